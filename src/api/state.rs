//! What every handler shares: options, names, metrics, and the models once there are any.

use super::batch::{Desk, FileOptions};
use super::error::ApiError;
use super::exposition::{Labels, View};
use super::fallback::Fallback;
use super::fields::Fields;
use super::ids::IdSource;
use super::metrics::Metrics;
use super::model::ModelInfo;
use super::steer::Grammars;
use super::types::{RequestOptions, Rules};
use crate::engine;
use crate::text::Text;
use serde_json::{Map, Value};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The server's flags, as meant.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Accepted `model` values of each model, before and after loading; the first is canonical. Neither the list
    /// nor any of its parts is ever empty. The first model stands in front: it answers who names none.
    pub models: Vec<Vec<String>>,
    pub request: RequestOptions,
    /// `--api-key`; empty means open.
    pub api_keys: Vec<String>,
    pub cors: super::cors::CorsOptions,
    /// Bytes of a request body.
    pub body_limit: usize,
    /// Silence after which a stream says that it lives; zero turns it off.
    pub keep_alive: Duration,
    /// `--health-stall-timeout`: an engine that finishes no step for so long is not healthy.
    pub stall_timeout: Duration,
    /// `--seed`
    pub seed: Option<u64>,
    /// `--fallback`: who answers in our place.
    pub fallback: Option<Fallback>,
    /// `--files-dir` and its bounds.
    pub files: FileOptions,
    /// What `/version` says; starts with a dotted triple.
    pub version: String,
}

/// 64 MiB: long histories with tool results fit, a runaway client does not.
pub const BODY_LIMIT_DEFAULT: usize = 64 << 20;

impl Options {
    /// One model with these names.
    pub fn new(served_names: Vec<String>) -> Self {
        Self {
            models: vec![served_names],
            request: RequestOptions::default(),
            api_keys: Vec::new(),
            cors: super::cors::CorsOptions::default(),
            body_limit: BODY_LIMIT_DEFAULT,
            // Long prefills outlast the idle time-outs of proxies.
            keep_alive: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(120),
            seed: None,
            fallback: None,
            files: FileOptions::default(),
            version: reported_version(),
        }
    }
}

/// Some clients gate features on vLLM's version, so ours stands behind the one we follow.
pub fn reported_version() -> String {
    format!("0.17.1+ferrotron.{}", env!("CARGO_PKG_VERSION"))
}

/// A model that requests can be sent to, or that is still reading its weights.
#[derive(Clone)]
pub struct Resident {
    /// Its place in [`Options::models`].
    pub index: usize,
    pub text: Arc<Text>,
    pub engine: engine::Handle,
    pub model: Arc<ModelInfo>,
}

/// Shared by all handlers.
pub struct App {
    pub options: Options,
    pub ids: IdSource,
    pub metrics: Arc<Metrics>,
    /// Compiled, by model.
    pub grammars: Grammars,
    /// Files and batches.
    pub batches: Desk,
    /// By place; empty while the checkpoint's configuration and tokenizer are read.
    residents: Vec<OnceLock<Resident>>,
    load_error: OnceLock<String>,
    draining: AtomicBool,
}

/// Whether the server can answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Health {
    Ready,
    /// Share of the weights that is read, 0 to 1.
    Loading(f32),
    LoadFailed(String),
    Draining,
    Dead(String),
}

impl App {
    pub fn new(options: Options) -> Arc<Self> {
        let canonical = |names: &Vec<String>| names.first().cloned().unwrap_or_default();
        let names: Vec<String> = options.models.iter().map(canonical).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Arc::new(Self {
            ids: IdSource::new(options.seed),
            metrics: Arc::new(Metrics::new(&names)),
            residents: options.models.iter().map(|_| OnceLock::new()).collect(),
            grammars: Grammars::default(),
            batches: Desk::new(options.files.clone()),
            options,
            load_error: OnceLock::new(),
            draining: AtomicBool::new(false),
        })
    }

    /// A model's text and engine exist; the engine's own status says when it is loaded. Only the first of a place
    /// counts.
    pub fn set_resident(&self, resident: Resident) {
        if let Some(place) = self.residents.get(resident.index) {
            let _ = place.set(resident);
        }
    }

    /// There will be a model too few.
    pub fn set_load_error(&self, error: String) {
        let _ = self.load_error.set(error);
    }

    /// Health turns red, so that nobody sends more; what runs goes on.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Ends all engines: what runs goes on for up to `drain`, what is left then is failed.
    pub async fn shutdown(&self, drain: Duration) {
        futures_util::future::join_all(self.residents().map(|resident| resident.engine.shutdown(drain)))
            .await;
    }

    /// The model at a place, if as much as its text is there.
    pub fn resident(&self, index: usize) -> Option<&Resident> {
        self.residents.get(index).and_then(OnceLock::get)
    }

    /// All of those, the front one first.
    pub fn residents(&self) -> impl Iterator<Item = &Resident> {
        self.residents.iter().filter_map(OnceLock::get)
    }

