//! Every error on a path of Ollama's in Ollama's shape, whoever made it: a handler, the router or the guard of keys.

use crate::api::error::ApiError;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};

/// Gives an [`ApiError`] its other body; status and headers stay.
pub async fn shape(request: Request, next: Next) -> Response {
    let is_ours = request.uri().path().starts_with("/api/");
    let response = next.run(request).await;
    let Some(error) = response.extensions().get::<ApiError>().filter(|_| is_ours).cloned() else {
        return response;
    };
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(body(&error).to_string()))
}

/// `{"error":"…"}`
pub fn body(error: &ApiError) -> Value {
    json!({"error": match error {
        // The words that clients look for before they pull a model.
        ApiError::UnknownModel { name, .. } => ApiError::malformed(format!("model '{name}' not found")).message(),
        other => other.message(),
    }})
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::to_bytes;
    use axum::middleware::from_fn;
    use axum::routing::get;
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    async fn panic() -> &'static str {
        panic!("on purpose")
    }

    #[tokio::test]
    async fn a_panic_has_the_shape_of_its_path() {
        for (path, expected) in [("/api/panic", true), ("/panic", false)] {
            let router = Router::new().route(path, get(panic));
            let router = router.layer(CatchPanicLayer::custom(crate::api::panicked)).layer(from_fn(shape));
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = router.oneshot(request).await.expect("the router is infallible");
            assert_eq!(response.status(), 500);
            let bytes = to_bytes(response.into_body(), 1 << 16).await.expect("a whole body");
            let error: Value = serde_json::from_slice(&bytes).expect("JSON");
            assert_eq!(error["error"].is_string(), expected, "{error}");
        }
    }
}
