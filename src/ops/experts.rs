//! The routed experts: `out = Σ_j weight_j · down_j(relu(up_j v)²)`, in the latent width where there is one.

use super::{
    Cost,
    linear::{Epilogue, relu2},
};
use crate::model::config::Moe;
use crate::weights::Linear;

/// `v` [T, u] · `ids`, `weights` [T, K] · `up` E of [i, u] · `down` E of [u, i] · `out` [T, u].
pub fn reference(
    shape: &Moe,
    up: &[Linear],
    down: &[Linear],
    ids: &[u32],
    weights: &[f32],
    v: &[f32],
    out: &mut [f32],
    epilogue: Epilogue,
) {
    let (width, inner, chosen) = (up[0].cols, shape.intermediate, shape.experts_per_token);
    let mut row = vec![0.0; width.max(inner)];
    let mut middle = vec![0.0; inner];
    for (token, (v, out)) in v.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let mut sum = vec![0.0f64; width];
        for j in token * chosen..(token + 1) * chosen {
            let expert = ids[j] as usize;
            for (i, value) in middle.iter_mut().enumerate() {
                up[expert].row_f32(i, &mut row[..width]);
                *value = relu2(dot(&row[..width], v) as f32);
            }
            for (i, sum) in sum.iter_mut().enumerate() {
                down[expert].row_f32(i, &mut row[..inner]);
                *sum += f64::from(weights[j]) * dot(&row[..inner], &middle);
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            epilogue.apply(sum as f32, out);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Weight bytes are those of `distinct` experts: each is read once per step, whoever chose it.
pub fn cost(shape: &Moe, up: &Linear, down: &Linear, tokens: usize, distinct: usize) -> Cost {
    let chosen = tokens * shape.experts_per_token;
    Cost {
        weights: (distinct * (up.bytes() + down.bytes())) as u64,
        activations: ((tokens * 2 * up.cols + 2 * chosen * shape.intermediate) * 4) as u64,
        flops: (4 * chosen * up.cols * shape.intermediate) as u64,
        ..Cost::default()
    }
}
