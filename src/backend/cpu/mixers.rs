//! The vector loops of a step that are not products with a weight: norms, convolution, recurrence, attention.
//! One body each over 16 lanes, compiled for every instruction set.

use super::Precision;
use super::simd::{Isa, Output, exp, fma, reduce, silu, versions};
use crate::backend::{SequenceInputs, StepInputs};
use crate::model::config::Mamba;
use crate::ops::attention::Pages;
use crate::ops::ssm;

/// Sum of squares in 16 lanes.
#[inline(always)]
fn squares<const FMA: bool>(x: &[f32]) -> f32 {
    dot::<FMA>(x, x)
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (mut left, mut right) = (a.chunks_exact(16), b.chunks_exact(16));
    for (a, b) in left.by_ref().zip(right.by_ref()) {
        for l in 0..16 {
            lanes[l] = fma::<FMA>(a[l], b[l], lanes[l]);
        }
    }
    let mut sum = reduce(lanes);
    for (&a, &b) in left.remainder().iter().zip(right.remainder()) {
        sum = fma::<FMA>(a, b, sum);
    }
    sum
}

#[inline(always)]
fn rms_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (squares::<FMA>(x) / x.len() as f32 + eps).sqrt();
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

versions! {
    /// One row.
    pub fn rms_norm = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
}

#[inline(always)]
fn gated_norm_body<const FMA: bool>(z: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    for (y, &z) in y.iter_mut().zip(z) {
        *y *= silu::<FMA>(z);
    }
    let scale = 1.0 / (squares::<FMA>(y) / y.len() as f32 + eps).sqrt();
    for (y, &w) in y.iter_mut().zip(weight) {
        *y = *y * scale * w;
    }
}

versions! {
    /// One group of one row, in place.
    pub fn gated_norm = gated_norm_body(z: &[f32], weight: &[f32], eps: f32, y: &mut [f32])
}

/// Channels of a row convolved at once; a tail shorter than the taps reads zeros from here.
const CONV_CHANNELS: usize = 256;
static ZEROS: [f32; CONV_CHANNELS] = [0.0; CONV_CHANNELS];
/// Taps of a convolution at most; every release has 4.
pub const CONV_TAPS: usize = 8;

/// One row of channels: `sources` holds each tap's inputs, oldest first; `weight` [channels, taps].
#[inline(always)]
fn conv_row_body<const FMA: bool>(sources: &[&[f32]], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let count = out.len();
    if let [a, b, c, d] = *sources {
        let (a, b, c, d, bias) = (&a[..count], &b[..count], &c[..count], &d[..count], &bias[..count]);
        let weight = &weight[..4 * count];
        for k in 0..count {
            let early = fma::<FMA>(weight[4 * k], a[k], bias[k]);
            let early = fma::<FMA>(weight[4 * k + 1], b[k], early);
            let late = fma::<FMA>(weight[4 * k + 2], c[k], early);
            out[k] = fma::<FMA>(weight[4 * k + 3], d[k], late);
        }
    } else {
        out.copy_from_slice(&bias[..count]);
        for (tap, source) in sources.iter().enumerate() {
            for (k, (out, &x)) in out.iter_mut().zip(*source).enumerate() {
                *out = fma::<FMA>(weight[k * sources.len() + tap], x, *out);
            }
        }
    }
    for out in out.iter_mut() {
        *out = silu::<FMA>(*out);
    }
}

versions! {
    fn conv_row = conv_row_body(sources: &[&[f32]], weight: &[f32], bias: &[f32], out: &mut [f32])
}

/// Channels `from..to` of one sequence: as `ops::conv::reference`.
///
/// # Safety
/// No other thread may touch these channels of the tail (rows of `[slots * (K-1), c]`) and of the output.
pub unsafe fn conv(
    isa: Isa,
    shape: &Mamba,
    sequence: &SequenceInputs,
    projected: &[f32],
    (weight, bias): (&[f32], &[f32]),
    tail: Output,
    output: Output,
    (from, to): (usize, usize),
    precision: Precision,
) {
    let (taps, kept) = (shape.conv_kernel, shape.conv_kernel - 1);
    let (first, count) = (sequence.first as usize, sequence.count as usize);
    let slot = sequence.slot as usize * kept;
    for from in (from..to).step_by(CONV_CHANNELS) {
        let width = CONV_CHANNELS.min(to - from);
        let raw =
            |token: usize| &projected[(first + token) * shape.projection() + shape.inner() + from..][..width];
        for token in 0..count {
            let mut sources: [&[f32]; CONV_TAPS] = [&ZEROS[..width]; CONV_TAPS];
            for (tap, source) in sources[..taps].iter_mut().enumerate() {
                // The input `kept - tap` tokens back: of this step, of the tail, or zero before the start.
                match (token + tap).checked_sub(kept) {
                    Some(token) => *source = raw(token),
                    None if sequence.past == 0 => {}
                    // SAFETY: passed on from the caller; rows of the tail are only read here.
                    None => *source = unsafe { tail.slice(slot + token + tap, from, width) },
                }
            }
            // SAFETY: passed on from the caller.
            let out = unsafe { output.slice(first + token, from, width) };
            conv_row(isa, &sources[..taps], &weight[from * taps..], &bias[from..], out);
            precision.round(out);
        }
        for row in 0..kept {
            // The tail's row `row` is the raw input `kept - row` tokens before the next one.
            // SAFETY: passed on from the caller; source and target rows differ.
            let target = unsafe { tail.slice(slot + row, from, width) };
            match (count + row).checked_sub(kept) {
                Some(token) => target.copy_from_slice(raw(token)),
                None if sequence.past == 0 => target.fill(0.0),
                // SAFETY: as above: row + count > row.
                None => target.copy_from_slice(unsafe { tail.slice(slot + row + count, from, width) }),
            }
        }
    }
}

