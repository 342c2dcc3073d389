//! A grammar for tool calls, from the tools' schemas, in the XML that the template renders history with:
//!
//! ```text
//! <tool_call>⏎<function=NAME>⏎(<parameter=KEY>⏎VALUE⏎</parameter>⏎)*</function>⏎</tool_call>
//! ```
//!
//! Whatever it allows, the decoder reads as a call whose arguments fit the schema. It is written in Lark, as the room
//! `sample` compiles it; values that are JSON are named parts of it, to be compiled from their schemas.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::Tool;
use super::decoder::TagIds;
use super::markup::Tag;
use super::schema::{Schema, Types, resolve};

/// Lark, and the schemas of the parts that it names with an `@`.
#[derive(Debug, Clone, PartialEq)]
pub struct CallGrammar {
    pub lark: String,
    pub schemas: Vec<(String, Value)>,
}

/// How much is to be in the shape of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallForm {
    /// One call, from its `<tool_call>` to its `</tool_call>`.
    One,
    /// A whole answer: one call, or with `many` one after the other.
    Answer { many: bool },
    /// The same, or else the part `@answer`, which the caller has.
    OrAnswer { many: bool },
}

/// How closely values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// To their schemas.
    Full,
    /// To their types: for schemas that ask for more than a grammar can hold.
    Types,
}

/// The form of `tools`. Errors: a name that the markup cannot spell, in words.
pub fn grammar(tools: &[Tool], form: CallForm, detail: Detail, ids: &TagIds) -> Result<CallGrammar, String> {
    let mut writer =
        Writer { detail, lark: String::new(), schemas: Vec::new(), terminals: String::new(), rules: 0 };
    let [open, close] = [Tag::Call, Tag::EndCall].map(|tag| match ids.tags[tag as usize] {
        Some(id) => format!("<[{id}]>"),
        None => literal(tag.text()),
    });
    let many = match form {
        CallForm::One => "",
        CallForm::Answer { many } | CallForm::OrAnswer { many } if many => " (\"\\n\" call)*",
        CallForm::Answer { .. } | CallForm::OrAnswer { .. } => "",
    };
    // History has a line break before and after each call of a turn; models write what they have read.
    let start = match form {
        CallForm::One => "call".to_string(),
        CallForm::Answer { .. } => format!("/\\n{{0,2}}/ call{many} \"\\n\"?"),
        CallForm::OrAnswer { .. } => format!("/\\n{{0,2}}/ call{many} \"\\n\"? | @answer"),
    };
    let functions =
        tools.iter().map(|tool| writer.function(tool)).collect::<Result<Vec<_>, String>>()?.join(" | ");
    let lark = format!(
        "start: {start}\ncall: {open} \"\\n<function=\" ({functions}) \"</function>\\n\" {close}\n{}{}{TEXT}",
        writer.lark, writer.terminals,
    );
    Ok(CallGrammar { lark, schemas: writer.schemas })
}

/// A value of free text with its closer, for only both together can be told from what follows. It cannot hold what
/// the decoder would take for the end of the value.
const TEXT: &str = concat!(
    "ANY: /(?s:.*)/\n",
    r"ENDS: /(?s:.*)(<\s*\/\s*parameter\s*>|<\s*parameter\s*=",
    r"|<\s*\/\s*function\s*>\s*<\s*function\s*=)(?s:.*)/",
    "\nCLOSE: \"\\n</parameter>\\n\"\n",
    "TEXT: (ANY & ~ENDS) CLOSE\n",
);

struct Writer {
    detail: Detail,
    lark: String,
    schemas: Vec<(String, Value)>,
    terminals: String,
    rules: usize,
}

