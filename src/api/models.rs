//! `GET /v1/models` and `/v1/models/{id}`: who answers here, and how much context it has.

use super::error::ApiError;
use super::model::CAPABILITIES;
use super::roster::{Stage, Then};
use super::seat::Seat;
use super::state::App;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// Every name of every model. Those that the start has not come to are left out; errors: 503 while that is the first.
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    if app.keeper.stage(0) == Stage::Starting {
        app.known_at(0)?;
    }
    let mut data = Vec::new();
    for (place, seat) in app.keeper.seats().iter().enumerate() {
        let stage = app.keeper.stage(place);
        if stage != Stage::Starting {
            data.extend(seat.known.names.iter().map(|name| card(seat, stage, name)));
        }
    }
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `id` is the rest of the path: names hold slashes, raw or percent-encoded.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let place = app.place(&id)?;
    let stage = app.keeper.stage(place);
    if stage == Stage::Starting {
        app.known_at(place)?;
    }
    let seat = app.keeper.seat(place).ok_or(ApiError::Loading { percent: 0.0 })?;
    Ok(Json(card(&seat, stage, &id)))
}

/// llama-server's word for where a model is.
pub fn status(stage: Stage) -> &'static str {
    match stage {
        Stage::Unloaded => "unloaded",
        Stage::Starting | Stage::Queued | Stage::Loading => "loading",
        // It is, until it has gone.
        Stage::Ready | Stage::Leaving(Then::Unloaded) => "loaded",
        Stage::Leaving(Then::Asleep(_)) | Stage::Asleep(_) => "sleeping",
    }
}

fn card(seat: &Seat, stage: Stage, name: &str) -> Value {
    let model = seat.model();
    let created = model.as_ref().map_or(0, |model| model.created);
    json!({
        "id": name,
        "object": "model",
        // Anthropic's clients look for these two.
        "type": "model",
        "display_name": name,
        "created": created,
        "owned_by": "vllm",
        "root": model.as_ref().map_or(&seat.known.path, |model| &model.root),
        "parent": null,
        "max_model_len": model.as_ref().map_or(0, |model| model.max_model_len),
        "capabilities": CAPABILITIES,
        "status": status(stage),
        "permission": [{
            "id": format!("modelperm-{name}"),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
    })
}
