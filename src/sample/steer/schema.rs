//! JSON schemas as clients write them become schemas as the grammar compiler wants them.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

/// White space between the parts of a JSON value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Spaces {
    /// A space, or a line break with its indentation; never more, so that nobody loops on blanks.
    #[default]
    Bounded,
    /// `", "` and `": "`, and nothing else.
    Fixed,
    /// What this regular expression matches, or nothing.
    Pattern(String),
}

/// `schema` with its own options, and closed objects: `additionalProperties` is false where `properties` are given and
/// it is not, because a model asked for certain keys is not to invent others.
pub fn prepared(schema: &Value, spaces: &Spaces) -> Result<Value, String> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        other => return Err(format!("a schema must be an object or true, got {other}")),
    };
    check(&schema)?;
    let mut merged = HashSet::new();
    collect_merged(&schema, &mut merged);
    close(&mut schema, "#", &merged, false);
    if let Value::Object(map) = &mut schema {
        map.insert("x-guidance".into(), options(spaces));
    }
    Ok(schema)
}

fn options(spaces: &Spaces) -> Value {
    match spaces {
        Spaces::Bounded => json!({
            "whitespace_pattern": r" |\n[ \t]{0,40}", "coerce_one_of": true, "lenient": true,
        }),
        Spaces::Pattern(pattern) => json!({
            "whitespace_pattern": pattern, "coerce_one_of": true, "lenient": true,
        }),
        Spaces::Fixed => json!({
            "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
            "coerce_one_of": true, "lenient": true,
        }),
    }
}

/// Mistakes that the lenient compiler would pass over.
fn check(schema: &Value) -> Result<(), String> {
    const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
    let Value::Object(map) = schema else { return Ok(()) };
    let names: &[Value] = match map.get("type") {
        None => &[],
        Some(Value::Array(names)) => names,
        Some(name) => std::slice::from_ref(name),
    };
    if let Some(wrong) = names.iter().find(|name| !name.as_str().is_some_and(|name| TYPES.contains(&name))) {
        return Err(format!("`type` must be one of {}, got {wrong}", TYPES.join(", ")));
    }
    if map.get("enum").is_some_and(|values| values.as_array().is_none_or(Vec::is_empty)) {
        return Err("`enum` must be a list with at least one value".into());
    }
    each_subschema(map, &mut |_, sub| check(sub))
}

/// Calls `visit` with the place and the value of every schema directly below.
fn each_subschema<'a>(
    map: &'a Map<String, Value>,
    visit: &mut impl FnMut(String, &'a Value) -> Result<(), String>,
) -> Result<(), String> {
    for (key, value) in map {
        match (kind(key), value) {
            (Place::One, value) => visit(key.clone(), value)?,
            (Place::List, Value::Array(items)) => {
                for (index, item) in items.iter().enumerate() {
                    visit(format!("{key}/{index}"), item)?;
                }
            }
            (Place::List, value @ Value::Object(_)) => visit(key.clone(), value)?,
            (Place::Map, Value::Object(items)) => {
                for (name, item) in items {
                    visit(format!("{key}/{name}"), item)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

enum Place {
    One,
    List,
    Map,
    None,
}

/// Where a keyword keeps schemas.
fn kind(keyword: &str) -> Place {
    match keyword {
        "additionalProperties" | "additionalItems" | "not" | "if" | "then" | "else" => Place::One,
        "items" | "prefixItems" | "anyOf" | "oneOf" | "allOf" => Place::List,
        "properties" | "patternProperties" | "$defs" | "definitions" => Place::Map,
        _ => Place::None,
    }
}

/// Schemas that are one part of a whole: a closed part would shut the other parts' keys out.
fn is_composed(map: &Map<String, Value>) -> bool {
    let parts = map.get("allOf").and_then(Value::as_array).map_or(0, Vec::len);
    let own = map.contains_key("properties");
    let others = ["$ref", "anyOf", "oneOf"].iter().filter(|name| map.contains_key(**name)).count();
    parts + usize::from(own) + others > 1
}

/// The definitions that composed schemas refer to.
fn collect_merged(schema: &Value, merged: &mut HashSet<String>) {
    let Value::Object(map) = schema else { return };
    if is_composed(map) {
        refer(map, merged);
    }
    let _ = each_subschema(map, &mut |_, sub| {
        collect_merged(sub, merged);
        Ok(())
    });
}

/// What a schema refers to in its own place, itself or through its alternatives.
fn refer(map: &Map<String, Value>, merged: &mut HashSet<String>) {
    if let Some(Value::String(target)) = map.get("$ref") {
        merged.insert(target.clone());
    }
    let lists = ["allOf", "anyOf", "oneOf"].iter().filter_map(|name| map.get(*name)?.as_array());
    for part in lists.flatten().filter_map(Value::as_object) {
        refer(part, merged);
    }
}

/// `open`: the schema is a part of a composed one.
fn close(schema: &mut Value, path: &str, merged: &HashSet<String>, open: bool) {
    let Value::Object(map) = schema else { return };
    let composed = is_composed(map);
    let open = open || composed || merged.contains(path);
    let given = ["additionalProperties", "patternProperties", "unevaluatedProperties"];
    if map.contains_key("properties") && !open && !given.iter().any(|name| map.contains_key(*name)) {
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
    for (key, value) in map.iter_mut() {
        let inside = open && matches!(key.as_str(), "allOf" | "anyOf" | "oneOf");
        match (kind(key), value) {
            (Place::One, value) => close(value, &format!("{path}/{key}"), merged, false),
            (Place::List, Value::Array(items)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    close(item, &format!("{path}/{key}/{index}"), merged, inside);
                }
            }
            (Place::List, value @ Value::Object(_)) => close(value, &format!("{path}/{key}"), merged, false),
            (Place::Map, Value::Object(items)) => {
                for (name, item) in items {
                    close(item, &format!("{path}/{key}/{name}"), merged, false);
                }
            }
            _ => {}
        }
    }
}
