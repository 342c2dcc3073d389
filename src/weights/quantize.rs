//! Rows of `f32` to the stored formats: the writer's side of [`Linear::row_f32`].
//!
//! Source: ModelOpt's NVFP4 and FP8 conventions: `global = amax / (6 * 448)`, `block = e4m3(block_amax / 6 / global)`
//! kept in [2^-9, 448], FP8 `scale = amax / 448`.

use bytes::Bytes;

use super::codec::{self, E2M1_MAX, E4M3_MAX, E4M3_MIN_POSITIVE};
use super::linear::NVFP4_BLOCK;
use super::{Format, Kind, Linear};

/// Encodes `values` [rows, cols], which must be finite, as `kind`.
///
/// Panics if the length is not rows * cols, or cols is not a multiple of 16 for NVFP4, or for GGUF's blocks, which are
/// only read here: the caller checks shapes and kind.
pub fn quantize(values: &[f32], rows: usize, cols: usize, kind: Kind) -> Linear {
    assert_eq!(values.len(), rows * cols, "values of a [{rows}, {cols}] weight");
    match kind {
        Kind::F32 => plain(values, rows, cols, Format::F32, |v, out| out.extend_from_slice(&v.to_le_bytes())),
        Kind::F16 => plain(values, rows, cols, Format::F16, |v, out| {
            out.extend_from_slice(&codec::f32_to_f16(v).to_le_bytes());
        }),
        Kind::BF16 => plain(values, rows, cols, Format::BF16, |v, out| {
            out.extend_from_slice(&codec::f32_to_bf16(v).to_le_bytes());
        }),
        Kind::Fp8 => {
            let scale = positive(amax(values) / E4M3_MAX);
            plain(values, rows, cols, Format::Fp8 { scale }, |v, out| out.push(codec::f32_to_e4m3(v / scale)))
        }
        Kind::Nvfp4 => nvfp4(values, rows, cols),
        Kind::Blocks(blocks) => panic!("{} is read, never written", blocks.name()),
    }
}

fn plain(
    values: &[f32],
    rows: usize,
    cols: usize,
    format: Format,
    encode: impl Fn(f32, &mut Vec<u8>),
) -> Linear {
    let mut data = Vec::with_capacity(format.kind().bytes(rows, cols));
    for &value in values {
        encode(value, &mut data);
    }
    Linear { rows, cols, format, data: data.into() }
}

fn nvfp4(values: &[f32], rows: usize, cols: usize) -> Linear {
    assert!(cols.is_multiple_of(NVFP4_BLOCK), "{cols} columns are not whole blocks of {NVFP4_BLOCK}");
    let global_scale = positive(amax(values) / (E2M1_MAX * E4M3_MAX));
    let mut data = Vec::with_capacity(values.len() / 2);
    let mut scales = Vec::with_capacity(values.len() / NVFP4_BLOCK);
    for block in values.chunks_exact(NVFP4_BLOCK) {
        let wanted = amax(block) / E2M1_MAX / global_scale;
        // A block of zeros gets scale 1: any would do, and 1 is what ModelOpt writes.
        let code = match wanted {
            0.0 => codec::f32_to_e4m3(1.0),
            wanted => codec::f32_to_e4m3(wanted.clamp(E4M3_MIN_POSITIVE, E4M3_MAX)),
        };
        scales.push(code);
        let scale = codec::e4m3_to_f32(code) * global_scale;
        for pair in block.chunks_exact(2) {
            data.push(codec::f32_to_e2m1(pair[0] / scale) | codec::f32_to_e2m1(pair[1] / scale) << 4);
        }
    }
    let format = Format::Nvfp4 { scales: Bytes::from(scales), global_scale };
    Linear { rows, cols, format, data: data.into() }
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// A scale to divide by; a tensor of zeros (or of values too small for a normal scale) takes 1.
fn positive(scale: f32) -> f32 {
    if scale.is_normal() { scale } else { 1.0 }
}

/// What quantising lost: `sqrt(sum (a-b)^2 / sum a^2)` and `max |a-b|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    pub relative_rms: f64,
    pub max: f32,
}

