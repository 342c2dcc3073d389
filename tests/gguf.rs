//! GGUF files: blocks against llama.cpp's own package, a checkpoint against itself written as GGUF, and files that lie.

#[path = "support/blocks.rs"]
mod blocks;
#[path = "support/gguf.rs"]
mod writer;

use std::path::{Path, PathBuf};

use ferrotron::backend::cpu::Cpu;
use ferrotron::backend::reference::Reference;
use ferrotron::backend::{Backend, DraftInputs, Precision, StepInputs};
use ferrotron::model::config::{GenerationConfig, ModelConfig};
use ferrotron::model::quantization::Recipe;
use ferrotron::model::{Limits, Model, Network, gguf, load};
use ferrotron::text::{Chat, Message, Text, TextFiles};
use ferrotron::weights::codec::f32_to_bf16;
use ferrotron::weights::{Blocks, Checkpoint, Format, Kind, Linear, Source};
use writer::{File, Target, Tensor, Value, convert};

const BLOCK_LEN: usize = 16;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tiny() -> (PathBuf, Checkpoint) {
    let folder = root().join("models/tiny");
    let checkpoint = Checkpoint::open(Source::folder(&folder)).expect("tiny opens");
    (folder, checkpoint)
}

/// A folder with `file` as model.gguf.
fn written(file: &File) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    file.write(&path);
    (folder, path)
}

fn config(checkpoint: &Checkpoint) -> ModelConfig {
    let json = checkpoint.file("config.json").expect("readable").expect("config.json is there");
    ModelConfig::from_json(&json).expect("the config is understood")
}

fn model<B: Backend>(backend: B, checkpoint: &Checkpoint) -> Model<B> {
    let config = config(checkpoint);
    let loaded = load::load(&config, checkpoint, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let limits = Limits {
        step_tokens: 64,
        logit_rows: 64,
        slots: 1,
        blocks: 16,
        block_len: BLOCK_LEN,
        lanes: 1,
        drafts: 1,
        ..Limits::default()
    };
    Model::new(backend, config, loaded.fields, limits).expect("the sizes agree")
}

fn cpu(checkpoint: &Checkpoint) -> Model<Cpu> {
    model(Cpu::new(Precision::F32, 2).expect("threads start"), checkpoint)
}

/// Logits of every token of one prompt, and the draft after it if the model has a drafter.
fn logits(network: &mut dyn Network, ids: &[u32]) -> (Vec<f32>, Vec<u32>) {
    let mut inputs = StepInputs::single(ids, 0, BLOCK_LEN);
    inputs.logit_rows = (0..ids.len() as u32).collect();
    let logits = network.step(&inputs).expect("the step runs").to_vec();
    let mut drafts = Vec::new();
    if network.can_draft() {
        let mut draft = DraftInputs::single(&ids[1..], 1, BLOCK_LEN);
        draft.step.logit_rows = (0..ids.len() as u32 - 1).collect();
        network.draft(&draft, &mut drafts).expect("the drafter runs");
    }
    (logits, drafts)
}

/// The answer to a chat, token after token.
fn greedy(network: &mut dyn Network, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut inputs = StepInputs::single(prompt, 0, BLOCK_LEN);
    let mut tokens: Vec<u32> = Vec::new();
    while tokens.len() < count {
        let logits = network.step(&inputs).expect("the step runs");
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("logits");
        tokens.push(best as u32);
        inputs = StepInputs::single(&tokens[tokens.len() - 1..], prompt.len() + tokens.len() - 1, BLOCK_LEN);
    }
    tokens
}

/// Prompts that tiny was trained to answer, as ids.
fn prompts(text: &Text) -> Vec<Vec<u32>> {
    let prompt = |content: &str| {
        let message = Message { role: "user".into(), content: Some(content.into()), ..Message::default() };
        let chat = Chat { messages: vec![message], add_generation_prompt: true, ..Chat::default() };
        text.prompt(&chat).expect("the template renders")
    };
    ["Hi! My name is Hugo.", "What is 4 + 5?"].map(prompt).into()
}

fn text(checkpoint: &Checkpoint) -> Text {
    let file = |name: &str| checkpoint.file(name).expect("readable");
    let (tokenizer, config) = (file("tokenizer.json").expect("a tokenizer"), file("tokenizer_config.json"));
    let template = file("chat_template.jinja").expect("a template");
    let files = TextFiles {
        tokenizer_json: &tokenizer,
        tokenizer_config: config.as_deref(),
        chat_template: Some(std::str::from_utf8(&template).expect("UTF-8")),
    };
    Text::load(files).expect("the text files load")
}

/// `tests/goldens/blocks.py` says where the expected weights are from.
#[test]
fn blocks_decode_to_the_bit_as_the_gguf_package_decodes_them() {
    let checkpoint = Checkpoint::open(Source::folder(root().join("tests/goldens/blocks"))).expect("it opens");
    for blocks in Blocks::ALL {
        let name = blocks.name();
        let stored = checkpoint.tensor(&format!("{name}.blocks")).expect("blocks are there");
        let rows = stored.shape[0];
        let expected =
            checkpoint.values(&format!("{name}.weights"), &[&[rows, 256]]).expect("as are weights");
        let format = Format::Blocks { blocks, scale: 1.0 };
        let linear = Linear { rows, cols: 256, format, data: stored.bytes };
        assert_eq!(linear.bytes(), linear.data.len(), "{name}");
        for (i, (got, expected)) in linear.to_f32().iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "{name}: weight {i}");
        }
    }
}

