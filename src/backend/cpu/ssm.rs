//! The recurrence of a Mamba layer, by heads.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::simd::{Isa, Output, fma, reduce, versions};
use crate::backend::{Save, SequenceInputs};
use crate::model::config::Mamba;
use crate::ops::cells::{Cells, Rounding};
use crate::ops::lanes::Lanes;
use crate::ops::ssm;

/// What advances a state: consecutive tokens of one sequence, in a step or in a lane.
#[derive(Clone, Copy)]
struct Rows<'a> {
    /// [count, c], convolved.
    xbc: &'a [f32],
    /// Raw dt, `[., H]` at the end of rows of `stride`.
    dt: &'a [f32],
    stride: usize,
    /// Of the first of them in the sequence.
    position: u32,
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

impl Head {
    /// dt and decay of the token at `row`.
    #[inline(always)]
    fn step(&self, shape: &Mamba, rows: Rows<'_>, row: usize) -> (f32, f32) {
        let raw = rows.dt[(row + 1) * rows.stride - shape.heads + self.index];
        let dt = ssm::step_size(raw, self.dt_bias, shape.dt_limit);
        (dt, (dt * self.rate).exp())
    }

    /// What is left to do with a state after the token at `position`.
    #[inline(always)]
    fn settle(&self, position: u32, state: &mut [f32]) {
        let Some(layer) = self.rounded else { return };
        let rounding = Rounding::new(position, layer, self.index as u32);
        for (element, value) in state.iter_mut().enumerate() {
            *value = rounding.apply(element as u32, *value);
        }
    }
}

/// Advances `state` [P, N] by `count` tokens; `output`, row `first` on, receives their results.
#[inline(always)]
fn scan_body<const FMA: bool>(
    shape: &Mamba,
    head: Head,
    rows: Rows<'_>,
    count: usize,
    state: &mut [f32],
    output: Output,
    first: usize,
) {
    let &Mamba { head_dim: p, state_size: n, groups, .. } = shape;
    let (d, c) = (shape.inner(), shape.conv_channels());
    let group = head.index / (shape.heads / groups);
    for token in 0..count {
        let row = &rows.xbc[token * c..][..c];
        let b = &row[d + group * n..][..n];
        let cc = &row[d + (groups + group) * n..][..n];
        let (dt, decay) = head.step(shape, rows, token);
        // SAFETY: the caller owns this head's columns of the output.
        let out = unsafe { output.slice(first + token, head.index * p, p) };
        for ((out, &x), s) in out.iter_mut().zip(&row[head.index * p..]).zip(state.chunks_exact_mut(n)) {
            let input = dt * x;
            let mut lanes = [0.0f32; 16];
            let (mut s16, mut b16, mut c16) =
                (s.chunks_exact_mut(16), b.chunks_exact(16), cc.chunks_exact(16));
            for ((s, b), c) in s16.by_ref().zip(b16.by_ref()).zip(c16.by_ref()) {
                for l in 0..16 {
                    s[l] = fma::<FMA>(s[l], decay, input * b[l]);
                    lanes[l] = fma::<FMA>(s[l], c[l], lanes[l]);
                }
            }
            let mut y = reduce(lanes);
            let rest = s16.into_remainder().iter_mut().zip(b16.remainder()).zip(c16.remainder());
            for ((s, &b), &c) in rest {
                *s = fma::<FMA>(*s, decay, input * b);
                y = fma::<FMA>(*s, c, y);
            }
            *out = fma::<FMA>(head.d, x, y);
        }
        head.settle(rows.position + token as u32, state);
    }
}

versions! {
    fn scan = scan_body(
        shape: &Mamba,
        head: Head,
        rows: Rows<'_>,
        count: usize,
        state: &mut [f32],
        output: Output,
        first: usize,
    )
}

/// The state half of [`scan`], operation for operation, so that a replayed token leaves the bits it would have left.
#[inline(always)]
fn replay_body<const FMA: bool>(shape: &Mamba, head: Head, rows: Rows<'_>, count: usize, state: &mut [f32]) {
    let &Mamba { head_dim: p, state_size: n, groups, .. } = shape;
    let (d, c) = (shape.inner(), shape.conv_channels());
    let group = head.index / (shape.heads / groups);
    for token in 0..count {
        let row = &rows.xbc[token * c..][..c];
        let b = &row[d + group * n..][..n];
        let (dt, decay) = head.step(shape, rows, token);
        for (&x, s) in row[head.index * p..].iter().zip(state.chunks_exact_mut(n)) {
            let input = dt * x;
            for (s, &b) in s.iter_mut().zip(b) {
                *s = fma::<FMA>(*s, decay, input * b);
            }
        }
        head.settle(rows.position + token as u32, state);
    }
}

