//! Models that come and go: llama-server's `/models` with load and unload, and vLLM's sleep and wake.

use super::body::JsonBody;
use super::error::ApiError;
use super::fields::Fields;
use super::keeper::Mode;
use super::models::status;
use super::query::Pairs;
use super::roster::{Level, Stage};
use super::seat::Seat;
use super::state::App;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// `GET /models`: every model and where it is. `?reload=1` looks for new ones first.
pub async fn list(State(app): State<Arc<App>>, query: Pairs) -> Result<Json<Value>, ApiError> {
    if query.bool("reload")? == Some(true) {
        app.rescan().await?;
    }
    let seats = app.keeper.seats();
    let data: Vec<Value> =
        seats.iter().enumerate().map(|(place, seat)| card(seat, app.keeper.stage(place))).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `POST /models/load`: answers when it is known that the model can be loaded, and loads it in the background.
pub async fn load(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    app.keeper.load(named(&app, &body)?).await?;
    Ok(Json(json!({"success": true})))
}

/// `POST /models/unload`: takes no more requests at once; the model goes when those under way are out.
pub async fn unload(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    app.keeper.unload(named(&app, &body)?)?;
    Ok(Json(json!({"success": true})))
}

fn named(app: &App, body: &JsonBody) -> Result<usize, ApiError> {
    let fields = Fields::top(&body.map);
    fields.required("model")?;
    app.place(fields.string("model")?.unwrap_or_default())
}

/// `POST /sleep?level=1&mode=abort`: every model that is here, or the one that `model` names.
pub async fn sleep(State(app): State<Arc<App>>, query: Pairs) -> Result<Json<Value>, ApiError> {
    let (number, level) = match query.get("level") {
        Some("0") => (0, Level::Paused),
        None | Some("1") => (1, Level::Offloaded),
        Some("2") => (2, Level::Discarded),
        Some(other) => {
            return Err(ApiError::bad("level", format!("`level` must be 0, 1 or 2, got `{other}`.")));
        }
    };
    let mode = match query.get("mode") {
        None | Some("abort") => Mode::Abort,
        Some("wait") => Mode::Wait,
        Some("keep") if level.keeps_memory() => Mode::Keep,
        Some("keep") => {
            return Err(ApiError::bad(
                "mode",
                "`mode` keep needs level 0: deeper, there is nothing left that an answer could go on from.",
            ));
        }
        Some(other) => {
            return Err(ApiError::bad("mode", format!("`mode` must be abort, wait or keep, got `{other}`.")));
        }
    };
    if level == Level::Offloaded {
        tracing::warn!("Level 1 is as level 2 here: the device's memory is the host's");
    }
    let started = Instant::now();
    for place in addressed(&app, &query)? {
        app.keeper.sleep(place, level, mode).await?;
    }
    app.metrics.sleep_mode("sleep", started.elapsed());
    Ok(Json(json!({"status": "sleeping", "level": number})))
}

/// `POST /wake_up?tags=weights&tags=kv_cache`. Weights and caches come together here: one tag alone is noted, and the
/// model wakes with the other.
pub async fn wake_up(State(app): State<Arc<App>>, query: Pairs) -> Result<Json<Value>, ApiError> {
    const TAGS: [&str; 2] = ["weights", "kv_cache"];
    let mut tags: Vec<&str> = query.all("tags").collect();
    if let Some(other) = tags.iter().find(|tag| !TAGS.contains(tag)) {
        return Err(ApiError::bad("tags", format!("`tags` must be weights or kv_cache, got `{other}`.")));
    }
    if tags.is_empty() {
        tags.extend(TAGS);
    }
    let started = Instant::now();
    for place in addressed(&app, &query)? {
        let Some(seat) = app.keeper.seat(place) else { continue };
        if seat.ask(TAGS.map(|tag| tags.contains(&tag))) {
            app.keeper.wake(place).await?;
        }
    }
    app.metrics.sleep_mode("wake_up", started.elapsed());
    Ok(Json(json!({"status": "awake", "tags": tags})))
}

/// `GET /is_sleeping`: the model that `model` names; without one, whether some sleep and none is awake.
pub async fn is_sleeping(State(app): State<Arc<App>>, query: Pairs) -> Result<Json<Value>, ApiError> {
    let stages: Vec<Stage> =
        addressed(&app, &query)?.into_iter().map(|place| app.keeper.stage(place)).collect();
    let sleeps = stages.iter().any(|stage| matches!(stage, Stage::Asleep(_)));
    Ok(Json(json!({"is_sleeping": sleeps && !stages.contains(&Stage::Ready)})))
}

/// `POST /reset_prefix_cache`: the next prompt is computed from its beginning.
pub async fn reset_prefix_cache(State(app): State<Arc<App>>, query: Pairs) -> Result<Json<Value>, ApiError> {
    for place in addressed(&app, &query)? {
        if let Some(resident) = app.resident(place) {
            resident.engine.clear_cache().await;
        }
    }
    Ok(Json(json!({"success": true})))
}

/// The places that a query is about. Errors: 404 for a name that nobody has.
fn addressed(app: &App, query: &Pairs) -> Result<Vec<usize>, ApiError> {
    match query.get("model") {
        Some(name) => Ok(vec![app.place(name)?]),
        None => Ok((0..app.keeper.len()).collect()),
    }
}

fn card(seat: &Seat, stage: Stage) -> Value {
    let known = &seat.known;
    let mut state = json!({"value": status(stage), "args": known.args});
    if let Some(preset) = &known.preset {
        state["preset"] = json!(preset);
    }
    if let Some(progress) = seat.progress() {
        state["progress"] = json!(progress);
    }
    if let Some(failure) = seat.failure() {
        state["failed"] = json!(true);
        state["exit_code"] = json!(1);
        state["message"] = json!(failure.to_string());
    }
    json!({
        "id": seat.canonical(),
        "aliases": known.names.get(1..).unwrap_or_default(),
        "object": "model",
        "created": seat.model().map_or(0, |model| model.created),
        "owned_by": "vllm",
        "in_cache": true,
        "path": known.path,
        "status": state,
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    })
}
