//! What waits for judgement: the inputs by which the drafts of each lane would advance a Mamba layer.

use super::lines::Lines;
use crate::backend::StepInputs;
use crate::model::config::Mamba;

/// The lanes of one Mamba layer. A row is one draft.
#[derive(Debug, Clone)]
pub struct Lanes {
    /// Rows of one lane.
    pub drafts: usize,
    /// [lanes, drafts, c] x, B and C before the convolution: rows of the tail, once accepted.
    pub raw: Lines<f32>,
    /// [lanes, drafts, c] the same after it.
    pub xbc: Lines<f32>,
    /// [lanes, drafts, H] dt as projected.
    pub dt: Lines<f32>,
}

impl Lanes {
    pub fn new(shape: &Mamba, lanes: usize, drafts: usize) -> Self {
        let zeros = |width: usize| Lines::zeros(lanes * drafts * width);
        let c = shape.conv_channels();
        Lanes { drafts, raw: zeros(c), xbc: zeros(c), dt: zeros(shape.heads) }
    }

    /// Keeps what the recurrence reads of a step's drafts: rows of `xbc` [T, c] and dt of `projected`. Every head
    /// must have replayed before, because the heads of a group share these rows.
    pub fn keep(&mut self, shape: &Mamba, inputs: &StepInputs, projected: &[f32], xbc: &[f32]) {
        let (h, c) = (shape.heads, shape.conv_channels());
        for sequence in &inputs.sequences {
            let from = (sequence.first + sequence.certain()) as usize;
            for i in 0..sequence.drafts as usize {
                let row = sequence.lane as usize * self.drafts + i;
                self.xbc[row * c..][..c].copy_from_slice(&xbc[(from + i) * c..][..c]);
                let dt = &projected[(from + i) * shape.projection() + shape.projection() - h..][..h];
                self.dt[row * h..][..h].copy_from_slice(dt);
            }
        }
    }
}
