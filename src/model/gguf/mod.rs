//! A GGUF file as a checkpoint: its tensors under the names that safetensors checkpoints have, its metadata as the files
//! that stand beside those. Nothing is expanded: weights stay the mapped bytes of the file.
//!
//! ```no_run
//! use ferrotron::model::{config::ModelConfig, gguf};
//! let checkpoint = gguf::open("nemotron-Q4_K_M.gguf".as_ref())?;
//! let config = ModelConfig::from_json(&checkpoint.file("config.json")?.expect("made from metadata"))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod tensors;
mod tokenizer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::weights::gguf::{Gguf, Metadata, Stored, parse};
use crate::weights::{self, Checkpoint, Source};

/// The tensors of all files by GGUF's names.
type Named<'a> = HashMap<&'a str, &'a Stored>;

/// Files of one model; the format's tools split at a few GB, so more is a mistake.
const SPLIT_LIMIT: u64 = 1000;

/// How many files a model is split into.
const SPLIT: &str = "split.count";

/// A path that leads to no GGUF model of this family.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Weights(#[from] weights::Error),

    #[error("{path}: no such file", path = path.display())]
    NoFile { path: PathBuf },

    #[error(
        "{path}: expected one *.gguf file, or one model in files -00001-of-0000n.gguf; got {got}: name the file itself",
        path = path.display()
    )]
    NotOne { path: PathBuf, got: String },

    #[error("{file}: general.architecture: expected nemotron_h or nemotron_h_moe; got {got}")]
    Architecture { file: String, got: String },

    #[error(
        "{file}: layer {layer}: expected a tensor blk.{layer}.ssm_in, attn_q, ffn_gate_inp or ffn_up; got none (a file \
         mtp-*.gguf holds the draft head alone: take the model's own)"
    )]
    Layer { file: String, layer: usize },
}

/// Opens a `.gguf` file, the first of split ones, or a folder that holds one model.
///
/// Errors: what is wrong with the file, or that it is another model's.
pub fn open(path: &Path) -> Result<Checkpoint, Error> {
    let path = if path.is_dir() { only_file(path)? } else { path.to_owned() };
    let (name, first) = read(&path)?;
    let split = first.metadata.size_or(SPLIT, 1)?;
    if split > SPLIT_LIMIT {
        return Err(first.metadata.wrong(SPLIT, format!("at most {SPLIT_LIMIT}"), split).into());
    }
    let mut files = vec![(name, first)];
    for number in 1..split {
        let (name, next) = read(&sibling(&files[0].1.metadata, &path, number, split)?)?;
        if next.metadata.size_or("split.no", 0)? != number {
            let got = next.metadata.size_or("split.no", 0)?;
            return Err(next.metadata.wrong("split.no", number.to_string(), got).into());
        }
        files.push((name, next));
    }
    checkpoint(files, &path)
}

/// A checkpoint of all files of a model, the first of which says what it is.
fn checkpoint(files: Vec<(String, Gguf)>, path: &Path) -> Result<Checkpoint, Error> {
    let metadata = &files[0].1.metadata;
    let architecture = metadata.text("general.architecture")?;
    if !matches!(architecture, "nemotron_h" | "nemotron_h_moe") {
        let (file, got) = (metadata.file().into(), architecture.into());
        return Err(Error::Architecture { file, got });
    }
    let named: Named =
        files.iter().flat_map(|(_, file)| &file.tensors).map(|t| (t.name.as_str(), t)).collect();
    let outline = config::Outline::read(metadata, architecture, &named)?;
    let mut made = vec![
        ("config.json", Bytes::from(outline.config.to_string())),
        ("generation_config.json", Bytes::from(tokenizer::generation_config(metadata)?.to_string())),
    ];
    made.extend(tokenizer::files(metadata)?);
    let place = path.display().to_string();
    let mut parts = Vec::with_capacity(files.len());
    for (name, file) in &files {
        parts.push((name.clone(), tensors::parts(name, &file.tensors, &named, &outline)?));
    }
    Ok(Checkpoint::from_parts(Source::Made { place, files: made }, parts)?)
}

/// Maps and parses one file.
fn read(path: &Path) -> Result<(String, Gguf), Error> {
    let (folder, name) = match (path.parent(), path.file_name().and_then(|n| n.to_str())) {
        (Some(folder), Some(name)) => (folder, name),
        _ => return Err(Error::NoFile { path: path.into() }),
    };
    let Some(bytes) = Source::folder(folder).file(name)? else {
        return Err(Error::NoFile { path: path.into() });
    };
    Ok((name.into(), parse(&path.display().to_string(), bytes)?))
}

/// The one model of a folder. Draft heads and vision towers that lie beside it are no models.
fn only_file(folder: &Path) -> Result<PathBuf, Error> {
    let mut names = Source::folder(folder).names()?;
    names.retain(|n| n.ends_with(".gguf") && !n.starts_with("mtp-") && !n.starts_with("mmproj"));
    let first = |name: &String| split_name(name).is_none_or(|(_, number, _)| number == 1);
    let firsts: Vec<_> = names.iter().filter(|n| first(n)).collect();
    match firsts[..] {
        [name] => Ok(folder.join(name)),
        [] => Err(Error::NotOne { path: folder.into(), got: "none".into() }),
        _ => {
            let got = firsts.iter().take(4).map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
            Err(Error::NotOne { path: folder.into(), got })
        }
    }
}

/// File `number` (from 0) of the `count` that `first` is the first of.
fn sibling(metadata: &Metadata, first: &Path, number: u64, count: u64) -> Result<PathBuf, weights::Error> {
    let name = first.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    match split_name(name) {
        Some((stem, 1, named)) if named == count => {
            Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1)))
        }
        _ => {
            let expected = format!("the first file, whose name ends in -00001-of-{count:05}.gguf");
            Err(metadata.wrong(SPLIT, expected, format!("{count} in {name}")))
        }
    }
}

/// `model-00002-of-00003.gguf` as (`model`, 2, 3).
fn split_name(name: &str) -> Option<(&str, u64, u64)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    match digits(number) && digits(count) {
        true => Some((stem, number.parse().ok()?, count.parse().ok()?)),
        false => None,
    }
}
