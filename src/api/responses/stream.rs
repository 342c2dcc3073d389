//! What happens to the items, as events: `added`, the pieces of a part, `done`, between the response's beginning and
//! its end.

use super::answer::Answer;
use super::output::{Change, Item, Kind, Progress};
use crate::api::conversation::{Piece, Reader};
use crate::api::error::ApiError;
use crate::api::generate::Update;
use crate::api::stream::{Frame, Frames};
use crate::api::usage::Usage;
use serde_json::{Map, Value, json};

/// The stream's wire form.
pub struct ResponseFrames {
    reader: Reader,
    pub answer: Answer,
    /// Numbers the events.
    next: u64,
}

impl Frames for ResponseFrames {
    /// The last event says by its name that it is the last.
    const END: Option<&'static str> = None;

    fn frames(&mut self, update: Update, _: Usage, _: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for chunk in self.reader.chunks(update) {
            if let Piece::Role { .. } = chunk.piece {
                self.answer.progress();
                for name in ["response.created", "response.in_progress"] {
                    frames.push(self.event(name, json!({"response": self.answer.begun("in_progress")})));
                }
                continue;
            }
            for change in self.answer.output.take(chunk) {
                self.change(change, &mut frames);
            }
        }
        frames
    }

    fn closing(&mut self, usage: Usage) -> Vec<Frame> {
        let response = self.answer.completed(usage);
        let complete = response["status"] == "completed";
        let name = if complete { "response.completed" } else { "response.incomplete" };
        vec![self.event(name, json!({"response": response}))]
    }

    fn failure(&mut self, error: &ApiError) -> Frame {
        let response = self.answer.failed(error);
        self.event("response.failed", json!({"response": response}))
    }
}

impl ResponseFrames {
    pub fn new(reader: Reader, answer: Answer) -> Self {
        Self { reader, answer, next: 0 }
    }

    fn change(&mut self, change: Change, frames: &mut Vec<Frame>) {
        match change {
            Change::Added(item) => {
                let added = json!({"output_index": item.index, "item": item.to_json()});
                frames.push(self.event("response.output_item.added", added));
                if !matches!(item.kind, Kind::Call { .. }) {
                    let part = at_part(&item, "part", item.part());
                    frames.push(self.event("response.content_part.added", part));
                }
            }
            Change::Grew(item) => frames.push(self.delta(item)),
            Change::Done(item) => {
                match item.kind {
                    Kind::Call { .. } => frames.extend(self.call_done(&item)),
                    _ => frames.extend(self.part_done(&item)),
                }
                let done = json!({"output_index": item.index, "item": item.to_json()});
                frames.push(self.event("response.output_item.done", done));
            }
        }
    }

    fn delta(&mut self, item: Item) -> Frame {
        let mut delta = at_part(&item, "delta", json!(item.text));
        let name = match item.kind {
            Kind::Reasoning => "response.reasoning_text.delta",
            Kind::Message { logprobs } => {
                delta["logprobs"] = Value::Array(logprobs);
                "response.output_text.delta"
            }
            Kind::Call { .. } => {
                delta = json!({"item_id": item.id, "output_index": item.index, "delta": item.text});
                "response.function_call_arguments.delta"
            }
        };
        self.event(name, delta)
    }

    fn part_done(&mut self, item: &Item) -> [Frame; 2] {
        let mut done = at_part(item, "text", json!(item.text));
        let name = match &item.kind {
            Kind::Message { logprobs } => {
                done["logprobs"] = json!(logprobs);
                "response.output_text.done"
            }
            _ => "response.reasoning_text.done",
        };
        let part = at_part(item, "part", item.part());
        [self.event(name, done), self.event("response.content_part.done", part)]
    }

    /// Nothing for a call that was cut: its arguments are not.
    fn call_done(&mut self, item: &Item) -> Option<Frame> {
        let Kind::Call { name, .. } = &item.kind else { return None };
        let done = json!({
            "item_id": item.id, "output_index": item.index, "arguments": item.text, "name": name,
        });
        (item.progress == Progress::Whole).then(|| self.event("response.function_call_arguments.done", done))
    }

    /// `fields` behind the event's own name and its number.
    fn event(&mut self, name: &'static str, fields: Value) -> Frame {
        let mut data = Map::new();
        data.insert("type".into(), json!(name));
        data.insert("sequence_number".into(), json!(self.next));
        self.next += 1;
        if let Value::Object(fields) = fields {
            data.extend(fields);
        }
        Frame { name: Some(name), data: Value::Object(data) }
    }
}

/// Something about the one part of an item.
fn at_part(item: &Item, name: &str, value: Value) -> Value {
    json!({"item_id": item.id, "output_index": item.index, "content_index": 0, name: value})
}
