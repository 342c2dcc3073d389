//! Products of [`Packed`] weights with BF16 operands: 32 weights of 16 rows in a register meet two numbers of a token.
//!
//! Every FP8 weight and every E2M1 code is a BF16 exactly, so products are exact; sums are f32, one lane for each row, two
//! products at a time in the order of the columns. NVFP4 adds up 16 columns by themselves and multiplies the sum by their
//! scale. So the bits of a result depend on nothing but its row and its token.

#![allow(clippy::needless_range_loop, reason = "one index serves registers and what they are made of")]

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::place::Place;
use super::{E2M1, Tokens};
use crate::backend::cpu::packed::{Codes, Packed, TILE};

/// Tokens that share what was decoded: their sums fill the registers.
const TOKENS: usize = 8;

/// A weight of one format.
trait Form: Copy {
    /// Sums of R tiles from `tile` on with T tokens.
    ///
    /// # Safety
    /// The tiles must be there, each of `x` must point to a row of operands, and the instructions must be there.
    unsafe fn sums<const R: usize, const T: usize>(self, tile: usize, x: [*const u16; T])
    -> [[__m512; T]; R];

    /// Tiles at once for so many tokens: enough chains of sums to hide how long a sum takes, no more than registers.
    const WIDE_FOR: usize;
}

/// Weights that are whole bytes, two columns of 16 rows after the next two.
#[derive(Clone, Copy)]
struct Pairs<W> {
    data: *const u8,
    pairs: usize,
    weights: PhantomData<W>,
}

/// How 32 weights become BF16.
trait Bytes: Copy {
    /// Bytes of 32 weights.
    const BYTES: usize;
    /// As [`Form::WIDE_FOR`].
    const WIDE_FOR: usize;

    /// # Safety
    /// BYTES bytes must be there, aligned to as many; AVX-512 F and BW must be there.
    unsafe fn load(bytes: *const u8) -> __m512i;
}

#[derive(Clone, Copy)]
struct Bf16;

#[derive(Clone, Copy)]
struct Fp8;

#[derive(Clone, Copy)]
struct Nvfp4 {
    codes: *const u8,
    scales: *const u8,
    groups: usize,
}

/// Asks for the line at the same place in the tiles that come next: a tile is so short that the processor's own guess of
/// what is read next begins anew in each. Only where tiles are read at memory's speed, which is for few tokens.
#[inline(always)]
fn ahead<const T: usize>(line: *const u8, tiles: usize) {
    if T <= AHEAD_FOR {
        // SAFETY: asking for memory, wherever it is, reads and writes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(tiles).cast()) };
    }
}

/// Tokens up to which it pays.
const AHEAD_FOR: usize = 4;

/// Two numbers of a token for all rows.
///
/// # Safety
/// `x` must have columns `2 * pair` and the next; AVX-512 F must be there.
#[inline(always)]
unsafe fn operand(x: *const u16, pair: usize) -> __m512bh {
    // SAFETY: passed on from the caller; the types are the same register.
    unsafe { std::mem::transmute(_mm512_set1_epi32(x.add(2 * pair).cast::<i32>().read_unaligned())) }
}

/// # Safety
/// AVX-512 BF16 must be there.
#[inline(always)]
unsafe fn multiply_add(w: __m512i, x: __m512bh, sums: __m512) -> __m512 {
    // SAFETY: the types are the same register.
    unsafe { _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(w), x) }
}

impl<W: Bytes> Form for Pairs<W> {
    const WIDE_FOR: usize = W::WIDE_FOR;

    #[inline(always)]
    unsafe fn sums<const R: usize, const T: usize>(
        self,
        tile: usize,
        x: [*const u16; T],
    ) -> [[__m512; T]; R] {
        // SAFETY: passed on from the caller: a tile is `pairs` times BYTES.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            let tiles: [*const u8; R] =
                std::array::from_fn(|i| self.data.add((tile + i) * self.pairs * W::BYTES));
            for pair in 0..self.pairs {
                let mut operands = [operand(x[0], pair); T];
                for t in 1..T {
                    operands[t] = operand(x[t], pair);
                }
                for i in 0..R {
                    let bytes = tiles[i].add(W::BYTES * pair);
                    if W::BYTES * pair % 64 == 0 {
                        ahead::<T>(bytes, R * self.pairs * W::BYTES);
                    }
                    let w = W::load(bytes);
                    for t in 0..T {
                        sums[i][t] = multiply_add(w, operands[t], sums[i][t]);
                    }
                }
            }
            sums
        }
    }
}

impl Bytes for Bf16 {
    const BYTES: usize = 64;
    const WIDE_FOR: usize = TOKENS;

    #[inline(always)]
    unsafe fn load(bytes: *const u8) -> __m512i {
        // SAFETY: passed on from the caller.
        unsafe { _mm512_load_si512(bytes.cast()) }
    }
}

impl Bytes for Fp8 {
    const BYTES: usize = 32;
    const WIDE_FOR: usize = 4;

