//! Attention in AVX-512, where heads are 128 numbers wide: a query, or its result, stays in registers.

#![allow(clippy::needless_range_loop, reason = "one index serves a register and its numbers in memory")]

use std::arch::x86_64::*;

use crate::backend::cpu::simd::{avx512::reduce, exp};

/// Registers of a vector of one head.
const REGISTERS: usize = 8;
/// Numbers in them.
pub const DIM: usize = 16 * REGISTERS;

/// scores[i] = query · keys[i] · scale; returns the largest and `max`. AVX-512 must have been detected.
pub fn score(query: &[f32], keys: &[f32], scale: f32, max: f32, scores: &mut [f32]) -> f32 {
    assert!(query.len() == DIM && keys.len() == scores.len() * DIM);
    let mut max = max;
    for (keys, scores) in keys.chunks(16 * DIM).zip(scores.chunks_mut(16)) {
        let mut sums = [0.0; 16];
        // SAFETY: between 1 and 16 keys of 128 numbers, by the assertion and the size of a chunk.
        unsafe { products(query, keys, &mut sums) };
        for (score, sum) in scores.iter_mut().zip(sums) {
            *score = sum * scale;
            max = max.max(*score);
        }
    }
    max
}

/// Products of the query with up to 16 keys; missing keys repeat the last one.
///
/// # Safety
/// AVX-512 must be there; `query` has 128 numbers, `keys` between 1 and 16 times as many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn products(query: &[f32], keys: &[f32], sums: &mut [f32; 16]) {
    let mut lanes = [_mm512_setzero_ps(); 16];
    let last = keys.len() / DIM - 1;
    for k in 0..REGISTERS {
        // SAFETY: 16 of the 128 numbers.
        let q = unsafe { _mm512_loadu_ps(query.as_ptr().add(16 * k)) };
        for i in 0..16 {
            // SAFETY: 16 numbers of a key that is there.
            let key = unsafe { _mm512_loadu_ps(keys.as_ptr().add(i.min(last) * DIM + 16 * k)) };
            lanes[i] = _mm512_fmadd_ps(q, key, lanes[i]);
        }
    }
    // SAFETY: 16 numbers.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), reduce(&lanes)) };
}

/// Scores become weights: e to the power of their distance from `max`. Returns `total` and the weights, added in
/// order.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn weigh(scores: &mut [f32], max: f32, total: f32) -> f32 {
    for score in scores.iter_mut() {
        *score = exp::<true>(*score - max);
    }
    scores.iter().fold(total, |total, &weight| total + weight)
}

/// `out` gains the weighted sum of `values` [scores, 128], in order; returns `total` and the weights.
/// AVX-512 must have been detected.
pub fn mix(scores: &mut [f32], max: f32, total: f32, values: &[f32], out: &mut [f32]) -> f32 {
    assert!(out.len() == DIM && values.len() == scores.len() * DIM);
    // SAFETY: AVX-512 by the caller's promise, the lengths by the assertion.
    unsafe {
        let total = weigh(scores, max, total);
        add(scores, values, out);
        total
    }
}

/// # Safety
/// AVX-512 must be there; `out` has 128 numbers, `values` as many for every weight.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn add(weights: &[f32], values: &[f32], out: &mut [f32]) {
    let mut sums = [_mm512_setzero_ps(); REGISTERS];
    for k in 0..REGISTERS {
        // SAFETY: 16 of the 128 numbers.
        sums[k] = unsafe { _mm512_loadu_ps(out.as_ptr().add(16 * k)) };
    }
    for (i, &weight) in weights.iter().enumerate() {
        let weight = _mm512_set1_ps(weight);
        for k in 0..REGISTERS {
            // SAFETY: 16 numbers of the value of this weight.
            let value = unsafe { _mm512_loadu_ps(values.as_ptr().add(i * DIM + 16 * k)) };
            sums[k] = _mm512_fmadd_ps(weight, value, sums[k]);
        }
    }
    for k in 0..REGISTERS {
        // SAFETY: 16 of the 128 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * k), sums[k]) };
    }
}
