//! `ferrotron serve` as its users meet it: a process, its signals, its sockets, and clients that behave badly.

#[path = "support/server.rs"]
mod server;

use serde_json::{Value, json};
use server::{Open, Server, eventually};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

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
    check("--spec-depth", "9", "0..=8");
    check("--speculative-config", "eagle", "must be");
    check("--host", "256.0.0.1", "256.0.0.1");
    check("--chat-template", "/nowhere/template", "/nowhere/template");
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
