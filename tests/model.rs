//! The network against an independent implementation, and against itself in every order of work.

use std::path::{Path, PathBuf};

use ferrotron::backend::cpu::{Cpu, simd::Isa};
use ferrotron::backend::reference::Reference;
use ferrotron::backend::trace::Trace;
use ferrotron::backend::{Backend, DraftInputs, KvType, Precision, SsmType, StepInputs};
use ferrotron::model::config::{Layer, ModelConfig};
use ferrotron::model::{Limits, Model, Network, load, presets};

use ferrotron::weights::{Checkpoint, Source};
use serde::Deserialize;

const BLOCK_LEN: usize = 4;

/// Logits of an implementation that is not ours; tools/goldens says how they were made.
#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    ids: Vec<u32>,
    /// Positions whose logits are given.
    rows: Vec<u32>,
    logits: Vec<Vec<f32>>,
    /// Greedy continuation, stop ids not obeyed.
    #[serde(default)]
    tokens: Vec<u32>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn golden_folders() -> Vec<PathBuf> {
    let folder = root().join("tests/goldens");
    let entries = std::fs::read_dir(&folder).expect("tests/goldens is part of the project");
    let mut folders: Vec<_> = entries.map(|e| e.expect("a readable entry").path()).collect();
    folders.retain(|path| path.join("golden.json").exists());
    assert!(folders.len() >= 5, "goldens are missing: {folders:?}");
    folders.push(root().join("models/tiny"));
    folders.sort();
    folders
}

fn golden(path: &Path) -> Golden {
    let json = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&json).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A model with room for `slots` sequences of 512 tokens.
fn model<B: Backend>(backend: B, folder: &Path, slots: usize) -> Model<B> {
    model_with(backend, folder, slots, KvType::Auto, SsmType::F32)
}

fn model_with<B: Backend>(backend: B, folder: &Path, slots: usize, kv: KvType, ssm: SsmType) -> Model<B> {
    let checkpoint = Checkpoint::open(Source::folder(folder)).expect("the checkpoint opens");
    let json = checkpoint.file("config.json").expect("readable").expect("config.json is there");
    let config = ModelConfig::from_json(&json).expect("the config is understood");
    let fields = load::load(&config, &checkpoint, &|_| {}).expect("the weights load").fields;
    let limits = Limits {
        step_tokens: 512,
        logit_rows: 512,
        slots,
        blocks: slots * 512 / BLOCK_LEN,
        block_len: BLOCK_LEN,
        kv,
        ssm,
        ..Limits::default()
    };
    Model::new(backend, config, fields, limits).expect("the sizes agree")
}

fn reference(folder: &Path) -> Model<Reference> {
    model(Reference::new(Precision::F32), folder, 3)
}

fn cpu(folder: &Path, isa: Isa) -> Model<Cpu> {
    model(Cpu::with_isa(Precision::F32, 2, isa).expect("threads start"), folder, 3)
}

/// Logits of every position, prefilled in chunks of `chunk`.
fn prefill(network: &mut dyn Network, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut all = Vec::new();
    let mut past = 0;
    for part in ids.chunks(chunk) {
        let mut inputs = StepInputs::single(part, past, BLOCK_LEN);
        inputs.logit_rows = (0..part.len() as u32).collect();
        all.extend_from_slice(network.step(&inputs).expect("the step runs"));
        past += part.len();
    }
    all
}

fn greedy(network: &mut dyn Network, ids: &[u32], count: usize) -> Vec<u32> {
    let mut inputs = StepInputs::single(ids, 0, BLOCK_LEN);
    let mut tokens = Vec::new();
    for i in 0..count {
        tokens.push(argmax(network.step(&inputs).expect("the step runs")));
        inputs = StepInputs::single(&tokens[i..], ids.len() + i, BLOCK_LEN);
    }
    tokens
}

#[track_caller]
fn close(got: &[f32], expected: &[f32], relative: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= relative * scale,
            "{what}: logit {i} is {got}, expected {expected} (largest {scale})"
        );
    }
}

/// Every given row within `relative` of the largest logit, and the same greedy continuation.
fn check_golden(network: &mut dyn Network, folder: &Path, relative: f32) {
    for case in golden(&folder.join("golden.json")).cases {
        let vocab = network.vocab_size();
        let what = format!("{} with {} ids", folder.display(), case.ids.len());
        let logits = prefill(network, &case.ids, 512);
        for (&row, expected) in case.rows.iter().zip(&case.logits) {
            close(&logits[row as usize * vocab..][..vocab], expected, relative, &what);
        }
        assert_eq!(greedy(network, &case.ids, case.tokens.len()), case.tokens, "{what}: greedy ids");
    }
}

