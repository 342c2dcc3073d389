//! Weights in the order in which the BF16 kernels read them: 16 rows side by side, two columns at a time.
//!
//! ```text
//! tile of 16 rows, columns 2p and 2p + 1:      row 0      row 1            row 15
//!                                             [k k+1]    [k k+1]    …     [k k+1]      32 weights, one register
//! ```
//!
//! Each row has a lane of the sums, so nothing is added up across lanes, and an operand is two numbers for all lanes. The
//! codes stay as they are stored, in as many bytes; only their order changes, once, at load.
//!
//! NVFP4 puts eight columns of a tile into one line of 64 bytes: four bits of each of 32 words are columns 0 and 1, the
//! next four bits 2 and 3, and so on, so that a shift brings the codes of two columns to where a look-up takes them.
//! The scales of 16 columns are 16 bytes, a row each.

use super::simd::Output;
use crate::ops::lines::Lines;
use crate::weights::linear::NVFP4_BLOCK;
use crate::weights::{Format, Linear};

/// Rows of a tile.
pub const TILE: usize = 16;

/// See the module. Rows that fill up the last tile are zero.
pub struct Packed {
    pub rows: usize,
    pub cols: usize,
    pub codes: Codes,
    data: Lines<u8>,
}

/// What the bytes stand for.
pub enum Codes {
    Bf16,
    /// E4M3, times one scale per tensor.
    Fp8 {
        scale: f32,
    },
    /// E2M1, times E4M3 scales `[tile, cols / 16, 16]`, times one per tensor.
    Nvfp4 {
        scales: Lines<u8>,
        global_scale: f32,
    },
}

impl Codes {
    /// Bytes of a tile's codes.
    fn tile_bytes(&self, cols: usize) -> usize {
        match self {
            Codes::Bf16 => TILE * cols * 2,
            Codes::Fp8 { .. } => TILE * cols,
            Codes::Nvfp4 { .. } => TILE * cols / 2,
        }
    }
}

impl Packed {
    /// Whether a weight has such an order: its products are exact in BF16, and two columns stay together.
    pub fn takes(weight: &Linear) -> bool {
        match weight.format {
            Format::BF16 | Format::Fp8 { .. } => weight.cols.is_multiple_of(2),
            Format::Nvfp4 { .. } => weight.cols.is_multiple_of(NVFP4_BLOCK),
            _ => false,
        }
    }

    /// Room for `weight`, which [`Packed::takes`]; [`Packed::fill`] then brings it in.
    pub fn room(weight: &Linear) -> Self {
        let (rows, cols) = (weight.rows, weight.cols);
        let tiles = rows.div_ceil(TILE);
        let codes = match weight.format {
            Format::Fp8 { scale } => Codes::Fp8 { scale },
            Format::Nvfp4 { global_scale, .. } => Codes::Nvfp4 { scales: lines(tiles * cols), global_scale },
            _ => Codes::Bf16,
        };
        let data = lines(tiles * codes.tile_bytes(cols));
        Self { rows, cols, codes, data }
    }

    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The tiles' codes and scales, for [`Filler::fill`] from several threads.
    pub fn filler<'a>(&mut self, weight: &'a Linear) -> Filler<'a> {
        let tile = self.codes.tile_bytes(self.cols);
        let scales = match &mut self.codes {
            Codes::Nvfp4 { scales, .. } => Output::new(scales, self.cols),
            _ => Output::new(&mut [], 0),
        };
        Filler { weight, data: Output::new(&mut self.data, tile), tile, scales }
    }
}

/// Brings a weight into its order, tile by tile.
#[derive(Clone, Copy)]
pub struct Filler<'a> {
    weight: &'a Linear,
    data: Output<u8>,
    /// Bytes of a tile.
    tile: usize,
    /// [tile, cols]
    scales: Output<u8>,
}

impl Filler<'_> {
    /// # Safety
    /// The [`Packed`] that this came from must still be there, and no two threads may fill the same tile.
    pub unsafe fn fill(&self, tile: usize) {
        let (weight, cols) = (self.weight, self.weight.cols);
        // SAFETY: passed on from the caller.
        let out = unsafe { self.data.slice(tile, 0, self.tile) };
        let rows = TILE.min(weight.rows - tile * TILE);
        let bytes = |width: usize| &weight.data[tile * TILE * width..][..rows * width];
        match &weight.format {
            Format::Fp8 { .. } => interleave::<2>(bytes(cols), cols, out),
            Format::Nvfp4 { scales, .. } => {
                spread(bytes(cols / 2), cols / 2, out);
                let groups = cols / NVFP4_BLOCK;
                // SAFETY: passed on from the caller.
                let out = unsafe { self.scales.slice(tile, 0, cols) };
                interleave::<1>(&scales[tile * TILE * groups..][..rows * groups], groups, out);
            }
            _ => interleave::<4>(bytes(2 * cols), 2 * cols, out),
        }
    }
}

