//! Who starts, who is paused, who gives back what he has.

use super::cache::Hit;
use super::sequence::{DrafterCache, Key, Resume};
use super::{Prompt, Scheduler, Sequence, checkpoint_positions};
use crate::backend::BlockCopy;

impl Scheduler {
    /// Starts, resumes and pauses until nothing is left to do.
    pub(super) fn admit(&mut self) {
        // Waiting sequences up to here have been looked at; `None` when no further one is to be.
        let mut after = Some(Key { priority: i32::MIN, arrival: 0 });
        while let Some(key) = self.candidate(after) {
            if self.running.len() == self.places {
                let lowest = self.running.last().map_or(key, |sequence| sequence.key);
                if lowest.priority <= key.priority {
                    return;
                }
            }
            let started = match self.paused.remove(&key) {
                Some(sequence) => Start::Started(Box::new(sequence)),
                None => self.start(key),
            };
            match started {
                Start::Started(sequence) => self.run(*sequence),
                // Those behind it need not wait for what it waits for.
                Start::Waits => after = Some(key),
                // Nobody overtakes it; but the paused hold what is missing, so they go on.
                Start::NoRoom => after = None,
            }
        }
    }

    /// The first of all who are paused, or wait behind `after`.
    fn candidate(&self, after: Option<Key>) -> Option<Key> {
        use std::ops::Bound::{Excluded, Unbounded};
        let range = after.map(|after| (Excluded(after), Unbounded));
        let waiting = range.and_then(|range| self.waiting.range(range).next()).map(|(&key, _)| key);
        let paused = self.paused.first_key_value().map(|(&key, _)| key);
        match (waiting, paused) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Adds a sequence to the running ones; whoever is then one too many is paused.
    fn run(&mut self, sequence: Sequence) {
        let index = self.running.partition_point(|other| other.key < sequence.key);
        self.running.insert(index, sequence);
        if self.running.len() > self.places
            && let Some(mut last) = self.running.pop()
        {
            last.drafts.clear();
            // A lane is kept only for what is in it.
            if last.replay == 0
                && let Some(lane) = last.lane.take()
            {
                self.lanes.give_back(lane);
            }
            self.counts.paused += 1;
            self.paused.insert(last.key, last);
        }
    }

    /// Gives a waiting sequence a slot and blocks for all tokens it has.
    fn start(&mut self, key: Key) -> Start {
        let Some(next) = self.waiting.get(&key) else { return Start::Waits };
        let mut blocks = std::mem::take(&mut self.hit_blocks);
        // Rows of logits are wanted for its whole prompt: none of it can come from the cache.
        let mut hit = match next.every_row {
            true => None,
            false => {
                let limit = next.tokens.len() - 1;
                self.cache.find(next.salt.as_deref(), &next.tokens, limit, &mut blocks)
            }
        };
        if !next.every_row && self.will_be_cached(next, hit.map_or(0, |hit| hit.len)) {
            self.hit_blocks = blocks;
            return Start::Waits;
        }
        let mut resume = self.reserve(key, hit.as_ref(), &blocks);
        if resume.is_none() && hit.is_some() && self.running.is_empty() && self.paused.is_empty() {
            // What it would resume from leaves no room for its copy of the last block: then from the start.
            hit = None;
            resume = self.reserve(key, None, &blocks);
        }
        let started = match (resume, self.waiting.remove(&key)) {
            (Some(resume), Some(mut sequence)) => {
                self.equip(&mut sequence, hit.as_ref(), resume, &blocks);
                Start::Started(Box::new(sequence))
            }
            (_, waiting) => {
                self.waiting.extend(waiting.map(|sequence| (key, sequence)));
                Start::NoRoom
            }
        };
        self.hit_blocks = blocks;
        started
    }

    /// Sees that all is free that a start from `hit` takes, and holds what it resumes from; `None` if it cannot be.
    fn reserve(&mut self, key: Key, hit: Option<&Hit>, blocks: &[u32]) -> Option<Option<Resume>> {
        let shared = hit.map_or(0, |hit| hit.len / self.config.limits.block_len);
        let needed = self.blocks_to_start(self.waiting.get(&key)?) - shared;
        // Held at once, so that making room cannot drop what it is about to use.
        let resume = hit.map(|hit| self.hold(hit, blocks));
        if self.make_room(key, needed) {
            return Some(resume);
        }
        self.let_go(resume, &blocks[..shared]);
        None
    }

    /// Blocks for all tokens it has, the next one, and what the drafter adds.
    fn blocks_to_start(&self, sequence: &Sequence) -> usize {
        let end = sequence.tokens.len() + 1 + self.config.limits.drafts;
        end.min(sequence.len_max).div_ceil(self.config.limits.block_len)
    }

    /// Hands over what was reserved.
    fn equip(&mut self, sequence: &mut Sequence, hit: Option<&Hit>, resume: Option<Resume>, blocks: &[u32]) {
        let shared = hit.map_or(0, |hit| hit.len / self.config.limits.block_len);
        let fresh = self.blocks_to_start(sequence) - shared;
        sequence.slot = self.pools.slots.take().expect("make_room left a slot free");
        sequence.blocks.reserve_exact(sequence.len_max.div_ceil(self.config.limits.block_len));
        sequence.blocks.extend_from_slice(&blocks[..shared]);
        let taken = std::iter::from_fn(|| self.pools.blocks.take());
        sequence.blocks.extend(taken.take(fresh));
        for &block in &sequence.blocks {
            self.note_use(block);
        }
        sequence.resume = resume.map(|resume| Resume {
            copy: resume.copy.map(|copy| BlockCopy { to: sequence.blocks[shared], ..copy }),
            ..resume
        });
        self.begin(sequence, hit);
    }

    /// What a sequence knows when it starts.
    fn begin(&mut self, sequence: &mut Sequence, hit: Option<&Hit>) {
        let len = hit.map_or(0, |hit| hit.len);
        sequence.tokens.reserve_exact(sequence.len_max - sequence.tokens.len());
        sequence.past = len;
        sequence.replay = 0;
        sequence.drafter =
            hit.map_or(DrafterCache::default(), |hit| DrafterCache { from: hit.draft_from.max(1), to: len });
        if let Some(hit) = hit {
            self.cache.touch(hit);
        }
        if sequence.cached.is_none() {
            sequence.cached = Some(len);
            self.counts.queried_tokens += sequence.tokens.len() as u64;
            self.counts.hit_tokens += len as u64;
        }
        sequence.checkpoints.clear();
        if self.config.checkpoints_max > 0 {
            let prompt = Prompt {
                cached_len: len as u32,
                len: sequence.prompt_len as u32,
                borders: &sequence.borders,
                stride: self.config.checkpoint_stride,
                gap_min: self.config.checkpoint_gap,
                group: sequence.siblings,
            };
            checkpoint_positions(&prompt, &mut sequence.checkpoints);
            sequence.checkpoints.reverse();
        }
    }

    /// Whether somebody who runs is reading the same beginning and will leave a checkpoint deeper than `known`.
    fn will_be_cached(&self, next: &Sequence, known: usize) -> bool {
        let leaves = |leader: &&Sequence| {
            leader.key.priority <= next.key.priority
                && leader.past < leader.prompt_len
                && leader.salt == next.salt
        };
        self.running.iter().filter(leaves).any(|leader| {
            let limit = next.tokens.len() - 1;
            leader.checkpoints.iter().any(|&len| {
                let len = len as usize;
                len > known && len <= limit && leader.tokens[..len] == next.tokens[..len]
            })
        })
    }

    fn hold(&mut self, hit: &Hit, blocks: &[u32]) -> Resume {
        let block_len = self.config.limits.block_len;
        self.pools.slots.share(hit.place);
        for &block in blocks {
            self.pools.blocks.share(block);
        }
        let partial = (!hit.len.is_multiple_of(block_len)).then(|| blocks[hit.len / block_len]);
        Resume { place: hit.place, copy: partial.map(|from| BlockCopy { from, to: from }) }
    }

    fn let_go(&mut self, resume: Option<Resume>, shared: &[u32]) {
        for &block in shared {
            self.pools.blocks.give_back(block);
        }
        if let Some(resume) = resume {
            self.free(resume);
        }
    }

    pub(super) fn free(&mut self, resume: Resume) {
        self.pools.slots.give_back(resume.place);
        if let Some(copy) = resume.copy {
            self.pools.blocks.give_back(copy.from);
        }
    }

    /// Sees that a slot and `count` blocks are free, and a block more for each who runs, so that the start of one is not the
    /// preemption of another. The cache gives first, then lower classes. False if that is not enough.
    fn make_room(&mut self, key: Key, count: usize) -> bool {
        loop {
            // Without others there is no more to wait for, and the pool holds any sequence.
            let wanted = (count + self.running.len()).min(self.pools.blocks.len());
            if self.slot_free() && self.blocks_free(wanted) {
                return true;
            }
            if !self.preempt_below(key.priority) {
                return false;
            }
        }
    }

    /// Whether `count` blocks are free, or are now because the cache let go of what only it held.
    pub(super) fn blocks_free(&mut self, count: usize) -> bool {
        self.cache.make_room_for_blocks(count, &mut self.pools)
    }

    /// The same for a place in the state pool.
    pub(super) fn slot_free(&mut self) -> bool {
        self.cache.make_room_for_place(&mut self.pools)
    }

    /// Takes everything from the last of those below the class `priority`.
    fn preempt_below(&mut self, priority: i32) -> bool {
        let paused = self.paused.last_key_value().map(|(&key, _)| key);
        let running = self.running.last().map(|sequence| sequence.key);
        match paused.max(running) {
            Some(key) if key.priority > priority => self.preempt_key(key),
            _ => false,
        }
    }

    /// Takes everything from the last of all behind `key`, or from `key` itself if it is the last.
    /// False if that was itself.
    pub(super) fn preempt_last(&mut self, key: Key) -> bool {
        let paused = self.paused.last_key_value().map(|(&key, _)| key);
        let running = self.running.last().map(|sequence| sequence.key);
        let last = paused.max(running).unwrap_or(key);
        self.preempt_key(last);
        last != key
    }

    fn preempt_key(&mut self, key: Key) -> bool {
        if let Some(sequence) = self.paused.remove(&key) {
            self.wait_again(sequence);
            return true;
        }
        match self.running.binary_search_by_key(&key, |sequence| sequence.key) {
            Ok(index) => {
                self.preempt(index);
                true
            }
            Err(_) => false,
        }
    }

    pub(super) fn preempt(&mut self, index: usize) {
        let sequence = self.running.remove(index);
        self.wait_again(sequence);
    }

    /// Gives back what a sequence holds; its tokens stay, and it is computed again from them.
    fn wait_again(&mut self, mut sequence: Sequence) {
        self.counts.preempted += 1;
        self.give_back(&mut sequence);
        sequence.past = 0;
        sequence.replay = 0;
        sequence.drafts.clear();
        sequence.checkpoints.clear();
        self.waiting.insert(sequence.key, sequence);
    }
}

/// What came of trying to start a sequence.
enum Start {
    Started(Box<Sequence>),
    NoRoom,
    /// Another is about to cache what it needs.
    Waits,
}
