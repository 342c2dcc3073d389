//! `/v1/models`, and several models behind one door.

use super::world::{CHAT, Server, names, redact, resident};
use axum::http::StatusCode;
use ferrotron::api::{self, App, Options};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn models_are_listed_and_found_with_slashes() {
    let server = Server::answering("").await;
    let (_, list) = server.get("/v1/models").await;
    insta::assert_json_snapshot!(redact(serde_json::from_str(&list).expect("JSON")));
    for path in ["/v1/models/nvidia/tiny", "/v1/models/nvidia%2Ftiny", "/v1/models/tiny?api-version=1"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    assert_eq!(server.get("/v1/models/gpt-4").await.0, StatusCode::NOT_FOUND);
}

/// A front model that says "front", one behind that is not there yet, and what puts it there.
pub async fn two() -> (Server, api::Resident) {
    let mut options = Options::new(names());
    options.models.push(vec!["large".into()]);
    let app = App::new(options);
    app.set_resident(resident(0, names(), " front", Duration::ZERO).await);
    (Server { app }, resident(1, vec!["large".into()], " behind", Duration::ZERO).await)
}

pub fn continued(model: Value) -> Value {
    json!({"model": model, "prompt": "Once", "temperature": 0})
}

#[tokio::test]
async fn the_model_of_a_request_picks_the_engine() {
    let (server, behind) = two().await;
    server.app.set_resident(behind);
    let check = async |model: Value, said: &str| {
        let (status, answer) = server.json("/v1/completions", continued(model.clone())).await;
        assert_eq!((status, &answer["choices"][0]["text"]), (StatusCode::OK, &json!(said)), "{model}");
        assert_eq!(answer["model"], if said == " behind" { json!("large") } else { json!("nvidia/tiny") });
    };
    check(Value::Null, " front").await;
    check(json!(""), " front").await;
    check(json!("nvidia/tiny"), " front").await;
    check(json!("large"), " behind").await;
    for path in ["/v1/completions", CHAT, "/tokenize", "/detokenize"] {
        let (status, error) = server.json(path, continued(json!("medium"))).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}: {error}");
        assert!(error["error"]["message"].to_string().contains("nvidia/tiny, tiny, large"), "{error}");
    }
    let (_, list) = server.get("/v1/models").await;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let ids: Vec<&Value> = list["data"].as_array().into_iter().flatten().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["nvidia/tiny", "tiny", "large"]);
    assert_eq!(server.get("/v1/models/large").await.0, StatusCode::OK);
    let (_, page) = server.get("/metrics").await;
    for series in [
        "vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"nvidia/tiny\"} 3",
        "vllm:request_success_total{engine=\"1\",finished_reason=\"stop\",model_name=\"large\"} 1",
        "vllm:num_requests_running{model_name=\"large\",engine=\"1\"} 0",
    ] {
        assert!(page.lines().any(|line| line == series), "no {series} in {page}");
    }
}

#[tokio::test]
async fn one_that_still_loads_keeps_only_its_own_requests_waiting() {
    let (server, behind) = two().await;
    assert_eq!(server.json("/v1/completions", continued(json!("tiny"))).await.0, StatusCode::OK);
    let (status, error) = server.json("/v1/completions", continued(json!("large"))).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(error["error"]["message"].to_string().contains("Loading model"), "{error}");
    let (status, health) = server.get("/health").await;
    assert_eq!(
        (status, health.as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"loading","progress":0.5}"#)
    );
    server.app.set_resident(behind);
    assert_eq!(server.get("/health").await.0, StatusCode::OK);
}
