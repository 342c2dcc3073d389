//! `POST /v1/chat/completions`: a conversation in, a message out, whole or in pieces.
//!
//! ```text
//! Update ─Reader→ Chunk ─┬─ Frames → SSE events
//!                        └─ Collected → one message
//! ```

use super::body::JsonBody;
use super::envelope::{Envelope, TokenView, fingerprint};
use super::error::ApiError;
use super::generate::{Finished, Generation, Input, Token, Update, UpdateEvent, fit};
use super::request_id::RequestId;
use super::sse::{self, Frames};
use super::state::{App, Resident};
use super::steer;
use super::types::{ChatRequest, Common, Forced, StreamOptions};
use super::usage::Usage;
use crate::text::{Chat, Delta, Mode};
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Answers a chat. Errors: 400 for what cannot be read or does not fit, 404 for another model, 503 while there is
/// no engine to take it.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(request_id): Extension<RequestId>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let resident = app.ready(&body.map)?;
    let mut request = ChatRequest::read(&body.map, app.rules(resident))?;
    let chat = std::mem::take(&mut request.chat);
    let prompt = fit(render(resident, chat).await?, &request.common, resident.model.max_model_len)?;
    let starts_in_reasoning = resident.text.starts_in_reasoning(&prompt);
    let steering = steer::chat(&app, resident, &request, &prompt, starts_in_reasoning).await?;
    let common = request.common;
    let mode = Mode::Chat {
        starts_in_reasoning,
        thinking: request.thinking,
        force_nonempty_content: request.force_nonempty_content,
        tools: request.tools,
    };
    let reader = Reader {
        app: app.clone(),
        tokens: TokenView::new(resident, &common),
        return_ids: common.return_ids,
        include_reasoning: request.include_reasoning,
        named: matches!(request.forced, Some(Forced::Named(_))),
        choices: (0..common.n).map(|_| ChoiceState::default()).collect(),
    };
    let envelope = Envelope::new("chatcmpl", &common, &request_id.0);
    let fingerprint = fingerprint(&resident.model);
    let borders = resident.text.borders(&prompt);
    let input = Input { prompt: prompt.clone(), borders, mode, one_call: request.one_call, steering };
    let generation = Generation::start(&app, resident, &common, vec![input], body.arrived)?;
    match common.stream {
        Some(options) => {
            let frames = ChatFrames { reader, envelope, fingerprint, options, prompt };
            Ok(sse::respond(generation, frames, app.options.keep_alive))
        }
        None => {
            let answer = Collected::new(&common, request.include_reasoning, prompt, envelope, fingerprint);
            Ok(answer.collect(generation, reader).await?.into_response())
        }
    }
}

/// Chat to ids. Errors: the template refuses the conversation, or it is no template for it.
pub async fn render(resident: &Resident, chat: Chat) -> Result<Vec<u32>, ApiError> {
    let text = resident.text.clone();
    // A long history takes milliseconds, in which other streams would stand still.
    let rendered = tokio::task::spawn_blocking(move || text.prompt(&chat)).await;
    rendered
        .map_err(|error| ApiError::Internal(format!("The template's task failed: {error}")))?
        .map_err(|error| ApiError::bad("messages", format!("The messages cannot be rendered: {error}.")))
}

/// A piece of an answer as a client sees it.
struct Chunk {
    choice: usize,
    piece: Piece,
    /// Entries of `logprobs.content` for the ids since the last chunk.
    logprobs: Vec<Value>,
    ids: Vec<u32>,
}

enum Piece {
    Role {
        prompt_logprobs: Option<Value>,
    },
    Reasoning(String),
    Content(String),
    CallStart {
        index: usize,
        id: String,
        name: String,
    },
    CallArguments {
        index: usize,
        json: String,
    },
    /// Not on the wire: the call before it is whole.
    CallEnd,
    End(End),
}

struct End {
    finish_reason: &'static str,
    stop_reason: Value,
    reasoning_became_content: bool,
    /// Some of the answer was thought, shown or not.
    reasoned: bool,
}

/// Updates become chunks; remembers what chunks must not forget.
struct Reader {
    app: Arc<App>,
    tokens: TokenView,
    return_ids: bool,
    include_reasoning: bool,
    /// The client has chosen what is called: that it is called is then no news, and the reason is `stop`.
    named: bool,
    choices: Vec<ChoiceState>,
}

#[derive(Default)]
struct ChoiceState {
    /// Of ids whose text is still held back.
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    reasoned: bool,
    /// A whole call was seen.
    called: bool,
}

