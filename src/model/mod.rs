//! The networks: one `forward` over [`crate::backend::Backend`], their configurations and their drafter.

pub mod config;
pub mod convert;
pub mod embedded;
pub mod fields;
mod forward;
pub mod gguf;
mod json;
pub mod load;
pub mod manifest;
pub mod names;
pub mod null;
pub mod plan;
pub mod presets;
pub mod quantization;
pub mod random;

pub use forward::{Model, ModelError};

use crate::backend::{DraftInputs, KvType, SsmType, StepInputs};

/// What the engine needs of a resident model: one step in, one row of logits per asked row out.
///
/// `Model<B>` answers it for every backend; tests answer it with a script.
pub trait Network: Send {
    /// Vocabulary size V: the width of a row of logits.
    fn vocab_size(&self) -> usize;

    /// What was allocated at start; a step that exceeds it is a caller's bug.
    fn limits(&self) -> &Limits;

    /// Runs one step and returns `[inputs.logit_rows.len(), V]` f32 logits, row-major, valid until the next step.
    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError>;

    /// Whether [`Self::draft`] can be asked.
    fn can_draft(&self) -> bool {
        false
    }

    /// Runs one pass of the drafter over hidden vectors of the last step (or of its own last pass) and puts the
    /// likeliest next id of each of `inputs.step.logit_rows` into `drafts`, which it clears first.
    fn draft(&mut self, _inputs: &DraftInputs, drafts: &mut Vec<u32>) -> Result<(), StepError> {
        drafts.clear();
        Ok(())
    }
}

/// Sizes fixed at start. Everything a step may touch is allocated from these once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of all sequences in one step (T).
    pub step_tokens: usize,
    /// Rows of logits one step may ask for.
    pub logit_rows: usize,
    /// Places in the state pool: of sequences, and of checkpoints.
    pub slots: usize,
    /// KV blocks in the pool, shared by all sequences.
    pub blocks: usize,
    /// Tokens per KV block.
    pub block_len: usize,
    /// Sequences whose drafts can be under way at once; 0: nobody drafts.
    pub lanes: usize,
    /// Drafts of one sequence in one step.
    pub drafts: usize,
    pub kv: KvType,
    pub ssm: SsmType,
}

/// A step that failed. Its sequences are lost; the engine and the other sequences go on unless `Device`.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("the logits of row {row} are not finite")]
    NotFinite { row: usize },
    #[error("the device failed: {0}")]
    Device(String),
}
