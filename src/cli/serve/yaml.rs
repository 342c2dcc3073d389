//! The part of YAML that files of flags are written in: keys, scalars, lists and maps, in blocks or in brackets.
//! What else YAML has (anchors, tags, folded text, several documents) is refused by name.

use serde_json::{Map, Number, Value};

/// A value as written; numbers keep their spelling, because a name may look like one.
#[derive(Debug, Clone, PartialEq)]
pub enum Yaml {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Yaml>),
    Map(Vec<(String, Yaml)>),
}

/// A key of the outermost map, and the line it stands in, from 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub line: usize,
    pub key: String,
    pub value: Yaml,
}

/// What cannot be read, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub line: usize,
    pub message: String,
}

/// Brackets in brackets; a file of flags has two or three.
const DEPTH_MAX: usize = 32;

impl Yaml {
    pub fn json(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(value) => Value::Bool(*value),
            Self::Number(text) => {
                text.parse::<Number>().map_or_else(|_| Value::String(text.clone()), Value::Number)
            }
            Self::Text(text) => Value::String(text.clone()),
            Self::List(items) => items.iter().map(Self::json).collect(),
            Self::Map(entries) => Value::Object(
                entries.iter().map(|(key, value)| (key.clone(), value.json())).collect::<Map<_, _>>(),
            ),
        }
    }
}

/// The outermost map of a file.
pub fn entries(text: &str) -> Result<Vec<Entry>, Fault> {
    let mut lines = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let number = index + 1;
        let bare = without_comment(text).trim_end();
        let content = bare.trim_start_matches(' ');
        match content {
            "" => continue,
            "---" if lines.is_empty() => continue,
            "..." => break,
            _ if content.starts_with('\t') => {
                return Err(fault(number, "lines are indented by spaces, not tabs"));
            }
            _ if content.starts_with("---") => {
                return Err(fault(number, "one document is expected, not several"));
            }
            _ => lines.push(Line { number, indent: bare.len() - content.len(), content }),
        }
    }
    let mut reader = Blocks { lines: &lines, at: 0 };
    let Some(first) = lines.first() else { return Ok(Vec::new()) };
    if first.is_item() {
        return Err(fault(first.number, "expected `key: value`, got a list"));
    }
    let entries = reader.map(first.indent, 0)?;
    match reader.lines.get(reader.at) {
        Some(line) => Err(fault(line.number, "is indented less than the lines before it")),
        None => Ok(entries),
    }
}

#[derive(Debug)]
struct Line<'a> {
    number: usize,
    indent: usize,
    content: &'a str,
}

impl Line<'_> {
    fn is_item(&self) -> bool {
        self.content == "-" || self.content.starts_with("- ")
    }
}

struct Blocks<'a> {
    lines: &'a [Line<'a>],
    at: usize,
}

impl<'a> Blocks<'a> {
    fn map(&mut self, indent: usize, depth: usize) -> Result<Vec<Entry>, Fault> {
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(line) = self.here(indent)? {
            if line.is_item() {
                return Err(fault(line.number, "expected `key: value`, got an item of a list"));
            }
            let (key, rest) = split(line)?;
            if entries.iter().any(|entry| entry.key == key) {
                return Err(fault(line.number, format!("`{key}` is there twice")));
            }
            self.at += 1;
            let value = if rest.is_empty() { self.below(indent, depth)? } else { scalar(rest, line.number)? };
            entries.push(Entry { line: line.number, key, value });
        }
        Ok(entries)
    }

    fn list(&mut self, indent: usize) -> Result<Yaml, Fault> {
        let mut items = Vec::new();
        while let Some(line) = self.here(indent)?.filter(|line| line.is_item()) {
            let rest = line.content[1..].trim_start();
            // Lists of maps mean nothing to any flag, and have rules of their own.
            if rest.is_empty() || rest.starts_with("- ") {
                return Err(fault(line.number, "expected a value after `-`"));
            }
            items.push(scalar(rest, line.number)?);
            self.at += 1;
        }
        Ok(Yaml::List(items))
    }

    /// What stands under a key that has nothing beside it.
    fn below(&mut self, indent: usize, depth: usize) -> Result<Yaml, Fault> {
        let Some(next) = self.lines.get(self.at) else { return Ok(Yaml::Null) };
        // The items of a list may stand right under their key.
        if next.is_item() && next.indent >= indent {
            return self.list(next.indent);
        }
        if next.indent <= indent {
            return Ok(Yaml::Null);
        }
        if depth == DEPTH_MAX {
            return Err(fault(next.number, "is too deep"));
        }
        let entries = self.map(next.indent, depth + 1)?;
        Ok(Yaml::Map(entries.into_iter().map(|entry| (entry.key, entry.value)).collect()))
    }

