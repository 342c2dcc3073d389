//! What is asked: bodies of requests drawn by seeded chance.

use serde_json::{Value, json};

use crate::cli::bench::agents::world::{self, World};
use crate::cli::bench::chance::Chance;

/// What a client does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A conversation of several turns, streamed.
    Chat,
    /// Plain text, streamed or not.
    Completion,
    /// Several answers to one prompt.
    Several,
    /// A stream that its reader leaves half-way, or before it begins.
    Dropped,
    /// A stream whose reader takes its time.
    Slow,
    /// An answer in the form of a schema.
    Schema,
    /// Calls of tools, and what they bring.
    Tools,
    /// A thought of bounded length.
    Budget,
    /// Less time than the answer needs.
    Timeout,
    /// What a server must not take.
    Refused,
}

pub const KINDS: [Kind; 10] = [
    Kind::Chat,
    Kind::Completion,
    Kind::Several,
    Kind::Dropped,
    Kind::Slow,
    Kind::Schema,
    Kind::Tools,
    Kind::Budget,
    Kind::Timeout,
    Kind::Refused,
];

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completion => "completion",
            Self::Several => "several answers",
            Self::Dropped => "dropped",
            Self::Slow => "slow reader",
            Self::Schema => "schema",
            Self::Tools => "tools",
            Self::Budget => "thinking budget",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
        }
    }
}

/// Draws bodies, the same ones for the same seed.
pub struct Mix {
    pub chance: Chance,
    pub world: World,
    model: String,
}

impl Mix {
    pub fn new(model: String, seed: u64) -> Self {
        Self { chance: Chance::new(seed), world: World::new(seed), model }
    }

    pub fn kind(&mut self) -> Kind {
        *self.chance.pick(&KINDS)
    }

    /// A system prompt, from a few that many share, and a first question.
    pub fn opening(&mut self) -> Vec<Value> {
        let mut shared = World::new(self.chance.below(4) as u64);
        let facts: Vec<String> = (0..1 + self.chance.below(12)).map(|_| shared.fact()).collect();
        let system = format!("{} {}", world::OPENING, facts.join(" "));
        vec![json!({"role": "system", "content": system}), self.question()]
    }

    pub fn question(&mut self) -> Value {
        json!({"role": "user", "content": self.world.question()})
    }

    pub fn chat(&mut self, messages: &[Value], stream: bool) -> Value {
        let mut body = self.common(stream);
        body["messages"] = json!(messages);
        body["chat_template_kwargs"] = json!({"enable_thinking": self.chance.below(2) == 0});
        body
    }

    pub fn completion(&mut self, stream: bool) -> Value {
        let mut body = self.common(stream);
        body["prompt"] = json!(self.world.fact());
        if self.chance.below(4) == 0 {
            body["logprobs"] = json!(2);
        }
        body
    }

    /// The schema that [`fits`] looks for.
    pub fn schema(&mut self) -> Value {
        let messages = self.opening();
        let mut body = self.chat(&messages, false);
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["ok", "day"],
            "properties": {"ok": {"type": "boolean"}, "day": {"enum": ["Monday", "Friday"]}},
        });
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": "plan", "schema": schema}});
        body["chat_template_kwargs"] = json!({"enable_thinking": false});
        body["max_tokens"] = json!(200);
        body
    }

    /// A body that each server of this API answers with 400, and the route for it is that of chats.
    pub fn refused(&mut self) -> Value {
        let wrong = [
            ("messages", json!([])),
            ("messages", json!([{"role": "nobody", "content": "?"}])),
            ("max_tokens", json!(-1)),
            ("temperature", json!(-3)),
            ("n", json!(0)),
            ("timeout", json!(0)),
            ("cache_salt", json!("a@b")),
            ("speculation", json!("sometimes")),
            ("response_format", json!({"type": "poem"})),
            ("priority", json!("first")),
        ];
        let messages = self.opening();
        let mut body = self.chat(&messages, false);
        let (field, value) = self.chance.pick(&wrong);
        body[*field] = value.clone();
        body
    }

    /// Fields of either route: length, chance, drafts, class and salt.
    fn common(&mut self, stream: bool) -> Value {
        let mut body =
            json!({"model": self.model, "stream": stream, "max_tokens": 4 + self.chance.below(60)});
        if self.chance.below(2) == 0 {
            body["temperature"] = json!(0);
        } else {
            body["temperature"] = json!(0.8);
            body["seed"] = json!(self.chance.below(1000));
        }
        let drafts = [json!("off"), json!("auto"), json!(2), json!({"method": "ngram"}), json!(null)];
        match self.chance.pick(&drafts) {
            Value::Null => {}
            drafts => body["speculation"] = drafts.clone(),
        }
        if self.chance.below(4) == 0 {
            body["priority"] = json!(self.chance.below(5) as i64 - 2);
        }
        match self.chance.below(8) {
            // Nobody uses it again.
            0 => body["cache_salt"] = json!(format!("once-{}", self.chance.below(usize::MAX))),
            1 | 2 => body["cache_salt"] = json!(format!("shared-{}", self.chance.below(3))),
            _ => {}
        }
        body
    }
}

/// Whether `content` has the form of [`Mix::schema`].
pub fn fits(content: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(content) else { return false };
    value["ok"].is_boolean() && ["Monday", "Friday"].iter().any(|day| value["day"] == *day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_asks_the_same_again() {
        let ask = |seed| {
            let mut mix = Mix::new("tiny".to_owned(), seed);
            let bodies = (0..20).map(|_| mix.completion(true).to_string() + &mix.refused().to_string());
            bodies.collect::<Vec<_>>()
        };
        assert_eq!(ask(1), ask(1));
        assert_ne!(ask(1), ask(2));
    }

    #[test]
    fn an_answer_must_have_the_form_of_the_schema() {
        assert!(fits(r#"{"ok": true, "day": "Friday"}"#));
        for wrong in ["", "{}", r#"{"ok": 1, "day": "Friday"}"#, r#"{"ok": true, "day": "Sunday"}"#] {
            assert!(!fits(wrong), "{wrong}");
        }
    }
}
