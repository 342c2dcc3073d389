//! What the state of a network takes: every byte follows from its plan.

use super::{KvType, Precision, SsmType, StatePlan};
use crate::model::config::Mamba;
use crate::ops::{attention::Pages, cells::Cell};

impl KvType {
    /// The kind of number meant by this under activations of `precision`.
    pub fn cell(self, precision: Precision) -> Cell {
        match (self, precision) {
            (KvType::Auto, Precision::F32) | (KvType::F32, _) => Cell::F32,
            (KvType::Auto, Precision::Bf16) | (KvType::Bf16, _) => Cell::Bf16,
            (KvType::Fp8, _) => Cell::Fp8,
        }
    }
}

impl SsmType {
    pub fn cell(self) -> Cell {
        match self {
            SsmType::F32 => Cell::F32,
            SsmType::F16 => Cell::F16,
        }
    }
}

/// Bytes of a state in host memory, by what is handed out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// K and V of one block in all attention layers, the drafter's too.
    pub per_block: usize,
    /// Convolution tails, SSM states and the hidden vector at one place in the state pool.
    pub per_slot: usize,
    /// The inputs of the drafts of one sequence.
    pub per_lane: usize,
}

impl StatePlan {
    /// Under activations of `precision`, which decides what [`KvType::Auto`] means.
    pub fn bytes(&self, precision: Precision) -> StateBytes {
        let block = |a| 2 * Pages::new(a, self.block_len).block_size();
        let slot = |m: &Mamba| {
            let tail = (m.conv_kernel - 1) * m.conv_channels();
            tail * size_of::<f32>() + m.inner() * m.state_size * self.ssm.cell().bytes()
        };
        let lane = |m: &Mamba| 2 * m.conv_channels() + m.heads;
        StateBytes {
            per_block: self.attention.iter().map(block).sum::<usize>() * self.kv.cell(precision).bytes(),
            per_slot: self.mamba.iter().map(slot).sum::<usize>() + self.hidden * size_of::<f32>(),
            per_lane: self.mamba.iter().map(lane).sum::<usize>() * self.drafts * size_of::<f32>(),
        }
    }
}

impl StateBytes {
    /// All of a plan's blocks, places and lanes.
    pub fn total(&self, plan: &StatePlan) -> usize {
        plan.blocks * self.per_block + plan.slots * self.per_slot + plan.lanes * self.per_lane
    }
}
