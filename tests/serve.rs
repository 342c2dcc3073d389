//! `ferrotron serve` as its users meet it: a process, its signals, its sockets, and clients that behave badly.

#[path = "support/server.rs"]
mod server;

use serde_json::{Value, json};
use server::{Open, Server, eventually};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// So much text that it is still being written when the test has done its part.
fn endless(stream: bool) -> Value {
    json!({"prompt": "Hi! My name is", "max_tokens": 8000, "ignore_eos": true, "stream": stream})
}

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0})
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

/// How many requests ended for `reason`.
fn finished(server: &Server, reason: &str) -> f64 {
    server.metric("vllm:request_success_total", &format!("finished_reason=\"{reason}\""))
}

fn running(server: &Server) -> f64 {
    server.metric("vllm:num_requests_running", "")
}

/// A server that waits for its template, and the pipe it waits at.
#[cfg(unix)]
fn loading(folder: &std::path::Path) -> (Server, std::path::PathBuf) {
    let pipe = folder.join("template.jinja");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo is everywhere").success());
    let server = Server::listening(&["--chat-template", pipe.to_str().expect("UTF-8")], &[]);
    (server, pipe)
}

#[cfg(unix)]
#[test]
fn health_is_503_until_the_model_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (server, pipe) = loading(folder.path());
    let health = server.get("/health");
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["status"], "loading");
    assert!(health.json()["progress"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)));
    let early = server.post(COMPLETIONS, &greedy("Hi", 1));
    assert_eq!(early.status, 503);
    assert!(early.head.contains("retry-after: 1"), "{}", early.head);
    assert!(early.json()["error"]["message"].as_str().is_some_and(|text| text.contains("Loading model")));

    std::fs::write(pipe, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    eventually("health turns green", || (server.get("/health").status == 200).then_some(()));
    assert_eq!(server.post(COMPLETIONS, &greedy("Hi", 1)).status, 200);
}

#[cfg(unix)]
#[test]
fn while_one_server_loads_another_answers_what_can_wait() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Server::ready(&["--served-model-name", "nano"]);
    let pipe = folder.path().join("template.jinja");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo is everywhere").success());
    let url = format!("http://{}", nano.address);
    let template = pipe.to_str().expect("UTF-8");
    let super_ = Server::listening(
        &["--fallback", &url, "--served-model-name", "super", "--chat-template", template],
        &[],
    );
    let waits = with(with(greedy("Hi! My name is", 12), "priority", json!(1)), "model", json!("super"));

    let there = super_.post(COMPLETIONS, &waits);
    assert_eq!((there.status, &there.json()["model"]), (200, &json!("nano")), "{}", there.body);
    assert!(there.head.contains(&format!("x-ferrotron-fallback: {}", nano.address)), "{}", there.head);
    let stream = super_.post(COMPLETIONS, &with(waits.clone(), "stream", json!(true)));
    assert!(stream.body.contains("data: [DONE]") && stream.head.contains("event-stream"), "{}", stream.body);
    assert_eq!(super_.post(COMPLETIONS, &with(waits.clone(), "priority", json!(0))).status, 503);
    // A client that goes away frees its place over there.
    let mut leaving = super_.begin(COMPLETIONS, &with(endless(true), "priority", json!(1)));
    leaving.line("data:");
    drop(leaving);
    eventually("the stream is aborted", || (finished(&nano, "abort") == 1.0).then_some(()));

    std::fs::write(pipe, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    super_.wait_until_ready();
    let here = super_.post(COMPLETIONS, &waits);
    assert_eq!((&here.json()["model"], here.text()), (&json!("super"), there.text()));
    assert!(!here.head.contains("x-ferrotron-fallback"), "{}", here.head);
}

#[cfg(unix)]
#[test]
fn without_its_fallback_a_server_that_loads_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Server::ready(&[]);
    let url = format!("http://{}", nano.address);
    let pipe = folder.path().join("template.jinja");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo is everywhere").success());
    let server =
        Server::listening(&["--fallback", &url, "--chat-template", pipe.to_str().expect("UTF-8")], &[]);
    let waits = with(greedy("Hi", 1), "priority", json!(1));
    assert_eq!(server.post(COMPLETIONS, &waits).status, 200);
    drop(nano);
    let answer = server.post(COMPLETIONS, &waits);
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("Loading model"), "{}", answer.body);
}

#[cfg(unix)]
#[test]
fn a_server_that_is_still_loading_ends_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (mut server, _pipe) = loading(folder.path());
    server.signal("TERM");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
}

#[test]
fn a_client_that_leaves_frees_its_place_and_disturbs_nobody() {
    let server = Server::ready(&["--max-num-seqs", "4"]);
    let request = greedy("Hey, I am", 100);
    let alone = server.post(COMPLETIONS, &request).text();

    let mut leaving = server.begin(COMPLETIONS, &endless(true));
    leaving.line("data:");
    let staying = server.begin(COMPLETIONS, &request);
    drop(leaving);
    eventually("a stream is aborted", || (finished(&server, "abort") == 1.0).then_some(()));
    assert_eq!(staying.answer().text(), alone);
    eventually("its place is free", || (running(&server) == 0.0).then_some(()));

    let leaving = server.begin(COMPLETIONS, &endless(false));
    eventually("it runs", || (running(&server) == 1.0).then_some(()));
    drop(leaving);
    eventually("a plain request is aborted", || (finished(&server, "abort") == 2.0).then_some(()));
    eventually("its place is free", || (running(&server) == 0.0).then_some(()));
    assert_eq!(finished(&server, "length"), 2.0);
    // Their places became free because they left, not because they had all that they asked for.
    assert!(server.metric("vllm:generation_tokens_total", "") < 8000.0);
}

