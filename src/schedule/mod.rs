//! Who runs next: sequences, block tables, slots, chunks, drafts. A pure state machine: no clock, I/O or tensors.
//!
//! ```text
//! let mut inputs = scheduler.inputs();
//! scheduler.add(arrival)?;
//! while scheduler.plan(&mut inputs) {
//!     let logits = network.step(&inputs);
//!     // One outcome per share; the ids sampled for all of them lie in one list.
//!     for share in scheduler.shares() { outcomes.push(…) }
//!     scheduler.commit(&outcomes, &sampled);
//!     // If somebody drafts: the drafter reads what became certain, then goes on from its own output.
//!     let mut more = scheduler.plan_drafts(&mut draft_inputs, |id| …);
//!     while more { network.draft(&draft_inputs, &mut drafts); more = scheduler.take_drafts(&drafts, &mut draft_inputs); }
//! }
//! ```
//!
//! The policy:
//!
//! - **Classes.** Lower `priority` first. A sequence of a higher class takes the place of one of a lower class, which
//!   is *paused*: it keeps its slot and blocks and goes on later as if nothing had been. Within a class nobody
//!   overtakes, but for those who wait for another's checkpoint (below).
//! - **Decode first.** Every sequence that lacks one token gets it, then its drafts; what remains of the step's tokens
//!   goes to prompts, class by class, half of it to the oldest and the rest to all in equal parts, so that a long
//!   prompt delays neither who decodes nor a short prompt behind it.
//! - **Nothing is overcommitted.** A sequence starts when a slot and the blocks of its prompt are free, and takes
//!   further blocks as it grows. Free means: free, or held by the cache alone. When nothing is free, the last of the
//!   lowest class gives back all it has and waits; it is computed again later (*preemption*). The first of the
//!   highest class never has to, and the pool holds the longest sequence, so somebody always gets on.
//! - **Nothing is computed twice.** A prompt resumes at the deepest checkpoint that the [`cache`] has of it. While
//!   another sequence is reading the same beginning and will leave a deeper checkpoint there, it waits for that.

mod acceptance;
mod admit;
mod borders;
mod cache;
mod check;
mod costs;
mod depth;
mod draft;
mod ngram;
mod plan;
mod pool;
mod sequence;
mod trial;

use std::collections::{BTreeMap, HashMap};

use crate::model::Limits;

/// What a plan fills; engines name them through here.
pub use crate::backend::{DraftInputs, StepInputs};
pub use acceptance::{Acceptance, Drafter, Verdict};
pub use borders::{Prompt, checkpoint_positions};
pub use cache::{Cache, CacheConfig, Freed, Hit, Holdings, Prefix};
pub use costs::StepCosts;
pub use depth::{Candidate, Choice, Chooser, Speed};
pub use draft::{Advanced, Wanted};
pub use ngram::{GRAM_LEN, MATCH_MAX, Ngram};
pub use pool::{Pool, Pools};
pub use sequence::Arrival;
pub use trial::{trial_pass, trial_step};

use draft::{Drafting, Stepped};
use sequence::{Key, Resume, Sequence};

/// Tokens that the state of an ended sequence must be ahead of what is cached to be kept: it costs no copy.
const END_GAP: usize = 8;

/// How a scheduler is set up.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub limits: Limits,
    /// Sequences that may run at once; the limits may allow fewer.
    pub sequences_max: usize,
    /// States that the prefix cache may hold; 0 turns it off. They are places of the state pool, so
    /// `limits.slots` should have as many beyond `sequences_max`.
    pub checkpoints_max: usize,
    /// Bytes of one state and of one KV block: what the cache weighs tokens against.
    pub state_bytes: usize,
    pub block_bytes: usize,
    /// Tokens that two checkpoints of a prompt should at least be apart.
    pub checkpoint_gap: u32,
    /// Tokens without a border after which a checkpoint is made all the same.
    pub checkpoint_stride: u32,
}

impl Config {
    /// Without a prefix cache.
    pub fn new(limits: Limits, sequences_max: usize) -> Self {
        Self {
            limits,
            sequences_max,
            checkpoints_max: 0,
            state_bytes: 1,
            block_bytes: 1,
            checkpoint_gap: 64,
            checkpoint_stride: 4096,
        }
    }
}