#[inline(always)]
fn ssm_body<const FMA: bool>(
    shape: &Mamba,
    sequence: &SequenceInputs,
    head: usize,
    projected: &[f32],
    xbc: &[f32],
    heads: ssm::Heads<'_>,
    state: &mut [f32],
    output: Output,
) {
    let &Mamba { head_dim: p, state_size: n, groups, .. } = shape;
    let (d, c) = (shape.inner(), shape.conv_channels());
    let group = head / (shape.heads / groups);
    let rate = -heads.a_log[head].exp();
    if sequence.past == 0 {
        state.fill(0.0);
    }
    for token in sequence.first as usize..(sequence.first + sequence.count) as usize {
        let row = &xbc[token * c..][..c];
        let b = &row[d + group * n..][..n];
        let cc = &row[d + (groups + group) * n..][..n];
        let raw = projected[token * shape.projection() + d + c + head];
        let dt = ssm::step_size(raw, heads.dt_bias[head], shape.dt_limit);
        let decay = (dt * rate).exp();
        // SAFETY: the caller owns this head's columns of the output.
        let out = unsafe { output.slice(token, head * p, p) };
        for ((out, &x), s) in out.iter_mut().zip(&row[head * p..]).zip(state.chunks_exact_mut(n)) {
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
            *out = fma::<FMA>(heads.d[head], x, y);
        }
    }
}

versions! {
    /// One head of one sequence over its tokens of the step; `state` [P, N] is that head's. As
    /// `ops::ssm::reference`.
    pub fn ssm = ssm_body(
        shape: &Mamba,
        sequence: &SequenceInputs,
        head: usize,
        projected: &[f32],
        xbc: &[f32],
        heads: ssm::Heads<'_>,
        state: &mut [f32],
        output: Output,
    )
}

/// Writes a step's keys (or values) `[T, kv * D]` to their pages.
pub fn append(
    inputs: &StepInputs,
    pages: Pages,
    rows: &super::Buffer,
    cache: &mut [f32],
    precision: Precision,
) {
    let dim = pages.head_dim;
    for sequence in &inputs.sequences {
        let blocks = &inputs.blocks[sequence.first_block as usize..][..sequence.block_count as usize];
        for i in 0..sequence.count as usize {
            let row = rows.row(sequence.first as usize + i);
            for (head, values) in row.chunks_exact(dim).enumerate() {
                let to = &mut cache[pages.offset(blocks, sequence.past as usize + i, head)..][..dim];
                to.copy_from_slice(values);
                precision.round(to);
            }
        }
    }
}

#[inline(always)]
fn attend_body<const FMA: bool>(
    pages: Pages,
    blocks: &[u32],
    kv_head: usize,
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = pages.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut max = f32::NEG_INFINITY;
    for (block, scores) in scores.chunks_mut(pages.block_len).enumerate() {
        let keys = &keys[pages.offset(blocks, block * pages.block_len, kv_head)..];
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(dim)) {
            *score = dot::<FMA>(query, key) * scale;
            max = max.max(*score);
        }
    }
    out.fill(0.0);
    let mut total = 0.0;
    for (block, scores) in scores.chunks(pages.block_len).enumerate() {
        let values = &values[pages.offset(blocks, block * pages.block_len, kv_head)..];
        for (&score, value) in scores.iter().zip(values.chunks_exact(dim)) {
            let weight = exp::<FMA>(score - max);
            total += weight;
            for (out, &v) in out.iter_mut().zip(value) {
                *out = fma::<FMA>(weight, v, *out);
            }
        }
    }
    let inverse = 1.0 / total;
    for out in out.iter_mut() {
        *out *= inverse;
    }
}

versions! {
    /// One head of one query over the first `scores.len()` positions of its sequence.
    pub fn attend = attend_body(
        pages: Pages,
        blocks: &[u32],
        kv_head: usize,
        query: &[f32],
        keys: &[f32],
        values: &[f32],
        scores: &mut [f32],
        out: &mut [f32],
    )
}
