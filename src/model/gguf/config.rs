//! Metadata and tensors of a GGUF file as a `config.json`, so that sizes are read and checked in one place.

use serde_json::{Map, Value, json};

use super::{Error, Named};
use crate::model::config::LAYER_LIMIT;
use crate::weights::{self, gguf::Metadata};

/// What the names of tensors are translated by.
pub struct Outline {
    /// As a release's `config.json` would say it.
    pub config: Value,
    /// Layers of the body; the MTP block has the number after the last one.
    pub body: usize,
    /// Rows of one attention head, 0 in a model without attention.
    pub head_dim: usize,
}

/// Metadata below the architecture's prefix.
struct Own<'a> {
    metadata: &'a Metadata,
    prefix: &'a str,
    layers: usize,
}

impl Own<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn optional(&self, name: &str) -> Result<Option<u64>, weights::Error> {
        self.metadata.optional_size(&self.key(name))
    }

    fn size(&self, name: &str) -> Result<u64, weights::Error> {
        self.metadata.size(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, weights::Error> {
        self.metadata.optional_number(&self.key(name))
    }

    /// One number per layer, the MTP block's included.
    fn sizes(&self, name: &str) -> Result<Vec<u64>, weights::Error> {
        self.metadata.sizes(&self.key(name), self.layers)
    }
}

impl Outline {
    /// Sizes come from metadata; what a layer is, from the tensors it has.
    pub fn read(metadata: &Metadata, architecture: &str, tensors: &Named) -> Result<Self, Error> {
        let mut own = Own { metadata, prefix: architecture, layers: 0 };
        let (layers, mtp) = (own.size("block_count")?, own.optional("nextn_predict_layers")?.unwrap_or(0));
        if layers > LAYER_LIMIT as u64 {
            let expected = format!("at most {LAYER_LIMIT}");
            return Err(metadata.wrong(&own.key("block_count"), expected, layers).into());
        }
        if mtp > 1 || mtp > layers {
            return Err(metadata.wrong(&own.key("nextn_predict_layers"), "0 or 1", mtp).into());
        }
        own.layers = layers as usize;
        let body = (layers - mtp) as usize;
        let per_layer = PerLayer::read(&own)?;
        let shape = |name: &str| tensors.get(name).map(|t| &t.shape);
        let has = |layer: usize, name: &str| shape(&format!("blk.{layer}.{name}")).is_some();
        let mut blocks = Vec::with_capacity(body);
        for layer in 0..body {
            blocks.push(match layer {
                _ if has(layer, "ssm_in.weight") => {
                    json!({"block_type": "mamba", "use_conv_bias": has(layer, "ssm_conv1d.bias")})
                }
                _ if has(layer, "attn_q.weight") => per_layer.attention(layer),
                _ if has(layer, "ffn_gate_inp.weight") => per_layer.moe(layer),
                _ if has(layer, "ffn_up.weight") => {
                    json!({"block_type": "mlp", "intermediate_size": per_layer.inner[layer]})
                }
                _ => return Err(Error::Layer { file: metadata.file().into(), layer }),
            });
        }
        let mut config = common(&own)?;
        config.insert("block_configs".into(), blocks.into());
        config.insert("num_nextn_predict_layers".into(), mtp.into());
        if mtp == 1 {
            let blocks = [per_layer.attention(body), per_layer.moe(body)];
            config.insert("mtp_block_configs".into(), blocks.to_vec().into());
        }
        config.insert("tie_word_embeddings".into(), shape("output.weight").is_none().into());
        // The table's own height: the metadata of some files does not count the rows that pad it.
        let vocabulary = match shape("token_embd.weight") {
            Some(shape) => shape[0] as u64,
            None => own.size("vocab_size")?,
        };
        config.insert("vocab_size".into(), vocabulary.into());
        let head_dim = head_dim(&own, &mut config, &per_layer)?;
        Ok(Outline { config: config.into(), body, head_dim })
    }
}

/// Sizes that files give layer by layer.
struct PerLayer {
    heads: Vec<u64>,
    kv_heads: Vec<u64>,
    inner: Vec<u64>,
    expert_inner: Vec<u64>,
    chosen: Vec<u64>,
    shared: Vec<u64>,
}

impl PerLayer {
    fn read(own: &Own) -> Result<Self, weights::Error> {
        Ok(PerLayer {
            heads: own.sizes("attention.head_count")?,
            kv_heads: own.sizes("attention.head_count_kv")?,
            inner: own.sizes("feed_forward_length")?,
            expert_inner: own.sizes("expert_feed_forward_length")?,
            chosen: own.sizes("expert_used_count")?,
            shared: own.sizes("expert_shared_feed_forward_length")?,
        })
    }

    fn attention(&self, layer: usize) -> Value {
        json!({
            "block_type": "attention",
            "num_attention_heads": self.heads[layer],
            "num_key_value_heads": self.kv_heads[layer],
        })
    }

    fn moe(&self, layer: usize) -> Value {
        // Files from before the experts had a key of their own say it as any other layer's inner size.
        let inner = match self.expert_inner[layer] {
            0 => self.inner[layer],
            inner => inner,
        };
        json!({
            "block_type": "moe",
            "moe_intermediate_size": inner,
            "num_experts_per_tok": self.chosen[layer],
            "moe_shared_expert_intermediate_size": self.shared[layer],
        })
    }
}

/// What all layers share. `rope.*` is inert: the family has no positions.
fn common(own: &Own) -> Result<Map<String, Value>, weights::Error> {
    let mut config = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(name.into(), value);
        }
    };
    put("model_type", Some("nemotron_h".into()));
    put("hidden_size", Some(own.size("embedding_length")?.into()));
    put("max_position_embeddings", own.optional("context_length")?.map(Value::from));
    let epsilon = match own.number("attention.layer_norm_rms_epsilon")? {
        Some(epsilon) => Some(epsilon),
        None => own.number("attention.layer_norm_epsilon")?,
    };
    put("layer_norm_epsilon", epsilon.map(Value::from));
    for (name, key) in [
        ("conv_kernel", "ssm.conv_kernel"),
        ("ssm_state_size", "ssm.state_size"),
        ("n_groups", "ssm.group_count"),
        ("n_routed_experts", "expert_count"),
        ("n_shared_experts", "expert_shared_count"),
        ("moe_latent_size", "moe_latent_size"),
    ] {
        put(name, own.optional(key)?.map(Value::from));
    }
    for (name, key) in [("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count")] {
        // Some converters write 0 for "no groups".
        put(name, own.optional(key)?.filter(|&count| count > 0).map(Value::from));
    }
    if let Some(heads) = own.optional("ssm.time_step_rank")? {
        let inner = own.size("ssm.inner_size")?;
        if heads == 0 || !inner.is_multiple_of(heads) {
            let expected = format!("a multiple of ssm.time_step_rank, {heads}");
            return Err(own.metadata.wrong(&own.key("ssm.inner_size"), expected, inner));
        }
        put("mamba_num_heads", Some(heads.into()));
        put("mamba_head_dim", Some((inner / heads).into()));
    }
    put("routed_scaling_factor", own.number("expert_weights_scale")?.map(Value::from));
    put("norm_topk_prob", own.metadata.optional_bool(&own.key("expert_weights_norm"))?.map(Value::from));
    match own.optional("expert_gating_func")? {
        // 2 is the sigmoid, and what llama.cpp takes for this family where nothing is said.
        None | Some(0 | 2) => Ok(config),
        Some(other) => Err(own.metadata.wrong(&own.key("expert_gating_func"), "2 (sigmoid)", other)),
    }
}

/// The size of a head, put into `config` too.
fn head_dim(
    own: &Own,
    config: &mut Map<String, Value>,
    per_layer: &PerLayer,
) -> Result<usize, weights::Error> {
    let heads = per_layer.heads.iter().copied().max().unwrap_or(0);
    let size = match own.optional("attention.key_length")? {
        Some(size) => size,
        None => own.size("embedding_length")? / heads.max(1),
    };
    let value = own.optional("attention.value_length")?.unwrap_or(size);
    if value != size {
        let expected = format!("attention.key_length, {size}");
        return Err(own.metadata.wrong(&own.key("attention.value_length"), expected, value));
    }
    if !size.is_multiple_of(2) {
        return Err(own.metadata.wrong(&own.key("attention.key_length"), "an even number", size));
    }
    config.insert("head_dim".into(), size.into());
    // A size beyond the address space fits no tensor either.
    Ok(usize::try_from(size).unwrap_or(0))
}
