//! Causal depthwise convolution over x, B and C, then SiLU: the first half of a Mamba-2 mixer.
//! Source: spec nemotron-h §2.3 step 2; Dao and Gu 2024, arXiv 2405.21060.

use super::{Cost, lanes::Lanes, silu};
use crate::backend::StepInputs;
use crate::model::config::Mamba;

/// `projected` [T, 2d + 2GN + H] (in_proj's output, of which x, B, C are convolved) · `weight` [K, c] with
/// tap K-1 on the current token · `bias` [c] · `tails` [places, K-1, c]: the last raw rows, oldest first ·
/// `lanes`: raw rows of drafts, read where they are replayed and then replaced · `out` [T, c].
pub fn reference(
    shape: &Mamba,
    inputs: &StepInputs,
    projected: &[f32],
    weight: &[f32],
    bias: &[f32],
    tails: &mut [f32],
    lanes: &mut Lanes,
    out: &mut [f32],
) {
    let (c, taps) = (shape.conv_channels(), shape.conv_kernel);
    let tail = (taps - 1) * c;
    for (index, sequence) in inputs.sequences.iter().enumerate() {
        // Every raw row from the tail to the last token of the step; a tail after `count` tokens is a part of it.
        let mut rows = match sequence.past {
            0 => vec![0.0; tail],
            _ => tails[sequence.source as usize * tail..][..tail].to_vec(),
        };
        let (replay, certain) = (sequence.replay as usize, sequence.certain() as usize);
        let lane = &mut lanes.raw[sequence.lane as usize * lanes.drafts * c..];
        rows.extend_from_slice(&lane[..replay * c]);
        for token in sequence.first..sequence.first + sequence.count {
            rows.extend_from_slice(&projected[token as usize * shape.projection() + shape.inner()..][..c]);
            let window = &rows[rows.len() - tail - c..];
            let row = &mut out[token as usize * c..][..c];
            for k in 0..c {
                let raw = window[tail + k];
                let mut sum = f64::from(bias[k]) + f64::from(weight[tail + k]) * f64::from(raw);
                for j in 0..taps - 1 {
                    sum += f64::from(weight[j * c + k]) * f64::from(window[j * c + k]);
                }
                row[k] = silu(sum as f32);
            }
        }
        let mut keep = |place: u32, count: usize| {
            tails[place as usize * tail..][..tail].copy_from_slice(&rows[(replay + count) * c..][..tail]);
        };
        for save in inputs.saves_of(index) {
            keep(save.to, save.after as usize);
        }
        keep(sequence.slot, certain);
        let drafts = &rows[tail + (replay + certain) * c..];
        lane[..drafts.len()].copy_from_slice(drafts);
    }
}

/// Each tail is read and written once; a save is one more write; a draft's raw row goes to its lane, and is read from
/// there once if it was accepted.
pub fn cost(shape: &Mamba, inputs: &StepInputs) -> Cost {
    let (c, tokens) = (shape.conv_channels(), inputs.tokens.len());
    let tails = (2 * inputs.sequences.len() + inputs.saves.len()) * (shape.conv_kernel - 1);
    Cost {
        weights: (c * (shape.conv_kernel + 1) * 2) as u64,
        state: ((tails + inputs.lane_rows()) * c * 4) as u64,
        activations: (tokens * c * 2 * 4) as u64,
        flops: (2 * tokens * c * shape.conv_kernel) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SequenceInputs;

    #[test]
    fn inputs_before_the_sequence_are_zero_and_the_tail_carries_over() {
        // One channel of x, one each of B and C; the projection also has z and dt around them.
        let shape = Mamba {
            heads: 1,
            head_dim: 1,
            state_size: 1,
            groups: 1,
            conv_kernel: 4,
            conv_bias: true,
            dt_limit: (0.0, f32::INFINITY),
        };
        let weight = [1.0, 10.0, 100.0, 1000.0].map(|tap| [tap; 3]).concat();
        let inputs = |past, count| StepInputs {
            sequences: vec![SequenceInputs { slot: 1, source: 1, count, past, ..SequenceInputs::default() }],
            ..StepInputs::default()
        };
        let mut lanes = Lanes::new(&shape, 0, 0);
        let projected = |x: f32| [9.0, x, x, x, 9.0];
        let mut state = vec![7.0; 2 * 3 * 3];
        let mut out = vec![0.0; 6];
        let rows = [projected(1.0), projected(2.0)].concat();
        reference(&shape, &inputs(0, 2), &rows, &weight, &[0.5; 3], &mut state, &mut lanes, &mut out);
        assert_eq!(out[0], silu(1000.5), "tap 3 multiplies the current token, what came before is zero");
        assert_eq!(out[3], silu(2100.5));
        assert_eq!(state[..9], [7.0; 9], "another slot is not touched");
        assert_eq!(state[9..], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], "raw rows, oldest first");
        let rows = projected(3.0);
        reference(&shape, &inputs(2, 1), &rows, &weight, &[0.5; 3], &mut state, &mut lanes, &mut out);
        assert_eq!(out[0], silu(3210.5));
    }
}
