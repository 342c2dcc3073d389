//! `/v1/messages` and `/v1/messages/count_tokens`.

use super::world::{CALL, CHAT, CONTEXT, Server, chat, names, post, read, weather};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use ferrotron::api::Options;
use serde_json::{Value, json};
use std::time::Duration;

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn ask(extra: Value) -> Value {
    let mut body = json!({
        "model": "tiny", "max_tokens": 200, "temperature": 0, "messages": [{"role": "user", "content": "hi"}],
    });
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

/// The tool of `CALL`, in this dialect.
fn tools() -> Value {
    let function = &weather()[0]["function"];
    json!([{"name": function["name"], "input_schema": function["parameters"]}])
}

async fn plain(server: &Server, extra: Value) -> Value {
    let (status, answer) = server.json(MESSAGES, ask(extra.clone())).await;
    assert_eq!(status, StatusCode::OK, "{extra}: {answer}");
    answer
}

/// The content of the answer without what nobody reads, and why it ended.
async fn said(script: &str, extra: Value) -> (Value, Value) {
    let mut answer = plain(&Server::answering(script).await, extra).await;
    (anonymous(answer["content"].take()), answer["stop_reason"].take())
}

/// Names of calls differ from run to run.
fn anonymous(mut content: Value) -> Value {
    for block in content.as_array_mut().into_iter().flatten() {
        if let Some(id) = block.get_mut("id") {
            assert!(id.as_str().is_some_and(|id| id.starts_with("toolu_")), "{id}");
            *id = json!("[tool]");
        }
    }
    content
}

/// The events of a stream: the data of each, whose type is its name.
async fn events(server: &Server, extra: Value) -> Vec<Value> {
    let mut body = ask(extra);
    body["stream"] = json!(true);
    let (status, text) = server.post(MESSAGES, &body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap_or_else(|| panic!("no data: {event}"));
        let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("no data: {event}"));
        let data: Value = serde_json::from_str(data).expect("data is JSON");
        assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap_or_default()));
        data
    };
    text.split_terminator("\n\n").map(event).collect()
}

/// What a client makes of a stream. Panics if the order is not the documented one.
fn folded(events: Vec<Value>) -> Value {
    let mut events = events.into_iter().filter(|event| event["type"] != "ping");
    let mut first = events.next().expect("an event");
    assert_eq!(first["type"], "message_start");
    let mut message = first["message"].take();
    let (mut blocks, mut open, mut json) = (Vec::<Value>::new(), false, String::new());
    let mut ended = false;
    for mut event in events.by_ref() {
        if let Some(index) = event.get("index") {
            let newest = if open { blocks.len() - 1 } else { blocks.len() };
            assert_eq!(index, &json!(newest), "{event}");
        }
        match event["type"].as_str().unwrap_or_default() {
            "content_block_start" => {
                assert!(!open && !ended, "{event}");
                open = true;
                blocks.push(event["content_block"].take());
            }
            "content_block_delta" => {
                let (block, delta) = (blocks.last_mut().expect("a block"), &event["delta"]);
                let (kind, field) = match block["type"].as_str().unwrap_or_default() {
                    "text" => ("text_delta", "text"),
                    "tool_use" => ("input_json_delta", "partial_json"),
                    "thinking" if delta["type"] == "signature_delta" => ("signature_delta", "signature"),
                    _ => ("thinking_delta", "thinking"),
                };
                assert!(
                    open && delta["type"] == kind && delta.as_object().is_some_and(|d| d.len() == 2),
                    "{delta}"
                );
                let more = delta[field].as_str().expect("text");
                if kind == "input_json_delta" {
                    json.push_str(more);
                } else {
                    assert_ne!(more, "", "{delta}");
                    block[field] = json!(block[field].as_str().expect("text").to_owned() + more);
                }
            }
            "content_block_stop" => {
                assert!(open, "{event}");
                open = false;
                let block = blocks.last_mut().expect("a block");
                if block["type"] == "tool_use" {
                    assert_eq!(block["input"], json!({}));
                    block["input"] = serde_json::from_str(&json).unwrap_or(Value::Null);
                    json.clear();
                }
            }
            "message_delta" => {
                assert!(!open && !ended, "{event}");
                ended = true;
                for field in ["stop_reason", "stop_sequence"] {
                    message[field] = event["delta"][field].take();
                }
                message["usage"] = event["usage"].take();
            }
            "message_stop" => break,
            other => panic!("an event {other}"),
        }
    }
    assert!(ended && events.next().is_none(), "{message}");
    message["content"] = Value::Array(blocks);
    message
}

