//! The one table of names: which tensor of a checkpoint becomes which field. Loading, describing, random weights
//! and the manifest all walk it; they differ in what they answer for a name.

use super::config::{Attention, Layer, Mamba, ModelConfig, Moe};
use super::fields::*;
use crate::weights::Checkpoint;

/// Where a checkpoint puts the model's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    /// In front of everything: empty, or `language_model.` in multimodal wrappers.
    outer: &'static str,
    /// In front of the body: `backbone.` in releases, `model.` in files with transformers' names.
    body: &'static str,
    /// The embedding table's own name.
    embeddings: &'static str,
}

const OUTER: [&str; 3] = ["", "language_model.", "model.language_model."];
const BODY: [&str; 3] = ["backbone.", "model.", ""];
const EMBEDDINGS: [&str; 3] = ["embeddings", "embedding", "embed_tokens"];

impl Naming {
    /// The official releases' names.
    pub const OFFICIAL: Naming = Naming { outer: "", body: "backbone.", embeddings: "embeddings" };

    /// Finds the embedding table, which every checkpoint has; its name tells the prefixes of all others.
    pub fn detect(checkpoint: &Checkpoint) -> Option<Self> {
        for outer in OUTER {
            for body in BODY {
                for embeddings in EMBEDDINGS {
                    let stored = |end: &str| checkpoint.contains(&format!("{outer}{body}{embeddings}.{end}"));
                    if stored("weight") || stored("weight_packed") {
                        return Some(Naming { outer, body, embeddings });
                    }
                }
            }
        }
        None
    }

    /// A name without the prefixes of any checkpoint: `layers.3.mixer.in_proj`, `mtp.layers.0.norm`, `lm_head`.
    pub fn canonical(name: &str) -> &str {
        let strip = |name, prefixes: &[&str]| {
            prefixes.iter().filter(|p| !p.is_empty()).find_map(|p| str::strip_prefix(name, p)).unwrap_or(name)
        };
        // The longest outer prefix first: `model.` alone would leave `language_model.` behind.
        strip(strip(name, &["model.language_model.", "language_model."]), &BODY)
    }

    /// Whether `name` belongs to the language model at all: a wrapper's other towers do not.
    pub fn owns(&self, name: &str) -> bool {
        name.starts_with(self.outer)
    }

    fn in_body(&self, rest: &str) -> String {
        format!("{}{}{rest}", self.outer, self.body)
    }

    fn outside(&self, rest: &str) -> String {
        format!("{}{rest}", self.outer)
    }

    /// The embedding table, without `.weight`.
    pub fn embeddings(&self) -> String {
        self.in_body(self.embeddings)
    }
}

/// What a vector is for, which decides its stored type and its size at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Norm,
    ConvWeight,
    ConvBias,
    ALog,
    D,
    DtBias,
    /// F32 in every release.
    CorrectionBias,
}

/// Who answers for names. A failure is kept by the answerer, so that one walk finds all of them.
pub trait Tensors {
    type Linear: Clone;

    /// The linear weight `module` (without `.weight`) [rows, cols].
    fn linear(&mut self, module: &str, rows: usize, cols: usize) -> Self::Linear;

    /// The router's weight `module` [rows, cols], which no release quantises.
    fn gate(&mut self, module: &str, rows: usize, cols: usize) -> Self::Linear;

    /// A small tensor by its full name, as f32.
    fn vector(&mut self, name: &str, shape: &[usize], role: Role) -> Vec<f32>;

    /// A scale of the FP8 cache: 1 where the checkpoint has none.
    fn cache_scale(&mut self, name: &str) -> f32;

