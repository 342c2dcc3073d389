//! What a GGUF file says of its model: names to typed values.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use super::{Error, Reader};

/// The entries of one file.
#[derive(Debug)]
pub struct Metadata {
    file: String,
    entries: BTreeMap<String, Value>,
}

/// A value of any of the format's types; whole numbers of all widths are one kind here.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    /// An f32 as the shortest decimal number that means it: 0.6, not 0.6000000238418579.
    Float(f64),
    Bool(bool),
    Text(String),
    List(List),
}

/// A list whose elements were checked when the file was read and are read again when they are asked for: a vocabulary
/// is not held twice.
#[derive(Debug, Clone, PartialEq)]
pub struct List {
    element: u32,
    count: usize,
    bytes: Bytes,
}

const TEXT: u32 = 8;
const LIST: u32 = 9;

/// Reads `count` entries.
pub(super) fn read(reader: &mut Reader<'_>, whole: &Bytes, count: u64) -> Result<Metadata, Error> {
    let mut entries = BTreeMap::new();
    for _ in 0..count {
        let key = reader.name("a metadata key")?;
        let kind = reader.u32("a metadata type")?;
        let value = match kind {
            LIST => Value::List(list(reader, whole, key)?),
            kind => value(reader, kind, key)?,
        };
        if entries.insert(key.to_owned(), value).is_some() {
            return Err(reader.wrong(format!("{key} is there twice")));
        }
    }
    Ok(Metadata { file: reader.file.into(), entries })
}

fn list(reader: &mut Reader<'_>, whole: &Bytes, key: &str) -> Result<List, Error> {
    let element = reader.u32("a list's type")?;
    let count = reader.u64("a list's length")?;
    let start = reader.at;
    if let Some(width) = width(element) {
        // Checked as one piece: a lie about the length costs nothing.
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(width));
        reader.take(bytes.unwrap_or(usize::MAX), key)?;
    } else if element == TEXT {
        for _ in 0..count {
            reader.text(key)?;
        }
    } else {
        return Err(reader.wrong(format!("{key} is a list of type {element}; expected numbers or strings")));
    }
    // Every element took at least a byte of the file, so the count fits.
    Ok(List { element, count: count as usize, bytes: whole.slice(start..reader.at) })
}

/// Bytes of a value of a type of fixed width.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn value(reader: &mut Reader<'_>, kind: u32, key: &str) -> Result<Value, Error> {
    Ok(match kind {
        0 => Value::Unsigned(u8::from_le_bytes(reader.word(key)?).into()),
        1 => Value::Signed(i8::from_le_bytes(reader.word(key)?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(reader.word(key)?).into()),
        3 => Value::Signed(i16::from_le_bytes(reader.word(key)?).into()),
        4 => Value::Unsigned(reader.u32(key)?.into()),
        5 => Value::Signed(i32::from_le_bytes(reader.word(key)?).into()),
        6 => Value::Float(shortest(f32::from_le_bytes(reader.word(key)?))),
        7 => match reader.word(key)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => {
                return Err(reader.wrong(format!("{key} is a boolean of {other}; expected 0 or 1")));
            }
        },
        TEXT => Value::Text(reader.text(key)?.to_owned()),
        10 => Value::Unsigned(reader.u64(key)?),
        11 => Value::Signed(i64::from_le_bytes(reader.word(key)?)),
        12 => Value::Float(f64::from_le_bytes(reader.word(key)?)),
        other => return Err(reader.wrong(format!("{key} has the type {other}; expected 0 to 12"))),
    })
}

fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl List {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether its elements are strings.
    pub fn is_text(&self) -> bool {
        self.element == TEXT
    }

    /// Its elements, in order.
    pub fn values(&self) -> impl Iterator<Item = Value> + '_ {
        let mut reader = Reader { file: "", bytes: &self.bytes, at: 0 };
        // They were read without error before, so none is lost here.
        (0..self.count).map_while(move |_| value(&mut reader, self.element, "").ok())
    }

    /// Its elements, if they are strings; none otherwise.
    pub fn texts(&self) -> impl Iterator<Item = &str> + '_ {
        let mut reader = Reader { file: "", bytes: &self.bytes, at: 0 };
        let count = if self.is_text() { self.count } else { 0 };
        (0..count).map_while(move |_| reader.text("").ok())
    }
}

impl Value {
    /// A whole number that is not negative.
    pub fn whole(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(n) => write!(f, "{n}"),
            Value::Signed(n) => write!(f, "{n}"),
            Value::Float(n) => write!(f, "{n}"),
            Value::Bool(b) => write!(f, "{b}"),
            // A template is a page of text: its beginning tells it.
            Value::Text(text) => write!(f, "{:?}", text.chars().take(40).collect::<String>()),
            Value::List(list) => write!(f, "a list of {}", list.len()),
        }
    }
}

impl Metadata {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// What a message calls the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The error that `key` is not as expected.
    pub fn wrong(&self, key: &str, expected: impl Into<String>, got: impl fmt::Display) -> Error {
        Error::Metadata {
            file: self.file.clone(),
            key: key.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, expected, value)),
        }
    }

    fn present<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| self.wrong(key, expected, "nothing"))
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number", Value::whole)
    }

    pub fn size_or(&self, key: &str, default: u64) -> Result<u64, Error> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    pub fn size(&self, key: &str) -> Result<u64, Error> {
        self.present(key, "a whole number", self.optional_size(key)?)
    }

    pub fn optional_number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |value| match value {
            Value::Float(n) => Some(*n),
            other => other.whole().map(|n| n as f64),
        })
    }

    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    pub fn optional_text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub fn text(&self, key: &str) -> Result<&str, Error> {
        self.present(key, "a string", self.optional_text(key)?)
    }

    pub fn optional_list(&self, key: &str) -> Result<Option<&List>, Error> {
        self.typed(key, "a list", |value| match value {
            Value::List(list) => Some(list),
            _ => None,
        })
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<&List, Error> {
        let expected = "a list of strings";
        let list = self.present(key, expected, self.optional_list(key)?)?;
        match list.is_text() || list.is_empty() {
            true => Ok(list),
            false => Err(self.wrong(key, expected, "a list of numbers")),
        }
    }

    /// Whole numbers: a list of `count`, or one number that stands for as many; 0 where there is nothing.
    pub fn sizes(&self, key: &str, count: usize) -> Result<Vec<u64>, Error> {
        let expected = format!("a whole number or a list of {count}");
        match self.get(key) {
            None => Ok(vec![0; count]),
            Some(Value::List(list)) if list.len() == count => {
                let sizes: Option<Vec<u64>> = list.values().map(|value| value.whole()).collect();
                sizes.ok_or_else(|| self.wrong(key, expected, "other elements"))
            }
            Some(value) => match value.whole() {
                Some(size) => Ok(vec![size; count]),
                None => Err(self.wrong(key, expected, value)),
            },
        }
    }
}
