//! `/v1/completions`, and the ids that it takes: `/tokenize` and `/detokenize`.

use super::world::{CHAT, Server, chat, weather};
use axum::http::StatusCode;
use serde_json::{Value, json};

#[tokio::test]
async fn a_completion_continues_raw_text() {
    let server = Server::answering(" a time <think>").await;
    let body = json!({"prompt": "Once upon", "echo": true, "logprobs": 1, "temperature": 0});
    let (status, answer) = server.json("/v1/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "Once upon a time <think>");
    assert_eq!(choice["logprobs"]["token_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["text_offset"][0], 0);
    let lengths = ["tokens", "token_logprobs", "text_offset", "top_logprobs"]
        .map(|list| choice["logprobs"][list].as_array().map(Vec::len));
    assert!(lengths.iter().all(|length| *length == lengths[0]), "{lengths:?}");
}

#[tokio::test]
async fn completions_stream_and_number_their_choices() {
    let server = Server::answering(" yes").await;
    let body = json!({"prompt": ["a", "b"], "stream": true, "temperature": 0,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let events = server.events("/v1/completions", body).await;
    let mut texts = [String::new(), String::new()];
    for line in events.lines().filter(|line| *line != "[DONE]") {
        let event: Value = serde_json::from_str(line).expect("an event is JSON");
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(9) as usize;
            texts[index] += choice["text"].as_str().unwrap_or_default();
        }
    }
    assert_eq!(texts, [" yes", " yes"]);
    assert!(
        events.lines().filter(|line| *line != "[DONE]").all(|line| line.contains("\"usage\":{")),
        "{events}"
    );
    assert!(events.ends_with("[DONE]"));
}

#[tokio::test]
async fn scoring_generates_nothing() {
    let server = Server::answering("never said").await;
    let body = json!({"prompt": "Once upon", "echo": true, "max_tokens": 0, "logprobs": 0});
    let (status, answer) = server.json("/v1/completions", body).await;
    assert_eq!((status, &answer["choices"][0]["text"]), (StatusCode::OK, &json!("Once upon")), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn ids_and_text_are_each_others_inverse() {
    let server = Server::answering("").await;
    let text = "Grüße, 世界! 🦀 <|im_end|>\n";
    let (_, tokens) = server.json("/tokenize", json!({"prompt": text, "return_token_strs": true})).await;
    assert_eq!(tokens["count"], json!(tokens["tokens"].as_array().map(Vec::len)));
    let (_, back) = server.json("/detokenize", json!({"tokens": tokens["tokens"]})).await;
    assert_eq!((&back["prompt"], &back["content"]), (&json!(text), &json!(text)));
    let (_, counted) = server.json("/tokenize", chat(json!({"tools": weather()}))).await;
    let (_, answer) = server.json(CHAT, chat(json!({"tools": weather(), "max_tokens": 1}))).await;
    assert_eq!(counted["count"], answer["usage"]["prompt_tokens"]);
}
