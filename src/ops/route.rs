//! The router: scores every expert from the full hidden vector, chooses K, weighs them.
//! Source: spec nemotron-h §2.6. The correction bias chooses; the weights come from the raw scores.

use super::Cost;
use crate::model::config::Moe;

/// From logits to choice, for one token. `logits` [E] become scores in place · `selection` scratch [E] ·
/// `ids`, `weights` [K], best first; ties go to the lower expert.
pub fn choose(
    shape: &Moe,
    bias: &[f32],
    logits: &mut [f32],
    selection: &mut [f32],
    ids: &mut [u32],
    weights: &mut [f32],
) {
    for ((s, select), &b) in logits.iter_mut().zip(selection.iter_mut()).zip(bias) {
        *s = 1.0 / (1.0 + (-*s).exp());
        *select = *s + b;
    }
    if shape.groups > 1 {
        limit_groups(shape, selection);
    }
    for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
        let mut best = 0;
        for (expert, &value) in selection.iter().enumerate() {
            if value > selection[best] {
                best = expert;
            }
        }
        *id = best as u32;
        *weight = logits[best];
        selection[best] = f32::NEG_INFINITY;
    }
    let sum = if shape.normalize { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    for weight in weights {
        *weight = *weight / sum * shape.scaling;
    }
}

/// Group-limited routing: a group's score is the sum of its two largest; all but the best
/// `groups_per_token` groups leave the choice.
fn limit_groups(shape: &Moe, selection: &mut [f32]) {
    let size = shape.experts / shape.groups;
    let score = |group: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &value in group {
            if value > first {
                (first, second) = (value, first);
            } else if value > second {
                second = value;
            }
        }
        if size > 1 { first + second } else { first }
    };
    // A group stays if fewer than `groups_per_token` beat it (ties: the lower one wins). Scores are taken
    // before any group is masked, and a masked group scores -inf, so masking from the worst is safe.
    for _ in 0..shape.groups - shape.groups_per_token {
        let mut worst: Option<(usize, f32)> = None;
        for (group, values) in selection.chunks_exact(size).enumerate() {
            let value = score(values);
            if value > f32::NEG_INFINITY && worst.is_none_or(|(_, w)| value <= w) {
                worst = Some((group, value));
            }
        }
        let Some((group, _)) = worst else { return };
        selection[group * size..][..size].fill(f32::NEG_INFINITY);
    }
}

/// `gate_bytes` is the router weight as stored.
pub fn cost(shape: &Moe, hidden: usize, gate_bytes: usize, tokens: usize) -> Cost {
    Cost {
        weights: (gate_bytes + shape.experts * 4) as u64,
        activations: (tokens * (hidden + 2 * shape.experts_per_token) * 4) as u64,
        flops: (2 * tokens * hidden * shape.experts) as u64,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(shape: Moe, logits: &[f32], bias: &[f32], expected: &[(u32, f32)]) {
        let mut scores = logits.to_vec();
        let mut selection = vec![0.0; logits.len()];
        let mut ids = vec![0; expected.len()];
        let mut weights = vec![0.0; expected.len()];
        choose(&shape, bias, &mut scores, &mut selection, &mut ids, &mut weights);
        assert_eq!(ids, expected.iter().map(|e| e.0).collect::<Vec<_>>());
        for (got, (_, expected)) in weights.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{weights:?}");
        }
    }

    fn shape(experts: usize, groups: usize, groups_per_token: usize) -> Moe {
        Moe {
            experts,
            experts_per_token: 2,
            intermediate: 1,
            latent: None,
            shared_intermediate: 0,
            scaling: 2.5,
            groups,
            groups_per_token,
            normalize: true,
        }
    }

    /// Spec nemotron-h §12, vector 2.
    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let expected = [(2, 0.905_274_2), (0, 1.594_725_8)];
        check(shape(4, 1, 1), &[2.0, 1.0, 0.0, -1.0], &[0.0, 0.0, 0.5, 0.0], &expected);
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        check(shape(4, 1, 1), &[0.0; 4], &[0.0; 4], &[(0, 1.25), (1, 1.25)]);
    }

    #[test]
    fn only_experts_of_the_best_groups_are_chosen() {
        // Group 0 holds the single best expert, group 1 the best pair: one group may stay, so the pair wins.
        let logits = [3.0, -9.0, 2.0, 2.0];
        check(shape(4, 2, 1), &logits, &[0.0; 4], &[(2, 1.25), (3, 1.25)]);
    }
}
