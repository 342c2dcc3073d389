//! The tile in AVX-512: 16 weights of a row become one register, whatever they are stored as.

use std::arch::x86_64::*;

use super::{E2M1, E4M3, ROWS, Rows, Sums, portable};

/// A row of a weight from which 16 f32 can be had at multiples of 16.
trait Row: Copy {
    /// # Safety
    /// Elements `k .. k + 16` must lie inside the row this was made from.
    unsafe fn load(self, k: usize) -> __m512;
}

#[derive(Clone, Copy)]
struct F32Row(*const u8);
#[derive(Clone, Copy)]
struct F16Row(*const u8);
#[derive(Clone, Copy)]
struct Bf16Row(*const u8);
#[derive(Clone, Copy)]
struct Fp8Row(*const u8);
#[derive(Clone, Copy)]
struct Nvfp4Row {
    codes: *const u8,
    scales: *const u8,
    table: __m512,
}

impl Row for F32Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512 {
        // SAFETY: 64 bytes inside the row by the trait's contract; the load is unaligned.
        unsafe { _mm512_loadu_ps(self.0.add(4 * k).cast()) }
    }
}

impl Row for F16Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512 {
        // SAFETY: 32 bytes inside the row; AVX-512F is on in every caller.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(self.0.add(2 * k).cast())) }
    }
}

impl Row for Bf16Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512 {
        // SAFETY: 32 bytes inside the row; a BF16 is the upper half of an f32.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(self.0.add(2 * k).cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

impl Row for Fp8Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512 {
        // As FP16 bits the exponent is 8 too small; the multiplication puts it right and is exact. Going
        // through FP16 lets the hardware handle E4M3's subnormals at full speed.
        // SAFETY: 16 bytes inside the row; AVX-512 BW and VL are on in every caller.
        unsafe {
            let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(self.0.add(k).cast()));
            let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)));
            let rest = _mm256_slli_epi16::<7>(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)));
            let half = _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
            _mm512_mul_ps(half, _mm512_set1_ps(256.0))
        }
    }
}

impl Row for Nvfp4Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512 {
        // SAFETY: 8 code bytes and one scale inside the row; AVX-512F is on in every caller.
        unsafe {
            let pairs = _mm_loadl_epi64(self.codes.add(k / 2).cast());
            let nibble = _mm_set1_epi8(15);
            let low = _mm_and_si128(pairs, nibble);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(pairs), nibble);
            let codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
            let scale = E4M3[usize::from(*self.scales.add(k / 16))];
            _mm512_mul_ps(_mm512_permutexvar_ps(codes, self.table), _mm512_set1_ps(scale))
        }
    }
}

