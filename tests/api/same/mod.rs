//! A plain answer is the stream, collected: a few hundred random requests to the tiny model, each asked for both ways and
//! compared field by field. They are asked several at a time, so that batches, the prefix cache and drafts differ between
//! the two.
//!
//! `FERROTRON_SAME=5000 FERROTRON_SAME_SEED=7 cargo test --test api same` asks more, or others.

mod draw;
mod fold;

use super::models_in_memory::{self as models, Random};
use super::world::{self, Server, names};
use axum::http::StatusCode;
use ferrotron::api::{App, Options};
use ferrotron::backend::Precision;
use ferrotron::backend::cpu::Cpu;
use ferrotron::engine::EngineConfig;
use ferrotron::model::Limits;
use futures_util::future::join_all;
use serde_json::Value;

const REQUESTS: usize = 300;
const SEED: u64 = 6;
const TOGETHER: usize = 8;

/// The tiny model with a prefix cache and drafts.
async fn tiny() -> Server {
    let limits = Limits {
        step_tokens: 128,
        logit_rows: 64,
        slots: 12 + 12,
        blocks: 512,
        block_len: 16,
        lanes: 12,
        drafts: 3,
        ..Limits::default()
    };
    let network = models::model(Cpu::new(Precision::F32, 1).expect("threads start"), &models::tiny(), limits);
    let config = EngineConfig { max_sequences: 12, context_len: world::CONTEXT, ..EngineConfig::default() };
    let app = App::new(Options::new(names()));
    app.set_resident(world::around(0, names(), world::text(), network, config).await);
    Server { app }
}

fn variable(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

#[tokio::test]
async fn a_stream_and_a_plain_answer_say_the_same() {
    let (count, seed) =
        (variable("FERROTRON_SAME", REQUESTS as u64) as usize, variable("FERROTRON_SAME_SEED", SEED));
    let server = tiny().await;
    let mut random = Random(seed);
    let mut refused = 0;
    for first in (0..count).step_by(TOGETHER) {
        let requests: Vec<_> =
            (first..count.min(first + TOGETHER)).map(|_| draw::request(&mut random)).collect();
        let answers = join_all(requests.iter().map(|(path, body)| both(&server, path, body))).await;
        refused += answers.iter().filter(|answered| !**answered).count();
    }
    // Most have to be answered, or nothing was compared.
    assert!(refused * 4 < count, "{refused} of {count} were refused");
}

/// Asks both ways and compares; whether there was an answer. A refusal is the same refusal.
async fn both(server: &Server, path: &str, body: &Value) -> bool {
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = serde_json::json!({"include_usage": true});
    let ((status, plain), (stream_status, events)) =
        tokio::join!(server.post(path, body), server.post(path, &streamed));
    assert_eq!(status, stream_status, "{path} {body}\n{plain}\n{events}");
    if status != StatusCode::OK {
        assert_eq!(plain, events, "{path} {body}");
        assert!(status.is_client_error(), "{path} {body}\n{plain}");
        return false;
    }
    let plain: Value = serde_json::from_str(&plain).expect("JSON");
    let compared = if path == draw::CHAT {
        fold::chat(&events).map(|folded| (fold::told_of_chat(&plain, &folded, body), folded))
    } else {
        fold::completion(&events).map(|folded| (fold::told_of_completion(&plain), folded))
    };
    let (told, folded) = compared.unwrap_or_else(|fault| panic!("{fault}\n{path} {body}\n{events}"));
    assert_eq!(folded, told, "{path} {body}\nplain: {plain}\n{events}");
    true
}
