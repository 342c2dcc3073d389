//! vLLM's ways to give a flag: put right before clap reads them.
//!
//! `--config FILE`, underscores, `--no-FLAG`, `--json.key value`, and the flags that mean nothing here.

use super::args::Args;
use super::ignored::{self, Takes};
use super::yaml::{self, Yaml};
use clap::error::ErrorKind;
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::path::Path;

/// Short spellings of more than one letter, which clap does not know.
const SHORT: [(&str, &str); 6] = [
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-np", "--max-num-seqs"),
    ("-cc", "--compilation-config"),
    ("-sc", "--speculative-config"),
];

/// The command line of `serve` as clap shall read it: what `--config` names stands before what was typed and gives way
/// to it, flags without effect become `--ignored NAME`, which [`super::run`] tells. Other commands pass through untouched.
/// Errors: a sentence about the flag, or the line of the file.
pub fn spell(arguments: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>, String> {
    let mut arguments = arguments.into_iter();
    let mut spelled: Vec<OsString> = arguments.by_ref().take(2).collect();
    if spelled.get(1).is_none_or(|command| command != "serve") {
        spelled.extend(arguments);
        return Ok(spelled);
    }
    let known = Known::flags();
    let words: Vec<OsString> = arguments.collect();
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    let typed = items(&words[..end], &known);
    let mut all = Vec::new();
    for file in typed.iter().filter(|item| item.is("--config")).flat_map(|item| &item.values) {
        all.extend(from_file(Path::new(file), &known, &typed)?);
    }
    all.extend(typed.into_iter().filter(|item| !item.is("--config")));
    let all = denied(joined(all)?, &known);
    let lenient = all.iter().any(|item| item.is("--ignore-unknown-flags"));
    for item in all {
        spelled.extend(item.spelled(&known, lenient)?);
    }
    spelled.extend_from_slice(&words[end..]);
    Ok(spelled)
}

/// The flags of `serve` as clap knows them.
struct Known(Vec<Flag>);

struct Flag {
    /// Its canonical spelling, dashes included.
    name: String,
    /// Every spelling.
    names: Vec<String>,
    takes: Takes,
}

impl Known {
    fn flags() -> Self {
        let mut command = <Args as clap::Args>::augment_args(clap::Command::new("serve"));
        command.build();
        let flag = |argument: &clap::Arg| {
            let long = argument.get_long()?;
            let aliases = argument.get_all_aliases().unwrap_or_default();
            let mut names: Vec<String> =
                [long].into_iter().chain(aliases).map(|name| format!("--{name}")).collect();
            names.extend(argument.get_short().map(|short| format!("-{short}")));
            let most = argument.get_num_args().map_or(0, |range| range.max_values());
            let takes = match most {
                0 => Takes::Nothing,
                1 => Takes::Value,
                _ => Takes::Values,
            };
            Some(Flag { name: format!("--{long}"), names, takes })
        };
        Self(command.get_arguments().filter_map(flag).collect())
    }

    fn find(&self, name: &str) -> Option<&Flag> {
        self.0.iter().find(|flag| flag.names.iter().any(|known| known == name))
    }

    /// What a flag takes along; nothing if nobody knows it.
    fn takes(&self, name: &str) -> Takes {
        match (self.find(name), ignored::find(name)) {
            (Some(flag), _) => flag.takes,
            (None, Some(ignored)) if ignored.name == name => ignored.takes,
            (None, _) => Takes::Nothing,
        }
    }
}

/// A flag with its values, or a word that is none.
#[derive(Debug, Clone, PartialEq)]
struct Item {
    /// Canonical; `None` for a word that belongs to no flag.
    name: Option<String>,
    values: Vec<OsString>,
    /// `--flag=value`.
    glued: bool,
}

impl Item {
    fn is(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name)
    }

    fn flag(name: String, value: Option<String>) -> Self {
        Self {
            name: Some(name),
            glued: value.is_some(),
            values: value.into_iter().map(OsString::from).collect(),
        }
    }

    /// As clap reads it. Errors: a value that asks for what is not to be had.
    fn spelled(self, known: &Known, lenient: bool) -> Result<Vec<OsString>, String> {
        let Some(name) = self.name else { return Ok(self.values) };
        let ignored = ignored::find(&name);
        if known.find(&name).is_none() && (ignored.is_some() || lenient && name.starts_with("--")) {
            if let Some(ignored) = ignored.filter(|ignored| !ignored.only.is_empty()) {
                let fits = |value: &OsString| ignored.only.iter().any(|only| value == only);
                if let Some(value) = self.values.iter().find(|value| !fits(value)) {
                    let (only, value) = (ignored.only.join(" or "), value.to_string_lossy());
                    return Err(format!("{name}: expected {only}, got `{value}`: {}", ignored.why));
                }
            }
            // With `=`, because the name begins like a flag.
            return Ok(vec![format!("--ignored={name}").into()]);
        }
        if self.glued {
            let mut word = OsString::from(name + "=");
            self.values.iter().for_each(|value| word.push(value));
            return Ok(vec![word]);
        }
        Ok([OsString::from(name)].into_iter().chain(self.values).collect())
    }
}

