//! The block formats of GGUF: a row is cut into blocks of 32, 64 or 256 weights, each with its own scales.
//!
//! | format | weights | bytes | layout of a block, in order |
//! |---|---|---|---|
//! | Q8_0 | 32 | 34 | d f16 · 32 codes i8 |
//! | Q4_0 | 32 | 18 | d f16 · 16 bytes of codes |
//! | IQ4_NL | 32 | 18 | d f16 · 16 bytes of codes, which index a table |
//! | Q4_K | 256 | 144 | d f16 · dmin f16 · 12 bytes of 6-bit scales and minima · 128 bytes of codes |
//! | Q5_K | 256 | 176 | as Q4_K, with 32 bytes of fifth bits before the codes |
//! | Q6_K | 256 | 210 | 128 bytes of low nibbles · 64 bytes of upper bit pairs · 16 scales i8 · d f16 |
//! | IQ4_XS | 256 | 136 | d f16 · upper scale bits u16 · 4 bytes of lower scale bits · 128 bytes of codes |
//! | NVFP4 | 64 | 36 | 4 scales E4M3 without sign · 32 bytes of E2M1 codes |
//!
//! The decoding here is the definition: the vector code of a backend is this code, compiled for its instructions, or
//! gives the same bits. Source: the GGUF format as llama.cpp's `gguf` package defines it; `tests/goldens/blocks.py`
//! holds this file to that package, bit for bit.

use super::codec;

/// Weights in the longest block; every row of fewer blocks is a multiple of [`Blocks::weights`] all the same.
pub const LONGEST: usize = 256;

/// How a row is encoded in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blocks {
    Q4_0,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    /// GGUF's order of NVFP4, which is not that of safetensors files: see the layout above.
    Nvfp4,
}

impl Blocks {
    pub const ALL: [Blocks; 8] = [
        Blocks::Q4_0,
        Blocks::Q8_0,
        Blocks::Q4K,
        Blocks::Q5K,
        Blocks::Q6K,
        Blocks::Iq4Nl,
        Blocks::Iq4Xs,
        Blocks::Nvfp4,
    ];

    /// Weights in a block.
    pub const fn weights(self) -> usize {
        match self {
            Blocks::Q4_0 | Blocks::Q8_0 | Blocks::Iq4Nl => 32,
            Blocks::Nvfp4 => 64,
            Blocks::Q4K | Blocks::Q5K | Blocks::Q6K | Blocks::Iq4Xs => 256,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Blocks::Q4_0 | Blocks::Iq4Nl => 18,
            Blocks::Q8_0 => 34,
            Blocks::Nvfp4 => 36,
            Blocks::Iq4Xs => 136,
            Blocks::Q4K => 144,
            Blocks::Q5K => 176,
            Blocks::Q6K => 210,
        }
    }

    /// Bytes of `weights` weights, a multiple of [`Blocks::weights`].
    pub const fn bytes_of(self, weights: usize) -> usize {
        weights / self.weights() * self.bytes()
    }

    /// The name that GGUF gives it.
    pub fn name(self) -> &'static str {
        match self {
            Blocks::Q4_0 => "Q4_0",
            Blocks::Q8_0 => "Q8_0",
            Blocks::Q4K => "Q4_K",
            Blocks::Q5K => "Q5_K",
            Blocks::Q6K => "Q6_K",
            Blocks::Iq4Nl => "IQ4_NL",
            Blocks::Iq4Xs => "IQ4_XS",
            Blocks::Nvfp4 => "NVFP4",
        }
    }

    /// Whole blocks `data` into `out`, without the scale that a tensor may have besides.
    /// Blocks that one of the two has no room for are left out.
    #[inline(always)]
    pub fn decode(self, data: &[u8], out: &mut [f32]) {
        match self {
            Blocks::Q4_0 => each(data, out, q4_0),
            Blocks::Q8_0 => each(data, out, q8_0),
            Blocks::Q4K => each(data, out, q4_k),
            Blocks::Q5K => each(data, out, q5_k),
            Blocks::Q6K => each(data, out, q6_k),
            Blocks::Iq4Nl => each(data, out, iq4_nl),
            Blocks::Iq4Xs => each(data, out, iq4_xs),
            Blocks::Nvfp4 => each(data, out, nvfp4),
        }
    }
}

