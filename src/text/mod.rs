//! Text to ids and ids to text: tokenizer, chat template, detokeniser, reasoning, tool calls, stop strings. Pure: no
//! async, no files; the clock is read only for `strftime_now`.
//!
//! ```text
//! let text = Text::load(files)?;
//! let ids = text.prompt(&chat)?;                                   // chat → ids
//! let starts_in_reasoning = text.starts_in_reasoning(&ids);
//! let mut decoder = text.decoder(DecoderOptions { .. });           // ids → deltas, see [`Decoder`]
//! ```

mod calls;
mod chat;
mod decoder;
mod error;
mod fold;
mod guard;
pub mod json;
mod markup;
mod python;
mod schema;
mod split;
mod stop;
mod template;
mod utf8;
mod vocabulary;

use std::sync::Arc;

use jiff::Zoned;
use serde_json::{Map, Value};

pub use calls::{CallForm, CallGrammar, Detail};
pub use chat::{Chat, Message, ToolCall};
pub use decoder::{Decoder, DecoderOptions, Mode};
pub use error::Error;
pub use fold::{Answer, Call, Fold};

use decoder::TagIds;
use guard::{Guard, Pieces};
use markup::Tag;
use template::Template;
use vocabulary::Vocabulary;

/// A tool as the decoder needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    pub name: String,
    /// JSON schema of the arguments object.
    pub parameters: Option<Value>,
}

/// A piece of an answer. Reasoning comes before content; one call ends before the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    Reasoning(String),
    Content(String),
    /// `index` counts the calls of an answer from 0.
    CallStart {
        index: usize,
        name: String,
    },
    /// The pieces of one index, joined, are a JSON object.
    CallArguments {
        index: usize,
        json: String,
    },
    CallEnd {
        index: usize,
    },
}

/// The files of a checkpoint that concern text, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct TextFiles<'a> {
    pub tokenizer_json: &'a [u8],
    pub tokenizer_config: Option<&'a [u8]>,
    /// `chat_template.jinja`; else `chat_template` in tokenizer_config.json is used.
    pub chat_template: Option<&'a str>,
}

/// Everything textual of one checkpoint. Immutable; share it in an [`Arc`].
#[derive(Debug)]
pub struct Text {
    vocabulary: Arc<Vocabulary>,
    template: Template,
    pieces: Pieces,
    ids: TagIds,
}

impl Text {
    /// Reads a checkpoint's text files. A missing template is no error here: completions need none.
    /// Errors: [`Error::Tokenizer`], [`Error::NotByteLevel`], [`Error::TokenizerConfig`], [`Error::Template`].
    pub fn load(files: TextFiles<'_>) -> Result<Text, Error> {
        let vocabulary = Arc::new(Vocabulary::load(files.tokenizer_json)?);
        let config = files.tokenizer_config.map(read_config).transpose()?.unwrap_or_default();
        let template = match files.chat_template {
            Some(source) => Some(source.to_string()),
            None => config.get("chat_template").and_then(default_template),
        };
        let template = Template::new(template.as_deref(), named_tokens(&config))?;
        let pieces = Pieces::new(&vocabulary);
        let ids = TagIds::find(&vocabulary);
        Ok(Text { vocabulary, template, pieces, ids })
    }

