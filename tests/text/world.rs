//! A small world for tests: a byte-level tokenizer built in code, and answers cut into tokens anywhere.

use std::collections::HashMap;

use ferrotron::text::{Answer, DecoderOptions, Delta, Fold, Mode, Text, TextFiles, Tool};
use serde_json::{Value, json};

/// Nemotron 3's control tokens, by id; 12 to 17 are added but not special.
pub const CONTROL: [&str; 18] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
];
/// `<|im_end|>`, the stop id.
pub const IM_END: u32 = 11;

/// splitmix64: small, seeded, good enough to choose cuts.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// GPT-2's printable alphabet of bytes.
fn alphabet() -> Vec<char> {
    let mut next = 0x100;
    (0..=255u32)
        .map(|byte| {
            if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
                char::from_u32(byte).unwrap()
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap()
            }
        })
        .collect()
}

/// A tokenizer.json: the control tokens (unless the tags are left out), all bytes, and `pieces` as tokens.
pub fn tokenizer_json(with_tags: bool, pieces: &[Vec<u8>]) -> (Vec<u8>, HashMap<Vec<u8>, u32>) {
    let alphabet = alphabet();
    let spell = |bytes: &[u8]| bytes.iter().map(|&b| alphabet[b as usize]).collect::<String>();
    let mut vocab = serde_json::Map::new();
    let mut ids = HashMap::new();
    let mut added = Vec::new();
    for (id, text) in CONTROL.iter().enumerate() {
        if with_tags || !(12..=15).contains(&id) {
            vocab.insert(text.to_string(), json!(id));
            added.push(
                json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": !(12..=17).contains(&id)}),
            );
        }
    }
    let mut id = CONTROL.len() as u32;
    for piece in (0..=255u8).map(|b| vec![b]).chain(pieces.iter().cloned()) {
        ids.entry(piece).or_insert_with_key(|piece| {
            vocab.insert(spell(piece), json!(id));
            id += 1;
            id - 1
        });
    }
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    (serde_json::to_vec(&file).unwrap(), ids)
}

/// The byte tokenizer, with `template`.
pub fn text(template: Option<&str>) -> Text {
    let (tokenizer_json, _) = tokenizer_json(true, &[]);
    let files =
        TextFiles { tokenizer_json: &tokenizer_json, tokenizer_config: None, chat_template: template };
    Text::load(files).unwrap()
}

/// The tiny checkpoint's own files.
pub fn tiny() -> Text {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    Text::load(TextFiles {
        tokenizer_json: &read("tokenizer.json"),
        tokenizer_config: Some(&read("tokenizer_config.json")),
        chat_template: Some(std::str::from_utf8(&read("chat_template.jinja")).unwrap()),
    })
    .unwrap()
}

/// A piece of an output: a control token or some bytes.
#[derive(Clone)]
enum Piece {
    Control(u32),
    Bytes(Vec<u8>),
}

/// The output `text` cut into tokens. Control tokens become their ids unless spelled with a backslash (`\<think>`).
fn cut(text: &str, with_tags: bool, every: Option<usize>, rng: &mut Rng) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut run: Vec<u8> = Vec::new();
    let mut flush = |run: &mut Vec<u8>, pieces: &mut Vec<Piece>| {
        let mut at = 0;
        while at < run.len() {
            let mut len = every.unwrap_or_else(|| 1 + rng.below(9)).min(run.len() - at);
            // A token that spells a control token would be that token.
            if CONTROL.iter().any(|token| token.as_bytes() == &run[at..at + len]) {
                len -= 1;
            }
            pieces.push(Piece::Bytes(run[at..at + len].to_vec()));
            at += len;
        }
        run.clear();
    };
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if c == '\\' && rest[1..].starts_with('<') {
            run.push(b'<');
            rest = &rest[2..];
            continue;
        }
        let control = CONTROL.iter().position(|token| rest.starts_with(token));
        match control.filter(|id| with_tags || !(12..=15).contains(id)) {
            Some(id) => {
                flush(&mut run, &mut pieces);
                pieces.push(Piece::Control(id as u32));
                rest = &rest[CONTROL[id].len()..];
            }
            None => {
                run.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    flush(&mut run, &mut pieces);
    pieces
}

/// What reading one output gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    pub answer: Answer,
    pub stop: Option<String>,
    /// The stream with neighbours joined: the order of kinds counts, the cuts do not.
    pub stream: Vec<Delta>,
    pub reasoning_tokens: usize,
}

/// Reads `output` cut in many ways, demands that all agree, and returns the reading.
pub fn read(output: &str, options: &DecoderOptions) -> Reading {
    read_with(output, options, true, 12)
}

/// The same with a vocabulary that has no ids for the tags.
pub fn read_untagged(output: &str, options: &DecoderOptions) -> Reading {
    read_with(output, options, false, 12)
}