impl Writer {
    /// The rule of one function's call, after `<function=`.
    fn function(&mut self, tool: &Tool) -> Result<String, String> {
        let name = spelled(&tool.name)?;
        let none = Value::Null;
        let root = tool.parameters.as_ref().unwrap_or(&none);
        let node = resolve(root, root, 0).unwrap_or(root);
        let properties = node.get("properties").and_then(Value::as_object);
        let required: Vec<&str> = node
            .get("required")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let mut body = String::new();
        let declared = properties.into_iter().flatten().map(|(key, schema)| (key.as_str(), Some(schema)));
        let known = |key: &str| properties.is_some_and(|properties| properties.contains_key(key));
        let undeclared = required.iter().filter(|key| !known(key)).map(|key| (*key, None));
        let keys: Vec<(&str, Option<&Value>)> = declared.chain(undeclared).collect();
        for (key, schema) in &keys {
            let needed = required.contains(key);
            let spelling = match spelled(key) {
                Ok(key) => key,
                Err(error) if needed => return Err(error),
                Err(_) => continue,
            };
            // A schema that nothing fits belongs to a parameter that must not be given.
            if !needed && *schema == Some(&Value::Bool(false)) {
                continue;
            }
            let value = self.value(root, schema.unwrap_or(&Value::Null))?;
            let open = literal(&format!("<parameter={spelling}>\n"));
            let _ = write!(body, " ({open} {value}){}", if needed { "" } else { "?" });
        }
        if self.takes_others(node, properties.is_some()) {
            let names: Vec<String> = keys.iter().map(|(key, _)| escaped(key)).collect();
            let others = self.terminal(&if names.is_empty() {
                "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/".into()
            } else {
                format!("/[A-Za-z_][A-Za-z0-9_.-]{{0,63}}/ & ~/({})/", names.join("|"))
            });
            let _ = write!(body, " (\"<parameter=\" {others} \">\\n\" TEXT)*");
        }
        let rule = self.name("function");
        let _ = writeln!(self.lark, "{rule}: {}{body}", literal(&format!("{name}>\n")));
        Ok(rule)
    }

    /// Whether parameters without a declaration may be given; they are read as strings.
    fn takes_others(&self, node: &Value, declares: bool) -> bool {
        match node.get("additionalProperties") {
            None => node.is_object() && !declares && node.get("type").is_some(),
            Some(Value::Bool(yes)) => *yes,
            Some(schema) => {
                let parameters = json!({"properties": {"other": schema}});
                Schema::of_parameter(Some(&parameters), "other").types() == Types::STRING
                    && ["enum", "const", "pattern", "minLength", "maxLength"]
                        .iter()
                        .all(|name| schema.get(name).is_none())
            }
        }
    }

    /// A value with its closer.
    fn value(&mut self, root: &Value, schema: &Value) -> Result<String, String> {
        let mut forms = Vec::new();
        self.forms(root, schema, 0, &mut forms)?;
        if forms.is_empty() {
            return Err("a parameter's schema allows no value".into());
        }
        forms.dedup();
        let rule = self.name("value");
        let _ = writeln!(self.lark, "{rule}: {}", forms.join(" | "));
        Ok(rule)
    }

    /// The ways in which a value may be written.
    fn forms(
        &mut self,
        root: &Value,
        schema: &Value,
        depth: usize,
        out: &mut Vec<String>,
    ) -> Result<(), String> {
        /// Schemas may refer to themselves; deeper alternatives are JSON, which knows recursion.
        const DEPTH_MAX: usize = 8;
        let node = resolve(root, schema, 0).unwrap_or(schema);
        let types = types(root, node);
        if let Some(values) = listed(node) {
            for value in values {
                let text = match value {
                    Value::String(text) if !ends_value(text) => text.clone(),
                    Value::String(_) => continue,
                    other => other.to_string(),
                };
                out.push(literal(&format!("{text}\n</parameter>\n")));
            }
            return Ok(());
        }
        let branches = ["anyOf", "oneOf"].iter().find_map(|name| node.get(*name)?.as_array());
        if let Some(branches) = branches.filter(|_| depth < DEPTH_MAX) {
            return branches.iter().try_for_each(|branch| self.forms(root, branch, depth + 1, out));
        }
        if types == Types::BOOLEAN {
            // The template writes history as Python does.
            out.push("(\"true\" | \"false\" | \"True\" | \"False\") CLOSE".into());
        } else if types == Types::STRING {
            out.push(self.text(node));
        } else if types.has(Types::STRING) {
            // Text that opens like JSON would be read as it.
            let plain = self.terminal("(/([^\\[{](?s:.*))?/ & ~ENDS) CLOSE");
            out.push(if types.has(Types::ARRAY) || types.has(Types::OBJECT) { plain } else { "TEXT".into() });
            self.structured(root, node, types, out);
        } else if types == Types::NUMBER && !is_bounded(node) || types == Types::NUMBER && self.is_loose() {
            // As many digits as a double holds: what it cannot hold would be read as text.
            out.push("/-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,16})?([eE][-+]?[0-9]{1,2})?/ CLOSE".into());
        } else {
            out.push(format!("@{} CLOSE", self.part(root, node)));
        }
        Ok(())
    }

    /// Of a value that may also be text: what is an array or an object.
    fn structured(&mut self, root: &Value, node: &Value, types: Types, out: &mut Vec<String>) {
        for (kind, name) in [(Types::ARRAY, "array"), (Types::OBJECT, "object")] {
            if let (true, Value::Object(map)) = (types.has(kind), node) {
                let mut map = map.clone();
                map.insert("type".into(), name.into());
                out.push(format!("@{} CLOSE", self.part(root, &Value::Object(map))));
            }
        }
    }

