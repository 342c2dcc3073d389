//! Ids become deltas: bytes, then stop strings over the raw text, then the grammar of the answer.

use std::sync::Arc;

use super::markup::{self, Tag};
use super::split::{Rules, Splitter, emit};
use super::stop::StopStrings;
use super::utf8::Utf8;
use super::vocabulary::Vocabulary;
use super::{Delta, Tool};

/// How an answer is to be read.
#[derive(Debug, Clone, Default)]
pub struct DecoderOptions {
    pub mode: Mode,
    /// Strings that end the output, wherever they appear in the raw text, tags included.
    pub stop: Vec<String>,
    /// Gives the stop string out too.
    pub include_stop: bool,
    /// Control tokens make no text.
    pub skip_special: bool,
}

/// What the text is.
#[derive(Debug, Clone, Default)]
pub enum Mode {
    /// A completion: everything is content, tags are text.
    #[default]
    Raw,
    /// An assistant's turn.
    Chat {
        /// From the rendered prompt: `Text::starts_in_reasoning`.
        starts_in_reasoning: bool,
        /// `enable_thinking`, true unless the client said otherwise.
        thinking: bool,
        /// Gives blank content the reasoning's text.
        force_nonempty_content: bool,
        /// None: no tools were given, or `tool_choice` is none; tool markup is then content.
        tools: Option<Vec<Tool>>,
    },
}

/// The ids with a meaning in an answer, by their text in the vocabulary.
#[derive(Debug, Clone, Copy, Default)]
pub struct TagIds {
    /// By [`Tag`].
    pub tags: [Option<u32>; 4],
    /// `<|im_start|>`, `<|im_end|>`, `</s>`: where a turn ends.
    pub borders: [Option<u32>; 3],
    /// Begins a turn: `<|im_start|>`, or `<SPECIAL_11>` in the second generation's vocabulary, which has no such token.
    pub opener: Option<u32>,
}

impl TagIds {
    pub fn find(vocabulary: &Vocabulary) -> TagIds {
        TagIds {
            tags: Tag::ALL.map(|tag| vocabulary.added_id(tag.text())),
            borders: ["<|im_start|>", "<|im_end|>", "</s>"].map(|text| vocabulary.added_id(text)),
            opener: ["<|im_start|>", "<SPECIAL_11>"].iter().find_map(|text| vocabulary.added_id(text)),
        }
    }

    pub fn tag(&self, id: u32) -> Option<Tag> {
        Tag::ALL.into_iter().find(|&tag| self.tags[tag as usize] == Some(id))
    }

    pub fn is_border(&self, id: u32) -> bool {
        self.borders.contains(&Some(id))
    }
}

/// One output being read.
///
/// ```text
/// let mut decoder = text.decoder(options);
/// for id in events { if let Some(stop) = decoder.push(id, &mut deltas) { cancel(); break } send(&mut deltas) }
/// decoder.finish(&mut deltas);
/// ```
///
/// Push the stop id as well (the engine sends it as the last token): it makes no text in a chat, and tells that the
/// model ended its turn by itself, so that a call it left open is closed rather than thrown away.
#[derive(Debug)]
pub struct Decoder {
    vocabulary: Arc<Vocabulary>,
    ids: TagIds,
    /// None in raw mode.
    splitter: Option<Splitter>,
    tools: bool,
    utf8: Utf8,
    stop: StopStrings,
    include_stop: bool,
    skip_special: bool,
    /// Text and tag marks that may still become a stop string.
    held: Vec<u8>,
    stopped: bool,
    ended: bool,
    reasoning: bool,
    reasoning_tokens: usize,
    text: String,
}

impl Decoder {
    pub(super) fn new(vocabulary: Arc<Vocabulary>, ids: TagIds, options: DecoderOptions) -> Decoder {
        let (mut tools_given, mut reasoning) = (false, false);
        let splitter = match options.mode {
            Mode::Raw => None,
            Mode::Chat { starts_in_reasoning, thinking, force_nonempty_content, tools } => {
                tools_given = tools.is_some();
                reasoning = starts_in_reasoning;
                let by_text = ids.tags.map(|id| id.is_none());
                Some(Splitter::new(Rules {
                    starts_in_reasoning,
                    thinking,
                    force_nonempty_content,
                    tools,
                    by_text,
                }))
            }
        };
        Decoder {
            vocabulary,
            ids,
            splitter,
            tools: tools_given,
            utf8: Utf8::default(),
            stop: StopStrings::new(options.stop),
            include_stop: options.include_stop,
            skip_special: options.skip_special,
            held: Vec::new(),
            stopped: false,
            ended: false,
            reasoning,
            reasoning_tokens: 0,
            text: String::new(),
        }
    }

