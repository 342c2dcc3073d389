//! `POST /v1/messages` and `/v1/messages/count_tokens`, Anthropic's API: a thin translation around a [`Conversation`].
//!
//! ```text
//! body ─request, history, tools→ the body of a chat ─Conversation─┬─ stream: pieces → events
//!                                                                 └─ answer: pieces → content blocks
//! ```

mod answer;
mod history;
mod request;
mod stream;
mod tools;

use super::body::JsonBody;
use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::Fields;
use super::request_id::RequestId;
use super::state::App;
use super::tokenize;
use super::types::TokenizeRequest;
use answer::{Answer, Head};
use axum::Json;
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use stream::MessageFrames;

/// Answers a conversation. Errors: 400 for what cannot be read, else those of [`Conversation::open`].
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(request_id): Extension<RequestId>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::top(&body.map);
    let model = fields.required_string("model")?;
    let mut map = request::whole(&fields, &app.options.request)?;
    name_model(&app, model, &mut map);
    let chat = JsonBody { map, arrived: body.arrived };
    let mut conversation = Conversation::open(&app, &chat).await.map_err(request::respelled)?;
    let head = Head { id: format!("msg_{}", request_id.0), model: model.to_owned() };
    if conversation.common.stream.is_some() {
        let Conversation { generation, reader, .. } = conversation;
        let frames = MessageFrames::new(reader, head, request_id.0);
        return Ok(super::stream::respond(generation, frames, app.options.keep_alive));
    }
    let mut answer = Answer::default();
    let usage = conversation.each(|chunk| answer.push(chunk.piece)).await?;
    Ok(Json(answer.into_json(&head, usage)).into_response())
}

/// How many tokens the prompt of the same request has. Errors: as [`create`], before anything is generated.
pub async fn count_tokens(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::top(&body.map);
    let model = fields.required_string("model")?;
    let mut map = request::prompt(&fields, &app.options.request)?;
    name_model(&app, model, &mut map);
    let resident = app.described(&map).await?;
    let request = TokenizeRequest::read(&map, app.rules(&resident)).map_err(request::respelled)?;
    let ids = tokenize::ids(&resident, request.input).await?;
    Ok(Json(json!({"input_tokens": ids.len()})))
}

/// Agents ask for several of Anthropic's models by name, a large and a small one; here the front model is all of them.
fn name_model(app: &App, model: &str, chat: &mut Map<String, Value>) {
    let is_alias =
        app.options.request.claude_names && model.starts_with("claude") && app.place(model).is_err();
    if !is_alias {
        chat.insert("model".into(), json!(model));
    }
}

/// `{"type":"error","error":{"type","message"},"request_id"}`
pub fn error(error: &ApiError, request_id: &str) -> Value {
    let kind = match error.kind().0 {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message()}, "request_id": request_id})
}
