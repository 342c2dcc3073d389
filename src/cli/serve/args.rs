//! The flags of `serve`, by vLLM's names where they mean the same.

use super::door::DoorArgs;
use super::reading::Reading;
use crate::api;
use crate::backend::{KvType, SsmType};
use crate::cli::resident::{Compute, count};
use crate::engine::{ACCEPTED_POSITIONS, Speculation};
use clap::ValueEnum;
use serde_json::{Map, Value};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ferrotron serve
  ferrotron serve --model tiny --port 8001 --default-chat-template-kwargs '{\"enable_thinking\": false}'
  curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}]}'";

/// Names of tool parsers that mean the built-in one.
const TOOL_PARSERS: [&str; 3] = ["qwen3_coder", "qwen3_xml", "nemotron_v3"];
/// Names of reasoning parsers that mean the built-in one.
const REASONING_PARSERS: [&str; 5] = ["nemotron_v3", "super_v3", "nano_v3", "deepseek_r1", "qwen3"];

/// Drafts per step that are counted, one by one.
const DEPTH_MAX: u32 = ACCEPTED_POSITIONS as u32;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Preset, folder, .gguf file or hub id [default: tiny]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,
    /// The same as MODEL; repeated, the first model stands in front and the others behind it. NAME=MODEL gives a name
    #[arg(long = "model", value_name = "[NAME=]MODEL")]
    pub models: Vec<String>,
    /// A folder of models, each a folder or a .gguf file, that are loaded when somebody asks for them
    #[arg(long, value_name = "DIR")]
    pub models_dir: Option<PathBuf>,
    /// A file of [sections], each a model by name with options of its own, loaded in the same way
    #[arg(long, value_name = "FILE")]
    pub models_preset: Option<PathBuf>,
    /// Models beside those of the command line that are loaded at one time; the one that was used longest ago goes
    /// first. 0: any number
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_most_1024)]
    pub models_max: usize,
    /// Do not load a model because a request asks for it: POST /models/load does
    #[arg(long)]
    pub no_models_autoload: bool,
    /// Let models be put to sleep: POST /sleep, /wake_up and /reset_prefix_cache
    #[arg(long)]
    pub enable_sleep_mode: bool,
    /// A request for a model that sleeps wakes it
    #[arg(long)]
    pub auto_wake: bool,
    /// Seconds after which a model that nobody asks for gives its memory back; a request brings it again [default: never]
    #[arg(long, value_name = "SEC", value_parser = idle_seconds, allow_hyphen_values = true)]
    pub sleep_idle_seconds: Option<std::time::Duration>,
    /// Show what the models would take of memory, and end
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub compute: Compute,
    /// Flags from a YAML file; what is typed wins over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Warn of unknown flags instead of refusing them
    #[arg(long)]
    pub ignore_unknown_flags: bool,
    /// Address or name to listen on [default: 127.0.0.1; with an API key 0.0.0.0]
    #[arg(long, env = "FERROTRON_HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Names that requests may ask for; the first is canonical [default: MODEL]
    #[arg(long, alias = "alias", short = 'a', value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,

    /// Tokens of prompt and answer together; `auto` or -1 is the default [default: the model's, up to 32768]
    #[arg(long, alias = "ctx-size", short = 'c', value_name = "N", value_parser = context, allow_hyphen_values = true)]
    pub max_model_len: Option<Context>,
    /// Sequences that run at once; each has room for --max-model-len tokens
    #[arg(long, alias = "parallel", value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_num_seqs: u16,
    /// Tokens of one step: what a long prompt may take before the others have their turn
    #[arg(long, value_name = "N", default_value = "256", value_parser = batched)]
    pub max_num_batched_tokens: usize,
    /// Keep what prompts begin with, so that the next one does not compute it again (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Compute every prompt anew
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// States that the prefix cache may hold [default: 16 or twice --max-num-seqs, fewer where memory is short]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub prefix_cache_checkpoints: Option<u32>,
    /// Tokens whose keys and values there is room for [default: --max-num-seqs times --max-model-len, fewer where memory is short]
    #[arg(long, value_name = "N", value_parser = size)]
    pub kv_cache_tokens: Option<usize>,
    /// The same in blocks of 16 tokens
    #[arg(long, value_name = "N", value_parser = size, conflicts_with = "kv_cache_tokens")]
    pub num_gpu_blocks_override: Option<usize>,
    /// The same in bytes, for each model
    #[arg(long, value_name = "N", value_parser = size, conflicts_with_all = ["kv_cache_tokens", "num_gpu_blocks_override"])]
    pub kv_cache_memory_bytes: Option<usize>,
    /// Share of the memory that is free now which may be taken [default: all; what nobody planned needs some of it]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub gpu_memory_utilization: Option<f64>,
    /// `none` is --no-enable-prefix-caching; every other name keeps states where turns end
    #[arg(long, value_name = "MODE", value_parser = ["auto", "none", "align", "all"])]
    pub mamba_cache_mode: Option<String>,
    /// How keys and values are kept; `auto` is as wide as --dtype
    #[arg(long, value_enum, default_value_t = KvName::Auto)]
    pub kv_cache_dtype: KvName,
    /// How Mamba states are kept between steps
    #[arg(long, value_enum, default_value_t = SsmName::Float32)]
    pub mamba_ssm_cache_dtype: SsmName,
    /// Who may draft ahead and how far, such as '{"method": "mtp", "num_speculative_tokens": 3}'; methods are mtp, ngram,
    /// auto and none [default: auto, up to 3]
    #[arg(long, value_name = "JSON", value_parser = speculative)]
    pub speculative_config: Option<Speculation>,
    /// Drafts per step at most; 0: none
    #[arg(long, alias = "num-speculative-tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i64::from(DEPTH_MAX)))]
    pub spec_depth: Option<u32>,
    /// Start although the plan needs more memory than is free
    #[arg(long)]
    pub allow_overcommit: bool,
    /// Requests that may wait; more are answered with 429
    #[arg(long, value_name = "N", default_value = "1024", value_parser = count::<1_000_000>)]
    pub max_num_queued_reqs: usize,
    /// Seconds after which a request that brings no `timeout` of its own is answered with 504; 0 never [default: never]
    #[arg(long, value_name = "SEC", value_parser = seconds)]
    pub request_timeout: Option<std::time::Duration>,
    /// Makes the seeds of requests without one repeat from start to start
    #[arg(long)]
    pub seed: Option<u64>,

    /// `auto` takes the sampling defaults from the model's generation_config.json, `vllm` neutral ones, a folder its own
    #[arg(long, default_value = "auto", value_name = "auto|vllm|FOLDER")]
    pub generation_config: String,
    /// Sampling defaults over those, such as '{"temperature": 0.6}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub override_generation_config: Option<Map<String, Value>>,
    /// Template variables below each request's own, such as '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub default_chat_template_kwargs: Option<Map<String, Value>>,
    /// 0: no thoughts unless a request asks for them; -1: as the template has it
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(i64).range(-1..=0))]
    pub reasoning_budget: Option<i64>,
    /// Let requests bring their own `chat_template`
    #[arg(long)]
    pub trust_request_chat_template: bool,
    /// Do not show the tools to the model when `tool_choice` is none
    #[arg(long)]
    pub exclude_tools_when_tool_choice_none: bool,
    /// Largest `top_logprobs`; -1 allows the whole vocabulary
    #[arg(long, value_name = "N", default_value_t = 20, allow_hyphen_values = true, value_parser = clap::value_parser!(i64).range(-1..=1_000_000))]
    pub max_logprobs: i64,
    /// Show tokens in log-probabilities as `token_id:N`
    #[arg(long)]
    pub return_tokens_as_token_ids: bool,
    /// End every stream with its usage
    #[arg(long)]
    pub enable_force_include_usage: bool,
    /// Cut a `max_tokens` beyond the context instead of refusing it
    #[arg(long)]
    pub clamp_max_tokens: bool,
    /// Answer /v1/messages for every name that begins with `claude` (the default)
    #[arg(long, overrides_with = "no_anthropic_any_model")]
    pub anthropic_any_model: bool,
    /// Answer /v1/messages for served names only
    #[arg(long)]
    pub no_anthropic_any_model: bool,
    /// What /v1/messages does where the request does not say `thinking`: as the chat template (on), or none
    #[arg(long, default_value = "on", value_parser = ["on", "off"])]
    pub anthropic_default_thinking: String,

    /// Keys that requests must show one of
    #[arg(long, value_name = "KEY", num_args = 1.., env = "VLLM_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
    #[command(flatten)]
    pub door: DoorArgs,
    /// Web origins that may call, a JSON list [default: this machine and apps; with an API key all]
    #[arg(long, value_name = "JSON", value_parser = strings)]
    pub allowed_origins: Option<Strings>,
    /// Methods they may use, a JSON list [default: all]
    #[arg(long, value_name = "JSON", value_parser = strings)]
    pub allowed_methods: Option<Strings>,
    /// Headers they may send, a JSON list [default: all]
    #[arg(long, value_name = "JSON", value_parser = strings)]
    pub allowed_headers: Option<Strings>,
    /// Let browsers send credentials along
    #[arg(long)]
    pub allow_credentials: bool,

    /// Server that answers in place of this one while its engine is loading, dead or ending: only requests with a
    /// `priority` above 0, which can wait
    #[arg(long, value_name = "URL")]
    pub fallback: Option<String>,
    /// The key that it wants to see; those of our clients are not shown to it
    #[arg(long, value_name = "KEY", env = "FERROTRON_FALLBACK_API_KEY", hide_env_values = true)]
    pub fallback_api_key: Option<String>,
    /// The model that it is asked for [default: none is named, so that its first one answers]
    #[arg(long, value_name = "NAME", requires = "fallback")]
    pub fallback_model: Option<String>,

    /// Where uploaded files and batches are kept; batches go on there after a restart [default: a temporary folder]
    #[arg(long, value_name = "DIR")]
    pub files_dir: Option<PathBuf>,
    /// Bytes of all those files together
    #[arg(long, value_name = "BYTES", default_value = "1024M", value_parser = size)]
    pub files_max_bytes: usize,
    /// How many of them there may be
    #[arg(long, value_name = "N", default_value = "1000", value_parser = count::<100_000>)]
    pub files_max_count: usize,

    /// Seconds of silence after which a stream says that it lives; 0 never
    #[arg(long, alias = "sse-ping-interval", value_name = "SEC", default_value = "15", value_parser = seconds)]
    pub sse_keep_alive_interval: std::time::Duration,
    /// Seconds that running requests get when the server is asked to end
    #[arg(long, value_name = "SEC", default_value = "5", value_parser = seconds)]
    pub shutdown_timeout: std::time::Duration,
    /// Seconds without a finished step after which /health is red
    #[arg(long, value_name = "SEC", default_value = "120", value_parser = seconds)]
    pub health_stall_timeout: std::time::Duration,
    /// The version that /version reports
    #[arg(long, value_name = "VERSION")]
    pub reported_version: Option<String>,
    /// No line about the throughput every ten seconds
    #[arg(long)]
    pub disable_log_stats: bool,
    /// No line per request
    #[arg(long)]
    pub disable_uvicorn_access_log: bool,
    /// Record every step in a Chrome trace, to be read by ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// How much is logged
    #[arg(long, alias = "log-level", env = "VLLM_LOGGING_LEVEL", default_value = "info", ignore_case = true, value_parser = ["critical", "error", "warning", "info", "debug", "trace"])]
    pub uvicorn_log_level: String,

    /// A template that takes the place of the checkpoint's: a file, or the text itself
    #[arg(long, value_name = "FILE|TEXT")]
    pub chat_template: Option<PathBuf>,
    /// Accepted for scripts: every name means the built-in parser
    #[arg(long, value_name = "NAME", value_parser = TOOL_PARSERS)]
    pub tool_call_parser: Option<String>,
    /// Accepted for scripts: every name means the built-in parser
    #[arg(long, value_name = "NAME", value_parser = REASONING_PARSERS)]
    pub reasoning_parser: Option<String>,
    /// Only 1: one process, one device
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1))]
    pub tensor_parallel_size: u16,
    #[arg(long, hide = true, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1))]
    pub pipeline_parallel_size: u16,
    #[arg(long, hide = true, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1))]
    pub data_parallel_size: u16,
    /// Flags that were typed and mean nothing here; see `spelling`
    #[arg(long, hide = true, value_name = "FLAG", allow_hyphen_values = true)]
    pub ignored: Vec<String>,
}

