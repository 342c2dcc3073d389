//! Names that nobody has used before: of requests, of tool calls; and the seeds of requests without one.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

/// Characters of an id that a client may choose.
const LABEL_CHARS_MAX: usize = 128;

/// Draws numbers that differ within a process and, being keyed by the system's entropy, between processes.
/// They are names, not secrets.
#[derive(Debug)]
pub struct IdSource {
    key: RandomState,
    count: AtomicU64,
    /// `--seed`: with it, the seeds (not the names) repeat from start to start.
    seed: Option<u64>,
    seeds_drawn: AtomicU64,
}

impl IdSource {
    pub fn new(seed: Option<u64>) -> Self {
        Self { key: RandomState::new(), count: AtomicU64::new(0), seed, seeds_drawn: AtomicU64::new(0) }
    }

    /// 24 hexadecimal digits.
    pub fn hex(&self) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let high = self.key.hash_one((count, 0));
        let low = self.key.hash_one((count, 1)) as u32;
        format!("{high:016x}{low:08x}")
    }

    /// `call_` and 24 hexadecimal digits.
    pub fn call(&self) -> String {
        format!("call_{}", self.hex())
    }

    /// Tells the answers to one prompt from those to another.
    pub fn group(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// The seed of a request that gave none.
    pub fn seed(&self) -> u64 {
        let count = self.seeds_drawn.fetch_add(1, Ordering::Relaxed);
        match self.seed {
            None => self.key.hash_one((count, 2)),
            Some(seed) => mix(seed ^ mix(count)),
        }
    }
}

/// One step of SplitMix64: neighbouring inputs give unrelated outputs.
/// Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Whether a client may call its request so: 1 to 128 visible ASCII characters.
pub fn is_label(text: &str) -> bool {
    (1..=LABEL_CHARS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_differ_and_have_the_documented_form() {
        let ids = IdSource::new(None);
        let drawn: HashSet<String> = (0..1000).map(|_| ids.call()).collect();
        assert_eq!(drawn.len(), 1000);
        assert!(drawn.iter().all(|id| id.len() == 29 && is_label(id)));
    }

    #[test]
    fn a_server_seed_makes_the_seeds_repeat() {
        let (one, two) = (IdSource::new(Some(7)), IdSource::new(Some(7)));
        let first: Vec<u64> = (0..4).map(|_| one.seed()).collect();
        assert_eq!(first, (0..4).map(|_| two.seed()).collect::<Vec<_>>());
        assert_eq!(first.iter().collect::<HashSet<_>>().len(), 4);
    }

    #[test]
    fn labels_are_short_and_visible() {
        assert!(is_label("req-1"));
        assert!(!is_label(""));
        assert!(!is_label("a b"));
        assert!(!is_label(&"x".repeat(129)));
    }
}
