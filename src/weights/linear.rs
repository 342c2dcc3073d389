//! A linear weight as the checkpoint stores it. Nothing is expanded: backends read these bytes.

use bytes::Bytes;

use super::{Blocks, codec};

/// Elements of a row that share one block scale in NVFP4.
pub const NVFP4_BLOCK: usize = 16;

/// `[rows, cols]` = `[out, in]`, row-major, in its stored format.
#[derive(Debug, Clone)]
pub struct Linear {
    pub rows: usize,
    pub cols: usize,
    pub format: Format,
    /// The stored codes; empty for a weight that is only described (trace, plan).
    pub data: Bytes,
}

/// How the elements of a [`Linear`] are encoded, with what is needed to read them.
#[derive(Debug, Clone)]
pub enum Format {
    F32,
    F16,
    BF16,
    /// E4M3, times one scale per tensor.
    Fp8 {
        scale: f32,
    },
    /// E2M1, low nibble first; E4M3 block scales `[rows, cols/16]` linear; times `global_scale`
    /// (already inverted for compressed-tensors files).
    Nvfp4 {
        scales: Bytes,
        global_scale: f32,
    },
    /// Blocks of GGUF, times one scale per tensor, which is 1 unless the file says otherwise.
    Blocks {
        blocks: Blocks,
        scale: f32,
    },
}

/// A [`Format`] without its scales: what a recipe can say of a weight that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    F32,
    F16,
    BF16,
    Fp8,
    Nvfp4,
    Blocks(Blocks),
}

impl Kind {
    /// Bytes of `[rows, cols]` elements with their block scales; the scale of a whole tensor is not counted.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        let elements = rows * cols;
        match self {
            Kind::F32 => 4 * elements,
            Kind::F16 | Kind::BF16 => 2 * elements,
            Kind::Fp8 => elements,
            Kind::Nvfp4 => elements / 2 + elements / NVFP4_BLOCK,
            Kind::Blocks(blocks) => blocks.bytes_of(elements),
        }
    }

    /// The name that tables and messages use.
    pub fn name(self) -> &'static str {
        match self {
            Kind::F32 => "F32",
            Kind::F16 => "F16",
            Kind::BF16 => "BF16",
            Kind::Fp8 => "FP8",
            Kind::Nvfp4 => "NVFP4",
            Kind::Blocks(blocks) => blocks.name(),
        }
    }
}

impl Format {
    pub fn kind(&self) -> Kind {
        match self {
            Format::F32 => Kind::F32,
            Format::F16 => Kind::F16,
            Format::BF16 => Kind::BF16,
            Format::Fp8 { .. } => Kind::Fp8,
            Format::Nvfp4 { .. } => Kind::Nvfp4,
            Format::Blocks { blocks, .. } => Kind::Blocks(*blocks),
        }
    }
}

impl Linear {
    /// A weight without data, whose sizes and bytes can still be asked for. Its scales are 1.
    pub fn described(rows: usize, cols: usize, kind: Kind) -> Self {
        let format = match kind {
            Kind::F32 => Format::F32,
            Kind::F16 => Format::F16,
            Kind::BF16 => Format::BF16,
            Kind::Fp8 => Format::Fp8 { scale: 1.0 },
            Kind::Nvfp4 => Format::Nvfp4 { scales: Bytes::new(), global_scale: 1.0 },
            Kind::Blocks(blocks) => Format::Blocks { blocks, scale: 1.0 },
        };
        Linear { rows, cols, format, data: Bytes::new() }
    }

    pub fn kind(&self) -> Kind {
        self.format.kind()
    }

    /// Bytes that reading all of it moves, from shape and format: right without data too.
    pub fn bytes(&self) -> usize {
        self.kind().bytes(self.rows, self.cols)
    }

    /// Whether it has shape and format only.
    pub fn is_described(&self) -> bool {
        self.data.is_empty() && self.rows * self.cols > 0
    }

