//! The flags of `serve`, by vLLM's names where they mean the same.

use crate::cli::resident::{Compute, count};
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
const QUANTIZATIONS: [&str; 6] = ["auto", "modelopt", "modelopt_fp4", "nvfp4", "fp8", "compressed-tensors"];

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Preset, folder or hub id [default: tiny]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,
    /// The same as MODEL
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<String>,
    #[command(flatten)]
    pub compute: Compute,
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
    /// Requests that may wait; more are answered with 503
    #[arg(long, value_name = "N", default_value = "1024", value_parser = count::<1_000_000>)]
    pub max_num_queued_reqs: usize,
    /// Makes the seeds of requests without one repeat from start to start
    #[arg(long)]
    pub seed: Option<u64>,

    /// `auto` takes the sampling defaults from generation_config.json, `vllm` neutral ones
    #[arg(long, default_value = "auto", value_parser = ["auto", "vllm"])]
    pub generation_config: String,
    /// Sampling defaults over those, such as '{"temperature": 0.6}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub override_generation_config: Option<Map<String, Value>>,
    /// Template variables below each request's own, such as '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub default_chat_template_kwargs: Option<Map<String, Value>>,
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

    /// Keys that requests must show one of
    #[arg(long, value_name = "KEY", num_args = 1.., env = "VLLM_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
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
    /// Accepted for scripts: the checkpoint itself says how it is stored
    #[arg(long, short = 'q', value_name = "NAME", value_parser = QUANTIZATIONS)]
    pub quantization: Option<String>,
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
    pub fn model(&self) -> &str {
        self.model.as_deref().or(self.model_flag.as_deref()).unwrap_or("tiny")
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
        _ => (text, 1),
    };
    let count = digits.parse::<usize>().ok().and_then(|count| count.checked_mul(factor));
    count
        .filter(|count| *count > 0)
        .ok_or_else(|| format!("expected a size such as 4096, 32k or 1M, got `{text}`"))
}

/// Memory is set aside for every token of a step.
fn batched(text: &str) -> Result<usize, String> {
    const MOST: usize = 1 << 20;
    let tokens = size(text)?;
    if tokens <= MOST { Ok(tokens) } else { Err(format!("expected at most {MOST} tokens, got `{text}`")) }
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
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
}
