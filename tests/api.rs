//! The wire, called in memory: the real router, text and engine around a network that follows a script.

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use axum::response::Response;
use ferrotron::api::{self, App, ModelInfo, Options, SamplingDefaults};
use ferrotron::backend::StepInputs;
use ferrotron::engine::{self, EngineConfig};
use ferrotron::model::{Limits, Network, StepError};
use ferrotron::text::{Text, TextFiles};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tower::ServiceExt;

/// Wide enough for the tokenizer of `models/tiny`.
const VOCAB: usize = 4096;
const CONTEXT: usize = 512;

/// Says the ids of its script, whatever it is asked; after them the end of the turn, for ever.
struct Script {
    ids: Vec<u32>,
    end: u32,
    /// Time of one step: long enough for a client to go away in between.
    pace: Duration,
    /// Prompt length by slot: the script begins behind it.
    prompts: HashMap<u32, u32>,
    limits: Limits,
    logits: Vec<f32>,
}

impl Network for Script {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        std::thread::sleep(self.pace);
        self.logits.clear();
        self.logits.resize(inputs.logit_rows.len() * VOCAB, 0.0);
        for sequence in &inputs.sequences {
            if sequence.past == 0 {
                self.prompts.insert(sequence.slot, sequence.count);
            }
            let said = sequence.past + sequence.count - self.prompts[&sequence.slot];
            let next = self.ids.get(said as usize).copied().unwrap_or(self.end);
            for (row, position) in inputs.logit_rows.iter().enumerate() {
                if (sequence.first..sequence.first + sequence.count).contains(position) {
                    self.logits[row * VOCAB + next as usize] = 50.0;
                }
            }
        }
        Ok(&self.logits)
    }
}

fn text() -> Text {
    let template = include_str!("../models/tiny/chat_template.jinja");
    Text::load(TextFiles {
        tokenizer_json: include_bytes!("../models/tiny/tokenizer.json"),
        tokenizer_config: Some(include_bytes!("../models/tiny/tokenizer_config.json")),
        chat_template: Some(template),
    })
    .expect("the tiny model's own files")
}

fn names() -> Vec<String> {
    vec!["nvidia/tiny".into(), "tiny".into()]
}

fn limits() -> Limits {
    Limits { step_tokens: 1024, logit_rows: 1024, slots: 8, blocks: 512, block_len: 16, ..Limits::default() }
}

/// A model that answers `script`.
async fn resident(index: usize, names: Vec<String>, script: &str, pace: Duration) -> api::Resident {
    let text = text();
    let ids = text.encode(script, false).expect("plain text");
    let end = text.id_of("<|im_end|>").expect("a control token");
    let network = Script { ids, end, pace, prompts: HashMap::new(), limits: limits(), logits: Vec::new() };
    around(index, names, text, network).await
}

/// A model that does what `network` does.
async fn around(
    index: usize,
    served_names: Vec<String>,
    text: Text,
    network: impl Network + 'static,
) -> api::Resident {
    // A script knows a sequence only from its start, so nothing may be resumed.
    let config = EngineConfig { context_len: CONTEXT, checkpoints_max: 0, ..EngineConfig::default() };
    let (engine, _) = engine::start(config, move |_| Ok(Box::new(network)));
    engine.loaded().await;
    let model = ModelInfo {
        served_names,
        root: "tiny".into(),
        created: 1,
        max_model_len: CONTEXT,
        vocab_size: VOCAB,
        stop_ids: text.id_of("<|im_end|>").into_iter().collect(),
        defaults: SamplingDefaults::default(),
    };
    api::Resident { index, text: Arc::new(text), engine, model: Arc::new(model) }
}

/// A server whose model answers `script`.
struct Server {
    app: Arc<App>,
}

impl Server {
    async fn answering(script: &str) -> Self {
        Self::start(script, Duration::ZERO, Options::new(names())).await
    }

    async fn start(script: &str, pace: Duration, options: Options) -> Self {
        let app = App::new(options);
        app.set_resident(resident(0, names(), script, pace).await);
        Self { app }
    }

    async fn call(&self, request: Request<Body>) -> Response {
        api::router(self.app.clone()).oneshot(request).await.expect("the router is infallible")
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        read(self.call(request).await).await
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, String) {
        read(self.call(post(path, body.to_string())).await).await
    }

