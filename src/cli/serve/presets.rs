//! The preset file of `--models-preset`: models by section, options by line.
//!
//! TOML as far as such a file needs it, and llama-server's INI, which is the same with fewer quotes:
//!
//! ```text
//! ["*"]                          # for all
//! ctx-size = 16384
//! [nano]
//! model = "/models/nano-nvfp4"
//! alias = ["voice", "fast"]
//! ```

/// Where something stands in the file, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// Errors of the file: where, and what was expected there.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("line {}, column {}: {message}", at.line, at.column)]
pub struct Error {
    pub at: Position,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// `*` is all of them.
    pub name: String,
    pub at: Position,
    pub entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// With dashes for underscores, and none in front.
    pub key: String,
    pub at: Position,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A string, a number, a word: whoever reads it knows which.
    Text(String),
    List(Vec<String>),
}

/// All sections, in order. Errors: what is no section and no option, and names that come twice.
pub fn read(text: &str) -> Result<Vec<Section>, Error> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, line) in text.strip_prefix('\u{feff}').unwrap_or(text).lines().enumerate() {
        let mut line = Line { number: index + 1, text: line, at: 0 };
        line.skip_space();
        let at = line.position();
        match line.peek() {
            None | Some('#' | ';') => {}
            Some('[') => {
                let name = line.section()?;
                if sections.iter().any(|section| section.name == name) {
                    return Err(Error { at, message: format!("the section [{name}] is there already") });
                }
                sections.push(Section { name, at, entries: Vec::new() });
            }
            Some(_) => {
                let (key, value) = (line.key()?, line.value()?);
                let Some(section) = sections.last_mut() else {
                    return Err(Error {
                        at,
                        message: format!("`{key}` stands before the first [section]: [*] is for all models"),
                    });
                };
                if section.entries.iter().any(|entry| entry.key == key) {
                    return Err(Error {
                        at,
                        message: format!("`{key}` is given twice in [{}]", section.name),
                    });
                }
                section.entries.push(Entry { key, at, value });
            }
        }
    }
    Ok(sections)
}

/// What is left of one line.
struct Line<'a> {
    number: usize,
    text: &'a str,
    /// Bytes that are read.
    at: usize,
}

