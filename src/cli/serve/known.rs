//! The models that a server knows besides those of its command line: a folder of them, and a file of presets.

use super::args::{Args, Served, seconds};
use super::presets::{self, Entry, Position, Section, Value};
use crate::api::STOP_TIMEOUT;
use crate::cli::flags;
use anyhow::{Context as _, bail};
use std::collections::HashSet;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

/// Every model of a server.
#[derive(Debug, Clone)]
pub struct Models {
    /// Of the command line; the first stands in front.
    pub front: Vec<Served>,
    pub known: Vec<Known>,
}

/// A model that is loaded when somebody asks for it.
#[derive(Debug, Clone)]
pub struct Known {
    pub served: Served,
    /// The server's flags with its own options.
    pub args: Box<Args>,
    /// Those alone, as they would be typed.
    pub words: Vec<String>,
    /// It has a section in the preset file.
    pub in_file: bool,
    pub on_start: bool,
    pub stop_timeout: Duration,
}

/// Options that a model may have of its own, by every spelling that serve knows.
const OWN: [&str; 22] = [
    "max-model-len",
    "ctx-size",
    "max-num-seqs",
    "parallel",
    "max-num-batched-tokens",
    "max-num-queued-reqs",
    "enable-prefix-caching",
    "no-enable-prefix-caching",
    "prefix-cache-checkpoints",
    "kv-cache-tokens",
    "num-gpu-blocks-override",
    "kv-cache-memory-bytes",
    "kv-cache-dtype",
    "mamba-ssm-cache-dtype",
    "mamba-cache-mode",
    "speculative-config",
    "spec-depth",
    "num-speculative-tokens",
    "generation-config",
    "override-generation-config",
    "chat-template",
    "allow-overcommit",
];
/// llama-server's short spellings.
const SHORT: [(&str, &str); 4] = [("c", "ctx-size"), ("np", "parallel"), ("m", "model"), ("a", "alias")];
/// Options of llama-server that have nothing to change here.
const IGNORED: [&str; 9] =
    ["jinja", "flash-attn", "fa", "n-gpu-layers", "gpu-layers", "ngl", "mmap", "no-mmap", "mlock"];

impl Models {
    /// Looks at the command line, the folder and the file. Errors: two models of one name, a folder that cannot be
    /// read, a line that cannot be understood, no model at all.
    pub fn find(args: &Args) -> anyhow::Result<Self> {
        let front = args.models().map_err(anyhow::Error::msg)?;
        let known = known(args)?;
        let all = front.iter().chain(known.iter().map(|known| &known.served));
        let mut seen = HashSet::new();
        if let Some(name) = all.flat_map(|served| &served.names).find(|name| !seen.insert(name.as_str())) {
            bail!(
                "two models are named `{name}`: --models-dir, --models-preset and --model NAME=MODEL share their names"
            );
        }
        if front.is_empty() && known.is_empty() {
            let dir = args.models_dir.as_deref().unwrap_or(Path::new("nothing"));
            bail!(
                "--models-dir: {} holds no model: expected folders with config.json and *.safetensors, or *.gguf",
                dir.display()
            );
        }
        Ok(Self { front, known })
    }
}

/// Those of the file first, in its order, then those of the folder that it does not name.
pub fn known(args: &Args) -> anyhow::Result<Vec<Known>> {
    let mut found = match &args.models_dir {
        Some(dir) => scan(dir).with_context(|| format!("--models-dir: {} cannot be read", dir.display()))?,
        None => Vec::new(),
    };
    let sections = match &args.models_preset {
        Some(path) => read(path)?,
        None => Vec::new(),
    };
    let file = args.models_preset.as_deref().unwrap_or(Path::new(""));
    let (all, sections): (Vec<_>, Vec<_>) = sections.into_iter().partition(|section| section.name == "*");
    let all = all.first();
    let mut known = Vec::new();
    for section in &sections {
        let at = found.iter().position(|(name, _)| *name == section.name);
        let path = at.map(|at| found.remove(at).1);
        known.push(of_section(args, file, all, section, path)?);
    }
    for (name, path) in found {
        let section = Section { name, at: Position { line: 1, column: 1 }, entries: Vec::new() };
        let model = of_section(args, file, all, &section, Some(path))?;
        known.push(Known { in_file: false, ..model });
    }
    Ok(known)
}

