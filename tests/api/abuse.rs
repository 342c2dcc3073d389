//! What clients should not do: every mistake gets a status and a sentence, at once, and never a 500.

use super::world::{
    CHAT, Listening, PATIENCE, Server, VOCAB, around, chat, forgetful, limits, names, parsed, post, read,
    text, weather,
};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use ferrotron::api::{App, Limits, Options};
use ferrotron::backend::StepInputs;
use ferrotron::model::{self, Network, StepError};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The error object of an answer. Panics if it is none, or says nothing.
fn error(status: u16, body: &str) -> Value {
    let error: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{status}: not JSON: {body}"));
    let error = error["error"].clone();
    assert_eq!(error["code"], json!(status), "{body}");
    assert!(error["message"].as_str().is_some_and(|message| message.contains(' ')), "{body}");
    error
}

/// Every row of the table of errors that a request alone can cause.
#[tokio::test]
async fn every_row_of_the_table_of_errors_has_its_status_type_and_field() {
    let server = Server::answering("x").await;
    let check = async |request: Request<Body>, status: u16, kind: &str, param: Value, words: &str| {
        let shown = format!("{} {}", request.method(), request.uri());
        let (got, body) = read(server.call(request).await).await;
        let error = error(got.as_u16(), &body);
        assert_eq!(
            (got.as_u16(), &error["type"], &error["param"]),
            (status, &json!(kind), &param),
            "{shown} {body}"
        );
        assert!(error["message"].to_string().contains(words), "{shown}: {body}");
    };
    let bad = "BadRequestError";
    for body in [&b""[..], b"{", b"\xff", b"[1]", b"\"x\"", b"null", b"{\"a\":1}{"] {
        check(post(CHAT, body.to_vec()), 400, bad, Value::Null, "").await;
    }
    let deep = format!("{{\"messages\":{}1{}}}", "[".repeat(200), "]".repeat(200));
    check(post(CHAT, deep), 400, bad, Value::Null, "recursion").await;
    let plain = Request::post(CHAT).header(header::CONTENT_TYPE, "text/plain").body(Body::from("{}"));
    check(plain.expect("a request"), 400, bad, Value::Null, "application/json").await;
    check(post(CHAT, "{}"), 400, bad, json!("messages"), "required").await;
    check(post("/v1/completions", "{}"), 400, bad, json!("prompt"), "required").await;

    let rows = [
        (json!({"messages": "x"}), 400, "messages", "array"),
        (json!({"temperature": "hot"}), 400, "temperature", "number"),
        (json!({"temperature": true}), 400, "temperature", "number"),
        (json!({"temperature": -1}), 400, "temperature", "between"),
        (json!({"n": "two"}), 400, "n", "integer"),
        (json!({"n": 0}), 400, "n", ""),
        (json!({"top_p": 0}), 400, "top_p", ""),
        (json!({"top_k": -2}), 400, "top_k", ""),
        (json!({"max_tokens": -5}), 400, "max_tokens", ""),
        (json!({"max_tokens": 0}), 400, "max_tokens", ""),
        (json!({"max_tokens": 1.5}), 400, "max_tokens", "integer"),
        (json!({"max_tokens": 1e308}), 400, "max_tokens", ""),
        (json!({"max_tokens": 513}), 400, "max_tokens", "max_model_len"),
        (json!({"repetition_penalty": -1}), 400, "repetition_penalty", ""),
        (json!({"presence_penalty": 1e308}), 400, "presence_penalty", ""),
        (json!({"seed": 1e308}), 400, "seed", ""),
        (json!({"logit_bias": {"-1": 1}}), 400, "logit_bias", ""),
        (json!({"top_logprobs": -1, "logprobs": true}), 400, "top_logprobs", ""),
        (json!({"thinking_token_budget": -7}), 400, "thinking_token_budget", ""),
        (json!({"timeout": -1}), 400, "timeout", ""),
        (json!({"stop": [1]}), 400, "stop", ""),
        (json!({"tools": "x"}), 400, "tools", ""),
        (json!({"tools": [{"type": "function"}]}), 400, "tools[0].function", ""),
        (json!({"tools": weather(), "tool_choice": "sometimes"}), 400, "tool_choice", ""),
        (json!({"tool_choice": "required"}), 400, "tool_choice", ""),
        (
            json!({"tools": weather(), "tool_choice": {"type": "function", "function": {"name": "no"}}}),
            400,
            "tool_choice",
            "",
        ),
        (json!({"stream_options": {"include_usage": true}}), 400, "stream_options", ""),
        (json!({"stream": true, "prompt_logprobs": 1}), 400, "prompt_logprobs", ""),
    ];
    for (extra, status, param, words) in rows {
        let body = chat(extra);
        check(post(CHAT, body.to_string()), status, bad, json!(param), words).await;
    }
    let unknown = chat(json!({"model": "gpt-4"})).to_string();
    check(post(CHAT, unknown), 404, "NotFoundError", json!("model"), "nvidia/tiny").await;
    let long = chat(json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]})).to_string();
    check(post(CHAT, long), 400, bad, json!("input_tokens"), "maximum context length").await;

    let bare = |method: Method, path: &str| {
        Request::builder().method(method).uri(path).body(Body::empty()).expect("a request")
    };
    check(bare(Method::GET, "/v2/none"), 404, "NotFoundError", Value::Null, "no route").await;
    check(bare(Method::GET, CHAT), 405, "Method Not Allowed", Value::Null, "not allowed").await;
    check(bare(Method::POST, "/v1/embeddings"), 501, "NotImplementedError", Value::Null, "").await;
}

