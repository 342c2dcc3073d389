//! The template engine: what Hugging Face templates need, spelled as Python spells it.

use ferrotron::text::{Chat, Error, Message, Text};
use serde_json::{Value, json};

use crate::world::text;

fn user(content: &str) -> Message {
    Message { role: "user".into(), content: Some(content.into()), ..Message::default() }
}

/// Renders `template` with `x`.
fn render(template: &str, x: Value) -> Result<String, Error> {
    let kwargs = [("x".to_string(), x)].into_iter().collect();
    text(Some(template)).render(&Chat { messages: vec![user("hi")], kwargs, ..Chat::default() })
}

fn check(template: &str, x: Value, expected: &str) {
    assert_eq!(render(template, x.clone()).unwrap(), expected, "{template} of {x}");
}

#[test]
fn values_print_as_in_python_everywhere() {
    let spelled = [
        (json!(true), "True"),
        (json!(false), "False"),
        (json!(null), "None"),
        (json!(3), "3"),
        (json!(u64::MAX), "18446744073709551615"),
        (json!(1.0), "1.0"),
        (json!(1e20), "1e+20"),
        (json!(1.5e-7), "1.5e-07"),
        (json!(["string", "null"]), "['string', 'null']"),
        (json!([1, 2.0, true, null, 1e20]), "[1, 2.0, True, None, 1e+20]"),
        (json!({"b": [1], "a": "it's"}), "{'b': [1], 'a': \"it's\"}"),
        (json!("é\n"), "é\n"),
    ];
    for (x, expected) in spelled {
        check("{{ x }}", x.clone(), expected);
        check("{{ x | string }}", x.clone(), expected);
        check("{{ '<' ~ x ~ '>' }}", x.clone(), &format!("<{expected}>"));
        check("{% set y = x %}{% macro m(v) %}{{ v }}{% endmacro %}{{ m(y) }}", x, expected);
    }
}

#[test]
fn tojson_is_json_dumps_without_ascii() {
    let x = json!({"z": "é<>&'\"", "a": [1, 2.5, null, true, 1e20], "e": {}, "l": []});
    check(
        "{{ x | tojson }}",
        x.clone(),
        "{\"z\": \"é<>&'\\\"\", \"a\": [1, 2.5, null, true, 1e+20], \"e\": {}, \"l\": []}",
    );
    let indented = "{\n  \"z\": \"é<>&'\\\"\",\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true,\n    1e+20\n  ],\n  \"e\": {},\n  \"l\": []\n}";
    check("{{ x | tojson(indent=2) }}", x.clone(), indented);
    check("{{ x | tojson(2) }}", x, indented);
    check(
        "{{ x | tojson(separators=(',', ':'), sort_keys=true) }}",
        json!({"b": 1, "a": 2}),
        "{\"a\":2,\"b\":1}",
    );
    check("{{ x | tojson(ensure_ascii=true) }}", json!("é🦀"), "\"\\u00e9\\ud83e\\udd80\"");
    check("{{ x | tojson | length }}", json!("<"), "3");
}

#[test]
fn blocks_are_trimmed_and_stripped() {
    check("a\n  {% if true %}\nb\n  {% endif %}\nc", json!(1), "a\nb\nc");
}

#[test]
fn what_the_nemotron_templates_use() {
    check(
        "{% for c in x.split(',') %}{{ loop.index0 }}{{ c.strip() }}{% if not loop.last %};{% endif %}{% endfor %}",
        json!(" a, b"),
        "0a;1b",
    );
    check(
        "{{ x.startswith('a') }} {{ x.replace('a', 'b') }} {{ x | trim | length }}",
        json!("aa "),
        "True bb  2",
    );
    check("{{ x[1:] | length }} {{ x[-1] }}", json!([1, 2, 3]), "2 3");
    check(
        "{{ x is mapping }} {{ x.a is sequence }} {{ x.b is string }} {{ x.c is defined }} {{ x.a is iterable }}",
        json!({"a": [], "b": ""}),
        "True True True False True",
    );
    check(
        "{% set ns = namespace(n=0) %}{% for k, v in x | items %}{% set ns.n = ns.n + v %}{{ k }}{% endfor %}{{ ns.n }}",
        json!({"b": 1, "a": 2}),
        "ba3",
    );
    check("{{ x | default('d', true) }} {{ x | safe }}", json!(""), "d ");
    check(
        "{% for i in x %}{{ loop.previtem | default('-') }}{{ loop.nextitem | default('+') }}{% endfor %}",
        json!([1, 2]),
        "-21+",
    );
    check("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", json!([1, 2, 3]), "1");
    check("{{ x.get('a', 7) }}{% for k, v in x.items() %}{{ k }}{% endfor %}", json!({"b": 1}), "7b");
}

