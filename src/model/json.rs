//! JSON as Python writes it: bare `Infinity`, `-Infinity` and `NaN`, or transformers' `{"__float__": "Infinity"}`.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// Parses JSON in which the three bare words may stand for numbers; they become `{"__float__": "..."}`.
pub fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(&quote_bare_words(bytes))
}

/// A number, whichever way Python spelt it.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::Object(map) => match map.get("__float__")?.as_str()? {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        },
        _ => None,
    }
}

/// A field that is there and not null.
pub fn field<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|v| !v.is_null())
}

/// What kind of value it is, in words, for messages; short values are shown.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        other => {
            let text = other.to_string();
            // Cut at a character, not at a byte.
            if text.len() > 60 { format!("{}…", text.chars().take(57).collect::<String>()) } else { text }
        }
    }
}

/// Rewrites the bare words that stand outside strings; a file without them is returned as it is.
fn quote_bare_words(bytes: &[u8]) -> Cow<'_, [u8]> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut out = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    let mut in_string = false;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'-' | b'I' | b'N' if !in_string => {
                if let Some(word) = WORDS.iter().find(|w| bytes[at..].starts_with(w)) {
                    out.extend_from_slice(&bytes[copied..at]);
                    out.extend_from_slice(br#"{"__float__":""#);
                    out.extend_from_slice(word);
                    out.extend_from_slice(br#""}"#);
                    at += word.len();
                    copied = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(bytes);
    }
    out.extend_from_slice(&bytes[copied..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_floats_are_numbers_and_strings_stay_strings() {
        let value =
            parse(br#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "d": "NaN \" Infinity", "e": -1}"#);
        let value = value.unwrap();
        assert_eq!(number(&value["a"][1]), Some(f64::INFINITY));
        assert_eq!(number(&value["b"]), Some(f64::NEG_INFINITY));
        assert!(number(&value["c"]).is_some_and(f64::is_nan));
        assert_eq!(value["d"], "NaN \" Infinity");
        assert_eq!(number(&value["e"]), Some(-1.0));
        assert_eq!(number(&parse(br#"{"__float__": "Infinity"}"#).unwrap()), Some(f64::INFINITY));
    }

    #[test]
    fn other_bare_words_are_still_errors() {
        for text in ["[Infinit]", "[NaNs]", "{\"a\": \"NaN}", "\"\\", "-", "N"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
