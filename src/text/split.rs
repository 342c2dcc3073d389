//! The grammar of an answer: reasoning, content, tool calls (spec nemotron-h §7.1, §7.2; http-api Annex A).
//!
//! ```text
//! REASONING </think> CONTENT (<tool_call> <function=NAME> (<parameter=KEY> VALUE </parameter>)* </function> </tool_call>)*
//! ```
//!
//! One machine over bytes that may arrive cut anywhere. What could still be the beginning of a tag is held back; what
//! was given out is never taken back, so the pieces joined are the whole answer. Where the two specifications
//! differ, nemotron-h §7.2 is followed; the places are marked.

use super::markup::{self, Match, Tag};
use super::schema::{Schema, Types};
use super::{Delta, Tool, json};

/// A NAME or KEY longer than this is none: the bound on what an unclosed tag can hold back.
const MAX_NAME_BYTES: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reasoning,
    Content,
    /// After `<function=`, which is still in the buffer and so many bytes long.
    Name(usize),
    /// Inside a call, between parameters.
    Body,
    /// After `<parameter=`, which is still in the buffer.
    Key(usize),
    Value,
}

/// What a request asks of its splitter.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    pub starts_in_reasoning: bool,
    /// Thinking was not switched off: an answer that opens with `<think>` then reasons.
    pub thinking: bool,
    pub force_nonempty_content: bool,
    /// None: tool markup is content.
    pub tools: Option<Vec<Tool>>,
    /// Tags the vocabulary has no id for; they are then recognised as text. By [`Tag`].
    pub by_text: [bool; 4],
}

/// See the module.
#[derive(Debug)]
pub struct Splitter {
    rules: Rules,
    state: State,
    buffer: Vec<u8>,
    /// White space that is dropped if a tag follows and given out if text does.
    white: String,
    /// No text was given out yet in this stretch of reasoning or content.
    fresh: bool,
    /// White space at the start of this stretch is dropped, not only its newlines (after a tool tag).
    drop_lead: bool,
    has_content: bool,
    has_reasoning: bool,
    /// The reasoning so far, kept only if it may have to become the content.
    reasoning: Option<String>,
    moved: bool,
    calls: usize,
    call: Call,
    scratch: String,
}

/// The call being read.
#[derive(Debug, Default)]
struct Call {
    /// Its place among the request's tools.
    tool: Option<usize>,
    parameters: usize,
    key: String,
    /// The value is a string and nothing else: its text streams.
    streams: bool,
    /// The value's first byte has not been read: a newline there is dropped.
    at_start: bool,
    /// So much of the buffered value holds no end.
    scanned: usize,
}

/// What ends a value, and how much of it belongs to the value's tag.
enum End {
    Parameter(usize),
    Call(usize),
}

impl Splitter {
    pub fn new(rules: Rules) -> Splitter {
        let may_move = !rules.thinking || rules.force_nonempty_content;
        let state = if rules.starts_in_reasoning { State::Reasoning } else { State::Content };
        Splitter {
            reasoning: may_move.then(String::new),
            rules,
            state,
            buffer: Vec::new(),
            white: String::new(),
            fresh: state == State::Content,
            drop_lead: false,
            has_content: false,
            has_reasoning: false,
            moved: false,
            calls: 0,
            call: Call::default(),
            scratch: String::new(),
        }
    }

    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Whether a `<think>` would open the reasoning now: only as the first thing of an answer, or the parser could stay
    /// in thought for ever.
    pub fn may_open_reasoning(&self) -> bool {
        self.state == State::Content
            && self.rules.thinking
            && !self.has_content
            && !self.has_reasoning
            && self.calls == 0
    }

    /// True if `finish` gave the reasoning out once more as content.
    pub fn moved(&self) -> bool {
        self.moved
    }

