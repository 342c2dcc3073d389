//! What chat and completions have in common: how to draw ids, when to stop, what to report.

use super::{Rules, speculation};
use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong};
use crate::engine::Speculation;
use crate::sample::SamplingParams;
use std::sync::Arc;
use std::time::Duration;

/// Sequences one request may ask for.
const CHOICES_MAX: i64 = 128;
/// Stop strings one request may hold; matching costs time for each.
const STOPS_MAX: usize = 64;
/// Words one request may ban, and the characters of each: every one is looked for before each draw.
const BAD_WORDS_MAX: usize = 128;
const BAD_WORD_CHARS_MAX: usize = 256;
/// Below this a temperature only overflows the division; vLLM raises it as well.
const TEMPERATURE_MIN: f32 = 0.01;
/// Length of a `cache_salt` and of a client's request id.
const LABEL_CHARS_MAX: usize = 128;
/// Eleven days: longer than any answer takes, short enough to be added to any clock.
const TIMEOUT_SECONDS_MAX: f64 = 1e6;

/// The validated fields both routes share.
#[derive(Debug, Clone, PartialEq)]
pub struct Common {
    /// The served name the client used.
    pub model: String,
    pub n: usize,
    /// `None`: no stream. A plain answer is the stream, collected.
    pub stream: Option<StreamOptions>,
    /// `seed` of the params is not set yet: each choice derives its own from `seed` below.
    pub sampling: SamplingParams,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    /// `stop_token_ids`: reported in `stop_reason`.
    pub stop_ids: Vec<u32>,
    /// As text; which ids those are, the tokenizer knows.
    pub bad_words: Vec<String>,
    pub include_stop: bool,
    pub ignore_eos: bool,
    pub min_tokens: usize,
    /// As asked; the room that the prompt leaves may be less.
    pub max_tokens: Option<usize>,
    pub skip_special: bool,
    /// `-1` (whole vocabulary) is already resolved.
    pub prompt_logprobs: Option<u32>,
    pub truncate_prompt: Option<usize>,
    pub tokens_as_ids: bool,
    pub return_ids: bool,
    /// Part of the answer's id, if the client chose one.
    pub request_id: Option<String>,
    /// Lower is earlier.
    pub priority: i32,
    pub cache_salt: Option<Arc<str>>,
    pub speculation: Speculation,
    /// From arrival to the end of the answer.
    pub timeout: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    pub include_usage: bool,
    pub continuous_usage: bool,
}

impl Common {
    /// Reads the shared fields. `max_tokens` and `logprobs` differ by route, so the route reads them.
    pub fn read(
        fields: &Fields,
        rules: Rules,
        max_tokens: Option<usize>,
        logprobs: Option<u32>,
    ) -> Result<Self, ApiError> {
        let model = rules.model.resolve(fields.string("model")?)?.to_owned();
        let sampling = sampling(fields, rules, logprobs)?;
        let n = fields.integer("n", 1..=CHOICES_MAX)?.unwrap_or(1) as usize;
        if n > 1 && sampling.temperature == 0.0 {
            return Err(fields.bad("n", "`n` must be 1 when using greedy sampling (`temperature` 0)."));
        }
        let stream = stream(fields, rules)?;
        let prompt_logprobs = logprob_count(fields, "prompt_logprobs", rules)?;
        if stream.is_some() && prompt_logprobs.is_some() {
            return Err(fields.bad("prompt_logprobs", "`prompt_logprobs` cannot be streamed."));
        }
        let min_tokens = fields.integer("min_tokens", 0..=i64::MAX)?.unwrap_or(0) as usize;
        if let Some(max) = max_tokens.filter(|max| min_tokens > *max) {
            let message = format!("`min_tokens` must be at most max_tokens={max}, got {min_tokens}.");
            return Err(fields.bad("min_tokens", message));
        }
        Ok(Self {
            model,
            n,
            stream,
            sampling,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.and_then(|seed| u64::try_from(seed).ok()),
            stop: stop(fields)?,
            bad_words: bad_words(fields)?,
            stop_ids: fields.ids("stop_token_ids", rules.model.vocab_size)?.unwrap_or_default(),
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            min_tokens,
            max_tokens,
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            prompt_logprobs,
            truncate_prompt: truncate_prompt(fields, rules)?,
            tokens_as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(rules.options.tokens_as_ids),
            return_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            request_id: request_id(fields)?,
            priority: priority(fields)?,
            cache_salt: cache_salt(fields)?,
            speculation: fields
                .get("speculation")
                .map(|value| speculation(value, &fields.path("speculation")))
                .transpose()?
                .unwrap_or_default(),
            timeout: timeout(fields)?.or(rules.options.timeout),
        })
    }
}

