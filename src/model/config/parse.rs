//! `config.json` in all its dialects, read once, checked, and turned into a [`ModelConfig`].

use serde_json::{Map, Value, json};

use super::read::{Fields, LAYER_LIMIT, SIZE_LIMIT, bounded, invalid};
use super::{Attention, ConfigError, Layer, Mamba, Mlp, ModelConfig, Moe};
use crate::model::json;

/// Vocabulary and context may be larger than any width.
const LONG_LIMIT: usize = 1 << 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LayerKind {
    Mamba,
    Attention,
    Moe,
    Mlp,
}

impl ModelConfig {
    /// Reads `config.json`: of the model itself, or of a wrapper that keeps it under `llm_config` or
    /// `text_config`.
    ///
    /// Errors: not JSON, another model, an unknown layer kind, a size that is missing, absurd or does not fit
    /// the others, or a feature (biases, another activation) that no release has.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        const FILE: &str = "config.json";
        let value =
            json::parse(bytes).map_err(|e| ConfigError::Json { file: FILE, reason: e.to_string() })?;
        Self::from_value(&value)
    }

    /// As [`ModelConfig::from_json`], for a file that was parsed already.
    pub fn from_value(value: &Value) -> Result<Self, ConfigError> {
        let Value::Object(outer) = value else {
            return Err(invalid("config.json", "an object", json::describe(value)));
        };
        let root = language_model(outer);
        check_model_type(root)?;
        let fields = Fields::new(root);
        check_features(&fields)?;
        let long = |name: &str| match fields.get(&[name]) {
            Some((name, value)) => bounded(&name, value, LONG_LIMIT),
            None => Err(ConfigError::Missing { field: name.into(), expected: "an integer" }),
        };
        let vocab_size = long("vocab_size")?;
        if vocab_size == 0 {
            return Err(invalid("vocab_size", "at least 1", 0));
        }
        Ok(ModelConfig {
            vocab_size,
            hidden_size: fields.size(&["hidden_size"])?,
            // The other two names are in most files with the same value, and read by nobody else.
            norm_eps: fields.positive_or(&["layer_norm_epsilon", "norm_eps", "rms_norm_eps"], 1e-5)? as f32,
            layers: body(root, fields)?,
            mtp: mtp(root, fields)?,
            max_position_embeddings: match root.get("max_position_embeddings") {
                Some(_) => long("max_position_embeddings")?,
                None => 262_144,
            },
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", false)?,
            eos_token_ids: token_ids(&fields, "eos_token_id")?,
        })
    }
}

/// The object that holds the language model's own fields.
pub(in crate::model) fn language_model(outer: &Map<String, Value>) -> &Map<String, Value> {
    ["llm_config", "text_config"].iter().find_map(|key| outer.get(*key)?.as_object()).unwrap_or(outer)
}

fn check_model_type(root: &Map<String, Value>) -> Result<(), ConfigError> {
    let model_type = json::field(root, "model_type");
    let architecture = json::field(root, "architectures").and_then(|list| list.get(0));
    let known = |v: &Value| {
        let name = v.as_str().unwrap_or_default();
        matches!(name, "nemotron_h" | "nemotron_h_puzzle")
            || matches!(name, "NemotronHForCausalLM" | "NemotronHPuzzleForCausalLM")
    };
    match model_type.or(architecture) {
        Some(name) if known(name) || architecture.is_some_and(known) => Ok(()),
        Some(name) => Err(ConfigError::UnknownModel { got: json::describe(name) }),
        None => Err(ConfigError::UnknownModel { got: "no model_type".into() }),
    }
}

/// Fields that would change the arithmetic, if any release set them.
fn check_features(fields: &Fields) -> Result<(), ConfigError> {
    for name in ["use_bias", "mlp_bias", "attention_bias"] {
        fields.only(name, &[json!(false)], "false")?;
    }
    fields.only("mlp_hidden_act", &[json!("relu2")], "\"relu2\"")?;
    fields.only("mamba_hidden_act", &[json!("silu"), json!("swish")], "\"silu\"")?;
    fields.only("sliding_window", &[], "null")
}

fn body(root: &Map<String, Value>, fields: Fields) -> Result<Vec<Layer>, ConfigError> {
    let names = ["hybrid_override_pattern", "layers_block_type", "layer_types", "block_configs"];
    let layers = match stack(root, fields, &names)? {
        Some(layers) if !layers.is_empty() => layers,
        Some(_) => return Err(invalid(names[0], "at least one layer", 0)),
        None => {
            let expected = "a pattern of M, E, * and -, or layers_block_type";
            return Err(ConfigError::Missing { field: names[0].into(), expected });
        }
    };
    // `num_hidden_layers` is not always written again by tools that cut layers away, so a shorter list than it
    // says is a mistake that must be heard.
    match fields.optional_size(&["num_hidden_layers"])? {
        Some(count) if count != layers.len() => {
            Err(invalid("num_hidden_layers", format!("{} (the layers listed)", layers.len()), count))
        }
        _ => Ok(layers),
    }
}