/// The state of everyone who runs, is paused or waits.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    /// Sequences that may run at once.
    places: usize,
    pools: Pools,
    lanes: Pool,
    cache: Cache,
    /// Sequences that hold each block, and blocks that any holds: what is used and not merely cached.
    users: Vec<u32>,
    blocks_used: usize,
    /// Ordered by key.
    running: Vec<Sequence>,
    /// Hold what they held, and do not run.
    paused: BTreeMap<Key, Sequence>,
    /// Hold nothing.
    waiting: BTreeMap<Key, Sequence>,
    keys: HashMap<u64, Key>,
    arrivals: u64,
    /// The step planned last, until it is committed.
    shares: Vec<Share>,
    saves: Vec<Saving>,
    /// What the last step resumed from; held until the next plan, because the drafter reads it after the step.
    spent: Vec<Resume>,
    /// The step committed last, until the next plan.
    stepped: Vec<Stepped>,
    drafting: Vec<Drafting>,
    /// Scratch of the plan: tokens for each running sequence.
    quotas: Vec<usize>,
    /// Scratch of an admission.
    hit_blocks: Vec<u32>,
    counts: Counts,
}

/// What happened so far; only ever grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of prompts that were looked up, and those of them that were found.
    pub queried_tokens: u64,
    pub hit_tokens: u64,
    pub paused: u64,
    pub preempted: u64,
    pub copied_blocks: u64,
    pub checkpoints_made: u64,
}

/// A checkpoint that the planned or last step made. It goes to the cache with the next plan, when the drafter has
/// read what the state has, or when its sequence ends.
#[derive(Debug, Clone, Copy)]
struct Saving {
    id: u64,
    /// Index among the shares of the step.
    share: usize,
    /// Tokens of its sequence that it stands for; 0 if it is worth nothing after all.
    len: usize,
    place: u32,
}

/// A sequence's share of the planned step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub id: u64,
    /// Its tokens read by earlier steps or found in the cache.
    pub past: usize,
    /// Its tokens in this step; the last `drafts` of them may turn out wrong.
    pub count: usize,
    pub drafts: usize,
    /// Index of its first token in the step.
    pub first: usize,
    /// Its rows in the step's logits: `first_row .. first_row + rows`, for its last `rows` tokens of this step.
    pub first_row: usize,
    pub rows: usize,
    /// All its certain tokens are read after this step: its last `drafts + 1` rows predict the next ones.
    pub samples: bool,
    /// What the cache had of its prompt when it first started.
    pub cached: usize,
    /// Where it runs, unless a cancel has moved it since.
    index: usize,
}

/// What became of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A chunk was read and there is more to read.
    Advance,
    /// The next tokens: the accepted drafts and one more, at `first .. first + count` of the sampled ids.
    Tokens { first: usize, count: usize },
    /// The same, and the sequence is over: everything it held is free, or kept by the cache.
    End { first: usize, count: usize },
    /// The sequence is over because its numbers are wrong: nothing of this step is kept, nor anything cached that it
    /// came from, for whoever resumed there would fail as well.
    Fail,
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
    #[error("sequence {id} is here already")]
    Twice { id: u64 },
}

/// Where a cancelled sequence was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Waiting,
    /// It had run: it ran now, was paused, or waited to be computed again.
    Running,
    /// It had ended already, or never was.
    Unknown,
}

