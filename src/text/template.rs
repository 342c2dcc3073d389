//! A chat becomes a prompt: the checkpoint's own Jinja template, rendered as Python renders it.

use std::error::Error as _;
use std::io;

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::merge_maps;
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde_json::{Map, Value, json};

use super::chat::{Chat, Message};
use super::guard::Guard;
use super::{Error, python};

/// Instructions one rendering may take. A long agent session with sixty tools takes some hundred thousand.
const FUEL: u64 = 10_000_000;
/// Bytes one rendering may write: four times the largest context we know of, in bytes.
const MAX_OUTPUT_BYTES: usize = 32 << 20;
const NAME: &str = "chat_template";

/// The engine and, if the checkpoint has one, its template, parsed.
#[derive(Debug)]
pub struct Template {
    env: Environment<'static>,
    present: bool,
    /// `bos_token` and its kin from tokenizer_config.json, which templates may print.
    tokens: minijinja::Value,
}

impl Template {
    /// Parses `source`. `tokens` become variables of every rendering.
    /// Errors: [`Error::Template`] with the line if it is not Jinja.
    pub fn new(source: Option<&str>, tokens: Vec<(String, String)>) -> Result<Template, Error> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| Error::Template { line: 0, got: error.to_string() })?;
        env.set_syntax(syntax);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        python::extend(&mut env);
        if let Some(source) = source {
            env.add_template_owned(NAME, source.to_string()).map_err(|error| template_error(&error))?;
        }
        // The checkpoint's own words: they are not guarded, a template prints them to have their ids.
        let tokens = minijinja::Value::from_pairs(tokens);
        Ok(Template { env, present: source.is_some(), tokens })
    }

    /// As it was given.
    pub fn source(&self) -> Option<String> {
        self.env.get_template(NAME).ok().map(|template| template.source().to_owned())
    }

    pub fn mentions(&self, variable: &str) -> bool {
        self.env.get_template(NAME).is_ok_and(|template| template.source().contains(variable))
    }

    /// The prompt's text with the guard's marks still in it. `values` are the chat's, from [`values`].
    pub fn render(
        &self,
        chat: &Chat,
        values: &Value,
        guard: &Guard<'_>,
        now: Zoned,
    ) -> Result<String, Error> {
        if chat.continue_final_message && chat.add_generation_prompt {
            return Err(Error::Continue { expected: "add_generation_prompt=false", got: "true" });
        }
        let clock = minijinja::Value::from_function(move |format: &str| python::strftime(format, &now));
        let values = python::value(values, guard);
        let context =
            minijinja::context! { strftime_now => clock, ..merge_maps([values, self.tokens.clone()]) };

        let template = match &chat.template {
            Some(source) => self.env.template_from_named_str(NAME, source),
            None if self.present => self.env.get_template(NAME),
            None => return Err(Error::NoTemplate),
        };
        let template = template.map_err(|error| template_error(&error))?;
        let mut output = Bounded::default();
        let rendered = template.render_captured_to(context, &mut output).map(|_| ());
        if output.overflow {
            return Err(Error::Limit { what: "bytes of prompt", limit: MAX_OUTPUT_BYTES });
        }
        rendered.map_err(|error| template_error(&error))?;
        let rendered = String::from_utf8(output.bytes)
            .map_err(|error| Error::Template { line: 0, got: error.to_string() })?;
        if chat.continue_final_message { cut_after_final(rendered, chat, guard) } else { Ok(rendered) }
    }
}

/// What a chat gives to a rendering. Released templates read options from the top level, NeMo's training copy from a
/// dict named `chat_template_kwargs`: both are there. The request's own keys never shadow the chat.
pub fn values(chat: &Chat) -> Value {
    let mut values = chat.kwargs.clone();
    values.insert("chat_template_kwargs".into(), Value::Object(chat.kwargs.clone()));
    values.insert("messages".into(), chat.messages.iter().map(message).collect());
    let tools: Vec<Value> = chat.tools.iter().map(without_nulls).collect();
    values.insert("tools".into(), if tools.is_empty() { Value::Null } else { Value::Array(tools) });
    values.insert("add_generation_prompt".into(), Value::Bool(chat.add_generation_prompt));
    Value::Object(values)
}