#[test]
fn unquantised_files_give_the_logits_and_drafts_of_their_checkpoint_to_the_bit() {
    let (folder, original) = tiny();
    for target in [Target::BF16, Target::F32] {
        let (_folder, path) = written(&convert(&folder, &original, target));
        let converted = gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
        for ids in prompts(&text(&original)) {
            let expected = logits(&mut cpu(&original), &ids);
            assert_eq!(expected.1.len(), ids.len() - 1, "tiny drafts");
            assert!(logits(&mut cpu(&converted), &ids) == expected, "{target:?}");
            let reference = |c| logits(&mut model(Reference::new(Precision::F32), c), &ids[..8]);
            assert!(reference(&converted) == reference(&original), "{target:?}, reference");
        }
    }
}

#[test]
fn eight_bits_give_the_answers_of_their_checkpoint() {
    let (folder, original) = tiny();
    for target in [Target::Q8_0, Target::F16] {
        let (_folder, path) = written(&convert(&folder, &original, target));
        let converted = gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
        for ids in prompts(&text(&original)) {
            let expected = greedy(&mut cpu(&original), &ids, 16);
            assert_eq!(greedy(&mut cpu(&converted), &ids, 16), expected, "{target:?}");
        }
    }
}

#[test]
fn metadata_say_what_the_files_of_a_checkpoint_say() {
    let (folder, original) = tiny();
    let (_folder, path) = written(&convert(&folder, &original, Target::Q4_0));
    let converted = gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let expected = ModelConfig {
        // What the converter writes for every hybrid model.
        max_position_embeddings: 1 << 20,
        eos_token_ids: Vec::new(),
        ..config(&original)
    };
    assert_eq!(config(&converted), expected);
    let generation = converted.file("generation_config.json").expect("readable").expect("it is made");
    let stops = GenerationConfig::from_json(&generation).expect("understood").eos_token_ids;
    assert_eq!(stops, [11, 2], "both, though the file names one of them");
    let (ours, theirs) = (text(&original), text(&converted));
    for sample in
        ["Hello, world! 123", "<think>\nnaïve 日本語</think><|im_end|>", "  a\n\n\tb'll {\"k\": 1}", "<s>"]
    {
        assert_eq!(theirs.encode(sample, true).unwrap(), ours.encode(sample, true).unwrap(), "{sample}");
    }
    for id in 0..ours.vocab_size() as u32 {
        assert_eq!(theirs.token_bytes(id), ours.token_bytes(id), "id {id}");
        assert_eq!(theirs.is_special(id), ours.is_special(id), "id {id}");
    }
    let template = |c: &Checkpoint| c.file("chat_template.jinja").expect("readable");
    assert_eq!(template(&converted), template(&original));
}

