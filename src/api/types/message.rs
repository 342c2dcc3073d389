//! `messages` become turns for the template: many dialects in, one form out.

use super::content;
use crate::api::error::{ApiError, cut};
use crate::api::fields::Fields;
use crate::text::{Message, ToolCall};
use serde_json::{Map, Value, json};

/// Reads `messages`. Errors: not a list, empty, or a message that names no known role or holds no text.
pub fn read(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    fields.required("messages")?;
    let messages = fields.array("messages")?.unwrap_or_default();
    if messages.is_empty() {
        return Err(fields.bad("messages", "`messages` must not be empty."));
    }
    messages
        .iter()
        .enumerate()
        .map(|(index, value)| message(&Fields::object_at(value, fields.path(&format!("messages[{index}]")))?))
        .collect()
}

fn message(fields: &Fields) -> Result<Message, ApiError> {
    let role = fields
        .string("role")?
        .ok_or_else(|| fields.bad("role", format!("`{}` is required.", fields.path("role"))))?;
    // The template knows neither `developer` nor the deprecated `function`.
    let role = match role {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => "tool",
        other => {
            let got = cut(other, 40);
            let message = format!(
                "`{}` must be system, developer, user, assistant or tool, got {got}.",
                fields.path("role")
            );
            return Err(fields.bad("role", message));
        }
    };
    let content = if role == "tool" { tool_content(fields)? } else { content::read(fields)? };
    let (mut reasoning, mut tool_calls) = (None, Vec::new());
    if role == "assistant" {
        // The same thing under the names of different releases.
        let (given, older) = (fields.string("reasoning")?, fields.string("reasoning_content")?);
        let given = given.or(older);
        reasoning = given.map(str::to_owned).or(content.reasoning);
        tool_calls = calls(fields)?;
    }
    Ok(Message {
        role: role.to_owned(),
        content: content.text,
        reasoning,
        tool_calls,
        tool_call_id: fields.string("tool_call_id")?.map(str::to_owned),
        name: fields.string("name")?.map(str::to_owned),
    })
}

/// A tool may answer with an object; the model reads it as JSON.
fn tool_content(fields: &Fields) -> Result<content::Content, ApiError> {
    match fields.get("content") {
        Some(object @ Value::Object(_)) => {
            Ok(content::Content { text: Some(object.to_string()), reasoning: None })
        }
        _ => content::read(fields),
    }
}

fn calls(fields: &Fields) -> Result<Vec<ToolCall>, ApiError> {
    if let Some(calls) = fields.array("tool_calls")? {
        return calls
            .iter()
            .enumerate()
            .map(|(index, value)| {
                let call = Fields::object_at(value, fields.path(&format!("tool_calls[{index}]")))?;
                let function = call.required("function")?;
                let function = Fields::object_at(function, call.path("function"))?;
                self::call(&function, call.string("id")?)
            })
            .collect();
    }
    fields.object("function_call")?.iter().map(|function| call(function, None)).collect()
}

fn call(function: &Fields, id: Option<&str>) -> Result<ToolCall, ApiError> {
    let name = function.string("name")?.filter(|name| !name.is_empty()).ok_or_else(|| {
        function.bad("name", format!("`{}` must be a non-empty string.", function.path("name")))
    })?;
    let arguments = arguments(function)?;
    Ok(ToolCall { id: id.map(str::to_owned), name: name.to_owned(), arguments })
}

/// An object, whatever was sent. Text that is not a JSON object becomes one argument: one broken call in a
/// long history must not end an agent's session.
fn arguments(function: &Fields) -> Result<Value, ApiError> {
    let text = match function.get("arguments") {
        None => return Ok(Value::Object(Map::new())),
        Some(object @ Value::Object(_)) => return Ok(object.clone()),
        Some(_) => function.string("arguments")?.unwrap_or_default(),
    };
    if text.trim().is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    match serde_json::from_str::<Value>(text) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(Value::Null) => Ok(Value::Object(Map::new())),
        _ => Ok(json!({"arguments": text})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(messages: Value) -> Result<Vec<Message>, String> {
        let body = json!({"messages": messages});
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        read(&Fields::top(map)).map_err(|error| error.body()["error"]["param"].to_string())
    }

    fn check_arguments(given: Value, expected: Value) {
        let messages = read_all(json!([
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
        ]));
        assert_eq!(messages.map(|mut all| all.remove(0).tool_calls.remove(0).arguments), Ok(expected));
    }

    #[test]
    fn arguments_become_an_object() {
        check_arguments(json!("{\"a\": 1}"), json!({"a": 1}));
        check_arguments(json!({"a": 1}), json!({"a": 1}));
        check_arguments(json!(""), json!({}));
        check_arguments(json!(null), json!({}));
        check_arguments(json!("null"), json!({}));
        check_arguments(json!("{broken"), json!({"arguments": "{broken"}));
        check_arguments(json!("[1]"), json!({"arguments": "[1]"}));
    }

    #[test]
    fn dialects_meet_in_one_form() {
        let messages = read_all(json!([
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": []},
            {"role": "function", "name": "f", "content": {"ok": true}},
        ]))
        .unwrap_or_default();
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "assistant", "tool"]);
        assert_eq!(messages[1].reasoning.as_deref(), Some("hm"));
        assert_eq!(messages[2].content.as_deref(), Some("{\"ok\":true}"));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let check = |messages, param: &str| assert_eq!(read_all(messages), Err(format!("\"{param}\"")));
        check(json!("hello"), "messages");
        check(json!([]), "messages");
        check(json!(null), "messages");
        check(json!(["hello"]), "messages[0]");
        check(json!([{"content": "x"}]), "messages[0].role");
        check(json!([{"role": "wizard", "content": "x"}]), "messages[0].role");
        check(json!([{"role": "user", "content": 1}]), "messages[0].content");
        check(
            json!([{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
            "messages[0].tool_calls[0].function",
        );
        check(
            json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]),
            "messages[0].tool_calls[0].function.arguments",
        );
    }
}
