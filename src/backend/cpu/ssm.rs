//! The recurrence of a Mamba layer, by heads.
//!
//! A row of the state is read once and written once per block of tokens, whatever becomes of them: replayed
//! drafts, certain tokens and drafts differ only in whether their result is read and the state after them kept.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::simd::{Isa, Output, fma, reduce, versions};
use crate::backend::{Save, SequenceInputs};
use crate::model::config::Mamba;
use crate::ops::cells::{Cells, Rounding};
use crate::ops::lanes::Lanes;
use crate::ops::ssm;

/// Tokens that pass over a row of a state while it is in registers.
const BLOCK: usize = 16;

/// What one token does to one head, and where its result goes.
#[derive(Clone, Copy)]
struct Token<'a> {
    /// [P]
    x: &'a [f32],
    /// [N]
    b: &'a [f32],
    /// [N]
    c: &'a [f32],
    dt: f32,
    decay: f32,
    /// In the sequence.
    position: u32,
    /// Row of the output.
    row: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy)]
struct Block<'a> {
    tokens: &'a [Token<'a>],
    /// The first so many are replayed: nobody reads their result.
    replayed: usize,
    /// The state is kept as it is after so many of them.
    kept: usize,
}

/// What is one head's own: its index and its constants.
#[derive(Clone, Copy)]
struct Head {
    index: usize,
    /// A, negative.
    rate: f32,
    d: f32,
    dt_bias: f32,
    /// The Mamba layer, if its state is rounded after every token.
    rounded: Option<u32>,
}

/// `state` [P, N]: row by row, every token of the block. `row` [N] is scratch.
#[inline(always)]
fn advance_body<const FMA: bool>(
    head: Head,
    block: Block<'_>,
    state: &mut [f32],
    row: &mut [f32],
    output: Output,
) {
    for (p, state) in state.chunks_exact_mut(row.len()).enumerate() {
        row.copy_from_slice(state);
        for (i, token) in block.tokens.iter().enumerate() {
            let x = token.x[p];
            let y = advance_row::<FMA>(token, token.dt * x, row);
            if let Some(layer) = head.rounded {
                let rounding = Rounding::new(token.position, layer, head.index as u32);
                for (j, value) in row.iter_mut().enumerate() {
                    *value = rounding.apply((p * state.len() + j) as u32, *value);
                }
            }
            if i >= block.replayed {
                // SAFETY: the caller owns this head's columns of the output.
                let out = unsafe { output.slice(token.row, head.index * token.x.len() + p, 1) };
                out[0] = fma::<FMA>(head.d, x, y);
            }
            if i + 1 == block.kept {
                state.copy_from_slice(row);
            }
        }
    }
}

/// One row of a state and one token; returns the product with C.
#[inline(always)]
fn advance_row<const FMA: bool>(token: &Token<'_>, input: f32, row: &mut [f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let mut s16 = row.chunks_exact_mut(16);
    let (mut b16, mut c16) = (token.b.chunks_exact(16), token.c.chunks_exact(16));
    for ((s, b), c) in s16.by_ref().zip(b16.by_ref()).zip(c16.by_ref()) {
        for l in 0..16 {
            s[l] = fma::<FMA>(s[l], token.decay, input * b[l]);
            lanes[l] = fma::<FMA>(s[l], c[l], lanes[l]);
        }
    }
    let mut y = reduce(lanes);
    let rest = s16.into_remainder().iter_mut().zip(b16.remainder()).zip(c16.remainder());
    for ((s, &b), &c) in rest {
        *s = fma::<FMA>(*s, token.decay, input * b);
        y = fma::<FMA>(*s, c, y);
    }
    y
}

