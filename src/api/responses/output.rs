//! The items of an answer: thoughts, messages and calls, in the order in which they came. The plain answer and the
//! stream are both read off this, so they cannot differ.

use crate::api::conversation::{Chunk, Piece};
use crate::api::state::App;
use serde_json::{Value, json};
use std::sync::Arc;

/// What precedes a thought in `encrypted_content`: our own are not secret, and those of others cannot be read.
pub const THOUGHT_MARK: &str = "ferrotron:";

/// What an answer shows beside its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shown {
    /// `include: ["message.output_text.logprobs"]` or `top_logprobs`.
    pub logprobs: bool,
    /// `include: ["reasoning.encrypted_content"]`: clients that keep no more of a thought than that send it back.
    pub encrypted: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    Reasoning,
    Message { logprobs: Vec<Value> },
    Call { call_id: String, name: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Open,
    Whole,
    /// The answer ended within it.
    Cut,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub id: String,
    /// Where it stands among the items of the answer.
    pub index: usize,
    pub kind: Kind,
    /// The text, or a call's arguments.
    pub text: String,
    pub progress: Progress,
    shown: Shown,
}

/// What one chunk did to the items.
#[derive(Debug, PartialEq)]
pub enum Change {
    Added(Item),
    /// Text that the open item went on with. Its [`Item::text`] holds no more than that.
    Grew(Item),
    Done(Item),
}

/// The items so far.
pub struct Output {
    app: Arc<App>,
    shown: Shown,
    done: Vec<Item>,
    open: Option<Item>,
    finish_reason: Option<&'static str>,
}

impl Output {
    pub fn new(app: Arc<App>, shown: Shown) -> Self {
        Self { app, shown, done: Vec::new(), open: None, finish_reason: None }
    }

    /// Takes in what came next.
    pub fn take(&mut self, chunk: Chunk) -> Vec<Change> {
        let mut changes = Vec::new();
        match chunk.piece {
            Piece::Role { .. } => {}
            Piece::Reasoning(text) => {
                self.turn_to(Kind::Reasoning, &mut changes);
                changes.extend(self.grow(text, Vec::new()));
            }
            Piece::Content(text) => {
                let begins = !matches!(&self.open, Some(Item { kind: Kind::Message { .. }, .. }));
                let scores = match (self.shown.logprobs, begins) {
                    (false, _) => Vec::new(),
                    (true, true) => spoken(chunk.logprobs, &text),
                    (true, false) => chunk.logprobs,
                };
                self.turn_to(Kind::Message { logprobs: Vec::new() }, &mut changes);
                changes.extend(self.grow(text, scores));
            }
            Piece::CallStart { id: call_id, name, .. } => {
                self.close(Progress::Whole, &mut changes);
                changes.push(self.add(Kind::Call { call_id, name }));
            }
            Piece::CallArguments { json, .. } => changes.extend(self.grow(json, Vec::new())),
            Piece::CallEnd => self.close(Progress::Whole, &mut changes),
            Piece::End(end) => self.end(end.finish_reason, &mut changes),
        }
        changes
    }

