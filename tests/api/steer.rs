//! What a request may say of the form of its answer.

use super::world::{CALL, CHAT, Server, chat, text, weather};
use axum::http::StatusCode;
use serde_json::{Value, json};

/// The content of the answer to `extra`, and how it ended.
async fn said(script: &str, extra: Value) -> (Value, Value) {
    let (status, answer) = Server::answering(script).await.json(CHAT, chat(extra)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let choice = &answer["choices"][0];
    (choice["message"]["content"].clone(), choice["finish_reason"].clone())
}

#[tokio::test]
async fn a_constraint_holds_under_each_of_its_names() {
    let choices = json!(["yes", "no"]);
    let schema = json!({"enum": ["yes", "no"]});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for (extra, quoted) in [
        (json!({"structured_outputs": {"choice": choices}}), false),
        (json!({"structured_outputs": {"regex": "yes|no"}}), false),
        (json!({"structured_outputs": {"grammar": "start: \"yes\" | \"no\""}}), false),
        (json!({"structured_outputs": {"json": schema}}), true),
        (json!({"response_format": format}), true),
        (json!({"guided_choice": choices}), false),
        (json!({"guided_regex": "^(yes|no)$"}), false),
        (json!({"guided_grammar": "root ::= \"yes\" | \"no\""}), false),
        (json!({"guided_json": schema.to_string()}), true),
    ] {
        let (content, reason) = said("Hm.\n</think>\nPerhaps, if", extra.clone()).await;
        let expected =
            ["yes", "no"].map(|word| if quoted { json!(format!("{word:?}")) } else { json!(word) });
        assert!(expected.contains(&content), "{extra}: {content}");
        assert_eq!(reason, json!("stop"), "{extra}");
    }
}

#[tokio::test]
async fn a_complete_answer_ends_even_where_no_id_may_end_it() {
    let extra = json!({"guided_choice": ["yes", "no"], "ignore_eos": true, "reasoning_effort": "none"});
    let (content, reason) = said("Perhaps", extra).await;
    assert!([json!("yes"), json!("no")].contains(&content), "{content}");
    assert_eq!(reason, json!("stop"));
}

#[tokio::test]
async fn rules_that_exclude_each_other_end_the_request_alone() {
    let server = Server::answering("Perhaps").await;
    let off = json!({"guided_choice": ["yes"], "allowed_token_ids": [7], "reasoning_effort": "none"});
    let (status, answer) = server.json(CHAT, chat(off)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    let (status, _) = server.json(CHAT, chat(json!({}))).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn tools_and_a_format_allow_either() {
    let format = json!({"type": "json_object"});
    let extra = json!({"tools": weather(), "response_format": format});
    let (_, answer) = Server::answering(CALL).await.json(CHAT, chat(extra.clone())).await;
    assert_eq!(answer["choices"][0]["finish_reason"], json!("tool_calls"), "{answer}");
    let (content, _) = said("So.\n</think>{\"a\": [1, 2]}", extra).await;
    assert_eq!(content, json!("{\"a\": [1, 2]}"));
}

#[tokio::test]
async fn a_constraint_holds_for_completions() {
    let server = Server::answering("Perhaps").await;
    let body = json!({"prompt": "Well?", "temperature": 0, "n": 1, "guided_choice": ["yes", "no"]});
    let (_, answer) = server.json("/v1/completions", body).await;
    let choice = &answer["choices"][0];
    assert!([json!("yes"), json!("no")].contains(&choice["text"]), "{choice}");
    assert_eq!(choice["finish_reason"], json!("stop"));
}

#[tokio::test]
async fn a_forced_call_says_how_it_ended_and_keeps_its_thought() {
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, reason) in [(json!("required"), "tool_calls"), (named, "stop")] {
        let server = Server::answering(CALL).await;
        let body = chat(json!({"tools": weather(), "tool_choice": choice}));
        let (_, answer) = server.json(CHAT, body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], json!(reason), "{choice}");
        assert_eq!(choice["message"]["reasoning"], json!("Look it up."), "{choice}");
        let calls = &choice["message"]["tool_calls"];
        assert_eq!(calls[0]["function"]["arguments"], json!("{\"city\": \"Bonn\", \"days\": 2}"), "{choice}");
        assert_eq!(calls.as_array().map(Vec::len), Some(1));
    }
}

#[tokio::test]
async fn a_call_within_the_thought_is_a_forced_call_too() {
    let script = CALL.replace("\n</think>", "");
    let server = Server::answering(&script).await;
    let body = chat(json!({"tools": weather(), "tool_choice": "required", "thinking_token_budget": 50}));
    let (_, answer) = server.json(CHAT, body).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning"], json!("Look it up."), "{message}");
    assert_eq!(message["tool_calls"][0]["function"]["name"], json!("weather"), "{message}");
}

#[tokio::test]
async fn a_call_is_held_to_its_schema_unasked() {
    let server = Server::answering(&CALL.replace("\n2\n", "\ntwo\n")).await;
    let (_, answer) = server.json(CHAT, chat(json!({"tools": weather(), "max_tokens": 100}))).await;
    let message = &answer["choices"][0]["message"];
    // The script does not know that it was led astray, so the call need not end; but it has no word for a number.
    assert!(!message.to_string().contains("two"), "{message}");
}

#[tokio::test]
async fn a_thought_ends_at_its_budget() {
    for (budget, thought) in [(0, Value::Null), (1, json!("one")), (3, json!("one two three"))] {
        let server = Server::answering("one two three four five six seven eight").await;
        let text = text();
        let count = thought.as_str().map_or(0, |text_| text.encode(text_, false).expect("text").len());
        let budget = if budget == 0 { 0 } else { count };
        let (_, answer) = server.json(CHAT, chat(json!({"thinking_token_budget": budget}))).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["reasoning"], thought, "{choice}");
        assert_eq!(choice["finish_reason"], json!("stop"), "{choice}");
        let details = &answer["usage"]["completion_tokens_details"];
        // The line break before the end is a thought's, too.
        assert_eq!(details["reasoning_tokens"], json!(if count == 0 { 0 } else { count + 1 }), "{answer}");
    }
}
