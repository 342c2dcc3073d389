//! Fixed sets of numbered places: state slots, and KV blocks.

/// What sequences and the prefix cache hold together.
#[derive(Debug, Clone)]
pub struct Pools {
    /// Places of states: of sequences, and of checkpoints.
    pub slots: Pool,
    /// KV blocks.
    pub blocks: Pool,
}

/// Numbers `0 .. len`, each either free or held, once or more often. Nothing is allocated after [`Pool::new`].
#[derive(Debug, Clone)]
pub struct Pool {
    /// A stack: what was given back last is still warm in the caches.
    free: Vec<u32>,
    /// Holders by place.
    counts: Vec<u32>,
}

impl Pool {
    /// All `len` places are free; the lowest number is taken first.
    pub fn new(len: u32) -> Self {
        Self { free: (0..len).rev().collect(), counts: vec![0; len as usize] }
    }

    /// Places there are.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    pub fn taken_count(&self) -> usize {
        self.len() - self.free.len()
    }

    pub fn is_taken(&self, place: u32) -> bool {
        self.count(place) > 0
    }

    /// Holders of a place; 0 if it is free.
    pub fn count(&self, place: u32) -> u32 {
        self.counts[place as usize]
    }

    /// Holders by place.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// A free place, held once from now on; `None` when all are taken.
    pub fn take(&mut self) -> Option<u32> {
        let place = self.free.pop()?;
        self.counts[place as usize] = 1;
        Some(place)
    }

    /// One holder more. Panics if the place is free: what it holds may be anything.
    pub fn share(&mut self, place: u32) {
        let count = &mut self.counts[place as usize];
        assert!(*count > 0, "place {place} was shared while free");
        *count += 1;
    }

    /// One holder less; true if it was the last one, and the place is free. Panics if the place was free before:
    /// two sequences would then get it, and one would read the other's text.
    pub fn give_back(&mut self, place: u32) -> bool {
        let count = &mut self.counts[place as usize];
        assert!(*count > 0, "place {place} was given back twice");
        *count -= 1;
        let freed = *count == 0;
        if freed {
            self.free.push(place);
        }
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once() {
        let mut pool = Pool::new(2);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(0), Some(1), None));
        assert!(pool.give_back(0));
        assert_eq!((pool.free_count(), pool.taken_count(), pool.is_taken(1)), (1, 1, true));
        assert_eq!(pool.take(), Some(0));
    }

    #[test]
    fn a_shared_place_is_free_when_its_last_holder_has_gone() {
        let mut pool = Pool::new(1);
        pool.take();
        pool.share(0);
        assert_eq!(pool.count(0), 2);
        assert!(!pool.give_back(0));
        assert_eq!((pool.count(0), pool.free_count(), pool.take()), (1, 0, None));
        assert!(pool.give_back(0));
        assert_eq!(pool.free_count(), 1);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_place_is_given_back_once() {
        let mut pool = Pool::new(1);
        pool.take();
        pool.give_back(0);
        pool.give_back(0);
    }

    #[test]
    #[should_panic(expected = "shared while free")]
    fn a_free_place_is_not_shared() {
        Pool::new(1).share(0);
    }
}