    /// `completed`, or `incomplete` if the answer was cut; in any case only once it has ended.
    pub fn status(&self) -> &'static str {
        if self.finish_reason == Some("length") { "incomplete" } else { "completed" }
    }

    /// All whole items. A call that was cut is none: nobody could carry it out.
    pub fn to_json(&self) -> Value {
        let of_use =
            |item: &&Item| !(item.progress == Progress::Cut && matches!(item.kind, Kind::Call { .. }));
        self.done.iter().filter(of_use).map(Item::to_json).collect()
    }

    fn end(&mut self, finish_reason: &'static str, changes: &mut Vec<Change>) {
        let cut = finish_reason == "length";
        self.finish_reason = Some(finish_reason);
        let open_call = matches!(&self.open, Some(Item { kind: Kind::Call { .. }, .. }));
        self.close(if cut || open_call { Progress::Cut } else { Progress::Whole }, changes);
        // Who looks for the message of an answer that came to its end finds one, if there is nothing else to do.
        if !cut && self.done.iter().all(|item| item.kind == Kind::Reasoning) {
            self.turn_to(Kind::Message { logprobs: Vec::new() }, changes);
            self.close(Progress::Whole, changes);
        }
    }

    /// Goes on with an open item of this kind, or begins one.
    fn turn_to(&mut self, kind: Kind, changes: &mut Vec<Change>) {
        let goes_on = |item: &Item| std::mem::discriminant(&item.kind) == std::mem::discriminant(&kind);
        if !self.open.as_ref().is_some_and(goes_on) {
            self.close(Progress::Whole, changes);
            changes.push(self.add(kind));
        }
    }

    fn add(&mut self, kind: Kind) -> Change {
        let prefix = match kind {
            Kind::Reasoning => "rs",
            Kind::Message { .. } => "msg",
            Kind::Call { .. } => "fc",
        };
        let item = Item {
            id: format!("{prefix}_{}", self.app.ids.hex()),
            index: self.done.len(),
            kind,
            text: String::new(),
            progress: Progress::Open,
            shown: self.shown,
        };
        self.open = Some(item.clone());
        Change::Added(item)
    }

    fn grow(&mut self, text: String, scores: Vec<Value>) -> Option<Change> {
        let open = self.open.as_mut()?;
        open.text.push_str(&text);
        let kind = match &mut open.kind {
            Kind::Message { logprobs } => {
                logprobs.extend(scores.iter().cloned());
                Kind::Message { logprobs: scores }
            }
            other => other.clone(),
        };
        let (id, index) = (open.id.clone(), open.index);
        Some(Change::Grew(Item { id, index, kind, text, progress: Progress::Open, shown: self.shown }))
    }

    fn close(&mut self, progress: Progress, changes: &mut Vec<Change>) {
        let Some(mut item) = self.open.take() else { return };
        item.progress = progress;
        self.done.push(item.clone());
        changes.push(Change::Done(item));
    }
}

impl Item {
    /// As it stands in `output`.
    pub fn to_json(&self) -> Value {
        let status = match self.progress {
            Progress::Open => "in_progress",
            Progress::Whole => "completed",
            Progress::Cut => "incomplete",
        };
        let parts = || if self.progress == Progress::Open { json!([]) } else { json!([self.part()]) };
        match &self.kind {
            Kind::Reasoning => json!({
                "type": "reasoning", "id": self.id, "summary": [], "content": parts(),
                "encrypted_content": self.encrypted(),
                "status": if self.progress == Progress::Whole { Value::Null } else { json!(status) },
            }),
            Kind::Message { .. } => json!({
                "type": "message", "id": self.id, "role": "assistant", "status": status, "content": parts(),
            }),
            Kind::Call { call_id, name } => json!({
                "type": "function_call", "id": self.id, "call_id": call_id, "name": name,
                "arguments": self.text, "status": status,
            }),
        }
    }

    /// The one part that a thought or a message has.
    pub fn part(&self) -> Value {
        match &self.kind {
            Kind::Message { logprobs } => json!({
                "type": "output_text", "text": self.text, "annotations": [],
                "logprobs": self.shown.logprobs.then_some(logprobs),
            }),
            _ => json!({"type": "reasoning_text", "text": self.text}),
        }
    }

    fn encrypted(&self) -> Option<String> {
        (self.shown.encrypted && self.progress != Progress::Open)
            .then(|| format!("{THOUGHT_MARK}{}", self.text))
    }
}

/// The entries from the first one whose token is in `text`: before it come those that ended the thought.
fn spoken(entries: Vec<Value>, text: &str) -> Vec<Value> {
    let is_said = |entry: &Value| {
        let bytes = entry["bytes"].as_array().into_iter().flatten();
        let bytes: Vec<u8> = bytes.filter_map(|byte| u8::try_from(byte.as_u64()?).ok()).collect();
        let first = bytes.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(bytes.len());
        let (whole, bare) = (&bytes[..], &bytes[first..]);
        let said = |bytes: &[u8]| text.as_bytes().starts_with(bytes) || bytes.starts_with(text.as_bytes());
        // Line breaks before the first word are no part of the text.
        !bytes.is_empty() && (said(whole) || !bare.is_empty() && said(bare))
    };
    let start = entries.iter().position(is_said).unwrap_or(entries.len());
    entries.into_iter().skip(start).collect()
}
