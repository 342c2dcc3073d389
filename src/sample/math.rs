//! Arithmetic over whole rows of logits, in loops that the compiler turns into vector code.

/// e to the power of `x`, for `x` at most 0; 0 below -87, where f32 would be subnormal. Within 2 ulp.
///
/// Our own, because the platform's differs from machine to machine in the last bit, which would make a seeded
/// draw depend on where it was made, and because a call per value cannot be vectorised.
pub fn exp(x: f32) -> f32 {
    const MIN: f32 = -87.0;
    /// Adding and subtracting 1.5 · 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has so few bits that its multiples are exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.max(MIN);
    let n = (bounded * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (bounded - n * LN_2_HIGH) - n * LN_2_LOW;
    // The series to r^7: for |r| at most ln 2 / 2 the next term is below 1e-8.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < MIN { 0.0 } else { sum * power }
}

/// The sum in f64, over eight running sums so that additions overlap. The order is fixed, hence the result.
pub fn sum(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let mut lanes = [0f64; 8];
    for (index, value) in values.enumerate() {
        lanes[index % 8] += f64::from(value);
    }
    lanes.iter().sum()
}

/// Compiles one portable body for the vector widths of x86 as well and calls the widest that this machine has.
/// Comparisons and bit tests give the same answer in any width.
macro_rules! wide {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($values:ident $(, $arg:ident: $ty:ty)*) -> $out:ty = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($values: &[f32] $(, $arg: $ty)*) -> $out {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx2")]
                fn avx512($values: &[f32] $(, $arg: $ty)*) -> $out {
                    $body($values $(, $arg)*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($values: &[f32] $(, $arg: $ty)*) -> $out {
                    $body($values $(, $arg)*)
                }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has just reported the features that the function is compiled for.
                    return unsafe { avx512($values $(, $arg)*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($values $(, $arg)*) };
                }
            }
            $body($values $(, $arg)*)
        }
    };
}

/// All its bits are set in what is infinite or not a number, and in nothing else.
const EXPONENT: u32 = 0x7f80_0000;

/// Values looked at side by side: two registers of the widest kind, so that additions overlap.
const LANES: usize = 32;

wide! {
    /// The greatest value; −∞ if there is none.
    pub fn max(values) -> f32 = max_body
}

#[inline(always)]
fn max_body(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

wide! {
    /// The greatest value of a row; `None` if one is infinite or not a number.
    pub fn finite_max(values) -> Option<f32> = finite_max_body
}

#[inline(always)]
fn finite_max_body(values: &[f32]) -> Option<f32> {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut odd = [0u32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for ((lane, odd), &value) in lanes.iter_mut().zip(&mut odd).zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
            *odd |= u32::from(value.to_bits() & EXPONENT == EXPONENT);
        }
    }
    let finite = odd.iter().all(|&odd| odd == 0) && all_finite(rest);
    finite.then(|| lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max))
}

/// The index of the greatest value, which is `best`; the lowest one of equals.
pub fn index_of(values: &[f32], best: f32) -> Option<u32> {
    find(values, best).map(|index| index as u32)
}

/// The index of the greatest value, the lowest one of equals; `None` if all are −∞.
pub fn argmax(values: &[f32]) -> Option<u32> {
    let best = max(values);
    let index = find(values, best)?;
    (best > f32::NEG_INFINITY).then_some(index as u32)
}

wide! {
    /// Where `wanted` stands first.
    fn find(values, wanted: f32) -> Option<usize> = find_body
}

#[inline(always)]
fn find_body(values: &[f32], wanted: f32) -> Option<usize> {
    // A loop that may end anywhere is not vectorised; one over a block is.
    let blocks = values.chunks(4 * LANES);
    let hit = |block: &&[f32]| block.iter().fold(false, |hit, &value| hit | (value == wanted));
    let (number, block) = blocks.enumerate().find(|(_, block)| hit(block))?;
    let within = block.iter().position(|&value| value == wanted)?;
    Some(number * 4 * LANES + within)
}

/// Neither infinite nor NaN, all of them.
#[inline(always)]
fn all_finite(values: &[f32]) -> bool {
    values.chunks(8 * LANES).all(|chunk| {
        let bad = chunk.iter().fold(0, |bad, value| bad | u32::from(value.to_bits() & EXPONENT == EXPONENT));
        bad == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for step in 0..=870_000 {
            let x = step as f32 * -1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error <= 2.0 * f64::from(f32::EPSILON), "exp({x}): relative error {error:e}");
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    /// The widest version that this machine has against the plain one, at every length around its lanes.
    #[test]
    fn wide_versions_answer_as_the_plain_ones() {
        let values: Vec<f32> = (0..300).map(|i| ((i * 7919) % 97) as f32 - 48.0).collect();
        for len in 0..values.len() {
            let values = &values[..len];
            assert_eq!(max(values), max_body(values), "{len}");
            assert_eq!(find(values, 31.0), find_body(values, 31.0), "{len}");
            assert_eq!(find(values, 31.0), values.iter().position(|&v| v == 31.0), "{len}");
            assert_eq!(finite_max(values), Some(max_body(values)), "{len}");
        }
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        let mut values = vec![1.0f32; 19];
        values[11] = 2.0;
        values[17] = 2.0;
        assert_eq!(argmax(&values), Some(11));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 9]), None);
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn one_bad_value_is_found_anywhere() {
        let mut values = vec![f32::MAX; 300];
        assert!(all_finite(&values));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[299] = bad;
            assert!(!all_finite(&values));
            assert_eq!(finite_max(&values), None);
            values.swap(299, 64);
            assert_eq!(finite_max(&values), None);
            values.swap(299, 64);
        }
    }

    #[test]
    fn sum_adds_each_once() {
        assert_eq!(sum((0..100).map(|v| v as f32)), 4950.0);
    }
}
