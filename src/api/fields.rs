//! Lenient reading of a request's JSON object: unknown fields are ignored, `null` is absent, `16.0` is an
//! integer; everything else that does not fit is a 400 that names the field, the expected and the got.

use super::error::{ApiError, cut};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Quoted values in messages are cut to this many characters.
const QUOTE_CHARS_MAX: usize = 60;

/// One JSON object and where it stands in the request (`""` at the top, else `stream_options`, `tools[0]`).
#[derive(Clone)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    pub fn top(map: &'a Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    /// `value` as an object standing at `path`. Errors: it is something else.
    pub fn object_at(value: &'a Value, path: String) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong(&path, "an object", other)),
        }
    }

    /// The client's spelling of where `name` stands.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// An error about field `name` of this object.
    pub fn bad(&self, name: &str, message: impl Into<String>) -> ApiError {
        ApiError::bad(self.path(name), message)
    }

    /// The value of `name`, if given and not `null`.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| self.bad(name, format!("`{}` is required.", self.path(name))))
    }

    pub fn required_string(&self, name: &str) -> Result<&'a str, ApiError> {
        let value = self.required(name)?;
        value.as_str().ok_or_else(|| wrong(&self.path(name), "a string", value))
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", |value| value.as_str())
    }

    pub fn array(&self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.read(name, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(name).map(|value| Fields::object_at(value, self.path(name))).transpose()
    }

    /// A whole number within `range`.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.read(name, "an integer", whole)? else { return Ok(None) };
        if range.contains(&value) {
            return Ok(Some(value));
        }
        let path = self.path(name);
        let message = match (*range.start(), *range.end()) {
            (low, i64::MAX) => format!("`{path}` must be at least {low}, got {value}."),
            (low, high) => format!("`{path}` must be between {low} and {high}, got {value}."),
        };
        Err(ApiError::bad(path, message))
    }

    /// A finite number that `fits` as it is returned, because 1e-60 is above 0 and its f32 is not; `expected` says
    /// in words what fits.
    pub fn number(
        &self,
        name: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.read(name, "a number", Value::as_f64)? else { return Ok(None) };
        let single = value as f32;
        if single.is_finite() && fits(f64::from(single)) {
            return Ok(Some(single));
        }
        let path = self.path(name);
        Err(ApiError::bad(path.clone(), format!("`{path}` must be {expected}, got {value}.")))
    }

    /// Token ids below `vocab_size`.
    pub fn ids(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(values) = self.array(name)? else { return Ok(None) };
        values
            .iter()
            .map(|value| token_id(value, &self.path(name), vocab_size))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| wrong(&self.path(name), expected, value))
    }
}

/// `value` as the id of a token below `vocab_size`.
pub fn token_id(value: &Value, path: &str, vocab_size: usize) -> Result<u32, ApiError> {
    let id = whole(value).ok_or_else(|| wrong(path, "a list of token ids", value))?;
    match u32::try_from(id) {
        Ok(id) if (id as usize) < vocab_size => Ok(id),
        _ => Err(ApiError::bad(
            path,
            format!("`{path}` holds the token id {id}, which is outside the vocabulary of {vocab_size}."),
        )),
    }
}

/// An integer, or a float without a fraction: JavaScript and some serializers write `16.0`.
pub fn whole(value: &Value) -> Option<i64> {
    if let Some(integer) = value.as_i64() {
        return Some(integer);
    }
    let float = value.as_f64()?;
    // Beyond 2^53 a float no longer says which integer was meant.
    (float.fract() == 0.0 && float.abs() <= 9_007_199_254_740_992.0).then_some(float as i64)
}

/// "`path` must be EXPECTED, got …": what the value was, and a piece of it.
pub fn wrong(path: &str, expected: &str, got: &Value) -> ApiError {
    let kind = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    let quote = cut(&got.to_string(), QUOTE_CHARS_MAX);
    ApiError::bad(path, format!("`{path}` must be {expected}, got {kind}: {quote}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check<T: std::fmt::Debug + PartialEq>(
        body: Value,
        read: impl Fn(&Fields) -> Result<Option<T>, ApiError>,
        expected: Result<Option<T>, &str>,
    ) {
        let Value::Object(map) = body else { panic!("the test gives an object") };
        let got = read(&Fields::top(&map)).map_err(|error| error.to_string());
        assert_eq!(got, expected.map_err(str::to_owned));
    }

    #[test]
    fn integers_may_arrive_as_floats_without_fraction() {
        let n = |fields: &Fields| fields.integer("n", 1..=128);
        check(json!({"n": 16.0}), n, Ok(Some(16)));
        check(json!({"n": 16.5}), n, Err("`n` must be an integer, got a number: 16.5"));
        check(json!({"n": "two"}), n, Err("`n` must be an integer, got a string: \"two\""));
        check(json!({"n": true}), n, Err("`n` must be an integer, got a boolean: true"));
        check(json!({"n": 1e300}), n, Err("`n` must be an integer, got a number: 1e+300"));
        check(json!({"n": 0}), n, Err("`n` must be between 1 and 128, got 0."));
        check(json!({"n": u64::MAX}), n, Err("`n` must be an integer, got a number: 18446744073709551615"));
    }

    #[test]
    fn null_is_absent() {
        check(json!({"stream": null}), |fields| fields.bool("stream"), Ok(None));
        check(json!({"n": null}), |fields| fields.integer("n", 0..=9), Ok(None));
    }

    #[test]
    fn a_nested_field_is_named_by_its_path() {
        let read =
            |fields: &Fields| fields.object("stream_options")?.map_or(Ok(None), |o| o.bool("include_usage"));
        check(
            json!({"stream_options": {"include_usage": 1}}),
            read,
            Err("`stream_options.include_usage` must be true or false, got a number: 1"),
        );
    }

    #[test]
    fn ids_stay_inside_the_vocabulary() {
        let ids = |fields: &Fields| fields.ids("ids", 10);
        check(json!({"ids": [0, 9.0]}), ids, Ok(Some(vec![0, 9])));
        check(
            json!({"ids": [10]}),
            ids,
            Err("`ids` holds the token id 10, which is outside the vocabulary of 10."),
        );
        check(
            json!({"ids": [-1]}),
            ids,
            Err("`ids` holds the token id -1, which is outside the vocabulary of 10."),
        );
    }
}
