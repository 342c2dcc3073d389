//! What a batch asks: a file of lines, each a request, checked as a whole before the first is answered. A mistake in the
//! last of ten thousand lines is told at once, not after a night.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Routes that a line may ask.
const URLS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"];
/// A name is repeated in every result; more than this is no name.
const CUSTOM_ID_BYTES_MAX: usize = 512;
/// Of a file that is all wrong, so many lines tell enough.
pub const FAULTS_SHOWN: usize = 20;
/// Bytes of a line's digest that are kept: as good as never the same for two lines.
const DIGEST_BYTES: usize = 12;

/// What a file may hold.
#[derive(Debug, Clone)]
pub struct Limits<'a> {
    /// Bytes of one line.
    pub line: usize,
    pub lines: usize,
    /// The one route that all lines must ask, if there is one.
    pub endpoint: Option<&'a str>,
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The client's name for it.
    pub custom_id: String,
    pub url: String,
    pub body: Map<String, Value>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Fault {
    #[error("longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("not a JSON object: {0}")]
    NotJson(String),
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`custom_id` must be a string of 1 to {CUSTOM_ID_BYTES_MAX} bytes")]
    CustomId,
    #[error("`custom_id` `{id}` is on line {first} already")]
    Duplicate { id: String, first: usize },
    #[error("`method` must be POST, got {0}")]
    Method(String),
    #[error("`url` must be {expected}, got {got}")]
    Url { got: String, expected: String },
    #[error("`body` must be an object")]
    Body,
    #[error("`body.stream` must not be true: a result is one line")]
    Stream,
}

impl Fault {
    /// What programs switch on.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLong { .. } => "line_too_long",
            Self::NotJson(_) => "invalid_json_line",
            Self::Missing(_) => "missing_required_parameter",
            Self::CustomId => "invalid_custom_id",
            Self::Duplicate { .. } => "duplicate_custom_id",
            Self::Method(_) => "invalid_method",
            Self::Url { .. } => "invalid_url",
            Self::Body | Self::Stream => "invalid_body",
        }
    }

    /// The field at fault.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Self::TooLong { .. } | Self::NotJson(_) => None,
            Self::Missing(name) => Some(name),
            Self::CustomId | Self::Duplicate { .. } => Some("custom_id"),
            Self::Method(_) => Some("method"),
            Self::Url { .. } => Some("url"),
            Self::Body => Some("body"),
            Self::Stream => Some("body.stream"),
        }
    }
}

/// Why a file is no batch.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it has no lines")]
    Empty,
    #[error("it has more than {limit} lines")]
    TooMany { limit: usize },
    /// The first [`FAULTS_SHOWN`] with their lines, counted from 1, and how many there are.
    #[error("{}", Faults(shown, *count))]
    Faulty { shown: Vec<(usize, Fault)>, count: usize },
    #[error("line {0} is not what it was when the batch began")]
    Changed(usize),
}

struct Faults<'a>(&'a [(usize, Fault)], usize);

impl fmt::Display for Faults<'_> {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let Self(shown, count) = self;
        write!(out, "{count} of its lines cannot be requests")?;
        for (line, fault) in *shown {
            write!(out, "\n  line {line}: {fault}")?;
        }
        if *count > shown.len() {
            write!(out, "\n  … and {} more", count - shown.len())?;
        }
        Ok(())
    }
}

impl Line {
    /// Errors: what is wrong with it by itself.
    fn read(bytes: &[u8], limits: &Limits) -> Result<Self, Fault> {
        let mut map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| Fault::NotJson(error.to_string()))?;
        let mut take = |name| map.remove(name).filter(|value| !value.is_null()).ok_or(Fault::Missing(name));
        let custom_id = match take("custom_id")? {
            Value::String(id) if (1..=CUSTOM_ID_BYTES_MAX).contains(&id.len()) => id,
            _ => return Err(Fault::CustomId),
        };
        let method = take("method")?;
        if method.as_str() != Some("POST") {
            return Err(Fault::Method(method.to_string()));
        }
        let url = take("url")?;
        let known = |url: &&str| limits.endpoint.map_or_else(|| URLS.contains(url), |only| *url == only);
        let Some(url) = url.as_str().filter(known).map(str::to_owned) else {
            let expected =
                limits.endpoint.map_or_else(|| format!("one of {}", URLS.join(", ")), str::to_owned);
            return Err(Fault::Url { got: url.to_string(), expected });
        };
        let Value::Object(body) = take("body")? else { return Err(Fault::Body) };
        if body.get("stream").is_some_and(|stream| *stream == Value::Bool(true)) {
            return Err(Fault::Stream);
        }
        Ok(Self { custom_id, url, body })
    }

    /// Whether there is such a route for batches.
    pub fn may_ask(url: &str) -> bool {
        URLS.contains(&url)
    }
}

