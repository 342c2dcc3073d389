//! Opens models: from a name to an engine that reads its weights, within the memory that there is.

use super::args::{Args, Context, KvName, Served};
use super::known::{self, Known, Models};
use super::memory;
use super::sizes::{self, Sizes, Wish};
use crate::api::{
    self, App, Estimate, Facts, LoadError, Loader, ModelInfo, SamplingDefaults, Simulation, Target,
};
use crate::cli::resident::{BLOCK_LEN, Resident};
use crate::engine::{self, Busy, EngineConfig, Handle, Status, TraceWriter};
use crate::model::config::{GenerationConfig, Layer};
use crate::model::manifest::Manifest;
use crate::model::quantization::Recipe;
use crate::text::Text;
use crate::weights::Kind;
use anyhow::{Context as _, bail};
use clap::ValueEnum as _;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Without a word from the user, more context than this is not set aside: room is reserved for each sequence.
const CONTEXT_DEFAULT: usize = 32_768;
/// How far the threads of a model behind give way to those of the model in front: about a tenth of its weight.
pub const NICE_BEHIND: i32 = 10;

/// Opens the models of one server.
pub struct Opener {
    args: Args,
    /// In the order of the server's places.
    places: RwLock<Vec<Place>>,
    /// Places of the command line's models, which come first.
    front: usize,
    ledger: Mutex<Ledger>,
    trace: Option<TraceWriter>,
}

#[derive(Clone)]
struct Place {
    served: Served,
    args: Arc<Args>,
    /// Set by its engine, whichever one that is at the time.
    busy: Busy,
}

/// Memory is divided once: what the plans of loaded models say is theirs, touched yet or not.
#[derive(Default)]
struct Ledger {
    /// Of what was free when the first was planned, the share that may be taken; `None` where the system does not tell.
    start: Option<u64>,
    /// By place.
    taken: HashMap<usize, u64>,
}

impl Ledger {
    /// What may still be given: of the first look, and of what is there now, whatever others have taken.
    fn free(&self) -> Option<u64> {
        let taken = self.taken.values().copied().fold(0u64, u64::saturating_add);
        let left = self.start.map(|start| start.saturating_sub(taken));
        match (left, memory::free()) {
            (Some(left), Some(now)) => Some(left.min(now)),
            (left, now) => left.or(now),
        }
    }

    /// The same when all but the first `front` places have ended.
    fn free_without_others(&self, front: usize) -> Option<u64> {
        let others = self.taken.iter().filter(|(place, _)| **place >= front).map(|(_, taken)| *taken);
        let others = others.fold(0u64, u64::saturating_add);
        let all = self.taken.values().copied().fold(0u64, u64::saturating_add);
        let left = self.start.map(|start| start.saturating_sub(all - others));
        let now = memory::free().map(|now| now.saturating_add(others));
        match (left, now) {
            (Some(left), Some(now)) => Some(left.min(now)),
            (left, now) => left.or(now),
        }
    }
}

impl Opener {
    pub fn new(args: Args, models: Models, trace: Option<TraceWriter>) -> Self {
        let shared = Arc::new(args.clone());
        let front = models.front.len();
        let own = models.front.into_iter().map(|served| Place {
            served,
            args: shared.clone(),
            busy: Busy::default(),
        });
        let places = own.chain(models.known.into_iter().map(Place::of)).collect();
        let share = args.gpu_memory_utilization.unwrap_or(1.0);
        let start = memory::free().map(|free| (free as f64 * share) as u64);
        let ledger = Mutex::new(Ledger { start, taken: HashMap::new() });
        Self { args, places: RwLock::new(places), front, ledger, trace }
    }

