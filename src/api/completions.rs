//! `POST /v1/completions`: text in, its continuation out, with nothing in between.

use super::body::JsonBody;
use super::envelope::{Envelope, TokenView, fingerprint, finite};
use super::error::ApiError;
use super::generate::{Generation, Input, Update, UpdateEvent, fit};
use super::request_id::RequestId;
use super::state::{App, Resident};
use super::steer;
use super::stream::{self, Frame, Frames};
use super::types::{CompletionRequest, Prompt, StreamOptions};
use super::usage::Usage;
use crate::engine::TokenLogprobs;
use crate::text::{Delta, Mode};
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Continues each prompt `n` times; choice `index` is prompt · n + answer.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(request_id): Extension<RequestId>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let lease = app.ready(&body.map).await?;
    let resident = &*lease;
    let request = CompletionRequest::read(&body.map, app.rules(resident))?;
    let common = request.common;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for (ids, text) in
        encode(resident, request.prompts, request.add_special_tokens, common.skip_special).await?
    {
        prompts.push(Echo { ids: fit(ids, &common, resident.model.max_model_len)?, text });
    }
    let steering = steer::completion(&app, resident, request.constraint.as_ref()).await?;
    let inputs = prompts
        .iter()
        .map(|prompt| Input {
            prompt: prompt.ids.clone(),
            // Nobody knows where raw text has its turns.
            borders: Vec::new(),
            mode: Mode::Raw,
            one_call: false,
            steering: steering.clone(),
        })
        .collect();
    let writer = Writer {
        tokens: TokenView::new(resident, &common),
        echo: request.echo,
        n: common.n,
        top: common.sampling.logprobs,
        return_ids: common.return_ids,
        choices: (0..prompts.len() * common.n).map(|_| ChoiceState::default()).collect(),
        prompts,
        envelope: Envelope::new("cmpl", &common, &request_id.0),
        fingerprint: fingerprint(&resident.model),
    };
    let generation = Generation::start(&app, &lease, &common, inputs, body.arrived)?;
    match common.stream {
        Some(options) => {
            Ok(stream::respond(generation, CompletionFrames { writer, options }, app.options.keep_alive))
        }
        None => Ok(collect(generation, writer, common.prompt_logprobs.is_some()).await?.into_response()),
    }
}

/// Prompts to ids, each with its own text. Errors: the text cannot be encoded.
pub async fn encode(
    resident: &Resident,
    prompts: Vec<Prompt>,
    add_special: bool,
    skip_special: bool,
) -> Result<Vec<(Vec<u32>, String)>, ApiError> {
    let text = resident.text.clone();
    let encode = move || {
        let one = |prompt| match prompt {
            Prompt::Text(prompt) => Ok((text.encode(&prompt, add_special)?, prompt)),
            Prompt::Ids(ids) => {
                let prompt = text.decode(&ids, skip_special);
                Ok((ids, prompt))
            }
        };
        prompts.into_iter().map(one).collect::<Result<Vec<_>, crate::text::Error>>()
    };
    tokio::task::spawn_blocking(encode)
        .await
        .map_err(|error| ApiError::Internal(format!("The tokenizer's task failed: {error}")))?
        .map_err(|error| ApiError::bad("prompt", format!("The prompt cannot be encoded: {error}.")))
}

/// A prompt as it is echoed.
struct Echo {
    ids: Vec<u32>,
    text: String,
}

/// A piece of one choice.
struct Chunk {
    choice: usize,
    /// The first of its choice: says once what was asked.
    is_first: bool,
    text: String,
    logprobs: Logprobs,
    ids: Vec<u32>,
    prompt_logprobs: Option<Value>,
    /// finish_reason and stop_reason.
    end: Option<(&'static str, Value)>,
}

/// The four parallel lists of the legacy format.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    top_logprobs: Vec<Value>,
}

impl Logprobs {
    fn extend(&mut self, other: Self) {
        self.tokens.extend(other.tokens);
        self.token_logprobs.extend(other.token_logprobs);
        self.text_offset.extend(other.text_offset);
        self.top_logprobs.extend(other.top_logprobs);
    }

