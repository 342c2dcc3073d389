//! `POST /v1/chat/completions`, read and validated.

use super::refused::refuse;
use super::sampling::{logprob_count, max_tokens};
use super::{Common, Constraint, Forced, Rules, message, steer, tool};
use crate::api::error::{ApiError, cut};
use crate::api::fields::Fields;
use crate::text::{Chat, Tool};
use serde_json::{Map, Value};

/// Keys of the template's own variables, which a request may not replace.
const RESERVED_KWARGS: [&str; 4] = ["messages", "tools", "chat_template", "tokenize"];

/// A chat as the engine room of text understands it, and what to do with the answer.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    pub common: Common,
    pub chat: Chat,
    /// The tools whose calls are read out of the answer; `None` if none are.
    pub tools: Option<Vec<Tool>>,
    /// `parallel_tool_calls: false`
    pub one_call: bool,
    pub forced: Option<Forced>,
    /// What the answer is to be.
    pub constraint: Option<Constraint>,
    /// `thinking_token_budget`: ids of thought at most.
    pub thinking_budget: Option<usize>,
    /// `reasoning_effort` minimal or low, and no other word on it in the request's own keys.
    pub low_effort: bool,
    /// `enable_thinking` as the template will see it.
    pub thinking: bool,
    /// An answer that is all thought is sent as content as well.
    pub force_nonempty_content: bool,
    /// `include_reasoning: false` keeps the thought to ourselves; it still counts.
    pub include_reasoning: bool,
    /// `echo`: what the assistant had said already, if the answer goes on from there.
    pub echo: Option<String>,
}

impl ChatRequest {
    pub fn read(body: &Map<String, Value>, rules: Rules) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        refuse(&fields)?;
        let echoes = fields.bool("echo")?.unwrap_or(false);
        let older = max_tokens(&fields, "max_tokens", 1, rules)?;
        let max = max_tokens(&fields, "max_completion_tokens", 1, rules)?.or(older);
        let logprobs = logprobs(&fields, rules)?;
        let common = Common::read(&fields, rules, max, logprobs)?;
        let tools = tool::read(&fields, rules.options.hide_tools_when_none)?;
        let constraint = steer::read(&fields)?;
        if let (Some(constraint), Some(_)) = (&constraint, &tools.forced)
            && !constraint.param.starts_with("response_format")
        {
            let param = &constraint.param;
            return Err(ApiError::bad(
                param,
                format!("`{param}` and a forced tool call exclude each other."),
            ));
        }
        let chat = chat(&fields, tools.shown, rules)?;
        let said = chat.messages.last().filter(|last| last.role == "assistant");
        let echo = said.filter(|_| echoes).and_then(|said| said.content.clone());
        let flag = |name| chat.kwargs.get(name).and_then(Value::as_bool);
        Ok(Self {
            thinking: flag("enable_thinking").unwrap_or(true),
            force_nonempty_content: flag("force_nonempty_content").unwrap_or(false),
            include_reasoning: fields.bool("include_reasoning")?.unwrap_or(true),
            tools: tools.parsed,
            one_call: tools.one_call,
            forced: tools.forced,
            constraint,
            thinking_budget: thinking_budget(&fields)?,
            low_effort: flag("low_effort").unwrap_or(false),
            echo,
            common,
            chat,
        })
    }
}

/// The part of a chat request that becomes the prompt; `/tokenize` reads it too.
pub fn chat(fields: &Fields, tools: Vec<Value>, rules: Rules) -> Result<Chat, ApiError> {
    let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
    let generation = fields.bool("add_generation_prompt")?;
    if continue_final_message && generation == Some(true) {
        return Err(fields.bad(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
        ));
    }
    Ok(Chat {
        messages: message::read(fields)?,
        tools,
        add_generation_prompt: generation.unwrap_or(!continue_final_message),
        continue_final_message,
        kwargs: template_kwargs(fields, rules)?,
        template: own_template(fields, rules)?,
    })
}

