//! One thread per resident model: takes requests, plans, runs, samples, sends events. Text never enters here.
//!
//! An engine is a value: [`start`] gives a [`Handle`] (cloned freely, used from any task) and a [`Runner`]
//! (joined once, by whoever owns the process). What a caller writes:
//!
//! ```text
//! let (handle, runner) = engine::start(config, |progress| load_model(progress));
//! let mut stream = handle.submit(request)?;            // a value when refused: loading, overloaded, too long …
//! while let Some(event) = stream.next().await { … }    // Started, Token …, then Finished or Failed
//! drop(stream);                                        // at any moment: cancels and frees everything
//! handle.shutdown(Duration::from_secs(5)).await;
//! ```

mod busy;
mod handle;
mod ids;
mod run;
mod sequence;
mod speculate;
mod stats;
pub mod trace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::model::Limits;
use crate::sample::{SamplingParams, Steering};

pub use crate::sample::TokenLogprobs;
pub use busy::Busy;
pub use handle::{Handle, LoadProgress, RequestStream, Runner, SubmitError};
pub use run::start;
pub use stats::{ACCEPTED_POSITIONS, Histogram, ITERATION_TOKENS_BOUNDS, Stats, VERIFY_TOKENS};
pub use trace::TraceWriter;

/// How one engine is run. What depends on the model (slots, blocks, tokens per step) is in its [`Limits`].
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Names the thread and the log lines.
    pub name: String,
    /// Requests that may wait for a place; one more is [`SubmitError::Overloaded`].
    pub queue_len: usize,
    /// Sequences that may run at once; the model's limits may allow fewer.
    pub max_sequences: usize,
    /// Prompt and output together, in tokens; the KV pool may allow less.
    pub context_len: usize,
    /// States that the prefix cache may hold, of the places that [`Limits`] has beyond the sequences'; 0: nothing
    /// is cached.
    pub checkpoints_max: usize,
    /// The most that a request may be given, whatever it asks for.
    pub speculation: Speculation,
    /// What one place of the state pool costs; the prefix cache weighs it against `block_bytes`.
    pub state_bytes: usize,
    /// What one KV block of all layers costs.
    pub block_bytes: usize,
    /// Set by this engine while it has sequences.
    pub busy: Busy,
    /// Of the engines before this one: while any is busy, a prompt is read in smaller chunks.
    pub in_front: Vec<Busy>,
    /// Where its steps are recorded.
    pub trace: Option<TraceWriter>,
}

impl Default for EngineConfig {
    /// 1024 waiting requests (the documented default of `--max-num-queued-reqs`), all that the model's limits allow;
    /// a state as costly as a block; nobody in front.
    fn default() -> Self {
        Self {
            name: "engine".into(),
            queue_len: 1024,
            max_sequences: usize::MAX,
            context_len: usize::MAX,
            checkpoints_max: usize::MAX,
            speculation: Speculation::default(),
            state_bytes: 1,
            block_bytes: 1,
            busy: Busy::default(),
            in_front: Vec::new(),
            trace: None,
        }
    }
}

/// What a client asked, as ids and parameters.
#[derive(Debug, Clone)]
pub struct Request {
    /// The rendered prompt; never empty, shorter than the context.
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    /// Rules for the ids themselves: a grammar, a budget for the thought.
    pub steering: Option<Steering>,
    /// Ids to generate at most; at least 1. What does not fit the context after the prompt is cut off, and
    /// the sequence then ends as [`Finish::Length`].
    pub max_tokens: usize,
    /// Until so many ids are generated, stop ids have probability 0.
    pub min_tokens: usize,
    /// Ids that end the sequence: the checkpoint's stop set (unless `ignore_eos`) and the request's own.
    pub stop_ids: Vec<u32>,
    /// Log-probabilities of the prompt's own ids, with so many alternatives each.
    pub prompt_logprobs: Option<u32>,
    /// Lower runs earlier, and makes higher ones wait if need be; 0 is the ordinary class.
    pub priority: i32,
    /// Only requests with the same salt share what the prefix cache holds.
    pub cache_salt: Option<Arc<str>>,
    /// Lengths of the prompt's heads at which a turn ends, ascending, each below its length: other prompts may
    /// well part from this one there, so the cache keeps the state.
    pub borders: Vec<u32>,
    /// Requests of one group have the same prompt: the others wait until the first has read it.
    pub group: Option<u64>,
    pub speculation: Speculation,
    /// When it fails with [`Failure::TimedOut`], whether it waits or runs.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Greedy or not as `sampling` says; everything else as if it was not asked for.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParams, max_tokens: usize) -> Self {
        Self {
            prompt,
            sampling,
            steering: None,
            max_tokens,
            min_tokens: 0,
            stop_ids: Vec::new(),
            prompt_logprobs: None,
            priority: 0,
            cache_salt: None,
            borders: Vec::new(),
            group: None,
            speculation: Speculation::default(),
            deadline: None,
        }
    }
}

