//! A server in memory: the real router, text and engine around a network that follows a script.

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use ferrotron::api::{self, App, Facts, ModelInfo, Options, SamplingDefaults};
use ferrotron::backend::StepInputs;
use ferrotron::engine::{self, EngineConfig};
use ferrotron::model::{Limits, Network, StepError};
use ferrotron::text::{Text, TextFiles};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tower::ServiceExt;

/// Wide enough for the tokenizer of `models/tiny`.
pub const VOCAB: usize = 4096;
pub const CONTEXT: usize = 512;

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

pub fn text() -> Text {
    let template = include_str!("../../models/tiny/chat_template.jinja");
    Text::load(TextFiles {
        tokenizer_json: include_bytes!("../../models/tiny/tokenizer.json"),
        tokenizer_config: Some(include_bytes!("../../models/tiny/tokenizer_config.json")),
        chat_template: Some(template),
    })
    .expect("the tiny model's own files")
}

pub fn names() -> Vec<String> {
    vec!["nvidia/tiny".into(), "tiny".into()]
}

pub fn limits() -> Limits {
    Limits { step_tokens: 1024, logit_rows: 1024, slots: 8, blocks: 512, block_len: 16, ..Limits::default() }
}

/// A model that answers `script`.
pub async fn resident(index: usize, names: Vec<String>, script: &str, pace: Duration) -> api::Resident {
    let text = text();
    let network = scripted(&text, script, pace);
    let resident = opening(index, names, text, forgetful(), move || Ok(network));
    resident.engine.loaded().await;
    resident
}

/// As those of a model that is larger than it is.
fn facts() -> Facts {
    Facts {
        architecture: "nemotron_h_moe",
        format: "safetensors",
        quantization: "NVFP4".into(),
        parameters: 31_577_940_288,
        bytes: 19_339_781_632,
        device_bytes: 0,
        layers: 52,
        hidden_size: 2688,
    }
}

/// For networks that know a sequence only from its start: nothing may be resumed.
pub fn forgetful() -> EngineConfig {
    EngineConfig { context_len: CONTEXT, checkpoints_max: 0, ..EngineConfig::default() }
}

/// A model that does what `network` does.
pub async fn around(
    index: usize,
    served_names: Vec<String>,
    text: Text,
    network: impl Network + 'static,
    config: EngineConfig,
) -> api::Resident {
    let resident = opening(index, served_names, text, config, move || Ok(Box::new(network)));
    resident.engine.loaded().await;
    resident
}

/// A network that says the ids of `script`.
pub fn scripted(text: &Text, script: &str, pace: Duration) -> Box<dyn Network> {
    let ids = text.encode(script, false).expect("plain text");
    let end = text.id_of("<|im_end|>").expect("a control token");
    Box::new(Script { ids, end, pace, prompts: HashMap::new(), limits: limits(), logits: Vec::new() })
}

/// A model whose network `load` brings on the engine's own thread.
pub fn opening(
    index: usize,
    served_names: Vec<String>,
    text: Text,
    config: EngineConfig,
    load: impl FnOnce() -> Result<Box<dyn Network>, String> + Send + 'static,
) -> api::Resident {
    let (engine, _) = engine::start(config, move |_| load());
    let model = ModelInfo {
        served_names,
        root: "tiny".into(),
        created: 1,
        max_model_len: CONTEXT,
        vocab_size: VOCAB,
        stop_ids: text.id_of("<|im_end|>").into_iter().collect(),
        defaults: SamplingDefaults::default(),
        facts: facts(),
    };
    api::Resident { index, text: Arc::new(text), engine, model: Arc::new(model) }
}

/// A server whose model answers `script`.
pub struct Server {
    pub app: Arc<App>,
}

impl Server {
    pub async fn answering(script: &str) -> Self {
        Self::start(script, Duration::ZERO, Options::new(names())).await
    }

    pub async fn start(script: &str, pace: Duration, options: Options) -> Self {
        let app = App::new(options);
        app.set_resident(resident(0, names(), script, pace).await);
        Self { app }
    }

    pub async fn call(&self, request: Request<Body>) -> Response {
        api::router(self.app.clone()).oneshot(request).await.expect("the router is infallible")
    }

    pub async fn get(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        read(self.call(request).await).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, String) {
        read(self.call(post(path, body.to_string())).await).await
    }

    pub async fn json(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let (status, text) = self.post(path, &body).await;
        (status, redact(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))))
    }

    /// The events of a stream, one per line, without what differs from run to run.
    pub async fn events(&self, path: &str, body: Value) -> String {
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

pub fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
    request.body(body.into()).expect("a request")
}

pub async fn read(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 24).await.expect("a whole body");
    (status, String::from_utf8(bytes.to_vec()).expect("UTF-8"))
}

/// Names become constants, times go.
pub fn redact(mut value: Value) -> Value {
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

pub fn chat(extra: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]});
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

pub fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    }}}])
}

pub const CHAT: &str = "/v1/chat/completions";
pub const CALL: &str = "Look it up.\n</think>\n<tool_call>\n<function=weather>\n<parameter=city>\nBonn\n</parameter>\n\
                    <parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n";

/// A server behind a real socket, for what only a socket can do.
pub struct Listening {
    pub address: SocketAddr,
    task: JoinHandle<io::Result<()>>,
}

impl Listening {
    pub async fn answering(script: &str, limits: api::Limits) -> Self {
        Self::around(Server::answering(script).await, limits, |door| door).await
    }

    pub async fn around(
        server: Server,
        limits: api::Limits,
        door: impl FnOnce(api::Door) -> api::Door,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let door = door(api::Door::from(listener).with_limits(limits));
        let drain = api::Drain { signal: std::future::pending(), timeout: Duration::ZERO };
        let task = tokio::spawn(api::serve(door, server.app, drain));
        Self { address, task }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("it listens")
    }

    /// Writes `bytes` and reads to the end.
    pub async fn send(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        let (mut reader, mut writer) = stream.split();
        // What is refused early is not read to its end.
        let write = async { drop(writer.write_all(bytes.as_ref()).await) };
        let mut text = Vec::new();
        let read = async { drop(reader.read_to_end(&mut text).await) };
        tokio::time::timeout(PATIENCE, async { tokio::join!(write, read) }).await.expect("no answer ends");
        String::from_utf8(text).expect("answers are UTF-8")
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Nobody waits so long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The status of an answer as it stood on the wire, and its body.
pub fn parsed(answer: &str) -> (u16, &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {head}")), body)
}
