//! `system` and `messages`: turns of blocks become turns of text, thoughts and calls.

use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use serde_json::{Map, Value, json};

/// Claude Code opens its system prompt with a line that changes at every request: with it no prompt would begin like
/// the one before, and nothing could be resumed.
const BILLING: &str = "x-anthropic-billing-header";
/// What stands for an image that a tool returned. It stays in the history for ever, so an error would end the session.
const UNSEEN: &str = "[An image, which this model cannot see.]";

/// Puts the conversation into the body of a chat. Errors: 400 that names the block which cannot be read.
pub fn read(fields: &Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut turns = Vec::new();
    if fields.get("system").is_some() {
        turns.extend(system(fields, "system")?);
    }
    fields.required("messages")?;
    let messages = fields.array("messages")?.unwrap_or_default();
    if messages.is_empty() {
        return Err(fields.bad("messages", "`messages` must not be empty."));
    }
    let mut prefill = false;
    for (index, value) in messages.iter().enumerate() {
        let message = Fields::object_at(value, fields.path(&format!("messages[{index}]")))?;
        prefill = false;
        match message.required_string("role")? {
            "user" => turns.extend(user(&message)?),
            "system" => turns.extend(system(&message, "content")?),
            "assistant" => {
                let turn = assistant(&message)?;
                // An empty last turn asks for what would come anyway.
                if index + 1 < messages.len() || turn.len() > 1 {
                    prefill = true;
                    turns.push(Value::Object(turn));
                }
            }
            other => {
                let path = message.path("role");
                let got = cut(other, 40);
                let text = format!("`{path}` must be user, assistant or system, got {got}.");
                return Err(message.bad("role", text));
            }
        }
    }
    chat.insert("messages".into(), Value::Array(turns));
    if prefill {
        chat.insert("continue_final_message".into(), json!(true));
    }
    Ok(())
}

/// A block, by its type.
struct Block<'a> {
    kind: &'a str,
    fields: Fields<'a>,
}

enum Content<'a> {
    Text(&'a str),
    Blocks(Vec<Block<'a>>),
}

fn content<'a>(fields: &Fields<'a>, name: &str) -> Result<Content<'a>, ApiError> {
    let path = fields.path(name);
    let items = match fields.required(name)? {
        Value::String(text) => return Ok(Content::Text(text)),
        Value::Array(items) => items,
        other => return Err(wrong(&path, "a string or a list of blocks", other)),
    };
    let block = |(index, item)| {
        let fields = Fields::object_at(item, format!("{path}[{index}]"))?;
        Ok(Block { kind: fields.required_string("type")?, fields })
    };
    items.iter().enumerate().map(block).collect::<Result<_, _>>().map(Content::Blocks)
}

/// A turn, unless nothing is left of it.
fn system(fields: &Fields, name: &str) -> Result<Option<Value>, ApiError> {
    let text = match content(fields, name)? {
        Content::Text(text) => text.to_owned(),
        Content::Blocks(blocks) => {
            let texts = blocks.iter().map(text).collect::<Result<Vec<_>, _>>()?;
            let kept: Vec<String> = texts.into_iter().filter(|text| !text.starts_with(BILLING)).collect();
            if kept.is_empty() {
                return Ok(None);
            }
            kept.join("\n")
        }
    };
    Ok(Some(json!({"role": "system", "content": text})))
}

/// What tools answered comes first, as the model expects it right after its calls; then what the user says.
fn user(message: &Fields) -> Result<Vec<Value>, ApiError> {
    let mut turns = Vec::new();
    let said = match content(message, "content")? {
        Content::Text(text) => text.to_owned(),
        Content::Blocks(blocks) => {
            let mut texts = Vec::new();
            for block in &blocks {
                match block.kind {
                    "tool_result" => turns.push(tool_result(&block.fields)?),
                    _ => texts.push(text(block)?),
                }
            }
            if texts.is_empty() && !turns.is_empty() {
                return Ok(turns);
            }
            texts.join("\n")
        }
    };
    turns.push(json!({"role": "user", "content": said}));
    Ok(turns)
}