    /// Shows the plan of the command line's models, or else of all that are known. Errors: it does not fit.
    pub fn dry_run(&self) -> anyhow::Result<()> {
        let places = self.places();
        let shown = if self.front > 0 { &places[..self.front] } else { &places[..] };
        for (index, place) in shown.iter().enumerate() {
            if self.front == 0 {
                let described = vec![describe(&place.args, &place.served, 0)?];
                plan(&place.args, &described, self.ledger().free())?;
            } else if index == 0 {
                plan(&self.args, &self.describe_front()?, self.ledger().free())?;
            }
        }
        Ok(())
    }

    /// Reads the checkpoints of the command line's models and divides the memory, then lets the engines load their
    /// weights one after the other, the front one first; says when all take requests.
    pub async fn start_all(self: &Arc<Self>, app: &App) -> anyhow::Result<()> {
        let started = Instant::now();
        let reader = self.clone();
        let (described, sizes) = tokio::task::spawn_blocking(move || {
            let described = reader.describe_front()?;
            let free = reader.ledger().free();
            let sizes = if described.is_empty() { Vec::new() } else { plan(&reader.args, &described, free)? };
            anyhow::Ok((described, sizes))
        })
        .await
        .context("reading the checkpoint failed")??;

        if self.front > 0 {
            tracing::info!("Loading weights: {}", self.args.compute.describe());
        }
        let mut before = None;
        for (index, (described, sizes)) in described.into_iter().zip(sizes).enumerate() {
            let resident = self.engine(index, described, &sizes, before);
            before = Some(resident.engine.clone());
            app.set_resident(resident);
        }
        for resident in app.residents() {
            resident.engine.loaded().await;
            if let Status::Dead(reason) = resident.engine.status() {
                bail!("the model could not be loaded: {reason}");
            }
            app.warm_grammars(&resident);
        }
        if self.front > 0 {
            tracing::info!("Model loaded in {:.2} s", started.elapsed().as_secs_f64());
        }
        tracing::info!("Application startup complete.");
        for (place, seat) in app.keeper.seats().iter().enumerate().filter(|(_, seat)| seat.known.on_start) {
            if let Err(error) = app.keeper.load(place).await {
                tracing::error!("{}: {error}", seat.canonical());
            }
        }
        Ok(())
    }

    fn describe_front(&self) -> anyhow::Result<Vec<Described>> {
        let places = self.places();
        let front = places[..self.front].iter().enumerate();
        front.map(|(index, place)| describe(&place.args, &place.served, self.nice(index))).collect()
    }

    /// How far the threads of a place give way.
    fn nice(&self, index: usize) -> i32 {
        if index == 0 || self.front == 0 { 0 } else { NICE_BEHIND }
    }

    /// The engines that one steps aside for: on the command line those before it, else the first of those.
    fn in_front(&self, index: usize) -> Vec<Busy> {
        let count = if index < self.front { index } else { self.front.min(1) };
        self.places()[..count].iter().map(|place| place.busy.clone()).collect()
    }

    /// Starts the engine of one model, which waits until the one `before` it has loaded.
    fn engine(
        &self,
        index: usize,
        described: Described,
        sizes: &Sizes,
        before: Option<Handle>,
    ) -> api::Resident {
        let Place { args, busy, .. } = self.place(index).expect("a place that was described is there");
        let Described { resident, text, mut model } = described;
        model.max_model_len = sizes.context;
        log_defaults(&model);
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let config = EngineConfig {
            name: if index == 0 { "engine".to_owned() } else { format!("engine-{index}") },
            queue_len: args.max_num_queued_reqs,
            max_sequences: usize::from(args.max_num_seqs),
            context_len: sizes.context,
            checkpoints_max: sizes.checkpoints,
            speculation: args.speculation(),
            state_bytes: bytes(sizes.state_bytes),
            block_bytes: bytes(sizes.block_bytes),
            busy,
            in_front: self.in_front(index),
            trace: self.trace.clone(),
        };
        self.ledger().taken.insert(index, sizes.plan.total());
        let (compute, limits) = (args.compute.clone(), sizes.limits);
        let before = before.map(|before| (before, tokio::runtime::Handle::current()));
        let (engine, _) = engine::start(config, move |progress| {
            if let Some((before, runtime)) = before {
                runtime.block_on(before.loaded());
            }
            resident.load(&compute, limits, progress)
        });
        engine.stats().set_prices(sizes.state_bytes, sizes.block_bytes);
        api::Resident { index, text: Arc::new(text), engine, model: Arc::new(model) }
    }

