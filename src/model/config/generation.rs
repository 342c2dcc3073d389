//! `generation_config.json`: where generation stops and how the vendor samples.

use serde_json::{Map, Value};

use super::ConfigError;
use super::parse::token_ids;
use super::read::{Fields, invalid};
use crate::model::json;

/// The fields of `generation_config.json` that a server uses; absent ones are `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end an answer; for these models [2, 11], which config.json does not say.
    pub eos_token_ids: Vec<u32>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads the file's bytes. Errors: not JSON, a field of the wrong type or out of range.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        const FILE: &str = "generation_config.json";
        let value =
            json::parse(bytes).map_err(|e| ConfigError::Json { file: FILE, reason: e.to_string() })?;
        let Value::Object(root) = value else {
            return Err(invalid(FILE, "an object", json::describe(&value)));
        };
        let fields = Fields::new(&root);
        Ok(GenerationConfig {
            eos_token_ids: token_ids(&fields, "eos_token_id")?,
            do_sample: root.get("do_sample").and_then(Value::as_bool),
            temperature: ranged(&root, "temperature", 0.0, f32::MAX)?,
            top_p: ranged(&root, "top_p", 0.0, 1.0)?,
            // Some files write "off" as -1.
            top_k: ranged(&root, "top_k", -1.0, u32::MAX as f32)?.map(|k| k.max(0.0) as u32),
            min_p: ranged(&root, "min_p", 0.0, 1.0)?,
            repetition_penalty: ranged(&root, "repetition_penalty", f32::MIN_POSITIVE, f32::MAX)?,
            max_new_tokens: match json::field(&root, "max_new_tokens") {
                Some(value) => Some(super::read::bounded("max_new_tokens", value, 1 << 30)?),
                None => None,
            },
        })
    }
}

fn ranged(root: &Map<String, Value>, name: &str, low: f32, high: f32) -> Result<Option<f32>, ConfigError> {
    let Some(value) = json::field(root, name) else { return Ok(None) };
    match json::number(value).map(|n| n as f32) {
        Some(n) if (low..=high).contains(&n) => Ok(Some(n)),
        _ => Err(invalid(name, format!("a number from {low} to {high}"), json::describe(value))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supers_file_is_read() {
        let config = GenerationConfig::from_json(
            br#"{"_from_model_config": true, "bos_token_id": 1, "do_sample": true, "eos_token_id": [2, 11],
                 "pad_token_id": 0, "temperature": 1.0, "top_p": 0.95, "transformers_version": "4.55.4"}"#,
        )
        .unwrap();
        assert_eq!(config.eos_token_ids, [2, 11]);
        assert_eq!((config.temperature, config.top_p, config.top_k), (Some(1.0), Some(0.95), None));
    }

    #[test]
    fn one_id_or_none_are_lists_too() {
        assert_eq!(GenerationConfig::from_json(br#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
        assert_eq!(GenerationConfig::from_json(b"{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, message) in [
            (r#"{"top_p": 1.5}"#, "top_p: expected a number from 0 to 1; got 1.5"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"eos_token_id": [2, "x"]}"#, "eos_token_id"),
            ("[]", "expected an object"),
            ("{", "not JSON"),
        ] {
            let error = GenerationConfig::from_json(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