#[test]
fn three_at_once_say_what_each_says_alone() {
    let server = Server::ready(&["--max-num-seqs", "3"]);
    let requests = ["Hi! My name is", "What is 17 + 25?", "user"].map(|prompt| greedy(prompt, 60));
    let alone = requests.each_ref().map(|request| server.post(COMPLETIONS, request).text());
    let together = requests.each_ref().map(|request| server.begin(COMPLETIONS, request));
    assert_eq!(together.map(|open| open.answer().text()), alone);
}

/// As many streams as Annie's whole house would open at once, and some that nobody reads to the end.
#[test]
fn two_hundred_streams_at_once_each_say_what_they_say_alone() {
    let server = Server::ready(&[]);
    let prompts = ["Hi! My name is", "One, two,", "Search the web for", "What is 17 + 25?"];
    let alone = prompts.map(|prompt| server.post(COMPLETIONS, &greedy(prompt, 12)).text());
    let open: Vec<_> = (0..200)
        .map(|number| {
            let body = with(greedy(prompts[number % prompts.len()], 12), "stream", json!(true));
            server.begin(COMPLETIONS, &with(body, "cache_salt", json!(format!("{}", number % 7))))
        })
        .collect();
    for (number, stream) in open.into_iter().enumerate() {
        if number % 10 == 9 {
            continue; // It is dropped unread.
        }
        let text = stream.rest();
        let frames = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let frames: Vec<Value> = frames.filter_map(|frame| serde_json::from_str(frame).ok()).collect();
        let said: String = frames.iter().filter_map(|f| f["choices"][0]["text"].as_str()).collect();
        assert_eq!(said, alone[number % prompts.len()], "stream {number}");
        assert!(text.contains("data: [DONE]"), "stream {number}: {text}");
    }
    eventually("everything is free", || (running(&server) == 0.0).then_some(()));
    assert_eq!(server.metric("vllm:num_requests_waiting", ""), 0.0);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc", ""), 0.0);
}

#[test]
fn what_is_asked_twice_comes_from_the_cache_and_is_the_same() {
    let server = Server::ready(&[]);
    let question = json!({"temperature": 0, "max_tokens": 24, "messages": [
        {"role": "system", "content": "You are a toy. ".repeat(30)},
        {"role": "user", "content": "What is 17 + 25?"},
    ]});
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_f64().unwrap();
    let (first, again) = (server.post(CHAT, &question).json(), server.post(CHAT, &question).json());
    assert_eq!(first["choices"][0]["message"], again["choices"][0]["message"]);
    let prompt = first["usage"]["prompt_tokens"].as_f64().unwrap();
    assert_eq!(cached(&first), 0.0);
    assert!(cached(&again) > 0.9 * prompt, "{} of {prompt}", cached(&again));
    let apart = server.post(CHAT, &with(question.clone(), "cache_salt", json!("mine"))).json();
    assert_eq!((cached(&apart), &apart["choices"][0]["message"]), (0.0, &first["choices"][0]["message"]));
    let many = with(with(question, "n", json!(3)), "temperature", json!(0.8));
    let many = server.post(CHAT, &with(many, "cache_salt", json!("several"))).json();
    assert_eq!(many["usage"]["prompt_tokens"].as_f64(), Some(prompt), "the prompt counts once");
    assert_eq!(cached(&many), 0.0, "the first of them read it");
    assert!(server.metric("vllm:prefix_cache_hits_total", "") > 2.9 * prompt * 0.9);
}

#[test]
fn a_stop_string_counts_as_stop_with_all_its_times() {
    let server = Server::ready(&[]);
    let request = greedy("Hi! My name is", 40);
    let text = server.post(COMPLETIONS, &request).text();
    let characters: Vec<char> = text.chars().collect();
    let stop: String = characters[characters.len() / 2..][..4].iter().collect();
    let stopped = server.post(COMPLETIONS, &with(request, "stop", json!([stop])));
    assert_eq!(stopped.json()["choices"][0]["stop_reason"], json!(stop));
    assert_eq!(finished(&server, "stop"), 1.0);
    for phase in ["queue", "prefill", "decode", "inference"] {
        let name = format!("vllm:request_{phase}_time_seconds");
        assert_eq!(server.metric(&format!("{name}_count"), ""), 2.0, "{name}");
        assert!(phase == "queue" || server.metric(&format!("{name}_sum"), "") > 0.0, "{name}");
    }
}

