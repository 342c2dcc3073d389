//! `POST /v1/chat/completions`: a conversation in, a message out, whole or in pieces.

use super::body::JsonBody;
use super::conversation::{Chunk, Collected, Conversation, End, Message, Piece, Reader};
use super::envelope::{Envelope, fingerprint};
use super::error::ApiError;
use super::generate::Update;
use super::request_id::RequestId;
use super::state::App;
use super::stream::{self, Frame, Frames};
use super::types::{Common, StreamOptions};
use super::usage::Usage;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Answers a chat. Errors: those of [`Conversation::open`].
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(request_id): Extension<RequestId>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let conversation = Conversation::open(&app, &body).await?;
    match conversation.common.stream {
        Some(options) => {
            let envelope = envelope(&conversation.common, &request_id);
            let fingerprint = fingerprint(&conversation.resident.model);
            let Conversation { generation, reader, .. } = conversation;
            let frames = ChatFrames { reader, envelope, fingerprint, options };
            Ok(stream::respond(generation, frames, app.options.keep_alive))
        }
        None => {
            let plain = Plain::new(&conversation, &request_id);
            let answer = plain.into_json(conversation.collect().await?);
            Ok(axum::Json(answer).into_response())
        }
    }
}

fn envelope(common: &Common, request_id: &RequestId) -> Envelope {
    Envelope::new("chatcmpl", common, &request_id.0)
}

/// The stream's wire form.
struct ChatFrames {
    reader: Reader,
    envelope: Envelope,
    fingerprint: String,
    options: StreamOptions,
}

impl Frames for ChatFrames {
    fn frames(&mut self, update: Update, usage: Usage, is_last: bool) -> Vec<Frame> {
        let chunks = self.reader.chunks(update);
        let mut frames: Vec<Value> =
            chunks.into_iter().filter_map(|chunk| self.frame(chunk, usage)).collect();
        // Where a frame with the usage follows, that one is the last.
        if let Some(last) = frames.last_mut().filter(|_| is_last && !self.options.include_usage) {
            last["timings"] = usage.timings_json();
        }
        frames.into_iter().map(Frame::from).collect()
    }

    fn closing(&mut self, usage: Usage) -> Vec<Frame> {
        let closing = self.options.include_usage.then(|| {
            let mut frame = self.head();
            frame.insert("choices".into(), json!([]));
            frame.insert("usage".into(), usage.to_json());
            frame.insert("timings".into(), usage.timings_json());
            Frame::from(Value::Object(frame))
        });
        closing.into_iter().collect()
    }
}

impl ChatFrames {
    fn head(&self) -> Map<String, Value> {
        let mut head = self.envelope.head("chat.completion.chunk");
        head.insert("system_fingerprint".into(), json!(self.fingerprint));
        head
    }

    fn frame(&self, chunk: Chunk, usage: Usage) -> Option<Value> {
        let mut frame = self.head();
        let mut choice = Map::new();
        choice.insert("index".into(), json!(chunk.choice));
        let mut end = None;
        let delta = match chunk.piece {
            Piece::Role { .. } => {
                if self.reader.return_ids {
                    frame.insert("prompt_token_ids".into(), json!(self.reader.prompt));
                }
                json!({"role": "assistant", "content": ""})
            }
            Piece::Reasoning(text) => json!({"reasoning": text, "reasoning_content": text}),
            Piece::Content(text) => json!({"content": text}),
            // Accumulators join strings, so id and name come once.
            Piece::CallStart { index, id, name } => json!({"tool_calls": [{
                "index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""},
            }]}),
            Piece::CallArguments { index, json } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": json}}]})
            }
            Piece::CallEnd => return None,
            Piece::End(ended) => {
                end = Some(ended);
                json!({})
            }
        };
        choice.insert("delta".into(), delta);
        choice.insert("logprobs".into(), logprobs(chunk.logprobs));
        choice.insert("finish_reason".into(), json!(end.as_ref().map(|end| end.finish_reason)));
        if let Some(end) = end {
            choice.insert("stop_reason".into(), end.stop_reason);
        }
        if !chunk.ids.is_empty() {
            choice.insert("token_ids".into(), json!(chunk.ids));
        }
        frame.insert("choices".into(), json!([choice]));
        if self.options.continuous_usage {
            frame.insert("usage".into(), usage.to_json());
        }
        Some(Value::Object(frame))
    }
}