    /// Whether every model can answer; else what is worst. Looks at values that others publish; never waits.
    pub fn health(&self) -> Health {
        let all = (0..self.residents.len()).map(|index| (index, self.health_of(index)));
        let mut worst = Health::Ready;
        let mut progress = 0.0;
        for (index, health) in all {
            progress += match health {
                Health::Ready => 1.0,
                Health::Loading(progress) => progress,
                _ => 0.0,
            };
            let health = match health {
                Health::Dead(reason) if self.residents.len() > 1 => {
                    Health::Dead(format!("{}: {reason}", self.canonical(index)))
                }
                other => other,
            };
            if health.severity() > worst.severity() {
                worst = health;
            }
        }
        match worst {
            Health::Loading(_) => Health::Loading(progress / self.residents.len().max(1) as f32),
            worst => worst,
        }
    }

    /// Whether one model can answer.
    pub fn health_of(&self, index: usize) -> Health {
        if self.draining.load(Ordering::Acquire) {
            return Health::Draining;
        }
        if let Some(error) = self.load_error.get() {
            return Health::LoadFailed(error.clone());
        }
        let Some(resident) = self.resident(index) else { return Health::Loading(0.0) };
        match resident.engine.status() {
            engine::Status::Loading { progress } => Health::Loading(progress),
            engine::Status::Draining => Health::Draining,
            engine::Status::Dead(reason) => Health::Dead(reason),
            engine::Status::Ready => match self.stalled(resident) {
                Some(stalled) => Health::Dead(format!("no step has finished for {} s", stalled.as_secs())),
                None => Health::Ready,
            },
        }
    }

    /// How long an engine has finished no step, if that is longer than a step can take.
    pub fn stalled(&self, resident: &Resident) -> Option<Duration> {
        resident.engine.stats().stalled().filter(|stalled| *stalled > self.options.stall_timeout)
    }

    /// The model that a request's `model` names, the front one for a request that names none, if it can take
    /// requests. Errors: 404 if nobody has the name, 503 that says why the one who has it cannot.
    pub fn ready(&self, body: &Map<String, Value>) -> Result<&Resident, ApiError> {
        let index = self.named(body)?;
        match (self.health_of(index), self.resident(index)) {
            (Health::Ready, Some(resident)) => Ok(resident),
            (Health::Ready, None) => Err(ApiError::Loading { percent: 0.0 }),
            (Health::Loading(progress), _) => Err(ApiError::Loading { percent: progress * 100.0 }),
            (Health::LoadFailed(error), _) => Err(ApiError::LoadFailed(error)),
            (Health::Draining, _) => Err(ApiError::ShuttingDown),
            (Health::Dead(reason), _) => Err(ApiError::EngineDead(reason)),
        }
    }

    /// The same model as far as its text, which is enough for `/tokenize`: it is there before the weights are.
    pub fn described(&self, body: &Map<String, Value>) -> Result<&Resident, ApiError> {
        self.described_at(self.named(body)?)
    }

    /// The model at a place as far as its text. Errors: 503 while it is not there.
    pub fn described_at(&self, index: usize) -> Result<&Resident, ApiError> {
        match (self.load_error.get(), self.resident(index)) {
            (Some(error), _) => Err(ApiError::LoadFailed(error.clone())),
            (None, Some(resident)) => Ok(resident),
            (None, None) => Err(ApiError::Loading { percent: 0.0 }),
        }
    }

    /// The place of the model that has `name`. Errors: [`ApiError::UnknownModel`] with the names that exist.
    pub fn place(&self, name: &str) -> Result<usize, ApiError> {
        let models = &self.options.models;
        models.iter().position(|names| names.iter().any(|served| served == name)).ok_or_else(|| {
            ApiError::UnknownModel { name: name.to_owned(), served: models.concat().join(", ") }
        })
    }

    fn named(&self, body: &Map<String, Value>) -> Result<usize, ApiError> {
        match Fields::top(body).string("model")? {
            None | Some("") => Ok(0),
            Some(name) => self.place(name),
        }
    }

    fn canonical(&self, index: usize) -> &str {
        self.options.models.get(index).and_then(|names| names.first()).map_or("", String::as_str)
    }

    pub fn rules<'a>(&'a self, resident: &'a Resident) -> Rules<'a> {
        Rules { model: &resident.model, options: &self.options.request }
    }

    /// The page of all counters.
    pub fn exposition(&self) -> String {
        let idle = engine::Stats::default();
        let view = |index| {
            let resident = self.resident(index);
            View {
                labels: Labels::new(self.canonical(index), index),
                stats: resident.map_or(&idle, |resident| resident.engine.stats()),
                info: resident.and_then(|resident| resident.engine.info()),
                max_model_len: resident.map_or(0, |resident| resident.model.max_model_len),
                cached_tokens: self.metrics.model(index).cached_tokens(),
                stalled: resident.is_some_and(|resident| self.stalled(resident).is_some()),
            }
        };
        self.metrics.page(&(0..self.residents.len()).map(view).collect::<Vec<_>>())
    }
}

impl Health {
    /// What several models are together is what the worst of them is.
    fn severity(&self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Loading(_) => 1,
            Self::Draining => 2,
            Self::LoadFailed(_) => 3,
            Self::Dead(_) => 4,
        }
    }
}
