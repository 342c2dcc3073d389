//! Tool calls: spec nemotron-h §7.2, §7.3; http-api Annex A and §6.

use ferrotron::text::{DecoderOptions, Delta};

use crate::world::{Reading, chat, chat_off, read, read_untagged, tools};

/// `calls` as `name{arguments}`.
fn check(output: &str, content: Option<&str>, calls: &[&str]) -> Reading {
    check_with(output, &chat_off(tools()), content, calls)
}

fn check_with(output: &str, options: &DecoderOptions, content: Option<&str>, calls: &[&str]) -> Reading {
    let reading = read(output, options);
    compare(output, &reading, content, calls);
    reading
}

fn compare(output: &str, reading: &Reading, content: Option<&str>, calls: &[&str]) {
    let got: Vec<String> =
        reading.answer.calls.iter().map(|call| format!("{}{}", call.name, call.arguments)).collect();
    assert_eq!(got, calls, "calls of {output:?}");
    assert_eq!(reading.answer.content.as_deref(), content, "content of {output:?}");
}

/// One call of f with one parameter.
fn coerced(key: &str, value: &str, expected: &str) {
    let output = format!(
        "<tool_call>\n<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
    );
    check(&output, None, &[&format!("f{{\"{key}\": {expected}}}")]);
}

