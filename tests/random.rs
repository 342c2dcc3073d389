//! Networks of random weights: the ones that speed is measured with, in memory and as files; and how it is measured.

use std::path::Path;

use ferrotron::backend::cpu::Cpu;
use ferrotron::backend::profile::Profile;
use ferrotron::backend::trace::Trace;
use ferrotron::backend::{Backend, DraftInputs, Precision, StepInputs};
use ferrotron::model::config::ModelConfig;
use ferrotron::model::convert::ConvertError;
use ferrotron::model::embedded::BLUEPRINTS;
use ferrotron::model::manifest::Manifest;
use ferrotron::model::names::Part;
use ferrotron::model::quantization::Recipe;
use ferrotron::model::random::{Plan, random};
use ferrotron::model::{Limits, Model, load};
use ferrotron::weights::{Checkpoint, Kind, Source};
use serde_json::Value;
use sha2::{Digest, Sha256};

const KINDS: [Kind; 3] = [Kind::BF16, Kind::Fp8, Kind::Nvfp4];
const BLOCK_LEN: usize = 16;

fn json(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name).join("config.json");
    serde_json::from_slice(&std::fs::read(path).expect("the config is part of the project")).expect("JSON")
}

fn config(name: &str) -> ModelConfig {
    ModelConfig::from_value(&json(name)).expect("the config is understood")
}

/// The layers of `name`, each a few thousand parameters.
fn small(name: &str) -> ModelConfig {
    let mut json = json(name);
    for (key, value) in [
        ("vocab_size", 256),
        ("hidden_size", 64),
        ("mamba_num_heads", 8),
        ("mamba_head_dim", 16),
        ("ssm_state_size", 16),
        ("num_attention_heads", 4),
        ("head_dim", 16),
        ("n_routed_experts", 32),
        ("moe_intermediate_size", 32),
        ("moe_shared_expert_intermediate_size", 64),
    ] {
        json[key] = value.into();
    }
    if json.get("moe_latent_size").is_some() {
        json["moe_latent_size"] = 32.into();
    }
    ModelConfig::from_value(&json).expect("the small config is understood")
}

fn limits(tokens: usize) -> Limits {
    Limits {
        step_tokens: tokens,
        logit_rows: tokens,
        slots: 1,
        blocks: 64,
        block_len: BLOCK_LEN,
        lanes: 1,
        drafts: 1,
        ..Limits::default()
    }
}

fn network<B: Backend>(backend: B, config: &ModelConfig, kind: Kind) -> Model<B> {
    let fields = random(config, 0, &Recipe::uniform(kind), &|_| {});
    Model::new(backend, config.clone(), fields, limits(64)).expect("the sizes agree")
}

fn cpu() -> Cpu {
    Cpu::new(Precision::F32, 2).expect("threads start")
}

fn trace(config: &ModelConfig, kind: Kind) -> Model<Trace> {
    let fields = load::describe(config, &Recipe::uniform(kind));
    Model::new(Trace::new(4), config.clone(), fields, limits(64)).expect("the sizes agree")
}

#[test]
fn the_bench_models_have_the_sizes_their_readmes_say() {
    let sizes = ["bench-nano", "bench-super"].map(|name| {
        assert!(BLUEPRINTS.iter().any(|(known, _)| *known == name));
        let config = config(name);
        let totals = KINDS.map(|kind| Manifest::new(&config, &Recipe::uniform(kind)).totals());
        (totals[0].parameters, totals.map(|totals| totals.bytes))
    });
    // Parameters, and bytes as BF16, FP8 and NVFP4.
    assert_eq!(sizes[0], (1_252_562_432, [2_505_125_632, 1_286_814_708, 753_802_228]));
    assert_eq!(sizes[1], (1_018_327_232, [2_036_658_304, 1_054_223_912, 624_401_960]));
}

#[test]
fn a_step_that_chooses_every_expert_reads_what_the_manifest_lists() {
    const TOKENS: usize = 8;
    for name in ["bench-nano", "bench-super"] {
        let config = config(name);
        for kind in KINDS {
            let recipe = Recipe::uniform(kind);
            // The table is read by rows, the drafter in passes of its own, and scales of whole tensors are no bytes
            // worth counting.
            let read = |entry: &ferrotron::model::manifest::Entry| {
                !matches!(Part::of(&entry.name), Part::Embeddings | Part::Mtp) && !entry.shape.is_empty()
            };
            let listed: u64 =
                Manifest::new(&config, &recipe).entries().filter(read).map(|entry| entry.bytes()).sum();
            let mut trace = trace(&config, kind);
            trace.forward(&StepInputs::single(&[0; TOKENS], 0, BLOCK_LEN));
            let rows = (TOKENS * config.hidden_size * 2) as u64;
            assert_eq!(trace.backend().total().weights, listed + rows, "{name} {kind:?}");
        }
    }
}

