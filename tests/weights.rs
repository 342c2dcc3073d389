//! Small random checkpoints on disk: opened, loaded, converted, and broken in every way that a user may meet.

use std::cell::Cell;
use std::path::Path;

use ferrotron::model::config::ModelConfig;
use ferrotron::model::convert::{ConvertError, Plan};
use ferrotron::model::fields::{Fields, Mixer};
use ferrotron::model::load::{self, LoadError};
use ferrotron::model::manifest::Manifest;
use ferrotron::model::names::Naming;
use ferrotron::model::quantization::Recipe;
use ferrotron::model::random::random;
use ferrotron::weights::writer::{Planned, Writer};
use ferrotron::weights::{Checkpoint, Dtype, Error, Format, Kind, Linear, Source, codec};

/// Every kind of layer, latent experts, and a drafter.
const CONFIG: &str = r#"{
  "model_type": "nemotron_h", "vocab_size": 64, "hidden_size": 32, "layer_norm_epsilon": 1e-5,
  "hybrid_override_pattern": "ME*-", "num_hidden_layers": 4, "intermediate_size": 48,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
  "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4,
  "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_latent_size": 16,
  "moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
  "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "time_step_limit": [0.0, Infinity]
}"#;

fn config() -> ModelConfig {
    ModelConfig::from_json(CONFIG.as_bytes()).unwrap()
}

/// A tensor to write.
type Data = (Planned, Vec<u8>);

/// The tensors of the configuration in BF16, small and different everywhere.
fn tensors() -> Vec<Data> {
    let (config, recipe) = (config(), Recipe::uniform(Kind::BF16));
    let mut state = 1u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let entries = Manifest::new(&config, &recipe);
    entries
        .entries()
        .map(|e| {
            let count = e.shape.iter().product::<usize>();
            let data = match e.dtype {
                Dtype::F32 => (0..count).flat_map(|_| value().to_le_bytes()).collect(),
                _ => (0..count).flat_map(|_| codec::f32_to_bf16(value()).to_le_bytes()).collect(),
            };
            (Planned { name: e.name, dtype: e.dtype, shape: e.shape }, data)
        })
        .collect()
}

fn write_file(path: &Path, tensors: &[Data]) {
    let mut writer = Writer::create(path, tensors.iter().map(|(p, _)| p.clone()).collect()).unwrap();
    for (planned, data) in tensors {
        writer.write(&planned.name, data).unwrap();
    }
    writer.finish().unwrap();
}

/// A checkpoint folder of these tensors.
fn folder(tensors: &[Data]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_file(&folder.path().join("model.safetensors"), tensors);
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    folder
}

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open(Source::folder(folder)).unwrap()
}

fn fields(checkpoint: &Checkpoint) -> Fields<Linear> {
    load::load(&config(), checkpoint, &|_| {}).unwrap_or_else(|e| panic!("{e}")).fields
}

/// The names with one thing about the tensors changed.
fn edited(edit: impl Fn(&mut Vec<Data>)) -> tempfile::TempDir {
    let mut tensors = tensors();
    edit(&mut tensors);
    folder(&tensors)
}

