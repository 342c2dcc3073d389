//! `POST /tokenize` and `/detokenize`, in vLLM's spelling and llama-server's (`content`).

use super::{Rules, chat, tool};
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::text::Chat;
use serde_json::{Map, Value};

#[derive(Debug, Clone)]
pub struct TokenizeRequest {
    pub input: TokenizeInput,
    /// The ids' own strings are wanted as well.
    pub token_strings: bool,
}

#[derive(Debug, Clone)]
pub enum TokenizeInput {
    Text { text: String, add_special_tokens: bool },
    Chat(Chat),
}

impl TokenizeRequest {
    pub fn read(body: &Map<String, Value>, rules: Rules) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        rules.model.resolve(fields.string("model")?)?;
        let input = if fields.get("messages").is_some() {
            let tools = tool::read(&fields, rules.options.hide_tools_when_none)?;
            TokenizeInput::Chat(chat::chat(&fields, tools.shown, rules)?)
        } else {
            // llama-server adds no special tokens unless asked.
            let (text, add) = match (fields.string("prompt")?, fields.string("content")?) {
                (Some(prompt), _) => (prompt, true),
                (None, Some(content)) => (content, fields.bool("add_special")?.unwrap_or(false)),
                (None, None) => return Err(fields.bad("prompt", "`prompt` or `messages` is required.")),
            };
            let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(add);
            TokenizeInput::Text { text: text.to_owned(), add_special_tokens }
        };
        Ok(Self { input, token_strings: fields.bool("return_token_strs")?.unwrap_or(false) })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct DetokenizeRequest {
    /// All inside the vocabulary.
    pub ids: Vec<u32>,
}

impl DetokenizeRequest {
    pub fn read(body: &Map<String, Value>, rules: Rules) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        rules.model.resolve(fields.string("model")?)?;
        fields.required("tokens")?;
        Ok(Self { ids: fields.ids("tokens", rules.model.vocab_size)?.unwrap_or_default() })
    }
}