#[test]
fn a_bad_request_is_told_what_is_bad_and_harms_nobody() {
    let server = Server::ready(&["--max-model-len", "256"]);
    let check = |path: &str, body: &Value, status: u16, param: Value, words: &str| {
        let answer = server.post(path, body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["code"]), (status, &json!(status)), "{body}: {error}");
        assert_eq!(error["param"], param, "{body}: {error}");
        assert!(error["type"].is_string(), "{error}");
        let message = error["message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "{body}: {message:?} without {words:?}");
    };
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    let plain = greedy("Hi", 1);
    let tool = json!([{"type": "function", "function": {"name": "known"}}]);

    check(CHAT, &json!([]), 400, Value::Null, "object");
    check(CHAT, &json!({}), 400, json!("messages"), "messages");
    check(CHAT, &with(chat.clone(), "messages", json!("Hi")), 400, json!("messages"), "messages");
    check(CHAT, &with(chat.clone(), "max_tokens", json!("9")), 400, json!("max_tokens"), "max_tokens");
    check(CHAT, &with(chat.clone(), "stream", json!(1)), 400, json!("stream"), "stream");
    check(CHAT, &with(chat.clone(), "temperature", json!(-1)), 400, json!("temperature"), "-1");
    check(CHAT, &with(chat.clone(), "temperature", json!(2.5)), 400, json!("temperature"), "2.5");
    check(CHAT, &with(chat.clone(), "top_p", json!(0)), 400, json!("top_p"), "got 0");
    check(CHAT, &with(chat.clone(), "top_k", json!(-2)), 400, json!("top_k"), "-2");
    check(CHAT, &with(chat.clone(), "n", json!(0)), 400, json!("n"), "got 0");
    check(COMPLETIONS, &with(plain.clone(), "min_p", json!(1.5)), 400, json!("min_p"), "1.5");
    check(COMPLETIONS, &with(plain.clone(), "prompt", json!([4_000_000])), 400, json!("prompt"), "4000000");
    check(COMPLETIONS, &with(plain.clone(), "model", json!("nope")), 404, json!("model"), "`nope`");
    let long = json!("word ".repeat(2000));
    let words = "maximum context length is 256";
    check(COMPLETIONS, &with(plain.clone(), "prompt", long.clone()), 400, json!("input_tokens"), words);
    let long = json!([{"role": "user", "content": long}]);
    check(CHAT, &with(chat.clone(), "messages", long), 400, json!("input_tokens"), words);
    let choice = json!({"type": "function", "function": {"name": "unknown"}});
    let unknown = with(with(chat.clone(), "tools", tool), "tool_choice", choice);
    check(CHAT, &unknown, 400, json!("tool_choice"), "unknown");

    let answer = server.post_text(CHAT, "{\"messages\": [");
    assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (400, Some("BadRequestError")));
    assert_eq!(server.post_text(CHAT, "").status, 400);
    assert_eq!(server.get("/v1/nothing").status, 404);
    assert_eq!(server.get(CHAT).status, 405);

    assert_eq!(server.post(COMPLETIONS, &plain).status, 200);
    assert_eq!(server.post(CHAT, &chat).status, 200);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// A chat that ends soon, whatever the toy model says.
fn chat(extra: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "What is 17 + 25?"}], "thinking_token_budget": 20, "max_tokens": 400,
        "temperature": 1.0, "seed": 7,
    });
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

/// With the thought, without it, and with none to begin with.
fn thoughts() -> [Value; 3] {
    [json!({}), json!({"thinking_token_budget": 0}), json!({"reasoning_effort": "none"})]
}

/// The choice is what `a_schema_is_kept_with_and_without_a_thought` asks for, and nothing around it.
fn check_list(choice: &Value) {
    assert_eq!(choice["finish_reason"], json!("stop"), "{choice}");
    let content = choice["message"]["content"].as_str().unwrap_or_default();
    let value: Value = serde_json::from_str(content).unwrap_or_else(|error| panic!("{error}: {choice}"));
    assert_eq!(content.trim(), content);
    assert!([json!("sum"), json!("list")].contains(&value["kind"]), "{value}");
    for item in value["items"].as_array().expect("a list") {
        assert!(item["name"].as_str().is_some_and(|name| name.chars().count() <= 6), "{value}");
        assert!(item["count"].as_u64().is_some_and(|count| count <= 99), "{value}");
        assert_eq!(item.as_object().map(serde_json::Map::len), Some(2), "{value}");
    }
}