    /// `module` of each expert: `{mixer}.experts.{e}.{projection}` [rows, cols].
    fn experts(
        &mut self,
        mixer: &str,
        projection: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Vec<Self::Linear> {
        (0..count).map(|e| self.linear(&format!("{mixer}.experts.{e}.{projection}"), rows, cols)).collect()
    }
}

/// Everything outside the layers: (embeddings, lm_head, norm_f).
pub fn ends<T: Tensors>(
    config: &ModelConfig,
    naming: &Naming,
    from: &mut T,
) -> (T::Linear, T::Linear, Vec<f32>) {
    let (v, h) = (config.vocab_size, config.hidden_size);
    let embeddings = from.linear(&naming.embeddings(), v, h);
    let lm_head = match config.tie_word_embeddings {
        true => embeddings.clone(),
        false => from.linear(&naming.outside("lm_head"), v, h),
    };
    let norm_f = from.vector(&naming.in_body("norm_f.weight"), &[h], Role::Norm);
    (embeddings, lm_head, norm_f)
}

/// Layer `index` of the body.
pub fn layer<T: Tensors>(
    config: &ModelConfig,
    naming: &Naming,
    index: usize,
    from: &mut T,
) -> LayerFields<T::Linear> {
    one_layer(&naming.in_body(&format!("layers.{index}")), &config.layers[index], config.hidden_size, from)
}

/// The MTP block, if the configuration has one.
pub fn mtp<T: Tensors>(config: &ModelConfig, naming: &Naming, from: &mut T) -> Option<MtpFields<T::Linear>> {
    let layers = config.mtp.as_ref()?;
    let h = config.hidden_size;
    let name = |rest: &str| naming.outside(&format!("mtp.layers.{rest}"));
    let last = layers.len().saturating_sub(1);
    Some(MtpFields {
        enorm: from.vector(&name("0.enorm.weight"), &[h], Role::Norm),
        hnorm: from.vector(&name("0.hnorm.weight"), &[h], Role::Norm),
        eh_proj: from.linear(&name("0.eh_proj"), h, 2 * h),
        layers: layers
            .iter()
            .enumerate()
            .map(|(i, l)| one_layer(&name(&i.to_string()), l, h, from))
            .collect(),
        final_norm: from.vector(&name(&format!("{last}.final_layernorm.weight")), &[h], Role::Norm),
    })
}

/// The whole network.
pub fn network<T: Tensors>(config: &ModelConfig, naming: &Naming, from: &mut T) -> Fields<T::Linear> {
    let (embeddings, lm_head, norm_f) = ends(config, naming, from);
    let layers = (0..config.layers.len()).map(|index| layer(config, naming, index, from)).collect();
    Fields { embeddings, lm_head, norm_f, layers, mtp: mtp(config, naming, from) }
}

fn one_layer<T: Tensors>(prefix: &str, layer: &Layer, h: usize, from: &mut T) -> LayerFields<T::Linear> {
    let norm = from.vector(&format!("{prefix}.norm.weight"), &[h], Role::Norm);
    let mixer = format!("{prefix}.mixer");
    let mixer = match layer {
        Layer::Mamba(sizes) => Mixer::Mamba(mamba(&mixer, sizes, h, from)),
        Layer::Attention(sizes) => Mixer::Attention(attention(&mixer, sizes, h, from)),
        Layer::Moe(sizes) => Mixer::Moe(moe(&mixer, sizes, h, from)),
        Layer::Mlp(sizes) => Mixer::Mlp(MlpFields {
            up: from.linear(&format!("{mixer}.up_proj"), sizes.intermediate, h),
            down: from.linear(&format!("{mixer}.down_proj"), h, sizes.intermediate),
        }),
    };
    LayerFields { norm, mixer }
}

fn mamba<T: Tensors>(mixer: &str, m: &Mamba, h: usize, from: &mut T) -> MambaFields<T::Linear> {
    let (c, heads) = (m.conv_channels(), m.heads);
    let vector = |from: &mut T, name: &str, shape: &[usize], role| {
        from.vector(&format!("{mixer}.{name}"), shape, role)
    };
    MambaFields {
        in_proj: from.linear(&format!("{mixer}.in_proj"), m.projection(), h),
        conv_weight: vector(from, "conv1d.weight", &[c, 1, m.conv_kernel], Role::ConvWeight),
        conv_bias: match m.conv_bias {
            true => vector(from, "conv1d.bias", &[c], Role::ConvBias),
            false => vec![0.0; c],
        },
        a_log: vector(from, "A_log", &[heads], Role::ALog),
        d: vector(from, "D", &[heads], Role::D),
        dt_bias: vector(from, "dt_bias", &[heads], Role::DtBias),
        norm: vector(from, "norm.weight", &[m.inner()], Role::Norm),
        out_proj: from.linear(&format!("{mixer}.out_proj"), h, m.inner()),
    }
}

fn attention<T: Tensors>(mixer: &str, a: &Attention, h: usize, from: &mut T) -> AttentionFields<T::Linear> {
    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    AttentionFields {
        q_proj: from.linear(&format!("{mixer}.q_proj"), q, h),
        k_proj: from.linear(&format!("{mixer}.k_proj"), kv, h),
        v_proj: from.linear(&format!("{mixer}.v_proj"), kv, h),
        o_proj: from.linear(&format!("{mixer}.o_proj"), h, q),
        k_scale: from.cache_scale(&format!("{mixer}.k_proj.k_scale")),
        v_scale: from.cache_scale(&format!("{mixer}.v_proj.v_scale")),
    }
}

fn moe<T: Tensors>(mixer: &str, m: &Moe, h: usize, from: &mut T) -> MoeFields<T::Linear> {
    let u = m.latent.unwrap_or(h);
    let name = |rest: &str| format!("{mixer}.{rest}");
    MoeFields {
        gate: from.gate(&name("gate"), m.experts, h),
        correction_bias: from.vector(
            &name("gate.e_score_correction_bias"),
            &[m.experts],
            Role::CorrectionBias,
        ),
        latent: m.latent.map(|latent| {
            (
                from.linear(&name("fc1_latent_proj"), latent, h),
                from.linear(&name("fc2_latent_proj"), h, latent),
            )
        }),
        up: from.experts(mixer, "up_proj", m.experts, m.intermediate, u),
        down: from.experts(mixer, "down_proj", m.experts, u, m.intermediate),
        shared: (m.shared_intermediate > 0).then(|| {
            let s = m.shared_intermediate;
            (
                from.linear(&name("shared_experts.up_proj"), s, h),
                from.linear(&name("shared_experts.down_proj"), h, s),
            )
        }),
    }
}

/// A part of the network, for tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Embeddings,
    Mamba,
    Attention,
    RoutedExperts,
    SharedExperts,
    Latent,
    Router,
    Mlp,
    Norms,
    LmHead,
    Mtp,
}

