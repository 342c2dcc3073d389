//! What every handler shares: options, names, metrics, and the models once there are any.

use super::batch::{Desk, FileOptions};
use super::error::ApiError;
use super::exposition::{self, Labels, View};
use super::fallback::Fallback;
use super::fields::Fields;
use super::ids::IdSource;
use super::keeper::{Keeper, Keeping, Lease};
use super::loader::Known;
use super::metrics::Metrics;
use super::model::ModelInfo;
use super::responses::{Store, StoreLimits};
use super::roster::{Stage, Then};
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
    /// Accepted `model` values of each model that the start loads; the first is canonical. No part is ever empty. The
    /// first model stands in front: it answers who names none.
    pub models: Vec<Vec<String>>,
    /// Models that come when they are asked for, in the places behind those. There is at least one of both.
    pub known: Vec<Known>,
    pub keeping: Keeping,
    /// `--enable-sleep-mode`: whether models can be put to sleep and caches be dropped.
    pub sleep_mode: bool,
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
    /// How many responses are kept, and how long.
    pub responses: StoreLimits,
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
            known: Vec::new(),
            keeping: Keeping::default(),
            sleep_mode: false,
            request: RequestOptions::default(),
            api_keys: Vec::new(),
            cors: super::cors::CorsOptions::default(),
            body_limit: BODY_LIMIT_DEFAULT,
            // Long prefills outlast the idle time-outs of proxies.
            keep_alive: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(120),
            seed: None,
            responses: StoreLimits::default(),
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
    /// Its place: those of [`Options::models`] first, then those of [`Options::known`].
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
    pub grammars: Arc<Grammars>,
    /// Who is here, and who comes and goes.
    pub keeper: Arc<Keeper>,
    pub responses: Store,
    /// Files and batches.
    pub batches: Desk,
    load_error: OnceLock<String>,
    draining: AtomicBool,
    rescan: tokio::sync::Mutex<()>,
}

/// Whether the server can answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Health {
    Ready,
    /// Share of the weights that is read, 0 to 1.
    Loading(f32),
    /// No model is loaded, and requests load none.
    Empty,
    LoadFailed(String),
    Draining,
    Dead(String),
}

impl App {
    pub fn new(options: Options) -> Arc<Self> {
        let grammars = Arc::new(Grammars::default());
        let keeper = Keeper::new(options.keeping.clone(), grammars.clone());
        for names in &options.models {
            keeper.add(Known::named(names.clone()), true);
        }
        for known in &options.known {
            keeper.add(known.clone(), false);
        }
        let seats = keeper.seats();
        let names: Vec<&str> = seats.iter().map(|seat| seat.canonical()).collect();
        Arc::new(Self {
            ids: IdSource::new(options.seed),
            metrics: Arc::new(Metrics::new(&names)),
            grammars,
            keeper,
            responses: Store::new(options.responses),
            batches: Desk::new(options.files.clone()),
            options,
            load_error: OnceLock::new(),
            draining: AtomicBool::new(false),
            rescan: tokio::sync::Mutex::default(),
        })
    }

    /// A model's text and engine exist; the engine's own status says when it is loaded. Only the first of a place
    /// counts.
    pub fn set_resident(&self, resident: Resident) {
        self.keeper.put(resident.index, resident);
    }

    /// There will be a model too few.
    pub fn set_load_error(&self, error: String) {
        let _ = self.load_error.set(error);
    }

