//! Errors in Ollama's shape.

use crate::api::error::ApiError;
use serde_json::{Value, json};

/// `{"error":"…"}`
pub fn body(error: &ApiError) -> Value {
    json!({"error": match error {
        // The words that clients look for before they pull a model.
        ApiError::UnknownModel { name, .. } => ApiError::malformed(format!("model '{name}' not found")).message(),
        other => other.message(),
    }})
}