impl Part {
    /// The part that a tensor or module belongs to, by its name.
    pub fn of(name: &str) -> Part {
        let name = Naming::canonical(name);
        let has = |word: &str| name.contains(word);
        match name {
            _ if name.starts_with("mtp.") => Part::Mtp,
            _ if name.starts_with("embed") => Part::Embeddings,
            _ if name.starts_with("lm_head") => Part::LmHead,
            _ if has(".experts.") => Part::RoutedExperts,
            _ if has(".shared_experts.") => Part::SharedExperts,
            _ if has("_latent_proj") => Part::Latent,
            _ if has(".gate.") => Part::Router,
            _ if has(".q_proj") || has(".k_proj") || has(".v_proj") || has(".o_proj") => Part::Attention,
            _ if has(".up_proj") || has(".down_proj") => Part::Mlp,
            _ if has(".mixer.") => Part::Mamba,
            _ => Part::Norms,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Part::Embeddings => "embeddings",
            Part::Mamba => "mamba",
            Part::Attention => "attention",
            Part::RoutedExperts => "routed experts",
            Part::SharedExperts => "shared experts",
            Part::Latent => "latent projections",
            Part::Router => "router",
            Part::Mlp => "mlp",
            Part::Norms => "norms",
            Part::LmHead => "lm_head",
            Part::Mtp => "mtp",
        }
    }
}
