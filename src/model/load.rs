//! A checkpoint becomes the fields of a network, every name resolved and every shape checked.
//!
//! ```no_run
//! use ferrotron::model::{config::ModelConfig, load};
//! use ferrotron::weights::{Checkpoint, Source};
//! let checkpoint = Checkpoint::open(Source::folder("nemotron"))?;
//! let config = ModelConfig::from_json(&checkpoint.file("config.json")?.expect("a config"))?;
//! let loaded = load::load(&config, &checkpoint, &|bytes| eprintln!("{bytes} of {}", checkpoint.bytes()))?;
//! for warning in &loaded.warnings {
//!     eprintln!("{warning}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use super::config::ModelConfig;
use super::fields::Fields;
use super::manifest::{self, Group, Totals, dtype_name};
use super::names::{self, Naming, Part, Role, Tensors};
use super::quantization::Recipe;
use crate::weights::{Checkpoint, Dtype, Error, Kind, Linear, Stored};

/// Everything a linear weight may bring along, after its module's name. What a format does not read (activation
/// scales, when weights are read as weight-only) is still known.
const LINEAR_SUFFIXES: [&str; 9] = [
    "weight",
    "weight_scale",
    "weight_scale_2",
    "weight_packed",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "output_scale",
    "scale",
];

/// Problems and leftovers that a message lists before it only counts.
const LISTED: usize = 8;

/// Bytes touched between two reports of progress.
const PROGRESS_STEP: usize = 64 << 20;

/// A network with its weights.
pub struct Loaded {
    /// `mtp` is `None` if the configuration has no MTP block, or the checkpoint holds none of its tensors.
    pub fields: Fields<Linear>,
    pub naming: Naming,
    /// For the log: tensors that nobody asked for, an MTP block that is promised and absent.
    pub warnings: Vec<String>,
}

/// The checkpoint does not hold the network that its configuration describes.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("no embedding table: expected backbone.embeddings.weight or model.embeddings.weight; got {got}")]
    NotTheModel { got: String },
    #[error("{}", Problems(.0))]
    Tensors(Vec<Error>),
}

/// Resolves every field of `config` in `checkpoint`. Weights stay where they are mapped; each is touched once, so
/// that it is in memory afterwards, and `progress` hears the bytes touched so far, out of `checkpoint.bytes()`.
///
/// Errors: all tensors that are missing or wrong, together.
pub fn load(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    progress: &dyn Fn(u64),
) -> Result<Loaded, LoadError> {
    let (fields, found) = resolve(config, checkpoint, Some(progress))?;
    if !found.problems.is_empty() {
        return Err(LoadError::Tensors(found.problems));
    }
    let mut warnings = found.warnings;
    if !found.leftovers.is_empty() {
        let shown = found.leftovers.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
        warnings.push(format!("{} tensors are not part of the network: {shown}", found.leftovers.len()));
    }
    Ok(Loaded { fields, naming: found.naming, warnings })
}

/// As much as can be said of a checkpoint without reading its data.
pub struct Inspection {
    pub naming: Naming,
    /// What was found, by part and format.
    pub groups: BTreeMap<Group, Totals>,
    /// Tensors that are missing or wrong.
    pub problems: Vec<Error>,
    /// Stored tensors that no field asks for.
    pub leftovers: Vec<String>,
    /// Modules that are stored in another format than the recipe says: (module, recipe, stored).
    pub disagreements: Vec<(String, Kind, Kind)>,
    pub warnings: Vec<String>,
}

/// Resolves every name, shape and dtype without touching any data, and compares the formats with `recipe`.
pub fn inspect(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
) -> Result<Inspection, LoadError> {
    let (_, mut found) = resolve(config, checkpoint, None)?;
    for (module, kind) in std::mem::take(&mut found.modules) {
        let expected = manifest::linear_scheme(recipe, &module).kind;
        // A recipe's BF16 only means that a module is not quantised.
        let plain = |k| matches!(k, Kind::BF16 | Kind::F16 | Kind::F32);
        // No recipe speaks of GGUF's blocks.
        let known = !matches!(kind, Kind::Blocks(_));
        if known && expected != kind && !(plain(expected) && plain(kind)) {
            found.disagreements.push((module, expected, kind));
        }
    }
    Ok(Inspection {
        naming: found.naming,
        groups: found.groups,
        problems: found.problems,
        leftovers: found.leftovers,
        disagreements: found.disagreements,
        warnings: found.warnings,
    })
}

