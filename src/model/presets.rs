//! The checkpoints that have a name here: what is known of them without their files, and where their files may be.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::config::{ConfigError, ModelConfig};
use super::embedded::{BLUEPRINTS, EMBEDDED};
use super::gguf;
use super::quantization::Recipe;
use crate::weights::{self, Checkpoint, Source, StaticFiles};

/// A published checkpoint: `models/<name>/` as data.
pub struct Preset {
    pub name: &'static str,
    config: &'static str,
    quantization: &'static str,
    policy: &'static str,
    /// What a network of random weights needs.
    pub files: StaticFiles,
    /// MODEL.md
    pub description: &'static str,
}

macro_rules! presets {
    ($($name:literal),*) => {
        &[$(Preset {
            name: $name,
            config: include_str!(concat!("../../models/", $name, "/config.json")),
            files: &[("config.json", include_bytes!(concat!("../../models/", $name, "/config.json")))],
            quantization: include_str!(concat!("../../models/", $name, "/quantization.json")),
            policy: include_str!(concat!("../../models/", $name, "/preset.json")),
            description: include_str!(concat!("../../models/", $name, "/MODEL.md")),
        }),*]
    };
}

/// All of them.
pub static PRESETS: &[Preset] =
    presets!("nano-nvfp4", "nano-bf16", "super-nvfp4", "super-bf16", "lightning-nvfp4", "nano-4b");

/// How a published checkpoint is meant to be used: policy as data.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    pub title: String,
    /// `org/name` on the Hugging Face hub.
    pub hub: String,
    /// What `pull` asks for.
    pub revision: String,
    /// The beginning of the commit whose files our facts were read from.
    pub revision_read: Option<String>,
    /// Shorter names.
    pub aliases: Vec<String>,
    /// The vendor's recommendation.
    pub sampling: Sampling,
    /// The same with tools, where it differs.
    pub sampling_with_tools: Option<Sampling>,
    pub stop_token_ids: Vec<u32>,
    /// Name of the reasoning splitter's rules.
    pub reasoning_parser: String,
    /// Name of the tool grammar.
    pub tool_parser: String,
    /// Tokens a sequence may have, as the checkpoint's config says.
    pub context: usize,
    /// Totals that a third party read from the headers of all shards.
    pub published: Option<Published>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    pub temperature: f32,
    pub top_p: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    pub tensors: u64,
    pub bytes: u64,
    pub shards: u64,
}

impl Preset {
    pub fn config(&self) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(self.config.as_bytes())
    }

    /// Which module is in which format.
    pub fn recipe(&self) -> Result<Recipe, ConfigError> {
        Recipe::from_compact(self.quantization)
    }

    pub fn policy(&self) -> Result<Policy, ConfigError> {
        serde_json::from_str(self.policy)
            .map_err(|e| ConfigError::Json { file: "preset.json", reason: e.to_string() })
    }

    /// Whether this preset goes by `name`: its own, an alias, or its hub id.
    fn answers_to(&self, name: &str) -> bool {
        let policy = || self.policy().is_ok_and(|p| p.hub == name || p.aliases.iter().any(|a| a == name));
        self.name == name || policy()
    }
}

/// The preset of this name, alias or hub id.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|p| p.answers_to(name))
}

/// Where a model is.
#[derive(Clone)]
pub enum Location {
    /// A folder with `config.json`; the preset, if its name says which one it is.
    Folder { path: PathBuf, preset: Option<&'static Preset> },
    /// Part of the binary: one of [`EMBEDDED`] or of [`BLUEPRINTS`].
    Embedded { name: &'static str, files: StaticFiles },
    /// A GGUF file, or a folder whose only weights are one.
    Gguf { path: PathBuf },
}

impl Location {
    /// The checkpoint there: headers are read, weights are not.
    pub fn open(&self) -> Result<Checkpoint, OpenError> {
        match self {
            Location::Gguf { path } => Ok(gguf::open(path)?),
            Location::Folder { path, .. } => Ok(Checkpoint::open(Source::folder(path))?),
            Location::Embedded { name, files } => Ok(Checkpoint::open(Source::embedded(name, files))?),
        }
    }

    /// The files of a checkpoint in safetensors; `None` where it is GGUF.
    pub fn source(&self) -> Option<Source> {
        match self {
            Location::Folder { path, .. } => Some(Source::folder(path)),
            Location::Embedded { name, files } => Some(Source::embedded(name, files)),
            Location::Gguf { .. } => None,
        }
    }

    pub fn preset(&self) -> Option<&'static Preset> {
        match self {
            Location::Folder { preset, .. } => *preset,
            Location::Embedded { .. } | Location::Gguf { .. } => None,
        }
    }
}

/// A location whose files are no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Weights(#[from] weights::Error),
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
}