impl<'a> Line<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn position(&self) -> Position {
        Position { line: self.number, column: self.text[..self.at].chars().count() + 1 }
    }

    fn expected<T>(&self, what: &str) -> Result<T, Error> {
        let found = self.peek().map_or("the end of the line".to_owned(), |found| format!("`{found}`"));
        Err(Error { at: self.position(), message: format!("expected {what}, found {found}") })
    }

    /// `[name]`, quoted or not.
    fn section(&mut self) -> Result<String, Error> {
        self.take();
        self.skip_space();
        let name = match self.peek() {
            Some('"' | '\'') => self.quoted()?,
            _ => {
                let end = self.rest().find([']', '#']).unwrap_or(self.rest().len());
                let name = self.rest()[..end].trim().to_owned();
                self.at += end;
                name
            }
        };
        if name.is_empty() {
            return self.expected("the name of a model");
        }
        self.skip_space();
        if self.peek() != Some(']') {
            return self.expected("`]`");
        }
        self.take();
        self.end()?;
        Ok(name)
    }

    fn key(&mut self) -> Result<String, Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let end = self.rest().find(|c| !allowed(c)).unwrap_or(self.rest().len());
        let key = self.rest()[..end].trim_start_matches('-').replace('_', "-");
        if key.is_empty() {
            return self.expected("the name of an option, or [a section]");
        }
        self.at += end;
        self.skip_space();
        if self.peek() != Some('=') {
            return self.expected("`=`");
        }
        self.take();
        self.skip_space();
        Ok(key)
    }

    fn value(&mut self) -> Result<Value, Error> {
        let value = match self.peek() {
            Some('"' | '\'') => Value::Text(self.quoted()?),
            Some('[') => Value::List(self.list()?),
            Some(_) => return self.bare(),
            None => return self.expected("a value"),
        };
        self.end()?;
        Ok(value)
    }

    /// Everything up to a comment, which has space before it.
    fn bare(&mut self) -> Result<Value, Error> {
        let rest = self.rest();
        let comment = rest.match_indices(['#', ';']).map(|(at, _)| at);
        let end = { comment }.find(|at| rest[..*at].ends_with([' ', '\t']) || *at == 0);
        let text = rest[..end.unwrap_or(rest.len())].trim();
        if text.is_empty() {
            return self.expected("a value");
        }
        self.at = self.text.len();
        Ok(Value::Text(text.to_owned()))
    }

    fn quoted(&mut self) -> Result<String, Error> {
        let from = self.position();
        let quote = self.take();
        let mut text = String::new();
        loop {
            match self.take() {
                None => {
                    return Err(Error { at: from, message: "this string has no end on its line".to_owned() });
                }
                end if end == quote => return Ok(text),
                Some('\\') if quote == Some('"') => {
                    text.push(match self.peek() {
                        Some(c @ ('"' | '\\')) => c,
                        Some('n') => '\n',
                        Some('t') => '\t',
                        _ => return self.expected("one of \" \\ n t behind `\\`"),
                    });
                    self.take();
                }
                Some(c) => text.push(c),
            }
        }
    }

    fn list(&mut self) -> Result<Vec<String>, Error> {
        self.take();
        let mut items = Vec::new();
        loop {
            self.skip_space();
            match self.peek() {
                Some('"' | '\'') => items.push(self.quoted()?),
                Some(']') => break,
                _ => return self.expected("a quoted string or `]`"),
            }
            self.skip_space();
            match self.peek() {
                Some(',') => drop(self.take()),
                Some(']') => break,
                _ => return self.expected("`,` or `]`"),
            }
        }
        self.take();
        Ok(items)
    }

    fn end(&mut self) -> Result<(), Error> {
        self.skip_space();
        match self.peek() {
            None | Some('#' | ';') => Ok(()),
            Some(_) => self.expected("the end of the line"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(text: &str) -> Vec<(String, Value)> {
        let sections = read(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        sections
            .into_iter()
            .flat_map(|section| section.entries)
            .map(|entry| (entry.key, entry.value))
            .collect()
    }

    fn text(value: &str) -> Value {
        Value::Text(value.to_owned())
    }

    #[test]
    fn toml_and_ini_are_read_alike() {
        let expected =
            [("ctx-size", "4096"), ("model", "/a b/c"), ("chat-template", "x#y"), ("jinja", "true")];
        let expected: Vec<_> = expected.map(|(key, value)| (key.to_owned(), text(value))).into();
        let toml = "[\"*\"]\r\nctx_size = 4096 # all\n\n[nano] # one\nmodel = \"/a b/c\"\nchat-template='x#y'\njinja=true";
        let ini = "; all\n[*]\n--ctx-size = 4096\n[ nano ]\nmodel = /a b/c ; there\nchat-template = x#y\njinja = true\n";
        assert_eq!(entries(toml), expected);
        assert_eq!(entries(ini), expected);
        assert_eq!(
            read(ini).map(|sections| sections.into_iter().map(|s| s.name).collect::<Vec<_>>()),
            Ok(vec!["*".to_owned(), "nano".to_owned()])
        );
    }

    #[test]
    fn strings_have_escapes_and_lists_have_strings() {
        assert_eq!(
            entries(
                r#"[a]
                              x = "q\"\\\n\t""#
            ),
            [("x".to_owned(), text("q\"\\\n\t"))]
        );
        let list = Value::List(vec!["a".into(), "b, c".into()]);
        assert_eq!(entries("[a]\nalias = [\"a\", 'b, c',] # two"), [("alias".to_owned(), list)]);
        assert_eq!(entries("[a]\nalias = []"), [("alias".to_owned(), Value::List(vec![]))]);
    }

    #[test]
    fn what_is_wrong_is_told_with_line_and_column() {
        let check = |text: &str, line: usize, column: usize, words: &str| {
            let error = read(text).expect_err(text);
            assert_eq!((error.at.line, error.at.column), (line, column), "{text:?}: {error}");
            assert!(error.message.contains(words), "{text:?}: {error}");
        };
        check("x = 1", 1, 1, "before the first [section]");
        check("[a", 1, 3, "expected `]`, found the end of the line");
        check("[]", 1, 2, "the name of a model");
        check("[a] b", 1, 5, "the end of the line");
        check("[a]\n\n  ctx size = 1", 3, 7, "expected `=`, found `s`");
        check("[a]\nx =", 2, 4, "a value");
        check("[a]\nx = # nothing", 2, 5, "a value");
        check("[a]\nx = \"abc", 2, 5, "no end");
        check("[a]\nx = \"\\q\"", 2, 7, "behind `\\`");
        check("[a]\nx = [1]", 2, 6, "a quoted string");
        check("[a]\nx = [\"ä\" \"b\"]", 2, 10, "`,` or `]`");
        check("[a]\nx = 'b' c", 2, 9, "the end of the line");
        check("[a]\n= 1", 2, 1, "the name of an option");
        check("[a]\nx = 1\nx = 2", 3, 1, "twice");
        check("[a]\n['a']", 2, 1, "already");
        check("ä", 1, 1, "the name of an option");
    }

    #[test]
    fn no_file_breaks_the_reader() {
        let parts = ["[", "]", "\"", "'", "\\", "=", "#", ",", "a", " ", "\n", "\r", "é", "*"];
        let mut state = 7u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text += parts[(state >> 33) as usize % parts.len()];
            }
            // Whatever it says, it says something.
            let _ = read(&text);
        }
    }
}
