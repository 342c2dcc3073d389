//! Grammars: what a request allows its answer to be, compiled against a vocabulary.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{self, ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use super::lane::{self, Pool};
use super::schema::{self, Spaces};

/// Source text of one grammar; larger ones are refused unread.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Brackets inside each other: the readers of regular expressions and Lark are recursive.
const NESTING_MAX: usize = 200;
/// Room for the recursion that the bounds above leave; pages that are not touched cost nothing.
const STACK_BYTES: usize = 64 << 20;
/// A client waits for this; what takes longer is no grammar for a server.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(10);
/// Compilations at once, those that nobody waits for any more included.
const COMPILE_COUNT_MAX: usize = 8;

/// One id of the vocabulary, as a grammar sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// Exact bytes, perhaps half a character.
    Text(Vec<u8>),
    /// A tag or control id: it makes no text, so a grammar allows it only by its name or number.
    Control(String),
    /// No such id, or one that is never to appear.
    Unused,
}

/// What an answer is to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// A value that JSON Schema describes. `spaces`: what may stand between its parts.
    Schema { schema: Value, spaces: Spaces },
    /// A regular expression in Rust's syntax, for the whole text.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A Lark grammar with llguidance's extensions.
    Lark(String),
    /// A Lark grammar that refers to others, each by its name with an `@` before it. Parts have no parts.
    Parts { lark: String, parts: Vec<(String, Source)> },
}

/// Why there is no grammar; the source is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("the grammar cannot be compiled: {0}")]
    Invalid(String),
    #[error("the grammar is too large: expected at most {limit} {what}, got more")]
    TooLarge { what: &'static str, limit: usize },
    #[error("the grammar took longer than {} s to compile", COMPILE_TIME_MAX.as_secs())]
    TooSlow,
    #[error("too many grammars are being compiled at once; try again later")]
    Busy,
}

/// Turns sources into grammars. One per model; building it takes about a second for 131,072 ids.
#[derive(Clone)]
pub struct Compiler {
    shared: Arc<Shared>,
}

struct Shared {
    factory: ParserFactory,
    eos: Vec<u32>,
    pool: Arc<Pool>,
    compiling: AtomicUsize,
}

/// A compiled grammar; cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    compiled: Arc<Compiled>,
}

struct Compiled {
    start: Matcher,
    warnings: Vec<String>,
    shared: Arc<Shared>,
}

