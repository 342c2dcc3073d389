//! Ollama's requests, said in the words of `/v1/chat/completions` and `/v1/completions`.

use super::models;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, whole, wrong};
use crate::api::state::App;
use serde_json::{Map, Value, json};

/// What `options` may hold, and its name elsewhere. The rest (`num_ctx`, `num_gpu`, `mirostat` …) says how Ollama
/// shall run a model, which this server has decided when it started.
const OPTIONS: [(&str, &str); 9] = [
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("repeat_penalty", "repetition_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
];

/// Fields of a message, and their names elsewhere.
const MESSAGE: [(&str, &str); 6] = [
    ("role", "role"),
    ("content", "content"),
    ("thinking", "reasoning"),
    ("tool_calls", "tool_calls"),
    ("tool_call_id", "tool_call_id"),
    ("tool_name", "name"),
];

/// Our own fields, which mean the same on every route.
const OWN: [&str; 4] = ["priority", "cache_salt", "speculation", "timeout"];

/// What every request for an answer says.
pub struct Asked {
    /// As the client wrote it; answers repeat it so.
    pub model: String,
    /// The name that the model is served under.
    pub served: String,
    pub stream: bool,
    /// `keep_alive` is 0.
    pub unload: bool,
}

impl Asked {
    /// Errors: 400 for what cannot be read, 404 for a model that is not served.
    pub fn read(app: &App, body: &Map<String, Value>) -> Result<Self, ApiError> {
        let fields = Fields::top(body);
        let model = models::named(&fields)?;
        Ok(Self {
            model: model.to_owned(),
            served: models::served(app, model)?,
            stream: fields.bool("stream")?.unwrap_or(true),
            unload: keep_alive(&fields)? == Some(0.0),
        })
    }
}

/// A `/api/chat` as a chat; `None` if it holds no messages, which asks for the model and for no answer.
pub fn chat(body: &Map<String, Value>, asked: &Asked) -> Result<Option<Map<String, Value>>, ApiError> {
    let fields = Fields::top(body);
    let messages = fields.array("messages")?.unwrap_or_default();
    if messages.is_empty() {
        return Ok(None);
    }
    let mut chat = common(&fields, asked)?;
    let messages =
        messages.iter().enumerate().map(|(index, value)| message(value, format!("messages[{index}]")));
    chat.insert("messages".into(), messages.collect::<Result<_, _>>()?);
    if let Some(tools) = fields.array("tools")? {
        chat.insert("tools".into(), tools.iter().map(tool).collect());
    }
    Ok(Some(chat))
}

/// A `/api/generate` in other words.
pub enum Generate {
    /// No prompt: asks for the model and for no answer.
    Nothing,
    /// A chat of one turn, behind the ids of earlier ones.
    Turn { chat: Map<String, Value>, before: Vec<u32> },
    /// A completion.
    Raw(Map<String, Value>),
}

pub fn generate(body: &Map<String, Value>, asked: &Asked) -> Result<Generate, ApiError> {
    let fields = Fields::top(body);
    refuse_images(&fields)?;
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(
            fields.bad("suffix", "`suffix` is not supported: this model does not fill in the middle.")
        );
    }
    let given = |text: Option<&'_ str>| text.is_some_and(|text| !text.is_empty());
    let (system, template) = (fields.string("system")?, fields.string("template")?);
    let before = fields.ids("context", u32::MAX as usize)?.unwrap_or_default();
    let raw = fields.bool("raw")?.unwrap_or(false);
    if raw && (given(system) || given(template) || !before.is_empty()) {
        return Err(fields.bad("raw", "raw mode does not support template, system, or context"));
    }
    if given(template) {
        return Err(fields.bad("template", "`template` is not supported: the model's own template is used."));
    }
    let prompt = fields.string("prompt")?.unwrap_or_default();
    if prompt.is_empty() {
        return Ok(Generate::Nothing);
    }
    let mut map = common(&fields, asked)?;
    if raw {
        map.insert("prompt".into(), json!(prompt));
        scores_of_completion(&mut map);
        // A completion's own default is 16 tokens; Ollama goes on to the end of the context.
        map.entry("max_tokens").or_insert(json!(i64::MAX));
        return Ok(Generate::Raw(map));
    }
    let system = system.filter(|system| !system.is_empty());
    let system = system.map(|system| json!({"role": "system", "content": system}));
    let turns = system.into_iter().chain([json!({"role": "user", "content": prompt})]);
    map.insert("messages".into(), turns.collect());
    // They come back as the context of the next turn.
    map.insert("return_token_ids".into(), json!(true));
    Ok(Generate::Turn { chat: map, before })
}

