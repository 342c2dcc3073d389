//! Ids and bytes.

use ferrotron::text::{Error, Text, TextFiles};
use proptest::prelude::*;

use crate::world::{IM_END, text, tiny, tokenizer_json};

fn load(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Text, Error> {
    Text::load(TextFiles { tokenizer_json, tokenizer_config, chat_template: None })
}

#[test]
fn an_absent_or_unknown_tokenizer_is_a_typed_error() {
    for json in [&b""[..], b" \n", b"{", b"[]", b"{\"model\": {\"type\": \"Magic\"}}", b"\xff\xfe"] {
        let error = load(json, None).unwrap_err();
        assert!(matches!(error, Error::Tokenizer { .. }), "{json:?}: {error}");
    }
}

#[test]
fn a_tokenizer_that_is_not_byte_level_is_a_typed_error() {
    let json = br#"{"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    let error = load(json, None).unwrap_err();
    assert!(matches!(&error, Error::NotByteLevel { got } if got.contains("Fuse")), "{error}");
}

#[test]
fn ids_far_beyond_the_vocabulary_are_refused() {
    let json = br#"{"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 4000000000}, "merges": []}}"#;
    assert!(matches!(load(json, None), Err(Error::Tokenizer { .. })));
}

#[test]
fn a_broken_tokenizer_config_is_a_typed_error() {
    let (json, _) = tokenizer_json(true, &[]);
    for config in [&b"{"[..], b"[]", b"7"] {
        assert!(matches!(load(&json, Some(config)), Err(Error::TokenizerConfig { .. })));
    }
}

#[test]
fn the_bytes_of_every_token() {
    let (json, ids) = tokenizer_json(true, &[vec![0xf0, 0x9f], b" the".to_vec()]);
    let text = load(&json, None).unwrap();
    for (bytes, id) in &ids {
        assert_eq!(text.token_bytes(*id), Some(&bytes[..]));
    }
    assert_eq!(text.token_bytes(IM_END), Some(&b"<|im_end|>"[..]));
    assert_eq!(text.token_bytes(u32::MAX), None);
    assert_eq!(text.token_string(ids[&vec![0xf0, 0x9f]]).as_deref(), Some("\u{FFFD}"));
    assert_eq!(text.vocab_size(), 18 + 256 + 2);
    assert_eq!(text.id_of("<|im_end|>"), Some(IM_END));
    assert_eq!(text.id_of("no such token"), None);
}

#[test]
fn special_tokens_are_skipped_and_added_ones_are_not() {
    let text = text(None);
    let ids = text.encode("<|im_start|>a<think></s>", false).unwrap();
    assert_eq!(text.decode(&ids, true), "a<think>");
    assert_eq!(text.decode(&ids, false), "<|im_start|>a<think></s>");
    assert!(text.is_special(IM_END) && !text.is_special(12));
}

proptest! {
    #[test]
    fn any_unicode_makes_a_round_trip(given in any::<String>()) {
        let text = byte_level();
        let ids = text.encode(&given, false).unwrap();
        prop_assert_eq!(text.decode(&ids, false), given);
    }

    #[test]
    fn any_unicode_makes_a_round_trip_through_the_tiny_tokenizer(given in "(\\PC|[\r\n\t ]){0,40}") {
        let text = tiny_once();
        let ids = text.encode(&given, false).unwrap();
        prop_assert_eq!(text.decode(&ids, false), given);
    }
}

fn byte_level() -> &'static Text {
    static TEXT: std::sync::OnceLock<Text> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| text(None))
}

fn tiny_once() -> &'static Text {
    static TEXT: std::sync::OnceLock<Text> = std::sync::OnceLock::new();
    TEXT.get_or_init(tiny)
}
