//! Which API a route belongs to. Its errors take that API's form, whoever made them: a handler, the check of keys, the
//! router itself.

use super::error::ApiError;
use super::request_id::RequestId;
use super::{anthropic, ollama};
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::Value;

/// A family of routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Also what belongs to no family.
    OpenAi,
    Anthropic,
    Ollama,
}

impl Dialect {
    pub fn of(path: &str) -> Self {
        let messages = path.strip_prefix("/v1/messages");
        match messages {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Self::Anthropic,
            _ if path.starts_with("/api/") => Self::Ollama,
            _ => Self::OpenAi,
        }
    }

    fn error(self, error: &ApiError, request_id: &str) -> Value {
        match self {
            Self::OpenAi => error.body(),
            Self::Anthropic => anthropic::error(error, request_id),
            Self::Ollama => ollama::error(error),
        }
    }
}

/// Says errors again in the form of the route's family; status and headers stay.
pub async fn translate_errors(request: Request, next: Next) -> Response {
    let dialect = Dialect::of(request.uri().path());
    let request_id = request.extensions().get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
    let mut response = next.run(request).await;
    if dialect == Dialect::OpenAi {
        return response;
    }
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        *response.body_mut() = Body::from(dialect.error(&error, &request_id).to_string());
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if dialect == Dialect::Anthropic
        && let Ok(value) = HeaderValue::from_str(&request_id)
    {
        // Where the SDK of this family looks for it.
        response.headers_mut().insert("request-id", value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::middleware::from_fn;
    use axum::routing::get;
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    #[tokio::test]
    async fn a_panic_is_said_in_the_form_of_the_path_too() {
        async fn panic() -> StatusCode {
            panic!("on purpose")
        }
        let paths = ["/v1/messages", "/v1/models", "/api/chat"];
        let router = paths.into_iter().fold(Router::new(), |router, path| router.route(path, get(panic)));
        let layers = |router: Router| {
            router.layer(CatchPanicLayer::custom(crate::api::panicked)).layer(from_fn(translate_errors))
        };
        let router = layers(router);
        let check = async |path: &str, pointer: &str, kind: &str| {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = router.clone().oneshot(request).await.expect("the router is infallible");
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.expect("a whole body");
            let body: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(body.pointer(pointer), Some(&kind.into()), "{body}");
        };
        check("/v1/messages", "/error/type", "api_error").await;
        check("/v1/messages", "/type", "error").await;
        check("/v1/models", "/error/type", "InternalServerError").await;
        check("/api/chat", "/error", "The server failed to handle this request.").await;
    }

    #[test]
    fn the_path_says_whose_form_an_error_takes() {
        let check = |path: &str, dialect: Dialect| assert_eq!(Dialect::of(path), dialect, "{path}");
        check("/v1/messages", Dialect::Anthropic);
        check("/v1/messages/count_tokens", Dialect::Anthropic);
        check("/v1/messages/nowhere", Dialect::Anthropic);
        check("/v1/messagesque", Dialect::OpenAi);
        check("/v1/models", Dialect::OpenAi);
        check("/api/chat", Dialect::Ollama);
        check("/api/nowhere", Dialect::Ollama);
        check("/api", Dialect::OpenAi);
        check("/", Dialect::OpenAi);
    }
}