/// A completion's `logprobs` is the number of alternatives.
fn scores_of_completion(map: &mut Map<String, Value>) {
    let top = map.remove("top_logprobs").unwrap_or(json!(0));
    if map.remove("logprobs") == Some(json!(true)) {
        map.insert("logprobs".into(), top);
    }
}

/// An error about a field that was said in other words, in the client's own.
pub fn in_own_words(error: ApiError) -> ApiError {
    let ApiError::BadRequest { message, param: Some(param) } = error else { return error };
    let own = match OPTIONS.iter().find(|(_, elsewhere)| *elsewhere == param) {
        Some((option, _)) => format!("options.{option}"),
        None if param.starts_with("response_format") => "format".to_owned(),
        None => return ApiError::BadRequest { message, param: Some(param) },
    };
    let message = message.replace(&format!("`{param}`"), &format!("`{own}`"));
    ApiError::BadRequest { message, param: Some(own) }
}

/// All but what is to be answered.
fn common(fields: &Fields, asked: &Asked) -> Result<Map<String, Value>, ApiError> {
    let mut map = Map::new();
    map.insert("model".into(), json!(asked.served));
    map.insert("stream".into(), json!(asked.stream));
    // Who asks for more than there is means all of it.
    map.insert("clamp_max_tokens".into(), json!(true));
    for name in OWN.into_iter().chain(["logprobs", "top_logprobs"]) {
        if let Some(value) = fields.get(name) {
            map.insert(name.into(), value.clone());
        }
    }
    if let Some(effort) = effort(fields)? {
        map.insert("reasoning_effort".into(), json!(effort));
    }
    if let Some(format) = format(fields)? {
        map.insert("response_format".into(), format);
    }
    if let Some(own) = fields.object("options")? {
        options(&own, &mut map)?;
    }
    Ok(map)
}

fn options(options: &Fields, map: &mut Map<String, Value>) -> Result<(), ApiError> {
    for (name, elsewhere) in OPTIONS {
        if let Some(value) = options.get(name) {
            map.insert(elsewhere.into(), value.clone());
        }
    }
    // Looking back no tokens at all is how Ollama's clients switch the penalty off.
    if options.integer("repeat_last_n", i64::MIN..=i64::MAX)? == Some(0) {
        map.insert("repetition_penalty".into(), json!(1));
    }
    // -1 is no limit, -2 what the context leaves: the same thing here.
    let most = options.integer("num_predict", i64::MIN..=i64::MAX)?;
    if let Some(most) = most.filter(|most| *most > 0) {
        map.insert("max_tokens".into(), json!(most));
    }
    Ok(())
}

/// `think` as `reasoning_effort`.
fn effort(fields: &Fields) -> Result<Option<&'static str>, ApiError> {
    const LEVELS: [&str; 4] = ["low", "medium", "high", "max"];
    let Some(value) = fields.get("think") else { return Ok(None) };
    let level = match value {
        Value::Bool(false) => Some("none"),
        Value::Bool(true) => Some("medium"),
        Value::String(level) => LEVELS.into_iter().find(|known| known == level),
        _ => None,
    };
    level.map(Some).ok_or_else(|| wrong("think", "true, false, low, medium, high or max", value))
}

fn format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(value) = fields.get("format") else { return Ok(None) };
    match value {
        Value::String(none) if none.is_empty() => Ok(None),
        Value::String(json) if json == "json" => Ok(Some(json!({"type": "json_object"}))),
        Value::Object(_) => Ok(Some(json!({
            "type": "json_schema", "json_schema": {"name": "format", "schema": value},
        }))),
        other => Err(wrong("format", "\"json\" or a JSON schema", other)),
    }
}

