//! A message: content blocks, why it ended, what it cost.

use crate::api::conversation::{Call, End, Piece};
use crate::api::usage::Usage;
use serde_json::{Value, json};

/// Of a thought. It comes back with the history and nobody looks at it; clients want it not to be empty.
pub const SIGNATURE: &str = "ZmVycm90cm9u";

/// What all parts of an answer share.
pub struct Head {
    pub id: String,
    /// As the client spelled it.
    pub model: String,
}

impl Head {
    /// The object `message`; `stop` is [`stop`]'s, or nothing while it goes on.
    pub fn message(&self, content: Vec<Value>, stop: (Value, Value), usage: Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop.0,
            "stop_sequence": stop.1,
            "usage": self::usage(usage),
        })
    }
}

/// `stop_reason` and `stop_sequence`. `called`: a whole call is in the answer, whoever chose it.
pub fn stop(end: &End, called: bool) -> (Value, Value) {
    match &end.stop_reason {
        _ if end.finish_reason == "length" => (json!("max_tokens"), Value::Null),
        _ if called => (json!("tool_use"), Value::Null),
        Value::String(sequence) => (json!("stop_sequence"), json!(sequence)),
        _ => (json!("end_turn"), Value::Null),
    }
}

/// The prompt's tokens in three parts: read, found in the cache, and written to it, which costs nothing here.
pub fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

/// The block of a call's name; its arguments are `input`.
pub fn tool_use(id: &str, name: &str, input: Value) -> Value {
    json!({"type": "tool_use", "id": tool_id(id), "name": name, "input": input})
}

fn tool_id(id: &str) -> String {
    format!("toolu_{}", id.strip_prefix("call_").unwrap_or(id))
}

/// A plain answer: the pieces of the stream in their order, joined to blocks.
#[derive(Default)]
pub struct Answer {
    blocks: Vec<Block>,
    /// Begun and not ended: left out if it never is, for half its arguments are no input.
    open: Option<Call>,
    end: Option<End>,
}

enum Block {
    Thought(String),
    Text(String),
    Use(Call),
}

impl Answer {
    pub fn push(&mut self, piece: Piece) {
        match piece {
            Piece::Role { .. } => {}
            Piece::Reasoning(more) => match self.blocks.last_mut() {
                Some(Block::Thought(text)) => text.push_str(&more),
                _ => self.blocks.push(Block::Thought(more)),
            },
            Piece::Content(more) => match self.blocks.last_mut() {
                Some(Block::Text(text)) => text.push_str(&more),
                _ => self.blocks.push(Block::Text(more)),
            },
            Piece::CallStart { id, name, .. } => {
                self.open = Some(Call { id, name, arguments: String::new() });
            }
            Piece::CallArguments { json, .. } => {
                if let Some(call) = &mut self.open {
                    call.arguments.push_str(&json);
                }
            }
            Piece::CallEnd => self.blocks.extend(self.open.take().map(Block::Use)),
            Piece::End(end) => self.end = Some(end),
        }
    }

    pub fn into_json(mut self, head: &Head, usage: Usage) -> Value {
        if self.blocks.is_empty() {
            self.blocks.push(Block::Text(String::new()));
        }
        let called = self.blocks.iter().any(|block| matches!(block, Block::Use(_)));
        let stop = self.end.map_or((Value::Null, Value::Null), |end| stop(&end, called));
        head.message(self.blocks.into_iter().map(Block::into_json).collect(), stop, usage)
    }
}

impl Block {
    fn into_json(self) -> Value {
        match self {
            Self::Thought(text) => json!({"type": "thinking", "thinking": text, "signature": SIGNATURE}),
            Self::Text(text) => json!({"type": "text", "text": text}),
            Self::Use(call) => {
                // The decoder's arguments are an object; what is not could only be our own fault.
                let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
                tool_use(&call.id, &call.name, input)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_cache_held_is_not_counted_twice() {
        let spent = Usage { prompt_tokens: 30, cached_tokens: 20, completion_tokens: 5, ..Usage::default() };
        let json = usage(spent);
        assert_eq!((&json["input_tokens"], &json["cache_read_input_tokens"]), (&json!(10), &json!(20)));
        assert_eq!(json["output_tokens"], 5);
    }

    #[test]
    fn a_limit_comes_before_a_call_and_a_call_before_a_stop_string() {
        let check = |finish_reason: &'static str, stop_reason: Value, called: bool, expected: [Value; 2]| {
            let end = End { finish_reason, stop_reason, reasoning_became_content: false, reasoned: false };
            assert_eq!(stop(&end, called), expected.into());
        };
        check("length", Value::Null, true, [json!("max_tokens"), Value::Null]);
        check("stop", Value::Null, true, [json!("tool_use"), Value::Null]);
        check("tool_calls", json!("x"), true, [json!("tool_use"), Value::Null]);
        check("stop", json!("x"), false, [json!("stop_sequence"), json!("x")]);
        check("stop", Value::Null, false, [json!("end_turn"), Value::Null]);
    }
}