/// The network as stored, for counting its bytes: no data is touched, vectors are zeros. Errors as [`load`].
pub fn outline(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Fields<Linear>, LoadError> {
    let (fields, found) = resolve(config, checkpoint, None)?;
    if found.problems.is_empty() { Ok(fields) } else { Err(LoadError::Tensors(found.problems)) }
}

/// The network without weights: right shapes and formats, empty data, vectors of zeros. For trace and plan.
pub fn describe(config: &ModelConfig, recipe: &Recipe) -> Fields<Linear> {
    names::network(config, &Naming::OFFICIAL, &mut Describe { recipe })
}

struct Describe<'a> {
    recipe: &'a Recipe,
}

impl Tensors for Describe<'_> {
    type Linear = Linear;

    fn linear(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        Linear::described(rows, cols, manifest::linear_scheme(self.recipe, module).kind)
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        Linear::described(rows, cols, manifest::gate_kind(self.recipe, module))
    }

    fn vector(&mut self, _: &str, shape: &[usize], _: Role) -> Vec<f32> {
        vec![0.0; shape.iter().product()]
    }

    fn cache_scale(&mut self, _: &str) -> f32 {
        1.0
    }
}

fn resolve<'a>(
    config: &ModelConfig,
    checkpoint: &'a Checkpoint,
    progress: Option<&'a dyn Fn(u64)>,
) -> Result<(Fields<Linear>, Resolver<'a>), LoadError> {
    let Some(naming) = Naming::detect(checkpoint) else {
        let shown: Vec<_> = checkpoint.names().take(3).collect();
        let got = format!("{} tensors such as {}", checkpoint.names().len(), shown.join(", "));
        return Err(LoadError::NotTheModel { got });
    };
    let mut resolver = Resolver {
        checkpoint,
        progress,
        touched: 0,
        seen: HashSet::new(),
        naming: naming.clone(),
        modules: Vec::new(),
        groups: BTreeMap::new(),
        problems: Vec::new(),
        leftovers: Vec::new(),
        disagreements: Vec::new(),
        warnings: Vec::new(),
    };
    let has_mtp = checkpoint.names().any(|n| Part::of(n) == Part::Mtp);
    let fields = if config.mtp.is_some() && !has_mtp {
        // Community files often drop the drafter; the model itself is whole without it.
        resolver
            .warnings
            .push("config.json has an MTP block, the checkpoint none of its tensors: no drafting".into());
        names::network(&ModelConfig { mtp: None, ..config.clone() }, &naming, &mut resolver)
    } else {
        names::network(config, &naming, &mut resolver)
    };
    let seen = &resolver.seen;
    resolver.leftovers =
        checkpoint.names().filter(|n| !seen.contains(*n) && naming.owns(n)).map(String::from).collect();
    Ok((fields, resolver))
}

/// Answers names from a checkpoint and remembers what it saw.
struct Resolver<'a> {
    checkpoint: &'a Checkpoint,
    /// Who hears of bytes; `None` if no data may be touched.
    progress: Option<&'a dyn Fn(u64)>,
    touched: u64,
    seen: HashSet<String>,
    naming: Naming,
    modules: Vec<(String, Kind)>,
    groups: BTreeMap<Group, Totals>,
    problems: Vec<Error>,
    leftovers: Vec<String>,
    disagreements: Vec<(String, Kind, Kind)>,
    warnings: Vec<String>,
}

impl Resolver<'_> {
    /// Reads a byte of every page, so that serving does not wait for the disk later.
    fn touch(&mut self, bytes: &[u8]) {
        let Some(progress) = self.progress else { return };
        for chunk in bytes.chunks(PROGRESS_STEP) {
            let sum = chunk.iter().step_by(4096).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            std::hint::black_box(sum);
            self.touched += chunk.len() as u64;
            progress(self.touched);
        }
    }

    /// Counts a stored tensor, and that it is known.
    fn count(&mut self, name: String, format: Option<Kind>, parameters: usize) {
        let stored_as = match self.checkpoint.stored(&name) {
            Stored::Tensor(dtype, _) => dtype_name(dtype),
            Stored::Blocks(blocks, _) => blocks.name(),
            Stored::Nothing => return,
        };
        let label = format.map_or(stored_as, Kind::name);
        let totals = self.groups.entry((Part::of(&name), label)).or_default();
        totals.tensors += 1;
        totals.bytes += self.checkpoint.bytes_of(&name);
        totals.parameters += parameters as u64;
        self.seen.insert(name);
    }

    fn found(&mut self, module: &str, linear: &Linear) {
        for suffix in LINEAR_SUFFIXES {
            let holds_codes = matches!(suffix, "weight" | "weight_packed");
            let parameters = if holds_codes { linear.rows * linear.cols } else { 0 };
            self.count(format!("{module}.{suffix}"), Some(linear.kind()), parameters);
        }
        self.modules.push((module.into(), linear.kind()));
        self.touch(&linear.data.clone());
        if let crate::weights::Format::Nvfp4 { scales, .. } = &linear.format {
            self.touch(scales);
        }
    }

    fn problem(&mut self, module: &str, error: Error) {
        // What is there in the wrong shape is not a leftover besides.
        for suffix in LINEAR_SUFFIXES {
            self.seen.insert(format!("{module}.{suffix}"));
        }
        self.problems.push(error);
    }
}