/// Compares `linear` with the `values` [rows, cols] that it was made from.
pub fn loss(values: &[f32], linear: &Linear) -> Loss {
    let mut row = vec![0.0; linear.cols];
    let (mut error, mut power, mut max) = (0f64, 0f64, 0f32);
    for (index, expected) in values.chunks_exact(linear.cols.max(1)).enumerate() {
        linear.row_f32(index, &mut row);
        for (&a, &b) in expected.iter().zip(&row) {
            let difference = a - b;
            error += (difference as f64).powi(2);
            power += (a as f64).powi(2);
            max = max.max(difference.abs());
        }
    }
    let relative_rms = if power > 0.0 { (error / power).sqrt() } else { 0.0 };
    Loss { relative_rms, max }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Weights whose blocks are within 2^-4 of the largest one, so that no block scale is subnormal.
    fn weights() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((-1.0f32..1.0, 0.06f32..1.0), 4 * 32).prop_map(|v| {
            let mut values: Vec<f32> = v.iter().map(|(value, _)| *value).collect();
            for (block, (_, size)) in values.chunks_exact_mut(16).zip(&v) {
                block[3] = *size;
            }
            values
        })
    }

    fn codes(linear: &Linear) -> (Bytes, Bytes) {
        match &linear.format {
            Format::Nvfp4 { scales, .. } => (linear.data.clone(), scales.clone()),
            _ => (linear.data.clone(), Bytes::new()),
        }
    }

    proptest! {
        #[test]
        fn quantising_what_was_quantised_changes_nothing(values in weights()) {
            for kind in [Kind::Nvfp4, Kind::Fp8, Kind::BF16, Kind::F16, Kind::F32] {
                let once = quantize(&values, 4, 32, kind);
                let twice = quantize(&once.to_f32(), 4, 32, kind);
                prop_assert_eq!(codes(&once), codes(&twice), "{:?}", kind);
            }
        }

        #[test]
        fn the_error_is_what_the_format_allows(values in weights()) {
            // Half a step next to the largest code, relative to it: E2M1 1 of 6 (its scale is off by up to 1/16
            // besides), E4M3 1 of 16.
            for (kind, bound) in [(Kind::Nvfp4, 1.0 / 6.0 + 1.0 / 16.0), (Kind::Fp8, 1.0 / 16.0), (Kind::BF16, 1.0 / 256.0)] {
                let linear = quantize(&values, 4, 32, kind);
                let read = linear.to_f32();
                for (block, read) in values.chunks_exact(16).zip(read.chunks_exact(16)) {
                    for (a, b) in block.iter().zip(read) {
                        prop_assert!((a - b).abs() <= bound * amax(block), "{:?}: {} became {}", kind, a, b);
                    }
                }
                prop_assert!(loss(&values, &linear).relative_rms < bound as f64);
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_scales_stay_usable() {
        for kind in [Kind::Nvfp4, Kind::Fp8] {
            let linear = quantize(&[0.0; 32], 2, 16, kind);
            assert_eq!(linear.to_f32(), [0.0; 32], "{kind:?}");
            assert_eq!(loss(&[0.0; 32], &linear), Loss { relative_rms: 0.0, max: 0.0 });
        }
        let mut one = [0.0; 32];
        // 2688 / 1024, so that the global scale is a power of two and nothing rounds.
        one[17] = -2.625;
        let linear = quantize(&one, 2, 16, Kind::Nvfp4);
        let Format::Nvfp4 { scales, global_scale } = &linear.format else { panic!("NVFP4 was asked for") };
        assert_eq!((scales[0], scales[1], *global_scale), (0x38, 0x7E, 1.0 / 1024.0));
        assert_eq!(linear.to_f32()[17], -2.625);
    }

    #[test]
    fn a_block_far_below_the_largest_keeps_a_positive_scale() {
        let mut values = [1e-6f32; 32];
        values[0] = 1.0;
        let Format::Nvfp4 { scales, .. } = quantize(&values, 1, 32, Kind::Nvfp4).format else {
            unreachable!()
        };
        assert_eq!(scales[1], 1, "the smallest E4M3 value, not zero");
    }
}
