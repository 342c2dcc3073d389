//! Maps by request id. Ids count up, so they spread by themselves; nobody outside chooses them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

pub(super) type ById<V> = HashMap<u64, V, BuildHasherDefault<IdHasher>>;

/// One multiplication, so that the high bits, which the map looks at first, differ too.
#[derive(Debug, Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_again() {
        let mut map = ById::default();
        (0..1000u64).for_each(|id| assert!(map.insert(id, id).is_none()));
        assert!((0..1000u64).all(|id| map.get(&id) == Some(&id)));
        assert_eq!(map.get(&1000), None);
    }
}