/// `max_tokens` of field `name`. Errors: below `least`, or beyond the context unless it may be clamped.
pub fn max_tokens(fields: &Fields, name: &str, least: i64, rules: Rules) -> Result<Option<usize>, ApiError> {
    let Some(value) = fields.integer(name, least..=i64::MAX)? else { return Ok(None) };
    let context = rules.model.max_model_len;
    let value = usize::try_from(value).unwrap_or(usize::MAX);
    let clamp = fields.bool("clamp_max_tokens")?.unwrap_or(rules.options.clamp_max_tokens);
    if value > context && !clamp {
        let message = format!("`{name}`={value} cannot be greater than max_model_len={context}.");
        return Err(fields.bad(name, message));
    }
    Ok(Some(value.min(context)))
}

/// How many log-probabilities field `name` asks for, within `--max-logprobs`; -1 is the whole vocabulary.
pub fn logprob_count(fields: &Fields, name: &str, rules: Rules) -> Result<Option<u32>, ApiError> {
    let vocab_size = rules.model.vocab_size as u32;
    let Some(count) = fields.integer(name, -1..=i64::MAX)? else { return Ok(None) };
    match (u32::try_from(count), rules.options.max_logprobs) {
        (Err(_), None) => Ok(Some(vocab_size)),
        (Ok(count), None) => Ok(Some(count.min(vocab_size))),
        (Ok(count), Some(max)) if count <= max => Ok(Some(count.min(vocab_size))),
        (_, Some(max)) => {
            Err(fields
                .bad(name, format!("`{name}` must be between 0 and {max} (--max-logprobs), got {count}.")))
        }
    }
}

