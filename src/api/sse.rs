//! Server-sent events: every update leaves as soon as it is there, and silence is filled with comments.

use super::error::ApiError;
use super::generate::{Generation, Update};
use super::usage::Usage;
use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

/// A route's wire form of a stream.
pub trait Frames: Send + 'static {
    /// The events that one update makes; often one, sometimes none. `is_last`: every choice has ended.
    fn frames(&mut self, update: Update, usage: Usage, is_last: bool) -> Vec<Value>;

    /// What follows the last update.
    fn closing(&mut self, usage: Usage) -> Option<Value>;
}

/// Streams `generation` through `frames`, then `[DONE]`. Dropping the response's body cancels the generation.
pub fn respond(generation: Generation, frames: impl Frames, keep_alive: Duration) -> Response {
    let state = Stream { generation, frames, ready: VecDeque::new(), phase: Phase::Running };
    let events = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    });
    let sse = Sse::new(events);
    let mut response = if keep_alive.is_zero() {
        sse.into_response()
    } else {
        sse.keep_alive(KeepAlive::new().interval(keep_alive).text("keep-alive")).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Stream<F> {
    generation: Generation,
    frames: F,
    /// Made, not yet sent.
    ready: VecDeque<Event>,
    phase: Phase,
}

#[derive(PartialEq)]
enum Phase {
    Running,
    /// All that remains is in `ready`.
    Closing,
}

impl<F: Frames> Stream<F> {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && self.phase == Phase::Running {
            match self.generation.next().await {
                Some(Ok(update)) => {
                    let made =
                        self.frames.frames(update, self.generation.usage(), self.generation.is_complete());
                    self.ready.extend(made.iter().map(event));
                }
                Some(Err(error)) => {
                    self.ready.push_back(event(&failure(&error)));
                    self.close();
                }
                None => {
                    let closing = self.frames.closing(self.generation.usage());
                    self.ready.extend(closing.iter().map(event));
                    self.close();
                }
            }
        }
        self.ready.pop_front()
    }

    fn close(&mut self) {
        self.phase = Phase::Closing;
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

/// SDKs raise an error for a data object that holds one.
fn failure(error: &ApiError) -> Value {
    tracing::debug!("a stream ended early: {error}");
    error.body()
}

/// JSON never holds a raw line break, so one event is one line.
fn event(value: &Value) -> Event {
    Event::default().data(value.to_string())
}
