//! Blocks in AVX-512: the sixteen numbers that a code of four bits can mean are one register, and a code is an index
//! into it. The numbers are those of [`Blocks::decode`] to the bit, because each is made by the same operations.

use std::arch::x86_64::*;

use super::super::{E2M1, E4M3, reduce};
use super::{BlockRows, ROWS, Sums, TOGETHER};
use crate::weights::blocks::{Blocks, LEVELS, LONGEST, f16, scales_and_minima};

/// See [`super::tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn tile(weight: BlockRows<'_>, first: usize, count: usize, x: &[&[f32]], sums: &mut Sums) {
    assert!((1..=ROWS).contains(&count));
    match *x {
        [a] => few(weight, first, count, [a], sums),
        [a, b] => few(weight, first, count, [a, b], sums),
        [a, b, c] => few(weight, first, count, [a, b, c], sums),
        [a, b, c, d] => few(weight, first, count, [a, b, c, d], sums),
        _ => {}
    }
}

/// See [`super::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn decode_rows(weight: BlockRows<'_>, first: usize, out: &mut [f32]) {
    let mut span = [0.0; LONGEST];
    for (i, out) in out.chunks_exact_mut(weight.width).enumerate() {
        for (s, out) in out.chunks_mut(LONGEST).enumerate() {
            let from = s * LONGEST;
            decode(weight.blocks, weight.span(first + i, from, from + out.len()), &mut span);
            out.copy_from_slice(&span[..out.len()]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn few<const T: usize>(weight: BlockRows<'_>, first: usize, count: usize, x: [&[f32]; T], sums: &mut Sums) {
    let mut spans = [[0.0f32; LONGEST]; TOGETHER];
    for r in (0..count).step_by(TOGETHER) {
        let mut lanes = [[_mm512_setzero_ps(); T]; TOGETHER];
        let mut from = 0;
        while from < weight.width {
            let to = (from + LONGEST).min(weight.width);
            for (i, span) in spans.iter_mut().enumerate() {
                // Rows that are missing repeat the last one.
                let row = first + (r + i).min(count - 1);
                decode(weight.blocks, weight.span(row, from, to), span);
            }
            lanes = products(&spans, to - from, x.map(|x| &x[from..to]), lanes);
            from = to;
        }
        for i in 0..TOGETHER.min(count - r) {
            for t in 0..T {
                sums[t][r + i] = reduce(numbers(lanes[i][t]));
            }
        }
    }
}

/// Adds the products of the first `len` numbers, a multiple of 16, to the running sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn products<const T: usize>(
    spans: &[[f32; LONGEST]; TOGETHER],
    len: usize,
    x: [&[f32]; T],
    mut lanes: [[__m512; T]; TOGETHER],
) -> [[__m512; T]; TOGETHER] {
    assert!(len <= LONGEST && x.iter().all(|x| x.len() == len));
    let mut k = 0;
    while k + 16 <= len {
        let mut operands = [_mm512_setzero_ps(); T];
        for (operand, x) in operands.iter_mut().zip(x) {
            // SAFETY: x has `len` numbers, k + 16 <= len.
            *operand = unsafe { _mm512_loadu_ps(x.as_ptr().add(k)) };
        }
        for (span, lanes) in spans.iter().zip(lanes.iter_mut()) {
            // SAFETY: k + 16 <= len <= LONGEST.
            let w = unsafe { _mm512_loadu_ps(span.as_ptr().add(k)) };
            for (lane, operand) in lanes.iter_mut().zip(operands) {
                *lane = _mm512_fmadd_ps(w, operand, *lane);
            }
        }
        k += 16;
    }
    lanes
}

/// As [`Blocks::decode`], at most [`LONGEST`] weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn decode(blocks: Blocks, data: &[u8], out: &mut [f32; LONGEST]) {
    match blocks {
        Blocks::Q8_0 => {
            for (block, out) in data.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
                let d = _mm512_set1_ps(f16(block[0], block[1]));
                for at in [0, 16] {
                    let codes = _mm512_cvtepi8_epi32(bytes(&block[2 + at..]));
                    store(&mut out[at..], _mm512_mul_ps(d, _mm512_cvtepi32_ps(codes)));
                }
            }
        }
        Blocks::Q4_0 => {
            let levels = _mm512_sub_ps(iota(), _mm512_set1_ps(8.0));
            for (block, out) in data.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
                let table = _mm512_mul_ps(_mm512_set1_ps(f16(block[0], block[1])), levels);
                nibbles(&block[2..], table, table, out, 16);
            }
        }
        Blocks::Iq4Nl => {
            let levels = table(&LEVELS);
            for (block, out) in data.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
                let table = _mm512_mul_ps(_mm512_set1_ps(f16(block[0], block[1])), levels);
                nibbles(&block[2..], table, table, out, 16);
            }
        }
        Blocks::Iq4Xs => {
            let levels = table(&LEVELS);
            for block in data.as_chunks::<136>().0.iter().take(1) {
                let d = f16(block[0], block[1]);
                let high = u16::from_le_bytes([block[2], block[3]]);
                for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
                    let scale = low | ((high >> (2 * group) & 3) as u8) << 4;
                    let scale = _mm512_set1_ps(d * f32::from(scale as i8 - 32));
                    let table = _mm512_mul_ps(scale, levels);
                    nibbles(&block[8 + 16 * group..], table, table, out, 16);
                }
            }
        }
        Blocks::Nvfp4 => {
            let codes = table(&E2M1);
            for (block, out) in data.as_chunks::<36>().0.iter().zip(out.as_chunks_mut::<64>().0) {
                for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    let scale = match block[group] & 0x7F {
                        0x7F => 0.0,
                        code => E4M3[usize::from(code)],
                    };
                    let table = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
                    let (eight, _) = block[4 + 8 * group..].as_chunks();
                    let pairs = _mm_cvtsi64_si128(i64::from_le_bytes(eight[0]));
                    // Only the low four bits of an index count, so the neighbour's bits above them may stay.
                    let indices = _mm_unpacklo_epi64(pairs, _mm_srli_epi16::<4>(pairs));
                    store(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(indices), table));
                }
            }
        }
        Blocks::Q4K => {
            for block in data.as_chunks::<144>().0.iter().take(1) {
                let (d, dmin) = (f16(block[0], block[1]), f16(block[2], block[3]));
                let (scales, minima) = scales_and_minima(&block[4..16]);
                for (pair, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
                    let (scale, minimum) = pair_of(pair, d, dmin, &scales, &minima);
                    let low = _mm512_sub_ps(_mm512_mul_ps(scale[0], iota()), minimum[0]);
                    let high = _mm512_sub_ps(_mm512_mul_ps(scale[1], iota()), minimum[1]);
                    for at in [0, 16] {
                        nibbles(&block[16 + 32 * pair + at..], low, high, &mut out[at..], 32);
                    }
                }
            }
        }
        Blocks::Q5K => q5_k(data, out),
        Blocks::Q6K => q6_k(data, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn q5_k(data: &[u8], out: &mut [f32; LONGEST]) {
    let upper = _mm512_add_ps(iota(), _mm512_set1_ps(16.0));
    let (fifteen, sixteen) = (_mm512_set1_epi32(15), _mm512_set1_epi32(16));
    for block in data.as_chunks::<176>().0.iter().take(1) {
        let (d, dmin) = (f16(block[0], block[1]), f16(block[2], block[3]));
        let (scales, minima) = scales_and_minima(&block[4..16]);
        for (pair, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let (scale, minimum) = pair_of(pair, d, dmin, &scales, &minima);
            let shift = _mm_cvtsi32_si128(2 * pair as i32);
            for at in [0, 16] {
                let codes = _mm512_cvtepu8_epi32(bytes(&block[48 + 32 * pair + at..]));
                let fifth = _mm512_srl_epi32(_mm512_cvtepu8_epi32(bytes(&block[16 + at..])), shift);
                let low = _mm512_and_si512(codes, fifteen);
                let low = _mm512_or_si512(low, _mm512_and_si512(_mm512_slli_epi32::<4>(fifth), sixteen));
                let high = _mm512_srli_epi32::<4>(codes);
                let high = _mm512_or_si512(high, _mm512_and_si512(_mm512_slli_epi32::<3>(fifth), sixteen));
                for (i, indices) in [low, high].into_iter().enumerate() {
                    // The fifth bit chooses between two tables of 16.
                    let below = _mm512_sub_ps(_mm512_mul_ps(scale[i], iota()), minimum[i]);
                    let above = _mm512_sub_ps(_mm512_mul_ps(scale[i], upper), minimum[i]);
                    store(&mut out[32 * i + at..], _mm512_permutex2var_ps(below, indices, above));
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn q6_k(data: &[u8], out: &mut [f32; LONGEST]) {
    let (fifteen, three) = (_mm512_set1_epi32(15), _mm512_set1_epi32(3));
    for block in data.as_chunks::<210>().0.iter().take(1) {
        let d = f16(block[208], block[209]);
        for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (quarter, at) = (group / 2, 16 * (group % 2));
                let low = bytes(&block[64 * half + 32 * (quarter % 2) + at..]);
                let high = bytes(&block[128 + 32 * half + at..]);
                let low_shift = _mm_cvtsi32_si128(4 * (quarter as i32 / 2));
                let low = _mm512_srl_epi32(_mm512_cvtepu8_epi32(low), low_shift);
                let high =
                    _mm512_srl_epi32(_mm512_cvtepu8_epi32(high), _mm_cvtsi32_si128(2 * quarter as i32));
                let low = _mm512_and_si512(low, fifteen);
                let high = _mm512_slli_epi32::<4>(_mm512_and_si512(high, three));
                let code = _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(32));
                let scale = _mm512_set1_ps(d * f32::from(block[192 + 8 * half + group] as i8));
                store(out, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(code)));
            }
        }
    }
}

/// Scales and minima of groups 2 `pair` and 2 `pair` + 1 of Q4_K and Q5_K.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_of(pair: usize, d: f32, dmin: f32, scales: &[u8; 8], minima: &[u8; 8]) -> ([__m512; 2], [__m512; 2]) {
    let mut both = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
    for i in 0..2 {
        both.0[i] = _mm512_set1_ps(d * f32::from(scales[2 * pair + i]));
        both.1[i] = _mm512_set1_ps(dmin * f32::from(minima[2 * pair + i]));
    }
    both
}

/// Sixteen bytes of codes: the numbers of the low nibbles go to `out`, those of the high ones `apart` further on.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(codes: &[u8], low: __m512, high: __m512, out: &mut [f32], apart: usize) {
    // Only the low four bits of an index count.
    let indices = _mm512_cvtepu8_epi32(bytes(codes));
    store(out, _mm512_permutexvar_ps(indices, low));
    store(&mut out[apart..], _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(indices), high));
}

/// 0, 1 … 15
#[inline]
#[target_feature(enable = "avx512f")]
fn iota() -> __m512 {
    _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn table(values: &[f32; 16]) -> __m512 {
    // SAFETY: 16 numbers.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn numbers(register: __m512) -> [f32; 16] {
    let mut values = [0.0; 16];
    store(&mut values, register);
    values
}

/// The first sixteen bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(from: &[u8]) -> __m128i {
    let from = &from[..16];
    // SAFETY: 16 bytes; the load is unaligned.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// Into the first sixteen numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &mut [f32], register: __m512) {
    let out = &mut out[..16];
    // SAFETY: 16 numbers; the store is unaligned.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), register) }
}
