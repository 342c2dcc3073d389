//! Causal depthwise convolution over x, B and C, then SiLU: the first half of a Mamba-2 mixer.
//! Source: spec nemotron-h §2.3 step 2; Dao and Gu 2024, arXiv 2405.21060.

use super::{Cost, silu};
use crate::backend::SequenceInputs;
use crate::model::config::Mamba;

/// `projected` [T, 2d + 2GN + H] (in_proj's output, of which x, B, C are convolved) · `weight` [c, K] with
/// tap K-1 on the current token · `bias` [c] · `state` [slots, K-1, c]: the last raw rows, oldest first,
/// replaced in place · `out` [T, c].
pub fn reference(
    shape: &Mamba,
    sequences: &[SequenceInputs],
    projected: &[f32],
    weight: &[f32],
    bias: &[f32],
    state: &mut [f32],
    out: &mut [f32],
) {
    let (c, taps) = (shape.conv_channels(), shape.conv_kernel);
    for sequence in sequences {
        let tail = &mut state[sequence.slot as usize * (taps - 1) * c..][..(taps - 1) * c];
        if sequence.past == 0 {
            tail.fill(0.0);
        }
        for token in sequence.first..sequence.first + sequence.count {
            let raw = &projected[token as usize * shape.projection() + shape.inner()..][..c];
            let row = &mut out[token as usize * c..][..c];
            for k in 0..c {
                let mut sum = f64::from(bias[k]) + f64::from(weight[k * taps + taps - 1]) * f64::from(raw[k]);
                for j in 0..taps - 1 {
                    sum += f64::from(weight[k * taps + j]) * f64::from(tail[j * c + k]);
                }
                row[k] = silu(sum as f32);
            }
            tail.copy_within(c.., 0);
            tail[(taps - 2) * c..].copy_from_slice(raw);
        }
    }
}

pub fn cost(shape: &Mamba, tokens: usize, sequences: usize) -> Cost {
    let c = shape.conv_channels();
    Cost {
        weights: (c * (shape.conv_kernel + 1) * 2) as u64,
        state: (sequences * 2 * (shape.conv_kernel - 1) * c * 4) as u64,
        activations: (tokens * c * 2 * 4) as u64,
        flops: (2 * tokens * c * shape.conv_kernel) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let weight = [1.0, 10.0, 100.0, 1000.0].repeat(3);
        let sequence =
            |past, count| SequenceInputs { slot: 1, source: 1, count, past, ..SequenceInputs::default() };
        let projected = |x: f32| [9.0, x, x, x, 9.0];
        let mut state = vec![7.0; 2 * 3 * 3];
        let mut out = vec![0.0; 6];
        let rows = [projected(1.0), projected(2.0)].concat();
        reference(&shape, &[sequence(0, 2)], &rows, &weight, &[0.5; 3], &mut state, &mut out);
        assert_eq!(out[0], silu(1000.5), "tap 3 multiplies the current token, what came before is zero");
        assert_eq!(out[3], silu(2100.5));
        assert_eq!(state[..9], [7.0; 9], "another slot is not touched");
        assert_eq!(state[9..], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], "raw rows, oldest first");
        reference(&shape, &[sequence(2, 1)], &projected(3.0), &weight, &[0.5; 3], &mut state, &mut out);
        assert_eq!(out[0], silu(3210.5));
    }
}
