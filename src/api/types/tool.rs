//! `tools` and `tool_choice`, and the deprecated `functions` and `function_call` that mean the same.

use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use crate::text::Tool;
use serde_json::{Map, Value, json};

/// Deeper schemas are a mistake or an attack; every walk over a schema is recursive.
const SCHEMA_DEPTH_MAX: usize = 64;

/// The tools of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tools {
    /// What the template shows the model: definitions in the form of `tools`.
    pub shown: Vec<Value>,
    /// What calls in the answer are read by; `None` if none were given or `tool_choice` is none.
    pub parsed: Option<Vec<Tool>>,
    /// `parallel_tool_calls: false`: the answer ends after its first call.
    pub one_call: bool,
    /// The answer is to be calls and nothing else. Only with [`Self::parsed`].
    pub forced: Option<Forced>,
}

/// What must be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forced {
    /// `required`: at least one of the tools.
    Any,
    /// This one, once.
    Named(String),
}

/// `tool_choice` as meant.
enum Choice {
    Auto,
    None,
    Forced(Forced),
}

/// Reads tools and choice. Errors: a definition without a name, a choice without tools or of a missing one.
pub fn read(fields: &Fields, hide_when_none: bool) -> Result<Tools, ApiError> {
    let defined = defined(fields)?;
    let choice = choice(fields, &defined)?;
    let allowed = !matches!(choice, Choice::None);
    let one_call = fields.bool("parallel_tool_calls")? == Some(false);
    let (mut shown, tools): (Vec<Value>, Vec<Tool>) = defined.into_iter().unzip();
    if !allowed && hide_when_none {
        shown.clear();
    }
    let parsed = (allowed && !tools.is_empty()).then_some(tools);
    let forced = if let Choice::Forced(forced) = choice { Some(forced) } else { None };
    Ok(Tools { shown, parsed, one_call, forced })
}

/// Each definition as the template sees it, and as the decoder does.
fn defined(fields: &Fields) -> Result<Vec<(Value, Tool)>, ApiError> {
    if let Some(tools) = fields.array("tools")? {
        return tools
            .iter()
            .enumerate()
            .map(|(index, value)| {
                let tool = Fields::object_at(value, fields.path(&format!("tools[{index}]")))?;
                match tool.string("type")? {
                    Some("function") => {}
                    got => {
                        let got = cut(got.unwrap_or("nothing"), 40);
                        return Err(tool.bad("type", format!("A tool's `type` must be function, got {got}.")));
                    }
                }
                let function = tool.required("function")?;
                Ok((value.clone(), function_tool(function, tool.path("function"))?))
            })
            .collect();
    }
    let functions = fields.array("functions")?.unwrap_or_default();
    let path = |index| fields.path(&format!("functions[{index}]"));
    functions
        .iter()
        .enumerate()
        .map(|(index, value)| {
            let tool = function_tool(value, path(index))?;
            Ok((json!({"type": "function", "function": value}), tool))
        })
        .collect()
}

fn function_tool(value: &Value, path: String) -> Result<Tool, ApiError> {
    let function = Fields::object_at(value, path)?;
    let name = function.string("name")?.filter(|name| !name.is_empty()).ok_or_else(|| {
        function.bad("name", format!("`{}` must be a non-empty string.", function.path("name")))
    })?;
    function.string("description")?;
    function.object("parameters")?;
    let parameters = function.get("parameters").cloned();
    if parameters.as_ref().map_or(0, depth) > SCHEMA_DEPTH_MAX {
        let message = format!("The schema is nested deeper than {SCHEMA_DEPTH_MAX} levels.");
        return Err(function.bad("parameters", message));
    }
    Ok(Tool { name: name.to_owned(), parameters })
}

/// The JSON reader bounds the nesting before this walks it.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Whether the model may call tools, or must.
fn choice(fields: &Fields, tools: &[(Value, Tool)]) -> Result<Choice, ApiError> {
    let name = if fields.get("tool_choice").is_some() { "tool_choice" } else { "function_call" };
    match fields.get(name) {
        None => Ok(Choice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::None),
            "required" | "any" => forced(fields, name, tools, Forced::Any),
            other => {
                let other = cut(other, 40);
                Err(fields
                    .bad(name, format!("`{name}` must be none, auto, required or a function, got {other}.")))
            }
        },
        Some(Value::Object(choice)) => {
            let wanted = wanted(choice, fields.path(name))?;
            forced(fields, name, tools, Forced::Named(wanted))
        }
        Some(other) => Err(wrong(name, "a string or an object", other)),
    }
}

