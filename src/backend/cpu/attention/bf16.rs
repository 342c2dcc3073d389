//! Attention over BF16 pages with BF16 operands, heads 128 numbers wide: queries that share keys go over a page together.
//!
//! A query's scores, weights and sums are those of its own positions in their own order, whoever else is in its group.

#![allow(clippy::needless_range_loop, reason = "one index serves a register and its numbers in memory")]

use std::arch::x86_64::*;

use half::bf16;

use super::View;
use crate::backend::cpu::simd::{Isa, avx512::reduce, exp, narrow};

/// Queries of a group at most.
pub const QUERIES: usize = 16;
/// Numbers of a head.
pub const DIM: usize = 128;
/// Registers of a head in BF16, and in f32.
const NARROW: usize = DIM / 32;
const WIDE: usize = DIM / 16;
/// Positions that are scored, and mixed, together.
const RUN: usize = 16;
/// Positions of which all scores are kept at once. The largest score so far is what weights are measured by; when a later
/// strip has a larger one, what was summed before shrinks.
const STRIP: usize = 256;
/// Scores of a query: a run may end behind the strip.
const SCORES: usize = STRIP + RUN;

/// Memory of one thread.
pub struct Memory {
    /// [QUERIES, SCORES]
    scores: Vec<f32>,
    /// [QUERIES, DIM]
    queries: Vec<u16>,
    /// [QUERIES, DIM], pairs of columns as [`interleave`] leaves them.
    sums: Vec<f32>,
    /// Two positions side by side, [RUN / 2, 2 * DIM].
    pairs: Vec<u16>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            scores: vec![0.0; QUERIES * SCORES],
            queries: vec![0; QUERIES * DIM],
            sums: vec![0.0; QUERIES * DIM],
            pairs: vec![0; RUN * DIM],
        }
    }
}

/// Queries of one key head in one sequence: `heads` of each of `tokens` that follow each other.
#[derive(Clone, Copy)]
pub struct Group<'a> {
    pub view: View<'a>,
    pub kv_head: usize,
    pub tokens: usize,
    pub heads: usize,
    /// Positions that the first token sees; each further one sees one more.
    pub positions: usize,
}

impl Group<'_> {
    fn queries(&self) -> usize {
        self.tokens * self.heads
    }

    fn positions_max(&self) -> usize {
        self.positions + self.tokens - 1
    }

    /// Of the positions of a strip, so many are seen by a query.
    fn seen(&self, query: usize, strip: usize) -> usize {
        (self.positions + query / self.heads).saturating_sub(strip).min(STRIP)
    }

    /// Runs of at most [`RUN`] positions of a strip that stand together: how many are before, where they are in the
    /// pages, and how many they are.
    fn each_run(&self, strip: usize, mut visit: impl FnMut(usize, usize, usize)) {
        let view = View { from: self.view.from + strip, ..self.view };
        let mut done = 0;
        for (offset, len) in view.runs(self.kv_head, STRIP.min(self.positions_max() - strip)) {
            for from in (0..len).step_by(RUN) {
                let run = RUN.min(len - from);
                visit(done, offset + from * DIM, run);
                done += run;
            }
        }
    }
}

/// `query(i)` and `out(i)` are the 128 numbers of query i; `keys` and `values` the pages. AVX-512 BF16 must have been
/// detected.
pub fn attend<'a>(
    group: Group<'_>,
    query: impl Fn(usize) -> &'a [f32],
    keys: &[bf16],
    values: &[bf16],
    memory: &mut Memory,
    out: impl Fn(usize) -> &'a mut [f32],
) {
    let queries = group.queries();
    assert!(queries <= QUERIES);
    for i in 0..queries {
        narrow(Isa::Avx512Bf16, query(i), &mut memory.queries[i * DIM..][..DIM]);
    }
    memory.sums[..queries * DIM].fill(0.0);
    let (mut max, mut totals) = ([f32::NEG_INFINITY; QUERIES], [0.0; QUERIES]);
    for strip in (0..group.positions_max()).step_by(STRIP) {
        score_strip(group, strip, keys, memory);
        for i in 0..queries {
            let scores = &mut memory.scores[i * SCORES..][..SCORES];
            let (scores, behind) = scores.split_at_mut(group.seen(i, strip));
            // What lies behind in the last run has no weight.
            behind[..RUN].fill(0.0);
            let sums = &mut memory.sums[i * DIM..][..DIM];
            // SAFETY: AVX-512 by the caller's promise.
            unsafe { weigh(scores, &mut max[i], &mut totals[i], sums) };
        }
        mix_strip(group, strip, values, memory);
    }
    for i in 0..queries {
        // SAFETY: AVX-512 by the caller's promise; both have 128 numbers.
        unsafe { finish(&memory.sums[i * DIM..][..DIM], 1.0 / totals[i], &mut out(i)[..DIM]) };
    }
}

