//! Steering from the schema of a tool to the call that a client gets: whatever a grammar lets a model write, our own
//! decoder reads as a call that fits the schema.

use std::sync::OnceLock;

use ferrotron::sample::steer::{Compiler, Source, Spaces, Start, Word};
use ferrotron::sample::{Sampler, SamplingParams, Steering, Workspace, uniform};
use ferrotron::text::{Call, CallForm, DecoderOptions, Detail, Fold, Mode, Text, TextFiles, Tool};
use proptest::prelude::*;
use serde_json::{Value, json};

struct World {
    text: Text,
    compiler: Compiler,
    end: u32,
}

/// The tokenizer of `models/tiny`.
fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let text = Text::load(TextFiles {
            tokenizer_json: include_bytes!("../models/tiny/tokenizer.json"),
            tokenizer_config: None,
            chat_template: None,
        })
        .unwrap();
        let end = text.id_of("<|im_end|>").unwrap();
        let words = (0..text.vocab_size() as u32).map(|id| match text.token_bytes(id) {
            None => Word::Unused,
            Some(bytes) if text.is_added(id) => Word::Control(String::from_utf8_lossy(bytes).into()),
            Some(bytes) => Word::Text(bytes.to_vec()),
        });
        let compiler = Compiler::new(words, &[end]).unwrap();
        World { text, compiler, end }
    })
}

fn tool(name: &str, parameters: Value) -> Tool {
    Tool { name: name.into(), parameters: Some(parameters) }
}

fn object(properties: Value, required: Value) -> Value {
    json!({"type": "object", "properties": properties, "required": required})
}

/// Schemas of every kind that clients send.
fn tools() -> Vec<Tool> {
    vec![
        tool(
            "weather",
            object(
                json!({
                    "city": {"type": "string"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                }),
                json!(["city", "days"]),
            ),
        ),
        tool(
            "set",
            object(
                json!({
                    "on": {"type": "boolean"},
                    "level": {"type": "number"},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
                    "spot": {"$ref": "#/$defs/Spot"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                }),
                json!(["on", "spot"]),
            )
            .as_object()
            .map(|map| {
                let mut map = map.clone();
                let spot =
                    object(json!({"x": {"type": "integer"}, "y": {"type": "integer"}}), json!(["x", "y"]));
                map.insert("$defs".into(), json!({"Spot": spot}));
                Value::Object(map)
            })
            .unwrap(),
        ),
        tool("no-arguments", json!({"type": "object", "properties": {}})),
        Tool { name: "bare".into(), parameters: None },
        tool(
            "open",
            json!({"type": "object", "properties": {"a/b": {"type": "string"}},
            "required": ["a/b"], "additionalProperties": true}),
        ),
        tool(
            "code",
            object(
                json!({
                    "id": {"type": "string", "pattern": "^[A-Z]{2}/\\d+$"},
                    "short": {"type": "string", "minLength": 1, "maxLength": 3},
                    "kind": {"enum": ["a", 2, null, true]},
                    "always": {"const": "x y"},
                }),
                json!(["id", "short", "kind", "always"]),
            ),
        ),
    ]
}

/// Enough of JSON Schema for the schemas above.
fn fits(value: &Value, schema: &Value, root: &Value) -> bool {
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        return fits(value, root.pointer(&target[1..]).unwrap(), root);
    }
    if let Some(options) = schema.get("anyOf").and_then(Value::as_array) {
        return options.iter().any(|option| fits(value, option, root));
    }
    let typed = match schema.get("type").and_then(Value::as_str) {
        None => true,
        Some("string") => value.is_string(),
        Some("integer") => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|x| x.fract() == 0.0)
        }
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        Some(other) => panic!("{other}"),
    };
    let listed = |name: &str| schema.get(name).and_then(Value::as_array);
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
    let chars = value.as_str().map(|text| text.chars().count() as f64);
    let keys_fit = value.as_object().is_none_or(|map| {
        let properties = schema.get("properties").and_then(Value::as_object);
        let open = schema.get("additionalProperties") == Some(&json!(true)) || properties.is_none();
        listed("required").into_iter().flatten().all(|key| map.contains_key(key.as_str().unwrap()))
            && map.iter().all(|(key, value)| match properties.and_then(|all| all.get(key)) {
                Some(schema) => fits(value, schema, root),
                None => open,
            })
    });
    typed
        && keys_fit
        && listed("enum").is_none_or(|values| values.contains(value))
        && schema.get("const").is_none_or(|constant| constant == value)
        && bound("minimum").is_none_or(|least| value.as_f64().is_some_and(|x| x >= least))
        && bound("maximum").is_none_or(|most| value.as_f64().is_some_and(|x| x <= most))
        && bound("minLength").is_none_or(|least| chars.is_some_and(|count| count >= least))
        && bound("maxLength").is_none_or(|most| chars.is_some_and(|count| count <= most))
        && bound("maxItems").is_none_or(|most| value.as_array().is_some_and(|list| list.len() as f64 <= most))
        && schema.get("pattern").is_none_or(|_| {
            let text = value.as_str().unwrap();
            text.len() > 3 && text.as_bytes()[2] == b'/' && text[..2].chars().all(|c| c.is_ascii_uppercase())
        })
        && value.as_array().is_none_or(|list| {
            list.iter().all(|item| schema.get("items").is_none_or(|schema| fits(item, schema, root)))
        })
}