fn load_error(folder: &Path) -> String {
    match load::load(&config(), &open(folder), &|_| {}) {
        Ok(_) => panic!("it loaded"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_tensor_becomes_a_field_and_progress_counts_all_bytes() {
    let folder = folder(&tensors());
    let checkpoint = open(folder.path());
    let seen = Cell::new(0);
    let loaded = load::load(&config(), &checkpoint, &|bytes| {
        assert!(bytes > seen.get(), "progress only grows");
        seen.set(bytes);
    })
    .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(seen.get(), checkpoint.bytes());
    assert_eq!(loaded.warnings, Vec::<String>::new());

    let fields = loaded.fields;
    assert_eq!((fields.embeddings.rows, fields.lm_head.cols, fields.norm_f.len()), (64, 32, 32));
    let Mixer::Mamba(mamba) = &fields.layers[0].mixer else { panic!("layer 0 is Mamba") };
    // d = 32, G N = 32, H = 4.
    assert_eq!((mamba.in_proj.rows, mamba.conv_weight.len(), mamba.a_log.len()), (32 + 96 + 4, 96 * 4, 4));
    let Mixer::Moe(moe) = &fields.layers[1].mixer else { panic!("layer 1 is MoE") };
    assert_eq!((moe.up.len(), moe.up[0].cols, moe.down[3].rows, moe.gate.rows), (4, 16, 16, 4));
    assert_eq!(moe.gate.bytes(), 4 * 32 * 2);
    let mtp = fields.mtp.expect("a drafter");
    assert_eq!((mtp.eh_proj.cols, mtp.layers.len(), mtp.final_norm.len()), (64, 2, 32));

    let embeddings = &tensors()[0];
    let expected = codec::bf16_to_f32(u16::from_le_bytes([embeddings.1[64], embeddings.1[65]]));
    let mut row = vec![0.0; 32];
    fields.embeddings.row_f32(1, &mut row);
    assert_eq!(row[0], expected);
}

#[test]
fn other_prefixes_are_found() {
    for (from, to) in [("backbone.", "model."), ("", "language_model.")] {
        let folder = edited(|tensors| {
            for (planned, _) in tensors {
                planned.name = match planned.name.strip_prefix(from) {
                    Some(rest) => format!("{to}{rest}"),
                    None => continue,
                };
            }
        });
        fields(&open(folder.path()));
    }
}

#[test]
fn stacked_experts_are_taken_apart() {
    let one_by_one = folder(&tensors());
    let stacked = edited(|tensors| {
        for layer in ["backbone.layers.1", "mtp.layers.1"] {
            for projection in ["up_proj", "down_proj"] {
                let is_part = |name: &str| {
                    name.starts_with(&format!("{layer}.mixer.experts.")) && name.contains(projection)
                };
                let parts: Vec<Data> = tensors.extract_if(.., |(p, _)| is_part(&p.name)).collect();
                let shape = [&[parts.len()], &parts[0].0.shape[..]].concat();
                let name = format!("{layer}.mixer.experts.{projection}");
                let data = parts.into_iter().flat_map(|(_, data)| data).collect();
                tensors.push((Planned { name, dtype: Dtype::BF16, shape }, data));
            }
        }
    });
    let experts = |path: &Path| match fields(&open(path)).layers.swap_remove(1).mixer {
        Mixer::Moe(moe) => [moe.up, moe.down].concat().iter().map(Linear::to_f32).collect::<Vec<_>>(),
        _ => panic!("layer 1 is MoE"),
    };
    assert_eq!(experts(one_by_one.path()), experts(stacked.path()));
}

#[test]
fn shards_are_found_through_their_index_or_by_their_names() {
    let tensors = tensors();
    let (left, right) = tensors.split_at(tensors.len() / 2);
    let folder = tempfile::tempdir().unwrap();
    write_file(&folder.path().join("a.safetensors"), left);
    write_file(&folder.path().join("b.safetensors"), right);
    assert_eq!(open(folder.path()).names().len(), tensors.len());

    let index = |shard_of_last: &str| {
        let entries = left
            .iter()
            .map(|(p, _)| (p, "a.safetensors"))
            .chain(right.iter().map(|(p, _)| (p, shard_of_last)));
        let map: serde_json::Map<_, _> = entries.map(|(p, s)| (p.name.clone(), s.into())).collect();
        serde_json::json!({ "weight_map": map }).to_string()
    };
    let reopen = |text: String| {
        std::fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        Checkpoint::open(Source::folder(folder.path()))
    };
    assert_eq!(reopen(index("b.safetensors")).unwrap().names().len(), tensors.len());
    let missing = reopen(index("c.safetensors")).unwrap_err().to_string();
    assert!(
        missing.contains("shard c.safetensors is missing") && missing.contains(&right.len().to_string()),
        "{missing}"
    );
    assert!(matches!(reopen(index("a.safetensors")).unwrap_err(), Error::NotInShard { .. }));
    assert!(matches!(reopen(index("../b.safetensors")).unwrap_err(), Error::Index { .. }));
    assert!(matches!(reopen("{".into()).unwrap_err(), Error::Index { .. }));
    assert!(matches!(reopen(r#"{"weight_map": {}}"#.into()).unwrap_err(), Error::Index { .. }));
}

#[test]
fn a_tensor_in_two_files_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.safetensors", "b.safetensors"] {
        write_file(&folder.path().join(name), &tensors()[..1]);
    }
    let error = Checkpoint::open(Source::folder(folder.path())).unwrap_err().to_string();
    assert_eq!(error, "b.safetensors: tensor backbone.embeddings.weight is also in a.safetensors");
}

#[test]
fn places_without_weights_are_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Checkpoint::open(Source::folder(empty.path())), Err(Error::NoWeights { .. })));
    assert!(matches!(Checkpoint::open(Source::folder(empty.path().join("no"))), Err(Error::Io { .. })));
    assert!(matches!(Checkpoint::open(Source::embedded("none", &[])), Err(Error::NoWeights { .. })));
    std::fs::write(empty.path().join("model.safetensors"), "").unwrap();
    assert!(matches!(Checkpoint::open(Source::folder(empty.path())), Err(Error::TooShort { got: 0, .. })));
}

#[test]
fn a_truncated_file_says_how_much_is_missing() {
    let folder = folder(&tensors());
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(whole - 100).unwrap();
    let error = Checkpoint::open(Source::folder(folder.path())).unwrap_err().to_string();
    assert!(error.contains(&format!("{} bytes; expected {whole}", whole - 100)), "{error}");
}

#[test]
fn missing_and_wrong_tensors_are_listed_and_the_rest_counted() {
    let missing = edited(|tensors| tensors.retain(|(p, _)| !p.name.contains("layers.1.mixer.experts")));
    let error = load_error(missing.path());
    // Body and drafter: 4 experts of 2 matrices each.
    assert!(error.starts_with("16 tensors do not fit"), "{error}");
    assert!(
        error.contains("experts.0.up_proj.weight: expected BF16, F16 or F32 [32, 16]; got no such tensor"),
        "{error}"
    );
    assert!(error.ends_with("and 8 more"), "{error}");

    let wrong = edited(|tensors| {
        let norm = tensors.iter_mut().find(|(p, _)| p.name == "backbone.norm_f.weight").unwrap();
        (norm.0.shape, norm.1) = (vec![16], vec![0; 32]);
    });
    let error = load_error(wrong.path());
    assert!(
        error.contains("backbone.norm_f.weight: expected BF16, F16 or F32 [32]; got BF16 [16]"),
        "{error}"
    );

    let integers = edited(|tensors| tensors[0].0.dtype = Dtype::I16);
    // The embedding table is still found by its name, and its type is the complaint.
    assert!(
        load_error(integers.path())
            .contains("embeddings.weight: expected BF16, F16 or F32 [64, 32]; got I16")
    );

    let other_model = edited(|tensors| tensors.retain(|(p, _)| !p.name.contains("embeddings")));
    assert!(load_error(other_model.path()).contains("no embedding table"));
}

#[test]
fn leftovers_and_an_absent_drafter_are_warnings() {
    let folder = edited(|tensors| {
        tensors.retain(|(p, _)| !p.name.starts_with("mtp."));
        tensors.push((Planned { name: "vision.tower".into(), dtype: Dtype::U8, shape: vec![1] }, vec![0]));
    });
    let loaded = load::load(&config(), &open(folder.path()), &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    assert!(loaded.fields.mtp.is_none());
    assert!(loaded.warnings[0].contains("no drafting"), "{:?}", loaded.warnings);
    assert!(loaded.warnings[1].contains("1 tensors are not part of the network: vision.tower"));
}

#[test]
fn a_checkpoint_can_be_converted_loaded_and_checked() {
    let source = folder(&tensors());
    let out = tempfile::tempdir().unwrap();
    let done = Cell::new(0);
    let plan = Plan::new(Source::folder(source.path()), 20_000).unwrap();
    let outcomes = plan.run(out.path(), false, &|bytes| done.set(done.get() + bytes)).unwrap();
    assert_eq!(done.get(), plan.bytes());
    // Body: 8 expert matrices and 2 Mamba projections. The drafter stays BF16.
    assert_eq!((outcomes.len(), plan.weights()), (10, 10));
    for outcome in &outcomes {
        let bound = if outcome.kind == Kind::Nvfp4 { 0.15 } else { 0.04 };
        assert!(outcome.loss.relative_rms > 0.0 && outcome.loss.relative_rms < bound, "{outcome:?}");
    }

    let checkpoint = open(out.path());
    assert!(checkpoint.shards().count() > 1, "20 kB per file make several");
    let (before, after) = (fields(&open(source.path())), fields(&checkpoint));
    let Mixer::Moe(moe) = &after.layers[1].mixer else { panic!("layer 1 is MoE") };
    assert!(moe.up.iter().chain(&moe.down).all(|l| l.kind() == Kind::Nvfp4));
    let Mixer::Mamba(mamba) = &after.layers[0].mixer else { panic!("layer 0 is Mamba") };
    assert_eq!((mamba.in_proj.kind(), mamba.out_proj.kind()), (Kind::Fp8, Kind::Fp8));
    assert_eq!(after.embeddings.data, before.embeddings.data);
    let Mixer::Moe(drafter) = &after.mtp.as_ref().unwrap().layers[1].mixer else {
        panic!("it ends with MoE")
    };
    assert!(drafter.up.iter().all(|l| l.kind() == Kind::BF16));

    // The recipe that was written says what is stored, and the manifest from it is exactly what is there.
    let text = std::fs::read(out.path().join("config.json")).unwrap();
    let recipe = Recipe::of_checkpoint(&text, None).unwrap();
    let written = ModelConfig::from_json(&text).unwrap();
    assert_eq!(written, config());
    let inspection = load::inspect(&written, &checkpoint, &recipe).unwrap_or_else(|e| panic!("{e}"));
    assert!(
        inspection.problems.is_empty()
            && inspection.disagreements.is_empty()
            && inspection.leftovers.is_empty()
    );
    let comparison = Manifest::with_naming(&written, &recipe, Naming::OFFICIAL).compare(&checkpoint);
    assert!(comparison.is_clean(), "{comparison:?}");
    assert!(out.path().join("tokenizer.json").is_file());
    let partial = |e: std::fs::DirEntry| e.path().extension().is_some_and(|x| x == "partial");
    assert!(!std::fs::read_dir(out.path()).unwrap().any(|e| partial(e.unwrap())));

    let again = |path: &Path, force| plan.run(path, force, &|_| {});
    assert!(matches!(again(out.path(), false), Err(ConvertError::NotEmpty { .. })));
    assert!(matches!(again(source.path(), true), Err(ConvertError::Itself { .. })));
    assert_eq!(again(out.path(), true).unwrap(), outcomes);
    assert!(matches!(
        Plan::new(Source::folder(out.path()), u64::MAX),
        Err(ConvertError::AlreadyQuantised { .. })
    ));
}

#[test]
fn a_weight_that_is_not_finite_is_not_quantised() {
    let folder = edited(|tensors| {
        let weight = tensors.iter_mut().find(|(p, _)| p.name.ends_with("experts.2.up_proj.weight")).unwrap();
        weight.1[..2].copy_from_slice(&codec::f32_to_bf16(f32::INFINITY).to_le_bytes());
    });
    let out = tempfile::tempdir().unwrap();
    let error = Plan::new(Source::folder(folder.path()), u64::MAX)
        .unwrap()
        .run(out.path(), false, &|_| {})
        .unwrap_err();
    assert!(error.to_string().contains("experts.2.up_proj"), "{error}");
    assert!(!out.path().join("config.json").exists(), "a failed conversion is no checkpoint");
    assert!(!out.path().join("model.safetensors").exists());
}

/// One linear weight `w` [2, 16] in the tensors of some format.
fn one_linear(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Result<Linear, Error> {
    let data = |t: &(&str, Dtype, &[usize], &[u8])| -> Data {
        (Planned { name: t.0.into(), dtype: t.1, shape: t.2.into() }, t.3.into())
    };
    let folder = tempfile::tempdir().unwrap();
    write_file(&folder.path().join("model.safetensors"), &tensors.iter().map(data).collect::<Vec<_>>());
    open(folder.path()).linear("w", 2, 16)
}

#[test]
fn both_namings_of_nvfp4_read_the_same() {
    let codes = [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]; 2].concat();
    let model_opt = one_linear(&[
        ("w.weight", Dtype::U8, &[2, 8], &codes),
        ("w.weight_scale", Dtype::F8_E4M3, &[2, 1], &[0x38, 0x40]),
        ("w.weight_scale_2", Dtype::F32, &[], &0.25f32.to_le_bytes()),
        ("w.input_scale", Dtype::F32, &[], &1f32.to_le_bytes()),
    ])
    .unwrap();
    let compressed = one_linear(&[
        ("w.weight_packed", Dtype::U8, &[2, 8], &codes),
        ("w.weight_scale", Dtype::F8_E4M3, &[2, 1], &[0x38, 0x40]),
        ("w.weight_global_scale", Dtype::F32, &[1], &4f32.to_le_bytes()),
    ])
    .unwrap();
    assert_eq!(model_opt.to_f32(), compressed.to_f32());
    assert_eq!((model_opt.to_f32()[7], model_opt.to_f32()[23]), (1.5, 3.0));
    assert_eq!(model_opt.bytes(), 18);
}

#[test]
fn scales_that_cannot_be_are_refused() {
    let fp8 = |scale: f32, shape: &[usize]| {
        let scales = vec![scale.to_le_bytes(); shape.iter().product()].concat();
        one_linear(&[
            ("w.weight", Dtype::F8_E4M3, &[2, 16], &[0x38; 32]),
            ("w.weight_scale", Dtype::F32, shape, &scales),
        ])
    };
    assert!(matches!(fp8(2.0, &[1]).unwrap().format, Format::Fp8 { scale: 2.0 }));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(fp8(scale, &[]), Err(Error::Value { .. })), "{scale}");
    }
    let per_row = fp8(1.0, &[2]).unwrap_err().to_string();
    assert_eq!(per_row, "w.weight_scale: expected BF16, F16 or F32 [] or [1]; got F32 [2]");
    let none = one_linear(&[("w.weight", Dtype::F8_E4M3, &[2, 16], &[0x38; 32])]).unwrap_err().to_string();
    assert!(none.starts_with("w.weight_scale: expected") && none.ends_with("got no such tensor"), "{none}");
}

