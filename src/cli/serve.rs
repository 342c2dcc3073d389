//! `serve`: models behind an HTTP server, from flags to a clean end.

mod args;
mod end;
mod memory;
mod sizes;
mod spelling;

pub use args::Args;
pub use spelling::spell;

use super::resident::Resident;
use crate::api::batch::{self, FileOptions};
use crate::api::{
    self, App, CorsOptions, Drain, Fallback, ModelInfo, Options, RequestOptions, SamplingDefaults,
    log_throughput, watch_stalls,
};
use crate::engine::{self, Busy, EngineConfig, Status, TraceWriter};
use anyhow::{Context as _, bail};
use args::{Context, Served};
pub use end::death;
use end::{ended, until_end};
use serde_json::{Map, Value};
use sizes::{Sizes, Wish};
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Without a word from the user, more context than this is not set aside: room is reserved for each sequence.
const CONTEXT_DEFAULT: usize = 32_768;
/// How far the threads of a model behind give way to those of the model in front: about a tenth of its weight.
pub const NICE_BEHIND: i32 = 10;

/// Serves until the process is asked to end.
/// Errors: no such model, a port in use, a flag that does not fit, too little memory, an engine that died.
pub fn run(args: Args) -> anyhow::Result<()> {
    start_log(&args);
    for flag in &args.ignored {
        tracing::warn!("{flag} has no effect here and is ignored");
    }
    let models = args.models().map_err(anyhow::Error::msg)?;
    let options = options(&args, &models)?;
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
    models: Vec<Served>,
    options: Options,
    trace: Option<TraceWriter>,
) -> anyhow::Result<()> {
    let listener = listen(&args).await?;
    let address = listener.local_addr()?;
    announce(address);
    let stop = watch::Sender::new(false);
    tokio::spawn(stop_on_signals(stop.clone()));
    serve_on(listener, args, models, App::new(options), trace, stop).await
}

