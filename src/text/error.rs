//! What can go wrong between text and ids.

/// Errors of the `text` room. A user's mistake is a value: each variant names the thing, what was expected
/// and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `tokenizer.json` is empty, is not JSON, or is not a tokenizer.
    #[error("tokenizer.json: expected a Hugging Face tokenizer, got {got}")]
    Tokenizer { got: String },
    /// Only byte-level vocabularies can give the exact bytes of a token.
    #[error("tokenizer.json: expected a ByteLevel decoder, got {got}")]
    NotByteLevel { got: String },
    #[error("tokenizer_config.json: expected a JSON object, got {got}")]
    TokenizerConfig { got: String },
    /// A chat was given, but neither the checkpoint nor the request has a template.
    #[error(
        "chat template: expected chat_template.jinja or a chat_template in tokenizer_config.json, got none"
    )]
    NoTemplate,
    /// The template cannot be parsed, or failed while it was rendered.
    #[error("chat template, line {line}: {got}")]
    Template { line: usize, got: String },
    /// The template called `raise_exception`: it refuses this conversation.
    #[error("chat template refused the messages: {message}")]
    Refused { message: String },
    /// A bound of rendering was reached.
    #[error("chat template: expected at most {limit} {what}, got more")]
    Limit { what: &'static str, limit: usize },
    #[error("continue_final_message: expected {expected}, got {got}")]
    Continue { expected: &'static str, got: &'static str },
    /// A tool that cannot be called in this model's markup.
    #[error("tools: {got}")]
    Unspeakable { got: String },
    #[error("the text cannot be encoded: {got}")]
    Encode { got: String },
}
