//! Ollama's routes: chats and completions in lines or at once, lists of models, and what is refused.

use super::world::{self, CALL, CHAT, CONTEXT, Server, VOCAB, names, post, read, text, weather};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use ferrotron::api::{App, Options};
use ferrotron::backend::StepInputs;
use ferrotron::model::{Limits, Network, StepError};
use serde_json::{Map, Value, json};
use std::time::Duration;

const OLLAMA_CHAT: &str = "/api/chat";
const GENERATE: &str = "/api/generate";
const ANSWER: &str = "Easy.\n</think>\nForty-two.";

/// A request that is greedy, and `extra`.
fn asked(path: &str, extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "options": {"temperature": 0}});
    body[if path == GENERATE { "prompt" } else { "messages" }] =
        if path == GENERATE { json!("hi") } else { json!([{"role": "user", "content": "hi"}]) };
    merge(&mut body, extra);
    body
}

fn merge(into: &mut Value, extra: Value) {
    match (into, extra) {
        (Value::Object(into), Value::Object(extra)) => {
            for (key, value) in extra {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, extra) => *into = extra,
    }
}

/// The one object that answers `extra`.
async fn whole(server: &Server, path: &str, extra: Value) -> Value {
    let mut body = asked(path, extra);
    body["stream"] = json!(false);
    let response = server.call(post(path, body.to_string())).await;
    let media = response.headers()[header::CONTENT_TYPE].clone();
    let (status, text) = read(response).await;
    assert_eq!((status, media.as_bytes()), (StatusCode::OK, &b"application/json"[..]), "{body}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The lines that answer `extra`, which does not say `stream`.
async fn lines(server: &Server, path: &str, extra: Value) -> Vec<Value> {
    let response = server.call(post(path, asked(path, extra).to_string())).await;
    let media = response.headers()[header::CONTENT_TYPE].clone();
    let (status, text) = read(response).await;
    assert_eq!((status, media.as_bytes()), (StatusCode::OK, &b"application/x-ndjson"[..]), "{text}");
    assert!(text.ends_with('\n'), "{text}");
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

async fn refused(server: &Server, path: &str, extra: Value, status: u16, words: &str) {
    let (got, text) = server.post(path, &asked(path, extra.clone())).await;
    let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
    assert_eq!((got.as_u16(), error.as_object().map(Map::len)), (status, Some(1)), "{extra}: {text}");
    assert!(error["error"].as_str().is_some_and(|error| error.contains(words)), "{extra}: {text}");
}

/// Without what differs from run to run.
fn timeless(mut answer: Value) -> Value {
    if let Value::Object(map) = &mut answer {
        map.retain(|key, _| key != "created_at" && !key.ends_with("_duration"));
    }
    world::redact(answer)
}

/// The last line with all that the lines before it said.
fn folded(lines: &[Value]) -> Value {
    let (last, before) = lines.split_last().expect("a last line");
    let mut whole = last.clone();
    for line in before {
        assert_eq!(line["done"], json!(false), "{line}");
        gather(&mut whole, line);
    }
    // What the last line itself said stands behind what came before it.
    if let (Some(Value::Array(all)), Some(Value::Array(own))) =
        (whole.get_mut("logprobs"), last.get("logprobs"))
    {
        all.rotate_left(own.len());
    }
    whole
}

/// Texts and lists are joined, whatever they stand in.
fn gather(whole: &mut Value, line: &Value) {
    let Value::Object(fields) = line else { panic!("not an object: {line}") };
    for (key, value) in fields {
        match (key.as_str(), value) {
            ("message", value) => gather(&mut whole["message"], value),
            ("content" | "response" | "thinking", Value::String(text)) => {
                let before = whole[key].as_str().unwrap_or_default().to_owned();
                whole[key] = json!(before + text);
            }
            ("tool_calls" | "logprobs", Value::Array(items)) => {
                let mut all = whole[key].as_array().cloned().unwrap_or_default();
                all.extend(items.iter().cloned());
                whole[key] = json!(all);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_server_says_what_it_is_to_get_and_head() {
    let server = Server::answering("").await;
    assert_eq!(server.get("/").await, (StatusCode::OK, "Ollama is running".to_owned()));
    assert_eq!(server.get("/api/version").await, (StatusCode::OK, "{\"version\":\"0.13.0\"}".to_owned()));
    for path in ["/", "/api/version", "/api/tags"] {
        let request = Request::head(path).body(Body::empty()).expect("a request");
        let (status, body) = read(server.call(request).await).await;
        assert_eq!((status, body.as_str()), (StatusCode::OK, ""), "{path}");
    }
}

#[tokio::test]
async fn a_chat_comes_in_lines_unless_it_says_otherwise() {
    let server = Server::answering(ANSWER).await;
    let lines = lines(&server, OLLAMA_CHAT, json!({})).await;
    let (last, before) = lines.split_last().expect("lines");
    let (mut thinking, mut content) = (String::new(), String::new());
    for line in before {
        assert_eq!((&line["model"], &line["done"]), (&json!("tiny"), &json!(false)), "{line}");
        assert_eq!(line["message"]["role"], "assistant", "{line}");
        thinking += line["message"]["thinking"].as_str().unwrap_or_default();
        content += line["message"]["content"].as_str().expect("always a text");
    }
    assert_eq!((thinking.as_str(), content.as_str()), ("Easy.", "Forty-two."));
    assert_eq!(last["message"], json!({"role": "assistant", "content": ""}));
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("stop")));
}

#[tokio::test]
async fn a_plain_chat_is_the_last_line_with_the_whole_message() {
    let server = Server::answering(ANSWER).await;
    let answer = whole(&server, OLLAMA_CHAT, json!({})).await;
    let message = json!({"role": "assistant", "content": "Forty-two.", "thinking": "Easy."});
    assert_eq!(answer["message"], message);
    let keys: Vec<&str> = answer.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    let expected = "model created_at message done done_reason total_duration load_duration prompt_eval_count \
                    prompt_eval_duration eval_count eval_duration";
    assert_eq!(keys.join(" "), expected);
}

#[tokio::test]
async fn times_are_nanoseconds_and_no_count_is_divided_by_zero() {
    let server = Server::answering("</think>yes").await;
    for path in [OLLAMA_CHAT, GENERATE] {
        let answer = whole(&server, path, json!({"options": {"num_predict": 1}})).await;
        let number = |name: &str| answer[name].as_u64().unwrap_or_else(|| panic!("{name} of {answer}"));
        assert!(number("prompt_eval_count") > 0 && number("prompt_eval_duration") > 0, "{answer}");
        assert!(number("eval_count") == 1 && number("eval_duration") > 0, "{answer}");
        let parts = number("load_duration") + number("prompt_eval_duration");
        assert!(number("total_duration") + 1 >= parts, "{answer}");
        let moment = answer["created_at"].as_str().unwrap_or_default();
        assert!(moment.parse::<jiff::Timestamp>().is_ok(), "{answer}");
        assert!(moment.ends_with('Z') && moment.contains('.'), "{answer}");
    }
}

#[tokio::test]
async fn lines_and_one_object_say_the_same() {
    for script in
        [ANSWER, CALL, "</think>Grüße 🦀 one two three", "I wonder and wonder", "", "x </think> y <think> z"]
    {
        let server = Server::answering(script).await;
        for extra in [
            json!({}),
            json!({"think": false}),
            json!({"think": "low"}),
            json!({"options": {"num_predict": 3}}),
            json!({"options": {"stop": ["two", "nd"]}}),
            json!({"format": {"enum": ["yes", "no"]}}),
            json!({"logprobs": true, "top_logprobs": 2, "options": {"repeat_penalty": 1.1, "seed": 7, "top_k": 1}}),
        ] {
            for (path, more) in [
                (OLLAMA_CHAT, json!({})),
                (OLLAMA_CHAT, json!({"tools": weather()})),
                (GENERATE, json!({})),
                (GENERATE, json!({"raw": true})),
            ] {
                let mut extra = extra.clone();
                merge(&mut extra, more);
                let streamed = folded(&lines(&server, path, extra.clone()).await);
                let plain = whole(&server, path, extra.clone()).await;
                assert_eq!(timeless(streamed), timeless(plain), "{path} {script:?} {extra}");
            }
        }
    }
}

#[tokio::test]
async fn the_same_chat_has_the_same_answer_in_both_dialects() {
    let server = Server::answering(CALL).await;
    let (_, theirs) = server.json(CHAT, world::chat(json!({"tools": weather()}))).await;
    let ours = whole(&server, OLLAMA_CHAT, json!({"tools": weather()})).await;
    assert_eq!(ours["prompt_eval_count"], theirs["usage"]["prompt_tokens"]);
    assert_eq!(ours["eval_count"], theirs["usage"]["completion_tokens"]);
    assert_eq!(ours["message"]["thinking"], theirs["choices"][0]["message"]["reasoning"]);
}

#[tokio::test]
async fn a_call_is_one_line_with_an_object() {
    let server = Server::answering(&CALL.repeat(2)).await;
    let lines = lines(&server, OLLAMA_CHAT, json!({"tools": weather()})).await;
    let calls: Vec<&Value> =
        lines.iter().filter(|line| line["message"].get("tool_calls").is_some()).collect();
    assert_eq!(calls.len(), 2);
    for (index, line) in calls.into_iter().enumerate() {
        let function = json!({"index": index, "name": "weather", "arguments": {"city": "Bonn", "days": 2}});
        assert_eq!(line["message"]["content"], "");
        let call = &line["message"]["tool_calls"][0];
        assert_eq!((&call["function"], line["done"].as_bool()), (&function, Some(false)));
        assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    }
    assert_eq!(lines.last().map(|line| &line["done_reason"]), Some(&json!("stop")));
    let untyped = json!([{"function": weather()[0]["function"]}]);
    let answer = whole(&server, OLLAMA_CHAT, json!({"tools": untyped})).await;
    assert_eq!(answer["message"]["tool_calls"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_history_with_thoughts_calls_and_results_is_read() {
    let server = Server::answering("</think>yes").await;
    let history = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "thinking": "Look it up.", "tool_calls": [
            {"function": {"index": 0, "name": "weather", "arguments": {"city": "Bonn"}}},
        ]},
        {"role": "tool", "tool_name": "weather", "content": "rain", "images": []},
    ]);
    let ours = whole(&server, OLLAMA_CHAT, json!({"messages": history, "tools": weather()})).await;
    let mut same = history;
    same[2]["reasoning"] = same[2]["thinking"].take();
    let (_, theirs) = server.json(CHAT, world::chat(json!({"messages": same, "tools": weather()}))).await;
    assert_eq!(ours["message"]["content"], "yes");
    assert_eq!(ours["prompt_eval_count"], theirs["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn think_is_a_switch_or_a_level() {
    let server = Server::answering("Forty-two.").await;
    let off = whole(&server, OLLAMA_CHAT, json!({"think": false})).await;
    assert_eq!(off["message"], json!({"role": "assistant", "content": "Forty-two."}));
    let off = whole(&server, GENERATE, json!({"think": false})).await;
    assert_eq!((&off["response"], off.get("thinking")), (&json!("Forty-two."), None));
    let (_, low) = server.json(CHAT, world::chat(json!({"reasoning_effort": "low"}))).await;
    let (_, high) = server.json(CHAT, world::chat(json!({"reasoning_effort": "high"}))).await;
    assert_ne!(low["usage"]["prompt_tokens"], high["usage"]["prompt_tokens"]);
    for (level, same) in [
        (Value::Null, &high),
        (json!(true), &high),
        (json!("medium"), &high),
        (json!("high"), &high),
        (json!("max"), &high),
        (json!("low"), &low),
    ] {
        let answer = whole(&server, OLLAMA_CHAT, json!({"think": level})).await;
        assert_eq!(answer["message"]["thinking"], "Forty-two.", "{level}");
        assert_eq!(answer["prompt_eval_count"], same["usage"]["prompt_tokens"], "{level}");
    }
    for level in [json!("loud"), json!(1), json!("true"), json!([])] {
        refused(&server, OLLAMA_CHAT, json!({"think": level}), 400, "`think` must be").await;
    }
}

#[tokio::test]
async fn lengths_below_one_are_the_rest_of_the_context_and_long_ones_are_cut() {
    let server = Server::answering(&"word ".repeat(2 * CONTEXT)).await;
    let ended = async |path: &str, most: Value| {
        let raw = json!({"raw": path == GENERATE, "options": {"num_predict": most}});
        let answer = whole(&server, path, raw).await;
        let count = |name: &str| answer[name].as_u64().unwrap_or_default() as usize;
        assert_eq!(answer["done_reason"], "length", "{answer}");
        (count("prompt_eval_count"), count("eval_count"))
    };
    for path in [OLLAMA_CHAT, GENERATE] {
        assert_eq!(ended(path, json!(5)).await.1, 5);
        for most in [Value::Null, json!(-1), json!(-2), json!(0), json!(1_000_000_000)] {
            let (prompt, answer) = ended(path, most).await;
            assert_eq!(prompt + answer, CONTEXT, "{path}");
        }
    }
}

#[tokio::test]
async fn options_are_read_and_named_as_the_client_wrote_them() {
    let server = Server::answering("</think>one two three four").await;
    let answer = whole(&server, OLLAMA_CHAT, json!({"options": {"stop": [" three"]}})).await;
    assert_eq!((&answer["message"]["content"], &answer["done_reason"]), (&json!("one two"), &json!("stop")));
    let others = json!({"options": {
        "num_ctx": 8192, "num_keep": 4, "num_batch": 512, "num_gpu": 99, "main_gpu": 0, "num_thread": 8,
        "use_mmap": true, "numa": false, "mirostat": 2, "mirostat_tau": 5.0, "tfs_z": 1.0, "typical_p": 0.7,
        "top_k": 40, "top_p": 0.9, "min_p": 0.05, "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": -1,
        "nobody_knows": {},
    }});
    whole(&server, OLLAMA_CHAT, others).await;
    for (name, value) in [
        ("temperature", json!("hot")),
        ("temperature", json!(3)),
        ("top_k", json!(-2)),
        ("top_p", json!(2)),
        ("min_p", json!(2)),
        ("seed", json!(0.5)),
        ("stop", json!([1])),
        ("repeat_penalty", json!(0)),
        ("repeat_last_n", json!("x")),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("num_predict", json!("x")),
    ] {
        let words = format!("`options.{name}` must");
        refused(&server, OLLAMA_CHAT, json!({"options": {name: value}}), 400, &words).await;
    }
    refused(&server, OLLAMA_CHAT, json!({"options": []}), 400, "`options` must be an object").await;
}

#[tokio::test]
async fn a_format_holds_the_answer_and_not_the_thought() {
    let server = Server::answering("Hm.\n</think>\nPerhaps {\"a\": 1}").await;
    let answer = whole(&server, OLLAMA_CHAT, json!({"format": {"enum": ["yes"]}})).await;
    assert_eq!(
        (&answer["message"]["content"], &answer["message"]["thinking"]),
        (&json!("\"yes\""), &json!("Hm."))
    );
    for path in [OLLAMA_CHAT, GENERATE] {
        let object = json!({"think": false, "format": "json", "options": {"num_predict": 1}});
        let answer = whole(&server, path, object).await;
        let said = answer["message"]["content"].as_str().or(answer["response"].as_str()).unwrap_or_default();
        assert!(said.starts_with('{'), "{answer}");
    }
    let free = whole(&server, OLLAMA_CHAT, json!({"format": ""})).await;
    assert_eq!(free["message"]["content"], "Perhaps {\"a\": 1}");
    for format in [json!("xml"), json!(true), json!([])] {
        refused(&server, OLLAMA_CHAT, json!({"format": format}), 400, "`format` must be").await;
    }
    refused(&server, OLLAMA_CHAT, json!({"format": {"type": "nonsense"}}), 400, "`format`").await;
}

#[tokio::test]
async fn who_asks_for_nothing_is_told_that_the_model_is_there() {
    let server = Server::answering("never said").await;
    let check = async |path: &str, extra: Value, reason: &str| {
        for stream in [false, true] {
            let mut body = asked(path, extra.clone());
            body["stream"] = json!(stream);
            let (status, text) = server.post(path, &body).await;
            let answer: Value = serde_json::from_str(&text).expect("one object");
            let mut expected = json!({"model": "tiny", "done": true, "done_reason": reason});
            match path {
                GENERATE => expected["response"] = json!(""),
                _ => expected["message"] = json!({"role": "assistant", "content": ""}),
            }
            assert_eq!((status, timeless(answer)), (StatusCode::OK, expected), "{body}");
        }
    };
    for (keep_alive, reason) in [
        (Value::Null, "load"),
        (json!("5m"), "load"),
        (json!("-1"), "load"),
        (json!(-1), "load"),
        (json!(300.5), "load"),
        (json!("1h30m"), "load"),
        (json!(0), "unload"),
        (json!(0.0), "unload"),
        (json!("0"), "unload"),
        (json!("0s"), "unload"),
    ] {
        check(OLLAMA_CHAT, json!({"messages": [], "keep_alive": keep_alive}), reason).await;
        check(OLLAMA_CHAT, json!({"messages": null, "keep_alive": keep_alive}), reason).await;
        check(GENERATE, json!({"prompt": "", "keep_alive": keep_alive}), reason).await;
        check(GENERATE, json!({"prompt": null, "keep_alive": keep_alive}), reason).await;
    }
    for wrong in [json!("soon"), json!(""), json!(true), json!("5 m")] {
        refused(&server, OLLAMA_CHAT, json!({"keep_alive": wrong}), 400, "`keep_alive` must be").await;
    }
}

#[tokio::test]
async fn a_completion_is_a_turn_of_the_template_unless_raw() {
    let server = Server::answering(ANSWER).await;
    let turn = whole(&server, GENERATE, json!({"system": "Be brief."})).await;
    assert_eq!((&turn["response"], &turn["thinking"]), (&json!("Forty-two."), &json!("Easy.")));
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]);
    let (_, chat) = server.json(CHAT, world::chat(json!({"messages": messages}))).await;
    assert_eq!(turn["prompt_eval_count"], chat["usage"]["prompt_tokens"]);
    let raw = whole(&server, GENERATE, json!({"raw": true})).await;
    assert_eq!((&raw["response"], raw.get("thinking")), (&json!(ANSWER), None));
    let (_, ids) = server.json("/tokenize", json!({"prompt": "hi"})).await;
    assert_eq!((&raw["prompt_eval_count"], raw.get("context")), (&ids["count"], None));
}

#[tokio::test]
async fn the_context_of_one_turn_stands_before_the_next() {
    let server = Server::answering(ANSWER).await;
    let first = whole(&server, GENERATE, json!({})).await;
    let context: Vec<u32> = serde_json::from_value(first["context"].clone()).expect("ids");
    let said = text().decode(&context, false);
    assert!(said.contains("hi<|im_end|>") && said.ends_with(&format!("{ANSWER}<|im_end|>")), "{said}");
    let next = whole(&server, GENERATE, json!({"context": context})).await;
    let counted = context.len() as u64 + first["prompt_eval_count"].as_u64().unwrap_or_default();
    assert_eq!(next["prompt_eval_count"], json!(counted));
    let outside = json!({"context": [VOCAB]});
    refused(&server, GENERATE, outside, 400, "outside the vocabulary").await;
    refused(&server, GENERATE, json!({"context": "x"}), 400, "`context` must be").await;
}

#[tokio::test]
async fn what_the_model_cannot_do_is_refused_by_name() {
    let server = Server::answering("x").await;
    let pictures = json!({"messages": [{"role": "user", "content": "What is it?", "images": ["aGk="]}]});
    refused(&server, OLLAMA_CHAT, pictures, 400, "`messages[0].images` cannot be read").await;
    refused(&server, GENERATE, json!({"images": ["aGk="]}), 400, "`images` cannot be read").await;
    refused(&server, GENERATE, json!({"suffix": "}"}), 400, "`suffix` is not supported").await;
    refused(&server, GENERATE, json!({"template": "{{ .Prompt }}"}), 400, "`template` is not supported")
        .await;
    for more in [json!({"system": "s"}), json!({"template": "t"}), json!({"context": [1]})] {
        let mut raw = json!({"raw": true});
        merge(&mut raw, more);
        refused(&server, GENERATE, raw, 400, "raw mode does not support").await;
    }
    whole(
        &server,
        GENERATE,
        json!({"suffix": "", "template": "", "system": "", "images": [], "context": []}),
    )
    .await;
    refused(&server, OLLAMA_CHAT, json!({"messages": "hi"}), 400, "`messages` must be an array").await;
    refused(&server, OLLAMA_CHAT, json!({"messages": [{"content": "hi"}]}), 400, "`messages[0].role`").await;
    refused(&server, OLLAMA_CHAT, json!({"messages": [{"role": "wizard", "content": "hi"}]}), 400, "wizard")
        .await;
    refused(&server, OLLAMA_CHAT, json!({"stream": "yes"}), 400, "`stream` must be").await;
    refused(&server, GENERATE, json!({"prompt": 7}), 400, "`prompt` must be a string").await;
    refused(&server, OLLAMA_CHAT, json!({"top_logprobs": 2}), 400, "`top_logprobs` needs").await;
    let long = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    refused(&server, OLLAMA_CHAT, json!({"messages": long}), 400, "maximum context length").await;
}

#[tokio::test]
async fn names_need_neither_tag_nor_case_and_come_back_as_written() {
    let server = Server::answering("</think>yes").await;
    for name in ["tiny", "tiny:latest", "TINY", "nvidia/tiny", "NVIDIA/Tiny:latest"] {
        for path in [OLLAMA_CHAT, GENERATE] {
            assert_eq!(whole(&server, path, json!({"model": name})).await["model"], name);
            let lines = lines(&server, path, json!({"model": name})).await;
            assert!(lines.iter().all(|line| line["model"] == name), "{lines:?}");
        }
        assert_eq!(server.post("/api/show", &json!({"model": name})).await.0, StatusCode::OK, "{name}");
    }
    for path in [OLLAMA_CHAT, GENERATE, "/api/show"] {
        for name in ["llama3", "tiny:7b"] {
            refused(&server, path, json!({"model": name}), 404, &format!("model '{name}' not found")).await;
        }
        refused(&server, path, json!({"model": null}), 400, "`model` is required").await;
        refused(&server, path, json!({"model": ""}), 400, "`model` is required").await;
        refused(&server, path, json!({"model": 7}), 400, "`model` must be a string").await;
    }
    // As it was called at first.
    assert_eq!(server.post("/api/show", &json!({"name": "tiny"})).await.0, StatusCode::OK);
}

#[tokio::test]
async fn models_introduce_themselves() {
    let server = Server::answering("x").await;
    let get = async |path: &str| -> Value { serde_json::from_str(&server.get(path).await.1).expect("JSON") };
    let (tags, running) = (get("/api/tags").await, get("/api/ps").await);
    let details = json!({
        "parent_model": "", "format": "safetensors", "family": "nemotron_h_moe", "families": ["nemotron_h_moe"],
        "parameter_size": "31.6B", "quantization_level": "NVFP4",
    });
    for (index, name) in ["nvidia/tiny:latest", "tiny:latest"].into_iter().enumerate() {
        let mut entry = tags["models"][index].clone();
        let digest = entry["digest"].take();
        assert!(
            digest.as_str().is_some_and(|it| it.len() == 64 && it.chars().all(|c| c.is_ascii_hexdigit()))
        );
        let mut expected = json!({
            "name": name, "model": name, "modified_at": "1970-01-01T00:00:01.000000Z", "size": 19_339_781_632_u64,
            "digest": null, "details": details,
        });
        assert_eq!(entry, expected);
        merge(
            &mut expected,
            json!({
                "digest": digest, "expires_at": "2200-01-01T00:00:00.000000Z", "size_vram": 0, "context_length": CONTEXT,
            }),
        );
        assert_eq!(running["models"][index], expected);
    }
    assert_eq!(tags["models"].as_array().map(Vec::len), Some(2));
    let (_, card) = server.json("/api/show", json!({"model": "tiny", "verbose": true})).await;
    assert_eq!(card["details"], details);
    assert_eq!(card["capabilities"], json!(["completion", "tools", "thinking"]));
    assert_eq!(
        card["model_info"],
        json!({
            "general.architecture": "nemotron_h_moe", "general.parameter_count": 31_577_940_288_u64,
            "nemotron_h_moe.block_count": 52, "nemotron_h_moe.context_length": CONTEXT,
            "nemotron_h_moe.embedding_length": 2688, "nemotron_h_moe.vocab_size": VOCAB,
        })
    );
    let parameters = "temperature 1\ntop_p 1\ntop_k 0\nmin_p 0\nrepeat_penalty 1";
    assert_eq!(card["parameters"], parameters);
    let modelfile = format!("FROM tiny\nPARAMETER {}\n", parameters.replace('\n', "\nPARAMETER "));
    assert_eq!(card["modelfile"], modelfile);
    assert_eq!(card["template"], include_str!("../../models/tiny/chat_template.jinja"));
}

#[tokio::test]
async fn only_what_has_loaded_runs_and_only_what_is_known_is_listed() {
    let (server, behind) = super::models::two().await;
    let names = async |path: &str| -> Vec<String> {
        let list: Value = serde_json::from_str(&server.get(path).await.1).expect("JSON");
        let models = list["models"].as_array().cloned().unwrap_or_default();
        models.iter().filter_map(|model| model["name"].as_str().map(str::to_owned)).collect()
    };
    assert_eq!(names("/api/ps").await, ["nvidia/tiny:latest", "tiny:latest"]);
    refused(&server, OLLAMA_CHAT, json!({"model": "large"}), 503, "Loading model").await;
    refused(&server, OLLAMA_CHAT, json!({"model": "large", "messages": []}), 503, "Loading model").await;
    server.app.set_resident(behind);
    assert_eq!(names("/api/ps").await, ["nvidia/tiny:latest", "tiny:latest", "large:latest"]);
    let empty = Server { app: App::new(Options::new(vec!["tiny".into()])) };
    let (status, text) = empty.get("/api/tags").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.starts_with("{\"error\":\"Loading model"), "{text}");
    assert_eq!(empty.get("/api/ps").await, (StatusCode::OK, "{\"models\":[]}".to_owned()));
}

#[tokio::test]
async fn a_body_need_not_say_that_it_is_json_unless_a_page_sends_it() {
    let server = Server::answering("</think>yes").await;
    let send = async |kind: Option<&str>, origin: Option<&str>| {
        let mut request = Request::post(OLLAMA_CHAT);
        for (name, value) in [(header::CONTENT_TYPE, kind), (header::ORIGIN, origin)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        let body = Body::from(asked(OLLAMA_CHAT, json!({})).to_string());
        server.call(request.body(body).expect("a request")).await.status()
    };
    let form = Some("application/x-www-form-urlencoded");
    assert_eq!(send(None, None).await, StatusCode::OK);
    assert_eq!(send(form, None).await, StatusCode::OK);
    assert_eq!(send(Some("application/json"), Some("http://localhost:3000")).await, StatusCode::OK);
    for kind in [None, form, Some("text/plain")] {
        assert_eq!(send(kind, Some("https://evil.example")).await, StatusCode::BAD_REQUEST, "{kind:?}");
    }
    for (body, words) in [("", "JSON decode error"), ("[1]", "object"), ("{\"model\": ", "JSON decode error")]
    {
        let (status, text) = read(server.call(post(OLLAMA_CHAT, body)).await).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(text.starts_with("{\"error\":\"") && text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn errors_that_no_handler_made_have_the_same_shape() {
    let mut options = Options::new(names());
    options.api_keys = vec!["secret".into()];
    options.body_limit = 1000;
    let server = Server::start("x", Duration::ZERO, options).await;
    let check = async |method: Method, path: &str, key: &str, body: &str, status: u16| {
        let request = Request::builder().method(method).uri(path).header("x-api-key", key);
        let response = server.call(request.body(Body::from(body.to_owned())).expect("a request")).await;
        let headers = response.headers().clone();
        let (got, text) = read(response).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        assert_eq!((got.as_u16(), error["error"].is_string()), (status, true), "{path}: {text}");
        assert_eq!(headers[header::CONTENT_TYPE], "application/json", "{path}");
        assert!(
            headers.get(header::CONTENT_LENGTH).is_none_or(|it| *it == *text.len().to_string()),
            "{path}"
        );
        assert_eq!(headers.contains_key(header::ALLOW), status == 405, "{path}");
        assert_eq!(headers.contains_key(header::WWW_AUTHENTICATE), status == 401, "{path}");
    };
    check(Method::GET, "/api/tags", "wrong", "", 401).await;
    check(Method::POST, OLLAMA_CHAT, "wrong", "{}", 401).await;
    check(Method::GET, "/api/nowhere", "secret", "", 404).await;
    check(Method::GET, OLLAMA_CHAT, "secret", "", 405).await;
    check(Method::POST, OLLAMA_CHAT, "secret", &"x".repeat(1001), 413).await;
    for path in ["/", "/api/version"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    // What stands beside the paths of this dialect keeps its own shape.
    let (_, text) = server.get("/v1/models").await;
    assert!(text.contains("AuthenticationError"), "{text}");
}

#[tokio::test]
async fn there_is_no_store_of_models() {
    let server = Server::answering("x").await;
    let check = async |method: Method, path: &str| {
        let request = Request::builder().method(method).uri(path).body(Body::from("{}")).expect("a request");
        let (status, text) = read(server.call(request).await).await;
        let expected = format!("{{\"error\":\"{path} is not implemented by this server.\"}}");
        assert_eq!((status, text), (StatusCode::NOT_IMPLEMENTED, expected));
    };
    for path in
        ["/api/embed", "/api/embeddings", "/api/push", "/api/create", "/api/copy", "/api/blobs/sha256:0"]
    {
        check(Method::POST, path).await;
    }
    check(Method::DELETE, "/api/delete").await;
    refused(&server, "/api/pull", json!({"model": "llama3"}), 501, "/api/pull is not implemented").await;
    let here = server.post("/api/pull", &json!({"model": "tiny:latest"})).await;
    assert_eq!(here, (StatusCode::OK, "{\"status\":\"success\"}\n".to_owned()));
    let here = server.post("/api/pull", &json!({"name": "tiny", "stream": false})).await;
    assert_eq!(here, (StatusCode::OK, "{\"status\":\"success\"}".to_owned()));
}

/// Says one thing for three steps and then no number.
struct Failing {
    steps: usize,
    limits: Limits,
    logits: Vec<f32>,
}

impl Network for Failing {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        self.steps += 1;
        let fill = if self.steps > 3 { f32::NAN } else { 0.0 };
        self.logits = vec![fill; inputs.logit_rows.len() * VOCAB];
        if self.steps <= 3 {
            self.logits.iter_mut().skip(300).step_by(VOCAB).for_each(|logit| *logit = 50.0);
        }
        Ok(&self.logits)
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_a_line_that_says_so() {
    for stream in [true, false] {
        let app = App::new(Options::new(names()));
        let network = Failing { steps: 0, limits: world::limits(), logits: Vec::new() };
        app.set_resident(world::around(0, names(), text(), network, world::forgetful()).await);
        let server = Server { app };
        let (status, text) =
            server.post(GENERATE, &asked(GENERATE, json!({"stream": stream, "raw": true}))).await;
        let last: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).expect("JSON");
        assert!(last["error"].as_str().is_some_and(|error| error.contains("not finite")), "{text}");
        assert_eq!(last.as_object().map(Map::len), Some(1));
        assert_eq!(status.as_u16(), if stream { 200 } else { 500 });
        assert_eq!(text.lines().count() > 1, stream, "{text}");
    }
}
