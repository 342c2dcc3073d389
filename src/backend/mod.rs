//! The `Backend` trait and who answers it.

#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "simt")]
pub mod simt;

/// All that varies from step to step: ragged tokens of many sequences.
///
/// The sequence's tokens stand at `tokens[first .. first + count]`; its KV blocks at
/// `blocks[first_block .. first_block + block_count]`, in order, covering at least `past + count` tokens.
/// A sequence with `past == 0` starts from the zero state: its slot's old content is never read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInputs {
    /// [T]
    pub tokens: Vec<u32>,
    pub sequences: Vec<SequenceInputs>,
    /// The block tables of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// Indices into `tokens` whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceInputs {
    /// Place in the state pool.
    pub slot: u32,
    /// Index of its first token of this step in `StepInputs::tokens`.
    pub first: u32,
    /// Its tokens in this step; at least 1.
    pub count: u32,
    /// Its tokens already in state and cache.
    pub past: u32,
    pub first_block: u32,
    pub block_count: u32,
}

impl StepInputs {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
        self.blocks.clear();
        self.logit_rows.clear();
    }
}