/// Blocks of `BYTES` bytes and `LEN` weights, one after the other. Sizes known to the compiler make the loops inside
/// vector code.
#[inline(always)]
fn each<const BYTES: usize, const LEN: usize>(
    data: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = data.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<LEN>();
    for (block, out) in blocks.iter().zip(outs) {
        decode(block, out);
    }
}

/// IEEE half precision, exact, without a call: `half` asks the processor for its features each time.
#[inline(always)]
pub fn f16(low: u8, high: u8) -> f32 {
    /// Moves the exponent, whose bias is 15 there and 127 here, to its place; the product normalises subnormals.
    const REBIAS: f32 = f32::from_bits((112 + 127) << 23);
    let bits = u32::from(u16::from_le_bytes([low, high]));
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7FFF);
    let value = match magnitude >= 0x7C00 {
        true => f32::from_bits(0x7F80_0000 | magnitude << 13),
        false => f32::from_bits(magnitude << 13) * REBIAS,
    };
    f32::from_bits(value.to_bits() | sign)
}

/// w = d · q
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16(block[0], block[1]);
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(code as i8);
    }
}

/// w = d · (q - 8); low nibbles are the first 16 weights, high nibbles the last 16.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block[0], block[1]);
    for i in 0..16 {
        out[i] = d * f32::from((block[2 + i] & 15) as i8 - 8);
        out[16 + i] = d * f32::from((block[2 + i] >> 4) as i8 - 8);
    }
}

/// The sixteen levels of IQ4_NL and IQ4_XS, denser near zero.
pub const LEVELS: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// w = d · level(q), nibbles as in Q4_0.
#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block[0], block[1]);
    for i in 0..16 {
        out[i] = d * LEVELS[usize::from(block[2 + i] & 15)];
        out[16 + i] = d * LEVELS[usize::from(block[2 + i] >> 4)];
    }
}

/// Eight groups of 32 as IQ4_NL, each times d · (scale - 32) with a scale of 6 bits.
#[inline(always)]
fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16(block[0], block[1]);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (outs, _) = out.as_chunks_mut::<32>();
    for (group, out) in outs.iter_mut().enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let scale = low | ((high >> (2 * group) & 3) as u8) << 4;
        let scale = d * f32::from(scale as i8 - 32);
        let codes = &block[8 + 16 * group..][..16];
        for i in 0..16 {
            out[i] = scale * LEVELS[usize::from(codes[i] & 15)];
            out[16 + i] = scale * LEVELS[usize::from(codes[i] >> 4)];
        }
    }
}

/// Eight scales and eight minima of 6 bits in 12 bytes: the first four of each lie in the low bits of bytes 0..4 and
/// 4..8; of the last four, the low nibbles are in bytes 8..12 and the upper two bits above those of the first four.
#[inline(always)]
pub fn scales_and_minima(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for i in 0..4 {
        scales[i] = packed[i] & 63;
        minima[i] = packed[4 + i] & 63;
        scales[4 + i] = packed[8 + i] & 15 | packed[i] >> 6 << 4;
        minima[4 + i] = packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4;
    }
    (scales, minima)
}