    #[inline(always)]
    unsafe fn load(bytes: *const u8) -> __m512i {
        // SAFETY: passed on from the caller; the table has 64 bytes.
        unsafe {
            let table = _mm512_loadu_si512(SUBNORMAL.as_ptr().cast());
            from_e4m3(_mm256_load_si256(bytes.cast()), table)
        }
    }
}

/// k · 2^-9 for k below 8, the upper half of the f32.
const SUBNORMAL: [u16; 32] = {
    let mut table = [0; 32];
    let mut k = 0;
    while k < 8 {
        table[k] = ((k as f32 / 512.0).to_bits() >> 16) as u16;
        k += 1;
    }
    table
};

/// Sign and the seven other bits go where BF16 has them; the exponent is then 120 too small. What it is for codes
/// without an exponent, which are multiples of 2^-9, is looked up: the instruction takes subnormal BF16 for zero, so it
/// cannot be left to a product.
///
/// # Safety
/// AVX-512 F and BW must be there.
#[inline(always)]
unsafe fn from_e4m3(bytes: __m256i, subnormals: __m512i) -> __m512i {
    // SAFETY: the instructions are there by the caller's promise.
    unsafe {
        let wide = _mm512_cvtepu8_epi16(bytes);
        let rest = _mm512_slli_epi16::<4>(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)));
        let normal = _mm512_add_epi16(rest, _mm512_set1_epi16(120 << 7));
        let subnormal = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
        let magnitude = _mm512_mask_permutexvar_epi16(normal, subnormal, wide, subnormals);
        // magnitude or (wide << 8 and the sign's bit)
        let shifted = _mm512_slli_epi16::<8>(wide);
        _mm512_ternarylogic_epi32::<0xf8>(magnitude, shifted, _mm512_set1_epi16(i16::MIN))
    }
}

impl Form for Nvfp4 {
    const WIDE_FOR: usize = 2;

    #[inline(always)]
    unsafe fn sums<const R: usize, const T: usize>(
        self,
        tile: usize,
        x: [*const u16; T],
    ) -> [[__m512; T]; R] {
        // SAFETY: passed on from the caller: a group is two lines of codes and 16 scales, a tile is `groups` of them.
        unsafe {
            let table = _mm512_loadu_si512(E2M1_TWICE.as_ptr().cast());
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            let codes: [*const u8; R] =
                std::array::from_fn(|i| self.codes.add((tile + i) * self.groups * 128));
            let scales: [*const u8; R] =
                std::array::from_fn(|i| self.scales.add((tile + i) * self.groups * 16));
            for group in 0..self.groups {
                for i in 0..R {
                    let mut products = [_mm512_setzero_ps(); T];
                    for half in 0..2 {
                        ahead::<T>(codes[i].add(128 * group + 64 * half), R * self.groups * 128);
                        let line = _mm512_load_si512(codes[i].add(128 * group + 64 * half).cast());
                        let first = 8 * group + 4 * half;
                        products = step::<0, T>(line, table, first, x, products);
                        products = step::<4, T>(line, table, first + 1, x, products);
                        products = step::<8, T>(line, table, first + 2, x, products);
                        products = step::<12, T>(line, table, first + 3, x, products);
                    }
                    if group % 4 == 0 {
                        ahead::<T>(scales[i].add(16 * group), R * self.groups * 16);
                    }
                    let scale = scales_of(_mm_load_si128(scales[i].add(16 * group).cast()));
                    for t in 0..T {
                        sums[i][t] = _mm512_fmadd_ps(products[t], scale, sums[i][t]);
                    }
                }
            }
            sums
        }
    }
}

/// Every E2M1 code as BF16, twice: a look-up takes five bits of which the fifth is another code's.
static E2M1_TWICE: [u16; 32] = {
    let mut table = [0; 32];
    let mut code = 0;
    while code < 32 {
        table[code] = (E2M1[code % 16].to_bits() >> 16) as u16;
        code += 1;
    }
    table
};

/// Two columns of NVFP4, whose codes begin at bit SHIFT of each word.
///
/// # Safety
/// As for [`operand`], of each of `x`; AVX-512 BW and BF16 must be there.
#[inline(always)]
unsafe fn step<const SHIFT: u32, const T: usize>(
    line: __m512i,
    table: __m512i,
    pair: usize,
    x: [*const u16; T],
    mut products: [__m512; T],
) -> [__m512; T] {
    // SAFETY: passed on from the caller.
    unsafe {
        let w = _mm512_permutexvar_epi16(_mm512_srli_epi16::<SHIFT>(line), table);
        for t in 0..T {
            products[t] = multiply_add(w, operand(x[t], pair), products[t]);
        }
        products
    }
}

/// 16 scales as f32, 256 times too small: as FP16 bits the exponent of E4M3 is 8 too small, and this way the hardware
/// handles its subnormals.
///
/// # Safety
/// AVX-512 BW and VL must be there.
#[inline(always)]
unsafe fn scales_of(bytes: __m128i) -> __m512 {
    // SAFETY: the instructions are there by the caller's promise.
    unsafe {
        let wide = _mm256_cvtepu8_epi16(bytes);
        let rest = _mm256_slli_epi16::<7>(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)));
        _mm512_cvtph_ps(_mm256_or_si256(sign, rest))
    }
}

