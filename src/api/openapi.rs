//! `GET /openapi.json`: every route of this server as an OpenAPI 3.1 document.
//!
//! Each dialect has a part of it in `openapi/`, written by hand, because what a field may hold is decided in `types`
//! in ways that no derived schema says. That the parts tell the truth is tested: `tests/api/openapi.rs` compares them
//! with the router, `tests/clients/schema_client.py` asks a server whatever they allow and forbid.

use super::state::{App, Options};
use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};
use std::sync::Arc;

const PARTS: [&str; 7] = [
    include_str!("openapi/server.json"),
    include_str!("openapi/openai.json"),
    include_str!("openapi/responses.json"),
    include_str!("openapi/anthropic.json"),
    include_str!("openapi/ollama.json"),
    include_str!("openapi/router.json"),
    include_str!("openapi/batch.json"),
];
/// Behind `--enable-sleep-mode`.
const SLEEP: &str = include_str!("openapi/sleep.json");

pub async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    Json(describe(&app.options))
}

/// The parts together, with what only the running server knows: its version, its names, whether it wants a key.
fn describe(options: &Options) -> Value {
    let mut document = Map::from_iter([
        ("openapi".to_owned(), json!("3.1.0")),
        ("info".to_owned(), json!({"title": "ferrotron", "version": env!("CARGO_PKG_VERSION")})),
    ]);
    for part in PARTS.into_iter().chain(options.sleep_mode.then_some(SLEEP)) {
        merge(&mut document, serde_json::from_str(part).expect("the parts are read by a test"));
    }
    let known = options.known.iter().flat_map(|known| &known.names);
    let mut names: Vec<Value> =
        options.models.iter().flatten().chain(known).map(|name| json!(name)).collect();
    // Who names no model, or an empty one, gets the first.
    names.extend([json!(""), Value::Null]);
    merge(&mut document, object(json!({"components": {"schemas": {"Model": {"enum": names}}}})));
    if !options.api_keys.is_empty() {
        document.insert("security".into(), json!([{"bearer": []}, {"key": []}]));
    }
    Value::Object(document)
}

/// Adds `part` to `whole`; objects under the same key become one.
fn merge(whole: &mut Map<String, Value>, part: Map<String, Value>) {
    for (key, value) in part {
        match (whole.get_mut(&key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            (_, value) => {
                whole.insert(key, value);
            }
        }
    }
}

fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(map) = value { map } else { Map::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_become_one_document() {
        let document = describe(&Options::new(vec!["tiny".into()]));
        for path in ["/health", "/v1/chat/completions"] {
            assert!(document["paths"][path].is_object(), "{path}");
        }
        assert_eq!(document["components"]["schemas"]["Model"], json!({"enum": ["tiny", "", null]}));
        assert!(document.get("security").is_none());
        let locked = Options { api_keys: vec!["key".into()], ..Options::new(vec!["tiny".into()]) };
        assert!(describe(&locked)["security"].is_array());
    }
}
