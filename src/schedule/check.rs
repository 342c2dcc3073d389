//! The conservation laws, for simulations to check after every step.

use super::{Scheduler, Sequence};

impl Scheduler {
    /// Panics if a slot, block or lane is held by nobody and not free, or by more than are counted, or if a sequence
    /// is not in order.
    pub fn check(&self) {
        let mut slots = vec![0; self.pools.slots.len()];
        let mut blocks = vec![0; self.pools.blocks.len()];
        let mut lanes = vec![0; self.lanes.len()];
        for sequence in self.running.iter().chain(self.paused.values()) {
            self.check_sequence(sequence);
            slots[sequence.slot as usize] += 1;
            sequence.blocks.iter().for_each(|&block| blocks[block as usize] += 1);
            sequence.lane.iter().for_each(|&lane| lanes[lane as usize] += 1);
        }
        assert_eq!(self.users, blocks, "sequences that hold each block");
        assert_eq!(self.blocks_used, blocks.iter().filter(|&&users| users > 0).count(), "blocks used");
        let resumes = self.running.iter().chain(self.paused.values()).filter_map(|s| s.resume.as_ref());
        for resume in resumes.chain(&self.spent) {
            slots[resume.place as usize] += 1;
            resume.copy.iter().for_each(|copy| blocks[copy.from as usize] += 1);
        }
        self.saves.iter().for_each(|saving| slots[saving.place as usize] += 1);
        for (lane, &held) in lanes.iter().enumerate() {
            assert_eq!(self.lanes.count(lane as u32), held, "holders of lane {lane}");
        }
        self.cache.check(&self.pools, slots, blocks);

        assert!(self.running.len() <= self.places, "{} sequences run", self.running.len());
        assert!(self.running.is_sorted_by_key(|sequence| sequence.key), "running sequences are not in order");
        for sequence in self.waiting.values() {
            let holds = !sequence.blocks.is_empty() || sequence.lane.is_some() || sequence.resume.is_some();
            assert!(!holds && sequence.past == 0, "sequence {} waits and holds", sequence.id);
        }
        let known = self.running.len() + self.paused.len() + self.waiting.len();
        assert_eq!(self.keys.len(), known, "keys of sequences that are not there");
    }

    fn check_sequence(&self, sequence: &Sequence) {
        let Sequence { id, past, replay, len_max, .. } = *sequence;
        let covered = sequence.blocks.len() * self.config.limits.block_len;
        let len = sequence.tokens.len();
        assert!(past < len && len <= len_max, "sequence {id}: {past} of {len} tokens, at most {len_max}");
        assert!(past <= covered, "sequence {id}: {past} tokens in blocks for {covered}");
        assert!(replay == 0 || (sequence.lane.is_some() && replay < past), "sequence {id}: replays {replay}");
        let drafter = sequence.drafter;
        assert!(1 <= drafter.from && drafter.to <= len, "sequence {id}: the drafter has {drafter:?}");
    }
}
