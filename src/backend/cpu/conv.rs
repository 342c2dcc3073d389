//! The causal convolution of a Mamba layer, by channels.

use super::Precision;
use super::simd::{Isa, Output, fma, silu, versions};
use crate::backend::{Save, SequenceInputs};
use crate::model::config::Mamba;

/// Channels of a row convolved at once; a tail shorter than the taps reads zeros from here.
const CHANNELS: usize = 256;
static ZEROS: [f32; CHANNELS] = [0.0; CHANNELS];
/// Taps of a convolution at most; every release has 4.
pub const TAPS: usize = 8;

/// One row of channels: `sources` holds each tap's inputs, oldest first, `weights` what they are multiplied with.
#[inline(always)]
fn row_body<const FMA: bool>(sources: &[&[f32]], weights: &[&[f32]], bias: &[f32], out: &mut [f32]) {
    let count = out.len();
    if let ([a, b, c, d], [wa, wb, wc, wd]) = (sources, weights) {
        let (a, b, c, d, bias) = (&a[..count], &b[..count], &c[..count], &d[..count], &bias[..count]);
        let (wa, wb, wc, wd) = (&wa[..count], &wb[..count], &wc[..count], &wd[..count]);
        for k in 0..count {
            let early = fma::<FMA>(wa[k], a[k], bias[k]);
            let early = fma::<FMA>(wb[k], b[k], early);
            let late = fma::<FMA>(wc[k], c[k], early);
            out[k] = silu::<FMA>(fma::<FMA>(wd[k], d[k], late));
        }
        return;
    }
    out.copy_from_slice(&bias[..count]);
    for (source, weights) in sources.iter().zip(weights) {
        for ((out, &x), &weight) in out.iter_mut().zip(*source).zip(*weights) {
            *out = fma::<FMA>(weight, x, *out);
        }
    }
    for out in out.iter_mut() {
        *out = silu::<FMA>(*out);
    }
}

versions! {
    fn row = row_body(sources: &[&[f32]], weights: &[&[f32]], bias: &[f32], out: &mut [f32])
}

/// One convolution of a step, shared by the threads that split its channels.
#[derive(Clone, Copy)]
pub struct Conv<'a> {
    pub isa: Isa,
    pub precision: Precision,
    pub shape: &'a Mamba,
    /// [T, 2d + 2GN + H]
    pub projected: &'a [f32],
    /// [K, c]
    pub weight: &'a [f32],
    /// [c]
    pub bias: &'a [f32],
    /// [places * (K-1), c]
    pub tails: Output,
    /// [lanes * drafts, c]: raw rows.
    pub lanes: Output,
    /// Rows of one lane.
    pub drafts: usize,
    /// [T, c]
    pub output: Output,
}

impl Conv<'_> {
    /// Channels `from..to` of one sequence: as `ops::conv::reference`.
    ///
    /// # Safety
    /// No other thread may touch these channels of the tails, the lanes and the output meanwhile.
    pub unsafe fn run(&self, sequence: &SequenceInputs, saves: &[Save], (from, to): (usize, usize)) {
        let kept = self.shape.conv_kernel - 1;
        let (first, certain) = (sequence.first as usize, sequence.certain() as usize);
        for from in (from..to).step_by(CHANNELS) {
            let width = CHANNELS.min(to - from);
            let mut weights: [&[f32]; TAPS] = [&[]; TAPS];
            for (tap, weights) in weights[..=kept].iter_mut().enumerate() {
                *weights = &self.weight[tap * self.shape.conv_channels() + from..];
            }
            for token in 0..sequence.count as usize {
                let mut sources: [&[f32]; TAPS] = [&ZEROS[..width]; TAPS];
                for (tap, source) in sources[..=kept].iter_mut().enumerate() {
                    // SAFETY: passed on from the caller.
                    *source = unsafe { self.raw(sequence, token + tap, from, width) };
                }
                // SAFETY: passed on from the caller.
                let out = unsafe { self.output.slice(first + token, from, width) };
                row(self.isa, &sources[..=kept], &weights[..=kept], &self.bias[from..], out);
                self.precision.round(out);
            }
            // Saves come first: the tail at `source` is still what it was.
            for save in saves {
                // SAFETY: passed on from the caller.
                unsafe { self.keep(sequence, save.to, save.after as usize, from, width) };
            }
            // SAFETY: passed on from the caller.
            unsafe { self.keep(sequence, sequence.slot, certain, from, width) };
            // Replayed rows were read above, so their lane is free for the drafts of this step.
            for draft in 0..sequence.drafts as usize {
                let row = sequence.lane as usize * self.drafts + draft;
                // SAFETY: passed on from the caller; rows of this step are not rows of a lane.
                unsafe {
                    let raw = self.raw(sequence, kept + certain + draft, from, width);
                    self.lanes.slice(row, from, width).copy_from_slice(raw);
                }
            }
        }
    }

    /// Raw inputs in the order of their tokens, counted from the oldest that the first token of this step sees: zeros
    /// before the start, the tail, replayed drafts, this step.
    ///
    /// # Safety
    /// As for [`Conv::run`].
    unsafe fn raw<'a>(
        &'a self,
        sequence: &SequenceInputs,
        index: usize,
        from: usize,
        width: usize,
    ) -> &'a [f32] {
        let (kept, replay) = (self.shape.conv_kernel - 1, sequence.replay as usize);
        let index = index + replay;
        if let Some(token) = index.checked_sub(kept + replay) {
            let row = (sequence.first as usize + token) * self.shape.projection();
            &self.projected[row + self.shape.inner() + from..][..width]
        } else if let Some(draft) = index.checked_sub(kept) {
            // SAFETY: passed on from the caller.
            unsafe { self.lanes.slice(sequence.lane as usize * self.drafts + draft, from, width) }
        } else if sequence.past == 0 {
            &ZEROS[..width]
        } else {
            // SAFETY: passed on from the caller.
            unsafe { self.tails.slice(sequence.source as usize * kept + index, from, width) }
        }
    }

    /// Writes the tail after the first `count` tokens of the step to `place`.
    ///
    /// # Safety
    /// As for [`Conv::run`].
    unsafe fn keep(&self, sequence: &SequenceInputs, place: u32, count: usize, from: usize, width: usize) {
        let kept = self.shape.conv_kernel - 1;
        for row in 0..kept {
            // SAFETY: passed on from the caller. Where place and source are one, the row that is read is a later one
            // than the row that is written, because count is at least 1.
            unsafe {
                let raw = self.raw(sequence, count + row, from, width);
                self.tails.slice(place as usize * kept + row, from, width).copy_from_slice(raw);
            }
        }
    }
}
