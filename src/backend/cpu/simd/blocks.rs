//! The product over GGUF's blocks: a span of a few rows is decoded into the L1 cache and multiplied from there.
//!
//! Every (row, token) pair has the 16 running sums of [`super::tile`] in the same order, so its bits depend neither on
//! how many tokens share the step nor on which of the two loops below served it.

#[cfg(target_arch = "x86_64")]
mod avx512;

use super::place::Place;
use super::{Isa, ROWS, Rows, Sums, Tokens, bytes_of, fma, reduce, token_tiles, versions};
use crate::weights::blocks::{Blocks, LONGEST};
use crate::weights::{Format, Linear};

/// Rows whose spans are decoded together: their sums do not wait for each other.
const TOGETHER: usize = 4;

/// Tokens up to which spans are decoded again for every tile of 4: a decoded row of its whole width leaves the nearest
/// cache, so it must serve several tiles.
const SPANS: usize = 4;

/// A weight in blocks, rows one after the other.
#[derive(Clone, Copy)]
pub struct BlockRows<'a> {
    blocks: Blocks,
    data: &'a [u8],
    /// Weights and bytes of a row.
    width: usize,
    bytes: usize,
}

impl<'a> BlockRows<'a> {
    /// `None` for a weight in another format.
    pub fn of(weight: &'a Linear) -> Option<Self> {
        match weight.format {
            Format::Blocks { blocks, .. } => {
                let bytes = blocks.bytes_of(weight.cols);
                Some(BlockRows { blocks, data: &weight.data, width: weight.cols, bytes })
            }
            _ => None,
        }
    }

    /// Blocks of row `row` that hold weights `from..to`, multiples of the block's length.
    #[inline(always)]
    fn span(&self, row: usize, from: usize, to: usize) -> &'a [u8] {
        let start = row * self.bytes;
        &self.data[start + self.blocks.bytes_of(from)..start + self.blocks.bytes_of(to)]
    }
}

/// As [`super::rows`], for a weight in blocks with `scale` for all of it. `scratch` [4 * cols].
pub fn rows(
    isa: Isa,
    weight: BlockRows<'_>,
    scale: f32,
    (from, to): (usize, usize),
    tokens: Tokens<'_>,
    scratch: &mut [f32],
    place: Place<'_>,
) {
    let width = weight.width;
    if tokens.count > SPANS {
        for r in (from..to).step_by(TOGETHER) {
            let count = TOGETHER.min(to - r);
            let scratch = &mut scratch[..count * width];
            decode(isa, weight, r, scratch);
            let decoded = Rows::F32(bytes_of(scratch));
            token_tiles(isa, &decoded, scale, (0, r), count, width, tokens, place);
        }
        return;
    }
    let mut x = [tokens.row(0, width); SPANS];
    for (i, x) in x.iter_mut().enumerate().take(tokens.count).skip(1) {
        *x = tokens.row(i, width);
    }
    let mut sums = [[0.0; ROWS]; 4];
    for r in (from..to).step_by(ROWS) {
        let count = ROWS.min(to - r);
        tile(isa, weight, r, count, &x[..tokens.count], &mut sums);
        for (t, sums) in sums.iter_mut().enumerate().take(tokens.count) {
            sums.iter_mut().for_each(|sum| *sum *= scale);
            place.put(r, t, &mut sums[..count]);
        }
    }
}

#[inline(always)]
fn decode_body<const FMA: bool>(weight: BlockRows<'_>, first: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(weight.width).enumerate() {
        weight.blocks.decode(weight.span(first + i, 0, weight.width), out);
    }
}

/// Rows from `first` on as f32, as many as `out` has room for.
fn decode(isa: Isa, weight: BlockRows<'_>, first: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: `Isa::available` lists it only after the CPU reported its features.
        return unsafe { avx512::decode_rows(weight, first, out) };
    }
    decode_of(isa, weight, first, out);
}

versions! {
    /// As [`decode`], for the compiler to make vector code of.
    fn decode_of = decode_body(weight: BlockRows<'_>, first: usize, out: &mut [f32])
}

/// sums[j][i] = row (first + i) · x[j], for up to 16 rows and up to 4 tokens.
fn tile(isa: Isa, weight: BlockRows<'_>, first: usize, count: usize, x: &[&[f32]], sums: &mut Sums) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: `Isa::available` lists it only after the CPU reported its features.
        return unsafe { avx512::tile(weight, first, count, x, sums) };
    }
    tile_of(isa, weight, first, count, x, sums);
}

versions! {
    /// As [`tile`], for the compiler to make vector code of.
    fn tile_of = tile_body(weight: BlockRows<'_>, first: usize, count: usize, x: &[&[f32]], sums: &mut Sums)
}

#[inline(always)]
fn tile_body<const FMA: bool>(
    weight: BlockRows<'_>,
    first: usize,
    count: usize,
    x: &[&[f32]],
    sums: &mut Sums,
) {
    // The number of tokens is known to each of these loops, so that running sums stay in registers.
    match *x {
        [a] => few::<FMA, 1>(weight, first, count, [a], sums),
        [a, b] => few::<FMA, 2>(weight, first, count, [a, b], sums),
        [a, b, c] => few::<FMA, 3>(weight, first, count, [a, b, c], sums),
        [a, b, c, d] => few::<FMA, 4>(weight, first, count, [a, b, c, d], sums),
        _ => {}
    }
}

#[inline(always)]
fn few<const FMA: bool, const T: usize>(
    weight: BlockRows<'_>,
    first: usize,
    count: usize,
    x: [&[f32]; T],
    sums: &mut Sums,
) {
    let mut spans = [[0.0f32; LONGEST]; TOGETHER];
    for r in (0..count).step_by(TOGETHER) {
        let mut lanes = [[[0.0f32; 16]; T]; TOGETHER];
        let mut from = 0;
        while from < weight.width {
            let to = (from + LONGEST).min(weight.width);
            for (i, span) in spans.iter_mut().enumerate() {
                // Rows that are missing repeat the last one.
                let row = first + (r + i).min(count - 1);
                weight.blocks.decode(weight.span(row, from, to), span);
            }
            for k in (0..to - from).step_by(16) {
                for t in 0..T {
                    let (x, _) = x[t][from + k..].as_chunks::<16>();
                    for i in 0..TOGETHER {
                        let (w, _) = spans[i][k..].as_chunks::<16>();
                        for l in 0..16 {
                            lanes[i][t][l] = fma::<FMA>(w[0][l], x[0][l], lanes[i][t][l]);
                        }
                    }
                }
            }
            from = to;
        }
        for i in 0..TOGETHER.min(count - r) {
            for t in 0..T {
                sums[t][r + i] = reduce(lanes[i][t]);
            }
        }
    }
}