/// Words sorted into flags with their values.
fn items(words: &[OsString], known: &Known) -> Vec<Item> {
    let mut items = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let (name, value) = split(word);
        let Some(name) = name.map(|name| canonical(name, known)) else {
            items.push(Item { name: None, values: vec![word.clone()], glued: false });
            continue;
        };
        let mut item = Item::flag(name, value.map(str::to_owned));
        if !item.glued {
            let is_value = |next: &&OsString| !next.to_string_lossy().starts_with("--");
            let most = match item.name.as_deref().map_or(Takes::Nothing, |name| known.takes(name)) {
                _ if item.name.as_deref().is_some_and(|name| name.contains('.')) => 1,
                Takes::Nothing => 0,
                Takes::Value => 1,
                Takes::Values => usize::MAX,
            };
            while item.values.len() < most {
                let Some(value) = words.next_if(is_value) else { break };
                item.values.push(value.clone());
            }
        }
        items.push(item);
    }
    items
}

/// The name of a flag and the value behind its `=`; no name if the argument is none.
fn split(argument: &OsString) -> (Option<&str>, Option<&str>) {
    match argument.to_str() {
        // `-O3`: the only one whose value is glued to it.
        Some(flag) if flag.starts_with("-O") && flag.len() > 2 => (Some("-O"), flag.get(2..)),
        Some(flag) if flag.starts_with('-') && flag.len() > 1 => match flag.split_once('=') {
            Some((name, value)) => (Some(name), Some(value)),
            None => (Some(flag), None),
        },
        _ => (None, None),
    }
}

fn canonical(name: &str, known: &Known) -> String {
    let name = match SHORT.iter().find(|(short, _)| *short == name) {
        Some((_, long)) => (*long).to_owned(),
        None if name.starts_with("--") => match name.split_once('.') {
            // What stands behind the first dot is a key, whose underscores are its own.
            Some((flag, key)) => format!("{}.{key}", flag.replace('_', "-")),
            None => name.replace('_', "-"),
        },
        None if name == "-O" => "--compilation-config".to_owned(),
        None => name.to_owned(),
    };
    known.find(&name).map_or(name, |flag| flag.name.clone())
}

/// `--flag.key value` becomes a key of the flag's JSON. Errors: the JSON it belongs to is none.
fn joined(items: Vec<Item>) -> Result<Vec<Item>, String> {
    let mut all: Vec<Item> = Vec::new();
    for item in items {
        let Some((name, path)) = item.name.as_deref().and_then(|name| name.split_once('.')) else {
            all.push(item);
            continue;
        };
        let text = item.values.first().map(|value| value.to_string_lossy().into_owned());
        let Some(text) = text else { return Err(format!("{name}.{path}: expected a value")) };
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        let before = all.iter().rposition(|item| item.is(name));
        let mut map = match before.and_then(|at| all[at].values.first()) {
            None => Map::new(),
            Some(json) => serde_json::from_str(&json.to_string_lossy())
                .map_err(|error| format!("{name}: expected a JSON object beside {name}.{path}: {error}"))?,
        };
        place(&mut map, path, value);
        let merged = Item::flag(name.to_owned(), Some(Value::Object(map).to_string()));
        match before {
            Some(at) => all[at] = merged,
            None => all.push(merged),
        }
    }
    Ok(all)
}

fn place(map: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            map.insert(path.to_owned(), value);
        }
        Some((key, rest)) => {
            let inner = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            if let Value::Object(inner) = inner {
                place(inner, rest, value);
            }
        }
    }
}

/// `--no-FLAG` takes back a switch that was given before it.
fn denied(items: Vec<Item>, known: &Known) -> Vec<Item> {
    let mut all: Vec<Item> = Vec::new();
    for item in items {
        match item.name.as_deref().and_then(|name| switch(name, known)) {
            Some(switch) => all.retain(|before| !before.is(&switch)),
            None => all.push(item),
        }
    }
    all
}

/// The switch that `--no-FLAG` denies, unless that is a flag of its own.
fn switch(name: &str, known: &Known) -> Option<String> {
    let denied = format!("--{}", name.strip_prefix("--no-")?);
    let is_switch = known.find(&denied).is_some_and(|flag| flag.takes == Takes::Nothing);
    (known.find(name).is_none() && is_switch).then_some(denied)
}

