//! `/openapi.json` says what the router does, no more and no less.

use super::world::{Server, names, read};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use ferrotron::api::Options;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/// A server with every route there is.
async fn server() -> Server {
    let options = Options { sleep_mode: true, ..Options::new(names()) };
    Server::start("</think>yes", Duration::ZERO, options).await
}

async fn document(server: &Server) -> Value {
    serde_json::from_str(&server.get("/openapi.json").await.1).expect("JSON")
}

/// What the sources under `folder` give to `.route(`, spelled as OpenAPI does.
fn routes_of(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("sources are readable") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            routes_of(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("sources are UTF-8");
            let after = text.split(".route(").skip(1);
            let quoted = after.filter_map(|rest| rest.trim_start().strip_prefix('"')?.split_once('"'));
            found.extend(quoted.map(|(route, _)| route.replace("{*", "{")));
        }
    }
}

#[tokio::test]
async fn no_route_is_missing_and_none_is_made_up() {
    let document = document(&server().await).await;
    let described: BTreeSet<String> = document["paths"].as_object().expect("paths").keys().cloned().collect();
    let mut routed = BTreeSet::new();
    routes_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api"), &mut routed);
    let missing: Vec<_> = routed.difference(&described).collect();
    let made_up: Vec<_> = described.difference(&routed).collect();
    assert!(missing.is_empty() && made_up.is_empty(), "missing: {missing:?}, made up: {made_up:?}");
}

#[tokio::test]
async fn each_path_answers_exactly_the_methods_it_is_said_to() {
    let server = server().await;
    let mut wrong = Vec::new();
    for (path, item) in document(&server).await["paths"].as_object().expect("paths") {
        let asked = path.replace(['{', '}'], "");
        for method in METHODS {
            let request = Request::builder().method(method).uri(&asked).body(Body::empty());
            let (status, _) = read(server.call(request.expect("a request")).await).await;
            let answers = !matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED);
            if answers != item.get(method.to_lowercase()).is_some() {
                wrong.push(format!("{method} {path}: {status}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[tokio::test]
async fn every_reference_leads_somewhere() {
    let document = document(&server().await).await;
    let mut values = vec![&document];
    let mut count = 0;
    while let Some(value) = values.pop() {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            let place = reference.strip_prefix('#').and_then(|place| document.pointer(place));
            assert!(place.is_some(), "{reference}");
            count += 1;
        }
        match value {
            Value::Object(map) => values.extend(map.values()),
            Value::Array(items) => values.extend(items),
            _ => {}
        }
    }
    assert!(count > 50, "{count} references");
}