/// A template is a program; only a server that says so runs a stranger's.
fn own_template(fields: &Fields, rules: Rules) -> Result<Option<String>, ApiError> {
    match fields.string("chat_template")? {
        Some(_) if !rules.options.trust_template => Err(fields.bad(
            "chat_template",
            "`chat_template` is refused unless the server runs with --trust-request-chat-template.",
        )),
        template => Ok(template.map(str::to_owned)),
    }
}

/// The server's defaults, then what `reasoning_effort` means, then the request's own keys.
fn template_kwargs(fields: &Fields, rules: Rules) -> Result<Map<String, Value>, ApiError> {
    let mut kwargs = rules.options.template_kwargs.clone();
    match fields.string("reasoning_effort")? {
        None => {}
        Some("none") => {
            kwargs.insert("enable_thinking".into(), false.into());
        }
        Some(effort @ ("minimal" | "low" | "medium" | "high" | "xhigh" | "max")) => {
            kwargs.insert("enable_thinking".into(), true.into());
            kwargs.insert("low_effort".into(), matches!(effort, "minimal" | "low").into());
        }
        Some(other) => {
            let got = cut(other, 40);
            return Err(fields.bad(
                "reasoning_effort",
                format!(
                    "`reasoning_effort` must be none, minimal, low, medium, high, xhigh or max, got {got}."
                ),
            ));
        }
    }
    let Some(own) = fields.get("chat_template_kwargs") else { return Ok(kwargs) };
    let own =
        own.as_object().ok_or_else(|| crate::api::fields::wrong("chat_template_kwargs", "an object", own))?;
    for (key, value) in own {
        let path = format!("chat_template_kwargs.{}", cut(key, 64));
        if RESERVED_KWARGS.contains(&key.as_str()) {
            return Err(ApiError::bad(path.clone(), format!("`{path}` is a field of the request itself.")));
        }
        kwargs.insert(key.clone(), value.clone());
    }
    Ok(kwargs)
}

fn logprobs(fields: &Fields, rules: Rules) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = logprob_count(fields, "top_logprobs", rules)?.unwrap_or(0);
    match (wanted, top) {
        (true, top) => Ok(Some(top)),
        (false, 0) => Ok(None),
        (false, _) => Err(fields.bad("top_logprobs", "`top_logprobs` needs `logprobs: true`.")),
    }
}

