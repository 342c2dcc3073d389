//! Who runs next: sequences, block tables, slots, chunks. A pure state machine: no clock, I/O or tensors.
//!
//! ```text
//! let mut inputs = scheduler.inputs();
//! scheduler.add(id, prompt, max_tokens, false)?;
//! while scheduler.plan(&mut inputs) {
//!     let logits = network.step(&inputs);
//!     outcomes.clear();
//!     for share in scheduler.shares() { outcomes.push(…) }   // one per share: Advance, Token, End or Rewind
//!     scheduler.commit(&outcomes);
//! }
//! ```
//!
//! The policy is first come, first served, in three rules:
//!
//! - **Decode first.** Every sequence that lacks one token gets it, so that a long prompt never holds back the
//!   others; what remains of the step's tokens goes to prompts, oldest first, in chunks.
//! - **Admission reserves everything.** A sequence starts only when a slot and all blocks for its prompt and its
//!   longest output are free, and they are its own until it ends. So nothing is ever overcommitted: a running
//!   sequence can always finish, and no preemption or deadlock exists. The price is that room asked for and not
//!   used stands empty.
//! - **Nobody overtakes.** While the oldest waiting request does not fit, none behind it starts; running
//!   sequences end, so it will fit, and everyone is served.
//!
//! No more sequences run than a step has tokens and rows of logits, so each of them advances in each step.

mod acceptance;
mod borders;
mod cache;
mod costs;
mod depth;
mod ngram;
mod pool;

use std::collections::VecDeque;

use crate::backend::SequenceInputs;
use crate::model::Limits;

/// What a plan fills; engines name it through here.
pub use crate::backend::StepInputs;
pub use acceptance::{Acceptance, Drafter, Verdict};
pub use borders::{Prompt, checkpoint_positions};
pub use cache::{Cache, CacheConfig, Freed, Hit, Holdings, Prefix};
pub use costs::StepCosts;
pub use depth::{Candidate, Choice, Chooser, Speed};
pub use ngram::{GRAM_LEN, MATCH_MAX, Ngram};
pub use pool::{Pool, Pools};

/// The state of everyone who runs or waits.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// Sequences that may run at once.
    places: usize,
    slots: Pool,
    blocks: Pool,
    /// In order of admission.
    running: Vec<Sequence>,
    /// In order of arrival.
    waiting: VecDeque<Sequence>,
    /// The step planned last, until it is committed.
    shares: Vec<Share>,
}

/// A sequence's share of the planned step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub id: u64,
    /// Its tokens read by earlier steps; 0 in its first step, and after it lost its state.
    pub past: usize,
    /// Its tokens in this step.
    pub count: usize,
    /// Its rows in the step's logits: `first_row .. first_row + rows`, for its last `rows` tokens of this step.
    pub first_row: usize,
    pub rows: usize,
    /// All its tokens are read after this step: its last row predicts the next one.
    pub samples: bool,
    /// Where it runs, unless a cancel has moved it since.
    index: usize,
}

/// What became of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A chunk was read and there is more to read.
    Advance,
    /// The next token; it is fed in the next step.
    Token(u32),
    /// The sequence is over, well or badly: everything it held is free.
    End,
    /// The step failed under it: its state is lost and computed again from its tokens.
    Rewind,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{name}: expected at least 1 and at most {}, got {got}", u32::MAX)]
    Limit { name: &'static str, got: usize },
    #[error(
        "sequence {id}: expected at least one token of prompt and one of output, got {prompt} and {output}"
    )]
    Empty { id: u64, prompt: usize, output: usize },
    #[error("sequence {id}: expected at most {limit} tokens of prompt and output, got {got}")]
    TooLong { id: u64, limit: usize, got: usize },
}

/// Where a cancelled sequence was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Waiting,
    Running,
    /// It had ended already, or never was.
    Unknown,
}

