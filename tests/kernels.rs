//! The kernels on the host: what they compute, that it does not depend on the order of threads, and that the shim
//! notices the faults it is there for.
#![cfg(feature = "simt")]

use std::collections::BTreeSet;
use std::mem::offset_of;

use ferrotron::backend::simt::{self, Bf16Buffer, Error, Launch, rms_norm};
use ferrotron::ops;
use ferrotron::ops::rms_norm::Args as RmsNormArgs;
use half::bf16;
use proptest::prelude::*;

const EPS: f32 = 1e-5;
/// Enough for 64 threads in 2 warps to come in every order that matters; a fault seen by half of all seeds escapes
/// with a chance of 2⁻³².
const SEEDS: u64 = 32;

/// The operation's own reference, rounded to bfloat16.
fn rms_norm_reference(x: &[u16], weight: &[u16]) -> Vec<u16> {
    let values = |bits: &[u16]| -> Vec<f32> { bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect() };
    let (x, weight) = (values(x), values(weight));
    let mut y = vec![0.0; x.len()];
    for (x, y) in x.chunks(weight.len()).zip(y.chunks_mut(weight.len())) {
        ops::rms_norm::reference(x, &weight, EPS, y);
    }
    bits(y)
}

/// How many bfloat16 values lie between two of them; both zeros are one.
fn ulps(a: u16, b: u16) -> i32 {
    let ordered = |bits: u16| if bits & 0x8000 == 0 { i32::from(bits) } else { -i32::from(bits & 0x7fff) };
    (ordered(a) - ordered(b)).abs()
}

/// One unit in the last place is what the arithmetic allows: a sum of n squares in f32 is off by at most n · 2⁻²⁴ of
/// itself and all else by a few 2⁻²⁴, which for the widths here is far below the 2⁻⁹ of a bfloat16's rounding and can
/// only tip a value that lies next to the border between two neighbours.
fn check_rms_norm(x: &[u16], weight: &[u16], rows: u32, seed: u64) {
    let got = rms_norm(x, weight, rows, weight.len() as u32, EPS, seed).expect("a sound kernel ends");
    let expected = rms_norm_reference(x, weight);
    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let values = (bf16::from_bits(*got), bf16::from_bits(*expected));
        assert!(ulps(*got, *expected) <= 1, "seed {seed}, element {at}: (got, expected) = {values:?}");
    }
    assert_eq!(got.len(), expected.len());
}

fn bits(values: impl IntoIterator<Item = f32>) -> Vec<u16> {
    values.into_iter().map(|value| bf16::from_f32(value).to_bits()).collect()
}

/// Rows, x [rows, width] at some magnitude, weight [width]. Widths around the block's 256 threads, its 2048 elements a
/// turn and multiples of 8, where the kernel takes its wide loads, as often as any others.
fn problem() -> impl Strategy<Value = (u32, Vec<u16>, Vec<u16>)> {
    let width = prop_oneof![1usize..40, (1usize..40).prop_map(|n| n * 8), 250usize..262, 2040usize..2060];
    (1u32..4, width, -20i32..20).prop_flat_map(|(rows, width, exponent)| {
        let scale = (exponent as f32).exp2();
        let x = prop::collection::vec(-8.0f32..8.0, rows as usize * width);
        let weight = prop::collection::vec(-2.0f32..2.0, width);
        (Just(rows), x.prop_map(move |x| bits(x.iter().map(|x| x * scale))), weight.prop_map(bits))
    })
}

/// Any float, every second one halfway between two bfloat16 values.
fn float_or_tie() -> impl Strategy<Value = f32> {
    prop_oneof![any::<u32>(), any::<u32>().prop_map(|bits| bits & 0xffff_0000 | 0x8000)]
        .prop_map(f32::from_bits)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rms_norm_is_its_reference((rows, x, weight) in problem(), seed: u64) {
        check_rms_norm(&x, &weight, rows, seed);
    }

    #[test]
    fn rms_norm_is_the_same_in_every_order((rows, x, weight) in problem(), seeds: [u64; 4]) {
        let width = weight.len() as u32;
        let answers: BTreeSet<_> = seeds.iter().map(|s| rms_norm(&x, &weight, rows, width, EPS, *s).unwrap()).collect();
        prop_assert_eq!(answers.len(), 1);
    }

    #[test]
    fn to_bf16_rounds_as_the_half_crate_does(all in prop::collection::vec(float_or_tie(), 64)) {
        let all: [f32; 64] = all.try_into().unwrap();
        for (got, value) in planted("planted_rounding", all, 0).unwrap().into_iter().zip(all) {
            let expected = if value.is_nan() { 0x7fff } else { bf16::from_f32(value).to_bits() };
            prop_assert_eq!(got, expected, "{}", value);
        }
    }
}

#[test]
fn rms_norm_of_zeros_is_zero() {
    check_rms_norm(&bits([0.0; 96]), &bits([1.0; 48]), 2, 0);
}

#[test]
fn rms_norm_of_no_rows_is_empty() {
    assert_eq!(rms_norm(&[], &bits([1.0; 8]), 0, 8, EPS, 0), Ok(vec![]));
}

#[test]
fn rms_norm_refuses_sizes_that_do_not_agree() {
    let got = rms_norm(&[0; 15], &[0; 8], 2, 8, EPS, 0);
    assert_eq!(got, Err(Error::Shape { name: "x", expected: 16, got: 15 }));
}

