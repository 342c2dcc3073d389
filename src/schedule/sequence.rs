//! One sequence as the scheduler sees it: its tokens, how far they are read, and what it holds.

use std::sync::Arc;

use crate::backend::BlockCopy;

/// Who goes first: the lower class, then who came first. A sequence keeps its key for life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub priority: i32,
    pub arrival: u64,
}

/// What a caller hands over.
#[derive(Debug, Clone, Default)]
pub struct Arrival {
    /// The caller's name for it.
    pub id: u64,
    /// Never empty.
    pub prompt: Vec<u32>,
    /// At least 1.
    pub max_tokens: usize,
    /// Logits are wanted for each token of the prompt: nothing of it may come from the cache.
    pub every_row: bool,
    /// Lower is served first.
    pub priority: i32,
    /// Only equal salts share what is cached.
    pub salt: Option<Arc<str>>,
    /// Lengths of the prompt's heads at which a turn ends, ascending.
    pub borders: Vec<u32>,
    /// Others with the same prompt are on their way: its whole prompt is worth a checkpoint.
    pub siblings: bool,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub id: u64,
    pub key: Key,
    pub salt: Option<Arc<str>>,
    /// The prompt, then the output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Prompt and longest output: `tokens` never grows beyond it.
    pub len_max: usize,
    /// Logits are wanted for every token until the first one is sampled.
    pub every_row: bool,
    pub siblings: bool,
    pub borders: Vec<u32>,
    /// Tokens that came from the cache when it first started.
    pub cached: Option<usize>,

    /// Tokens in state, lane and KV cache; less than `tokens.len()`.
    pub past: usize,
    /// Accepted drafts that are in the lane and not yet in the state: it stands at `past - replay`.
    pub replay: usize,
    /// Held unless it waits.
    pub slot: u32,
    pub lane: Option<u32>,
    /// Cover at least `past` tokens; empty while it waits.
    pub blocks: Vec<u32>,
    /// Until its first step is done.
    pub resume: Option<Resume>,
    /// Lengths at which its state is to be kept, the next one last.
    pub checkpoints: Vec<u32>,
    /// What the next step is to verify.
    pub drafts: Vec<u32>,
    pub drafter: DrafterCache,
}

/// What a sequence goes on from. The scheduler holds one count each on the place and on the block copied from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resume {
    pub place: u32,
    /// The partial block at the end of what was cached: its rest will be written, so it cannot be shared.
    pub copy: Option<BlockCopy>,
}

/// Which positions of a sequence the drafter has entries for: `from .. to`, never position 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DrafterCache {
    pub from: usize,
    pub to: usize,
}

impl Default for DrafterCache {
    fn default() -> Self {
        Self { from: 1, to: 1 }
    }
}

impl Sequence {
    pub fn new(arrival: Arrival, number: u64, drafts_max: usize) -> Self {
        let Arrival { id, prompt, max_tokens, every_row, priority, salt, borders, siblings } = arrival;
        Self {
            id,
            key: Key { priority, arrival: number },
            salt,
            prompt_len: prompt.len(),
            len_max: prompt.len() + max_tokens,
            tokens: prompt,
            every_row,
            siblings,
            borders,
            cached: None,
            past: 0,
            replay: 0,
            slot: 0,
            lane: None,
            blocks: Vec::new(),
            resume: None,
            checkpoints: Vec::new(),
            drafts: Vec::with_capacity(drafts_max),
            drafter: DrafterCache::default(),
        }
    }

    /// Tokens still to be read; at least 1 while it lives.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.past
    }

    /// It lacks one token: its next step samples.
    pub fn decodes(&self) -> bool {
        self.pending() == 1 && !self.every_row
    }

    /// The length that its state stands at between steps.
    pub fn committed(&self) -> usize {
        self.past - self.replay
    }

    /// Drafts that it can still use: each of them and the token after the last are within its length.
    pub fn drafts_useful(&self) -> usize {
        (self.len_max - self.tokens.len()).saturating_sub(1)
    }
}