versions! {
    fn advance_any = advance_body(head: Head, block: Block<'_>, state: &mut [f32], row: &mut [f32], output: Output)
}

/// Advances `state` [P, N] by the block; `row` [N] is scratch.
fn advance(isa: Isa, head: Head, block: Block<'_>, state: &mut [f32], row: &mut [f32], output: Output) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && head.rounded.is_none() && avx512::fits(state.len() / row.len(), row.len()) {
        return avx512::advance(head, block, state, output);
    }
    advance_any(isa, head, block, state, row, output);
}

/// [places * H, P * N], as they are kept.
#[derive(Clone, Copy)]
pub enum States {
    F32(Output),
    F16(Output<f16>),
}

impl States {
    /// `size` is that of one head.
    pub fn new(cells: &mut Cells, size: usize) -> Self {
        match cells {
            Cells::F32(cells) => States::F32(Output::new(cells, size)),
            Cells::F16(cells) => States::F16(Output::new(cells, size)),
            Cells::Bf16(_) | Cells::Fp8(_) => unreachable!("`SsmType` has no such state"),
        }
    }
}

/// The recurrence of one layer in a step, shared by the threads that split its heads.
#[derive(Clone, Copy)]
pub struct Scan<'a> {
    pub isa: Isa,
    pub shape: &'a Mamba,
    /// Among the Mamba layers.
    pub layer: usize,
    /// [T, 2d + 2GN + H]
    pub projected: &'a [f32],
    /// [T, c]
    pub xbc: &'a [f32],
    pub heads: ssm::Heads<'a>,
    pub lanes: &'a Lanes,
    pub states: States,
    /// [T, d]
    pub output: Output,
}

