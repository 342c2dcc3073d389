//! An unquantised checkpoint becomes one in Super's mixed ModelOpt layout: routed experts NVFP4, Mamba projections
//! FP8, everything else as it is, the MTP block included.
//!
//! No activation is calibrated, so no `input_scale` is written and the recipe says weight-only: an invented scale
//! would be worse than none.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::config::{ConfigError, ModelConfig};
use super::json as python_json;
use super::manifest::{Manifest, stored_tensors};
use super::names::{Naming, Part};
use super::quantization::{Recipe, Scheme};
use crate::weights::quantize::{Loss, loss, quantize};
use crate::weights::writer::{Planned, Writer};
use crate::weights::{self, Checkpoint, Format, Kind, Linear, Source};

/// Files beside the weights that a served checkpoint needs; copied as they are.
const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
];

/// Elements that are expanded to f32 at a time, over all threads: half a gigabyte.
const BATCH_ELEMENTS: usize = 128 << 20;

/// What became of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub module: String,
    pub kind: Kind,
    pub loss: Loss,
    /// As stored before and after.
    pub bytes_before: u64,
    pub bytes_after: u64,
}

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error(transparent)]
    Weights(#[from] weights::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{place}: no config.json")]
    NoConfig { place: String },
    #[error("{place}: no embedding table: expected backbone.embeddings.weight")]
    NotTheModel { place: String },
    #[error("{module}: expected BF16, F16 or F32; got {got}, so this checkpoint is quantised already")]
    AlreadyQuantised { module: String, got: &'static str },
    #[error("{module}: width {cols} is not a multiple of 16, as NVFP4 blocks ask for")]
    Width { module: String, cols: usize },
    #[error("{module}: holds a value that is not finite")]
    NotFinite { module: String },
    #[error("{path}: is not empty; give another folder, or allow overwriting with --force", path = path.display())]
    NotEmpty { path: PathBuf },
    #[error("{path}: is the source itself; give another folder", path = path.display())]
    Itself { path: PathBuf },
}

/// The format of `module` (with its prefixes) in the mixed layout; `None` for what stays as it is.
pub fn target(module: &str) -> Option<Kind> {
    let projection = |name: &str| module.ends_with(name);
    match Part::of(module) {
        Part::RoutedExperts => Some(Kind::Nvfp4),
        Part::Mamba if projection(".in_proj") || projection(".out_proj") => Some(Kind::Fp8),
        _ => None,
    }
}

/// A conversion that was checked and can run.
pub struct Plan {
    checkpoint: Checkpoint,
    config: Value,
    shards: Vec<Vec<Job>>,
    quantised: BTreeMap<String, Kind>,
}

struct Job {
    /// Where the weight comes from.
    from: From,
    outputs: Vec<Planned>,
    elements: usize,
}

enum From {
    /// A tensor that is copied.
    Tensor(String),
    /// A weight that is quantised.
    Weight { module: String, weight: Linear, kind: Kind },
}

impl Plan {
    /// Reads headers and plans every output tensor; files will have at most `shard_bytes` of data, or one tensor.
    pub fn new(source: Source, shard_bytes: u64) -> Result<Self, ConvertError> {
        let place = source.place();
        let checkpoint = Checkpoint::open(source)?;
        let text = checkpoint.file("config.json")?.ok_or(ConvertError::NoConfig { place: place.clone() })?;
        let parse_error =
            |e: serde_json::Error| ConfigError::Json { file: "config.json", reason: e.to_string() };
        let config = python_json::parse(&text).map_err(parse_error)?;
        let model = ModelConfig::from_value(&config)?;
        let naming = Naming::detect(&checkpoint).ok_or(ConvertError::NotTheModel { place })?;

        let mut quantised = BTreeMap::new();
        let mut jobs = Vec::new();
        let mut consumed = std::collections::HashSet::new();
        let recipe = Recipe::uniform(Kind::BF16);
        for entry in Manifest::with_naming(&model, &recipe, naming).entries() {
            let Some(module) = entry.name.strip_suffix(".weight").filter(|_| entry.format.is_some()) else {
                continue;
            };
            let Some(kind) = target(module) else { continue };
            let (weight, stored_as) = read(&checkpoint, module, entry.shape[0], entry.shape[1], &model)?;
            consumed.insert(stored_as);
            quantised.insert(module.to_string(), kind);
            jobs.push(quantise_job(module, weight, kind)?);
        }
        for name in checkpoint.names().filter(|n| !consumed.contains(*n)) {
            if let Some(tensor) = checkpoint.tensor(name) {
                let output = Planned { name: name.into(), dtype: tensor.dtype, shape: tensor.shape };
                jobs.push(Job { from: From::Tensor(name.into()), outputs: vec![output], elements: 0 });
            }
        }
        Ok(Plan { checkpoint, config, shards: into_shards(jobs, shard_bytes), quantised })
    }

    /// Bytes of all source tensors: what progress counts up to.
    pub fn bytes(&self) -> u64 {
        self.checkpoint.bytes()
    }

    /// Weights that will be quantised.
    pub fn weights(&self) -> usize {
        self.quantised.len()
    }

    /// Writes everything into `out`, each file under a temporary name first. `progress` hears source bytes done.
    ///
    /// Errors: `out` is the source, or holds files and `overwrite` is false; a weight is not finite; the disk.
    pub fn run(
        &self,
        out: &Path,
        overwrite: bool,
        progress: &dyn Fn(u64),
    ) -> Result<Vec<Outcome>, ConvertError> {
        prepare(self.checkpoint.source(), out, overwrite)?;
        let mut outcomes = Vec::with_capacity(self.quantised.len());
        let mut index = Map::new();
        let mut total = 0;
        for (number, jobs) in self.shards.iter().enumerate() {
            let name = shard_name(number, self.shards.len());
            let outputs: Vec<Planned> = jobs.iter().flat_map(|j| j.outputs.clone()).collect();
            for output in &outputs {
                index.insert(output.name.clone(), Value::from(name.as_str()));
                total += output.bytes();
            }
            let mut writer = Writer::create(&out.join(&name), outputs)?;
            for batch in batches(jobs) {
                let done: Vec<_> = batch.par_iter().map(encode).collect();
                for (job, encoded) in batch.iter().zip(done) {
                    self.write(job, encoded?, &mut writer, &mut outcomes, progress)?;
                }
            }
            writer.finish()?;
        }
        if self.shards.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": index});
            write_file(out, "model.safetensors.index.json", &pretty(&index))?;
        }
        write_file(out, "hf_quant_config.json", &pretty(&self.quant_config_file()))?;
        copy_companions(self.checkpoint.source(), out)?;
        // Last, because a folder with config.json counts as a checkpoint.
        write_file(out, "config.json", &pretty(&self.config_file()))?;
        Ok(outcomes)
    }

    fn write(
        &self,
        job: &Job,
        encoded: Option<(Linear, Loss)>,
        writer: &mut Writer,
        outcomes: &mut Vec<Outcome>,
        progress: &dyn Fn(u64),
    ) -> Result<(), ConvertError> {
        match (&job.from, encoded) {
            (From::Weight { module, weight, kind }, Some((linear, loss))) => {
                write_linear(writer, module, &linear)?;
                let bytes_before = weight.data.len() as u64;
                let bytes_after = job.outputs.iter().map(Planned::bytes).sum();
                outcomes.push(Outcome {
                    module: module.clone(),
                    kind: *kind,
                    loss,
                    bytes_before,
                    bytes_after,
                });
                progress(bytes_before);
            }
            (From::Tensor(name), _) => {
                if let Some(tensor) = self.checkpoint.tensor(name) {
                    writer.write(name, &tensor.bytes)?;
                    progress(tensor.bytes.len() as u64);
                }
            }
            (From::Weight { .. }, None) => unreachable!("encode answers every weight"),
        }
        Ok(())
    }

    fn layers(&self) -> Map<String, Value> {
        let entry = |kind: &Kind| match kind {
            Kind::Nvfp4 => json!({"quant_algo": "W4A16_NVFP4", "group_size": 16}),
            _ => json!({"quant_algo": "FP8"}),
        };
        self.quantised.iter().map(|(module, kind)| (module.clone(), entry(kind))).collect()
    }

    fn quant_config_file(&self) -> Value {
        json!({
            "producer": {
                "name": "ferrotron",
                "version": env!("CARGO_PKG_VERSION"),
                "note": "weight-only: no activation was calibrated, so there is no input_scale",
            },
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": null,
                "quantized_layers": self.layers(),
            },
        })
    }

    /// The source's config.json and the recipe in it, in the form that says weight-only for FP8 as well.
    fn config_file(&self) -> Value {
        let group = |kind: Kind, weights: Value| {
            let targets: Vec<&String> =
                self.quantised.iter().filter(|(_, k)| **k == kind).map(|(m, _)| m).collect();
            json!({"targets": targets, "weights": weights, "input_activations": null})
        };
        let recipe = json!({
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_scheme": null,
            "config_groups": {
                "group_0": group(Kind::Nvfp4, json!({"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false})),
                "group_1": group(Kind::Fp8, json!({"num_bits": 8, "type": "float", "dynamic": false})),
            },
            "quantized_layers": self.layers(),
        });
        let mut config = self.config.clone();
        if let Value::Object(map) = &mut config {
            map.insert("quantization_config".into(), recipe);
        }
        config
    }
}

/// The weight of `module` and the name of the tensor it is stored in: its own, or its experts' stacked one.
fn read(
    checkpoint: &Checkpoint,
    module: &str,
    rows: usize,
    cols: usize,
    model: &ModelConfig,
) -> Result<(Linear, String), ConvertError> {
    let own = format!("{module}.weight");
    if !checkpoint.contains(&own)
        && let Some((experts, rest)) = module.split_once(".experts.")
        && let Some((number, projection)) = rest.split_once('.')
        && let Ok(number) = number.parse::<usize>()
    {
        let stacked = format!("{experts}.experts.{projection}");
        let count = model.layers.iter().find_map(|l| match l {
            super::config::Layer::Moe(moe) if number < moe.experts => Some(moe.experts),
            _ => None,
        });
        if let (true, Some(count)) = (checkpoint.contains(&stacked), count) {
            let weight = checkpoint.stacked(&stacked, count, rows, cols)?.swap_remove(number);
            return Ok((weight, stacked));
        }
    }
    Ok((checkpoint.linear(module, rows, cols)?, own))
}

fn quantise_job(module: &str, weight: Linear, kind: Kind) -> Result<Job, ConvertError> {
    if !matches!(weight.format, Format::BF16 | Format::F16 | Format::F32) {
        return Err(ConvertError::AlreadyQuantised { module: module.into(), got: weight.kind().name() });
    }
    let (rows, cols) = (weight.rows, weight.cols);
    if kind == Kind::Nvfp4 && !cols.is_multiple_of(weights::linear::NVFP4_BLOCK) {
        return Err(ConvertError::Width { module: module.into(), cols });
    }
    let scheme = Scheme { kind, input_scale: false };
    let planned = |(suffix, dtype, shape)| Planned { name: format!("{module}.{suffix}"), dtype, shape };
    let outputs = stored_tensors(scheme, rows, cols).into_iter().map(planned).collect();
    Ok(Job { from: From::Weight { module: module.into(), weight, kind }, outputs, elements: rows * cols })
}

/// `None` for a tensor that is copied.
fn encode(job: &Job) -> Result<Option<(Linear, Loss)>, ConvertError> {
    let From::Weight { module, weight, kind } = &job.from else { return Ok(None) };
    let values = weight.to_f32();
    if !values.iter().all(|v| v.is_finite()) {
        return Err(ConvertError::NotFinite { module: module.clone() });
    }
    let linear = quantize(&values, weight.rows, weight.cols, *kind);
    let loss = loss(&values, &linear);
    Ok(Some((linear, loss)))
}

fn write_linear(writer: &mut Writer, module: &str, linear: &Linear) -> Result<(), weights::Error> {
    writer.write(&format!("{module}.weight"), &linear.data)?;
    match &linear.format {
        Format::Fp8 { scale } => writer.write(&format!("{module}.weight_scale"), &scale.to_le_bytes()),
        Format::Nvfp4 { scales, global_scale } => {
            writer.write(&format!("{module}.weight_scale"), scales)?;
            writer.write(&format!("{module}.weight_scale_2"), &global_scale.to_le_bytes())
        }
        Format::F32 | Format::F16 | Format::BF16 | Format::Blocks { .. } => Ok(()),
    }
}

/// An empty folder, or one whose old weights are gone, so that none of them is taken for new.
pub(super) fn prepare(source: &Source, out: &Path, overwrite: bool) -> Result<(), ConvertError> {
    let io = |e| weights::Error::io(out, e);
    std::fs::create_dir_all(out).map_err(io)?;
    if let Source::Folder(source) = source
        && source.canonicalize().map_err(io)? == out.canonicalize().map_err(io)?
    {
        return Err(ConvertError::Itself { path: out.into() });
    }
    for entry in std::fs::read_dir(out).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if !overwrite {
            return Err(ConvertError::NotEmpty { path: out.into() });
        }
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.ends_with(".safetensors") || name == "model.safetensors.index.json" {
            std::fs::remove_file(&path).map_err(|e| weights::Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// What stands beside the weights of `source` and is served with them.
pub(super) fn copy_companions(source: &Source, out: &Path) -> Result<(), weights::Error> {
    for name in COMPANIONS {
        if let Some(bytes) = source.file(name)? {
            write_file(out, name, &bytes)?;
        }
    }
    Ok(())
}

/// Consecutive jobs whose values fit in memory together.
fn batches(jobs: &[Job]) -> Vec<&[Job]> {
    let mut batches = Vec::new();
    let (mut start, mut elements) = (0, 0);
    for (at, job) in jobs.iter().enumerate() {
        if at > start && elements + job.elements > BATCH_ELEMENTS {
            batches.push(&jobs[start..at]);
            (start, elements) = (at, 0);
        }
        elements += job.elements;
    }
    batches.push(&jobs[start..]);
    batches
}

fn into_shards(jobs: Vec<Job>, limit: u64) -> Vec<Vec<Job>> {
    let mut shards = vec![Vec::new()];
    let mut bytes = 0;
    for job in jobs {
        let size: u64 = job.outputs.iter().map(Planned::bytes).sum();
        if bytes > 0 && bytes + size > limit {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(shard) = shards.last_mut() {
            shard.push(job);
        }
    }
    shards
}

pub(super) fn shard_name(number: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    }
}

pub(super) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

pub(super) fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), weights::Error> {
    let (path, partial) = (folder.join(name), folder.join(format!("{name}.partial")));
    let io = |e| weights::Error::io(&path, e);
    let mut file = std::fs::File::create(&partial).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
    std::fs::rename(&partial, &path).map_err(io)
}
