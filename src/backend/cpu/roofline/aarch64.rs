//! Reading and multiplying on aarch64: NEON, and BF16 matrices of two rows.

use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

use super::Unit;

/// Sums that do not wait for each other: more than latency times units of any core, and few enough for the registers.
const SUMS: usize = 16;
/// Of BF16 matrices, named one by one in [`bf16_neon`].
const MATRICES: usize = 12;
/// Words read per round: two cache lines, in eight loads.
const WORDS: usize = 16;

pub fn has(unit: Unit) -> bool {
    match unit {
        Unit::F32 => true,
        Unit::Bf16Dot => std::arch::is_aarch64_feature_detected!("bf16"),
        Unit::Bf16Tile => false,
    }
}

/// Multiplications and additions of one round.
pub fn flops_per_round(unit: Unit) -> usize {
    match unit {
        Unit::F32 => 2 * SUMS * 4,
        // A 2x4 matrix times a 4x2 one.
        Unit::Bf16Dot => 2 * MATRICES * 16,
        Unit::Bf16Tile => 0,
    }
}

/// Runs `rounds` rounds of `unit`, which the machine [`has`].
pub fn multiply(unit: Unit, rounds: usize) {
    black_box(sum(unit, rounds, 1e-9));
}

/// The sum of all sums after `rounds` rounds of products of `x` and 1.
pub fn sum(unit: Unit, rounds: usize, x: f32) -> f32 {
    match unit {
        Unit::F32 => f32_neon(rounds, x),
        // SAFETY: the caller asked `has`.
        Unit::Bf16Dot => unsafe { bf16_neon(rounds, x) },
        Unit::Bf16Tile => 0.0,
    }
}

fn f32_neon(rounds: usize, x: f32) -> f32 {
    // SAFETY: every aarch64 machine has NEON, and only registers are touched.
    unsafe {
        let (x, one) = (vdupq_n_f32(black_box(x)), vdupq_n_f32(black_box(1.0)));
        let mut sums = [vdupq_n_f32(0.0); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, x, one);
            }
        }
        sums.iter().map(|&sum| vaddvq_f32(sum)).sum()
    }
}

/// In assembly, because the compiler keeps the intrinsics of BF16 unstable.
#[target_feature(enable = "neon,bf16")]
fn bf16_neon(rounds: usize, x: f32) -> f32 {
    if rounds == 0 {
        return 0.0;
    }
    let pair = |value: f32| u32::from(half::bf16::from_f32(value).to_bits()) * 0x0001_0001;
    let mut sums = [[0.0f32; 4]; MATRICES];
    // SAFETY: the loads and stores are of whole registers inside `sums`, and every register used is named.
    unsafe {
        asm!(
            "dup v24.4s, {x:w}",
            "dup v25.4s, {one:w}",
            "ld1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}], #64",
            "ld1 {{v4.4s, v5.4s, v6.4s, v7.4s}}, [{sums}], #64",
            "ld1 {{v16.4s, v17.4s, v18.4s, v19.4s}}, [{sums}]",
            "sub {sums}, {sums}, #128",
            "2:",
            "bfmmla v0.4s, v24.8h, v25.8h",
            "bfmmla v1.4s, v24.8h, v25.8h",
            "bfmmla v2.4s, v24.8h, v25.8h",
            "bfmmla v3.4s, v24.8h, v25.8h",
            "bfmmla v4.4s, v24.8h, v25.8h",
            "bfmmla v5.4s, v24.8h, v25.8h",
            "bfmmla v6.4s, v24.8h, v25.8h",
            "bfmmla v7.4s, v24.8h, v25.8h",
            "bfmmla v16.4s, v24.8h, v25.8h",
            "bfmmla v17.4s, v24.8h, v25.8h",
            "bfmmla v18.4s, v24.8h, v25.8h",
            "bfmmla v19.4s, v24.8h, v25.8h",
            "subs {rounds}, {rounds}, #1",
            "b.ne 2b",
            "st1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}], #64",
            "st1 {{v4.4s, v5.4s, v6.4s, v7.4s}}, [{sums}], #64",
            "st1 {{v16.4s, v17.4s, v18.4s, v19.4s}}, [{sums}]",
            x = in(reg) pair(x),
            one = in(reg) pair(1.0),
            sums = inout(reg) sums.as_mut_ptr() => _,
            rounds = inout(reg) rounds => _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v24") _, out("v25") _,
            options(nostack),
        );
    }
    sums.iter().flatten().sum()
}

/// Reads all of `words`.
pub fn read(words: &[u64]) {
    let mut all = 0;
    // SAFETY: every aarch64 machine has NEON; a line has `WORDS` words, and the loads need no alignment.
    unsafe {
        let mut sums = [vdupq_n_u64(0); WORDS / 2];
        for line in words.chunks_exact(WORDS) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = veorq_u64(*sum, vld1q_u64(line.as_ptr().add(2 * i)));
            }
        }
        for sum in sums {
            all ^= vgetq_lane_u64::<0>(sum) ^ vgetq_lane_u64::<1>(sum);
        }
    }
    black_box(all);
}
