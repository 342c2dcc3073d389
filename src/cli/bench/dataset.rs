//! The requests a load is made of.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::chance::Chance;
use crate::cli::eval::HELDOUT;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Token ids drawn by chance
    Random,
    /// The chats that ship with the tiny model
    Heldout,
    /// JSON lines of {"prompt"}, {"messages"} or {"request"}, from --dataset-path
    Custom,
    /// ShareGPT's JSON list of conversations, from --dataset-path
    Sharegpt,
}

impl DatasetName {
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Heldout => "heldout",
            Self::Custom => "custom",
            Self::Sharegpt => "sharegpt",
        }
    }
}

/// Which route is asked, and so in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Completion,
    Chat,
}

/// The lengths of random prompts, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct RandomLengths {
    pub prefix: usize,
    pub input: usize,
    pub output: usize,
    /// Lengths are drawn from this share below to this share above.
    pub range_ratio: f64,
    pub vocab: usize,
}

/// Bodies of `count` requests with ids drawn by chance; all begin with the same `prefix` ids.
pub fn random(lengths: RandomLengths, count: usize, chance: &mut Chance) -> Vec<Map<String, Value>> {
    let RandomLengths { prefix, input, output, range_ratio, vocab } = lengths;
    let prefix: Vec<usize> = (0..prefix).map(|_| chance.below(vocab)).collect();
    (0..count)
        .map(|_| {
            let input = around(input, range_ratio, chance);
            let output = around(output, range_ratio, chance);
            let ids: Vec<usize> = prefix
                .iter()
                .copied()
                .chain((0..input).map(|_| chance.below(vocab)).collect::<Vec<_>>())
                .collect();
            object(json!({"prompt": ids, "max_tokens": output}))
        })
        .collect()
}

/// Uniform from `len` · (1 - ratio) to `len` · (1 + ratio), at least 1.
fn around(len: usize, ratio: f64, chance: &mut Chance) -> usize {
    let low = (len as f64 * (1.0 - ratio)).floor() as usize;
    let high = (len as f64 * (1.0 + ratio)).ceil() as usize;
    (low + chance.below(high - low + 1)).max(1)
}

/// The chats of the tiny model's held-out file, in a seeded order, from the start again when they are used up.
pub fn heldout(count: usize, output: usize, chance: &mut Chance) -> anyhow::Result<Vec<Map<String, Value>>> {
    let problems = lines(HELDOUT, "heldout.jsonl")?;
    cycle(&problems, count, chance, |problem| written(problem, Form::Chat, output))
}

/// Of a file of JSON lines or, for ShareGPT, one list. Errors name the file and what is wrong in it.
pub fn file(
    name: DatasetName,
    path: &Path,
    form: Form,
    count: usize,
    output: usize,
    chance: &mut Chance,
) -> anyhow::Result<Vec<Map<String, Value>>> {
    let shown = path.display().to_string();
    let text =
        std::fs::read_to_string(path).with_context(|| format!("--dataset-path: cannot read {shown}"))?;
    let problems = match name {
        DatasetName::Sharegpt => conversations(&text).with_context(|| shown.clone())?,
        _ => lines(&text, &shown)?,
    };
    ensure!(!problems.is_empty(), "{shown}: no prompts");
    cycle(&problems, count, chance, |problem| written(problem, form, output)).with_context(|| shown.clone())
}

fn lines(text: &str, name: &str) -> anyhow::Result<Vec<Value>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| serde_json::from_str(line).with_context(|| format!("{name}, line {}", i + 1)))
        .collect()
}

/// The first turn of each conversation of two turns or more.
fn conversations(text: &str) -> anyhow::Result<Vec<Value>> {
    let list: Vec<Value> = serde_json::from_str(text).context("expected a list of conversations")?;
    let first = |entry: &Value| {
        let turns = entry["conversations"].as_array().filter(|turns| turns.len() >= 2)?;
        Some(json!({"prompt": turns[0]["value"].as_str()?}))
    };
    Ok(list.iter().filter_map(first).collect())
}

