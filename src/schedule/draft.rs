//! The drafter's passes behind a step: first over all that became certain, then over its own drafts.

use super::{DraftInputs, Scheduler, find};
use crate::backend::Hidden;

/// A sequence that the last step advanced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stepped {
    pub id: u64,
    /// Where it ran in the plan.
    pub index: usize,
    /// Index of its first token in the step.
    pub first: usize,
    /// Its tokens before the step.
    pub past: usize,
    /// The checkpoint that the step resumed from.
    pub saved: Option<u32>,
}

impl Stepped {
    /// The first position of the entries behind this step, where those the drafter has end at `to`.
    fn begin(&self, to: usize) -> usize {
        match self.saved {
            // The hidden vector before the step was kept with the checkpoint.
            Some(_) if to == self.past => self.past,
            _ => self.past + 1,
        }
    }
}

/// A sequence that is being drafted for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drafting {
    id: u64,
    index: usize,
    /// Drafts wanted after those it has.
    left: usize,
}

/// What a step left a sequence with.
#[derive(Debug, Clone, Copy)]
pub struct Advanced<'a> {
    pub id: u64,
    /// All of them, the one to be read next too.
    pub tokens: &'a [u32],
    /// Its tokens at most.
    pub len_max: usize,
    /// It lacks one token.
    pub decodes: bool,
    /// Drafts that it can use.
    pub drafts_useful: usize,
    /// Entries that the drafter's next pass has for it.
    pub entries: usize,
    /// With them the drafter has read all of it, or nearly so.
    pub remembered: bool,
}

/// What the engine wants of the drafter for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: its entries fall behind, and begin anew where it is wanted again.
    Nothing,
    /// Entries for what became certain, and so many drafts, which may be 0.
    Drafts(usize),
}