    fn to_json(&self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.token_logprobs,
            "text_offset": self.text_offset, "top_logprobs": self.top_logprobs,
        })
    }
}

/// Updates become chunks.
struct Writer {
    tokens: TokenView,
    echo: bool,
    n: usize,
    /// Alternatives per token, if log-probabilities are wanted.
    top: Option<u32>,
    return_ids: bool,
    prompts: Vec<Echo>,
    choices: Vec<ChoiceState>,
    envelope: Envelope,
    fingerprint: String,
}

#[derive(Default)]
struct ChoiceState {
    /// Of ids whose text is still held back.
    logprobs: Logprobs,
    ids: Vec<u32>,
    prompt_logprobs: Option<Value>,
    /// A chunk has gone out.
    has_begun: bool,
    /// Characters of all tokens so far: the next `text_offset`.
    offset: usize,
}

impl Writer {
    fn chunk(&mut self, update: Update) -> Option<Chunk> {
        let choice = update.choice;
        match update.event {
            UpdateEvent::Started { prompt_logprobs } => self.started(choice, prompt_logprobs),
            UpdateEvent::Token { token, deltas } => {
                self.score(choice, token.id, token.logprobs.as_ref());
                let state = self.choices.get_mut(choice)?;
                state.ids.push(token.id);
                let text = join(deltas);
                // What is held back travels with the text that it belongs to.
                (!text.is_empty()).then(|| self.take(choice, text)).flatten()
            }
            UpdateEvent::Ended { deltas, finish, .. } => {
                let mut chunk = self.take(choice, join(deltas))?;
                chunk.end = Some((finish.reason(), finish.stop_reason()));
                Some(chunk)
            }
        }
    }

    fn started(&mut self, choice: usize, scores: Option<Vec<Option<TokenLogprobs>>>) -> Option<Chunk> {
        let prompt = self.prompts.get(choice / self.n.max(1))?;
        let prompt_logprobs = scores.as_ref().map(|scores| self.tokens.prompt_scores(&prompt.ids, scores));
        let (ids, text) =
            if self.echo { (prompt.ids.clone(), prompt.text.clone()) } else { Default::default() };
        for (place, id) in ids.into_iter().enumerate() {
            let scored = scores.as_ref().and_then(|scores| scores.get(place)).and_then(Option::as_ref);
            self.score(choice, id, scored);
        }
        self.choices.get_mut(choice)?.prompt_logprobs = prompt_logprobs;
        (!text.is_empty()).then(|| self.take(choice, text)).flatten()
    }

    /// Notes one token for the log-probabilities; the first of a prompt has none.
    fn score(&mut self, choice: usize, id: u32, scored: Option<&TokenLogprobs>) {
        let (Some(top), Some(state)) = (self.top, self.choices.get_mut(choice)) else { return };
        let label = self.tokens.label(id);
        let characters = self.tokens.text.token_string(id).unwrap_or_default().chars().count();
        state.logprobs.text_offset.push(json!(state.offset));
        state.offset += characters;
        state.logprobs.token_logprobs.push(json!(scored.map(|scored| finite(scored.logprob))));
        let map = scored.map(|scored| {
            let mut map = Map::new();
            for (other, logprob) in scored.top.iter().take(top as usize) {
                // Two tokens may look alike; the better one is named.
                map.entry(self.tokens.label(*other)).or_insert_with(|| json!(finite(*logprob)));
            }
            map.entry(label.clone()).or_insert_with(|| json!(finite(scored.logprob)));
            map
        });
        state.logprobs.tokens.push(json!(label));
        state.logprobs.top_logprobs.push(json!(map));
    }

    /// `text` and all that waited for it.
    fn take(&mut self, choice: usize, text: String) -> Option<Chunk> {
        let state = self.choices.get_mut(choice)?;
        Some(Chunk {
            choice,
            is_first: !std::mem::replace(&mut state.has_begun, true),
            text,
            logprobs: std::mem::take(&mut state.logprobs),
            ids: std::mem::take(&mut state.ids),
            prompt_logprobs: state.prompt_logprobs.take(),
            end: None,
        })
    }

