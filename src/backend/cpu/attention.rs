//! Attention over the pages of a cache.

use super::simd::{E4M3, dot, exp, fma, versions};
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
#[inline(always)]
fn read<'a>(cache: &'a Cells, from: usize, len: usize, page: &'a mut [f32]) -> &'a [f32] {
    let page = match cache {
        Cells::F32(cells) => return &cells[from..][..len],
        _ => &mut page[..len],
    };
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
    page
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
        let keys = read(keys, offset, run * dim, page);
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
        let values = read(values, offset, run * dim, page);
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
    /// One head of one query over `scores.len()` positions of its sequence. `page` [block_len * D] is scratch.
    pub fn attend = attend_body(
        view: View<'_>,
        kv_head: usize,
        query: &[f32],
        keys: &Cells,
        values: &Cells,
        page: &mut [f32],
        scores: &mut [f32],
        out: &mut [f32],
    )
}
