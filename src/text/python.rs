//! What Python's Jinja has and minijinja has otherwise: the spelling of floats, `tojson`, `strftime_now`,
//! `raise_exception`.

use std::fmt;
use std::sync::Arc;

use jiff::Zoned;
use minijinja::value::{Kwargs, Object, ObjectRepr, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::{guard::Guard, json};

/// A template's refusal, carried as the source of the engine's error so that it can be told from a failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Raised(pub String);

/// A float that minijinja would spell otherwise than Python (`1e+20`). It prints as Python prints it, in every place
/// a value can be printed; it is no longer a number to arithmetic, which no chat template does on arguments.
#[derive(Debug)]
struct Float(f64);

impl Object for Float {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&json::float(self.0))
    }
}

/// JSON to a template's value: key order kept, strings guarded, floats with Python's spelling.
pub fn value(given: &serde_json::Value, guard: &Guard<'_>) -> Value {
    match given {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, Some(x)) => {
                let plain = Value::from(x);
                if plain.to_string() == json::float(x) { plain } else { Value::from_object(Float(x)) }
            }
            _ => Value::from(number.to_string()),
        },
        serde_json::Value::String(text) => Value::from(guard.mark(text)),
        serde_json::Value::Array(items) => items.iter().map(|item| value(item, guard)).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (guard.mark(key), value(item, guard))))
        }
    }
}

/// Adds the filters and functions that Hugging Face gives to every chat template.
pub fn extend(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", to_json);
    // Jinja2 asks what a value can do, so strings and mappings are sequences, None is not iterable, and True is a
    // number; undefined is empty but all of these.
    env.add_test("iterable", |given: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(given.kind(), Iterable | Map | Seq | String | Undefined)
    });
    env.add_test("sequence", |given: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(given.kind(), Map | Seq | String | Undefined)
    });
    env.add_test("number", |given: &Value| {
        is_float(given) || matches!(given.kind(), ValueKind::Number | ValueKind::Bool)
    });
    env.add_test("float", |given: &Value| {
        is_float(given) || given.kind() == ValueKind::Number && !given.is_integer()
    });
    env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
}

fn is_float(given: &Value) -> bool {
    given.downcast_object_ref::<Float>().is_some()
}

/// `strftime_now(format)`: the time of rendering, in the machine's zone.
pub fn strftime(format: &str, now: &Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// `tojson`: `json.dumps(value, ensure_ascii=False)`, with `indent`, `separators`, `sort_keys`, `ensure_ascii`.
fn to_json(given: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|value| !value.is_none() && !value.is_undefined()) {
        None => None,
        Some(value) => match value.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(usize::try_from(value)?.min(MAX_INDENT))),
        },
    };
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
        // As in Python: with an indent the line break takes the place of the space.
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let writer = Writer {
        indent,
        comma,
        colon,
        sort: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    writer.write(given, 0, &mut out)?;
    Ok(Value::from(out))
}

/// More indentation than this helps nobody and costs memory.
const MAX_INDENT: usize = 64;
/// Nesting that a template can build but no client means.
const MAX_DEPTH: usize = 128;

struct Writer {
    indent: Option<String>,
    comma: String,
    colon: String,
    sort: bool,
    ascii: bool,
}

impl Writer {
    fn write(&self, given: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        if let Some(float) = given.downcast_object_ref::<Float>() {
            out.push_str(&json::float(float.0));
            return Ok(());
        }
        match given.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if given.is_true() { "true" } else { "false" }),
            ValueKind::Number if given.is_integer() => out.push_str(&given.to_string()),
            ValueKind::Number => match f64::try_from(given.clone()) {
                Ok(x) => out.push_str(&json::float(x)),
                Err(_) => out.push_str(&given.to_string()),
            },
            ValueKind::String => self.string(given.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = given.try_iter()?.collect();
                self.container('[', ']', items, depth, out, |item, out| self.write(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut pairs: Vec<(Value, Value)> = Vec::new();
                for key in given.try_iter()? {
                    let item = given.get_item(&key)?;
                    pairs.push((key, item));
                }
                if self.sort {
                    pairs.sort_by_key(|pair| pair.0.to_string());
                }
                self.container('{', '}', pairs, depth, out, |(key, item), out| {
                    self.string(&key.to_string(), out);
                    out.push_str(&self.colon);
                    self.write(item, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("tojson: a value of kind {kind} is not JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn container<T>(
        &self,
        open: char,
        close: char,
        items: Vec<T>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.comma);
            }
            new_line(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        let start = out.len();
        json::string(text, out);
        if self.ascii && !out[start..].is_ascii() {
            let written = out.split_off(start);
            for unit in written.encode_utf16() {
                match u8::try_from(unit) {
                    Ok(byte) if byte.is_ascii() => out.push(byte as char),
                    _ => out.push_str(&format!("\\u{unit:04x}")),
                }
            }
        }
    }
}
