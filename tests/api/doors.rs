//! Who is let in, from where, and by which name.

use super::world::{Listening, Server, names, parsed};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use ferrotron::api::{CorsOptions, Limits, Options};
use std::time::Duration;

async fn with_keys(keys: &[&str]) -> Server {
    let mut options = Options::new(names());
    options.api_keys = keys.iter().map(|key| (*key).to_owned()).collect();
    Server::start("x", Duration::ZERO, options).await
}

async fn status(server: &Server, method: Method, path: &str, fields: &[(&str, &str)]) -> u16 {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    server.call(request.body(Body::empty()).expect("a request")).await.status().as_u16()
}

#[tokio::test]
async fn any_of_several_keys_opens_and_nothing_else_does() {
    let server = with_keys(&["first", "second key"]).await;
    let check = async |fields: &[(&str, &str)], expected: u16| {
        assert_eq!(status(&server, Method::GET, "/v1/models", fields).await, expected, "{fields:?}");
    };
    check(&[], 401).await;
    check(&[("authorization", "Bearer first")], 200).await;
    check(&[("authorization", "bEARER second key")], 200).await;
    check(&[("x-api-key", "first")], 200).await;
    check(&[("authorization", "Bearer firs")], 401).await;
    check(&[("authorization", "Bearer first2")], 401).await;
    check(&[("authorization", "Bearer ")], 401).await;
    check(&[("authorization", "first")], 401).await;
    check(&[("authorization", "Basic first")], 401).await;
    check(&[("x-api-key", "")], 401).await;
    check(&[("cookie", "first")], 401).await;
}

/// What vLLM leaves open because its path begins with something else than /v1 is closed here.
#[tokio::test]
async fn only_probes_are_open() {
    let server = with_keys(&["key"]).await;
    for path in ["/", "/health", "/ping", "/version", "/metrics", "/load", "/api/version", "/docs"] {
        assert_ne!(status(&server, Method::GET, path, &[]).await, 401, "{path}");
    }
    for path in
        ["/tokenize", "/detokenize", "/sleep", "/models/load", "/api/chat", "/v1/chat/completions", "/x"]
    {
        assert_eq!(status(&server, Method::POST, path, &[]).await, 401, "{path}");
    }
    assert_eq!(status(&server, Method::GET, "/health/../v1/models", &[]).await, 401);
    assert_eq!(status(&server, Method::GET, "//health", &[]).await, 401);
}

#[tokio::test]
async fn who_is_refused_learns_how_to_ask() {
    let server = with_keys(&["key"]).await;
    let request = Request::get("/v1/models").body(Body::empty()).expect("a request");
    let response = server.call(request).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
    let (_, body) = super::world::read(response).await;
    assert!(body.contains("AuthenticationError") && body.contains("x-api-key"), "{body}");
    assert!(!body.contains("\"key\""), "{body}");
}

/// Which origin an answer to a page of `origin` allows.
async fn allowed(server: &Server, origin: &str, method: Method) -> Option<String> {
    let request = Request::builder()
        .method(method)
        .uri("/v1/models")
        .header(header::ORIGIN, origin)
        .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
        .header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization, content-type");
    let response = server.call(request.body(Body::empty()).expect("a request")).await;
    let allowed = response.headers().get(header::ACCESS_CONTROL_ALLOW_ORIGIN)?;
    Some(allowed.to_str().expect("ASCII").to_owned())
}

async fn cors(keys: &[&str], cors: CorsOptions) -> Server {
    let mut options = Options::new(names());
    options.api_keys = keys.iter().map(|key| (*key).to_owned()).collect();
    options.cors = cors;
    Server::start("x", Duration::ZERO, options).await
}

#[tokio::test]
async fn pages_of_this_machine_may_call_and_others_only_where_a_key_is_asked_for() {
    let open = cors(&[], CorsOptions::default()).await;
    let keyed = cors(&["key"], CorsOptions::default()).await;
    let local =
        ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:8080", "app://obsidian.md", "tauri://x"];
    for method in [Method::OPTIONS, Method::GET] {
        for origin in local {
            assert_eq!(allowed(&open, origin, method.clone()).await.as_deref(), Some(origin), "{method}");
        }
        for origin in ["https://evil.example", "http://localhost.evil.example", "null", "file://"] {
            assert_eq!(allowed(&open, origin, method.clone()).await, None, "{method} {origin}");
        }
        assert_eq!(allowed(&keyed, "https://any.example", method).await.as_deref(), Some("*"));
    }
}

#[tokio::test]
async fn named_origins_are_the_only_ones() {
    let origins = Some(vec!["https://a.example".to_owned()]);
    let server = cors(&["key"], CorsOptions { origins, ..CorsOptions::default() }).await;
    assert_eq!(
        allowed(&server, "https://a.example", Method::GET).await.as_deref(),
        Some("https://a.example")
    );
    assert_eq!(allowed(&server, "https://b.example", Method::GET).await, None);
    let everyone =
        CorsOptions { origins: Some(vec!["*".to_owned()]), credentials: true, ..CorsOptions::default() };
    let server = cors(&["key"], everyone).await;
    // With credentials browsers do not take `*`.
    assert_eq!(
        allowed(&server, "https://b.example", Method::GET).await.as_deref(),
        Some("https://b.example")
    );
}

#[tokio::test]
async fn a_preflight_needs_no_key() {
    let server = cors(&["key"], CorsOptions::default()).await;
    let fields = [("origin", "https://a.example"), ("access-control-request-method", "POST")];
    assert_eq!(status(&server, Method::OPTIONS, "/v1/chat/completions", &fields).await, 200);
}

#[tokio::test]
async fn behind_a_proxy_every_path_has_two_names() {
    let server = Server::answering("x").await;
    let server = Listening::around(server, Limits::default(), |door| door.with_root("/llm/")).await;
    let check = async |path: &str, expected: u16| {
        let answer =
            server.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(parsed(&answer).0, expected, "{path}: {answer}");
    };
    check("/llm/v1/models", 200).await;
    check("/llm/v1/models/nvidia/tiny?api-version=1", 200).await;
    check("/v1/models", 200).await;
    check("/llmv1/models", 404).await;
}
