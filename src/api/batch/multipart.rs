//! `multipart/form-data` out of bytes, however they are cut: the form in which files are uploaded (RFC 7578).

/// The lines before a part's content name it; more than this is no name.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// RFC 2046 allows no longer boundary.
const BOUNDARY_BYTES_MAX: usize = 70;

/// What comes of a form, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A field begins.
    Part { name: String, filename: Option<String> },
    /// More of its content.
    Data(Vec<u8>),
    /// Its content is complete.
    PartEnd,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FormError {
    #[error("the content type must be multipart/form-data with a boundary")]
    ContentType,
    #[error("the head of a part is longer than {HEAD_BYTES_MAX} bytes")]
    HeadTooLong,
    #[error("a part has no content-disposition with a name")]
    NoName,
    #[error("a boundary is followed by neither a line's end nor the form's")]
    Boundary,
    #[error("it ends within a part")]
    Cut,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// Before the first boundary; nothing there counts.
    Preamble,
    /// Just behind a boundary.
    Boundary,
    Head,
    Content,
    End,
}

/// Splits a form into [`Event`]s; holds back no more than a head or a boundary.
pub struct Splitter {
    /// `\r\n--` and the boundary: what ends a content.
    delimiter: Vec<u8>,
    held: Vec<u8>,
    state: State,
}

impl Splitter {
    /// Errors: the request's content type is not that of a form.
    pub fn new(content_type: &str) -> Result<Self, FormError> {
        let (media, parameters) = content_type.split_once(';').ok_or(FormError::ContentType)?;
        if !media.trim().eq_ignore_ascii_case("multipart/form-data") {
            return Err(FormError::ContentType);
        }
        let boundary = parameter(parameters, "boundary");
        let fits = |boundary: &String| (1..=BOUNDARY_BYTES_MAX).contains(&boundary.len());
        let boundary = boundary.filter(fits).ok_or(FormError::ContentType)?;
        let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
        // The first boundary has no line before it; with one, all are alike.
        Ok(Self { delimiter, held: b"\r\n".to_vec(), state: State::Preamble })
    }

    /// Takes the next bytes and hands out what is certain now.
    pub fn push(&mut self, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), FormError> {
        self.held.extend_from_slice(bytes);
        while self.step(events)? {}
        Ok(())
    }

    /// Errors: the form is not complete.
    pub fn finish(&self) -> Result<(), FormError> {
        if self.state == State::End { Ok(()) } else { Err(FormError::Cut) }
    }

    /// Whether there may be more to do with what is held.
    fn step(&mut self, events: &mut Vec<Event>) -> Result<bool, FormError> {
        match self.state {
            State::Preamble | State::Content => Ok(self.content(events)),
            State::Boundary => self.boundary(),
            State::Head => self.head(events),
            State::End => {
                self.held.clear();
                Ok(false)
            }
        }
    }

    fn content(&mut self, events: &mut Vec<Event>) -> bool {
        let found = find(&self.held, &self.delimiter);
        // What could be the beginning of a boundary waits for the rest.
        let sure = found.unwrap_or_else(|| self.held.len().saturating_sub(self.delimiter.len() - 1));
        let data: Vec<u8> = self.held.drain(..sure).collect();
        let counts = self.state == State::Content;
        if counts && !data.is_empty() {
            events.push(Event::Data(data));
        }
        if found.is_none() {
            return false;
        }
        if counts {
            events.push(Event::PartEnd);
        }
        self.held.drain(..self.delimiter.len());
        self.state = State::Boundary;
        true
    }

    fn boundary(&mut self) -> Result<bool, FormError> {
        let blanks = self.held.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        match self.held.get(blanks..blanks + 2) {
            None if blanks > HEAD_BYTES_MAX => Err(FormError::Boundary),
            None => Ok(false),
            Some(b"--") => {
                self.state = State::End;
                Ok(true)
            }
            Some(b"\r\n") => {
                // The line's end stays: a head without lines ends as any other does.
                self.held.drain(..blanks);
                self.state = State::Head;
                Ok(true)
            }
            Some(_) => Err(FormError::Boundary),
        }
    }

