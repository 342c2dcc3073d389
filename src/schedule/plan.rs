//! What one step holds: tokens for each who runs, in the order in which they are served.

use super::{Saving, Scheduler, Sequence, Share, StepInputs};
use crate::backend::Save;

/// A prompt's part of a step is at least this long if it has so much left and the step has room: shorter ones cost more in
/// steps than they gain in fairness.
const CHUNK_MIN: usize = 16;

/// While a higher class runs, lower ones read their prompts in steps this many times shorter: the length of a step is
/// what the higher class waits for between its tokens.
const YIELD: usize = 4;

/// What a step being planned can still take.
#[derive(Debug, Clone, Copy)]
struct Room {
    tokens: usize,
    rows: usize,
}

impl Scheduler {
    /// Fills `inputs` with the next step; false if there is nothing to run. A plan that was not committed is
    /// forgotten. Allocates nothing for running sequences; an admission allocates its block table and room for
    /// its output, once.
    pub fn plan(&mut self, inputs: &mut StepInputs) -> bool {
        self.plan_within(inputs, usize::MAX)
    }

    /// The same in a step of at most `tokens` tokens, though never fewer than who runs.
    pub fn plan_within(&mut self, inputs: &mut StepInputs, tokens: usize) -> bool {
        inputs.clear();
        self.forget_plan();
        self.keep_saves(None);
        while let Some(resume) = self.spent.pop() {
            self.free(resume);
        }
        self.admit();
        self.make_room_for_tables(inputs);
        self.grow();
        let mut room = Room {
            tokens: self.config.limits.step_tokens.min(tokens.max(self.running.len())),
            rows: self.config.limits.logit_rows,
        };
        self.put_decodes(&mut room, inputs);
        self.put_prompts(&mut room, inputs);
        debug_assert!(inputs.tokens.len() <= self.config.limits.step_tokens);
        debug_assert!(inputs.logit_rows.len() <= self.config.limits.logit_rows);
        !self.shares.is_empty()
    }

    /// A step that was planned and never committed leaves its checkpoints' places.
    fn forget_plan(&mut self) {
        if !self.shares.is_empty() {
            self.shares.clear();
            for saving in &mut self.saves {
                saving.len = 0;
            }
        }
    }