    async fn json(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let (status, text) = self.post(path, &body).await;
        (status, redact(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))))
    }

    /// The events of a stream, one per line, without what differs from run to run.
    async fn events(&self, path: &str, body: Value) -> String {
        let (status, text) = self.post(path, &body).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let lines = text.lines().filter(|line| !line.is_empty()).map(|line| {
            let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {line}"));
            match serde_json::from_str(data) {
                Ok(value) => without_head(redact(value)).to_string(),
                Err(_) => data.to_owned(),
            }
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
    request.body(body.into()).expect("a request")
}

async fn read(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 24).await.expect("a whole body");
    (status, String::from_utf8(bytes.to_vec()).expect("UTF-8"))
}

/// Names become constants, times go.
fn redact(mut value: Value) -> Value {
    match &mut value {
        Value::Object(map) => {
            map.shift_remove("timings");
            for (key, value) in map.iter_mut() {
                match (key.as_str(), &*value) {
                    ("id", Value::String(id)) if id.starts_with("call_") => *value = json!("[call]"),
                    ("id", Value::String(id)) if id.contains("cmpl-") => *value = json!("[id]"),
                    ("created", Value::Number(_)) => *value = json!(0),
                    ("system_fingerprint", _) => *value = json!("[fingerprint]"),
                    _ => *value = redact(value.take()),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = redact(item.take())),
        _ => {}
    }
    value
}

fn without_head(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        for key in ["id", "object", "created", "model", "system_fingerprint"] {
            map.shift_remove(key);
        }
    }
    value
}

fn chat(extra: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]});
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    }}}])
}

const CHAT: &str = "/v1/chat/completions";
const CALL: &str = "Look it up.\n</think>\n<tool_call>\n<function=weather>\n<parameter=city>\nBonn\n</parameter>\n\
                    <parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n";

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