/// A name that leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "unknown model {name:?}: expected one of {known}, a folder with config.json, a .gguf file, or a hub id such as \
         org/name",
        known = known_names()
    )]
    Unknown { name: String },

    #[error("{path}: no config.json; expected a checkpoint folder, or one with a .gguf file", path = path.display())]
    NoConfig { path: PathBuf },

    #[error(
        "{name} is not on this machine. With a network: `ferrotron pull {name}`. Without: download all files of \
         https://huggingface.co/{hub} (config.json, generation_config.json, tokenizer.json, tokenizer_config.json, \
         chat_template.jinja, hf_quant_config.json if there is one, *.safetensors and model.safetensors.index.json) \
         elsewhere, put them into one folder and give that folder as the model; or copy the hub's cache to {cache}",
        cache = cache.display()
    )]
    NotDownloaded { name: String, hub: String, cache: PathBuf },

    #[error("{hub} at {revision:?} is not in {cache}: expected a branch, a tag or a commit that was downloaded", cache = cache.display())]
    NoRevision { hub: String, revision: String, cache: PathBuf },
}

/// Every name that a model argument knows.
fn known_names() -> String {
    let embedded = EMBEDDED.iter().chain(BLUEPRINTS).map(|(name, _)| *name);
    embedded.chain(PRESETS.iter().map(|p| p.name)).collect::<Vec<_>>().join(", ")
}

/// Finds `name`: an embedded model, a preset or a hub id in the hub's cache, a folder, or a GGUF file.
///
/// `hub_cache` is the folder with `models--org--name` inside. A known name wins over a folder of the same name;
/// write `./tiny` for the folder.
pub fn resolve(name: &str, hub_cache: &Path) -> Result<Location, Error> {
    resolve_at(name, hub_cache, None)
}

/// The same; what comes from the hub, at this branch, tag or commit.
pub fn resolve_at(name: &str, hub_cache: &Path, wanted: Option<&str>) -> Result<Location, Error> {
    let embedded = EMBEDDED.iter().chain(BLUEPRINTS);
    if let Some(&(name, files)) = embedded.into_iter().find(|(embedded, _)| *embedded == name) {
        return Ok(Location::Embedded { name, files });
    }
    let preset = find(name);
    let folder = Path::new(name);
    if preset.is_none() && (holds_gguf(folder) || folder.extension().is_some_and(|e| e == "gguf")) {
        return Ok(Location::Gguf { path: folder.into() });
    }
    if preset.is_none() && folder.is_dir() {
        return match folder.join("config.json").is_file() {
            true => Ok(Location::Folder { path: folder.into(), preset: None }),
            false => Err(Error::NoConfig { path: folder.into() }),
        };
    }
    let (hub, revision) = match preset.and_then(|p| p.policy().ok()) {
        Some(policy) => (policy.hub, policy.revision),
        None if is_hub_id(name) => (name.to_string(), "main".to_string()),
        None => return Err(Error::Unknown { name: name.into() }),
    };
    let found = match wanted {
        Some(wanted) => exactly(hub_cache, &hub, wanted),
        None => snapshot(hub_cache, &hub, &revision),
    };
    match (found, wanted) {
        (Some(path), _) => Ok(Location::Folder { path, preset }),
        (None, Some(wanted)) => {
            Err(Error::NoRevision { hub, revision: wanted.into(), cache: hub_cache.into() })
        }
        (None, None) => Err(Error::NotDownloaded { name: name.into(), hub, cache: hub_cache.into() }),
    }
}

/// Whether a folder's only weights are GGUF: repositories of such files often have a `config.json` as well.
fn holds_gguf(folder: &Path) -> bool {
    let names = Source::folder(folder).names().unwrap_or_default();
    let any = |end: &str| names.iter().any(|n| n.ends_with(end));
    any(".gguf") && !any(".safetensors") && !any(".safetensors.index.json")
}

/// Whether this is `org/name` as the hub spells it.
pub fn is_hub_id(name: &str) -> bool {
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    name.split_once('/').is_some_and(|(org, model)| plain(org) && plain(model))
}

/// The folder of a hub repository in the hub's cache: the commit its ref names, or the newest one that is there.
pub fn snapshot(hub_cache: &Path, hub: &str, revision: &str) -> Option<PathBuf> {
    let repository = hub_cache.join(format!("models--{}", hub.replace('/', "--")));
    let snapshots = repository.join("snapshots");
    let complete = |path: &PathBuf| path.join("config.json").is_file();
    let named = std::fs::read_to_string(repository.join("refs").join(revision)).ok();
    if let Some(path) = named.map(|commit| snapshots.join(commit.trim())).filter(complete) {
        return Some(path);
    }
    let folders = std::fs::read_dir(snapshots).ok()?.flatten().map(|e| e.path()).filter(complete);
    folders.max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
}