/// Loads the models behind a server that answers at once, and serves until `stop` is raised.
pub async fn serve_on(
    listener: TcpListener,
    args: Args,
    models: Vec<Served>,
    app: Arc<App>,
    trace: Option<TraceWriter>,
    stop: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let stopped = stop.subscribe();
    batch::resume(&app).map_err(|error| anyhow::anyhow!("--files-dir: {error}"))?;
    tokio::spawn(watch_stalls(app.clone()));
    if !args.disable_log_stats {
        tokio::spawn(log_throughput(app.clone()));
    }
    let drain = Drain { signal: raised(stopped.clone()), timeout: args.shutdown_timeout };
    let server = tokio::spawn(api::serve(listener, app.clone(), drain));

    let outcome = tokio::select! {
        loaded = load(args, models, app.clone(), trace) => loaded,
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

/// Reads the checkpoints and divides the memory, then lets the engines load their weights one after the other, the
/// front one first; says when all take requests.
pub async fn load(
    args: Args,
    models: Vec<Served>,
    app: Arc<App>,
    trace: Option<TraceWriter>,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let (args, described, sizes) = tokio::task::spawn_blocking(move || {
        let models = models.iter().enumerate();
        let described = models
            .map(|(index, served)| describe(&args, index, served))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let sizes = plan(&args, &described)?;
        anyhow::Ok((args, described, sizes))
    })
    .await
    .context("reading the checkpoint failed")??;

    tracing::info!("Loading weights: {}", args.compute.describe());
    let mut in_front = Vec::new();
    for (index, (described, sizes)) in described.into_iter().zip(sizes).enumerate() {
        let busy = Busy::default();
        let place = Place { index, busy: busy.clone(), in_front: in_front.clone(), trace: trace.clone() };
        start(&args, &app, described, &sizes, place);
        in_front.push(busy);
    }
    for resident in app.residents() {
        resident.engine.loaded().await;
        if let Status::Dead(reason) = resident.engine.status() {
            bail!("the model could not be loaded: {reason}");
        }
        api::warm_grammars(&app, resident);
    }
    tracing::info!("Model loaded in {:.2} s", started.elapsed().as_secs_f64());
    tracing::info!("Application startup complete.");
    Ok(())
}

/// Where an engine stands among those of the process.
struct Place {
    index: usize,
    busy: Busy,
    in_front: Vec<Busy>,
    trace: Option<TraceWriter>,
}

/// Starts the engine of one model, which waits until the one before it has loaded, and shows it to the routes.
fn start(args: &Args, app: &App, described: Described, sizes: &Sizes, place: Place) {
    let Place { index, busy, in_front, trace } = place;
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
        in_front,
        trace,
    };
    let (compute, limits) = (args.compute.clone(), sizes.limits);
    let before = index.checked_sub(1).and_then(|before| app.resident(before)).map(|r| r.engine.clone());
    let runtime = tokio::runtime::Handle::current();
    let (engine, _) = engine::start(config, move |progress| {
        if let Some(before) = before {
            runtime.block_on(before.loaded());
        }
        resident.load(&compute, limits, progress)
    });
    engine.stats().set_prices(sizes.state_bytes, sizes.block_bytes);
    app.set_resident(api::Resident { index, text: Arc::new(text), engine, model: Arc::new(model) });
}

/// Divides what is free among the models and shows it. Errors: it does not fit.
fn plan(args: &Args, described: &[Described]) -> anyhow::Result<Vec<Sizes>> {
    let models: Vec<sizes::Model> = described
        .iter()
        .map(|described| sizes::Model {
            name: described.model.canonical(),
            config: &described.resident.config,
            context: described.model.max_model_len,
            weights: described.resident.bytes(),
        })
        .collect();
    let free = memory::free();
    let sizes = sizes::divide(&models, &Wish::new(args), free);
    tracing::info!("Memory:\n{}", sizes::show(&models, &sizes, free));
    sizes::check(&sizes, free, args.allow_overcommit)?;
    Ok(sizes)
}

struct Described {
    resident: Resident,
    text: crate::text::Text,
    model: ModelInfo,
}

/// All that is known before the weights are read.
fn describe(args: &Args, index: usize, served: &Served) -> anyhow::Result<Described> {
    let mut resident = Resident::open(&served.model)?;
    resident.nice = if index == 0 { 0 } else { NICE_BEHIND };
    let template = args.chat_template.as_deref().map(template_text).transpose()?;
    let text = resident.text_with(template.as_deref())?;
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
    };
    Ok(Described { resident, text, model })
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
    if args.generation_config == "auto" {
        let file = &resident.generation;
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

/// Flags as the API room means them.
pub fn options(args: &Args, models: &[Served]) -> anyhow::Result<Options> {
    let mut options = Options::new(Vec::new());
    options.models = models.iter().map(|served| served.names.clone()).collect();
    options.request = RequestOptions {
        max_logprobs: u32::try_from(args.max_logprobs).ok(),
        template_kwargs: args.default_chat_template_kwargs.clone().unwrap_or_default(),
        hide_tools_when_none: args.exclude_tools_when_tool_choice_none,
        clamp_max_tokens: args.clamp_max_tokens,
        tokens_as_ids: args.return_tokens_as_token_ids,
        trust_template: args.trust_request_chat_template,
        force_usage: args.enable_force_include_usage,
        timeout: args.request_timeout.filter(|timeout| !timeout.is_zero()),
    };
    options.api_keys = args.api_key.iter().filter(|key| !key.is_empty()).cloned().collect();
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

/// Errors: the port is taken, or the address is not ours; both name it.
pub async fn listen(args: &Args) -> anyhow::Result<TcpListener> {
    let has_key = args.api_key.iter().any(|key| !key.is_empty());
    let default = if has_key { "0.0.0.0" } else { "127.0.0.1" };
    // A variable that is set to nothing is one that is not set.
    let host = args.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(default);
    let port = args.port;
    TcpListener::bind((host, port)).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("port {port} on {host} is in use: stop who has it, or give another --port")
        }
        _ => anyhow::anyhow!("--host: cannot listen on port {port} of {host}: {error}"),
    })
}

fn announce(address: SocketAddr) {
    tracing::info!("Listening on http://{address}");
    if address.ip().is_loopback() {
        tracing::info!("Only this machine can connect; --host 0.0.0.0 opens it to others");
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
        let models = args.models().expect("one model");
        assert_eq!(models[0].model, "nvidia/x");
        assert_eq!(args.max_model_len, Some(Context::Tokens(32_000)));
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
            "serve --speculative-config {\"method\":\"magic\"}",
            "serve --no-such-flag",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        let args = parse("serve --allowed-methods [\"G(ET\"]").expect("a list of strings");
        assert!(options(&args, &args.models().expect("one model")).is_err());
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
