//! The JSON of a request, on every route that takes one.

use std::sync::OnceLock;

use ferrotron::api::{
    ApiError, ChatRequest, Common, CompletionRequest, DetokenizeRequest, Facts, ModelInfo, Prompt,
    RequestOptions, Rules, SamplingDefaults, TokenizeInput, TokenizeRequest, read_object,
};
use serde_json::{Map, Value, json};

use super::Choices;
use super::text::tiny;

const VOCAB: u32 = 100;
const CONTEXT: usize = 64;

/// A body is refused with a client's error that names a short reason, or what is read is within its documented ranges
/// and can be rendered or refused by the template. Neither takes anything but the bytes to decide.
pub fn request(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    let body = if kind.is_multiple_of(4) { rest.to_vec() } else { body(&mut Choices(rest)) };
    let Some(map) = accepted(read_object(&body)) else { return };
    let (model, options) = model();
    let rules = Rules { model, options };
    if let Some(chat) = accepted(ChatRequest::read(&map, rules)) {
        check(&chat.common);
        assert!(!chat.chat.messages.is_empty());
        for message in &chat.chat.messages {
            assert!(matches!(message.role.as_str(), "system" | "user" | "assistant" | "tool"), "{message:?}");
            assert!(message.tool_calls.iter().all(|call| call.arguments.is_object()), "{message:?}");
        }
        assert!(chat.chat.template.is_none(), "a stranger's template");
        let _ = tiny().prompt(&chat.chat);
    }
    if let Some(completion) = accepted(CompletionRequest::read(&map, rules)) {
        check(&completion.common);
        assert!(!completion.prompts.is_empty());
        for prompt in &completion.prompts {
            let Prompt::Ids(ids) = prompt else { continue };
            assert!(!ids.is_empty() && ids.iter().all(|&id| id < VOCAB), "{ids:?}");
        }
    }
    if let Some(TokenizeRequest { input: TokenizeInput::Text { text, add_special_tokens }, .. }) =
        accepted(TokenizeRequest::read(&map, rules))
    {
        tiny().encode(&text, add_special_tokens).expect("any text can be encoded");
    }
    if let Some(detokenize) = accepted(DetokenizeRequest::read(&map, rules)) {
        assert!(detokenize.ids.iter().all(|&id| id < VOCAB), "{detokenize:?}");
    }
}

/// What was read; an error must be the client's, and must not send back more than a screen of what the client sent.
fn accepted<T>(read: Result<T, ApiError>) -> Option<T> {
    let error = match read {
        Ok(read) => return Some(read),
        Err(error) => error,
    };
    assert!(error.kind().0.is_client_error(), "{error:?}");
    let body = error.body();
    let chars = |name: &str| body["error"][name].as_str().unwrap_or_default().chars().count();
    assert!((1..=1001).contains(&chars("message")) && chars("param") < 200, "{body}");
    None
}

/// The ranges that [`ferrotron::sample::SamplingParams`] and the fields of `Common` document.
fn check(common: &Common) {
    let p = &common.sampling;
    assert!(p.temperature == 0.0 || (0.01..=2.0).contains(&p.temperature), "{common:?}");
    assert!(p.top_p > 0.0 && p.top_p <= 1.0, "{common:?}");
    assert!((0.0..=1.0).contains(&p.min_p), "{common:?}");
    assert!(p.repetition_penalty > 0.0 && p.repetition_penalty.is_finite(), "{common:?}");
    assert!((-2.0..=2.0).contains(&p.presence_penalty), "{common:?}");
    assert!((-2.0..=2.0).contains(&p.frequency_penalty), "{common:?}");
    assert!(p.logit_bias.is_sorted_by(|a, b| a.0 < b.0), "{common:?}");
    assert!(p.logit_bias.iter().all(|(id, bias)| *id < VOCAB && bias.abs() <= 100.0), "{common:?}");
    let allowed = p.allowed_ids.as_deref().unwrap_or(&[0]);
    assert!(
        !allowed.is_empty() && allowed.iter().chain(&common.stop_ids).all(|&id| id < VOCAB),
        "{common:?}"
    );
    assert!(p.logprobs.max(common.prompt_logprobs).is_none_or(|count| count <= 20), "{common:?}");
    assert!((1..=128).contains(&common.n) && (common.n == 1 || p.temperature > 0.0), "{common:?}");
    assert!(common.max_tokens.is_none_or(|max| common.min_tokens <= max && max <= CONTEXT), "{common:?}");
    assert!(common.truncate_prompt != Some(0), "{common:?}");
    assert!(common.stop.len() <= 64 && common.stop.iter().all(|stop| !stop.is_empty()), "{common:?}");
    assert_eq!(common.model, "tiny");
}

fn model() -> &'static (ModelInfo, RequestOptions) {
    static MODEL: OnceLock<(ModelInfo, RequestOptions)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let model = ModelInfo {
            served_names: vec!["tiny".into()],
            root: "tiny".into(),
            created: 0,
            max_model_len: CONTEXT,
            vocab_size: VOCAB as usize,
            stop_ids: vec![1],
            defaults: SamplingDefaults::default(),
            facts: Facts::default(),
        };
        (model, RequestOptions::default())
    })
}