    /// Highest id of the tokenizer + 1. The model's logits may be wider.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.size()
    }

    /// Text to ids exactly as Hugging Face does it: added tokens spelled in the text become their ids.
    /// `add_special` puts in what the post-processor adds (for Nemotron: nothing).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        self.vocabulary.encode(text, add_special)
    }

    /// Ids to text; bytes that are no characters become U+FFFD, unknown ids nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !(skip_special && self.vocabulary.is_special(id)))
            .filter_map(|&id| self.vocabulary.bytes(id))
            .flatten()
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The exact bytes of an id, perhaps half a character. None if there is no such id.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.bytes(id)
    }

    /// The text of one id, with U+FFFD where its bytes are no characters by themselves.
    pub fn token_string(&self, id: u32) -> Option<String> {
        Some(String::from_utf8_lossy(self.vocabulary.bytes(id)?).into_owned())
    }

    /// The id of a token as tokenizer.json spells it.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.vocabulary.id_of(token)
    }

    /// True for the ids flagged special in tokenizer.json: the control tokens.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// True for tags and control tokens, and whatever else is no text: ids that the tokenizer knows by their whole name.
    pub fn is_added(&self, id: u32) -> bool {
        self.vocabulary.is_added(id)
    }

    /// The id of `</think>`, if it is one.
    pub fn thought_end(&self) -> Option<u32> {
        self.ids.tags[Tag::EndThink as usize]
    }

    /// The id of `<tool_call>`, if it is one.
    pub fn call_start(&self) -> Option<u32> {
        self.ids.tags[Tag::Call as usize]
    }

    /// The ids of a line break.
    pub fn line_break(&self) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        self.vocabulary.encode_plain("\n", &mut ids)?;
        Ok(ids)
    }

    /// The shape of calls to `tools`, for the room `sample` to hold an answer to.
    /// Errors: [`Error::Unspeakable`] if the markup has no room for a name.
    pub fn call_grammar(&self, tools: &[Tool], form: CallForm, detail: Detail) -> Result<CallGrammar, Error> {
        calls::grammar(tools, form, detail, &self.ids).map_err(|got| Error::Unspeakable { got })
    }

    /// The chat template as it was given, if there is one.
    pub fn template(&self) -> Option<String> {
        self.template.source()
    }

    /// Whether the template speaks of a variable: one that it does not know changes nothing.
    pub fn template_knows(&self, variable: &str) -> bool {
        self.template.mentions(variable)
    }

    /// The prompt's text. Encoding it again would let a user write control tokens: use [`Text::prompt`] for ids.
    pub fn render(&self, chat: &Chat) -> Result<String, Error> {
        self.render_at(chat, Zoned::now())
    }

    /// As [`Text::render`], with the time that `strftime_now` tells.
    pub fn render_at(&self, chat: &Chat, now: Zoned) -> Result<String, Error> {
        let guard = Guard::off(&self.vocabulary, &self.pieces);
        self.template.render(chat, &template::values(chat), &guard, now)
    }

    /// The prompt's ids. Control tokens come from the template only, whatever the messages, tools or options spell;
    /// the module `guard` says how.
    pub fn prompt(&self, chat: &Chat) -> Result<Vec<u32>, Error> {
        Ok(self.prompt_and_text(chat)?.0)
    }

    /// The prompt's ids and its text, from one rendering.
    pub fn prompt_and_text(&self, chat: &Chat) -> Result<(Vec<u32>, String), Error> {
        let values = template::values(chat);
        let guard = Guard::new(&self.vocabulary, &self.pieces, &values);
        let rendered = self.template.render(chat, &values, &guard, Zoned::now())?;
        let ids = guard.encode(&rendered)?;
        Ok((ids, guard.unmark(rendered)))
    }

    /// Whether the answer to `prompt` begins inside the reasoning: its last `<think>` is open. Looks back to the last turn
    /// border only, because earlier turns and tool descriptions may speak of tags.
    pub fn starts_in_reasoning(&self, prompt: &[u32]) -> bool {
        let turn =
            prompt.iter().rposition(|&id| self.ids.is_border(id)).map_or(prompt, |at| &prompt[at + 1..]);
        let [think, end, ..] = self.ids.tags;
        if let (Some(think), Some(end)) = (think, end) {
            return turn.iter().rev().find(|&&id| id == think || id == end) == Some(&think);
        }
        let text = self.decode(turn, false);
        text.rfind(Tag::Think.text()).is_some_and(|open| !text[open..].contains(Tag::EndThink.text()))
    }

    /// Lengths of the heads of `prompt` at which a turn ends and the next begins, ascending, without 0. A history that is
    /// edited, or that loses its old thoughts, still shares the heads before the edit.
    pub fn borders(&self, prompt: &[u32]) -> Vec<u32> {
        let Some(opener) = self.ids.opener else { return Vec::new() };
        let opens = |(place, &id): (usize, &u32)| (id == opener).then_some(place as u32);
        prompt.iter().enumerate().skip(1).filter_map(opens).collect()
    }

    /// Reads one output; see [`Decoder`].
    pub fn decoder(&self, options: DecoderOptions) -> Decoder {
        Decoder::new(Arc::clone(&self.vocabulary), self.ids, options)
    }
}

fn read_config(bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::TokenizerConfig { got: json_kind(&other).into() }),
        Err(error) => Err(Error::TokenizerConfig { got: error.to_string() }),
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A template, or the one named `default` (else the first) of a list of named ones.
fn default_template(value: &Value) -> Option<String> {
    let source = |entry: &Value| Some(entry.get("template")?.as_str()?.to_string());
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(entries) => {
            let named = entries.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            named.or(entries.first()).and_then(source)
        }
        _ => None,
    }
}

/// `bos_token` and its kin: a string, or an object with `content`.
fn named_tokens(config: &Map<String, Value>) -> Vec<(String, String)> {
    ["bos_token", "eos_token", "unk_token", "pad_token"]
        .into_iter()
        .filter_map(|key| {
            let value = config.get(key)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.to_string(), text.to_string()))
        })
        .collect()
}
