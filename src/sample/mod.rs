//! Logits to ids. Its randomness is an argument: the same seed, position and logits give the same id.

/// How a request wants its ids drawn. Validated by its constructor in `api`; ranges as noted.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; else at least 0.01.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// (0, 1]
    pub top_p: f32,
    /// [0, 1]
    pub min_p: f32,
    /// > 0; over prompt and output ids. 1 is off.
    pub repetition_penalty: f32,
    /// [-2, 2]; over output ids.
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// (id, bias in [-100, 100]), sorted by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, every other id is masked.
    pub allowed_ids: Option<Vec<u32>>,
    pub seed: u64,
    /// Top log-probabilities wanted per token; None = none, Some(0) = only the chosen id's.
    pub logprobs: Option<u32>,
}
