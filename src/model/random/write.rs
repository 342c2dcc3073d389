//! The random network as a checkpoint folder, for whoever reads such folders: another engine, or a converter.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{linear, vector};
use crate::model::config::{ConfigError, ModelConfig};
use crate::model::convert::{self, ConvertError};
use crate::model::json as python_json;
use crate::model::manifest::{self, Entry, Manifest};
use crate::model::names::{self, Naming, Role, Tensors};
use crate::model::quantization::Recipe;
use crate::weights::linear::NVFP4_BLOCK;
use crate::weights::writer::{Planned, Writer};
use crate::weights::{self, Dtype, Format, Kind, Linear, Source, codec};

/// Experts that are in memory at once.
const EXPERTS_AT_ONCE: usize = 16;

/// A checkpoint of random weights that can be written.
pub struct Plan {
    source: Source,
    json: Value,
    config: ModelConfig,
    recipe: Recipe,
    kind: Kind,
    seed: u64,
    shards: Vec<Vec<Planned>>,
    parameters: u64,
}

impl Plan {
    /// Plans every tensor of the network that `config.json` of `source` describes, its linear weights as `kind`; files
    /// will have at most `shard_bytes` of data, or one tensor. Other files of `source` but weights come along.
    pub fn new(source: Source, kind: Kind, seed: u64, shard_bytes: u64) -> Result<Self, ConvertError> {
        let text = source.file("config.json")?;
        let text = text.ok_or_else(|| ConvertError::NoConfig { place: source.place() })?;
        let parse_error =
            |e: serde_json::Error| ConfigError::Json { file: "config.json", reason: e.to_string() };
        let json = python_json::parse(&text).map_err(parse_error)?;
        let config = ModelConfig::from_value(&json)?;
        let recipe = Recipe::uniform(kind);
        let mut shards = vec![Vec::new()];
        let (mut bytes, mut parameters) = (0, 0);
        for entry in Manifest::new(&config, &recipe).entries() {
            check_width(&entry)?;
            if bytes > 0 && bytes + entry.bytes() > shard_bytes {
                shards.push(Vec::new());
                bytes = 0;
            }
            bytes += entry.bytes();
            parameters += entry.parameters;
            if let Some(shard) = shards.last_mut() {
                shard.push(Planned { name: entry.name, dtype: entry.dtype, shape: entry.shape });
            }
        }
        Ok(Plan { source, json, config, recipe, kind, seed, shards, parameters })
    }

