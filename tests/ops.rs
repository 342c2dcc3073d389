//! Every fast operation equals its reference, on every instruction set of this machine.

#[path = "support/blocks.rs"]
mod blocks;

use ferrotron::backend::cpu::{Cpu, simd::Isa};
use ferrotron::backend::host::{Buffer, Routes};
use ferrotron::backend::reference::Reference;
use ferrotron::backend::{Backend, Heads, KvType, Precision, Save, SsmType, StatePlan, StepInputs};
use ferrotron::model::config::{Attention, Mamba, Moe};
use ferrotron::ops::cells::Cells;
use ferrotron::ops::linear::Epilogue;
use ferrotron::ops::lines::Lines;
use ferrotron::weights::quantize::quantize;
use ferrotron::weights::{Blocks, Kind, Linear};
use proptest::prelude::*;

const KINDS: [Kind; 5] = [Kind::F32, Kind::F16, Kind::BF16, Kind::Fp8, Kind::Nvfp4];

/// splitmix64 values in [-1, 1).
fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weight(seed: u64, rows: usize, cols: usize, kind: Kind) -> Linear {
    quantize(&values(seed, rows * cols), rows, cols, kind)
}

fn vector(seed: u64, count: usize) -> Lines<f32> {
    values(seed, count).into()
}

fn buffer(seed: u64, rows: usize, width: usize) -> Buffer {
    Buffer { width, data: values(seed, rows * width).into() }
}

fn numbers(cells: &Cells) -> Vec<f32> {
    (0..cells.len()).map(|i| cells.get(i)).collect()
}

fn cpus(threads: usize) -> Vec<Cpu> {
    cpus_of(Precision::F32, threads)
}

/// With room for the operands of the largest product here.
fn cpus_of(precision: Precision, threads: usize) -> Vec<Cpu> {
    let cpu = |isa| {
        let mut cpu = Cpu::with_isa(precision, threads, isa).expect("threads start");
        cpu.buffer(64, 300);
        cpu
    };
    Isa::available().into_iter().map(cpu).collect()
}

fn rounded(mut buffer: Buffer) -> Buffer {
    Precision::Bf16.round(&mut buffer.data);
    buffer
}

/// Error of a sum of `count` products of numbers in [-1, 1] times `magnitude`, added in f32.
fn tolerance(count: usize, magnitude: f32) -> f32 {
    f32::EPSILON * magnitude * (count as f32).sqrt() * 8.0
}

#[track_caller]
fn close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(difference <= tolerance, "{what}: element {i} is {got}, expected {expected} ± {tolerance}");
    }
}

