//! A request's body becomes a JSON object, or a 400 that says why not.

use super::door::Limits;
use super::error::ApiError;
use super::query::Pairs;
use super::state::App;
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The body as an object, and when it had arrived.
pub struct JsonBody {
    pub map: Map<String, Value>,
    pub arrived: Instant,
}

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        check_type(request.headers())?;
        Self::read(request, app).await
    }
}

/// A JSON object that need not say that it is one: command lines send it as a form or as nothing.
pub struct UntypedBody(pub JsonBody);

impl FromRequest<Arc<App>> for UntypedBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        // Browsers name the page that sends: pages are held to the type, see [`check_type`].
        if request.headers().contains_key(header::ORIGIN) {
            check_type(request.headers())?;
        }
        JsonBody::read(request, app).await.map(Self)
    }
}

impl JsonBody {
    async fn read(request: Request, app: &App) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        let limit = app.options.body_limit;
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > limit) {
            return Err(ApiError::TooLarge { limit });
        }
        let priority = priority(request.headers())?;
        let (mut parts, body) = request.into_parts();
        let autoload = Pairs::from_request_parts(&mut parts, app).await?.bool("autoload")?;
        let patience = parts.extensions.get::<Limits>().copied().unwrap_or_default().body;
        let bytes = read(body, limit, patience).await?;
        let mut map = read_object(&bytes)?;
        if let Some(priority) = priority.filter(|_| map.get("priority").is_none_or(Value::is_null)) {
            map.insert("priority".to_owned(), priority.into());
        }
        // llama-server's clients say it in the address.
        if let Some(autoload) = autoload {
            map.insert("autoload".to_owned(), autoload.into());
        }
        Ok(Self { map, arrived })
    }
}

/// Proxies sort their clients into classes without touching the body: the header stands for the field where there
/// is none. Errors: 400 if it is no integer.
pub fn priority(headers: &HeaderMap) -> Result<Option<i64>, ApiError> {
    let Some(value) = headers.get("x-vllm-priority") else { return Ok(None) };
    let number = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    number
        .map(Some)
        .ok_or_else(|| ApiError::bad("X-Vllm-Priority", "The header `X-Vllm-Priority` must be an integer."))
}

/// A page of another origin can send text without asking first, but not JSON: so this also keeps strangers out.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media = value.split(';').next().unwrap_or("").trim();
    if media.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::malformed("Unsupported Media Type: Only 'application/json' is allowed"))
}

/// Bytes of a body that bring a further second: a phone far from its mast is faster.
const BYTES_PER_SECOND: u32 = 1024;

/// All of the body; without a declared length it is counted as it comes. What comes in drops is given up, so that
/// nobody holds a request open for nothing.
pub async fn read(body: Body, limit: usize, patience: Duration) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    let start = tokio::time::Instant::now();
    loop {
        let earned =
            Duration::from_secs(1) * u32::try_from(bytes.len()).unwrap_or(u32::MAX) / BYTES_PER_SECOND;
        let chunk = tokio::time::timeout_at(start + patience + earned, chunks.next()).await;
        let chunk = chunk.map_err(|_| ApiError::Slow { what: "body", seconds: start.elapsed().as_secs() })?;
        let Some(chunk) = chunk else { break };
        let chunk =
            chunk.map_err(|error| ApiError::malformed(format!("The body ended too early: {error}")))?;
        if bytes.len() + chunk.len() > limit {
            return Err(ApiError::TooLarge { limit });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The bytes of a body as an object. Errors: 400 with what the JSON reader says.
///
/// serde_json bounds the nesting at 128 levels, so that no body can exhaust the stack.
pub fn read_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::malformed("The body must be a JSON object.")),
        Err(error) => Err(ApiError::malformed(format!("JSON decode error: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &[u8], words: &str) {
        let error = read_object(body).expect_err("the test gives what cannot be read").to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn what_is_no_object_says_why() {
        check(b"", "EOF");
        check(b"{\"a\": }", "expected value");
        check(b"[1]", "must be a JSON object");
        check(b"{\"a\": \"\xff\"}", "unicode");
        check(b"{\"a\": NaN}", "expected value");
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(200), "]".repeat(200));
        check(deep.as_bytes(), "recursion limit");
        check("[".repeat(1 << 20).as_bytes(), "recursion limit");
    }
}