impl Scheduler {
    pub fn new(config: Config) -> Result<Self, Error> {
        let Config { limits, sequences_max, .. } = config;
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
        let mut config = config;
        config.checkpoints_max = config.checkpoints_max.min(limits.slots - 1);
        let places = sequences_max.min(limits.slots).min(limits.step_tokens).min(limits.logit_rows);
        let cache = Cache::new(CacheConfig {
            block_len: limits.block_len,
            blocks: limits.blocks,
            checkpoints_max: config.checkpoints_max,
            state_bytes: config.state_bytes,
            block_bytes: config.block_bytes,
        });
        Ok(Self {
            config,
            places,
            pools: Pools { slots: Pool::new(limits.slots as u32), blocks: Pool::new(limits.blocks as u32) },
            lanes: Pool::new(limits.lanes as u32),
            cache,
            users: vec![0; limits.blocks],
            blocks_used: 0,
            running: Vec::with_capacity(places + 1),
            paused: BTreeMap::new(),
            waiting: BTreeMap::new(),
            keys: HashMap::new(),
            arrivals: 0,
            shares: Vec::with_capacity(places),
            // Each has a place of its own.
            saves: Vec::with_capacity(limits.slots),
            spent: Vec::with_capacity(places),
            stepped: Vec::with_capacity(places),
            drafting: Vec::with_capacity(places),
            quotas: Vec::with_capacity(places),
            hit_blocks: Vec::with_capacity(limits.blocks),
            counts: Counts::default(),
        })
    }

    /// Empty inputs with room for any step of this scheduler, so that filling them never allocates, but for long tables
    /// of shared blocks: room for those is made at an admission.
    pub fn inputs(&self) -> StepInputs {
        let limits = &self.config.limits;
        StepInputs {
            tokens: Vec::with_capacity(limits.step_tokens),
            sequences: Vec::with_capacity(self.places),
            blocks: Vec::with_capacity(limits.blocks),
            logit_rows: Vec::with_capacity(limits.logit_rows),
            block_copies: Vec::with_capacity(self.places),
            saves: Vec::with_capacity(limits.slots),
        }
    }

    /// The same for the drafter's passes.
    pub fn draft_inputs(&self) -> DraftInputs {
        DraftInputs { step: self.inputs(), hidden: Vec::with_capacity(self.config.limits.step_tokens) }
    }

    /// Makes room in `inputs` for the tables of all who run, as long as they may become. Shared blocks stand in more
    /// than one, so together they may name more blocks than there are.
    fn make_room_for_tables(&self, inputs: &mut StepInputs) {
        let named = self.running.iter().map(|sequence| sequence.blocks.capacity()).sum();
        inputs.blocks.reserve(named);
    }

    /// Queues a sequence.
    pub fn add(&mut self, arrival: Arrival) -> Result<(), Error> {
        let (id, prompt, output) = (arrival.id, arrival.prompt.len(), arrival.max_tokens);
        let limit = self.len_limit();
        let got = prompt.saturating_add(output);
        if prompt == 0 || output == 0 {
            return Err(Error::Empty { id, prompt, output });
        }
        if got > limit {
            return Err(Error::TooLong { id, limit, got });
        }
        if self.keys.contains_key(&id) {
            return Err(Error::Twice { id });
        }
        self.arrivals += 1;
        let sequence = Sequence::new(arrival, self.arrivals, self.config.limits.drafts);
        self.keys.insert(id, sequence.key);
        self.waiting.insert(sequence.key, sequence);
        Ok(())
    }

    /// Forgets a sequence and frees what it holds, also while a step with it is planned and not committed: the
    /// places are given out again by the next plan at the earliest, and `commit` passes over it.
    pub fn cancel(&mut self, id: u64) -> Cancelled {
        let Some(key) = self.keys.remove(&id) else { return Cancelled::Unknown };
        if let Some(sequence) = self.waiting.remove(&key) {
            return if sequence.cached.is_some() { Cancelled::Running } else { Cancelled::Waiting };
        }
        let planned = self.shares.iter().any(|share| share.id == id);
        let sequence = match self.running.binary_search_by_key(&key, |sequence| sequence.key) {
            Ok(index) => Some(self.running.remove(index)),
            Err(_) => self.paused.remove(&key),
        };
        match sequence {
            // In a planned step its state is about to change, so it is worth nothing. The step still reads what it
            // resumes from; the next plan frees that.
            Some(mut sequence) if planned => {
                self.spent.extend(sequence.resume.take());
                self.give_back(&mut sequence);
            }
            Some(sequence) => self.retire(sequence),
            None => return Cancelled::Unknown,
        }
        Cancelled::Running
    }

    /// The shares of the planned step, in the order of `StepInputs::sequences`.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// All tokens of a share's sequence, prompt and output; empty if it was cancelled since the plan.
    pub fn tokens(&self, share: &Share) -> &[u32] {
        find(&self.running, share.id, share.index).map_or(&[], |index| &self.running[index].tokens)
    }

