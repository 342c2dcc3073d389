//! Random requests: what clients ask for, in all combinations.

use super::Random;
use serde_json::{Map, Value, json};

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";

const TEXTS: [&str; 8] = [
    "What is 17 + 25?",
    "Hello!",
    "Search the web for rain in Bonn.",
    "Remind me to call Mum at nine.",
    "Grüße aus Köln 🦀, 東京",
    "Repeat: one two three",
    "<think> is a word, </think> too",
    "",
];
const STOPS: [&str; 7] = ["e", "42", ".", " the", "\n", "</tool_call>", "one two"];

pub fn request(random: &mut Random) -> (&'static str, Value) {
    let mut body = Map::new();
    sampling(random, &mut body);
    let path = if random.below(4) == 0 { COMPLETIONS } else { CHAT };
    if path == CHAT {
        chat(random, &mut body)
    } else {
        completion(random, &mut body)
    }
    (path, Value::Object(body))
}

fn one_of<T: Clone>(random: &mut Random, items: &[T]) -> T {
    items[random.below(items.len())].clone()
}

/// Puts `value` under `name` in one of `of` requests.
fn sometimes(random: &mut Random, of: usize, body: &mut Map<String, Value>, name: &str, value: Value) {
    if random.below(of) == 0 {
        body.insert(name.into(), value);
    }
}

fn sampling(random: &mut Random, body: &mut Map<String, Value>) {
    let temperature = one_of(random, &[0.0, 0.0, 0.7, 1.5]);
    body.insert("temperature".into(), json!(temperature));
    // Without a seed of its own a request is drawn anew each time.
    body.insert("seed".into(), json!(random.below(1000)));
    body.insert("max_tokens".into(), json!(1 + random.below(48)));
    if temperature > 0.0 {
        let n = 2 + random.below(2);
        sometimes(random, 4, body, "n", json!(n));
    }
    let stops = [json!(one_of(random, &STOPS)), json!([one_of(random, &STOPS), one_of(random, &STOPS)])];
    let stop = one_of(random, &stops);
    sometimes(random, 4, body, "stop", stop);
    let ids = json!([random.below(1200), random.below(1200), random.below(64)]);
    sometimes(random, 6, body, "stop_token_ids", ids);
    let least = random.below(12);
    sometimes(random, 6, body, "min_tokens", json!(least));
    let bias = json!({random.below(1200).to_string(): 5, random.below(1200).to_string(): -100});
    sometimes(random, 8, body, "logit_bias", bias);
    for (of, name, value) in [
        (5, "ignore_eos", json!(true)),
        (5, "include_stop_str_in_output", json!(true)),
        (6, "skip_special_tokens", json!(false)),
        (4, "top_p", json!(0.8)),
        (6, "top_k", json!(20)),
        (8, "min_p", json!(0.05)),
        (6, "presence_penalty", json!(1.0)),
        (6, "frequency_penalty", json!(0.5)),
        (6, "repetition_penalty", json!(1.2)),
        (4, "return_token_ids", json!(true)),
        (8, "return_tokens_as_token_ids", json!(true)),
        (8, "speculation", json!("off")),
        (8, "cache_salt", json!("own")),
    ] {
        sometimes(random, of, body, name, value);
    }
}

fn chat(random: &mut Random, body: &mut Map<String, Value>) {
    let mut messages = Vec::new();
    if random.below(2) == 0 {
        messages.push(json!({"role": "system", "content": "You are a toy. ".repeat(1 + random.below(8))}));
    }
    for _ in 0..random.below(3) {
        messages.push(json!({"role": "user", "content": one_of(random, &TEXTS)}));
        messages.push(json!({
            "role": "assistant", "content": one_of(random, &TEXTS), "reasoning": one_of(random, &TEXTS),
        }));
    }
    messages.push(json!({"role": "user", "content": one_of(random, &TEXTS)}));
    body.insert("messages".into(), json!(messages));
    if random.below(3) == 0 {
        body.insert("logprobs".into(), json!(true));
        body.insert("top_logprobs".into(), json!(random.below(4)));
    }
    if random.below(2) == 0 {
        tools(random, body);
    }
    let forced =
        matches!(body.get("tool_choice"), Some(choice) if !matches!(choice.as_str(), Some("auto" | "none")));
    if !forced {
        constraint(random, body);
    }
    let off = json!({"enable_thinking": false});
    let full = json!({"force_nonempty_content": true});
    let kwargs = one_of(random, &[off, full]);
    sometimes(random, 3, body, "chat_template_kwargs", kwargs);
    let budget = random.below(10);
    sometimes(random, 5, body, "thinking_token_budget", json!(budget));
    sometimes(random, 6, body, "include_reasoning", json!(false));
}

fn tools(random: &mut Random, body: &mut Map<String, Value>) {
    let tool = |name: &str, properties: Value| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": properties,
        }}})
    };
    let search = tool("web_search", json!({"query": {"type": "string", "maxLength": 20}}));
    let remind = tool(
        "set_reminder",
        json!({
            "text": {"type": "string", "maxLength": 12}, "hour": {"type": "integer", "minimum": 0, "maximum": 23},
            "urgent": {"type": "boolean"},
        }),
    );
    body.insert("tools".into(), json!([search, remind]));
    let named = json!({"type": "function", "function": {"name": "set_reminder"}});
    let choice = one_of(random, &[json!("auto"), json!("required"), json!("none"), named]);
    sometimes(random, 2, body, "tool_choice", choice);
    sometimes(random, 4, body, "parallel_tool_calls", json!(false));
}

fn constraint(random: &mut Random, body: &mut Map<String, Value>) {
    let schema = json!({
        "type": "object", "required": ["a"], "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "string", "maxLength": 8},
        },
    });
    let (name, value) = one_of(
        random,
        &[
            (
                "response_format",
                json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
            ),
            ("response_format", json!({"type": "json_object"})),
            ("guided_choice", json!(["yes", "no", "peut-être"])),
            ("guided_regex", json!("[a-f]{2,9}é?")),
        ],
    );
    sometimes(random, 4, body, name, value);
}

fn completion(random: &mut Random, body: &mut Map<String, Value>) {
    // The ids below 32 are control tokens, whose text is not shown.
    let ids = json!([random.below(32), random.below(32)]);
    let prompts = [
        json!(one_of(random, &TEXTS[..7])),
        json!([one_of(random, &TEXTS[..7]), one_of(random, &TEXTS[..7])]),
        json!([40 + random.below(900), 40 + random.below(900)]),
        ids,
    ];
    body.insert("prompt".into(), one_of(random, &prompts));
    sometimes(random, 3, body, "echo", json!(true));
    let top = random.below(4);
    sometimes(random, 2, body, "logprobs", json!(top));
    constraint(random, body);
}
