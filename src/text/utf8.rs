//! Bytes become text as they arrive: never half a code point, and together always what the whole would have been.

/// Holds back the bytes of an unfinished character (three at most).
#[derive(Debug, Default)]
pub struct Utf8 {
    pending: Vec<u8>,
}

impl Utf8 {
    /// Appends to `out` all the text that is certain now. Bytes that can be no character become U+FFFD, one for each
    /// maximal invalid run, just as [`String::from_utf8_lossy`] does for the whole.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.pending.is_empty() {
            // The usual token is whole characters: no copy.
            if let Ok(text) = std::str::from_utf8(bytes) {
                out.push_str(text);
                return;
            }
        }
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let at_end = done + invalid.len() == self.pending.len();
            let unfinished = at_end && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if unfinished {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
        self.pending.drain(..done);
    }

    /// No more bytes will come: an unfinished character is U+FFFD.
    pub fn flush(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: &[u8], cuts: &[usize]) {
        let mut utf8 = Utf8::default();
        let (mut whole, mut at) = (String::new(), 0);
        let mut ends: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        for end in ends {
            let before = whole.len();
            utf8.push(&bytes[at..end], &mut whole);
            assert!(whole.is_char_boundary(before));
            at = end;
        }
        utf8.flush(&mut whole);
        assert_eq!(whole, String::from_utf8_lossy(bytes));
    }

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let mut utf8 = Utf8::default();
        let mut out = String::new();
        utf8.push(&[0xf0, 0x9f], &mut out);
        utf8.push(&[0xa6], &mut out);
        assert_eq!(out, "");
        utf8.push(&[0x80, b'!'], &mut out);
        assert_eq!(out, "🦀!");
    }

    proptest! {
        #[test]
        fn cutting_bytes_anywhere_changes_nothing(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80..=0xf7u8], 0..24),
            cuts in prop::collection::vec(0usize..64, 0..8),
        ) {
            check(&bytes, &cuts);
        }

        #[test]
        fn cutting_text_anywhere_changes_nothing(text in ".{0,12}", cuts in prop::collection::vec(0usize..64, 0..8)) {
            check(text.as_bytes(), &cuts);
        }
    }
}