impl Args {
    /// Every model that the command line names, the front one first; `tiny` where nothing names any. Errors: two
    /// models of one name, or names that could belong to several.
    pub fn models(&self) -> Result<Vec<Served>, String> {
        let positional = self.model.iter().map(|model| Served::new(None, model));
        let mut models: Vec<Served> = positional.chain(self.models.iter().map(|m| Served::read(m))).collect();
        let has_others = self.models_dir.is_some() || self.models_preset.is_some();
        if models.is_empty() && !has_others {
            models.push(Served::new(None, "tiny"));
        }
        match (self.served_model_name.as_slice(), models.as_mut_slice()) {
            ([], _) => {}
            (names, [only]) if !has_others => only.names = names.to_vec(),
            (_, _) => {
                return Err(
                    "--served-model-name: expected one model; name several with --model NAME=MODEL".into()
                );
            }
        }
        let mut seen = std::collections::HashSet::new();
        match models.iter().flat_map(|model| &model.names).find(|name| !seen.insert(name.as_str())) {
            Some(name) => {
                Err(format!("--model: two models are named `{name}`; tell them apart with NAME=MODEL"))
            }
            None => Ok(models),
        }
    }

    /// The most that any request may be given.
    pub fn speculation(&self) -> Speculation {
        let asked = self.speculative_config.unwrap_or_default();
        let depth = match (self.spec_depth, asked.depth_max) {
            (Some(depth), _) => depth,
            (None, u32::MAX) => Speculation::DEPTH_DEFAULT,
            (None, depth) => depth,
        };
        if depth == 0 { Speculation::OFF } else { Speculation { depth_max: depth, ..asked } }
    }

