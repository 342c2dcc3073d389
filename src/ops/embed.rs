//! Embedding rows by token id. No scaling and no position: the family has neither.

use super::Cost;
use crate::weights::Linear;

/// `tokens` [T] · `table` [V, h] in its stored format · `out` [T, h].
pub fn reference(table: &Linear, tokens: &[u32], out: &mut [f32]) {
    for (&token, row) in tokens.iter().zip(out.chunks_exact_mut(table.cols)) {
        table.row_f32(token as usize, row);
    }
}

pub fn cost(tokens: usize, table: &Linear) -> Cost {
    Cost {
        weights: (table.bytes() / table.rows.max(1) * tokens) as u64,
        activations: (tokens * table.cols * 4) as u64,
        ..Cost::default()
    }
}