#[tokio::test]
async fn bad_requests_are_named() {
    let server = Server::answering("x").await;
    let check = async |path: &str, body: &str, status: u16, param: Value, words: &str| {
        let (got, text) = read(server.call(post(path, body.to_owned())).await).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        let error = &error["error"];
        assert_eq!(
            (got.as_u16(), &error["code"], &error["param"]),
            (status, &json!(status), &param),
            "{body}: {text}"
        );
        assert!(error["message"].to_string().contains(words), "{body}: {text}");
    };
    check(CHAT, "", 400, Value::Null, "JSON decode error").await;
    check(CHAT, "{\"messages\": ", 400, Value::Null, "JSON decode error").await;
    check(CHAT, "[1]", 400, Value::Null, "object").await;
    check(CHAT, &format!("{{\"a\":{}", "[".repeat(100_000)), 400, Value::Null, "recursion").await;
    check(CHAT, "{}", 400, json!("messages"), "required").await;
    check(CHAT, "{\"messages\": []}", 400, json!("messages"), "empty").await;
    check(CHAT, "{\"messages\": \"hi\"}", 400, json!("messages"), "an array").await;
    check("/v1/completions", "{}", 400, json!("prompt"), "required").await;
    check("/v1/completions", "{\"prompt\": []}", 400, json!("prompt"), "empty").await;
    check("/v1/completions", "{\"prompt\": [4096]}", 400, json!("prompt"), "outside the vocabulary").await;
    check("/v1/completions", "{\"prompt\": \"x\", \"suffix\": \"y\"}", 400, json!("suffix"), "not currently")
        .await;
    check("/detokenize", "{\"tokens\": [-1]}", 400, json!("tokens"), "outside the vocabulary").await;
    let with = |extra| chat(extra).to_string();
    check(CHAT, &with(json!({"model": "gpt-4"})), 404, json!("model"), "nvidia/tiny").await;
    check(CHAT, &with(json!({"temperature": 3})), 400, json!("temperature"), "between 0 and 2").await;
    check(CHAT, &with(json!({"max_tokens": 100_000})), 400, json!("max_tokens"), "max_model_len").await;
    for stream in [false, true] {
        let with = |extra: Value| {
            let mut body = chat(extra);
            body["stream"] = json!(stream);
            body.to_string()
        };
        let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
        let path = json!("response_format.json_schema.schema");
        check(CHAT, &with(format(json!({"type": "text"}))), 400, path.clone(), "`type`").await;
        check(CHAT, &with(format(json!({"$ref": "#/$defs/No"}))), 400, path.clone(), "No").await;
        check(CHAT, &with(format(json!({"enum": []}))), 400, path, "`enum`").await;
        check(CHAT, &with(json!({"guided_regex": "("})), 400, json!("guided_regex"), "regex").await;
        check(CHAT, &with(json!({"guided_grammar": "?"})), 400, json!("guided_grammar"), "grammar").await;
        let nested = "(".repeat(100_000);
        check(CHAT, &with(json!({"guided_regex": nested})), 400, json!("guided_regex"), "brackets").await;
        let unspeakable = json!([{"type": "function", "function": {"name": "a>b"}}]);
        let forced = json!({"tools": unspeakable, "tool_choice": "required"});
        check(CHAT, &with(forced), 400, json!("tools"), "a>b").await;
    }
    let both = json!({"structured_outputs": {"regex": "a", "choice": ["b"]}});
    check(CHAT, &with(both), 400, json!("structured_outputs"), "exactly one").await;
    let long = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    check(CHAT, &with(json!({"messages": long})), 400, json!("input_tokens"), "maximum context length").await;
    // Fields that nobody knows, nulls and floats do no harm.
    let (status, _) = server.json(CHAT, chat(json!({"store": true, "stop": null, "max_tokens": 4.0}))).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn what_is_not_served_is_said_in_the_same_shape() {
    let server = Server::answering("x").await;
    let check = async |method: Method, path: &str, status: u16| {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
        let response = server.call(request).await;
        let allow = response.headers().get(header::ALLOW).is_some();
        let (got, text) = read(response).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        assert_eq!((got.as_u16(), &error["error"]["code"]), (status, &json!(status)), "{path}: {text}");
        assert_eq!(allow, status == 405, "{path}");
    };
    check(Method::GET, "/nowhere", 404).await;
    check(Method::GET, CHAT, 405).await;
    check(Method::DELETE, "/v1/models", 405).await;
    check(Method::POST, "/v1/embeddings", 501).await;
    let plain = Request::post(CHAT).header(header::CONTENT_TYPE, "text/plain").body(Body::from("{}"));
    let (status, text) = read(server.call(plain.expect("a request")).await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("Unsupported Media Type"), "{text}");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_declared_or_not() {
    let mut options = Options::new(vec!["tiny".into()]);
    options.body_limit = 1000;
    let server = Server::start("x", Duration::ZERO, options).await;
    let body = "x".repeat(1001);
    let declared = Request::post(CHAT)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, body.len());
    let declared = declared.body(Body::from(body.clone())).expect("a request");
    for request in [declared, post(CHAT, body)] {
        let (status, text) = read(server.call(request).await).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
        assert!(text.contains("1000 bytes"), "{text}");
    }
}

#[tokio::test]
async fn keys_guard_all_but_the_probes() {
    let mut options = Options::new(vec!["tiny".into()]);
    options.api_keys = vec!["secret".into()];
    let server = Server::start("x", Duration::ZERO, options).await;
    for path in ["/health", "/ping", "/version", "/metrics", "/load"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    let (status, text) = server.get("/v1/models").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(text.contains("AuthenticationError"), "{text}");
    let request =
        Request::get("/v1/models").header(header::AUTHORIZATION, "Bearer secret").body(Body::empty());
    assert_eq!(server.call(request.expect("a request")).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn only_local_pages_may_call_an_open_server() {
    let server = Server::answering("x").await;
    let preflight = async |origin: &str| {
        let request = Request::options(CHAT)
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .body(Body::empty());
        let response = server.call(request.expect("a request")).await;
        response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN)
    };
    assert!(preflight("http://localhost:3000").await);
    assert!(!preflight("https://evil.example").await);
}

#[tokio::test]
async fn the_request_id_comes_back() {
    let server = Server::answering("x").await;
    let mut request = post(CHAT, chat(json!({"max_tokens": 1})).to_string());
    request.headers_mut().insert("x-request-id", "mine-7".parse().expect("a header"));
    let response = server.call(request).await;
    assert_eq!(response.headers().get("x-request-id").map(|id| id.as_bytes()), Some(&b"mine-7"[..]));
    assert!(read(response).await.1.contains("\"id\":\"chatcmpl-mine-7\""));
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

/// A front model that says "front", one behind that is not there yet, and what puts it there.
async fn two() -> (Server, api::Resident) {
    let mut options = Options::new(names());
    options.models.push(vec!["large".into()]);
    let app = App::new(options);
    app.set_resident(resident(0, names(), " front", Duration::ZERO).await);
    (Server { app }, resident(1, vec!["large".into()], " behind", Duration::ZERO).await)
}

fn continued(model: Value) -> Value {
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

async fn gated(
    index: usize,
    names: Vec<String>,
) -> (api::Resident, std::sync::mpsc::Sender<Result<(), StepError>>) {
    let (word, words) = std::sync::mpsc::channel();
    let network = Gate { words, limits: limits(), logits: Vec::new() };
    (around(index, names, text(), network).await, word)
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
async fn too_many_are_told_to_come_again() {
    let options = Options::new(names());
    let server = Server::start("x", Duration::from_millis(5), options).await;
    let engine = &server.app.resident(0).expect("a model").engine;
    // As full as a thousand clients would make it.
    engine.stats().waiting.store(1024, std::sync::atomic::Ordering::Relaxed);
    let response = server.call(post(CHAT, chat(json!({})).to_string())).await;
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    let (status, text) = read(response).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert!(text.contains("RateLimitError") && text.contains("1024 requests are queued"), "{text}");
}

#[tokio::test]
async fn a_class_in_the_header_is_read_like_the_field() {
    let server = Server::answering("x").await;
    let send = async |value: &str| {
        let mut request = post(CHAT, chat(json!({"max_tokens": 1})).to_string());
        request.headers_mut().insert("x-vllm-priority", value.parse().expect("a header"));
        read(server.call(request).await).await
    };
    assert_eq!(send("-3").await.0, StatusCode::OK);
    let (status, text) = send("urgent").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("X-Vllm-Priority"), "{text}");
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