    fn choice_json(&self, chunk: &Chunk) -> Map<String, Value> {
        let scores = match self.top {
            Some(_) if !chunk.logprobs.tokens.is_empty() => chunk.logprobs.to_json(),
            _ => Value::Null,
        };
        let (finish_reason, stop_reason) = match &chunk.end {
            Some((finish, stop)) => (json!(finish), stop.clone()),
            None => (Value::Null, Value::Null),
        };
        let mut choice = Map::new();
        choice.insert("index".into(), json!(chunk.choice));
        choice.insert("text".into(), json!(chunk.text));
        choice.insert("logprobs".into(), scores);
        choice.insert("finish_reason".into(), finish_reason);
        choice.insert("stop_reason".into(), stop_reason);
        if self.return_ids {
            choice.insert("token_ids".into(), json!(chunk.ids));
        }
        let prompt = self.prompts.get(chunk.choice / self.n.max(1));
        if let Some(prompt) = prompt.filter(|_| self.return_ids && chunk.is_first) {
            choice.insert("prompt_token_ids".into(), json!(prompt.ids));
        }
        choice
    }

    fn head(&self) -> Map<String, Value> {
        let mut head = self.envelope.head("text_completion");
        head.insert("system_fingerprint".into(), json!(self.fingerprint));
        head
    }
}

/// In raw mode everything is content.
fn join(deltas: Vec<Delta>) -> String {
    deltas
        .into_iter()
        .filter_map(|delta| match delta {
            Delta::Content(text) => Some(text),
            _ => None,
        })
        .collect()
}

struct CompletionFrames {
    writer: Writer,
    options: StreamOptions,
}

impl Frames for CompletionFrames {
    fn frames(&mut self, update: Update, usage: Usage, is_last: bool) -> Vec<Frame> {
        let Some(chunk) = self.writer.chunk(update) else { return Vec::new() };
        let mut frame = self.writer.head();
        frame.insert("choices".into(), json!([self.writer.choice_json(&chunk)]));
        if self.options.continuous_usage {
            frame.insert("usage".into(), usage.to_json());
        }
        // Where a frame with the usage follows, that one is the last.
        if is_last && !self.options.include_usage {
            frame.insert("timings".into(), usage.timings_json());
        }
        vec![Value::Object(frame).into()]
    }

    fn closing(&mut self, usage: Usage) -> Vec<Frame> {
        let closing = self.options.include_usage.then(|| {
            let mut frame = self.writer.head();
            frame.insert("choices".into(), json!([]));
            frame.insert("usage".into(), usage.to_json());
            frame.insert("timings".into(), usage.timings_json());
            Frame::from(Value::Object(frame))
        });
        closing.into_iter().collect()
    }
}

/// The stream, collected.
async fn collect(
    mut generation: Generation,
    mut writer: Writer,
    wants_prompt_logprobs: bool,
) -> Result<axum::Json<Value>, ApiError> {
    let mut answers: Vec<Option<Chunk>> = writer.choices.iter().map(|_| None).collect();
    while let Some(update) = generation.next().await {
        let Some(chunk) = writer.chunk(update?) else { continue };
        match answers.get_mut(chunk.choice) {
            Some(Some(answer)) => {
                answer.text.push_str(&chunk.text);
                answer.logprobs.extend(chunk.logprobs);
                answer.ids.extend(chunk.ids);
                answer.end = chunk.end.or(answer.end.take());
            }
            Some(answer) => *answer = Some(chunk),
            None => {}
        }
    }
    let choices: Vec<Value> = answers
        .into_iter()
        .flatten()
        .map(|answer| {
            let mut choice = writer.choice_json(&answer);
            let scores = answer.prompt_logprobs.filter(|_| wants_prompt_logprobs);
            choice.insert("prompt_logprobs".into(), json!(scores));
            Value::Object(choice)
        })
        .collect();
    let mut answer = writer.head();
    answer.insert("choices".into(), Value::Array(choices));
    answer.insert("usage".into(), generation.usage().to_json());
    answer.insert("timings".into(), generation.usage().timings_json());
    Ok(axum::Json(Value::Object(answer)))
}