/// A file that was checked. Its requests are read again when their turn comes: only where they stand is kept.
#[derive(Debug)]
pub struct Input {
    file: Mutex<File>,
    entries: Vec<Entry>,
    /// Place of each name in `entries`.
    places: HashMap<String, usize>,
}

#[derive(Debug)]
struct Entry {
    /// Bytes from the start of the file, and to the line's end.
    offset: u64,
    len: usize,
    /// Counted from 1, empty ones too.
    number: usize,
    digest: [u8; DIGEST_BYTES],
}

impl Input {
    /// Reads and checks all of it; empty lines count for nothing. Blocks.
    pub fn read(path: &Path, limits: &Limits) -> Result<Self, InputError> {
        let mut reader = BufReader::new(File::open(path)?);
        let (mut entries, mut places) = (Vec::<Entry>::new(), HashMap::new());
        let (mut shown, mut count) = (Vec::new(), 0);
        let (mut bytes, mut offset, mut number) = (Vec::new(), 0, 0);
        loop {
            let consumed = next_line(&mut reader, &mut bytes, limits.line)?;
            if consumed == 0 {
                break;
            }
            number += 1;
            let start = offset;
            offset += consumed;
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            if entries.len() + count == limits.lines {
                return Err(InputError::TooMany { limit: limits.lines });
            }
            let line = if bytes.len() > limits.line {
                Err(Fault::TooLong { limit: limits.line })
            } else {
                Line::read(plain(&bytes), limits)
            };
            let fault = match line {
                Ok(line) => match places.get(&line.custom_id) {
                    Some(&first) => {
                        let first: &Entry = &entries[first];
                        Fault::Duplicate { id: line.custom_id, first: first.number }
                    }
                    None => {
                        places.insert(line.custom_id, entries.len());
                        entries.push(Entry {
                            offset: start,
                            len: bytes.len(),
                            number,
                            digest: digest(&bytes),
                        });
                        continue;
                    }
                },
                Err(fault) => fault,
            };
            count += 1;
            if shown.len() < FAULTS_SHOWN {
                shown.push((number, fault));
            }
        }
        match (count, entries.len()) {
            (0, 0) => Err(InputError::Empty),
            (0, _) => Ok(Self { file: Mutex::new(reader.into_inner()), entries, places }),
            (count, _) => Err(InputError::Faulty { shown, count }),
        }
    }

    /// How many requests it holds.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// The id of the result of request `index`: the same for the same line, wherever and whenever it is answered.
    pub fn id(&self, index: usize) -> String {
        let hex: String = self.entries[index].digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("batch_req_{hex}")
    }

    /// The request that has this name.
    pub fn place(&self, custom_id: &str) -> Option<usize> {
        self.places.get(custom_id).copied()
    }

    /// Reads request `index` again. Errors: somebody has changed the file meanwhile.
    pub fn line(&self, index: usize) -> Result<Line, InputError> {
        let entry = &self.entries[index];
        let mut bytes = vec![0; entry.len];
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(entry.offset))?;
            file.read_exact(&mut bytes).map_err(|_| InputError::Changed(entry.number))?;
        }
        if digest(&bytes) != entry.digest {
            return Err(InputError::Changed(entry.number));
        }
        let limits = Limits { line: usize::MAX, lines: usize::MAX, endpoint: None };
        Line::read(plain(&bytes), &limits).map_err(|_| InputError::Changed(entry.number))
    }
}

