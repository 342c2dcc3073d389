//! One thread per resident model: takes requests, plans, runs, samples, sends events. Text never enters here.

use crate::sample::SamplingParams;

/// What a client asked, as ids and parameters.
#[derive(Debug, Clone)]
pub struct Request {
    /// The rendered prompt; never empty, shorter than the context.
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    /// Ids to generate at most; at least 1, and prompt + max_tokens fits the context.
    pub max_tokens: usize,
    /// Until so many ids are generated, stop ids have probability 0.
    pub min_tokens: usize,
    /// Ids that end the sequence: the checkpoint's stop set (unless `ignore_eos`) and the request's own.
    pub stop_ids: Vec<u32>,
    /// Log-probabilities of the prompt's own ids, with so many alternatives each.
    pub prompt_logprobs: Option<u32>,
}

/// What the engine sends back, in order: `Started`, any number of `Token`, one of `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt is prefilled. `cached_tokens` came from the prefix cache.
    Started {
        cached_tokens: usize,
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    Token {
        id: u32,
        logprobs: Option<TokenLogprobs>,
    },
    Finished(Finish),
    Failed(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop id was sampled; it was sent as the last `Token`.
    Stop { id: u32 },
    /// `max_tokens` or the context's end.
    Length,
}

/// Log-probabilities from the raw logits, natural logarithm.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// Best first.
    pub top: Vec<(u32, f32)>,
}
