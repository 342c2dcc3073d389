//! What the backends that compute in host memory share: buffers, routes and the state pool.

use super::{BlockCopy, Hidden, Precision, StatePlan, StepInputs};
use crate::ops::{attention::Pages, cells::Cells, lanes::Lanes, lines::Lines};

/// `[rows, width]` f32, row-major.
pub struct Buffer {
    pub width: usize,
    pub data: Lines<f32>,
}

impl Buffer {
    pub fn new(rows: usize, width: usize) -> Self {
        Buffer { width, data: Lines::zeros(rows * width) }
    }

    pub fn rows(&self, count: usize) -> &[f32] {
        &self.data[..count * self.width]
    }

    pub fn rows_mut(&mut self, count: usize) -> &mut [f32] {
        &mut self.data[..count * self.width]
    }

    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..][..self.width]
    }

    /// Appends the index of the largest number of each row; of equals the lowest.
    pub fn largest(&self, rows: usize, indices: &mut Vec<u32>) {
        indices.extend(self.rows(rows).chunks_exact(self.width).map(|row| {
            let mut best = 0;
            for (i, &value) in row.iter().enumerate() {
                if value > row[best] {
                    best = i;
                }
            }
            best as u32
        }));
    }

    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.data[index * self.width..][..self.width]
    }
}

/// Chosen experts `[T, K]` and their weights.
pub struct Routes {
    pub chosen: usize,
    pub ids: Box<[u32]>,
    pub weights: Box<[f32]>,
}

impl Routes {
    pub fn new(rows: usize, chosen: usize) -> Self {
        Routes { chosen, ids: vec![0; rows * chosen].into(), weights: vec![0.0; rows * chosen].into() }
    }
}

/// States by slot and pages by block, in the types of the plan.
pub struct State {
    /// Per Mamba layer `[slots, K-1, c]`.
    pub conv: Vec<Lines<f32>>,
    /// Per Mamba layer `[slots, H, P, N]`.
    pub ssm: Vec<Cells>,
    /// Per Mamba layer.
    pub lanes: Vec<Lanes>,
    /// Per attention layer `[blocks, kv, block_len, D]`.
    pub keys: Vec<Cells>,
    pub values: Vec<Cells>,
    /// [places, h]: what checkpoints keep for the drafter.
    pub hidden: Buffer,
    pub block_len: usize,
    pub blocks: usize,
}

impl State {
    /// `precision` decides what `KvType::Auto` means.
    pub fn new(plan: &StatePlan, precision: Precision) -> Self {
        let (kv, ssm) = (plan.kv.cell(precision), plan.ssm.cell());
        let pages = |a| Cells::new(kv, plan.blocks * Pages::new(a, plan.block_len).block_size());
        State {
            conv: plan
                .mamba
                .iter()
                .map(|m| Lines::zeros(plan.slots * (m.conv_kernel - 1) * m.conv_channels()))
                .collect(),
            ssm: plan.mamba.iter().map(|m| Cells::new(ssm, plan.slots * m.inner() * m.state_size)).collect(),
            lanes: plan.mamba.iter().map(|m| Lanes::new(m, plan.lanes, plan.drafts)).collect(),
            keys: plan.attention.iter().map(pages).collect(),
            values: plan.attention.iter().map(pages).collect(),
            hidden: Buffer::new(plan.slots, plan.hidden),
            block_len: plan.block_len,
            blocks: plan.blocks,
        }
    }

    /// What was allocated for it.
    pub fn bytes(&self) -> usize {
        let f32s = |cells: &[f32]| size_of_val(cells);
        let lanes = |l: &Lanes| f32s(&l.raw) + f32s(&l.xbc) + f32s(&l.dt);
        let cells = self.ssm.iter().chain(&self.keys).chain(&self.values);
        self.conv.iter().map(|tails| f32s(tails)).sum::<usize>()
            + cells.map(Cells::bytes).sum::<usize>()
            + self.lanes.iter().map(lanes).sum::<usize>()
            + f32s(&self.hidden.data)
    }

    pub fn keep_hidden(&mut self, inputs: &StepInputs, x: &Buffer) {
        for sequence in &inputs.sequences {
            let row = sequence.first + sequence.count - sequence.drafts - 1;
            self.hidden.row_mut(sequence.slot as usize).copy_from_slice(x.row(row as usize));
        }
        for save in &inputs.saves {
            let row = inputs.sequences[save.sequence as usize].first + save.after - 1;
            self.hidden.row_mut(save.to as usize).copy_from_slice(x.row(row as usize));
        }
    }

    pub fn hidden(&self, hidden: &[Hidden], x: &Buffer, drafted: &Buffer, out: &mut Buffer) {
        for (i, &hidden) in hidden.iter().enumerate() {
            out.row_mut(i).copy_from_slice(match hidden {
                Hidden::Step(row) => x.row(row as usize),
                Hidden::Saved(place) => self.hidden.row(place as usize),
                Hidden::Draft(row) => drafted.row(row as usize),
            });
        }
    }

    pub fn copy_blocks(&mut self, copies: &[BlockCopy]) {
        for pages in self.keys.iter_mut().chain(&mut self.values) {
            let size = pages.len() / self.blocks;
            for copy in copies {
                let from = copy.from as usize * size;
                pages.copy_within(from..from + size, copy.to as usize * size);
            }
        }
    }
}

impl Precision {
    /// Rounds what an operation stored.
    #[inline]
    pub fn round(self, values: &mut [f32]) {
        if self == Precision::Bf16 {
            // Without a branch, so that it becomes vector code: what rounding adds to NaN could make it infinite.
            for value in values {
                let bits = value.to_bits();
                let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
                let kept = if value.is_nan() { bits | 0x40_0000 } else { rounded };
                *value = f32::from_bits(kept & 0xffff_0000);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvType, SsmType};
    use crate::model::config::{Attention, Mamba};

    #[test]
    fn a_state_takes_the_bytes_its_plan_says() {
        let mamba = Mamba {
            heads: 4,
            head_dim: 3,
            state_size: 5,
            groups: 2,
            conv_kernel: 4,
            conv_bias: true,
            dt_limit: (0.0, f32::INFINITY),
        };
        let attention = Attention { heads: 4, kv_heads: 2, head_dim: 7 };
        for kv in [KvType::Auto, KvType::F32, KvType::Bf16, KvType::Fp8] {
            for ssm in [SsmType::F32, SsmType::F16] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let plan = StatePlan {
                        slots: 3,
                        blocks: 5,
                        block_len: 4,
                        lanes: 2,
                        drafts: 6,
                        kv,
                        ssm,
                        hidden: 11,
                        mamba: vec![mamba, mamba],
                        attention: vec![attention; 3],
                    };
                    let said = plan.bytes(precision).total(&plan);
                    assert_eq!(State::new(&plan, precision).bytes(), said, "{kv:?} {ssm:?} {precision:?}");
                }
            }
        }
    }
}
