//! `POST /v1/completions`: prompts as text or ids, and nothing between them and the model.

use super::refused::refuse;
use super::sampling::{logprob_count, max_tokens};
use super::{Common, Constraint, Rules, steer};
use crate::api::error::ApiError;
use crate::api::fields::{Fields, token_id, wrong};
use serde_json::{Map, Value};

/// Prompts in one request.
const PROMPTS_MAX: usize = 1024;
/// OpenAI's default of this route.
const MAX_TOKENS_DEFAULT: usize = 16;

#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    pub common: Common,
    /// Never empty.
    pub prompts: Vec<Prompt>,
    pub echo: bool,
    pub add_special_tokens: bool,
    /// What each answer is to be.
    pub constraint: Option<Constraint>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Text(String),
    /// Not empty, all inside the vocabulary.
    Ids(Vec<u32>),
}

impl CompletionRequest {
    pub fn read(body: &Map<String, Value>, rules: Rules) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        refuse(&fields)?;
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(fields.bad("suffix", "`suffix` is not currently supported."));
        }
        if fields.integer("best_of", i64::MIN..=i64::MAX)?.is_some_and(|count| count != 1) {
            return Err(fields.bad("best_of", "`best_of` is only supported as 1."));
        }
        let echo = fields.bool("echo")?.unwrap_or(false);
        let max = max_tokens(&fields, "max_tokens", if echo { 0 } else { 1 }, rules)?;
        let max = max.unwrap_or(MAX_TOKENS_DEFAULT.min(rules.model.max_model_len));
        let logprobs = logprob_count(&fields, "logprobs", rules)?;
        let mut common = Common::read(&fields, rules, Some(max), logprobs)?;
        if echo && logprobs.is_some() {
            // The echoed prompt is scored like the answer.
            common.prompt_logprobs = common.prompt_logprobs.max(logprobs);
        }
        Ok(Self {
            common,
            prompts: prompts(&fields, rules.model.vocab_size)?,
            echo,
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true),
            constraint: steer::read(&fields)?,
        })
    }
}

/// A string, strings, ids, or lists of ids.
fn prompts(fields: &Fields, vocab_size: usize) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of such lists";
    let value = fields.required("prompt")?;
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(items) => items,
        other => return Err(wrong("prompt", EXPECTED, other)),
    };
    let ids = |items: &[Value], path: &str| {
        if items.is_empty() {
            return Err(ApiError::bad("prompt", format!("`{path}` must not be an empty list.")));
        }
        items.iter().map(|item| token_id(item, path, vocab_size)).collect::<Result<Vec<u32>, _>>()
    };
    if items.first().is_none_or(Value::is_number) {
        return Ok(vec![Prompt::Ids(ids(items, "prompt")?)]);
    }
    if items.len() > PROMPTS_MAX {
        let message = format!("`prompt` must hold at most {PROMPTS_MAX} prompts, got {}.", items.len());
        return Err(fields.bad("prompt", message));
    }
    items
        .iter()
        .enumerate()
        .map(|(index, item)| match item {
            Value::String(text) => Ok(Prompt::Text(text.clone())),
            Value::Array(items) => ids(items, &format!("prompt[{index}]")).map(Prompt::Ids),
            other => Err(wrong("prompt", EXPECTED, other)),
        })
        .collect()
}