/// A model with random taste, that closes what it opened sooner or later.
fn write(steering: Steering, seed: u64, start: &[u32], max: usize) -> Option<Vec<u32>> {
    let World { text, end, .. } = world();
    let params = SamplingParams::plain(1.0, seed);
    let vocab = text.vocab_size();
    let mut sampler = Sampler::new(params, vec![*end], 0, &[], max, vocab).steered(Some(steering));
    let mut workspace = Workspace::new(vocab);
    let mut ids = start.to_vec();
    ids.iter().for_each(|&id| sampler.accept(id));
    let closers: Vec<u32> = (0..vocab as u32)
        .filter(|&id| {
            text.token_bytes(id).is_some_and(|bytes| bytes.iter().any(|b| b"\"}]</>\n".contains(b)))
        })
        .collect();
    let closing = text.encode("\n</parameter>\n", false).unwrap();
    while ids.len() < max {
        let position = ids.len() as u64;
        let mut logits: Vec<f32> =
            (0..vocab as u64).map(|id| 6.0 * uniform(seed, position << 20 | id) as f32).collect();
        closers.iter().for_each(|&id| logits[id as usize] += 3.0);
        // The longest part of the closer that has been written wants its next id.
        if let Some(&next) =
            (0..closing.len()).rev().find(|&n| ids.ends_with(&closing[..n])).map(|n| &closing[n])
        {
            logits[next as usize] += 8.0;
        }
        logits[*end as usize] += 4.0;
        sampler.prepare(&mut Vec::new());
        let id = sampler.sample(&mut workspace, &logits, position).unwrap();
        sampler.accept(id);
        if id == *end {
            return Some(ids);
        }
        ids.push(id);
    }
    None
}

fn calls(ids: &[u32], tools: &[Tool]) -> (Option<String>, Vec<Call>) {
    let World { text, end, .. } = world();
    let mode = Mode::Chat {
        starts_in_reasoning: false,
        thinking: false,
        force_nonempty_content: false,
        tools: Some(tools.to_vec()),
    };
    let mut decoder = text.decoder(DecoderOptions { mode, skip_special: true, ..DecoderOptions::default() });
    let (mut deltas, mut fold) = (Vec::new(), Fold::default());
    ids.iter().chain([end]).for_each(|&id| {
        decoder.push(id, &mut deltas);
    });
    decoder.finish(&mut deltas);
    deltas.into_iter().for_each(|delta| fold.push(delta));
    let answer = fold.finish(decoder.reasoning_became_content());
    (answer.content, answer.calls)
}

fn source(tools: &[Tool], form: CallForm, detail: Detail) -> Source {
    let made = world().text.call_grammar(tools, form, detail).unwrap();
    let part = |(name, schema)| (name, Source::Schema { schema, spaces: Spaces::default() });
    Source::Parts { lark: made.lark, parts: made.schemas.into_iter().map(part).collect() }
}

fn steering(tools: &[Tool], form: CallForm, start: Start) -> Steering {
    let grammar = world().compiler.compile(&source(tools, form, Detail::Full)).unwrap();
    Steering { grammar: Some((grammar, start)), call: world().text.call_start(), thought: None }
}

