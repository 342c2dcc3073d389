//! Ids and their bytes: `tokenizer.json`, read by the `tokenizers` crate, with a table of each id's exact bytes
//! beside it.
//!
//! ```text
//! let ids = vocabulary.encode("héllo", false)?;   // text to ids, as Hugging Face does
//! vocabulary.bytes(ids[0])                        // the bytes of one id, maybe half a character
//! ```

use std::collections::{HashMap, HashSet};

use tokenizers::tokenizer::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use super::Error;

/// What an added token is.
#[derive(Debug, Clone)]
pub struct Added {
    pub id: u32,
    pub text: String,
    /// Control tokens: left out of text when special tokens are skipped, and never made from a user's words.
    pub special: bool,
}

/// A byte-level vocabulary. Immutable; shared by every request.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: tokenizers::Tokenizer,
    /// Bytes of all ids, one after the other; id i has `bytes[ends[i - 1]..ends[i]]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    /// Whether the id exists: a vocabulary may have holes.
    known: Vec<bool>,
    special: Vec<bool>,
    /// By text; every id flagged special or added.
    added: HashMap<String, Added>,
    /// Lengths in bytes that added tokens have, longest first: the match must be the longest one.
    added_lens: Vec<usize>,
    /// The bytes an added token may start with.
    added_starts: Box<[bool; 256]>,
}

impl Vocabulary {
    /// Reads a `tokenizer.json`.
    /// Errors: [`Error::Tokenizer`] if it is none, [`Error::NotByteLevel`] if its tokens are not byte strings.
    pub fn load(json: &[u8]) -> Result<Vocabulary, Error> {
        if json.iter().all(u8::is_ascii_whitespace) {
            return Err(Error::Tokenizer { got: "an empty file".into() });
        }
        let tokenizer = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| Error::Tokenizer { got: error.to_string() })?;
        let decoder = match tokenizer.get_decoder() {
            None => "none".to_string(),
            Some(decoder) => serde_json::to_string(decoder).unwrap_or_else(|error| error.to_string()),
        };
        if !decoder.contains("\"type\":\"ByteLevel\"") {
            return Err(Error::NotByteLevel { got: decoder.chars().take(200).collect() });
        }

        let added: HashMap<String, Added> = tokenizer
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| !token.content.is_empty())
            .map(|(&id, token)| {
                let text = token.content.clone();
                (text.clone(), Added { id, text, special: token.special })
            })
            .collect();
        let vocab = tokenizer.get_vocab(true);
        let count = vocab.values().max().map_or(0, |&id| id as usize + 1);
        // A hole costs an empty entry, so ids far beyond the number of tokens are a lie, not a vocabulary.
        if count == 0 || count > 2 * vocab.len() + MAX_HOLES {
            return Err(Error::Tokenizer { got: format!("{} tokens with ids up to {count}", vocab.len()) });
        }
        let mut texts: Vec<Option<&str>> = vec![None; count];
        for (text, &id) in &vocab {
            texts[id as usize] = Some(text);
        }
        let unprintable = byte_of_char();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(count));
        let (mut known, mut special) = (vec![false; count], vec![false; count]);
        for (id, text) in texts.iter().enumerate() {
            if let Some(text) = text {
                known[id] = true;
                match added.get(*text) {
                    Some(token) => {
                        special[id] = token.special;
                        bytes.extend_from_slice(text.as_bytes());
                    }
                    None => push_token_bytes(text, &unprintable, &mut bytes),
                }
            }
            ends.push(
                u32::try_from(bytes.len())
                    .map_err(|_| Error::Tokenizer { got: "a vocabulary of more than 4 GiB".into() })?,
            );
        }
        let mut added_lens: Vec<usize> =
            added.keys().map(String::len).collect::<HashSet<_>>().into_iter().collect();
        added_lens.sort_unstable_by(|a, b| b.cmp(a));
        let mut added_starts = Box::new([false; 256]);
        for first in added.keys().filter_map(|text| text.bytes().next()) {
            added_starts[first as usize] = true;
        }
        Ok(Vocabulary { tokenizer, bytes, ends, known, special, added, added_lens, added_starts })
    }

    /// Highest id + 1.
    pub fn size(&self) -> usize {
        self.ends.len()
    }

    /// The exact bytes of an id: perhaps half a character. None if there is no such id.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let i = id as usize;
        if !*self.known.get(i)? {
            return None;
        }
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        Some(&self.bytes[start..self.ends[i] as usize])
    }

    /// True for the ids that `tokenizer.json` flags as special.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// True for the ids of added tokens, special or not.
    pub fn is_added(&self, id: u32) -> bool {
        self.bytes(id)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .is_some_and(|text| self.added_id(text) == Some(id))
    }

    /// The id of an added token, by its text.
    pub fn added_id(&self, text: &str) -> Option<u32> {
        self.added.get(text).map(|token| token.id)
    }

    /// The id of a token as `tokenizer.json` spells it (byte-level tokens in their printable alphabet).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Every added token that is flagged special.
    pub fn specials(&self) -> impl Iterator<Item = &Added> {
        self.added.values().filter(|token| token.special)
    }

    /// The longest added token at the start of `text`.
    pub fn added_at(&self, text: &str) -> Option<&Added> {
        if !self.added_starts[usize::from(*text.as_bytes().first()?)] {
            return None;
        }
        self.added_lens.iter().find_map(|&len| self.added.get(text.get(..len)?))
    }

    /// Text to ids, exactly as Hugging Face does it: added tokens spelled in the text become their ids.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(|error| Error::Encode { got: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text to ids without looking for added tokens: what a user wrote stays what a user wrote.
    pub fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        let fail = |error: tokenizers::Error| Error::Encode { got: error.to_string() };
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.tokenizer.get_normalizer() {
            normalizer.normalize(&mut normalized).map_err(fail)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(fail)?;
        }
        let model = self.tokenizer.get_model();
        for (piece, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            ids.extend(model.tokenize(piece).map_err(fail)?.iter().map(|token| token.id));
        }
        Ok(())
    }
}

/// Ids without a token that a vocabulary may have beyond its own size again.
const MAX_HOLES: usize = 1 << 16;

/// The bytes of one byte-level token. Characters outside the alphabet stand for themselves, as in the crate's decoder:
/// a whole token is then its own text.
fn push_token_bytes(text: &str, table: &HashMap<char, u8>, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        match table.get(&c) {
            Some(&byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet: printable Latin-1 bytes are themselves, the other bytes are numbered from U+0100 upward.
fn byte_of_char() -> HashMap<char, u8> {
    let mut table = HashMap::with_capacity(256);
    let mut next = 0x100u32;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let c = if printable { Some(byte as char) } else { char::from_u32(next) };
        if !printable {
            next += 1;
        }
        if let Some(c) = c {
            table.insert(c, byte);
        }
    }
    table
}
