//! The networks: one `forward` over [`crate::backend::Backend`], their configurations and their drafter.

pub mod config;
pub mod convert;
pub mod embedded;
pub mod fields;
mod forward;
mod json;
pub mod load;
pub mod manifest;
pub mod names;
pub mod presets;
pub mod quantization;
pub mod random;

pub use forward::{Model, ModelError};

use crate::backend::StepInputs;

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
}

/// Sizes fixed at start. Everything a step may touch is allocated from these once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of all sequences in one step (T).
    pub step_tokens: usize,
    /// Rows of logits one step may ask for.
    pub logit_rows: usize,
    /// Places in the state pool: sequences that can be resident at once.
    pub slots: usize,
    /// KV blocks in the pool, shared by all sequences.
    pub blocks: usize,
    /// Tokens per KV block.
    pub block_len: usize,
}

/// A step that failed. Its sequences are lost; the engine and the other sequences go on unless `Device`.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("the logits of row {row} are not finite")]
    NotFinite { row: usize },
    #[error("the device failed: {0}")]
    Device(String),
}