    /// Reads one id. Deltas are appended to `out`, joined to its last one where they go on. Some(string): a stop string
    /// is complete; the output ends there, and further ids are ignored. Unknown ids make no text.
    pub fn push(&mut self, id: u32, out: &mut Vec<Delta>) -> Option<String> {
        if self.stopped {
            return None;
        }
        let chat = self.splitter.is_some();
        if chat && self.ids.is_border(id) {
            self.ended = true;
            return None;
        }
        let tag = if chat { self.ids.tag(id) } else { None };
        self.count(tag);
        let vocabulary = Arc::clone(&self.vocabulary);
        let bytes = vocabulary.bytes(id)?;
        if self.skip_special && vocabulary.is_special(id) && tag.is_none() {
            return None;
        }
        self.ended = false;
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        match tag {
            Some(_) => self.utf8.flush(&mut text),
            None => self.utf8.push(bytes, &mut text),
        }
        let mut found = self.feed(text.as_bytes(), None, out);
        if let (None, Some(tag)) = (&found, tag) {
            found = self.feed(&[tag.mark()], Some(tag), out);
        }
        self.text = text;
        found
    }

    /// While suspended (`min_tokens`) no stop string matches; a match must begin after the suspension.
    pub fn suspend_stop(&mut self, yes: bool) {
        self.stop.suspend(yes);
    }

    /// Says that the model ended its turn, where its stop id is not pushed.
    pub fn end_of_turn(&mut self) {
        self.ended = true;
    }

    /// Gives out what was held back. Without the end of the turn (a length limit, a stop string), a call that is not
    /// complete stays without [`Delta::CallEnd`].
    pub fn finish(&mut self, out: &mut Vec<Delta>) {
        if !self.stopped {
            let mut text = std::mem::take(&mut self.text);
            text.clear();
            self.utf8.flush(&mut text);
            self.feed(text.as_bytes(), None, out);
            self.text = text;
        }
        let held = std::mem::take(&mut self.held);
        self.give(&held, out);
        if let Some(splitter) = &mut self.splitter {
            splitter.finish(self.ended && !self.stopped, out);
        }
        self.stopped = true;
    }

    /// Ids spent on reasoning, tags not counted.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// True if `finish` gave the reasoning out once more as content, because there was none; a whole message then
    /// has the text only as its content.
    pub fn reasoning_became_content(&self) -> bool {
        self.splitter.as_ref().is_some_and(Splitter::moved)
    }

    fn count(&mut self, tag: Option<Tag>) {
        let Some(splitter) = &self.splitter else { return };
        if self.ids.tags[Tag::EndThink as usize].is_none() {
            // Tags are text here; the splitter knows, give or take what it holds back.
            self.reasoning_tokens += usize::from(splitter.in_reasoning());
            return;
        }
        match tag {
            Some(Tag::EndThink) => self.reasoning = false,
            Some(Tag::Call) if self.tools => self.reasoning = false,
            Some(Tag::Think) => self.reasoning |= splitter.may_open_reasoning(),
            _ => self.reasoning_tokens += usize::from(self.reasoning),
        }
    }

    /// Runs a piece through the stop strings: `bytes` is text, or the mark of `tag`.
    fn feed(&mut self, bytes: &[u8], tag: Option<Tag>, out: &mut Vec<Delta>) -> Option<String> {
        if self.stop.is_empty() {
            self.give(bytes, out);
            return None;
        }
        let spelled = tag.map_or(bytes, |tag| tag.text().as_bytes());
        for (i, &byte) in spelled.iter().enumerate() {
            let Some(stop) = self.stop.feed(byte) else { continue };
            let stop = stop.to_string();
            // All up to this byte, then without the stop string itself.
            match tag {
                None => self.held.extend_from_slice(&bytes[..=i]),
                Some(tag) if i + 1 == spelled.len() => self.held.push(tag.mark()),
                // The string ends inside a tag: what is said of the tag is text no more than the tag is.
                Some(_) => {}
            }
            let beyond = match tag {
                Some(_) if i + 1 < spelled.len() => stop.len().saturating_sub(i + 1),
                _ => stop.len(),
            };
            if !self.include_stop {
                let keep = self.held.len() - self.tail(beyond);
                self.held.truncate(keep);
            }
            let held = std::mem::take(&mut self.held);
            self.give(&held, out);
            self.stopped = true;
            return Some(stop);
        }
        self.held.extend_from_slice(bytes);
        let keep = self.tail(self.stop.hold());
        let mut held = std::mem::take(&mut self.held);
        self.give(&held[..held.len() - keep], out);
        held.drain(..held.len() - keep);
        self.held = held;
        None
    }

    /// The held bytes that spell the last `len` bytes of the raw text; a tag cut by it counts whole.
    fn tail(&self, len: usize) -> usize {
        let (mut spelled, mut bytes) = (0, 0);
        for &byte in self.held.iter().rev() {
            if spelled >= len {
                break;
            }
            spelled += Tag::of_mark(byte).map_or(1, |tag| tag.text().len());
            bytes += 1;
        }
        bytes
    }

    fn give(&mut self, bytes: &[u8], out: &mut Vec<Delta>) {
        match &mut self.splitter {
            Some(splitter) => splitter.push(bytes, out),
            None if bytes.is_empty() => {}
            None => {
                let mut text = String::with_capacity(bytes.len());
                markup::spell(bytes, &mut text);
                emit(out, Delta::Content(text));
            }
        }
    }
}
