//! `POST /v1/chat/completions/batch`: several conversations under the same fields, one choice for each.

use super::body::JsonBody;
use super::chat::Plain;
use super::conversation::{Collected, Conversation};
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::request_id::RequestId;
use super::state::App;
use super::usage::Usage;
use axum::Json;
use axum::extract::{Extension, State};
use futures_util::future::try_join_all;
use serde_json::Value;
use std::sync::Arc;

/// Conversations in one request: as many as prompts in one of `/v1/completions`.
const CONVERSATIONS_MAX: usize = 1024;

/// Answers each of `messages`, a list of conversations; choice `index` is the conversation's place. Errors: those of
/// [`Conversation::open`] for any of them; then none is answered.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(request_id): Extension<RequestId>,
    mut body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    check(&Fields::top(&body.map))?;
    let Some(Value::Array(histories)) = body.map.remove("messages") else { return Ok(Json(Value::Null)) };
    let mut opened = Vec::with_capacity(histories.len());
    for (index, messages) in histories.into_iter().enumerate() {
        let mut map = body.map.clone();
        map.insert("messages".into(), messages);
        let one = JsonBody { map, arrived: body.arrived };
        opened.push(Conversation::open(&app, &one).await.map_err(|error| of(index, error))?);
    }
    let plain = opened.first().map(|first| Plain::new(first, &request_id));
    let answers = try_join_all(opened.into_iter().map(Conversation::collect)).await?;
    let answer = plain.map(|plain| plain.into_json(joined(answers)));
    Ok(Json(answer.unwrap_or_default()))
}

/// Errors: `messages` is no list of lists, or a field makes sense for one conversation only.
fn check(fields: &Fields) -> Result<(), ApiError> {
    fields.required("messages")?;
    let histories = fields.array("messages")?.unwrap_or_default();
    if histories.is_empty() || histories.len() > CONVERSATIONS_MAX {
        let got = histories.len();
        let message = format!("`messages` must hold 1 to {CONVERSATIONS_MAX} conversations, got {got}.");
        return Err(fields.bad("messages", message));
    }
    if let Some((index, other)) = histories.iter().enumerate().find(|(_, history)| !history.is_array()) {
        return Err(wrong(&format!("messages[{index}]"), "a list of messages", other));
    }
    if fields.bool("stream")? == Some(true) {
        return Err(fields.bad("stream", "A batch cannot be streamed."));
    }
    if fields.integer("n", 1..=i64::MAX)?.is_some_and(|n| n != 1) {
        return Err(fields.bad("n", "`n` must be 1 in a batch: it has one choice for each conversation."));
    }
    for name in ["prompt_logprobs", "return_token_ids"] {
        if fields.get(name).is_some_and(|value| *value != false) {
            return Err(fields.bad(name, format!("`{name}` is not supported in a batch: prompts differ.")));
        }
    }
    Ok(())
}

/// The error of one conversation, named by its place.
fn of(index: usize, error: ApiError) -> ApiError {
    let ApiError::BadRequest { message, param: Some(param) } = error else { return error };
    let Some(rest) = param.strip_prefix("messages") else {
        return ApiError::BadRequest { message, param: Some(param) };
    };
    let message = message.replace("`messages", &format!("`messages[{index}]"));
    ApiError::bad(format!("messages[{index}]{rest}"), message)
}

fn joined(answers: Vec<Collected>) -> Collected {
    let mut all = Collected {
        messages: Vec::new(),
        prompt: Vec::new(),
        prompt_logprobs: Value::Null,
        usage: Usage::default(),
    };
    for answer in answers {
        all.usage.prompt_tokens += answer.usage.prompt_tokens;
        all.usage.add(answer.usage);
        all.messages.extend(answer.messages);
    }
    all
}
