//! Philox4x32-10: a random function, not a random stream.
//!
//! The same key and counter always give the same words, so a draw needs no state that could be lost, shared or
//! advanced in another order. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

/// The four words that belong to `counter` under `key`.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const ROUNDS: usize = 10;
    for round in 0..ROUNDS {
        if round > 0 {
            // Weyl sequences of the golden ratio and of sqrt(3) - 1.
            key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
        }
        let (high_0, low_0) = multiply(0xd251_1f53, counter[0]);
        let (high_1, low_1) = multiply(0xcd9e_8d57, counter[2]);
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0];
    }
    counter
}

/// The number in [0, 1) that belongs to `position` under `seed`, with all 53 bits of an f64.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let [a, b, ..] = philox4x32([low(position), high(position), 0, 0], [low(seed), high(seed)]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn multiply(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    (high(product), low(product))
}

fn low(word: u64) -> u32 {
    word as u32
}

fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 publishes (tests/kat_vectors).
    #[test]
    fn known_answers() {
        let check = |counter, key, expected: [u32; 4]| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        check(
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        );
    }

    #[test]
    fn uniform_depends_on_each_half_of_seed_and_position() {
        let base = uniform(1, 1);
        for (seed, position) in [(2, 1), (1, 2), (1 | 1 << 40, 1), (1, 1 | 1 << 40)] {
            assert_ne!(uniform(seed, position), base);
        }
        assert_eq!(uniform(1, 1), base);
    }
}
