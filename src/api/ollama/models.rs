//! Models by Ollama's names: without case, with a tag; and how they introduce themselves.

use super::answer::moment;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::model::{CAPABILITIES, ModelInfo, SamplingDefaults};
use crate::api::roster::Stage;
use crate::api::state::{App, Health};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// The tag of a name without one.
const TAG: &str = ":latest";
/// A date that clients show as "forever": nothing here expires.
const NEVER: &str = "2200-01-01T00:00:00.000000Z";

/// The model that a request names. Errors: 400 if none.
pub fn named<'a>(fields: &Fields<'a>) -> Result<&'a str, ApiError> {
    let name = match fields.string("model")? {
        // What `model` was called at first.
        None | Some("") => fields.string("name")?,
        model => model,
    };
    name.filter(|name| !name.is_empty()).ok_or_else(|| fields.bad("model", "`model` is required."))
}

/// The served name that `name` means: itself, or the first that differs in case or tag only. Errors: 404.
pub fn served(app: &App, name: &str) -> Result<String, ApiError> {
    let seats = app.keeper.seats();
    let mut names = seats.iter().flat_map(|seat| &seat.known.names);
    let wanted = bare(name);
    let same = names.clone().find(|served| *served == name).or_else(|| names.find(|it| bare(it) == wanted));
    // The error is the same that every route makes of a name that nobody has.
    same.cloned().map_or_else(|| app.place(name).map(|_| name.to_owned()), Ok)
}

fn bare(name: &str) -> String {
    let name = name.to_lowercase();
    name.strip_suffix(TAG).map_or(name.clone(), str::to_owned)
}

/// `/api/tags`: every name of every model whose configuration is read, loaded or not. Errors: 503 while that of the
/// first is not.
pub fn tags(app: &App) -> Result<Value, ApiError> {
    if app.keeper.stage(0) == Stage::Starting {
        app.known_at(0)?;
    }
    let seats = app.keeper.seats();
    let models = seats.iter().filter_map(|seat| Some((seat, seat.model()?)));
    let entries = models.flat_map(|(seat, model)| entries(&seat.known.names, &model, |_| Map::new()));
    Ok(json!({"models": entries.collect::<Vec<_>>()}))
}

/// `/api/ps`: those that can answer.
pub fn running(app: &App) -> Value {
    let seats = app.keeper.seats();
    let running = seats.iter().enumerate().filter_map(|(place, seat)| {
        let is_here = app.keeper.stage(place) == Stage::Ready && app.health_of(place) == Health::Ready;
        Some((seat, seat.resident().filter(|_| is_here)?))
    });
    let entries = running.flat_map(|(seat, resident)| {
        entries(&seat.known.names, &resident.model, |model| {
            Map::from_iter([
                ("expires_at".to_owned(), json!(NEVER)),
                ("size_vram".to_owned(), json!(model.facts.device_bytes)),
                ("context_length".to_owned(), json!(model.max_model_len)),
            ])
        })
    });
    json!({"models": entries.collect::<Vec<_>>()})
}

/// One entry for each name, `more` behind what all have.
fn entries(
    names: &[String],
    model: &ModelInfo,
    more: impl Fn(&ModelInfo) -> Map<String, Value>,
) -> Vec<Value> {
    let entry = |name: &String| {
        let tagged = if name.contains(':') { name.clone() } else { format!("{name}{TAG}") };
        let mut entry = Map::new();
        entry.insert("name".into(), json!(tagged));
        entry.insert("model".into(), json!(tagged));
        entry.insert("modified_at".into(), json!(modified(model)));
        entry.insert("size".into(), json!(model.facts.bytes));
        entry.insert("digest".into(), json!(digest(model)));
        entry.insert("details".into(), details(model));
        entry.extend(more(model));
        Value::Object(entry)
    };
    names.iter().map(entry).collect()
}

/// `/api/show`.
pub fn card(model: &ModelInfo, template: Option<String>) -> Value {
    let parameters = parameters(&model.defaults);
    let modelfile: String = parameters
        .lines()
        .map(|line| format!("PARAMETER {line}\n"))
        .fold(format!("FROM {}\n", model.root), |all, line| all + &line);
    json!({
        "license": "",
        "modelfile": modelfile,
        "parameters": parameters,
        "template": template.unwrap_or_default(),
        "details": details(model),
        "model_info": facts(model),
        "capabilities": CAPABILITIES,
        "modified_at": modified(model),
    })
}

/// What a request gets that does not say, one per line.
fn parameters(defaults: &SamplingDefaults) -> String {
    let SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty } = defaults;
    format!(
        "temperature {temperature}\ntop_p {top_p}\ntop_k {top_k}\nmin_p {min_p}\nrepeat_penalty {repetition_penalty}"
    )
}

fn details(model: &ModelInfo) -> Value {
    let facts = &model.facts;
    json!({
        "parent_model": "",
        "format": facts.format,
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": rounded(facts.parameters),
        "quantization_level": facts.quantization,
    })
}

/// Keys as in GGUF: what belongs to the architecture stands below its name.
fn facts(model: &ModelInfo) -> Value {
    let facts = &model.facts;
    let mut info = Map::new();
    info.insert("general.architecture".into(), json!(facts.architecture));
    info.insert("general.parameter_count".into(), json!(facts.parameters));
    for (key, value) in [
        ("block_count", facts.layers),
        ("context_length", model.max_model_len),
        ("embedding_length", facts.hidden_size),
        ("vocab_size", model.vocab_size),
    ] {
        info.insert(format!("{}.{key}", facts.architecture), json!(value));
    }
    Value::Object(info)
}

/// `31.6B`, `970K`.
fn rounded(parameters: u64) -> String {
    let parameters = parameters as f64;
    match parameters {
        1e9.. => format!("{:.1}B", parameters / 1e9),
        1e6.. => format!("{:.1}M", parameters / 1e6),
        _ => format!("{:.0}K", parameters / 1e3),
    }
}

fn modified(model: &ModelInfo) -> String {
    let seconds = i64::try_from(model.created).unwrap_or(i64::MAX);
    moment(Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX))
}

/// 64 digits that tell models apart. Nobody can check them: they are of the model's name and size, because reading
/// all weights for the sake of a list would take minutes.
fn digest(model: &ModelInfo) -> String {
    let name = format!("{}\n{}\n{}", model.root, model.facts.quantization, model.facts.bytes);
    Sha256::digest(name.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Options;

    #[test]
    fn names_are_found_without_case_and_with_or_without_the_tag() {
        let mut options = Options::new(vec!["nvidia/Tiny".into(), "fast:latest".into()]);
        options.models.push(vec!["FAST".into(), "big:q4".into()]);
        let app = App::new(options);
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(served(&app, name).ok().as_deref(), expected, "{name}")
        };
        check("nvidia/Tiny", Some("nvidia/Tiny"));
        check("NVIDIA/tiny:LATEST", Some("nvidia/Tiny"));
        check("fast", Some("fast:latest"));
        check("FAST", Some("FAST"));
        check("big:Q4", Some("big:q4"));
        check("big", None);
        check("", None);
        check(":latest", None);
    }

    #[test]
    fn parameters_are_counted_in_round_numbers() {
        assert_eq!([31_577_940_288, 8_030_000, 12_345].map(rounded), ["31.6B", "8.0M", "12K"]);
    }
}
