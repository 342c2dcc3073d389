//! Every tensor that a checkpoint must hold, from its configuration and recipe alone.
//!
//! ```
//! use ferrotron::model::{manifest::Manifest, presets};
//! let nano = presets::find("nano-nvfp4").expect("a known name");
//! let totals = Manifest::new(&nano.config()?, &nano.recipe()?).totals();
//! assert_eq!((totals.tensors, totals.bytes), (24_147, 19_339_781_632));
//! # Ok::<(), ferrotron::model::config::ConfigError>(())
//! ```

use std::collections::BTreeMap;

use super::config::ModelConfig;
use super::names::{self, Naming, Part, Role, Tensors};
use super::quantization::{Recipe, Scheme};
use crate::weights::{Checkpoint, Dtype, Kind, Stored, header};

/// One expected tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The format of the linear weight that it belongs to; `None` for vectors.
    pub format: Option<Kind>,
    /// Parameters of the network that it holds: 0 for scales.
    pub parameters: u64,
}

impl Entry {
    /// Bytes of its data. Sizes of a configuration are bounded, so this cannot overflow.
    pub fn bytes(&self) -> u64 {
        header::data_len(self.dtype, &self.shape).unwrap_or(u64::MAX)
    }
}

/// Sums over tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub tensors: u64,
    pub bytes: u64,
    pub parameters: u64,
}

impl Totals {
    fn add(&mut self, entry: &Entry) {
        self.tensors += 1;
        self.bytes += entry.bytes();
        self.parameters += entry.parameters;
    }
}

/// Where in the network, and in which format.
pub type Group = (Part, &'static str);

/// The expected tensors of one network, made when they are asked for.
#[derive(Debug, Clone)]
pub struct Manifest<'a> {
    config: &'a ModelConfig,
    recipe: &'a Recipe,
    naming: Naming,
}

impl<'a> Manifest<'a> {
    /// With the official names.
    pub fn new(config: &'a ModelConfig, recipe: &'a Recipe) -> Self {
        Self::with_naming(config, recipe, Naming::OFFICIAL)
    }

    pub fn with_naming(config: &'a ModelConfig, recipe: &'a Recipe, naming: Naming) -> Self {
        Manifest { config, recipe, naming }
    }

    /// All tensors in the order of the network; memory holds one layer's at a time.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let layers = self.config.layers.len();
        (0..layers + 2).flat_map(move |step| {
            let mut list = Listing { recipe: self.recipe, entries: Vec::new() };
            match step {
                0 => drop(names::ends(self.config, &self.naming, &mut list)),
                step if step <= layers => drop(names::layer(self.config, &self.naming, step - 1, &mut list)),
                _ => drop(names::mtp(self.config, &self.naming, &mut list)),
            }
            list.entries
        })
    }

    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.entries().for_each(|entry| totals.add(&entry));
        totals
    }

    /// Totals by part and format, in the order of [`Part`].
    pub fn groups(&self) -> BTreeMap<Group, Totals> {
        let mut groups = BTreeMap::<Group, Totals>::new();
        for entry in self.entries() {
            let format = entry.format.map_or_else(|| dtype_name(entry.dtype), Kind::name);
            groups.entry((Part::of(&entry.name), format)).or_default().add(&entry);
        }
        groups
    }

    /// What of this the checkpoint lacks, holds differently, or holds besides.
    pub fn compare(&self, checkpoint: &Checkpoint) -> Comparison {
        let mut comparison = Comparison::default();
        let mut known = std::collections::HashSet::new();
        for entry in self.entries() {
            let stored = checkpoint.stored(&entry.name);
            let fits = match &stored {
                Stored::Tensor(dtype, shape) => *dtype == entry.dtype && same_shape(shape, &entry.shape),
                Stored::Nothing | Stored::Blocks(..) => false,
            };
            known.insert(entry.name.clone());
            if !fits {
                comparison.differences.push((entry, stored));
            }
        }
        comparison.unexpected =
            checkpoint.names().filter(|n| !known.contains(*n)).map(String::from).collect();
        comparison
    }
}

/// Scalars may be stored with rank 0 or as `[1]`.
fn same_shape(stored: &[usize], expected: &[usize]) -> bool {
    stored == expected || (expected.is_empty() && stored == [1])
}

