//! A streamed answer, put together again: its texts, its ids if they were asked for, and when they came.

use std::time::Instant;

use serde_json::{Value, json};

/// What a stream has said so far; one choice.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub content: String,
    pub reasoning: String,
    pub calls: Vec<Call>,
    /// `return_token_ids`: of the prompt and of the answer.
    pub prompt_ids: Vec<u32>,
    pub ids: Vec<u32>,
    pub usage: Usage,
    pub finish_reason: Option<String>,
    /// When each chunk came that carries text or a call.
    pub times: Vec<Instant>,
    /// When the first and the last event came, whatever they carry. Servers open a stream with the first token.
    pub first: Option<Instant>,
    pub last: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// JSON, as it streamed.
    pub arguments: String,
}

/// Of the last chunk that has one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    pub output: usize,
    pub cached: usize,
}

impl Answer {
    /// Takes in an event of `/v1/completions` or `/v1/chat/completions`.
    pub fn push(&mut self, event: &Value, now: Instant) {
        self.first.get_or_insert(now);
        self.last = Some(now);
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            let count = |value: &Value| value.as_u64().unwrap_or(0) as usize;
            self.usage = Usage {
                prompt: count(&usage["prompt_tokens"]),
                output: count(&usage["completion_tokens"]),
                cached: count(&usage["prompt_tokens_details"]["cached_tokens"]),
            };
        }
        extend_ids(&mut self.prompt_ids, &event["prompt_token_ids"]);
        let choice = &event["choices"][0];
        extend_ids(&mut self.ids, &choice["token_ids"]);
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = Some(reason.to_owned());
        }
        if self.take_text(choice) {
            self.times.push(now);
        }
    }

    /// Whether the chunk said something.
    fn take_text(&mut self, choice: &Value) -> bool {
        let delta = &choice["delta"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let content = text(&choice["text"]) + &text(&delta["content"]);
        // Both names hold the same text where both are there.
        let reasoning = text(if delta["reasoning"].is_string() {
            &delta["reasoning"]
        } else {
            &delta["reasoning_content"]
        });
        self.content.push_str(&content);
        self.reasoning.push_str(&reasoning);
        let calls = delta["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
        calls.iter().for_each(|piece| self.take_call(piece));
        !(content.is_empty() && reasoning.is_empty() && calls.is_empty())
    }

    fn take_call(&mut self, piece: &Value) {
        let index = piece["index"].as_u64().unwrap_or(0) as usize;
        // Calls come one after the other; a server that leaves some out is not followed.
        if index == self.calls.len() {
            self.calls.push(Call::default());
        }
        let Some(call) = self.calls.get_mut(index) else { return };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        call.id += &text(&piece["id"]);
        call.name += &text(&piece["function"]["name"]);
        call.arguments += &text(&piece["function"]["arguments"]);
    }

    /// The turn that a client appends to its history.
    pub fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.content});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = json!(self.reasoning);
        }
        if !self.calls.is_empty() {
            let call = |call: &Call| json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}});
            message["tool_calls"] = self.calls.iter().map(call).collect();
        }
        message
    }
}

fn extend_ids(ids: &mut Vec<u32>, value: &Value) {
    let numbers = value.as_array().map_or(&[][..], Vec::as_slice);
    ids.extend(numbers.iter().filter_map(Value::as_u64).map(|id| id as u32));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thought_a_call_and_the_counts_are_put_together() {
        let mut answer = Answer::default();
        for event in [
            json!({"prompt_token_ids": [1, 2], "choices": [{"delta": {"role": "assistant", "content": ""}}]}),
            json!({"choices": [{"delta": {"reasoning": "I ", "reasoning_content": "I "}, "token_ids": [5]}]}),
            json!({"choices": [{"delta": {"reasoning_content": "look."}, "token_ids": [6, 7]}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]}),
            json!({"choices": [{"delta": {}, "finish_reason": "tool_calls", "token_ids": [8]}]}),
            json!({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1}}}),
        ] {
            answer.push(&event, Instant::now());
        }
        assert_eq!(answer.usage, Usage { prompt: 2, output: 4, cached: 1 });
        assert_eq!((answer.prompt_ids.as_slice(), answer.ids.as_slice()), (&[1, 2][..], &[5, 6, 7, 8][..]));
        assert_eq!((answer.times.len(), answer.finish_reason.as_deref()), (4, Some("tool_calls")));
        assert_eq!(
            answer.message(),
            json!({
                "role": "assistant", "content": "", "reasoning_content": "I look.",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            })
        );
    }
}
