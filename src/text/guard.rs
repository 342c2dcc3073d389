//! A user's words never become control ids.
//!
//! A template renders one string, and in it `<|im_end|>` from the template and `<|im_end|>` from a message look the
//! same. So before rendering, every control token that a *value* spells is broken by a mark: a private-use
//! character that occurs in none of the values. The template's own tokens stay whole. After rendering, what is whole
//! becomes ids, the marks are taken out, and the text between is encoded without looking for control tokens. A
//! conversation that spells none (nearly all) is never marked and takes the plain way.
//!
//! A value may also complete a token together with the template's text (a key `|im_end|>` written as `<KEY>`), so
//! a value that begins with the end of a control token, or ends with the beginning of one, or is a piece of one,
//! is marked at that edge.
//!
//! Only tokens flagged special are guarded (spec §6.1). `<think>`, `<tool_call>` and their kin are not flagged:
//! templates look for them in the history, and they mean in a prompt what they mean in the reference.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Error, vocabulary::Vocabulary};

/// What a vocabulary's control tokens look like from inside a value. Built once per checkpoint.
#[derive(Debug, Default)]
pub struct Pieces {
    /// Every token's proper beginnings and proper ends, and every token's inner pieces.
    heads: HashSet<String>,
    tails: HashSet<String>,
    inner: HashSet<String>,
    longest: usize,
}

impl Pieces {
    pub fn new(vocabulary: &Vocabulary) -> Pieces {
        let mut pieces = Pieces::default();
        for token in vocabulary.specials() {
            // A token of one character has no pieces; absurdly long ones would cost their length squared.
            let text: Vec<char> = token.text.chars().take(64).collect();
            let cut = |range: &[char]| range.iter().collect::<String>();
            for i in 1..text.len() {
                pieces.heads.insert(cut(&text[..i]));
                pieces.tails.insert(cut(&text[i..]));
                for j in i + 1..text.len() {
                    pieces.inner.insert(cut(&text[i..j]));
                }
            }
            pieces.longest = pieces.longest.max(token.text.len());
        }
        pieces
    }

    fn starts_with_tail(&self, core: &str) -> bool {
        let upto = core.len().min(self.longest);
        (1..=upto).any(|n| core.get(..n).is_some_and(|head| self.tails.contains(head)))
            || self.inner.contains(core)
    }

    fn ends_with_head(&self, core: &str) -> bool {
        let upto = core.len().min(self.longest);
        (1..=upto).any(|n| core.get(core.len() - n..).is_some_and(|tail| self.heads.contains(tail)))
            || self.inner.contains(core)
    }
}

/// Unicode's private use area.
const PRIVATE: RangeInclusive<char> = '\u{E000}'..='\u{F8FE}';

/// The mark of one rendering.
#[derive(Debug, Clone, Copy)]
pub struct Guard<'a> {
    vocabulary: &'a Vocabulary,
    pieces: &'a Pieces,
    mark: Option<char>,
}

impl<'a> Guard<'a> {
    /// Chooses a mark that `values` do not hold. If nearly all private-use characters occur, the first is taken and its
    /// occurrences are lost: such a text says nothing.
    pub fn new(vocabulary: &'a Vocabulary, pieces: &'a Pieces, values: &Value) -> Guard<'a> {
        let mut used = HashSet::new();
        each_string(values, &mut |text| used.extend(text.chars().filter(|c| PRIVATE.contains(c))));
        let mark = PRIVATE.rev().find(|c| !used.contains(c)).unwrap_or(*PRIVATE.start());
        Guard { vocabulary, pieces, mark: Some(mark) }
    }

    /// A guard that marks nothing, for text that is only to be read.
    pub fn off(vocabulary: &'a Vocabulary, pieces: &'a Pieces) -> Guard<'a> {
        Guard { vocabulary, pieces, mark: None }
    }

    /// `text` with the control tokens that it spells broken.
    pub fn mark(&self, text: &str) -> String {
        let Some(mark) = self.mark else { return text.to_string() };
        let core = text.trim();
        let lead = text.len() - text.trim_start().len();
        let mut out = String::with_capacity(text.len() + 8);
        out.push_str(&text[..lead]);
        if self.pieces.starts_with_tail(core) {
            out.push(mark);
        }
        let mut rest = core;
        while let Some(c) = rest.chars().next() {
            let breaks = self.special_at(rest);
            out.push(c);
            if breaks {
                out.push(mark);
            }
            rest = &rest[c.len_utf8()..];
        }
        if self.pieces.ends_with_head(core) {
            out.push(mark);
        }
        out.push_str(&text[lead + core.len()..]);
        out
    }

    fn special_at(&self, text: &str) -> bool {
        self.vocabulary.added_at(text).is_some_and(|token| token.special)
    }

    /// The rendered text without marks.
    pub fn unmark(&self, rendered: String) -> String {
        match self.mark {
            Some(mark) if rendered.contains(mark) => rendered.replace(mark, ""),
            _ => rendered,
        }
    }

    /// The rendered text as ids. Added tokens count where they are whole.
    pub fn encode(&self, rendered: &str) -> Result<Vec<u32>, Error> {
        let Some(mark) = self.mark.filter(|&mark| rendered.contains(mark)) else {
            return self.vocabulary.encode(rendered, false);
        };
        let (mut ids, mut plain, mut rest) = (Vec::new(), String::new(), rendered);
        while let Some(c) = rest.chars().next() {
            if let Some(token) = self.vocabulary.added_at(rest) {
                self.vocabulary.encode_plain(&std::mem::take(&mut plain), &mut ids)?;
                ids.push(token.id);
                rest = &rest[token.text.len()..];
            } else {
                if c != mark {
                    plain.push(c);
                }
                rest = &rest[c.len_utf8()..];
            }
        }
        self.vocabulary.encode_plain(&plain, &mut ids)?;
        Ok(ids)
    }
}

fn each_string(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| each_string(item, visit)),
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            visit(key);
            each_string(item, visit);
        }),
        _ => {}
    }
}
