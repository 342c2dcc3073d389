//! The tile over BF16 operands: 32 weights of a row become one register of BF16 and meet 32 operands in one instruction,
//! with twice the products of f32. Every FP8 and NVFP4 weight, its block's scale included, is a BF16 exactly, so the
//! products are those of the f32 tile; sums are f32, two products to a lane.

use std::arch::x86_64::*;

use super::{Row, Rows, Sums, check, tokens};
use crate::backend::cpu::simd::{E2M1, E4M3};

/// A row of which 32 weights become 32 BF16.
trait NarrowRow: Copy {
    /// # Safety
    /// As for [`Row::load`].
    unsafe fn load(self, k: usize) -> __m512i;

    /// Fewer than 32, and zeros behind them.
    ///
    /// # Safety
    /// As for [`Row::load_last`].
    unsafe fn load_last(self, k: usize, count: usize) -> __m512i;
}

/// Makes a [`Row`] of a [`NarrowRow`].
#[derive(Clone, Copy)]
struct Narrow<R>(R);

#[derive(Clone, Copy)]
struct Bf16Row(*const u8);
#[derive(Clone, Copy)]
struct Fp8Row(*const u8);
#[derive(Clone, Copy)]
struct Nvfp4Row {
    codes: *const u8,
    scales: *const u8,
    unpack: __m512i,
    table: __m512,
}

impl<R: NarrowRow> Row for Narrow<R> {
    type Operand = u16;
    type Register = __m512i;
    const STEP: usize = 32;

    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512i {
        // SAFETY: passed on from the caller.
        unsafe { self.0.load(k) }
    }

    #[inline(always)]
    unsafe fn operand(x: *const u16) -> __m512i {
        // SAFETY: passed on from the caller.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }

    #[inline(always)]
    unsafe fn multiply_add(w: __m512i, x: __m512i, sums: __m512) -> __m512 {
        // SAFETY: the two types are the same register, and AVX-512 BF16 is on in every caller.
        unsafe { _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute(x)) }
    }

    #[inline(always)]
    unsafe fn load_last(self, k: usize, count: usize) -> Option<__m512i> {
        // SAFETY: passed on from the caller.
        Some(unsafe { self.0.load_last(k, count) })
    }

    #[inline(always)]
    unsafe fn last_operand(x: *const u16, count: usize) -> __m512i {
        // SAFETY: the mask leaves `count` numbers.
        unsafe { _mm512_maskz_loadu_epi16(first(count), x.cast()) }
    }
}

/// The lowest `count` of 32 bits.
#[inline(always)]
fn first(count: usize) -> u32 {
    (1 << count) - 1
}

impl NarrowRow for Bf16Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512i {
        // SAFETY: 64 bytes inside the row.
        unsafe { _mm512_loadu_si512(self.0.add(2 * k).cast()) }
    }

    #[inline(always)]
    unsafe fn load_last(self, k: usize, count: usize) -> __m512i {
        // SAFETY: the mask leaves 2 · `count` bytes inside the row.
        unsafe { _mm512_maskz_loadu_epi16(first(count), self.0.add(2 * k).cast()) }
    }
}

impl NarrowRow for Fp8Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512i {
        // SAFETY: 32 bytes inside the row.
        unsafe { from_e4m3(_mm256_loadu_si256(self.0.add(k).cast())) }
    }

    #[inline(always)]
    unsafe fn load_last(self, k: usize, count: usize) -> __m512i {
        // SAFETY: the mask leaves `count` bytes inside the row.
        unsafe { from_e4m3(_mm256_maskz_loadu_epi8(first(count), self.0.add(k).cast())) }
    }
}