fn mtp(root: &Map<String, Value>, fields: Fields) -> Result<Option<Vec<Layer>>, ConfigError> {
    let names = ["mtp_hybrid_override_pattern", "mtp_layers_block_type", "mtp_block_configs"];
    let count = match fields.optional_size(&["num_nextn_predict_layers"])? {
        Some(count) => count,
        // Puzzle only lists the blocks.
        None => {
            json::field(root, "mtp_block_configs").and_then(Value::as_array).map_or(0, |l| l.len().min(1))
        }
    };
    match count {
        0 => Ok(None),
        1 => match stack(root, fields, &names)? {
            Some(layers) if !layers.is_empty() => Ok(Some(layers)),
            // Every release has attention, then MoE, and some do not say so.
            _ => Ok(Some(vec![layer(LayerKind::Attention, fields, 0)?, layer(LayerKind::Moe, fields, 0)?])),
        },
        other => Err(ConfigError::Unsupported {
            field: "num_nextn_predict_layers".into(),
            expected: "0 or 1",
            got: other.to_string(),
        }),
    }
}

/// The layers that the first of these fields lists; `None` where none of them is there.
///
/// A field is a string with a character per layer, a list of such characters or of words, or a list of objects
/// with a `block_type` and that layer's own sizes (Puzzle).
fn stack(
    root: &Map<String, Value>,
    fields: Fields,
    names: &[&str],
) -> Result<Option<Vec<Layer>>, ConfigError> {
    let Some((name, value)) = names.iter().find_map(|n| Some((*n, json::field(root, n)?))) else {
        return Ok(None);
    };
    // Kinds may stand in one field and the sizes that vary in another.
    let blocks_name = if name.starts_with("mtp") { "mtp_block_configs" } else { "block_configs" };
    let blocks = json::field(root, blocks_name).and_then(Value::as_array);
    let kinds = match value {
        Value::String(pattern) => {
            let kind = |(i, c): (usize, char)| kind_of(name, i, c.encode_utf8(&mut [0; 4]));
            pattern.chars().take(LAYER_LIMIT + 1).enumerate().map(kind).collect::<Result<Vec<_>, _>>()?
        }
        Value::Array(list) => {
            let kind = |(i, entry): (usize, &Value)| {
                let word = entry.get("block_type").unwrap_or(entry);
                match word.as_str() {
                    Some(word) => kind_of(name, i, word),
                    None => Err(invalid(&format!("{name}[{i}]"), "a layer kind", json::describe(word))),
                }
            };
            list.iter().take(LAYER_LIMIT + 1).enumerate().map(kind).collect::<Result<Vec<_>, _>>()?
        }
        other => return Err(invalid(name, "a string or a list", json::describe(other))),
    };
    if kinds.len() > LAYER_LIMIT {
        return Err(invalid(name, format!("at most {LAYER_LIMIT} layers"), "more"));
    }
    if let Some(blocks) = blocks
        && blocks.len() != kinds.len()
    {
        return Err(invalid(blocks_name, format!("{} entries, as {name} has", kinds.len()), blocks.len()));
    }
    let mut dense = 0;
    let mut layers = Vec::with_capacity(kinds.len());
    for (position, &kind) in kinds.iter().enumerate() {
        let fields = match blocks.and_then(|b| b[position].as_object()) {
            Some(block) => fields.with_block(blocks_name, position, block),
            None => fields,
        };
        layers.push(layer(kind, fields, dense)?);
        dense += usize::from(kind == LayerKind::Mlp);
    }
    Ok(Some(layers))
}

fn kind_of(field: &str, position: usize, word: &str) -> Result<LayerKind, ConfigError> {
    match word {
        "M" | "mamba" | "linear_attention" => Ok(LayerKind::Mamba),
        "*" | "attention" | "full_attention" => Ok(LayerKind::Attention),
        "E" | "moe" => Ok(LayerKind::Moe),
        "-" | "mlp" => Ok(LayerKind::Mlp),
        other => Err(ConfigError::UnknownLayer { field: field.into(), position, got: format!("{other:?}") }),
    }
}

/// One layer's sizes; `dense` is its place among the dense MLP layers.
fn layer(kind: LayerKind, fields: Fields, dense: usize) -> Result<Layer, ConfigError> {
    Ok(match kind {
        LayerKind::Mamba => Layer::Mamba(mamba(fields)?),
        LayerKind::Attention => Layer::Attention(attention(fields)?),
        LayerKind::Moe => Layer::Moe(moe(fields)?),
        LayerKind::Mlp => Layer::Mlp(Mlp { intermediate: intermediate(fields, dense)? }),
    })
}