#[test]
fn activations_stay_finite_and_of_ordinary_size_through_all_layers() {
    let ids: Vec<u32> = (0..64).map(|i| i * 37 % 256).collect();
    for name in ["bench-nano", "bench-super"] {
        for kind in KINDS {
            let mut model = network(cpu(), &small(name), kind);
            let mut inputs = StepInputs::single(&ids, 0, BLOCK_LEN);
            inputs.logit_rows = (0..64).collect();
            let logits = model.forward(&inputs);
            let largest = logits.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
            assert!(logits.iter().all(|logit| logit.is_finite()), "{name} {kind:?}");
            assert!((0.5..20.0).contains(&largest), "{name} {kind:?}: logits up to {largest}");
        }
    }
}

/// Writes tiny's configuration with random weights.
fn write(out: &Path, kind: Kind, seed: u64, shard_bytes: u64) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let plan = Plan::new(Source::folder(folder), kind, seed, shard_bytes).unwrap_or_else(|e| panic!("{e}"));
    let done = std::cell::Cell::new(0);
    plan.run(out, false, &|bytes| done.set(done.get() + bytes)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(done.get(), plan.bytes(), "progress counts every byte");
}

#[test]
fn a_seed_is_a_checkpoint_byte_for_byte_on_every_machine() {
    let digests = KINDS.map(|kind| {
        let out = tempfile::tempdir().expect("a temporary folder");
        write(out.path(), kind, 1, u64::MAX);
        let bytes = std::fs::read(out.path().join("model.safetensors")).expect("one file");
        Sha256::digest(&bytes)[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    });
    assert_eq!(digests, ["bf4d7e66c09043e5", "4570de39c0bd44cb", "8b1722d4e536f8a4"]);
}

#[test]
fn what_is_written_is_what_is_computed_with_and_what_its_recipe_says() {
    let config = config("tiny");
    for kind in KINDS {
        let out = tempfile::tempdir().expect("a temporary folder");
        write(out.path(), kind, 7, 1_000_000);
        let checkpoint = Checkpoint::open(Source::folder(out.path())).unwrap_or_else(|e| panic!("{e}"));
        assert!(checkpoint.shards().count() > 1);
        let text = checkpoint.file("config.json").unwrap().expect("a config");
        let recipe = Recipe::of_checkpoint(&text, None).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
        let comparison = Manifest::new(&config, &recipe).compare(&checkpoint);
        assert!(comparison.is_clean(), "{kind:?}: {comparison:?}");
        assert!(out.path().join("tokenizer.json").is_file());

        let loaded = load::load(&config, &checkpoint, &|_| {}).unwrap_or_else(|e| panic!("{e}")).fields;
        let made = random(&config, 7, &Recipe::uniform(kind), &|_| {});
        let inputs = StepInputs::single(&[5, 6, 7], 0, BLOCK_LEN);
        let logits = [loaded, made].map(|fields| {
            let mut model = Model::new(cpu(), config.clone(), fields, limits(8)).expect("the sizes agree");
            model.forward(&inputs).to_vec()
        });
        assert_eq!(logits[0], logits[1], "{kind:?}");
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut json = json("tiny");
    json["moe_shared_expert_intermediate_size"] = 250.into();
    std::fs::write(folder.path().join("config.json"), json.to_string()).expect("writable");
    let plan = |kind| Plan::new(Source::folder(folder.path()), kind, 0, u64::MAX);
    assert!(plan(Kind::Fp8).is_ok());
    assert!(matches!(plan(Kind::Nvfp4), Err(ConvertError::Width { cols: 250, .. })));
}

#[test]
fn a_profile_sees_every_operation_and_changes_nothing() {
    let config = small("bench-super");
    let inputs = StepInputs::single(&[3, 1, 4, 1, 5], 0, BLOCK_LEN);
    let draft = DraftInputs::single(&[1, 5], 1, BLOCK_LEN);
    let mut plain = network(cpu(), &config, Kind::BF16);
    let expected = (plain.forward(&inputs).to_vec(), plain.forward_draft(&draft).to_vec());

    let mut profiled = network(Profile::new(cpu()), &config, Kind::BF16);
    profiled.forward(&inputs);
    assert_eq!(profiled.backend().spans(), []);
    profiled.backend_mut().watch(true);
    let got = (profiled.forward(&inputs).to_vec(), profiled.forward_draft(&draft).to_vec());
    assert_eq!(got, expected);

    let mut trace = trace(&config, Kind::BF16);
    trace.forward(&inputs);
    trace.forward_draft(&draft);
    let spans = profiled.backend().spans();
    let names: Vec<_> = spans.iter().map(|span| span.op).collect();
    let traced: Vec<_> = trace.backend().records.iter().map(|record| record.op).collect();
    assert_eq!(names, traced);
    for span in spans {
        // Five tokens choose 22 experts of 32 each, the drafter's two at least as many as one of them.
        assert_eq!((22..=32).contains(&span.experts), span.op == "experts", "{span:?}");
    }
}