    fn places(&self) -> Vec<Place> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn place(&self, index: usize) -> Option<Place> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn of(known: Known) -> Self {
        Self { served: known.served, args: Arc::from(known.args), busy: Busy::default() }
    }
}

impl Loader for Opener {
    fn start(&self, index: usize) -> Result<api::Resident, LoadError> {
        let failed = |error: anyhow::Error| LoadError::Failed(format!("{error:#}"));
        let place = self.place(index).ok_or(LoadError::Failed("there is no such place".into()))?;
        let described = vec![describe(&place.args, &place.served, self.nice(index)).map_err(failed)?];
        let (free, most) = {
            let ledger = self.ledger();
            (ledger.free(), ledger.free_without_others(self.front))
        };
        let sizes = plan(&place.args, &described, free).map_err(|error| {
            // Nobody shall go for one that does not fit even then.
            let models = models(&described);
            let alone = sizes::divide(&models, &Wish::new(&place.args), most);
            let would_fit = sizes::check(&alone, most, false).is_ok();
            let words = error.to_string();
            if would_fit { LoadError::NoRoom(words) } else { LoadError::NeverFits(words) }
        })?;
        let opened = described.into_iter().zip(sizes).next();
        let (described, sizes) = opened.ok_or(LoadError::Failed("the plan has no model".into()))?;
        Ok(self.engine(index, described, &sizes, None))
    }

    fn ended(&self, index: usize) {
        self.ledger().taken.remove(&index);
    }

    fn simulate(&self, simulation: &Simulation) -> Result<Estimate, LoadError> {
        let failed = |error: anyhow::Error| LoadError::Failed(format!("{error:#}"));
        let (served, args, own) = match &simulation.target {
            Target::Place(index) => {
                let place = self.place(*index).ok_or(LoadError::Failed("there is no such place".into()))?;
                (place.served, place.args, self.ledger().taken.get(index).copied())
            }
            Target::Path(path) => (Served::new(None, path), Arc::new(self.args.clone()), None),
        };
        let mut args = Args::clone(&args);
        if let Some(tokens) = simulation.max_model_len {
            args.max_model_len = Some(Context::Tokens(tokens));
        }
        if let Some(sequences) = simulation.max_num_seqs {
            args.max_num_seqs = u16::try_from(sequences).map_err(|_| {
                LoadError::Failed(format!("max_num_seqs: expected at most 1024, got {sequences}"))
            })?;
        }
        if let Some(name) = &simulation.kv_cache_dtype {
            args.kv_cache_dtype = KvName::from_str(name, true).map_err(|_| {
                LoadError::Failed(format!("kv_cache_dtype: expected auto, f32, bf16 or fp8, got {name}"))
            })?;
        }
        let (resident, model) = introduced(&args, &served).map_err(failed)?;
        // What the model has itself would be given back before it is loaded so.
        let free = self.ledger().free().map(|free| free.saturating_add(own.unwrap_or(0)));
        let free = free.map(|free| (free as f64 * simulation.share.unwrap_or(1.0)) as u64);
        Ok(estimate(&args, &resident, &model, free))
    }

    fn rescan(&self) -> Result<Vec<api::Known>, LoadError> {
        let found = known::known(&self.args).map_err(|error| LoadError::Failed(format!("{error:#}")))?;
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = Vec::new();
        for known in found {
            let taken = places.iter().flat_map(|place| &place.served.names);
            let mut clash = taken.filter(|name| known.served.names.contains(name));
            if clash.next().is_none() {
                fresh.push(introduce(&known));
                places.push(Place::of(known));
            }
        }
        Ok(fresh)
    }
}