    /// The next line, if it belongs to a block of this indent.
    fn here(&self, indent: usize) -> Result<Option<&'a Line<'a>>, Fault> {
        match self.lines.get(self.at) {
            Some(line) if line.indent > indent => {
                Err(fault(line.number, "is indented more than the lines before it"))
            }
            Some(line) if line.indent == indent => Ok(Some(line)),
            _ => Ok(None),
        }
    }
}

fn fault(line: usize, message: impl Into<String>) -> Fault {
    Fault { line, message: message.into() }
}

/// Everything before a `#` that begins a comment.
fn without_comment(text: &str) -> &str {
    let mut quote = None;
    let mut before = ' ';
    for (at, here) in text.char_indices() {
        match (quote, here) {
            (None, '#') if before.is_whitespace() => return &text[..at],
            // A quote within a word is an apostrophe.
            (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(here),
            (Some(open), _) if here == open && before != '\\' => quote = None,
            _ => {}
        }
        before = here;
    }
    text
}

/// `key: value` or `key:`.
fn split<'a>(line: &Line<'a>) -> Result<(String, &'a str), Fault> {
    let (key, rest) = match line.content.chars().next() {
        Some(quote @ ('"' | '\'')) => {
            let end = line.content[1..].find(quote).map(|end| end + 1);
            let end = end.ok_or_else(|| fault(line.number, "a quote has no end"))?;
            (&line.content[1..end], line.content[end + 1..].trim_start().strip_prefix(':'))
        }
        _ => match line.content.split_once(": ") {
            Some((key, rest)) => (key.trim_end(), Some(rest)),
            None => (line.content.trim_end_matches(':'), line.content.ends_with(':').then_some("")),
        },
    };
    match rest {
        Some(rest) => Ok((key.to_owned(), rest.trim())),
        None => Err(fault(line.number, format!("expected `key: value`, got `{}`", line.content))),
    }
}

/// The value beside a key: a word, a quoted text, or brackets.
fn scalar(text: &str, line: usize) -> Result<Yaml, Fault> {
    let mut flow = Flow { text, at: 0, line };
    let value = match text.chars().next() {
        Some('{' | '[' | '"' | '\'') => flow.value(0)?,
        Some(mark @ ('|' | '>' | '&' | '*' | '!' | '%' | '@' | '`')) => {
            return Err(fault(
                line,
                format!("`{mark}` is a part of YAML that is not read here: put the value in quotes"),
            ));
        }
        _ => return Ok(word(text)),
    };
    flow.space();
    match flow.rest() {
        "" => Ok(value),
        rest => Err(fault(line, format!("expected the end of the line, got `{rest}`"))),
    }
}

/// Words that mean a value, as YAML 1.1 has them.
fn word(text: &str) -> Yaml {
    match text {
        "null" | "Null" | "NULL" | "~" => Yaml::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "on" | "On" => Yaml::Bool(true),
        "false" | "False" | "FALSE" | "no" | "No" | "off" | "Off" => Yaml::Bool(false),
        _ if text.parse::<Number>().is_ok() => Yaml::Number(text.to_owned()),
        _ => Yaml::Text(text.to_owned()),
    }
}