impl Reader {
    fn chunks(&mut self, update: Update, prompt: &[u32]) -> Vec<Chunk> {
        let choice = update.choice;
        let pieces = match update.event {
            UpdateEvent::Started { prompt_logprobs } => {
                let scores = prompt_logprobs.map(|scores| self.tokens.prompt_scores(prompt, &scores));
                vec![Piece::Role { prompt_logprobs: scores }]
            }
            UpdateEvent::Token { token, deltas } => {
                self.note(choice, token);
                self.pieces(choice, deltas)
            }
            UpdateEvent::Ended { deltas, finish, reasoning_became_content } => {
                let mut pieces = self.pieces(choice, deltas);
                let Some(state) = self.choices.get(choice) else { return Vec::new() };
                pieces.push(Piece::End(End {
                    finish_reason: match finish {
                        Finished::Length => "length",
                        _ if state.called && !self.named => "tool_calls",
                        _ => finish.reason(),
                    },
                    stop_reason: finish.stop_reason(),
                    reasoning_became_content,
                    reasoned: state.reasoned,
                }));
                pieces
            }
        };
        pieces.into_iter().map(|piece| self.chunk(choice, piece)).collect()
    }

    fn note(&mut self, choice: usize, token: Token) {
        let Some(state) = self.choices.get_mut(choice) else { return };
        if let Some(logprobs) = &token.logprobs {
            state.logprobs.push(self.tokens.chat_entry(token.id, logprobs));
        }
        if self.return_ids {
            state.ids.push(token.id);
        }
    }

    fn pieces(&mut self, choice: usize, deltas: Vec<Delta>) -> Vec<Piece> {
        let Some(state) = self.choices.get_mut(choice) else { return Vec::new() };
        let mut pieces = Vec::with_capacity(deltas.len());
        for delta in deltas {
            pieces.push(match delta {
                Delta::Reasoning(text) => {
                    state.reasoned = true;
                    if !self.include_reasoning {
                        continue;
                    }
                    Piece::Reasoning(text)
                }
                Delta::Content(text) => Piece::Content(text),
                Delta::CallStart { index, name } => Piece::CallStart { index, id: self.app.ids.call(), name },
                Delta::CallArguments { index, json } => Piece::CallArguments { index, json },
                Delta::CallEnd { .. } => {
                    state.called = true;
                    Piece::CallEnd
                }
            });
        }
        pieces
    }

    /// The first chunk that goes out takes along all that waited.
    fn chunk(&mut self, choice: usize, piece: Piece) -> Chunk {
        let (mut logprobs, mut ids) = (Vec::new(), Vec::new());
        if let Some(state) = self.choices.get_mut(choice).filter(|_| !matches!(piece, Piece::CallEnd)) {
            logprobs = std::mem::take(&mut state.logprobs);
            ids = std::mem::take(&mut state.ids);
        }
        Chunk { choice, piece, logprobs, ids }
    }
}

/// The stream's wire form.
struct ChatFrames {
    reader: Reader,
    envelope: Envelope,
    fingerprint: String,
    options: StreamOptions,
    prompt: Vec<u32>,
}

impl Frames for ChatFrames {
    fn frames(&mut self, update: Update, usage: Usage, is_last: bool) -> Vec<Value> {
        let chunks = self.reader.chunks(update, &self.prompt);
        let mut frames: Vec<Value> =
            chunks.into_iter().filter_map(|chunk| self.frame(chunk, usage)).collect();
        // Where a frame with the usage follows, that one is the last.
        if let Some(last) = frames.last_mut().filter(|_| is_last && !self.options.include_usage) {
            last["timings"] = usage.timings_json();
        }
        frames
    }

