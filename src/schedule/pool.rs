//! A fixed set of numbered places: state slots, or KV blocks.

/// Numbers `0 .. len`, each either free or taken. Taking and giving back allocate nothing.
#[derive(Debug, Clone)]
pub struct Pool {
    /// A stack: what was given back last is still warm in the caches.
    free: Vec<u32>,
    taken: Vec<bool>,
}

impl Pool {
    /// All `len` places are free; the lowest number is taken first.
    pub fn new(len: u32) -> Self {
        Self { free: (0..len).rev().collect(), taken: vec![false; len as usize] }
    }

    /// Places there are.
    pub fn len(&self) -> usize {
        self.taken.len()
    }

    pub fn is_empty(&self) -> bool {
        self.taken.is_empty()
    }

    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    pub fn taken_count(&self) -> usize {
        self.len() - self.free.len()
    }

    pub fn is_taken(&self, place: u32) -> bool {
        self.taken[place as usize]
    }

    /// `None` when all are taken.
    pub fn take(&mut self) -> Option<u32> {
        let place = self.free.pop()?;
        self.taken[place as usize] = true;
        Some(place)
    }

    /// Panics if the place was not taken: two sequences would then share it, and one would read the other's text.
    pub fn give_back(&mut self, place: u32) {
        assert!(std::mem::take(&mut self.taken[place as usize]), "place {place} was given back twice");
        self.free.push(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once() {
        let mut pool = Pool::new(2);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(0), Some(1), None));
        pool.give_back(0);
        assert_eq!((pool.free_count(), pool.taken_count(), pool.is_taken(1)), (1, 1, true));
        assert_eq!(pool.take(), Some(0));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_place_is_given_back_once() {
        let mut pool = Pool::new(1);
        pool.take();
        pool.give_back(0);
        pool.give_back(0);
    }
}