/// `from` [rows, width] in pieces of N bytes becomes `to` [width / N, TILE] pieces.
fn interleave<const N: usize>(from: &[u8], width: usize, to: &mut [u8]) {
    for (r, row) in from.chunks_exact(width).enumerate() {
        for (piece, to) in
            row.as_chunks::<N>().0.iter().zip(to.as_chunks_mut::<N>().0[r..].iter_mut().step_by(TILE))
        {
            *to = *piece;
        }
    }
}

/// `from` [rows, width] E2M1 codes; four bytes of each row make one line with those of the others.
fn spread(from: &[u8], width: usize, to: &mut [u8]) {
    /// Bits 0..4, 8..12, 16..20 and 24..28, next to each other.
    fn every_other(codes: u32) -> u32 {
        let pairs = (codes | codes >> 4) & 0x00ff_00ff;
        (pairs | pairs >> 8) & 0xffff
    }
    for (r, row) in from.chunks_exact(width).enumerate() {
        let words = to.as_chunks_mut::<4>().0[r..].iter_mut().step_by(TILE);
        for (codes, to) in row.as_chunks::<4>().0.iter().zip(words) {
            let codes = u32::from_le_bytes(*codes);
            let (even, odd) = (every_other(codes & 0x0f0f_0f0f), every_other(codes >> 4 & 0x0f0f_0f0f));
            *to = (even | odd << 16).to_le_bytes();
        }
    }
}

/// Room for whole cache lines: a register may reach past the last tile.
fn lines(bytes: usize) -> Lines<u8> {
    Lines::zeros(bytes.next_multiple_of(64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn packed(weight: &Linear) -> Packed {
        let mut packed = Packed::room(weight);
        let filler = packed.filler(weight);
        // SAFETY: one thread, and `packed` is there.
        (0..weight.rows.div_ceil(TILE)).for_each(|tile| unsafe { filler.fill(tile) });
        packed
    }

    #[test]
    fn two_columns_of_sixteen_rows_stand_together() {
        let data: Vec<u8> = (0..18 * 4).collect();
        let weight =
            Linear { rows: 18, cols: 4, format: Format::Fp8 { scale: 1.0 }, data: Bytes::from(data) };
        let packed = packed(&weight);
        assert_eq!(packed.tiles(), 2);
        // Tile 0, columns 2 and 3, row 5; tile 1, columns 0 and 1, row 17; and a row that is not there.
        assert_eq!(packed.data()[2 * 16 + 2 * 5..][..2], [22, 23]);
        assert_eq!(packed.data()[64 + 2..][..2], [68, 69]);
        assert_eq!(packed.data()[64 + 2 * 2..][..2], [0, 0]);
    }

    #[test]
    fn a_shift_brings_two_columns_of_nvfp4_to_the_lowest_bits() {
        let (rows, cols) = (16, 32);
        let code = |row: usize, k: usize| ((row * 7 + k * 3 + row * k) % 16) as u8;
        let byte = |i: usize| {
            let (row, k) = (i / (cols / 2), 2 * (i % (cols / 2)));
            code(row, k) | code(row, k + 1) << 4
        };
        let scales: Vec<u8> = (0..rows * cols / 16).map(|i| i as u8).collect();
        let weight = Linear {
            rows,
            cols,
            format: Format::Nvfp4 { scales: Bytes::from(scales), global_scale: 1.0 },
            data: (0..rows * cols / 2).map(byte).collect(),
        };
        let packed = packed(&weight);
        for row in 0..rows {
            for k in 0..cols {
                let word = &packed.data()[k / 8 * 64 + (2 * row + k % 2) * 2..][..2];
                let word = u16::from_le_bytes([word[0], word[1]]);
                assert_eq!((word >> (4 * (k % 8 / 2)) & 15) as u8, code(row, k), "row {row}, column {k}");
            }
        }
        let Codes::Nvfp4 { scales, .. } = &packed.codes else { panic!("another format") };
        assert_eq!(scales[16 + 3], 3 * 2 + 1, "row 3, columns 16 to 31");
    }
}