#[test]
fn unquantised_types_are_read_as_they_are() {
    let halves = [codec::f32_to_f16(1.5); 32].map(u16::to_le_bytes).concat();
    let f16 = one_linear(&[("w.weight", Dtype::F16, &[2, 16], &halves)]).unwrap();
    assert_eq!((f16.kind(), f16.to_f32()[31]), (Kind::F16, 1.5));
    let floats = [0.1f32; 32].map(f32::to_le_bytes).concat();
    let f32 = one_linear(&[("w.weight", Dtype::F32, &[2, 16], &floats)]).unwrap();
    assert_eq!((f32.kind(), f32.to_f32()[31]), (Kind::F32, 0.1));
}

#[test]
fn described_and_random_networks_have_the_manifests_shapes() {
    let config = config();
    for kind in [Kind::BF16, Kind::Fp8, Kind::Nvfp4] {
        let recipe = Recipe::uniform(kind);
        let described = load::describe(&config, &recipe);
        let random = random(&config, 7, &recipe, &|_| {});
        let Mixer::Attention(left) = &described.layers[2].mixer else { panic!("layer 2 is attention") };
        let Mixer::Attention(right) = &random.layers[2].mixer else { panic!("layer 2 is attention") };
        assert!(left.q_proj.is_described() && !right.q_proj.is_described());
        assert_eq!((left.q_proj.rows, left.q_proj.bytes()), (right.q_proj.rows, right.q_proj.bytes()));
        assert_eq!(right.q_proj.kind(), kind);
        assert!(right.q_proj.to_f32().iter().all(|v| v.abs() <= 0.5));
        let Mixer::Mamba(mamba) = &random.layers[0].mixer else { panic!("layer 0 is Mamba") };
        let finite =
            mamba.dt_bias.iter().chain(&mamba.a_log).chain(&mamba.conv_weight).all(|v| v.is_finite());
        assert!(finite && mamba.a_log.iter().all(|v| *v >= 0.0));
    }
    let (a, b, c) = (1, 1, 2);
    let rows =
        [a, b, c].map(|seed| random(&config, seed, &Recipe::uniform(Kind::BF16), &|_| {}).lm_head.data);
    assert_eq!(rows[0], rows[1]);
    assert_ne!(rows[0], rows[2]);
}

#[test]
fn an_outline_has_the_stored_formats_and_reports_no_bytes() {
    let source = folder(&tensors());
    let out = tempfile::tempdir().unwrap();
    Plan::new(Source::folder(source.path()), u64::MAX).unwrap().run(out.path(), false, &|_| {}).unwrap();
    let outline = load::outline(&config(), &open(out.path())).unwrap_or_else(|e| panic!("{e}"));
    let Mixer::Moe(moe) = &outline.layers[1].mixer else { panic!("layer 1 is MoE") };
    assert_eq!((moe.up[0].kind(), moe.correction_bias.len()), (Kind::Nvfp4, 4));
    assert_eq!(outline.norm_f, [0.0; 32]);
}

#[test]
fn load_error_is_typed() {
    let folder = edited(|tensors| tensors.retain(|(p, _)| p.name != "lm_head.weight"));
    match load::load(&config(), &open(folder.path()), &|_| {}) {
        Err(LoadError::Tensors(problems)) => {
            assert!(matches!(&problems[..], [Error::Tensor { tensor, .. }] if tensor == "lm_head.weight"));
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it loaded"),
    }
}
