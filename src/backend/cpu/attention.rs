//! Attention over the pages of a cache.

use super::Precision;
use super::simd::{dot, exp, fma, versions};
use crate::backend::StepInputs;
use crate::ops::attention::Pages;

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
        let blocks = inputs.blocks_of(sequence);
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

/// The positions one query sees, from `from` on.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub pages: Pages,
    /// The sequence's block table.
    pub blocks: &'a [u32],
    pub from: usize,
}

impl View<'_> {
    /// Splits `count` positions where blocks end: offset of the first vector of one head in the pages, and how many
    /// follow it there.
    #[inline(always)]
    fn runs(self, kv_head: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
        let end = self.from + count;
        let mut position = self.from;
        std::iter::from_fn(move || {
            if position == end {
                return None;
            }
            let offset = self.pages.offset(self.blocks, position, kv_head);
            let next = (position / self.pages.block_len + 1) * self.pages.block_len;
            let run = next.min(end) - position;
            position += run;
            Some((offset, run))
        })
    }
}

#[inline(always)]
fn attend_body<const FMA: bool>(
    view: View<'_>,
    kv_head: usize,
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = view.pages.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut max = f32::NEG_INFINITY;
    let mut done = 0;
    for (offset, run) in view.runs(kv_head, scores.len()) {
        let keys = &keys[offset..][..run * dim];
        for (score, key) in scores[done..].iter_mut().zip(keys.chunks_exact(dim)) {
            *score = dot::<FMA>(query, key) * scale;
            max = max.max(*score);
        }
        done += run;
    }
    out.fill(0.0);
    let mut total = 0.0;
    done = 0;
    for (offset, run) in view.runs(kv_head, scores.len()) {
        let values = &values[offset..][..run * dim];
        for (&score, value) in scores[done..].iter().zip(values.chunks_exact(dim)) {
            let weight = exp::<FMA>(score - max);
            total += weight;
            for (out, &v) in out.iter_mut().zip(value) {
                *out = fma::<FMA>(weight, v, *out);
            }
        }
        done += run;
    }
    let inverse = 1.0 / total;
    for out in out.iter_mut() {
        *out *= inverse;
    }
}

versions! {
    /// One head of one query over `scores.len()` positions of its sequence.
    pub fn attend = attend_body(
        view: View<'_>,
        kv_head: usize,
        query: &[f32],
        keys: &[f32],
        values: &[f32],
        scores: &mut [f32],
        out: &mut [f32],
    )
}