    /// Sees that everyone who decodes has a block for its next token. The last of the lowest class pays if need be.
    fn grow(&mut self) {
        let block_len = self.config.limits.block_len;
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &self.running[index];
            let key = sequence.key;
            if sequence.past < sequence.blocks.len() * block_len || !sequence.decodes() {
                index += 1;
            } else if self.blocks_free(1) {
                self.extend(index);
                index += 1;
            } else if !self.preempt_last(key) {
                // It was the last itself; nobody stands behind it.
                return;
            }
        }
    }

    fn extend(&mut self, index: usize) {
        let block = self.pools.blocks.take().expect("blocks_free left a block free");
        self.running[index].blocks.push(block);
        self.note_use(block);
    }

    /// Blocks for positions up to `end`, as far as that preempts nobody. Gives the end that is covered.
    fn cover(&mut self, index: usize, end: usize) -> usize {
        let block_len = self.config.limits.block_len;
        let needed = end.min(self.running[index].len_max).div_ceil(block_len);
        while self.running[index].blocks.len() < needed && self.blocks_free(1) {
            self.extend(index);
        }
        self.running[index].blocks.len() * block_len
    }

    /// One token each for all who lack one, and their drafts as far as there is room.
    fn put_decodes(&mut self, room: &mut Room, inputs: &mut StepInputs) {
        let decodes = self.running.iter().filter(|sequence| sequence.decodes()).count();
        // Everyone who runs gets its token and its row before anybody's drafts do.
        let mut spare = (room.tokens - self.running.len()).min(room.rows - self.running.len());
        if decodes == 0 {
            spare = 0;
        }
        for index in 0..self.running.len() {
            if self.running[index].decodes() {
                let drafts = self.prepare_drafts(index, spare);
                spare -= drafts;
                self.put(index, 1 + drafts, drafts, 1 + drafts, room, inputs);
            }
        }
    }

    /// Cuts the drafts of a sequence to what can be verified and gives it what that needs.
    fn prepare_drafts(&mut self, index: usize, spare: usize) -> usize {
        let sequence = &self.running[index];
        let wanted =
            sequence.drafts.len().min(spare).min(sequence.drafts_useful()).min(self.config.limits.drafts);
        let past = sequence.past;
        let mut drafts = wanted;
        if wanted > 0 {
            // The drafter goes on behind what is verified.
            let end = self.cover(index, past + 1 + wanted + self.config.limits.drafts);
            drafts = wanted.min(end - past - 1);
            if self.running[index].lane.is_none() {
                self.running[index].lane = self.lanes.take();
            }
            if self.running[index].lane.is_none() {
                drafts = 0;
            }
        }
        self.running[index].drafts.truncate(drafts);
        drafts
    }

    /// Prompts, class by class: half of what is left to the oldest, the rest to all of the class in equal parts.
    fn put_prompts(&mut self, room: &mut Room, inputs: &mut StepInputs) {
        let highest = self.running.first().map_or(0, |sequence| sequence.key.priority);
        let mut first = 0;
        while first < self.running.len() {
            let class = self.running[first].key.priority;
            let count = self.running[first..].partition_point(|sequence| sequence.key.priority == class);
            let behind = class > highest;
            let tokens =
                if behind { room.tokens.min(self.config.limits.step_tokens / YIELD) } else { room.tokens };
            self.divide(first..first + count, tokens, room.rows);
            for offset in 0..count {
                let (index, quota) = (first + offset, self.quotas[offset]);
                if !self.running[index].decodes() && quota > 0 {
                    self.put_chunk(index, quota, room, inputs);
                }
            }
            first += count;
        }
    }

    /// Fills `quotas` with tokens for each of a class's prompts.
    fn divide(&mut self, class: std::ops::Range<usize>, mut tokens: usize, rows: usize) {
        self.quotas.clear();
        let needs = |sequence: &Sequence| match sequence {
            decoding if decoding.decodes() => 0,
            // Each of its tokens needs a row.
            sequence if sequence.every_row => sequence.pending().min(rows),
            sequence => sequence.pending(),
        };
        let members = &self.running[class];
        self.quotas.resize(members.len(), 0);
        if let Some(oldest) = members.iter().position(|sequence| needs(sequence) > 0) {
            let most = tokens.div_ceil(2).max(CHUNK_MIN.min(tokens));
            self.quotas[oldest] = needs(&members[oldest]).min(most);
            tokens -= self.quotas[oldest];
        }
        loop {
            let hungry = members.iter().zip(&self.quotas).filter(|(s, quota)| needs(s) > **quota).count();
            if hungry == 0 || tokens == 0 {
                return;
            }
            let part = (tokens / hungry).max(CHUNK_MIN);
            // From the youngest: the oldest have had their part.
            for (sequence, quota) in members.iter().zip(&mut self.quotas).rev() {
                let more = (needs(sequence) - *quota).min(part).min(tokens);
                *quota += more;
                tokens -= more;
            }
        }
    }

    fn put_chunk(&mut self, index: usize, quota: usize, room: &mut Room, inputs: &mut StepInputs) {
        let sequence = &self.running[index];
        let pending = sequence.pending();
        let count = pending.min(quota).min(room.tokens);
        let (count, rows) = if sequence.every_row {
            let count = count.min(room.rows);
            (count, count)
        } else if count < pending {
            (count, 0)
        } else if room.rows == 0 {
            // The last token waits for a step that has a row for it.
            (count - 1, 0)
        } else {
            (count, 1)
        };
        if count > 0 {
            self.put(index, count, 0, rows, room, inputs);
        }
    }

    /// Writes a share into the step: `count` tokens of which the last `drafts` are drafts.
    fn put(
        &mut self,
        index: usize,
        count: usize,
        drafts: usize,
        rows: usize,
        room: &mut Room,
        inputs: &mut StepInputs,
    ) {
        let number = self.shares.len();
        self.plan_saves(index, count - drafts, number, inputs);
        let sequence = &mut self.running[index];
        let (past, end) = (sequence.past, sequence.past + count);
        let (first, first_row) = (inputs.tokens.len(), inputs.logit_rows.len());
        let source = sequence.resume.map_or(sequence.slot, |resume| resume.place);
        if let Some(copy) = sequence.resume.and_then(|resume| resume.copy) {
            inputs.block_copies.push(copy);
            self.counts.copied_blocks += 1;
        }
        // The casts hold: `Scheduler::new` refuses limits beyond u32.
        let tokens = sequence.tokens[past..end - drafts].iter().chain(&sequence.drafts[..drafts]).copied();
        let blocks = sequence.blocks[..end.div_ceil(self.config.limits.block_len)].iter().copied();
        // The casts hold, here and there: `Scheduler::new` refuses limits beyond u32.
        let put = inputs.push(sequence.slot, past, tokens, blocks);
        put.source = source;
        put.lane = sequence.lane.unwrap_or(0);
        put.replay = sequence.replay as u32;
        put.drafts = drafts as u32;
        let step_end = inputs.tokens.len();
        inputs.logit_rows.extend((step_end - rows..step_end).map(|index| index as u32));
        room.tokens -= count;
        room.rows -= rows;
        self.shares.push(Share {
            id: sequence.id,
            past,
            count,
            drafts,
            first,
            first_row,
            rows,
            samples: end - drafts == sequence.tokens.len(),
            cached: sequence.cached.unwrap_or(0),
            index,
        });
    }

    /// Checkpoints that fall into the next `certain` tokens of a sequence, as far as the cache has places for them.
    fn plan_saves(&mut self, index: usize, certain: usize, share: usize, inputs: &mut StepInputs) {
        let past = self.running[index].past;
        while let Some(&len) = self.running[index].checkpoints.last() {
            let len = len as usize;
            if len > past + certain {
                return;
            }
            self.running[index].checkpoints.pop();
            let sequence = &self.running[index];
            let hit = self.cache.find(sequence.salt.as_deref(), &sequence.tokens, len, &mut self.hit_blocks);
            if len <= past || hit.is_some_and(|hit| hit.len == len) || !self.slot_free() {
                continue;
            }
            let Some(place) = self.pools.slots.take() else { continue };
            inputs.saves.push(Save { sequence: share as u32, after: (len - past) as u32, to: place });
            self.saves.push(Saving { id: self.running[index].id, share, len, place });
        }
    }
}