/// The name in `{"type":"function","function":{"name"}}` or the deprecated `{"name"}`.
fn wanted(choice: &Map<String, Value>, path: String) -> Result<String, ApiError> {
    let name =
        choice.get("function").and_then(|function| function.get("name")).or_else(|| choice.get("name"));
    match name.and_then(Value::as_str) {
        Some(name) => Ok(name.to_owned()),
        None => Err(ApiError::bad(path.clone(), format!("`{path}` must name a function."))),
    }
}

/// Errors: there is nothing to call.
fn forced(fields: &Fields, field: &str, tools: &[(Value, Tool)], forced: Forced) -> Result<Choice, ApiError> {
    if tools.is_empty() {
        return Err(fields.bad(field, format!("`{field}` is only allowed when `tools` are given.")));
    }
    if let Forced::Named(wanted) = &forced
        && tools.iter().all(|(_, tool)| tool.name != *wanted)
    {
        let wanted = cut(wanted, 64);
        return Err(fields.bad(field, format!("`{field}` names `{wanted}`, which is not in `tools`.")));
    }
    Ok(Choice::Forced(forced))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: Value, expected: Result<(usize, bool), (&str, &str)>) {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        let got = read(&Fields::top(map), false)
            .map(|tools| (tools.shown.len(), tools.parsed.is_some()))
            .map_err(|error| error.body()["error"].clone());
        match (got, expected) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{body}"),
            (Err(error), Err((param, words))) => {
                assert_eq!(error["param"], param, "{body}");
                assert!(error["message"].to_string().contains(words), "{error}");
            }
            (got, expected) => panic!("{body}: expected {expected:?}, got {got:?}"),
        }
    }

    fn weather() -> Value {
        json!([{"type": "function", "function": {"name": "weather"}}])
    }

    #[test]
    fn no_choice_is_auto_and_empty_lists_are_none() {
        check(json!({"tools": weather()}), Ok((1, true)));
        check(json!({"tools": []}), Ok((0, false)));
        check(json!({"tools": weather(), "tool_choice": "none"}), Ok((1, false)));
        check(json!({"functions": [{"name": "f"}], "function_call": "auto"}), Ok((1, true)));
        check(json!({"tool_choice": "auto"}), Ok((0, false)));
    }

    #[test]
    fn a_forced_call_needs_its_tool() {
        check(json!({"tools": weather(), "tool_choice": "required"}), Ok((1, true)));
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        check(json!({"tools": weather(), "tool_choice": named("weather")}), Ok((1, true)));
        check(
            json!({"tools": weather(), "tool_choice": named("fly")}),
            Err(("tool_choice", "not in `tools`")),
        );
        check(json!({"tool_choice": "required"}), Err(("tool_choice", "when `tools` are given")));
        check(json!({"tools": weather(), "tool_choice": "maybe"}), Err(("tool_choice", "got maybe")));
        check(json!({"tools": weather(), "tool_choice": 1}), Err(("tool_choice", "a string or an object")));
    }

    #[test]
    fn broken_definitions_are_named() {
        check(json!({"tools": [{"type": "web_search"}]}), Err(("tools[0].type", "got web_search")));
        check(json!({"tools": [{"type": "function"}]}), Err(("tools[0].function", "required")));
        check(
            json!({"tools": [{"type": "function", "function": {"name": ""}}]}),
            Err(("tools[0].function.name", "non-empty")),
        );
        check(
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
            Err(("tools[0].function.parameters", "an object")),
        );
        let mut deep = json!({});
        for _ in 0..SCHEMA_DEPTH_MAX {
            deep = json!({"items": deep});
        }
        check(
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]}),
            Err(("tools[0].function.parameters", "nested deeper than 64")),
        );
    }
}
