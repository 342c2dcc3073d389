//! `y = W x` for rows of tokens, W read in its stored format, with what is done to `y` on the way out.

use super::{Cost, ShapeError, agree};
use crate::weights::Linear;

/// What happens to a product before it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// out = y
    Store,
    /// out = relu(y)²: the activation of every MLP and expert of the family.
    Relu2,
    /// out += y: the residual stream.
    Add,
}

impl Epilogue {
    #[inline(always)]
    pub fn apply(self, y: f32, out: &mut f32) {
        match self {
            Epilogue::Store => *out = y,
            Epilogue::Relu2 => *out = relu2(y),
            Epilogue::Add => *out += y,
        }
    }

    /// What traces and profiles call a product that ends so.
    pub fn linear_name(self) -> &'static str {
        match self {
            Epilogue::Store => "linear",
            Epilogue::Relu2 => "linear+relu2",
            Epilogue::Add => "linear+add",
        }
    }
}

#[inline(always)]
pub fn relu2(y: f32) -> f32 {
    let positive = y.max(0.0);
    positive * positive
}

/// The weight must be `[rows, cols]`.
pub fn check(name: &'static str, weight: &Linear, rows: usize, cols: usize) -> Result<(), ShapeError> {
    agree(name, "rows", rows, weight.rows)?;
    agree(name, "cols", cols, weight.cols)
}

/// `x` [T, cols] · `out` [T, rows] · `row` scratch [cols].
pub fn reference(weight: &Linear, x: &[f32], out: &mut [f32], epilogue: Epilogue, row: &mut [f32]) {
    for r in 0..weight.rows {
        weight.row_f32(r, row);
        for (x, out) in x.chunks_exact(weight.cols).zip(out.chunks_exact_mut(weight.rows)) {
            let y = row.iter().zip(x).map(|(&w, &v)| f64::from(w) * f64::from(v)).sum::<f64>();
            epilogue.apply(y as f32, &mut out[r]);
        }
    }
}

pub fn cost(tokens: usize, weight: &Linear) -> Cost {
    Cost {
        weights: weight.bytes() as u64,
        activations: (tokens * (weight.rows + weight.cols) * 4) as u64,
        flops: (2 * tokens * weight.rows * weight.cols) as u64,
        ..Cost::default()
    }
}
