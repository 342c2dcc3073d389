//! The wire: OpenAI's types, routes, streams and errors, and other APIs as translations of them. Sees text, never
//! tensors.
//!
//! ```text
//! JSON ─body→ object ─types→ request ─text→ ids ─generate→ updates ─chat, completions→ answer or stream
//! ```
//!
//! What a caller writes:
//!
//! ```text
//! let app = App::new(Options::new(vec!["tiny".into()]));
//! tokio::spawn(serve(listener, app.clone(), shutdown));   // answers 503 with the progress from here on
//! app.set_resident(Resident { index: 0, text, engine, model });   // answers as soon as the engine is ready
//! ```

mod anthropic;
mod auth;
pub mod batch;
mod body;
mod chat;
mod chat_batch;
mod completions;
mod conversation;
mod cors;
mod dialect;
mod door;
mod envelope;
mod error;
mod exposition;
mod fallback;
mod fields;
mod generate;
mod ids;
mod invocations;
mod keeper;
mod lifecycle;
mod line;
mod loader;
mod meter;
mod metrics;
mod model;
mod models;
mod ollama;
mod openapi;
mod probes;
mod process;
mod query;
mod request_id;
mod responses;
mod roster;
mod seat;
mod server;
mod simulate;
mod stall;
mod state;
mod steer;
mod stream;
mod throughput;
mod tls;
mod tokenize;
mod types;
mod usage;

pub use body::read_object;
pub use cors::CorsOptions;
pub use door::{Door, Limits};
pub use error::ApiError;
pub use fallback::Fallback;
pub use keeper::{Keeping, Lease};
pub use loader::{Estimate, Known, LoadError, Loader, STOP_TIMEOUT, Simulation, Target};
pub use model::{Facts, ModelInfo, SamplingDefaults};
pub use responses::StoreLimits;
pub use server::{Drain, serve};
pub use stall::watch_stalls;
pub use state::{App, BODY_LIMIT_DEFAULT, Health, Options, Resident, reported_version};
pub use throughput::log_throughput;
pub use tls::{Tls, TlsError, TlsFiles};
pub use types::{
    ChatRequest, Common, CompletionRequest, DetokenizeRequest, Prompt, RequestOptions, Rules, StreamOptions,
    TokenizeInput, TokenizeRequest, speculation,
};

use axum::Router;
use axum::extract::Request;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use std::any::Any;
use std::sync::Arc;
use tower_http::catch_panic::CatchPanicLayer;

/// Routes that OpenAI or vLLM have and this server knows it does not.
const NOT_IMPLEMENTED: [&str; 8] = [
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/audio/{*rest}",
    "/v1/images/{*rest}",
    "/v1/rerank",
    "/rerank",
    "/score",
    "/pooling",
];

/// All routes, with names, keys and counting around them.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/health", get(probes::health))
        .route("/ping", get(probes::health).post(probes::health))
        .route("/version", get(probes::version))
        .route("/load", get(probes::load))
        .route("/metrics", get(probes::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/chat/completions/batch", post(chat_batch::create))
        .route("/invocations", post(invocations::invoke))
        .route("/v1/completions", post(completions::create))
        .route("/v1/messages", post(anthropic::create))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::remove))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .merge(ollama::routes());
    router = router
        .route("/models", get(lifecycle::list))
        .route("/models/load", post(lifecycle::load))
        .route("/models/unload", post(lifecycle::unload))
        .route("/simulate", post(simulate::simulate));
    if app.options.sleep_mode {
        router = router
            .route("/sleep", post(lifecycle::sleep))
            .route("/wake_up", post(lifecycle::wake_up))
            .route("/is_sleeping", get(lifecycle::is_sleeping))
            .route("/reset_prefix_cache", post(lifecycle::reset_prefix_cache));
    }
    for path in NOT_IMPLEMENTED {
        router = router.route(path, any(not_implemented));
    }
    router = batch::add_to(router);
    // The last layer is the outermost: a preflight needs no key, and a panic anywhere below still gets an id.
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(app.clone(), fallback::relay))
        .layer(from_fn_with_state(app.clone(), auth::require_key))
        .layer(app.options.cors.layer(!app.options.api_keys.is_empty()))
        .layer(from_fn(dialect::translate_errors))
        .layer(from_fn_with_state(app.clone(), request_id::observe))
        .with_state(app)
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::UnknownRoute { method: request.method().to_string(), path: request.uri().path().to_owned() }
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::MethodNotAllowed { method: request.method().to_string(), path: request.uri().path().to_owned() }
}

async fn not_implemented(request: Request) -> ApiError {
    ApiError::NotImplemented(request.uri().path().to_owned())
}

/// A fault of ours in one handler: the client learns that, the log learns what, the process goes on.
fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!("a handler panicked: {}", text.unwrap_or("without a message"));
    ApiError::Internal("The server failed to handle this request.".to_owned()).into_response()
}