#[test]
fn a_schema_is_kept_with_and_without_a_thought() {
    let server = Server::ready(&[]);
    let schema = json!({
        "$defs": {"Item": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["name", "count"],
        }},
        "type": "object",
        "properties": {
            "kind": {"enum": ["sum", "list"]},
            "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "maxItems": 2},
        },
        "required": ["kind", "items"],
    });
    let format =
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
    for thought in thoughts() {
        for seed in 0..2 {
            let mut body = chat(format.clone());
            body["seed"] = json!(seed);
            body["n"] = json!(2);
            thought.as_object().into_iter().flatten().for_each(|(key, value)| body[key] = value.clone());
            let choices = server.post(CHAT, &body).json()["choices"].clone();
            assert_eq!(choices.as_array().map(Vec::len), Some(2), "{choices}");
            choices.as_array().into_iter().flatten().for_each(check_list);
        }
    }
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn a_call_that_must_be_made_is_made_with_and_without_a_thought() {
    let server = Server::ready(&[]);
    let function = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["unit", "days"],
        }}})
    };
    let tools = json!([function("weather"), function("forecast")]);
    let named = json!({"type": "function", "function": {"name": "forecast"}});
    for thought in thoughts() {
        for choice in [json!("required"), named.clone()] {
            let mut body = chat(json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false}));
            thought.as_object().into_iter().flatten().for_each(|(key, value)| body[key] = value.clone());
            let message = server.post(CHAT, &body).json()["choices"][0]["message"].clone();
            let call = &message["tool_calls"][0]["function"];
            let arguments: Value = call["arguments"]
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default();
            assert!(["celsius", "fahrenheit"].map(Value::from).contains(&arguments["unit"]), "{message}");
            assert!((1..=9).contains(&arguments["days"].as_u64().unwrap_or(0)), "{message}");
            assert!(choice == json!("required") || call["name"] == json!("forecast"), "{message}");
            assert!(message["content"].is_null(), "{message}");
            assert_eq!(message["tool_calls"].as_array().map(Vec::len), Some(1), "{message}");
        }
    }
}

#[test]
fn a_thought_costs_no_more_than_its_budget() {
    let server = Server::ready(&[]);
    for budget in [0, 1, 5] {
        let body = chat(json!({"thinking_token_budget": budget, "max_tokens": 40}));
        let usage = server.post(CHAT, &body).json()["usage"].clone();
        let thought = usage["completion_tokens_details"]["reasoning_tokens"].as_u64();
        assert!(thought.is_some_and(|count| count <= budget + 1), "{budget}: {usage}");
    }
}

#[test]
fn half_a_request_makes_nobody_wait() {
    let server = Server::ready(&["--max-num-seqs", "1"]);
    let body = greedy("Hi", 2).to_string();
    let (first, second) = body.split_at(body.len() / 2);
    let mut heads: Vec<Open> = (0..8).map(|_| Open::connect(&server.address)).collect();
    heads.iter_mut().for_each(|open| open.write("POST /v1/completions HTTP/1.1\r\nHost: x\r\nConte"));
    let mut slow = Open::connect(&server.address);
    slow.write(&format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Expect: 100-continue\r\nContent-Length: {}\r\n\r\n{first}",
        body.len()
    ));
    // Said when the handler begins to wait for the body.
    slow.line("HTTP/1.1 100");
    slow.line("\r\n");
    assert_eq!(server.post(COMPLETIONS, &greedy("Hi", 2)).status, 200);
    slow.write(second);
    assert_eq!(slow.answer().status, 200);
}

#[test]
fn a_flag_that_cannot_be_is_refused_before_anything_is_set_aside() {
    let check = |flag: &str, value: &str, words: &str| {
        let mut server = Server::started(&[flag, value], &[]);
        let (status, log) = (server.ended(), server.log());
        assert!(!status.success() && !log.contains("panicked"), "{flag} {value}: {log}");
        assert!(log.contains(flag) && log.contains(words), "{flag} {value}: {log}");
    };
    check("--max-num-batched-tokens", "18446744073709551615", "at most 1048576");
    check("--max-num-seqs", "1025", "1..=1024");
    check("--trace-file", "/nowhere/trace.json", "/nowhere/trace.json cannot be written");
    check("--max-num-queued-reqs", "0", "from 1 to 1000000");
    check("--max-model-len", "8193", "at most the model's 8192 tokens, got 8193");
    check("--kv-cache-tokens", "1000000000k", "--allow-overcommit");
    check("--cpu-offload-gb", "4", "weights are in the CPU's memory anyway");
    check("--load-format", "pt", "possible values: auto, dummy");
    check("--quantization", "nvfp4", "tiny is not stored as nvfp4");
    check("--uds", "/nowhere/door.sock", "cannot listen on /nowhere/door.sock");
    check("--ssl-certfile", "/nowhere/cert.pem", "/nowhere/cert.pem cannot be read");
    check("--api-key-file", "/nowhere/keys", "/nowhere/keys cannot be read");
    check("--generation-config", "/nowhere", "/nowhere/generation_config.json");
    check("--config", "/nowhere/serve.yaml", "/nowhere/serve.yaml cannot be read");
    check("--spec-depth", "9", "0..=8");
    check("--speculative-config", "eagle", "must be");
    check("--host", "256.0.0.1", "256.0.0.1");
    check("--chat-template", "/nowhere/template", "/nowhere/template");
    check("--models-dir", "/nowhere/models", "/nowhere/models cannot be read");
    check("--models-preset", "/nowhere/presets.toml", "/nowhere/presets.toml cannot be read");
    check("--models-max", "1025", "0 to 1024");
    check("--override-generation-config", r#"{"top_p": 2}"#, "top_p: expected above 0 and at most 1, got 2");
}

#[cfg(unix)]
#[test]
fn a_trace_is_whole_when_the_server_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let mut server = Server::ready(&["--trace-file", path.to_str().expect("UTF-8")]);
    assert_eq!(server.post(COMPLETIONS, &greedy("Hi! My name is", 3)).status, 200);
    server.signal("TERM");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let named = |name: &str| {
        let events = trace.as_array().expect("a list of events");
        events.iter().filter(|event| event["name"] == name && event["ph"] == "X").count()
    };
    // A prompt and two further tokens; drafts may save a step.
    assert!((2..=3).contains(&named("forward")), "{trace}");
    assert_eq!((named("plan"), named("prefill")), (named("forward"), 1), "{trace}");
}

