//! The response object: what it repeats of the request, its items and how it ended; and where it is kept.

use super::output::Output;
use super::request::ResponsesRequest;
use crate::api::envelope::unix_seconds;
use crate::api::error::ApiError;
use crate::api::state::App;
use crate::api::types::Common;
use crate::api::usage::Usage;
use futures_util::future::AbortHandle;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// An answer under way.
pub struct Answer {
    app: Arc<App>,
    id: String,
    pub output: Output,
    /// All fields, in order; those that change have the values of the beginning.
    fields: Map<String, Value>,
    /// What a follow-up continues beside the answer; `None` if nothing is kept.
    input: Option<Arc<Vec<Value>>>,
    background: bool,
}

impl Answer {
    pub fn new(app: &Arc<App>, request: ResponsesRequest, common: &Common) -> Self {
        let id = format!("resp_{}", app.ids.hex());
        let mut fields = Map::new();
        for (name, value) in [
            ("id", json!(id)),
            ("object", json!("response")),
            ("created_at", json!(unix_seconds())),
            ("status", json!("in_progress")),
            ("model", json!(common.model)),
            ("error", Value::Null),
            ("incomplete_details", Value::Null),
            ("output", json!([])),
            ("temperature", json!(common.sampling.temperature)),
            ("top_p", json!(common.sampling.top_p)),
        ] {
            fields.insert(name.into(), value);
        }
        fields.extend(request.repeated);
        fields.insert("usage".into(), Value::Null);
        Self {
            app: app.clone(),
            id,
            output: Output::new(app.clone(), request.shown),
            fields,
            input: request.store.then(|| Arc::new(request.items)),
            background: request.background,
        }
    }

    /// The response before anything is said, with one of the statuses `queued` and `in_progress`.
    pub fn begun(&self, status: &str) -> Value {
        let mut fields = self.fields.clone();
        fields.insert("status".into(), json!(status));
        Value::Object(fields)
    }

    /// The response that whoever asks for it gets until there is more; `running` ends the work. Errors: too many are
    /// made in the background already.
    pub fn enqueue(&self, running: AbortHandle) -> Result<Value, ApiError> {
        let queued = self.begun("queued");
        let input = self.input.clone().unwrap_or_default();
        self.app.responses.begin(&self.id, queued.clone(), input, running)?;
        Ok(queued)
    }

    /// Whoever asks for it hears that the work has begun.
    pub fn progress(&self) {
        if self.background {
            self.app.responses.progress(&self.id, self.begun("in_progress"));
        }
    }

    /// The whole response; from now on it can be asked for.
    pub fn completed(&self, usage: Usage) -> Value {
        let status = self.output.status();
        let mut response = self.begun(status);
        if status == "incomplete" {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        response["output"] = self.output.to_json();
        response["usage"] = usage_json(usage);
        self.keep(&response);
        response
    }

    /// What there is of a response that ended early.
    pub fn failed(&self, error: &ApiError) -> Value {
        let mut response = self.begun("failed");
        // One of the codes that clients know.
        response["error"] = json!({"code": "server_error", "message": error.body()["error"]["message"]});
        response["output"] = self.output.to_json();
        self.keep(&response);
        response
    }

    fn keep(&self, response: &Value) {
        match &self.input {
            Some(_) if self.background => self.app.responses.finish(&self.id, response.clone()),
            Some(input) => self.app.responses.insert(&self.id, response.clone(), input.clone()),
            None => {}
        }
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
