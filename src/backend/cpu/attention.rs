//! Attention over the pages of a cache.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub mod bf16;
#[cfg(target_arch = "x86_64")]
pub mod groups;

use super::simd::{E4M3, Isa, dot, exp, fma, versions};
use crate::backend::StepInputs;
use crate::ops::attention::Pages;
use crate::ops::cells::Cells;

/// Writes a step's keys (or values) `[T, kv * D]` to their pages.
pub fn append(inputs: &StepInputs, pages: Pages, rows: &super::Buffer, cache: &mut Cells) {
    for sequence in &inputs.sequences {
        let blocks = inputs.blocks_of(sequence);
        for i in 0..sequence.count as usize {
            let row = rows.row(sequence.first as usize + i);
            for (head, values) in row.chunks_exact(pages.head_dim).enumerate() {
                cache.write(pages.offset(blocks, sequence.past as usize + i, head), values);
            }
        }
    }
}

/// `len` numbers from `from` on: where they are if they are f32, else decoded into `page`.
fn read<'a>(isa: Isa, cache: &'a Cells, from: usize, len: usize, page: &'a mut [f32]) -> &'a [f32] {
    if let Cells::F32(cells) = cache {
        return &cells[from..][..len];
    }
    let page = &mut page[..len];
    decode(isa, cache, from, page);
    page
}

#[inline(always)]
fn decode_body<const FMA: bool>(cache: &Cells, from: usize, page: &mut [f32]) {
    match cache {
        Cells::F32(_) | Cells::F16(_) => cache.read(from, page),
        Cells::Bf16(cells) => {
            for (out, cell) in page.iter_mut().zip(&cells[from..]) {
                *out = f32::from_bits(u32::from(cell.to_bits()) << 16);
            }
        }
        Cells::Fp8(cells) => {
            for (out, &cell) in page.iter_mut().zip(&cells[from..]) {
                *out = E4M3[usize::from(cell)];
            }
        }
    }
}

versions! {
    fn decode = decode_body(cache: &Cells, from: usize, page: &mut [f32])
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

/// scores[i] = query · keys[i] · scale; `max` becomes the largest of all.
#[inline(always)]
fn score_body<const FMA: bool>(query: &[f32], keys: &[f32], scale: f32, max: &mut f32, scores: &mut [f32]) {
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(query.len())) {
        *score = dot::<FMA>(query, key) * scale;
        *max = max.max(*score);
    }
}

versions! {
    fn score_any = score_body(query: &[f32], keys: &[f32], scale: f32, max: &mut f32, scores: &mut [f32])
}

/// `out` gains the sum of `values` weighted by e to the power of score - `max`; `total` gains the weights.
#[inline(always)]
fn mix_body<const FMA: bool>(scores: &mut [f32], max: f32, total: &mut f32, values: &[f32], out: &mut [f32]) {
    for (&mut score, value) in scores.iter_mut().zip(values.chunks_exact(out.len())) {
        let weight = exp::<FMA>(score - max);
        *total += weight;
        for (out, &v) in out.iter_mut().zip(value) {
            *out = fma::<FMA>(weight, v, *out);
        }
    }
}

versions! {
    fn mix_any = mix_body(scores: &mut [f32], max: f32, total: &mut f32, values: &[f32], out: &mut [f32])
}

fn score(isa: Isa, query: &[f32], keys: &[f32], scale: f32, max: &mut f32, scores: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && query.len() == avx512::DIM {
        *max = avx512::score(query, keys, scale, *max, scores);
        return;
    }
    score_any(isa, query, keys, scale, max, scores);
}

fn mix(isa: Isa, scores: &mut [f32], max: f32, total: &mut f32, values: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && out.len() == avx512::DIM {
        *total = avx512::mix(scores, max, *total, values, out);
        return;
    }
    mix_any(isa, scores, max, total, values, out);
}

/// One head of one query over `scores.len()` positions of its sequence. `page` [block_len * D] is scratch.
pub fn attend(
    isa: Isa,
    view: View<'_>,
    kv_head: usize,
    query: &[f32],
    keys: &Cells,
    values: &Cells,
    page: &mut [f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = view.pages.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut max = f32::NEG_INFINITY;
    let mut done = 0;
    for (offset, run) in view.runs(kv_head, scores.len()) {
        let keys = read(isa, keys, offset, run * dim, page);
        score(isa, query, keys, scale, &mut max, &mut scores[done..][..run]);
        done += run;
    }
    out.fill(0.0);
    let mut total = 0.0;
    done = 0;
    for (offset, run) in view.runs(kv_head, scores.len()) {
        let values = read(isa, values, offset, run * dim, page);
        mix(isa, &mut scores[done..][..run], max, &mut total, values, out);
        done += run;
    }
    let inverse = 1.0 / total;
    for out in out.iter_mut() {
        *out *= inverse;
    }
}