impl Scan<'_> {
    /// One head of one sequence: as `ops::ssm::reference`, but for the rows it leaves in the lane.
    /// `scratch` [(P + 1) * N] takes a row, and a state that is not kept as f32.
    ///
    /// # Safety
    /// No other thread may touch this head of the sequence's places and of its lane, and its columns of the output.
    pub unsafe fn run(&self, sequence: &SequenceInputs, saves: &[Save], head: usize, scratch: &mut [f32]) {
        let (row, scratch) = scratch.split_at_mut(self.shape.state_size);
        let scratch = &mut scratch[..self.shape.head_dim * self.shape.state_size];
        // SAFETY: passed on from the caller.
        unsafe {
            match self.states {
                States::F32(states) => self.run_in_place(states, sequence, saves, head, scratch, row),
                States::F16(states) => self.run_in_scratch(states, sequence, saves, head, scratch, row),
            }
        }
    }

    /// # Safety
    /// As for [`Scan::run`].
    unsafe fn run_in_place(
        &self,
        states: Output,
        sequence: &SequenceInputs,
        saves: &[Save],
        head: usize,
        scratch: &mut [f32],
        row: &mut [f32],
    ) {
        let at = |place: u32| place as usize * self.shape.heads + head;
        // SAFETY: passed on from the caller; the three places are apart.
        let place = |place: u32| unsafe { states.slice(at(place), 0, scratch.len()) };
        let head = self.head(head, None);
        let state = place(sequence.slot);
        if sequence.past == 0 {
            state.fill(0.0);
        } else if sequence.source != sequence.slot {
            state.copy_from_slice(place(sequence.source));
        }
        let mut done = 0;
        for save in saves {
            let end = sequence.replay + save.after;
            self.pass(sequence, head, (done, end), state, row);
            done = end;
            place(save.to).copy_from_slice(state);
        }
        let (certain, all) = (sequence.replay + sequence.certain(), sequence.replay + sequence.count);
        // Drafts go on from the last certain tokens in registers, where they fit, and are forgotten with them.
        let last = certain - (certain - done).min(BLOCK as u32);
        self.pass(sequence, head, (done, last), state, row);
        if (all - last) as usize <= BLOCK {
            self.block(sequence, head, (last, all), certain - last, state, row);
        } else {
            self.pass(sequence, head, (last, certain), state, row);
            scratch.copy_from_slice(state);
            self.pass(sequence, head, (certain, all), scratch, row);
        }
    }

    /// # Safety
    /// As for [`Scan::run`].
    unsafe fn run_in_scratch(
        &self,
        states: Output<f16>,
        sequence: &SequenceInputs,
        saves: &[Save],
        head: usize,
        state: &mut [f32],
        row: &mut [f32],
    ) {
        let (at, size) = (|place: u32| place as usize * self.shape.heads + head, state.len());
        // SAFETY: passed on from the caller.
        let place = |place: u32| unsafe { states.slice(at(place), 0, size) };
        let head = self.head(head, Some(self.layer as u32));
        match sequence.past {
            0 => state.fill(0.0),
            _ => place(sequence.source).convert_to_f32_slice(state),
        }
        let mut done = 0;
        for save in saves {
            let end = sequence.replay + save.after;
            self.pass(sequence, head, (done, end), state, row);
            done = end;
            place(save.to).convert_from_f32_slice(state);
        }
        let certain = sequence.replay + sequence.certain();
        self.pass(sequence, head, (done, certain), state, row);
        place(sequence.slot).convert_from_f32_slice(state);
        self.pass(sequence, head, (certain, sequence.replay + sequence.count), state, row);
    }

    fn head(&self, index: usize, rounded: Option<u32>) -> Head {
        let rate = -self.heads.a_log[index].exp();
        Head { index, rate, d: self.heads.d[index], dt_bias: self.heads.dt_bias[index], rounded }
    }

    /// Token `index` of the sequence, counted from the first that is replayed.
    fn token(&self, sequence: &SequenceInputs, head: Head, index: u32) -> Token<'_> {
        let &Mamba { heads, head_dim: p, state_size: n, groups, .. } = self.shape;
        let (d, c) = (self.shape.inner(), self.shape.conv_channels());
        let row = (sequence.first + index.saturating_sub(sequence.replay)) as usize;
        let (xbc, raw) = if index < sequence.replay {
            let row = sequence.lane as usize * self.lanes.drafts + index as usize;
            (&self.lanes.xbc[row * c..][..c], self.lanes.dt[row * heads + head.index])
        } else {
            let raw = self.projected[(row + 1) * self.shape.projection() - heads + head.index];
            (&self.xbc[row * c..][..c], raw)
        };
        let group = head.index / (heads / groups);
        let dt = ssm::step_size(raw, head.dt_bias, self.shape.dt_limit);
        Token {
            x: &xbc[head.index * p..][..p],
            b: &xbc[d + group * n..][..n],
            c: &xbc[d + (groups + group) * n..][..n],
            dt,
            decay: (dt * head.rate).exp(),
            position: sequence.past - sequence.replay + index,
            row,
        }
    }

    /// Advances `state` by the tokens `from..to`, counted from the first that is replayed.
    fn pass(
        &self,
        sequence: &SequenceInputs,
        head: Head,
        (from, to): (u32, u32),
        state: &mut [f32],
        row: &mut [f32],
    ) {
        for from in (from..to).step_by(BLOCK) {
            let to = to.min(from + BLOCK as u32);
            self.block(sequence, head, (from, to), to - from, state, row);
        }
    }

    /// As [`Scan::pass`] for at most [`BLOCK`] tokens, of which the first `kept` advance the state.
    fn block(
        &self,
        sequence: &SequenceInputs,
        head: Head,
        (from, to): (u32, u32),
        kept: u32,
        state: &mut [f32],
        row: &mut [f32],
    ) {
        if from == to {
            return;
        }
        let mut tokens = [self.token(sequence, head, from); BLOCK];
        let count = (to - from) as usize;
        for (token, index) in tokens[..count].iter_mut().zip(from..to).skip(1) {
            *token = self.token(sequence, head, index);
        }
        let replayed = sequence.replay.saturating_sub(from) as usize;
        let block = Block { tokens: &tokens[..count], replayed, kept: kept as usize };
        advance(self.isa, head, block, state, row, self.output);
    }
}