/// How many tokens may be drafted ahead for a request. It changes when tokens come, never which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// Drafts per step at most; 0: none.
    pub depth_max: u32,
    /// The model's own draft head may propose.
    pub mtp: bool,
    /// What stood in the sequence before may propose.
    pub ngram: bool,
    /// Only so many as pay, by what was accepted and what verifying costs; else always all that fit.
    pub adaptive: bool,
}

impl Speculation {
    /// Drafts per step where nobody says how many: draft heads are trained for one to three, and where more would hardly gain,
    /// fewer are the safer choice.
    pub const DEPTH_DEFAULT: u32 = 3;

    /// Nothing is drafted.
    pub const OFF: Self = Self { depth_max: 0, mtp: false, ngram: false, adaptive: true };
}

impl Default for Speculation {
    /// All that the engine offers.
    fn default() -> Self {
        Self { depth_max: u32::MAX, mtp: true, ngram: true, adaptive: true }
    }
}

/// What the engine sends back, in order: `Started`, any number of `Token`, one of `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is prefilled. `cached_tokens` came from the prefix cache.
    /// `prompt_logprobs` has one entry per prompt id; the first is `None`, for nothing stands before it.
    /// `timings` are those so far (`decode` is zero): a reader that cancels gets no others.
    Started {
        cached_tokens: usize,
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
        timings: Timings,
    },
    Token {
        id: u32,
        logprobs: Option<TokenLogprobs>,
    },
    Finished {
        finish: Finish,
        timings: Timings,
    },
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop id was sampled, or the steering's text is complete with an id that is none; it was sent as the last
    /// `Token`.
    Stop { id: u32 },
    /// `max_tokens` or the context's end.
    Length,
}

/// Why a request that was accepted did not finish.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the model's logits are not finite; the sequence cannot go on")]
    NotFinite,
    #[error(
        "no id is allowed: the request's own rules (allowed ids, min_tokens, stop ids) exclude each other"
    )]
    NothingAllowed,
    #[error("the grammar of the answer could not be followed: its parser gave up")]
    Steering,
    #[error("the engine stopped: {0}")]
    Dead(String),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("all requests of this model were aborted")]
    Aborted,
    #[error("the deadline passed before the answer was complete")]
    TimedOut,
}

/// How long a request took: submitted → queue → first step → prefill → first id → decode → last id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    pub queue: Duration,
    pub prefill: Duration,
    pub decode: Duration,
    /// Tokens that were drafted and verified, and how many of them stayed.
    pub drafted: usize,
    pub accepted: usize,
}

/// Whether the engine can serve now. Read from atomics; never blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// `progress` in 0 … 1.
    Loading {
        progress: f32,
    },
    Ready,
    /// Accepts nothing more; finishes, or has finished, what it accepted.
    Draining,
    Dead(String),
}

/// What is known once the model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    pub vocab_size: usize,
    pub limits: Limits,
    /// Prompt and output together: the smaller of [`EngineConfig::context_len`] and the whole KV pool.
    pub context_len: usize,
    /// Sequences that can run at once.
    pub max_sequences: usize,
}