pub fn read_with(output: &str, options: &DecoderOptions, with_tags: bool, cuts: u64) -> Reading {
    let outputs: Vec<Vec<Piece>> = (0..cuts)
        .map(|seed| {
            let every = [Some(1), Some(usize::MAX)].get(seed as usize).copied().flatten();
            cut(output, with_tags, every, &mut Rng(seed))
        })
        .collect();
    let pieces: Vec<Vec<u8>> = outputs
        .iter()
        .flatten()
        .filter_map(|piece| match piece {
            Piece::Bytes(bytes) => Some(bytes.clone()),
            Piece::Control(_) => None,
        })
        .collect();
    let (tokenizer_json, ids) = tokenizer_json(with_tags, &pieces);
    let files = TextFiles { tokenizer_json: &tokenizer_json, tokenizer_config: None, chat_template: None };
    let text = Text::load(files).unwrap();
    let mut first: Option<Reading> = None;
    for (seed, pieces) in outputs.iter().enumerate() {
        let ids = pieces.iter().map(|piece| match piece {
            Piece::Control(id) => *id,
            Piece::Bytes(bytes) => ids[bytes],
        });
        let mut reading = read_ids(&text, ids, options);
        // Tokens are counted, so their number is the one thing that cuts may change.
        let first = first.get_or_insert_with(|| reading.clone());
        reading.reasoning_tokens = first.reasoning_tokens;
        assert_eq!(&reading, first, "cut {seed} of {output:?} reads otherwise than cut 0");
    }
    first.unwrap()
}

/// Reads ids, checking what every stream must keep.
pub fn read_ids(text: &Text, ids: impl Iterator<Item = u32>, options: &DecoderOptions) -> Reading {
    let mut decoder = text.decoder(options.clone());
    let (mut stream, mut stop): (Vec<Delta>, Option<String>) = (Vec::new(), None);
    for id in ids {
        let mut out = Vec::new();
        stop = decoder.push(id, &mut out);
        check_pieces(&out);
        stream.extend(out);
        if stop.is_some() {
            break;
        }
    }
    let mut out = Vec::new();
    decoder.finish(&mut out);
    check_pieces(&out);
    stream.extend(out);
    let mut fold = Fold::default();
    let mut joined: Vec<Delta> = Vec::new();
    for delta in stream {
        fold.push(delta.clone());
        match (joined.last_mut(), &delta) {
            (Some(Delta::Reasoning(last)), Delta::Reasoning(more)) => last.push_str(more),
            (Some(Delta::Content(last)), Delta::Content(more)) => last.push_str(more),
            (Some(Delta::CallArguments { json: last, .. }), Delta::CallArguments { json: more, .. }) => {
                last.push_str(more);
            }
            _ => joined.push(delta),
        }
    }
    let answer = fold.finish(decoder.reasoning_became_content());
    for call in &answer.calls {
        let arguments: Result<Value, _> = serde_json::from_str(&call.arguments);
        assert!(arguments.is_ok_and(|value| value.is_object()), "{:?} is no JSON object", call.arguments);
    }
    Reading { answer, stop, stream: joined, reasoning_tokens: decoder.reasoning_tokens() }
}

fn check_pieces(out: &[Delta]) {
    for delta in out {
        let empty = match delta {
            Delta::Reasoning(text) | Delta::Content(text) => text.is_empty(),
            Delta::CallStart { name, .. } => name.is_empty(),
            Delta::CallArguments { json, .. } => json.is_empty(),
            Delta::CallEnd { .. } => false,
        };
        assert!(!empty, "an empty delta in {out:?}");
    }
}

/// A chat's options: thinking on, the prompt's `<think>` open, and `tools`.
pub fn chat(tools: Option<Vec<Tool>>) -> DecoderOptions {
    DecoderOptions {
        mode: Mode::Chat { starts_in_reasoning: true, thinking: true, force_nonempty_content: false, tools },
        skip_special: true,
        ..DecoderOptions::default()
    }
}

/// Thinking off: the prompt ends with `<think></think>`.
pub fn chat_off(tools: Option<Vec<Tool>>) -> DecoderOptions {
    DecoderOptions {
        mode: Mode::Chat {
            starts_in_reasoning: false,
            thinking: false,
            force_nonempty_content: false,
            tools,
        },
        skip_special: true,
        ..DecoderOptions::default()
    }
}

/// Two tools: one with a parameter of every type, one without parameters.
pub fn tools() -> Option<Vec<Tool>> {
    let parameters = json!({"type": "object", "properties": {
        "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"type": "integer"}},
        "o": {"type": "object", "properties": {"k": {"type": "integer"}}},
        "s_or_null": {"type": ["string", "null"]}, "any": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "e": {"enum": ["a", 1, null]}, "r": {"$ref": "#/$defs/R"}, "alias": {"type": "dict"}, "u": {"type": "uint8"},
        "si": {"type": ["string", "integer"]},
    }, "$defs": {"R": {"type": "object"}}});
    Some(vec![
        Tool { name: "f".into(), parameters: Some(parameters) },
        Tool { name: "g".into(), parameters: None },
    ])
}
