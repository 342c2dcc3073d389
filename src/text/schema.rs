//! What the text of a parameter means: coercion by the tool's JSON schema (spec nemotron-h §7.2).
//!
//! Where http-api Annex A reads otherwise, §7.2 is followed: a parameter without a declared type is a string (it can
//! then stream), and types are tried in one fixed order rather than in that of `anyOf`.

use serde_json::Value;

use super::json;

/// A set of JSON types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Types(u8);

impl Types {
    pub const NULL: Types = Types(1);
    pub const INTEGER: Types = Types(2);
    pub const NUMBER: Types = Types(4);
    pub const BOOLEAN: Types = Types(8);
    pub const OBJECT: Types = Types(16);
    pub const ARRAY: Types = Types(32);
    pub const STRING: Types = Types(64);

    pub fn has(self, other: Types) -> bool {
        self.0 & other.0 != 0
    }

    fn add(&mut self, other: Types) {
        self.0 |= other.0;
    }

    /// A type by its JSON Schema name or by what other languages call it.
    pub fn named(name: &str) -> Option<Types> {
        Some(match name.trim().to_ascii_lowercase().as_str() {
            "null" | "none" => Types::NULL,
            "string" | "str" | "text" | "varchar" | "char" | "enum" => Types::STRING,
            "integer" | "int" | "int32" | "int64" | "long" | "short" | "unsigned" => Types::INTEGER,
            name if name.starts_with("uint") => Types::INTEGER,
            "number" | "float" | "float32" | "float64" | "double" => Types::NUMBER,
            "boolean" | "bool" => Types::BOOLEAN,
            "object" | "dict" => Types::OBJECT,
            "array" | "arr" | "list" | "sequence" => Types::ARRAY,
            _ => return None,
        })
    }

    pub fn of(value: &Value) -> Types {
        match value {
            Value::Null => Types::NULL,
            Value::Bool(_) => Types::BOOLEAN,
            Value::Number(n) if n.is_f64() => Types::NUMBER,
            Value::Number(_) => Types::INTEGER,
            Value::String(_) => Types::STRING,
            Value::Array(_) => Types::ARRAY,
            Value::Object(_) => Types::OBJECT,
        }
    }
}

/// Schemas may nest and refer to themselves; beyond this depth nothing is looked up.
const MAX_DEPTH: usize = 16;

/// One parameter's schema, with the whole it may refer to (`#/$defs/..`).
#[derive(Debug, Clone, Copy)]
pub struct Schema<'a> {
    root: &'a Value,
    node: Option<&'a Value>,
}

impl<'a> Schema<'a> {
    /// The schema of parameter `key`; without one, everything is a string.
    pub fn of_parameter(parameters: Option<&'a Value>, key: &str) -> Schema<'a> {
        let root = parameters.unwrap_or(&Value::Null);
        Schema { root, node: root.get("properties").and_then(|properties| properties.get(key)) }
    }

    /// The declared types; {string} if none is found.
    pub fn types(&self) -> Types {
        let mut types = Types::default();
        if let Some(node) = self.node {
            collect(self.root, node, &mut types, 0);
        }
        if types == Types::default() { Types::STRING } else { types }
    }

    /// The JSON of a parameter's text.
    pub fn coerce(&self, text: &str, out: &mut String) {
        if !typed(text, self.types(), *self, 0, out) {
            // None fits: JSON if it is that, else the string.
            match serde_json::from_str::<Value>(text) {
                Ok(value) => json::value(&value, out),
                Err(_) => json::string(text, out),
            }
        }
    }

    fn child(&self, find: impl Fn(&'a Value) -> Option<&'a Value>) -> Schema<'a> {
        let node = self.node.and_then(|node| resolve(self.root, node, 0)).and_then(find);
        Schema { root: self.root, node }
    }
}

/// Follows local references. A schema that is only a `$ref` would else have no type, and its object become a string.
pub fn resolve<'a>(root: &'a Value, node: &'a Value, depth: usize) -> Option<&'a Value> {
    match node.get("$ref").and_then(Value::as_str) {
        Some(reference) if depth < MAX_DEPTH => {
            resolve(root, root.pointer(reference.strip_prefix('#')?)?, depth + 1)
        }
        Some(_) => None,
        None => Some(node),
    }
}

fn collect(root: &Value, node: &Value, types: &mut Types, depth: usize) {
    if depth > MAX_DEPTH {
        return;
    }
    let Some(node) = resolve(root, node, 0) else { return };
    match node.get("type") {
        Some(Value::String(name)) => {
            if let Some(found) = Types::named(name) {
                types.add(found);
            }
        }
        Some(Value::Array(names)) => {
            for found in names.iter().filter_map(Value::as_str).filter_map(Types::named) {
                types.add(found);
            }
        }
        _ => {}
    }
    if let Some(Value::Array(values)) = node.get("enum") {
        values.iter().for_each(|value| types.add(Types::of(value)));
    }
    if let Some(value) = node.get("const") {
        types.add(Types::of(value));
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(parts)) = node.get(key) {
            parts.iter().for_each(|part| collect(root, part, types, depth + 1));
        }
    }
}

