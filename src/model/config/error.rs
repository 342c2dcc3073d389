//! What can be wrong with a configuration.

/// A `config.json` that cannot be served. Each variant names the field, the expected and the got.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("{file} is not JSON: {reason}")]
    Json { file: &'static str, reason: String },

    #[error("model_type: expected nemotron_h or nemotron_h_puzzle; got {got}")]
    UnknownModel { got: String },

    #[error("{field}: missing; expected {expected}")]
    Missing { field: String, expected: &'static str },

    #[error("{field}: expected {expected}; got {got}")]
    Invalid { field: String, expected: String, got: String },

    #[error(
        "{field}: unknown layer kind {got} at position {position}; expected M, E, *, - or mamba, linear_attention, \
         moe, attention, full_attention, mlp"
    )]
    UnknownLayer { field: String, position: usize, got: String },

    #[error("{what}: {got} is not divisible by {divisor}, which {why} asks for")]
    NotDivisible { what: &'static str, got: usize, divisor: usize, why: &'static str },

    #[error("{field} = {got} is not supported; every released checkpoint has {expected}")]
    Unsupported { field: String, expected: &'static str, got: String },
}