/// A ragged step: sequences of `(slot, past, count)`, blocks handed out in a scattered order.
fn step(parts: &[(u32, u32, u32)], block_len: u32) -> StepInputs {
    let mut inputs = StepInputs::default();
    let needed: u32 = parts.iter().map(|p| (p.1 + p.2).div_ceil(block_len)).sum();
    for &(slot, past, count) in parts {
        let first_block = inputs.blocks.len() as u32;
        let blocks = (0..(past + count).div_ceil(block_len)).map(|b| needed - 1 - first_block - b);
        inputs.push(slot, past as usize, slot..slot + count, blocks);
    }
    inputs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn linear_equals_its_reference(
        seed: u64, rows in 1usize..70, blocks in 1usize..9, odd in 0usize..16, tokens in 1usize..20,
    ) {
        for kind in KINDS {
            // NVFP4 rows are whole blocks; the others also end in a tail shorter than a register.
            let cols = if kind == Kind::Nvfp4 { 16 * blocks } else { 16 * blocks - odd };
            let w = weight(seed, rows, cols, kind);
            let x = buffer(seed ^ 1, tokens, cols);
            for epilogue in [Epilogue::Store, Epilogue::Relu2, Epilogue::Add] {
                let mut expected = buffer(seed ^ 2, tokens, rows);
                Reference::new(Precision::F32).linear(tokens, &w, &x, &mut expected, epilogue);
                for mut cpu in cpus(2) {
                    let mut out = buffer(seed ^ 2, tokens, rows);
                    let held = cpu.linear_from(w.clone());
                    cpu.linear(tokens, &held, &x, &mut out, epilogue);
                    let tolerance = tolerance(cols, 2.0 * cols as f32);
                    let what = format!("{kind:?} {epilogue:?} {}", cpu.isa().name());
                    close(&out.data, &expected.data, tolerance, &what);
                }
            }
        }
    }

    /// Operands that are BF16 already: whoever multiplies them as such loses nothing.
    #[test]
    fn products_with_bf16_operands_equal_their_reference(
        seed: u64, rows in 1usize..70, blocks in 1usize..9, odd in 0usize..16, tokens in 1usize..40,
    ) {
        for kind in KINDS {
            let cols = if kind == Kind::Nvfp4 { 16 * blocks } else { 16 * blocks - odd };
            let w = weight(seed, rows, cols, kind);
            let x = rounded(buffer(seed ^ 1, tokens, cols));
            let mut expected = Buffer::new(tokens, rows);
            Reference::new(Precision::F32).logits(tokens, &w, &x, &mut expected);
            for mut cpu in cpus_of(Precision::Bf16, 2) {
                let mut out = Buffer::new(tokens, rows);
                let held = cpu.linear_from(w.clone());
                cpu.logits(tokens, &held, &x, &mut out);
                let what = format!("{kind:?} {}", cpu.isa().name());
                close(&out.data, &expected.data, tolerance(cols, 2.0 * cols as f32), &what);
            }
        }
    }

    #[test]
    fn a_token_alone_has_the_bits_it_has_in_a_batch(seed: u64, tokens in 2usize..40, cols in 1usize..17) {
        let cols = 16 * cols;
        for kind in KINDS {
            let w = weight(seed, 130, cols, kind);
            let x = buffer(seed ^ 1, tokens, cols);
            for mut cpu in cpus(2).into_iter().chain(cpus_of(Precision::Bf16, 2)) {
                let held = cpu.linear_from(w.clone());
                let mut batch = Buffer::new(tokens, 130);
                cpu.linear(tokens, &held, &x, &mut batch, Epilogue::Store);
                for t in 0..tokens {
                    let mut alone = Buffer::new(1, 130);
                    let one = Buffer { width: cols, data: x.row(t).into() };
                    cpu.linear(1, &held, &one, &mut alone, Epilogue::Store);
                    prop_assert_eq!(&alone.data[..], batch.row(t), "{:?} {}", kind, cpu.isa().name());
                }
            }
        }
    }

    #[test]
    fn linear_in_blocks_equals_its_reference(
        seed: u64, rows in 1usize..40, wide in 1usize..5, short in 0usize..8, tokens in 1usize..11,
    ) {
        for kind in Blocks::ALL {
            // Rows of short blocks may end inside a span of 256.
            let cols = (256 * wide - 32 * short).next_multiple_of(kind.weights());
            let w = blocks::weight(seed, rows, cols, kind, 0.75);
            let x = buffer(seed ^ 1, tokens, cols);
            let mut expected = buffer(seed ^ 2, tokens, rows);
            Reference::new(Precision::F32).linear(tokens, &w, &x, &mut expected, Epilogue::Add);
            for mut cpu in cpus(2) {
                let mut out = buffer(seed ^ 2, tokens, rows);
                let held = cpu.linear_from(w.clone());
                cpu.linear(tokens, &held, &x, &mut out, Epilogue::Add);
                let what = format!("{kind:?} {}", cpu.isa().name());
                close(&out.data, &expected.data, tolerance(cols, 2.0 * cols as f32), &what);
                for t in 0..tokens {
                    let mut alone = Buffer::new(1, rows);
                    alone.data.copy_from_slice(buffer(seed ^ 2, tokens, rows).row(t));
                    let one = Buffer { width: cols, data: x.row(t).into() };
                    cpu.linear(1, &held, &one, &mut alone, Epilogue::Add);
                    prop_assert_eq!(&alone.data[..], out.row(t), "{}: token {} alone", what, t);
                }
            }
        }
    }

    #[test]
    fn norms_equal_their_references(seed: u64, width in 1usize..300, tokens in 1usize..9) {
        let x = buffer(seed, tokens, width);
        let w = vector(seed ^ 1, width);
        let mut expected = Buffer::new(tokens, width + 3);
        Reference::new(Precision::F32).rms_norm(tokens, &x, &w, 1e-5, &mut expected, 3);
        for mut cpu in cpus(2) {
            let mut out = Buffer::new(tokens, width + 3);
            cpu.rms_norm(tokens, &x, &w, 1e-5, &mut out, 3);
            close(&out.data, &expected.data, 1e-5 * (width as f32).sqrt(), cpu.isa().name());
        }
    }

    #[test]
    fn experts_equal_their_reference(
        seed: u64, tokens in 1usize..24, latent: bool, k in 1usize..6, kind in 0usize..6, bf16: bool,
    ) {
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        // All of one form, or each of another.
        let kinds = KINDS.get(kind).map_or(KINDS, |&kind| [kind; 5]);
        let shape = Moe {
            experts: 6, experts_per_token: k, intermediate: 48, latent: latent.then_some(32),
            shared_intermediate: 0, scaling: 2.5, groups: 2, groups_per_token: 2, normalize: true,
        };
        let width = if latent { 32 } else { 64 };
        let make = |salt: u64, rows, cols| {
            (0..6).map(|e| weight(seed ^ salt ^ e << 8, rows, cols, kinds[e as usize % 5])).collect::<Vec<_>>()
        };
        let (up, down) = (make(3, 48, width), make(4, width, 48));
        let gate = weight(seed ^ 5, 6, 64, Kind::BF16);
        let bias = vector(seed ^ 6, 6);
        let (mut u, mut v) = (buffer(seed ^ 7, tokens, 64), buffer(seed ^ 8, tokens, width));
        if bf16 {
            (u, v) = (rounded(u), rounded(v));
        }
        for epilogue in [Epilogue::Store, Epilogue::Add] {
            let mut reference = Reference::new(precision);
            let held = reference.experts_from(up.clone(), down.clone());
            let mut routes = Routes::new(tokens, k);
            reference.route(tokens, &shape, &u, &gate, &bias, &mut routes);
            let mut expected = buffer(seed ^ 9, tokens, width);
            reference.experts(tokens, &shape, &v, &routes, &held, &mut expected, epilogue);
            for mut cpu in cpus_of(precision, 2) {
                let held = cpu.experts_from(up.clone(), down.clone());
                let gate = cpu.linear_from(gate.clone());
                let mut chosen = cpu.routes(tokens, k);
                cpu.route(tokens, &shape, &u, &gate, &bias, &mut chosen);
                prop_assert_eq!(&chosen.ids, &routes.ids);
                close(&chosen.weights, &routes.weights, 1e-5, "route weights");
                let mut out = buffer(seed ^ 9, tokens, width);
                cpu.experts(tokens, &shape, &v, &chosen, &held, &mut out, epilogue);
                let magnitude = expected.data.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                // What is between the two matrices, and the result, may be rounded to the other neighbour.
                let slack = if bf16 { 1.0 / 128.0 } else { 1e-4 };
                close(&out.data, &expected.data, slack * magnitude, cpu.isa().name());
            }
        }
    }

    #[test]
    fn mamba_equals_its_reference(
        seed: u64, a in 1u32..7, b in 1u32..7, past in 0u32..3, taps in prop_oneof![Just(4usize), 2usize..=8],
        narrow: bool,
    ) {
        let shape = Mamba {
            heads: 6, head_dim: 5, state_size: 24, groups: 3, conv_kernel: taps, conv_bias: true,
            dt_limit: (0.0, f32::INFINITY),
        };
        let inputs = step(&[(2, past, a), (0, 0, b)], 4);
        let tokens = (a + b) as usize;
        let ssm = if narrow { SsmType::F16 } else { SsmType::F32 };
        let plan =
            StatePlan { slots: 3, blocks: 8, block_len: 4, ssm, mamba: vec![shape], ..StatePlan::default() };
        let projected = buffer(seed, tokens, shape.projection());
        let c = shape.conv_channels();
        let (weight, bias) = (vector(seed ^ 1, c * taps), vector(seed ^ 2, c));
        let (a_log, d, dt_bias) = (vector(seed ^ 3, 6), vector(seed ^ 4, 6), vector(seed ^ 5, 6));
        let norm = vector(seed ^ 6, shape.inner());
        let start = |state: &mut ferrotron::backend::host::State| {
            state.conv[0].copy_from_slice(&values(seed ^ 7, 3 * (taps - 1) * c));
            state.ssm[0].write(0, &values(seed ^ 8, 3 * shape.inner() * 24));
        };
        let mut reference = Reference::new(Precision::F32);
        let mut expected_state = reference.state(&plan);
        start(&mut expected_state);
        let (mut xbc, mut y) = (Buffer::new(tokens, c), Buffer::new(tokens, shape.inner()));
        let heads = || Heads { a_log: &a_log, d: &d, dt_bias: &dt_bias };
        reference.conv(&inputs, 0, &shape, &projected, &weight, &bias, &mut expected_state, &mut xbc);
        reference.ssm(&inputs, 0, &shape, &projected, &xbc, heads(), &mut expected_state, &mut y);
        let scanned = y.data.clone();
        reference.gated_norm(tokens, &shape, 1e-5, &projected, &norm, &mut y);
        for mut cpu in cpus(2) {
            let name = cpu.isa().name();
            let mut state = cpu.state(&plan);
            start(&mut state);
            let (mut out_xbc, mut out) = (Buffer::new(tokens, c), Buffer::new(tokens, shape.inner()));
            cpu.conv(&inputs, 0, &shape, &projected, &weight, &bias, &mut state, &mut out_xbc);
            close(&out_xbc.data, &xbc.data, 1e-5, name);
            prop_assert_eq!(&state.conv[0], &expected_state.conv[0], "tails are moved, not computed");
            cpu.ssm(&inputs, 0, &shape, &projected, &out_xbc, heads(), &mut state, &mut out);
            // Where sums differ in their last bit, a state may be rounded to the other neighbour after each token.
            let expected_numbers = numbers(&expected_state.ssm[0]);
            let apart = expected_numbers.iter().fold(1.0f32, |m, v| m.max(v.abs())) / 1024.0;
            let slack = if narrow { tokens as f32 * apart } else { 0.0 };
            close(&out.data, &scanned, 1e-4 + 24.0 * slack, name);
            close(&numbers(&state.ssm[0]), &expected_numbers, 1e-4 + slack, name);
            cpu.gated_norm(tokens, &shape, 1e-5, &projected, &norm, &mut out);
            if !narrow {
                close(&out.data, &y.data, 2e-3, name);
            }
        }
    }

    /// Replayed, certain and drafted tokens together are more than pass over a row at once, and fewer; the wide shape is the
    /// one that AVX-512 has its own loop for.
    #[test]
    fn drafts_are_scanned_as_the_reference_does(
        seed: u64, certain in 1u32..24, drafts in 0u32..13, replay in 0u32..13, saved in 0u32..24, wide: bool,
        narrow: bool,
    ) {
        let (head_dim, state_size) = if wide { (16, 128) } else { (5, 24) };
        let shape = Mamba {
            heads: 2, head_dim, state_size, groups: 1, conv_kernel: 4, conv_bias: true,
            dt_limit: (0.0, f32::INFINITY),
        };
        let ssm = if narrow { SsmType::F16 } else { SsmType::F32 };
        let mamba = vec![shape];
        let plan = StatePlan { slots: 4, lanes: 2, drafts: 12, ssm, mamba, ..StatePlan::default() };
        let mut inputs = StepInputs::default();
        let put = inputs.push(2, replay as usize + 1, 0..certain + drafts, []);
        (put.source, put.lane, put.replay, put.drafts) = (1, 1, replay, drafts);
        if (1..=certain).contains(&saved) {
            inputs.saves.push(Save { sequence: 0, after: saved, to: 3 });
        }
        let tokens = inputs.tokens.len();
        let (projected, xbc) = (buffer(seed, tokens, shape.projection()), buffer(seed ^ 1, tokens, shape.conv_channels()));
        let (a_log, d, dt_bias) = (vector(seed ^ 2, 2), vector(seed ^ 3, 2), vector(seed ^ 4, 2));
        let heads = || Heads { a_log: &a_log, d: &d, dt_bias: &dt_bias };
        let start = |state: &mut ferrotron::backend::host::State| {
            state.ssm[0].write(0, &values(seed ^ 5, 4 * shape.inner() * state_size));
            let lanes = &mut state.lanes[0];
            lanes.xbc = vector(seed ^ 6, lanes.xbc.len());
            lanes.dt = vector(seed ^ 7, lanes.dt.len());
        };
        let mut reference = Reference::new(Precision::F32);
        let mut expected_state = reference.state(&plan);
        start(&mut expected_state);
        let mut expected = Buffer::new(tokens, shape.inner());
        reference.ssm(&inputs, 0, &shape, &projected, &xbc, heads(), &mut expected_state, &mut expected);
        let largest = |all: &[f32]| all.iter().fold(1.0f32, |most, value| most.max(value.abs()));
        let expected_numbers = numbers(&expected_state.ssm[0]);
        let scanned = tokens + replay as usize;
        // Where sums differ in their last bit, a state may be rounded to the other neighbour after each token.
        let slack = if narrow { scanned as f32 * largest(&expected_numbers) / 1024.0 } else { 0.0 };
        let apart = |all: &[f32]| tolerance(scanned * state_size, largest(all));
        for mut cpu in cpus(2) {
            let name = cpu.isa().name();
            let mut state = cpu.state(&plan);
            start(&mut state);
            let mut out = Buffer::new(tokens, shape.inner());
            cpu.ssm(&inputs, 0, &shape, &projected, &xbc, heads(), &mut state, &mut out);
            close(&out.data, &expected.data, apart(&expected.data) + state_size as f32 * slack, name);
            close(&numbers(&state.ssm[0]), &expected_numbers, apart(&expected_numbers) + slack, name);
            prop_assert_eq!(&state.lanes[0].xbc, &expected_state.lanes[0].xbc);
            prop_assert_eq!(&state.lanes[0].dt, &expected_state.lanes[0].dt);
        }
    }

    #[test]
    fn attention_equals_its_reference(
        seed: u64, a in 1u32..9, b in 1u32..9, past in 0u32..12, hidden in 0u32..12,
    ) {
        let shape = Attention { heads: 4, kv_heads: 2, head_dim: 40 };
        let mut inputs = step(&[(0, past, a), (1, 0, b)], 4);
        inputs.sequences[0].visible_from = hidden.min(past);
        let tokens = (a + b) as usize;
        let (q, k, v) = (buffer(seed, tokens, 160), buffer(seed ^ 1, tokens, 80), buffer(seed ^ 2, tokens, 80));
        let start = |state: &mut ferrotron::backend::host::State| {
            state.keys[0].write(0, &values(seed ^ 3, 16 * 4 * 80));
            state.values[0].write(0, &values(seed ^ 4, 16 * 4 * 80));
        };
        for (precision, kv) in [
            (Precision::F32, KvType::Auto), (Precision::F32, KvType::Bf16), (Precision::F32, KvType::Fp8),
            (Precision::Bf16, KvType::Auto), (Precision::Bf16, KvType::F32),
        ] {
            let attention = vec![shape];
            let plan =
                StatePlan { slots: 2, blocks: 16, block_len: 4, kv, attention, ..StatePlan::default() };
            let mut reference = Reference::new(precision);
            let mut expected_state = reference.state(&plan);
            start(&mut expected_state);
            let mut expected = Buffer::new(tokens, 160);
            reference.attention(&inputs, 0, &shape, &q, &k, &v, &mut expected_state, &mut expected);
            for isa in Isa::available() {
                let mut cpu = Cpu::with_isa(precision, 2, isa).expect("threads start");
                let mut state = cpu.state(&plan);
                start(&mut state);
                let mut out = Buffer::new(tokens, 160);
                cpu.attention(&inputs, 0, &shape, &q, &k, &v, &mut state, &mut out);
                prop_assert_eq!(&state.keys[0], &expected_state.keys[0]);
                let tolerance = if precision == Precision::F32 { 1e-5 } else { 1.0 / 128.0 };
                close(&out.data, &expected.data, tolerance, isa.name());
            }
        }
    }

    /// Heads as the models have them, over BF16 pages: past several strips of positions, and token by token.
    #[test]
    fn heads_of_128_equal_their_reference(
        seed: u64, past in 0u32..700, count in 1u32..40, hidden in 0u32..700, heads in prop_oneof![Just(2usize), Just(16)],
    ) {
        let shape = Attention { heads, kv_heads: 2, head_dim: 128 };
        let (width, kv) = (heads * 128, 2 * 128);
        let mut inputs = step(&[(0, past, count), (1, 0, 3)], 16);
        inputs.sequences[0].visible_from = hidden.min(past);
        let tokens = count as usize + 3;
        let q = rounded(buffer(seed, tokens, width));
        let (k, v) = (rounded(buffer(seed ^ 1, tokens, kv)), rounded(buffer(seed ^ 2, tokens, kv)));
        let plan = StatePlan { slots: 2, blocks: 64, block_len: 16, attention: vec![shape], ..StatePlan::default() };
        let start = |state: &mut ferrotron::backend::host::State| {
            state.keys[0].write(0, &values(seed ^ 3, 64 * 16 * kv));
            state.values[0].write(0, &values(seed ^ 4, 64 * 16 * kv));
        };
        let mut reference = Reference::new(Precision::Bf16);
        let mut expected_state = reference.state(&plan);
        start(&mut expected_state);
        let mut expected = Buffer::new(tokens, width);
        reference.attention(&inputs, 0, &shape, &q, &k, &v, &mut expected_state, &mut expected);
        for mut cpu in cpus_of(Precision::Bf16, 2) {
            let name = cpu.isa().name();
            let mut state = cpu.state(&plan);
            start(&mut state);
            let mut out = Buffer::new(tokens, width);
            cpu.attention(&inputs, 0, &shape, &q, &k, &v, &mut state, &mut out);
            // A result is rounded to 8 bits, and so are the weights of a mean of numbers below 1.
            close(&out.data, &expected.data, 1.0 / 128.0, name);
            for t in 0..count {
                let mut one = step(&[(0, past + t, 1)], 16);
                one.blocks = inputs.blocks[..(past + t + 1).div_ceil(16) as usize].to_vec();
                one.sequences[0].visible_from = inputs.sequences[0].visible_from;
                let row = |from: &Buffer| Buffer { width: from.width, data: from.row(t as usize).into() };
                let mut alone = Buffer::new(1, width);
                cpu.attention(&one, 0, &shape, &row(&q), &row(&k), &row(&v), &mut state, &mut alone);
                prop_assert_eq!(&alone.data[..], out.row(t as usize), "{} token {}", name, t);
            }
        }
    }
}

#[test]
fn large_products_are_the_same_on_any_number_of_threads() {
    let w = weight(7, 777, 512, Kind::Nvfp4);
    let x = buffer(8, 16, 512);
    let mut results = Vec::new();
    for threads in [1, 2, 5] {
        let mut cpu = Cpu::new(Precision::F32, threads).expect("threads start");
        let held = cpu.linear_from(w.clone());
        let mut out = Buffer::new(16, 777);
        cpu.run(|cpu| cpu.linear(16, &held, &x, &mut out, Epilogue::Store));
        results.push(out.data);
    }
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}