#[test]
fn a_call_as_the_template_writes_it() {
    check(
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</parameter>\n<parameter=i>\n3\n</parameter>\n</function>\n</tool_call>",
        None,
        &[r#"f{"s": "v", "i": 3}"#],
    );
}

#[test]
fn types_are_tried_in_their_order() {
    coerced("s", "3", "\"3\"");
    coerced("s", "null", "\"null\"");
    coerced("s_or_null", "NULL", "null");
    coerced("s_or_null", "x", "\"x\"");
    coerced("i", "007", "7");
    coerced("i", " -12 ", "-12");
    coerced("i", "123456789012345678901234567890", "123456789012345678901234567890");
    coerced("i", "1_000", "\"1_000\"");
    coerced("i", "3.5", "3.5");
    coerced("n", "2.0", "2");
    coerced("n", "1e-5", "1e-05");
    coerced("n", "inf", "\"inf\"");
    coerced("b", "True", "true");
    coerced("b", " 0 ", "false");
    coerced("b", "maybe", "\"maybe\"");
    coerced("l", "[1, \"2\", {\"é\":1.0}]", "[1, 2, {\"é\": 1.0}]");
    coerced("l", "{}", "{}");
    coerced("l", "[1,", "\"[1,\"");
    coerced("o", "{\"k\": \"5\", \"z\": \"5\"}", "{\"k\": 5, \"z\": \"5\"}");
    coerced("o", "{\"k\": NaN}", "\"{\\\"k\\\": NaN}\"");
    coerced("any", "null", "null");
    coerced("any", "4", "4");
    coerced("any", "four", "\"four\"");
    coerced("e", "a", "\"a\"");
    coerced("e", "1", "1");
    coerced("r", "{\"a\": 1}", "{\"a\": 1}");
    coerced("alias", "{\"a\": 1}", "{\"a\": 1}");
    coerced("u", "8", "8");
    coerced("si", "007", "7");
    coerced("unknown", "{\"a\": 1}", "\"{\\\"a\\\": 1}\"");
}

#[test]
fn exactly_one_newline_at_each_end_belongs_to_the_markup() {
    let call = |value: &str| format!("<function=f><parameter=s>{value}</parameter></function>");
    check(&call("\n\n a \n\n"), None, &[r#"f{"s": "\n a \n"}"#]);
    check(&call("\n"), None, &[r#"f{"s": ""}"#]);
    check(&call(""), None, &[r#"f{"s": ""}"#]);
    check(&call("a"), None, &[r#"f{"s": "a"}"#]);
    check(&call("\n\n"), None, &[r#"f{"s": ""}"#]);
}

#[test]
fn white_space_in_tags_is_tolerated() {
    check("< function = f >< parameter = s >\nv\n</ parameter ></ function >", None, &[r#"f{"s": "v"}"#]);
}

#[test]
fn several_calls_in_one_block_and_in_several() {
    check(
        "<tool_call><function=g></function><function=g></function></tool_call>\n<tool_call><function=f></function></tool_call>",
        None,
        &["g{}", "g{}", "f{}"],
    );
}

#[test]
fn tags_inside_a_value_are_data() {
    check(
        "<function=f><parameter=s>\n<think> </think> <tool_call> </tool_call> x</parameter></function>",
        None,
        &[r#"f{"s": "<think> </think> <tool_call> </tool_call> x"}"#],
    );
    check(
        "<function=f><parameter=s>\ncode </function> more <function=x> end\n</parameter>\n</function>\n</tool_call>",
        None,
        &[r#"f{"s": "code </function> more <function=x> end"}"#],
    );
}

#[test]
fn text_before_a_call_comes_first_and_loses_its_white_space() {
    let reading = check(
        "Let me see. \n\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        Some("Let me see."),
        &["g{}"],
    );
    assert_eq!(reading.stream[0], Delta::Content("Let me see.".into()));
}

#[test]
fn white_space_between_reasoning_and_call_is_never_content() {
    let output = "r</think>\n\n<tool_call>\n<function=g>\n</function>\n</tool_call>\n";
    let reading = check_with(output, &chat(tools()), None, &["g{}"]);
    assert!(!reading.stream.iter().any(|delta| matches!(delta, Delta::Content(_))));
}

#[test]
fn text_after_a_call_is_content() {
    check("a <function=g></function> \n b \n<function=g></function>c \n", Some("abc"), &["g{}", "g{}"]);
}

#[test]
fn no_tools_no_calls() {
    let all = "<tool_call>\n<function=g>\n</function>\n</tool_call>";
    check_with(all, &chat_off(None), Some(all), &[]);
}

#[test]
fn an_unknown_function_goes_to_the_client_as_it_is() {
    check("<function=nobody><parameter=x>1</parameter></function>", None, &[r#"nobody{"x": "1"}"#]);
}

#[test]
fn a_repeated_key_ends_with_its_last_value() {
    let reading = check(
        "<function=f><parameter=i>1</parameter><parameter=i>2</parameter></function>",
        None,
        &[r#"f{"i": 1, "i": 2}"#],
    );
    let read: serde_json::Value = serde_json::from_str(&reading.answer.calls[0].arguments).unwrap();
    assert_eq!(read, serde_json::json!({"i": 2}));
}

#[test]
fn vllm_57699_a_last_parameter_without_its_end_is_kept() {
    check("<function=f><parameter=s>\nv\n</function>\n</tool_call>", None, &[r#"f{"s": "v"}"#]);
    check("<function=f><parameter=i>\n5\n</function>", None, &[r#"f{"i": 5}"#]);
    check("<function=f><parameter=s>\nv\n</tool_call>\n", None, &[r#"f{"s": "v"}"#]);
    check(
        "<function=f><parameter=s>v<parameter=i>1</function></tool_call>",
        None,
        &[r#"f{"s": "v", "i": 1}"#],
    );
    // The model ended its turn inside the call: the call is closed.
    check("<function=f><parameter=s>\nv<|im_end|>", None, &[r#"f{"s": "v"}"#]);
    check("<function=f><parameter=i>\n5\n</parameter><|im_end|>", None, &[r#"f{"i": 5}"#]);
}

#[test]
fn a_call_that_was_cut_off_is_left_out() {
    // A length limit: no end of turn. What was sent stays sent, the message does not have the call.
    let reading = check("<function=f><parameter=s>\nrm -rf /tm", None, &[]);
    let sent = Delta::CallArguments { index: 0, json: "{\"s\": \"rm -rf /tm".into() };
    assert_eq!(reading.stream, [Delta::CallStart { index: 0, name: "f".into() }, sent]);
    check("<function=f><parameter=i>\n5\n</parameter>", None, &[]);
    check("<function=g></function><function=f><parameter=i>\n5", None, &["g{}"]);
}

#[test]
fn vllm_55495_a_malformed_parameter_does_not_leak() {
    let good = "<parameter=i>1</parameter></function>";
    check(&format!("<function=f><parameter=s\nleak</parameter>{good}"), None, &[r#"f{"i": 1}"#]);
    check(&format!("<function=f><parameter=>leak</parameter>{good}"), None, &[r#"f{"i": 1}"#]);
    check(&format!("<function=f>leak{good}"), None, &[r#"f{"i": 1}"#]);
}

#[test]
fn vllm_58227_an_unclosed_name_does_not_swallow_the_next_call() {
    check("<function=f\n<function=g></function>", Some("<function=f"), &["g{}"]);
    check(
        "<tool_call><function=f</tool_call><tool_call><function=g></function></tool_call>",
        Some("<function=f"),
        &["g{}"],
    );
    check("<function=f</function><function=g></function>", Some("<function=f</function>"), &["g{}"]);
}

#[test]
fn a_name_that_never_closed_is_content() {
    check("<function=f", Some("<function=f"), &[]);
    check("<function=>x", Some("<function=>x"), &[]);
    let long = format!("<function={}", "é".repeat(400));
    check(&long, Some(&long), &[]);
}

#[test]
fn a_call_that_was_not_closed_does_not_swallow_the_next() {
    check("<function=f><parameter=i>1</parameter><function=g></function>", None, &[r#"f{"i": 1}"#, "g{}"]);
    check(
        "<function=f><parameter=i>1</parameter></tool_call><function=g></function>",
        None,
        &[r#"f{"i": 1}"#, "g{}"],
    );
    check("<function=f><tool_call><function=g></function></tool_call>", None, &["f{}", "g{}"]);
    check(
        "<function=f><parameter=s>\nv\n</tool_call>\n<tool_call>\n<function=g></function></tool_call>",
        None,
        &[r#"f{"s": "v"}"#, "g{}"],
    );
}

#[test]
fn vllm_47137_a_truncated_opener_is_the_same_in_stream_and_whole() {
    for cut in ["<", "<f", "<function", "<function=", "< function ="] {
        check(&format!("text {cut}"), Some(&format!("text {cut}")), &[]);
    }
    let reading = read_untagged("text <tool_c", &chat_off(tools()));
    compare("untagged", &reading, Some("text <tool_c"), &[]);
}

#[test]
fn vllm_30439_43267_string_arguments_stream() {
    // Every byte its own token: after each one, all that can be known has been sent.
    let text = crate::world::text(None);
    let mut decoder = text.decoder(chat_off(tools()));
    let mut out = Vec::new();
    for id in text.encode("<tool_call><function=f><parameter=s>\nhello wor", false).unwrap() {
        decoder.push(id, &mut out);
    }
    let start = Delta::CallStart { index: 0, name: "f".into() };
    let sent = Delta::CallArguments { index: 0, json: "{\"s\": \"hello wor".into() };
    assert_eq!(out, [start, sent]);
}

#[test]
fn vllm_22975_no_call_text_is_left_in_content() {
    check("<tool_call>\n<function=g>\n</function>\n</tool_call>\n<tool_call>\n</tool_call>", None, &["g{}"]);
}

#[test]
fn vllm_33965_43074_names_are_sent_once_and_markup_in_content_is_text() {
    let reading = check("</parameter> <function=g></function>", Some("</parameter>"), &["g{}"]);
    let starts = reading.stream.iter().filter(|delta| matches!(delta, Delta::CallStart { .. })).count();
    assert_eq!(starts, 1);
}

#[test]
fn qwen3_coder_480_a_missing_opener_is_accepted() {
    check("I call:\n<function=g>\n</function>\n</tool_call>", Some("I call:"), &["g{}"]);
}

#[test]
fn vllm_35615_several_parameters_in_one_token_are_all_read() {
    check(
        "<function=f><parameter=i>1</parameter><parameter=b>true</parameter><parameter=s>x</parameter></function>",
        None,
        &[r#"f{"i": 1, "b": true, "s": "x"}"#],
    );
}

#[test]
fn vllm_47647_a_call_right_after_the_reasoning_in_the_same_step() {
    let reading =
        check_with("r</think><tool_call><function=g></function></tool_call>", &chat(tools()), None, &["g{}"]);
    assert_eq!(reading.answer.reasoning.as_deref(), Some("r"));
}

#[test]
fn spark_196_markup_never_reaches_content_when_tools_were_given() {
    check(
        "<tool_call>\n<function=f>\n<parameter=s>\nv\n</parameter>\n</function>\n</tool_call>\n\n",
        None,
        &[r#"f{"s": "v"}"#],
    );
}

#[test]
fn the_same_grammar_without_tag_ids() {
    let options = chat(tools());
    let output = "r\n<tool_call>\n<function=f>\n<parameter=s>\na <tool_call> b\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>";
    let reading = read_untagged(output, &options);
    compare(output, &reading, None, &[r#"f{"s": "a <tool_call> b"}"#, "g{}"]);
    assert_eq!(reading.answer.reasoning.as_deref(), Some("r"));
}

#[test]
fn other_alphabets_are_not_escaped() {
    check(
        "<function=f><parameter=s>é\"🦀\t\u{1}</parameter></function>",
        None,
        &["f{\"s\": \"é\\\"🦀\\t\\u0001\"}"],
    );
}