#[test]
fn nothing_is_expanded() {
    let (folder, original) = tiny();
    let file = convert(&folder, &original, Target::Q4_0);
    let (_folder, path) = written(&file);
    let converted = gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let loaded = load::load(&config(&converted), &converted, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    let kind = Kind::Blocks(Blocks::Q4_0);
    assert_eq!((loaded.fields.lm_head.kind(), loaded.fields.embeddings.kind()), (kind, kind));
    assert_eq!(loaded.fields.lm_head.data.len(), 1280 * 128 / 32 * 18);
    let inspection = load::inspect(&config(&converted), &converted, &Recipe::uniform(Kind::BF16))
        .expect("it is the model");
    let (problems, leftovers) = (inspection.problems, inspection.leftovers);
    assert!(problems.is_empty() && leftovers.is_empty(), "{problems:?} {leftovers:?}");
    assert_eq!(inspection.disagreements, [], "no recipe speaks of blocks");
}

#[test]
fn commands_take_the_file_and_its_folder() {
    let (folder, original) = tiny();
    let (folder, path) = written(&convert(&folder, &original, Target::Q8_0));
    let prompts = folder.path().join("prompts.jsonl");
    let prompt = r#"{"family": "greeting", "request": {"messages": [{"role": "user", "content": "Hey, I am Meera."}]},
                     "expect": {"content": "Hello Meera! How can I help you?"}}"#;
    std::fs::write(&prompts, prompt.replace('\n', " ")).expect("the folder is writable");
    let run = |arguments: &[&std::ffi::OsStr]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferrotron"))
            .args(arguments)
            .output()
            .expect("the binary runs");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    for place in [path.as_os_str(), folder.path().as_os_str()] {
        let (success, text) = run(&["check".as_ref(), place]);
        assert!(success && text.contains("every tensor of the network is there"), "{text}");
        assert!(text.contains("Q8_0") && !text.contains("warning"), "{text}");
    }
    let (eval, model, file) = ("eval".as_ref(), "--model".as_ref(), "--prompts".as_ref());
    let (success, text) = run(&[eval, model, path.as_os_str(), file, prompts.as_os_str(), "--json".as_ref()]);
    assert!(success, "{text}");
    let (success, text) = run(&["quantize".as_ref(), path.as_os_str(), "/nowhere".as_ref()]);
    assert!(!success && text.contains("is GGUF: expected a checkpoint in safetensors"), "{text}");
}

#[test]
fn split_files_are_one_model() {
    let (folder, original) = tiny();
    let whole = convert(&folder, &original, Target::Q8_0);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let name = |n: usize| folder.path().join(format!("tiny-{n:05}-of-00002.gguf"));
    let split = |number: u32, tensors: &[Tensor]| {
        let mut file = File { metadata: Vec::new(), tensors: tensors.to_vec() };
        file.put("split.no", Value::U32(number));
        file.put("split.count", Value::U32(2));
        file
    };
    let (first, second) = whole.tensors.split_at(20);
    let mut one = split(0, first);
    one.metadata.extend(whole.metadata.clone());
    one.write(&name(1));
    split(1, second).write(&name(2));
    // The folder, or the first file.
    for path in [folder.path().to_owned(), name(1)] {
        let checkpoint = gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(checkpoint.shards().count(), 2);
        assert_eq!(checkpoint.names().len(), whole.tensors.len());
    }
    let error = gguf::open(&name(2)).unwrap_err().to_string();
    assert!(error.contains("expected the first file"), "{error}");
    std::fs::remove_file(name(2)).expect("it was there");
    let error = gguf::open(&name(1)).unwrap_err().to_string();
    assert!(error.contains("tiny-00002-of-00002.gguf: no such file"), "{error}");
}