fn tool_result(result: &Fields) -> Result<Value, ApiError> {
    let id = result.required_string("tool_use_id")?;
    let mut said = match result.get("content") {
        None => String::new(),
        Some(_) => match content(result, "content")? {
            Content::Text(text) => text.to_owned(),
            Content::Blocks(blocks) => {
                let texts = blocks.iter().map(|block| match block.kind {
                    "image" => Ok(UNSEEN.to_owned()),
                    "tool_reference" => block.fields.required_string("tool_name").map(str::to_owned),
                    _ => text(block),
                });
                texts.collect::<Result<Vec<_>, _>>()?.join("\n")
            }
        },
    };
    if result.bool("is_error")? == Some(true) && !said.starts_with("Error") {
        said.insert_str(0, "Error: ");
    }
    Ok(json!({"role": "tool", "tool_call_id": id, "content": said}))
}

/// What a block says in words. Errors: it says nothing in words, or does not belong here.
fn text(block: &Block) -> Result<String, ApiError> {
    let fields = &block.fields;
    match block.kind {
        "text" => fields.required_string("text").map(str::to_owned),
        "document" => document(fields),
        "search_result" => titled(fields, &["title", "source"], content(fields, "content")?),
        kind => Err(stranger(fields, kind)),
    }
}

/// A document of plain text, under its title.
fn document(fields: &Fields) -> Result<String, ApiError> {
    fields.required("source")?;
    let Some(source) = fields.object("source")? else { return Ok(String::new()) };
    let inside = match source.required_string("type")? {
        "text" => Content::Text(source.required_string("data")?),
        "content" => content(&source, "content")?,
        other => {
            let (path, other) = (source.path("type"), cut(other, 40));
            let message =
                format!("`{path}` must be text or content: this model reads no files, got {other}.");
            return Err(source.bad("type", message));
        }
    };
    titled(fields, &["title", "context"], inside)
}

fn titled(fields: &Fields, headings: &[&str], inside: Content) -> Result<String, ApiError> {
    let mut lines = Vec::new();
    for name in headings {
        lines.extend(fields.string(name)?.map(str::to_owned));
    }
    match inside {
        Content::Text(text) => lines.push(text.to_owned()),
        Content::Blocks(blocks) => {
            for block in &blocks {
                // Not `text`: a document in a document would be a recursion that the client bounds.
                match block.kind {
                    "text" => lines.push(block.fields.required_string("text")?.to_owned()),
                    kind => return Err(stranger(&block.fields, kind)),
                }
            }
        }
    }
    Ok(lines.join("\n"))
}

