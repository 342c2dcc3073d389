//! A body of `/v1/responses` becomes one of `/v1/chat/completions`, and what is said of the answer beyond that.

use super::items;
use super::output::Shown;
use super::store::Store;
use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use serde_json::{Map, Value, json};

/// Fields that mean the same on both routes.
const SAME: [&str; 37] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprob_token_ids",
    "use_beam_search",
    "skip_special_tokens",
    "parallel_tool_calls",
    "thinking_token_budget",
    "include_reasoning",
    "chat_template",
    "chat_template_kwargs",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "priority",
    "cache_salt",
    "request_id",
    "speculation",
    "timeout",
];

/// Fields that the answer repeats, and what stands for those that are not given.
fn repeated() -> [(&'static str, Value); 15] {
    [
        ("instructions", Value::Null),
        ("metadata", Value::Null),
        ("parallel_tool_calls", json!(true)),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("max_output_tokens", Value::Null),
        ("max_tool_calls", Value::Null),
        ("previous_response_id", Value::Null),
        ("reasoning", Value::Null),
        ("service_tier", json!("auto")),
        ("text", Value::Null),
        ("truncation", json!("disabled")),
        ("top_logprobs", Value::Null),
        ("user", Value::Null),
        ("background", json!(false)),
    ]
}

/// A request, read.
pub struct ResponsesRequest {
    /// The same request in the form of a chat.
    pub chat: Map<String, Value>,
    /// The fields that the answer repeats.
    pub repeated: Map<String, Value>,
    /// All items so far, those of earlier responses included.
    pub items: Vec<Value>,
    pub shown: Shown,
    pub stream: bool,
    pub store: bool,
    pub background: bool,
    /// `truncation: auto`: turns that are too many are left out, the oldest first.
    pub truncate: bool,
    pub names: Names,
}

impl ResponsesRequest {
    /// Errors: 400 for what cannot be read, or a previous response that is not in `store`.
    pub fn read(body: &Map<String, Value>, store: &Store) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        refuse(&fields)?;
        let keeps = fields.bool("store")?.unwrap_or(true) && store.is_on();
        let background = fields.bool("background")?.unwrap_or(false);
        if background && !keeps {
            return Err(
                fields.bad("background", "`background` needs `store`: nobody could ask for the answer.")
            );
        }
        let shown = shown(&fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let (items, own) = all_items(&fields, store)?;
        let mut chat: Map<String, Value> =
            SAME.into_iter().filter_map(|name| Some((name.to_owned(), fields.get(name)?.clone()))).collect();
        let mut messages = Vec::new();
        if let Some(instructions) = fields.string("instructions")? {
            messages.push(json!({"role": "system", "content": instructions}));
        }
        items::messages(&items, items.len() - own, &mut messages)?;
        chat.insert("messages".into(), Value::Array(messages));
        let (allowed, choice) = choice(&fields, tools(&fields)?)?;
        chat.insert("tools".into(), allowed.iter().map(|tool| tool.chat.clone()).collect());
        chat.insert("tool_choice".into(), choice);
        chat.insert("max_completion_tokens".into(), json!(fields.get("max_output_tokens")));
        chat.insert("response_format".into(), format(&fields)?);
        chat.insert("reasoning_effort".into(), effort(&fields)?);
        if shown.logprobs {
            chat.insert("logprobs".into(), json!(true));
            chat.insert("top_logprobs".into(), json!(fields.get("top_logprobs")));
        }
        if stream {
            chat.insert("stream".into(), json!(true));
        }
        Ok(Self {
            chat,
            repeated: repeat(&fields, keeps),
            items,
            shown,
            stream,
            store: keeps,
            background,
            truncate: truncates(&fields)?,
            names: Names { tools: allowed.iter().map(|tool| tool.index).collect() },
        })
    }
}

/// Fields that name what only OpenAI's own service has.
fn refuse(fields: &Fields) -> Result<(), ApiError> {
    if fields.get("prompt").is_some() {
        return Err(fields.bad("prompt", "`prompt` is not supported: there are no stored prompts here."));
    }
    if fields.get("conversation").is_some() {
        let message = "`conversation` is not supported; `previous_response_id` is.";
        return Err(fields.bad("conversation", message));
    }
    Ok(())
}

/// The items before the answer, and how many of them are this request's own.
fn all_items(fields: &Fields, store: &Store) -> Result<(Vec<Value>, usize), ApiError> {
    let own = match fields.required("input")? {
        Value::String(text) => vec![json!({"type": "message", "role": "user", "content": text})],
        Value::Array(items) => items.clone(),
        other => return Err(wrong("input", "a string or a list of items", other)),
    };
    let mut items = match fields.string("previous_response_id")? {
        Some(id) => store.conversation(id)?,
        None => Vec::new(),
    };
    if items.is_empty() && own.is_empty() {
        return Err(fields.bad("input", "`input` must not be empty."));
    }
    let count = own.len();
    items.extend(own);
    Ok((items, count))
}

fn shown(fields: &Fields) -> Result<Shown, ApiError> {
    let included = fields.array("include")?.unwrap_or_default();
    let includes = |name: &str| included.iter().any(|item| item == name);
    Ok(Shown {
        logprobs: includes("message.output_text.logprobs") || fields.get("top_logprobs").is_some(),
        encrypted: includes("reasoning.encrypted_content"),
    })
}

fn truncates(fields: &Fields) -> Result<bool, ApiError> {
    match fields.string("truncation")? {
        None | Some("disabled") => Ok(false),
        Some("auto") => Ok(true),
        Some(other) => {
            let got = cut(other, 40);
            Err(fields.bad("truncation", format!("`truncation` must be auto or disabled, got {got}.")))
        }
    }
}

/// `text.format`, which holds side by side what `response_format` nests.
fn format(fields: &Fields) -> Result<Value, ApiError> {
    let Some(text) = fields.object("text")? else { return Ok(Value::Null) };
    let Some(format) = text.object("format")? else { return Ok(Value::Null) };
    let kind = format.required("type")?;
    if kind == "json_schema" {
        return Ok(json!({"type": kind, "json_schema": {
            "name": format.get("name"), "schema": format.get("schema"), "strict": format.get("strict"),
        }}));
    }
    Ok(json!({"type": kind}))
}

fn effort(fields: &Fields) -> Result<Value, ApiError> {
    Ok(json!(fields.object("reasoning")?.and_then(|reasoning| reasoning.get("effort"))))
}

fn repeat(fields: &Fields, keeps: bool) -> Map<String, Value> {
    let given =
        |(name, absent): (&str, Value)| (name.to_owned(), fields.get(name).cloned().unwrap_or(absent));
    let mut all: Map<String, Value> = repeated().into_iter().map(given).collect();
    all.insert("store".into(), json!(keeps));
    all
}

/// A function in the form of a chat's `tools`.
struct Definition {
    /// Its place in the request, where others may stand between.
    index: usize,
    name: String,
    chat: Value,
}

/// The functions among `tools`. What only OpenAI's own service could carry out (`web_search` and its like) is left
/// out: agents offer it to whomever they ask.
fn tools(fields: &Fields) -> Result<Vec<Definition>, ApiError> {
    let mut read = Vec::new();
    for (index, value) in fields.array("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = Fields::object_at(value, format!("tools[{index}]"))?;
        let kind = tool.required("type")?;
        if kind != "function" {
            tracing::warn!(tool = %cut(&kind.to_string(), 60), "a tool that is not a function is left out");
            continue;
        }
        // Some send the chat's form here.
        let function = tool.get("function").cloned().unwrap_or_else(|| {
            let named = |name: &str| Some((name.to_owned(), tool.get(name)?.clone()));
            Value::Object(
                ["name", "description", "parameters", "strict"].into_iter().filter_map(named).collect(),
            )
        });
        let name = function["name"].as_str().unwrap_or_default().to_owned();
        read.push(Definition { index, name, chat: json!({"type": "function", "function": function}) });
    }
    Ok(read)
}

/// The functions that may be called, and the chat's `tool_choice`.
fn choice(fields: &Fields, tools: Vec<Definition>) -> Result<(Vec<Definition>, Value), ApiError> {
    let choice = match fields.get("tool_choice") {
        None => return Ok((tools, Value::Null)),
        Some(word @ Value::String(_)) => return Ok((tools, word.clone())),
        Some(choice) => Fields::object_at(choice, "tool_choice".into())?,
    };
    match choice.string("type")? {
        Some("function") => Ok((tools, json!({"type": "function", "function": {"name": named(&choice)?}}))),
        Some("allowed_tools") => allowed(&choice, tools),
        kind => {
            let kind = cut(kind.unwrap_or("nothing"), 40);
            let message = format!(
                "`tool_choice` names a tool of type {kind}, which this server does not have; it must be none, auto, \
                 required, a function or allowed_tools."
            );
            Err(fields.bad("tool_choice", message))
        }
    }
}

fn named<'a>(choice: &Fields<'a>) -> Result<&'a str, ApiError> {
    let name = match choice.get("function") {
        Some(function) => function["name"].as_str(),
        None => choice.string("name")?,
    };
    name.ok_or_else(|| ApiError::bad("tool_choice", "`tool_choice` must name a function."))
}

