//! The tokenizer and chat template of a GGUF file as the files that text is read from.

use std::collections::HashSet;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::weights::Error;
use crate::weights::gguf::{List, Metadata};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const TYPES: &str = "tokenizer.ggml.token_type";
const PRE: &str = "tokenizer.ggml.pre";

/// How text is cut before merges run, by the name that GGUF has for it: (names, expression, whether a whole piece that
/// is a token is taken without merging).
///
/// `pixtral` is what converters write for Nemotron 3, whose own expression is Tekken's; that is what stands here, so
/// that ids are the model's own and not those of a similar expression.
const SPLITS: [(&[&str], &str, bool); 3] = [
    (
        &["pixtral", "tekken"],
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
    ),
    (
        &["llama-bpe", "llama3", "llama-v3"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
    ),
    (
        &["gpt-2", "default"],
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        false,
    ),
];

/// What a token is: the format's numbers that mean something here.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
/// Fills a hole between ids.
const UNUSED: u64 = 5;

/// Tokens that end an answer of this family whatever the file says: some files name only one of them.
const STOPS: [&str; 2] = ["</s>", "<|im_end|>"];

/// `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, as far as the file has what they are made of.
pub fn files(metadata: &Metadata) -> Result<Vec<(&'static str, Bytes)>, Error> {
    let mut files = Vec::new();
    if let Some(template) = metadata.optional_text("tokenizer.chat_template")? {
        files.push(("chat_template.jinja", Bytes::from(template.to_owned())));
    }
    if let Some(json) = metadata.optional_text("tokenizer.huggingface.json")? {
        files.push(("tokenizer.json", Bytes::from(json.to_owned())));
    } else if let Some(model) = metadata.optional_text("tokenizer.ggml.model")? {
        if model != "gpt2" {
            return Err(metadata.wrong("tokenizer.ggml.model", "gpt2, a byte-level BPE", model));
        }
        files.push(("tokenizer.json", Bytes::from(tokenizer(metadata)?.to_string())));
    }
    if metadata.get(TOKENS).is_some() {
        files.push(("tokenizer_config.json", Bytes::from(config(metadata)?.to_string())));
    }
    Ok(files)
}

fn tokenizer(metadata: &Metadata) -> Result<Value, Error> {
    let tokens = metadata.texts(TOKENS)?;
    let types = types(metadata, tokens.len())?;
    let (expression, ignore_merges) = split(metadata)?;
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, (token, kind)) in tokens.texts().zip(types).enumerate() {
        if kind == UNUSED {
            continue;
        }
        if vocabulary.insert(token.to_owned(), id.into()).is_some() {
            return Err(metadata.wrong(TOKENS, "every token once", format!("{token:?} again with id {id}")));
        }
        if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) {
            added.push(json!({
                "id": id, "content": token, "special": kind != USER_DEFINED,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            }));
        }
    }
    let pieces =
        json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, bytes]},
        "post_processor": first_token(metadata, tokens)?,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "merges": merges(metadata, &vocabulary)?,
            "vocab": vocabulary,
        },
    }))
}

/// The kind of each token: normal where the file says nothing.
fn types(metadata: &Metadata, count: usize) -> Result<Vec<u64>, Error> {
    match metadata.optional_list(TYPES)? {
        None => Ok(vec![1; count]),
        Some(list) if list.len() == count => metadata.sizes(TYPES, count),
        Some(list) => Err(metadata.wrong(TYPES, format!("{count} entries, one for each token"), list.len())),
    }
}

fn split(metadata: &Metadata) -> Result<(&'static str, bool), Error> {
    let name = metadata.text(PRE)?;
    match SPLITS.iter().find(|(names, ..)| names.contains(&name)) {
        Some((_, expression, ignore_merges)) => Ok((expression, *ignore_merges)),
        None => {
            let known: Vec<_> = SPLITS.iter().flat_map(|(names, ..)| *names).copied().collect();
            Err(metadata.wrong(PRE, format!("one of {}", known.join(", ")), name))
        }
    }
}

/// Pairs of tokens, earlier ones first. A pair that makes no token would be refused without its name later.
fn merges(metadata: &Metadata, vocabulary: &Map<String, Value>) -> Result<Vec<Value>, Error> {
    let list = metadata.texts(MERGES)?;
    let mut merges = Vec::with_capacity(list.len());
    for merge in list.texts() {
        // A space is never part of a byte-level token.
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let known = |token: &str| vocabulary.contains_key(token);
            known(left) && known(right) && known(&[*left, *right].concat())
        });
        let Some((left, right)) = pair else {
            let expected = "two tokens that make a third, with a space between them";
            return Err(metadata.wrong(MERGES, expected, format!("{merge:?}")));
        };
        merges.push(json!([left, right]));
    }
    Ok(merges)
}

/// Nothing is put in front of a text unless the file asks for it, which no release of the family does.
fn first_token(metadata: &Metadata, tokens: &List) -> Result<Value, Error> {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    if metadata.optional_bool("tokenizer.ggml.add_bos_token")? != Some(true) {
        return Ok(bytes);
    }
    let Some((id, token)) = named(metadata, tokens, "bos")? else {
        return Err(metadata.wrong("tokenizer.ggml.bos_token_id", "the token to begin with", "nothing"));
    };
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), text("B", 1)],
        "special_tokens": {token.as_str(): {"id": token, "ids": [id], "tokens": [token]}},
    });
    Ok(json!({"type": "Sequence", "processors": [bytes, template]}))
}

/// The token with the name `bos`, `eos`, `eot`, …: its id and text.
fn named(metadata: &Metadata, tokens: &List, name: &str) -> Result<Option<(u64, String)>, Error> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = metadata.optional_size(&key)? else { return Ok(None) };
    let text = usize::try_from(id).ok().filter(|&id| id < tokens.len()).and_then(|id| tokens.texts().nth(id));
    match text {
        Some(text) => Ok(Some((id, text.to_owned()))),
        None => Err(metadata.wrong(&key, format!("an id below {}, the count of tokens", tokens.len()), id)),
    }
}

/// The names that a template may speak of.
fn config(metadata: &Metadata) -> Result<Value, Error> {
    let tokens = metadata.texts(TOKENS)?;
    let mut config = Map::new();
    for (name, key) in
        [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
    {
        if let Some((_, text)) = named(metadata, tokens, name)? {
            config.insert(key.into(), text.into());
        }
    }
    Ok(config.into())
}

/// Where answers end, and how the vendor samples if the file says so.
pub fn generation_config(metadata: &Metadata) -> Result<Value, Error> {
    let mut config = Map::new();
    let mut stops: Vec<u64> = Vec::new();
    if metadata.get(TOKENS).is_some() {
        let tokens = metadata.texts(TOKENS)?;
        for name in ["eos", "eot", "eom"] {
            stops.extend(named(metadata, tokens, name)?.map(|(id, _)| id));
        }
        let control = types(metadata, tokens.len())?;
        let ends = |(token, kind): (&str, &u64)| *kind == CONTROL && STOPS.contains(&token);
        let found = tokens.texts().zip(&control).enumerate().filter(|(_, entry)| ends(*entry));
        stops.extend(found.map(|(id, _)| id as u64));
    }
    let mut seen = HashSet::new();
    stops.retain(|id| seen.insert(*id));
    config.insert("eos_token_id".into(), stops.into());
    for (name, key) in [
        ("temperature", "temp"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("min_p", "min_p"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        if let Some(value) = metadata.optional_number(&format!("general.sampling.{key}"))? {
            config.insert(name.into(), value.into());
        }
    }
    Ok(config.into())
}
