//! Items become messages: what one answer put into several (a thought, a text, calls) is one assistant's turn again.

use super::output::THOUGHT_MARK;
use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use crate::api::types::content;
use serde_json::{Map, Value, json};

/// Appends the messages of `items` to `messages`. The first `before` items are those of earlier responses: what
/// comes after them stands in the request as `input[0]`. Errors: 400 that names the item.
pub fn messages(items: &[Value], before: usize, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut turn = Turn::default();
    for (index, item) in items.iter().enumerate() {
        let path = match index.checked_sub(before) {
            Some(index) => format!("input[{index}]"),
            None => "previous_response_id".to_owned(),
        };
        read(&Fields::object_at(item, path)?, &mut turn, messages)?;
    }
    turn.end(messages);
    Ok(())
}

fn read(item: &Fields, turn: &mut Turn, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    match item.string("type")? {
        None | Some("message") => message(item, turn, messages),
        Some("reasoning") => {
            let thought = thought(item)?;
            turn.think(thought, messages);
            Ok(())
        }
        Some("function_call") => {
            turn.calls.push(call(item)?);
            Ok(())
        }
        Some("function_call_output") => {
            turn.end(messages);
            messages.push(json!({
                "role": "tool", "tool_call_id": text(item, "call_id")?, "content": result(item)?,
            }));
            Ok(())
        }
        Some("item_reference") => {
            let message = "Items cannot be referred to; send the item itself, or `previous_response_id`.";
            Err(item.bad("type", message))
        }
        Some(other) => {
            let message = format!(
                "An item's `type` must be message, reasoning, function_call or function_call_output, got {}.",
                cut(other, 40)
            );
            Err(item.bad("type", message))
        }
    }
}

fn message(item: &Fields, turn: &mut Turn, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = text(item, "role")?;
    if !matches!(role, "user" | "assistant" | "system" | "developer") {
        let got = cut(role, 40);
        let message =
            format!("`{}` must be user, assistant, system or developer, got {got}.", item.path("role"));
        return Err(item.bad("role", message));
    }
    item.required("content")?;
    let content = content::read(item)?;
    let said = content.text.unwrap_or_default();
    if role == "assistant" {
        turn.say(said, messages);
    } else {
        turn.end(messages);
        messages.push(json!({"role": role, "content": said}));
    }
    Ok(())
}

/// The thought itself where there is one, else what was said of it.
fn thought(item: &Fields) -> Result<String, ApiError> {
    let listed = |name: &str| -> Result<Vec<&str>, ApiError> {
        let parts = item.array(name)?.unwrap_or_default();
        Ok(parts.iter().filter_map(|part| part["text"].as_str()).collect())
    };
    let content = listed("content")?;
    if !content.is_empty() {
        return Ok(content.join("\n"));
    }
    // Another service's cannot be read.
    if let Some(own) = item.string("encrypted_content")?.and_then(|text| text.strip_prefix(THOUGHT_MARK)) {
        return Ok(own.to_owned());
    }
    Ok(listed("summary")?.join("\n"))
}

fn call(item: &Fields) -> Result<Value, ApiError> {
    let arguments = item.get("arguments").cloned().unwrap_or(Value::Null);
    if !matches!(arguments, Value::Null | Value::String(_) | Value::Object(_)) {
        return Err(wrong(&item.path("arguments"), "a string", &arguments));
    }
    Ok(json!({
        "id": text(item, "call_id")?, "type": "function",
        "function": {"name": text(item, "name")?, "arguments": arguments},
    }))
}

/// What a function gave back: a string, parts, or an object, which the model reads as JSON.
fn result(item: &Fields) -> Result<String, ApiError> {
    match item.required("output")? {
        Value::String(text) => Ok(text.clone()),
        parts @ Value::Array(_) => {
            let content = Map::from_iter([("content".to_owned(), parts.clone())]);
            let read = content::read(&Fields::top(&content));
            let read = read.map_err(|error| at_output(error, &item.path("output")))?;
            Ok(read.text.unwrap_or_default())
        }
        object @ Value::Object(_) => Ok(object.to_string()),
        other => Err(wrong(&item.path("output"), "a string, a list of parts or an object", other)),
    }
}

fn at_output(error: ApiError, path: &str) -> ApiError {
    let ApiError::BadRequest { message, param: Some(param) } = error else { return error };
    let inside = param.strip_prefix("content").unwrap_or(&param);
    ApiError::bad(format!("{path}{inside}"), message.replace("`content", &format!("`{path}")))
}