#[derive(Debug)]
struct Sequence {
    id: u64,
    /// The prompt, then the output.
    tokens: Vec<u32>,
    /// Tokens in state and cache; never more than `tokens.len()`.
    past: usize,
    /// Prompt and longest output: `tokens` never grows beyond it, and `blocks` covers it.
    len_max: usize,
    /// Logits are wanted for every token until the first one is sampled.
    every_row: bool,
    /// Meaningful while running.
    slot: u32,
    /// Empty while waiting.
    blocks: Vec<u32>,
    ended: bool,
}

impl Scheduler {
    /// At most `sequences_max` run at once, and no more than the limits allow.
    pub fn new(limits: Limits, sequences_max: usize) -> Result<Self, Error> {
        for (name, got) in [
            ("step_tokens", limits.step_tokens),
            ("logit_rows", limits.logit_rows),
            ("slots", limits.slots),
            ("blocks", limits.blocks),
            ("block_len", limits.block_len),
            ("max_sequences", sequences_max.min(limits.slots)),
        ] {
            if got == 0 || u32::try_from(got).is_err() {
                return Err(Error::Limit { name, got });
            }
        }
        let places = sequences_max.min(limits.slots).min(limits.step_tokens).min(limits.logit_rows);
        Ok(Self {
            limits,
            places,
            slots: Pool::new(limits.slots as u32),
            blocks: Pool::new(limits.blocks as u32),
            running: Vec::with_capacity(places),
            waiting: VecDeque::new(),
            shares: Vec::with_capacity(places),
        })
    }

    /// Empty inputs with room for any step of this scheduler, so that filling them never allocates.
    pub fn inputs(&self) -> StepInputs {
        StepInputs {
            tokens: Vec::with_capacity(self.limits.step_tokens),
            sequences: Vec::with_capacity(self.places),
            blocks: Vec::with_capacity(self.limits.blocks),
            logit_rows: Vec::with_capacity(self.limits.logit_rows),
            ..StepInputs::default()
        }
    }

    /// Queues a sequence. With `every_row`, logits are computed for each token of its prompt.
    pub fn add(
        &mut self,
        id: u64,
        prompt: Vec<u32>,
        max_tokens: usize,
        every_row: bool,
    ) -> Result<(), Error> {
        let limit = self.len_limit();
        let len_max = prompt.len().saturating_add(max_tokens);
        if prompt.is_empty() || max_tokens == 0 {
            return Err(Error::Empty { id, prompt: prompt.len(), output: max_tokens });
        }
        if len_max > limit {
            return Err(Error::TooLong { id, limit, got: len_max });
        }
        self.waiting.push_back(Sequence {
            id,
            tokens: prompt,
            past: 0,
            len_max,
            every_row,
            slot: 0,
            blocks: Vec::new(),
            ended: false,
        });
        Ok(())
    }