versions! {
    fn replay = replay_body(shape: &Mamba, head: Head, rows: Rows<'_>, count: usize, state: &mut [f32])
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
    /// `scratch` [P * N] takes the state that drafts advance.
    ///
    /// # Safety
    /// No other thread may touch this head of the sequence's places and of its lane, and its columns of the output.
    pub unsafe fn run(&self, sequence: &SequenceInputs, saves: &[Save], head: usize, scratch: &mut [f32]) {
        let scratch = &mut scratch[..self.shape.head_dim * self.shape.state_size];
        // SAFETY: passed on from the caller.
        unsafe {
            match self.states {
                States::F32(states) => self.run_in_place(states, sequence, saves, head, scratch),
                States::F16(states) => self.run_in_scratch(states, sequence, saves, head, scratch),
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
    ) {
        let row = |place: u32| place as usize * self.shape.heads + head;
        // SAFETY: passed on from the caller; the three places are apart.
        let place = |place: u32| unsafe { states.slice(row(place), 0, scratch.len()) };
        let head = self.head(head, None);
        let state = place(sequence.slot);
        if sequence.past == 0 {
            state.fill(0.0);
        } else if sequence.source != sequence.slot {
            state.copy_from_slice(place(sequence.source));
        }
        self.replay(sequence, head, state);
        let mut done = 0;
        for save in saves {
            self.scan(sequence, head, (done, save.after), state);
            done = save.after;
            place(save.to).copy_from_slice(state);
        }
        self.scan(sequence, head, (done, sequence.certain()), state);
        if sequence.drafts > 0 {
            scratch.copy_from_slice(state);
            self.scan(sequence, head, (sequence.certain(), sequence.count), scratch);
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
    ) {
        let (row, size) = (|place: u32| place as usize * self.shape.heads + head, state.len());
        // SAFETY: passed on from the caller.
        let place = |place: u32| unsafe { states.slice(row(place), 0, size) };
        let head = self.head(head, Some(self.layer as u32));
        match sequence.past {
            0 => state.fill(0.0),
            _ => place(sequence.source).convert_to_f32_slice(state),
        }
        self.replay(sequence, head, state);
        let mut done = 0;
        for save in saves {
            self.scan(sequence, head, (done, save.after), state);
            done = save.after;
            place(save.to).convert_from_f32_slice(state);
        }
        self.scan(sequence, head, (done, sequence.certain()), state);
        place(sequence.slot).convert_from_f32_slice(state);
        self.scan(sequence, head, (sequence.certain(), sequence.count), state);
    }

    fn head(&self, index: usize, rounded: Option<u32>) -> Head {
        let rate = -self.heads.a_log[index].exp();
        Head { index, rate, d: self.heads.d[index], dt_bias: self.heads.dt_bias[index], rounded }
    }

    /// Advances `state` by the accepted drafts in the lane.
    fn replay(&self, sequence: &SequenceInputs, head: Head, state: &mut [f32]) {
        if sequence.replay == 0 {
            return;
        }
        let row = sequence.lane as usize * self.lanes.drafts;
        let rows = Rows {
            xbc: &self.lanes.xbc[row * self.shape.conv_channels()..],
            dt: &self.lanes.dt[row * self.shape.heads..],
            stride: self.shape.heads,
            position: sequence.past - sequence.replay,
        };
        replay(self.isa, self.shape, head, rows, sequence.replay as usize, state);
    }

    /// Advances `state` by the tokens `from..to` of the sequence in this step.
    fn scan(&self, sequence: &SequenceInputs, head: Head, (from, to): (u32, u32), state: &mut [f32]) {
        let first = (sequence.first + from) as usize;
        let rows = Rows {
            xbc: &self.xbc[first * self.shape.conv_channels()..],
            dt: &self.projected[first * self.shape.projection()..],
            stride: self.shape.projection(),
            position: sequence.past + from,
        };
        scan(self.isa, self.shape, head, rows, (to - from) as usize, state, self.output, first);
    }
}