fn cycle(
    problems: &[Value],
    count: usize,
    chance: &mut Chance,
    written: impl Fn(&Value) -> anyhow::Result<Map<String, Value>>,
) -> anyhow::Result<Vec<Map<String, Value>>> {
    let mut order: Vec<usize> = (0..problems.len()).collect();
    // Fisher and Yates.
    for last in (1..order.len()).rev() {
        order.swap(last, chance.below(last + 1));
    }
    (0..count).map(|i| written(&problems[order[i % order.len()]])).collect()
}

/// A line of a dataset in the form of the route.
fn written(problem: &Value, form: Form, output: usize) -> anyhow::Result<Map<String, Value>> {
    let mut body = match (problem.get("request"), problem.get("messages"), problem.get("prompt")) {
        (Some(request @ Value::Object(_)), ..) => object(request.clone()),
        (_, Some(messages), _) => object(json!({"messages": messages})),
        (_, _, Some(Value::String(prompt))) if form == Form::Chat => {
            object(json!({"messages": [{"role": "user", "content": prompt}]}))
        }
        (_, _, Some(prompt)) => object(json!({"prompt": prompt})),
        _ => bail!("expected `prompt`, `messages` or `request` in {problem}"),
    };
    if form == Form::Completion && !body.contains_key("prompt") {
        bail!("these prompts are chats: they need --backend openai-chat");
    }
    let own = problem.get("output_tokens").and_then(Value::as_u64);
    body.entry("max_tokens").or_insert_with(|| json!(own.unwrap_or(output as u64)));
    Ok(body)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_prompts_repeat_with_their_seed_and_share_their_prefix() {
        let lengths = RandomLengths { prefix: 3, input: 10, output: 4, range_ratio: 0.5, vocab: 50 };
        let bodies = random(lengths, 40, &mut Chance::new(1));
        assert_eq!(bodies, random(lengths, 40, &mut Chance::new(1)));
        assert_ne!(bodies, random(lengths, 40, &mut Chance::new(2)));
        let ids = |body: &Map<String, Value>| body["prompt"].as_array().cloned().unwrap_or_default();
        for body in &bodies {
            assert_eq!(ids(body)[..3], ids(&bodies[0])[..3]);
            assert!((8..=18).contains(&ids(body).len()), "{}", ids(body).len());
            assert!((2..=6).contains(&body["max_tokens"].as_u64().unwrap_or(0)), "{}", body["max_tokens"]);
        }
    }

    #[test]
    fn a_line_takes_the_form_of_the_route() {
        let check = |problem: Value, form, expected: Option<Value>| {
            let got = written(&problem, form, 9).ok().map(Value::Object);
            assert_eq!(got, expected, "{problem}");
        };
        let hi = json!([{"role": "user", "content": "Hi"}]);
        let chat = Some(json!({"messages": hi, "max_tokens": 9}));
        check(json!({"prompt": "Hi"}), Form::Completion, Some(json!({"prompt": "Hi", "max_tokens": 9})));
        check(json!({"prompt": "Hi"}), Form::Chat, chat.clone());
        check(json!({"messages": hi}), Form::Chat, chat.clone());
        check(json!({"request": {"messages": hi}, "family": "x"}), Form::Chat, chat);
        check(json!({"messages": hi}), Form::Completion, None);
        check(json!({"text": "Hi"}), Form::Chat, None);
        let own = json!({"prompt": "Hi", "output_tokens": 3});
        check(own, Form::Completion, Some(json!({"prompt": "Hi", "max_tokens": 3})));
    }

    #[test]
    fn the_built_in_chats_are_readable_and_start_again_when_used_up() {
        let bodies = heldout(300, 5, &mut Chance::new(0)).expect("they ship with the binary");
        let count = lines(HELDOUT, "heldout").expect("valid").len();
        assert!(bodies.iter().all(|body| body["messages"].is_array()));
        assert_eq!(bodies[0], bodies[count]);
        assert_ne!(bodies[0], bodies[1]);
    }
}