    /// Forgets a sequence and frees what it holds, also while a step with it is planned and not committed: the
    /// places are given out again by the next plan at the earliest, and `commit` passes over it.
    pub fn cancel(&mut self, id: u64) -> Cancelled {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(index);
            self.release(&sequence);
            return Cancelled::Running;
        }
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(index);
            return Cancelled::Waiting;
        }
        Cancelled::Unknown
    }

    /// Fills `inputs` with the next step; false if there is nothing to run. A plan that was not committed is
    /// forgotten. Allocates nothing for running sequences; an admission allocates its block table and room for
    /// its output, once.
    pub fn plan(&mut self, inputs: &mut StepInputs) -> bool {
        inputs.clear();
        self.shares.clear();
        let mut room = Room { tokens: self.limits.step_tokens, rows: self.limits.logit_rows };
        for pending_one in [true, false] {
            for (index, sequence) in self.running.iter().enumerate() {
                if (sequence.pending() == 1) == pending_one {
                    let chunk = sequence.chunk(room);
                    let share = sequence.put(chunk, index, self.limits.block_len, &mut room, inputs);
                    self.shares.extend(share);
                }
            }
        }
        while let Some(chunk) =
            self.waiting.front().map(|next| next.chunk(room)).filter(|chunk| chunk.count > 0)
        {
            if !self.admit() {
                break;
            }
            if let Some((index, sequence)) = self.running.iter().enumerate().next_back() {
                let share = sequence.put(chunk, index, self.limits.block_len, &mut room, inputs);
                self.shares.extend(share);
            }
        }
        debug_assert!(inputs.tokens.len() <= self.limits.step_tokens);
        debug_assert!(inputs.logit_rows.len() <= self.limits.logit_rows);
        !self.shares.is_empty()
    }

    /// The shares of the planned step, in the order of `StepInputs::sequences`.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// All tokens of a share's sequence, prompt and output; empty if it was cancelled since the plan.
    pub fn tokens(&self, share: &Share) -> &[u32] {
        find(&self.running, share).map_or(&[], |index| &self.running[index].tokens)
    }

    /// Takes in what became of the planned step: one outcome per share, in order.
    ///
    /// Panics if the outcomes do not belong to the plan: another number of them, a token for a share that does
    /// not sample, or one more token than was reserved.
    pub fn commit(&mut self, outcomes: &[Outcome]) {
        assert_eq!(outcomes.len(), self.shares.len(), "one outcome per share");
        for (share, outcome) in self.shares.iter().zip(outcomes) {
            let Some(index) = find(&self.running, share) else {
                continue; // Cancelled while the step ran.
            };
            let sequence = &mut self.running[index];
            match *outcome {
                Outcome::Advance => sequence.past += share.count,
                Outcome::Token(token) => {
                    assert!(share.samples, "sequence {}: a token before its prompt was read", share.id);
                    assert!(sequence.tokens.len() < sequence.len_max, "sequence {}: out of room", share.id);
                    sequence.past += share.count;
                    sequence.tokens.push(token);
                    sequence.every_row = false;
                }
                Outcome::End => sequence.ended = true,
                Outcome::Rewind => sequence.past = 0,
            }
        }
        self.shares.clear();
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].ended {
                let sequence = self.running.remove(index);
                self.release(&sequence);
            } else {
                index += 1;
            }
        }
    }

    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn slots(&self) -> &Pool {
        &self.slots
    }

    pub fn blocks(&self) -> &Pool {
        &self.blocks
    }

    /// Sequences that can run at once.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Prompt and output of one sequence, in tokens, at most.
    pub fn len_limit(&self) -> usize {
        self.limits.blocks.saturating_mul(self.limits.block_len)
    }

    /// The conservation laws: panics if a slot or block is held by nobody and not free, or by two.
    pub fn check(&self) {
        let mut slots = vec![false; self.slots.len()];
        let mut blocks = vec![false; self.blocks.len()];
        let mut held = 0;
        for sequence in &self.running {
            let Sequence { id, past, len_max, slot, .. } = *sequence;
            assert!(!std::mem::replace(&mut slots[slot as usize], true), "slot {slot} is held twice");
            assert!(self.slots.is_taken(slot), "slot {slot} is held by sequence {id} and free");
            for &block in &sequence.blocks {
                assert!(!std::mem::replace(&mut blocks[block as usize], true), "block {block} is held twice");
                assert!(self.blocks.is_taken(block), "block {block} is held by sequence {id} and free");
            }
            assert_eq!(sequence.blocks.len(), len_max.div_ceil(self.limits.block_len), "sequence {id}");
            assert!(past < sequence.tokens.len() && sequence.tokens.len() <= len_max, "sequence {id}");
            held += sequence.blocks.len();
        }
        assert!(self.running.len() <= self.places, "{} sequences run", self.running.len());
        assert_eq!(self.running.len() + self.slots.free_count(), self.slots.len(), "slots do not add up");
        assert_eq!(held + self.blocks.free_count(), self.blocks.len(), "blocks do not add up");
        for sequence in &self.waiting {
            assert!(sequence.blocks.is_empty() && sequence.past == 0, "sequence {} holds", sequence.id);
        }
    }

    /// Moves the oldest waiting sequence to the running ones if all it will ever need is free.
    fn admit(&mut self) -> bool {
        let Some(next) = self.waiting.front() else { return false };
        let needed = next.len_max.div_ceil(self.limits.block_len);
        if self.running.len() == self.places || self.blocks.free_count() < needed {
            return false;
        }
        let Some(slot) = self.slots.take() else { return false };
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        sequence.slot = slot;
        sequence.tokens.reserve_exact(sequence.len_max - sequence.tokens.len());
        sequence.blocks.reserve_exact(needed);
        sequence.blocks.extend((0..needed).map_while(|_| self.blocks.take()));
        debug_assert_eq!(sequence.blocks.len(), needed);
        self.running.push(sequence);
        true
    }

    fn release(&mut self, sequence: &Sequence) {
        self.slots.give_back(sequence.slot);
        for &block in &sequence.blocks {
            self.blocks.give_back(block);
        }
    }
}