/// Values in one line, in JSON's brackets, with or without quotes.
struct Flow<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl<'a> Flow<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn eat(&mut self, wanted: char) -> bool {
        self.space();
        let eats = self.rest().starts_with(wanted);
        self.at += if eats { wanted.len_utf8() } else { 0 };
        eats
    }

    fn fault(&self, message: &str) -> Fault {
        fault(self.line, format!("{message} at `{}`", self.rest()))
    }

    fn value(&mut self, depth: usize) -> Result<Yaml, Fault> {
        if depth == DEPTH_MAX {
            return Err(self.fault("too many brackets"));
        }
        if self.eat('[') {
            let mut items = Vec::new();
            while !self.eat(']') {
                items.push(self.value(depth + 1)?);
                self.comma(']')?;
            }
            return Ok(Yaml::List(items));
        }
        if self.eat('{') {
            let mut entries = Vec::new();
            while !self.eat('}') {
                let key = match self.atom(&[':', ',', '}'])? {
                    Yaml::Text(key) | Yaml::Number(key) => key,
                    _ => return Err(self.fault("expected a key")),
                };
                if !self.eat(':') {
                    return Err(self.fault("expected `:`"));
                }
                entries.push((key, self.value(depth + 1)?));
                self.comma('}')?;
            }
            return Ok(Yaml::Map(entries));
        }
        self.atom(&[',', ']', '}'])
    }

    fn comma(&mut self, end: char) -> Result<(), Fault> {
        self.space();
        if self.eat(',') || self.rest().starts_with(end) {
            return Ok(());
        }
        Err(fault(self.line, format!("expected `,` or `{end}` in this line, got `{}`", self.rest())))
    }

    /// A quoted text, or a word up to one of `ends`.
    fn atom(&mut self, ends: &[char]) -> Result<Yaml, Fault> {
        self.space();
        match self.rest().chars().next() {
            Some('"') => {
                let mut parts = serde_json::Deserializer::from_str(self.rest()).into_iter::<String>();
                let Some(Ok(text)) = parts.next() else {
                    return Err(self.fault("expected a text in quotes"));
                };
                self.at += parts.byte_offset();
                Ok(Yaml::Text(text))
            }
            Some('\'') => self.single(),
            _ => {
                let end = self.rest().find(ends).unwrap_or(self.rest().len());
                let text = self.rest()[..end].trim_end();
                if text.is_empty() {
                    return Err(self.fault("expected a value"));
                }
                self.at += end;
                Ok(word(text))
            }
        }
    }

    /// Between single quotes, of which two in a row mean one.
    fn single(&mut self) -> Result<Yaml, Fault> {
        let mut text = String::new();
        let mut rest = self.rest()[1..].char_indices().peekable();
        while let Some((at, here)) = rest.next() {
            match here {
                '\'' if rest.next_if(|(_, next)| *next == '\'').is_some() => text.push('\''),
                '\'' => {
                    self.at += 1 + at + 1;
                    return Ok(Yaml::Text(text));
                }
                _ => text.push(here),
            }
        }
        Err(self.fault("a quote has no end"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Value, String> {
        let entries = entries(text).map_err(|fault| format!("{}: {}", fault.line, fault.message))?;
        Ok(Value::Object(entries.into_iter().map(|entry| (entry.key, entry.value.json())).collect()))
    }

    #[test]
    fn blocks_brackets_and_scalars_are_read() {
        let text = "\
---
# a file of flags
model: nvidia/x   # with a comment
port: 8003
ratio: 0.5
enforce-eager: yes
none:
empty: ~
key: 'it''s # no comment'
path: \"a\\nb\"
url: http://x:1/#top
served-model-name:
- a
- \"b\"
other:
  - 1
  - c d
speculative-config:
  method: mtp
  deeper:
    num: 3
flow: {method: mtp, \"n\": [1, true, 'x'], e: {}}
list: [\"*\", a b]
";
        let expected = json!({
            "model": "nvidia/x", "port": 8003, "ratio": 0.5, "enforce-eager": true, "none": null, "empty": null,
            "key": "it's # no comment", "path": "a\nb", "url": "http://x:1/#top", "served-model-name": ["a", "b"],
            "other": [1, "c d"], "speculative-config": {"method": "mtp", "deeper": {"num": 3}},
            "flow": {"method": "mtp", "n": [1, true, "x"], "e": {}}, "list": ["*", "a b"],
        });
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read(""), Ok(json!({})));
        assert_eq!(read("{}"), Err("1: expected `key: value`, got `{}`".into()));
    }

    #[test]
    fn a_number_keeps_its_spelling() {
        let entries = entries("api-key: 007\nname: 1e5\nsize: 32k").expect("three entries");
        let values: Vec<_> = entries.into_iter().map(|entry| entry.value).collect();
        let text = |text: &str| Yaml::Text(text.into());
        assert_eq!(values, [text("007"), Yaml::Number("1e5".into()), text("32k")]);
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_line() {
        let check = |text: &str, expected: &str| {
            let error = read(text).expect_err(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        };
        check("a: 1\nb", "2: expected `key: value`");
        check("a: 1\n  b: 2", "2: is indented more");
        check("  a: 1\nb: 2", "2: is indented less");
        check("a: 1\na: 2", "2: `a` is there twice");
        check("a: |\n  x", "1: `|`");
        check("a: *x", "1: `*`");
        check("a: [1, 2", "1: expected `,` or `]`");
        check("a: {b 1}", "1: expected `:`");
        check("a: 'x", "1: a quote has no end");
        check("a: \"x\" y", "1: expected the end");
        check("- a", "1: expected `key: value`, got a list");
        check("\ta: 1", "1: lines are indented by spaces");
        check("a: 1\n---\nb: 2", "2: one document");
        check(&format!("a: {}", "[".repeat(100)), "1: too many brackets");
    }
}