    fn head(&mut self, events: &mut Vec<Event>) -> Result<bool, FormError> {
        let Some(end) = find(&self.held, b"\r\n\r\n") else {
            return if self.held.len() > HEAD_BYTES_MAX { Err(FormError::HeadTooLong) } else { Ok(false) };
        };
        if end > HEAD_BYTES_MAX {
            return Err(FormError::HeadTooLong);
        }
        let head: Vec<u8> = self.held.drain(..end + 4).collect();
        events.push(named(&String::from_utf8_lossy(&head))?);
        self.state = State::Content;
        Ok(true)
    }
}

fn named(head: &str) -> Result<Event, FormError> {
    let disposition = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    });
    let parameters = disposition.and_then(|value| value.split_once(';')).map(|(_, rest)| rest);
    let parameters = parameters.ok_or(FormError::NoName)?;
    let name = parameter(parameters, "name").ok_or(FormError::NoName)?;
    Ok(Event::Part { name, filename: parameter(parameters, "filename") })
}

/// The value of `name` among `; name="value"; name=value`.
fn parameter(text: &str, name: &str) -> Option<String> {
    let mut rest = text;
    loop {
        let (key, value) = rest.trim_start_matches([';', ' ', '\t']).split_once('=')?;
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = value.find(';').unwrap_or(value.len());
                (value[..end].trim().to_owned(), &value[end..])
            }
        };
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(value);
        }
        rest = after;
    }
}

/// What stands before the next quotation mark, and what behind it.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = text[from..].iter().position(|byte| *byte == pattern[0]) {
        let at = from + at;
        if text[at..].starts_with(pattern) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &str = "multipart/form-data; charset=utf-8; boundary=\"b-1\"";

    fn split(form: &[u8], size: usize) -> Result<Vec<Event>, FormError> {
        let mut splitter = Splitter::new(TYPE)?;
        let mut events = Vec::new();
        for piece in form.chunks(size) {
            splitter.push(piece, &mut events)?;
        }
        splitter.finish()?;
        let mut joined: Vec<Event> = Vec::new();
        for event in events {
            match (joined.last_mut(), event) {
                (Some(Event::Data(before)), Event::Data(more)) => before.extend(more),
                (_, event) => joined.push(event),
            }
        }
        Ok(joined)
    }

    #[test]
    fn a_form_is_the_same_however_it_is_cut() {
        let form = b"words before\r\n--b-1\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--b-1  \r\n\
            content-disposition: form-data; filename=\"a \\\"b\\\"; name=c\"; name=file\r\nContent-Type: text/plain\r\n\r\n\
            \r\n--b-\r\n-\r\r\n--b-1\r\nContent-Disposition: form-data; name=\"empty\"\r\n\r\n\r\n--b-1--\r\nwords behind";
        let part = |name: &str, filename: Option<&str>| Event::Part {
            name: name.into(),
            filename: filename.map(str::to_owned),
        };
        let expected = [
            part("purpose", None),
            Event::Data(b"batch".to_vec()),
            Event::PartEnd,
            part("file", Some("a \"b\"; name=c")),
            Event::Data(b"\r\n--b-\r\n-\r".to_vec()),
            Event::PartEnd,
            part("empty", None),
            Event::PartEnd,
        ];
        for size in 1..form.len() {
            assert_eq!(split(form, size).as_deref(), Ok(&expected[..]), "pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_form_says_why() {
        let check = |form: &[u8], error: FormError| {
            for size in [1, 3, form.len().max(1)] {
                assert_eq!(split(form, size), Err(error.clone()));
            }
        };
        check(b"", FormError::Cut);
        check(b"--b-1\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nx", FormError::Cut);
        check(b"--b-1\r\nContent-Type: text/plain\r\n\r\nx", FormError::NoName);
        check(b"--b-1\r\n\r\nx", FormError::NoName);
        check(b"--b-1xy", FormError::Boundary);
        check(&[b"--b-1\r\n", &[b'x'; HEAD_BYTES_MAX + 9][..]].concat(), FormError::HeadTooLong);
        for kind in [
            "application/json",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "text/a; boundary=b",
        ] {
            assert_eq!(Splitter::new(kind).map(|_| ()), Err(FormError::ContentType), "{kind}");
        }
        let long = format!("multipart/form-data; boundary={}", "b".repeat(71));
        assert!(Splitter::new(&long).is_err());
    }
}