/// A string that is not empty.
fn text<'a>(item: &Fields<'a>, name: &str) -> Result<&'a str, ApiError> {
    let given = item.string(name)?.filter(|text| !text.is_empty());
    given.ok_or_else(|| item.bad(name, format!("`{}` must be a non-empty string.", item.path(name))))
}

/// An assistant's turn that is being put together.
#[derive(Default)]
struct Turn {
    thought: Option<String>,
    said: Option<String>,
    calls: Vec<Value>,
}

impl Turn {
    /// A thought stands at the beginning of a turn.
    fn think(&mut self, thought: String, messages: &mut Vec<Value>) {
        if self.said.is_some() || !self.calls.is_empty() {
            self.end(messages);
        }
        match &mut self.thought {
            _ if thought.is_empty() => {}
            Some(before) => {
                before.push('\n');
                before.push_str(&thought);
            }
            None => self.thought = Some(thought),
        }
    }

    /// Text after a call belongs to the same turn, two texts in a row do not.
    fn say(&mut self, text: String, messages: &mut Vec<Value>) {
        if self.said.is_some() && self.calls.is_empty() {
            self.end(messages);
        }
        self.said.get_or_insert_default().push_str(&text);
    }

    fn end(&mut self, messages: &mut Vec<Value>) {
        let Self { thought, said, calls } = std::mem::take(self);
        if thought.is_none() && said.is_none() && calls.is_empty() {
            return;
        }
        let mut message = json!({"role": "assistant", "content": said, "reasoning": thought});
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        messages.push(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(items: Value, expected: Value) {
        let mut got = Vec::new();
        messages(items.as_array().expect("the test gives a list"), 0, &mut got).expect("valid");
        assert_eq!(Value::Array(got), expected, "{items}");
    }

    fn refused(item: Value, param: &str) {
        let error = messages(std::slice::from_ref(&item), 0, &mut Vec::new())
            .expect_err("the test gives what is wrong");
        assert_eq!(error.body()["error"]["param"], json!(param), "{item}: {error}");
    }

    fn call_item(id: &str) -> Value {
        json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"})
    }

    fn call_of(id: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}})
    }

    #[test]
    fn what_one_answer_held_is_one_turn() {
        check(
            json!([
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                call_item("1"),
                call_item("2"),
                {"type": "function_call_output", "call_id": "1", "output": "x"},
                {"type": "function_call_output", "call_id": "2", "output": {"y": 1}},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
                call_item("3"),
                {"role": "developer", "content": "brief"},
            ]),
            json!([
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning": "hm", "tool_calls": [call_of("1"), call_of("2")]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
                {"role": "tool", "tool_call_id": "2", "content": "{\"y\":1}"},
                {"role": "assistant", "content": null, "reasoning": "so", "tool_calls": [call_of("3")]},
                {"role": "developer", "content": "brief"},
            ]),
        );
    }

    #[test]
    fn turns_part_where_a_new_one_begins() {
        let said = |text: &str| json!({"role": "assistant", "content": text});
        let turn = |text: &str| json!({"role": "assistant", "content": text, "reasoning": null});
        check(json!([said("a"), said("b")]), json!([turn("a"), turn("b")]));
        let mut with_call = turn("ab");
        with_call["tool_calls"] = json!([call_of("1")]);
        check(json!([said("a"), call_item("1"), said("b")]), json!([with_call]));
        check(
            json!([said("a"), {"type": "reasoning", "encrypted_content": "ferrotron:hm"}]),
            json!([turn("a"), {"role": "assistant", "content": null, "reasoning": "hm"}]),
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        refused(json!("hi"), "input[0]");
        refused(json!({"content": "x"}), "input[0].role");
        refused(json!({"role": "tool", "content": "x"}), "input[0].role");
        refused(json!({"role": "user"}), "input[0].content");
        refused(json!({"role": "user", "content": [{"type": "input_image"}]}), "input[0].content[0].type");
        refused(json!({"type": "item_reference", "id": "x"}), "input[0].type");
        refused(json!({"type": "computer_call"}), "input[0].type");
        refused(json!({"type": "function_call", "name": "f"}), "input[0].call_id");
        refused(json!({"type": "function_call", "call_id": "1"}), "input[0].name");
        refused(
            json!({"type": "function_call", "call_id": "1", "name": "f", "arguments": 1}),
            "input[0].arguments",
        );
        refused(json!({"type": "function_call_output", "output": "x"}), "input[0].call_id");
        refused(json!({"type": "function_call_output", "call_id": "1"}), "input[0].output");
        let image =
            json!({"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image"}]});
        refused(image, "input[0].output[0].type");
        refused(json!({"type": "reasoning", "content": "hm"}), "input[0].content");
    }
}
