//! From what was typed after `--model` to a network that answers steps: shared by every command.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};
use std::path::PathBuf;

use super::pull::hub_cache;
use crate::backend::cpu::Cpu;
use crate::backend::host::Routes;
use crate::backend::profile::{Profile, Span};
use crate::backend::{Backend, KvType, Precision, reference::Reference, trace::Trace};
use crate::engine::LoadProgress;
use crate::model::config::{GenerationConfig, ModelConfig};
use crate::model::fields::Fields;
use crate::model::manifest::{Manifest, dtype_name};
use crate::model::presets::{OpenError, Preset};
use crate::model::quantization::Recipe;
use crate::model::random::random;
use crate::model::{Limits, Model, Network, load, presets};
use crate::sample;
use crate::text::{Mode, Text, TextFiles, Tool};
use crate::weights::{Checkpoint, Error as WeightsError, Kind, Linear, Source, Stored};

/// Of dummy weights, and of `quantize --random` where nobody says otherwise.
pub const SEED: u64 = 0;

/// Tokens per KV block.
pub const BLOCK_LEN: usize = 16;

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// Threads and SIMD over weights in their stored form
    Cpu,
    /// Plain loops, for comparison
    Reference,
}

/// The type activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// bf16 as the checkpoints were trained, on the CPU; f32 in the reference
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// From the checkpoint
    #[default]
    #[value(aliases = ["safetensors", "fastsafetensors", "runai_streamer"])]
    Auto,
    /// Random ones, from the configuration alone
    Dummy,
}

/// How random weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightFormat {
    Bf16,
    Fp8,
    Nvfp4,
}

impl WeightFormat {
    pub fn kind(self) -> Kind {
        match self {
            WeightFormat::Bf16 => Kind::BF16,
            WeightFormat::Fp8 => Kind::Fp8,
            WeightFormat::Nvfp4 => Kind::Nvfp4,
        }
    }
}

/// Options of commands that can do without a checkpoint.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Load {
    /// `dummy` makes random weights from the configuration alone, the same ones each time
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// Format of dummy weights [default: what the configuration says]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub quantization: Option<WeightFormat>,
}

/// Where the hub's checkpoints lie on this machine, and which of them are meant.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The folder with `models--org--name` inside.
    pub cache: PathBuf,
    /// Branch, tag or commit; `None`: what the preset says, or the newest that is there.
    pub revision: Option<String>,
}

impl Default for Hub {
    fn default() -> Self {
        Self { cache: hub_cache(), revision: None }
    }
}

impl Hub {
    pub fn resolve(&self, model: &str) -> Result<presets::Location, presets::Error> {
        presets::resolve_at(model, &self.cache, self.revision.as_deref())
    }
}

/// Options of every command that computes.
#[derive(Debug, Clone, clap::Args)]
pub struct Compute {
    /// Who computes
    #[arg(long, value_enum, default_value_t = BackendName::Cpu)]
    pub backend: BackendName,
    /// Type that activations are rounded to; weights always stay in their stored form
    #[arg(long, value_enum, default_value_t = DtypeName::Auto)]
    pub dtype: DtypeName,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl Compute {
    pub fn precision(&self) -> Precision {
        match (self.dtype, self.backend) {
            (DtypeName::F32, _) | (DtypeName::Auto, BackendName::Reference) => Precision::F32,
            (DtypeName::Bf16, _) | (DtypeName::Auto, BackendName::Cpu) => Precision::Bf16,
        }
    }

    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, usize::from)
    }

    /// As tables print it: `cpu avx512, 2 threads, f32`.
    pub fn describe(&self) -> String {
        let precision = match self.precision() {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        };
        match self.backend {
            BackendName::Reference => format!("reference, {precision}"),
            BackendName::Cpu => {
                let isa = crate::backend::cpu::simd::Isa::detect().name();
                format!("cpu {isa}, {} threads, {precision}", self.threads())
            }
        }
    }
}

/// What a network's weights are made of.
enum Weights {
    /// Their headers were checked.
    Stored(Checkpoint),
    /// Nothing but a configuration; `bytes` as they would be stored.
    Random { source: Source, recipe: Recipe, bytes: u64 },
}

/// A model whose configuration was read; its weights are not loaded yet.
pub struct Resident {
    /// As the user named it.
    pub name: String,
    weights: Weights,
    pub config: ModelConfig,
    pub generation: GenerationConfig,
    /// How far its compute threads give way to those of a model in front of it.
    pub nice: i32,
}

impl Resident {
    /// Finds and opens `model`: a preset, a folder, a GGUF file or a hub id in the local cache.
    pub fn open(model: &str) -> anyhow::Result<Self> {
        Self::open_as(model, &Load::default())
    }