/// Sign and the seven other bits go where BF16 has them; the exponent is then 120 too small. What it is for codes
/// without an exponent, which are multiples of 2^-9, is looked up: the instruction takes subnormal BF16 for zero, so it
/// cannot be left to a product.
///
/// # Safety
/// AVX-512 F and BW must be there.
#[inline(always)]
unsafe fn from_e4m3(bytes: __m256i) -> __m512i {
    /// k · 2^-9 for k below 8, upper half of the f32.
    const SUBNORMAL: [u16; 32] = {
        let mut table = [0; 32];
        let mut k = 0;
        while k < 8 {
            table[k] = ((k as f32 / 512.0).to_bits() >> 16) as u16;
            k += 1;
        }
        table
    };
    // SAFETY: the table has 64 bytes; the instructions are there by the caller's promise.
    unsafe {
        let wide = _mm512_cvtepu8_epi16(bytes);
        let rest = _mm512_slli_epi16::<4>(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)));
        let normal = _mm512_add_epi16(rest, _mm512_set1_epi16(120 << 7));
        let subnormal = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
        let table = _mm512_loadu_si512(SUBNORMAL.as_ptr().cast());
        let index = _mm512_and_si512(wide, _mm512_set1_epi16(7));
        let magnitude = _mm512_mask_permutexvar_epi16(normal, subnormal, index, table);
        // magnitude or (wide << 8 and the sign's bit)
        let shifted = _mm512_slli_epi16::<8>(wide);
        _mm512_ternarylogic_epi32::<0xf8>(magnitude, shifted, _mm512_set1_epi16(i16::MIN))
    }
}

impl NarrowRow for Nvfp4Row {
    #[inline(always)]
    unsafe fn load(self, k: usize) -> __m512i {
        // SAFETY: 16 code bytes and two scales inside the row.
        unsafe {
            let codes = _mm_loadu_si128(self.codes.add(k / 2).cast());
            let scales = self.scales.add(k / 16);
            self.scaled(codes, *scales, *scales.add(1))
        }
    }

    #[inline(always)]
    unsafe fn load_last(self, k: usize, _: usize) -> __m512i {
        // SAFETY: rows are whole blocks of 16, so 8 code bytes and one scale are left. Codes of zero are zeros.
        unsafe {
            let codes = _mm_loadl_epi64(self.codes.add(k / 2).cast());
            self.scaled(codes, *self.scales.add(k / 16), 0)
        }
    }
}

impl Nvfp4Row {
    /// 32 codes, of which the first 16 have one scale and the others another. All values times each scale are made
    /// first, so that one look-up gives 32 weights.
    ///
    /// # Safety
    /// AVX-512 F, BW, VBMI and BF16 must be there.
    #[inline(always)]
    unsafe fn scaled(self, codes: __m128i, low: u8, high: u8) -> __m512i {
        // SAFETY: passed on from the caller.
        unsafe {
            let low = _mm512_mul_ps(self.table, _mm512_set1_ps(E4M3[usize::from(low)]));
            let high = _mm512_mul_ps(self.table, _mm512_set1_ps(E4M3[usize::from(high)]));
            let values: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            // Four codes to each eight bytes, then each of them to its own two, with what follows it above.
            let spread = _mm512_multishift_epi64_epi8(self.unpack, _mm512_cvtepu16_epi64(codes));
            // The code, and bit 4 for the second block.
            let second = _mm512_set_epi64(S, S, S, S, 0, 0, 0, 0);
            let index = _mm512_ternarylogic_epi32::<0xf8>(second, spread, _mm512_set1_epi16(15));
            _mm512_permutexvar_epi16(index, values)
        }
    }
}

/// Bit 4 of four 16-bit numbers.
const S: i64 = 0x0010_0010_0010_0010;

/// See [`super::super::tile`]. Panics if a row or an operand is shorter than `width`, or if the weight is of another
/// format than BF16, FP8 and NVFP4.
pub fn tile(rows: &Rows<'_>, first: usize, count: usize, width: usize, x: &[&[u16]], sums: &mut Sums) {
    check(rows, first, count, width, x);
    let at = |i: usize| (first + i.min(count - 1)) * width;
    // SAFETY: the instructions were detected before this module is used, and the check keeps every load of `tokens`
    // inside the rows and operands.
    unsafe {
        match *rows {
            Rows::Bf16(d) => narrow(|i| Narrow(Bf16Row(d.as_ptr().add(2 * at(i)))), count, width, x, sums),
            Rows::Fp8(d) => narrow(|i| Narrow(Fp8Row(d.as_ptr().add(at(i)))), count, width, x, sums),
            Rows::Nvfp4 { codes, scales } => {
                let (unpack, table) = nvfp4_constants();
                let row = |i| Nvfp4Row {
                    codes: codes.as_ptr().add(at(i) / 2),
                    scales: scales.as_ptr().add(at(i) / 16),
                    unpack,
                    table,
                };
                narrow(|i| Narrow(row(i)), count, width, x, sums)
            }
            Rows::F32(_) | Rows::F16(_) => {
                panic!("a weight of more than 8 significant bits has no BF16 tile")
            }
        }
    }
}

