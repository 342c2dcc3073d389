//! Every dialect of config.json, and every mistake in one.

use serde_json::{Value, json};

use super::*;

/// A small network with every kind of layer, as the releases write it.
fn base() -> Value {
    json!({
        "model_type": "nemotron_h", "vocab_size": 64, "hidden_size": 32, "layer_norm_epsilon": 1e-5,
        "hybrid_override_pattern": "ME*-", "num_hidden_layers": 4, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
        "eos_token_id": 2, "max_position_embeddings": 1024, "sliding_window": null,
    })
}

/// The base with these fields set, or removed where they are null.
fn with(changes: Value) -> Value {
    let mut value = base();
    let map = value.as_object_mut().unwrap();
    for (key, change) in changes.as_object().unwrap() {
        match change {
            Value::Null => map.remove(key),
            change => map.insert(key.clone(), change.clone()),
        };
    }
    value
}

fn parse(value: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(value.to_string().as_bytes())
}

/// Changes that mean the same as the base.
#[track_caller]
fn same(changes: Value) {
    assert_eq!(parse(&with(changes)).unwrap(), parse(&base()).unwrap());
}

#[track_caller]
fn fails(changes: Value, message: &str) {
    let error = parse(&with(changes)).expect_err("it must not be accepted").to_string();
    assert!(error.contains(message), "{error}");
}

#[test]
fn the_fields_mean_what_they_say() {
    let config = parse(&base()).unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.norm_eps), (64, 32, 1e-5));
    assert_eq!((config.max_position_embeddings, &config.eos_token_ids[..]), (1024, &[2][..]));
    let [Layer::Mamba(m), Layer::Moe(e), Layer::Attention(a), Layer::Mlp(d)] = config.layers[..] else {
        panic!("{:?}", config.layers)
    };
    assert_eq!((m.inner(), m.conv_channels(), m.projection()), (32, 96, 132));
    assert_eq!(m.dt_limit, (0.0, f32::INFINITY));
    assert!(m.conv_bias);
    assert_eq!((e.experts, e.experts_per_token, e.intermediate, e.latent), (8, 2, 32, Some(16)));
    assert_eq!((e.shared_intermediate, e.scaling, e.groups, e.normalize), (48, 2.5, 1, true));
    assert_eq!((a.heads, a.kv_heads, a.head_dim), (4, 2, 16));
    assert_eq!(d.intermediate, 48);
    assert_eq!(config.mtp, None);
}

#[test]
fn layers_may_be_a_list_in_either_vocabulary() {
    let absent = Value::Null;
    same(json!({"hybrid_override_pattern": ["M", "E", "*", "-"]}));
    same(
        json!({"hybrid_override_pattern": absent, "layers_block_type": ["mamba", "moe", "attention", "mlp"]}),
    );
    same(json!({
        "hybrid_override_pattern": absent, "num_hidden_layers": absent,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    }));
}

#[test]
fn aliases_are_understood() {
    let absent = Value::Null;
    same(json!({"n_groups": absent, "mamba_n_groups": 2, "conv_kernel": absent, "mamba_d_conv": 4}));
    same(json!({"n_routed_experts": absent, "num_local_experts": 8}));
    same(json!({"head_dim": absent, "attention_head_dim": 16}));
    same(json!({"intermediate_size": [48], "eos_token_id": [2]}));
    same(json!({"model_type": absent, "architectures": ["NemotronHForCausalLM"]}));
    same(json!({"layer_norm_epsilon": absent, "norm_eps": 1e-5, "hidden_size": 32.0}));
}

#[test]
fn wrappers_are_opened() {
    for key in ["llm_config", "text_config"] {
        let wrapper = json!({"model_type": "a_multimodal_one", "vision_config": {}, key: base()});
        assert_eq!(parse(&wrapper).unwrap(), parse(&base()).unwrap());
    }
}

