//! `serve`: models behind an HTTP server, from flags to a clean end.

mod args;
mod door;
mod end;
mod environment;
mod ignored;
mod known;
mod memory;
mod opener;
mod presets;
mod reading;
mod sizes;
mod spelling;
mod yaml;

pub use args::Args;
pub use door::listen;
pub use end::death;
pub use known::Models;
pub use opener::NICE_BEHIND;
pub use spelling::spell;

use crate::api::batch::{self, FileOptions};
use crate::api::{
    self, App, CorsOptions, Door, Drain, Fallback, Keeping, Options, RequestOptions, log_throughput,
    watch_stalls,
};
use crate::engine::TraceWriter;
use anyhow::Context as _;
use args::KvName;
use end::{ended, until_end};
use opener::Opener;
use serde_json::Value;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// Serves until the process is asked to end.
/// Errors: no such model, a port in use, a flag that does not fit, too little memory, an engine that died.
pub fn run(args: Args) -> anyhow::Result<()> {
    start_log(&args);
    tell(&args);
    let models = Models::find(&args)?;
    let options = options(&args, &models)?;
    if args.dry_run {
        Opener::new(args, models, None).dry_run()?;
        tracing::info!("Nothing was started, because of --dry-run");
        return Ok(());
    }
    // The listener and the streams need little; the cores are for the engines.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime could not be started")?;
    let trace = args.trace_file.as_deref().map(start_trace).transpose()?;
    let result = runtime.block_on(serve(args, models, options, trace.clone()));
    // A blocking task that still reads a checkpoint must not keep the process alive.
    runtime.shutdown_background();
    if let Some(trace) = trace {
        finish_trace(&trace);
    }
    result
}

async fn serve(
    args: Args,
    models: Models,
    options: Options,
    trace: Option<TraceWriter>,
) -> anyhow::Result<()> {
    let (door, _file) = door::open(&args).await?;
    let stop = watch::Sender::new(false);
    tokio::spawn(stop_on_signals(stop.clone()));
    serve_on(door, args, models, App::new(options), trace, stop).await
}

/// Loads the models for an application without a server.
pub async fn load(args: Args, models: Models, app: &App, trace: Option<TraceWriter>) -> anyhow::Result<()> {
    let opener = Arc::new(Opener::new(args, models, trace));
    app.keeper.employ(opener.clone());
    opener.start_all(app).await
}

/// Loads the models behind a server that answers at once, and serves until `stop` is raised.
pub async fn serve_on(
    door: impl Into<Door>,
    args: Args,
    models: Models,
    app: Arc<App>,
    trace: Option<TraceWriter>,
    stop: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let stopped = stop.subscribe();
    batch::resume(&app).map_err(|error| anyhow::anyhow!("--files-dir: {error}"))?;
    tokio::spawn(watch_stalls(app.clone()));
    if let Some(idle) = args.sleep_idle_seconds.filter(|idle| !idle.is_zero()) {
        tokio::spawn(app.keeper.clone().doze(idle));
    }
    if !args.disable_log_stats {
        tokio::spawn(log_throughput(app.clone()));
    }
    let drain = Drain { signal: raised(stopped.clone()), timeout: args.shutdown_timeout };
    let opener = Arc::new(Opener::new(args, models, trace));
    app.keeper.employ(opener.clone());
    let server = tokio::spawn(api::serve(door.into(), app.clone(), drain));

    let outcome = tokio::select! {
        loaded = opener.start_all(&app) => loaded,
        // Asked to end while a model is still being read.
        () = raised(stopped.clone()) => return ended(server.await),
    };
    if let Err(error) = outcome {
        app.set_load_error(format!("{error:#}"));
        return Err(error);
    }
    let outlives = std::env::var("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH").is_ok_and(|value| value == "1");
    until_end(&app, server, &stop, outlives).await
}

/// Flags as the API room means them.
pub fn options(args: &Args, models: &Models) -> anyhow::Result<Options> {
    let mut options = Options::new(Vec::new());
    options.models = models.front.iter().map(|served| served.names.clone()).collect();
    options.known = models.known.iter().map(opener::introduce).collect();
    options.keeping = Keeping {
        most: args.models_max,
        autoload: !args.no_models_autoload,
        auto_wake: args.auto_wake,
        waiters_max: args.max_num_queued_reqs,
        ..Keeping::default()
    };
    let is_developed = std::env::var("VLLM_SERVER_DEV_MODE").is_ok_and(|value| value == "1");
    options.sleep_mode = args.enable_sleep_mode || is_developed;
    options.request = RequestOptions {
        max_logprobs: u32::try_from(args.max_logprobs).ok(),
        template_kwargs: args.default_chat_template_kwargs.clone().unwrap_or_default(),
        hide_tools_when_none: args.exclude_tools_when_tool_choice_none,
        clamp_max_tokens: args.clamp_max_tokens,
        tokens_as_ids: args.return_tokens_as_token_ids,
        trust_template: args.trust_request_chat_template,
        force_usage: args.enable_force_include_usage,
        claude_names: !args.no_anthropic_any_model,
        anthropic_thinking: args.anthropic_default_thinking == "on",
        timeout: args.request_timeout.filter(|timeout| !timeout.is_zero()),
    };
    if args.reasoning_budget == Some(0) {
        options.request.template_kwargs.entry("enable_thinking").or_insert(Value::Bool(false));
    }
    options.api_keys = door::keys(args)?;
    options.cors = CorsOptions {
        origins: args.allowed_origins.clone().map(|list| list.0),
        methods: args.allowed_methods.clone().map(|list| list.0),
        headers: args.allowed_headers.clone().map(|list| list.0),
        credentials: args.allow_credentials,
    };
    options.cors.check().map_err(|error| anyhow::anyhow!("CORS flags: {error}"))?;
    options.keep_alive = args.sse_keep_alive_interval;
    options.stall_timeout = args.health_stall_timeout;
    options.seed = args.seed;
    options.fallback = fallback(args)?;
    options.files = FileOptions {
        directory: args.files_dir.clone(),
        bytes_max: args.files_max_bytes as u64,
        count_max: args.files_max_count,
    };
    if let Some(version) = &args.reported_version {
        options.version.clone_from(version);
    }
    Ok(options)
}

