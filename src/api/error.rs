//! What can go wrong on the wire, and the one table from error to status and OpenAI error body.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// User input is quoted in messages; nobody needs more of it back than this many characters.
const MESSAGE_CHARS_MAX: usize = 1000;

/// A request that gets no answer, or a stream that ends early.
///
/// `param` names the field at fault in the client's own spelling (`messages[2].content`).
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    #[error("{message}")]
    BadRequest { message: String, param: Option<String> },
    #[error("A valid API key is required: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.")]
    Unauthorized,
    #[error("The model `{name}` does not exist. Served here: {served}.")]
    UnknownModel { name: String, served: String },
    /// `what`: a file, a batch.
    #[error("There is no {what} `{id}`.")]
    NotFound { what: &'static str, id: String },
    #[error("There is no route {method} {path} on this server.")]
    UnknownRoute { method: String, path: String },
    #[error("The method {method} is not allowed on {path}.")]
    MethodNotAllowed { method: String, path: String },
    #[error("The request body is larger than the limit of {limit} bytes.")]
    TooLarge { limit: usize },
    #[error("{0} is not implemented by this server.")]
    NotImplemented(String),
    #[error("The engine is currently busy: {limit} requests are queued already. Try again later.")]
    Busy { limit: usize },
    /// The words "Loading model" are what llama-server's clients look for.
    #[error("Loading model: {percent:.0} % done.")]
    Loading { percent: f32 },
    #[error("The model could not be loaded: {0}")]
    LoadFailed(String),
    #[error("The server is shutting down.")]
    ShuttingDown,
    /// The request's own `timeout`, or the server's for all.
    #[error("The answer was not complete before the request's timeout.")]
    TimedOut,
    #[error("The engine has stopped: {0}")]
    EngineDead(String),
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    /// A client's mistake in `param`.
    pub fn bad(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::BadRequest { message: message.into(), param: Some(param.into()) }
    }

    /// A client's mistake that no single field holds.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::BadRequest { message: message.into(), param: None }
    }

    /// The table: status, and the `type` that clients switch on.
    pub fn kind(&self) -> (StatusCode, &'static str) {
        match self {
            Self::BadRequest { .. } => (StatusCode::BAD_REQUEST, "BadRequestError"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "AuthenticationError"),
            Self::UnknownModel { .. } | Self::UnknownRoute { .. } | Self::NotFound { .. } => {
                (StatusCode::NOT_FOUND, "NotFoundError")
            }
            Self::MethodNotAllowed { .. } => (StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge"),
            Self::NotImplemented(_) => (StatusCode::NOT_IMPLEMENTED, "NotImplementedError"),
            // The proxies in front count 503 as a sick server; a full one is well.
            Self::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "RateLimitError"),
            Self::TimedOut => (StatusCode::GATEWAY_TIMEOUT, "TimeoutError"),
            Self::Loading { .. } | Self::LoadFailed(_) | Self::ShuttingDown | Self::EngineDead(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable")
            }
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError"),
        }
    }

    /// `{"error":{"message","type","param","code"}}`
    pub fn body(&self) -> Value {
        let (status, kind) = self.kind();
        let param = match self {
            Self::BadRequest { param, .. } => param.as_deref(),
            Self::UnknownModel { .. } => Some("model"),
            _ => None,
        };
        let message = cut(&self.to_string(), MESSAGE_CHARS_MAX);
        json!({"error": {"message": message, "type": kind, "param": param, "code": status.as_u16()}})
    }

    /// Whether the same request may succeed a little later.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Loading { .. } | Self::ShuttingDown)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind().0, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.is_passing() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self == Self::TimedOut {
            // SDKs repeat what failed with 5xx; the same request would take as long again.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self == Self::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The first `chars` characters of `text`, with `…` where something was left out.
pub fn cut(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_names_the_field_and_the_status() {
        let error = ApiError::bad("temperature", "`temperature` must be between 0 and 2, got 3.");
        assert_eq!(
            error.body(),
            json!({"error": {
                "message": "`temperature` must be between 0 and 2, got 3.",
                "type": "BadRequestError", "param": "temperature", "code": 400,
            }})
        );
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöü", 2), "äö…");
        let body = ApiError::malformed("é".repeat(5000)).body();
        let message = body["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(message.chars().count(), MESSAGE_CHARS_MAX + 1);
    }

    #[test]
    fn only_passing_troubles_ask_for_a_retry() {
        let retry = |error: ApiError| error.into_response().headers().contains_key(header::RETRY_AFTER);
        assert!(retry(ApiError::Busy { limit: 1 }));
        assert!(retry(ApiError::Loading { percent: 10.0 }));
        assert!(!retry(ApiError::malformed("no")));
        assert!(!retry(ApiError::LoadFailed("no file".into())));
        assert!(!retry(ApiError::TimedOut));
    }

    #[test]
    fn who_must_wait_is_told_from_who_waited_too_long() {
        let check = |error: ApiError, status: u16, kind: &str| {
            assert_eq!((error.kind().0.as_u16(), error.kind().1), (status, kind));
        };
        check(ApiError::Busy { limit: 1 }, 429, "RateLimitError");
        check(ApiError::TimedOut, 504, "TimeoutError");
        check(ApiError::ShuttingDown, 503, "Service Unavailable");
        assert_eq!(ApiError::TimedOut.into_response().headers()["x-should-retry"], "false");
    }
}
