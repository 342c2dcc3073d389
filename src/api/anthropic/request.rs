//! A body of `/v1/messages` becomes one of `/v1/chat/completions`, which is then read like any other.

use super::{history, tools};
use crate::api::error::{ApiError, cut};
use crate::api::fields::Fields;
use crate::api::types::RequestOptions;
use serde_json::{Map, Value, json};

/// Fields that mean the same there; the last ones are this server's own.
const SAME: [&str; 9] =
    ["stream", "temperature", "top_p", "top_k", "cache_salt", "seed", "priority", "timeout", "speculation"];

/// What a chat calls it, and what the client did: an error shall speak of the field that was sent.
const SPELLINGS: [(&str, &str); 5] = [
    ("response_format.json_schema", "output_config.format"),
    ("thinking_token_budget", "thinking.budget_tokens"),
    ("`stop`", "`stop_sequences`"),
    (".function.parameters", ".input_schema"),
    (".function.name", ".name"),
];

/// The body of the chat. Errors: 400 for what is missing or malformed; the rest is the chat's own business.
pub fn whole(fields: &Fields, options: &RequestOptions) -> Result<Map<String, Value>, ApiError> {
    let mut chat = prompt(fields, options)?;
    fields.required("max_tokens")?;
    let max_tokens = fields.integer("max_tokens", 1..=i64::MAX)?.unwrap_or(1);
    chat.insert("max_tokens".into(), json!(max_tokens));
    // Agents ask for as much as Anthropic's models can write, whatever model answers.
    chat.insert("clamp_max_tokens".into(), json!(true));
    if let Some(budget) = budget(fields)? {
        chat.insert("thinking_token_budget".into(), json!(budget.min(max_tokens - 1)));
    }
    for name in SAME {
        if let Some(value) = fields.get(name) {
            chat.insert(name.into(), value.clone());
        }
    }
    if let Some(stop) = fields.get("stop_sequences") {
        chat.insert("stop".into(), stop.clone());
    }
    if let Some(format) = format(fields)? {
        chat.insert("response_format".into(), format);
    }
    Ok(chat)
}

/// As much of it as becomes the prompt.
pub fn prompt(fields: &Fields, options: &RequestOptions) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    history::read(fields, &mut chat)?;
    tools::read(fields, &mut chat)?;
    chat.insert("chat_template_kwargs".into(), Value::Object(kwargs(fields, options)?));
    Ok(chat)
}

/// The template's variables: the request's own, and beneath them what `thinking` and `output_config.effort` mean.
fn kwargs(fields: &Fields, options: &RequestOptions) -> Result<Map<String, Value>, ApiError> {
    let mut kwargs = Map::new();
    let thinking = thinking(fields, options)?;
    if let Some(thinking) = thinking {
        kwargs.insert("enable_thinking".into(), json!(thinking));
    }
    // Where there is no thought, no word of effort belongs into the prompt.
    if let Some(effort) = effort(fields)?.filter(|_| thinking != Some(false)) {
        kwargs.insert("low_effort".into(), json!(effort == "low"));
    }
    if fields.object("chat_template_kwargs")?.is_some()
        && let Some(Value::Object(own)) = fields.get("chat_template_kwargs")
    {
        kwargs.extend(own.clone());
    }
    Ok(kwargs)
}

/// Whether the request decides on thinking, and how.
fn thinking(fields: &Fields, options: &RequestOptions) -> Result<Option<bool>, ApiError> {
    let Some(thinking) = fields.object("thinking")? else {
        return Ok((!options.anthropic_thinking).then_some(false));
    };
    match thinking.required_string("type")? {
        "enabled" => Ok(Some(true)),
        "disabled" => Ok(Some(false)),
        // When to think is the model's own choice here.
        "adaptive" | "between_tools" => Ok(None),
        other => {
            let other = cut(other, 40);
            let message = format!("`thinking.type` must be enabled, disabled or adaptive, got {other}.");
            Err(thinking.bad("type", message))
        }
    }
}

