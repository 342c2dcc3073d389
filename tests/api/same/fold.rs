//! A stream, held to its order and put together again; and what a plain answer tells in the same form.

use serde_json::{Map, Value, json};

type Folded = Result<Value, String>;

/// The events before `[DONE]`, the head's fields the same in all of them; and the usage, which is in the last alone.
fn events(text: &str) -> Result<(Vec<Value>, Value), String> {
    let data = text.lines().filter(|line| !line.is_empty());
    let data: Option<Vec<&str>> = data.map(|line| line.strip_prefix("data: ")).collect();
    let mut data = data.ok_or("a line that is no event")?;
    need(data.pop() == Some("[DONE]"), "the last event is not [DONE]")?;
    let events: Result<Vec<Value>, _> = data.iter().map(|event| serde_json::from_str(event)).collect();
    let mut events = events.map_err(|error| error.to_string())?;
    for key in ["id", "object", "created", "model", "system_fingerprint"] {
        need(events.iter().all(|event| event[key] == events[0][key]), key)?;
    }
    let last = events.pop().ok_or("no events")?;
    need(last["choices"] == json!([]) && last["usage"].is_object(), "the last event is not the usage")?;
    need(events.iter().all(|event| event.get("usage").is_none_or(Value::is_null)), "usage before the end")?;
    let single = |event: &Value| event["choices"].as_array().is_some_and(|choices| choices.len() == 1);
    need(events.iter().all(single), "an event of none or several choices")?;
    Ok((events, spent(&last["usage"])))
}

fn need(fact: bool, fault: &str) -> Result<(), String> {
    if fact { Ok(()) } else { Err(fault.to_owned()) }
}

/// What was cached depends on who came first.
fn spent(usage: &Value) -> Value {
    let mut usage = usage.clone();
    if let Value::Object(usage) = &mut usage {
        usage.shift_remove("prompt_tokens_details");
    }
    usage
}

/// The choices that `events` speak of, in order of their index, each with its events.
fn by_choice(events: &[Value]) -> Result<Vec<Vec<&Value>>, String> {
    let mut choices: Vec<Vec<&Value>> = Vec::new();
    for event in events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().ok_or("a choice without an index")? as usize;
        choices.resize_with(choices.len().max(index + 1), Vec::new);
        choices[index].push(choice);
    }
    for choice in &choices {
        let ended = |choice: &&Value| !choice["finish_reason"].is_null();
        need(choice.last().is_some_and(ended), "a choice that does not end")?;
        need(choice.iter().filter(|choice| ended(choice)).count() == 1, "a choice that ends twice")?;
    }
    Ok(choices)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(parts: impl Iterator<Item = Value>) -> Value {
    parts.flat_map(|part| part.as_array().cloned().unwrap_or_default()).collect()
}

/// A streamed chat in the form of [`told_of_chat`].
pub fn chat(stream: &str) -> Folded {
    let (events, usage) = events(stream)?;
    let mut choices = Vec::new();
    for pieces in by_choice(&events)? {
        choices.push(chat_choice(&pieces)?);
    }
    let prompt = events.iter().find_map(|event| event.get("prompt_token_ids")).cloned();
    Ok(json!({"choices": choices, "usage": usage, "prompt": prompt}))
}

fn chat_choice(pieces: &[&Value]) -> Folded {
    let (mut content, mut reasoning) = (String::new(), String::new());
    let mut calls: Vec<Map<String, Value>> = Vec::new();
    for (place, piece) in pieces.iter().enumerate() {
        let delta = &piece["delta"];
        need((place == 0) == (delta["role"] == "assistant"), "a role that is not first")?;
        need(delta["reasoning"] == delta["reasoning_content"], "two names with two thoughts")?;
        let (thought, said) = (text(&delta["reasoning"]), text(&delta["content"]));
        let call = delta.get("tool_calls");
        let kinds = [!thought.is_empty(), !said.is_empty(), call.is_some()];
        need(kinds.iter().filter(|kind| **kind).count() <= 1, "a delta of two kinds")?;
        need(
            ["content", "reasoning"].iter().all(|key| delta.get(key).is_none_or(Value::is_string)),
            "a null",
        )?;
        if let Some(call) = call {
            one_call(call, &mut calls)?;
        }
        reasoning += &thought;
        content += &said;
    }
    let last = pieces.last().ok_or("no events")?;
    Ok(json!({
        "content": content, "reasoning": reasoning, "calls": calls,
        "finish_reason": last["finish_reason"], "stop_reason": last["stop_reason"],
        "logprobs": list(pieces.iter().map(|piece| piece["logprobs"]["content"].clone())),
        "ids": list(pieces.iter().map(|piece| piece["token_ids"].clone())),
    }))
}