    /// Health turns red, so that nobody sends more; what runs goes on.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
        self.keeper.close();
    }

    /// Ends all engines: what runs goes on for up to `drain`, what is left then is failed.
    pub async fn shutdown(&self, drain: Duration) {
        let residents = self.residents();
        futures_util::future::join_all(residents.iter().map(|resident| resident.engine.shutdown(drain)))
            .await;
    }

    /// The model at a place, if as much as its text is there.
    pub fn resident(&self, index: usize) -> Option<Resident> {
        self.keeper.seat(index)?.resident()
    }

    /// All of those, the front one first.
    pub fn residents(&self) -> Vec<Resident> {
        self.keeper.seats().iter().filter_map(|seat| seat.resident()).collect()
    }

    /// Makes a model's grammar compiler in the background.
    pub fn warm_grammars(&self, resident: &Resident) {
        super::steer::warm(&self.grammars, resident);
    }

    /// Whether every model that is meant to be here can answer; else what is worst. A model that was unloaded or put to
    /// sleep on purpose, or that comes when it is asked for, is well. Looks at values that others publish; never waits.
    pub fn health(&self) -> Health {
        let count = self.keeper.len();
        let mut worst = if self.is_empty() { Health::Empty } else { Health::Ready };
        let mut progress = 0.0;
        for index in 0..count {
            let health = self.health_of(index);
            if index < self.options.models.len() {
                progress += match health {
                    Health::Ready => 1.0,
                    Health::Loading(progress) => progress,
                    _ => 0.0,
                };
            }
            let health = match health {
                Health::Dead(reason) if count > 1 => {
                    Health::Dead(format!("{}: {reason}", self.canonical(index)))
                }
                other => other,
            };
            if health.severity() > worst.severity() {
                worst = health;
            }
        }
        match worst {
            Health::Loading(_) => Health::Loading(progress / self.options.models.len().max(1) as f32),
            worst => worst,
        }
    }

    /// Whether one model can answer, or is away for a reason.
    pub fn health_of(&self, index: usize) -> Health {
        if self.draining.load(Ordering::Acquire) {
            return Health::Draining;
        }
        if let Some(error) = self.load_error.get() {
            return Health::LoadFailed(error.clone());
        }
        match (self.keeper.stage(index), self.resident(index)) {
            (Stage::Ready, Some(resident)) => self.health_in(&resident),
            (Stage::Starting, _) => Health::Loading(0.0),
            _ => Health::Ready,
        }
    }

    /// What a model's engine says of itself.
    fn health_in(&self, resident: &Resident) -> Health {
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

    /// No model is here or comes, and no request would change that.
    fn is_empty(&self) -> bool {
        let gone =
            |index| matches!(self.keeper.stage(index), Stage::Unloaded | Stage::Leaving(Then::Unloaded));
        !self.options.keeping.autoload && (0..self.keeper.len()).all(gone)
    }

    /// How long an engine has finished no step, if that is longer than a step can take.
    pub fn stalled(&self, resident: &Resident) -> Option<Duration> {
        resident.engine.stats().stalled().filter(|stalled| *stalled > self.options.stall_timeout)
    }

    /// The model that a request's `model` names, the front one for a request that names none; it stays for as long as
    /// the lease is held. Waits while it is loaded for this request or another, `autoload` in the body deciding whether
    /// it is. Errors: 404 if nobody has the name, 400 if it is not loaded or never fits, 503 that says why the one who
    /// has it cannot answer.
    pub async fn ready(&self, body: &Map<String, Value>) -> Result<Lease, ApiError> {
        self.lease(self.named(body)?, Fields::top(body).bool("autoload")?).await
    }

    /// The same for the model at a place.
    pub async fn lease(&self, place: usize, autoload: Option<bool>) -> Result<Lease, ApiError> {
        match (self.draining.load(Ordering::Acquire), self.load_error.get()) {
            (true, _) => return Err(ApiError::ShuttingDown),
            (_, Some(error)) => return Err(ApiError::LoadFailed(error.clone())),
            _ => {}
        }
        let lease = self.keeper.lease(place, autoload);
        let lease = match self.options.request.timeout {
            None => lease.await,
            Some(timeout) => tokio::time::timeout(timeout, lease).await.unwrap_or(Err(ApiError::TimedOut)),
        }?;
        match self.health_in(&lease) {
            Health::Ready => Ok(lease),
            Health::Loading(progress) => Err(ApiError::Loading { percent: progress * 100.0 }),
            Health::Dead(reason) => Err(ApiError::EngineDead(reason)),
            _ => Err(ApiError::ShuttingDown),
        }
    }

    /// The same model as far as its text, which is enough for `/tokenize`: at the start it is there before the weights
    /// are.
    pub async fn described(&self, body: &Map<String, Value>) -> Result<Resident, ApiError> {
        let place = self.named(body)?;
        if let Some(error) = self.load_error.get() {
            return Err(ApiError::LoadFailed(error.clone()));
        }
        match self.resident(place) {
            Some(resident) => Ok(resident),
            None => Ok(Resident::clone(&*self.ready(body).await?)),
        }
    }

    /// What is known of the model at a place. Errors: 503 while its configuration is not read.
    pub fn known_at(&self, index: usize) -> Result<Arc<ModelInfo>, ApiError> {
        let model = self.keeper.seat(index).and_then(|seat| seat.model());
        match (self.load_error.get(), model) {
            (Some(error), _) => Err(ApiError::LoadFailed(error.clone())),
            (None, Some(model)) => Ok(model),
            (None, None) => Err(ApiError::Loading { percent: 0.0 }),
        }
    }

    /// The place of the model that has `name`. Errors: [`ApiError::UnknownModel`] with the names that exist.
    pub fn place(&self, name: &str) -> Result<usize, ApiError> {
        let seats = self.keeper.seats();
        let place = seats.iter().position(|seat| seat.known.names.iter().any(|served| served == name));
        place.ok_or_else(|| {
            let names: Vec<&str> =
                seats.iter().flat_map(|seat| &seat.known.names).map(String::as_str).collect();
            ApiError::UnknownModel { name: name.to_owned(), served: names.join(", ") }
        })
    }

    /// Looks for models that have come since the start. Errors: nobody can look, or what is there cannot be.
    pub async fn rescan(&self) -> Result<(), ApiError> {
        let loader = self.keeper.loader()?;
        // One at a time: the loader's places and ours are in one order.
        let _rescan = self.rescan.lock().await;
        let known = tokio::task::spawn_blocking(move || loader.rescan()).await;
        let known = known
            .map_err(|error| ApiError::Internal(format!("The look for models failed: {error}")))?
            .map_err(|error| ApiError::malformed(error.to_string()))?;
        for known in known {
            if let Some(name) = known.names.first() {
                // Before anybody can ask for it.
                self.metrics.add(name);
                self.keeper.add(known, false);
            }
        }
        Ok(())
    }

    fn named(&self, body: &Map<String, Value>) -> Result<usize, ApiError> {
        match Fields::top(body).string("model")? {
            None | Some("") => Ok(0),
            Some(name) => self.place(name),
        }
    }

    fn canonical(&self, index: usize) -> String {
        self.keeper.seat(index).map_or_else(String::new, |seat| seat.canonical().to_owned())
    }

    pub fn rules<'a>(&'a self, resident: &'a Resident) -> Rules<'a> {
        Rules { model: &resident.model, options: &self.options.request }
    }

    /// The page of all counters, or of those of one model and of the server itself.
    pub fn exposition(&self, only: Option<usize>) -> String {
        let idle = engine::Stats::default();
        let seats = self.keeper.seats();
        let residents: Vec<Option<Resident>> = seats.iter().map(|seat| seat.resident()).collect();
        let view = |index: usize| {
            let resident = residents[index].as_ref();
            View {
                labels: Labels::new(seats[index].canonical(), index),
                stats: resident.map_or(&idle, |resident| resident.engine.stats()),
                info: resident.and_then(|resident| resident.engine.info()),
                max_model_len: resident.map_or(0, |resident| resident.model.max_model_len),
                cached_tokens: self.metrics.model(index).cached_tokens(),
                stalled: resident.is_some_and(|resident| self.stalled(resident).is_some()),
                asleep: match self.keeper.stage(index) {
                    Stage::Asleep(level) => Some(level),
                    _ => None,
                },
            }
        };
        let views: Vec<View> = (0..seats.len()).map(view).collect();
        let page = self.metrics.page(&views);
        match only {
            None => page,
            Some(index) => exposition::of_model(&page, self.canonical(index).as_str()),
        }
    }
}

impl Health {
    /// What several models are together is what the worst of them is.
    fn severity(&self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Loading(_) => 1,
            Self::Empty => 2,
            Self::Draining => 3,
            Self::LoadFailed(_) => 4,
            Self::Dead(_) => 5,
        }
    }
}