#[tokio::test]
async fn an_answer_is_thought_and_text() {
    let server = Server::answering("Easy.\n</think>\nForty-two.").await;
    let mut answer = plain(&server, json!({})).await;
    let id = answer["id"].take();
    assert!(id.as_str().is_some_and(|id| id.starts_with("msg_") && id.len() > 10), "{id}");
    insta::assert_json_snapshot!(answer);
}

#[tokio::test]
async fn a_stream_is_start_blocks_delta_stop() {
    let server = Server::answering(&format!("{CALL}And so")).await;
    let mut events = events(&server, json!({"tools": tools()})).await;
    events[0]["message"]["id"] = json!("[id]");
    for event in &mut events {
        if let Some(id) = event.pointer_mut("/content_block/id") {
            *id = json!("[tool]");
        }
    }
    insta::assert_snapshot!(events.iter().map(Value::to_string).collect::<Vec<_>>().join("\n"));
}

#[tokio::test]
async fn a_call_is_a_block_whoever_chose_it() {
    let call =
        json!({"type": "tool_use", "id": "[tool]", "name": "weather", "input": {"city": "Bonn", "days": 2}});
    for choice in [json!(null), json!({"type": "any"}), json!({"type": "tool", "name": "weather"})] {
        let (content, reason) = said(CALL, json!({"tools": tools(), "tool_choice": choice})).await;
        assert_eq!((&content[1], reason), (&call, json!("tool_use")), "{choice}");
        assert_eq!(content[0]["thinking"], "Look it up.", "{choice}");
    }
}

#[tokio::test]
async fn without_calls_allowed_markup_is_text() {
    let (content, reason) = said(CALL, json!({"tools": tools(), "tool_choice": {"type": "none"}})).await;
    assert!(content[1]["text"].to_string().contains("<function=weather>"), "{content}");
    assert_eq!(reason, json!("end_turn"));
}

#[tokio::test]
async fn calls_are_parallel_unless_that_is_disabled() {
    for (disabled, count) in [(false, 2), (true, 1)] {
        let choice = json!({"type": "auto", "disable_parallel_tool_use": disabled});
        let (content, reason) = said(&CALL.repeat(2), json!({"tools": tools(), "tool_choice": choice})).await;
        let blocks = content.as_array().into_iter().flatten();
        let calls = blocks.filter(|block| block["type"] == "tool_use").count();
        assert_eq!((calls, reason), (count, json!("tool_use")), "{content}");
    }
}

#[tokio::test]
async fn text_after_a_call_is_a_block_of_its_own() {
    let (content, _) = said(&format!("{CALL}And so"), json!({"tools": tools()})).await;
    let kinds: Vec<&Value> = content.as_array().into_iter().flatten().map(|block| &block["type"]).collect();
    assert_eq!(kinds, ["thinking", "tool_use", "text"]);
}

#[tokio::test]
async fn the_reason_of_the_end_is_said() {
    let check = async |extra: Value, reason: &str, sequence: Value| {
        let server = Server::answering("</think>one two three four").await;
        let answer = plain(&server, extra).await;
        assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!(reason), &sequence));
        answer["content"].clone()
    };
    check(json!({}), "end_turn", Value::Null).await;
    check(json!({"max_tokens": 3}), "max_tokens", Value::Null).await;
    let content = check(json!({"stop_sequences": ["e f", "o th"]}), "stop_sequence", json!("o th")).await;
    assert_eq!(content, json!([{"type": "text", "text": "one tw"}]));
}

#[tokio::test]
async fn a_call_cut_short_is_no_call() {
    let (content, reason) = said(CALL, json!({"tools": tools(), "max_tokens": 16})).await;
    assert_eq!(reason, json!("max_tokens"));
    assert_eq!(content.as_array().map(Vec::len), Some(1), "{content}");
    assert_eq!(content[0]["type"], "thinking");
}

#[tokio::test]
async fn an_answer_of_nothing_is_one_empty_block() {
    let nothing = json!([{"type": "text", "text": ""}]);
    let (content, _) = said("", json!({"thinking": {"type": "disabled"}})).await;
    assert_eq!(content, nothing);
    let streamed =
        folded(events(&Server::answering("").await, json!({"thinking": {"type": "disabled"}})).await);
    assert_eq!(streamed["content"], nothing);
}