/// An object with what the routes need and then fields of our choice, which may replace it.
fn body(choices: &mut Choices) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("messages".into(), json!([{"role": "user", "content": "hi"}]));
    map.insert("prompt".into(), "hi".into());
    map.insert("tokens".into(), json!([1]));
    while !choices.0.is_empty() {
        let name = choices.of(&FIELDS);
        let value = if choices.byte().is_multiple_of(2) { likely(choices, name) } else { value(choices, 0) };
        map.insert(name.into(), value);
    }
    Value::Object(map).to_string().into_bytes()
}

/// What `name` may well hold.
fn likely(choices: &mut Choices, name: &str) -> Value {
    match name {
        "messages" => {
            let messages = (0..1 + choices.byte() % 3).map(|_| {
                let role = choices.of(&["user", "assistant", "tool", "developer"]);
                let mut call = || json!({"function": {"name": "f", "arguments": value(choices, 2)}});
                let (first, second) = (call(), call());
                json!({"role": role, "content": value(choices, 2), "tool_calls": [first, second]})
            });
            messages.collect()
        }
        "tools" => {
            json!([{"type": "function", "function": {"name": "f", "parameters": value(choices, 2)}}])
        }
        "logit_bias" => {
            let biases = (0..3).map(|_| {
                (choices.of(&["7", "07", "99", "100"]).to_owned(), choices.of(&[1.5, -1.0, 1e9]).into())
            });
            Value::Object(biases.collect())
        }
        "temperature" => choices.of(&[0.0, 1e-60, 1e-3, 2.0, 2.1]).into(),
        "n" | "min_tokens" | "max_tokens" => choices.of(&[1, 2, 64, 65, 128, 129]).into(),
        "tokens" | "stop_token_ids" | "allowed_token_ids" => {
            (0..choices.byte() % 4).map(|_| choices.of(&[0, 99, 100, -1])).collect()
        }
        "stop" | "prompt" => (0..choices.byte() % 3).map(|_| choices.of(&WORDS)).collect(),
        "stream" | "logprobs" | "echo" => true.into(),
        _ => value(choices, 0),
    }
}

fn value(choices: &mut Choices, depth: usize) -> Value {
    // Deeper than any field that is read, and a bound for our own recursion.
    let kinds = if depth < 6 { 9 } else { 6 };
    match choices.byte() % kinds {
        0 => choices.of(&[Value::Null, Value::Bool(true), Value::Bool(false)].each_ref()).clone(),
        1 => choices.of(&[0.5, 1e-60, 1e300, -0.0, 2.0, 16.0, 1.5, 1e-3, 9e15]).into(),
        2 => choices.of(&[1, 0, -1, 2, 16, 63, 64, 100, 128, i64::MAX, i64::MIN]).into(),
        3 | 4 => choices.of(&WORDS).into(),
        // A letter of any kind, over and over.
        5 => char::from(choices.byte()).to_string().repeat(usize::from(choices.byte()) * 8).into(),
        6 => (0..choices.byte() % 4).map(|_| value(choices, depth + 1)).collect(),
        _ => {
            let fields = (0..choices.byte() % 6).map(|_| {
                let name =
                    if choices.byte().is_multiple_of(4) { choices.of(&FIELDS) } else { choices.of(&INNER) };
                (name.to_owned(), value(choices, depth + 1))
            });
            Value::Object(fields.collect())
        }
    }
}

/// Fields of a body.
const FIELDS: [&str; 58] = [
    "messages",
    "prompt",
    "tools",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "model",
    "tool_choice",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "truncate_prompt_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "ignore_eos",
    "echo",
    "suffix",
    "best_of",
    "add_special_tokens",
    "tokens",
    "content",
    "add_special",
    "return_token_strs",
    "request_id",
    "cache_salt",
    "response_format",
    "guided_json",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "bad_words",
    "include_reasoning",
    "thinking_token_budget",
];

/// Fields of the objects inside it.
const INNER: [&str; 24] = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "function",
    "arguments",
    "parameters",
    "description",
    "properties",
    "items",
    "tool_calls",
    "tool_call_id",
    "id",
    "reasoning",
    "reasoning_content",
    "thinking",
    "refusal",
    "include_usage",
    "enable_thinking",
    "low_effort",
    "7",
    "07",
    "99",
];

/// Strings that mean something somewhere.
const WORDS: [&str; 24] = [
    "user",
    "assistant",
    "system",
    "tool",
    "developer",
    "function",
    "",
    "text",
    "thinking",
    "reasoning",
    "tiny",
    "none",
    "auto",
    "low",
    "high",
    "f",
    "object",
    "<|im_end|>",
    "{\"a\": 1}",
    "{",
    "null",
    "é🦀",
    "a\u{0}b",
    "</think>",
];
