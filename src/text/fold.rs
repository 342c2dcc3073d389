//! A plain answer is the stream, collected.

use super::Delta;

/// A whole message. Texts are None where nothing was said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    pub reasoning: Option<String>,
    pub content: Option<String>,
    pub calls: Vec<Call>,
}

/// A complete call. `arguments` is JSON: the joined pieces, exactly as they streamed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    pub arguments: String,
}

/// Collects deltas.
#[derive(Debug, Clone, Default)]
pub struct Fold {
    answer: Answer,
    open: Option<Call>,
}

impl Fold {
    pub fn push(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => self.answer.reasoning.get_or_insert_default().push_str(&text),
            Delta::Content(text) => self.answer.content.get_or_insert_default().push_str(&text),
            Delta::CallStart { name, .. } => self.open = Some(Call { name, arguments: String::new() }),
            Delta::CallArguments { json, .. } => {
                if let Some(call) = &mut self.open {
                    call.arguments.push_str(&json);
                }
            }
            Delta::CallEnd { .. } => self.answer.calls.extend(self.open.take()),
        }
    }

    /// The message. A call without its end is left out. `reasoning_became_content` is the decoder's word that the
    /// content is the reasoning, sent once more; the message then has it once.
    pub fn finish(mut self, reasoning_became_content: bool) -> Answer {
        if reasoning_became_content {
            self.answer.reasoning = None;
        }
        self.answer
    }
}