#[test]
fn two_models_share_a_door_and_not_their_answers() {
    let alone = Server::ready(&["tiny-nvfp4"]).post(COMPLETIONS, &greedy("Hi! My name is", 20)).text();
    let server = Server::ready(&["tiny", "--model", "large=tiny-nvfp4"]);
    let large = with(greedy("Hi! My name is", 20), "model", json!("large"));
    let together = ["tiny", "large"]
        .map(|model| server.begin(COMPLETIONS, &with(greedy("Hi! My name is", 20), "model", json!(model))));
    let [_, behind] = together.map(|open| open.answer().text());
    assert_eq!((&behind, &server.post(COMPLETIONS, &large).text()), (&alone, &alone));
    assert_eq!(server.metric("vllm:generation_tokens_total", "engine=\"0\""), 20.0);
    assert_eq!(server.metric("vllm:generation_tokens_total", "engine=\"1\""), 40.0);
    let plan = server.log();
    assert!(plan.lines().any(|line| line.contains("tiny") && line.contains("together")), "{plan}");
}

/// `tiny` and `tiny-nvfp4` in folders of their own, as somebody would keep them.
fn models_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let own = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    for name in ["tiny", "tiny-nvfp4"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        // What the second has not of its own is the first's.
        for source in ["tiny", name] {
            for entry in std::fs::read_dir(own.join(source)).unwrap() {
                let path = entry.unwrap().path();
                let file = path.file_name().unwrap();
                if path
                    .extension()
                    .is_some_and(|end| ["json", "jinja", "safetensors"].iter().any(|e| end == *e))
                {
                    std::fs::copy(&path, folder.path().join(name).join(file)).unwrap();
                }
            }
        }
    }
    folder
}

fn status_of(server: &Server, model: &str) -> Value {
    let list = server.get("/models").json();
    let cards = list["data"].as_array().expect("a list");
    cards.iter().find(|card| card["id"] == json!(model)).unwrap_or_else(|| panic!("no {model} in {list}"))["status"]
        .clone()
}

fn until_status(server: &Server, model: &str, value: &str) {
    eventually(value, || (status_of(server, model)["value"] == json!(value)).then_some(()));
}

#[test]
fn models_of_a_folder_come_when_they_are_asked_for_and_make_room_for_each_other() {
    let folder = models_folder();
    let prompt = greedy("Hi! My name is", 20);
    let alone = Server::ready(&["tiny-nvfp4"]).post(COMPLETIONS, &prompt).text();
    let dir = folder.path().to_str().expect("UTF-8");
    let server = Server::ready(&["--models-dir", dir, "--models-max", "1"]);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(status_of(&server, "tiny")["value"], json!("unloaded"));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][1]["id"], json!("tiny-nvfp4"));
    assert_eq!(models["data"][1]["max_model_len"], json!(8192));

    let mut stream = server.begin(COMPLETIONS, &with(endless(true), "model", json!("tiny")));
    stream.line("data:");
    let other = with(prompt, "model", json!("tiny-nvfp4"));
    let waiting = server.begin(COMPLETIONS, &other);
    until_status(&server, "tiny-nvfp4", "loading");
    assert_eq!(status_of(&server, "tiny")["value"], json!("loaded"), "it is busy");
    stream.line("data:");
    drop(stream);
    assert_eq!(waiting.answer().text(), alone);
    assert_eq!(status_of(&server, "tiny")["value"], json!("unloaded"));
    assert_eq!(server.metric("vllm:generation_tokens_total", "engine=\"1\""), 20.0);

    assert_eq!(server.post("/models/unload", &json!({"model": "tiny-nvfp4"})).status, 200);
    until_status(&server, "tiny-nvfp4", "unloaded");
    assert_eq!(server.post("/models/load", &json!({"model": "tiny-nvfp4"})).status, 200);
    until_status(&server, "tiny-nvfp4", "loaded");
    assert_eq!(server.post(COMPLETIONS, &other).text(), alone);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn a_preset_that_does_not_fit_is_refused_in_the_words_of_the_plan_and_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("presets.toml");
    let text = "[\"*\"]\nmax-num-seqs = 2\n\n[huge]\nmodel = \"tiny\"\nkv-cache-tokens = \"1000000000k\"\n\
                [small]\nmodel = \"tiny\"\nalias = \"little\"\nctx-size = 256\nload-on-startup = true\n";
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().expect("UTF-8");
    let server = Server::ready(&["--model", "front=tiny-nvfp4", "--models-preset", path]);
    let asked = |model: &str| server.post(COMPLETIONS, &with(greedy("Hi", 2), "model", json!(model)));
    let refused = asked("huge");
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert!(refused.body.contains("the plan needs") && refused.body.contains("are free"), "{}", refused.body);
    let refused = server.post("/models/load", &json!({"model": "huge"}));
    assert!(refused.status == 400 && refused.body.contains("the plan needs"), "{}", refused.body);
    let simulated = server.post("/simulate", &json!({"model": "huge"})).json();
    assert_eq!(simulated["fits"], json!(false), "{simulated}");
    assert_eq!(server.post("/simulate", &json!({"model": "small"})).json()["fits"], json!(true));
    until_status(&server, "small", "loaded");
    assert_eq!(server.get("/v1/models/little").json()["max_model_len"], json!(256));
    assert_eq!((asked("little").status, asked("front").status), (200, 200));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_model_sleeps_wakes_and_forgets_what_it_is_told_to() {
    let server = Server::ready(&["--enable-sleep-mode"]);
    let question = json!({"temperature": 0, "max_tokens": 24, "messages": [
        {"role": "system", "content": "You are a toy. ".repeat(30)},
        {"role": "user", "content": "What is 17 + 25?"},
    ]});
    let ask = || {
        let answer = server.post(CHAT, &question).json();
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_f64();
        (answer["choices"][0]["message"].clone(), cached.unwrap() > 0.0)
    };
    let (first, _) = ask();
    assert_eq!(ask(), (first.clone(), true));
    assert_eq!(server.post_text("/reset_prefix_cache", "").json(), json!({"success": true}));
    assert_eq!(ask(), (first.clone(), false), "the cache is empty");
    for level in 0..3 {
        assert_eq!(server.post_text(&format!("/sleep?level={level}"), "").status, 200);
        assert_eq!(server.get("/is_sleeping").json(), json!({"is_sleeping": true}));
        assert_eq!(server.get("/health").status, 200);
        assert_eq!(server.post(CHAT, &question).status, 503);
        assert_eq!(server.post_text("/wake_up", "").status, 200);
        assert_eq!(ask(), (first.clone(), level == 0), "level {level}");
    }
}

