//! A writer of GGUF: a safetensors checkpoint becomes the file that llama.cpp's converter makes of it.

use std::collections::BTreeMap;
use std::path::Path;

use ferrotron::weights::codec::{bf16_to_f32, f32_to_bf16, f32_to_f16};
use ferrotron::weights::{Checkpoint, Dtype};
use serde_json::Value as Json;

/// A metadata value.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    U32s(Vec<u32>),
    Texts(Vec<String>),
}

/// A tensor: dimensions outermost first, the format's type number, its bytes.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// A file before it is written.
#[derive(Clone, Default)]
pub struct File {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

const ALIGNMENT: usize = 32;

impl File {
    pub fn put(&mut self, key: &str, value: Value) {
        self.metadata.push((key.into(), value));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for &size in tensor.shape.iter().rev() {
                out.extend((size as u64).to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(ALIGNMENT) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend_from_slice(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).expect("the folder is writable");
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
        match self {
            Value::U32(n) => {
                kind(out, 4);
                out.extend(n.to_le_bytes());
            }
            Value::F32(n) => {
                kind(out, 6);
                out.extend(n.to_le_bytes());
            }
            Value::Bool(b) => {
                kind(out, 7);
                out.push(u8::from(*b));
            }
            Value::Text(s) => {
                kind(out, 8);
                text(out, s);
            }
            Value::U32s(list) => {
                kind(out, 9);
                kind(out, 4);
                out.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Value::Texts(list) => {
                kind(out, 9);
                kind(out, 8);
                out.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|s| text(out, s));
            }
        }
    }
}

/// The type of a matrix in the written file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
}

impl Target {
    fn kind(self) -> u32 {
        match self {
            Target::F32 => 0,
            Target::F16 => 1,
            Target::BF16 => 30,
            Target::Q8_0 => 8,
            Target::Q4_0 => 2,
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Target::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Target::F16 => values.iter().flat_map(|&v| f32_to_f16(v).to_le_bytes()).collect(),
            Target::BF16 => values.iter().flat_map(|&v| f32_to_bf16(v).to_le_bytes()).collect(),
            Target::Q8_0 => values.chunks_exact(32).flat_map(q8_0).collect(),
            Target::Q4_0 => values.chunks_exact(32).flat_map(q4_0).collect(),
        }
    }
}

fn q8_0(block: &[f32]) -> Vec<u8> {
    let d = block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let mut out = f32_to_f16(d).to_le_bytes().to_vec();
    out.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
    out
}

/// The largest number, with its sign, becomes -8.
fn q4_0(block: &[f32]) -> Vec<u8> {
    let largest = block.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let d = largest / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let code = |v: f32| ((v * inverse + 8.5) as i32).clamp(0, 15) as u8;
    let mut out = f32_to_f16(d).to_le_bytes().to_vec();
    out.extend((0..16).map(|i| code(block[i]) | code(block[16 + i]) << 4));
    out
}

/// What a converter of `folder` writes, with every matrix but the router as `target`.
pub fn convert(folder: &Path, checkpoint: &Checkpoint, target: Target) -> File {
    let json = |name: &str| -> Json {
        let bytes = std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let config = json("config.json");
    let mut file = File::default();
    model_metadata(&mut file, &config);
    let template =
        std::fs::read_to_string(folder.join("chat_template.jinja")).expect("the template is there");
    file.put("tokenizer.chat_template", Value::Text(template));
    tokenizer_metadata(&mut file, &json("tokenizer.json"));
    tensors(&mut file, &config, checkpoint, target);
    file
}

fn pattern(config: &Json) -> Vec<char> {
    config["hybrid_override_pattern"].as_str().expect("a pattern").chars().collect()
}

fn model_metadata(file: &mut File, config: &Json) {
    let size = |name: &str| config[name].as_u64().unwrap_or(0) as u32;
    let layers = pattern(config);
    let mtp = size("num_nextn_predict_layers");
    // The MTP block, which is attention and MoE, stands at the end.
    let kinds = || layers.iter().copied().chain((0..mtp).map(|_| '!'));
    let attends = |kind: char| matches!(kind, '*' | '!');
    let feeds = |kind: char| match kind {
        'E' | '!' => size("moe_intermediate_size"),
        '-' => size("intermediate_size"),
        _ => 0,
    };
    let moe = size("num_experts_per_tok") > 0;
    let architecture = if moe { "nemotron_h_moe" } else { "nemotron_h" };
    file.put("general.architecture", Value::Text(architecture.into()));
    let mut put = |key: &str, value: Value| file.put(&format!("{architecture}.{key}"), value);
    put("block_count", Value::U32(layers.len() as u32 + mtp));
    put("context_length", Value::U32(1 << 20));
    put("embedding_length", Value::U32(size("hidden_size")));
    put("vocab_size", Value::U32(size("vocab_size")));
    put("attention.head_count", Value::U32(size("num_attention_heads")));
    let kv = kinds().map(|kind| if attends(kind) { size("num_key_value_heads") } else { 0 });
    put("attention.head_count_kv", Value::U32s(kv.collect()));
    put("feed_forward_length", Value::U32s(kinds().map(feeds).collect()));
    put("attention.key_length", Value::U32(size("head_dim")));
    put("attention.value_length", Value::U32(size("head_dim")));
    put("attention.layer_norm_epsilon", Value::F32(1e-5));
    put("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    put("ssm.conv_kernel", Value::U32(size("conv_kernel")));
    put("ssm.inner_size", Value::U32(size("mamba_num_heads") * size("mamba_head_dim")));
    put("ssm.state_size", Value::U32(size("ssm_state_size")));
    put("ssm.group_count", Value::U32(size("n_groups")));
    put("ssm.time_step_rank", Value::U32(size("mamba_num_heads")));
    put("rope.freq_base", Value::F32(10000.0));
    put("rope.scaling.finetuned", Value::Bool(false));
    if moe {
        put("expert_count", Value::U32(size("n_routed_experts")));
        put("expert_used_count", Value::U32(size("num_experts_per_tok")));
        put("expert_shared_count", Value::U32(size("n_shared_experts")));
        put("expert_feed_forward_length", Value::U32(size("moe_intermediate_size")));
        put("expert_shared_feed_forward_length", Value::U32(size("moe_shared_expert_intermediate_size")));
        put("expert_weights_norm", Value::Bool(true));
        let scaling = config["routed_scaling_factor"].as_f64().expect("a scaling factor");
        put("expert_weights_scale", Value::F32(scaling as f32));
        put("expert_group_count", Value::U32(size("n_group")));
        put("expert_group_used_count", Value::U32(size("topk_group")));
    }
    if size("moe_latent_size") > 0 {
        put("moe_latent_size", Value::U32(size("moe_latent_size")));
    }
    if mtp > 0 {
        put("nextn_predict_layers", Value::U32(mtp));
    }
}

fn tokenizer_metadata(file: &mut File, tokenizer: &Json) {
    let vocabulary = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens: BTreeMap<u64, (String, u32)> =
        vocabulary.iter().map(|(text, id)| (id.as_u64().expect("an id"), (text.clone(), 1))).collect();
    for added in tokenizer["added_tokens"].as_array().expect("added tokens") {
        // Control, or user-defined.
        let kind = if added["special"] == true { 3 } else { 4 };
        let text = added["content"].as_str().expect("a text").to_owned();
        tokens.insert(added["id"].as_u64().expect("an id"), (text, kind));
    }
    assert!(tokens.keys().copied().eq(0..tokens.len() as u64), "the vocabulary has no holes");
    let merge = |pair: &Json| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges = tokenizer["model"]["merges"].as_array().expect("merges").iter().map(merge).collect();
    file.put("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.put("tokenizer.ggml.pre", Value::Text("pixtral".into()));
    let (texts, kinds) = tokens.into_values().unzip();
    file.put("tokenizer.ggml.tokens", Value::Texts(texts));
    file.put("tokenizer.ggml.token_type", Value::U32s(kinds));
    file.put("tokenizer.ggml.merges", Value::Texts(merges));
    for (name, id) in [("bos", 1), ("eos", 11), ("unknown", 0), ("padding", 0)] {
        file.put(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
    }
    file.put("tokenizer.ggml.add_bos_token", Value::Bool(false));
}

/// Our names and GGUF's, of a layer's tensors.
const LAYER: [(&str, &str); 17] = [
    ("norm.weight", "attn_norm.weight"),
    ("mixer.in_proj.weight", "ssm_in.weight"),
    ("mixer.out_proj.weight", "ssm_out.weight"),
    ("mixer.conv1d.weight", "ssm_conv1d.weight"),
    ("mixer.conv1d.bias", "ssm_conv1d.bias"),
    ("mixer.norm.weight", "ssm_norm.weight"),
    ("mixer.A_log", "ssm_a"),
    ("mixer.D", "ssm_d"),
    ("mixer.dt_bias", "ssm_dt.bias"),
    ("mixer.q_proj.weight", "attn_q.weight"),
    ("mixer.k_proj.weight", "attn_k.weight"),
    ("mixer.v_proj.weight", "attn_v.weight"),
    ("mixer.o_proj.weight", "attn_output.weight"),
    ("mixer.up_proj.weight", "ffn_up.weight"),
    ("mixer.down_proj.weight", "ffn_down.weight"),
    ("mixer.gate.weight", "ffn_gate_inp.weight"),
    ("mixer.gate.e_score_correction_bias", "exp_probs_b.bias"),
];

const MOE: [(&str, &str); 4] = [
    ("mixer.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
    ("mixer.shared_experts.down_proj.weight", "ffn_down_shexp.weight"),
    ("mixer.fc1_latent_proj.weight", "ffn_latent_down.weight"),
    ("mixer.fc2_latent_proj.weight", "ffn_latent_up.weight"),
];

fn tensors(file: &mut File, config: &Json, checkpoint: &Checkpoint, target: Target) {
    let layers = pattern(config).len();
    let mut out = Tensors { file, config, checkpoint, target };
    for (here, there) in [
        ("backbone.embeddings.weight", "token_embd.weight"),
        ("backbone.norm_f.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ] {
        out.one(here, there);
    }
    for layer in 0..layers {
        out.layer(&format!("backbone.layers.{layer}"), layer);
    }
    if config["num_nextn_predict_layers"] == 1 {
        for (here, there) in [
            ("mtp.layers.0.enorm.weight", "nextn.enorm.weight"),
            ("mtp.layers.0.hnorm.weight", "nextn.hnorm.weight"),
            ("mtp.layers.0.eh_proj.weight", "nextn.eh_proj.weight"),
            ("mtp.layers.1.final_layernorm.weight", "nextn.shared_head_norm.weight"),
            ("mtp.layers.1.norm.weight", "post_attention_norm.weight"),
        ] {
            out.one(here, &format!("blk.{layers}.{there}"));
        }
        out.layer("mtp.layers.0", layers);
        // Its norm was written above, under a name of its own.
        out.mixer("mtp.layers.1", layers);
    }
}

struct Tensors<'a> {
    file: &'a mut File,
    config: &'a Json,
    checkpoint: &'a Checkpoint,
    target: Target,
}

impl Tensors<'_> {
    fn layer(&mut self, prefix: &str, number: usize) {
        self.one(&format!("{prefix}.norm.weight"), &format!("blk.{number}.attn_norm.weight"));
        self.mixer(prefix, number);
    }

    fn mixer(&mut self, prefix: &str, number: usize) {
        for (here, there) in LAYER[1..].iter().chain(&MOE) {
            self.one(&format!("{prefix}.{here}"), &format!("blk.{number}.{there}"));
        }
        for projection in ["up", "down"] {
            let expert = |e: u64| format!("{prefix}.mixer.experts.{e}.{projection}_proj.weight");
            if self.checkpoint.contains(&expert(0)) {
                let count = self.config["n_routed_experts"].as_u64().expect("experts");
                let each: Vec<_> = (0..count).map(|e| self.read(&expert(e))).collect();
                let shape = [&[count as usize][..], &each[0].0].concat();
                let values: Vec<f32> = each.into_iter().flat_map(|(_, values)| values).collect();
                self.push(format!("blk.{number}.ffn_{projection}_exps.weight"), shape, &values, self.target);
            }
        }
    }

    /// One tensor, if it is there.
    fn one(&mut self, here: &str, there: &str) {
        if !self.checkpoint.contains(here) {
            return;
        }
        let (shape, values) = self.read(here);
        let (shape, values) = self.changed(here, shape, values);
        let matrix = shape.len() == 2 && !here.contains("mixer.gate");
        let small =
            ["A_log", ".D", "conv1d.weight", "mixer.norm.weight"].iter().any(|end| here.ends_with(end));
        let target = if matrix && !small { self.target } else { Target::F32 };
        self.push(there.into(), shape, &values, target);
    }

    fn push(&mut self, name: String, shape: Vec<usize>, values: &[f32], target: Target) {
        let bytes = target.encode(values);
        self.file.tensors.push(Tensor { name, shape, kind: target.kind(), bytes });
    }

    fn read(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensor = self.checkpoint.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
        let values = match tensor.dtype {
            Dtype::BF16 => {
                tensor.bytes.chunks_exact(2).map(|b| bf16_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect()
            }
            Dtype::F32 => {
                tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            other => panic!("{name}: {other:?} is not written"),
        };
        (tensor.shape, values)
    }

    /// What the converter does to some tensors.
    fn changed(&self, name: &str, shape: Vec<usize>, values: Vec<f32>) -> (Vec<usize>, Vec<f32>) {
        let size = |key: &str| self.config[key].as_u64().expect("a size") as usize;
        if name.ends_with(".A_log") {
            return (vec![shape[0], 1], values.iter().map(|v| -v.exp()).collect());
        }
        if name.ends_with(".D") {
            return (vec![shape[0], 1], values);
        }
        if name.ends_with("mixer.norm.weight") {
            return (vec![size("n_groups"), shape[0] / size("n_groups")], values);
        }
        if name.ends_with("conv1d.weight") {
            return (vec![shape[0], shape[2]], values);
        }
        if name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight") {
            return (shape.clone(), interleave(&values, size("head_dim"), shape[1]));
        }
        (shape, values)
    }
}

/// Row 2 j of a head becomes its row j, row 2 j + 1 its row head / 2 + j.
pub fn interleave(values: &[f32], head: usize, cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    let from = |row: usize| row / head * head + row % head / 2 + row % 2 * (head / 2);
    (0..rows).flat_map(|row| values[from(row) * cols..][..cols].iter().copied()).collect()
}