fn mamba(fields: Fields) -> Result<Mamba, ConfigError> {
    let mamba = Mamba {
        heads: fields.size(&["mamba_num_heads"])?,
        head_dim: fields.size(&["mamba_head_dim"])?,
        state_size: fields.size(&["ssm_state_size", "mamba_d_state"])?,
        groups: fields.size(&["n_groups", "mamba_n_groups"])?,
        conv_kernel: fields.size_or(&["conv_kernel", "mamba_d_conv"], 4)?,
        conv_bias: match fields.get(&["use_conv_bias"]) {
            Some(_) => fields.bool_or("use_conv_bias", true)?,
            None => fields.bool_or("mamba_conv_bias", true)?,
        },
        dt_limit: dt_limit(fields)?,
    };
    divides("mamba_num_heads", mamba.heads, mamba.groups, "n_groups")?;
    limit("mamba_num_heads * mamba_head_dim", mamba.heads.saturating_mul(mamba.head_dim))?;
    limit("n_groups * ssm_state_size", mamba.groups.saturating_mul(mamba.state_size))?;
    // One tap would leave no tail to keep; more than 8 no kernel is written for. Every release has 4.
    if !(2..=8).contains(&mamba.conv_kernel) {
        return Err(invalid("conv_kernel", "2 to 8", mamba.conv_kernel));
    }
    Ok(mamba)
}

fn dt_limit(fields: Fields) -> Result<(f32, f32), ConfigError> {
    let Some((name, value)) = fields.get(&["time_step_limit", "mamba_dt_limit"]) else {
        return Ok((0.0, f32::INFINITY));
    };
    let bound = |i: usize| json::number(value.get(i)?).map(|n| n as f32);
    match (bound(0), bound(1), value.as_array().map_or(0, Vec::len)) {
        (Some(low), Some(high), 2) if low <= high => Ok((low, high)),
        _ => Err(invalid(&name, "two numbers, the lower first", value)),
    }
}

fn attention(fields: Fields) -> Result<Attention, ConfigError> {
    let attention = Attention {
        heads: fields.size(&["num_attention_heads"])?,
        kv_heads: fields.size(&["num_key_value_heads"])?,
        // Not hidden_size / heads: Nano has 2688 / 32 = 84 there and heads of 128.
        head_dim: fields.size(&["head_dim", "attention_head_dim"])?,
    };
    divides("num_attention_heads", attention.heads, attention.kv_heads, "num_key_value_heads")?;
    limit("num_attention_heads * head_dim", attention.heads.saturating_mul(attention.head_dim))?;
    Ok(attention)
}

fn moe(fields: Fields) -> Result<Moe, ConfigError> {
    let experts = fields.size(&["n_routed_experts", "num_local_experts"])?;
    let shared = match fields.optional_size(&["moe_shared_expert_intermediate_size"])? {
        Some(width) => width.saturating_mul(fields.optional_size(&["n_shared_experts"])?.unwrap_or(1)),
        None => 0,
    };
    limit("moe_shared_expert_intermediate_size * n_shared_experts", shared)?;
    let moe = Moe {
        experts,
        experts_per_token: fields.size(&["num_experts_per_tok"])?,
        intermediate: fields.size(&["moe_intermediate_size"])?,
        latent: fields.optional_size(&["moe_latent_size"])?.filter(|&n| n > 0),
        shared_intermediate: shared,
        scaling: fields.positive_or(&["routed_scaling_factor"], 1.0)? as f32,
        groups: fields.size_or(&["n_group"], 1)?,
        groups_per_token: fields.size_or(&["topk_group"], 1)?,
        normalize: fields.bool_or("norm_topk_prob", true)?,
    };
    divides("n_routed_experts", moe.experts, moe.groups, "n_group")?;
    if moe.groups_per_token > moe.groups {
        return Err(invalid("topk_group", format!("at most n_group, {}", moe.groups), moe.groups_per_token));
    }
    let reachable = moe.experts / moe.groups * moe.groups_per_token;
    if moe.experts_per_token > reachable {
        let expected = format!("at most the {reachable} experts that can be chosen from");
        return Err(invalid("num_experts_per_tok", expected, moe.experts_per_token));
    }
    Ok(moe)
}

/// `intermediate_size`: one size, or a list with one entry, or a list with one per dense layer.
fn intermediate(fields: Fields, dense: usize) -> Result<usize, ConfigError> {
    let Some((name, Value::Array(list))) = fields.get(&["intermediate_size"]) else {
        return fields.size(&["intermediate_size"]);
    };
    let entry = if list.len() == 1 { list.first() } else { list.get(dense) };
    let Some(entry) = entry else {
        return Err(invalid(&name, "an entry for each dense layer", list.len()));
    };
    match bounded(&format!("{name}[{dense}]"), entry, SIZE_LIMIT)? {
        0 => Err(invalid(&name, "at least 1", 0)),
        size => Ok(size),
    }
}

/// Token ids written as one number, a list, or not at all.
pub(super) fn token_ids(fields: &Fields, name: &str) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| bounded(name, value, LONG_LIMIT).map(|n| n as u32);
    match fields.get(&[name]) {
        None => Ok(Vec::new()),
        Some((_, Value::Array(list))) => list.iter().map(id).collect(),
        Some((_, value)) => Ok(vec![id(value)?]),
    }
}

fn divides(what: &'static str, got: usize, divisor: usize, why: &'static str) -> Result<(), ConfigError> {
    if got.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(ConfigError::NotDivisible { what, got, divisor, why })
    }
}

fn limit(what: &str, size: usize) -> Result<(), ConfigError> {
    if size <= SIZE_LIMIT { Ok(()) } else { Err(invalid(what, format!("at most {SIZE_LIMIT}"), size)) }
}