/// The plan of one model in the words of `POST /simulate`.
fn estimate(args: &Args, resident: &Resident, model: &ModelInfo, free: Option<u64>) -> Estimate {
    let one = [sizes::Model {
        name: model.canonical(),
        config: &resident.config,
        context: model.max_model_len,
        weights: resident.bytes(),
    }];
    let sizes = sizes::divide(&one, &Wish::new(args), free).remove(0);
    let tokens = sizes.limits.blocks.saturating_mul(BLOCK_LEN);
    Estimate {
        total: sizes.plan.total(),
        weights: sizes.plan.weights,
        kv_per_token: sizes.block_bytes / BLOCK_LEN as u64,
        state_per_sequence: sizes.state_bytes,
        activations: sizes.plan.workspace + sizes.plan.logits + sizes.plan.lanes,
        free,
        concurrency: (tokens / sizes.context.max(1)).min(usize::from(args.max_num_seqs)),
        max_model_len: sizes.context,
    }
}

/// A known model as the wire shows it before anybody has asked for it.
pub fn introduce(known: &Known) -> api::Known {
    let model = introduced(&known.args, &known.served).map(|(_, model)| model);
    if let Err(error) = &model {
        tracing::warn!("The model {} cannot be read: {error:#}", known.served.names.join(", "));
    }
    api::Known {
        names: known.served.names.clone(),
        path: known.served.model.clone(),
        args: known.words.clone(),
        preset: known.in_file.then(|| known.served.names.first().cloned().unwrap_or_default()),
        model: model.ok(),
        on_start: known.on_start,
        stop_timeout: known.stop_timeout,
    }
}

/// Divides `free` bytes among the models and shows it. Errors: it does not fit.
fn plan(args: &Args, described: &[Described], free: Option<u64>) -> anyhow::Result<Vec<Sizes>> {
    let models = models(described);
    let sizes = sizes::divide(&models, &Wish::new(args), free);
    tracing::info!("Memory:\n{}", sizes::show(&models, &sizes, free));
    sizes::check(&sizes, free, args.allow_overcommit)?;
    Ok(sizes)
}

fn models(described: &[Described]) -> Vec<sizes::Model<'_>> {
    described
        .iter()
        .map(|Described { resident, model, .. }| sizes::Model {
            name: model.canonical(),
            config: &resident.config,
            context: model.max_model_len,
            weights: resident.bytes(),
        })
        .collect()
}

struct Described {
    resident: Resident,
    text: Text,
    model: ModelInfo,
}

/// All that is known before the weights are read.
fn describe(args: &Args, served: &Served, nice: i32) -> anyhow::Result<Described> {
    let (mut resident, model) = introduced(args, served)?;
    resident.nice = nice;
    let template = args.chat_template.as_deref().map(template_text).transpose()?;
    let text = args.reading.text(&resident, template.as_deref())?;
    Ok(Described { resident, text, model })
}

/// What the configuration and the headers say.
fn introduced(args: &Args, served: &Served) -> anyhow::Result<(Resident, ModelInfo)> {
    let resident = args.reading.open(&served.model)?;
    let most = resident.config.max_position_embeddings;
    let max_model_len = match args.max_model_len {
        None | Some(Context::Auto) => most.min(CONTEXT_DEFAULT),
        Some(Context::Tokens(tokens)) if tokens <= most => tokens,
        Some(Context::Tokens(tokens)) => {
            bail!("--max-model-len: expected at most the model's {most} tokens, got {tokens}")
        }
    };
    let defaults = sampling_defaults(args, &resident)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let model = ModelInfo {
        served_names: served.names.clone(),
        root: served.model.clone(),
        created,
        max_model_len,
        vocab_size: resident.config.vocab_size,
        stop_ids: resident.stop_ids(),
        defaults,
        facts: facts(&resident),
    };
    Ok((resident, model))
}

