//! `/health` and `/metrics`: from before the model is there until the server ends.

use super::models::{continued, two};
use super::world::{CHAT, Server, VOCAB, around, chat, forgetful, limits, names, post, read, text};
use axum::http::{StatusCode, header};
use ferrotron::api::{self, App, Options};
use ferrotron::backend::StepInputs;
use ferrotron::model::{Limits, Network, StepError};
use serde_json::json;
use std::time::{Duration, Instant};

/// Every step waits for a word from outside, and dies of a bad one.
struct Gate {
    words: std::sync::mpsc::Receiver<Result<(), StepError>>,
    limits: Limits,
    logits: Vec<f32>,
}

impl Network for Gate {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        self.words.recv().unwrap_or(Ok(()))?;
        self.logits.clear();
        self.logits.resize(inputs.logit_rows.len() * VOCAB, 0.0);
        Ok(&self.logits)
    }
}

pub async fn gated(
    index: usize,
    names: Vec<String>,
) -> (api::Resident, std::sync::mpsc::Sender<Result<(), StepError>>) {
    let (word, words) = std::sync::mpsc::channel();
    let network = Gate { words, limits: limits(), logits: Vec::new() };
    (around(index, names, text(), network, forgetful()).await, word)
}

/// Asks until the answer has `words`.
async fn until(server: &Server, path: &str, words: &str) {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let text = server.get(path).await.1;
        if text.contains(words) {
            return;
        }
        assert!(Instant::now() < give_up, "no {words:?} in {text}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn until_there_is_a_model_health_is_red_and_requests_wait_their_turn() {
    let app = App::new(Options::new(vec!["tiny".into()]));
    let server = Server { app: app.clone() };
    let (status, text) = server.get("/health").await;
    assert_eq!(
        (status, text.as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"loading","progress":0.0}"#)
    );
    let response = server.call(post(CHAT, chat(json!({})).to_string())).await;
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    let (status, text) = read(response).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.contains("Loading model"), "{text}");
    app.set_load_error("no such folder".into());
    assert!(server.get("/health").await.1.contains("no such folder"));
}

#[tokio::test]
async fn every_series_is_there_from_the_start_and_counts() {
    let server = Server::answering("</think>yes").await;
    let value = async |name: &str| {
        let page = server.get("/metrics").await.1;
        let line =
            page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {page}"));
        line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok())
    };
    let stop = "vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"nvidia/tiny\"}";
    let names = [
        stop,
        "vllm:num_requests_running{model_name=\"nvidia/tiny\",engine=\"0\"}",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:time_to_first_token_seconds_count{",
        "vllm:iteration_tokens_total_bucket{",
    ];
    for name in names {
        assert_eq!(value(name).await, Some(0.0), "{name}");
    }
    let (_, answer) = server.json(CHAT, chat(json!({}))).await;
    assert_eq!(value(stop).await, Some(1.0));
    assert_eq!(value("vllm:generation_tokens_total{").await, answer["usage"]["completion_tokens"].as_f64());
    assert_eq!(value("vllm:time_to_first_token_seconds_count{").await, Some(1.0));
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_place() {
    let script = "word ".repeat(400);
    let options = Options::new(names());
    let server = Server::start(&script, Duration::from_millis(5), options).await;
    let abort = "finished_reason=\"abort\",model_name=\"nvidia/tiny\"} ";
    // Streaming: the body is dropped. Not streaming: the handler is.
    let stream = server.call(post(CHAT, chat(json!({"stream": true})).to_string())).await;
    drop(stream);
    let plain = server.call(post(CHAT, chat(json!({})).to_string()));
    assert!(
        tokio::time::timeout(Duration::from_millis(50), plain).await.is_err(),
        "the answer takes seconds"
    );
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let page = server.get("/metrics").await.1;
        let running = page.contains("vllm:num_requests_running{model_name=\"nvidia/tiny\",engine=\"0\"} 0");
        if running && page.contains(&format!("{abort}2")) {
            break;
        }
        assert!(Instant::now() < give_up, "{page}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_step_that_does_not_end_turns_health_red_until_it_does() {
    let mut options = Options::new(names());
    options.stall_timeout = Duration::from_millis(1);
    let app = App::new(options);
    let (resident, word) = gated(0, names()).await;
    app.set_resident(resident);
    let server = Server { app };
    let one = json!({"prompt": "x", "max_tokens": 1});
    let stuck = server.call(post("/v1/completions", one.to_string()));
    let watch = async {
        until(&server, "/health", "no step has finished").await;
        until(&server, "/metrics", "ferrotron:stalled{model_name=\"nvidia/tiny\",engine=\"0\"} 1").await;
        word.send(Ok(())).expect("the network lives");
    };
    let (response, ()) = tokio::join!(stuck, watch);
    assert_eq!(response.status(), StatusCode::OK);
    until(&server, "/health", "ok").await;
    until(&server, "/metrics", "ferrotron:stalled{model_name=\"nvidia/tiny\",engine=\"0\"} 0").await;
}

#[tokio::test]
async fn a_dead_engine_turns_health_red_and_tells_who_waits() {
    let (server, _) = two().await;
    let (resident, word) = gated(1, vec!["large".into()]).await;
    server.app.set_resident(resident);
    assert_eq!(server.get("/health").await.0, StatusCode::OK);
    word.send(Err(StepError::Device("it burns".into()))).expect("the network lives");
    let (status, error) = server.json("/v1/completions", continued(json!("large"))).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(error["error"]["message"].to_string().contains("it burns"), "{error}");
    let (status, health) = server.get("/health").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(health.contains("large: the device failed: it burns"), "{health}");
    let (status, error) = server.json("/v1/completions", continued(json!("large"))).await;
    assert_eq!(
        (status, &error["error"]["type"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("Service Unavailable"))
    );
}

#[tokio::test]
async fn at_the_end_open_streams_are_told() {
    let options = Options::new(names());
    let server = Server::start(&"word ".repeat(400), Duration::from_millis(5), options).await;
    let response = server.call(post(CHAT, chat(json!({"stream": true})).to_string())).await;
    server.app.set_draining();
    assert_eq!(server.get("/health").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let engine = server.app.resident(0).expect("a model").engine.clone();
    engine.shutdown(Duration::from_millis(50)).await;
    let (_, events) = read(response).await;
    let tail: Vec<&str> = events.lines().filter(|line| !line.is_empty()).rev().take(2).collect();
    assert_eq!(tail[0], "data: [DONE]");
    assert!(tail[1].contains("\"code\":503"), "{}", tail[1]);
}
