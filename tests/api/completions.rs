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

/// Joins the pieces of each choice of a stream into what a plain answer has.
fn folded(events: &str) -> Vec<Value> {
    let mut choices: Vec<Value> = Vec::new();
    for line in events.lines().filter(|line| *line != "[DONE]") {
        let event: Value = serde_json::from_str(line).expect("an event is JSON");
        for piece in event["choices"].as_array().into_iter().flatten() {
            let index = piece["index"].as_u64().unwrap_or_default() as usize;
            if choices.len() <= index {
                choices.resize(index + 1, json!({"text": "", "logprobs": null}));
            }
            let choice = &mut choices[index];
            assert!(choice["finish_reason"].is_null(), "nothing follows the end: {line}");
            let text =
                [&choice["text"], &piece["text"]].map(|text| text.as_str().unwrap_or_default()).concat();
            choice["text"] = json!(text);
            choice["finish_reason"] = piece["finish_reason"].clone();
            choice["stop_reason"] = piece["stop_reason"].clone();
            for (list, values) in piece["logprobs"].as_object().into_iter().flatten() {
                let mut all = choice["logprobs"][list].as_array().cloned().unwrap_or_default();
                all.extend(values.as_array().cloned().unwrap_or_default());
                choice["logprobs"][list] = Value::Array(all);
            }
        }
    }
    choices
}

#[tokio::test]
async fn a_stream_folds_into_the_plain_answer() {
    let server = Server::answering(" Grüße, one two <think> 🦀.").await;
    let ids = server.json("/tokenize", json!({"prompt": "Once upon"})).await.1["tokens"].clone();
    let prompts =
        [json!("Once"), json!(["Once", "upon"]), ids.clone(), json!([ids, [7]]), json!(["a", [8, 9]])];
    let extras = [
        json!({}),
        json!({"echo": true}),
        json!({"echo": true, "logprobs": 2, "max_tokens": 5}),
        json!({"logprobs": 0, "stop": ["e t"]}),
        json!({"n": 2, "temperature": 1, "seed": 3, "include_stop_str_in_output": true, "stop": ["one"]}),
        json!({"max_tokens": 0, "echo": true}),
    ];
    for prompt in &prompts {
        for extra in &extras {
            let mut body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 30});
            body.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
            let (status, answer) = server.json("/v1/completions", body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{body}: {answer}");
            body["stream"] = json!(true);
            let folded = folded(&server.events("/v1/completions", body.clone()).await);
            let plain = answer["choices"].as_array().cloned().unwrap_or_default();
            assert_eq!(folded.len(), plain.len(), "{body}");
            for (index, (one, other)) in plain.iter().zip(&folded).enumerate() {
                assert_eq!(one["index"], index, "{body}");
                for name in ["text", "logprobs", "finish_reason", "stop_reason"] {
                    assert_eq!(one[name], other[name], "{body}: {name} of choice {index}");
                }
            }
        }
    }
}

#[tokio::test]
async fn answers_are_numbered_by_prompt_and_then_by_answer() {
    let server = Server::answering(" yes").await;
    let body = json!({"prompt": ["a", "b"], "n": 2, "temperature": 1, "echo": true});
    let (_, answer) = server.json("/v1/completions", body).await;
    let texts: Vec<&Value> =
        answer["choices"].as_array().into_iter().flatten().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["a yes", "a yes", "b yes", "b yes"]);
}

#[tokio::test]
async fn what_completions_cannot_do_is_named() {
    let server = Server::answering("x").await;
    for (extra, param) in [
        (json!({"suffix": "y"}), "suffix"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"prompt_embeds": "AAAA"}), "prompt_embeds"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"prompt": vec!["x"; 1025]}), "prompt"),
        (json!({"prompt": [[1], []]}), "prompt"),
        (json!({"prompt": ["x", 1]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"bad_words": "x"}), "bad_words"),
        (json!({"logprob_token_ids": [1]}), "logprob_token_ids"),
        (json!({"use_beam_search": true}), "use_beam_search"),
    ] {
        let mut body = json!({"prompt": "x"});
        body.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
        let (status, error) = server.json("/v1/completions", body).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
    let harmless = json!({"prompt": "x", "suffix": "", "best_of": 1, "length_penalty": 1, "user": "me"});
    assert_eq!(server.json("/v1/completions", harmless).await.0, StatusCode::OK);
}