#[test]
fn tests_answer_as_jinja2_answers() {
    let ask = "{{ x is mapping }} {{ x is sequence }} {{ x is iterable }} {{ x is string }} {{ x is number }} {{ x is float }}";
    check(ask, json!(null), "False False False False False False");
    check(ask, json!(true), "False False False False True False");
    check(ask, json!(1e20), "False False False False True True");
    check(ask, json!(1.5), "False False False False True True");
    check(ask, json!(1), "False False False False True False");
    check(ask, json!(""), "False True True True False False");
    check(ask, json!([]), "False True True False False False");
    check(ask, json!({}), "True True True False False False");
}

#[test]
fn raise_exception_is_a_refusal_not_a_failure() {
    let refused = render("{{ raise_exception('roles must ' ~ x) }}", json!("alternate"));
    assert_eq!(refused, Err(Error::Refused { message: "roles must alternate".into() }));
    let nested = render("{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}", json!(1));
    assert_eq!(nested, Err(Error::Refused { message: "no".into() }));
}

#[test]
fn strftime_now_tells_the_time_it_is_given() {
    let now: jiff::Zoned = "2025-12-15T10:30:00+00:00[UTC]".parse().unwrap();
    let chat = Chat { messages: vec![user("hi")], ..Chat::default() };
    let tell = |template: &str| text(Some(template)).render_at(&chat, now.clone());
    assert_eq!(tell("{{ strftime_now('%d %B %Y') }}").unwrap(), "15 December 2025");
    assert!(matches!(tell("{{ strftime_now('%!') }}"), Err(Error::Template { line: 1, .. })));
}

#[test]
fn errors_name_the_line() {
    let chat = Chat { messages: vec![user("hi")], ..Chat::default() };
    assert!(matches!(
        text(Some("a\n{{ nobody.at_home }}")).render(&chat),
        Err(Error::Template { line: 2, .. })
    ));
    let (tokenizer_json, _) = crate::world::tokenizer_json(true, &[]);
    let files = ferrotron::text::TextFiles {
        tokenizer_json: &tokenizer_json,
        tokenizer_config: None,
        chat_template: Some("a\n{% if %}"),
    };
    assert!(matches!(Text::load(files), Err(Error::Template { line: 2, .. })));
    assert_eq!(text(None).render(&chat), Err(Error::NoTemplate));
}

#[test]
fn a_template_without_end_is_stopped() {
    let endless =
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless, json!(1)), Err(Error::Limit { what: "template instructions", .. })));
    let long = "{% for a in range(99999) %}{{ x }}{% endfor %}";
    assert!(matches!(
        render(long, json!("x".repeat(1024))),
        Err(Error::Limit { what: "bytes of prompt", .. })
    ));
}

#[test]
fn a_requests_own_template_takes_the_place_of_the_checkpoints() {
    let chat = Chat {
        messages: vec![user("hi")],
        template: Some("own {{ messages[0].content }}".into()),
        ..Chat::default()
    };
    assert_eq!(text(Some("theirs")).render(&chat).unwrap(), "own hi");
    assert_eq!(text(None).render(&chat).unwrap(), "own hi");
}

#[test]
fn the_template_may_be_in_tokenizer_config() {
    let (tokenizer_json, _) = crate::world::tokenizer_json(true, &[]);
    let load = |config: Value| {
        let config = config.to_string();
        let files = ferrotron::text::TextFiles {
            tokenizer_json: &tokenizer_json,
            tokenizer_config: Some(config.as_bytes()),
            chat_template: None,
        };
        Text::load(files).unwrap().render(&Chat::default()).unwrap()
    };
    assert_eq!(load(json!({"chat_template": "{{ eos_token }}", "eos_token": "<|im_end|>"})), "<|im_end|>");
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ bos_token }}"}]);
    assert_eq!(load(json!({"chat_template": named, "bos_token": {"content": "<s>"}})), "<s>");
}