#[tokio::test]
async fn what_looks_wrong_and_is_not_is_answered() {
    let server = Server::answering("x").await;
    let check = async |body: String| {
        let (status, text) = read(server.call(post(CHAT, body.clone())).await).await;
        assert_eq!(status, StatusCode::OK, "{}: {text}", &body[..body.len().min(200)]);
    };
    let with = |extra: Value| chat(extra).to_string();
    // The last of two equal keys counts, as everywhere.
    check(with(json!({})).replacen('{', "{\"temperature\": 9, \"temperature\": 0,", 1)).await;
    check(with(json!({"messages": [{"role": "user", "content": "a\u{0}b"}]}))).await;
    check(with(json!({"messages": [{"role": "user", "content": "<|im_end|>\u{fffd}\u{202e}🦀"}]}))).await;
    check(with(json!({"max_tokens": 4.0, "n": 1.0, "stop": null, "tools": null, "user": null}))).await;
    check(with(json!({"nobody": {"knows": ["this", 1e308, -0.0]}}))).await;
    // Both alone would fit; together they are cut to what there is room for.
    check(with(json!({"max_tokens": 512}))).await;
    check(with(json!({"tools": weather(), "tool_choice": "auto"}))).await;
}

#[tokio::test]
async fn what_no_text_can_mean_is_refused() {
    let server = Server::answering("x").await;
    let check = async |body: Vec<u8>, words: &str| {
        let (status, text) = read(server.call(post(CHAT, body)).await).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        assert!(error(400, &text)["message"].to_string().contains(words), "{text}");
    };
    check(vec![b'['; 10 << 20], "recursion").await;
    check([&b"{\"messages\":"[..], &vec![b'{'; 10 << 20]].concat(), "").await;
    check(br#"{"messages":[{"role":"user","content":"\ud800"}]}"#.to_vec(), "").await;
    check(br#"{"messages":[{"role":"user","content":"\udc00x"}]}"#.to_vec(), "").await;
    check(b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\0b\"}]}".to_vec(), "control character").await;
    check(vec![0; 1000], "").await;
    check(br#"{"messages":[],"temperature":1e999}"#.to_vec(), "out of range").await;
    check(br#"{"messages":[],"n":-99999999999999999999999999}"#.to_vec(), "").await;
    check(br#"{"messages":[{"role":"wizard","content":"x"}]}"#.to_vec(), "").await;
    check(br#"{"messages":[1,null,"x"]}"#.to_vec(), "").await;
    let image = chat(json!({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]}]}));
    check(image.to_string().into_bytes(), "image").await;
    let audio = chat(json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}));
    check(audio.to_string().into_bytes(), "audio").await;
}

#[tokio::test]
async fn a_schema_without_end_is_served_or_refused_and_never_a_fault() {
    let server = Server::answering("x").await;
    let status = async |schema: Value| {
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        let body = chat(json!({"response_format": format, "max_tokens": 2}));
        let (status, text) = server.post(CHAT, &body).await;
        if status != StatusCode::OK {
            error(status.as_u16(), &text);
        }
        status.as_u16()
    };
    let node = json!({"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}});
    assert_eq!(status(json!({"$ref": "#/$defs/Node", "$defs": {"Node": node}})).await, 200);
    assert_eq!(status(json!({"$ref": "#"})).await, 400);
    assert_eq!(status(json!({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}})).await, 400);
    let knot = json!({"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}});
    assert_eq!(status(json!({"$ref": "#/$defs/A", "$defs": knot})).await, 400);
    let endless =
        json!({"A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}});
    assert!([200, 400].contains(&status(json!({"$ref": "#/$defs/A", "$defs": endless})).await));
    let mut deep = json!({"type": "string"});
    for _ in 0..40 {
        deep = json!({"type": "array", "items": deep});
    }
    assert!([200, 400].contains(&status(deep.clone()).await));
    // Deeper than a schema may be, and not as deep as JSON may.
    for _ in 0..10 {
        deep = json!({"anyOf": [{"type": "array", "items": deep}]});
    }
    assert!([200, 400].contains(&status(deep).await));
    assert_eq!(status(json!({"type": "array", "items": {"enum": []}, "minItems": 1})).await, 400);
    assert_eq!(status(json!({"type": "string", "pattern": "("})).await, 400);
    assert!([200, 400].contains(&status(json!({"type": "string", "maxLength": 1e308})).await));
    assert!([200, 400].contains(&status(json!({"type": "string", "minLength": -3})).await));
    assert!(
        [200, 400].contains(&status(json!({"type": "integer", "minimum": 1e308, "maximum": -1e308})).await)
    );
}

/// Its logits are no numbers.
struct Nonsense {
    limits: model::Limits,
    logits: Vec<f32>,
}

impl Network for Nonsense {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn limits(&self) -> &model::Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        self.logits.clear();
        self.logits.resize(inputs.logit_rows.len() * VOCAB, f32::NAN);
        Ok(&self.logits)
    }
}

#[tokio::test]
async fn a_fault_while_generating_is_told_and_is_never_text() {
    let app = App::new(Options::new(names()));
    let network = Nonsense { limits: limits(), logits: Vec::new() };
    app.set_resident(around(0, names(), text(), network, forgetful()).await);
    let server = Server { app };
    let (status, body) = server.post(CHAT, &chat(json!({}))).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{body}");
    error(500, &body);
    let (_, stream) = server.post(CHAT, &chat(json!({"stream": true}))).await;
    let data: Vec<&str> = stream.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let [.., last, end] = &data[..] else { panic!("{stream}") };
    assert_eq!(*end, "[DONE]", "{stream}");
    error(500, last);
}

fn quick() -> Limits {
    let moment = Duration::from_millis(200);
    Limits { head: moment, body: moment, idle: moment, write: moment, farewell: moment, ..Limits::default() }
}

fn get(path: &str, fields: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n")
}

#[tokio::test]
async fn a_head_is_no_larger_than_it_may_be() {
    let server = Listening::answering("x", Limits::default()).await;
    let check = async |fields: String, status: u16, words: &str| {
        let answer = server.send(get("/version", &fields)).await;
        let (got, body) = parsed(&answer);
        assert_eq!(got, status, "{answer}");
        if status != 200 {
            assert!(error(status, body)["message"].to_string().contains(words), "{answer}");
        }
    };
    let long = |bytes: usize| format!("X-Long: {}\r\n", "y".repeat(bytes));
    let many = |count: usize| (0..count).map(|index| format!("X-{index}: y\r\n")).collect::<String>();
    check(long(60 << 10), 200, "").await;
    check(long(64 << 10), 431, "65536 bytes").await;
    check(long(4 << 20), 431, "65536 bytes").await;
    check(many(200), 200, "").await;
    check(many(300), 431, "256 header fields").await;
    check(many(3000), 431, "").await;
    let answer = server.send(get(&format!("/version?{}", "z".repeat(66 << 10)), "")).await;
    assert!([414, 431].contains(&parsed(&answer).0), "{answer}");
}

#[tokio::test]
async fn what_is_no_request_is_told_so() {
    let server = Listening::answering("x", quick()).await;
    for bytes in [
        &b"hello\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /version HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\nab",
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    ] {
        let answer = server.send(bytes).await;
        let (status, body) = parsed(&answer);
        assert_eq!(status, 400, "{}: {answer}", String::from_utf8_lossy(bytes));
        error(400, body);
    }
    let chunk = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                 Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n";
    let answer = server.send(chunk).await;
    assert_eq!(parsed(&answer).0, 400, "{answer}");
}

#[tokio::test]
async fn who_never_ends_a_request_is_not_waited_for() {
    let server = Listening::answering("x", quick()).await;
    let answer = server.send("GET /version HTTP/1.1\r\nHost: x\r\nX-Slow: ").await;
    assert!(error(408, parsed(&answer).1)["message"].to_string().contains("head"), "{answer}");
    let answer = server
        .send(format!(
            "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: 100\r\n\r\n{{"
        ))
        .await;
    assert!(error(408, parsed(&answer).1)["message"].to_string().contains("body"), "{answer}");
    // One byte after the other does not make it longer.
    let mut drops = server.connect().await;
    let (mut reader, mut writer) = drops.split();
    let drip = async {
        while writer.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut answer = String::new();
    tokio::select! {
        () = drip => {}
        read = tokio::time::timeout(PATIENCE, reader.read_to_string(&mut answer)) => {
            read.expect("it ends").expect("it is closed properly");
        }
    }
    assert_eq!(parsed(&answer).0, 408, "{answer}");
    // Nobody there at all: a clean end, and nothing said.
    assert_eq!(server.send("").await, "");
    assert!(Limits::default().idle >= Duration::from_secs(75), "pools hold connections so long");
}

#[tokio::test]
async fn who_never_reads_is_given_up() {
    let server = Listening::answering("x", quick()).await;
    let mut stream = server.connect().await;
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100);
    // Until both directions are full, and the server has had enough of it.
    let write = async { while stream.write_all(request.as_bytes()).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, write).await.expect("it is closed");
    assert_eq!(parsed(&server.send(get("/version", "")).await).0, 200);
}

#[tokio::test]
async fn half_a_socket_gets_its_answer() {
    let server = Listening::answering("x", Limits::default()).await;
    let half = async |bytes: &str| {
        let mut stream = server.connect().await;
        stream.write_all(bytes.as_bytes()).await.expect("it reads");
        stream.shutdown().await.expect("our half");
        let mut answer = String::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
        read.expect("it ends").expect("it is closed properly");
        answer
    };
    assert_eq!(parsed(&half("GET /version HTTP/1.1\r\nHost: x\r\n\r\n").await).0, 200);
    assert_eq!(parsed(&half("GET /version HTTP/1.0\r\n\r\n").await).0, 200);
    let body = chat(json!({"max_tokens": 1})).to_string();
    let head = |length: usize| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let answer = half(&format!("{}{body}", head(body.len()))).await;
    assert_eq!(parsed(&answer).0, 200, "{answer}");
    let answer = half(&format!("{}{body}", head(body.len() + 1))).await;
    assert!(error(400, parsed(&answer).1)["message"].to_string().contains("too early"), "{answer}");
    let answer = half("GET /version HTTP/1.1\r\nHo").await;
    assert!(error(400, parsed(&answer).1)["message"].to_string().contains("head"), "{answer}");
    assert_eq!(half("").await, "");
}

#[tokio::test]
async fn an_early_refusal_reaches_who_still_sends() {
    let mut options = Options::new(names());
    options.body_limit = 1000;
    let server = Server::start("x", Duration::ZERO, options).await;
    let server = Listening::around(server, Limits::default(), |door| door).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    let body = "x".repeat(8 << 20);
    let answer = server.send(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())).await;
    assert_eq!(parsed(&answer).0, 413, "{answer}");
    error(413, parsed(&answer).1);
}

#[tokio::test]
async fn http_1_0_is_spoken() {
    let server = Listening::answering("a b c", Limits::default()).await;
    let answer = server.send("GET /version HTTP/1.0\r\n\r\n").await;
    assert_eq!(parsed(&answer).0, 200, "{answer}");
    let body = chat(json!({"stream": true})).to_string();
    let answer = server
        .send(format!(
            "POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    assert!(!answer.to_ascii_lowercase().contains("chunked"), "{answer}");
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
}

#[tokio::test]
async fn http_2_is_spoken_by_who_knows_it() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let server = Listening::answering("a b c", Limits::default()).await;
    let io = TokioIo::new(server.connect().await);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let request = |extra: Value| {
        Request::post(format!("http://{}{CHAT}", server.address))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(bytes::Bytes::from(chat(extra).to_string())))
            .expect("a request")
    };
    let plain = sender.send_request(request(json!({}))).await.expect("an answer");
    assert_eq!(plain.status(), StatusCode::OK);
    let stream = sender.send_request(request(json!({"stream": true}))).await.expect("an answer");
    let stream = stream.into_body().collect().await.expect("a whole stream").to_bytes();
    assert!(stream.ends_with(b"data: [DONE]\n\n"));
    let long = request(json!({"messages": []}));
    let refused = sender.send_request(long).await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    connection.abort();
    // An offer to change the protocol may be passed over.
    let offer = "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    assert_eq!(parsed(&server.send(get("/version", offer)).await).0, 200);
}

#[tokio::test]
async fn one_too_many_is_told_so() {
    let server = Listening::answering("x", Limits { connections: 1, ..Limits::default() }).await;
    let first = server.connect().await;
    let answer = server.send(get("/version", "")).await;
    assert!(error(503, parsed(&answer).1)["message"].to_string().contains("connections"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: 1"), "{answer}");
    drop(first);
    let free = async {
        while parsed(&server.send(get("/version", "")).await).0 != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, free).await.expect("its place is free again");
}

/// Whoever reads an answer at all reads its status first.
#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_anything_harms_nobody() {
    let server = Listening::answering("x", Limits::default()).await;
    let body = chat(json!({})).to_string();
    let whole = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    for cut in (0..whole.len()).step_by(7) {
        let mut stream = server.connect().await;
        stream.write_all(&whole.as_bytes()[..cut]).await.expect("it reads");
    }
    assert_eq!(parsed(&server.send(get("/health", "")).await).0, 200);
}