/// How four codes come to their places, and what they stand for.
#[target_feature(enable = "avx512f")]
fn nvfp4_constants() -> (__m512i, __m512) {
    // Two bytes from bits 0, 4, 8 and 12 on.
    let unpack = _mm512_set1_epi64(0x140c_1008_0c04_0800);
    // SAFETY: the table has 16 f32.
    (unpack, unsafe { _mm512_loadu_ps(E2M1.as_ptr()) })
}

/// [`tokens`] with the instructions of this file.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL, VBMI and BF16 must be there; rows and operands must have `width` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")]
unsafe fn narrow<R: Row>(
    row: impl Fn(usize) -> R,
    count: usize,
    width: usize,
    x: &[&[R::Operand]],
    sums: &mut Sums,
) {
    // SAFETY: passed on from the caller.
    unsafe { tokens(row, count, width, x, sums) }
}

/// Decodes one row into BF16: what [`tile`] would multiply. Panics where it would.
pub fn decode(rows: &Rows<'_>, row: usize, out: &mut [u16]) {
    let width = out.len();
    check(rows, row, 1, width, &[&*out]);
    // SAFETY: as in `tile`.
    unsafe {
        match *rows {
            Rows::Bf16(d) => copy(Bf16Row(d.as_ptr().add(2 * row * width)), out),
            Rows::Fp8(d) => copy(Fp8Row(d.as_ptr().add(row * width)), out),
            Rows::Nvfp4 { codes, scales } => {
                let (unpack, table) = nvfp4_constants();
                let (codes, scales) =
                    (codes.as_ptr().add(row * width / 2), scales.as_ptr().add(row * width / 16));
                copy(Nvfp4Row { codes, scales, unpack, table }, out)
            }
            Rows::F32(_) | Rows::F16(_) => {
                panic!("a weight of more than 8 significant bits has no BF16 copy")
            }
        }
    }
}

/// # Safety
/// As for [`narrow`]; the row must have as many elements as `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")]
unsafe fn copy<R: NarrowRow>(row: R, out: &mut [u16]) {
    let width = out.len();
    let mut k = 0;
    // SAFETY: passed on from the caller; every store is inside `out`.
    unsafe {
        while k + 32 <= width {
            _mm512_storeu_si512(out.as_mut_ptr().add(k).cast(), row.load(k));
            k += 32;
        }
        if k < width {
            let last = row.load_last(k, width - k);
            _mm512_mask_storeu_epi16(out.as_mut_ptr().add(k).cast(), first(width - k), last);
        }
    }
}

/// Rounds f32 to BF16, to even. NaN stays NaN. Panics if the lengths differ.
pub fn narrow_operands(from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len());
    // SAFETY: as in `tile`; the lengths are equal.
    unsafe { convert(from, to) }
}

/// # Safety
/// As for [`narrow`]; `to` must be as long as `from`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn convert(from: &[f32], to: &mut [u16]) {
    let mut k = 0;
    // SAFETY: every load and store is inside the slices.
    unsafe {
        while k + 16 <= from.len() {
            let narrow: __m256i =
                std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.as_ptr().add(k))));
            _mm256_storeu_si256(to.as_mut_ptr().add(k).cast(), narrow);
            k += 16;
        }
        if k < from.len() {
            let mask = first(from.len() - k) as u16;
            let wide = _mm512_maskz_loadu_ps(mask, from.as_ptr().add(k));
            let narrow: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(wide));
            _mm256_mask_storeu_epi16(to.as_mut_ptr().add(k).cast(), mask, narrow);
        }
    }
}