    /// The drafts that a share verifies; empty if it was cancelled since the plan.
    pub fn drafts(&self, share: &Share) -> &[u32] {
        find(&self.running, share.id, share.index).map_or(&[], |index| &self.running[index].drafts)
    }

    /// Takes in what became of the planned step: one outcome per share, in order. `sampled` holds the ids that the
    /// outcomes point into.
    ///
    /// Panics if the outcomes do not belong to the plan: another number of them, tokens for a share that does
    /// not sample, more than one beyond its drafts, or more than its length allows.
    pub fn commit(&mut self, outcomes: &[Outcome], sampled: &[u32]) {
        assert_eq!(outcomes.len(), self.shares.len(), "one outcome per share");
        self.stepped.clear();
        for saving in &mut self.saves {
            let sound = !matches!(outcomes[saving.share], Outcome::Fail | Outcome::Rewind);
            if !sound || !self.keys.contains_key(&saving.id) {
                // Nobody will ask for it: `keep_saves` gives its place back.
                saving.len = 0;
            }
        }
        let mut shares = std::mem::take(&mut self.shares);
        for (share, &outcome) in shares.iter().zip(outcomes) {
            // Without an index it was cancelled while the step ran.
            if let Some(index) = find(&self.running, share.id, share.index) {
                self.advance(index, share, outcome, sampled);
            }
        }
        shares.clear();
        self.shares = shares;
    }