#[tokio::test]
async fn thinking_is_on_unless_it_is_disabled() {
    for (thinking, kind) in [
        (json!(null), "thinking"),
        (json!({"type": "adaptive"}), "thinking"),
        (json!({"type": "enabled", "budget_tokens": 2048}), "thinking"),
        (json!({"type": "disabled"}), "text"),
    ] {
        let (content, _) = said("Forty-two.", json!({"thinking": thinking})).await;
        assert_eq!(content[0]["type"], kind, "{thinking}");
    }
    let mut options = Options::new(names());
    options.request.anthropic_thinking = false;
    let server = Server::start("Forty-two.", Duration::ZERO, options).await;
    assert_eq!(plain(&server, json!({})).await["content"][0]["type"], "text");
}

#[tokio::test]
async fn a_thought_ends_at_its_budget() {
    let thinking = json!({"type": "enabled", "budget_tokens": 3});
    let (content, _) = said("one two three four five six seven eight", json!({"thinking": thinking})).await;
    let kinds: Vec<&Value> = content.as_array().into_iter().flatten().map(|block| &block["type"]).collect();
    assert_eq!(kinds, ["thinking", "text"], "{content}");
}

#[tokio::test]
async fn a_limit_beyond_the_context_is_cut() {
    let (content, reason) = said("</think>word", json!({"max_tokens": 64_000})).await;
    assert_eq!((&content[0]["text"], reason), (&json!("word"), json!("end_turn")));
    let long = "</think>".to_owned() + &"word ".repeat(CONTEXT);
    let (_, reason) = said(&long, json!({"max_tokens": 64_000})).await;
    assert_eq!(reason, json!("max_tokens"));
}

#[tokio::test]
async fn a_format_is_held_to() {
    let schema = json!({"enum": ["yes", "no"]});
    let extra = json!({"output_config": {"format": {"type": "json_schema", "schema": schema}}});
    let (content, _) = said("Hm.\n</think>\nPerhaps, if", extra).await;
    assert!([json!("\"yes\""), json!("\"no\"")].contains(&content[1]["text"]), "{content}");
}

#[tokio::test]
async fn any_claude_is_the_front_model_unless_names_are_strict() {
    let server = Server::answering("</think>x").await;
    for model in ["claude-sonnet-4-5-20250929", "claude-3-haiku", "tiny", "nvidia/tiny"] {
        assert_eq!(plain(&server, json!({"model": model})).await["model"], json!(model));
    }
    let mut options = Options::new(names());
    options.request.claude_names = false;
    let strict = Server::start("x", Duration::ZERO, options).await;
    for (server, model) in [(&server, "gpt-4"), (&strict, "claude-3-haiku")] {
        for path in [MESSAGES, COUNT] {
            let (status, error) = server.json(path, ask(json!({"model": model}))).await;
            assert_eq!((status, &error["error"]["type"]), (StatusCode::NOT_FOUND, &json!("not_found_error")));
            assert!(error["error"]["message"].to_string().contains("nvidia/tiny"), "{error}");
        }
    }
}

/// A conversation with everything in it, as an agent's client sends it.
fn session() -> Value {
    json!({
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=00000;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather in Bonn?", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Look it up.", "signature": "ZmVycm90cm9u"},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bonn", "days": 2}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Rain."}]},
                {"type": "text", "text": "And now?"},
            ]},
        ],
        "tools": tools(),
        "metadata": {"user_id": "user_1"},
        "context_management": {"edits": []},
    })
}

#[tokio::test]
async fn the_prompt_is_the_one_of_the_same_chat() {
    let server = Server::answering("</think>x").await;
    let function = json!({"name": "weather", "arguments": "{\"city\": \"Bonn\", \"days\": 2}"});
    let same = chat(json!({"tools": weather(), "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bonn?"},
        {"role": "assistant", "content": "One moment.", "reasoning": "Look it up.",
            "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "Rain."},
        {"role": "user", "content": "And now?"},
    ]}));
    let (_, answer) = server.json(CHAT, same).await;
    let (_, counted) = server.json(COUNT, ask(session())).await;
    assert_eq!(counted["input_tokens"], answer["usage"]["prompt_tokens"], "{counted} {answer}");
}

#[tokio::test]
async fn a_count_is_what_the_answer_will_report() {
    let server = Server::answering("</think>x").await;
    for extra in [
        json!({}),
        session(),
        json!({"thinking": {"type": "disabled"}}),
        json!({"output_config": {"effort": "low"}}),
        json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I thi"}]}),
    ] {
        let usage = plain(&server, extra.clone()).await["usage"].clone();
        let parts = ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"];
        let total: u64 = parts.iter().filter_map(|part| usage[part].as_u64()).sum();
        let mut body = ask(extra.clone());
        body.as_object_mut().and_then(|body| body.remove("max_tokens"));
        let (status, counted) = server.json(COUNT, body).await;
        assert_eq!((status, counted), (StatusCode::OK, json!({"input_tokens": total})), "{extra}");
    }
}

