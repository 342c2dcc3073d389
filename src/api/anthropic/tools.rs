//! `tools` and `tool_choice`. Tools that Anthropic's own service would carry out do not exist here and are not shown.

use crate::api::error::{ApiError, cut};
use crate::api::fields::Fields;
use serde_json::{Map, Value, json};

/// Puts tools and choice into the body of a chat. Errors: a tool without name or schema, a choice of what is not there.
pub fn read(fields: &Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut names = Vec::new();
    let mut tools = Vec::new();
    for (index, value) in fields.array("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = Fields::object_at(value, fields.path(&format!("tools[{index}]")))?;
        match tool.string("type")? {
            None | Some("custom") => {
                names.push(tool.required_string("name")?);
                tools.push(client_tool(&tool)?);
            }
            Some(kind) => tracing::debug!(kind = cut(kind, 64), "a server's tool is not shown to the model"),
        }
    }
    choose(fields, &names, chat)?;
    if !tools.is_empty() {
        chat.insert("tools".into(), Value::Array(tools));
    }
    Ok(())
}

fn client_tool(tool: &Fields) -> Result<Value, ApiError> {
    tool.required("input_schema")?;
    tool.object("input_schema")?;
    // A template prints what it finds, so nothing else goes along.
    let mut function = Map::new();
    for (ours, theirs) in [("name", "name"), ("description", "description"), ("parameters", "input_schema")] {
        if let Some(value) = tool.get(theirs) {
            function.insert(ours.into(), value.clone());
        }
    }
    tool.string("description")?;
    Ok(json!({"type": "function", "function": function}))
}

fn choose(fields: &Fields, names: &[&str], chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok(()) };
    let meant = match choice.required_string("type")? {
        "auto" => json!("auto"),
        "none" => json!("none"),
        "any" if names.is_empty() => {
            let message = "`tool_choice` is any, and `tools` holds none that the client carries out.";
            return Err(fields.bad("tool_choice", message));
        }
        "any" => json!("required"),
        "tool" => {
            let name = choice.required_string("name")?;
            if !names.contains(&name) {
                let name = cut(name, 64);
                let message = format!("`tool_choice.name` is `{name}`, which is not in `tools`.");
                return Err(choice.bad("name", message));
            }
            json!({"type": "function", "function": {"name": name}})
        }
        other => {
            let other = cut(other, 40);
            let message = format!("`tool_choice.type` must be auto, any, tool or none, got {other}.");
            return Err(choice.bad("type", message));
        }
    };
    chat.insert("tool_choice".into(), meant);
    if choice.bool("disable_parallel_tool_use")? == Some(true) {
        chat.insert("parallel_tool_calls".into(), json!(false));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: Value) -> Result<Value, String> {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        let mut chat = Map::new();
        read(&Fields::top(map), &mut chat).map_err(|error| error.to_string())?;
        Ok(Value::Object(chat))
    }

    fn weather() -> Value {
        json!({
            "name": "weather", "description": "Of a city.", "input_schema": {"type": "object"}, "strict": true,
            "defer_loading": false, "cache_control": {"type": "ephemeral"},
        })
    }

    #[test]
    fn a_tool_is_its_name_description_and_schema_and_servers_tools_are_left_out() {
        let custom = json!({"type": "custom", "name": "f", "input_schema": {}});
        let search = json!({"type": "web_search_20250305", "name": "web_search", "max_uses": 5});
        let bash = json!({"type": "bash_20250124", "name": "bash"});
        assert_eq!(
            chat(json!({"tools": [search, weather(), bash, custom]})),
            Ok(json!({"tools": [
                {"type": "function", "function": {
                    "name": "weather", "description": "Of a city.", "parameters": {"type": "object"},
                }},
                {"type": "function", "function": {"name": "f", "parameters": {}}},
            ]}))
        );
        assert_eq!(chat(json!({"tools": [search]})), Ok(json!({})));
    }

    #[test]
    fn a_choice_is_said_in_a_chats_words() {
        let check = |choice: Value, meant: Value, one: bool| {
            let got = chat(json!({"tools": [weather()], "tool_choice": choice})).expect("valid");
            assert_eq!(got["tool_choice"], meant, "{choice}");
            assert_eq!(got["parallel_tool_calls"] == false, one, "{choice}");
        };
        check(json!({"type": "auto"}), json!("auto"), false);
        check(json!({"type": "auto", "disable_parallel_tool_use": true}), json!("auto"), true);
        check(json!({"type": "any", "disable_parallel_tool_use": false}), json!("required"), false);
        check(json!({"type": "none"}), json!("none"), false);
        let named = json!({"type": "function", "function": {"name": "weather"}});
        check(json!({"type": "tool", "name": "weather"}), named, false);
        assert_eq!(chat(json!({"tool_choice": {"type": "auto"}})), Ok(json!({"tool_choice": "auto"})));
    }

    #[test]
    fn what_is_wrong_with_tools_or_choice_is_named() {
        let refused = |body: Value, words: &str| {
            let got = chat(body.clone());
            assert!(got.as_ref().is_err_and(|error| error.contains(words)), "{body}: {got:?}");
        };
        refused(json!({"tools": {}}), "`tools` must be an array");
        refused(json!({"tools": [7]}), "`tools[0]` must be an object");
        refused(json!({"tools": [{"input_schema": {}}]}), "`tools[0].name` is required");
        refused(json!({"tools": [weather(), {"name": "f"}]}), "`tools[1].input_schema` is required");
        refused(
            json!({"tools": [{"name": "f", "input_schema": "x"}]}),
            "`tools[0].input_schema` must be an object",
        );
        let described = json!({"tools": [{"name": "f", "input_schema": {}, "description": 7}]});
        refused(described, "`tools[0].description` must be a string");
        let choose = |choice: Value| json!({"tools": [weather()], "tool_choice": choice});
        refused(choose(json!("auto")), "`tool_choice` must be an object");
        refused(choose(json!({})), "`tool_choice.type` is required");
        refused(choose(json!({"type": "perhaps"})), "`tool_choice.type` must be auto, any, tool or none");
        refused(choose(json!({"type": "tool"})), "`tool_choice.name` is required");
        refused(choose(json!({"type": "tool", "name": "f"})), "`tool_choice.name` is `f`, which is not in");
        refused(json!({"tool_choice": {"type": "any"}}), "`tool_choice` is any, and `tools` holds none");
        let server = json!({"type": "bash_20250124", "name": "bash"});
        let named = json!({"tools": [server], "tool_choice": {"type": "tool", "name": "bash"}});
        refused(named, "which is not in `tools`");
    }
}