/// A model of random blocks whose every width is a multiple of 256, and the same weights as f32.
fn random(kind: Blocks) -> (File, File) {
    const SCALE: f32 = 0.04;
    const H: usize = 256;
    let mut blocked = File::default();
    blocked.put("general.architecture", Value::Text("nemotron_h_moe".into()));
    for (key, value) in [
        ("block_count", 4),
        ("context_length", 512),
        ("embedding_length", H as u32),
        ("attention.head_count", 2),
        ("attention.key_length", 128),
        ("ssm.conv_kernel", 4),
        ("ssm.inner_size", 256),
        ("ssm.state_size", 16),
        ("ssm.group_count", 2),
        ("ssm.time_step_rank", 4),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("expert_shared_count", 1),
        ("expert_shared_feed_forward_length", 256),
    ] {
        blocked.put(&format!("nemotron_h_moe.{key}"), Value::U32(value));
    }
    blocked.put("nemotron_h_moe.attention.head_count_kv", Value::U32s(vec![0, 0, 1, 0]));
    blocked.put("nemotron_h_moe.feed_forward_length", Value::U32s(vec![0, 512, 0, 256]));
    blocked.put("nemotron_h_moe.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    blocked.put("nemotron_h_moe.expert_weights_scale", Value::F32(2.5));
    let mut plain = blocked.clone();

    let codes = match kind {
        Blocks::Q4_0 => 2,
        Blocks::Q8_0 => 8,
        Blocks::Q4K => 12,
        Blocks::Q5K => 13,
        Blocks::Q6K => 14,
        Blocks::Iq4Nl => 20,
        Blocks::Iq4Xs => 23,
        Blocks::Nvfp4 => 40,
    };
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut matrix = |name: &str, shape: &[usize]| {
        let (cols, rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
        let weight = blocks::weight(rows as u64 ^ name.len() as u64, rows, cols, kind, SCALE);
        let (name, shape) = (format!("{name}.weight"), shape.to_vec());
        let bytes = weight.data.to_vec();
        blocked.tensors.push(Tensor { name: name.clone(), shape: shape.clone(), kind: codes, bytes });
        // One factor for a matrix, one for each expert of a stack.
        let count = if shape.len() == 3 { shape[0] } else { 1 };
        let scale = Tensor {
            name: name.replace(".weight", ".scale"),
            shape: vec![count],
            kind: 0,
            bytes: floats(&vec![SCALE; count]),
        };
        blocked.tensors.push(scale);
        let mut values = weight.to_f32();
        if kind == Blocks::Nvfp4 && (name.contains("attn_q") || name.contains("attn_k")) {
            // NVFP4 with a factor beside it was repacked from a release, whose rows are in order.
            values = writer::interleave(&values, 128, cols);
        }
        plain.tensors.push(Tensor { name, shape, kind: 0, bytes: floats(&values) });
    };
    matrix("token_embd", &[64, H]);
    matrix("output", &[64, H]);
    matrix("blk.0.ssm_in", &[2 * 256 + 2 * 2 * 16 + 4, H]);
    matrix("blk.0.ssm_out", &[H, 256]);
    matrix("blk.1.ffn_up", &[512, H]);
    matrix("blk.1.ffn_down", &[H, 512]);
    matrix("blk.2.attn_q", &[256, H]);
    matrix("blk.2.attn_k", &[128, H]);
    matrix("blk.2.attn_v", &[128, H]);
    matrix("blk.2.attn_output", &[H, 256]);
    matrix("blk.3.ffn_up_exps", &[4, 256, H]);
    matrix("blk.3.ffn_down_exps", &[4, H, 256]);
    matrix("blk.3.ffn_up_shexp", &[256, H]);
    matrix("blk.3.ffn_down_shexp", &[H, 256]);
    for (name, shape, low, high) in [
        ("output_norm.weight", &[H][..], 0.9, 1.1),
        ("blk.0.attn_norm.weight", &[H], 0.9, 1.1),
        ("blk.1.attn_norm.weight", &[H], 0.9, 1.1),
        ("blk.2.attn_norm.weight", &[H], 0.9, 1.1),
        ("blk.3.attn_norm.weight", &[H], 0.9, 1.1),
        ("blk.0.ssm_conv1d.weight", &[320, 4], -0.5, 0.5),
        ("blk.0.ssm_conv1d.bias", &[320], -0.1, 0.1),
        ("blk.0.ssm_dt.bias", &[4], -1.0, 0.0),
        ("blk.0.ssm_a", &[4, 1], -8.0, -1.0),
        ("blk.0.ssm_d", &[4, 1], 0.5, 1.5),
        ("blk.0.ssm_norm.weight", &[2, 128], 0.9, 1.1),
        ("blk.3.ffn_gate_inp.weight", &[4, H], -0.1, 0.1),
        ("blk.3.exp_probs_b.bias", &[4], -0.1, 0.1),
    ] {
        let count: usize = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|i| low + (high - low) * ((i * 37 + 11) % 101) as f32 / 100.0).collect();
        let tensor = Tensor { name: name.into(), shape: shape.to_vec(), kind: 0, bytes: floats(&values) };
        plain.tensors.push(tensor.clone());
        blocked.tensors.push(tensor);
    }
    (blocked, plain)
}

#[test]
fn every_block_format_computes_as_its_weights_in_f32_do() {
    for kind in Blocks::ALL {
        let (blocked, plain) = random(kind);
        let ((_one, blocked), (_two, plain)) = (written(&blocked), written(&plain));
        let open = |path: &Path| gguf::open(path).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        let (blocked, plain) = (open(&blocked), open(&plain));
        let ids: Vec<u32> = (0..12).map(|i| i * 5 % 64).collect();
        let (expected, _) = logits(&mut model(Reference::new(Precision::F32), &plain), &ids);
        let (same, _) = logits(&mut model(Reference::new(Precision::F32), &blocked), &ids);
        assert!(same == expected, "{kind:?}: the reference reads the same numbers");
        let (got, _) = logits(&mut cpu(&blocked), &ids);
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0.1, "{kind:?}: the logits say something");
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                (got - expected).abs() <= 1e-4 * scale,
                "{kind:?}: logit {i}: {got}, expected {expected}"
            );
        }
    }
}

