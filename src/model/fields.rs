//! The tensors of a network as fields. `L` is how a linear weight is held: [`crate::weights::Linear`] as
//! loaded, or a backend's own packed form.

/// Everything a network needs. Vectors are small and always f32 here.
pub struct Fields<L> {
    /// [V, h]
    pub embeddings: L,
    /// [V, h]; the embeddings again where the checkpoint ties them.
    pub lm_head: L,
    /// [h]
    pub norm_f: Vec<f32>,
    pub layers: Vec<LayerFields<L>>,
    pub mtp: Option<MtpFields<L>>,
}

pub struct LayerFields<L> {
    /// [h]
    pub norm: Vec<f32>,
    pub mixer: Mixer<L>,
}

pub enum Mixer<L> {
    Mamba(MambaFields<L>),
    Attention(AttentionFields<L>),
    Moe(MoeFields<L>),
    Mlp(MlpFields<L>),
}

pub struct MambaFields<L> {
    /// [2d + 2GN + H, h], rows z, x, B, C, dt
    pub in_proj: L,
    /// [c, K]
    pub conv_weight: Vec<f32>,
    /// [c]; zeros where the checkpoint has none
    pub conv_bias: Vec<f32>,
    /// [H] each
    pub a_log: Vec<f32>,
    pub d: Vec<f32>,
    pub dt_bias: Vec<f32>,
    /// [d]
    pub norm: Vec<f32>,
    /// [h, d]
    pub out_proj: L,
}

pub struct AttentionFields<L> {
    /// [heads * head_dim, h]
    pub q_proj: L,
    /// [kv_heads * head_dim, h]
    pub k_proj: L,
    pub v_proj: L,
    /// [h, heads * head_dim]
    pub o_proj: L,
    /// FP8 cache scales of the checkpoint; 1.0 where absent.
    pub k_scale: f32,
    pub v_scale: f32,
}

pub struct MoeFields<L> {
    /// Router [E, h]; stored BF16 or F32, its product is FP32 either way.
    pub gate: L,
    /// [E] `e_score_correction_bias`
    pub correction_bias: Vec<f32>,
    /// fc1 [latent, h] and fc2 [h, latent]
    pub latent: Option<(L, L)>,
    /// One per expert: up [i, u], down [u, i] with u = latent or h.
    pub up: Vec<L>,
    pub down: Vec<L>,
    /// up [s, h], down [h, s]
    pub shared: Option<(L, L)>,
}

pub struct MlpFields<L> {
    /// [i, h]
    pub up: L,
    /// [h, i]
    pub down: L,
}

/// The MTP block: embedding first, hidden second; own attention and MoE; RMSNorm at the end.
pub struct MtpFields<L> {
    /// [h]
    pub enorm: Vec<f32>,
    pub hnorm: Vec<f32>,
    /// [h, 2h]
    pub eh_proj: L,
    pub layers: Vec<LayerFields<L>>,
    /// [h]
    pub final_norm: Vec<f32>,
}