fn message(value: &Value, path: String) -> Result<Value, ApiError> {
    let fields = Fields::object_at(value, path)?;
    refuse_images(&fields)?;
    fields.string("thinking")?;
    let named = |(name, elsewhere): (&str, &str)| Some((elsewhere.to_owned(), fields.get(name)?.clone()));
    Ok(Value::Object(MESSAGE.into_iter().filter_map(named).collect()))
}

/// Ollama takes a tool that does not say what it is for a function.
fn tool(value: &Value) -> Value {
    let mut tool = value.clone();
    if let Value::Object(map) = &mut tool
        && map.get("type").is_none_or(Value::is_null)
    {
        map.insert("type".into(), json!("function"));
    }
    tool
}

fn refuse_images(fields: &Fields) -> Result<(), ApiError> {
    match fields.array("images")? {
        None | Some([]) => Ok(()),
        Some(_) => {
            let message =
                format!("`{}` cannot be read: this is not a multimodal model.", fields.path("images"));
            Err(fields.bad("images", message))
        }
    }
}

/// Seconds; negative is for ever.
fn keep_alive(fields: &Fields) -> Result<Option<f64>, ApiError> {
    let Some(value) = fields.get("keep_alive") else { return Ok(None) };
    let read = match value {
        Value::Number(_) => whole(value).map(|seconds| seconds as f64).or(value.as_f64()),
        Value::String(text) => seconds(text),
        _ => None,
    };
    read.map(Some).ok_or_else(|| wrong("keep_alive", "seconds or a duration like 5m", value))
}

/// `90`, `5m`, `1h30m`, `-1`: numbers with units, or one without.
fn seconds(text: &str) -> Option<f64> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest.chars().all(is_number) {
        return rest.parse::<f64>().ok().map(|seconds| sign * seconds);
    }
    let mut sum = 0.0;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c| !is_number(c))?);
        let (unit, after) = after.split_at(after.find(is_number).unwrap_or(after.len()));
        sum += number.parse::<f64>().ok()? * seconds_of(unit)?;
        rest = after;
    }
    Some(sign * sum)
}

fn seconds_of(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1e-9,
        "us" | "µs" | "μs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units_or_one_without() {
        let check = |text: &str, expected: Option<f64>| assert_eq!(seconds(text), expected, "{text}");
        check("5m", Some(300.0));
        check("1h30m", Some(5400.0));
        check("-1", Some(-1.0));
        check("-1m", Some(-60.0));
        check("+1.5h", Some(5400.0));
        check("0", Some(0.0));
        check("0s", Some(0.0));
        check("250ms", Some(0.25));
        check("2µs", Some(2e-6));
        for wrong in ["", "-", "m", "5 m", "5m3", "5x", "1.2.3s", "inf", "nan", "1e3", "m5"] {
            check(wrong, None);
        }
    }

    #[test]
    fn a_penalty_that_looks_back_at_nothing_is_none() {
        let check = |given: Value, expected: Value| {
            let (Value::Object(given), mut map) = (&given, Map::new()) else {
                panic!("the test gives an object")
            };
            options(&Fields::top(given), &mut map).expect("valid");
            assert_eq!(Value::Object(map), expected);
        };
        check(json!({"repeat_penalty": 1.1}), json!({"repetition_penalty": 1.1}));
        check(json!({"repeat_penalty": 1.1, "repeat_last_n": 64}), json!({"repetition_penalty": 1.1}));
        check(json!({"repeat_penalty": 1.1, "repeat_last_n": 0}), json!({"repetition_penalty": 1}));
        check(json!({"num_predict": -1, "num_ctx": 4096, "seed": 3}), json!({"seed": 3}));
    }

    #[test]
    fn errors_name_the_field_that_the_client_wrote() {
        let check = |param: &str, own: &str| {
            let error = in_own_words(ApiError::bad(param, format!("`{param}` is wrong.")));
            assert_eq!(error, ApiError::bad(own, format!("`{own}` is wrong.")));
        };
        check("temperature", "options.temperature");
        check("repetition_penalty", "options.repeat_penalty");
        check("response_format.json_schema.schema", "format");
        check("messages[0].role", "messages[0].role");
    }
}
