//! From what was typed after `--model` to a network that answers steps: shared by every command.

use anyhow::{Context, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use super::pull::hub_cache;
use crate::backend::{Precision, cpu::Cpu, reference::Reference, trace::Trace};
use crate::model::config::{GenerationConfig, ModelConfig};
use crate::model::fields::Fields;
use crate::model::{Limits, Model, Network, load, presets};
use crate::sample;
use crate::text::{Mode, Text, TextFiles, Tool};
use crate::weights::{Checkpoint, Linear};

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
    /// f32 on the CPU
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
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
        match self.dtype {
            DtypeName::Auto | DtypeName::F32 => Precision::F32,
            DtypeName::Bf16 => Precision::Bf16,
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

/// A checkpoint whose configuration was read and whose headers were checked; weights are not loaded yet.
pub struct Resident {
    /// As the user named it.
    pub name: String,
    pub checkpoint: Checkpoint,
    pub config: ModelConfig,
    pub generation: GenerationConfig,
    /// How far its compute threads give way to those of a model in front of it.
    pub nice: i32,
}

impl Resident {
    /// Finds and opens `model`: a preset, a folder, a GGUF file or a hub id in the local cache.
    pub fn open(model: &str) -> anyhow::Result<Self> {
        let checkpoint = presets::resolve(model, &hub_cache())?.open()?;
        let place = checkpoint.source().place();
        let Some(json) = checkpoint.file("config.json")? else {
            bail!("{place} has no config.json: a checkpoint folder of this family holds one");
        };
        let config = ModelConfig::from_json(&json).with_context(|| format!("config.json of {place}"))?;
        let generation = match checkpoint.file("generation_config.json")? {
            Some(json) => GenerationConfig::from_json(&json)
                .with_context(|| format!("generation_config.json of {place}"))?,
            None => GenerationConfig::default(),
        };
        Ok(Resident { name: model.to_owned(), checkpoint, config, generation, nice: 0 })
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
        let place = self.checkpoint.source().place();
        let Some(tokenizer) = self.checkpoint.file("tokenizer.json")? else {
            bail!("{place} has no tokenizer.json: copy it from the model's release beside config.json");
        };
        let tokenizer_config = self.checkpoint.file("tokenizer_config.json")?;
        let template = self.checkpoint.file("chat_template.jinja")?;
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

    /// Errors if a prompt and what follows it do not fit the model's context together.
    pub fn check_context(&self, prompt: usize, further: usize) -> anyhow::Result<()> {
        let context = self.config.max_position_embeddings;
        if prompt.saturating_add(further) > context {
            bail!("{prompt} tokens and {further} to generate exceed the context of {context} tokens");
        }
        Ok(())
    }

    /// Loads the weights; `progress` is told how many bytes of [`Checkpoint::bytes`] are done.
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

    fn fields(&self, progress: &dyn Fn(u64)) -> anyhow::Result<Fields<Linear>> {
        let bar = load_bar(self.checkpoint.bytes())?;
        let report = |done| {
            bar.set_position(done);
            progress(done);
        };
        let loaded = load::load(&self.config, &self.checkpoint, &report)?;
        bar.finish_and_clear();
        for warning in &loaded.warnings {
            eprintln!("warning: {}: {warning}", self.name);
        }
        Ok(loaded.fields)
    }

    fn cpu(&self, compute: &Compute) -> anyhow::Result<Cpu> {
        Ok(Cpu::giving_way(compute.precision(), compute.threads(), self.nice)?)
    }

    /// The model without weights, for counting bytes.
    pub fn trace(&self, limits: Limits, cache_bytes: usize) -> anyhow::Result<Model<Trace>> {
        let fields = load::outline(&self.config, &self.checkpoint)?;
        Ok(Model::new(Trace::new(cache_bytes), self.config.clone(), fields, limits)?)
    }
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
