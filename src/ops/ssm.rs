//! The Mamba-2 recurrence: per head `S = exp(dt A) S + dt x Bᵀ`, `y = S C + D x`.
//! Source: Dao and Gu 2024, arXiv 2405.21060; spec nemotron-h §2.3 steps 3 to 6.

use super::{
    Cost,
    cells::{Cells, Rounding},
    lanes::Lanes,
    softplus,
};
use crate::backend::StepInputs;
use crate::model::config::Mamba;

/// Per-head constants of a mixer, [H] each, f32.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    pub a_log: &'a [f32],
    pub d: &'a [f32],
    pub dt_bias: &'a [f32],
}

/// dt of one head after bias, softplus and the limit, which is (0, inf) in every release.
///
/// It is not clamped at `time_step_min`: transformers does that in its prefill, and then its own decode
/// disagrees with it.
#[inline]
pub fn step_size(raw: f32, bias: f32, limit: (f32, f32)) -> f32 {
    softplus(raw + bias).clamp(limit.0, limit.1)
}

/// `projected` [T, 2d + 2GN + H], of which the last H columns are dt · `xbc` [T, c] after the convolution ·
/// `states` [places, H, P, N] of Mamba layer `layer`, rounded after every token if they are f16 · `lanes`: replayed first, then the drafts' rows replace them · `out` [T, d].
pub fn reference(
    shape: &Mamba,
    layer: usize,
    inputs: &StepInputs,
    projected: &[f32],
    xbc: &[f32],
    heads: Heads<'_>,
    states: &mut Cells,
    lanes: &mut Lanes,
    out: &mut [f32],
) {
    let (d, c, h) = (shape.inner(), shape.conv_channels(), shape.heads);
    let size = d * shape.state_size;
    let mut unseen = vec![0.0; d];
    for (index, sequence) in inputs.sequences.iter().enumerate() {
        let mut state = vec![0.0; size];
        if sequence.past > 0 {
            states.read(sequence.source as usize * size, &mut state);
        }
        let stochastic = matches!(states, Cells::F16(_));
        let settle = |position: u32, state: &mut [f32]| {
            if stochastic {
                round(shape, layer, position, state);
            }
        };
        for i in 0..sequence.replay as usize {
            let row = sequence.lane as usize * lanes.drafts + i;
            let (xbc, dt) = (&lanes.xbc[row * c..][..c], &lanes.dt[row * h..][..h]);
            advance(shape, xbc, dt, heads, &mut state, &mut unseen);
            settle(sequence.past - sequence.replay + i as u32, &mut state);
        }
        for i in 0..sequence.count {
            let token = (sequence.first + i) as usize;
            let dt = &projected[token * shape.projection() + d + c..][..h];
            advance(shape, &xbc[token * c..][..c], dt, heads, &mut state, &mut out[token * d..][..d]);
            settle(sequence.past + i, &mut state);
            let mut keep = |place: u32| states.write(place as usize * size, &state);
            inputs.saves_of(index).iter().filter(|save| save.after == i + 1).for_each(|save| keep(save.to));
            if i + 1 == sequence.certain() {
                keep(sequence.slot);
            }
        }
    }
    lanes.keep(shape, inputs, projected, xbc);
}

/// One token: `row` [c], `dt` [H] as projected, `state` [H, P, N], `out` [d].
fn advance(shape: &Mamba, row: &[f32], dt: &[f32], heads: Heads<'_>, state: &mut [f32], out: &mut [f32]) {
    let &Mamba { heads: h, head_dim: p, state_size: n, groups, .. } = shape;
    let d = shape.inner();
    for head in 0..h {
        let group = head / (h / groups);
        let b = &row[d + group * n..][..n];
        let c = &row[d + groups * n + group * n..][..n];
        let dt = f64::from(step_size(dt[head], heads.dt_bias[head], shape.dt_limit));
        let decay = (-f64::from(heads.a_log[head]).exp() * dt).exp();
        for i in 0..p {
            let x = f64::from(row[head * p + i]);
            let s = &mut state[(head * p + i) * n..][..n];
            let mut y = f64::from(heads.d[head]) * x;
            for j in 0..n {
                let value = decay * f64::from(s[j]) + dt * x * f64::from(b[j]);
                s[j] = value as f32;
                y += value * f64::from(c[j]);
            }
            out[head * p + i] = y as f32;
        }
    }
}

/// Every element of every head after the token at `position`.
fn round(shape: &Mamba, layer: usize, position: u32, state: &mut [f32]) {
    for (head, state) in state.chunks_exact_mut(shape.head_dim * shape.state_size).enumerate() {
        let rounding = Rounding::new(position, layer as u32, head as u32);
        for (element, value) in state.iter_mut().enumerate() {
            *value = rounding.apply(element as u32, *value);
        }
    }
}

/// `element` is the bytes of one number of the state.
/// The state is read and written once per step, however many tokens the step has; a save is one more write, and a
/// draft costs its row in the lane.
pub fn cost(shape: &Mamba, inputs: &StepInputs, element: usize) -> Cost {
    let (state, tokens) = (shape.inner() * shape.state_size, inputs.tokens.len());
    let row = shape.conv_channels() + shape.heads;
    let replayed: u32 = inputs.sequences.iter().map(|s| s.replay).sum();
    let moved = (2 * inputs.sequences.len() + inputs.saves.len()) * state;
    Cost {
        weights: (shape.heads * 3 * 2) as u64,
        state: (moved * element + inputs.lane_rows() * row * 4) as u64,
        activations: (tokens * (row + shape.inner()) * 4) as u64,
        flops: (tokens * state * 6 + replayed as usize * state * 4) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SequenceInputs;
    use crate::ops::lines::Lines;

    /// Spec nemotron-h §12, vector 1.
    #[test]
    fn published_vector_of_one_head() {
        let shape = Mamba {
            heads: 1,
            head_dim: 1,
            state_size: 1,
            groups: 1,
            conv_kernel: 4,
            conv_bias: true,
            dt_limit: (0.0, f32::INFINITY),
        };
        let inputs = StepInputs {
            sequences: vec![SequenceInputs { count: 2, ..SequenceInputs::default() }],
            ..StepInputs::default()
        };
        let mut lanes = Lanes::new(&shape, 0, 0);
        // z, x, B, C, dt; only dt is read from the projection.
        let projected = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let xbc = [1.0, 1.0, 2.0, 2.0, 0.5, 1.0];
        let mut state = Cells::F32(Lines::from(&[9.0][..]));
        let mut out = [0.0; 2];
        let heads = Heads { a_log: &[0.0], d: &[0.5], dt_bias: &[0.5] };
        reference(&shape, 0, &inputs, &projected, &xbc, heads, &mut state, &mut lanes, &mut out);
        assert!((out[0] - 2.448_154).abs() < 1e-6, "{out:?}");
        assert!((out[1] - 2.879_109_8).abs() < 1e-6, "{out:?}");
        assert!((state.get(0) - 1.879_109_8).abs() < 1e-6, "{state:?}");
    }

    #[test]
    fn dt_is_not_clamped_from_below() {
        let dt = step_size(-20.0, 0.0, (0.0, f32::INFINITY));
        assert!(dt > 0.0 && dt < 1e-8, "{dt}");
        assert_eq!(step_size(-20.0, 0.0, (0.001, 0.1)), 0.001);
    }
}