/// Products of rows `from..to` with every token, put into their place a tile at a time. `from` must begin a tile. Panics if
/// rows or operands are not there.
pub fn rows(weight: &Packed, from: usize, to: usize, tokens: Tokens<'_, u16>, place: Place<'_>) {
    assert!(from.is_multiple_of(TILE) && from <= to && to <= weight.rows);
    let data = weight.data();
    let codes = data.as_ptr();
    // SAFETY: the instructions were detected before this module is used; `weight` has all tiles of its rows; operands
    // are checked where they are taken.
    unsafe {
        match &weight.codes {
            Codes::Bf16 => {
                assert!(data.len() >= weight.tiles() * weight.cols * 32);
                let form = Pairs::<Bf16> { data: codes, pairs: weight.cols / 2, weights: PhantomData };
                all(form, 1.0, (from, to), weight.cols, tokens, place)
            }
            Codes::Fp8 { scale } => {
                assert!(data.len() >= weight.tiles() * weight.cols * 16);
                let form = Pairs::<Fp8> { data: codes, pairs: weight.cols / 2, weights: PhantomData };
                all(form, *scale, (from, to), weight.cols, tokens, place)
            }
            Codes::Nvfp4 { scales, global_scale } => {
                assert!(data.len() >= weight.tiles() * weight.cols * 8);
                assert!(scales.len() >= weight.tiles() * weight.cols);
                let form = Nvfp4 { codes, scales: scales.as_ptr(), groups: weight.cols / 16 };
                all(form, 256.0 * global_scale, (from, to), weight.cols, tokens, place)
            }
        }
    }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL and BF16 must be there, and the tiles of the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn all<F: Form>(
    form: F,
    scale: f32,
    (from, to): (usize, usize),
    width: usize,
    tokens: Tokens<'_, u16>,
    place: Place<'_>,
) {
    let mut t = 0;
    while t < tokens.count {
        let batch = (tokens.count - t).min(TOKENS);
        // SAFETY: passed on from the caller.
        unsafe {
            match batch {
                1 => some::<F, 1>(form, scale, (from, to), width, tokens, t, place),
                2 => some::<F, 2>(form, scale, (from, to), width, tokens, t, place),
                3 => some::<F, 3>(form, scale, (from, to), width, tokens, t, place),
                4 => some::<F, 4>(form, scale, (from, to), width, tokens, t, place),
                5 => some::<F, 5>(form, scale, (from, to), width, tokens, t, place),
                6 => some::<F, 6>(form, scale, (from, to), width, tokens, t, place),
                7 => some::<F, 7>(form, scale, (from, to), width, tokens, t, place),
                _ => some::<F, TOKENS>(form, scale, (from, to), width, tokens, t, place),
            }
        }
        t += batch;
    }
}

/// T tokens from `first` on.
///
/// # Safety
/// As for [`all`].
#[inline(always)]
unsafe fn some<F: Form, const T: usize>(
    form: F,
    scale: f32,
    (from, to): (usize, usize),
    width: usize,
    tokens: Tokens<'_, u16>,
    first: usize,
    place: Place<'_>,
) {
    let mut x = [tokens.row(first, width).as_ptr(); T];
    for t in 1..T {
        x[t] = tokens.row(first + t, width).as_ptr();
    }
    let mut row = from;
    while row < to {
        // SAFETY: rows before `to` have their tiles, and `x` points to rows of `width` operands.
        unsafe {
            if T <= F::WIDE_FOR && row + TILE < to {
                put(form.sums::<2, T>(row / TILE, x), scale, (row, to), first, place);
                row += 2 * TILE;
            } else {
                put(form.sums::<1, T>(row / TILE, x), scale, (row, to), first, place);
                row += TILE;
            }
        }
    }
}

/// # Safety
/// AVX-512 F must be there.
#[inline(always)]
unsafe fn put<const R: usize, const T: usize>(
    sums: [[__m512; T]; R],
    scale: f32,
    (row, to): (usize, usize),
    first: usize,
    place: Place<'_>,
) {
    for i in 0..R {
        let row = row + i * TILE;
        for t in 0..T {
            // SAFETY: the instructions are there by the caller's promise.
            unsafe {
                let y = _mm512_mul_ps(sums[i][t], _mm512_set1_ps(scale));
                place.put_register(row, first + t, y, TILE.min(to - row));
            }
        }
    }
}

/// Rounds f32 to BF16, to even. NaN stays NaN. Panics if the lengths differ.
pub fn narrow(from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len());
    // SAFETY: the instructions were detected before this module is used; the lengths are equal.
    unsafe { convert(from, to) }
}

/// # Safety
/// AVX-512 F, BW, VL and BF16 must be there; `to` must be as long as `from`.
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
            let mask = (1u16 << (from.len() - k)) - 1;
            let wide = _mm512_maskz_loadu_ps(mask, from.as_ptr().add(k));
            let narrow: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(wide));
            _mm256_mask_storeu_epi16(to.as_mut_ptr().add(k).cast(), mask, narrow);
        }
    }
}