    fn closing(&mut self, usage: Usage) -> Option<Value> {
        self.options.include_usage.then(|| {
            let mut frame = self.head();
            frame.insert("choices".into(), json!([]));
            frame.insert("usage".into(), usage.to_json());
            frame.insert("timings".into(), usage.timings_json());
            Value::Object(frame)
        })
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
                    frame.insert("prompt_token_ids".into(), json!(self.prompt));
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

/// The stream, collected: a plain answer.
struct Collected {
    messages: Vec<Message>,
    include_reasoning: bool,
    wants_logprobs: bool,
    return_ids: bool,
    prompt: Vec<u32>,
    prompt_logprobs: Value,
    envelope: Envelope,
    fingerprint: String,
}

#[derive(Default)]
struct Message {
    reasoning: Option<String>,
    content: Option<String>,
    calls: Vec<Call>,
    /// Begun and not ended: left out if it never is.
    open: Option<Call>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    end: Option<End>,
}

struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Collected {
    fn new(
        common: &Common,
        include_reasoning: bool,
        prompt: Vec<u32>,
        envelope: Envelope,
        fingerprint: String,
    ) -> Self {
        Self {
            messages: (0..common.n).map(|_| Message::default()).collect(),
            include_reasoning,
            wants_logprobs: common.sampling.logprobs.is_some(),
            return_ids: common.return_ids,
            prompt,
            prompt_logprobs: Value::Null,
            envelope,
            fingerprint,
        }
    }

    async fn collect(
        mut self,
        mut generation: Generation,
        mut reader: Reader,
    ) -> Result<axum::Json<Value>, ApiError> {
        while let Some(update) = generation.next().await {
            for chunk in reader.chunks(update?, &self.prompt) {
                self.push(chunk);
            }
        }
        Ok(axum::Json(self.into_json(generation.usage())))
    }

    fn push(&mut self, chunk: Chunk) {
        let Some(message) = self.messages.get_mut(chunk.choice) else { return };
        message.logprobs.extend(chunk.logprobs);
        message.ids.extend(chunk.ids);
        match chunk.piece {
            Piece::Role { prompt_logprobs } => {
                if let Some(scores) = prompt_logprobs {
                    self.prompt_logprobs = scores;
                }
            }
            Piece::Reasoning(text) => message.reasoning.get_or_insert_default().push_str(&text),
            Piece::Content(text) => message.content.get_or_insert_default().push_str(&text),
            Piece::CallStart { id, name, .. } => {
                message.open = Some(Call { id, name, arguments: String::new() })
            }
            Piece::CallArguments { json, .. } => {
                if let Some(call) = &mut message.open {
                    call.arguments.push_str(&json);
                }
            }
            Piece::CallEnd => message.calls.extend(message.open.take()),
            Piece::End(end) => message.end = Some(end),
        }
    }

    fn into_json(self, usage: Usage) -> Value {
        let mut answer = self.envelope.head("chat.completion");
        let choices: Vec<Value> = self
            .messages
            .into_iter()
            .enumerate()
            .map(|(index, mut message)| {
                let scores = std::mem::take(&mut message.logprobs);
                let ids = std::mem::take(&mut message.ids);
                let end = message.end.take();
                let (finish_reason, stop_reason) = match &end {
                    Some(end) => (json!(end.finish_reason), end.stop_reason.clone()),
                    None => (Value::Null, Value::Null),
                };
                let mut choice = Map::new();
                choice.insert("index".into(), json!(index));
                choice.insert("message".into(), message.into_json(end, self.include_reasoning));
                let scores = if self.wants_logprobs { json!({"content": scores}) } else { Value::Null };
                choice.insert("logprobs".into(), scores);
                choice.insert("finish_reason".into(), finish_reason);
                choice.insert("stop_reason".into(), stop_reason);
                if self.return_ids {
                    choice.insert("token_ids".into(), json!(ids));
                }
                Value::Object(choice)
            })
            .collect();
        answer.insert("choices".into(), Value::Array(choices));
        answer.insert("service_tier".into(), Value::Null);
        answer.insert("system_fingerprint".into(), json!(self.fingerprint));
        answer.insert("usage".into(), usage.to_json());
        answer.insert("timings".into(), usage.timings_json());
        answer.insert("prompt_logprobs".into(), self.prompt_logprobs);
        if self.return_ids {
            answer.insert("prompt_token_ids".into(), json!(self.prompt));
        }
        answer.insert("kv_transfer_params".into(), Value::Null);
        Value::Object(answer)
    }
}

impl Message {
    fn into_json(self, end: Option<End>, include_reasoning: bool) -> Value {
        let end = end.as_ref();
        let cut_in_thought = end.is_some_and(|end| end.reasoned && end.finish_reason == "length");
        let moved = end.is_some_and(|end| end.reasoning_became_content);
        // Null says that something else came instead; a plain empty answer is "".
        let nothing = if cut_in_thought || !self.calls.is_empty() { Value::Null } else { json!("") };
        let mut message = Map::new();
        message.insert("role".into(), json!("assistant"));
        message.insert("content".into(), self.content.map_or(nothing, Value::String));
        if include_reasoning {
            let reasoning = json!(self.reasoning.filter(|_| !moved));
            message.insert("reasoning".into(), reasoning.clone());
            message.insert("reasoning_content".into(), reasoning);
        }
        // An empty list would look like a wish for tools.
        if !self.calls.is_empty() {
            let calls = self.calls.into_iter().map(|call| {
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
