//! `truncation: auto`: a conversation that has become too long loses its oldest turns.

use crate::api::conversation::Extent;
use crate::api::error::ApiError;
use crate::api::state::App;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Leaves out as few of the oldest turns as make `chat` (a body of `/v1/chat/completions`) fit the context with room
/// for an answer. What the system said stays, and so does the last turn, even if it does not fit.
pub async fn to_context(app: &Arc<App>, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Extent { len, context_len: context } = Extent::of(app, chat).await?;
    if len < context {
        return Ok(());
    }
    let Some(Value::Array(messages)) = chat.get("messages").cloned() else { return Ok(()) };
    let starts: Vec<usize> = (0..messages.len()).filter(|index| messages[*index]["role"] == "user").collect();
    let asked =
        chat.get("max_completion_tokens").and_then(Value::as_u64).and_then(|len| usize::try_from(len).ok());
    // An eighth for an answer that names no length; and a long answer wished for must not cost all of the past.
    let room = asked.unwrap_or(context / 8).min(context / 2);
    // Each turn less is a shorter prompt, so the first cut that fits is found by halving.
    let (mut low, mut high) = (1, starts.len().saturating_sub(1));
    while low < high {
        let middle = (low + high) / 2;
        chat.insert("messages".into(), from(&messages, starts[middle]));
        if Extent::of(app, chat).await?.len + room <= context {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if let Some(start) = starts.get(high) {
        chat.insert("messages".into(), from(&messages, *start));
    }
    Ok(())
}

/// The messages from `start` on, behind all that the system said before.
fn from(messages: &[Value], start: usize) -> Value {
    let stays = |(index, message): &(usize, &Value)| {
        *index >= start || message["role"] == "system" || message["role"] == "developer"
    };
    messages.iter().enumerate().filter(stays).map(|(_, message)| message.clone()).collect()
}
