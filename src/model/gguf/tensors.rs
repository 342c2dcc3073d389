//! The names of GGUF's tensors as those of safetensors checkpoints, and what its converter changed, changed back.
//!
//! | here | there | what was done |
//! |---|---|---|
//! | `q_proj`, `k_proj` | `attn_q`, `attn_k` | rows interleaved in each head, see [`RowOrder`] |
//! | `A_log` | `ssm_a` | stored as -exp(A_log) |
//! | `A_log`, `D`, `norm.weight` of a mixer | `ssm_a`, `ssm_d`, `ssm_norm` | reshaped to two dimensions |
//! | `experts.E.up_proj`, `down_proj` | `ffn_up_exps`, `ffn_down_exps` | stacked |

use bytes::Bytes;

use super::Named;
use super::config::Outline;
use crate::weights::codec::{bf16_to_f32, f32_to_bf16};
use crate::weights::gguf::Stored;
use crate::weights::{self, Blocks, Dtype, Encoding, Part, RowOrder};

/// The mixer's modules: GGUF's stem, ours.
const MODULES: [(&str, &str); 19] = [
    ("ssm_in", "in_proj"),
    ("ssm_out", "out_proj"),
    ("ssm_conv1d", "conv1d"),
    ("ssm_norm", "norm"),
    ("attn_q", "q_proj"),
    ("attn_k", "k_proj"),
    ("attn_v", "v_proj"),
    ("attn_output", "o_proj"),
    ("ffn_up", "up_proj"),
    ("ffn_down", "down_proj"),
    ("ffn_gate_inp", "gate"),
    ("ffn_up_exps", "experts.up_proj"),
    ("ffn_down_exps", "experts.down_proj"),
    ("ffn_up_shexp", "shared_experts.up_proj"),
    ("ffn_down_shexp", "shared_experts.down_proj"),
    ("ffn_latent_down", "fc1_latent_proj"),
    ("ffn_latent_up", "fc2_latent_proj"),
    // The names of another converter.
    ("ffn_latent_in", "fc1_latent_proj"),
    ("ffn_latent_out", "fc2_latent_proj"),
];

/// Tensors of a mixer that are no module's: GGUF's name, ours.
const VECTORS: [(&str, &str); 5] = [
    ("ssm_a", "A_log"),
    ("ssm_d", "D"),
    ("ssm_dt.bias", "dt_bias"),
    ("exp_probs_b.bias", "gate.e_score_correction_bias"),
    ("exp_probs_b", "gate.e_score_correction_bias"),
];

/// The tensors of one file, `all` being those of every file.
///
/// A tensor that is not the network's keeps its name: whoever loads says that nobody asked for it.
pub fn parts(
    file: &str,
    tensors: &[Stored],
    all: &Named,
    outline: &Outline,
) -> Result<Vec<Part>, weights::Error> {
    tensors.iter().map(|tensor| part(file, tensor, all, outline)).collect()
}

fn part(file: &str, tensor: &Stored, all: &Named, outline: &Outline) -> Result<Part, weights::Error> {
    let name = name_of(&tensor.name, outline.body).unwrap_or_else(|| tensor.name.clone());
    let mut part = Part {
        encoding: tensor.encoding,
        shape: tensor.shape.clone(),
        order: RowOrder::AsIs,
        bytes: tensor.bytes.clone(),
        name,
    };
    let ends = |suffix: &str| part.name.ends_with(suffix);
    if ends(".A_log") || ends(".D") || ends(".mixer.norm.weight") {
        part.shape = vec![part.shape.iter().product()];
    }
    if (ends(".q_proj.weight") || ends(".k_proj.weight")) && is_interleaved(tensor, all) {
        part.order = RowOrder::Interleaved { head: outline.head_dim };
    }
    if part.name.ends_with(".A_log") {
        part.bytes = logarithms(file, tensor)?;
    }
    Ok(part)
}

/// Whether the converter had the rows of this q or k in its hands as numbers. It repacks the NVFP4 codes of a release
/// as they are, and only then is there a scale beside them.
fn is_interleaved(tensor: &Stored, all: &Named) -> bool {
    let scale = tensor.name.replace(".weight", ".scale");
    tensor.encoding != Encoding::Blocks(Blocks::Nvfp4) || !all.contains_key(scale.as_str())
}

/// Our name of a tensor; `None` for one that we do not know.
fn name_of(name: &str, body: usize) -> Option<String> {
    if let Some(rest) = name.strip_prefix("blk.") {
        let (layer, rest) = rest.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        return if layer < body { in_body(layer, rest) } else { in_mtp(rest) };
    }
    let (stem, suffix) = name.rsplit_once('.')?;
    match stem {
        "token_embd" => Some(format!("backbone.embeddings.{suffix}")),
        "output" => Some(format!("lm_head.{suffix}")),
        "output_norm" => Some(format!("backbone.norm_f.{suffix}")),
        _ => None,
    }
}