    /// Bytes of all tensors: what progress counts up to.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().flatten().map(Planned::bytes).sum()
    }

    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Writes everything into `out`. `progress` hears bytes as they are written.
    ///
    /// Errors: `out` is the source, or holds files and `overwrite` is false; the disk.
    pub fn run(&self, out: &Path, overwrite: bool, progress: &dyn Fn(u64)) -> Result<(), ConvertError> {
        convert::prepare(&self.source, out, overwrite)?;
        let mut places = HashMap::new();
        let mut index = Map::new();
        let mut writers = Vec::with_capacity(self.shards.len());
        for (number, shard) in self.shards.iter().enumerate() {
            let name = convert::shard_name(number, self.shards.len());
            for planned in shard {
                places.insert(planned.name.clone(), number);
                index.insert(planned.name.clone(), Value::from(name.as_str()));
            }
            writers.push(Writer::create(&out.join(&name), shard.clone())?);
        }
        let mut scribe =
            Scribe { recipe: &self.recipe, seed: self.seed, places, writers, progress, failed: None };
        names::network(&self.config, &Naming::OFFICIAL, &mut scribe);
        let Scribe { writers, failed, .. } = scribe;
        if let Some(error) = failed {
            return Err(error.into());
        }
        writers.into_iter().try_for_each(Writer::finish)?;
        if self.shards.len() > 1 {
            let index = json!({"metadata": {"total_size": self.bytes()}, "weight_map": index});
            convert::write_file(out, "model.safetensors.index.json", &convert::pretty(&index))?;
        }
        convert::copy_companions(&self.source, out)?;
        // Last, because a folder with config.json counts as a checkpoint.
        convert::write_file(out, "config.json", &convert::pretty(&self.config_file()))?;
        Ok(())
    }

    /// The source's config.json with the formats of these weights.
    fn config_file(&self) -> Value {
        let mut config = self.json.clone();
        let Value::Object(map) = &mut config else { return config };
        map.remove("quantization_config");
        let group = |weights: Value| json!({"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}});
        let (algorithm, groups) = match self.kind {
            Kind::Fp8 => ("FP8", group(json!({"num_bits": 8, "type": "float", "dynamic": false}))),
            Kind::Nvfp4 => (
                "NVFP4",
                group(json!({"num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK, "dynamic": false})),
            ),
            Kind::F32 | Kind::F16 | Kind::BF16 => return config,
            Kind::Blocks(_) => unreachable!("random weights are never blocks of GGUF"),
        };
        let recipe = json!({
            "quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_scheme": null, "config_groups": groups,
        });
        map.insert("quantization_config".into(), recipe);
        config
    }
}

/// Errors where NVFP4's blocks do not fill a row.
fn check_width(entry: &Entry) -> Result<(), ConvertError> {
    let Some(module) = entry.name.strip_suffix(".weight").filter(|_| entry.format == Some(Kind::Nvfp4))
    else {
        return Ok(());
    };
    // The stored shape counts bytes, of two weights each.
    let cols = entry.parameters as usize / entry.shape[0].max(1);
    match cols.is_multiple_of(NVFP4_BLOCK) {
        true => Ok(()),
        false => Err(ConvertError::Width { module: module.into(), cols }),
    }
}

/// Writes what a walk over the names asks for; after a failure, nothing more.
struct Scribe<'a> {
    recipe: &'a Recipe,
    seed: u64,
    /// Tensor to writer.
    places: HashMap<String, usize>,
    writers: Vec<Writer>,
    progress: &'a dyn Fn(u64),
    failed: Option<weights::Error>,
}

impl Scribe<'_> {
    fn write(&mut self, name: &str, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        match self.writers[self.places[name]].write(name, bytes) {
            Ok(()) => (self.progress)(bytes.len() as u64),
            Err(error) => self.failed = Some(error),
        }
    }

    fn write_linear(&mut self, module: &str, linear: &Linear) {
        self.write(&format!("{module}.weight"), &linear.data);
        match &linear.format {
            Format::Fp8 { scale } => self.write(&format!("{module}.weight_scale"), &scale.to_le_bytes()),
            Format::Nvfp4 { scales, global_scale } => {
                self.write(&format!("{module}.weight_scale"), scales);
                self.write(&format!("{module}.weight_scale_2"), &global_scale.to_le_bytes());
            }
            Format::F32 | Format::F16 | Format::BF16 => {}
            Format::Blocks { .. } => unreachable!("random weights are never blocks of GGUF"),
        }
    }
}

impl Tensors for Scribe<'_> {
    type Linear = ();

    fn linear(&mut self, module: &str, rows: usize, cols: usize) {
        let kind = super::kind(self.recipe, module, cols);
        self.write_linear(module, &linear(self.seed, module, rows, cols, kind));
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) {
        let kind = manifest::gate_kind(self.recipe, module);
        self.write_linear(module, &linear(self.seed, module, rows, cols, kind));
    }

    fn vector(&mut self, name: &str, shape: &[usize], role: Role) -> Vec<f32> {
        let values = vector(self.seed, name, shape, role);
        let bytes: Vec<u8> = match manifest::vector_dtype(role) {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&v| codec::f32_to_bf16(v).to_le_bytes()).collect(),
        };
        self.write(name, &bytes);
        values
    }

    fn cache_scale(&mut self, _: &str) -> f32 {
        1.0
    }

    fn experts(&mut self, mixer: &str, projection: &str, count: usize, rows: usize, cols: usize) -> Vec<()> {
        let modules: Vec<String> =
            (0..count).map(|expert| format!("{mixer}.experts.{expert}.{projection}")).collect();
        for modules in modules.chunks(EXPERTS_AT_ONCE) {
            let one = |module: &String| {
                linear(self.seed, module, rows, cols, super::kind(self.recipe, module, cols))
            };
            let made: Vec<Linear> = modules.par_iter().map(one).collect();
            modules.iter().zip(&made).for_each(|(module, linear)| self.write_linear(module, linear));
        }
        vec![(); count]
    }
}
