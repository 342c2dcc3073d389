//! Reading typed, bounded fields of a JSON object, one layer's overrides first.

use serde_json::{Map, Value};

use super::ConfigError;
use crate::model::json;

/// No size of a network is larger: ten times the widest published one, and products of three stay below 2^64.
pub const SIZE_LIMIT: usize = 1 << 21;

/// Layers, and entries of any per-layer list.
pub const LAYER_LIMIT: usize = 4096;

/// Fields of the model, overlaid by those of one Puzzle block where there is one.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    root: &'a Map<String, Value>,
    /// Its name in messages, and its fields.
    block: Option<(&'a str, usize, &'a Map<String, Value>)>,
}

impl<'a> Fields<'a> {
    pub fn new(root: &'a Map<String, Value>) -> Self {
        Fields { root, block: None }
    }

    /// The same fields as entry `position` of the list `list` overrides them.
    pub fn with_block(self, list: &'a str, position: usize, block: &'a Map<String, Value>) -> Self {
        Fields { root: self.root, block: Some((list, position, block)) }
    }

    /// The first of these names that is there, with the name it has in messages.
    pub fn get(&self, names: &[&str]) -> Option<(String, &'a Value)> {
        for name in names {
            if let Some((list, position, block)) = self.block
                && let Some(value) = json::field(block, name)
            {
                return Some((format!("{list}[{position}].{name}"), value));
            }
            if let Some(value) = json::field(self.root, name) {
                return Some((name.to_string(), value));
            }
        }
        None
    }

    /// A size of at least 1.
    pub fn size(&self, names: &[&str]) -> Result<usize, ConfigError> {
        match self.optional_size(names)? {
            Some(size) if size > 0 => Ok(size),
            Some(_) => Err(invalid(names[0], "at least 1", "0")),
            None => Err(ConfigError::Missing { field: names[0].into(), expected: "an integer" }),
        }
    }

    /// A size that may be 0 or absent.
    pub fn optional_size(&self, names: &[&str]) -> Result<Option<usize>, ConfigError> {
        self.get(names).map(|(name, value)| bounded(&name, value, SIZE_LIMIT)).transpose()
    }

    pub fn size_or(&self, names: &[&str], default: usize) -> Result<usize, ConfigError> {
        if self.get(names).is_some() { self.size(names) } else { Ok(default) }
    }

    pub fn number_or(&self, names: &[&str], default: f64) -> Result<f64, ConfigError> {
        let Some((name, value)) = self.get(names) else { return Ok(default) };
        json::number(value).ok_or_else(|| invalid(&name, "a number", json::describe(value)))
    }

    pub fn bool_or(&self, name: &str, default: bool) -> Result<bool, ConfigError> {
        let Some((name, value)) = self.get(&[name]) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(&name, "true or false", json::describe(value)))
    }

    /// A number above 0 and finite.
    pub fn positive_or(&self, names: &[&str], default: f64) -> Result<f64, ConfigError> {
        let value = self.number_or(names, default)?;
        let in_range = value > 0.0 && value <= f32::MAX as f64;
        if in_range { Ok(value) } else { Err(invalid(names[0], "a finite number above 0", value)) }
    }

    /// Fails if the field is there with another value than the only one we serve.
    pub fn only(&self, name: &str, allowed: &[Value], expected: &'static str) -> Result<(), ConfigError> {
        match self.get(&[name]) {
            Some((field, value)) if !allowed.contains(value) => {
                Err(ConfigError::Unsupported { field, expected, got: json::describe(value) })
            }
            _ => Ok(()),
        }
    }
}

/// A non-negative integer of at most `limit`; Python may write it as 4.0.
pub fn bounded(name: &str, value: &Value, limit: usize) -> Result<usize, ConfigError> {
    let number =
        value.as_u64().or_else(|| value.as_f64().filter(|f| *f >= 0.0 && f.fract() == 0.0).map(|f| f as u64));
    match number {
        Some(n) if n <= limit as u64 => Ok(n as usize),
        _ => Err(invalid(name, format!("an integer from 0 to {limit}"), json::describe(value))),
    }
}

pub fn invalid(field: &str, expected: impl ToString, got: impl ToString) -> ConfigError {
    ConfigError::Invalid { field: field.into(), expected: expected.to_string(), got: got.to_string() }
}