#[tokio::test]
async fn a_last_turn_of_the_assistant_is_continued() {
    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]);
    let (content, _) = said(" forty-two.", json!({"messages": turns})).await;
    assert_eq!(content, json!([{"type": "text", "text": " forty-two."}]));
}

#[tokio::test]
async fn a_stream_tells_what_a_plain_answer_does() {
    let scripts = [
        "Easy.\n</think>\nForty-two.".to_owned(),
        "</think>Grüße, 世界! 🦀".to_owned(),
        "I wonder and wonder".to_owned(),
        String::new(),
        CALL.to_owned(),
        CALL.repeat(3),
        format!("{CALL}And then some"),
        CALL.replace("\n</think>", ""),
        CALL.replace("Bonn", "Bonn <b>\"x\"</b> \\ ü\nsecond line"),
        "Hm.\n</think>\nText first.\n<tool_call>\n<function=weather>\n</function>\n</tool_call>".to_owned(),
    ];
    let extras = [
        json!({}),
        json!({"tools": tools()}),
        json!({"tools": tools(), "tool_choice": {"type": "auto", "disable_parallel_tool_use": true}}),
        json!({"tools": tools(), "tool_choice": {"type": "none"}}),
        json!({"thinking": {"type": "disabled"}, "tools": tools()}),
        json!({"chat_template_kwargs": {"force_nonempty_content": true}}),
        json!({"max_tokens": 1}),
        json!({"max_tokens": 2, "tools": tools()}),
        json!({"max_tokens": 7}),
        json!({"stop_sequences": ["two", "onder", "ü"]}),
        json!({"temperature": 0.8, "seed": 7, "top_k": 5, "top_p": 0.9}),
    ];
    for script in &scripts {
        let server = Server::answering(script).await;
        for extra in &extras {
            let mut plain = plain(&server, extra.clone()).await;
            let mut streamed = folded(events(&server, extra.clone()).await);
            for answer in [&mut plain, &mut streamed] {
                answer["id"] = Value::Null;
                answer["content"] = anonymous(answer["content"].take());
            }
            assert_eq!(plain, streamed, "{script:?} {extra}");
        }
    }
}

#[tokio::test]
async fn a_call_that_was_cut_has_begun_in_the_stream_and_ends_it() {
    let server = Server::answering(CALL).await;
    let message = folded(events(&server, json!({"tools": tools(), "max_tokens": 16})).await);
    assert_eq!(
        (&message["stop_reason"], &message["content"][1]["type"]),
        (&json!("max_tokens"), &json!("tool_use"))
    );
}

#[tokio::test]
async fn silence_is_filled_with_pings_after_the_start() {
    let mut options = Options::new(names());
    options.keep_alive = Duration::from_millis(1);
    let server = Server::start("</think>one two", Duration::from_millis(50), options).await;
    let events = events(&server, json!({})).await;
    assert!(events.contains(&json!({"type": "ping"})), "{events:?}");
    folded(events);
}

#[tokio::test]
async fn queries_and_headers_of_other_versions_do_no_harm() {
    let server = Server::answering("</think>x").await;
    for path in ["/v1/messages?beta=true", "/v1/messages/count_tokens?beta=true"] {
        let mut request = post(path, ask(json!({})).to_string());
        let headers = request.headers_mut();
        headers.insert("anthropic-version", "2099-01-01".parse().expect("a header"));
        headers.insert("anthropic-beta", "claude-code-20250219,x".parse().expect("a header"));
        assert_eq!(server.call(request).await.status(), StatusCode::OK, "{path}");
    }
}