#[test]
fn the_developers_variable_opens_what_the_flag_opens() {
    let server = Server::listening(&[], &[("VLLM_SERVER_DEV_MODE", "1")]);
    assert_eq!(server.get("/is_sleeping").json(), json!({"is_sleeping": false}));
    assert_eq!(Server::listening(&[], &[]).get("/is_sleeping").status, 404);
}

#[test]
fn a_dry_run_shows_the_plan_and_ends() {
    let mut server = Server::started(&["--dry-run", "--model", "a=tiny", "--model", "b=tiny-nvfp4"], &[]);
    assert!(server.ended().success(), "{}", server.log());
    assert!(server.log().contains("KV blocks") && server.log().contains("together"), "{}", server.log());
}

#[test]
fn a_stall_is_told() {
    // No step is so quick: whoever looks while one runs finds it late.
    let server = Server::ready(&["--health-stall-timeout", "0.00001"]);
    let mut stream = server.begin(COMPLETIONS, &endless(true));
    stream.line("data:");
    server.wait_for_log("The engine of tiny has finished no step for");
}

#[test]
fn a_port_in_use_is_named() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    let mut server = Server::started(&["--host", "127.0.0.1", "--port", &port], &[]);
    let (status, log) = (server.ended(), server.log());
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&format!("port {port} on 127.0.0.1 is in use")), "{log}");
}

#[cfg(unix)]
#[test]
fn asked_to_end_it_lets_streams_end_properly() {
    let mut server = Server::ready(&["--shutdown-timeout", "0.5"]);
    let mut cut = server.begin(COMPLETIONS, &endless(true));
    cut.line("data:");
    server.signal("TERM");
    server.wait_for_log("Shutting down");
    let refused = || TcpStream::connect(&server.address).is_err().then_some(());
    eventually("no more connections are taken", refused);
    let text = cut.rest();
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let [.., error, last] = &data[..] else { panic!("{text}") };
    assert!(error.contains("shutting down") && *last == "[DONE]", "{error}\n{last}");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
}

#[cfg(unix)]
#[test]
fn asked_to_end_it_finishes_what_it_can() {
    let mut server = Server::ready(&["--shutdown-timeout", "60"]);
    let mut stream = server.begin(COMPLETIONS, &with(greedy("Hi! My name is", 50), "stream", json!(true)));
    stream.line("data:");
    server.signal("INT");
    let text = stream.rest();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"), "{text}");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
}

#[cfg(unix)]
#[test]
fn asked_twice_it_ends_at_once() {
    let mut server = Server::ready(&["--shutdown-timeout", "600"]);
    let mut stream = server.begin(COMPLETIONS, &endless(true));
    stream.line("data:");
    server.signal("TERM");
    server.wait_for_log("Shutting down");
    server.signal("TERM");
    assert_eq!(server.ended().code(), Some(130), "{}", server.log());
}

#[test]
fn the_host_comes_from_the_flag_or_the_environment() {
    let check = |arguments: &[&str], variables: &[(&str, &str)], expected: &str| {
        let server = Server::listening(arguments, variables);
        let log = server.log();
        assert!(
            log.contains(&format!("Listening on http://{expected}:")),
            "{arguments:?} {variables:?}: {log}"
        );
    };
    check(&[], &[], "127.0.0.1");
    check(&[], &[("FERROTRON_HOST", "0.0.0.0")], "0.0.0.0");
    check(&[], &[("FERROTRON_HOST", "")], "127.0.0.1");
    check(&["--host", "127.0.0.1"], &[("FERROTRON_HOST", "0.0.0.0")], "127.0.0.1");
    check(&["--host", "0.0.0.0"], &[], "0.0.0.0");
    check(&[], &[("VLLM_API_KEY", "key")], "0.0.0.0");
    check(&[], &[("VLLM_API_KEY", "")], "127.0.0.1");
}