/// How a checkpoint differs from a manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Expected tensors, with what is stored instead.
    pub differences: Vec<(Entry, Stored)>,
    /// Stored tensors that nobody expects.
    pub unexpected: Vec<String>,
}

impl Comparison {
    pub fn is_clean(&self) -> bool {
        self.differences.is_empty() && self.unexpected.is_empty()
    }
}

/// The name that safetensors and our tables give a dtype.
pub fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        Dtype::U8 => "U8",
        Dtype::F8_E4M3 => "F8_E4M3",
        _ => "other",
    }
}

/// Lists what a walk over the names asks for.
struct Listing<'a> {
    recipe: &'a Recipe,
    entries: Vec<Entry>,
}

impl Listing<'_> {
    fn push(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        format: Option<Kind>,
        parameters: usize,
    ) {
        self.entries.push(Entry { name, dtype, shape, format, parameters: parameters as u64 });
    }
}

impl Tensors for Listing<'_> {
    type Linear = ();

    fn linear(&mut self, module: &str, rows: usize, cols: usize) {
        let scheme = linear_scheme(self.recipe, module);
        for (suffix, dtype, shape) in stored_tensors(scheme, rows, cols) {
            let parameters = if suffix == "weight" { rows * cols } else { 0 };
            self.push(format!("{module}.{suffix}"), dtype, shape, Some(scheme.kind), parameters);
        }
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) {
        let dtype = match gate_kind(self.recipe, module) {
            Kind::F32 => Dtype::F32,
            _ => Dtype::BF16,
        };
        self.push(format!("{module}.weight"), dtype, vec![rows, cols], None, rows * cols);
    }

    fn vector(&mut self, name: &str, shape: &[usize], role: Role) -> Vec<f32> {
        let dtype = vector_dtype(role);
        self.push(name.into(), dtype, shape.into(), None, shape.iter().product());
        Vec::new()
    }

    fn cache_scale(&mut self, name: &str) -> f32 {
        if self.recipe.kv_scales && Part::of(name) != Part::Mtp {
            self.push(name.into(), Dtype::F32, Vec::new(), None, 0);
        }
        1.0
    }
}

/// The scheme of a linear weight; the embedding table is no linear to a recipe, and always BF16.
pub(super) fn linear_scheme(recipe: &Recipe, module: &str) -> Scheme {
    match Part::of(module) {
        Part::Embeddings => Scheme::BF16,
        _ => recipe.scheme(module),
    }
}

/// The stored type of a small tensor in the releases.
pub(super) fn vector_dtype(role: Role) -> Dtype {
    match role {
        Role::CorrectionBias => Dtype::F32,
        _ => Dtype::BF16,
    }
}

/// The stored type of a router. The MTP block is BF16 in every release, whatever the body's router is.
pub(super) fn gate_kind(recipe: &Recipe, module: &str) -> Kind {
    match recipe.gate {
        Dtype::F32 if Part::of(module) != Part::Mtp => Kind::F32,
        _ => Kind::BF16,
    }
}

/// The tensors that one linear weight becomes, by the end of their name.
pub fn stored_tensors(scheme: Scheme, rows: usize, cols: usize) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    let mut tensors = match scheme.kind {
        Kind::F32 => vec![("weight", Dtype::F32, vec![rows, cols])],
        Kind::F16 => vec![("weight", Dtype::F16, vec![rows, cols])],
        Kind::BF16 => vec![("weight", Dtype::BF16, vec![rows, cols])],
        Kind::Fp8 => {
            vec![("weight", Dtype::F8_E4M3, vec![rows, cols]), ("weight_scale", Dtype::F32, vec![])]
        }
        Kind::Nvfp4 => vec![
            ("weight", Dtype::U8, vec![rows, cols / 2]),
            ("weight_scale", Dtype::F8_E4M3, vec![rows, cols / 16]),
            ("weight_scale_2", Dtype::F32, vec![]),
        ],
        // GGUF's own: a manifest is of safetensors files.
        Kind::Blocks(_) => Vec::new(),
    };
    if scheme.input_scale {
        tensors.push(("input_scale", Dtype::F32, vec![]));
    }
    tensors
}
