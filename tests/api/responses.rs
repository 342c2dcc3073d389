//! `/v1/responses`: items, events, what is kept, and what is made in the background.

use super::world::{CALL, CHAT, CONTEXT, Server, chat, names, read, weather};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use ferrotron::api::{Options, StoreLimits};
use serde_json::{Value, json};
use std::time::Duration;

const RESPONSES: &str = "/v1/responses";

fn ask(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 0, "input": "hi"});
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

fn weather_tool() -> Value {
    let mut tool = weather()[0]["function"].clone();
    tool["type"] = json!("function");
    json!([tool])
}

/// A response with its names made equal: ids are numbered in the order in which they first appear.
struct Names(Vec<String>);

impl Names {
    fn redact(&mut self, value: &mut Value) {
        match value {
            Value::Object(map) => {
                for (key, value) in map.iter_mut() {
                    match (key.as_str(), &*value) {
                        ("created_at", _) => *value = json!(0),
                        ("id" | "item_id" | "call_id" | "previous_response_id", Value::String(id)) => {
                            *value = json!(self.of(id.clone()));
                        }
                        _ => self.redact(value),
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.redact(item)),
            _ => {}
        }
    }

    fn of(&mut self, id: String) -> String {
        let kind = id.split('_').next().unwrap_or_default().to_owned();
        let place = self.0.iter().position(|known| *known == id).unwrap_or_else(|| {
            self.0.push(id);
            self.0.len() - 1
        });
        format!("{kind}_{place}")
    }
}

fn redacted(mut value: Value) -> Value {
    Names(Vec::new()).redact(&mut value);
    value
}

async fn plain(server: &Server, body: &Value) -> Value {
    let (status, text) = server.post(RESPONSES, body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).expect("JSON")
}

/// The data of all events; their names are as they say.
async fn streamed(server: &Server, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let (status, text) = server.post(RESPONSES, &body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let mut events = Vec::new();
    let mut name = "";
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with(':')) {
        match (line.strip_prefix("event: "), line.strip_prefix("data: ")) {
            (Some(given), _) => name = given,
            (_, Some(data)) => {
                let data: Value =
                    serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"));
                assert_eq!(data["type"], name);
                events.push(data);
            }
            _ => panic!("no event: {line}"),
        }
    }
    events
}

async fn send(server: &Server, method: Method, path: &str) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
    let (status, text) = read(server.call(request).await).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
}

fn path(response: &Value) -> String {
    format!("{RESPONSES}/{}", response["id"].as_str().expect("an id"))
}

#[tokio::test]
async fn a_thought_and_a_message_are_items() {
    let server = Server::answering("Easy.\n</think>\nForty-two.").await;
    insta::assert_json_snapshot!(redacted(plain(&server, &ask(json!({}))).await));
}

#[tokio::test]
async fn a_stream_tells_every_item_from_beginning_to_end() {
    let server = Server::answering(&CALL.replace("<tool_call>", "So:\n<tool_call>")).await;
    let events = json!(streamed(&server, &ask(json!({"tools": weather_tool()}))).await);
    let lines: Vec<String> =
        redacted(events).as_array().into_iter().flatten().map(Value::to_string).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

/// What holds for the events of any response.
fn check_events(events: &[Value]) {
    let kind = |event: &Value| event["type"].as_str().unwrap_or_default().to_owned();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
    }
    assert_eq!([kind(&events[0]), kind(&events[1])], ["response.created", "response.in_progress"]);
    let (mut open, mut text, mut logprobs, mut done) = (Value::Null, String::new(), Vec::new(), Vec::new());
    for event in &events[2..events.len() - 1] {
        if !open.is_null() && event["item_id"].is_string() {
            assert_eq!(event["item_id"], open["id"], "{event}");
        }
        assert!(event["output_index"] == done.len(), "{event}");
        match kind(event).as_str() {
            "response.output_item.added" => {
                assert!(open.is_null(), "one item at a time: {event}");
                (open, text) = (event["item"].clone(), String::new());
                logprobs.clear();
                assert_eq!(open["status"], "in_progress");
            }
            "response.output_item.done" => {
                assert_eq!((&event["item"]["id"], &event["item"]["type"]), (&open["id"], &open["type"]));
                open = Value::Null;
                done.push(event["item"].clone());
            }
            "response.content_part.added" => assert_eq!(event["part"]["text"], ""),
            "response.content_part.done" => assert_eq!(event["part"]["text"], text),
            "response.function_call_arguments.done" => assert_eq!(event["arguments"], text),
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(event["text"], text);
                assert!(event["logprobs"].as_array().is_none_or(|all| *all == logprobs), "{event}");
            }
            _ => {
                text += event["delta"].as_str().unwrap_or_else(|| panic!("a delta: {event}"));
                logprobs.extend(event["logprobs"].as_array().cloned().unwrap_or_default());
            }
        }
    }
    let response = &events[events.len() - 1]["response"];
    done.retain(|item| !(item["type"] == "function_call" && item["status"] == "incomplete"));
    assert_eq!(response["output"], json!(done));
    assert_eq!(
        kind(&events[events.len() - 1]),
        format!("response.{}", response["status"].as_str().unwrap_or(""))
    );
}

