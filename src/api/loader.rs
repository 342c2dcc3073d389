//! What the keeper asks of whoever opens models, and what it is told of them.

use super::model::ModelInfo;
use super::state::Resident;
use std::time::Duration;

/// Opens models by their place; the command line knows how.
pub trait Loader: Send + Sync + 'static {
    /// Reads what stands before the weights, plans the memory and starts the engine, which loads on its own thread.
    /// Blocks.
    fn start(&self, place: usize) -> Result<Resident, LoadError>;

    /// The engine of a place has ended, its memory is free.
    fn ended(&self, place: usize);

    /// What a model would take of memory. Blocks.
    fn simulate(&self, simulation: &Simulation) -> Result<Estimate, LoadError>;

    /// Models that have come since the last look, in the order of their places to be. Blocks.
    fn rescan(&self) -> Result<Vec<Known>, LoadError>;
}

/// Why a model is not loaded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LoadError {
    /// Not even alone; in the memory plan's words.
    #[error("{0}")]
    NeverFits(String),
    /// Not beside those that are here.
    #[error("{0}")]
    NoRoom(String),
    #[error("{0}")]
    Failed(String),
}

/// A model that the server knows and need not have loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// What requests may call it; the first is canonical. Never empty.
    pub names: Vec<String>,
    /// The path or repository it comes from.
    pub path: String,
    /// Its own options, as words of a command line.
    pub args: Vec<String>,
    /// The section of the preset file that names it, if one does.
    pub preset: Option<String>,
    /// What its configuration alone says of it, if that can be read.
    pub model: Option<ModelInfo>,
    /// It is loaded at the start, after those of the command line.
    pub on_start: bool,
    /// How long its requests may go on when it is unloaded.
    pub stop_timeout: Duration,
}

/// How long requests may go on when their model is unloaded, unless somebody says otherwise.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

impl Known {
    /// A model of which nothing but its names is known.
    pub fn named(names: Vec<String>) -> Self {
        Self {
            path: names.first().cloned().unwrap_or_default(),
            names,
            args: Vec::new(),
            preset: None,
            model: None,
            on_start: false,
            stop_timeout: STOP_TIMEOUT,
        }
    }
}

/// What `POST /simulate` asks about.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    pub target: Target,
    pub max_model_len: Option<usize>,
    pub max_num_seqs: Option<usize>,
    pub kv_cache_dtype: Option<String>,
    /// Of what is free, how much may be taken; above 0, at most 1.
    pub share: Option<f64>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    Place(usize),
    Path(String),
}

/// What a model would take of memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub total: u64,
    pub weights: u64,
    pub kv_per_token: u64,
    pub state_per_sequence: u64,
    pub activations: u64,
    /// `None` where the system does not tell.
    pub free: Option<u64>,
    /// Sequences of the whole context that would run at one time.
    pub concurrency: usize,
    pub max_model_len: usize,
}

impl Estimate {
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.total <= free)
    }
}
