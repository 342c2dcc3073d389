//! The tags of a Nemotron answer and how they look in the stream.
//!
//! Inside the decoder the output is bytes: UTF-8 text, and for a tag that came as its own id one byte that UTF-8 never
//! uses. So a tag that was meant and a tag that was merely spelled are told apart without a second data structure.

/// The four tags that may be added tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    Think,
    EndThink,
    Call,
    EndCall,
}

impl Tag {
    pub const ALL: [Tag; 4] = [Tag::Think, Tag::EndThink, Tag::Call, Tag::EndCall];

    pub fn text(self) -> &'static str {
        match self {
            Tag::Think => "<think>",
            Tag::EndThink => "</think>",
            Tag::Call => "<tool_call>",
            Tag::EndCall => "</tool_call>",
        }
    }

    /// The byte that stands for the tag: 0xF8 and above are no UTF-8.
    pub fn mark(self) -> u8 {
        0xF8 + self as u8
    }

    pub fn of_mark(byte: u8) -> Option<Tag> {
        Tag::ALL.into_iter().find(|tag| tag.mark() == byte)
    }
}

/// Appends the text of `bytes`, tags spelled out.
pub fn spell(bytes: &[u8], out: &mut String) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let end = rest.iter().position(|&b| b >= 0xF8).unwrap_or(rest.len());
        // Valid by construction: pieces are cut at ASCII and at marks only. Lossy costs nothing then.
        out.push_str(&String::from_utf8_lossy(&rest[..end]));
        match rest.get(end).copied().and_then(Tag::of_mark) {
            Some(tag) => out.push_str(tag.text()),
            None if end == rest.len() => break,
            None => {}
        }
        rest = &rest[end + 1..];
    }
}

/// Whether something stands at the start of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Yes, and so many bytes long.
    Yes(usize),
    /// More bytes could still make it so.
    Partial,
    No,
}

/// `< / word >` with white space anywhere between: a closing tag.
pub fn closing(bytes: &[u8], word: &str) -> Match {
    pieces(bytes, &["<", "/", word, ">"])
}

/// `< word =`: the opening of a tag with a name.
pub fn opening(bytes: &[u8], word: &str) -> Match {
    pieces(bytes, &["<", word, "="])
}

/// Exactly `text`.
pub fn literal(bytes: &[u8], text: &str) -> Match {
    pieces(bytes, &[text])
}

fn pieces(bytes: &[u8], wanted: &[&str]) -> Match {
    let mut at = 0;
    for (i, piece) in wanted.iter().enumerate() {
        if i > 0 {
            at += white(&bytes[at..]);
        }
        let rest = &bytes[at..];
        let common = rest.iter().zip(piece.as_bytes()).take_while(|(a, b)| a == b).count();
        if common < piece.len() {
            return if common == rest.len() { Match::Partial } else { Match::No };
        }
        at += common;
    }
    Match::Yes(at)
}

/// Length of the ASCII white space at the start.
pub fn white(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| b.is_ascii_whitespace()).count()
}