#[tokio::test]
async fn a_stream_ends_with_the_plain_answer() {
    let two = format!("{CALL}\n<tool_call>\n<function=weather>\n</function>\n</tool_call>\nDone.");
    let said = CALL.replace("</think>\n", "</think>\nLooking:\n");
    let scripts =
        ["Easy.\n</think>\nGrüße 🦀, 42.", "</think>", "I wonder.", CALL, &two, &said, "</think>one two"];
    let bodies = [
        json!({}),
        json!({"tools": weather_tool()}),
        json!({"tools": weather_tool(), "tool_choice": "required", "parallel_tool_calls": false}),
        json!({"tools": weather_tool(), "max_output_tokens": 25}),
        json!({"reasoning": {"effort": "none"}, "instructions": "Be brief."}),
        json!({"include_reasoning": false, "stop": ["42", "o t"]}),
        json!({"chat_template_kwargs": {"force_nonempty_content": true}}),
        json!({"top_logprobs": 2, "include": ["reasoning.encrypted_content"], "metadata": {"a": "b"}}),
        json!({"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20}),
    ];
    for script in scripts {
        let server = Server::answering(script).await;
        for body in &bodies {
            let body = ask(body.clone());
            let whole = plain(&server, &body).await;
            let events = streamed(&server, &body).await;
            check_events(&events);
            let last = &events[events.len() - 1]["response"];
            assert_eq!(redacted(last.clone()), redacted(whole.clone()), "{script:?} {body}");
            for response in [&whole, last] {
                assert_eq!(
                    send(&server, Method::GET, &path(response)).await,
                    (StatusCode::OK, response.clone())
                );
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_says_so_and_holds_no_broken_call() {
    let server = Server::answering(CALL).await;
    let body = ask(json!({"tools": weather_tool(), "max_output_tokens": 25}));
    let events = streamed(&server, &body).await;
    let last = &events[events.len() - 1];
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(last["response"]["output"].as_array().map(Vec::len), Some(1), "{last}");
    let cut = &events[events.len() - 2]["item"];
    assert_eq!((&cut["type"], &cut["status"]), (&json!("function_call"), &json!("incomplete")));
    let (_, answer) = server.json(CHAT, chat(json!({"tools": weather(), "max_tokens": 25}))).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
}

#[tokio::test]
async fn an_answer_without_a_word_has_an_empty_message() {
    let server = Server::answering("Hm.\n</think>").await;
    let answer = plain(&server, &ask(json!({}))).await;
    assert_eq!(answer["output"][1]["content"][0]["text"], "", "{answer}");
    let cut = plain(&server, &ask(json!({"max_output_tokens": 1}))).await;
    assert_eq!(cut["output"].as_array().map(Vec::len), Some(1), "{cut}");
}

#[tokio::test]
async fn the_words_of_a_message_have_logprobs_and_nothing_else_has() {
    let server = Server::answering("Hm\n</think>\nGrüße 🦀.").await;
    for extra in [json!({"top_logprobs": 1}), json!({"include": ["message.output_text.logprobs"]})] {
        let answer = plain(&server, &ask(extra)).await;
        let part = &answer["output"][1]["content"][0];
        let entries = part["logprobs"].as_array().cloned().unwrap_or_default();
        let bytes = entries.iter().flat_map(|entry| entry["bytes"].as_array().cloned().unwrap_or_default());
        let bytes: Vec<u8> = bytes.filter_map(|byte| byte.as_u64().map(|byte| byte as u8)).collect();
        assert_eq!(String::from_utf8_lossy(&bytes).trim_start(), "Grüße 🦀.", "{part}");
    }
    let without = plain(&server, &ask(json!({}))).await;
    assert_eq!(without["output"][1]["content"][0]["logprobs"], Value::Null);
}

/// The tokens of the prompt that a request makes.
async fn input_tokens(server: &Server, body: Value) -> Value {
    plain(server, &ask(body)).await["usage"]["input_tokens"].clone()
}

async fn prompt_tokens(server: &Server, body: Value) -> Value {
    let (status, answer) = server.json(CHAT, chat(body)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["usage"]["prompt_tokens"].clone()
}

#[tokio::test]
async fn items_make_the_prompt_that_messages_make() {
    let server = Server::answering("</think>yes").await;
    let call = json!({"name": "weather", "arguments": "{\"city\": \"Bonn\"}"});
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": "", "reasoning": "Look.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "And now?"},
    ]);
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "Is it raining?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": call["arguments"]},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is."}]},
        {"role": "user", "content": "And now?"},
    ]);
    let expected = prompt_tokens(&server, json!({"messages": messages, "tools": weather()})).await;
    let body = json!({"instructions": "Be brief.", "input": input, "tools": weather_tool()});
    assert_eq!(input_tokens(&server, body).await, expected);
    assert_eq!(input_tokens(&server, json!({})).await, prompt_tokens(&server, json!({})).await);
}

#[tokio::test]
async fn a_follow_up_continues_what_was_said() {
    let server = Server::answering("Hm.\n</think>\nYes.").await;
    let first = plain(&server, &ask(json!({"instructions": "Be brief."}))).await;
    let ask_more = |previous: &Value| json!({"input": "Sure?", "previous_response_id": previous["id"]});
    let second = plain(&server, &ask(ask_more(&first))).await;
    let third = plain(&server, &ask(ask_more(&second))).await;
    let said = json!({"role": "assistant", "content": "Yes.", "reasoning": "Hm."});
    let asked = |text: &str| json!({"role": "user", "content": text});
    let history = json!([asked("hi"), said, asked("Sure?"), said, asked("Sure?")]);
    // Instructions are not handed on.
    assert_eq!(third["usage"]["input_tokens"], prompt_tokens(&server, json!({"messages": history})).await);
    assert_eq!(third["previous_response_id"], second["id"]);
    let streamed = streamed(&server, &ask(ask_more(&second))).await;
    assert_eq!(streamed[streamed.len() - 1]["response"]["usage"], third["usage"]);
}

#[tokio::test]
async fn what_is_not_kept_cannot_be_continued() {
    let server = Server::answering("</think>Yes.").await;
    let loose = plain(&server, &ask(json!({"store": false}))).await;
    assert_eq!(loose["store"], json!(false));
    let (status, error) = send(&server, Method::GET, &path(&loose)).await;
    assert_eq!((status, &error["error"]["type"]), (StatusCode::NOT_FOUND, &json!("NotFoundError")));
    let body = ask(json!({"previous_response_id": loose["id"]}));
    let (status, error) = server.json(RESPONSES, body).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("previous_response_id")));
    let kept = plain(&server, &ask(json!({}))).await;
    let (status, gone) = send(&server, Method::DELETE, &path(&kept)).await;
    assert_eq!((status, &gone["deleted"]), (StatusCode::OK, &json!(true)));
    for (method, path) in [
        (Method::GET, path(&kept)),
        (Method::DELETE, path(&kept)),
        (Method::POST, format!("{}/cancel", path(&kept))),
    ] {
        assert_eq!(send(&server, method, &path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
}

async fn with_limits(script: &str, pace: Duration, limits: StoreLimits) -> Server {
    let mut options = Options::new(names());
    options.responses = limits;
    Server::start(script, pace, options).await
}

#[tokio::test]
async fn the_oldest_is_forgotten_for_the_newest() {
    let limits = StoreLimits { count: 2, ..StoreLimits::default() };
    let server = with_limits("</think>Yes.", Duration::ZERO, limits).await;
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(plain(&server, &ask(json!({}))).await);
    }
    let mut found = Vec::new();
    for answer in &answers {
        found.push(send(&server, Method::GET, &path(answer)).await.0.as_u16());
    }
    assert_eq!(found, [404, 200, 200]);
}

#[tokio::test]
async fn a_server_that_keeps_nothing_says_so() {
    let limits = StoreLimits { count: 0, ..StoreLimits::default() };
    let server = with_limits("</think>Yes.", Duration::ZERO, limits).await;
    let answer = plain(&server, &ask(json!({"store": true}))).await;
    assert_eq!(answer["store"], json!(false));
    assert_eq!(send(&server, Method::GET, &path(&answer)).await.0, StatusCode::NOT_FOUND);
    let (status, error) = server.json(RESPONSES, ask(json!({"background": true}))).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("background")));
}