/// The folder of a branch, a tag or a commit of a hub repository, and of no other.
fn exactly(hub_cache: &Path, hub: &str, revision: &str) -> Option<PathBuf> {
    // A name is a name, not a way to another folder.
    let plain = !revision.split('/').any(|part| part.is_empty() || part.starts_with('.'));
    let repository = plain.then(|| hub_cache.join(format!("models--{}", hub.replace('/', "--"))))?;
    let named = std::fs::read_to_string(repository.join("refs").join(revision)).ok();
    let commit = named.as_deref().map_or(revision, str::trim);
    let path = repository.join("snapshots").join(commit);
    path.join("config.json").is_file().then_some(path)
}

/// Every model of the family's hub repositories that the cache holds: (hub id, folder).
pub fn cached(hub_cache: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(hub_cache) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let hub = name.strip_prefix("models--")?.replacen("--", "/", 1);
            let path = snapshot(hub_cache, &hub, "main")?;
            // Only what we could serve: the cache is shared with every other program.
            let config = std::fs::read(path.join("config.json")).ok()?;
            ModelConfig::from_json(&config).ok()?;
            Some((hub, path))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hub cache with one repository of one snapshot, complete if it has a config.
    fn cache_with(hub: &str, config: Option<&str>) -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join(format!("models--{}", hub.replace('/', "--")));
        let snapshot = repository.join("snapshots").join("abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs").join("main"), "abc").unwrap();
        if let Some(config) = config {
            std::fs::write(snapshot.join("config.json"), config).unwrap();
        }
        cache
    }

    fn failure(name: &str, cache: &Path) -> String {
        match resolve(name, cache) {
            Ok(_) => panic!("{name} was found"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_preset_is_found_by_each_of_its_names() {
        let cache = cache_with("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", Some("{}"));
        for name in ["super-nvfp4", "super", "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4"] {
            let location = resolve(name, cache.path()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(location.preset().map(|p| p.name), Some("super-nvfp4"), "{name}");
            assert!(location.source().is_some_and(|source| source.place().ends_with("abc")));
        }
    }

    #[test]
    fn a_revision_is_that_one_or_none() {
        let cache = cache_with("someone/a-model", Some("{}"));
        let at = |revision| resolve_at("someone/a-model", cache.path(), Some(revision)).is_ok();
        assert!(at("main") && at("abc"));
        assert!(!at("v2") && !at("") && !at("../snapshots/abc"));
    }

    #[test]
    fn any_hub_id_in_the_cache_is_found_even_without_its_ref() {
        let cache = cache_with("someone/a-model", Some("{}"));
        std::fs::remove_file(cache.path().join("models--someone--a-model/refs/main")).unwrap();
        assert!(resolve("someone/a-model", cache.path()).unwrap().preset().is_none());
    }

    #[test]
    fn a_folder_is_a_model_if_it_has_a_config() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().to_str().unwrap();
        assert!(failure(name, folder.path()).contains("no config.json"));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let place = || resolve(name, folder.path()).unwrap().source().map(|source| source.place());
        assert_eq!(place().as_deref(), Some(name));
        std::fs::write(folder.path().join("model.gguf"), "").unwrap();
        assert_eq!(place(), None, "now it is a folder with a GGUF file");
        std::fs::write(folder.path().join("model.safetensors"), "").unwrap();
        assert_eq!(place().as_deref(), Some(name), "safetensors come first");
    }

    #[test]
    fn what_is_not_here_says_what_to_download_and_where_to_put_it() {
        let cache = cache_with("nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", None);
        let message = failure("nano-4b", cache.path());
        for part in [
            "ferrotron pull nano-4b",
            "https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16",
            "tokenizer.json",
            &cache.path().display().to_string(),
        ] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let cache = tempfile::tempdir().unwrap();
        for name in ["gpt-5", "../etc/passwd", "a/b/c", "/absent/folder", "", "./nano"] {
            let message = failure(name, cache.path());
            assert!(message.starts_with(&format!("unknown model {name:?}")), "{message}");
            assert!(
                PRESETS.iter().all(|p| message.contains(p.name)) && message.contains("org/name"),
                "{message}"
            );
        }
    }

    #[test]
    fn only_models_of_the_family_are_listed_from_the_cache() {
        let config = PRESETS[0].config;
        let cache = cache_with("someone/a--model", Some(config));
        assert_eq!(
            cached(cache.path()).iter().map(|(hub, _)| hub.as_str()).collect::<Vec<_>>(),
            ["someone/a--model"]
        );
        let other = cache_with("someone/bert", Some(r#"{"model_type": "bert"}"#));
        assert_eq!(cached(other.path()), []);
        assert_eq!(cached(&cache.path().join("absent")), []);
    }
}
