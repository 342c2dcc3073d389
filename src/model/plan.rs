//! What a resident model needs of memory, known before anything is set aside: arithmetic over its configuration
//! and [`Limits`], nothing else.

use std::collections::BTreeSet;

use super::Limits;
use super::config::{Layer, ModelConfig};
use crate::backend::{Precision, StatePlan};

/// Bytes of an activation and a logit on the backends that compute in host memory, whatever they are rounded to.
const F32: usize = 4;

/// Bytes by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The checkpoint as stored: it is mapped, not expanded.
    pub weights: u64,
    /// The pool of KV blocks, of sequences and of the prefix cache.
    pub kv: u64,
    /// States of the sequences that run.
    pub states: u64,
    /// States that the prefix cache holds.
    pub checkpoints: u64,
    /// Inputs of drafts that are not judged yet.
    pub lanes: u64,
    /// Activations of one step.
    pub workspace: u64,
    pub logits: u64,
}

impl MemoryPlan {
    /// Of a network with `limits`, `sequences` of whose places are for sequences, the others for checkpoints.
    pub fn new(
        config: &ModelConfig,
        limits: &Limits,
        precision: Precision,
        sequences: usize,
        weights: u64,
    ) -> Self {
        let state = state_bytes(config, limits);
        let checkpoints = limits.slots.saturating_sub(sequences);
        Self {
            weights,
            kv: times(limits.blocks, block_bytes(config, limits, precision)),
            states: times(limits.slots.min(sequences), state),
            checkpoints: times(checkpoints, state),
            lanes: times(limits.lanes, lane_bytes(config, limits)),
            workspace: workspace_bytes(config, limits),
            logits: logits_bytes(config, limits),
        }
    }

    /// Kinds by the words that tables use, in order.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("KV blocks", self.kv),
            ("states of sequences", self.states),
            ("checkpoints", self.checkpoints),
            ("lanes", self.lanes),
            ("workspace", self.workspace),
            ("logits", self.logits),
        ]
    }

    pub fn total(&self) -> u64 {
        self.parts().iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }
}

/// Sizes come from flags: what is too large must be refused, not wrap around.
fn times(count: usize, bytes: u64) -> u64 {
    (count as u64).saturating_mul(bytes)
}

/// All layers, the drafter's too.
fn layers(config: &ModelConfig) -> impl Iterator<Item = &Layer> {
    config.layers.iter().chain(config.mtp.iter().flatten())
}

/// What is kept between steps, as a network of these layers asks its backend for it.
pub(super) fn state_plan(config: &ModelConfig, limits: &Limits) -> StatePlan {
    let mamba = |layer: &Layer| if let Layer::Mamba(m) = layer { Some(*m) } else { None };
    let attention = |layer: &Layer| if let Layer::Attention(a) = layer { Some(*a) } else { None };
    StatePlan {
        slots: limits.slots,
        blocks: limits.blocks,
        block_len: limits.block_len,
        lanes: limits.lanes,
        drafts: limits.drafts,
        kv: limits.kv,
        ssm: limits.ssm,
        hidden: if config.mtp.is_some() { config.hidden_size } else { 0 },
        mamba: layers(config).filter_map(mamba).collect(),
        attention: layers(config).filter_map(attention).collect(),
    }
}

/// One KV block of every attention layer.
pub fn block_bytes(config: &ModelConfig, limits: &Limits, precision: Precision) -> u64 {
    state_plan(config, limits).bytes(precision).per_block as u64
}

/// One place of the state pool: convolution tails and SSM states of every Mamba layer, and the hidden vector from
/// which the drafter goes on.
pub fn state_bytes(config: &ModelConfig, limits: &Limits) -> u64 {
    // The precision decides about blocks alone.
    state_plan(config, limits).bytes(Precision::F32).per_slot as u64
}

/// What the drafts of one sequence would advance its states by.
fn lane_bytes(config: &ModelConfig, limits: &Limits) -> u64 {
    state_plan(config, limits).bytes(Precision::F32).per_lane as u64
}