    fn advance(&mut self, index: usize, share: &Share, outcome: Outcome, sampled: &[u32]) {
        let sequence = &mut self.running[index];
        let certain = share.count - share.drafts;
        sequence.drafts.clear();
        let ids = match outcome {
            Outcome::Fail => {
                let mut sequence = self.running.remove(index);
                self.keys.remove(&sequence.id);
                self.forget_past(&sequence);
                return self.give_back(&mut sequence);
            }
            Outcome::Rewind => return self.preempt(index),
            Outcome::Advance => &[][..],
            Outcome::Tokens { first, count } | Outcome::End { first, count } => {
                &sampled[first..first + count]
            }
        };
        let resumed = sequence.resume.take();
        self.spent.extend(resumed);
        sequence.past += certain;
        sequence.replay = 0;
        if let Some(accepted) = ids.len().checked_sub(1) {
            let id = share.id;
            assert!(share.samples, "sequence {id}: a token before its prompt was read");
            assert!(accepted <= share.drafts, "sequence {id}: more tokens than were verified");
            assert!(sequence.tokens.len() + ids.len() <= sequence.len_max, "sequence {id}: out of room");
            sequence.past += accepted;
            sequence.replay = accepted;
            sequence.tokens.extend_from_slice(ids);
            sequence.every_row = false;
        }
        let saved = resumed.map(|resume| resume.place);
        let stepped = Stepped { index, id: share.id, first: share.first, past: share.past, saved };
        if let Outcome::End { .. } = outcome {
            let sequence = self.running.remove(index);
            self.keys.remove(&sequence.id);
            self.retire(sequence);
        } else {
            self.stepped.push(stepped);
        }
    }

    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    pub fn paused_count(&self) -> usize {
        self.paused.len()
    }

    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.paused.is_empty()
    }

    pub fn slots(&self) -> &Pool {
        &self.pools.slots
    }

    pub fn blocks(&self) -> &Pool {
        &self.pools.blocks
    }

    /// Blocks that sequences hold; the cache may hold more.
    pub fn blocks_used(&self) -> usize {
        self.blocks_used
    }

    pub fn lanes(&self) -> &Pool {
        &self.lanes
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Sequences that can run at once.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Prompt and output of one sequence, in tokens, at most.
    pub fn len_limit(&self) -> usize {
        self.config.limits.blocks.saturating_mul(self.config.limits.block_len)
    }

    /// Forgets everything cached.
    pub fn clear_cache(&mut self) {
        self.cache.clear(&mut self.pools);
    }

    /// The end of a sequence whose numbers are sound: its state becomes a checkpoint.
    fn retire(&mut self, mut sequence: Sequence) {
        self.keep_saves(Some(&sequence));
        let len = sequence.committed();
        // Before its first step it has no state of its own.
        let has_state = sequence.resume.is_none() && len > 0 && self.config.checkpoints_max > 0;
        if has_state && len >= self.known(&sequence, len) + END_GAP {
            self.pools.slots.share(sequence.slot);
            self.keep(&sequence, len, sequence.slot);
        }
        self.give_back(&mut sequence);
    }

    /// Hands the checkpoints of the last step to the cache: all of them, or those of one sequence that has left.
    fn keep_saves(&mut self, only: Option<&Sequence>) {
        let mut saves = std::mem::take(&mut self.saves);
        saves.retain(|saving| {
            let sequence = match only {
                Some(sequence) if sequence.id != saving.id => return true,
                Some(sequence) => Some(sequence),
                None => None,
            };
            self.keep_one(saving, sequence);
            false
        });
        self.saves = saves;
    }

    fn keep_one(&mut self, saving: &Saving, sequence: Option<&Sequence>) {
        let Saving { id, len, place, .. } = *saving;
        if len == 0 {
            self.pools.slots.give_back(place);
            return;
        }
        match sequence {
            Some(sequence) => self.keep(sequence, len, place),
            None => match self.running.iter().position(|sequence| sequence.id == id) {
                Some(index) => {
                    let sequence = self.running.remove(index);
                    self.keep(&sequence, len, place);
                    self.running.insert(index, sequence);
                }
                None => {
                    self.pools.slots.give_back(place);
                }
            },
        }
    }

    /// Hands the state at `place` to the cache as that after the first `len` tokens of `sequence`.
    fn keep(&mut self, sequence: &Sequence, len: usize, place: u32) {
        // Entries of the drafter that are missing at the end make all before them useless to whoever resumes here.
        let drafter = sequence.drafter;
        let prefix = Prefix {
            salt: sequence.salt.as_ref(),
            tokens: &sequence.tokens[..len],
            blocks: &sequence.blocks[..len.div_ceil(self.config.limits.block_len)],
            place,
            drafted_from: if drafter.to >= len { drafter.from.min(len) } else { len },
        };
        self.cache.insert(prefix, &mut self.pools);
        self.counts.checkpoints_made += 1;
    }

    /// The length of the deepest checkpoint of the first `len` tokens of `sequence`.
    fn known(&mut self, sequence: &Sequence, len: usize) -> usize {
        let hit = self.cache.find(sequence.salt.as_deref(), &sequence.tokens, len, &mut self.hit_blocks);
        hit.map_or(0, |hit| hit.len)
    }

    /// Drops every checkpoint that a sequence's tokens begin with.
    fn forget_past(&mut self, sequence: &Sequence) {
        let (salt, tokens) = (sequence.salt.as_deref(), &sequence.tokens);
        while let Some(hit) = self.cache.find(salt, tokens, tokens.len(), &mut self.hit_blocks) {
            self.cache.forget(&hit, &mut self.pools);
        }
    }

    /// Notes that a sequence holds a block of the pool, as it now does.
    fn note_use(&mut self, block: u32) {
        let users = &mut self.users[block as usize];
        self.blocks_used += usize::from(*users == 0);
        *users += 1;
    }

    /// Gives back everything that a sequence holds.
    fn give_back(&mut self, sequence: &mut Sequence) {
        self.pools.slots.give_back(sequence.slot);
        for block in sequence.blocks.drain(..) {
            let users = &mut self.users[block as usize];
            *users -= 1;
            self.blocks_used -= usize::from(*users == 0);
            self.pools.blocks.give_back(block);
        }
        if let Some(lane) = sequence.lane.take() {
            self.lanes.give_back(lane);
        }
        if let Some(resume) = sequence.resume.take() {
            self.free(resume);
        }
    }
}

/// Where the sequence `id` runs, if it still does; `hint` is where it ran.
fn find(running: &[Sequence], id: u64, hint: usize) -> Option<usize> {
    if running.get(hint).is_some_and(|sequence| sequence.id == id) {
        return Some(hint);
    }
    running.iter().position(|sequence| sequence.id == id)
}

#[cfg(test)]
mod tests;
