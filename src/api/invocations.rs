//! `POST /invocations`: the one route of a SageMaker endpoint. What is asked for shows in the body.

use super::body::JsonBody;
use super::error::ApiError;
use super::request_id::RequestId;
use super::state::App;
use super::{chat, completions, responses};
use axum::extract::{Extension, State};
use axum::response::Response;
use std::sync::Arc;

/// A chat for `messages`, a completion for `prompt`, a response for `input`. Errors: those of the route, or none of
/// the three is there.
pub async fn invoke(
    app: State<Arc<App>>,
    request_id: Extension<RequestId>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let has = |name: &str| body.map.get(name).is_some_and(|value| !value.is_null());
    if has("messages") {
        chat::create(app, request_id, body).await
    } else if has("prompt") {
        completions::create(app, request_id, body).await
    } else if has("input") {
        responses::create(app, body).await
    } else {
        Err(ApiError::malformed("`messages`, `prompt` or `input` is required."))
    }
}