/// Tokens of thought at most. Anthropic's own least is 1024; smaller ones do no harm here.
fn budget(fields: &Fields) -> Result<Option<i64>, ApiError> {
    let Some(thinking) = fields.object("thinking")? else { return Ok(None) };
    if thinking.string("type")? != Some("enabled") {
        return Ok(None);
    }
    thinking.required("budget_tokens")?;
    thinking.integer("budget_tokens", 1..=i64::MAX)
}

fn effort<'a>(fields: &Fields<'a>) -> Result<Option<&'a str>, ApiError> {
    let Some(config) = fields.object("output_config")? else { return Ok(None) };
    match config.string("effort")? {
        effort @ (None | Some("low" | "medium" | "high" | "xhigh" | "max")) => Ok(effort),
        Some(other) => {
            let other = cut(other, 40);
            let message =
                format!("`output_config.effort` must be low, medium, high, xhigh or max, got {other}.");
            Err(config.bad("effort", message))
        }
    }
}

/// `output_config.format` in a chat's words.
fn format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(config) = fields.object("output_config")? else { return Ok(None) };
    let Some(format) = config.object("format")? else { return Ok(None) };
    match format.required_string("type")? {
        "json_schema" => {
            let schema = format.required("schema")?;
            Ok(Some(json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})))
        }
        other => {
            let other = cut(other, 40);
            let message = format!("`output_config.format.type` must be json_schema, got {other}.");
            Err(format.bad("type", message))
        }
    }
}