    /// The same, its weights as `load` says.
    pub fn open_as(model: &str, load: &Load) -> anyhow::Result<Self> {
        Self::open_from(&Hub::default(), model, load)
    }

    /// The same, where `hub` says.
    pub fn open_from(hub: &Hub, model: &str, load: &Load) -> anyhow::Result<Self> {
        match (load.load_format, load.quantization) {
            (LoadFormat::Auto, None) => {
                let location = hub.resolve(model)?;
                let checkpoint = location.open().map_err(|error| match error {
                    OpenError::Weights(WeightsError::NoWeights { .. }) => {
                        anyhow::anyhow!(
                            "{error}; commands that take `--load-format dummy` make random weights"
                        )
                    }
                    error => error.into(),
                })?;
                let (config, generation) = configuration(checkpoint.source())?;
                Ok(Self::of(model, Weights::Stored(checkpoint), config, generation))
            }
            (LoadFormat::Auto, Some(_)) => {
                bail!(
                    "--quantization is for --load-format dummy: a checkpoint's weights stay as they are stored"
                )
            }
            (LoadFormat::Dummy, format) => Self::random(hub, model, format.map(WeightFormat::kind)),
        }
    }

    /// Random weights of `kind`, or as the configuration says.
    fn random(hub: &Hub, model: &str, kind: Option<Kind>) -> anyhow::Result<Self> {
        let (source, preset) = configured_from(hub, model)?;
        let (config, generation) = configuration(&source)?;
        let recipe = match (kind, preset) {
            (Some(kind), _) => Recipe::uniform(kind),
            (None, Some(preset)) => preset.recipe()?,
            (None, None) => recipe(&source)?,
        };
        let bytes = Manifest::new(&config, &recipe).totals().bytes;
        Ok(Self::of(model, Weights::Random { source, recipe, bytes }, config, generation))
    }

    fn of(name: &str, weights: Weights, config: ModelConfig, generation: GenerationConfig) -> Self {
        Resident { name: name.to_owned(), weights, config, generation, nice: 0 }
    }

    /// Every format that its configuration stores weights in. Errors: the configuration contradicts itself.
    pub fn kinds(&self) -> anyhow::Result<Vec<Kind>> {
        let recipe = match &self.weights {
            Weights::Stored(checkpoint) => &recipe(checkpoint.source())?,
            Weights::Random { recipe, .. } => recipe,
        };
        Ok(recipe.kinds().collect())
    }

    fn source(&self) -> &Source {
        match &self.weights {
            Weights::Stored(checkpoint) => checkpoint.source(),
            Weights::Random { source, .. } => source,
        }
    }

    /// Of all weights as they are stored.
    pub fn bytes(&self) -> u64 {
        match &self.weights {
            Weights::Stored(checkpoint) => checkpoint.bytes(),
            Weights::Random { bytes, .. } => *bytes,
        }
    }

