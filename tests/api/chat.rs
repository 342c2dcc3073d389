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

#[tokio::test]
async fn functions_are_tools_under_their_old_name() {
    let server = Server::answering(CALL).await;
    let functions = json!([weather()[0]["function"]]);
    let of_tools = server.json(CHAT, chat(json!({"tools": weather()}))).await;
    for choice in [json!(null), json!("auto")] {
        let body = chat(json!({"functions": functions, "function_call": choice}));
        assert_eq!(server.json(CHAT, body).await, of_tools);
    }
    let (_, none) = server.json(CHAT, chat(json!({"functions": functions, "function_call": "none"}))).await;
    assert!(none["choices"][0]["message"].get("tool_calls").is_none(), "{none}");
    let named = chat(json!({"functions": functions, "function_call": {"name": "weather"}}));
    let (_, named) = server.json(CHAT, named).await;
    assert_eq!(named["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "weather");
}

#[tokio::test]
async fn any_tool_is_a_required_one() {
    let server = Server::answering(CALL).await;
    let answer = async |choice: &str| {
        server.json(CHAT, chat(json!({"tools": weather(), "tool_choice": choice}))).await
    };
    assert_eq!(answer("any").await, answer("required").await);
}

#[tokio::test]
async fn a_banned_word_is_not_said() {
    let server = Server::answering("</think>one two three").await;
    let (_, answer) = server.json(CHAT, chat(json!({"bad_words": ["two"], "max_tokens": 9}))).await;
    let said = answer["choices"][0]["message"]["content"].to_string();
    assert!(said.contains("one") && !said.contains(" two"), "{said}");
}

#[tokio::test]
async fn an_answer_that_goes_on_may_begin_with_what_was_said() {
    let server = Server::answering(" is forty-two.").await;
    let messages = json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "The answer"}]);
    let body = json!({"messages": messages, "continue_final_message": true, "echo": true,
        "chat_template_kwargs": {"enable_thinking": false}});
    let (_, answer) = server.json(CHAT, chat(body.clone())).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "The answer is forty-two.", "{answer}");
    let mut body = chat(body);
    body["stream"] = json!(true);
    let events = server.events(CHAT, body.clone()).await;
    assert!(events.lines().nth(1).is_some_and(|second| second.contains("The answer")), "{events}");
    body["messages"] = json!([{"role": "user", "content": "?"}]);
    body["continue_final_message"] = json!(false);
    assert!(!server.events(CHAT, body).await.contains("?"), "only the assistant's own words are echoed");
}

#[tokio::test]
async fn a_batch_has_a_choice_for_each_conversation() {
    let server = Server::answering("Hm.\n</think>\nYes.").await;
    let (_, alone) = server.json(CHAT, chat(json!({"logprobs": true}))).await;
    let history = chat(json!({}))["messages"].clone();
    let mut body = chat(json!({"messages": [history, history, history], "logprobs": true}));
    let (status, answer) = server.json(&format!("{CHAT}/batch"), body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    for index in 0..3 {
        let mut expected = alone["choices"][0].clone();
        expected["index"] = json!(index);
        assert_eq!(answer["choices"][index], expected);
    }
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(
            answer["usage"][count].as_u64(),
            alone["usage"][count].as_u64().map(|one| 3 * one),
            "{answer}"
        );
    }
    body["messages"][1] = json!([{"role": "wizard"}]);
    let (status, error) = server.json(&format!("{CHAT}/batch"), body).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("messages[1][0].role")));
    for (extra, param) in [
        (json!({"messages": []}), "messages"),
        (json!({}), "messages[0]"),
        (json!({"messages": [[]], "stream": true}), "stream"),
        (json!({"messages": [[]], "n": 2}), "n"),
        (json!({"messages": [[]], "return_token_ids": true}), "return_token_ids"),
    ] {
        let (status, error) = server.json(&format!("{CHAT}/batch"), chat(extra)).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
}

#[tokio::test]
async fn an_invocation_is_what_its_body_is() {
    let server = Server::answering("</think>Yes.").await;
    let object = async |body: Value| server.json("/invocations", body).await.1["object"].clone();
    assert_eq!(object(chat(json!({}))).await, "chat.completion");
    assert_eq!(object(json!({"prompt": "Once"})).await, "text_completion");
    assert_eq!(object(json!({"input": "Once"})).await, "response");
    assert_eq!(server.json("/invocations", json!({})).await.0, StatusCode::BAD_REQUEST);
}