    /// Reads bytes (text and marks).
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<Delta>) {
        self.buffer.extend_from_slice(bytes);
        self.run(false, out);
    }

    /// No more comes. `natural`: the model ended its turn, so an open call is closed; else it was cut off, and a
    /// call that is not complete stays open (it must not be carried out with half its arguments).
    pub fn finish(&mut self, natural: bool, out: &mut Vec<Delta>) {
        self.run(true, out);
        match self.state {
            State::Value if natural => {
                let rest = std::mem::take(&mut self.buffer);
                self.close_value(&rest, out);
                self.close_call(out);
            }
            State::Body if natural => self.close_call(out),
            _ => {}
        }
        // With a call there is something to do, and content stays null; without, silence is what the swap is for.
        let silent = !self.has_content && self.calls == 0;
        let reasoning = self.reasoning.take().filter(|text| silent && !text.trim().is_empty());
        if let Some(reasoning) = reasoning {
            self.moved = true;
            return emit(out, Delta::Content(reasoning));
        }
        if self.state == State::Content && self.calls == 0 && !self.drop_lead {
            let text = std::mem::take(&mut self.white);
            let text = if self.fresh { text.trim_start_matches(NEWLINES) } else { &text };
            if !text.is_empty() {
                emit(out, Delta::Content(text.to_string()));
            }
        }
    }

    fn run(&mut self, end: bool, out: &mut Vec<Delta>) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = 0;
        loop {
            let rest = &buffer[at..];
            let before = self.state;
            let used = match self.state {
                State::Reasoning | State::Content => self.prose(rest, end, out),
                State::Name(open) => self.name(rest, open, end, out),
                State::Body => self.body(rest, end, out),
                State::Key(open) => self.key(rest, open, end, out),
                State::Value => self.value(rest, end, out),
            };
            at += used;
            if used == 0 && self.state == before {
                break;
            }
        }
        buffer.drain(..at);
        self.buffer = buffer;
    }

    // Prose: reasoning and content. Each step returns the bytes it has dealt with.

    fn prose(&mut self, rest: &[u8], end: bool, out: &mut Vec<Delta>) -> usize {
        let may_open = self.rules.tools.is_some() || self.rules.by_text.contains(&true);
        let stop = rest.iter().position(|&b| b >= 0xF8 || b == b'<' && may_open).unwrap_or(rest.len());
        if stop > 0 {
            self.text(&rest[..stop], out);
            return stop;
        }
        let Some(&first) = rest.first() else { return 0 };
        if let Some(tag) = Tag::of_mark(first) {
            self.tag(tag, &rest[..1], out);
            return 1;
        }
        let mut partial = false;
        for tag in Tag::ALL.into_iter().filter(|&tag| self.rules.by_text[tag as usize]) {
            match markup::literal(rest, tag.text()) {
                Match::Yes(len) => {
                    self.tag(tag, &rest[..len], out);
                    return len;
                }
                Match::Partial => partial = true,
                Match::No => {}
            }
        }
        // The opener may be missing (QwenLM/Qwen3-Coder 480). Thoughts may speak of functions, answers call them.
        if self.state == State::Content && self.rules.tools.is_some() {
            match markup::opening(rest, "function") {
                Match::Yes(len) => {
                    self.state = State::Name(len);
                    return 0;
                }
                Match::Partial => partial = true,
                Match::No => {}
            }
        }
        if partial && !end {
            return 0;
        }
        self.text(&rest[..1], out);
        1
    }

    fn text(&mut self, bytes: &[u8], out: &mut Vec<Delta>) {
        let mut text = std::mem::take(&mut self.scratch);
        text.clear();
        markup::spell(bytes, &mut text);
        if self.state == State::Reasoning {
            self.reason(&text, out)
        } else {
            self.content(&text, out)
        }
        self.scratch = text;
    }

    fn tag(&mut self, tag: Tag, bytes: &[u8], out: &mut Vec<Delta>) {
        let calls = self.rules.tools.is_some();
        match (tag, self.state) {
            // An opened thought begins on its own line, whoever opened it.
            (Tag::Think, State::Reasoning) => self.stretch(State::Reasoning, false),
            (Tag::Think, _) if self.may_open_reasoning() => self.stretch(State::Reasoning, false),
            // Stray tags are never text (Annex A rules 2 and 8).
            (Tag::Think, _) => {}
            (Tag::EndThink, State::Reasoning) => self.stretch(State::Content, false),
            (Tag::EndThink, _) => {}
            // Ends the reasoning implicitly: 2 to 8 % of calls come before `</think>`.
            (Tag::Call | Tag::EndCall, State::Content) if calls => self.stretch(State::Content, true),
            (Tag::Call, _) if calls => self.stretch(State::Content, true),
            (Tag::EndCall, _) if calls => {}
            (Tag::Call | Tag::EndCall, _) => self.text(bytes, out),
        }
    }

    /// Begins a stretch of text; white space held from the last one is dropped.
    fn stretch(&mut self, state: State, drop_lead: bool) {
        self.state = state;
        self.white.clear();
        self.fresh = true;
        self.drop_lead = drop_lead;
    }

    fn reason(&mut self, text: &str, out: &mut Vec<Delta>) {
        let text = if self.fresh { text.trim_start_matches(NEWLINES) } else { text };
        let core = text.trim_end();
        if core.is_empty() {
            self.white.push_str(text);
            self.fresh &= text.is_empty();
            return;
        }
        self.fresh = false;
        self.has_reasoning = true;
        let mut piece = std::mem::take(&mut self.white);
        piece.push_str(core);
        self.white.push_str(&text[core.len()..]);
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.push_str(&piece);
        }
        emit(out, Delta::Reasoning(piece));
    }

    fn content(&mut self, text: &str, out: &mut Vec<Delta>) {
        let core = text.trim_end();
        if core.is_empty() && (self.fresh || self.rules.tools.is_some()) {
            self.white.push_str(text);
            return;
        }
        let mut piece = std::mem::take(&mut self.white);
        if self.fresh {
            piece.push_str(text);
            let lead = if self.drop_lead { piece.trim_start() } else { piece.trim_start_matches(NEWLINES) };
            piece = lead.to_string();
        } else {
            piece.push_str(text);
        }
        self.fresh = false;
        self.drop_lead = false;
        self.has_content = true;
        // White space before a call is dropped, so with tools it waits for what follows it.
        if self.rules.tools.is_some() {
            let len = piece.trim_end().len();
            self.white.push_str(&piece[len..]);
            piece.truncate(len);
        }
        emit(out, Delta::Content(piece));
    }

    // Calls.

    fn name(&mut self, rest: &[u8], open: usize, end: bool, out: &mut Vec<Delta>) -> usize {
        match named(&rest[open..], end) {
            Named::Yes(name, len) => {
                self.call = Call { tool: self.tool(&name), ..Call::default() };
                self.state = State::Body;
                self.white.clear();
                // A name that is not among the tools goes to the client as it is: Annex A rule 6. §7.2 would return
                // it as content, but the call is well-formed, and the client can answer with an error the model reads.
                emit(out, Delta::CallStart { index: self.calls, name });
                open + len
            }
            Named::More => 0,
            // A NAME that never closed is content (§7.2, vLLM 58227): what follows it is read afresh.
            Named::Broken(len) => {
                self.state = State::Content;
                self.text(&rest[..open + len], out);
                open + len
            }
        }
    }

    fn tool(&self, name: &str) -> Option<usize> {
        self.rules.tools.iter().flatten().position(|tool| tool.name == name)
    }

    fn body(&mut self, rest: &[u8], end: bool, out: &mut Vec<Delta>) -> usize {
        // Between parameters there is only white space; anything else cannot be an argument and has no other place.
        let skip = rest.iter().position(|&b| b >= 0xF8 || b == b'<').unwrap_or(rest.len());
        let here = &rest[skip..];
        if here.is_empty() {
            return skip;
        }
        if let Match::Yes(len) = markup::closing(here, "function") {
            self.close_call(out);
            return skip + len;
        }
        if let Match::Yes(len) = markup::opening(here, "parameter") {
            self.state = State::Key(len);
            return skip;
        }
        let opens = [
            markup::opening(here, "function"),
            self.at_tag(here, Tag::Call),
            self.at_tag(here, Tag::EndCall),
        ];
        if opens.iter().any(|found| matches!(found, Match::Yes(_))) {
            // A missing `</function>`: the next opener closes the call, and is read as such.
            self.close_call(out);
            return skip;
        }
        let closes = [markup::closing(here, "function"), markup::opening(here, "parameter")];
        if !end && opens.iter().chain(&closes).any(|found| *found == Match::Partial) {
            return skip;
        }
        skip + 1
    }

    fn key(&mut self, rest: &[u8], open: usize, end: bool, out: &mut Vec<Delta>) -> usize {
        match named(&rest[open..], end) {
            Named::Yes(key, len) => {
                self.state = State::Value;
                let types = self.schema(&key).types();
                self.call.streams = types == Types::STRING;
                self.call.at_start = true;
                self.call.scanned = 0;
                self.call.key = key;
                if self.call.streams {
                    let mut piece = self.before_value();
                    piece.push('"');
                    self.arguments(piece, out);
                }
                open + len
            }
            Named::More => 0,
            // A malformed KEY is dropped with its value (vLLM 55495): nothing of it may leak into the arguments.
            Named::Broken(len) => {
                self.state = State::Body;
                open + len
            }
        }
    }

    fn value(&mut self, rest: &[u8], end: bool, out: &mut Vec<Delta>) -> usize {
        if self.call.at_start {
            let Some(&first) = rest.first() else { return 0 };
            self.call.at_start = false;
            if first == b'\n' {
                return 1;
            }
        }
        let mut at = self.call.scanned;
        loop {
            let Some(next) = rest[at..].iter().position(|&b| b == b'<' || b >= 0xF8) else {
                at = rest.len();
                break;
            };
            at += next;
            match self.value_end(&rest[at..], end) {
                Ok(Some(ending)) => {
                    self.close_value(&rest[..at], out);
                    return at
                        + match ending {
                            End::Parameter(len) => len,
                            End::Call(len) => {
                                self.close_call(out);
                                len
                            }
                        };
                }
                Ok(None) => at += 1,
                Err(Unclear) => break,
            }
        }
        self.call.scanned = at;
        if !self.call.streams {
            // The step above may have dropped a newline without a change of state; this one has nothing to give.
            return 0;
        }
        let safe = rest[..at].strip_suffix(b"\n").unwrap_or(&rest[..at]);
        if !safe.is_empty() {
            let mut piece = String::new();
            self.escaped(safe, &mut piece);
            self.arguments(piece, out);
        }
        self.call.scanned -= safe.len();
        safe.len()
    }

    /// Whether a value ends here. Tags inside a value are data; `</function>` is data too unless what follows it can
    /// only follow a call (§7.2), because code that speaks of functions is a common argument.
    fn value_end(&self, here: &[u8], end: bool) -> Result<Option<End>, Unclear> {
        let mut partial = false;
        let mut look = |found: Match| match found {
            Match::Yes(len) => Some(len),
            Match::Partial => {
                partial = true;
                None
            }
            Match::No => None,
        };
        if let Some(len) = look(markup::closing(here, "parameter")) {
            return Ok(Some(End::Parameter(len)));
        }
        if look(markup::opening(here, "parameter")).is_some() {
            return Ok(Some(End::Parameter(0)));
        }
        if let Some(len) = look(markup::closing(here, "function")) {
            let after = &here[len + markup::white(&here[len..])..];
            let follows = [
                self.at_tag(after, Tag::EndCall),
                self.at_tag(after, Tag::Call),
                markup::opening(after, "function"),
            ];
            if follows.into_iter().any(|found| look(found).is_some()) || after.is_empty() && end {
                return Ok(Some(End::Call(len)));
            }
        }
        // `</tool_call>` and `<tool_call>` alone are data. They are structure where nothing else can be meant: the
        // former as the last thing said, the latter with a function's opener behind it (the next call began).
        let closed = look(self.at_tag(here, Tag::EndCall)).unwrap_or(0);
        let after = &here[closed + markup::white(&here[closed..])..];
        if closed > 0 && after.is_empty() && end {
            return Ok(Some(End::Call(closed)));
        }
        if let Some(len) = look(self.at_tag(after, Tag::Call)) {
            let function = &after[len + markup::white(&after[len..])..];
            if look(markup::opening(function, "function")).is_some() {
                return Ok(Some(End::Call(closed)));
            }
        }
        if partial && !end { Err(Unclear) } else { Ok(None) }
    }

    /// Whether a tag stands here, as its id or, if it has none, as text.
    fn at_tag(&self, here: &[u8], tag: Tag) -> Match {
        if self.rules.by_text[tag as usize] {
            return markup::literal(here, tag.text());
        }
        match here.first() {
            None => Match::Partial,
            Some(&byte) if byte == tag.mark() => Match::Yes(1),
            Some(_) => Match::No,
        }
    }

    fn schema(&self, key: &str) -> Schema<'_> {
        let tool = self.call.tool.and_then(|i| self.rules.tools.as_ref()?.get(i));
        Schema::of_parameter(tool.and_then(|tool| tool.parameters.as_ref()), key)
    }

    /// What comes before a value. A repeated KEY is written again: the joined pieces must stay what was sent, and every
    /// JSON reader then takes the last value at the first one's place, which is what §7.2 asks.
    fn before_value(&mut self) -> String {
        let mut piece = String::from(if self.call.parameters == 0 { "{" } else { ", " });
        self.call.parameters += 1;
        json::string(&self.call.key, &mut piece);
        piece.push_str(": ");
        piece
    }

    fn close_value(&mut self, value: &[u8], out: &mut Vec<Delta>) {
        let value = if self.call.at_start { value.strip_prefix(b"\n").unwrap_or(value) } else { value };
        let value = value.strip_suffix(b"\n").unwrap_or(value);
        self.state = State::Body;
        let mut piece = String::new();
        if self.call.streams {
            self.escaped(value, &mut piece);
            piece.push('"');
        } else {
            piece = self.before_value();
            let mut text = String::new();
            markup::spell(value, &mut text);
            self.schema(&self.call.key).coerce(&text, &mut piece);
        }
        self.arguments(piece, out);
    }

    fn close_call(&mut self, out: &mut Vec<Delta>) {
        self.arguments(if self.call.parameters == 0 { "{}" } else { "}" }.to_string(), out);
        emit(out, Delta::CallEnd { index: self.calls });
        self.calls += 1;
        self.stretch(State::Content, true);
    }

    fn escaped(&mut self, bytes: &[u8], piece: &mut String) {
        self.scratch.clear();
        markup::spell(bytes, &mut self.scratch);
        json::escape(&self.scratch, piece);
    }

    fn arguments(&self, json: String, out: &mut Vec<Delta>) {
        emit(out, Delta::CallArguments { index: self.calls, json });
    }
}