impl Tensors for Resolver<'_> {
    type Linear = Linear;

    fn linear(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let linear = match self.progress {
            Some(_) => self.checkpoint.linear(module, rows, cols),
            None => self.checkpoint.linear_as_stored(module, rows, cols),
        };
        match linear {
            Ok(linear) => {
                self.found(module, &linear);
                linear
            }
            Err(error) => {
                self.problem(module, error);
                Linear::described(rows, cols, Kind::BF16)
            }
        }
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let gate = self.linear(module, rows, cols);
        // The recipe's rules are about quantisation, which a router is never part of.
        self.modules.pop_if(|(name, _)| name == module);
        gate
    }

    fn vector(&mut self, name: &str, shape: &[usize], role: Role) -> Vec<f32> {
        // transformers keeps a convolution as [c, 1, K]; some converters drop the 1.
        let squeezed: Vec<usize> = match role {
            Role::ConvWeight => shape.iter().copied().filter(|&d| d != 1).collect(),
            _ => shape.to_vec(),
        };
        let both = [shape, &squeezed];
        let shapes = if shape == squeezed { &both[..1] } else { &both[..] };
        let plain = |dtype| matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        let values = match (self.progress, self.checkpoint.stored(name)) {
            // Nobody asked for values: name, shape and type are enough.
            (None, Stored::Tensor(dtype, got)) if plain(dtype) && shapes.contains(&&got[..]) => {
                Ok(vec![0.0; shape.iter().product()])
            }
            _ => self.checkpoint.values(name, shapes),
        };
        match values {
            Ok(values) => {
                let bytes = self.checkpoint.bytes_of(name);
                self.count(name.into(), None, shape.iter().product());
                if let Some(progress) = self.progress {
                    self.touched += bytes;
                    progress(self.touched);
                }
                values
            }
            Err(error) => {
                self.seen.insert(name.into());
                self.problems.push(error);
                Vec::new()
            }
        }
    }

    fn cache_scale(&mut self, name: &str) -> f32 {
        if !self.checkpoint.contains(name) {
            return 1.0;
        }
        self.count(name.into(), None, 0);
        self.checkpoint.scale(name).unwrap_or_else(|error| {
            self.problems.push(error);
            1.0
        })
    }

    fn experts(
        &mut self,
        mixer: &str,
        projection: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Vec<Linear> {
        let stacked = format!("{mixer}.experts.{projection}");
        if !self.checkpoint.contains(&stacked) {
            return (0..count)
                .map(|e| self.linear(&format!("{mixer}.experts.{e}.{projection}"), rows, cols))
                .collect();
        }
        match self.checkpoint.stacked(&stacked, count, rows, cols) {
            Ok(experts) => {
                let kind = experts.first().map_or(Kind::BF16, Linear::kind);
                self.count(stacked.clone(), Some(kind), count * rows * cols);
                for suffix in ["scale", "input_scale"] {
                    self.count(format!("{stacked}.{suffix}"), Some(kind), 0);
                }
                self.modules.push((format!("{mixer}.experts.0.{projection}"), kind));
                experts.iter().for_each(|expert| self.touch(&expert.data));
                experts
            }
            Err(error) => {
                self.seen.insert(stacked);
                self.problems.push(error);
                Vec::new()
            }
        }
    }
}

/// Several problems as one message: some listed, the rest counted.
pub struct Problems<'a>(pub &'a [Error]);

impl fmt::Display for Problems<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors do not fit the configuration:", self.0.len())?;
        for problem in self.0.iter().take(LISTED) {
            write!(f, "\n  {problem}")?;
        }
        match self.0.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