fn facts(resident: &Resident) -> Facts {
    let config = &resident.config;
    let has_experts = config.layers.iter().any(|layer| matches!(layer, Layer::Moe(_)));
    // Scales are no parameters, so the count is the same whatever the weights are stored as.
    let parameters = Manifest::new(config, &Recipe::uniform(Kind::BF16)).totals().parameters;
    Facts {
        architecture: if has_experts { "nemotron_h_moe" } else { "nemotron_h" },
        format: resident.file_format(),
        quantization: resident.quantization(),
        parameters,
        bytes: resident.bytes(),
        // Every backend that serves computes in the host's memory.
        device_bytes: 0,
        layers: config.layers.len(),
        hidden_size: config.hidden_size,
    }
}

/// The file's text, or the argument itself if it can only be a template.
fn template_text(argument: &std::path::Path) -> anyhow::Result<String> {
    match (std::fs::read_to_string(argument), argument.to_str()) {
        (Ok(text), _) => Ok(text),
        (Err(_), Some(text)) if text.contains("{{") || text.contains("{%") => Ok(text.to_owned()),
        (Err(error), _) => {
            Err(error).with_context(|| format!("--chat-template: {} cannot be read", argument.display()))
        }
    }
}

/// `--override-generation-config` over `generation_config.json` over neutral values.
fn sampling_defaults(args: &Args, resident: &Resident) -> anyhow::Result<SamplingDefaults> {
    let mut defaults = SamplingDefaults::default();
    let own;
    let file = match args.generation_config.as_str() {
        "vllm" => None,
        "auto" => Some(&resident.generation),
        folder => {
            let path = Path::new(folder).join("generation_config.json");
            let shown = || format!("--generation-config: {}", path.display());
            own = GenerationConfig::from_json(&std::fs::read(&path).with_context(shown)?)
                .with_context(shown)?;
            Some(&own)
        }
    };
    if let Some(file) = file {
        defaults.temperature = file.temperature.unwrap_or(defaults.temperature);
        defaults.top_p = file.top_p.unwrap_or(defaults.top_p);
        defaults.top_k = file.top_k.unwrap_or(defaults.top_k);
        defaults.min_p = file.min_p.unwrap_or(defaults.min_p);
        defaults.repetition_penalty = file.repetition_penalty.unwrap_or(defaults.repetition_penalty);
    }
    if let Some(map) = &args.override_generation_config {
        override_defaults(&mut defaults, map)?;
    }
    Ok(defaults)
}

fn override_defaults(defaults: &mut SamplingDefaults, map: &Map<String, Value>) -> anyhow::Result<()> {
    for (key, value) in map {
        let number = value.as_f64().map(|number| number as f32);
        let number = number.with_context(|| {
            format!("--override-generation-config: {key}: expected a number, got {value}")
        })?;
        let (place, fits, expected) = match key.as_str() {
            "temperature" => (&mut defaults.temperature, (0.0..=2.0).contains(&number), "0 to 2"),
            "top_p" => (&mut defaults.top_p, number > 0.0 && number <= 1.0, "above 0 and at most 1"),
            "min_p" => (&mut defaults.min_p, (0.0..=1.0).contains(&number), "0 to 1"),
            "repetition_penalty" => (&mut defaults.repetition_penalty, number > 0.0, "above 0"),
            "top_k" => {
                defaults.top_k = number.max(0.0) as u32;
                continue;
            }
            other => {
                tracing::warn!("--override-generation-config: {other} has no effect here and is ignored");
                continue;
            }
        };
        if !fits {
            bail!("--override-generation-config: {key}: expected {expected}, got {number}");
        }
        *place = number;
    }
    Ok(())
}

