//! Lines become requests to the router itself, as many at once as the engines have places for.

use super::input::{Input, InputError, Line};
use super::journal::{Answer, Journal, result_line};
use crate::api::fallback;
use crate::api::state::App;
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderValue, Request, header};
use serde_json::{Map, Value, json};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tower::ServiceExt;

/// The class of a line that names none behind 0: whoever waits for an answer comes first.
const BACKGROUND: i64 = 100;
/// A fault of ours may pass; one that does not is the answer.
const ATTEMPTS: u32 = 3;
/// Between two attempts: doubled each time, up to the second.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a batch stopped before its end. What was answered is in the journal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("the input: {0}")]
    Input(#[from] InputError),
    #[error("the output cannot be written: {0}")]
    Output(#[from] io::Error),
    #[error("there is no room for more results: delete files that nobody needs")]
    Full,
}

/// Answers what `journal` says is left of `input` and adds it there; `answered` is told after each. Dropping the future
/// cancels what runs, which then counts as not asked.
pub async fn run(
    app: &Arc<App>,
    input: &Input,
    journal: &mut Journal,
    mut answered: impl FnMut(&Journal) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let router = crate::api::router(app.clone());
    let key = app.options.api_keys.first().and_then(|key| HeaderValue::from_str(key).ok());
    let mut left = journal.left().into_iter();
    let mut running = JoinSet::new();
    loop {
        while running.len() < width(app) {
            let Some(index) = left.next() else { break };
            let (line, id) = (input.line(index)?, input.id(index));
            let task = Task { router: router.clone(), key: key.clone(), index, id };
            running.spawn(task.answer(line));
        }
        let Some(ended) = running.join_next().await else { return Ok(()) };
        // The router catches panics, and nobody but us aborts a task.
        let answer = ended.map_err(io::Error::other)?;
        journal.append(&answer)?;
        answered(journal)?;
    }
}

/// So many lines that a place that becomes free is taken at once, and no more: what waits helps nobody.
fn width(app: &App) -> usize {
    let residents = app.residents();
    let infos = residents.iter().filter_map(|resident| resident.engine.info());
    let places: usize = infos.map(|info| info.max_sequences).sum();
    places + places / 4 + 1
}

/// The body with its own class if that is a background one, else with ours.
fn in_background(mut body: Map<String, Value>) -> Bytes {
    let own = body.get("priority").and_then(Value::as_i64).filter(|priority| *priority > 0);
    body.insert("priority".to_owned(), own.unwrap_or(BACKGROUND).into());
    Value::Object(body).to_string().into()
}

/// One line on its way.
struct Task {
    router: Router,
    key: Option<HeaderValue>,
    index: usize,
    id: String,
}

impl Task {
    async fn answer(self, line: Line) -> Answer {
        let Line { custom_id, url, body } = line;
        let body = in_background(body);
        let (mut attempts, mut pause) = (0, PAUSE);
        let (status, response) = loop {
            let (status, response) = self.ask(&url, body.clone()).await;
            match status {
                // Full, loading or ending: nobody waits, so we do. 529 is how Anthropic says it.
                429 | 503 | 529 => {}
                500 if attempts + 1 < ATTEMPTS => attempts += 1,
                _ => break (status, response),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        };
        let line = result_line(&self.id, &custom_id, response, Value::Null);
        Answer { index: self.index, line, succeeded: status == 200 }
    }

    /// The status and the response as a result shows it.
    async fn ask(&self, url: &str, body: Bytes) -> (u16, Value) {
        let mut request = Request::post(url)
            .header(header::CONTENT_TYPE, "application/json")
            // What this model was asked, no other shall answer: a line can wait until it is well again.
            .header(fallback::RELAYED, "1");
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        let request = request.body(Body::from(body)).expect("the url is one of ours, the headers are valid");
        let response = match self.router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let status = response.status().as_u16();
        let request_id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
        let request_id = request_id.unwrap_or_default().to_owned();
        // Bounded by what the request may generate.
        let Ok(bytes) = to_bytes(response.into_body(), usize::MAX).await else {
            return (500, json!({"status_code": 500, "request_id": request_id, "body": null}));
        };
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        (status, json!({"status_code": status, "request_id": request_id, "body": body}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_comes_before_who_waits() {
        let check = |body: &str, expected: &str| {
            assert_eq!(in_background(serde_json::from_str(body).unwrap()), expected, "{body}");
        };
        check(r#"{"n":1}"#, r#"{"n":1,"priority":100}"#);
        check(r#"{"priority":7}"#, r#"{"priority":7}"#);
        check(r#"{"priority":0}"#, r#"{"priority":100}"#);
        check(r#"{"priority":-5,"n":1}"#, r#"{"priority":100,"n":1}"#);
        check(r#"{"priority":null}"#, r#"{"priority":100}"#);
    }
}