fn in_body(layer: usize, rest: &str) -> Option<String> {
    match rest {
        "attn_norm.weight" => Some(format!("backbone.layers.{layer}.norm.weight")),
        _ => Some(format!("backbone.layers.{layer}.mixer.{}", in_mixer(rest)?)),
    }
}

/// The MTP block is one block there and two layers here: attention, then MoE.
fn in_mtp(rest: &str) -> Option<String> {
    if let Some(rest) = rest.strip_prefix("nextn.") {
        return match rest.split_once('.')? {
            ("shared_head_norm", suffix) => Some(format!("mtp.layers.1.final_layernorm.{suffix}")),
            ("enorm" | "hnorm" | "eh_proj", _) => Some(format!("mtp.layers.0.{rest}")),
            _ => None,
        };
    }
    match rest {
        "attn_norm.weight" => Some("mtp.layers.0.norm.weight".into()),
        "post_attention_norm.weight" => Some("mtp.layers.1.norm.weight".into()),
        _ => {
            let layer = usize::from(!rest.starts_with("attn_"));
            Some(format!("mtp.layers.{layer}.mixer.{}", in_mixer(rest)?))
        }
    }
}

fn in_mixer(rest: &str) -> Option<String> {
    if let Some((_, name)) = VECTORS.iter().find(|(there, _)| *there == rest) {
        return Some((*name).into());
    }
    let (stem, suffix) = rest.split_once('.')?;
    let (_, module) = MODULES.iter().find(|(there, _)| *there == stem)?;
    // A stack of experts has no `.weight`, here as in transformers.
    match (module.starts_with("experts."), suffix) {
        (true, "weight") => Some((*module).into()),
        _ => Some(format!("{module}.{suffix}")),
    }
}

/// A_log from -exp(A_log).
fn logarithms(file: &str, tensor: &Stored) -> Result<Bytes, weights::Error> {
    if tensor.encoding != Encoding::Plain(Dtype::F32) {
        let reason = format!("is stored as {}; expected F32", tensor.encoding.name());
        return Err(weights::Error::Entry { file: file.into(), tensor: tensor.name.clone(), reason });
    }
    let (words, _) = tensor.bytes.as_chunks();
    let mut bytes = Vec::with_capacity(tensor.bytes.len());
    for &word in words {
        let got = f32::from_le_bytes(word);
        if !(got < 0.0 && got.is_finite()) {
            let expected = "a finite number below 0, -exp(A_log)";
            return Err(weights::Error::Value { tensor: tensor.name.clone(), expected, got });
        }
        bytes.extend_from_slice(&logarithm(-got).to_le_bytes());
    }
    Ok(bytes.into())
}

/// The number whose exponential is `exponential`. Releases store it as BF16, so where one of those gives the same
/// exponential, up to its last rounding, it is the number that was there.
fn logarithm(exponential: f32) -> f32 {
    let exact = f64::from(exponential).ln();
    let short = bf16_to_f32(f32_to_bf16(exact as f32));
    let difference = (f64::from(short).exp() - f64::from(exponential)).abs();
    match difference <= f64::from(exponential * 2.0 * f32::EPSILON) {
        true => short,
        false => exact as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_bf16_numbers_come_back_exactly() {
        for bits in (0x3c00..0x4200).chain(0xbc00..0xc100) {
            let a_log = bf16_to_f32(bits);
            assert_eq!(logarithm(a_log.exp()), a_log);
        }
        let between = 1.000_1f32;
        assert!((logarithm(between.exp()) - between).abs() < 1e-6);
    }

    #[test]
    fn names() {
        for (there, here) in [
            ("token_embd.weight", Some("backbone.embeddings.weight")),
            ("output.scale", Some("lm_head.scale")),
            ("blk.3.attn_norm.weight", Some("backbone.layers.3.norm.weight")),
            ("blk.3.ssm_dt.bias", Some("backbone.layers.3.mixer.dt_bias")),
            ("blk.3.ssm_a", Some("backbone.layers.3.mixer.A_log")),
            ("blk.3.ffn_up_exps.weight", Some("backbone.layers.3.mixer.experts.up_proj")),
            ("blk.3.ffn_up_exps.scale", Some("backbone.layers.3.mixer.experts.up_proj.scale")),
            ("blk.4.attn_output.weight", Some("mtp.layers.0.mixer.o_proj.weight")),
            ("blk.4.ffn_gate_inp.weight", Some("mtp.layers.1.mixer.gate.weight")),
            ("blk.4.post_attention_norm.weight", Some("mtp.layers.1.norm.weight")),
            ("blk.4.nextn.eh_proj.weight", Some("mtp.layers.0.eh_proj.weight")),
            ("blk.4.nextn.shared_head_norm.weight", Some("mtp.layers.1.final_layernorm.weight")),
            ("blk.x.ssm_a", None),
            ("rope_freqs.weight", None),
        ] {
            assert_eq!(name_of(there, 4).as_deref(), here, "{there}");
        }
    }
}