fn sampling(fields: &Fields, rules: Rules, logprobs: Option<u32>) -> Result<SamplingParams, ApiError> {
    let defaults = rules.model.defaults;
    let penalty = |name| fields.number(name, "between -2 and 2", |value| (-2.0..=2.0).contains(&value));
    let temperature =
        fields.number("temperature", "between 0 and 2", |value| (0.0..=2.0).contains(&value))?;
    let allowed_ids = fields.ids("allowed_token_ids", rules.model.vocab_size)?;
    if allowed_ids.as_ref().is_some_and(Vec::is_empty) {
        return Err(fields.bad("allowed_token_ids", "`allowed_token_ids` must not be empty."));
    }
    Ok(SamplingParams {
        temperature: warm(temperature.unwrap_or(defaults.temperature)),
        top_k: match fields.integer("top_k", -1..=i64::MAX)? {
            None => defaults.top_k,
            Some(k) => u32::try_from(k.max(0)).unwrap_or(u32::MAX),
        },
        top_p: fields
            .number("top_p", "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?
            .unwrap_or(defaults.top_p),
        min_p: fields
            .number("min_p", "between 0 and 1", |value| (0.0..=1.0).contains(&value))?
            .unwrap_or(defaults.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", "above 0", |value| value > 0.0)?
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: penalty("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: penalty("frequency_penalty")?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, rules.model.vocab_size)?,
        allowed_ids,
        bad_words: Vec::new(),
        seed: 0,
        logprobs,
    })
}

/// 0 is greedy; what is not quite 0 is raised to what the sampler can divide by.
fn warm(temperature: f32) -> f32 {
    if temperature > 0.0 { temperature.max(TEMPERATURE_MIN) } else { 0.0 }
}

/// Token id as a decimal string → bias, clamped to ±100 as OpenAI documents.
fn logit_bias(fields: &Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = fields.get("logit_bias") else { return Ok(Vec::new()) };
    let map = value.as_object().ok_or_else(|| wrong("logit_bias", "an object", value))?;
    let mut biases = Vec::with_capacity(map.len());
    for (key, value) in map {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
            let key = super::super::error::cut(key, 40);
            fields.bad(
                "logit_bias",
                format!("`logit_bias` holds the key `{key}`, which is not a token id below {vocab_size}."),
            )
        })?;
        let bias = value.as_f64().ok_or_else(|| wrong("logit_bias", "numbers by token id", value))?;
        biases.push((id, bias.clamp(-100.0, 100.0) as f32));
    }
    biases.sort_by_key(|(id, _)| *id);
    // "7" and "07" are the same id.
    biases.dedup_by_key(|(id, _)| *id);
    Ok(biases)
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let strings = match value {
        serde_json::Value::String(one) => vec![one.clone()],
        serde_json::Value::Array(many) => many
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| wrong("stop", "a string or a list of strings", value))?,
        other => return Err(wrong("stop", "a string or a list of strings", other)),
    };
    if strings.len() > STOPS_MAX {
        let message = format!("`stop` must hold at most {STOPS_MAX} strings, got {}.", strings.len());
        return Err(fields.bad("stop", message));
    }
    if strings.iter().any(String::is_empty) {
        return Err(fields.bad("stop", "`stop` must not hold an empty string."));
    }
    Ok(strings)
}

fn bad_words(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let words = fields.array("bad_words")?.unwrap_or_default();
    if words.len() > BAD_WORDS_MAX {
        let message = format!("`bad_words` must hold at most {BAD_WORDS_MAX} words, got {}.", words.len());
        return Err(fields.bad("bad_words", message));
    }
    let fits = |word: &&str| !word.is_empty() && word.chars().count() <= BAD_WORD_CHARS_MAX;
    let word = |value: &serde_json::Value| value.as_str().filter(fits).map(str::to_owned);
    words.iter().map(word).collect::<Option<Vec<_>>>().ok_or_else(|| {
        let expected =
            format!("`bad_words` must be a list of strings of 1 to {BAD_WORD_CHARS_MAX} characters.");
        fields.bad("bad_words", expected)
    })
}

fn stream(fields: &Fields, rules: Rules) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if !stream {
        return match options {
            None => Ok(None),
            Some(_) => {
                Err(fields.bad("stream_options", "`stream_options` is only allowed with `stream: true`."))
            }
        };
    }
    let mut read = StreamOptions::default();
    if let Some(options) = options {
        read.continuous_usage = options.bool("continuous_usage_stats")?.unwrap_or(false);
        read.include_usage = options.bool("include_usage")?.unwrap_or(false);
    }
    read.include_usage |= rules.options.force_usage;
    Ok(Some(read))
}

fn truncate_prompt(fields: &Fields, rules: Rules) -> Result<Option<usize>, ApiError> {
    let name = "truncate_prompt_tokens";
    match fields.integer(name, -1..=i64::MAX)? {
        None => Ok(None),
        // The whole context less the one token that must still be generated.
        Some(-1) => Ok(Some(rules.model.max_model_len.saturating_sub(1))),
        Some(0) => Err(fields.bad(name, format!("`{name}` must be -1 or at least 1, got 0."))),
        Some(count) => Ok(Some(usize::try_from(count).unwrap_or(usize::MAX))),
    }
}

/// Clients number their classes as they like; what is beyond an i32 is as early or late as can be.
fn priority(fields: &Fields) -> Result<i32, ApiError> {
    let priority = fields.integer("priority", i64::MIN..=i64::MAX)?.unwrap_or(0);
    Ok(priority.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32)
}