/// Rows of activations: layers of one width share a buffer, so each width counts once per use.
fn workspace_bytes(config: &ModelConfig, limits: &Limits) -> u64 {
    let h = config.hidden_size;
    let mut widths = BTreeSet::new();
    let mut experts = 0;
    for layer in layers(config) {
        match layer {
            Layer::Mamba(m) => widths.extend([
                ("projected", m.projection()),
                ("convolved", m.conv_channels()),
                ("mixed", m.inner()),
            ]),
            // q and what was attended; k and v.
            Layer::Attention(a) => {
                widths.extend([("q", 2 * a.heads * a.head_dim), ("kv", 2 * a.kv_heads * a.head_dim)]);
            }
            Layer::Moe(m) => {
                widths.extend([
                    ("latent", 2 * m.latent.unwrap_or(0)),
                    ("inner", m.shared_intermediate),
                    ("routes", 2 * m.experts_per_token),
                ]);
                experts = experts.max(m.experts_per_token * m.intermediate);
            }
            Layer::Mlp(m) => {
                widths.insert(("inner", m.intermediate));
            }
        }
    }
    let residual = 2 * h;
    let drafter = if config.mtp.is_some() { 4 * h } else { 0 };
    let per_token = widths.iter().map(|(_, width)| width).sum::<usize>() + experts + residual + drafter;
    let picked = times(limits.logit_rows, (2 * h * F32) as u64);
    times(limits.step_tokens, (per_token * F32) as u64).saturating_add(picked)
}

fn logits_bytes(config: &ModelConfig, limits: &Limits) -> u64 {
    times(limits.logit_rows, (config.vocab_size * F32) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvType, SsmType};

    const NANO: &[u8] = include_bytes!("../../models/nano-bf16/config.json");

    fn limits() -> Limits {
        Limits {
            step_tokens: 256,
            logit_rows: 32,
            slots: 8 + 16,
            blocks: 1000,
            block_len: 16,
            lanes: 8,
            drafts: 4,
            ..Limits::default()
        }
    }

    fn nano(limits: &Limits) -> MemoryPlan {
        let config = ModelConfig::from_json(NANO).expect("the release's own file");
        MemoryPlan::new(&config, limits, Precision::F32, 8, 1000)
    }

    #[test]
    fn a_state_of_nano_costs_what_its_layers_do() {
        let config = ModelConfig::from_json(NANO).expect("the release's own file");
        // 23 Mamba layers of 64 heads of 64 × 128, and 3 rows of 6144 channels; no drafter.
        assert_eq!(state_bytes(&config, &limits()), 23 * (64 * 64 * 128 + 3 * 6144) * 4);
        let half = Limits { ssm: SsmType::F16, ..limits() };
        assert_eq!(state_bytes(&config, &half), 23 * (64 * 64 * 128 * 2 + 3 * 6144 * 4));
        // Raw and convolved rows, and dt.
        assert_eq!(lane_bytes(&config, &limits()), 23 * (2 * 6144 + 64) * 4 * 4);
    }

    #[test]
    fn a_block_of_nano_holds_six_layers_of_two_heads() {
        let config = ModelConfig::from_json(NANO).expect("the release's own file");
        let bytes = |kv, precision| block_bytes(&config, &Limits { kv, ..limits() }, precision);
        let numbers = 6 * 2 * 2 * 128 * 16;
        assert_eq!(bytes(KvType::Auto, Precision::F32), numbers * 4);
        assert_eq!(bytes(KvType::Auto, Precision::Bf16), numbers * 2);
        assert_eq!(bytes(KvType::Fp8, Precision::F32), numbers);
    }

    #[test]
    fn places_beyond_the_sequences_are_checkpoints() {
        let plan = nano(&limits());
        assert_eq!((plan.states * 2, plan.weights), (plan.checkpoints, 1000));
        assert_eq!(plan.total(), plan.parts().iter().map(|(_, bytes)| bytes).sum::<u64>());
        assert_eq!(plan.logits, 32 * 131_072 * 4);
    }

    #[test]
    fn what_nobody_has_is_more_than_any_machine_has() {
        let plan = nano(&Limits { blocks: usize::MAX, slots: usize::MAX, ..limits() });
        assert_eq!(plan.total(), u64::MAX);
    }
}
