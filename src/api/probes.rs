//! Routes that watch the server. They look at published values and never wait for the engine.

use super::error::ApiError;
use super::query::Pairs;
use super::state::{App, Health};
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// 200 when a request would be taken, else 503 that says why.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let body = match app.health() {
        Health::Ready => return Json(json!({"status": "ok"})).into_response(),
        Health::Loading(progress) => json!({"status": "loading", "progress": progress}),
        Health::Empty => json!({"status": "unloaded"}),
        Health::LoadFailed(message) => json!({"status": "failed", "message": message}),
        Health::Draining => json!({"status": "draining"}),
        Health::Dead(message) => json!({"status": "dead", "message": message}),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

pub async fn version(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"version": app.options.version}))
}

/// Requests being answered right now.
pub async fn load(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"server_load": app.metrics.in_flight()}))
}

/// `?model=` shows one model alone. Errors: 404 for a name that nobody has.
pub async fn metrics(State(app): State<Arc<App>>, query: Pairs) -> Result<Response, ApiError> {
    let only = query.get("model").map(|name| app.place(name)).transpose()?;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], app.exposition(only)).into_response())
}
