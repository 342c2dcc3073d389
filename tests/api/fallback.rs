//! `--fallback`: who can wait is answered elsewhere while the engine here is red or loading.

use super::probes::gated;
use super::world::{CHAT, Server, chat, names, post, read};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use ferrotron::api::{self, App, Drain, Fallback, Options};
use ferrotron::model::StepError;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Serves `app` on a port of its own as long as the test runs; where.
async fn listening(app: Arc<App>, listener: TcpListener) -> String {
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    let drain = Drain { signal: std::future::pending(), timeout: Duration::ZERO };
    tokio::spawn(api::serve(listener, app, drain));
    url
}

async fn port() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

fn options(url: &str, key: Option<&str>) -> Options {
    let mut options = Options::new(names());
    options.fallback = Some(Fallback::new(url, key, None).expect("a URL"));
    options
}

/// A server whose model `large` is still loading, and whose fallback, which has no such model, says `said`.
async fn loading(said: &str) -> Server {
    let there = Server::answering(said).await;
    let url = listening(there.app, port().await).await;
    let mut options = options(&url, None);
    options.models = vec![vec!["large".into()]];
    Server { app: App::new(options) }
}

async fn asked(server: &Server, extra: Value) -> Response {
    server.call(post(CHAT, chat(extra).to_string())).await
}

fn relayed(response: &Response) -> bool {
    response.headers().contains_key("x-ferrotron-fallback")
}

async fn content(response: Response) -> Value {
    let text = read(response).await.1;
    let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    answer["choices"][0]["message"]["content"].clone()
}

#[tokio::test]
async fn while_it_loads_only_what_can_wait_is_answered_elsewhere() {
    let server = loading("</think>there").await;
    let asked = async |mut extra: Value| {
        extra["model"] = json!("large");
        asked(&server, extra).await
    };
    let response = asked(json!({"priority": 1})).await;
    assert_eq!((response.status(), relayed(&response)), (StatusCode::OK, true));
    assert!(response.headers().contains_key("x-request-id"));
    assert_eq!(content(response).await, "there");
    let mut by_header = post(CHAT, chat(json!({"model": "large"})).to_string());
    by_header.headers_mut().insert("x-vllm-priority", "3".parse().expect("a value"));
    assert!(relayed(&server.call(by_header).await));
    for extra in [json!({}), json!({"priority": 0}), json!({"priority": -1})] {
        let response = asked(extra).await;
        assert_eq!((response.status(), relayed(&response)), (StatusCode::SERVICE_UNAVAILABLE, false));
    }
    let elsewhere = post("/tokenize", json!({"prompt": "x", "priority": 1}).to_string());
    assert!(!relayed(&server.call(elsewhere).await));
    // A mistake is told as there, not as a loading model.
    let response = asked(json!({"priority": 1, "temperature": 9})).await;
    assert_eq!((response.status(), relayed(&response)), (StatusCode::BAD_REQUEST, true));
}

#[tokio::test]
async fn when_the_engine_dies_streams_come_from_elsewhere() {
    let there = Server::answering("</think>over there").await;
    let url = listening(there.app, port().await).await;
    let app = App::new(options(&url, None));
    let (resident, word) = gated(0, names()).await;
    app.set_resident(resident);
    let server = Server { app };
    word.send(Err(StepError::Device("it burns".into()))).expect("the network lives");
    let first = asked(&server, json!({"priority": 1})).await;
    assert_eq!(first.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let response = asked(&server, json!({"priority": 1, "stream": true})).await;
    assert!(relayed(&response));
    assert!(response.headers()["content-type"].to_str().is_ok_and(|kind| kind.contains("event-stream")));
    let text = read(response).await.1;
    assert!(text.contains(" there") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert_eq!(asked(&server, json!({})).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.get("/health").await.0, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn an_engine_that_is_well_answers_itself() {
    let there = Server::answering("</think>there").await;
    let url = listening(there.app, port().await).await;
    let server = Server::start("</think>here", Duration::ZERO, options(&url, None)).await;
    let response = asked(&server, json!({"priority": 1})).await;
    assert!(!relayed(&response));
    assert_eq!(content(response).await, "here");
}

#[tokio::test]
async fn two_servers_that_stand_in_for_each_other_do_not_go_in_circles() {
    let (one, other) = (port().await, port().await);
    let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().expect("it is bound"));
    let (first, second) = (App::new(options(&url(&other), None)), App::new(options(&url(&one), None)));
    listening(first.clone(), one).await;
    listening(second.clone(), other).await;
    let response = asked(&Server { app: first }, json!({"priority": 1})).await;
    // Answered by the second, which did not send it back.
    assert_eq!((response.status(), relayed(&response)), (StatusCode::SERVICE_UNAVAILABLE, true));
    assert_eq!(second.metrics.in_flight(), 0);
}

#[tokio::test]
async fn a_fallback_that_is_not_there_changes_nothing() {
    // A port that was free a moment ago.
    let url = format!("http://{}", port().await.local_addr().expect("it is bound"));
    let server = Server { app: App::new(options(&url, None)) };
    let response = asked(&server, json!({"priority": 1})).await;
    assert_eq!((response.status(), relayed(&response)), (StatusCode::SERVICE_UNAVAILABLE, false));
    let text = read(response).await.1;
    assert!(text.contains("Loading model"), "{text}");
}

#[tokio::test]
async fn the_fallback_sees_its_own_key_and_never_the_clients() {
    let mut locked = Options::new(names());
    locked.api_keys = vec!["theirs".into()];
    let there = Server::start("</think>there", Duration::ZERO, locked).await;
    let url = listening(there.app, port().await).await;
    let ask = async |key: Option<&str>| {
        let mut options = options(&url, key);
        options.api_keys = vec!["ours".into(), "theirs".into()];
        let request = Request::post(CHAT)
            .header("content-type", "application/json")
            .header("authorization", "Bearer theirs")
            .body(Body::from(chat(json!({"priority": 1})).to_string()))
            .expect("a request");
        Server { app: App::new(options) }.call(request).await.status()
    };
    assert_eq!(ask(None).await, StatusCode::UNAUTHORIZED);
    assert_eq!(ask(Some("theirs")).await, StatusCode::OK);
}