impl Compiler {
    /// `words` by id; `eos` are the ids that end a text. Errors: [`GrammarError::Invalid`] if there is no id at all.
    pub fn new(words: impl IntoIterator<Item = Word>, eos: &[u32]) -> Result<Self, GrammarError> {
        let mut table: Vec<Vec<u8>> = words.into_iter().map(spelling).collect();
        // The trie wants one id that ends a text; without one of the model's own it is an id that no logit has.
        let mut eos: Vec<u32> = eos.iter().copied().filter(|&id| (id as usize) < table.len()).collect();
        if eos.is_empty() {
            eos.push(table.len() as u32);
            table.push(b"\xff<end of text>".to_vec());
        }
        for &id in &eos {
            table[id as usize] = format!("<eos {id}>").into_bytes();
            table[id as usize].insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        let count = u32::try_from(table.len()).map_err(|_| invalid("more ids than 32 bits hold"))?;
        let trie = TokTrie::from(&TokRxInfo::new(count, eos[0]), &table).with_eos_tokens(&eos);
        let env: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| invalid(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // A state is one to two KiB, and each sequence has its own.
            max_lexer_states: 50_000,
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        let shared = Shared { factory, eos, pool: Pool::new(), compiling: AtomicUsize::new(0) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Blocks for milliseconds as a rule, for [`COMPILE_TIME_MAX`] at most: call it where that hurts nobody.
    pub fn compile(&self, source: &Source) -> Result<Grammar, GrammarError> {
        let grammar = top(source)?;
        if self.shared.compiling.fetch_add(1, Ordering::AcqRel) >= COMPILE_COUNT_MAX {
            self.shared.compiling.fetch_sub(1, Ordering::AcqRel);
            return Err(GrammarError::Busy);
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let compiler = self.clone();
        let work = move || {
            let made = compiler.build(grammar);
            compiler.shared.compiling.fetch_sub(1, Ordering::AcqRel);
            // Nobody may be waiting any more.
            let _ = sender.send(made);
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
        if thread.spawn(work).is_err() {
            self.shared.compiling.fetch_sub(1, Ordering::AcqRel);
            return Err(GrammarError::Busy);
        }
        match receiver.recv_timeout(COMPILE_TIME_MAX) {
            Ok(made) => made,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(GrammarError::TooSlow),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(invalid("its compiler stopped")),
        }
    }

    /// llguidance turns its own panics into errors.
    fn build(&self, grammar: TopLevelGrammar) -> Result<Grammar, GrammarError> {
        let parser =
            self.shared.factory.create_parser(grammar).map_err(|error| invalid(error.to_string()))?;
        let mut start = Matcher::new(Ok(parser));
        if let Some(error) = start.get_error() {
            return Err(invalid(error));
        }
        // A grammar that allows nothing at all is found out here rather than in the first step.
        if let Err(error) = start.deep_clone().compute_mask_or_eos() {
            let reason = error.to_string();
            return Err(if lane::is_dead_end(&reason) {
                invalid("it allows no text at all")
            } else {
                invalid(reason)
            });
        }
        let mut seen = HashSet::new();
        let mut warnings = start.grammar_warnings();
        warnings.retain(|warning| seen.insert(warning.clone()));
        let compiled = Compiled { start, warnings, shared: self.shared.clone() };
        Ok(Grammar { compiled: Arc::new(compiled) })
    }
}

impl Grammar {
    /// What of the source could not be held to, in words.
    pub fn warnings(&self) -> &[String] {
        &self.compiled.warnings
    }

    /// At the start; shares nothing with others, so that a panic in one hurts no other.
    pub(super) fn matcher(&self) -> Matcher {
        self.compiled.start.deep_clone()
    }

    pub(super) fn is_eos(&self, id: u32) -> bool {
        self.compiled.shared.eos.contains(&id)
    }

    pub(super) fn eos(&self) -> &[u32] {
        &self.compiled.shared.eos
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.compiled.shared.pool
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

fn invalid(reason: impl Into<String>) -> GrammarError {
    /// Of a reason; some quote the whole source.
    const CHARS_MAX: usize = 400;
    let reason: String = reason.into();
    let reason = reason.trim_end().trim_end_matches("<non-verbose/>").trim_end();
    GrammarError::Invalid(reason.chars().take(CHARS_MAX).collect())
}

/// Control ids begin with a byte that no UTF-8 text has.
fn spelling(word: Word) -> Vec<u8> {
    match word {
        Word::Text(bytes) if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
        Word::Text(bytes) => bytes,
        Word::Control(name) => {
            let name = name.trim_start_matches('<').trim_end_matches('>');
            let mut bytes = format!("<{name}>").into_bytes();
            bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            bytes
        }
        Word::Unused => Vec::new(),
    }
}

/// What llguidance compiles, within our bounds.
fn top(source: &Source) -> Result<TopLevelGrammar, GrammarError> {
    if let Source::Parts { lark, parts } = source {
        check_text(lark, false)?;
        let mut grammars = vec![GrammarWithLexer::from_lark(lark.clone())];
        for (name, part) in parts {
            grammars.push(GrammarWithLexer { name: Some(name.clone()), ..single(part)? });
        }
        return Ok(TopLevelGrammar { grammars, max_tokens: None });
    }
    Ok(TopLevelGrammar::from_grammar(single(source)?))
}

fn single(source: &Source) -> Result<GrammarWithLexer, GrammarError> {
    Ok(match source {
        Source::Schema { schema, spaces } => {
            let schema = schema::prepared(schema, spaces).map_err(GrammarError::Invalid)?;
            check_len(schema.to_string().len())?;
            GrammarWithLexer::from_json_schema(schema)
        }
        Source::Regex(regex) => {
            check_text(regex, true)?;
            GrammarWithLexer::from_regex(unanchored(regex))
        }
        Source::Choice(texts) => {
            check_len(texts.iter().map(|text| text.len() + 4).sum())?;
            if texts.is_empty() {
                return Err(invalid("there is nothing to choose from"));
            }
            let texts: Vec<String> =
                texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            GrammarWithLexer::from_lark(format!("start: CHOICE\nCHOICE: {}", texts.join("\n  | ")))
        }
        Source::Lark(lark) => {
            check_text(lark, false)?;
            GrammarWithLexer::from_lark(lark.clone())
        }
        Source::Parts { .. } => return Err(invalid("a part of a grammar has parts")),
    })
}

fn check_len(bytes: usize) -> Result<(), GrammarError> {
    if bytes > SOURCE_BYTES_MAX {
        return Err(GrammarError::TooLarge { what: "bytes", limit: SOURCE_BYTES_MAX });
    }
    Ok(())
}

/// Size and nesting. Brackets in strings count too: no honest grammar comes near the limit either way.
/// `escapes`: a backslash takes the meaning from the bracket after it.
fn check_text(text: &str, escapes: bool) -> Result<(), GrammarError> {
    check_len(text.len())?;
    let (mut depth, mut escaped) = (0usize, false);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' if !escaped => depth += 1,
            b')' | b']' | b'}' if !escaped => depth = depth.saturating_sub(1),
            _ => {}
        }
        escaped = escapes && byte == b'\\' && !escaped;
        if depth > NESTING_MAX {
            return Err(GrammarError::TooLarge { what: "brackets inside each other", limit: NESTING_MAX });
        }
    }
    Ok(())
}

/// The whole text is matched anyway; clients write the anchors all the same.
fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        Some(head) if !ends_escaped(head) => head,
        _ => regex,
    }
}

/// An odd number of backslashes at the end.
fn ends_escaped(text: &str) -> bool {
    (text.len() - text.trim_end_matches('\\').len()) % 2 == 1
}
