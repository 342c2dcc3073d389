//! What a request wants its answer to be: `response_format`, `structured_outputs`, and the `guided_*` fields that
//! vLLM had before.

use crate::api::error::{ApiError, cut};
use crate::api::fields::{Fields, wrong};
use crate::sample::steer::{Source, Spaces};
use serde_json::{Value, json};

/// A constraint of the whole answer, and the field that asks for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Constraint {
    pub param: String,
    pub source: Source,
    /// Asked for by a name that vLLM has dropped.
    pub deprecated: bool,
}

/// The names of `structured_outputs` and what came before each.
const KINDS: [(&str, &str); 4] = [
    ("json", "guided_json"),
    ("regex", "guided_regex"),
    ("choice", "guided_choice"),
    ("grammar", "guided_grammar"),
];

/// The one constraint of a request. Errors: a field that is malformed, or several that each want the answer.
pub fn read(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    let mut found: Option<Constraint> = None;
    for constraint in [response_format(fields)?, structured(fields)?].into_iter().chain(guided(fields)?) {
        let Some(constraint) = constraint else { continue };
        if let Some(other) = &found {
            let message = format!("`{}` and `{}` exclude each other.", other.param, constraint.param);
            return Err(ApiError::bad(constraint.param, message));
        }
        found = Some(constraint);
    }
    Ok(found)
}

fn response_format(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    let constraint = |param: &str, schema: Value| {
        let source = Source::Schema { schema, spaces: Spaces::default() };
        Ok(Some(Constraint { param: param.into(), source, deprecated: false }))
    };
    match format.required("type")?.as_str() {
        Some("text") => Ok(None),
        // Some servers take the schema here; it narrows what was asked for.
        Some("json_object") => match format.get("schema") {
            None => constraint("response_format", any_object()),
            Some(value) => constraint("response_format.schema", schema(value, "response_format.schema")?),
        },
        Some("json_schema") => {
            let named = format.object("json_schema")?.ok_or_else(|| {
                format.bad("json_schema", "`response_format.json_schema` is required with this type.")
            })?;
            let path = named.path("schema");
            constraint(&path, schema(named.required("schema")?, &path)?)
        }
        Some("structural_tag") => Err(structural_tag("response_format")),
        _ => Err(format.bad("type", "`response_format.type` must be text, json_object or json_schema.")),
    }
}

fn structured(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    let Some(outputs) = fields.object("structured_outputs")? else { return Ok(None) };
    if outputs.get("structural_tag").is_some() {
        return Err(structural_tag("structured_outputs.structural_tag"));
    }
    let spaces = match (outputs.string("whitespace_pattern")?, outputs.bool("disable_any_whitespace")?) {
        (Some(pattern), _) => Spaces::Pattern(pattern.to_owned()),
        (None, Some(true)) => Spaces::Fixed,
        (None, _) => Spaces::default(),
    };
    let mut sources = Vec::new();
    for (name, _) in KINDS {
        if let Some(value) = outputs.get(name) {
            sources.push((outputs.path(name), source(name, value, &outputs.path(name), &spaces)?));
        }
    }
    if outputs.bool("json_object")? == Some(true) {
        sources.push((outputs.path("json_object"), Source::Schema { schema: any_object(), spaces }));
    }
    match sources.len() {
        1 => Ok(sources.pop().map(|(param, source)| Constraint { param, source, deprecated: false })),
        count => Err(fields.bad(
            "structured_outputs",
            format!(
                "`structured_outputs` must hold exactly one of json, regex, choice, grammar and json_object, \
                 got {count}."
            ),
        )),
    }
}