/// One call per delta, named once, its index counting up.
fn one_call(delta: &Value, calls: &mut Vec<Map<String, Value>>) -> Result<(), String> {
    let [call] = delta.as_array().map(Vec::as_slice).unwrap_or_default() else {
        return Err("a delta of several calls".into());
    };
    let function = &call["function"];
    if let Some(id) = call["id"].as_str() {
        need(call["index"] == calls.len() && call["type"] == "function", "a call out of order")?;
        need(!id.is_empty() && function["name"].is_string(), "a call without a name")?;
        calls.push(Map::from_iter([
            ("name".to_owned(), function["name"].clone()),
            ("arguments".to_owned(), json!("")),
        ]));
    } else {
        need(function.get("name").is_none() && call.get("type").is_none(), "a call that is named twice")?;
    }
    need(call["index"].as_u64().map(|index| index + 1) == Some(calls.len() as u64), "another call's piece")?;
    let whole = calls.last_mut().and_then(|call| call.get_mut("arguments")).ok_or("arguments of no call")?;
    *whole = json!(text(whole) + &text(&function["arguments"]));
    Ok(())
}

/// A plain chat, with what a stream of it may tell differently taken over from `folded`.
pub fn told_of_chat(plain: &Value, folded: &Value, body: &Value) -> Value {
    let choices = plain["choices"].as_array().cloned().unwrap_or_default();
    let choices = choices.iter().enumerate().map(|(index, choice)| {
        let (message, streamed) = (&choice["message"], &folded["choices"][index]);
        let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
        let mut calls: Vec<Value> = calls
            .iter()
            .map(|call| json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}))
            .collect();
        let cut = choice["finish_reason"] == "length";
        // A call that the limit cuts off is not told of, but what was streamed of it was.
        if let Some(open) = streamed["calls"].get(calls.len()).filter(|_| cut) {
            calls.push(open.clone());
        }
        let mut reasoning = text(&message["reasoning"]);
        let content = text(&message["content"]);
        // A thought that turns out to be the answer had been streamed as a thought before.
        let full = body["chat_template_kwargs"]["force_nonempty_content"] == true;
        if full && reasoning.is_empty() && streamed["reasoning"] == content.as_str() {
            reasoning = content.clone();
        }
        let absent = message["content"].is_null();
        assert!(!absent || cut || !calls.is_empty(), "no content and nothing in its place: {plain}");
        assert!(message.get("tool_calls").is_none_or(|calls| calls != &json!([])), "{plain}");
        json!({
            "content": content, "reasoning": reasoning, "calls": calls,
            "finish_reason": choice["finish_reason"], "stop_reason": choice["stop_reason"],
            "logprobs": list(std::iter::once(choice["logprobs"]["content"].clone())),
            "ids": list(std::iter::once(choice["token_ids"].clone())),
        })
    });
    let choices: Value = choices.collect();
    json!({"choices": choices, "usage": spent(&plain["usage"]), "prompt": plain.get("prompt_token_ids")})
}

const LISTS: [&str; 4] = ["tokens", "token_logprobs", "text_offset", "top_logprobs"];

/// A streamed completion in the form of [`told_of_completion`].
pub fn completion(stream: &str) -> Folded {
    let (events, usage) = events(stream)?;
    let choices = by_choice(&events)?;
    let choices: Value = choices.iter().map(|pieces| completion_choice(pieces)).collect();
    Ok(json!({"choices": choices, "usage": usage}))
}

pub fn told_of_completion(plain: &Value) -> Value {
    let choices = plain["choices"].as_array().cloned().unwrap_or_default();
    let choices: Value = choices.iter().map(|choice| completion_choice(&[choice])).collect();
    json!({"choices": choices, "usage": spent(&plain["usage"])})
}

fn completion_choice(pieces: &[&Value]) -> Value {
    let last = pieces.last().expect("a choice has events");
    let prompt = pieces.iter().find_map(|piece| piece.get("prompt_token_ids"));
    let scores: Map<String, Value> = LISTS
        .iter()
        .map(|name| ((*name).to_owned(), list(pieces.iter().map(|piece| piece["logprobs"][*name].clone()))))
        .collect();
    json!({
        "text": pieces.iter().map(|piece| text(&piece["text"])).collect::<String>(),
        "finish_reason": last["finish_reason"], "stop_reason": last["stop_reason"],
        "logprobs": scores, "prompt": prompt,
        "ids": list(pieces.iter().map(|piece| piece["token_ids"].clone())),
    })
}
