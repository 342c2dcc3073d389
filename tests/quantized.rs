//! The road of a mixed NVFP4 / FP8 / BF16 checkpoint, from `quantize` to an answer.

use std::path::{Path, PathBuf};
use std::process::Command;

use ferrotron::backend::cpu::{Cpu, simd::Isa};
use ferrotron::backend::reference::Reference;
use ferrotron::backend::{Backend, Precision, StepInputs};
use ferrotron::model::config::ModelConfig;
use ferrotron::model::{Limits, Model, Network, load};
use ferrotron::sample::argmax;
use ferrotron::weights::{Checkpoint, Source};

fn models(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

fn model<B: Backend>(backend: B, name: &str) -> Model<B> {
    let checkpoint = Checkpoint::open(Source::folder(models(name))).expect("the checkpoint opens");
    let json = checkpoint.file("config.json").expect("readable").expect("config.json is there");
    let config = ModelConfig::from_json(&json).expect("the config is understood");
    let fields = load::load(&config, &checkpoint, &|_| {}).expect("the weights load").fields;
    let limits =
        Limits { step_tokens: 64, logit_rows: 64, slots: 1, blocks: 16, block_len: 16, ..Limits::default() };
    Model::new(backend, config, fields, limits).expect("the sizes agree")
}

fn prompt() -> Vec<u32> {
    (0..48).map(|i| 18 + i * 23 % 1200).collect()
}

fn logits(network: &mut dyn Network, chunk: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for (i, part) in prompt().chunks(chunk).enumerate() {
        let mut inputs = StepInputs::single(part, i * chunk, 16);
        inputs.logit_rows = (0..part.len() as u32).collect();
        all.extend_from_slice(network.step(&inputs).expect("the step runs"));
    }
    all
}

#[test]
fn quantize_writes_the_checkpoint_that_ships() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out");
    let status = Command::new(env!("CARGO_BIN_EXE_ferrotron"))
        .arg("quantize")
        .args([models("tiny"), out.clone()])
        .output()
        .expect("the binary runs");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    for file in ["model.safetensors", "config.json", "hf_quant_config.json"] {
        let ours = std::fs::read(out.join(file)).expect("written");
        let ships = std::fs::read(models("tiny-nvfp4").join(file)).expect("part of the project");
        assert!(
            ours == ships,
            "{file} differs from models/tiny-nvfp4/{file}: quantize tiny again, or say why"
        );
    }
}

#[test]
fn every_instruction_set_reads_nvfp4_and_fp8_as_the_reference_does() {
    let expected = logits(&mut model(Reference::new(Precision::F32), "tiny-nvfp4"), 64);
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for isa in Isa::available() {
        let cpu = || Cpu::with_isa(Precision::F32, 2, isa).expect("threads start");
        let whole = logits(&mut model(cpu(), "tiny-nvfp4"), 64);
        for (i, (got, expected)) in whole.iter().zip(&expected).enumerate() {
            let name = isa.name();
            assert!(
                (got - expected).abs() <= 1e-4 * scale,
                "{name}: logit {i} is {got}, expected {expected}"
            );
        }
        assert_eq!(logits(&mut model(cpu(), "tiny-nvfp4"), 7), whole, "{}: chunks of 7", isa.name());
    }
}

/// Quantising costs about a tenth of each expert weight; most likeliest ids survive it even on noise.
#[test]
fn quantised_logits_stay_near_the_original() {
    let cpu = || Cpu::new(Precision::F32, 2).expect("threads start");
    let (mut tiny, mut mixed) = (model(cpu(), "tiny"), model(cpu(), "tiny-nvfp4"));
    let vocab = tiny.vocab_size();
    let (original, quantised) = (logits(&mut tiny, 64), logits(&mut mixed, 64));
    assert_ne!(original, quantised, "the mixed checkpoint is not the BF16 one");
    let rows = || original.chunks_exact(vocab).zip(quantised.chunks_exact(vocab));
    let same = rows().filter(|(a, b)| argmax(a) == argmax(b)).count();
    assert!(same * 4 >= rows().count() * 3, "{same} of {} likeliest ids are the same", rows().count());
}