/// w = (d · scale) · q - (dmin · minimum), eight groups of 32; 32 bytes hold one group in their low nibbles and the
/// next in their high ones.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16(block[0], block[1]), f16(block[2], block[3]));
    let (scales, minima) = scales_and_minima(&block[4..16]);
    let (outs, _) = out.as_chunks_mut::<64>();
    for (pair, out) in outs.iter_mut().enumerate() {
        let codes = &block[16 + 32 * pair..][..32];
        let scale = [0, 1].map(|i| d * f32::from(scales[2 * pair + i]));
        let minimum = [0, 1].map(|i| dmin * f32::from(minima[2 * pair + i]));
        for i in 0..32 {
            out[i] = scale[0] * f32::from(codes[i] & 15) - minimum[0];
            out[32 + i] = scale[1] * f32::from(codes[i] >> 4) - minimum[1];
        }
    }
}

/// As Q4_K; bit g of byte i of the fifth bits belongs to weight i of group g.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16(block[0], block[1]), f16(block[2], block[3]));
    let (scales, minima) = scales_and_minima(&block[4..16]);
    let fifth = &block[16..48];
    let (outs, _) = out.as_chunks_mut::<64>();
    for (pair, out) in outs.iter_mut().enumerate() {
        let codes = &block[48 + 32 * pair..][..32];
        let scale = [0, 1].map(|i| d * f32::from(scales[2 * pair + i]));
        let minimum = [0, 1].map(|i| dmin * f32::from(minima[2 * pair + i]));
        for i in 0..32 {
            let bits = fifth[i] >> (2 * pair);
            out[i] = scale[0] * f32::from(codes[i] & 15 | (bits & 1) << 4) - minimum[0];
            out[32 + i] = scale[1] * f32::from(codes[i] >> 4 | (bits & 2) << 3) - minimum[1];
        }
    }
}

/// w = (d · scale) · (q - 32), a scale for 16 weights. Each half of 128 weights has 64 bytes of low nibbles (32 weights
/// in the low ones of the first 32 bytes, 32 in those of the last, then the high ones) and 32 bytes of upper bit pairs.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16(block[208], block[209]);
    let (outs, _) = out.as_chunks_mut::<128>();
    for (half, out) in outs.iter_mut().enumerate() {
        let low = &block[64 * half..][..64];
        let high = &block[128 + 32 * half..][..32];
        let (outs, _) = out.as_chunks_mut::<16>();
        for (group, out) in outs.iter_mut().enumerate() {
            let scale = d * f32::from(block[192 + 8 * half + group] as i8);
            // Group g has weights 16 g ..: quarter g / 2 of the half, at the half's own bytes 16 (g % 2) ….
            let (quarter, at) = (group / 2, 16 * (group % 2));
            let low = &low[32 * (quarter % 2) + at..][..16];
            let high = &high[at..][..16];
            let (low_shift, high_shift) = (4 * (quarter / 2), 2 * quarter);
            for i in 0..16 {
                let code = low[i] >> low_shift & 15 | (high[i] >> high_shift & 3) << 4;
                out[i] = scale * f32::from(code as i8 - 32);
            }
        }
    }
}

/// Four groups of 16; low nibbles are the first 8 weights of a group, high nibbles the last 8.
#[inline(always)]
fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    let (outs, _) = out.as_chunks_mut::<16>();
    for (group, out) in outs.iter_mut().enumerate() {
        // The sign bit means nothing here, and the code of NaN is a zero, as in the format's own decoder.
        let scale = match block[group] & 0x7F {
            0x7F => 0.0,
            code => codec::e4m3_to_f32(code),
        };
        let codes = &block[4 + 8 * group..][..8];
        for i in 0..8 {
            out[i] = codec::e2m1_to_f32(codes[i]) * scale;
            out[8 + i] = codec::e2m1_to_f32(codes[i] >> 4) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_read_exactly() {
        for bits in 0..=u16::MAX {
            let [low, high] = bits.to_le_bytes();
            let (got, expected) = (f16(low, high), codec::f16_to_f32(bits));
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{bits:#06x}");
        }
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        let mut out = [7.0; 40];
        Blocks::Q8_0.decode(&[0; 100], &mut out);
        assert_eq!((out[31], out[32]), (0.0, 7.0));
    }
}