/// Models in a folder: (name, path), by name. What has no weights is none, and what is hidden is not looked at.
fn scan(dir: &Path) -> std::io::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let (Some(file), Some(text)) = (path.file_name().and_then(|name| name.to_str()), path.to_str())
        else {
            tracing::warn!("--models-dir: {} is no UTF-8 and is left out", path.display());
            continue;
        };
        if file.starts_with('.') {
            continue;
        }
        let name = if path.is_dir() {
            if holds_weights(&path) { file } else { continue }
        } else {
            let Some(name) = gguf_name(file) else { continue };
            name
        };
        found.push((name.to_owned(), text.to_owned()));
    }
    found.sort();
    Ok(found)
}

fn holds_weights(folder: &Path) -> bool {
    let names: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    let any = |end: &str| names.iter().any(|name| name.ends_with(end));
    any(".gguf") || any(".safetensors") && names.iter().any(|name| name == "config.json")
}

/// The name of a GGUF file's model; `None` for other files and for all but the first part of a split one.
fn gguf_name(file: &str) -> Option<&str> {
    let stem = file.strip_suffix(".gguf")?;
    let Some((head, count)) = stem.rsplit_once("-of-") else { return Some(stem) };
    let Some((name, part)) = head.rsplit_once('-') else { return Some(stem) };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match (is_number(count) && is_number(part), part.trim_start_matches('0')) {
        (false, _) => Some(stem),
        (true, "1") => Some(name),
        (true, _) => None,
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<Section>> {
    let bytes =
        std::fs::read(path).with_context(|| format!("--models-preset: {} cannot be read", path.display()))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        anyhow::anyhow!(
            "--models-preset: {} is not UTF-8 from byte {} on",
            path.display(),
            error.valid_up_to()
        )
    })?;
    presets::read(text).map_err(|error| anyhow::anyhow!("--models-preset: {}: {error}", path.display()))
}

/// One model: `section` over `all` of the file, below what was typed.
fn of_section(
    args: &Args,
    file: &Path,
    all: Option<&Section>,
    section: &Section,
    path: Option<String>,
) -> anyhow::Result<Known> {
    let wrong = |at: Position, message: &dyn Display| {
        anyhow::anyhow!(
            "--models-preset: {}: line {}, column {}: {message}",
            file.display(),
            at.line,
            at.column
        )
    };
    let mut model = path.unwrap_or_else(|| section.name.clone());
    let mut known = Known {
        served: Served::new(Some(&section.name), &model),
        args: Box::new(args.clone()),
        words: Vec::new(),
        in_file: true,
        on_start: false,
        stop_timeout: STOP_TIMEOUT,
    };
    let own = |entry: &Entry| section.entries.iter().any(|own| spelled(&own.key) == spelled(&entry.key));
    let general = all.into_iter().flat_map(|all| &all.entries).filter(|entry| !own(entry));
    for entry in general.chain(&section.entries) {
        let bad = |message: &str| wrong(entry.at, &format!("{}: {message}", entry.key));
        match (spelled(&entry.key), &entry.value) {
            ("model", Value::Text(given)) => model.clone_from(given),
            ("alias", Value::Text(given)) => known.served.names.push(given.clone()),
            ("alias", Value::List(given)) => known.served.names.extend(given.iter().cloned()),
            (_, Value::List(_)) => return Err(bad("expected one value, got a list")),
            ("load-on-startup", Value::Text(given)) => known.on_start = switch(given).map_err(|e| bad(&e))?,
            ("stop-timeout", Value::Text(given)) => {
                known.stop_timeout = seconds(given).map_err(|e| bad(&e))?;
            }
            (key, Value::Text(given)) if OWN.contains(&key) => {
                let word = word(key, given).map_err(|e| bad(&e))?;
                parsed(word.as_ref()).map_err(|e| bad(&e))?;
                known.words.extend(word);
            }
            (key, _) if IGNORED.contains(&key) => {
                tracing::warn!("{} of [{}] has no effect here and is ignored", entry.key, section.name);
            }
            _ => return Err(bad("expected an option that a model may have of its own")),
        }
    }
    known.served.model = model;
    let typed = parsed(&known.words).map_err(|error| wrong(section.at, &error))?;
    overlay(&mut known.args, &typed);
    Ok(known)
}