/// An error of the chat in the client's own words.
pub fn respelled(error: ApiError) -> ApiError {
    let ApiError::BadRequest { mut message, param } = error else { return error };
    for (theirs, ours) in SPELLINGS {
        message = message.replace(theirs, ours);
    }
    ApiError::BadRequest { message, param }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(extra: Value, options: &RequestOptions) -> Result<Value, String> {
        let mut body = json!({"max_tokens": 5000, "messages": [{"role": "user", "content": "hi"}]});
        let (Value::Object(map), Value::Object(extra)) = (&mut body, extra) else { panic!("objects") };
        map.extend(extra);
        whole(&Fields::top(map), options).map(Value::Object).map_err(|error| error.to_string())
    }

    fn check(extra: Value, name: &str, expected: Value) {
        let got = chat(extra.clone(), &RequestOptions::default()).expect("valid");
        assert_eq!(got[name], expected, "{extra}");
    }

    #[test]
    fn a_limit_is_required_and_cut_to_the_context() {
        check(json!({}), "max_tokens", json!(5000));
        check(json!({}), "clamp_max_tokens", json!(true));
        check(json!({"max_tokens": 7.0}), "max_tokens", json!(7));
    }

    #[test]
    fn what_both_know_goes_through_and_what_nobody_asked_for_does_not() {
        check(json!({"temperature": 0.5}), "temperature", json!(0.5));
        check(json!({"top_k": 40}), "top_k", json!(40));
        check(json!({"stop_sequences": ["a"]}), "stop", json!(["a"]));
        check(json!({"cache_salt": "mine"}), "cache_salt", json!("mine"));
        check(json!({"n": 4, "logprobs": true}), "n", Value::Null);
        check(json!({"metadata": {"user_id": "x"}, "service_tier": "auto"}), "metadata", Value::Null);
    }

    #[test]
    fn thinking_is_the_templates_own_unless_said() {
        let kwargs = "chat_template_kwargs";
        check(json!({}), kwargs, json!({}));
        check(json!({"thinking": {"type": "adaptive"}}), kwargs, json!({}));
        check(json!({"thinking": {"type": "between_tools"}}), kwargs, json!({}));
        check(json!({"thinking": {"type": "disabled"}}), kwargs, json!({"enable_thinking": false}));
        let enabled = json!({"type": "enabled", "budget_tokens": 2000});
        check(json!({"thinking": enabled}), kwargs, json!({"enable_thinking": true}));
        let own = json!({"enable_thinking": false, "x": 1});
        check(json!({"thinking": enabled, kwargs: own}), kwargs, own);
    }

    #[test]
    fn a_server_may_think_only_when_asked() {
        let options = RequestOptions { anthropic_thinking: false, ..RequestOptions::default() };
        let kwargs = |extra: Value| chat(extra, &options).map(|mut chat| chat["chat_template_kwargs"].take());
        assert_eq!(kwargs(json!({})), Ok(json!({"enable_thinking": false})));
        assert_eq!(kwargs(json!({"thinking": {"type": "adaptive"}})), Ok(json!({})));
    }

    #[test]
    fn a_budget_leaves_room_for_an_answer() {
        let budget = |tokens| json!({"thinking": {"type": "enabled", "budget_tokens": tokens}});
        check(budget(2000), "thinking_token_budget", json!(2000));
        check(budget(5000), "thinking_token_budget", json!(4999));
        check(json!({"thinking": {"type": "disabled"}}), "thinking_token_budget", Value::Null);
    }

    #[test]
    fn effort_is_a_word_for_the_template_where_there_is_thought() {
        let effort = |effort: &str| json!({"output_config": {"effort": effort}});
        check(effort("low"), "chat_template_kwargs", json!({"low_effort": true}));
        check(effort("max"), "chat_template_kwargs", json!({"low_effort": false}));
        let silent = json!({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}});
        check(silent, "chat_template_kwargs", json!({"enable_thinking": false}));
    }

    #[test]
    fn a_format_is_a_schema() {
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        let schema = json!({"name": "answer", "schema": {"type": "object"}});
        let expected = json!({"type": "json_schema", "json_schema": schema});
        check(json!({"output_config": {"format": format}}), "response_format", expected);
        check(json!({"output_config": {"format": null}}), "response_format", Value::Null);
    }

    #[test]
    fn what_is_malformed_is_named() {
        let refused = |extra: Value, words: &str| {
            let got = chat(extra.clone(), &RequestOptions::default());
            assert!(got.as_ref().is_err_and(|error| error.contains(words)), "{extra}: {got:?}");
        };
        refused(json!({"max_tokens": null}), "`max_tokens` is required");
        refused(json!({"max_tokens": 0}), "`max_tokens` must be at least 1, got 0");
        refused(json!({"max_tokens": "many"}), "`max_tokens` must be an integer");
        refused(json!({"thinking": "on"}), "`thinking` must be an object");
        refused(json!({"thinking": {}}), "`thinking.type` is required");
        refused(
            json!({"thinking": {"type": "deep"}}),
            "`thinking.type` must be enabled, disabled or adaptive",
        );
        refused(json!({"thinking": {"type": "enabled"}}), "`thinking.budget_tokens` is required");
        let none = json!({"thinking": {"type": "enabled", "budget_tokens": 0}});
        refused(none, "`thinking.budget_tokens` must be at least 1");
        refused(json!({"output_config": 7}), "`output_config` must be an object");
        refused(json!({"output_config": {"effort": "some"}}), "`output_config.effort` must be low");
        let format = |format: Value| json!({"output_config": {"format": format}});
        refused(format(json!({"type": "xml"})), "`output_config.format.type` must be json_schema, got xml");
        refused(format(json!({"type": "json_schema"})), "`output_config.format.schema` is required");
        refused(json!({"chat_template_kwargs": []}), "`chat_template_kwargs` must be an object");
    }

    #[test]
    fn a_chats_error_speaks_of_the_field_that_was_sent() {
        let error = ApiError::bad("stop", "`stop` must not hold an empty string.");
        assert_eq!(respelled(error).to_string(), "`stop_sequences` must not hold an empty string.");
        let error = ApiError::bad("x", "`response_format.json_schema.schema`: no type `t`.");
        assert_eq!(respelled(error).to_string(), "`output_config.format.schema`: no type `t`.");
    }
}