#[test]
fn a_key_of_the_environment_is_asked_for() {
    let server = Server::listening(&["--host", "127.0.0.1"], &[("VLLM_API_KEY", "the-key")]);
    server.wait_until_ready();
    let models = |header: &str| {
        Open::send(&server.address, &format!("GET /v1/models HTTP/1.1\r\n{header}"), "").answer().status
    };
    assert_eq!(models(""), 401);
    assert_eq!(models("Authorization: Bearer another\r\n"), 401);
    assert_eq!(models("Authorization: Bearer the-key\r\n"), 200);
    assert_eq!(server.get("/health").status, 200);
    assert!(!server.log().contains("the-key"), "{}", server.log());
}

/// One of the certificates and keys that `tests/support/tls/make.sh` makes.
fn tls_file(name: &str) -> String {
    format!("{}/tests/support/tls/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Asks for `path` over TLS, shows the client's certificate if told; the whole answer. Errors: no agreement.
fn over_tls(address: &str, path: &str, with_certificate: bool) -> std::io::Result<String> {
    use tokio_rustls::rustls::crypto::ring;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};

    let certificate = |name: &str| CertificateDer::from_pem_file(tls_file(name)).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(certificate("authority.pem")).expect("an authority");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring speaks them")
        .with_root_certificates(roots);
    let config = if with_certificate {
        let key = PrivateKeyDer::from_pem_file(tls_file("client.key")).expect("a key");
        config.with_client_auth_cert(vec![certificate("client.pem")], key).expect("they belong together")
    } else {
        config.with_no_client_auth()
    };
    let name = ServerName::try_from("localhost").expect("a name");
    let mut connection = ClientConnection::new(Arc::new(config), name).expect("a valid configuration");
    let mut socket = TcpStream::connect(address)?;
    let mut stream = Stream::new(&mut connection, &mut socket);
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn certificates_make_it_speak_https_and_nothing_else() {
    let (certificate, key) = (tls_file("server.pem"), tls_file("server.key"));
    let server = Server::listening(&["--ssl-certfile", &certificate, "--ssl-keyfile", &key], &[]);
    assert!(server.log().contains("Listening on https://127.0.0.1:"), "{}", server.log());
    server.wait_until_ready();
    let answer = over_tls(&server.address, "/v1/models", false).expect("they agree");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"tiny\""), "{answer}");
    let plain = server.get("/health");
    assert_eq!(plain.status, 400);
    assert!(plain.body.contains("https://"), "{}", plain.body);
}

