//! Reading and multiplying where nothing is known of the machine.

use std::hint::black_box;

use super::Unit;

const SUMS: usize = 32;

pub fn has(unit: Unit) -> bool {
    unit == Unit::F32
}

/// Multiplications and additions of one round.
pub fn flops_per_round(_: Unit) -> usize {
    2 * SUMS
}

/// Runs `rounds` rounds.
pub fn multiply(unit: Unit, rounds: usize) {
    black_box(sum(unit, rounds, 1e-9));
}

/// The sum of all sums after `rounds` rounds of products of `x` and 1.
pub fn sum(_: Unit, rounds: usize, x: f32) -> f32 {
    let (x, one) = (black_box(x), black_box(1.0));
    let mut sums = [0.0f32; SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum += x * one;
        }
    }
    sums.iter().sum()
}

/// Reads all of `words`.
pub fn read(words: &[u64]) {
    black_box(words.iter().fold(0, |sum, word| sum ^ word));
}