    /// `gguf`, or `safetensors` for all that is made of them.
    pub fn file_format(&self) -> &'static str {
        if matches!(self.source(), Source::Made { .. }) { "gguf" } else { "safetensors" }
    }

    /// What most of the weights' bytes are, in the words of releases.
    pub fn quantization(&self) -> String {
        let mut sums = BTreeMap::<&str, u64>::new();
        let mut add = |kind, bytes| *sums.entry(kind).or_default() += bytes;
        match &self.weights {
            Weights::Stored(checkpoint) => {
                for name in checkpoint.names() {
                    let bytes = checkpoint.bytes_of(name);
                    match checkpoint.stored(name) {
                        Stored::Nothing => {}
                        Stored::Tensor(dtype, _) => add(dtype_name(dtype), bytes),
                        Stored::Blocks(blocks, _) => add(blocks.name(), bytes),
                    }
                }
            }
            Weights::Random { recipe, .. } => {
                let manifest = Manifest::new(&self.config, recipe);
                manifest.entries().for_each(|entry| add(dtype_name(entry.dtype), entry.bytes()));
            }
        }
        let most = sums.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(kind, _)| kind);
        match most {
            // Two values of four bits share a byte.
            "U8" => "NVFP4",
            "F8_E4M3" => "FP8",
            most => most,
        }
        .to_owned()
    }

    /// Ids that end a generation: the checkpoint's stop set, else config.json's.
    pub fn stop_ids(&self) -> Vec<u32> {
        let generation = &self.generation.eos_token_ids;
        if generation.is_empty() { self.config.eos_token_ids.clone() } else { generation.clone() }
    }

    /// Tokenizer and chat template of the checkpoint.
    pub fn text(&self) -> anyhow::Result<Text> {
        self.text_with(None)
    }

    /// The same with `own` in place of the checkpoint's template.
    pub fn text_with(&self, own: Option<&str>) -> anyhow::Result<Text> {
        text_of(self.source(), own)
    }

    /// Errors if a prompt and what follows it do not fit the model's context together.
    pub fn check_context(&self, prompt: usize, further: usize) -> anyhow::Result<()> {
        let context = self.config.max_position_embeddings;
        if prompt.saturating_add(further) > context {
            bail!("{prompt} tokens and {further} to generate exceed the context of {context} tokens");
        }
        Ok(())
    }

    /// Loads the weights; `progress` is told how many bytes of [`Resident::bytes`] are done.
    pub fn network(
        &self,
        compute: &Compute,
        limits: Limits,
        progress: &dyn Fn(u64),
    ) -> anyhow::Result<Box<dyn Network>> {
        let fields = self.fields(progress)?;
        Ok(match compute.backend {
            BackendName::Reference => Box::new(Model::new(
                Reference::new(compute.precision()),
                self.config.clone(),
                fields,
                limits,
            )?),
            BackendName::Cpu => {
                Box::new(Model::new(self.cpu(compute)?, self.config.clone(), fields, limits)?)
            }
        })
    }

    /// The same as an engine asks for it, on its own thread: progress in shares of the whole, an error as a sentence.
    pub fn load(
        &self,
        compute: &Compute,
        limits: Limits,
        progress: &LoadProgress,
    ) -> Result<Box<dyn Network>, String> {
        let total = self.bytes();
        let network = self.network(compute, limits, &|done| progress.set(done, total));
        network.map_err(|error| format!("{error:#}"))
    }

    fn fields(&self, progress: &dyn Fn(u64)) -> anyhow::Result<Fields<Linear>> {
        let bar = load_bar(self.bytes())?;
        let report = |done| {
            bar.set_position(done);
            progress(done);
        };
        let loaded = match &self.weights {
            Weights::Stored(checkpoint) => load::load(&self.config, checkpoint, &report)?,
            Weights::Random { recipe, .. } => {
                let fields = random(&self.config, SEED, recipe, &report);
                bar.finish_and_clear();
                return Ok(fields);
            }
        };
        bar.finish_and_clear();
        for warning in &loaded.warnings {
            eprintln!("warning: {}: {warning}", self.name);
        }
        Ok(loaded.fields)
    }

    fn cpu(&self, compute: &Compute) -> anyhow::Result<Cpu> {
        Ok(Cpu::giving_way(compute.precision(), compute.threads(), self.nice)?)
    }

    /// As [`Self::network`], its operations to be watched.
    pub fn watched(&self, compute: &Compute, limits: Limits) -> anyhow::Result<Box<dyn Watched>> {
        let (config, fields) = (self.config.clone(), self.fields(&|_| {})?);
        Ok(match compute.backend {
            BackendName::Reference => {
                let backend = Profile::new(Reference::new(compute.precision()));
                Box::new(Model::new(backend, config, fields, limits)?)
            }
            BackendName::Cpu => {
                let backend = Profile::new(self.cpu(compute)?);
                Box::new(Model::new(backend, config, fields, limits)?)
            }
        })
    }

    /// The model without weights, for counting bytes.
    pub fn trace(&self, compute: &Compute, limits: Limits) -> anyhow::Result<Model<Trace>> {
        let cache_bytes = KvType::Auto.cell(compute.precision()).bytes();
        let fields = match &self.weights {
            Weights::Stored(checkpoint) => load::outline(&self.config, checkpoint)?,
            Weights::Random { recipe, .. } => load::describe(&self.config, recipe),
        };
        Ok(Model::new(Trace::new(cache_bytes), self.config.clone(), fields, limits)?)
    }
}

/// A network whose operations can be timed.
pub trait Watched: Network {
    /// See [`Profile::watch`].
    fn watch(&mut self, on: bool);

    /// See [`Profile::spans`].
    fn spans(&self) -> &[Span];
}

impl<B: Backend<Routes = Routes>> Watched for Model<Profile<B>> {
    fn watch(&mut self, on: bool) {
        self.backend_mut().watch(on);
    }

    fn spans(&self) -> &[Span] {
        self.backend().spans()
    }
}

/// The files of `model` beside its weights, which need not be there; the preset, where a preset's configuration is all
/// there is of them.
pub fn configured(model: &str) -> anyhow::Result<(Source, Option<&'static Preset>)> {
    configured_from(&Hub::default(), model)
}

