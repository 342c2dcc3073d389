//! Streams: every update leaves as soon as it is there. Server-sent events fill silence with comments; lines of
//! JSON have nothing to fill it with.

use super::error::ApiError;
use super::generate::{Generation, Update};
use super::usage::Usage;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

/// An event: its data, and its name where the dialect has names.
pub struct Frame {
    pub name: Option<&'static str>,
    pub data: Value,
}

impl From<Value> for Frame {
    fn from(data: Value) -> Self {
        Self { name: None, data }
    }
}

/// A route's wire form of a stream.
pub trait Frames: Send + 'static {
    /// What stands after the last event of a stream of server-sent events.
    const END: Option<&'static str> = Some("[DONE]");

    /// The events that one update makes; often one, sometimes none. `is_last`: every choice has ended.
    fn frames(&mut self, update: Update, usage: Usage, is_last: bool) -> Vec<Frame>;

    /// What follows the last update.
    fn closing(&mut self, usage: Usage) -> Vec<Frame>;

    /// The last event of a stream that ends early. SDKs raise an error for a data object that holds one.
    fn failure(&mut self, error: &ApiError) -> Frame {
        Frame::from(error.body())
    }

    /// What fills silence.
    fn idle() -> Event {
        Event::default().comment("keep-alive")
    }
}

/// Streams `generation` through `frames` as server-sent events. Dropping the response's body cancels the generation.
pub fn respond<F: Frames>(generation: Generation, frames: F, keep_alive: Duration) -> Response {
    let end = F::END.map(|end| Event::default().data(end));
    let events = Stream::new(generation, frames).map(event).chain(stream::iter(end)).map(Ok::<_, Infallible>);
    let sse = Sse::new(events);
    let mut response = if keep_alive.is_zero() {
        sse.into_response()
    } else {
        sse.keep_alive(KeepAlive::new().interval(keep_alive).event(F::idle())).into_response()
    };
    unbuffered(&mut response, "text/event-stream; charset=utf-8");
    response
}

/// Streams `generation` through `frames` as lines of JSON. Dropping the response's body cancels the generation.
pub fn respond_lines(generation: Generation, frames: impl Frames) -> Response {
    let lines = Stream::new(generation, frames).map(|frame| Ok::<_, Infallible>(format!("{}\n", frame.data)));
    let mut response = Body::from_stream(lines).into_response();
    unbuffered(&mut response, "application/x-ndjson");
    response
}

fn unbuffered(response: &mut Response, media: &'static str) {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

struct Stream<F> {
    generation: Generation,
    frames: F,
    /// Made, not yet sent.
    ready: VecDeque<Frame>,
    /// All that remains is in `ready`.
    closing: bool,
}

impl<F: Frames> Stream<F> {
    fn new(generation: Generation, frames: F) -> impl futures_util::Stream<Item = Frame> {
        let state = Self { generation, frames, ready: VecDeque::new(), closing: false };
        stream::unfold(state, |mut state| async move {
            let frame = state.next().await?;
            Some((frame, state))
        })
    }

    async fn next(&mut self) -> Option<Frame> {
        while self.ready.is_empty() && !self.closing {
            match self.generation.next().await {
                Some(Ok(update)) => {
                    let (usage, is_last) = (self.generation.usage(), self.generation.is_complete());
                    self.ready.extend(self.frames.frames(update, usage, is_last));
                }
                Some(Err(error)) => {
                    tracing::debug!("a stream ended early: {error}");
                    self.ready.push_back(self.frames.failure(&error));
                    self.closing = true;
                }
                None => {
                    self.ready.extend(self.frames.closing(self.generation.usage()));
                    self.closing = true;
                }
            }
        }
        self.ready.pop_front()
    }
}

/// JSON never holds a raw line break, so one event is one line.
fn event(frame: Frame) -> Event {
    let event = frame.name.map_or_else(Event::default, |name| Event::default().event(name));
    event.data(frame.data.to_string())
}