impl Scheduler {
    /// The sequences that the last step advanced and that still run.
    pub fn stepped(&self) -> impl Iterator<Item = Advanced<'_>> {
        self.stepped.iter().filter_map(|stepped| {
            let sequence = &self.running[find(&self.running, stepped.id, stepped.index)?];
            Some(Advanced {
                id: stepped.id,
                tokens: &sequence.tokens,
                len_max: sequence.len_max,
                decodes: sequence.decodes(),
                drafts_useful: sequence.drafts_useful(),
                entries: sequence.past - stepped.past,
                remembered: sequence.drafter.to == stepped.begin(sequence.drafter.to)
                    && sequence.drafter.from <= 1 + sequence.prompt_len / 8,
            })
        })
    }

    /// Drafts from elsewhere for a sequence that lacks one token. What does not fit its length is dropped.
    pub fn set_drafts(&mut self, id: u64, drafts: &[u32]) {
        let Some(key) = self.keys.get(&id) else { return };
        let Ok(index) = self.running.binary_search_by_key(key, |sequence| sequence.key) else { return };
        let sequence = &mut self.running[index];
        if sequence.decodes() {
            let count = drafts.len().min(sequence.drafts_useful()).min(self.config.limits.drafts);
            sequence.drafts.clear();
            sequence.drafts.extend_from_slice(&drafts[..count]);
        }
    }

    /// The drafts that the next step is to verify for `id`, to be cut by whoever knows better.
    pub fn drafts_mut(&mut self, id: u64) -> Option<&mut Vec<u32>> {
        let key = self.keys.get(&id)?;
        let index = self.running.binary_search_by_key(key, |sequence| sequence.key).ok()?;
        Some(&mut self.running[index].drafts)
    }

    /// Fills `inputs` with the first pass after a committed step: entries for what became certain. False if nobody
    /// wants any. The step's hidden vectors must still be there. `wanted` is asked about each sequence that the step advanced.
    pub fn plan_drafts(&mut self, inputs: &mut DraftInputs, mut wanted: impl FnMut(u64) -> Wanted) -> bool {
        inputs.step.clear();
        inputs.hidden.clear();
        self.drafting.clear();
        self.make_room_for_tables(&mut inputs.step);
        let stepped = std::mem::take(&mut self.stepped);
        for one in &stepped {
            let Some(index) = find(&self.running, one.id, one.index) else { continue };
            if let Wanted::Drafts(depth) = wanted(one.id) {
                self.put_entries(index, one, depth, inputs);
            }
        }
        self.stepped = stepped;
        !inputs.step.tokens.is_empty()
    }

    /// Takes the drafts of the pass planned last, one per row, and plans the next one; false if nobody wants more.
    pub fn take_drafts(&mut self, drafts: &[u32], inputs: &mut DraftInputs) -> bool {
        inputs.step.clear();
        inputs.hidden.clear();
        let mut drafting = std::mem::take(&mut self.drafting);
        let mut row = 0;
        drafting.retain_mut(|one| {
            let Some(&draft) = drafts.get(row) else { return false };
            row += 1;
            let Some(index) = find(&self.running, one.id, one.index) else { return false };
            self.running[index].drafts.push(draft);
            one.left -= 1;
            one.left > 0 && self.put_chained(index, draft, row as u32 - 1, inputs)
        });
        self.drafting = drafting;
        !inputs.step.tokens.is_empty()
    }

    /// Entries of one sequence for the tokens behind those it read before the step.
    fn put_entries(&mut self, index: usize, stepped: &Stepped, depth: usize, inputs: &mut DraftInputs) {
        let sequence = &mut self.running[index];
        let Stepped { first, past, saved, .. } = *stepped;
        // The token at `sequence.past` is known, and its hidden vector is that of the position before.
        let end = sequence.past + 1;
        let begin = stepped.begin(sequence.drafter.to);
        let room = self.config.limits.step_tokens - inputs.step.tokens.len();
        let covered = sequence.blocks.len() * self.config.limits.block_len;
        if end - begin > room || end > covered {
            return;
        }
        if sequence.drafter.to != begin {
            // What lies between was never drafted over: the drafter's memory begins anew.
            sequence.drafter.from = begin;
        }
        sequence.drafter.to = end;
        inputs.hidden.extend(saved.filter(|_| begin == past).map(Hidden::Saved));
        inputs
            .hidden
            .extend((past + 1..end).map(|position| Hidden::Step((first + position - past - 1) as u32)));
        let decodes = sequence.decodes();
        let depth =
            depth.min(sequence.drafts_useful()).min(self.config.limits.drafts).min(covered - sequence.past);
        let from = sequence.drafter.from;
        self.put_pass(index, begin, end, from, None, inputs);
        if decodes && depth > 0 && inputs.step.logit_rows.len() < self.config.limits.logit_rows {
            self.running[index].drafts.clear();
            inputs.step.logit_rows.push(inputs.step.tokens.len() as u32 - 1);
            self.drafting.push(Drafting { id: stepped.id, index, left: depth });
        }
    }

    /// One entry for the draft that was made last.
    fn put_chained(&mut self, index: usize, draft: u32, row: u32, inputs: &mut DraftInputs) -> bool {
        let sequence = &self.running[index];
        let position = sequence.past + sequence.drafts.len();
        let covered = sequence.blocks.len() * self.config.limits.block_len;
        if position >= covered || inputs.step.tokens.len() == self.config.limits.step_tokens {
            return false;
        }
        inputs.hidden.push(Hidden::Draft(row));
        let from = sequence.drafter.from;
        self.put_pass(index, position, position + 1, from, Some(draft), inputs);
        inputs.step.logit_rows.push(inputs.step.tokens.len() as u32 - 1);
        true
    }

    /// Positions `begin .. end` of a sequence: its own tokens, or `draft` for the only one.
    fn put_pass(
        &self,
        index: usize,
        begin: usize,
        end: usize,
        visible_from: usize,
        draft: Option<u32>,
        inputs: &mut DraftInputs,
    ) {
        let sequence = &self.running[index];
        let tokens = match &draft {
            Some(draft) => std::slice::from_ref(draft),
            None => &sequence.tokens[begin..end],
        };
        let blocks = &sequence.blocks[..end.div_ceil(self.config.limits.block_len)];
        let put = inputs.step.push(sequence.slot, begin, tokens.iter().copied(), blocks.iter().copied());
        put.visible_from = visible_from as u32;
    }
}
