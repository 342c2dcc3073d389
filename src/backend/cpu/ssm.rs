//! The recurrence of a Mamba layer, by heads.

use super::simd::{Isa, Output, fma, reduce, versions};
use crate::backend::{Save, SequenceInputs};
use crate::model::config::Mamba;
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
}

impl Rows<'_> {
    fn from(self, token: usize, shape: &Mamba) -> Self {
        Rows {
            xbc: &self.xbc[token * shape.conv_channels()..],
            dt: &self.dt[token * self.stride..],
            stride: self.stride,
        }
    }
}

/// What is one head's own: its index and its constants.
#[derive(Clone, Copy)]
struct Head {
    index: usize,
    /// A, negative.
    rate: f32,
    d: f32,
    dt_bias: f32,
}

impl Head {
    /// dt and decay of the token at `row`.
    #[inline(always)]
    fn step(&self, shape: &Mamba, rows: Rows<'_>, row: usize) -> (f32, f32) {
        let raw = rows.dt[(row + 1) * rows.stride - shape.heads + self.index];
        let dt = ssm::step_size(raw, self.dt_bias, shape.dt_limit);
        (dt, (dt * self.rate).exp())
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
    }
}

versions! {
    fn replay = replay_body(shape: &Mamba, head: Head, rows: Rows<'_>, count: usize, state: &mut [f32])
}

/// The recurrence of one layer in a step, shared by the threads that split its heads.
#[derive(Clone, Copy)]
pub struct Scan<'a> {
    pub isa: Isa,
    pub shape: &'a Mamba,
    /// [T, 2d + 2GN + H]
    pub projected: &'a [f32],
    /// [T, c]
    pub xbc: &'a [f32],
    pub heads: ssm::Heads<'a>,
    pub lanes: &'a Lanes,
    /// [places * H, P * N]
    pub states: Output,
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
        let Scan { isa, shape, heads, .. } = *self;
        let size = shape.head_dim * shape.state_size;
        // SAFETY: passed on from the caller.
        let place = |place: u32| unsafe { self.states.slice(place as usize * shape.heads + head, 0, size) };
        let head = Head {
            index: head,
            rate: -heads.a_log[head].exp(),
            d: heads.d[head],
            dt_bias: heads.dt_bias[head],
        };
        let state = place(sequence.slot);
        if sequence.past == 0 {
            state.fill(0.0);
        } else if sequence.source != sequence.slot {
            state.copy_from_slice(place(sequence.source));
        }
        if sequence.replay > 0 {
            replay(isa, shape, head, self.lane(sequence), sequence.replay as usize, state);
        }
        let (first, certain) = (sequence.first as usize, sequence.certain() as usize);
        let rows = Rows { xbc: self.xbc, dt: self.projected, stride: shape.projection() };
        let run = |from: usize, to: usize, state: &mut [f32]| {
            let token = first + from;
            scan(isa, shape, head, rows.from(token, shape), to - from, state, self.output, token);
        };
        let mut done = 0;
        for save in saves {
            run(done, save.after as usize, state);
            done = save.after as usize;
            place(save.to).copy_from_slice(state);
        }
        run(done, certain, state);
        if sequence.drafts > 0 {
            let scratch = &mut scratch[..size];
            scratch.copy_from_slice(state);
            run(certain, sequence.count as usize, scratch);
        }
    }

    fn lane(&self, sequence: &SequenceInputs) -> Rows<'_> {
        let row = sequence.lane as usize * self.lanes.drafts;
        Rows { xbc: &self.lanes.xbc, dt: &self.lanes.dt, stride: self.shape.heads }.from(row, self.shape)
    }
}
