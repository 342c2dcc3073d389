//! What is refused, on any route: how it is said, and who is let in.

use super::world::{CHAT, Server, chat, names, post, read};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use ferrotron::api::Options;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn bad_requests_are_named() {
    let server = Server::answering("x").await;
    let check = async |path: &str, body: &str, status: u16, param: Value, words: &str| {
        let (got, text) = read(server.call(post(path, body.to_owned())).await).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        let error = &error["error"];
        assert_eq!(
            (got.as_u16(), &error["code"], &error["param"]),
            (status, &json!(status), &param),
            "{body}: {text}"
        );
        assert!(error["message"].to_string().contains(words), "{body}: {text}");
    };
    check(CHAT, "", 400, Value::Null, "JSON decode error").await;
    check(CHAT, "{\"messages\": ", 400, Value::Null, "JSON decode error").await;
    check(CHAT, "[1]", 400, Value::Null, "object").await;
    check(CHAT, &format!("{{\"a\":{}", "[".repeat(100_000)), 400, Value::Null, "recursion").await;
    check(CHAT, "{}", 400, json!("messages"), "required").await;
    check(CHAT, "{\"messages\": []}", 400, json!("messages"), "empty").await;
    check(CHAT, "{\"messages\": \"hi\"}", 400, json!("messages"), "an array").await;
    check("/v1/completions", "{}", 400, json!("prompt"), "required").await;
    check("/v1/completions", "{\"prompt\": []}", 400, json!("prompt"), "empty").await;
    check("/v1/completions", "{\"prompt\": [4096]}", 400, json!("prompt"), "outside the vocabulary").await;
    check("/v1/completions", "{\"prompt\": \"x\", \"suffix\": \"y\"}", 400, json!("suffix"), "not currently")
        .await;
    check("/detokenize", "{\"tokens\": [-1]}", 400, json!("tokens"), "outside the vocabulary").await;
    let with = |extra| chat(extra).to_string();
    check(CHAT, &with(json!({"model": "gpt-4"})), 404, json!("model"), "nvidia/tiny").await;
    check(CHAT, &with(json!({"temperature": 3})), 400, json!("temperature"), "between 0 and 2").await;
    check(CHAT, &with(json!({"max_tokens": 100_000})), 400, json!("max_tokens"), "max_model_len").await;
    for stream in [false, true] {
        let with = |extra: Value| {
            let mut body = chat(extra);
            body["stream"] = json!(stream);
            body.to_string()
        };
        let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
        let path = json!("response_format.json_schema.schema");
        check(CHAT, &with(format(json!({"type": "text"}))), 400, path.clone(), "`type`").await;
        check(CHAT, &with(format(json!({"$ref": "#/$defs/No"}))), 400, path.clone(), "No").await;
        check(CHAT, &with(format(json!({"enum": []}))), 400, path, "`enum`").await;
        check(CHAT, &with(json!({"guided_regex": "("})), 400, json!("guided_regex"), "regex").await;
        check(CHAT, &with(json!({"guided_grammar": "?"})), 400, json!("guided_grammar"), "grammar").await;
        let nested = "(".repeat(100_000);
        check(CHAT, &with(json!({"guided_regex": nested})), 400, json!("guided_regex"), "brackets").await;
        let unspeakable = json!([{"type": "function", "function": {"name": "a>b"}}]);
        let forced = json!({"tools": unspeakable, "tool_choice": "required"});
        check(CHAT, &with(forced), 400, json!("tools"), "a>b").await;
    }
    let both = json!({"structured_outputs": {"regex": "a", "choice": ["b"]}});
    check(CHAT, &with(both), 400, json!("structured_outputs"), "exactly one").await;
    let long = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    check(CHAT, &with(json!({"messages": long})), 400, json!("input_tokens"), "maximum context length").await;
    // Fields that nobody knows, nulls and floats do no harm.
    let (status, _) = server.json(CHAT, chat(json!({"store": true, "stop": null, "max_tokens": 4.0}))).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn what_is_not_served_is_said_in_the_same_shape() {
    let server = Server::answering("x").await;
    let check = async |method: Method, path: &str, status: u16| {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
        let response = server.call(request).await;
        let allow = response.headers().get(header::ALLOW).is_some();
        let (got, text) = read(response).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        assert_eq!((got.as_u16(), &error["error"]["code"]), (status, &json!(status)), "{path}: {text}");
        assert_eq!(allow, status == 405, "{path}");
    };
    check(Method::GET, "/nowhere", 404).await;
    check(Method::GET, CHAT, 405).await;
    check(Method::DELETE, "/v1/models", 405).await;
    check(Method::POST, "/v1/embeddings", 501).await;
    let plain = Request::post(CHAT).header(header::CONTENT_TYPE, "text/plain").body(Body::from("{}"));
    let (status, text) = read(server.call(plain.expect("a request")).await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("Unsupported Media Type"), "{text}");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_declared_or_not() {
    let mut options = Options::new(vec!["tiny".into()]);
    options.body_limit = 1000;
    let server = Server::start("x", Duration::ZERO, options).await;
    let body = "x".repeat(1001);
    let declared = Request::post(CHAT)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, body.len());
    let declared = declared.body(Body::from(body.clone())).expect("a request");
    for request in [declared, post(CHAT, body)] {
        let (status, text) = read(server.call(request).await).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
        assert!(text.contains("1000 bytes"), "{text}");
    }
}

#[tokio::test]
async fn too_many_are_told_to_come_again() {
    let options = Options::new(names());
    let server = Server::start("x", Duration::from_millis(5), options).await;
    let engine = &server.app.resident(0).expect("a model").engine;
    // As full as a thousand clients would make it.
    engine.stats().waiting.store(1024, std::sync::atomic::Ordering::Relaxed);
    let response = server.call(post(CHAT, chat(json!({})).to_string())).await;
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    let (status, text) = read(response).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert!(text.contains("RateLimitError") && text.contains("1024 requests are queued"), "{text}");
}

#[tokio::test]
async fn keys_guard_all_but_the_probes() {
    let mut options = Options::new(vec!["tiny".into()]);
    options.api_keys = vec!["secret".into()];
    let server = Server::start("x", Duration::ZERO, options).await;
    for path in ["/health", "/ping", "/version", "/metrics", "/load"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    let (status, text) = server.get("/v1/models").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(text.contains("AuthenticationError"), "{text}");
    let request =
        Request::get("/v1/models").header(header::AUTHORIZATION, "Bearer secret").body(Body::empty());
    assert_eq!(server.call(request.expect("a request")).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn only_local_pages_may_call_an_open_server() {
    let server = Server::answering("x").await;
    let preflight = async |origin: &str| {
        let request = Request::options(CHAT)
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .body(Body::empty());
        let response = server.call(request.expect("a request")).await;
        response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN)
    };
    assert!(preflight("http://localhost:3000").await);
    assert!(!preflight("https://evil.example").await);
}

#[tokio::test]
async fn a_class_in_the_header_is_read_like_the_field() {
    let server = Server::answering("x").await;
    let send = async |value: &str| {
        let mut request = post(CHAT, chat(json!({"max_tokens": 1})).to_string());
        request.headers_mut().insert("x-vllm-priority", value.parse().expect("a header"));
        read(server.call(request).await).await
    };
    assert_eq!(send("-3").await.0, StatusCode::OK);
    let (status, text) = send("urgent").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("X-Vllm-Priority"), "{text}");
}

#[tokio::test]
async fn the_request_id_comes_back() {
    let server = Server::answering("x").await;
    let mut request = post(CHAT, chat(json!({"max_tokens": 1})).to_string());
    request.headers_mut().insert("x-request-id", "mine-7".parse().expect("a header"));
    let response = server.call(request).await;
    assert_eq!(response.headers().get("x-request-id").map(|id| id.as_bytes()), Some(&b"mine-7"[..]));
    assert!(read(response).await.1.contains("\"id\":\"chatcmpl-mine-7\""));
}
