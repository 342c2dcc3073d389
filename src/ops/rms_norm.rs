//! RMSNorm of rows: `out = w * x / sqrt(mean(x²) + eps)`, statistics in full precision, one rounding at the end.
//! Kernel twin: `kernels/rms_norm.cu`. Source: Zhang and Sennrich 2019, arXiv 1910.07467.

use super::Cost;

/// The kernel's `RmsNormArgs`, by value. Pointers to bfloat16 bits, on whichever side the kernel runs.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// [rows, width]
    pub x: *const u16,
    /// [width]
    pub weight: *const u16,
    /// [rows, width]
    pub y: *mut u16,
    pub width: u32,
    pub eps: f32,
}

/// One row. `x`, `weight`, `out` [width].
pub fn reference(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = (f64::from(v) * scale * f64::from(w)) as f32;
    }
}

/// `rows` rows of `width`.
pub fn cost(rows: usize, width: usize) -> Cost {
    Cost {
        weights: width as u64 * 2,
        activations: (rows * width * 2 * 4) as u64,
        flops: (rows * width * 4) as u64,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_a_row_computed_by_hand() {
        let mut out = [0.0; 2];
        // mean(x²) = 12.5, so x / sqrt(12.5) = [0.848528, 1.131371]
        reference(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
        assert!((out[0] - 0.848_528).abs() < 1e-6, "{out:?}");
        assert!((out[1] - 2.262_742).abs() < 1e-6, "{out:?}");
    }

    #[test]
    fn epsilon_keeps_a_zero_row_finite() {
        let mut out = [1.0; 3];
        reference(&[0.0; 3], &[5.0; 3], 1e-5, &mut out);
        assert_eq!(out, [0.0; 3]);
    }
}
