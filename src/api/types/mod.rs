//! JSON becomes a typed request here, once. Having one is the proof that it was validated.

mod chat;
mod completion;
pub mod content;
mod message;
mod refused;
mod sampling;
mod speculation;
mod steer;
mod tokenize;
mod tool;

pub use chat::ChatRequest;
pub use completion::{CompletionRequest, Prompt};
pub use sampling::{Common, StreamOptions};
pub use speculation::speculation;
pub use steer::Constraint;
pub use tokenize::{DetokenizeRequest, TokenizeInput, TokenizeRequest};
pub use tool::Forced;

use super::model::ModelInfo;
use serde_json::{Map, Value};
use std::time::Duration;

/// What validation looks at beside the request itself.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    pub model: &'a ModelInfo,
    pub options: &'a RequestOptions,
}

/// The server's flags that change how a request is read.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestOptions {
    /// `--max-logprobs`: the largest `top_logprobs`; `None` (-1) allows the whole vocabulary.
    pub max_logprobs: Option<u32>,
    /// `--default-chat-template-kwargs`: below the request's own.
    pub template_kwargs: Map<String, Value>,
    /// `--exclude-tools-when-tool-choice-none`
    pub hide_tools_when_none: bool,
    /// `--clamp-max-tokens`: a `max_tokens` beyond the context is cut instead of refused; a request's own
    /// `clamp_max_tokens` says so for itself.
    pub clamp_max_tokens: bool,
    /// `--return-tokens-as-token-ids`: the default of the request's field.
    pub tokens_as_ids: bool,
    /// `--trust-request-chat-template`
    pub trust_template: bool,
    /// `--enable-force-include-usage`: every stream ends with usage.
    pub force_usage: bool,
    /// `--anthropic-any-model`: a name that begins with `claude` and is nobody's stands for the front model.
    pub claude_names: bool,
    /// `--anthropic-default-thinking`: what `/v1/messages` does where the request has no `thinking`; true leaves it to
    /// the template.
    pub anthropic_thinking: bool,
    /// `--request-timeout`: for requests that give none of their own.
    pub timeout: Option<Duration>,
}

impl Default for RequestOptions {
    fn default() -> Self {
        Self {
            max_logprobs: Some(20),
            template_kwargs: Map::new(),
            hide_tools_when_none: false,
            clamp_max_tokens: false,
            tokens_as_ids: false,
            trust_template: false,
            force_usage: false,
            claude_names: true,
            anthropic_thinking: true,
            timeout: None,
        }
    }
}