#[test]
fn a_file_that_lies_is_refused_with_what_is_wrong() {
    let (good, _) = random(Blocks::Q4K);
    let check = |change: &dyn Fn(&mut File), message: &str| {
        let mut file = good.clone();
        change(&mut file);
        let (_folder, path) = written(&file);
        let error = match gguf::open(&path) {
            Err(error) => error.to_string(),
            Ok(checkpoint) => match ModelConfig::from_json(&checkpoint.file("config.json").unwrap().unwrap())
            {
                Err(error) => error.to_string(),
                Ok(config) => match load::load(&config, &checkpoint, &|_| {}) {
                    Err(error) => error.to_string(),
                    Ok(loaded) => loaded.warnings.join("\n"),
                },
            },
        };
        assert!(error.contains(message), "expected {message:?}, got: {error}");
    };
    let set = |file: &mut File, key: &str, value: Value| {
        file.metadata.retain(|(name, _)| !name.ends_with(key));
        file.put(&format!("nemotron_h_moe.{key}"), value);
    };
    let tensor = |file: &mut File, name: &str, change: &dyn Fn(&mut Tensor)| {
        change(file.tensors.iter_mut().find(|t| t.name == name).expect("it is there"));
    };
    check(
        &|f| f.metadata[0].1 = Value::Text("llama".into()),
        "expected nemotron_h or nemotron_h_moe; got llama",
    );
    check(&|f| f.metadata[0].1 = Value::U32(7), "general.architecture: expected a string; got 7");
    check(&|f| set(f, "block_count", Value::U32(5)), "expected a whole number or a list of 5");
    check(&|f| set(f, "block_count", Value::U32(u32::MAX)), "block_count: expected at most 4096");
    check(
        &|f| set(f, "ssm.inner_size", Value::U32(255)),
        "expected a multiple of ssm.time_step_rank, 4; got 255",
    );
    check(&|f| set(f, "ssm.group_count", Value::U32(3)), "n_groups");
    check(&|f| set(f, "expert_used_count", Value::U32(9)), "num_experts_per_tok");
    check(&|f| set(f, "expert_gating_func", Value::U32(1)), "expected 2 (sigmoid); got 1");
    check(&|f| set(f, "embedding_length", Value::U32(512)), "expected blocks [64, 512]; got Q4_K [64, 256]");
    check(&|f| f.put("general.architecture", Value::Bool(true)), "general.architecture is there twice");
    check(&|f| f.put("general.alignment", Value::U32(48)), "expected a power of two up to 2097152; got 48");
    check(
        &|f| f.put("tokenizer.ggml.model", Value::Text("llama".into())),
        "expected gpt2, a byte-level BPE; got llama",
    );
    check(&|f| f.tensors.push(f.tensors[0].clone()), "tensor token_embd.weight: is listed twice");
    check(
        &|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.kind = 10),
        "blk.1.ffn_up.weight is stored as Q2_K; expected F32",
    );
    check(
        &|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.shape[1] = 255),
        "rows of 255; expected a multiple of 256",
    );
    check(&|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.shape = vec![0, 256]), "which no file can hold");
    check(
        &|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.shape = vec![1 << 40, 1 << 40]),
        "which no file can hold",
    );
    check(&|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.shape[0] = 520), "the tensor before it ends");
    check(&|f| tensor(f, "blk.1.ffn_up.weight", &|t| t.shape[0] = 1 << 30), "incomplete download?");
    check(
        &|f| tensor(f, "blk.0.ssm_a", &|t| t.bytes[3] = 0),
        "expected a finite number below 0, -exp(A_log)",
    );
    check(
        &|f| tensor(f, "blk.3.exp_probs_b.bias", &|t| t.name = "odd".into()),
        "gate.e_score_correction_bias",
    );
    check(&|f| f.tensors.retain(|t| t.name != "blk.0.ssm_in.weight"), "expected a tensor blk.0.ssm_in");
    let stray = Tensor { name: "rope_freqs.weight".into(), shape: vec![1], kind: 0, bytes: vec![0; 4] };
    check(&|f| f.tensors.push(stray.clone()), "1 tensors are not part of the network: rope_freqs.weight");
    check(&|_| {}, "");
}

