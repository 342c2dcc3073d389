//! What every handler shares: options, names, metrics, and the model once there is one.

use super::error::ApiError;
use super::ids::IdSource;
use super::metrics::Metrics;
use super::model::ModelInfo;
use super::steer::Grammars;
use super::types::{RequestOptions, Rules};
use crate::engine;
use crate::text::Text;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The server's flags, as meant.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Accepted `model` values, before and after loading; the first is canonical. Never empty.
    pub served_names: Vec<String>,
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
    /// What `/version` says; starts with a dotted triple.
    pub version: String,
}

/// 64 MiB: long histories with tool results fit, a runaway client does not.
pub const BODY_LIMIT_DEFAULT: usize = 64 << 20;

impl Options {
    pub fn new(served_names: Vec<String>) -> Self {
        Self {
            served_names,
            request: RequestOptions::default(),
            api_keys: Vec::new(),
            cors: super::cors::CorsOptions::default(),
            body_limit: BODY_LIMIT_DEFAULT,
            // Long prefills outlast the idle time-outs of proxies.
            keep_alive: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(120),
            seed: None,
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
    /// Empty while the checkpoint's configuration and tokenizer are read.
    resident: OnceLock<Resident>,
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
        let name = options.served_names.first().map_or("", String::as_str);
        Arc::new(Self {
            ids: IdSource::new(options.seed),
            metrics: Arc::new(Metrics::new(name)),
            grammars: Grammars::default(),
            options,
            resident: OnceLock::new(),
            load_error: OnceLock::new(),
            draining: AtomicBool::new(false),
        })
    }

    /// The model's text and engine exist; the engine's own status says when it is loaded. Only the first counts.
    pub fn set_resident(&self, resident: Resident) {
        self.metrics.set_context(resident.model.max_model_len);
        let _ = self.resident.set(resident);
    }

    /// There will be no model.
    pub fn set_load_error(&self, error: String) {
        let _ = self.load_error.set(error);
    }

    /// Health turns red, so that nobody sends more; what runs goes on.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn resident(&self) -> Option<&Resident> {
        self.resident.get()
    }

    /// Looks at values that others publish; never waits.
    pub fn health(&self) -> Health {
        if self.draining.load(Ordering::Acquire) {
            return Health::Draining;
        }
        if let Some(error) = self.load_error.get() {
            return Health::LoadFailed(error.clone());
        }
        let Some(resident) = self.resident.get() else { return Health::Loading(0.0) };
        match resident.engine.status() {
            engine::Status::Loading { progress } => Health::Loading(progress),
            engine::Status::Draining => Health::Draining,
            engine::Status::Dead(reason) => Health::Dead(reason),
            engine::Status::Ready => match resident.engine.stats().stalled() {
                Some(stalled) if stalled > self.options.stall_timeout => {
                    Health::Dead(format!("no step has finished for {} s", stalled.as_secs()))
                }
                _ => Health::Ready,
            },
        }
    }

    /// The model, if it can take requests. Errors: 503 that says why not.
    pub fn ready(&self) -> Result<&Resident, ApiError> {
        match (self.health(), self.resident.get()) {
            (Health::Ready, Some(resident)) => Ok(resident),
            (Health::Ready, None) => Err(ApiError::Loading { percent: 0.0 }),
            (Health::Loading(progress), _) => Err(ApiError::Loading { percent: progress * 100.0 }),
            (Health::LoadFailed(error), _) => Err(ApiError::LoadFailed(error)),
            (Health::Draining, _) => Err(ApiError::ShuttingDown),
            (Health::Dead(reason), _) => Err(ApiError::EngineDead(reason)),
        }
    }

    /// The model's text, which is enough for `/tokenize`: it is there before the weights are.
    pub fn described(&self) -> Result<&Resident, ApiError> {
        match (self.load_error.get(), self.resident.get()) {
            (Some(error), _) => Err(ApiError::LoadFailed(error.clone())),
            (None, Some(resident)) => Ok(resident),
            (None, None) => Err(ApiError::Loading { percent: 0.0 }),
        }
    }

    pub fn rules<'a>(&'a self, resident: &'a Resident) -> Rules<'a> {
        Rules { model: &resident.model, options: &self.options.request }
    }
}
