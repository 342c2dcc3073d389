//! Numbers as a cache or a state keeps them, in 4, 2 or 1 bytes, and the stochastic rounding of a state.

use std::ops::Range;

use half::{bf16, f16};

use super::lines::Lines;
use crate::weights::codec::{e4m3_to_f32, f32_to_e4m3};

/// How one number is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    F32,
    F16,
    Bf16,
    /// E4M3, scale 1, saturating.
    Fp8,
}

impl Cell {
    pub fn bytes(self) -> usize {
        match self {
            Cell::F32 => 4,
            Cell::F16 | Cell::Bf16 => 2,
            Cell::Fp8 => 1,
        }
    }

    /// The name that tables use.
    pub fn name(self) -> &'static str {
        match self {
            Cell::F32 => "F32",
            Cell::F16 => "F16",
            Cell::Bf16 => "BF16",
            Cell::Fp8 => "FP8",
        }
    }
}

/// Kept numbers, all of one kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Cells {
    F32(Lines<f32>),
    F16(Lines<f16>),
    Bf16(Lines<bf16>),
    Fp8(Lines<u8>),
}

impl Cells {
    /// `len` zeros.
    pub fn new(cell: Cell, len: usize) -> Self {
        match cell {
            Cell::F32 => Cells::F32(Lines::zeros(len)),
            Cell::F16 => Cells::F16(Lines::zeros(len)),
            Cell::Bf16 => Cells::Bf16(Lines::zeros(len)),
            Cell::Fp8 => Cells::Fp8(Lines::zeros(len)),
        }
    }

    fn cell(&self) -> Cell {
        match self {
            Cells::F32(_) => Cell::F32,
            Cells::F16(_) => Cell::F16,
            Cells::Bf16(_) => Cell::Bf16,
            Cells::Fp8(_) => Cell::Fp8,
        }
    }

    pub fn bytes(&self) -> usize {
        self.len() * self.cell().bytes()
    }

    pub fn len(&self) -> usize {
        match self {
            Cells::F32(cells) => cells.len(),
            Cells::F16(cells) => cells.len(),
            Cells::Bf16(cells) => cells.len(),
            Cells::Fp8(cells) => cells.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn get(&self, index: usize) -> f32 {
        match self {
            Cells::F32(cells) => cells[index],
            Cells::F16(cells) => cells[index].to_f32(),
            Cells::Bf16(cells) => cells[index].to_f32(),
            Cells::Fp8(cells) => e4m3_to_f32(cells[index]),
        }
    }

    /// Numbers from `from` on.
    pub fn read(&self, from: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.get(from + i);
        }
    }

    /// Rounds to nearest, ties to even.
    pub fn write(&mut self, from: usize, values: &[f32]) {
        match self {
            Cells::F32(cells) => cells[from..][..values.len()].copy_from_slice(values),
            Cells::F16(cells) => put(&mut cells[from..], values, f16::from_f32),
            Cells::Bf16(cells) => put(&mut cells[from..], values, bf16::from_f32),
            Cells::Fp8(cells) => put(&mut cells[from..], values, f32_to_e4m3),
        }
    }

    pub fn copy_within(&mut self, from: Range<usize>, to: usize) {
        match self {
            Cells::F32(cells) => cells.copy_within(from, to),
            Cells::F16(cells) => cells.copy_within(from, to),
            Cells::Bf16(cells) => cells.copy_within(from, to),
            Cells::Fp8(cells) => cells.copy_within(from, to),
        }
    }
}

fn put<T>(cells: &mut [T], values: &[f32], encode: impl Fn(f32) -> T) {
    for (cell, &value) in cells[..values.len()].iter_mut().zip(values) {
        *cell = encode(value);
    }
}

/// Rounds what one head of a state becomes after a token to numbers of f16. The choice between the two neighbours
/// depends on this key and the element alone, so that chunks, drafts and batch change nothing.
#[derive(Debug, Clone, Copy)]
pub struct Rounding {
    key: u32,
}

impl Rounding {
    /// `position` in the sequence, `layer` among the Mamba layers, `head` in it.
    pub fn new(position: u32, layer: u32, head: u32) -> Self {
        // One finalizer of splitmix64: every bit of the three reaches every bit of the key.
        let mut z = u64::from(position) ^ u64::from(layer) << 32 ^ u64::from(head) << 48;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Rounding { key: (z >> 32) as u32 }
    }