/// A file with an entry of every kind, small enough to damage it everywhere.
fn small() -> Vec<u8> {
    let mut file = File::default();
    file.put("general.architecture", Value::Text("nemotron_h".into()));
    file.put("nemotron_h.block_count", Value::U32(1));
    file.put("a.number", Value::F32(0.5));
    file.put("a.list", Value::U32s(vec![1, 2, 3]));
    file.put("tokenizer.ggml.tokens", Value::Texts(vec!["a".into(), "b".into()]));
    let bytes = (0..34).collect();
    file.tensors.push(Tensor { name: "token_embd.weight".into(), shape: vec![1, 32], kind: 8, bytes });
    let bytes = f32_to_bf16(1.0).to_le_bytes().to_vec();
    file.tensors.push(Tensor { name: "one".into(), shape: vec![1], kind: 30, bytes });
    file.bytes()
}

#[test]
fn a_truncated_file_is_an_error_and_no_byte_makes_the_reader_panic() {
    let whole = small();
    let parse = |bytes: Vec<u8>| ferrotron::weights::gguf::parse("small.gguf", bytes.into());
    let parsed = parse(whole.clone()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(parsed.tensors.len(), 2);
    // The padding at the end is no part of a tensor.
    let used = whole.len() - 30;
    for len in 0..used {
        assert!(parse(whole[..len].to_vec()).is_err(), "{len} of {} bytes", whole.len());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    for at in 0..whole.len() {
        for value in [0, 1, 0x7F, 0x80, 0xFF, whole[at] ^ 0x20] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            // Lengths that are lies are longest where eight bytes of them are.
            let all = bytes.clone();
            let _ = parse(bytes);
            if at % 8 == 0 && value == 0xFF {
                let mut bytes = all;
                let end = (at + 8).min(bytes.len());
                bytes[at..end].fill(0xFF);
                std::fs::write(&path, &bytes).expect("the folder is writable");
                let _ = gguf::open(&path);
            }
        }
    }
}