/// Writes `text` as the first type of the fixed order that fits. False: none did, and nothing was written.
fn typed(text: &str, types: Types, schema: Schema<'_>, depth: usize, out: &mut String) -> bool {
    let trimmed = text.trim_ascii();
    if types.has(Types::NULL) && text.eq_ignore_ascii_case("null") {
        out.push_str("null");
        return true;
    }
    if (types.has(Types::INTEGER) || types.has(Types::NUMBER)) && integer(trimmed, out) {
        return true;
    }
    if types.has(Types::NUMBER) && number(trimmed, out) {
        return true;
    }
    if types.has(Types::BOOLEAN) {
        let word = match trimmed {
            t if t.eq_ignore_ascii_case("true") || t == "1" => Some("true"),
            t if t.eq_ignore_ascii_case("false") || t == "0" => Some("false"),
            _ => None,
        };
        if let Some(word) = word {
            out.push_str(word);
            return true;
        }
    }
    if types.has(Types::OBJECT) || types.has(Types::ARRAY) {
        // serde_json reads finite numbers only, and bounds the depth.
        if let Ok(value) = serde_json::from_str::<Value>(text)
            && (value.is_object() && types.has(Types::OBJECT) || value.is_array() && types.has(Types::ARRAY))
        {
            structured(&value, schema, depth, out);
            return true;
        }
    }
    if types.has(Types::STRING) {
        json::string(text, out);
        return true;
    }
    false
}

/// Writes a parsed value. A string inside it whose declared types exclude strings is coerced as a parameter would
/// be (`{"n": "5"}` for an integer n); everything that already has a type keeps it.
fn structured(value: &Value, schema: Schema<'_>, depth: usize, out: &mut String) {
    if depth > MAX_DEPTH {
        return json::value(value, out);
    }
    match value {
        Value::Array(items) => {
            let inner = schema.child(|node| node.get("items"));
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                structured(item, inner, depth + 1, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                json::string(key, out);
                out.push_str(": ");
                let inner = schema.child(|node| node.get("properties").and_then(|p| p.get(key)));
                structured(item, inner, depth + 1, out);
            }
            out.push('}');
        }
        Value::String(text) => {
            let types = schema.types();
            if types.has(Types::STRING) || !typed(text, types, schema, depth + 1, out) {
                json::string(text, out);
            }
        }
        other => json::value(other, out),
    }
}

/// An ASCII integer literal, of any size, as JSON wants it: no plus, no leading zeros.
fn integer(text: &str, out: &mut String) -> bool {
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return false;
    }
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        out.push('0');
        return true;
    }
    if negative {
        out.push('-');
    }
    out.push_str(digits);
    true
}

/// A finite float literal; an integral one becomes an integer.
fn number(text: &str, out: &mut String) -> bool {
    let Ok(x) = text.parse::<f64>() else { return false };
    if !x.is_finite() {
        return false;
    }
    if x == 0.0 {
        out.push('0');
    } else if x.fract() == 0.0 {
        out.push_str(&format!("{x:.0}"));
    } else {
        out.push_str(&json::float(x));
    }
    true
}