/// The fields that vLLM 0.12 dropped and has ignored since: a constraint is never ignored here.
fn guided(fields: &Fields) -> Result<Vec<Option<Constraint>>, ApiError> {
    // It chose among implementations; there is one here.
    fields.string("guided_decoding_backend")?;
    let spaces = match fields.string("guided_whitespace_pattern")? {
        Some(pattern) => Spaces::Pattern(pattern.to_owned()),
        None => Spaces::default(),
    };
    KINDS
        .iter()
        .filter_map(|(kind, name)| Some((kind, name, fields.get(name)?)))
        .map(|(kind, name, value)| {
            let source = source(kind, value, name, &spaces)?;
            Ok(Some(Constraint { param: (*name).into(), source, deprecated: true }))
        })
        .collect()
}

fn source(kind: &str, value: &Value, path: &str, spaces: &Spaces) -> Result<Source, ApiError> {
    let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong(path, "a string", value));
    Ok(match kind {
        "json" => Source::Schema { schema: schema(value, path)?, spaces: spaces.clone() },
        "regex" => Source::Regex(text()?),
        "choice" => Source::Choice(choice(value, path)?),
        _ => Source::Lark(lark(text()?)),
    })
}

/// A schema, or the text of one.
fn schema(value: &Value, path: &str) -> Result<Value, ApiError> {
    match value {
        Value::Object(_) | Value::Bool(true) => Ok(value.clone()),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(read @ (Value::Object(_) | Value::Bool(true))) => Ok(read),
            Ok(other) => Err(wrong(path, "a JSON schema", &other)),
            Err(error) => Err(ApiError::bad(path, format!("`{path}` must be a JSON schema: {error}."))),
        },
        other => Err(wrong(path, "a JSON schema", other)),
    }
}

fn choice(value: &Value, path: &str) -> Result<Vec<String>, ApiError> {
    let items = value.as_array().filter(|items| !items.is_empty());
    let texts = items.and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect());
    let texts: Vec<String> = texts.ok_or_else(|| wrong(path, "a non-empty list of strings", value))?;
    if texts.iter().any(String::is_empty) {
        return Err(ApiError::bad(path, format!("`{path}` must not hold an empty string.")));
    }
    Ok(texts)
}

/// Lark as it is; rules in EBNF's spelling (`root ::= …`) become Lark's, in which the first rule is named `start`.
fn lark(text: String) -> String {
    if !text.contains("::=") {
        return text;
    }
    let mut rules: Vec<String> = Vec::new();
    for line in text.lines() {
        match line.split_once("::=") {
            Some((name, body)) => rules.push(format!("{}: {}", rule_name(name.trim()), rule_body(body))),
            None => {
                if let Some(last) = rules.last_mut() {
                    last.push(' ');
                    last.push_str(&rule_body(line));
                }
            }
        }
    }
    rules.join("\n")
}

/// EBNF's names have hyphens and capitals; those of Lark's rules have neither.
fn rule_name(name: &str) -> String {
    match name {
        "root" => "start".into(),
        other => other.replace('-', "_").to_lowercase(),
    }
}

/// Names outside of quotes and brackets are renamed; a class of characters becomes a regular expression.
fn rule_body(body: &str) -> String {
    let mut out = String::new();
    let mut rest = body;
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '"' | '[' => {
                let close = if first == '"' { '"' } else { ']' };
                let mut escaped = false;
                let end = rest.char_indices().skip(1).find(|(_, c)| {
                    let ends = *c == close && !escaped;
                    escaped = *c == '\\' && !escaped;
                    ends
                });
                end.map_or(rest.len(), |(at, c)| at + c.len_utf8())
            }
            '#' => break,
            c if c.is_alphabetic() => {
                rest.find(|c: char| !c.is_alphanumeric() && c != '-' && c != '_').unwrap_or(rest.len())
            }
            c => c.len_utf8(),
        };
        let (piece, after) = rest.split_at(len);
        match first {
            '[' => out.push_str(&format!("/{}/", piece.replace('/', "\\/"))),
            c if c.is_alphabetic() => out.push_str(&rule_name(piece)),
            _ => out.push_str(piece),
        }
        rest = after;
    }
    out
}

fn any_object() -> Value {
    json!({"type": "object"})
}

