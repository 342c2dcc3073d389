//! Every request has a name, given by the client or by us; it comes back in the headers and in the answer's id.

use super::door::Quiet;
use super::ids::is_label;
use super::state::App;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use std::sync::Arc;
use std::time::Instant;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The request's name.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// Names the request and counts it.
pub async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
    let id = given.filter(|id| is_label(id)).map_or_else(|| app.ids.hex(), str::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let is_quiet = request.extensions().get::<Quiet>().is_some();
    let handler = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());

    let mut response = next.run(request).await;

    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HEADER, value);
    }
    let status = response.status().as_u16();
    // A client's own path would be a label without bound.
    let handler = handler.as_deref().unwrap_or("none");
    if !is_probe(handler) {
        app.metrics.http(handler, method_label(&method), status, started.elapsed());
        if !is_quiet {
            tracing::info!(target: "ferrotron::access", "{method} {path} {status} {id}");
        }
    }
    response
}

fn is_probe(handler: &str) -> bool {
    matches!(handler, "/health" | "/ping" | "/metrics" | "/load" | "/version")
}

/// Known methods only, for the same reason.
fn method_label(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "PATCH" => "PATCH",
        _ => "other",
    }
}
