//! What the wire must know of the resident model to validate a request and to introduce itself.

use super::error::ApiError;

/// The model behind the server, as clients see it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Accepted `model` values; never empty, the first is canonical.
    pub served_names: Vec<String>,
    /// The path or repository given on the command line.
    pub root: String,
    /// Unix seconds of the start.
    pub created: u64,
    /// Context length in tokens: prompt and answer together.
    pub max_model_len: usize,
    /// V: ids below it exist.
    pub vocab_size: usize,
    /// The checkpoint's stop set; not applied under `ignore_eos`.
    pub stop_ids: Vec<u32>,
    pub defaults: SamplingDefaults,
    pub facts: Facts,
}

/// What every model here can do, in Ollama's words.
pub const CAPABILITIES: [&str; 3] = ["completion", "tools", "thinking"];

/// What a model is made of, for lists of models; no answer depends on it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// As GGUF names it: `nemotron_h` or `nemotron_h_moe`.
    pub architecture: &'static str,
    /// Of its files: `safetensors` or `gguf`.
    pub format: &'static str,
    /// What most of its weights are stored as: `BF16`, `NVFP4`, `Q4_K`.
    pub quantization: String,
    pub parameters: u64,
    /// All weights as they are stored.
    pub bytes: u64,
    /// Those of them that lie in a GPU's own memory.
    pub device_bytes: u64,
    pub layers: usize,
    pub hidden_size: usize,
}

impl ModelInfo {
    /// The served name that `name` asks for; absent or empty is the first.
    /// Errors: [`ApiError::UnknownModel`] with the names that exist.
    pub fn resolve(&self, name: Option<&str>) -> Result<&str, ApiError> {
        let name = name.unwrap_or("");
        if name.is_empty() {
            return Ok(self.canonical());
        }
        self.served_names.iter().find(|served| *served == name).map(String::as_str).ok_or_else(|| {
            ApiError::UnknownModel { name: name.to_owned(), served: self.served_names.join(", ") }
        })
    }

    /// The first served name: the `model_name` of the metrics.
    pub fn canonical(&self) -> &str {
        self.served_names.first().map_or("", String::as_str)
    }
}

/// What a request gets that does not say: `--override-generation-config` over `generation_config.json` over
/// neutral values. Ranges as in [`crate::sample::SamplingParams`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    /// Neutral: the model's own distribution.
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_resolves_to_itself_and_none_to_the_first() {
        let model = ModelInfo {
            served_names: vec!["nvidia/tiny".into(), "tiny".into()],
            root: "tiny".into(),
            created: 0,
            max_model_len: 128,
            vocab_size: 16,
            stop_ids: vec![],
            defaults: SamplingDefaults::default(),
            facts: Facts::default(),
        };
        assert_eq!(model.resolve(None), Ok("nvidia/tiny"));
        assert_eq!(model.resolve(Some("")), Ok("nvidia/tiny"));
        assert_eq!(model.resolve(Some("tiny")), Ok("tiny"));
        let unknown = model.resolve(Some("gpt-4")).map_err(|error| error.to_string());
        assert_eq!(
            unknown,
            Err("The model `gpt-4` does not exist. Served here: nvidia/tiny, tiny.".to_owned())
        );
    }
}