/// What a file of flags says and the command line does not. Errors: with the file and the line.
fn from_file(path: &Path, known: &Known, typed: &[Item]) -> Result<Vec<Item>, String> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--config: {shown} cannot be read: {error}"))?;
    let entries =
        yaml::entries(&text).map_err(|fault| format!("{shown}, line {}: {}", fault.line, fault.message))?;
    let lenient = typed.iter().any(|item| item.is("--ignore-unknown-flags"))
        || entries.iter().any(|entry| entry.key.replace('_', "-") == "ignore-unknown-flags");
    let mut all = Vec::new();
    for entry in entries {
        let at = |message: String| format!("{shown}, line {}: {message}", entry.line);
        let name = canonical(&format!("--{}", entry.key), known);
        let is_known =
            known.find(&name).is_some() || ignored::find(&name).is_some() || switch(&name, known).is_some();
        // These two are words of this module, not the user's.
        if matches!(name.as_str(), "--config" | "--ignored") || !is_known && !lenient {
            return Err(at(format!("unknown key `{}`{}", entry.key, advice(&name))));
        }
        let items = from_value(&name, entry.value, known);
        check(&items, known, lenient).map_err(at)?;
        if !typed.iter().any(|item| speaks_of(item, &name)) {
            all.extend(items);
        }
    }
    Ok(all)
}

/// Whether a typed flag decides what a key of the file would.
fn speaks_of(item: &Item, name: &str) -> bool {
    match item.name.as_deref() {
        // A word that belongs to no flag is the model.
        None => name == "--model",
        Some(typed) => {
            let bare = |name: &str| name.trim_start_matches("--").trim_start_matches("no-").to_owned();
            bare(typed.split('.').next().unwrap_or(typed)) == bare(name)
        }
    }
}

fn from_value(name: &str, value: Yaml, known: &Known) -> Vec<Item> {
    let takes = known.takes(name);
    let one = |value: Option<String>| vec![Item::flag(name.to_owned(), value)];
    match (value, takes) {
        (Yaml::Null, _) => Vec::new(),
        (Yaml::Bool(true), Takes::Nothing) => one(None),
        (Yaml::Bool(false), Takes::Nothing) => {
            let denial = format!("--no-{}", name.trim_start_matches("--"));
            // Off is how switches are that cannot be denied.
            known.find(&denial).map(|flag| Item::flag(flag.name.clone(), None)).into_iter().collect()
        }
        (Yaml::Bool(value), _) => one(Some(value.to_string())),
        (Yaml::Number(text) | Yaml::Text(text), _) => one(Some(text)),
        (Yaml::List(items), Takes::Values) => items
            .into_iter()
            .map(|item| match item {
                Yaml::Number(text) | Yaml::Text(text) => Item::flag(name.to_owned(), Some(text)),
                other => Item::flag(name.to_owned(), Some(other.json().to_string())),
            })
            .collect(),
        (value @ (Yaml::List(_) | Yaml::Map(_)), _) => one(Some(value.json().to_string())),
    }
}

/// Errors: what clap says of the flags of one line.
fn check(items: &[Item], known: &Known, lenient: bool) -> Result<(), String> {
    let mut line = vec![OsString::from("serve")];
    for item in items {
        line.extend(item.clone().spelled(known, lenient)?);
    }
    match crate::cli::flags::<Args>(line) {
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
            let text = error.to_string();
            Err(text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
        }
        // What a flag needs beside it may stand in another line.
        _ => Ok(()),
    }
}