#[test]
fn python_writes_infinity_in_two_ways() {
    for limit in ["[0.0, Infinity]", r#"[0.0, {"__float__": "Infinity"}]"#] {
        let text = base().to_string().replacen('{', &format!("{{\"time_step_limit\": {limit}, "), 1);
        assert_eq!(ModelConfig::from_json(text.as_bytes()).unwrap(), parse(&base()).unwrap());
    }
    let Layer::Mamba(m) = parse(&with(json!({"time_step_limit": [0.001, 0.5]}))).unwrap().layers[0] else {
        panic!("layer 0 is Mamba")
    };
    assert_eq!(m.dt_limit, (0.001, 0.5));
    fails(json!({"time_step_limit": [1.0]}), "time_step_limit: expected two numbers");
    fails(json!({"time_step_limit": [1.0, 0.5]}), "the lower first");
}

#[test]
fn dense_layers_may_differ() {
    let config = with(
        json!({"hybrid_override_pattern": "-M-", "num_hidden_layers": 3, "intermediate_size": [16, 64]}),
    );
    let layers = parse(&config).unwrap().layers;
    assert_eq!([layers[0], layers[2]], [16, 64].map(|intermediate| Layer::Mlp(Mlp { intermediate })));
    fails(
        json!({"hybrid_override_pattern": "---", "num_hidden_layers": 3, "intermediate_size": [16, 64]}),
        "an entry for each dense layer",
    );
}