    /// `value` as one of its two neighbours in f16, the nearer one more often: so often that the mean is `value`.
    /// Beyond the largest number of f16 it is that number.
    #[inline(always)]
    pub fn apply(self, element: u32, value: f32) -> f32 {
        const LARGEST: f32 = 65504.0;
        const EXPONENT: u32 = 0x7f80_0000;
        /// Exponent field of 2^-14, below which the numbers of f16 are 2^-24 apart.
        const SMALLEST: u32 = (127 - 14) << 23;
        /// Chance is a number of this many bits: as many as an f32 has more than an f16.
        const BITS: u32 = 13;
        let mut random = self.key ^ element.wrapping_mul(0x9e37_79b1);
        random = (random ^ (random >> 16)).wrapping_mul(0x85eb_ca6b);
        random = (random ^ (random >> 13)).wrapping_mul(0xc2b2_ae35);
        let magnitude = value.abs().min(LARGEST);
        let exponent = (magnitude.to_bits() & EXPONENT).max(SMALLEST);
        // Neighbours are 2^(exponent - 10) apart: one is counted as 2^13, so that a normal f32 is a whole number.
        let scaled = magnitude * f32::from_bits((277 << 23) - exponent);
        let steps = (scaled as i32 + (random >> (32 - BITS)) as i32) >> BITS;
        let rounded = steps as f32 * f32::from_bits(exponent - (10 << 23));
        if value.is_nan() { value } else { rounded.copysign(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Vec<f32> {
        let powers = (-26..16).flat_map(|e| [1.0f32, 1.000_3, 1.37, 1.999_6].map(|m| m * 2f32.powi(e)));
        let mut values: Vec<f32> = powers.filter(|v| *v < 65504.0).collect();
        values.extend([0.0, 65504.0, 2f32.powi(-24) * 0.3]);
        values.iter().flat_map(|v| [*v, -*v]).collect()
    }

    /// The numbers of f16 around `value`.
    fn neighbours(value: f32) -> [f32; 2] {
        let nearest = f16::from_f32(value);
        let step = |by: i32| f16::from_bits((i32::from(nearest.to_bits()) + by) as u16).to_f32();
        match nearest.to_f32() {
            n if n == value => [n, n],
            // The pattern of a number grows with its magnitude.
            n if n.abs() > value.abs() => [step(-1), n],
            n => [n, step(1)],
        }
    }

    #[test]
    fn a_rounded_number_is_one_of_its_two_neighbours() {
        for value in values() {
            let two = neighbours(value);
            for element in 0..500 {
                let got = Rounding::new(7, 1, 2).apply(element, value);
                assert!(two.contains(&got), "{value} became {got}, neighbours {two:?}");
            }
        }
    }

    #[test]
    fn the_mean_of_many_roundings_is_the_number() {
        // The mean of n draws between neighbours d apart is off by d / (2 sqrt(n)) at most, 68 % of the time; five
        // times that is one failure in a million. Chance in steps of 2^-13 d adds at most one such step.
        const DRAWS: u32 = 20_000;
        for value in values() {
            let two = neighbours(value);
            let apart = f64::from(two[1] - two[0]).abs();
            for by_position in [false, true] {
                let draw = |i| match by_position {
                    true => Rounding::new(i, 3, 5).apply(9, value),
                    false => Rounding::new(9, 3, 5).apply(i, value),
                };
                let mean = (0..DRAWS).map(|i| f64::from(draw(i))).sum::<f64>() / f64::from(DRAWS);
                let allowed = apart * (2.5 / f64::from(DRAWS).sqrt() + 1.0 / 8192.0);
                assert!((mean - f64::from(value)).abs() <= allowed, "{value}: mean {mean} ± {allowed}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_saturates_and_what_is_no_number_stays_none() {
        let rounding = Rounding::new(0, 0, 0);
        assert_eq!(rounding.apply(0, 1e9), 65504.0);
        assert_eq!(rounding.apply(0, f32::NEG_INFINITY), -65504.0);
        assert!(rounding.apply(0, f32::NAN).is_nan());
    }

    #[test]
    fn cells_take_the_bytes_they_say_and_round_to_nearest() {
        for (cell, kept) in
            [(Cell::F32, 0.3), (Cell::F16, 0.300_048_83), (Cell::Bf16, 0.300_781_25), (Cell::Fp8, 0.3125)]
        {
            let mut cells = Cells::new(cell, 6);
            cells.write(2, &[0.3, 500.0]);
            cells.copy_within(2..4, 4);
            let mut out = [9.0; 6];
            cells.read(0, &mut out);
            let large = if cell == Cell::Fp8 { 448.0 } else { 500.0 };
            assert_eq!(out, [0.0, 0.0, kept, large, kept, large], "{cell:?}");
            assert_eq!(cells.bytes(), 6 * cell.bytes());
        }
    }
}
