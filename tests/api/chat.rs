//! `/v1/chat/completions`: thoughts, calls, stops, choices, logprobs.

use super::world::{CALL, CHAT, Server, chat, weather};
use axum::http::StatusCode;
use serde_json::{Value, json};

#[tokio::test]
async fn a_thought_and_an_answer_are_apart() {
    let server = Server::answering("Easy.\n</think>\nForty-two.").await;
    let (status, answer) = server.json(CHAT, chat(json!({}))).await;
    assert_eq!(status, StatusCode::OK);
    insta::assert_json_snapshot!(answer);
}

#[tokio::test]
async fn a_stream_is_role_thought_content_end_usage() {
    let server = Server::answering("Easy.\n</think>\nForty-two.").await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    insta::assert_snapshot!(server.events(CHAT, body).await);
}

#[tokio::test]
async fn a_call_is_read_out_of_the_markup() {
    let server = Server::answering(CALL).await;
    let (_, answer) = server.json(CHAT, chat(json!({"tools": weather()}))).await;
    insta::assert_json_snapshot!(answer["choices"]);
}

#[tokio::test]
async fn a_streamed_call_names_itself_once() {
    let server = Server::answering(CALL).await;
    insta::assert_snapshot!(server.events(CHAT, chat(json!({"tools": weather(), "stream": true}))).await);
}

#[tokio::test]
async fn without_tools_markup_is_content() {
    let server = Server::answering(CALL).await;
    let (_, answer) = server.json(CHAT, chat(json!({"tools": weather(), "tool_choice": "none"}))).await;
    let message = &answer["choices"][0]["message"];
    assert!(message.get("tool_calls").is_none());
    assert!(message["content"].to_string().contains("<function=weather>"), "{message}");
}

#[tokio::test]
async fn one_call_is_enough_where_calls_may_not_be_parallel() {
    let server = Server::answering(&CALL.repeat(2)).await;
    let body = chat(json!({"tools": weather(), "parallel_tool_calls": false}));
    let (_, answer) = server.json(CHAT, body).await;
    let calls = answer["choices"][0]["message"]["tool_calls"].as_array().map(Vec::len);
    assert_eq!((calls, &answer["choices"][0]["finish_reason"]), (Some(1), &json!("tool_calls")));
}

#[tokio::test]
async fn thinking_off_makes_all_of_it_content() {
    let server = Server::answering("Forty-two.").await;
    for off in
        [json!({"chat_template_kwargs": {"enable_thinking": false}}), json!({"reasoning_effort": "none"})]
    {
        let (_, answer) = server.json(CHAT, chat(off)).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["content"], &message["reasoning"]), (&json!("Forty-two."), &Value::Null));
    }
}

#[tokio::test]
async fn a_thought_cut_short_leaves_no_content() {
    let server = Server::answering("I wonder and wonder and wonder").await;
    let (_, answer) = server.json(CHAT, chat(json!({"max_tokens": 3}))).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("length"), &Value::Null));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_is_named() {
    let server = Server::answering("</think>one two three four").await;
    let (_, answer) = server.json(CHAT, chat(json!({"stop": ["e f", "o th"]}))).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "one tw");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("o th")));
}

#[tokio::test]
async fn several_choices_each_begin_and_end_once() {
    let server = Server::answering("</think>yes").await;
    let events = server.events(CHAT, chat(json!({"n": 3, "temperature": 1, "stream": true}))).await;
    for index in 0..3 {
        let of_choice = |event: &&str| event.contains(&format!("{{\"index\":{index},"));
        let events: Vec<&str> = events.lines().filter(of_choice).collect();
        assert!(events.first().is_some_and(|event| event.contains("\"role\"")), "{events:?}");
        assert_eq!(events.iter().filter(|event| event.contains("\"finish_reason\":\"stop\"")).count(), 1);
        assert!(
            events.last().is_some_and(|event| event.contains("\"finish_reason\":\"stop\"")),
            "{events:?}"
        );
    }
    assert!(events.ends_with("[DONE]"));
}

#[tokio::test]
async fn every_token_has_its_logprobs_once_streamed_or_not() {
    let server = Server::answering("Hm\n</think>\nGrüße 🦀").await;
    let extra = json!({"logprobs": true, "top_logprobs": 1});
    let (_, answer) = server.json(CHAT, chat(extra.clone())).await;
    let plain = answer["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default();
    assert_eq!(json!(plain.len()), answer["usage"]["completion_tokens"]);
    let mut body = chat(extra);
    body["stream"] = json!(true);
    let mut streamed = Vec::new();
    for line in server.events(CHAT, body).await.lines().filter(|line| *line != "[DONE]") {
        let event: Value = serde_json::from_str(line).expect("an event is JSON");
        streamed.extend(event["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!(plain, streamed);
    let bytes = plain.iter().flat_map(|entry| entry["bytes"].as_array().cloned().unwrap_or_default());
    let bytes: Vec<u8> = bytes.filter_map(|byte| byte.as_u64().map(|byte| byte as u8)).collect();
    assert!(String::from_utf8(bytes).is_ok_and(|text| text.contains("Grüße 🦀")));
}

#[tokio::test]
async fn the_last_word_of_an_answer_says_how_long_it_took() {
    let server = Server::answering("</think>one two three").await;
    let check = |timings: &Value, usage: &Value| {
        assert_eq!(timings["predicted_n"], usage["completion_tokens"], "{timings}");
        assert_eq!(timings["prompt_n"], usage["prompt_tokens"], "{timings}");
        assert!(["queue_ms", "prompt_ms", "predicted_ms"].iter().all(|name| timings[name].is_f64()));
    };
    for extra in [json!({}), json!({"stop": [" two"]}), json!({"n": 2, "temperature": 1})] {
        let (_, plain) = server.post(CHAT, &chat(extra.clone())).await;
        let plain: Value = serde_json::from_str(&plain).expect("JSON");
        check(&plain["timings"], &plain["usage"]);
        for include_usage in [false, true] {
            let mut body = chat(extra.clone());
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": include_usage});
            let (_, events) = server.post(CHAT, &body).await;
            let data = events.lines().filter_map(|line| line.strip_prefix("data: {"));
            let events: Vec<Value> =
                data.map(|rest| serde_json::from_str(&format!("{{{rest}")).expect("JSON")).collect();
            let (last, before) = events.split_last().expect("events");
            check(&last["timings"], &plain["usage"]);
            assert!(before.iter().all(|event| event.get("timings").is_none()), "{before:?}");
        }
    }
}
