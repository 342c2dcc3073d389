//! What a checkpoint's `config.json` means: one [`ModelConfig`], whatever dialect the file is written in.
//!
//! ```
//! use ferrotron::model::config::{Layer, ModelConfig};
//! let config = ModelConfig::from_json(include_bytes!("../../models/nano-bf16/config.json"))?;
//! assert_eq!(config.layers.len(), 52);
//! assert!(matches!(config.layers[5], Layer::Attention(a) if a.heads == 32 && a.kv_heads == 2));
//! # Ok::<(), ferrotron::model::config::ConfigError>(())
//! ```

mod error;
mod generation;
mod parse;
mod read;
#[cfg(test)]
mod tests;

pub use error::ConfigError;
pub use generation::GenerationConfig;
pub(in crate::model) use parse::language_model;
pub use read::LAYER_LIMIT;

/// A Nemotron-H network. Layer kinds carry their own sizes, because Puzzle checkpoints vary them by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    pub layers: Vec<Layer>,
    /// The layers of the one MTP block (attention, then MoE in every release), if the checkpoint has one.
    pub mtp: Option<Vec<Layer>>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// `eos_token_id` of config.json; the stop set comes from `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
}

/// One layer: exactly one mixer and one norm in front of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layer {
    Mamba(Mamba),
    Attention(Attention),
    Moe(Moe),
    Mlp(Mlp),
}

/// Mamba-2 mixer sizes. `d = heads * head_dim`; `c = d + 2 * groups * state_size`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mamba {
    /// H
    pub heads: usize,
    /// P
    pub head_dim: usize,
    /// N
    pub state_size: usize,
    /// G: groups of B and C, and of the gated norm.
    pub groups: usize,
    /// K
    pub conv_kernel: usize,
    pub conv_bias: bool,
    /// `time_step_limit`: dt is clamped to it after softplus; (0, +inf) in every release, which clamps nothing.
    pub dt_limit: (f32, f32),
}

impl Mamba {
    /// d: width of x and z.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// c: channels of the convolution (x, B, C).
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state_size
    }

    /// Rows of in_proj: z, x, B, C, dt.
    pub fn projection(&self) -> usize {
        self.inner() + self.conv_channels() + self.heads
    }
}

/// Grouped-query attention without any position encoding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Mixture of experts with sigmoid router; `latent` is Super's narrower space of the routed experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moe {
    /// E
    pub experts: usize,
    /// K chosen
    pub experts_per_token: usize,
    pub intermediate: usize,
    pub latent: Option<usize>,
    /// Width of the shared expert (times `n_shared_experts`); 0 where there is none.
    pub shared_intermediate: usize,
    pub scaling: f32,
    /// `n_group` and `topk_group` of group-limited routing; 1 and 1 in every release.
    pub groups: usize,
    pub groups_per_token: usize,
    /// `norm_topk_prob`
    pub normalize: bool,
}

/// Dense relu² MLP.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mlp {
    pub intermediate: usize,
}