#[test]
fn the_drafter_is_read_in_every_spelling() {
    let sizes = |changes| parse(&with(changes)).unwrap().mtp.map(|layers| layers.len());
    assert_eq!(sizes(json!({"num_nextn_predict_layers": 1})), Some(2));
    assert_eq!(sizes(json!({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"})), Some(2));
    assert_eq!(
        sizes(json!({"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]})),
        Some(2)
    );
    assert_eq!(sizes(json!({"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": "*E"})), None);
    assert_eq!(sizes(json!({"mtp_layers_block_type": ["attention", "moe"]})), None);
    let blocks = json!([{"block_type": "attention"}, {"block_type": "moe", "moe_intermediate_size": 64}]);
    let mtp = parse(&with(json!({"mtp_block_configs": blocks}))).unwrap().mtp.unwrap();
    assert!(matches!(mtp[1], Layer::Moe(moe) if moe.intermediate == 64));
    fails(json!({"num_nextn_predict_layers": 2}), "num_nextn_predict_layers = 2 is not supported");
}

#[test]
fn puzzle_layers_have_sizes_of_their_own() {
    let blocks = json!([
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 16, "num_experts_per_tok": 1},
        {"block_type": "attention", "moe_intermediate_size": null},
        {"block_type": "moe", "moe_intermediate_size": 64, "num_experts_per_tok": null},
    ]);
    let absent = Value::Null;
    let puzzle = json!({"model_type": "nemotron_h_puzzle", "hybrid_override_pattern": absent, "block_configs": blocks});
    let layers = parse(&with(puzzle)).unwrap().layers;
    let sizes: Vec<_> = layers
        .iter()
        .filter_map(|l| match l {
            Layer::Moe(moe) => Some((moe.intermediate, moe.experts_per_token)),
            _ => None,
        })
        .collect();
    assert_eq!(sizes, [(16, 1), (64, 2)]);
    let bad = json!([{"block_type": "mamba"}, {"block_type": "moe", "num_experts_per_tok": "many"},
                     {"block_type": "attention"}, {"block_type": "mlp"}]);
    fails(json!({"block_configs": bad}), "block_configs[1].num_experts_per_tok: expected an integer");
    fails(json!({"block_configs": [{}]}), "block_configs: expected 4 entries");
}

#[test]
fn unknown_layers_are_named_with_their_place() {
    fails(json!({"hybrid_override_pattern": "ME*X"}), r#"unknown layer kind "X" at position 3"#);
    let absent = Value::Null;
    fails(
        json!({"hybrid_override_pattern": absent, "layers_block_type": ["mamba", "rwkv", "moe", "mlp"]}),
        r#"layers_block_type: unknown layer kind "rwkv" at position 1"#,
    );
    fails(
        json!({"hybrid_override_pattern": "ME*"}),
        "num_hidden_layers: expected 3 (the layers listed); got 4",
    );
    fails(json!({"hybrid_override_pattern": absent}), "hybrid_override_pattern: missing");
    fails(json!({"hybrid_override_pattern": "", "num_hidden_layers": absent}), "at least one layer");
    fails(json!({"hybrid_override_pattern": 7}), "a string or a list");
    fails(json!({"hybrid_override_pattern": "M".repeat(5000)}), "at most 4096 layers");
}

#[test]
fn what_no_release_has_is_refused() {
    fails(
        json!({"attention_bias": true}),
        "attention_bias = true is not supported; every released checkpoint has false",
    );
    fails(json!({"use_bias": true}), "use_bias");
    fails(json!({"mlp_bias": true}), "mlp_bias");
    fails(json!({"mlp_hidden_act": "silu"}), "mlp_hidden_act");
    fails(json!({"sliding_window": 4096}), "sliding_window = 4096");
    fails(
        json!({"model_type": "llama"}),
        r#"model_type: expected nemotron_h or nemotron_h_puzzle; got "llama""#,
    );
    fails(json!({"model_type": null}), "no model_type");
    // Nothing reads this one.
    same(json!({"mamba_proj_bias": true}));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    fails(json!({"num_attention_heads": 5}), "num_attention_heads: 5 is not divisible by 2");
    fails(json!({"n_groups": 3}), "mamba_num_heads: 4 is not divisible by 3");
    fails(json!({"num_experts_per_tok": 9}), "num_experts_per_tok: expected at most the 8 experts");
    fails(json!({"n_group": 3}), "n_routed_experts: 8 is not divisible by 3");
    fails(json!({"n_group": 4, "topk_group": 5}), "topk_group: expected at most n_group, 4");
    fails(json!({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}), "at most the 2 experts");
    fails(json!({"hidden_size": 0}), "hidden_size: expected at least 1");
    fails(json!({"hidden_size": -1}), "hidden_size: expected an integer");
    fails(json!({"hidden_size": 1e30}), "hidden_size: expected an integer");
    fails(
        json!({"mamba_num_heads": 2_000_000, "mamba_head_dim": 2_000_000}),
        "mamba_num_heads * mamba_head_dim",
    );
    fails(json!({"head_dim": null}), "head_dim: missing");
    fails(json!({"vocab_size": "many"}), "vocab_size: expected an integer from 0 to 16777216; got \"many\"");
    fails(json!({"layer_norm_epsilon": 0.0}), "layer_norm_epsilon: expected a finite number above 0");
    fails(json!({"norm_topk_prob": 1}), "norm_topk_prob: expected true or false; got 1");
}

#[test]
fn what_is_not_json_is_said_so() {
    for text in ["", "{", "[1, 2]", "\"nemotron_h\"", "{\"model_type\": NaN"] {
        assert!(ModelConfig::from_json(text.as_bytes()).is_err(), "{text}");
    }
    let deep = "[".repeat(100_000);
    assert!(ModelConfig::from_json(deep.as_bytes()).is_err());
}

#[test]
fn the_published_dense_models_are_read() {
    // Nemotron-H 8B, as its old file spells it.
    let config = parse(&json!({
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096, "attention_head_dim": 128,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "num_hidden_layers": 52,
        "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": true,
        "mlp_hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    }))
    .unwrap();
    let count = |kind: fn(&Layer) -> bool| config.layers.iter().filter(|l| kind(l)).count();
    assert_eq!(count(|l| matches!(l, Layer::Mamba(m) if m.projection() == 18560)), 24);
    assert_eq!(count(|l| matches!(l, Layer::Mlp(_))), 24);
    assert_eq!(count(|l| matches!(l, Layer::Attention(_))), 4);
}
