//! What all answers of one request share: id, time, model; and how tokens are shown.

use super::model::ModelInfo;
use super::state::Resident;
use super::types::Common;
use crate::engine::TokenLogprobs;
use crate::text::Text;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Log-probabilities of minus infinity have no JSON; clients know this number.
const LOGPROB_MIN: f32 = -9999.0;

/// The constant head of every answer and chunk.
#[derive(Debug, Clone)]
pub struct Envelope {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Envelope {
    /// `prefix` names the kind of answer (`chatcmpl`), `request_id` is the one of the HTTP layer.
    pub fn new(prefix: &str, common: &Common, request_id: &str) -> Self {
        let id = common.request_id.as_deref().unwrap_or(request_id);
        Self { id: format!("{prefix}-{id}"), created: unix_seconds(), model: common.model.clone() }
    }

    /// `{"id","object","created","model"}`
    pub fn head(&self, object: &str) -> Map<String, Value> {
        let mut head = Map::new();
        head.insert("id".into(), json!(self.id));
        head.insert("object".into(), json!(object));
        head.insert("created".into(), json!(self.created));
        head.insert("model".into(), json!(self.model));
        head
    }
}

/// Names the build and the model: equal fingerprints and seeds give equal answers.
pub fn fingerprint(model: &ModelInfo) -> String {
    let sum = model.root.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        // FNV-1a: a name for the eye, nothing depends on it.
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("ferrotron-{}-{:08x}", env!("CARGO_PKG_VERSION"), sum as u32)
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// Shows ids as clients want to see them.
#[derive(Clone)]
pub struct TokenView {
    pub text: Arc<Text>,
    /// `token_id:7` instead of the token's text.
    pub as_ids: bool,
}

impl TokenView {
    pub fn new(resident: &Resident, common: &Common) -> Self {
        Self { text: resident.text.clone(), as_ids: common.tokens_as_ids }
    }

    /// The token's text, with U+FFFD for half a character.
    pub fn label(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.text.token_string(id).unwrap_or_default() }
    }

    /// An entry of a chat's `logprobs.content`. `bytes` are the token's own, so that joining them gives the text
    /// even where a token holds half a character.
    pub fn chat_entry(&self, id: u32, logprobs: &TokenLogprobs) -> Value {
        let top: Vec<Value> = logprobs.top.iter().map(|(id, logprob)| self.scored(*id, *logprob)).collect();
        let mut entry = self.scored(id, logprobs.logprob);
        if let Value::Object(entry) = &mut entry {
            entry.insert("top_logprobs".into(), Value::Array(top));
        }
        entry
    }

    fn scored(&self, id: u32, logprob: f32) -> Value {
        let bytes = self.text.token_bytes(id).unwrap_or_default();
        json!({"token": self.label(id), "logprob": finite(logprob), "bytes": bytes})
    }

    /// vLLM's `prompt_logprobs`: for each prompt id a map from id to score; `null` for the first.
    pub fn prompt_scores(&self, prompt: &[u32], scores: &[Option<TokenLogprobs>]) -> Value {
        let entry = |(id, scored): (&u32, &Option<TokenLogprobs>)| {
            let Some(scored) = scored else { return Value::Null };
            let mut map = Map::new();
            let mut add = |id: u32, logprob: f32, rank: Value| {
                let token = self.text.token_string(id).unwrap_or_default();
                let score = json!({"logprob": finite(logprob), "rank": rank, "decoded_token": token});
                map.insert(id.to_string(), score);
            };
            // The rank of the id itself is known only if it is among the best.
            let rank = scored.top.iter().position(|(other, _)| other == id).map(|rank| rank + 1);
            add(*id, scored.logprob, json!(rank));
            for (rank, (other, logprob)) in
                scored.top.iter().enumerate().filter(|(_, (other, _))| other != id)
            {
                add(*other, *logprob, json!(rank + 1));
            }
            Value::Object(map)
        };
        prompt.iter().zip(scores).map(entry).collect()
    }
}

/// What JSON can say of a log-probability.
pub fn finite(logprob: f32) -> f32 {
    // NaN cannot come from the sampler, which refuses such logits.
    if logprob.is_finite() { logprob } else { LOGPROB_MIN }
}
