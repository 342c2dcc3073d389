//! Fields that ask for something this server cannot do yet. A constraint is never ignored quietly:
//! a client that asked for JSON and got prose has been lied to.

use crate::api::error::ApiError;
use crate::api::fields::Fields;
use serde_json::Value;

/// Constraints on the shape of the answer: they need a grammar that steers the ids.
const STEERING: [&str; 7] = [
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
];

/// Other fields without an implementation behind them, and what they would do.
const MISSING: [(&str, &str); 3] = [
    ("bad_words", "banning words"),
    ("logprob_token_ids", "log-probabilities of chosen ids"),
    ("prompt_embeds", "prompts as embeddings"),
];

/// Errors: 400 that names the first field which would have to be ignored.
pub fn refuse(fields: &Fields) -> Result<(), ApiError> {
    for name in STEERING {
        if fields.get(name).is_some() {
            return Err(steering(fields, name));
        }
    }
    for (name, what) in MISSING {
        if fields.get(name).is_some_and(|value| !is_empty(value)) {
            return Err(fields.bad(name, format!("`{name}` is not supported: {what} is not implemented.")));
        }
    }
    if fields.bool("use_beam_search")? == Some(true) {
        return Err(fields.bad("use_beam_search", "`use_beam_search` is not supported: this server samples."));
    }
    response_format(fields)
}

/// `response_format` may be absent or `{"type":"text"}`.
fn response_format(fields: &Fields) -> Result<(), ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(()) };
    match format.required("type")?.as_str() {
        Some("text") => Ok(()),
        Some("json_object" | "json_schema" | "structural_tag") => Err(steering(fields, "response_format")),
        _ => Err(format.bad("type", "`response_format.type` must be text, json_object or json_schema.")),
    }
}

fn steering(fields: &Fields, name: &str) -> ApiError {
    fields.bad(
        name,
        format!(
            "`{name}` asks for an answer steered by a grammar, which this server does not implement yet. \
             It is refused rather than ignored; leave it out and ask for the format in the prompt."
        ),
    )
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(body: Value, param: Option<&str>) {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        let refused = refuse(&Fields::top(map)).err().map(|error| error.body()["error"]["param"].clone());
        assert_eq!(refused, param.map(|name| json!(name)), "{body}");
    }

    #[test]
    fn constraints_are_refused_by_name() {
        for name in STEERING {
            check(json!({name: "x"}), Some(name));
            check(json!({name: null}), None);
        }
        check(json!({"response_format": {"type": "json_object"}}), Some("response_format"));
        check(
            json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            Some("response_format"),
        );
        check(json!({"response_format": {"type": "xml"}}), Some("response_format.type"));
        check(json!({"response_format": {}}), Some("response_format.type"));
        check(json!({"response_format": "text"}), Some("response_format"));
        check(json!({"response_format": {"type": "text"}}), None);
    }

    #[test]
    fn empty_lists_ask_for_nothing() {
        check(json!({"bad_words": []}), None);
        check(json!({"bad_words": ["x"]}), Some("bad_words"));
    }
}
