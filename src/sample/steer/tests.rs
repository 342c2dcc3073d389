use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::sample::{Failure, Sampler, SamplingParams, Workspace, argmax, uniform};

const EOS: u32 = 256;
const END: u32 = 257;
const CALL: u32 = 258;
const CALL_END: u32 = 259;
const LINE: u32 = b'\n' as u32;
const WORDS: [&str; 12] =
    ["{\"", "\":", "\", \"", "true", "false", "null", "name", "0.", "}}", "\n\n", "value", "élan"];
const VOCAB: usize = 260 + WORDS.len();

/// Every byte, the control ids, and a few longer words.
fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| {
        let bytes = (0..=255u8).map(|byte| Word::Text(vec![byte]));
        let control = ["<eos>", "</think>", "<tool_call>", "</tool_call>"];
        let control = control.map(|name| Word::Control(name.into()));
        let words = WORDS.map(|word| Word::Text(word.into()));
        Compiler::new(bytes.chain(control).chain(words), &[EOS]).unwrap()
    })
}

fn text(ids: &[u32]) -> String {
    let mut bytes = Vec::new();
    for &id in ids {
        match id {
            0..256 => bytes.push(id as u8),
            260.. => bytes.extend_from_slice(WORDS[id as usize - 260].as_bytes()),
            _ => bytes.extend_from_slice(format!("<{id}>").as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn schema(schema: Value) -> Source {
    Source::Schema { schema, spaces: Spaces::Bounded }
}

fn grammar(source: Source) -> Grammar {
    compiler().compile(&source).unwrap()
}

fn answer(source: Source) -> Steering {
    Steering { grammar: Some((grammar(source), Start::Answer)), ..Steering::default() }
}

fn params() -> SamplingParams {
    SamplingParams::plain(0.0, 0)
}

fn sampler(steering: &Steering) -> Sampler {
    Sampler::new(params(), vec![EOS], 0, &[], 1000, VOCAB).steered(Some(steering.clone()))
}

/// Logits that depend on seed and position alone; printable text is likelier, so that walks are readable.
fn logits(seed: u64, position: u64) -> Vec<f32> {
    (0..VOCAB as u64)
        .map(|id| {
            uniform(seed, position * 1000 + id) as f32 * 8.0 + if (32..127).contains(&id) { 2.0 } else { 0.0 }
        })
        .collect()
}

/// What a model with random taste writes: at most `max` ids, without the end.
fn write(mut sampler: Sampler, seed: u64, max: u64) -> Result<Vec<u32>, Failure> {
    let mut workspace = Workspace::new(VOCAB);
    let mut written = Vec::new();
    for position in 0..max {
        sampler.prepare(&mut Vec::new());
        let id = sampler.sample(&mut workspace, &logits(seed, position), position)?;
        sampler.accept(id);
        if sampler.stops(id) {
            return Ok(written);
        }
        written.push(id);
        if sampler.is_complete() {
            break;
        }
    }
    Ok(written)
}

/// Whether exactly `text`, and then the end, is allowed.
fn accepts(steering: &Steering, text: &str) -> bool {
    let mut helm = Helm::new(steering.clone());
    let mut drafts = ids(text);
    let count = drafts.len();
    drafts.push(EOS);
    helm.prepare(&mut drafts, &[EOS]);
    drafts.len() == count + 1
}

fn check(source: Source, yes: &[&str], no: &[&str]) {
    let steering = answer(source);
    for text in yes {
        assert!(accepts(&steering, text), "refused: {text}");
    }
    for text in no {
        assert!(!accepts(&steering, text), "accepted: {text}");
    }
}

fn refused(source: Source, words: &str) {
    match compiler().compile(&source) {
        Err(error) => assert!(error.to_string().contains(words), "{error}"),
        Ok(_) => panic!("compiled: {source:?}"),
    }
}

fn tree() -> Source {
    schema(json!({
        "$defs": {"Node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 5},
                "kind": {"enum": ["a", "b", 3, null]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 2}
            },
            "required": ["name", "kind"]
        }},
        "$ref": "#/$defs/Node"
    }))
}

#[test]
fn a_recursive_schema_holds() {
    check(
        tree(),
        &[
            r#"{"name":"x","kind":"a"}"#,
            r#"{"name": "x", "kind": 3, "children": [{"name": "y", "kind": null, "children": []}]}"#,
        ],
        &[
            r#"{"kind":"a"}"#,
            r#"{"name":"x","kind":"c"}"#,
            r#"{"name":"x","kind":"a","other":1}"#,
            r#"{"name":"toolong","kind":"a"}"#,
            r#" {"name":"x","kind":"a"}"#,
            "{\"name\":\"x\",\"kind\":\"a\"}\n",
            r#"{"name":  "x","kind":"a"}"#,
            "",
        ],
    );
}

#[test]
fn keywords_of_json_schema_hold() {
    let check = |body: Value, yes: &[&str], no: &[&str]| check(schema(body), yes, no);
    check(json!({"type": "integer", "minimum": 3, "maximum": 12}), &["3", "12"], &["2", "13", "3.5"]);
    check(json!({"type": ["string", "null"]}), &["\"a\"", "null"], &["1"]);
    check(json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1}), &["[true]"], &["[]", "[1]"]);
    check(
        json!({"type": "array", "prefixItems": [{"const": 1}], "items": false}),
        &["[1]", "[]"],
        &["[1,2]"],
    );
    check(json!({"type": "string", "pattern": "^[a-c]{2}$"}), &["\"ab\""], &["\"a\"", "\"abc\""]);
    check(json!({"type": "string", "format": "date"}), &["\"2024-02-29\""], &["\"soon\""]);
    check(json!({"anyOf": [{"const": "x"}, {"type": "null"}]}), &["\"x\"", "null"], &["\"y\""]);
    check(json!({"oneOf": [{"type": "number"}, {"type": "integer"}]}), &["1", "1.5"], &["\"1\""]);
    check(json!({"type": "object"}), &["{}", r#"{"a": [1]}"#], &["[]", "1"]);
    check(json!({"type": "array", "uniqueItems": true}), &["[1,1]"], &["{}"]);
    let parts = json!([
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    ]);
    check(json!({"allOf": parts}), &[r#"{"a":1,"b":2}"#], &[r#"{"a":1}"#]);
    let base = json!({"Base": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}});
    let heir = json!({
        "definitions": base,
        "allOf": [{"$ref": "#/definitions/Base"}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]
    });
    check(heir, &[r#"{"a":1,"b":2}"#], &[r#"{"a":1}"#]);
}

#[test]
fn spaces_may_be_fixed() {
    let body =
        json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}});
    let source = Source::Schema { schema: body.clone(), spaces: Spaces::Pattern("~".into()) };
    check(source, &["{\"a\":~[1,~2]}"], &[r#"{"a": [1]}"#]);
    let source = Source::Schema { schema: body, spaces: Spaces::Fixed };
    check(source, &[r#"{"a": [1, 2]}"#], &[r#"{"a":[1]}"#, r#"{ "a": [1]}"#]);
}

#[test]
fn other_sources_hold() {
    check(Source::Regex(r"^[a-c]+/\d{2}$".into()), &["abc/12"], &["abc/1", "d/12", "abc/123"]);
    check(Source::Choice(vec!["yes".into(), "no \"x\"\n".into()]), &["yes", "no \"x\"\n"], &["maybe", "ye"]);
    let lark = "start: \"<\" name \">\" (\",\" name)*\nname: /[a-z]+/";
    check(Source::Lark(lark.into()), &["<ab>", "<a>,b,c"], &["<>", "<a>,"]);
    let parts = vec![("answer".into(), tree())];
    let either = Source::Parts { lark: "start: \"no\" | @answer".into(), parts };
    check(either, &["no", r#"{"name":"x","kind":"a"}"#], &["yes", "{}"]);
}

#[test]
fn wrong_sources_are_refused_in_words() {
    refused(schema(json!({"type": "text"})), "`type` must be one of");
    refused(schema(json!({"properties": {"a": {"enum": []}}})), "`enum` must be");
    refused(schema(json!({"$ref": "#/$defs/Gone"})), "Gone");
    refused(schema(json!({"type": "string", "pattern": "("})), "regex");
    refused(schema(json!(false)), "must be an object");
    refused(schema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "Unsatisfiable");
    refused(Source::Lark("start: start".into()), "no text");
    refused(Source::Regex("(".into()), "regex");
    refused(Source::Choice(Vec::new()), "nothing to choose");
    refused(Source::Lark("begin: \"a\"".into()), "start");
    refused(Source::Regex("(".repeat(100_000)), "brackets");
    refused(Source::Lark(format!("start: {}", "(".repeat(100_000))), "brackets");
    refused(Source::Regex("a".repeat(2 << 20)), "bytes");
}

/// Each ends quickly, one way or the other, and what compiles can be used.
#[test]
fn sources_that_explode_are_bounded() {
    let mut nested = json!({"type": "string"});
    for _ in 0..100 {
        nested = json!({"type": "array", "items": nested, "minItems": 2});
    }
    let wide: serde_json::Map<String, Value> = (0..2000)
        .map(|index| (format!("key{index}"), json!({"type": "string", "maxLength": 3000})))
        .collect();
    let many: Vec<Value> = (0..40).map(|_| json!({"anyOf": [{"type": "string"}, {"$ref": "#"}]})).collect();
    for source in [
        schema(nested),
        schema(json!({"type": "object", "properties": wide})),
        schema(json!({"allOf": many})),
        schema(json!({"$ref": "#"})),
        schema(json!({"allOf": [{"$ref": "#"}, {"type": "object"}]})),
        schema(json!({"type": "array", "maxItems": 1_000_000_000u64, "minItems": 1_000_000_000u64})),
        schema(json!({"type": "string", "minLength": 1_000_000_000u64})),
        Source::Regex("((a{1,1000}){1,1000}){1,1000}".into()),
        Source::Regex("(.*a.*b.*c.*d.*e.*f){50}".into()),
        Source::Regex(r"(\w|\d|[^a]|é){0,5000}x".into()),
        Source::Lark("start: start start | \"a\"".into()),
        Source::Lark("start: start".into()),
        Source::Lark("start: a* \na: b*\nb: \"x\"?".into()),
    ] {
        if let Ok(grammar) = compiler().compile(&source) {
            let steering = Steering { grammar: Some((grammar, Start::Answer)), ..Steering::default() };
            let _ = write(sampler(&steering), 1, 20);
        }
    }
}

#[test]
fn random_writers_write_what_is_asked() {
    let steering = answer(tree());
    let mut complete = 0;
    for seed in 0..40 {
        let text = text(&write(sampler(&steering), seed, 400).unwrap());
        if let Ok(value) = serde_json::from_str::<Value>(&text) {
            assert!(value["name"].as_str().unwrap().chars().count() <= 5, "{text}");
            assert!([json!("a"), json!("b"), json!(3), json!(null)].contains(&value["kind"]), "{text}");
            complete += 1;
        }
    }
    assert!(complete > 20, "{complete}");
}

/// The ids that a row allows, the stop id among them.
fn allowed(helm: &mut Helm) -> Vec<u32> {
    match helm.rule(&[EOS]) {
        Rule::Mask { ids, ends } => {
            let end = ends.then_some(EOS);
            (0..VOCAB as u32).filter(|&id| id != EOS && ids.is_allowed(id)).chain(end).collect()
        }
        Rule::Forced(id) => vec![id],
        Rule::Complete => vec![EOS],
        Rule::Free => (0..VOCAB as u32).collect(),
        Rule::Unended => (0..VOCAB as u32).filter(|&id| id != EOS).collect(),
        rule => panic!("{rule:?}"),
    }
}

/// The same from a course that was never prepared and knew no drafts.
fn plainly(steering: &Steering, prefix: &[u32]) -> Vec<u32> {
    let mut helm = Helm::new(steering.clone());
    prefix.iter().for_each(|&id| helm.accept(id));
    allowed(&mut helm)
}

fn thinking(budget: Option<usize>) -> Thought {
    let budget = budget.map(|len| Budget {
        len,
        close: [LINE, END].into(),
        close_line: [END].into(),
        line_ends: Arc::new([LINE, 260 + 9].into_iter().collect()),
        starts_line: true,
    });
    Thought { end: END, budget }
}

fn call_lark() -> Source {
    Source::Lark(format!("start: <[{CALL}]> \"\\n\" (\"f\" | \"go\") \"\\n\" <[{CALL_END}]>"))
}

/// Steerings of every kind.
fn steerings() -> Vec<Steering> {
    let calls = |start| Some((grammar(call_lark()), start));
    vec![
        answer(tree()),
        Steering { thought: Some(thinking(Some(7))), ..answer(tree()) },
        Steering { thought: Some(thinking(None)), call: Some(CALL), grammar: calls(Start::Answer) },
        Steering { call: Some(CALL), grammar: calls(Start::Call), ..Steering::default() },
        Steering { thought: Some(thinking(Some(3))), call: Some(CALL), grammar: calls(Start::Call) },
        Steering { thought: Some(thinking(Some(5))), ..Steering::default() },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random histories of good and bad drafts: each row's mask is the one that its prefix has by itself, and what is
    /// cut from the drafts is exactly what is not allowed.
    #[test]
    fn a_row_belongs_to_its_prefix(which in 0usize..6, seed in any::<u64>()) {
        let steering = &steerings()[which];
        let mut helm = Helm::new(steering.clone());
        let mut prefix: Vec<u32> = Vec::new();
        let mut position = 0;
        let mut random = || { position += 1; uniform(seed, position) };
        let pick = |from: &[u32], random: &mut dyn FnMut() -> f64| {
            // Tags and closers are rare among 270 ids; a writer who knows the form writes them often.
            let likely: Vec<u32> = from.iter().copied().filter(|id| [END, CALL, EOS, 34, 125].contains(id)).collect();
            let from = if likely.is_empty() || random() < 0.6 { from } else { &likely[..] };
            from[(random() * from.len() as f64) as usize]
        };
        for _ in 0..12 {
            let mut proposed = Vec::new();
            let mut ahead = prefix.clone();
            for _ in 0..(random() * 5.0) as usize {
                let id = if random() < 0.15 {
                    (random() * VOCAB as f64) as u32
                } else {
                    pick(&plainly(steering, &ahead), &mut random)
                };
                proposed.push(id);
                if id == EOS || !plainly(steering, &ahead).contains(&id) {
                    break;
                }
                ahead.push(id);
            }
            let mut drafts = proposed.clone();
            helm.prepare(&mut drafts, &[EOS]);
            prop_assert!(proposed.starts_with(&drafts));
            if let Some(cut) = proposed.get(drafts.len()) {
                let at = [&prefix[..], &drafts[..]].concat();
                let again = which >= 3 && *cut == CALL;
                prop_assert!(again || !plainly(steering, &at).contains(cut), "{cut} cut after {at:?}");
            }
            let mut row = 0;
            loop {
                let possible = allowed(&mut helm);
                prop_assert_eq!(&possible, &plainly(steering, &prefix), "after {:?}", text(&prefix));
                let follow = drafts.get(row).copied().filter(|_| random() < 0.7);
                let id = follow.unwrap_or_else(|| pick(&possible, &mut random));
                if id == EOS {
                    return Ok(());
                }
                helm.accept(id);
                prefix.push(id);
                if drafts.get(row) != Some(&id) {
                    break;
                }
                row += 1;
            }
        }
    }

    /// With any drafts, the ids are those that come without drafts.
    #[test]
    fn drafts_change_no_id(which in 0usize..6, seed in any::<u64>(), temperature in prop_oneof![Just(0.0f32), Just(1.0)]) {
        let steering = &steerings()[which];
        let make = || {
            let params = SamplingParams { temperature, ..params() };
            Sampler::new(params, vec![EOS], 0, &[], 1000, VOCAB).steered(Some(steering.clone()))
        };
        let expected = write(make(), seed, 60).unwrap();
        let mut drafted = make();
        let mut workspace = Workspace::new(VOCAB);
        let mut written = Vec::new();
        'text: while written.len() < 60 {
            let at = written.len() as u64;
            let wrong = uniform(seed ^ 1, at);
            let mut drafts: Vec<u32> = expected[written.len().min(expected.len())..].iter().copied().take(4).collect();
            if wrong < 0.4 && !drafts.is_empty() {
                let place = (wrong * 10.0) as usize % drafts.len();
                drafts[place] = (drafts[place] + 1) % VOCAB as u32;
            }
            drafted.prepare(&mut drafts);
            for row in 0..=drafts.len() {
                let position = at + row as u64;
                let id = drafted.sample(&mut workspace, &logits(seed, position), position).unwrap();
                drafted.accept(id);
                if drafted.stops(id) || written.len() == 60 {
                    break 'text;
                }
                written.push(id);
                if drafts.get(row) != Some(&id) {
                    break;
                }
            }
        }
        written.truncate(60);
        prop_assert_eq!(&written, &expected, "{}", text(&written));
    }
}

/// A schema of random keywords with random, often wrong values.
fn any_schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(true)),
        Just(json!(3)),
        Just(json!(-1)),
        Just(json!(null)),
        Just(json!("string")),
        Just(json!("#/$defs/a")),
        Just(json!("^(a|b)+$")),
        Just(json!(["a", 1])),
        Just(json!(["integer", "null"])),
        Just(json!({})),
        Just(json!(1e300)),
    ];
    let keys = prop::sample::select(vec![
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "anyOf",
        "allOf",
        "oneOf",
        "not",
        "$ref",
        "$defs",
        "a",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "multipleOf",
        "maxItems",
        "additionalProperties",
        "patternProperties",
        "x-guidance",
    ]);
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec((keys.clone(), inner.clone()), 0..4).prop_map(|entries| {
                Value::Object(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
            }),
            prop::collection::vec(inner, 0..3).prop_map(Value::Array),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a client sends becomes a grammar or an error, and a grammar can be written by.
    #[test]
    fn no_source_does_harm(source in prop_oneof![
        any_schema().prop_map(schema),
        "[a-c(){}|*+?.^$\\\\\\[\\]0-9,-]{0,20}".prop_map(Source::Regex),
        "(start: |[a-cX:|*+?\"/()\\n %@<>{}\\[\\]0-9]){0,30}".prop_map(Source::Lark),
    ]) {
        if let Ok(grammar) = compiler().compile(&source) {
            let steering = Steering { grammar: Some((grammar, Start::Answer)), ..Steering::default() };
            let _ = write(sampler(&steering), 1, 10);
        }
    }
}

#[test]
fn many_compile_at_once_and_none_is_turned_away() {
    let sources = (0..40).map(|index| Source::Regex(format!("a{{{index}}}b")));
    let threads: Vec<_> =
        sources.map(|source| std::thread::spawn(move || compiler().compile(&source).is_ok())).collect();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
}

#[test]
fn drafts_are_cut_at_the_first_wrong_one() {
    let steering = answer(tree());
    for (proposed, kept) in [
        ("{\"name\":1", "{\"name\":"),
        ("{\"other\"", "{\""),
        ("x", ""),
        ("{\"name\":\"x\",\"kin", "{\"name\":\"x\",\"kin"),
    ] {
        let mut drafts = ids(proposed);
        Helm::new(steering.clone()).prepare(&mut drafts, &[EOS]);
        assert_eq!(text(&drafts), kept);
    }
    let mut drafts = [ids(r#"{"name":"x","kind":3}"#), vec![EOS, 7, 7]].concat();
    let whole = drafts.len() - 2;
    Helm::new(steering).prepare(&mut drafts, &[EOS]);
    assert_eq!(drafts.len(), whole, "nothing is drafted after the end");
}

#[test]
fn a_bias_brings_no_forbidden_id_back() {
    let steering = answer(Source::Choice(vec!["ab".into()]));
    let params = SamplingParams { logit_bias: vec![(u32::from(b'z'), 100.0)], ..params() };
    let sampler = Sampler::new(params, vec![EOS], 0, &[], 10, VOCAB).steered(Some(steering));
    assert_eq!(text(&write(sampler, 1, 9).unwrap()), "ab");
}

#[test]
fn a_complete_grammar_ends_whatever_min_tokens_says() {
    let steering = answer(Source::Choice(vec!["ab".into()]));
    let sampler = Sampler::new(params(), vec![EOS], 7, &[], 10, VOCAB).steered(Some(steering));
    assert_eq!(text(&write(sampler, 1, 9).unwrap()), "ab");
}

#[test]
fn without_stop_ids_a_complete_answer_says_so() {
    let steering = answer(Source::Choice(vec!["ab".into()]));
    let mut sampler = Sampler::new(params(), vec![], 0, &[], 10, VOCAB).steered(Some(steering));
    let mut workspace = Workspace::new(VOCAB);
    for (position, complete) in [(0, false), (1, true)] {
        assert_eq!(
            sampler.sample(&mut workspace, &logits(1, position), position).unwrap(),
            u32::from(b"ab"[position as usize])
        );
        sampler.accept(u32::from(b"ab"[position as usize]));
        assert_eq!(sampler.is_complete(), complete);
    }
    assert_eq!(sampler.sample(&mut workspace, &logits(1, 2), 2), Err(Failure::NothingAllowed));
}

#[test]
fn rules_that_exclude_each_other_allow_nothing() {
    let steering = answer(Source::Choice(vec!["ab".into()]));
    let params = SamplingParams { allowed_ids: Some(vec![7]), ..params() };
    let sampler = Sampler::new(params, vec![EOS], 0, &[], 10, VOCAB).steered(Some(steering));
    assert_eq!(write(sampler, 1, 9), Err(Failure::NothingAllowed));
}

#[test]
fn a_broken_parser_fails_its_own_sequence_alone() {
    let steering = answer(tree());
    let (mut broken, well) = (Helm::new(steering.clone()), sampler(&steering));
    let lane = broken.lane.clone().unwrap();
    assert!(lane.rest().matcher().test_trigger_lexer_error().is_err());
    broken.accept(u32::from(b'{'));
    // The fresh parser reads on: a fault that came from a draft is no fault of the text.
    assert!(matches!(broken.rule(&[EOS]), Rule::Mask { .. }));
    assert!(lane.rest().matcher().test_trigger_lexer_error().is_err());
    broken.row = None;
    assert!(matches!(broken.rule(&[EOS]), Rule::Broken));
    assert!(write(well, 3, 50).is_ok());
}

/// A thought that would never end by itself, cut at `budget`.
fn thought(steering: &Steering, logits_of: impl Fn(u64) -> Vec<f32>, max: u64) -> Vec<u32> {
    let mut sampler = sampler(steering);
    let mut workspace = Workspace::new(VOCAB);
    (0..max)
        .map(|position| {
            let id = sampler.sample(&mut workspace, &logits_of(position), position).unwrap();
            sampler.accept(id);
            id
        })
        .collect()
}

fn one_hot(id: u32) -> Vec<f32> {
    (0..VOCAB as u32).map(|other| if other == id { 9.0 } else { 0.0 }).collect()
}

#[test]
fn a_thought_ends_at_its_budget() {
    let x = u32::from(b'x');
    let cut = |budget| Steering { thought: Some(thinking(Some(budget))), ..Steering::default() };
    assert_eq!(thought(&cut(3), |_| one_hot(x), 6), [x, x, x, LINE, END, x]);
    assert_eq!(thought(&cut(2), |_| one_hot(LINE), 4), [LINE, LINE, END, LINE], "the line has ended already");
    assert_eq!(thought(&cut(0), |_| one_hot(x), 2), [END, x], "the prompt ends a line");
    let early = |position| one_hot(if position == 1 { END } else { x });
    assert_eq!(thought(&cut(3), early, 7), [x, END, x, x, x, x, x], "it had ended by itself");
}

#[test]
fn a_grammar_begins_right_after_the_cut() {
    let steering = Steering { thought: Some(thinking(Some(2))), ..answer(Source::Choice(vec!["ab".into()])) };
    let x = u32::from(b'x');
    let written = thought(&steering, |_| one_hot(x), 7);
    assert_eq!(written, [x, x, LINE, END, u32::from(b'a'), u32::from(b'b'), EOS]);
}

#[test]
fn an_answer_that_must_come_is_not_left_out() {
    let steering = Steering { thought: Some(thinking(None)), ..answer(Source::Choice(vec!["ab".into()])) };
    assert_ne!(thought(&steering, |_| one_hot(EOS), 1), [EOS]);
}

#[test]
fn a_thought_may_be_all_that_is_wanted() {
    let steering = Steering { thought: Some(thinking(None)), ..answer(Source::Choice(vec!["ab".into()])) };
    let mut sampler = Sampler::new(params(), vec![EOS, END], 0, &[], 10, VOCAB).steered(Some(steering));
    assert_eq!(sampler.sample(&mut Workspace::new(VOCAB), &one_hot(END), 0), Ok(END));
}

#[test]
fn a_budget_cuts_no_call() {
    let call = Some((grammar(call_lark()), Start::Call));
    let steering = Steering { thought: Some(thinking(Some(2))), call: Some(CALL), grammar: call };
    let x = u32::from(b'x');
    let taste = |position| one_hot(if position == 1 { CALL } else { x });
    let written = thought(&steering, taste, 8);
    assert_eq!(written[..3], [x, CALL, LINE]);
    assert!(!written.contains(&END), "{written:?}");
    assert!(written.contains(&CALL_END) && written[7] == x, "free after the call: {written:?}");
}

#[test]
fn each_call_is_held_to_the_grammar_anew() {
    let call = Some((grammar(call_lark()), Start::Call));
    let steering = Steering { call: Some(CALL), grammar: call, ..Steering::default() };
    let x = u32::from(b'x');
    let taste = |position| one_hot(if [1, 8, 15].contains(&position) { CALL } else { x });
    let written = thought(&steering, taste, 22);
    assert_eq!(written.iter().filter(|&&id| id == CALL_END).count(), 3, "{written:?}");
}

#[test]
fn log_probabilities_are_those_of_the_raw_logits() {
    let steering = answer(Source::Choice(vec!["ab".into()]));
    let (mut workspace, logits) = (Workspace::new(VOCAB), logits(5, 0));
    let mut sampler = sampler(&steering);
    let id = sampler.sample(&mut workspace, &logits, 0).unwrap();
    let steered = crate::sample::logprobs(&mut workspace, &logits, id, 1).unwrap();
    assert_eq!(id, u32::from(b'a'));
    assert_eq!(Some(steered.top[0].0), argmax(&logits));
}