fn structural_tag(param: &str) -> ApiError {
    ApiError::bad(
        param,
        format!("`{}` is not supported; json, regex, choice, grammar and json_object are.", cut(param, 60)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_from(body: Value) -> Result<Option<Constraint>, ApiError> {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        read(&Fields::top(map))
    }

    fn check(body: Value, param: &str, source: Source) {
        let got = read_from(body.clone()).expect("valid").expect("a constraint");
        assert_eq!((got.param.as_str(), &got.source), (param, &source), "{body}");
    }

    fn refused(body: Value, param: &str) {
        let got = read_from(body.clone()).err().map(|error| error.body()["error"]["param"].clone());
        assert_eq!(got, Some(json!(param)), "{body}");
    }

    fn of_schema(schema: Value) -> Source {
        Source::Schema { schema, spaces: Spaces::Bounded }
    }

    #[test]
    fn each_field_has_its_source() {
        let schema = json!({"type": "integer"});
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        check(
            json!({"response_format": format}),
            "response_format.json_schema.schema",
            of_schema(schema.clone()),
        );
        check(
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
            of_schema(any_object()),
        );
        check(json!({"guided_json": schema.to_string()}), "guided_json", of_schema(schema.clone()));
        check(json!({"guided_regex": "a+"}), "guided_regex", Source::Regex("a+".into()));
        check(
            json!({"guided_choice": ["a", "b"]}),
            "guided_choice",
            Source::Choice(vec!["a".into(), "b".into()]),
        );
        check(
            json!({"structured_outputs": {"json": schema, "disable_any_whitespace": true}}),
            "structured_outputs.json",
            Source::Schema { schema: schema.clone(), spaces: Spaces::Fixed },
        );
        check(
            json!({"guided_json": schema, "guided_whitespace_pattern": " ?"}),
            "guided_json",
            Source::Schema { schema: schema.clone(), spaces: Spaces::Pattern(" ?".into()) },
        );
        check(
            json!({"structured_outputs": {"json_object": true}}),
            "structured_outputs.json_object",
            of_schema(any_object()),
        );
        assert_eq!(read_from(json!({"response_format": {"type": "text"}})), Ok(None));
        assert_eq!(read_from(json!({"guided_json": null, "guided_decoding_backend": "xgrammar"})), Ok(None));
    }

    #[test]
    fn malformed_and_doubled_constraints_are_named() {
        refused(json!({"response_format": {"type": "xml"}}), "response_format.type");
        refused(json!({"response_format": {}}), "response_format.type");
        refused(json!({"response_format": "text"}), "response_format");
        refused(json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema");
        let empty = json!({"type": "json_schema", "json_schema": {}});
        refused(json!({"response_format": empty}), "response_format.json_schema.schema");
        refused(json!({"response_format": {"type": "structural_tag"}}), "response_format");
        refused(json!({"structured_outputs": {}}), "structured_outputs");
        refused(json!({"structured_outputs": {"regex": "a", "json": {}}}), "structured_outputs");
        refused(json!({"structured_outputs": {"structural_tag": {}}}), "structured_outputs.structural_tag");
        refused(json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice");
        refused(json!({"guided_choice": ["a", 1]}), "guided_choice");
        refused(json!({"guided_json": "{"}), "guided_json");
        refused(json!({"guided_json": [1]}), "guided_json");
        refused(json!({"guided_regex": 1}), "guided_regex");
        refused(json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice");
        refused(json!({"guided_regex": "a", "response_format": {"type": "json_object"}}), "guided_regex");
    }

    #[test]
    fn ebnf_becomes_lark() {
        let given = "root ::= Item-List \"::\" [a-z/]+ # end\nItem-List ::= \"Item\" | \"x-y\"\n  | \"z\"";
        let expected = "start:  item_list \"::\" /[a-z\\/]/+ \nitem_list:  \"Item\" | \"x-y\"   | \"z\"";
        assert_eq!(lark(given.into()), expected);
        assert_eq!(lark("start: \"a\"".into()), "start: \"a\"");
    }
}
