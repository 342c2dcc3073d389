//! `GET /v1/models` and `/v1/models/{id}`: who answers here, and how much context it has.

use super::error::ApiError;
use super::model::{CAPABILITIES, ModelInfo};
use super::state::{App, Resident};
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// Every name of every model whose configuration is read. Errors: 503 while there is none.
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.described_at(0)?;
    let cards = |resident: &Resident| {
        let model = resident.model.clone();
        model.served_names.iter().map(|name| card(&model, name)).collect::<Vec<_>>()
    };
    let data: Vec<Value> = app.residents().flat_map(cards).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `id` is the rest of the path: names hold slashes, raw or percent-encoded.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = &app.described_at(app.place(&id)?)?.model;
    Ok(Json(card(model, model.resolve(Some(&id))?)))
}

fn card(model: &ModelInfo, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm",
        "root": model.root,
        "parent": null,
        "max_model_len": model.max_model_len,
        "capabilities": CAPABILITIES,
        "permission": [{
            "id": format!("modelperm-{name}"),
            "object": "model_permission",
            "created": model.created,
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
