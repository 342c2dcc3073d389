//! An answer in Ollama's form: pieces become lines, and a plain answer is the last line with everything in it.

use super::errors;
use crate::api::conversation::{Call, Chunk, Collected, Conversation, End, Piece, Reader};
use crate::api::error::ApiError;
use crate::api::generate::Update;
use crate::api::stream::{self, Frame, Frames};
use crate::api::usage::Usage;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

/// Where an answer's text stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In `message`.
    Chat,
    /// In `response`.
    Generate,
}

/// What all lines of one answer share.
pub struct Writer {
    pub form: Form,
    /// As the client wrote it.
    pub model: String,
    pub arrived: Instant,
}

impl Writer {
    /// Answers as `conversation` was asked to: in lines or at once. Errors: what ends a plain answer early.
    pub async fn answer(self, conversation: Conversation) -> Result<Response, ApiError> {
        let taken = self.arrived.elapsed();
        let timed = Timed { writer: self, taken, shows_context: conversation.common.return_ids };
        if conversation.common.stream.is_none() {
            return Ok(axum::Json(timed.whole(conversation.collect().await?)).into_response());
        }
        let Conversation { generation, reader, .. } = conversation;
        let state = Lines { timed, reader, open: None, calls: 0, logprobs: Vec::new(), ids: Vec::new() };
        Ok(stream::respond_lines(generation, state))
    }

    /// The answer to who asked for none: the model was loaded or unloaded.
    pub fn nothing(&self, done_reason: &str) -> Response {
        let mut line = self.line(Said::default());
        line.insert("done".into(), json!(true));
        line.insert("done_reason".into(), json!(done_reason));
        axum::Json(Value::Object(line)).into_response()
    }

    fn line(&self, said: Said) -> Map<String, Value> {
        let Said { thinking, content, calls, logprobs } = said;
        let mut line = Map::new();
        line.insert("model".into(), json!(self.model));
        line.insert("created_at".into(), json!(moment(Timestamp::now())));
        let (mut text, name) = match self.form {
            Form::Chat => (Map::from_iter([("role".to_owned(), json!("assistant"))]), "content"),
            Form::Generate => (Map::new(), "response"),
        };
        text.insert(name.into(), json!(content));
        if let Some(thinking) = thinking {
            text.insert("thinking".into(), json!(thinking));
        }
        if !calls.is_empty() {
            text.insert("tool_calls".into(), Value::Array(calls));
        }
        match self.form {
            Form::Chat => drop(line.insert("message".into(), Value::Object(text))),
            Form::Generate => line.extend(text),
        }
        line.insert("done".into(), json!(false));
        if !logprobs.is_empty() {
            line.insert("logprobs".into(), Value::Array(logprobs));
        }
        line
    }
}

/// RFC 3339 with six digits of a second, whatever they are.
pub fn moment(time: Timestamp) -> String {
    format!("{time:.6}")
}

/// What one line says.
#[derive(Default)]
struct Said {
    thinking: Option<String>,
    content: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
}

/// A writer that knows what the answer cost before its first step.
struct Timed {
    writer: Writer,
    /// From arrival until the engine had the request.
    taken: Duration,
    /// The last line holds the ids of all turns.
    shows_context: bool,
}

impl Timed {
    fn last(&self, said: Said, end: Option<&End>, usage: Usage, context: Option<Vec<u32>>) -> Value {
        let is_cut = end.is_some_and(|end| end.finish_reason == "length");
        let mut line = self.writer.line(said);
        line.insert("done".into(), json!(true));
        line.insert("done_reason".into(), json!(if is_cut { "length" } else { "stop" }));
        if let Some(context) = context {
            line.insert("context".into(), json!(context));
        }
        let timings = usage.timings;
        let load = self.taken + timings.queue;
        let total = self.writer.arrived.elapsed().max(load + timings.prefill + timings.decode);
        line.insert("total_duration".into(), json!(nanoseconds(total)));
        line.insert("load_duration".into(), json!(nanoseconds(load)));
        line.insert("prompt_eval_count".into(), json!(usage.prompt_tokens));
        line.insert("prompt_eval_duration".into(), json!(divisor(usage.prompt_tokens, timings.prefill)));
        line.insert("eval_count".into(), json!(usage.completion_tokens));
        line.insert("eval_duration".into(), json!(divisor(usage.completion_tokens, timings.decode)));
        Value::Object(line)
    }

    fn whole(&self, collected: Collected) -> Value {
        let Collected { messages, mut prompt, usage, .. } = collected;
        // No request of this dialect asks for several answers.
        let message = messages.into_iter().next().unwrap_or_default();
        let said = Said {
            thinking: message.reasoning,
            content: message.content.unwrap_or_default(),
            calls: message.calls.iter().enumerate().map(|(index, call)| call_json(index, call)).collect(),
            logprobs: message.logprobs,
        };
        prompt.extend(message.ids);
        self.last(said, message.end.as_ref(), usage, self.shows_context.then_some(prompt))
    }
}

/// A call whole; its arguments are an object here.
fn call_json(index: usize, call: &Call) -> Value {
    let arguments: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap_or_default();
    json!({"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}})
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Clients divide by it: never 0 where something was counted, though the clock may not have moved.
fn divisor(count: usize, time: Duration) -> u64 {
    nanoseconds(time).max(u64::from(count > 0))
}

/// The stream's wire form.
struct Lines {
    timed: Timed,
    reader: Reader,
    /// Begun and not ended: calls are delivered whole.
    open: Option<Call>,
    /// Delivered.
    calls: usize,
    /// Waiting for a line.
    logprobs: Vec<Value>,
    ids: Vec<u32>,
}

impl Frames for Lines {
    fn frames(&mut self, update: Update, usage: Usage, _is_last: bool) -> Vec<Frame> {
        let chunks = self.reader.chunks(update);
        chunks.into_iter().filter_map(|chunk| self.frame(chunk, usage)).map(Frame::from).collect()
    }

    fn closing(&mut self, _usage: Usage) -> Vec<Frame> {
        Vec::new()
    }

    fn failure(&mut self, error: &ApiError) -> Frame {
        errors::body(error).into()
    }
}

impl Lines {
    fn frame(&mut self, chunk: Chunk, usage: Usage) -> Option<Value> {
        self.logprobs.extend(chunk.logprobs);
        if self.timed.shows_context {
            self.ids.extend(chunk.ids);
        }
        let mut said = Said::default();
        match chunk.piece {
            Piece::Role { .. } => return None,
            Piece::Reasoning(text) => said.thinking = Some(text),
            Piece::Content(text) => said.content = text,
            Piece::CallStart { id, name, .. } => {
                self.open = Some(Call { id, name, arguments: String::new() });
                return None;
            }
            Piece::CallArguments { json, .. } => {
                self.open.as_mut()?.arguments.push_str(&json);
                return None;
            }
            Piece::CallEnd => {
                said.calls.push(call_json(self.calls, &self.open.take()?));
                self.calls += 1;
            }
            Piece::End(end) => {
                said.logprobs = std::mem::take(&mut self.logprobs);
                let context = self.context();
                return Some(self.timed.last(said, Some(&end), usage, context));
            }
        }
        said.logprobs = std::mem::take(&mut self.logprobs);
        Some(Value::Object(self.timed.writer.line(said)))
    }

    /// The ids of all turns so far, if they are wanted.
    fn context(&mut self) -> Option<Vec<u32>> {
        self.timed.shows_context.then(|| {
            let mut ids = std::mem::take(&mut self.reader.prompt);
            ids.append(&mut self.ids);
            ids
        })
    }
}
