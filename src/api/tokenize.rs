//! `POST /tokenize` and `/detokenize`.

use super::body::JsonBody;
use super::conversation::render;
use super::error::ApiError;
use super::state::{App, Resident};
use super::types::{DetokenizeRequest, TokenizeInput, TokenizeRequest};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

/// Text or a chat to ids; a chat's count equals `usage.prompt_tokens` of the same request.
pub async fn tokenize(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let resident = app.described(&body.map).await?;
    let resident = &resident;
    let request = TokenizeRequest::read(&body.map, app.rules(resident))?;
    let ids = ids(resident, request.input).await?;
    let strings = request.token_strings.then(|| {
        ids.iter().map(|id| resident.text.token_string(*id).unwrap_or_default()).collect::<Vec<_>>()
    });
    Ok(Json(json!({
        "count": ids.len(),
        "max_model_len": resident.model.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    })))
}

/// Errors: what cannot be rendered or encoded.
pub async fn ids(resident: &Resident, input: TokenizeInput) -> Result<Vec<u32>, ApiError> {
    match input {
        TokenizeInput::Chat(chat) => render(resident, chat).await,
        TokenizeInput::Text { text, add_special_tokens } => {
            let encoder = resident.text.clone();
            tokio::task::spawn_blocking(move || encoder.encode(&text, add_special_tokens))
                .await
                .map_err(|error| ApiError::Internal(format!("The tokenizer's task failed: {error}")))?
                .map_err(|error| ApiError::bad("prompt", format!("The prompt cannot be encoded: {error}.")))
        }
    }
}

/// Ids to text, control tokens included.
pub async fn detokenize(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let resident = app.described(&body.map).await?;
    let resident = &resident;
    let request = DetokenizeRequest::read(&body.map, app.rules(resident))?;
    let text = resident.text.decode(&request.ids, false);
    // llama-server calls it content.
    Ok(Json(json!({"prompt": text, "content": text})))
}