const NEWLINES: [char; 2] = ['\n', '\r'];

/// More bytes decide.
struct Unclear;

enum Named {
    /// The trimmed name and the bytes up to and with its `>`.
    Yes(String, usize),
    More,
    /// No name: so many bytes are not part of any tag.
    Broken(usize),
}

/// A NAME or KEY: up to `>`. Another tag, too many bytes, or nothing at all make it none.
fn named(bytes: &[u8], end: bool) -> Named {
    match bytes.iter().take(MAX_NAME_BYTES).position(|&b| b == b'>' || b == b'<' || b >= 0xF8) {
        Some(stop) if bytes[stop] == b'>' => {
            let name = String::from_utf8_lossy(&bytes[..stop]).trim().to_string();
            if name.is_empty() { Named::Broken(stop + 1) } else { Named::Yes(name, stop + 1) }
        }
        Some(stop) => Named::Broken(stop),
        None if bytes.len() >= MAX_NAME_BYTES => {
            // Cut between characters: what is left must be UTF-8 again.
            let whole = (0..=MAX_NAME_BYTES).rev().find(|&i| bytes.get(i).is_none_or(|b| b & 0xC0 != 0x80));
            Named::Broken(whole.unwrap_or(0))
        }
        None if end => Named::Broken(bytes.len()),
        None => Named::More,
    }
}

/// Gives out a delta, joined to the last one if it goes on.
pub fn emit(out: &mut Vec<Delta>, delta: Delta) {
    match (out.last_mut(), &delta) {
        (Some(Delta::Reasoning(last)), Delta::Reasoning(more))
        | (Some(Delta::Content(last)), Delta::Content(more)) => {
            last.push_str(more);
        }
        (Some(Delta::CallArguments { index, json }), Delta::CallArguments { index: same, json: more })
            if index == same =>
        {
            json.push_str(more)
        }
        (_, Delta::Content(text) | Delta::Reasoning(text)) if text.is_empty() => {}
        (_, Delta::CallArguments { json, .. }) if json.is_empty() => {}
        _ => out.push(delta),
    }
}
