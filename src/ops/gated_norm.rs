//! Gate, then RMSNorm of each group: `g = y silu(z)`, normalised over the G slices of width d/G separately.
//! Norm-then-gate and an ungrouped norm are wrong by O(1) for this family (spec nemotron-h §2.3 step 7).

use super::{Cost, silu};
use crate::model::config::Mamba;

/// One row, in place. `y` [d] · `z` [d] · `weight` [d].
pub fn reference(groups: usize, eps: f32, z: &[f32], weight: &[f32], y: &mut [f32]) {
    let width = y.len() / groups;
    for ((y, z), w) in y.chunks_exact_mut(width).zip(z.chunks_exact(width)).zip(weight.chunks_exact(width)) {
        let mut sum = 0.0f64;
        for (y, &z) in y.iter_mut().zip(z) {
            *y *= silu(z);
            sum += f64::from(*y) * f64::from(*y);
        }
        let scale = 1.0 / (sum / width as f64 + f64::from(eps)).sqrt();
        for (y, &w) in y.iter_mut().zip(w) {
            *y = (f64::from(*y) * scale * f64::from(w)) as f32;
        }
    }
}

pub fn cost(shape: &Mamba, tokens: usize) -> Cost {
    let d = shape.inner();
    Cost {
        weights: d as u64 * 2,
        activations: (tokens * d * 3 * 4) as u64,
        flops: (tokens * d * 8) as u64,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_has_its_own_statistics_and_the_gate_comes_first() {
        let mut y = [1.0, 1.0, 100.0, 100.0];
        reference(2, 0.0, &[2.0, 2.0, 2.0, 2.0], &[1.0, 2.0, 3.0, 4.0], &mut y);
        for (got, expected) in y.iter().zip([1.0, 2.0, 3.0, 4.0]) {
            assert!((got - expected).abs() < 1e-6, "{y:?}");
        }
        let mut y = [1.0, 1.0];
        reference(1, 0.0, &[30.0, 0.0], &[1.0, 1.0], &mut y);
        assert!((y[0] - std::f32::consts::SQRT_2).abs() < 1e-6, "{y:?}");
        assert_eq!(y[1], 0.0);
    }
}
