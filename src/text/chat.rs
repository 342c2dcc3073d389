//! A conversation, normalised: what `api` makes of any wire format and `Text::render` makes a prompt of.

use serde_json::{Map, Value};

/// What a template renders.
#[derive(Debug, Clone, Default)]
pub struct Chat {
    pub messages: Vec<Message>,
    /// Tool definitions as the client sent them: `{"type": "function", "function": {..}}` or the function itself.
    pub tools: Vec<Value>,
    /// `chat_template_kwargs`: variables of the template.
    pub kwargs: Map<String, Value>,
    /// Ends the prompt with the opening of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends the prompt in the middle of the final message, which the model then continues. Excludes
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// A template in place of the checkpoint's. Time and output are bounded, memory inside an expression is not:
    /// accept it only from clients who are trusted.
    pub template: Option<String>,
}

/// One message; content is text already (parts joined).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    pub role: String,
    pub content: Option<String>,
    pub reasoning: Option<String>,
    pub tool_calls: Vec<ToolCall>,
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
}

/// A call in the history.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToolCall {
    pub id: Option<String>,
    pub name: String,
    /// An object, or the JSON string of one.
    pub arguments: Value,
}
