//! One bit between engines that share a machine: whether the one in front has something to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Whether an engine has sequences to serve. Clones share the bit: its engine sets it, those behind it read it
/// before each plan and take smaller chunks while it is set.
///
/// It is a hint and orders nothing: an engine behind that reads it a step late runs one large chunk too many.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<AtomicBool>);

impl Busy {
    pub fn set(&self, busy: bool) {
        self.0.store(busy, Relaxed);
    }

    pub fn is_busy(&self) -> bool {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_bit() {
        let (front, seen) = (Busy::default(), Busy::default());
        let behind = front.clone();
        assert!(!behind.is_busy());
        front.set(true);
        assert!(behind.is_busy() && !seen.is_busy());
        front.set(false);
        assert!(!behind.is_busy());
    }
}