/// -1 is no budget.
fn thinking_budget(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let budget = fields.integer("thinking_token_budget", -1..=i64::MAX)?;
    Ok(budget.and_then(|budget| usize::try_from(budget).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::model::{Facts, ModelInfo, SamplingDefaults};
    use crate::api::types::RequestOptions;
    use serde_json::json;

    fn read(extra: Value) -> Result<ChatRequest, ApiError> {
        let model = ModelInfo {
            served_names: vec!["tiny".into()],
            root: "tiny".into(),
            created: 0,
            max_model_len: 100,
            vocab_size: 50,
            stop_ids: vec![1],
            defaults: SamplingDefaults { temperature: 0.6, ..SamplingDefaults::default() },
            facts: Facts::default(),
        };
        let options = RequestOptions::default();
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
            body.extend(extra);
        }
        let Value::Object(map) = &body else { panic!("an object") };
        ChatRequest::read(map, Rules { model: &model, options: &options })
    }

    fn refused(extra: Value, param: &str) {
        let got = read(extra.clone()).err().map(|error| error.body()["error"]["param"].clone());
        assert_eq!(got, Some(json!(param)), "{extra}");
    }

    #[test]
    fn sampling_values_out_of_range_are_named() {
        for (name, value) in [
            ("temperature", json!(2.1)),
            ("temperature", json!(-0.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1e-60)),
            ("top_p", json!(1.5)),
            ("top_k", json!(-2)),
            ("min_p", json!(1.1)),
            ("repetition_penalty", json!(0)),
            ("repetition_penalty", json!(1e-60)),
            ("repetition_penalty", json!(1e60)),
            ("presence_penalty", json!(2.5)),
            ("frequency_penalty", json!(-3)),
            ("n", json!(0)),
            ("n", json!(129)),
            ("max_tokens", json!(0)),
            ("max_completion_tokens", json!(101)),
            ("min_tokens", json!(-1)),
            ("top_logprobs", json!(3)),
            ("seed", json!(1.5)),
            ("stop", json!("")),
            ("stop", json!([1])),
            ("stop", json!(vec!["x"; 65])),
            ("stop_token_ids", json!([50])),
            ("logit_bias", json!({"50": 1})),
            ("logit_bias", json!({"a": 1})),
            ("logit_bias", json!([1])),
            ("allowed_token_ids", json!([])),
            ("bad_words", json!("x")),
            ("bad_words", json!(["x", ""])),
            ("bad_words", json!(vec!["x"; 129])),
            ("truncate_prompt_tokens", json!(0)),
            ("stream", json!("yes")),
            ("stream_options", json!({})),
            ("reasoning_effort", json!("huge")),
            ("thinking_token_budget", json!(-2)),
            ("response_format.type", json!("xml")),
            ("cache_salt", json!("a/b")),
            ("request_id", json!("a b")),
            ("chat_template", json!("{{ messages }}")),
            ("chat_template_kwargs", json!("x")),
            ("chat_template_kwargs.tools", json!(null)),
        ] {
            match name.split_once('.') {
                Some((outer, inner)) => refused(json!({outer: {inner: value}}), name),
                None => refused(json!({name: value}), name),
            }
        }
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        refused(json!({"tools": tools, "tool_choice": "required", "guided_regex": "a"}), "guided_regex");
        refused(json!({"n": 2, "temperature": 0}), "n");
        refused(json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens");
        refused(json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs");
        refused(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs");
        refused(
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        );
    }

    #[test]
    fn what_is_not_given_comes_from_the_defaults() {
        let request = read(json!({"temperature": null, "unknown_field": {"a": 1}})).expect("valid");
        assert_eq!(request.common.sampling.temperature, 0.6);
        assert_eq!(request.common.sampling.top_p, 1.0);
        assert_eq!(request.common.max_tokens, None);
        assert!(request.thinking);
        assert!(request.chat.add_generation_prompt);
    }

    #[test]
    fn a_temperature_that_is_nearly_zero_is_raised() {
        let temperature = |value| read(json!({"temperature": value})).map(|r| r.common.sampling.temperature);
        assert_eq!(temperature(0.0), Ok(0.0));
        assert_eq!(temperature(0.001), Ok(0.01));
    }

    #[test]
    fn max_completion_tokens_wins() {
        let request = read(json!({"max_tokens": 5, "max_completion_tokens": 16.0})).expect("valid");
        assert_eq!(request.common.max_tokens, Some(16));
    }

    #[test]
    fn biases_are_clamped_and_sorted() {
        let request = read(json!({"logit_bias": {"9": 500, "2": -1.5}})).expect("valid");
        assert_eq!(request.common.sampling.logit_bias, vec![(2, -1.5), (9, 100.0)]);
    }

    #[test]
    fn effort_sets_what_the_request_did_not() {
        let thinking = |extra| read(extra).map(|request| request.thinking);
        assert_eq!(thinking(json!({"reasoning_effort": "none"})), Ok(false));
        assert_eq!(thinking(json!({"reasoning_effort": "high"})), Ok(true));
        let own = json!({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": true}});
        assert_eq!(thinking(own), Ok(true));
        let low = read(json!({"reasoning_effort": "low"})).expect("valid");
        assert_eq!(low.chat.kwargs.get("low_effort"), Some(&json!(true)));
    }
}