fn check(call: &Call, tools: &[Tool]) {
    let tool =
        tools.iter().find(|tool| tool.name == call.name).unwrap_or_else(|| panic!("no tool: {call:?}"));
    let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|e| panic!("{e}: {call:?}"));
    let none = json!({"properties": {}});
    let schema = tool.parameters.as_ref().unwrap_or(&none);
    assert!(fits(&arguments, schema, schema), "{arguments} does not fit {schema}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_must_be_calls_is_calls_that_fit(seed in any::<u64>(), many in any::<bool>(), which in 0usize..7) {
        let all = tools();
        // All tools, or one by name.
        let tools = all.get(which).map_or(all.clone(), |tool| vec![tool.clone()]);
        let form = CallForm::Answer { many };
        if let Some(ids) = write(steering(&tools, form, Start::Answer), seed, &[], 600) {
            let (content, calls) = calls(&ids, &tools);
            prop_assert_eq!(content, None);
            prop_assert!(!calls.is_empty() && (many || calls.len() == 1), "{:?}", calls);
            calls.iter().for_each(|call| check(call, &tools));
        }
    }

    #[test]
    fn a_call_that_is_begun_becomes_one_that_fits(seed in any::<u64>()) {
        let tools = tools();
        let steering = steering(&tools, CallForm::One, Start::Call);
        let start = [world().text.encode("So: ", false).unwrap(), vec![world().text.call_start().unwrap()]].concat();
        if let Some(ids) = write(steering, seed, &start, 600) {
            let (content, calls) = calls(&ids, &tools);
            prop_assert!(content.is_some_and(|text| text.starts_with("So:")));
            prop_assert!(!calls.is_empty());
            check(&calls[0], &tools);
        }
    }
}

/// The property above says nothing if nobody finishes.
#[test]
fn writers_finish() {
    let tools = tools();
    let steering = steering(&tools, CallForm::Answer { many: false }, Start::Answer);
    let done = (0..40).filter(|&seed| write(steering.clone(), seed, &[], 600).is_some()).count();
    assert!(done >= 20, "{done} of 40");
}

fn accepts(steering: &Steering, text: &str) -> bool {
    let World { text: tokenizer, end, .. } = world();
    let mut drafts = tokenizer.encode(text, false).unwrap();
    let count = drafts.len();
    drafts.push(*end);
    let params = SamplingParams::plain(0.0, 0);
    let mut sampler =
        Sampler::new(params, vec![*end], 0, &[], 9, tokenizer.vocab_size()).steered(Some(steering.clone()));
    sampler.prepare(&mut drafts);
    drafts.len() == count + 1
}

const WEATHER: &str = "<tool_call>\n<function=weather>\n<parameter=city>\nBonn <b>\n</b>\n</parameter>\n\
                       <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";

#[test]
fn calls_as_the_template_renders_them_are_allowed() {
    let one = steering(&tools(), CallForm::Answer { many: false }, Start::Answer);
    let many = steering(&tools(), CallForm::Answer { many: true }, Start::Answer);
    let history = format!("\n{WEATHER}\n");
    for yes in [WEATHER, &history] {
        assert!(accepts(&one, yes) && accepts(&many, yes), "{yes}");
    }
    let two = format!("{WEATHER}\n{WEATHER}");
    assert!(accepts(&many, &two) && !accepts(&one, &two));
    for (from, to) in [
        ("weather", "whether"),
        ("<parameter=days>\n3\n</parameter>\n", ""),
        ("\n3\n", "\n15\n"),
        ("\n3\n", "\nthree\n"),
        ("parameter=city", "parameter=town"),
        ("</tool_call>", ""),
        ("<tool_call>", "Sure! <tool_call>"),
    ] {
        let wrong = WEATHER.replacen(from, to, 1);
        assert!(!accepts(&one, &wrong), "{wrong}");
    }
}

#[test]
fn an_answer_may_be_calls_or_what_was_asked_for() {
    let Source::Parts { lark, mut parts } = source(&tools(), CallForm::OrAnswer { many: true }, Detail::Full)
    else {
        panic!("calls have parts")
    };
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    parts.push(("answer".into(), Source::Schema { schema, spaces: Spaces::Fixed }));
    let grammar = world().compiler.compile(&Source::Parts { lark, parts }).unwrap();
    let steering = Steering { grammar: Some((grammar, Start::Answer)), ..Steering::default() };
    assert!(accepts(&steering, WEATHER));
    assert!(accepts(&steering, r#"{"a": 1}"#));
    assert!(!accepts(&steering, "a"));
}

#[test]
fn names_that_markup_cannot_spell_are_refused() {
    for name in ["a>b", " a", "a<b", ""] {
        let tools = [tool(name, json!({}))];
        assert!(world().text.call_grammar(&tools, CallForm::One, Detail::Full).is_err(), "{name}");
    }
}

#[test]
fn a_schema_beyond_grammars_still_has_types() {
    let tools = [tool(
        "f",
        object(
            json!({
                "a": {"type": "string", "pattern": "^(?!x).*$"},
                "b": {"type": "array", "items": {"type": "string", "pattern": "(?=y)z"}},
            }),
            json!(["a", "b"]),
        ),
    )];
    assert!(world().compiler.compile(&source(&tools, CallForm::One, Detail::Full)).is_err());
    assert!(world().compiler.compile(&source(&tools, CallForm::One, Detail::Types)).is_ok());
}