fn configured_from(hub: &Hub, model: &str) -> anyhow::Result<(Source, Option<&'static Preset>)> {
    match (hub.resolve(model), presets::find(model)) {
        (Ok(location), _) => match location.source() {
            Some(source) => Ok((source, None)),
            None => bail!("{model} is GGUF: expected a folder with a config.json to make random weights for"),
        },
        (Err(presets::Error::NotDownloaded { .. }), Some(preset)) => {
            Ok((Source::embedded(preset.name, preset.files), Some(preset)))
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// How the weights of a checkpoint folder are stored.
fn recipe(source: &Source) -> anyhow::Result<Recipe> {
    let json = source.file("config.json")?.unwrap_or_default();
    Ok(Recipe::of_checkpoint(&json, source.file("hf_quant_config.json")?.as_deref())?)
}

/// Tokenizer and chat template of a folder, with `own` in place of its template.
pub fn text_of(source: &Source, own: Option<&str>) -> anyhow::Result<Text> {
    let place = source.place();
    let Some(tokenizer) = source.file("tokenizer.json")? else {
        bail!("{place} has no tokenizer.json: copy it from the model's release beside config.json");
    };
    let tokenizer_config = source.file("tokenizer_config.json")?;
    let template = source.file("chat_template.jinja")?;
    let template = match &template {
        Some(bytes) => Some(
            std::str::from_utf8(bytes)
                .with_context(|| format!("chat_template.jinja of {place} is not UTF-8"))?,
        ),
        None => None,
    };
    let files = TextFiles {
        tokenizer_json: &tokenizer,
        tokenizer_config: tokenizer_config.as_deref(),
        chat_template: own.or(template),
    };
    Text::load(files).with_context(|| format!("tokenizer and chat template of {place}"))
}

fn configuration(source: &Source) -> anyhow::Result<(ModelConfig, GenerationConfig)> {
    let place = source.place();
    let Some(json) = source.file("config.json")? else {
        bail!("{place} has no config.json: a checkpoint folder of this family holds one");
    };
    let config = ModelConfig::from_json(&json).with_context(|| format!("config.json of {place}"))?;
    let generation = match source.file("generation_config.json")? {
        Some(json) => GenerationConfig::from_json(&json)
            .with_context(|| format!("generation_config.json of {place}"))?,
        None => GenerationConfig::default(),
    };
    Ok((config, generation))
}

/// Bytes and GB/s of a load, on a terminal, when there is enough to wait for.
fn load_bar(bytes: u64) -> anyhow::Result<ProgressBar> {
    const WORTH_SHOWING: u64 = 100 << 20;
    let template = "loading {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} [{eta}]";
    let bar = ProgressBar::hidden().with_style(ProgressStyle::with_template(template)?);
    bar.set_length(bytes);
    if bytes >= WORTH_SHOWING {
        // Hidden by indicatif itself where standard error is no terminal.
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    Ok(bar)
}

/// How the decoder reads an assistant's turn after `prompt`: as the prompt left it and as the template was told.
pub fn chat_mode(text: &Text, prompt: &[u32], tools: &[Value], kwargs: &Map<String, Value>) -> Mode {
    let switch = |key: &str, default| kwargs.get(key).and_then(Value::as_bool).unwrap_or(default);
    let tool = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool);
        let name = function.get("name")?.as_str()?.to_owned();
        Some(Tool { name, parameters: function.get("parameters").cloned() })
    };
    Mode::Chat {
        starts_in_reasoning: text.starts_in_reasoning(prompt),
        thinking: switch("enable_thinking", true),
        force_nonempty_content: switch("force_nonempty_content", false),
        tools: (!tools.is_empty()).then(|| tools.iter().filter_map(tool).collect()),
    }
}

/// Reads a count that something is allocated for or repeated by; more than `MAX` is a slip of the finger.
pub fn count<const MAX: usize>(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=MAX).contains(count));
    count.ok_or_else(|| format!("expected a whole number from 1 to {MAX}, got `{text}`"))
}

/// The likeliest id of a row of logits. Errors if the row has none.
pub fn greedy(logits: &[f32]) -> anyhow::Result<u32> {
    sample::argmax(logits).context("the model's logits are not finite")
}

/// Limits for `sequences` sequences of at most `length` tokens each, and steps of at most `step_tokens`.
pub fn limits(sequences: usize, length: usize, step_tokens: usize) -> Limits {
    Limits {
        step_tokens,
        logit_rows: step_tokens,
        slots: sequences,
        blocks: sequences * length.div_ceil(BLOCK_LEN),
        block_len: BLOCK_LEN,
        ..Limits::default()
    }
}
