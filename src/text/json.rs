//! JSON as Python's `json.dumps(ensure_ascii=False)` writes it: `", "` and `": "`, keys in order, nothing escaped
//! but what JSON demands. Templates and tool arguments are both written this way, so that what a model reads
//! and what it is taken to have said have one spelling.

use std::fmt::Write as _;

use serde_json::Value;

/// Appends `text` as the inside of a JSON string, without the quotes. Prefix-stable: the escape of a
/// concatenation is the concatenation of the escapes, which is what lets strings stream.
pub fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
}

/// Appends `text` as a JSON string.
pub fn string(text: &str, out: &mut String) {
    out.push('"');
    escape(text, out);
    out.push('"');
}

/// Appends `value` with Python's separators.
pub fn value(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => match n.as_f64() {
            Some(f) if n.is_f64() => out.push_str(&float(f)),
            _ => out.push_str(&n.to_string()),
        },
        Value::String(s) => string(s, out),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                self::value(item, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                string(key, out);
                out.push_str(": ");
                self::value(item, out);
            }
            out.push('}');
        }
    }
}

/// `repr(x)` of a Python float: the shortest digits that read back, an exponent of at least two digits outside
/// 1e-4 ≤ |x| < 1e16, always a point or an exponent.
pub fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    // Rust's `{:?}` has the same digits and the same thresholds; only the exponent is spelled otherwise.
    let text = format!("{x:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let digits = digits.strip_suffix(".0").unwrap_or(digits);
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (x, expected) in [
            (1.0, "1.0"),
            (1e20, "1e+20"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1e-5, "1e-05"),
            (1e-4, "0.0001"),
            (-2.5e-7, "-2.5e-07"),
            (1.5e300, "1.5e+300"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(x), expected);
        }
    }

    #[test]
    fn json_has_pythons_separators_and_leaves_other_alphabets_alone() {
        let given = serde_json::json!({"b": [1, 2.0, null, true], "a": "é\u{1F980}\"\\\n\u{1}<>&'"});
        let mut out = String::new();
        value(&given, &mut out);
        assert_eq!(out, "{\"b\": [1, 2.0, null, true], \"a\": \"é🦀\\\"\\\\\\n\\u0001<>&'\"}");
    }
}
