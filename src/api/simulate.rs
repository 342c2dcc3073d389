//! `POST /simulate`: what a model would take of memory, and whether there is so much, without loading it.

use super::body::JsonBody;
use super::error::ApiError;
use super::fields::Fields;
use super::loader::{Estimate, LoadError, Simulation, Target};
use super::state::App;
use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// No model has a longer context, and no server runs more sequences; what is larger is a mistake.
const COUNT_MAX: i64 = 1 << 30;

/// The numbers that the start would print.
pub async fn simulate(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let simulation = read(&app, &body.map)?;
    let loader = app.keeper.loader()?;
    let estimate = tokio::task::spawn_blocking(move || loader.simulate(&simulation)).await;
    let estimate = estimate
        .map_err(|error| ApiError::Internal(format!("The simulation's task failed: {error}")))?
        .map_err(|error| match error {
            LoadError::NeverFits(words) | LoadError::NoRoom(words) => ApiError::DoesNotFit(words),
            LoadError::Failed(words) => ApiError::malformed(format!("The model cannot be read: {words}")),
        })?;
    Ok(Json(answer(&estimate)))
}

fn read(app: &App, map: &Map<String, Value>) -> Result<Simulation, ApiError> {
    let fields = Fields::top(map);
    let count = |name: &str| {
        let number = fields.integer(name, 1..=COUNT_MAX)?;
        Ok::<_, ApiError>(number.and_then(|number| usize::try_from(number).ok()))
    };
    let target = match (fields.string("model")?, fields.string("path")?) {
        (Some(name), _) if !name.is_empty() => Target::Place(app.place(name)?),
        (_, Some(path)) => Target::Path(path.to_owned()),
        (_, None) => Target::Place(0),
    };
    let share = fields
        .number("gpu_memory_utilization", "above 0 and at most 1", |share| share > 0.0 && share <= 1.0)?;
    Ok(Simulation {
        target,
        max_model_len: count("max_model_len")?,
        max_num_seqs: count("max_num_seqs")?,
        kv_cache_dtype: fields.string("kv_cache_dtype")?.map(str::to_owned),
        share: share.map(f64::from),
    })
}

fn answer(estimate: &Estimate) -> Value {
    json!({
        "fits": estimate.fits(),
        "total_bytes": estimate.total,
        "weights_bytes": estimate.weights,
        "kv_bytes_per_token": estimate.kv_per_token,
        "ssm_state_bytes_per_seq": estimate.state_per_sequence,
        "activation_bytes": estimate.activations,
        // The host runs no graphs.
        "cuda_graph_bytes": 0,
        "free_bytes": estimate.free,
        "max_concurrency": estimate.concurrency,
        "max_model_len": estimate.max_model_len,
    })
}