#[test]
fn rms_norm_args_are_the_kernels_args() {
    let twin = [
        size_of::<RmsNormArgs>(),
        offset_of!(RmsNormArgs, x),
        offset_of!(RmsNormArgs, weight),
        offset_of!(RmsNormArgs, y),
        offset_of!(RmsNormArgs, width),
        offset_of!(RmsNormArgs, eps),
    ];
    assert_eq!(simt::layout("rms_norm").unwrap(), twin);
}

/// The args of the kernels in `kernels/simt/tests/planted.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PlantedArgs {
    x: *const f32,
    y: *mut u16,
}

const PLANTED: Launch = Launch { grid: [1, 1, 1], block: [64, 1, 1], seed: 0 };

/// Runs a planted kernel: 64 threads, one x and one y each.
fn planted(kernel: &str, x: [f32; 64], seed: u64) -> Result<Vec<u16>, Error> {
    let mut y = Bf16Buffer::poisoned("y", x.len());
    let args = PlantedArgs { x: x.as_ptr(), y: y.as_mut_ptr() };
    // SAFETY: all planted kernels take these args and keep to x and to y with its guard lines.
    unsafe { simt::launch(kernel, &args, Launch { seed, ..PLANTED }) }?;
    y.read()
}

/// Whatever the seed, the fault is found, and its account holds all of `words`.
fn check_fault(kernel: &str, words: &[&str]) {
    for seed in 0..SEEDS {
        let error = planted(kernel, [1.0; 64], seed).expect_err("a planted fault").to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    }
}

#[test]
fn planted_args_are_the_kernels_args() {
    let twin = [size_of::<PlantedArgs>(), offset_of!(PlantedArgs, x), offset_of!(PlantedArgs, y)];
    assert_eq!(simt::layout("planted_missing_barrier").unwrap(), twin);
}

#[test]
fn a_missing_barrier_shows_as_an_answer_that_depends_on_the_order() {
    let answers: BTreeSet<_> =
        (0..SEEDS).map(|seed| planted("planted_missing_barrier", [1.0; 64], seed).unwrap()).collect();
    assert!(answers.len() > 1, "one answer under {SEEDS} seeds: {answers:?}");
}

#[test]
fn a_seed_is_an_order_and_gives_it_again() {
    for seed in 0..SEEDS {
        let run = || planted("planted_missing_barrier", [1.0; 64], seed).unwrap();
        assert_eq!(run(), run());
    }
}

#[test]
fn threads_that_wait_for_each_other_are_a_deadlock() {
    let words =
        ["deadlock", "block (0, 0, 0)", "thread (0, 0, 0) and 31 more wait at __syncthreads (planted.cu"];
    check_fault("planted_unequal_meetings", &words);
    check_fault(
        "planted_unequal_meetings",
        &["thread (1, 0, 0) and 31 more wait at shuffle_xor", "; 0 returned"],
    );
}

#[test]
fn a_barrier_on_either_branch_is_divergent() {
    check_fault("planted_two_barriers", &["block (0, 0, 0), thread (", "divergent barrier", "planted.cu"]);
}

#[test]
fn a_write_past_a_shared_array_is_found() {
    check_fault("planted_shared_overrun", &["thread (63, 0, 0)", "wrote outside the shared array stage"]);
}

#[test]
fn a_write_past_a_buffer_is_found() {
    for seed in 0..SEEDS {
        let got = planted("planted_global_overrun", [1.0; 64], seed);
        assert_eq!(got, Err(Error::Overrun { name: "y", len: 64, at: 64 }));
    }
}

#[test]
fn a_misaligned_load_is_found() {
    check_fault("planted_misaligned_load", &["load_pack", "not a multiple of 16"]);
}

#[test]
fn a_thread_that_returned_is_not_waited_for() {
    let mut x = [1.0; 64];
    x[2] = 5.0;
    for seed in 0..SEEDS {
        let y = planted("planted_early_return", x, seed).unwrap();
        assert_eq!(y[..40], [bf16::from_f32(5.0).to_bits(); 40], "seed {seed}");
    }
}

#[test]
fn an_unknown_kernel_is_named() {
    let got = planted("rms_morn", [0.0; 64], 0);
    assert_eq!(got, Err(Error::UnknownKernel { kernel: "rms_morn".to_owned() }));
}

#[test]
fn args_of_another_size_are_refused() {
    // SAFETY: the size is compared before anything is read.
    let got = unsafe { simt::launch("rms_norm", &0u8, PLANTED) };
    assert_eq!(got, Err(Error::ArgsBytes { kernel: "rms_norm".to_owned(), got: 1 }));
}

#[test]
fn a_block_beyond_the_device_is_refused() {
    for block in [[1025, 1, 1], [32, 33, 1], [0, 1, 1], [u32::MAX, u32::MAX, u32::MAX]] {
        let args = PlantedArgs { x: std::ptr::null(), y: std::ptr::null_mut() };
        // SAFETY: nothing runs, so nothing is read or written.
        let got = unsafe { simt::launch("planted_rounding", &args, Launch { block, ..PLANTED }) };
        assert_eq!(
            got,
            Err(Error::LaunchSize { kernel: "planted_rounding".to_owned(), grid: [1, 1, 1], block })
        );
    }
}

/// The image that `cuda` embeds: a fat binary (its magic number) with code for each target.
#[cfg(feature = "cuda")]
#[test]
fn the_embedded_image_is_a_fat_binary() {
    let image = ferrotron::backend::cuda::KERNELS;
    assert_eq!(image[..4], 0xba55_ed50_u32.to_le_bytes());
}
