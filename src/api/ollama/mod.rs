//! Ollama's routes, so that its clients (its own packages, Open WebUI) find here what they look for.
//!
//! ```text
//! body ─request→ body of /v1/chat/completions ─Conversation→ pieces ─answer→ lines, or one object
//! ```

mod answer;
mod errors;
mod models;
mod request;

pub use errors::body as error;

use super::body::{JsonBody, UntypedBody};
use super::conversation::Conversation;
use super::error::ApiError;
use super::state::App;
use answer::{Form, Writer};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use request::{Asked, Generate};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The release whose answers these are; clients ask for at least 0.9.
const VERSION: &str = "0.13.0";

/// What needs embeddings or a store of models.
const NOT_IMPLEMENTED: [&str; 7] = [
    "/api/embed",
    "/api/embeddings",
    "/api/push",
    "/api/create",
    "/api/copy",
    "/api/delete",
    "/api/blobs/{digest}",
];

pub fn routes() -> Router<Arc<App>> {
    let router = Router::new()
        .route("/", get(async || "Ollama is running"))
        .route("/api/version", get(async || Json(json!({"version": VERSION}))))
        .route("/api/tags", get(tags))
        .route("/api/ps", get(running))
        .route("/api/show", post(show))
        .route("/api/chat", post(chat))
        .route("/api/generate", post(generate))
        .route("/api/pull", post(pull));
    NOT_IMPLEMENTED.into_iter().fold(router, |router, path| router.route(path, any(not_implemented)))
}

async fn tags(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    models::tags(&app).map(Json)
}

async fn running(State(app): State<Arc<App>>) -> Json<Value> {
    Json(models::running(&app))
}

async fn show(State(app): State<Arc<App>>, body: UntypedBody) -> Result<Json<Value>, ApiError> {
    let asked = Asked::read(&app, &body.0.map)?;
    let place = app.place(&asked.served)?;
    let card = match app.resident(place) {
        Some(resident) => models::card(&resident.model, resident.text.template()),
        // The template is read with the weights.
        None => models::card(&*app.known_at(place)?, None),
    };
    Ok(Json(card))
}

async fn chat(State(app): State<Arc<App>>, UntypedBody(body): UntypedBody) -> Result<Response, ApiError> {
    let asked = Asked::read(&app, &body.map)?;
    match request::chat(&body.map, &asked)? {
        None => nothing(&app, &body, asked, Form::Chat).await,
        Some(chat) => {
            let writer = Writer { form: Form::Chat, model: asked.model, arrived: body.arrived };
            turn(&app, writer, chat, Vec::new()).await
        }
    }
}

async fn generate(State(app): State<Arc<App>>, UntypedBody(body): UntypedBody) -> Result<Response, ApiError> {
    let asked = Asked::read(&app, &body.map)?;
    let generate = request::generate(&body.map, &asked)?;
    let writer = || Writer { form: Form::Generate, model: asked.model.clone(), arrived: body.arrived };
    match generate {
        Generate::Nothing => nothing(&app, &body, asked, Form::Generate).await,
        Generate::Turn { chat, before } => turn(&app, writer(), chat, before).await,
        Generate::Raw(map) => {
            let body = JsonBody { map, ..body };
            let opened = Conversation::open_raw(&app, &body).await;
            writer().answer(opened.map_err(request::in_own_words)?).await
        }
    }
}

/// Answers `chat` behind the ids of earlier turns.
async fn turn(
    app: &Arc<App>,
    writer: Writer,
    chat: Map<String, Value>,
    before: Vec<u32>,
) -> Result<Response, ApiError> {
    let body = JsonBody { map: chat, arrived: writer.arrived };
    let opened = Conversation::open_after(app, &body, before).await;
    writer.answer(opened.map_err(request::in_own_words)?).await
}

/// No answer is wanted, only the model, or that it go. Those of the command line stay.
async fn nothing(app: &App, body: &JsonBody, asked: Asked, form: Form) -> Result<Response, ApiError> {
    let writer = Writer { form, model: asked.model, arrived: body.arrived };
    if asked.unload {
        let place = app.place(&asked.served)?;
        if place >= app.options.models.len() {
            // One that is not here has nothing to do.
            let _ = app.keeper.unload(place);
        }
        return Ok(writer.nothing("unload"));
    }
    app.ready(&Map::from_iter([("model".to_owned(), json!(asked.served))])).await?;
    Ok(writer.nothing("load"))
}

/// What is served is here; nothing else can be had.
async fn pull(State(app): State<Arc<App>>, UntypedBody(body): UntypedBody) -> Result<Response, ApiError> {
    let asked = match Asked::read(&app, &body.map) {
        Err(ApiError::UnknownModel { .. }) => return Err(ApiError::NotImplemented("/api/pull".to_owned())),
        read => read?,
    };
    let done = json!({"status": "success"});
    if !asked.stream {
        return Ok(Json(done).into_response());
    }
    let lines = HeaderValue::from_static("application/x-ndjson");
    Ok(([(header::CONTENT_TYPE, lines)], format!("{done}\n")).into_response())
}

async fn not_implemented(request: Request) -> ApiError {
    ApiError::NotImplemented(request.uri().path().to_owned())
}