/// The long spelling of an option.
fn spelled(key: &str) -> &str {
    SHORT.iter().find(|(short, _)| *short == key).map_or(key, |(_, long)| long)
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" | "on" => Ok(true),
        "false" | "0" | "off" => Ok(false),
        other => Err(format!("expected true or false, got `{other}`")),
    }
}

/// An option as it would be typed; nothing for a switch that is off.
fn word(key: &str, value: &str) -> Result<Option<String>, String> {
    match key {
        "enable-prefix-caching" if !switch(value)? => Ok(Some("--no-enable-prefix-caching".to_owned())),
        "enable-prefix-caching" | "no-enable-prefix-caching" | "allow-overcommit" => {
            Ok(switch(value)?.then(|| format!("--{key}")))
        }
        _ => Ok(Some(format!("--{key}={value}"))),
    }
}

/// Words read as serve reads its flags; the first line of what is wrong with them.
fn parsed<'a>(words: impl IntoIterator<Item = &'a String>) -> Result<Args, String> {
    let words = words.into_iter().map(String::as_str);
    flags(std::iter::once("serve").chain(words)).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        line.strip_prefix("error: ").unwrap_or(line).to_owned()
    })
}

/// Puts a model's own options where the command line says nothing. What was typed as it would be anyway counts as
/// nothing said.
fn overlay(args: &mut Args, own: &Args) {
    let default: Args = flags(["serve"]).expect("no flag is required");
    macro_rules! take {
        ($($field:ident),*) => {
            $(if args.$field == default.$field {
                args.$field.clone_from(&own.$field);
            })*
        };
    }
    // Ways to say one thing: the one that was typed leaves no room for the others.
    let is_sized = args.kv_cache_tokens.is_some() || args.num_gpu_blocks_override.is_some();
    if !is_sized && args.kv_cache_memory_bytes.is_none() {
        take!(kv_cache_tokens, num_gpu_blocks_override, kv_cache_memory_bytes);
    }
    if !args.enable_prefix_caching && !args.no_enable_prefix_caching {
        take!(enable_prefix_caching, no_enable_prefix_caching);
    }
    take!(
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        max_num_queued_reqs,
        prefix_cache_checkpoints,
        kv_cache_dtype,
        mamba_ssm_cache_dtype,
        mamba_cache_mode,
        speculative_config,
        spec_depth,
        generation_config,
        override_generation_config,
        chat_template,
        allow_overcommit
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn args(line: &[&str]) -> Args {
        flags(["serve"].iter().chain(line)).expect("valid flags")
    }

    /// The models of a file beside an empty folder.
    fn from_file(text: &str, line: &[&str]) -> anyhow::Result<Vec<Known>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("presets.toml");
        fs::write(&path, text).expect("it is ours");
        let path = path.to_str().expect("UTF-8").to_owned();
        let line: Vec<&str> = line.iter().copied().chain(["--models-preset", &path]).collect();
        Ok(Models::find(&args(&line))?.known)
    }

    fn refused(text: &str, words: &str) {
        let error = from_file(text, &[]).map(|_| ()).expect_err(text).to_string();
        assert!(error.contains(words), "{error:?} without {words:?}");
    }

    #[test]
    fn a_folder_is_searched_for_weights() {
        let folder = tempfile::tempdir().expect("a folder");
        let put = |path: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("in the folder")).expect("it is ours");
            fs::write(path, "").expect("it is ours");
        };
        for path in [
            "b/config.json",
            "b/model.safetensors",
            "no-weights/config.json",
            "no-config/model.safetensors",
            "c/any.gguf",
            "a.Q4_K.gguf",
            "split-00001-of-00002.gguf",
            "split-00002-of-00002.gguf",
            ".hidden/config.json",
            ".hidden/model.safetensors",
            "README.md",
        ] {
            put(path);
        }
        let dir = folder.path().to_str().expect("UTF-8");
        let known = Models::find(&args(&["--models-dir", dir])).expect("it holds models").known;
        let names: Vec<&str> = known.iter().map(|known| known.served.names[0].as_str()).collect();
        assert_eq!(names, ["a.Q4_K", "b", "c", "split"]);
        assert!(known[1].served.model.ends_with("/b") && !known[1].in_file);
        let error = Models::find(&args(&["--models-dir", dir, "--model", "b"])).map(|_| ());
        assert!(error.expect_err("b is there twice").to_string().contains("two models are named `b`"));
    }

    #[test]
    fn a_folder_without_models_is_a_mistake() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().to_str().expect("UTF-8");
        let error =
            |dir: &str| Models::find(&args(&["--models-dir", dir])).map(|_| ()).expect_err(dir).to_string();
        assert!(error(dir).contains("holds no model"));
        assert!(error(&format!("{dir}/absent")).contains("cannot be read"));
    }

    #[test]
    fn what_is_typed_wins_over_the_section_and_that_over_all() {
        let text = "[*]\nctx-size = 1000\nmax-num-seqs = 2\nkv-cache-dtype = fp8\n[x]\nmodel = tiny\nalias = [\"y\", \"z\"]\n\
                    c = 2000\nload-on-startup = true\nstop-timeout = 2.5\njinja = true\n[tiny]\n";
        let known = from_file(text, &["--max-num-seqs", "3"]).expect("a good file");
        let [x, tiny] = &known[..] else { panic!("{known:?}") };
        assert_eq!(
            (x.served.model.as_str(), &x.served.names),
            ("tiny", &vec!["x".into(), "y".into(), "z".into()])
        );
        assert_eq!(x.args.max_model_len, args(&["--max-model-len", "2000"]).max_model_len);
        assert_eq!(tiny.args.max_model_len, args(&["--max-model-len", "1000"]).max_model_len);
        assert_eq!((x.args.max_num_seqs, tiny.args.max_num_seqs), (3, 3));
        assert_eq!(x.args.kv_cache_dtype, args(&["--kv-cache-dtype", "fp8"]).kv_cache_dtype);
        assert_eq!((x.on_start, x.stop_timeout, tiny.on_start), (true, Duration::from_millis(2500), false));
        assert_eq!(tiny.served.model, "tiny");
        assert!(x.words.contains(&"--ctx-size=2000".to_owned()), "{:?}", x.words);
    }

    #[test]
    fn a_line_that_cannot_be_says_where_it_is() {
        refused("[x]\nport = 9", "line 2, column 1: port: expected an option");
        refused("[x]\n\n  max-num-seqs = many", "line 3, column 3: max-num-seqs: invalid value 'many'");
        refused("[x]\nctx-size = [\"1\"]", "line 2, column 1: ctx-size: expected one value");
        refused("[x]\nload-on-startup = yes", "line 2, column 1: load-on-startup: expected true or false");
        refused("[x]\nkv-cache-tokens = 9\nnum-gpu-blocks-override = 9", "line 1, column 1: ");
        refused("[x\n", "line 1, column 3: expected `]`");
        refused("[x]\n[y]\nalias = x", "two models are named `x`");
    }
}