/// Errors: no such URL, a key that cannot be sent.
fn fallback(args: &Args) -> anyhow::Result<Option<Fallback>> {
    let Some(url) = &args.fallback else { return Ok(None) };
    let key = args.fallback_api_key.as_deref().filter(|key| !key.is_empty());
    let fallback = Fallback::new(url, key, args.fallback_model.clone());
    fallback.map(Some).map_err(|error| anyhow::anyhow!("--fallback: {error}"))
}

/// One line for each flag and variable that was given and changes nothing.
fn tell(args: &Args) {
    for flag in &args.ignored {
        tracing::warn!("{}", ignored::told(flag));
    }
    for line in environment::told(
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
    ) {
        tracing::warn!("{line}");
    }
    for (flag, given) in
        [("--tool-call-parser", &args.tool_call_parser), ("--reasoning-parser", &args.reasoning_parser)]
    {
        if let Some(name) = given {
            tracing::info!("{flag} {name} is the parser that is built in");
        }
    }
    if args.kv_cache_dtype == KvName::Fp8E5m2 {
        tracing::warn!("--kv-cache-dtype fp8_e5m2: keys and values are kept as fp8_e4m3");
    }
    if let Some(share) = args.gpu_memory_utilization {
        tracing::info!("--gpu-memory-utilization {share} is a share of the memory that is free now");
    }
}

/// The first SIGTERM or SIGINT asks to end, the second ends.
pub async fn stop_on_signals(stop: watch::Sender<bool>) {
    // Made once, so that no signal falls between two of them.
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return tracing::error!("signals cannot be watched: {error}"),
    };
    signals.next().await;
    stop.send_replace(true);
    signals.next().await;
    tracing::warn!("Second signal: ending now");
    std::process::exit(130);
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Resolves when `flag` is true; never if nobody can raise it any more.
pub async fn raised(mut flag: watch::Receiver<bool>) {
    if flag.wait_for(|raised| *raised).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn start_trace(path: &Path) -> anyhow::Result<TraceWriter> {
    TraceWriter::start(path).with_context(|| format!("--trace-file: {} cannot be written", path.display()))
}

fn finish_trace(trace: &TraceWriter) {
    if let Err(error) = trace.finish() {
        tracing::error!("The trace is not complete: {error}");
    }
    if trace.dropped() > 0 {
        tracing::warn!("{} steps are missing from the trace: the disk was too slow", trace.dropped());
    }
}

pub fn start_log(args: &Args) {
    let level = match args.uvicorn_log_level.to_ascii_lowercase().as_str() {
        "critical" | "error" => "error",
        "warning" => "warn",
        "debug" => "debug",
        "trace" => "trace",
        _ => "info",
    };
    let access = if args.disable_uvicorn_access_log { "off" } else { level };
    let filter = format!("{level},ferrotron::access={access}");
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    // Fails only if a log exists already, which then serves as well.
    let _ = subscriber.try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::flags;

    fn parse(line: &str) -> Result<Args, String> {
        flags(line.split(' ')).map_err(|error| error.to_string())
    }

    #[test]
    fn a_script_written_for_vllm_is_understood() {
        let args = parse(
            "serve nvidia/x --served-model-name a b --max-model-len 32k --max-num-seqs 4 --tensor-parallel-size 1 \
             --reasoning-parser super_v3 --tool-call-parser qwen3_coder --api-key k1 k2",
        )
        .expect("valid flags");
        let models = Models::find(&args).expect("one model");
        assert_eq!(models.front[0].model, "nvidia/x");
        assert_eq!(args.max_model_len, Some(args::Context::Tokens(32_000)));
        let options = options(&args, &models).expect("valid flags");
        assert_eq!(options.models, [["a", "b"]]);
        assert_eq!(options.api_keys, ["k1", "k2"]);
        assert_eq!(options.request.max_logprobs, Some(20));
    }

    #[test]
    fn what_cannot_be_is_refused_at_once() {
        for line in [
            "serve --tensor-parallel-size 2",
            "serve --reasoning-parser magic",
            "serve --max-model-len none",
            "serve --default-chat-template-kwargs [1]",
            "serve --port 70000",
            "serve --kv-cache-dtype int4",
            "serve --spec-depth 9",
            "serve --kv-cache-tokens 9 --num-gpu-blocks-override 9",
            "serve --gpu-memory-utilization 1.5",
            "serve --load-format pt",
            "serve --quantization gptq",
            "serve --ssl-keyfile k",
            "serve --speculative-config {\"method\":\"magic\"}",
            "serve --no-such-flag",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        let args = parse("serve --allowed-methods [\"G(ET\"]").expect("a list of strings");
        assert!(options(&args, &Models::find(&args).expect("one model")).is_err());
    }
}