    /// One row as the format defines it, into `out` [cols]. Every product is exact in `f32` except the last
    /// one, with the scale of the whole tensor, which rounds once; GGUF's blocks round as [`Blocks`] says.
    ///
    /// Panics if `row` or `out` do not fit the shape or the weight is only described: a caller's mistake.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        let cols = self.cols;
        assert!(row < self.rows && out.len() == cols, "row {row} of {}, {} of {cols}", self.rows, out.len());
        match &self.format {
            Format::F32 => {
                let (words, _) = self.data[row * cols * 4..][..cols * 4].as_chunks();
                for (out, &bytes) in out.iter_mut().zip(words) {
                    *out = f32::from_le_bytes(bytes);
                }
            }
            Format::F16 => self.row_16(row, out, codec::f16_to_f32),
            Format::BF16 => self.row_16(row, out, codec::bf16_to_f32),
            Format::Fp8 { scale } => {
                for (out, &code) in out.iter_mut().zip(&self.data[row * cols..][..cols]) {
                    *out = codec::e4m3_to_f32(code) * scale;
                }
            }
            Format::Nvfp4 { scales, global_scale } => {
                let codes = &self.data[row * cols / 2..][..cols / 2];
                let scales = &scales[row * cols / NVFP4_BLOCK..][..cols / NVFP4_BLOCK];
                let blocks = out.chunks_exact_mut(NVFP4_BLOCK).zip(codes.chunks_exact(NVFP4_BLOCK / 2));
                for ((out, codes), &scale) in blocks.zip(scales) {
                    let scale = codec::e4m3_to_f32(scale);
                    for (pair, &byte) in out.chunks_exact_mut(2).zip(codes) {
                        pair[0] = codec::e2m1_to_f32(byte) * scale * global_scale;
                        pair[1] = codec::e2m1_to_f32(byte >> 4) * scale * global_scale;
                    }
                }
            }
            Format::Blocks { blocks, scale } => {
                blocks.decode(self.block_row(*blocks, row), out);
                out.iter_mut().for_each(|w| *w *= scale);
            }
        }
    }

    /// The bytes of a row in blocks, whose length divides the width.
    fn block_row(&self, blocks: Blocks, row: usize) -> &[u8] {
        let bytes = blocks.bytes_of(self.cols);
        &self.data[row * bytes..][..bytes]
    }

    /// The same weight with rows in another order: row i of the result is row `from(i)` of this one.
    /// The rows are copied. Panics where `from` names a row that is not there.
    pub fn reordered(&self, from: impl Fn(usize) -> usize) -> Linear {
        let reorder = |data: &Bytes| {
            let each = data.len() / self.rows.max(1);
            let mut out = Vec::with_capacity(data.len());
            (0..self.rows).for_each(|row| out.extend_from_slice(&data[from(row) * each..][..each]));
            Bytes::from(out)
        };
        let format = match &self.format {
            Format::Nvfp4 { scales, global_scale } => {
                Format::Nvfp4 { scales: reorder(scales), global_scale: *global_scale }
            }
            other => other.clone(),
        };
        Linear { format, data: reorder(&self.data), ..*self }
    }

    fn row_16(&self, row: usize, out: &mut [f32], decode: impl Fn(u16) -> f32) {
        let (words, _) = self.data[row * self.cols * 2..][..self.cols * 2].as_chunks();
        for (out, &bytes) in out.iter_mut().zip(words) {
            *out = decode(u16::from_le_bytes(bytes));
        }
    }

    /// All of it as `f32` [rows, cols]: for tests, reports and small weights.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        if self.cols > 0 {
            for (row, out) in values.chunks_exact_mut(self.cols).enumerate() {
                self.row_f32(row, out);
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector of the format's specification: every code once, block scale 1, global scale 0.5.
    #[test]
    fn nvfp4_reads_low_nibble_first() {
        let linear = Linear {
            rows: 1,
            cols: 16,
            format: Format::Nvfp4 { scales: Bytes::from_static(&[0x38]), global_scale: 0.5 },
            data: Bytes::from_static(&[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]),
        };
        let magnitudes = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0];
        let expected: Vec<f32> = magnitudes.into_iter().chain(magnitudes.map(|m| -m)).collect();
        assert_eq!(linear.to_f32(), expected);
        assert!(linear.to_f32()[8].is_sign_negative(), "code 8 is -0");
    }

    #[test]
    fn each_row_has_its_own_block_scales() {
        let linear = Linear {
            rows: 2,
            cols: 32,
            // 1, 2 in the first row; 0.5, 448 in the second.
            format: Format::Nvfp4 {
                scales: Bytes::from_static(&[0x38, 0x40, 0x30, 0x7E]),
                global_scale: 1.0,
            },
            data: Bytes::from(vec![0x22; 32]),
        };
        let values = linear.to_f32();
        assert_eq!([values[0], values[16], values[32], values[48]], [1.0, 2.0, 0.5, 448.0]);
    }

    #[test]
    fn fp8_multiplies_by_its_scale() {
        let linear = Linear {
            rows: 2,
            cols: 2,
            format: Format::Fp8 { scale: 2.0 },
            data: Bytes::from_static(&[0x38, 0x7E, 0x01, 0xB8]),
        };
        assert_eq!(linear.to_f32(), [2.0, 896.0, 1.0 / 256.0, -2.0]);
    }

    #[test]
    fn bytes_follow_from_shape_and_format_alone() {
        for (kind, expected) in
            [(Kind::F32, 4096), (Kind::F16, 2048), (Kind::BF16, 2048), (Kind::Fp8, 1024), (Kind::Nvfp4, 576)]
        {
            let linear = Linear::described(16, 64, kind);
            assert_eq!(linear.bytes(), expected, "{kind:?}");
            assert!(linear.is_described());
        }
    }
}