/// Which key may have been meant, if any is like it.
fn advice(name: &str) -> String {
    let error = crate::cli::flags::<Args>(["serve", name]).map(|_| ());
    let text = error.err().map(|error| error.to_string()).unwrap_or_default();
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    let meant = tip.filter(|tip| tip.contains("similar")).and_then(|tip| tip.split('\'').nth(1));
    meant.map_or_else(String::new, |meant| format!("; `{}` is like it", meant.trim_start_matches("--")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(typed: &str) -> Result<String, String> {
        let words = typed.split(' ').map(OsString::from);
        let words: Vec<String> =
            spell(words)?.into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Ok(words.join(" "))
    }

    fn check(typed: &str, expected: &str) {
        assert_eq!(spelled(typed).as_deref(), Ok(expected), "{typed}");
    }

    #[test]
    fn underscores_are_dashes_in_names_only() {
        check("f serve --max_model_len 9", "f serve --max-model-len 9");
        check("f serve --served_model_name=a_b", "f serve --served-model-name=a_b");
        check("f serve my_model", "f serve my_model");
        check("f serve -- --max_model_len", "f serve -- --max_model_len");
        check("f chat --max_model_len 9", "f chat --max_model_len 9");
        check("f serve -tp 1 --port 0", "f serve --tensor-parallel-size 1 --port 0");
        check("f serve --max-model-len -1 tiny", "f serve --max-model-len -1 tiny");
    }

    #[test]
    fn what_means_nothing_here_is_told_and_its_value_skipped() {
        check("f serve --swap-space 4 tiny", "f serve --ignored=--swap-space tiny");
        check("f serve --swap_space=4 tiny", "f serve --ignored=--swap-space tiny");
        check("f serve --enforce-eager tiny", "f serve --ignored=--enforce-eager tiny");
        check("f serve --no-enforce-eager tiny", "f serve --ignored=--no-enforce-eager tiny");
        check(
            "f serve --cudagraph-capture-sizes 1 2 4 --port 1",
            "f serve --ignored=--cudagraph-capture-sizes --port 1",
        );
        check("f serve -O3 tiny", "f serve --ignored=--compilation-config tiny");
        check("f serve --logprobs-mode raw_logprobs", "f serve --ignored=--logprobs-mode");
        let refused = spelled("f serve --cpu-offload-gb 8");
        assert!(refused.is_err_and(|error| error.starts_with("--cpu-offload-gb: expected 0")));
    }

    #[test]
    fn a_switch_can_be_taken_back_and_json_be_given_by_its_keys() {
        check("f serve --clamp-max-tokens --no-clamp-max-tokens x", "f serve x");
        check("f serve --no-enable-prefix-caching", "f serve --no-enable-prefix-caching");
        check(
            "f serve --speculative-config.method mtp --speculative_config.num_speculative_tokens=2",
            "f serve --speculative-config={\"method\":\"mtp\",\"num_speculative_tokens\":2}",
        );
        check(
            "f serve -sc {\"method\":\"mtp\"} --speculative-config.deep.er 1",
            "f serve --speculative-config={\"method\":\"mtp\",\"deep\":{\"er\":1}}",
        );
        check("f serve --compilation-config.level 3 x", "f serve --ignored=--compilation-config x");
    }

    #[test]
    fn what_nobody_knows_is_claps_to_refuse_unless_it_shall_be_passed_over() {
        check("f serve --no-such 1", "f serve --no-such 1");
        check(
            "f serve m --no-such=1 --ignore-unknown-flags",
            "f serve m --ignored=--no-such --ignore-unknown-flags",
        );
    }

    fn with_file(text: &str, typed: &str) -> Result<String, String> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("it can be written");
        let path = file.path().display().to_string();
        spelled(&format!("f serve --config {path} {typed}")).map_err(|error| error.replace(&path, "FILE"))
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let text = "\
model: a
port: 1
served_model_name: [x, y]
enable-prefix-caching: false
clamp-max-tokens: true
enforce-eager: true
speculative-config:
  method: mtp
";
        let all = "f serve --model=a --port=1 --served-model-name=x --served-model-name=y --no-enable-prefix-caching \
                   --clamp-max-tokens --ignored=--enforce-eager --speculative-config={\"method\":\"mtp\"}";
        assert_eq!(with_file(text, "--host h").as_deref(), Ok(format!("{all} --host h").as_str()));
        let typed =
            "b --port 2 -a z --enable-prefix-caching --no-clamp-max-tokens --speculative-config.method ngram";
        assert_eq!(
            with_file(text, typed).as_deref(),
            Ok("f serve --ignored=--enforce-eager b --port 2 --served-model-name z --enable-prefix-caching \
                --speculative-config={\"method\":\"ngram\"}")
        );
    }

    #[test]
    fn the_file_that_is_deployed_can_be_read_with_all_that_it_proposes() {
        let text = include_str!("../../../deploy/serve.yaml");
        let proposed: Vec<&str> =
            text.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)).skip(1).collect();
        assert!(with_file(text, "m").is_ok_and(|line| line.contains("--shutdown-timeout=10")));
        let all = with_file(&proposed.join("\n"), "m").expect("keys that are known");
        assert!(all.contains("--ssl-certfile=/etc/ferrotron/cert.pem"), "{all}");
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_with_its_line() {
        let check = |text: &str, expected: &str| {
            let error = with_file(text, "m").expect_err(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        };
        check(
            "port: 1\nmax-model-length: 3",
            "FILE, line 2: unknown key `max-model-length`; `max-model-len` is like it",
        );
        check("config: x", "FILE, line 1: unknown key `config`");
        check("port: 70000", "FILE, line 1: invalid value '70000'");
        check("cpu-offload-gb: 3", "FILE, line 1: --cpu-offload-gb: expected 0");
        check("a: [", "FILE, line 1: ");
        assert!(
            spelled("f serve --config /nowhere/x.yaml").is_err_and(|error| error.contains("/nowhere/x.yaml"))
        );
        assert_eq!(
            with_file("ignore-unknown-flags: true\nno-one: 1", "m").as_deref(),
            Ok("f serve --ignore-unknown-flags --ignored=--no-one m")
        );
    }
}