    /// States for the prefix cache: none, so many, or as many as seem good.
    pub fn checkpoints(&self) -> Option<usize> {
        if self.no_enable_prefix_caching || self.mamba_cache_mode.as_deref() == Some("none") {
            Some(0)
        } else {
            self.prefix_cache_checkpoints.map(|n| n as usize)
        }
    }
}

/// A model to serve.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// Preset, folder, .gguf file or hub id.
    pub model: String,
    /// What requests may call it; the first is canonical. Never empty.
    pub names: Vec<String>,
}

impl Served {
    pub fn new(name: Option<&str>, model: &str) -> Self {
        Self { model: model.to_owned(), names: vec![name.unwrap_or(model).to_owned()] }
    }

    /// `NAME=MODEL`, or a model alone: a folder's own name may hold a `=`.
    fn read(text: &str) -> Self {
        match text.split_once('=') {
            Some((name, model)) if !name.is_empty() && !std::path::Path::new(text).exists() => {
                Self::new(Some(name), model)
            }
            _ => Self::new(None, text),
        }
    }
}

/// `--kv-cache-dtype`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvName {
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
    /// Kept as fp8_e4m3, which has the finer steps
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
}

impl KvName {
    pub fn kind(self) -> KvType {
        match self {
            Self::Auto => KvType::Auto,
            Self::F32 => KvType::F32,
            Self::Bf16 => KvType::Bf16,
            Self::Fp8 | Self::Fp8E5m2 => KvType::Fp8,
        }
    }
}