fn assistant(message: &Fields) -> Result<Map<String, Value>, ApiError> {
    let (mut texts, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    match content(message, "content")? {
        Content::Text("") => {}
        Content::Text(text) => texts.push(text.to_owned()),
        Content::Blocks(blocks) => {
            for block in &blocks {
                match block.kind {
                    "text" => texts.push(text(block)?),
                    "thinking" => thoughts.push(block.fields.required_string("thinking")?),
                    "redacted_thinking" => {}
                    "tool_use" => calls.push(call(&block.fields)?),
                    kind => return Err(stranger(&block.fields, kind)),
                }
            }
        }
    }
    let mut turn = Map::new();
    turn.insert("role".into(), json!("assistant"));
    if !texts.is_empty() {
        turn.insert("content".into(), json!(texts.join("\n")));
    }
    if !thoughts.is_empty() {
        turn.insert("reasoning".into(), json!(thoughts.join("\n")));
    }
    if !calls.is_empty() {
        turn.insert("tool_calls".into(), Value::Array(calls));
    }
    Ok(turn)
}

fn call(fields: &Fields) -> Result<Value, ApiError> {
    let id = fields.required_string("id")?;
    let name = fields.required_string("name")?;
    fields.object("input")?;
    let input = fields.get("input").cloned().unwrap_or_else(|| json!({}));
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
}

fn stranger(fields: &Fields, kind: &str) -> ApiError {
    let (path, kind) = (fields.path("type"), cut(kind, 40));
    let message = match kind.as_str() {
        "image" => format!("`{path}` is image: this is not a multimodal model, it reads text only."),
        _ => format!("`{path}` is {kind}, a block that cannot be read here."),
    };
    fields.bad("type", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body of the chat for `body`, or what is said of it.
    fn chat(body: Value) -> Result<Value, String> {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        let mut chat = Map::new();
        read(&Fields::top(map), &mut chat).map_err(|error| error.to_string())?;
        Ok(Value::Object(chat))
    }

    fn check(messages: Value, turns: Value) {
        let got = chat(json!({"messages": messages})).map(|mut chat| chat["messages"].take());
        assert_eq!(got, Ok(turns), "{messages}");
    }

    fn check_user(content: Value, said: &str) {
        let messages = json!([{"role": "user", "content": content}]);
        check(messages, json!([{"role": "user", "content": said}]));
    }

    fn refused(role: &str, content: Value, words: &str) {
        let got = chat(json!({"messages": [{"role": role, "content": content}]}));
        assert!(got.as_ref().is_err_and(|error| error.contains(words)), "{content}: {got:?}");
    }

    #[test]
    fn a_system_prompt_is_text_or_blocks_without_the_billing_line() {
        let check = |system: Value, turns: Value| {
            let got = chat(json!({"system": system, "messages": [{"role": "user", "content": "hi"}]}));
            let Ok(Value::Array(mut got)) = got.map(|mut chat| chat["messages"].take()) else { panic!() };
            got.pop();
            assert_eq!(Value::Array(got), turns, "{system}");
        };
        check(json!("Be brief."), json!([{"role": "system", "content": "Be brief."}]));
        check(json!(null), json!([]));
        let billing = json!({"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=5a3;"});
        let brief = json!({"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}});
        let kind = json!({"type": "text", "text": "Be kind."});
        check(json!([billing, brief, kind]), json!([{"role": "system", "content": "Be brief.\nBe kind."}]));
        check(json!([billing]), json!([]));
    }

    #[test]
    fn a_system_turn_may_stand_in_the_middle() {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]);
        check(messages.clone(), messages);
    }

    #[test]
    fn what_a_user_says_in_blocks_is_lines() {
        check_user(json!("hi"), "hi");
        check_user(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "a\nb");
        check_user(json!([]), "");
        let source = json!({"type": "text", "media_type": "text/plain", "data": "Once."});
        check_user(json!([{"type": "document", "title": "A tale", "source": source}]), "A tale\nOnce.");
        let source = json!({"type": "content", "content": [{"type": "text", "text": "Twice."}]});
        check_user(json!([{"type": "document", "source": source}]), "Twice.");
        let found = json!({"type": "search_result", "title": "T", "source": "s", "content": [{"type": "text", "text": "x"}]});
        check_user(json!([found]), "T\ns\nx");
    }

    #[test]
    fn what_tools_answered_comes_before_what_the_user_says() {
        let result =
            |id: &str, content: Value| json!({"type": "tool_result", "tool_use_id": id, "content": content});
        let content = json!([
            {"type": "text", "text": "And?"},
            result("1", json!("sunny")),
            result("2", json!([{"type": "text", "text": "cold"}, {"type": "tool_reference", "tool_name": "f"}])),
            result("3", Value::Null),
        ]);
        check(
            json!([{"role": "user", "content": content}]),
            json!([
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
                {"role": "tool", "tool_call_id": "2", "content": "cold\nf"},
                {"role": "tool", "tool_call_id": "3", "content": ""},
                {"role": "user", "content": "And?"},
            ]),
        );
        let alone = json!([{"role": "user", "content": [result("1", json!("sunny"))]}]);
        check(alone, json!([{"role": "tool", "tool_call_id": "1", "content": "sunny"}]));
    }

    #[test]
    fn a_tools_error_says_that_it_is_one_and_its_image_that_nobody_sees_it() {
        let check = |content: Value, is_error: bool, said: &str| {
            let result =
                json!({"type": "tool_result", "tool_use_id": "1", "content": content, "is_error": is_error});
            check(
                json!([{"role": "user", "content": [result]}]),
                json!([{"role": "tool", "tool_call_id": "1", "content": said}]),
            );
        };
        check(json!("no such file"), true, "Error: no such file");
        check(json!("Error: no such file"), true, "Error: no such file");
        check(json!([{"type": "image", "source": {}}]), false, UNSEEN);
    }

    #[test]
    fn an_assistants_blocks_are_thought_text_and_calls() {
        let content = json!([
            {"type": "thinking", "thinking": "Hm.", "signature": "whatever"},
            {"type": "redacted_thinking", "data": "secret"},
            {"type": "text", "text": "Let me see.", "citations": null},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}, "cache_control": {}},
            {"type": "tool_use", "id": "toolu_2", "name": "g"},
        ]);
        let call = |id: &str, name: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        check(
            json!([{"role": "assistant", "content": content}]),
            json!([{
                "role": "assistant", "content": "Let me see.", "reasoning": "Hm.",
                "tool_calls": [call("toolu_1", "f", json!({"a": 1})), call("toolu_2", "g", json!({}))],
            }]),
        );
    }

    #[test]
    fn an_assistant_who_speaks_last_is_continued() {
        let continued = |last: Value| {
            let user = json!({"role": "user", "content": "hi"});
            let got =
                chat(json!({"messages": [user, {"role": "assistant", "content": last}]})).expect("valid");
            (got["messages"].as_array().map(Vec::len), got["continue_final_message"] == true)
        };
        assert_eq!(continued(json!("I think")), (Some(2), true));
        assert_eq!(continued(json!([{"type": "thinking", "thinking": "Hm"}])), (Some(2), true));
        assert_eq!(continued(json!("")), (Some(1), false));
        assert_eq!(continued(json!([])), (Some(1), false));
        let user = chat(json!({"messages": [{"role": "user", "content": "hi"}]})).expect("valid");
        assert!(user.get("continue_final_message").is_none());
    }

    #[test]
    fn a_block_that_cannot_be_read_is_named() {
        refused("wizard", json!("x"), "`messages[0].role` must be user, assistant or system, got wizard");
        refused("user", json!(null), "`messages[0].content` is required");
        refused("user", json!(7), "`messages[0].content` must be a string or a list of blocks");
        refused("user", json!(["x"]), "`messages[0].content[0]` must be an object");
        refused("user", json!([{"text": "x"}]), "`messages[0].content[0].type` is required");
        refused("user", json!([{"type": "text"}]), "`messages[0].content[0].text` is required");
        refused(
            "user",
            json!([{"type": "text", "text": 7}]),
            "`messages[0].content[0].text` must be a string",
        );
        let image = json!({"type": "image", "source": {"type": "base64", "data": "AAAA"}});
        refused("user", json!(["text", image]), "`messages[0].content[0]` must be");
        refused("user", json!([image]), "`messages[0].content[0].type` is image: this is not a multimodal");
        let file = json!({"type": "document", "source": {"type": "base64", "data": "AAAA"}});
        refused("user", json!([file]), "`messages[0].content[0].source.type` must be text or content");
        refused("user", json!([{"type": "document"}]), "`messages[0].content[0].source` is required");
        refused("user", json!([{"type": "tool_use", "id": "1", "name": "f"}]), "is tool_use, a block that");
        refused("user", json!([{"type": "tool_result"}]), "`messages[0].content[0].tool_use_id` is required");
        let inner = json!([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text"}]}]);
        refused("user", inner, "`messages[0].content[0].content[0].text` is required");
        let inner = json!([{"type": "tool_result", "tool_use_id": "1", "is_error": "yes"}]);
        refused("user", inner, "`messages[0].content[0].is_error` must be true or false");
        let nested = json!({"type": "content", "content": [file]});
        refused("user", json!([{"type": "document", "source": nested}]), "is document, a block that");
        refused("assistant", json!([{"type": "tool_result"}]), "is tool_result, a block that");
        refused("assistant", json!([{"type": "thinking"}]), "`messages[0].content[0].thinking` is required");
        refused("assistant", json!([{"type": "tool_use", "name": "f"}]), "content[0].id` is required");
        refused("assistant", json!([{"type": "tool_use", "id": "1"}]), "content[0].name` is required");
        let call = json!([{"type": "tool_use", "id": "1", "name": "f", "input": "{}"}]);
        refused("assistant", call, "`messages[0].content[0].input` must be an object");
        refused("system", json!([image]), "`messages[0].content[0].type` is image");
        assert_eq!(chat(json!({})), Err("`messages` is required.".into()));
        assert_eq!(chat(json!({"messages": []})), Err("`messages` must not be empty.".into()));
        assert!(chat(json!({"messages": "hi"})).is_err_and(|error| error.contains("must be an array")));
        assert!(
            chat(json!({"messages": ["hi"]})).is_err_and(|error| error.contains("`messages[0]` must be"))
        );
        let system = json!({"system": 7, "messages": [{"role": "user", "content": "x"}]});
        assert!(chat(system).is_err_and(|error| error.contains("`system` must be a string or a list")));
    }
}