#[test]
fn clients_can_be_asked_for_certificates() {
    let files = ["server.pem", "server.key", "authority.pem"].map(tls_file);
    let flags = ["--ssl-certfile", &files[0], "--ssl-keyfile", &files[1], "--ssl-ca-certs", &files[2]];
    let server = Server::listening(&flags, &[]);
    assert!(over_tls(&server.address, "/version", false).is_err());
    let answer = over_tls(&server.address, "/version", true).expect("they agree");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[cfg(unix)]
#[test]
fn a_socket_file_is_listened_on_and_taken_away() {
    use std::os::unix::net::UnixStream;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("door.sock");
    let path_text = path.to_str().expect("UTF-8");
    let flags = ["--uds", path_text];
    let mut server = Server::listening(&flags, &[]);
    assert_eq!(server.address, format!("unix:{path_text}"));
    let health = || {
        let mut stream = UnixStream::connect(&path)?;
        stream.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    assert!(health().is_ok_and(|answer: String| answer.starts_with("HTTP/1.1 200")));
    let mut second = Server::started(&flags, &[]);
    assert_eq!(second.ended().code(), Some(1));
    assert!(second.log().contains("is in use"), "{}", second.log());
    assert!(health().is_ok(), "who was refused took nothing away");
    server.signal("TERM");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
    assert!(!path.exists());

    // One that was killed leaves its file, which is no obstacle; what is no socket is not ours to take away.
    drop(Server::listening(&flags, &[]));
    assert!(path.exists());
    drop(Server::listening(&flags, &[]));
    let file = folder.path().join("a file");
    std::fs::write(&file, "mine").unwrap();
    let mut refused = Server::started(&["--uds", file.to_str().expect("UTF-8")], &[]);
    assert_eq!(refused.ended().code(), Some(1));
    assert_eq!(std::fs::read_to_string(file).unwrap(), "mine");
}

#[test]
fn a_file_of_flags_stands_below_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serve.yaml");
    let path_text = path.to_str().expect("UTF-8");
    let text = "model: tiny\nserved-model-name: [from-file]\nmax_model_len: 2k\nmax-num-seqs: 2\nenforce-eager: true\n";
    std::fs::write(&path, text).unwrap();
    let server = Server::ready(&["--config", path_text, "--max-model-len", "1k"]);
    let model = server.get("/v1/models").json()["data"][0].clone();
    assert_eq!((&model["id"], &model["max_model_len"]), (&json!("from-file"), &json!(1000)));
    assert!(server.log().contains("--enforce-eager is ignored: there are no graphs"), "{}", server.log());

    std::fs::write(&path, "model: tiny\nmax-model-length: 2k\n").unwrap();
    let mut refused = Server::started(&["--config", path_text], &[]);
    assert_eq!(refused.ended().code(), Some(2));
    let log = refused.log();
    assert!(
        log.contains("serve.yaml, line 2: unknown key `max-model-length`; `max-model-len` is like it"),
        "{log}"
    );
}

/// The line that Annie's seeds start vLLM with, and what else such scripts hold.
#[test]
fn a_line_written_for_vllm_starts_and_says_what_it_does_not_need() {
    let server = Server::listening(
        &[
            "tiny",
            "--served-model-name",
            "model",
            "--trust-remote-code",
            "--gpu-memory-utilization",
            "0.9",
            "--kv-cache-dtype",
            "fp8",
            "--max-num-seqs",
            "8",
            "-tp",
            "1",
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "qwen3_coder",
            "--reasoning-parser",
            "nano_v3",
            "--reasoning-parser-plugin",
            "/nowhere/nano_v3_reasoning_parser.py",
            "--load-format",
            "fastsafetensors",
            "--async-scheduling",
            "--no-enable-chunked-prefill",
            "--speculative-config.method",
            "mtp",
            "--logprobs-mode",
            "raw_logprobs",
        ],
        &[("VLLM_USE_FLASHINFER_MOE_FP4", "1"), ("VLLM_SOMETHING", "x")],
    );
    server.wait_until_ready();
    let log = server.log();
    for words in [
        "--trust-remote-code is ignored: no code of a checkpoint is ever run",
        "--reasoning-parser-plugin is ignored: no plug-in is loaded",
        "--async-scheduling is ignored: ",
        "--no-enable-chunked-prefill is ignored: ",
        "--tool-call-parser qwen3_coder is the parser that is built in",
        "--gpu-memory-utilization 0.9 is a share of the memory that is free now",
        "VLLM_USE_FLASHINFER_MOE_FP4 is ignored: ",
        "VLLM_SOMETHING is ignored: ",
    ] {
        assert_eq!(log.matches(words).count(), 1, "{words}: {log}");
    }
    assert_eq!(server.post(CHAT, &chat(json!({"model": "model", "max_tokens": 2}))).status, 200);
}

#[test]
fn dummy_weights_serve_and_say_what_they_are() {
    let server = Server::ready(&["tiny", "--load-format", "dummy", "--quantization", "nvfp4"]);
    assert!(server.log().contains("--load-format dummy: the weights are random"), "{}", server.log());
    let real = Server::ready(&["tiny"]).post(COMPLETIONS, &greedy("Hi! My name is", 8)).text();
    assert_ne!(server.post(COMPLETIONS, &greedy("Hi! My name is", 8)).text(), real);
}

#[test]
fn a_dry_run_shows_the_plan_and_starts_nothing() {
    let mut server = Server::started(&["tiny", "--dry-run"], &[]);
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
    let log = server.log();
    assert!(log.contains("total") && !log.contains("Listening"), "{log}");
}

#[test]
fn keys_come_from_a_file_too_and_an_empty_one_opens_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let path_text = path.to_str().expect("UTF-8");
    std::fs::write(&path, "# of the house\n\n  from-file  \n").unwrap();
    let flags = ["--host", "127.0.0.1", "--api-key", "typed", "also-typed", "--api-key-file", path_text];
    let server = Server::listening(&flags, &[]);
    server.wait_until_ready();
    let models = |key: &str| {
        let head = format!("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {key}\r\n");
        Open::send(&server.address, &head, "").answer().status
    };
    assert_eq!(
        ["typed", "also-typed", "from-file", "# of the house", ""].map(models),
        [200, 200, 200, 401, 401]
    );
    std::fs::write(&path, "# none\n").unwrap();
    let mut refused = Server::started(&["--api-key-file", path_text], &[]);
    assert_eq!(refused.ended().code(), Some(1));
    assert!(refused.log().contains("holds no key"), "{}", refused.log());
}

#[test]
fn paths_nobody_wants_to_read_about_are_not_logged() {
    let server = Server::ready(&["--disable-access-log-for-endpoints", "/v1/models,/nothing"]);
    assert_eq!(server.get("/v1/models").status, 200);
    assert_eq!(server.get("/v1/models/tiny").status, 200);
    server.wait_for_log("GET /v1/models/tiny 200");
    assert!(!server.log().contains("GET /v1/models 200"), "{}", server.log());
}

#[test]
fn more_tools_than_openai_takes_are_no_fault() {
    let server = Server::ready(&[]);
    let tool = |index: usize| json!({"type": "function", "function": {"name": format!("f{index}")}});
    let tools: Value = (0..129).map(tool).collect();
    let answer = server.post(CHAT, &chat(json!({"tools": tools, "max_tokens": 2})));
    assert_eq!(answer.status, 200, "{}", answer.body);
}