/// `--mamba-ssm-cache-dtype`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SsmName {
    #[value(alias = "auto", alias = "f32")]
    Float32,
    #[value(alias = "f16")]
    Float16,
}

impl SsmName {
    pub fn kind(self) -> SsmType {
        match self {
            Self::Float32 => SsmType::F32,
            Self::Float16 => SsmType::F16,
        }
    }
}

fn speculative(text: &str) -> Result<Speculation, String> {
    // A word alone is no JSON, and what it means is clear.
    let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
    let read = api::speculation(&value, "speculative-config").map_err(|error| error.to_string())?;
    match read.depth_max {
        depth if depth > DEPTH_MAX && depth != u32::MAX => {
            Err(format!("num_speculative_tokens: expected at most {DEPTH_MAX}, got {depth}"))
        }
        _ => Ok(read),
    }
}

/// `--max-model-len`
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Context {
    Auto,
    Tokens(usize),
}

/// A list; a type of its own, because clap reads a `Vec` as a repeated flag.
#[derive(Debug, Clone)]
pub struct Strings(pub Vec<String>);

fn context(text: &str) -> Result<Context, String> {
    match text {
        "auto" | "-1" => Ok(Context::Auto),
        _ => size(text).map(Context::Tokens),
    }
}

/// `32768`, `32k` (thousands), `32K` (1024s), `1M`.
fn size(text: &str) -> Result<usize, String> {
    let (digits, factor) = match text.char_indices().next_back() {
        Some((end, 'k')) => (&text[..end], 1000),
        Some((end, 'K')) => (&text[..end], 1024),
        Some((end, 'm')) => (&text[..end], 1_000_000),
        Some((end, 'M')) => (&text[..end], 1 << 20),
        Some((end, 'g')) => (&text[..end], 1_000_000_000),
        Some((end, 'G')) => (&text[..end], 1 << 30),
        _ => (text, 1),
    };
    let count = digits.parse::<usize>().ok().and_then(|count| count.checked_mul(factor));
    count
        .filter(|count| *count > 0)
        .ok_or_else(|| format!("expected a size such as 4096, 32k or 1M, got `{text}`"))
}