/// Status, type and message of an error, whose form is checked.
async fn error(server: &Server, request: Request<Body>) -> (u16, String, String) {
    let response = server.call(request).await;
    let id = response.headers().get("request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    let (status, text) = read(response).await;
    let mut error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
    let (kind, message) = (error["error"]["type"].take(), error["error"]["message"].take());
    let form = json!({"type": "error", "error": {"type": null, "message": null}, "request_id": id});
    assert_eq!(error, form, "{text}");
    let word = |value: Value| value.as_str().expect("a string").to_owned();
    (status.as_u16(), word(kind), word(message))
}

#[tokio::test]
async fn what_is_wrong_is_said_in_this_apis_form() {
    let server = Server::answering("x").await;
    let check = async |path: &str, body: String, words: &str| {
        let (status, kind, message) = error(&server, post(path, body.clone())).await;
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"), "{body}: {message}");
        assert!(message.contains(words), "{body}: {message}");
    };
    for path in [MESSAGES, COUNT] {
        check(path, String::new(), "JSON decode error").await;
        check(path, "[1]".into(), "object").await;
        check(path, "{}".into(), "`model` is required").await;
        check(path, ask(json!({"model": 7})).to_string(), "`model` must be a string").await;
        check(path, ask(json!({"messages": []})).to_string(), "`messages` must not be empty").await;
        check(path, ask(json!({"thinking": {"type": "deep"}})).to_string(), "`thinking.type`").await;
        let unnamed = json!([{"name": "", "input_schema": {}}]);
        check(path, ask(json!({"tools": unnamed})).to_string(), "`tools[0].name` must be a non-empty").await;
    }
    let check = async |extra: Value, words: &str| check(MESSAGES, ask(extra).to_string(), words).await;
    check(json!({"max_tokens": null}), "`max_tokens` is required").await;
    check(json!({"temperature": 3}), "`temperature` must be between 0 and 2").await;
    check(json!({"top_k": -7}), "`top_k` must be at least -1").await;
    check(json!({"stream": "yes"}), "`stream` must be true or false").await;
    check(json!({"stop_sequences": [""]}), "`stop_sequences` must not hold an empty string").await;
    check(json!({"stop_sequences": vec!["x"; 65]}), "`stop_sequences` must hold at most 64").await;
    let format = json!({"type": "json_schema", "schema": {"type": "nonsense"}});
    check(json!({"output_config": {"format": format}}), "`output_config.format.schema`").await;
    let long = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    check(json!({"messages": long}), "maximum context length").await;
    let call = json!([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]);
    let turns = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": call}]);
    check(json!({"messages": turns}), "a final message with text").await;
}

#[tokio::test]
async fn the_form_of_an_error_goes_by_the_path_whoever_makes_it() {
    let mut options = Options::new(names());
    options.api_keys = vec!["secret".into()];
    options.body_limit = 1000;
    let server = Server::start("</think>x", Duration::ZERO, options).await;
    let with_key = |path: &str, body: String| {
        let mut request = post(path, body);
        request.headers_mut().insert("x-api-key", "secret".parse().expect("a header"));
        request
    };
    let (status, kind, _) = error(&server, post(MESSAGES, "{}")).await;
    assert_eq!((status, kind.as_str()), (401, "authentication_error"));
    let (status, kind, message) = error(&server, with_key(MESSAGES, "x".repeat(1001))).await;
    assert_eq!((status, kind.as_str()), (413, "request_too_large"));
    assert!(message.contains("1000 bytes"), "{message}");
    let (status, kind, _) = error(&server, with_key("/v1/messages/batches", "{}".into())).await;
    assert_eq!((status, kind.as_str()), (404, "not_found_error"));
    let mut wrong = with_key(MESSAGES, "{}".into());
    *wrong.method_mut() = Method::PUT;
    let (status, kind, _) = error(&server, wrong).await;
    assert_eq!((status, kind.as_str()), (405, "invalid_request_error"));
    let mut bearer = post(MESSAGES, ask(json!({})).to_string());
    bearer.headers_mut().insert(header::AUTHORIZATION, "Bearer secret".parse().expect("a header"));
    assert_eq!(server.call(bearer).await.status(), StatusCode::OK);
    assert_eq!(server.call(with_key(MESSAGES, ask(json!({})).to_string())).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn who_must_wait_is_told_for_what() {
    let server = Server::answering("x").await;
    let engine = &server.app.resident(0).expect("a model").engine;
    // As full as a thousand clients would make it.
    engine.stats().waiting.store(1024, std::sync::atomic::Ordering::Relaxed);
    let request = || post(MESSAGES, ask(json!({})).to_string());
    assert!(server.call(request()).await.headers().contains_key(header::RETRY_AFTER));
    let (status, kind, _) = error(&server, request()).await;
    assert_eq!((status, kind.as_str()), (429, "rate_limit_error"));
    let loading = Server { app: ferrotron::api::App::new(Options::new(names())) };
    assert!(loading.call(request()).await.headers().contains_key(header::RETRY_AFTER));
    let (status, kind, message) = error(&loading, request()).await;
    assert_eq!((status, kind.as_str()), (503, "overloaded_error"));
    assert!(message.contains("Loading model"), "{message}");
}

#[tokio::test]
async fn a_stream_that_ends_early_ends_with_an_error_event() {
    let server = Server::start("</think>one two", Duration::from_millis(50), Options::new(names())).await;
    let events = events(&server, json!({"timeout": 0.07})).await;
    let (last, before) = events.split_last().expect("events");
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")), "{last}");
    assert_eq!(before[0]["type"], "message_start");
    assert!(before.iter().all(|event| event["type"] != "message_stop"));
}
