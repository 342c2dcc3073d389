//! The scalar codecs: one code in, one exact `f32` out, and back with rounding to nearest, ties to even.
//!
//! Source: OCP 8-bit Floating Point Specification 1.0 (E4M3) and OCP Microscaling Formats 1.0 (E2M1).

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;
/// Largest E2M1 value.
pub const E2M1_MAX: f32 = 6.0;
/// Smallest positive E4M3 value, a subnormal: 2^-9.
pub const E4M3_MIN_POSITIVE: f32 = 1.0 / 512.0;

/// The eight magnitudes of E2M1; bit 3 of a code is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// E4M3 has no infinity: 0x7F and 0xFF are NaN, 0x7E is 448.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let sign = (code as u32 & 0x80) << 24;
    let exponent = (code >> 3 & 15) as u32;
    let mantissa = (code & 7) as u32;
    if code & 0x7F == 0x7F {
        return f32::from_bits(sign | 0x7FC0_0000);
    }
    if exponent == 0 {
        let magnitude = mantissa as f32 * E4M3_MIN_POSITIVE;
        return f32::from_bits(sign | magnitude.to_bits());
    }
    // The exponent's bias is 7 here and 127 in f32.
    f32::from_bits(sign | (exponent + 120) << 23 | mantissa << 20)
}

/// To nearest, ties to even, saturating at 448; NaN stays NaN.
pub fn f32_to_e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    if value.is_nan() {
        return sign | 0x7F;
    }
    if magnitude >= E4M3_MAX {
        return sign | 0x7E;
    }
    if magnitude < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; 8 of them is the smallest normal, whose code is 8 as well.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    // Round the f32 at its third mantissa bit; a carry runs into the exponent, as it should.
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_FFFF + (bits >> 20 & 1);
    let code = (rounded >> 20) - (120 << 3);
    sign | (code as u8).min(0x7E)
}

/// Only the low four bits of `code` are read.
pub const fn e2m1_to_f32(code: u8) -> f32 {
    let magnitude = E2M1[code as usize & 7];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// To nearest, ties to the even code, saturating at 6; NaN becomes 0, because E2M1 has none.
pub fn f32_to_e2m1(value: f32) -> u8 {
    let sign = (value.to_bits() >> 28) as u8 & 8;
    let code = match value.abs() {
        m if m.is_nan() => return 0,
        m if m <= 0.25 => 0,
        m if m < 0.75 => 1,
        m if m <= 1.25 => 2,
        m if m < 1.75 => 3,
        m if m <= 2.5 => 4,
        m if m < 3.5 => 5,
        m if m <= 5.0 => 6,
        _ => 7,
    };
    sign | code
}

/// The upper half of an `f32`; exact.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// To nearest, ties to even.
pub fn f32_to_bf16(value: f32) -> u16 {
    half::bf16::from_f32(value).to_bits()
}

/// IEEE half precision; exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// To nearest, ties to even; beyond 65504 infinity.
pub fn f32_to_f16(value: f32) -> u16 {
    half::f16::from_f32(value).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_the_specification() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x7E, 448.0),
            (0xB8, -1.0),
            (0x3C, 1.5),
        ] {
            assert_eq!(e4m3_to_f32(code), value, "code {code:#04x}");
        }
        assert!(e4m3_to_f32(0x7F).is_nan() && e4m3_to_f32(0xFF).is_nan());
    }

    #[test]
    fn every_e4m3_code_survives_the_round_trip() {
        for code in 0..=255u8 {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(code)), code, "code {code:#04x}");
        }
    }

    #[test]
    fn e4m3_rounds_to_nearest_even_between_all_neighbours() {
        for code in 0..0x7Eu8 {
            let (low, high) = (e4m3_to_f32(code), e4m3_to_f32(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(f32_to_e4m3(middle), even, "tie above {code:#04x}");
            assert_eq!(f32_to_e4m3(middle.next_down()), code, "below the tie above {code:#04x}");
            assert_eq!(f32_to_e4m3(middle.next_up()), code + 1, "above the tie above {code:#04x}");
            assert_eq!(f32_to_e4m3(-middle), even | 0x80);
        }
        assert_eq!(f32_to_e4m3(1e9), 0x7E);
        assert_eq!(f32_to_e4m3(f32::NEG_INFINITY), 0xFE);
        assert_eq!(f32_to_e4m3(f32::NAN) & 0x7F, 0x7F);
    }

    #[test]
    fn e2m1_round_trips_and_breaks_ties_to_even() {
        for code in 0..16u8 {
            assert_eq!(f32_to_e2m1(e2m1_to_f32(code)), code);
        }
        for code in 0..7u8 {
            let middle = (e2m1_to_f32(code) + e2m1_to_f32(code + 1)) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(f32_to_e2m1(middle), even, "tie above {code}");
            assert_eq!(f32_to_e2m1(middle.next_down()), code);
            assert_eq!(f32_to_e2m1(middle.next_up()), code + 1);
        }
        assert_eq!(f32_to_e2m1(-1e9), 15);
        assert_eq!(f32_to_e2m1(f32::NAN), 0);
    }

    #[test]
    fn sixteen_bit_codes_survive_the_round_trip() {
        for bits in 0..=u16::MAX {
            if !bf16_to_f32(bits).is_nan() {
                assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
            }
            if !f16_to_f32(bits).is_nan() {
                assert_eq!(f32_to_f16(f16_to_f32(bits)), bits);
            }
        }
    }
}
