//! The tile as plain Rust over 16 lanes, which the compiler turns into AVX2 or NEON where it may.

use super::{E2M1, E4M3, Rows, Sums, fma, reduce, versions};

/// 2^120: moves an E4M3 exponent, shifted into the f32 field, to its place.
const E4M3_REBIAS: f32 = f32::from_bits((120 + 127) << 23);

#[inline(always)]
fn bf16(data: &[u8], i: usize) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([data[2 * i], data[2 * i + 1]])) << 16)
}

#[inline(always)]
fn f16(data: &[u8], i: usize) -> f32 {
    half::f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32()
}

#[inline(always)]
fn f32_at(data: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]])
}

/// Sign and exponent by shifts; subnormal codes come out right because the f32 product normalises them.
#[inline(always)]
fn fp8(byte: u8) -> f32 {
    let bits = (u32::from(byte & 0x80) << 24) | (u32::from(byte & 0x7f) << 20);
    f32::from_bits(bits) * E4M3_REBIAS
}

/// E2M1 in integers: twice its magnitude is t below 4, else (2 + low bit) << (t / 2 - 1).
#[inline(always)]
fn fp4(code: u8) -> f32 {
    let t = u32::from(code & 7);
    let large = (2 + (t & 1)) << ((t >> 1).max(1) - 1);
    let twice = if t < 4 { t } else { large };
    let magnitude = twice as i32 as f32 * 0.5;
    f32::from_bits(magnitude.to_bits() | (u32::from(code & 8) << 28))
}

/// Sixteen weights from element `16 * block` of a row.
#[inline(always)]
fn block16(rows: Rows<'_>, row: usize, width: usize, block: usize) -> [f32; 16] {
    let mut out = [0.0; 16];
    match rows {
        Rows::F32(data) => {
            let data = &data[(row * width + 16 * block) * 4..][..64];
            for (i, out) in out.iter_mut().enumerate() {
                *out = f32_at(data, i);
            }
        }
        Rows::F16(data) => {
            let data = &data[(row * width + 16 * block) * 2..][..32];
            for (i, out) in out.iter_mut().enumerate() {
                *out = f16(data, i);
            }
        }
        Rows::Bf16(data) => {
            let data = &data[(row * width + 16 * block) * 2..][..32];
            for (i, out) in out.iter_mut().enumerate() {
                *out = bf16(data, i);
            }
        }
        Rows::Fp8(data) => {
            let data = &data[row * width + 16 * block..][..16];
            for (out, &byte) in out.iter_mut().zip(data) {
                *out = fp8(byte);
            }
        }
        Rows::Nvfp4 { codes, scales } => {
            let codes = &codes[row * width / 2 + 8 * block..][..8];
            let scale = E4M3[usize::from(scales[row * width / 16 + block])];
            for (i, &pair) in codes.iter().enumerate() {
                out[2 * i] = fp4(pair & 15) * scale;
                out[2 * i + 1] = fp4(pair >> 4) * scale;
            }
        }
    }
    out
}

/// One weight of the tail that is shorter than 16. NVFP4 rows have none: their blocks are 16 wide.
#[inline(always)]
pub fn element(rows: Rows<'_>, row: usize, width: usize, i: usize) -> f32 {
    let at = row * width + i;
    match rows {
        Rows::F32(data) => f32_at(data, at),
        Rows::F16(data) => f16(data, at),
        Rows::Bf16(data) => bf16(data, at),
        Rows::Fp8(data) => fp8(data[at]),
        Rows::Nvfp4 { codes, scales } => {
            let pair = codes[at / 2];
            let code = if at.is_multiple_of(2) { pair & 15 } else { pair >> 4 };
            E2M1[usize::from(code)] * E4M3[usize::from(scales[at / 16])]
        }
    }
}

#[inline(always)]
fn tile_body<const FMA: bool>(
    rows: Rows<'_>,
    first: usize,
    count: usize,
    width: usize,
    x: &[&[f32]],
    sums: &mut Sums,
) {
    // A match out here lets each arm's inner loop know its format.
    match rows {
        Rows::F32(d) => one_format::<FMA>(Rows::F32(d), first, count, width, x, sums),
        Rows::F16(d) => one_format::<FMA>(Rows::F16(d), first, count, width, x, sums),
        Rows::Bf16(d) => one_format::<FMA>(Rows::Bf16(d), first, count, width, x, sums),
        Rows::Fp8(d) => one_format::<FMA>(Rows::Fp8(d), first, count, width, x, sums),
        Rows::Nvfp4 { codes, scales } => {
            one_format::<FMA>(Rows::Nvfp4 { codes, scales }, first, count, width, x, sums)
        }
    }
}

#[inline(always)]
fn one_format<const FMA: bool>(
    rows: Rows<'_>,
    first: usize,
    count: usize,
    width: usize,
    x: &[&[f32]],
    sums: &mut Sums,
) {
    let blocks = width / 16;
    for i in 0..count {
        let mut lanes = [[0.0f32; 16]; 4];
        for block in 0..blocks {
            let w = block16(rows, first + i, width, block);
            for (lanes, x) in lanes.iter_mut().zip(x) {
                let x = &x[16 * block..][..16];
                for l in 0..16 {
                    lanes[l] = fma::<FMA>(w[l], x[l], lanes[l]);
                }
            }
        }
        for ((sums, lanes), x) in sums.iter_mut().zip(lanes).zip(x) {
            let mut sum = reduce(lanes);
            for k in 16 * blocks..width {
                sum = fma::<FMA>(element(rows, first + i, width, k), x[k], sum);
            }
            sums[i] = sum;
        }
    }
}

#[inline(always)]
fn decode_body<const FMA: bool>(rows: Rows<'_>, row: usize, out: &mut [f32]) {
    let width = out.len();
    let mut blocks = out.chunks_exact_mut(16);
    for (block, out) in blocks.by_ref().enumerate() {
        out.copy_from_slice(&block16(rows, row, width, block));
    }
    for (i, out) in blocks.into_remainder().iter_mut().enumerate() {
        *out = element(rows, row, width, width / 16 * 16 + i);
    }
}

versions! {
    /// See [`super::tile`].
    pub fn tile = tile_body(
        rows: Rows<'_>,
        first: usize,
        count: usize,
        width: usize,
        x: &[&[f32]],
        sums: &mut Sums,
    )
}

versions! {
    /// One row as f32, without the scale per tensor: the same numbers [`tile`] multiplies.
    pub fn decode = decode_body(rows: Rows<'_>, row: usize, out: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::codec::{e2m1_to_f32, e4m3_to_f32};

    #[test]
    fn every_code_decodes_as_the_scalar_codec_says() {
        for code in 0..16 {
            assert_eq!(fp4(code).to_bits(), e2m1_to_f32(code).to_bits(), "e2m1 {code}");
        }
        for byte in 0..=255u8 {
            if byte & 0x7f != 0x7f {
                assert_eq!(fp8(byte).to_bits(), e4m3_to_f32(byte).to_bits(), "e4m3 {byte:#x}");
            }
        }
    }
}
