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
    #[error("There is no response `{0}` here: it was not stored, or no longer is.")]
    UnknownResponse(String),
    /// `what`: a file, a batch.
    #[error("There is no {what} `{id}`.")]
    NotFound { what: &'static str, id: String },
    #[error("There is no route {method} {path} on this server.")]
    UnknownRoute { method: String, path: String },
    #[error("The method {method} is not allowed on {path}.")]
    MethodNotAllowed { method: String, path: String },
    #[error("The request body is larger than the limit of {limit} bytes.")]
    TooLarge { limit: usize },
    #[error("The request's head is larger than the limit of {limit} bytes.")]
    HeadTooLarge { limit: usize },
    #[error("The request has more than {limit} header fields.")]
    TooManyFields { limit: usize },
    /// Its first part counts from the first byte on, so that nobody can hold a place with one byte a minute.
    #[error("The request's {what} was not complete within {seconds} s.")]
    Slow { what: &'static str, seconds: u64 },
    #[error("All {limit} connections are in use. Try again later.")]
    Crowded { limit: usize },
    #[error("{0} is not implemented by this server.")]
    NotImplemented(String),
    #[error("The engine is currently busy: {limit} requests are queued already. Try again later.")]
    Busy { limit: usize },
    /// The words "Loading model" are what llama-server's clients look for.
    #[error("Loading model: {percent:.0} % done.")]
    Loading { percent: f32 },
    #[error("The model could not be loaded: {0}")]
    LoadFailed(String),
    /// The memory plan's own words.
    #[error("The model does not fit: {0}")]
    DoesNotFit(String),
    #[error("The model `{0}` is not loaded, and requests do not load models here: POST /models/load does.")]
    NotLoaded(String),
    #[error("The model `{0}` is asleep. POST /wake_up wakes it.")]
    Asleep(String),
    #[error("There is no room for the model: those that are loaded are busy. Try again later.")]
    NoRoom,
    #[error("The model was unloaded before the answer was complete.")]
    Unloaded,
    #[error("The answer was aborted: the model was put to sleep.")]
    Aborted,
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
            Self::BadRequest { .. } | Self::DoesNotFit(_) | Self::NotLoaded(_) => {
                (StatusCode::BAD_REQUEST, "BadRequestError")
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "AuthenticationError"),
            Self::UnknownModel { .. }
            | Self::UnknownResponse(_)
            | Self::NotFound { .. }
            | Self::UnknownRoute { .. } => (StatusCode::NOT_FOUND, "NotFoundError"),
            Self::MethodNotAllowed { .. } => (StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge"),
            Self::HeadTooLarge { .. } | Self::TooManyFields { .. } => {
                (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "RequestEntityTooLarge")
            }
            Self::Slow { .. } => (StatusCode::REQUEST_TIMEOUT, "TimeoutError"),
            Self::Crowded { .. } => (StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable"),
            Self::NotImplemented(_) => (StatusCode::NOT_IMPLEMENTED, "NotImplementedError"),
            // The proxies in front count 503 as a sick server; a full one is well.
            Self::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "RateLimitError"),
            Self::TimedOut => (StatusCode::GATEWAY_TIMEOUT, "TimeoutError"),
            Self::Loading { .. }
            | Self::LoadFailed(_)
            | Self::Asleep(_)
            | Self::NoRoom
            | Self::Unloaded
            | Self::Aborted
            | Self::ShuttingDown
            | Self::EngineDead(_) => (StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable"),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError"),
        }
    }

    /// What happened, as a client may be told.
    pub fn message(&self) -> String {
        cut(&self.to_string(), MESSAGE_CHARS_MAX)
    }

    /// `{"error":{"message","type","param","code"}}`
    pub fn body(&self) -> Value {
        let (status, kind) = self.kind();
        let param = match self {
            Self::BadRequest { param, .. } => param.as_deref(),
            Self::UnknownModel { .. } | Self::DoesNotFit(_) | Self::NotLoaded(_) => Some("model"),
            Self::UnknownResponse(_) => Some("response_id"),
            _ => None,
        };
        json!({"error": {"message": self.message(), "type": kind, "param": param, "code": status.as_u16()}})
    }

    /// Seconds after which the same request may succeed, if it may.
    pub fn retry_after(&self) -> Option<&'static str> {
        match self {
            Self::Busy { .. }
            | Self::Crowded { .. }
            | Self::Loading { .. }
            | Self::Unloaded
            | Self::ShuttingDown => Some("1"),
            Self::Asleep(_) | Self::NoRoom | Self::Aborted => Some("5"),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind().0, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if matches!(self, Self::TimedOut | Self::LoadFailed(_)) {
            // SDKs repeat what failed with 5xx; the same request would take as long, or fail the same, again.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self == Self::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // Routes of another API say it in their own form; see `dialect`.
        response.extensions_mut().insert(self);
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