/// A message as templates read it. Absent content is the empty string, as in vLLM; reasoning goes by both its names.
fn message(message: &Message) -> Value {
    let mut map = Map::new();
    map.insert("role".into(), json!(message.role));
    map.insert("content".into(), json!(message.content.as_deref().unwrap_or_default()));
    if let Some(reasoning) = &message.reasoning {
        map.insert("reasoning_content".into(), json!(reasoning));
        map.insert("reasoning".into(), json!(reasoning));
    }
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(|call| {
            let mut entry = Map::new();
            if let Some(id) = &call.id {
                entry.insert("id".into(), json!(id));
            }
            entry.insert("type".into(), json!("function"));
            entry.insert(
                "function".into(),
                json!({"name": call.name, "arguments": arguments(&call.arguments)}),
            );
            Value::Object(entry)
        });
        map.insert("tool_calls".into(), calls.collect());
    }
    for (key, value) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
        if let Some(value) = value {
            map.insert(key.into(), json!(value));
        }
    }
    Value::Object(map)
}

/// Arguments as the object that templates demand. Clients send a JSON string; one that is no object is kept whole
/// as a single argument, because one bad call in the history must not end an agent's session (http-api §2.3.4).
fn arguments(given: &Value) -> Value {
    match given {
        Value::Object(_) => given.clone(),
        Value::Null => json!({}),
        Value::String(text) if text.trim().is_empty() => json!({}),
        Value::String(text) => match serde_json::from_str::<Value>(text) {
            Ok(object @ Value::Object(_)) => object,
            Ok(Value::Null) => json!({}),
            _ => json!({"arguments": text}),
        },
        other => json!({"arguments": other}),
    }
}

/// Drops the nulls that client libraries write for absent fields: to a template a null description is defined and
/// prints `None`. A null default or const is a value, and stays; so do nulls in lists.
fn without_nulls(given: &Value) -> Value {
    match given {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(key, value)| !value.is_null() || matches!(key.as_str(), "default" | "const"))
                .map(|(key, value)| (key.clone(), without_nulls(value)))
                .collect(),
        ),
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

/// `continue_final_message`: the prompt ends where the final message's words end, so that the model goes on writing it.
/// The words are its content, or its reasoning if it has no content yet.
fn cut_after_final(mut rendered: String, chat: &Chat, guard: &Guard<'_>) -> Result<String, Error> {
    let last = chat.messages.last();
    let words = last.and_then(|message| {
        [&message.content, &message.reasoning].into_iter().flatten().find(|text| !text.trim().is_empty())
    });
    let Some(words) = words else {
        return Err(Error::Continue { expected: "a final message with text", got: "none" });
    };
    let words = guard.mark(words);
    let Some(at) = rendered.rfind(words.trim()) else {
        return Err(Error::Continue {
            expected: "a template that prints the final message",
            got: "other text",
        });
    };
    // Templates may trim the message: its trailing white space is kept only if it was printed.
    let exact = words.trim_start();
    let len = if rendered[at..].starts_with(exact) { exact.len() } else { words.trim().len() };
    rendered.truncate(at + len);
    Ok(rendered)
}

fn template_error(error: &minijinja::Error) -> Error {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref::<python::Raised>() {
            return Error::Refused { message: raised.0.clone() };
        }
        source = inner.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Limit { what: "template instructions", limit: FUEL as usize };
    }
    let got = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    Error::Template { line: error.line().unwrap_or(0), got }
}

#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    overflow: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.overflow = true;
            return Err(io::Error::other("the prompt is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