/// See [`super::tile`]. Panics if a row or an operand is shorter than `width`.
pub fn tile(rows: &Rows<'_>, first: usize, count: usize, width: usize, x: &[&[f32]], sums: &mut Sums) {
    assert!(x.iter().all(|x| x.len() >= width) && (1..=4).contains(&x.len()));
    assert!((1..=ROWS).contains(&count));
    let last = (first + count) * width;
    let fits = match rows {
        Rows::F32(data) => data.len() >= last * 4,
        Rows::F16(data) | Rows::Bf16(data) => data.len() >= last * 2,
        Rows::Fp8(data) => data.len() >= last,
        Rows::Nvfp4 { codes, scales } => {
            width.is_multiple_of(16) && codes.len() >= last / 2 && scales.len() >= last / 16
        }
    };
    assert!(fits, "the weight has fewer than {} rows of {width}", first + count);
    // SAFETY: AVX-512 was detected before this module is used, and the assertions above keep every load of
    // `tokens` inside the rows and operands.
    unsafe {
        let at = |i: usize| (first + i.min(count - 1)) * width;
        match *rows {
            Rows::F32(d) => tokens(|i| F32Row(d.as_ptr().add(4 * at(i))), count, width, x, sums),
            Rows::F16(d) => tokens(|i| F16Row(d.as_ptr().add(2 * at(i))), count, width, x, sums),
            Rows::Bf16(d) => tokens(|i| Bf16Row(d.as_ptr().add(2 * at(i))), count, width, x, sums),
            Rows::Fp8(d) => tokens(|i| Fp8Row(d.as_ptr().add(at(i))), count, width, x, sums),
            Rows::Nvfp4 { codes, scales } => {
                let table = load_table();
                let row = |i| Nvfp4Row {
                    codes: codes.as_ptr().add(at(i) / 2),
                    scales: scales.as_ptr().add(at(i) / 16),
                    table,
                };
                tokens(row, count, width, x, sums)
            }
        }
    }
    for k in width / 16 * 16..width {
        for i in 0..count {
            let w = portable::element(*rows, first + i, width, k);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[i] = w.mul_add(x[k], sums[i]);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load_table() -> __m512 {
    // SAFETY: the table has 16 f32.
    unsafe { _mm512_loadu_ps(E2M1.as_ptr()) }
}

/// Picks the shape of 16 (row, token) pairs for the number of tokens; missing rows repeat the last one.
///
/// # Safety
/// AVX-512 F, BW, DQ and VL must be there; rows and operands must have `width` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tokens<R: Row>(
    row: impl Fn(usize) -> R,
    count: usize,
    width: usize,
    x: &[&[f32]],
    sums: &mut Sums,
) {
    // Closures that pass registers through functions of the standard library would not be inlined, because those
    // are compiled without these instructions: hence the loops.
    let mut all = [_mm512_setzero_ps(); 16];
    // SAFETY: passed on from the caller; every store is of a part of 16 numbers that begins in it.
    unsafe {
        match *x {
            [x] => {
                for half in 0..2 {
                    let rows = std::array::from_fn(|i| row(8 * half + i));
                    let sums = lanes::<R, 8, 1>(rows, width, [x]);
                    for i in 0..8 {
                        all[8 * half + i] = sums[i][0];
                    }
                }
                _mm512_storeu_ps(sums[0].as_mut_ptr(), reduce(&all));
            }
            [x, y] => {
                for first in (0..count).step_by(8) {
                    let rows = std::array::from_fn(|i| row(first + i));
                    let pairs = lanes::<R, 8, 2>(rows, width, [x, y]);
                    for i in 0..16 {
                        all[i] = pairs[i % 8][i / 8];
                    }
                    let all = reduce(&all);
                    _mm256_storeu_ps(sums[0].as_mut_ptr().add(first), _mm512_castps512_ps256(all));
                    _mm256_storeu_ps(sums[1].as_mut_ptr().add(first), _mm512_extractf32x8_ps::<1>(all));
                }
            }
            [x, y, z] => fours(row, count, width, [x, y, z], &mut all, sums),
            _ => fours(row, count, width, [x[0], x[1], x[2], x[3]], &mut all, sums),
        }
    }
}

/// Tiles of 4 rows and T tokens, the rest of `all` staying zeros.
///
/// # Safety
/// As for [`tokens`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn fours<R: Row, const T: usize>(
    row: impl Fn(usize) -> R,
    count: usize,
    width: usize,
    x: [&[f32]; T],
    all: &mut [__m512; 16],
    sums: &mut Sums,
) {
    // SAFETY: passed on from the caller; every store is of 4 of 16 numbers.
    unsafe {
        for first in (0..count).step_by(4) {
            let pairs = lanes::<R, 4, T>(std::array::from_fn(|i| row(first + i)), width, x);
            for i in 0..4 * T {
                all[i] = pairs[i % 4][i / 4];
            }
            let all = reduce(all);
            _mm_storeu_ps(sums[0].as_mut_ptr().add(first), _mm512_castps512_ps128(all));
            _mm_storeu_ps(sums[1].as_mut_ptr().add(first), _mm512_extractf32x4_ps::<1>(all));
            _mm_storeu_ps(sums[2].as_mut_ptr().add(first), _mm512_extractf32x4_ps::<2>(all));
            _mm_storeu_ps(sums[3].as_mut_ptr().add(first), _mm512_extractf32x4_ps::<3>(all));
        }
    }
}

/// 16 running sums for each of R rows and T tokens.
///
/// # Safety
/// As for [`tokens`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn lanes<R: Row, const ROWS: usize, const T: usize>(
    rows: [R; ROWS],
    width: usize,
    x: [&[f32]; T],
) -> [[__m512; T]; ROWS] {
    let mut lanes = [[_mm512_setzero_ps(); T]; ROWS];
    let mut k = 0;
    while k + 16 <= width {
        let mut operands = [_mm512_setzero_ps(); T];
        for (operand, x) in operands.iter_mut().zip(x) {
            // SAFETY: x has `width` elements, k + 16 <= width.
            *operand = unsafe { _mm512_loadu_ps(x.as_ptr().add(k)) };
        }
        for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
            // SAFETY: the row has `width` elements, k + 16 <= width.
            let w = unsafe { row.load(k) };
            for (lane, operand) in lanes.iter_mut().zip(operands) {
                *lane = _mm512_fmadd_ps(w, operand, *lane);
            }
        }
        k += 16;
    }
    lanes
}

/// Adds up the lanes of 16 registers at once: number i of the result is the sum of register i, with the tree of
/// [`super::reduce`], in which a lane meets the one 8, 4, 2 and 1 further on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn reduce(all: &[__m512; 16]) -> __m512 {
    let even = by_2(quarters(all, 0), quarters(all, 1));
    let odd = by_2(quarters(all, 2), quarters(all, 3));
    let low = _mm512_shuffle_ps::<0b10_00_10_00>(even, odd);
    _mm512_add_ps(low, _mm512_shuffle_ps::<0b11_01_11_01>(even, odd))
}

/// Four sums, of registers i, i + 4, i + 8 and i + 12, for each quarter of the result.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(all: &[__m512; 16], i: usize) -> __m512 {
    let (a, b) = (by_8(all[i], all[i + 4]), by_8(all[i + 8], all[i + 12]));
    let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
    _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn by_8(a: __m512, b: __m512) -> __m512 {
    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
    _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn by_2(a: __m512, b: __m512) -> __m512 {
    let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
}
