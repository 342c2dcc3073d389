//! Reasoning and content: spec nemotron-h §7.1, http-api Annex A.

use ferrotron::text::{DecoderOptions, Delta, Mode};

use crate::world::{IM_END, Reading, chat, chat_off, read, read_untagged, tools};

fn check(output: &str, options: &DecoderOptions, reasoning: Option<&str>, content: Option<&str>) -> Reading {
    let reading = read(output, options);
    assert_eq!(reading.answer.reasoning.as_deref(), reasoning, "reasoning of {output:?}");
    assert_eq!(reading.answer.content.as_deref(), content, "content of {output:?}");
    reading
}

fn forced() -> DecoderOptions {
    let mode =
        Mode::Chat { starts_in_reasoning: true, thinking: true, force_nonempty_content: true, tools: None };
    DecoderOptions { mode, ..chat(None) }
}

#[test]
fn reasoning_ends_at_its_tag_and_white_space_around_it_is_dropped() {
    check("a thought \n\n</think>\n\nan answer", &chat(None), Some("a thought"), Some("an answer"));
}

#[test]
fn text_is_exact_otherwise() {
    check(" a\n\n b</think>\n  c \n\nd \n", &chat(None), Some(" a\n\n b"), Some("  c \n\nd \n"));
    check("é🦀\u{301}</think>ಮೈಸೂರು", &chat(None), Some("é🦀\u{301}"), Some("ಮೈಸೂರು"));
}

#[test]
fn a_leading_think_tag_is_removed() {
    check("<think>\na</think>b", &chat(None), Some("a"), Some("b"));
}

#[test]
fn a_missing_end_tag_makes_everything_reasoning() {
    check("all of it \n", &chat(None), Some("all of it"), None);
}

#[test]
fn further_end_tags_are_swallowed() {
    check("a</think>b</think>c", &chat(None), Some("a"), Some("bc"));
}

#[test]
fn a_tag_spelled_from_ordinary_tokens_is_text() {
    check("a\\</think>b</think>c\\<think>d", &chat(None), Some("a</think>b"), Some("c<think>d"));
}

#[test]
fn tags_are_read_as_text_when_the_vocabulary_has_no_ids_for_them() {
    let reading = read_untagged("<think>a</thin</think>\nb<", &chat(None));
    assert_eq!(reading.answer.reasoning.as_deref(), Some("a</thin"));
    assert_eq!(reading.answer.content.as_deref(), Some("b<"));
}

#[test]
fn an_answer_that_opens_its_own_thought_is_split() {
    let mut options = chat(None);
    options.mode =
        Mode::Chat { starts_in_reasoning: false, thinking: true, force_nonempty_content: false, tools: None };
    check("<think>\na\n</think>\nb", &options, Some("a"), Some("b"));
    // Only as the first thing, or the parser could stay in thought for ever (ollama 13764).
    check("x<think>a", &options, None, Some("xa"));
}

#[test]
fn trtllm_14502_with_thinking_off_the_answer_is_content() {
    check("the answer", &chat_off(None), None, Some("the answer"));
    check("\n\nthe answer", &chat_off(None), None, Some("the answer"));
    check("<think></think>the answer", &chat_off(None), None, Some("the answer"));
}

#[test]
fn vllm_39103_40424_text_after_the_reasoning_is_content() {
    check("r</think>c", &chat(tools()), Some("r"), Some("c"));
    check("r</think>\n\nc\n", &forced(), Some("r"), Some("c\n"));
}

#[test]
fn first_nemotron_v3_the_swap_has_an_effect() {
    // The first plugin assigned a value to itself: reasoning stayed, content stayed empty.
    let reading = check("all of it\n", &forced(), None, Some("all of it"));
    assert_eq!(
        reading.stream,
        [Delta::Reasoning("all of it".into()), Delta::Content("all of it".into())],
        "the stream has sent the reasoning already, and sends it once more as content",
    );
    check("all of it</think>\n \n", &forced(), None, Some("all of it"));
    let mut off = chat_off(None);
    if let Mode::Chat { starts_in_reasoning, .. } = &mut off.mode {
        *starts_in_reasoning = true;
    }
    check("all of it", &off, None, Some("all of it"));
}

#[test]
fn the_swap_needs_reasoning_and_silence() {
    check("", &forced(), None, None);
    check(" \n</think>", &forced(), None, None);
    check("r</think>c", &forced(), Some("r"), Some("c"));
    check("cut off here", &chat(None), Some("cut off here"), None);
}

#[test]
fn spark_234_stream_and_whole_are_one_parser() {
    // `read` folds the stream and compares all cuts; here the order of the stream itself.
    let reading = read("r</think>c<tool_call><function=g></function></tool_call>", &chat(tools()));
    let kinds: Vec<_> = reading.stream.iter().map(std::mem::discriminant).collect();
    let expected = [
        Delta::Reasoning("r".into()),
        Delta::Content("c".into()),
        Delta::CallStart { index: 0, name: "g".into() },
        Delta::CallArguments { index: 0, json: "{}".into() },
        Delta::CallEnd { index: 0 },
    ];
    assert_eq!(reading.stream, expected, "{kinds:?}");
}

#[test]
fn trtllm_13684_a_call_ends_the_reasoning() {
    let reading =
        check("r \n<tool_call>\n<function=g>\n</function>\n</tool_call>", &chat(tools()), Some("r"), None);
    assert_eq!(reading.answer.calls.len(), 1);
    // Without tools it is what it says.
    check("r<tool_call>x</think>y", &chat(None), Some("r<tool_call>x"), Some("y"));
}

#[test]
fn control_tokens_are_never_text_in_a_chat() {
    let mut options = chat(None);
    options.skip_special = false;
    check("a</think>b<|im_end|>", &options, Some("a"), Some("b"));
}

#[test]
fn raw_mode_is_the_text_itself() {
    let mut options = DecoderOptions { skip_special: true, ..DecoderOptions::default() };
    let all = "<think>a</think>\n<tool_call><function=f></tool_call><|im_end|> ";
    check(all, &options, None, Some("<think>a</think>\n<tool_call><function=f></tool_call> "));
    options.skip_special = false;
    check(all, &options, None, Some(all));
}

#[test]
fn reasoning_tokens_are_counted_without_the_tags() {
    assert_eq!(read("<think>abc</think>de", &chat(None)).reasoning_tokens, 3);
    assert_eq!(read("ab<tool_call><function=g></function></tool_call>", &chat(tools())).reasoning_tokens, 2);
    assert_eq!(read("ab", &chat_off(None)).reasoning_tokens, 0);
}

#[test]
fn the_reasoning_of_the_end_of_turn_is_not_lost() {
    assert_eq!(crate::world::CONTROL[IM_END as usize], "<|im_end|>");
    check("a thought<|im_end|>", &chat(None), Some("a thought"), None);
}