fn score_strip(group: Group<'_>, strip: usize, keys: &[bf16], memory: &mut Memory) {
    let scale = 1.0 / (DIM as f32).sqrt();
    group.each_run(strip, |done, offset, run| {
        let keys = &keys[offset..][..run * DIM];
        for i in 0..group.queries() {
            if done < group.seen(i, strip) {
                let query = &memory.queries[i * DIM..][..DIM];
                let scores = &mut memory.scores[i * SCORES + done..][..RUN];
                // SAFETY: AVX-512 by `attend`'s caller; up to 16 keys, a query and 16 scores are there.
                unsafe { score(query, keys, scale, scores) };
            }
        }
    });
}

fn mix_strip(group: Group<'_>, strip: usize, values: &[bf16], memory: &mut Memory) {
    group.each_run(strip, |done, offset, run| {
        // SAFETY: AVX-512 by `attend`'s caller; up to 16 values, and room for as many.
        unsafe { interleave(&values[offset..][..run * DIM], &mut memory.pairs) };
        for i in 0..group.queries() {
            let seen = group.seen(i, strip).saturating_sub(done).min(run);
            let weights = &memory.scores[i * SCORES + done..][..seen.next_multiple_of(2)];
            // SAFETY: as above; a weight for each position, 128 sums.
            unsafe { mix(weights, &memory.pairs, &mut memory.sums[i * DIM..][..DIM]) };
        }
    });
}

/// Scores of up to 16 keys; those of keys that are not there are of no use.
///
/// # Safety
/// AVX-512 F, BW and BF16 must be there; `query` has 128 numbers, `keys` between 1 and 16 times as many, `scores` 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn score(query: &[u16], keys: &[bf16], scale: f32, scores: &mut [f32]) {
    // SAFETY: passed on from the caller; a key that is not there is the last one. The types are the same register.
    unsafe {
        let last = keys.len() / DIM - 1;
        let mut lanes = [_mm512_setzero_ps(); RUN];
        for k in 0..NARROW {
            let query: __m512bh = std::mem::transmute(_mm512_loadu_si512(query.as_ptr().add(32 * k).cast()));
            for i in 0..RUN {
                let key = _mm512_loadu_si512(keys.as_ptr().add(i.min(last) * DIM + 32 * k).cast());
                lanes[i] = _mm512_dpbf16_ps(lanes[i], std::mem::transmute::<__m512i, __m512bh>(key), query);
            }
        }
        let sums = _mm512_mul_ps(reduce(&lanes), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores.as_mut_ptr(), sums);
    }
}

/// Scores become weights, rounded to BF16: e to the power of their distance from the largest so far, which `max` is then.
/// `total` gains them; `total` and `sums` shrink by what `max` grew.
///
/// # Safety
/// AVX-512 F must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn weigh(scores: &mut [f32], max: &mut f32, total: &mut f32, sums: &mut [f32]) {
    let largest = scores.iter().fold(*max, |max, &score| max.max(score));
    if largest > *max {
        let shrunk = exp::<true>(*max - largest);
        *total *= shrunk;
        sums.iter_mut().for_each(|sum| *sum *= shrunk);
        *max = largest;
    }
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = scores.as_chunks_mut::<16>();
    for chunk in chunks {
        for l in 0..16 {
            chunk[l] = rounded(exp::<true>(chunk[l] - largest));
            lanes[l] += chunk[l];
        }
    }
    for (score, lane) in rest.iter_mut().zip(&mut lanes) {
        *score = rounded(exp::<true>(*score - largest));
        *lane += *score;
    }
    *total += crate::backend::cpu::simd::reduce(lanes);
}

