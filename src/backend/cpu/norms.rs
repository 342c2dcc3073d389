//! Norms of a row: one body each over 16 lanes, compiled for every instruction set.

use super::simd::{dot, silu, versions};

/// Sum of squares in 16 lanes.
#[inline(always)]
fn squares<const FMA: bool>(x: &[f32]) -> f32 {
    dot::<FMA>(x, x)
}

#[inline(always)]
fn rms_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (squares::<FMA>(x) / x.len() as f32 + eps).sqrt();
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

versions! {
    /// One row.
    pub fn rms_norm = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
}

#[inline(always)]
fn gated_norm_body<const FMA: bool>(z: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    for (y, &z) in y.iter_mut().zip(z) {
        *y *= silu::<FMA>(z);
    }
    let scale = 1.0 / (squares::<FMA>(y) / y.len() as f32 + eps).sqrt();
    for (y, &w) in y.iter_mut().zip(weight) {
        *y = *y * scale * w;
    }
}

versions! {
    /// One group of one row, in place.
    pub fn gated_norm = gated_norm_body(z: &[f32], weight: &[f32], eps: f32, y: &mut [f32])
}