/// Asks until the response has one of these statuses.
async fn until(server: &Server, response: &Value, statuses: &[&str]) -> Value {
    for _ in 0..1000 {
        let (_, now) = send(server, Method::GET, &path(response)).await;
        if statuses.contains(&now["status"].as_str().unwrap_or_default()) {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the response never was {statuses:?}");
}

#[tokio::test]
async fn what_is_made_in_the_background_is_there_when_it_is_done() {
    let server = Server::answering("Hm.\n</think>\nYes.").await;
    let body = ask(json!({"background": true}));
    let queued = plain(&server, &body).await;
    assert_eq!((&queued["status"], &queued["output"]), (&json!("queued"), &json!([])));
    let done = until(&server, &queued, &["completed"]).await;
    assert_eq!(done["id"], queued["id"]);
    assert_eq!(done["output"][1]["content"][0]["text"], "Yes.");
    // A cancel that comes late changes nothing.
    let cancel = format!("{}/cancel", path(&queued));
    assert_eq!(send(&server, Method::POST, &cancel).await, (StatusCode::OK, done.clone()));
    let events = streamed(&server, &body).await;
    check_events(&events);
    let last = &events[events.len() - 1]["response"];
    assert_eq!(redacted(last.clone()), redacted(done));
    assert_eq!(send(&server, Method::GET, &path(last)).await.1, *last);
}

#[tokio::test]
async fn a_cancel_ends_the_work() {
    let server = with_limits(&"wonder ".repeat(300), Duration::from_millis(10), StoreLimits::default()).await;
    let queued = plain(&server, &ask(json!({"background": true}))).await;
    until(&server, &queued, &["in_progress"]).await;
    let cancel = format!("{}/cancel", path(&queued));
    for _ in 0..2 {
        let (status, cancelled) = send(&server, Method::POST, &cancel).await;
        assert_eq!((status, &cancelled["status"]), (StatusCode::OK, &json!("cancelled")), "{cancelled}");
    }
    let body = ask(json!({"previous_response_id": queued["id"]}));
    assert_eq!(server.json(RESPONSES, body).await.0, StatusCode::BAD_REQUEST);
    let engine = &server.app.resident(0).expect("a model").engine;
    for _ in 0..500 {
        if engine.stats().running.load(std::sync::atomic::Ordering::Relaxed) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the sequence still runs");
}

#[tokio::test]
async fn too_many_in_the_background_are_told_to_come_again() {
    let limits = StoreLimits { running: 1, ..StoreLimits::default() };
    let server = with_limits(&"wonder ".repeat(300), Duration::from_millis(10), limits).await;
    let first = plain(&server, &ask(json!({"background": true}))).await;
    let (status, _) = server.json(RESPONSES, ask(json!({"background": true}))).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    let (status, _) = send(&server, Method::DELETE, &path(&first)).await;
    assert_eq!(status, StatusCode::OK);
    let again = plain(&server, &ask(json!({"background": true}))).await;
    assert_eq!(again["status"], "queued");
}

#[tokio::test]
async fn only_what_is_made_in_the_background_can_be_cancelled() {
    let server = Server::answering("</think>Yes.").await;
    let answer = plain(&server, &ask(json!({}))).await;
    let (status, error) = send(&server, Method::POST, &format!("{}/cancel", path(&answer))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(error["error"]["message"].to_string().contains("background"), "{error}");
}

#[tokio::test]
async fn a_stream_that_ends_early_says_why_in_its_last_event() {
    let server = with_limits(&"wonder ".repeat(300), Duration::from_millis(10), StoreLimits::default()).await;
    let events = streamed(&server, &ask(json!({"timeout": 0.3}))).await;
    let last = &events[events.len() - 1];
    assert_eq!(last["type"], "response.failed");
    assert_eq!(
        (&last["response"]["status"], last["sequence_number"].as_u64()),
        (&json!("failed"), Some(events.len() as u64 - 1))
    );
    assert!(last["response"]["error"]["message"].to_string().contains("timeout"), "{last}");
    assert_eq!(send(&server, Method::GET, &path(&last["response"])).await.1["status"], "failed");
    let (status, _) = server.post(RESPONSES, &ask(json!({"timeout": 0.1}))).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
}

#[tokio::test]
async fn a_tool_choice_has_this_routes_own_form() {
    let server = Server::answering("Sure.\n</think>\nNo tool.").await;
    let mut tools = weather_tool();
    let list = tools.as_array_mut().expect("a list");
    list.insert(0, json!({"type": "web_search"}));
    list.push(json!({"type": "function", "name": "other", "parameters": null}));
    let called = async |choice: Value| {
        let body = ask(json!({"tools": tools, "tool_choice": choice, "max_output_tokens": 100}));
        let answer = plain(&server, &body).await;
        assert_eq!((&answer["tools"], &answer["tool_choice"]), (&tools, &choice));
        let streamed = streamed(&server, &body).await;
        let added = streamed.iter().filter(|event| event["type"] == "response.output_item.added");
        let call = added.map(|event| event["item"]["name"].clone()).find(|name| !name.is_null());
        call.unwrap_or_default()
    };
    assert_eq!(called(json!("auto")).await, Value::Null);
    assert_eq!(called(json!("none")).await, Value::Null);
    assert_eq!(called(json!({"type": "function", "name": "weather"})).await, "weather");
    assert_eq!(called(json!({"type": "function", "name": "other"})).await, "other");
    for name in ["weather", "other"] {
        let list = json!([{"type": "function", "name": name}, {"type": "web_search"}]);
        let choice = |mode: &str| json!({"type": "allowed_tools", "mode": mode, "tools": list});
        assert_eq!(called(choice("required")).await, name);
        assert_eq!(called(choice("auto")).await, Value::Null);
    }
}

#[tokio::test]
async fn a_format_holds_for_the_message() {
    let server = Server::answering("Hm.\n</think>\nPerhaps, if").await;
    let schema = json!({"enum": ["yes", "no"]});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let answer = plain(&server, &ask(json!({"text": {"format": format, "verbosity": "low"}}))).await;
    let said = &answer["output"][1]["content"][0]["text"];
    assert!([json!("\"yes\""), json!("\"no\"")].contains(said), "{answer}");
    assert_eq!(answer["text"]["format"], format);
    let object = json!({"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20});
    let answer = plain(&server, &ask(object)).await;
    assert!(answer["output"][1]["content"][0]["text"].to_string().starts_with("\"{"), "{answer}");
}

#[tokio::test]
async fn effort_switches_the_thought_off() {
    let server = Server::answering("Yes.").await;
    let answer = plain(&server, &ask(json!({"reasoning": {"effort": "none", "summary": "auto"}}))).await;
    assert_eq!(answer["output"][0]["content"][0]["text"], "Yes.", "{answer}");
    assert_eq!(answer["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
}

#[tokio::test]
async fn truncation_leaves_out_the_oldest_turns() {
    let server = Server::answering("</think>Yes.").await;
    let turn = |turn: usize| {
        let text = format!("turn {turn} {}", "word ".repeat(20));
        [json!({"role": "user", "content": text}), json!({"role": "assistant", "content": "Yes."})]
    };
    let last = |count: usize| {
        let turns = (40 - count..40).flat_map(turn);
        turns.chain([json!({"role": "user", "content": "last"})]).collect::<Vec<Value>>()
    };
    let mut body = ask(json!({"instructions": "Be brief.", "input": last(40), "max_output_tokens": 100}));
    let (status, error) = server.json(RESPONSES, body.clone()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(error["error"]["message"].to_string().contains("maximum context length"), "{error}");
    body["truncation"] = json!("auto");
    let used = plain(&server, &body).await["usage"]["input_tokens"].clone();
    let mut fits = json!(0);
    for count in 1.. {
        let mut messages = last(count);
        messages.insert(0, json!({"role": "system", "content": "Be brief."}));
        let tokens = prompt_tokens(&server, json!({"messages": messages})).await;
        if tokens.as_u64().is_none_or(|tokens| tokens > CONTEXT as u64 - 100) {
            break;
        }
        fits = tokens;
    }
    assert_eq!(used, fits);
}

#[tokio::test]
async fn mistakes_are_named_in_the_clients_own_words() {
    let server = Server::answering("x").await;
    let check = async |body: Value, param: &str, words: &str| {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = json!(stream);
            let (status, error) = server.json(RESPONSES, body.clone()).await;
            let error = &error["error"];
            assert_eq!(
                (status, &error["param"]),
                (StatusCode::BAD_REQUEST, &json!(param)),
                "{body}: {error}"
            );
            assert!(error["message"].to_string().contains(words), "{body}: {error}");
        }
    };
    check(json!({"model": "tiny"}), "input", "required").await;
    check(ask(json!({"input": []})), "input", "empty").await;
    check(ask(json!({"input": 7})), "input", "a string or a list").await;
    check(ask(json!({"input": [{"type": "item_reference", "id": "x"}]})), "input[0].type", "referred").await;
    check(ask(json!({"prompt": {"id": "x"}})), "prompt", "stored prompts").await;
    check(ask(json!({"conversation": "x"})), "conversation", "previous_response_id").await;
    check(ask(json!({"max_output_tokens": 0})), "max_output_tokens", "`max_output_tokens` must be").await;
    check(ask(json!({"max_output_tokens": 100_000})), "max_output_tokens", "max_model_len").await;
    check(ask(json!({"temperature": 3})), "temperature", "between 0 and 2").await;
    check(ask(json!({"reasoning": {"effort": "huge"}})), "reasoning.effort", "`reasoning.effort`").await;
    check(ask(json!({"truncation": "maybe"})), "truncation", "auto or disabled").await;
    check(ask(json!({"background": true, "store": false})), "background", "store").await;
    check(ask(json!({"previous_response_id": "resp_no"})), "previous_response_id", "resp_no").await;
    let format = |format: Value| ask(json!({"text": {"format": format}}));
    check(format(json!({"type": "xml"})), "text.format.type", "`text.format.type`").await;
    check(format(json!({"type": "json_schema"})), "text.format.schema", "`text.format.schema`").await;
    let nonsense = json!({"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}});
    check(format(nonsense), "text.format.schema", "`text.format.schema`").await;
    let search = json!({"type": "web_search"});
    let tools = |tools: Value, choice: Value| ask(json!({"tools": tools, "tool_choice": choice}));
    check(tools(json!([search, {"type": "function"}]), json!(null)), "tools[1].name", "`tools[1].name`")
        .await;
    check(tools(json!([{"name": "f"}]), json!(null)), "tools[0].type", "required").await;
    check(tools(json!([search]), json!("required")), "tool_choice", "when `tools` are given").await;
    check(tools(weather_tool(), json!("maybe")), "tool_choice", "got maybe").await;
    check(tools(weather_tool(), search.clone()), "tool_choice", "web_search").await;
    check(tools(weather_tool(), json!({"type": "function", "name": "fly"})), "tool_choice", "fly").await;
    let allowed = |tools: Value| json!({"type": "allowed_tools", "mode": "auto", "tools": tools});
    check(tools(weather_tool(), allowed(json!([search]))), "tool_choice", "must name a function").await;
    let fly = json!([{"type": "function", "name": "fly"}]);
    check(tools(weather_tool(), allowed(fly)), "tool_choice", "fly").await;
    // What nobody knows does no harm.
    let odd = json!({"unknown": 1, "prompt_cache_key": "x", "safety_identifier": "y", "stream_options": {"a": 1},
        "service_tier": "flex", "user": "me", "max_tool_calls": 3, "n": 7, "echo": true, "text": null});
    let answer = plain(&server, &ask(odd)).await;
    assert_eq!((&answer["service_tier"], &answer["user"]), (&json!("flex"), &json!("me")));
    let (status, _) = server.json(RESPONSES, ask(json!({"model": "gpt-4"}))).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, error) = send(&server, Method::GET, "/v1/responses/x?stream=true").await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("stream")));
}