fn logprobs(entries: Vec<Value>) -> Value {
    if entries.is_empty() { Value::Null } else { json!({"content": entries}) }
}

/// What a plain answer shows.
pub struct Plain {
    envelope: Envelope,
    fingerprint: String,
    include_reasoning: bool,
    wants_logprobs: bool,
    return_ids: bool,
}

impl Plain {
    pub fn new(conversation: &Conversation, request_id: &RequestId) -> Self {
        let Conversation { common, .. } = conversation;
        Self {
            envelope: envelope(common, request_id),
            fingerprint: fingerprint(&conversation.resident.model),
            include_reasoning: conversation.include_reasoning,
            wants_logprobs: common.sampling.logprobs.is_some(),
            return_ids: common.return_ids,
        }
    }

    pub fn into_json(self, collected: Collected) -> Value {
        let Collected { messages, prompt, prompt_logprobs, usage } = collected;
        let mut answer = self.envelope.head("chat.completion");
        let choices = messages.into_iter().enumerate().map(|(index, message)| self.choice(index, message));
        answer.insert("choices".into(), choices.collect());
        answer.insert("service_tier".into(), Value::Null);
        answer.insert("system_fingerprint".into(), json!(self.fingerprint));
        answer.insert("usage".into(), usage.to_json());
        answer.insert("timings".into(), usage.timings_json());
        answer.insert("prompt_logprobs".into(), prompt_logprobs);
        if self.return_ids {
            answer.insert("prompt_token_ids".into(), json!(prompt));
        }
        answer.insert("kv_transfer_params".into(), Value::Null);
        Value::Object(answer)
    }

    fn choice(&self, index: usize, mut message: Message) -> Value {
        let scores = std::mem::take(&mut message.logprobs);
        let ids = std::mem::take(&mut message.ids);
        let end = message.end.take();
        let (finish_reason, stop_reason) = match &end {
            Some(end) => (json!(end.finish_reason), end.stop_reason.clone()),
            None => (Value::Null, Value::Null),
        };
        let mut choice = Map::new();
        choice.insert("index".into(), json!(index));
        choice.insert("message".into(), self.message(message, end));
        let scores = if self.wants_logprobs { json!({"content": scores}) } else { Value::Null };
        choice.insert("logprobs".into(), scores);
        choice.insert("finish_reason".into(), finish_reason);
        choice.insert("stop_reason".into(), stop_reason);
        if self.return_ids {
            choice.insert("token_ids".into(), json!(ids));
        }
        Value::Object(choice)
    }

    fn message(&self, answer: Message, end: Option<End>) -> Value {
        let end = end.as_ref();
        let cut_in_thought = end.is_some_and(|end| end.reasoned && end.finish_reason == "length");
        let moved = end.is_some_and(|end| end.reasoning_became_content);
        // Null says that something else came instead; a plain empty answer is "".
        let nothing = if cut_in_thought || !answer.calls.is_empty() { Value::Null } else { json!("") };
        let mut message = Map::new();
        message.insert("role".into(), json!("assistant"));
        message.insert("content".into(), answer.content.map_or(nothing, Value::String));
        if self.include_reasoning {
            let reasoning = json!(answer.reasoning.filter(|_| !moved));
            message.insert("reasoning".into(), reasoning.clone());
            message.insert("reasoning_content".into(), reasoning);
        }
        // An empty list would look like a wish for tools.
        if !answer.calls.is_empty() {
            let calls = answer.calls.into_iter().map(|call| {
                json!({
                    "id": call.id, "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                })
            });
            message.insert("tool_calls".into(), calls.collect());
        }
        for absent in ["refusal", "annotations", "audio", "function_call"] {
            message.insert(absent.into(), Value::Null);
        }
        Value::Object(message)
    }
}