#[test]
fn reference_matches_transformers() {
    for folder in golden_folders() {
        check_golden(&mut reference(&folder), &folder, 1e-4);
    }
}

#[test]
fn cpu_matches_transformers_on_every_instruction_set() {
    for folder in golden_folders() {
        for isa in Isa::available() {
            check_golden(&mut cpu(&folder, isa), &folder, 1e-4);
        }
    }
}

#[test]
fn bf16_activations_stay_within_their_rounding() {
    // Each of some 10 layers rounds a few times by 2^-9; the errors are independent, so their root counts.
    for folder in golden_folders() {
        let backend = Cpu::new(Precision::Bf16, 2).expect("threads start");
        let mut network = model(backend, &folder, 1);
        for case in golden(&folder.join("golden.json")).cases.iter().take(2) {
            let vocab = network.vocab_size();
            let logits = prefill(&mut network, &case.ids, 512);
            for (&row, expected) in case.rows.iter().zip(&case.logits) {
                let got = &logits[row as usize * vocab..][..vocab];
                close(got, expected, 0.12, &format!("{} bf16", folder.display()));
            }
        }
    }
}

/// How far apart the logits are, relative to the largest.
fn distance(got: &[f32], expected: &[f32]) -> f32 {
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    got.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// Kept numbers are off by a unit of rounding at most: in an attention layer once through the values and about once
/// more through the scores, in a Mamba layer once for what is remembered and once for what is added. Layers add up.
#[test]
fn narrow_caches_and_states_stay_within_their_rounding() {
    for folder in golden_folders() {
        let ids = ids(&folder, 40);
        let run = |kv, ssm| {
            let backend = Cpu::new(Precision::F32, 2).expect("threads start");
            let mut model = model_with(backend, &folder, 1, kv, ssm);
            let logits = prefill(&mut model, &ids, 512);
            let layers = model.config().layers.clone();
            (logits, layers)
        };
        let (exact, layers) = run(KvType::Auto, SsmType::F32);
        let attention = layers.iter().filter(|l| matches!(l, Layer::Attention(_))).count();
        let mamba = layers.iter().filter(|l| matches!(l, Layer::Mamba(_))).count();
        for (kv, ssm, count, unit) in [
            (KvType::Bf16, SsmType::F32, attention, 2f32.powi(-9)),
            (KvType::F32, SsmType::F16, mamba, 2f32.powi(-10)),
        ] {
            let off = distance(&run(kv, ssm).0, &exact);
            let allowed = 2.0 * count as f32 * unit;
            let what = format!("{} {kv:?} {ssm:?}: off by {off}, {allowed} allowed", folder.display());
            assert!(off <= allowed && (off > 0.0 || count == 0), "{what}");
        }
    }
}

/// A prompt of `count` ids, from the ids of the golden cases repeated.
fn ids(folder: &Path, count: usize) -> Vec<u32> {
    let cases = golden(&folder.join("golden.json")).cases;
    let all: Vec<u32> = cases.iter().flat_map(|c| c.ids.iter().copied()).collect();
    all.iter().copied().cycle().take(count).collect()
}

#[test]
fn chunked_prefill_is_whole_prefill_and_decode_is_prefill_bit_for_bit() {
    for folder in golden_folders() {
        let ids = ids(&folder, 37);
        let mut networks: Vec<Box<dyn Network>> =
            vec![Box::new(reference(&folder)), Box::new(cpu(&folder, Isa::detect()))];
        for network in &mut networks {
            let whole = prefill(&mut **network, &ids, 512);
            for chunk in [1, 2, 5, 8, 36] {
                assert_eq!(
                    prefill(&mut **network, &ids, chunk),
                    whole,
                    "{} in chunks of {chunk}",
                    folder.display()
                );
            }
        }
    }
}

/// Three ragged sequences in one step, then each of them alone.
#[test]
fn a_row_of_a_batch_is_the_row_alone_bit_for_bit() {
    for folder in golden_folders() {
        let all = ids(&folder, 40);
        let parts = [&all[0..9], &all[9..10], &all[10..40]];
        let mut networks: Vec<Box<dyn Network>> =
            vec![Box::new(reference(&folder)), Box::new(cpu(&folder, Isa::detect()))];
        for network in &mut networks {
            let vocab = network.vocab_size();
            let mut inputs = StepInputs::default();
            for (slot, part) in parts.iter().enumerate() {
                let first_block = inputs.blocks.len() as u32;
                let blocks = (0..part.len().div_ceil(BLOCK_LEN) as u32).map(|b| 200 - first_block - b);
                inputs.push(slot as u32, 0, part.iter().copied(), blocks);
            }
            inputs.logit_rows = (0..40).collect();
            let batch = network.step(&inputs).expect("the step runs").to_vec();
            let mut first = 0;
            for part in parts {
                let alone = prefill(&mut **network, part, 512);
                assert_eq!(alone, batch[first * vocab..(first + part.len()) * vocab], "{}", folder.display());
                first += part.len();
            }
        }
    }
}

#[test]
fn only_asked_rows_are_answered_and_they_are_the_same() {
    let folder = root().join("models/tiny");
    let mut network = cpu(&folder, Isa::detect());
    let (ids, vocab) = (ids(&folder, 20), network.vocab_size());
    let whole = prefill(&mut network, &ids, 512);
    let mut inputs = StepInputs::single(&ids, 0, BLOCK_LEN);
    inputs.logit_rows = vec![3, 19];
    let rows = network.step(&inputs).expect("the step runs");
    assert_eq!(rows[..vocab], whole[3 * vocab..4 * vocab]);
    assert_eq!(rows[vocab..], whole[19 * vocab..]);
}

#[test]
fn the_drafter_matches_its_golden() {
    let folder = root().join("models/tiny");
    for case in golden(&folder.join("golden_mtp.json")).cases {
        let expected = first_drafts(&mut reference(&folder), &case);
        let got = first_drafts(&mut cpu(&folder, Isa::detect()), &case);
        close(&got, &expected, 1e-4, "cpu drafter against reference");
        close(&expected, &case.logits.concat(), 1e-3, "drafter against its training code");
    }
}

/// Draft logits of the case's rows: row i drafts from the hidden vector of token i and token i + 1.
fn first_drafts<B: Backend>(model: &mut Model<B>, case: &Case) -> Vec<f32> {
    model.forward(&StepInputs::single(&case.ids[..case.ids.len() - 1], 0, BLOCK_LEN));
    let mut inputs = DraftInputs::single(&case.ids[1..], 1, BLOCK_LEN);
    inputs.step.logit_rows = case.rows.clone();
    model.forward_draft(&inputs).to_vec()
}

#[test]
fn the_step_of_tiny_as_operations_and_bytes() {
    let mut model = model(Trace::new(4), &root().join("models/tiny"), 1);
    model.forward(&StepInputs::single(&[7], 99, BLOCK_LEN));
    let trace = model.backend();
    let mut text = String::new();
    for r in &trace.records {
        let c = r.cost;
        text += &format!("{:12} {:44} weights {:8} state {:8}\n", r.op, r.shape, c.weights, c.state);
    }
    let total = trace.total();
    text += &format!("total weights {} state {} flops {}\n", total.weights, total.state, total.flops);
    insta::assert_snapshot!(text);
}

/// MODEL.md's gigabytes per decoded token, from configuration and recipe alone.
#[test]
fn a_decoded_token_of_the_released_models_reads_what_their_arithmetic_says() {
    for (name, gigabytes) in
        [("nano-nvfp4", 2.886), ("nano-bf16", 6.456), ("super-nvfp4", 12.646), ("super-bf16", 24.467)]
    {
        let preset = presets::find(name).expect("a known name");
        let config = preset.config().expect("the preset parses");
        let fields = load::describe(&config, &preset.recipe().expect("the recipe parses"));
        let limits =
            Limits { step_tokens: 1, logit_rows: 1, slots: 1, blocks: 1, block_len: 16, ..Limits::default() };
        let mut model = Model::new(Trace::new(2), config, fields, limits).expect("the sizes agree");
        model.forward(&StepInputs::single(&[0], 0, 16));
        let read = model.backend().total().weights as f64 / 1e9;
        assert!((read - gigabytes).abs() < 0.002 * gigabytes, "{name}: {read} GB, expected {gigabytes}");
    }
}

fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best as u32
}
