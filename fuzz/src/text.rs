//! What a model or a conversation wrote: detokenizer, reasoning, tool calls, stop strings and the template.

use std::sync::OnceLock;

use ferrotron::text::{Chat, DecoderOptions, Delta, Fold, Message, Mode, Text, TextFiles, Tool, ToolCall};
use serde_json::{Value, json};

/// The tiny checkpoint's tokenizer and template.
pub fn tiny() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| {
        let tokenizer_json = include_bytes!("../../models/tiny/tokenizer.json");
        let template = include_str!("../../models/tiny/chat_template.jinja");
        Text::load(TextFiles { tokenizer_json, tokenizer_config: None, chat_template: Some(template) })
            .expect("the tiny checkpoint's own files are sound")
    })
}

/// Ids from bytes: two bytes an id, so that ids beyond the vocabulary occur too.
fn ids(data: &[u8]) -> Vec<u32> {
    data.chunks_exact(2).map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]])) % 1400).collect()
}

/// Ids that spell `data` as an answer would: every byte value chooses a piece of markup or a character.
fn answer(data: &[u8]) -> Vec<u32> {
    const PIECES: [&str; 24] = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "<function=",
        "</function>",
        "<parameter=s>",
        "<parameter=i>",
        "<parameter=",
        "</parameter>",
        ">",
        "<",
        "\n",
        " ",
        "/",
        "STOP",
        "ST",
        "é",
        "🦀",
        "{\"a\": 1}",
        "7",
        "<|im_end|>",
        "=",
    ];
    let mut text = String::new();
    for &byte in data {
        match PIECES.get(byte as usize % 64) {
            Some(piece) => text.push_str(piece),
            None => text.push(byte as char),
        }
    }
    tiny().encode(&text, false).expect("any text can be encoded")
}

fn read(ids: &[u32], options: DecoderOptions) -> Vec<Delta> {
    let mut decoder = tiny().decoder(options);
    let mut out = Vec::new();
    for &id in ids {
        if decoder.push(id, &mut out).is_some() {
            break;
        }
    }
    decoder.finish(&mut out);
    let mut fold = Fold::default();
    out.iter().for_each(|delta| fold.push(delta.clone()));
    for call in fold.finish(decoder.reasoning_became_content()).calls {
        let arguments: Value = serde_json::from_str(&call.arguments).expect("arguments are JSON");
        assert!(arguments.is_object());
    }
    out
}

fn content(out: &[Delta]) -> String {
    let texts = out.iter().filter_map(|delta| match delta {
        Delta::Content(text) => Some(text.as_str()),
        _ => None,
    });
    texts.collect()
}

/// Raw decoding, id by id, is decoding the whole.
pub fn detokenizer(data: &[u8]) {
    let ids = ids(data);
    assert_eq!(content(&read(&ids, DecoderOptions::default())), tiny().decode(&ids, false));
}

/// The reasoning splitter keeps its order, and no tag becomes text.
pub fn reasoning(data: &[u8]) {
    let Some((&flags, rest)) = data.split_first() else { return };
    let mode = Mode::Chat {
        starts_in_reasoning: flags & 1 > 0,
        thinking: flags & 2 > 0,
        force_nonempty_content: flags & 4 > 0,
        tools: None,
    };
    let out = read(
        &answer(rest),
        DecoderOptions { mode, skip_special: flags & 8 > 0, ..DecoderOptions::default() },
    );
    let first_content = out.iter().position(|delta| matches!(delta, Delta::Content(_))).unwrap_or(out.len());
    assert!(!out[first_content..].iter().any(|delta| matches!(delta, Delta::Reasoning(_))), "{out:?}");
    assert!(!content(&out).contains("</think>"), "{out:?}");
}

/// The tool grammar: calls are numbered, opened and closed in order, and complete ones have JSON objects.
pub fn tools(data: &[u8]) {
    let parameters =
        json!({"type": "object", "properties": {"s": {"type": "string"}, "i": {"type": "integer"}}});
    let tools = Some(vec![Tool { name: "f".into(), parameters: Some(parameters) }]);
    let mode =
        Mode::Chat { starts_in_reasoning: false, thinking: true, force_nonempty_content: false, tools };
    let out = read(&answer(data), DecoderOptions { mode, ..DecoderOptions::default() });
    let (mut next, mut open) = (0, false);
    for delta in &out {
        match delta {
            Delta::CallStart { index, .. } => {
                assert!(!open && *index == next, "{out:?}");
                open = true;
            }
            Delta::CallArguments { index, .. } => assert!(open && *index == next, "{out:?}"),
            Delta::CallEnd { index } => {
                assert!(open && *index == next, "{out:?}");
                (next, open) = (next + 1, false);
            }
            Delta::Content(_) | Delta::Reasoning(_) => assert!(!open, "{out:?}"),
        }
    }
}

/// Stop strings: the text is what comes before the first match in the whole.
pub fn stop_strings(data: &[u8]) {
    let ids = answer(data);
    let stop = vec!["STOP".to_string(), "T\n".to_string(), "é🦀".to_string()];
    let out = read(&ids, DecoderOptions { stop: stop.clone(), ..DecoderOptions::default() });
    let whole = tiny().decode(&ids, false);
    let first =
        stop.iter().filter_map(|s| Some((whole.find(s.as_str())? + s.len(), s.len()))).min_by_key(|m| m.0);
    let expected = first.map_or(whole.as_str(), |(end, len)| &whole[..end - len]);
    assert_eq!(content(&out), expected);
}

/// A checkpoint's template on any messages, and any text as a template: an answer or an error, never a panic, and no
/// control token that the template did not write.
pub fn template(data: &[u8]) {
    const PIECES: [&str; 10] = [
        "<|im_end|>",
        "<|im_start|>",
        "</s>",
        "<",
        "|im_end|",
        ">",
        "s",
        "{{ messages }}",
        "{% for m in messages %}",
        " ",
    ];
    let pieces: Vec<u8> = data
        .iter()
        .flat_map(|byte| match PIECES.get(*byte as usize % 32) {
            Some(piece) => piece.as_bytes(),
            None => std::slice::from_ref(byte),
        })
        .copied()
        .collect();
    let words = String::from_utf8_lossy(&pieces).into_owned();
    let call = ToolCall { id: None, name: words.clone(), arguments: Value::String(words.clone()) };
    let message =
        |role: &str| Message { role: role.into(), content: Some(words.clone()), ..Message::default() };
    let mut chat = Chat {
        messages: vec![
            message("user"),
            Message { reasoning: Some(words.clone()), tool_calls: vec![call], ..message("assistant") },
            message("tool"),
        ],
        add_generation_prompt: true,
        ..Chat::default()
    };
    let ids = tiny().prompt(&chat).expect("the tiny template refuses nothing");
    let specials = ids.iter().filter(|&&id| tiny().is_special(id)).count();
    assert_eq!(specials, 9, "{words:?}");
    chat.template = Some(words);
    let _ = tiny().prompt(&chat);
}
