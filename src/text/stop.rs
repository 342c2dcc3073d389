//! Stop strings over the raw output, character by character: how the text is cut into tokens must not matter.
//!
//! Each string runs its own Knuth-Morris-Pratt automaton, so a byte costs one comparison per string and nothing
//! is ever searched twice.

/// The stop strings of one request and how far each has matched.
#[derive(Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    suspended: bool,
}

#[derive(Debug)]
struct Pattern {
    text: String,
    /// `back[n]`: length of the longest proper border of the first n bytes.
    back: Vec<usize>,
    /// Bytes of `text` that the output ends with.
    matched: usize,
}

impl StopStrings {
    /// Empty strings stop nothing and are left out.
    pub fn new(stop: Vec<String>) -> StopStrings {
        let patterns = stop.into_iter().filter(|text| !text.is_empty()).map(Pattern::new).collect();
        StopStrings { patterns, suspended: false }
    }

    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// While suspended nothing matches, and nothing is held back. A match must begin after the suspension, because
    /// what came before was already sent.
    pub fn suspend(&mut self, yes: bool) {
        self.suspended = yes;
        if yes {
            self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        }
    }

    /// Reads one byte. Some: a string is complete with it, the longest if several are.
    pub fn feed(&mut self, byte: u8) -> Option<&str> {
        if self.suspended {
            return None;
        }
        // Every automaton reads every byte, also after one of them is complete.
        self.patterns.iter_mut().for_each(|pattern| pattern.feed(byte));
        let complete = self.patterns.iter().filter(|pattern| pattern.matched == pattern.text.len());
        complete.map(|pattern| pattern.text.as_str()).max_by_key(|text| text.len())
    }

    /// Bytes at the end of the output that may still become a stop string.
    pub fn hold(&self) -> usize {
        self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0)
    }
}

impl Pattern {
    fn new(text: String) -> Pattern {
        let bytes = text.as_bytes();
        let mut back = vec![0; bytes.len() + 1];
        let mut border = 0;
        for i in 1..bytes.len() {
            while border > 0 && bytes[i] != bytes[border] {
                border = back[border];
            }
            if bytes[i] == bytes[border] {
                border += 1;
            }
            back[i + 1] = border;
        }
        Pattern { text, back, matched: 0 }
    }

    fn feed(&mut self, byte: u8) {
        let bytes = self.text.as_bytes();
        if self.matched == bytes.len() {
            self.matched = self.back[self.matched];
        }
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.back[self.matched];
        }
        if bytes[self.matched] == byte {
            self.matched += 1;
        }
    }
}