    /// Free text within what the schema says of its length and pattern.
    fn text(&mut self, node: &Value) -> String {
        let len = |name| node.get(name).and_then(Value::as_u64);
        let (least, most, pattern) =
            (len("minLength"), len("maxLength"), node.get("pattern").and_then(Value::as_str));
        if self.is_loose() || (least, most, pattern) == (None, None, None) {
            return "TEXT".into();
        }
        let mut conditions = vec!["~ENDS".to_string()];
        if least.is_some() || most.is_some() {
            // Counting costs a state for each character; beyond this a limit is not one that a model meets by chance.
            const COUNTED_MAX: u64 = 1000;
            let least = least.unwrap_or(0).min(COUNTED_MAX);
            let most =
                most.filter(|most| *most <= COUNTED_MAX).map_or(String::new(), |most| most.to_string());
            conditions.push(format!("/(?s:.){{{least},{most}}}/"));
        }
        if let Some(pattern) = pattern {
            conditions.push(format!("/{}/", unanchored(pattern)));
        }
        self.terminal(&format!("(ANY & {}) CLOSE", conditions.join(" & ")))
    }

    /// A named part: the schema with all that it may refer to.
    fn part(&mut self, root: &Value, node: &Value) -> String {
        let mut schema = match node {
            Value::Object(map) if !self.is_loose() => map.clone(),
            Value::Object(map) => map.iter().filter(|(key, _)| *key == "type").map(owned).collect(),
            _ => Map::new(),
        };
        for definitions in ["$defs", "definitions"] {
            if let (Some(all), false) = (root.get(definitions), self.is_loose()) {
                schema.entry(definitions).or_insert_with(|| all.clone());
            }
        }
        let name = format!("json{}", self.schemas.len());
        self.schemas.push((name.clone(), Value::Object(schema)));
        name
    }

    fn is_loose(&self) -> bool {
        self.detail == Detail::Types
    }

    fn name(&mut self, kind: &str) -> String {
        self.rules += 1;
        format!("{kind}{}", self.rules)
    }

    fn terminal(&mut self, expression: &str) -> String {
        let name = self.name("T");
        let _ = writeln!(self.terminals, "{name}: {expression}");
        name
    }
}

fn owned((key, value): (&String, &Value)) -> (String, Value) {
    (key.clone(), value.clone())
}

/// As the decoder sees them.
fn types(root: &Value, node: &Value) -> Types {
    let mut parameters = Map::new();
    for definitions in ["$defs", "definitions"] {
        if let Some(all) = root.get(definitions) {
            parameters.insert(definitions.into(), all.clone());
        }
    }
    parameters.insert("properties".into(), json!({"it": node}));
    Schema::of_parameter(Some(&Value::Object(parameters)), "it").types()
}

/// The values of an enumeration or constant.
fn listed(node: &Value) -> Option<Vec<&Value>> {
    match (node.get("enum"), node.get("const")) {
        (_, Some(value)) => Some(vec![value]),
        (Some(Value::Array(values)), None) => Some(values.iter().collect()),
        _ => None,
    }
}

fn is_bounded(node: &Value) -> bool {
    ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]
        .iter()
        .any(|name| node.get(name).is_some())
}

/// Text that the decoder would cut.
fn ends_value(text: &str) -> bool {
    ["</parameter>", "<parameter=", "</function>"].iter().any(|end| text.contains(end))
}

/// A name as it stands in the markup, which trims it and ends it at a bracket.
fn spelled(name: &str) -> Result<&str, String> {
    if name.trim() != name || name.is_empty() || name.contains(['<', '>', '\n']) {
        return Err(format!("the name {name:?} cannot be written in a call"));
    }
    Ok(name)
}

/// A Lark string is written as a JSON string is.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// The text as a regular expression between slashes.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if !c.is_alphanumeric() && c != '_' && c.is_ascii() && !c.is_ascii_control() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A schema's pattern may match anywhere; between slashes an expression matches the whole.
fn unanchored(pattern: &str) -> String {
    let (head, pattern) = match pattern.strip_prefix('^') {
        Some(rest) => ("", rest),
        None => ("(?s:.*)", pattern),
    };
    let (tail, pattern) = match pattern.strip_suffix('$') {
        Some(rest) if !rest.ends_with('\\') => ("", rest),
        _ => ("(?s:.*)", pattern),
    };
    let mut inner = String::new();
    let mut escape = false;
    for c in pattern.chars() {
        match c {
            '/' if !escape => inner.push_str("\\/"),
            '\n' => inner.push_str("\\n"),
            c => inner.push(c),
        }
        escape = c == '\\' && !escape;
    }
    format!("{head}(?:{inner}){tail}")
}