/// To BF16, to even, of a number that is finite or NaN.
#[inline(always)]
fn rounded(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// Each two positions become 256 numbers, a number of the one beside the same number of the other; an odd last one has
/// zeros beside it.
///
/// # Safety
/// AVX-512 F and BW must be there; `values` has up to 16 times 128 numbers, `pairs` 16 times.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(values: &[bf16], pairs: &mut [u16]) {
    let count = values.len() / DIM;
    for pair in 0..count.div_ceil(2) {
        for k in 0..NARROW {
            // SAFETY: 32 numbers of a position that is there, and 64 of the pair.
            unsafe {
                let first = _mm512_loadu_si512(values.as_ptr().add(2 * pair * DIM + 32 * k).cast());
                let second = match 2 * pair + 1 < count {
                    true => _mm512_loadu_si512(values.as_ptr().add((2 * pair + 1) * DIM + 32 * k).cast()),
                    false => _mm512_setzero_si512(),
                };
                let to = pairs.as_mut_ptr().add(2 * pair * DIM + 64 * k);
                _mm512_storeu_si512(to.cast(), _mm512_unpacklo_epi16(first, second));
                _mm512_storeu_si512(to.add(32).cast(), _mm512_unpackhi_epi16(first, second));
            }
        }
    }
}

/// `sums` gain the weighted values of the pairs, in order.
///
/// # Safety
/// AVX-512 F and BF16 must be there; `weights` is even, `pairs` has 128 numbers for each of them, `sums` 128.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn mix(weights: &[f32], pairs: &[u16], sums: &mut [f32]) {
    // SAFETY: passed on from the caller; the types are the same register.
    unsafe {
        let mut held = [_mm512_setzero_ps(); WIDE];
        for k in 0..WIDE {
            held[k] = _mm512_loadu_ps(sums.as_ptr().add(16 * k));
        }
        for (pair, weights) in weights.as_chunks::<2>().0.iter().enumerate() {
            // They are BF16 already.
            let both = weights[0].to_bits() >> 16 | weights[1].to_bits() & 0xffff_0000;
            let weight: __m512bh = std::mem::transmute(_mm512_set1_epi32(both as i32));
            for k in 0..WIDE {
                let value = _mm512_loadu_si512(pairs.as_ptr().add(2 * pair * DIM + 32 * k).cast());
                held[k] = _mm512_dpbf16_ps(held[k], std::mem::transmute::<__m512i, __m512bh>(value), weight);
            }
        }
        for k in 0..WIDE {
            _mm512_storeu_ps(sums.as_mut_ptr().add(16 * k), held[k]);
        }
    }
}

/// Puts the sums in order, times `scale`. Of 32 columns, the first register has 0 to 3 of each eight and the second 4 to 7.
///
/// # Safety
/// AVX-512 F must be there; both have 128 numbers.
#[target_feature(enable = "avx512f")]
unsafe fn finish(sums: &[f32], scale: f32, out: &mut [f32]) {
    // SAFETY: passed on from the caller.
    unsafe {
        let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        let second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for k in 0..NARROW {
            let low = _mm512_loadu_ps(sums.as_ptr().add(32 * k));
            let high = _mm512_loadu_ps(sums.as_ptr().add(32 * k + 16));
            let scale = _mm512_set1_ps(scale);
            let (low, high) = (_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
            _mm512_storeu_ps(out.as_mut_ptr().add(32 * k), _mm512_permutex2var_ps(low, first, high));
            _mm512_storeu_ps(out.as_mut_ptr().add(32 * k + 16), _mm512_permutex2var_ps(low, second, high));
        }
    }
}