/// Our own field, in seconds.
fn timeout(fields: &Fields) -> Result<Option<Duration>, ApiError> {
    let fits = |seconds| seconds > 0.0 && seconds <= TIMEOUT_SECONDS_MAX;
    let seconds = fields.number("timeout", "above 0 and at most 1000000 seconds", fits)?;
    Ok(seconds.map(Duration::from_secs_f32))
}

fn cache_salt(fields: &Fields) -> Result<Option<Arc<str>>, ApiError> {
    let Some(salt) = fields.string("cache_salt")? else { return Ok(None) };
    let fits =
        !salt.is_empty() && salt.chars().count() <= LABEL_CHARS_MAX && !salt.contains(['@', '/', '\\', '\0']);
    if fits {
        return Ok(Some(salt.into()));
    }
    let message =
        format!("`cache_salt` must be 1 to {LABEL_CHARS_MAX} characters without `@`, `/`, `\\` and NUL.");
    Err(fields.bad("cache_salt", message))
}

fn request_id(fields: &Fields) -> Result<Option<String>, ApiError> {
    let Some(id) = fields.string("request_id")? else { return Ok(None) };
    if crate::api::ids::is_label(id) {
        return Ok(Some(id.to_owned()));
    }
    let message = format!("`request_id` must be 1 to {LABEL_CHARS_MAX} visible ASCII characters.");
    Err(fields.bad("request_id", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::model::{Facts, ModelInfo, SamplingDefaults};
    use crate::api::types::RequestOptions;
    use serde_json::{Value, json};

    fn read(body: Value, options: &RequestOptions) -> Result<Common, Value> {
        let model = ModelInfo {
            served_names: vec!["tiny".into()],
            root: "tiny".into(),
            created: 0,
            max_model_len: 128,
            vocab_size: 16,
            stop_ids: vec![],
            defaults: SamplingDefaults::default(),
            facts: Facts::default(),
        };
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        Common::read(&Fields::top(map), Rules { model: &model, options }, None, None)
            .map_err(|error| error.body()["error"]["param"].clone())
    }

    #[test]
    fn the_engine_is_told_class_salt_drafts_and_deadline() {
        let options = RequestOptions::default();
        let plain = read(json!({}), &options).expect("a valid request");
        let told = (plain.priority, plain.cache_salt, plain.speculation, plain.timeout);
        assert_eq!(told, (0, None, Speculation::default(), None));
        let body = json!({"priority": -5, "cache_salt": "mine", "speculation": "off", "timeout": 0.5});
        let asked = read(body, &options).expect("a valid request");
        let told = (asked.priority, asked.cache_salt.as_deref(), asked.speculation, asked.timeout);
        assert_eq!(told, (-5, Some("mine"), Speculation::OFF, Some(Duration::from_millis(500))));
    }

    #[test]
    fn a_class_beyond_all_classes_is_the_last_or_first_one() {
        let options = RequestOptions::default();
        let priority = |value: i64| read(json!({"priority": value}), &options).map(|read| read.priority);
        assert_eq!(priority(i64::MAX), Ok(i32::MAX));
        assert_eq!(priority(i64::MIN), Ok(i32::MIN));
    }

    #[test]
    fn the_servers_timeout_is_for_those_without_their_own() {
        let options = RequestOptions { timeout: Some(Duration::from_secs(9)), ..RequestOptions::default() };
        let timeout = |body| read(body, &options).map(|read| read.timeout);
        assert_eq!(timeout(json!({})), Ok(Some(Duration::from_secs(9))));
        assert_eq!(timeout(json!({"timeout": 2})), Ok(Some(Duration::from_secs(2))));
        for bad in [json!(0), json!(-1), json!(1e7), json!("soon")] {
            assert_eq!(timeout(json!({"timeout": bad})), Err(json!("timeout")), "{bad}");
        }
    }
}