/// Reads the next line into `line`, of a longer one than `limit` only so much that it shows; bytes that were consumed.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>, limit: usize) -> io::Result<u64> {
    line.clear();
    let most = limit as u64 + 2;
    let mut consumed = reader.by_ref().take(most).read_until(b'\n', line)? as u64;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(consumed);
    }
    while consumed >= most {
        let held = reader.fill_buf()?;
        let (step, ends) = match held.iter().position(|&byte| byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (held.len(), held.is_empty()),
        };
        reader.consume(step);
        consumed += step as u64;
        if ends {
            break;
        }
    }
    Ok(consumed)
}

/// Without what editors put around: a mark of the byte order before, blanks behind.
fn plain(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii()
}

fn digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let whole = Sha256::digest(plain(bytes));
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&whole[..DIGEST_BYTES]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { line: 200, lines: 4, endpoint: None };

    fn read(text: &str, limits: &Limits) -> Result<Input, InputError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Input::read(file.path(), limits)
    }

    fn line(id: &str, more: &str) -> String {
        format!(
            r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{{"prompt":"x"{more}}}}}"#
        )
    }

    fn check(text: &str, number: usize, code: &str, words: &str) {
        match read(text, &LIMITS) {
            Err(InputError::Faulty { shown, count: 1 }) => {
                let (at, fault) = &shown[0];
                assert_eq!((*at, fault.code()), (number, code), "{text}");
                assert!(fault.to_string().contains(words), "{fault}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_line_that_is_no_request_says_which_and_why() {
        let good = line("a", "");
        check(&format!("{good}\n\n{{\"custom_id\":"), 3, "invalid_json_line", "EOF");
        check("[1]", 1, "invalid_json_line", "expected a map");
        check("\"\u{0}\"", 1, "invalid_json_line", "not a JSON object");
        check(r#"{"method":"POST"}"#, 1, "missing_required_parameter", "`custom_id`");
        check(&good.replace("\"a\"", "7"), 1, "invalid_custom_id", "string");
        check(&good.replace("\"a\"", "\"\""), 1, "invalid_custom_id", "string");
        check(&good.replace("POST", "GET"), 1, "invalid_method", "GET");
        check(&good.replace("/v1/completions", "/v1/embeddings"), 1, "invalid_url", "/v1/embeddings");
        check(&good.replace(r#"{"prompt":"x"}"#, "[]"), 1, "invalid_body", "object");
        check(&line("a", r#","stream":true"#), 1, "invalid_body", "stream");
        check(&format!("{good}\n{good}"), 2, "duplicate_custom_id", "line 1");
        check(&format!("{good}\n{}\n{}", "x".repeat(1000), line("b", "")), 2, "line_too_long", "200");
    }

    #[test]
    fn a_batch_has_one_endpoint_and_an_end() {
        let only = Limits { endpoint: Some("/v1/chat/completions"), ..LIMITS };
        assert!(matches!(read(&line("a", ""), &only), Err(InputError::Faulty { count: 1, .. })));
        assert!(matches!(read("\n \r\n", &LIMITS), Err(InputError::Empty)));
        let many: Vec<String> = (0..5).map(|id| line(&id.to_string(), "")).collect();
        assert!(matches!(read(&many.join("\n"), &LIMITS), Err(InputError::TooMany { limit: 4 })));
        let bad = Limits { lines: 100, ..LIMITS };
        let error = read(&"{}\n".repeat(30), &bad).unwrap_err().to_string();
        assert!(error.starts_with("30 of its lines") && error.ends_with("and 10 more"), "{error}");
    }

    #[test]
    fn a_request_is_found_again_by_its_place_whatever_stands_around_it() {
        let text = format!("\u{feff}{}\r\n\n  {} \n{}", line("a", ""), line("b", ""), line("c", ""));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        let input = Input::read(file.path(), &LIMITS).unwrap();
        let names: Vec<String> = (0..3).map(|index| input.line(index).unwrap().custom_id).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(input.place("c"), Some(2));
        let alone = read(&line("b", ""), &LIMITS).unwrap();
        assert_eq!(input.id(1), alone.id(0));
        assert_ne!(input.id(0), input.id(1));

        std::fs::write(file.path(), text.replace("\"c\"", "\"d\"")).unwrap();
        assert!(input.line(1).is_ok());
        assert!(matches!(input.line(2), Err(InputError::Changed(4))));
    }
}
