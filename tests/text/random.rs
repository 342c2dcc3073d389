//! Random answers made of everything the grammar knows: cut anywhere, they read the same, and what must never happen
//! does not.

use ferrotron::text::{DecoderOptions, Mode};
use proptest::prelude::*;

use crate::world::{read_with, tools};

const PARTS: [&str; 34] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "<function=g>",
    "<function=",
    "</function>",
    "<parameter=s>",
    "<parameter=i>",
    "<parameter=",
    "</parameter>",
    "< parameter = l >",
    ">",
    "<",
    "\n",
    " ",
    "  \n",
    "text",
    "3",
    "[1, 2]",
    "é",
    "🦀",
    "null",
    "true",
    "\"",
    "\\<think>",
    "\\</tool_call>",
    "<|im_end|>",
    "STOP",
    "STO",
    "</",
    "</func",
    "a < b",
];

fn answers() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(PARTS.to_vec()), 0..24).prop_map(|parts| parts.concat())
}

fn options() -> impl Strategy<Value = DecoderOptions> {
    (any::<[bool; 5]>(), any::<bool>(), prop::sample::select(vec![0usize, 1, 2])).prop_map(
        |(
            [starts_in_reasoning, thinking, force_nonempty_content, with_tools, skip_special],
            include_stop,
            stops,
        )| {
            let tools = if with_tools { tools() } else { None };
            let mode = Mode::Chat { starts_in_reasoning, thinking, force_nonempty_content, tools };
            let stop = ["STOP", "</think>\n"].iter().take(stops).map(|s| s.to_string()).collect();
            DecoderOptions { mode, stop, include_stop, skip_special }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn cutting_an_answer_anywhere_changes_nothing(output in answers(), options in options(), tagged in any::<bool>()) {
        // `read_with` compares the cuts, parses the arguments of every call, and refuses empty deltas.
        let reading = read_with(&output, &options, tagged, 6);
        if tagged {
            let content = reading.answer.content.unwrap_or_default();
            let spelled = output.contains("\\<");
            prop_assert!(spelled || !content.contains("</think>"), "{content:?}");
        }
        if let (Some(stop), false) = (&reading.stop, options.include_stop) {
            let leaked = reading.stream.iter().any(|delta| format!("{delta:?}").contains(stop.as_str()));
            prop_assert!(!leaked, "{stop:?} in {:?}", reading.stream);
        }
    }
}
