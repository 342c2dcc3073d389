//! The events of a message: `message_start`, its content blocks one after the other, `message_delta`, `message_stop`.

use super::answer::{self, Head, SIGNATURE};
use crate::api::conversation::{End, Piece, Reader};
use crate::api::error::ApiError;
use crate::api::generate::Update;
use crate::api::stream::{Frame, Frames};
use crate::api::usage::Usage;
use axum::response::sse::Event;
use serde_json::{Value, json};

/// The stream's wire form. One block is open at a time; indices count from 0 without a gap.
pub struct MessageFrames {
    reader: Reader,
    head: Head,
    request_id: String,
    open: Option<Kind>,
    /// Blocks begun so far.
    begun: usize,
    /// A whole call was sent.
    called: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thought,
    Text,
    Use,
}

impl MessageFrames {
    pub fn new(reader: Reader, head: Head, request_id: String) -> Self {
        Self { reader, head, request_id, open: None, begun: 0, called: false }
    }

    fn piece(&mut self, piece: Piece, usage: Usage, frames: &mut Vec<Frame>) {
        match piece {
            Piece::Role { .. } => {}
            Piece::Reasoning(text) => {
                let block = json!({"type": "thinking", "thinking": "", "signature": ""});
                self.go_on(Kind::Thought, block, frames);
                frames.push(self.delta(json!({"type": "thinking_delta", "thinking": text})));
            }
            Piece::Content(text) => {
                self.go_on(Kind::Text, json!({"type": "text", "text": ""}), frames);
                frames.push(self.delta(json!({"type": "text_delta", "text": text})));
            }
            Piece::CallStart { id, name, .. } => {
                self.begin(Kind::Use, answer::tool_use(&id, &name, json!({})), frames);
            }
            Piece::CallArguments { json, .. } => {
                frames.push(self.delta(json!({"type": "input_json_delta", "partial_json": json})));
            }
            Piece::CallEnd => {
                self.called = true;
                self.stop(frames);
            }
            Piece::End(end) => self.end(&end, usage, frames),
        }
    }

    /// The open block if it is of this kind; else it ends and `block` begins.
    fn go_on(&mut self, kind: Kind, block: Value, frames: &mut Vec<Frame>) {
        if self.open != Some(kind) {
            self.begin(kind, block, frames);
        }
    }

    fn begin(&mut self, kind: Kind, block: Value, frames: &mut Vec<Frame>) {
        self.stop(frames);
        self.open = Some(kind);
        self.begun += 1;
        frames.push(frame("content_block_start", json!({"index": self.index(), "content_block": block})));
    }

    /// Ends the open block, if there is one.
    fn stop(&mut self, frames: &mut Vec<Frame>) {
        let Some(kind) = self.open.take() else { return };
        if kind == Kind::Thought {
            frames.push(self.delta(json!({"type": "signature_delta", "signature": SIGNATURE})));
        }
        frames.push(frame("content_block_stop", json!({"index": self.index()})));
    }

    fn end(&mut self, end: &End, usage: Usage, frames: &mut Vec<Frame>) {
        if self.begun == 0 {
            self.begin(Kind::Text, json!({"type": "text", "text": ""}), frames);
        }
        self.stop(frames);
        let (reason, sequence) = answer::stop(end, self.called);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        frames.push(frame("message_delta", json!({"delta": delta, "usage": answer::usage(usage)})));
    }

    fn delta(&self, delta: Value) -> Frame {
        frame("content_block_delta", json!({"index": self.index(), "delta": delta}))
    }

    /// Of the block that began last.
    fn index(&self) -> usize {
        self.begun.saturating_sub(1)
    }
}

impl Frames for MessageFrames {
    const END: Option<&'static str> = None;

    /// At once, because nothing else may come before it, and a long prompt is read to the sound of pings. What the
    /// cache held is known later: the usage of `message_delta` is the last word.
    fn opening(&mut self, usage: Usage) -> Vec<Frame> {
        let message = self.head.message(Vec::new(), (Value::Null, Value::Null), usage);
        vec![frame("message_start", json!({"message": message}))]
    }

    fn frames(&mut self, update: Update, usage: Usage, _is_last: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for chunk in self.reader.chunks(update) {
            self.piece(chunk.piece, usage, &mut frames);
        }
        frames
    }

    fn closing(&mut self, _usage: Usage) -> Vec<Frame> {
        vec![frame("message_stop", json!({}))]
    }

    fn failure(&mut self, error: &ApiError) -> Frame {
        Frame { name: Some("error"), data: super::error(error, &self.request_id) }
    }

    fn idle() -> Event {
        Event::default().event("ping").data(json!({"type": "ping"}).to_string())
    }
}

/// An event whose data repeats its name, before all else.
fn frame(name: &'static str, rest: Value) -> Frame {
    let mut data = json!({"type": name});
    if let (Value::Object(data), Value::Object(rest)) = (&mut data, rest) {
        data.extend(rest);
    }
    Frame { name: Some(name), data }
}
