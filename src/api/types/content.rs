//! A message's `content`: a string, nothing, or a list of parts, becomes text (and thoughts, if parts hold them).

use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use serde_json::Value;

/// What the parts held, joined with newlines.
#[derive(Debug, Default, PartialEq)]
pub struct Content {
    /// `None`: no content was given at all.
    pub text: Option<String>,
    /// `thinking` and `reasoning` parts of a history that another API wrote.
    pub reasoning: Option<String>,
}

/// Reads `fields.content`. Errors: a part that is not text; this family reads nothing else.
pub fn read(fields: &Fields) -> Result<Content, ApiError> {
    let path = fields.path("content");
    let Some(value) = fields.get("content") else { return Ok(Content::default()) };
    let parts = match value {
        Value::String(text) => return Ok(Content { text: Some(text.clone()), reasoning: None }),
        Value::Array(parts) => parts,
        other => return Err(wrong(&path, "a string, a list of parts or null", other)),
    };
    let (mut texts, mut thoughts) = (Vec::new(), Vec::new());
    for (index, part) in parts.iter().enumerate() {
        match read_part(part, format!("{path}[{index}]"))? {
            Part::Text(text) => texts.push(text),
            Part::Thought(text) => thoughts.push(text),
        }
    }
    let reasoning = (!thoughts.is_empty()).then(|| thoughts.join("\n"));
    Ok(Content { text: Some(texts.join("\n")), reasoning })
}

enum Part<'a> {
    Text(&'a str),
    Thought(&'a str),
}

fn read_part(part: &Value, path: String) -> Result<Part<'_>, ApiError> {
    if let Value::String(text) = part {
        return Ok(Part::Text(text));
    }
    let fields = Fields::object_at(part, path)?;
    let text_of = |name: &str| match fields.string(name)? {
        Some(text) => Ok(text),
        None => Err(fields.bad(name, format!("`{}` is required.", fields.path(name)))),
    };
    match fields.string("type")?.unwrap_or("text") {
        "text" | "input_text" | "output_text" => text_of("text").map(Part::Text),
        "refusal" => text_of("refusal").map(Part::Text),
        "thinking" => text_of("thinking").map(Part::Thought),
        "reasoning" if fields.get("reasoning").is_some() => text_of("reasoning").map(Part::Thought),
        "reasoning" => text_of("text").map(Part::Thought),
        other => {
            let kind = cut(other, 40);
            let message = format!("A part of type `{kind}` cannot be read: this is not a multimodal model.");
            Err(fields.bad("type", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(content: Value, expected: Result<(Option<&str>, Option<&str>), &str>) {
        let message = json!({"content": content});
        let Value::Object(map) = &message else { panic!("the test gives an object") };
        let got = read(&Fields::top(map)).map_err(|error| error.body()["error"]["param"].to_string());
        let expected = expected
            .map(|(text, reasoning)| Content {
                text: text.map(Into::into),
                reasoning: reasoning.map(Into::into),
            })
            .map_err(|param| format!("\"{param}\""));
        assert_eq!(got, expected);
    }

    #[test]
    fn parts_are_joined_with_newlines() {
        check(json!("plain"), Ok((Some("plain"), None)));
        check(json!(null), Ok((None, None)));
        check(json!([]), Ok((Some(""), None)));
        check(
            json!([{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]),
            Ok((Some("a\nb\nc"), None)),
        );
        check(
            json!([{"type": "thinking", "thinking": "hm"}, {"type": "refusal", "refusal": "no"}]),
            Ok((Some("no"), Some("hm"))),
        );
    }

    #[test]
    fn what_is_not_text_is_named() {
        check(json!(7), Err("content"));
        check(json!([{"type": "image_url", "image_url": {"url": "data:"}}]), Err("content[0].type"));
        check(json!([{"type": "text"}]), Err("content[0].text"));
        check(json!([7]), Err("content[0]"));
    }
}