/// llama-server writes never as -1.
fn idle_seconds(text: &str) -> Result<std::time::Duration, String> {
    if text == "-1" { Ok(std::time::Duration::MAX) } else { seconds(text) }
}

fn at_most_1024(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| *count <= 1024);
    count.ok_or_else(|| format!("expected a whole number from 0 to 1024, got `{text}`"))
}

/// Memory is set aside for every token of a step.
fn batched(text: &str) -> Result<usize, String> {
    const MOST: usize = 1 << 20;
    let tokens = size(text)?;
    if tokens <= MOST { Ok(tokens) } else { Err(format!("expected at most {MOST} tokens, got `{text}`")) }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| format!("expected a share above 0 and at most 1, got `{text}`"))
}

pub fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let seconds =
        text.parse::<f64>().ok().and_then(|value| std::time::Duration::try_from_secs_f64(value).ok());
    seconds.ok_or_else(|| format!("expected seconds, got `{text}`"))
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

fn strings(text: &str) -> Result<Strings, String> {
    serde_json::from_str(text)
        .map(Strings)
        .map_err(|error| format!("expected a JSON list of strings: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let check = |text: &str, expected| assert_eq!(size(text).ok(), expected, "{text}");
        check("4096", Some(4096));
        check("32k", Some(32_000));
        check("32K", Some(32_768));
        check("1M", Some(1 << 20));
        check("0", None);
        check("k", None);
        check("", None);
        check("99999999999999999999k", None);
        check("18446744073709551615K", None);
    }

    fn args(line: &[&str]) -> Args {
        crate::cli::flags(["serve"].iter().chain(line)).expect("valid flags")
    }

    fn models(line: &[&str]) -> Result<Vec<(String, String)>, String> {
        let models = args(line).models()?;
        Ok(models.into_iter().map(|served| (served.names.join("+"), served.model)).collect())
    }

    #[test]
    fn the_first_model_is_in_front() {
        let check = |line: &[&str], expected: &[(&str, &str)]| {
            let expected =
                expected.iter().map(|(names, model)| ((*names).to_owned(), (*model).to_owned())).collect();
            assert_eq!(models(line), Ok(expected), "{line:?}");
        };
        check(&[], &[("tiny", "tiny")]);
        check(&["--model", "x"], &[("x", "x")]);
        check(&["x", "--model", "y"], &[("x", "x"), ("y", "y")]);
        check(&["--model", "voice=a/b", "--model", "c"], &[("voice", "a/b"), ("c", "c")]);
        check(&["x", "--served-model-name", "a", "b"], &[("a+b", "x")]);
        assert!(models(&["x", "--model", "x"]).is_err_and(|error| error.contains("two models")));
        assert!(models(&["x", "--model", "y", "--served-model-name", "a"]).is_err());
    }

    #[test]
    fn drafts_are_up_to_three_unless_said() {
        let check = |line: &[&str], expected: (u32, bool, bool)| {
            let got = args(line).speculation();
            assert_eq!((got.depth_max, got.mtp, got.ngram), expected, "{line:?}");
        };
        check(&[], (3, true, true));
        check(&["--spec-depth", "0"], (0, false, false));
        check(&["--spec-depth", "2"], (2, true, true));
        check(&["--speculative-config", "ngram"], (3, false, true));
        check(&["--speculative-config", r#"{"method":"mtp","num_speculative_tokens":1}"#], (1, true, false));
        check(&["--speculative-config", r#"{"method":"none"}"#], (0, false, false));
        check(&["--speculative-config", "mtp", "--spec-depth", "8"], (8, true, false));
        assert!(
            speculative(r#"{"num_speculative_tokens":9}"#).is_err_and(|error| error.contains("at most 8"))
        );
        assert!(speculative("eagle").is_err());
    }

    #[test]
    fn the_prefix_cache_is_on_unless_said() {
        assert_eq!(args(&[]).checkpoints(), None);
        assert_eq!(args(&["--enable-prefix-caching"]).checkpoints(), None);
        assert_eq!(args(&["--no-enable-prefix-caching"]).checkpoints(), Some(0));
        assert_eq!(args(&["--prefix-cache-checkpoints", "7"]).checkpoints(), Some(7));
        assert_eq!(args(&["--mamba-cache-mode", "none"]).checkpoints(), Some(0));
        assert_eq!(args(&["--mamba-cache-mode", "align"]).checkpoints(), None);
    }
}
