//! `POST /v1/responses`: a chat whose answer is a list of items, which may be kept, continued, and made in the
//! background.
//!
//! ```text
//! body ─request, items→ a chat's body ─Conversation→ chunks ─output→ items ─┬─ answer: the response object
//!                                                                            └─ stream: events
//! ```

mod answer;
mod items;
mod output;
mod request;
mod store;
mod stream;
mod truncate;

pub use store::{Store, StoreLimits};

use super::body::JsonBody;
use super::conversation::Conversation;
use super::error::ApiError;
use super::generate::Generation;
use super::state::App;
use super::stream as wire;
use answer::Answer;
use axum::Json;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::future::{AbortHandle, Abortable};
use request::ResponsesRequest;
use serde_json::{Value, json};
use std::sync::Arc;
use stream::ResponseFrames;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Events of a response in the background that wait for its reader: as with any other stream, a reader that stands
/// still holds up its own answer.
const EVENTS_WAITING_MAX: usize = 64;

/// Answers a request. Errors: 400 for what cannot be read; those of [`Conversation::open`].
pub async fn create(State(app): State<Arc<App>>, mut body: JsonBody) -> Result<Response, ApiError> {
    let mut request = ResponsesRequest::read(&body.map, &app.responses)?;
    body.map = std::mem::take(&mut request.chat);
    if request.truncate {
        let cut = truncate::to_context(&app, &mut body.map).await;
        cut.map_err(|error| request.names.restate(error))?;
    }
    let opened = Conversation::open(&app, &body).await;
    let mut conversation = opened.map_err(|error| request.names.restate(error))?;
    let (stream, background) = (request.stream, request.background);
    let mut answer = Answer::new(&app, request, &conversation.common);
    if !stream && !background {
        let take = |chunk| drop(answer.output.take(chunk));
        let usage = conversation.each(take).await?;
        return Ok(Json(answer.completed(usage)).into_response());
    }
    let Conversation { generation, reader, .. } = conversation;
    let frames = ResponseFrames::new(reader, answer);
    if background {
        return in_background(&app, generation, frames, stream);
    }
    Ok(wire::respond(generation, frames, app.options.keep_alive))
}

/// Goes on whether anybody listens or not. Errors: too many do already.
fn in_background(
    app: &Arc<App>,
    generation: Generation,
    frames: ResponseFrames,
    stream: bool,
) -> Result<Response, ApiError> {
    let (handle, registration) = AbortHandle::new_pair();
    let queued = frames.answer.enqueue(handle)?;
    let (send, events) = mpsc::channel(EVENTS_WAITING_MAX);
    let mut frames = wire::all(generation, frames).boxed();
    let work = async move {
        let mut heard = stream;
        while let Some(frame) = frames.next().await {
            heard = heard && send.send(frame).await.is_ok();
        }
    };
    tokio::spawn(Abortable::new(work, registration));
    if stream {
        let frames = ReceiverStream::new(events);
        return Ok(wire::respond_frames::<ResponseFrames>(frames, app.options.keep_alive));
    }
    Ok(Json(queued).into_response())
}

/// A response that is kept. Errors: 404.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    if query.is_some_and(|query| query.split('&').any(|pair| pair == "stream=true")) {
        return Err(ApiError::bad("stream", "A response that is kept cannot be streamed again."));
    }
    Ok(Json(Value::clone(&*app.responses.get(&id)?)))
}

/// Ends the work on a response. Errors: 404; 400 if it was not made in the background.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(Value::clone(&*app.responses.cancel(&id)?)))
}

/// Forgets a response. Errors: 404.
pub async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.responses.remove(&id)?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}