/// Where a share's sequence runs now.
fn find(running: &[Sequence], share: &Share) -> Option<usize> {
    let stayed = running.get(share.index).is_some_and(|sequence| sequence.id == share.id);
    if stayed {
        return Some(share.index);
    }
    running.iter().position(|sequence| sequence.id == share.id)
}

/// What a step being planned can still take.
#[derive(Debug, Clone, Copy)]
struct Room {
    tokens: usize,
    rows: usize,
}

/// Tokens of one sequence in one step, and how many of the last of them get logits.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    count: usize,
    rows: usize,
}

impl Sequence {
    /// Tokens still to be read; at least 1 while it lives.
    fn pending(&self) -> usize {
        self.tokens.len() - self.past
    }

    /// As much as the room allows; `count` is 0 if that is nothing.
    fn chunk(&self, room: Room) -> Chunk {
        let pending = self.pending();
        let count = pending.min(room.tokens);
        if self.every_row {
            let count = count.min(room.rows);
            Chunk { count, rows: count }
        } else if count < pending {
            Chunk { count, rows: 0 }
        } else if room.rows == 0 {
            // The last token waits for a step that has a row for it.
            Chunk { count: count.saturating_sub(1), rows: 0 }
        } else {
            Chunk { count, rows: 1 }
        }
    }

    /// Writes the chunk into the step; nothing if the chunk is empty.
    fn put(
        &self,
        chunk: Chunk,
        index: usize,
        block_len: usize,
        room: &mut Room,
        inputs: &mut StepInputs,
    ) -> Option<Share> {
        let Chunk { count, rows } = chunk;
        if count == 0 {
            return None;
        }
        let end = self.past + count;
        let block_count = end.div_ceil(block_len);
        let first_row = inputs.logit_rows.len();
        // The casts hold: `Scheduler::new` refuses limits beyond u32.
        inputs.sequences.push(SequenceInputs {
            slot: self.slot,
            source: self.slot,
            first: inputs.tokens.len() as u32,
            count: count as u32,
            past: self.past as u32,
            first_block: inputs.blocks.len() as u32,
            block_count: block_count as u32,
            ..SequenceInputs::default()
        });
        inputs.tokens.extend_from_slice(&self.tokens[self.past..end]);
        inputs.blocks.extend_from_slice(&self.blocks[..block_count]);
        let step_end = inputs.tokens.len();
        inputs.logit_rows.extend((step_end - rows..step_end).map(|index| index as u32));
        room.tokens -= count;
        room.rows -= rows;
        let samples = end == self.tokens.len();
        Some(Share { id: self.id, past: self.past, count, first_row, rows, samples, index })
    }
}

#[cfg(test)]
mod tests;