/// Only those that are listed, auto or required as `mode` says.
fn allowed(choice: &Fields, tools: Vec<Definition>) -> Result<(Vec<Definition>, Value), ApiError> {
    let mut names = Vec::new();
    for (index, value) in choice.array("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = Fields::object_at(value, format!("tool_choice.tools[{index}]"))?;
        if tool.string("type")? == Some("function") {
            let name = named(&tool)?;
            if tools.iter().all(|tool| tool.name != name) {
                let message = format!("`tool_choice` names `{}`, which is not in `tools`.", cut(name, 64));
                return Err(ApiError::bad("tool_choice", message));
            }
            names.push(name);
        }
    }
    if names.is_empty() {
        return Err(ApiError::bad(
            "tool_choice",
            "`tool_choice.tools` must name a function that is in `tools`.",
        ));
    }
    let listed = tools.into_iter().filter(|tool| names.contains(&tool.name.as_str())).collect();
    Ok((listed, json!(choice.string("mode")?.unwrap_or("auto"))))
}

/// What the chat's fields are called on this route.
pub struct Names {
    /// The place in the request of each tool of the chat.
    tools: Vec<usize>,
}

impl Names {
    /// The same error in the client's own words.
    pub fn restate(&self, error: ApiError) -> ApiError {
        let ApiError::BadRequest { message, param: Some(param) } = error else { return error };
        let name = self.of(&param);
        let message = message.replace(&format!("`{param}`"), &format!("`{name}`"));
        ApiError::BadRequest { message, param: Some(name) }
    }

    fn of(&self, param: &str) -> String {
        if let Some(rest) = param.strip_prefix("response_format") {
            return format!("text.format{}", rest.strip_prefix(".json_schema").unwrap_or(rest));
        }
        if let Some((index, rest)) = param.strip_prefix("tools[").and_then(|rest| rest.split_once(']')) {
            let index = index.parse().ok().and_then(|index: usize| self.tools.get(index));
            let rest = rest.strip_prefix(".function").unwrap_or(rest);
            return index.map_or_else(|| param.to_owned(), |index| format!("tools[{index}]{rest}"));
        }
        match param {
            "messages" => "input".into(),
            "reasoning_effort" => "reasoning.effort".into(),
            "max_completion_tokens" => "max_output_tokens".into(),
            other => other.into(),
        }
    }
}