fn log_defaults(model: &ModelInfo) {
    let SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty } = model.defaults;
    tracing::info!(
        "Model {} serves as {} with {} tokens of context; sampling defaults: temperature {temperature}, top_p {top_p}, \
         top_k {top_k}, min_p {min_p}, repetition_penalty {repetition_penalty}",
        model.root,
        model.served_names.join(", "),
        model.max_model_len,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::STOP_TIMEOUT;

    /// Knows `tiny`, and has `bytes` to give.
    fn opener(bytes: u64) -> Opener {
        let args: Args = crate::cli::flags(["serve"]).expect("no flag is required");
        let tiny = Known {
            served: Served::new(None, "tiny"),
            args: Box::new(args.clone()),
            words: Vec::new(),
            in_file: false,
            on_start: false,
            stop_timeout: STOP_TIMEOUT,
        };
        let opener = Opener::new(args, Models { front: Vec::new(), known: vec![tiny] }, None);
        opener.ledger().start = Some(bytes);
        opener
    }

    #[test]
    fn what_is_given_is_not_given_again() {
        let opener = opener(100);
        opener.ledger().taken.insert(3, 60);
        assert_eq!(opener.ledger().free(), Some(40));
        opener.ended(3);
        assert_eq!(opener.ledger().free(), Some(100));
    }

    #[test]
    fn too_little_memory_is_for_ever_where_nobody_can_make_enough_room() {
        let check = |bytes: u64, others: u64, expected: fn(String) -> LoadError| {
            let opener = opener(bytes);
            opener.ledger().taken.insert(3, others);
            let refused = opener.start(0).map(|_| ()).expect_err("it is too large");
            let words = refused.to_string();
            assert!(words.contains("the plan needs") && words.contains("are free"), "{words}");
            assert_eq!(refused, expected(words));
        };
        check(1000, 0, LoadError::NeverFits);
        check(1000, 900, LoadError::NeverFits);
        check(1 << 30, (1 << 30) - 1000, LoadError::NoRoom);
    }

    #[test]
    fn a_simulation_takes_nothing_and_hears_what_it_is_told() {
        let opener = opener(1 << 30);
        let simulate = |change: fn(&mut Simulation)| {
            let mut simulation = Simulation {
                target: Target::Place(0),
                max_model_len: None,
                max_num_seqs: None,
                kv_cache_dtype: None,
                share: None,
            };
            change(&mut simulation);
            opener.simulate(&simulation)
        };
        let plain = simulate(|_| ()).expect("tiny is there");
        assert!(plain.fits() && plain.total <= 1 << 30, "{plain:?}");
        let half =
            simulate(|simulation| simulation.kv_cache_dtype = Some("fp8".into())).expect("it is known");
        assert!(half.kv_per_token < plain.kv_per_token);
        let short = simulate(|simulation| simulation.max_model_len = Some(64)).expect("less than it has");
        assert!(short.max_model_len == 64 && short.total < plain.total);
        assert!(!simulate(|simulation| simulation.share = Some(1e-6)).expect("tiny is there").fits());
        for change in [
            (|simulation| simulation.kv_cache_dtype = Some("int3".into())) as fn(&mut Simulation),
            |simulation| simulation.max_num_seqs = Some(100_000),
            |simulation| simulation.max_model_len = Some(1 << 30),
            |simulation| simulation.target = Target::Path("/nowhere".into()),
        ] {
            assert!(matches!(simulate(change), Err(LoadError::Failed(_))));
        }
        assert!(opener.ledger().taken.is_empty());
    }

    #[test]
    fn overrides_are_checked() {
        let mut defaults = SamplingDefaults::default();
        let mut set = |json: Value| {
            let Value::Object(map) = json else { panic!("an object") };
            override_defaults(&mut defaults, &map).map(|()| defaults).map_err(|error| error.to_string())
        };
        let set_once = set(serde_json::json!({"temperature": 0.6, "top_k": 20, "max_new_tokens": 5}));
        assert_eq!(
            set_once,
            Ok(SamplingDefaults { temperature: 0.6, top_k: 20, ..SamplingDefaults::default() })
        );
        assert_eq!(
            set(serde_json::json!({"top_p": 0})),
            Err("--override-generation-config: top_p: expected above 0 and at most 1, got 0".to_owned())
        );
    }
}
