//! `batch`: a file of requests answered into a file of results, as fast as the model goes and from where it stopped.

use super::{flags, serve};
use crate::api::batch::{self, Counts, Input, Journal, Limits};
use crate::api::{App, BODY_LIMIT_DEFAULT};
use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

const EXAMPLES: &str = "\
Examples:
  ferrotron batch in.jsonl out.jsonl
  ferrotron batch in.jsonl out.jsonl --model nano-nvfp4 -- --max-num-seqs 32 --max-model-len 8k

A line of in.jsonl:
  {\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\",
   \"body\": {\"messages\": [{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}]}}";

/// Nobody waits for one answer, so more of them share each reading of the weights than `serve` gives places to.
const PLACES: &str = "16";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Requests, one per line, as OpenAI's Batch API takes them
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Results, one per line as they come; if it is there, what it answers is not asked again
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Preset, folder, .gguf file or hub id; NAME=MODEL gives a name, and several may be given
    #[arg(long = "model", value_name = "[NAME=]MODEL", default_value = "tiny")]
    models: Vec<String>,
    /// Flags of `serve`, after `--`
    #[arg(last = true, value_name = "FLAGS")]
    server: Vec<String>,
}

/// Answers all lines. Errors: files that do not fit, a model that cannot be loaded or dies, an interruption.
pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!(!is_same(&args.input, &args.output), "OUT is IN: give another file for the results");
    let server = server(&args)?;
    serve::start_log(&server);
    let limits = Limits { line: BODY_LIMIT_DEFAULT, lines: usize::MAX, endpoint: None };
    let input = Input::read(&args.input, &limits).with_context(|| args.input.display().to_string())?;
    let journal = Journal::open(&args.output, &input).with_context(|| args.output.display().to_string())?;
    if journal.left().is_empty() {
        println!("{}", told(journal.counts()));
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime could not be started")?;
    let result = runtime.block_on(answer(server, &input, journal));
    // A blocking task that still reads a checkpoint must not keep the process alive.
    runtime.shutdown_background();
    println!("{}", told(result?));
    Ok(())
}

/// Whether both name one file that is there.
fn is_same(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

/// What `serve` would be told, but for a log that speaks of troubles alone and more places.
fn server(args: &Args) -> anyhow::Result<serve::Args> {
    let mut line = vec!["ferrotron serve"];
    line.extend(args.models.iter().flat_map(|model| ["--model", model]));
    line.push("--disable-uvicorn-access-log");
    let own =
        |names: [&str; 2]| args.server.iter().any(|flag| names.iter().any(|name| flag.starts_with(name)));
    if !own(["--uvicorn-log-level", "--log-level"]) {
        line.extend(["--uvicorn-log-level", "warning"]);
    }
    if !own(["--max-num-seqs", "--parallel"]) {
        line.extend(["--max-num-seqs", PLACES]);
    }
    line.extend(args.server.iter().map(String::as_str));
    flags(line).context("flags after `--`")
}

async fn answer(args: serve::Args, input: &Input, mut journal: Journal) -> anyhow::Result<Counts> {
    let models = serve::Models::find(&args)?;
    let app = App::new(serve::options(&args, &models)?);
    let stop = watch::Sender::new(false);
    tokio::spawn(serve::stop_on_signals(stop.clone()));
    tokio::select! {
        loaded = serve::load(args, models, &app, None) => loaded?,
        () = serve::raised(stop.subscribe()) => bail!("interrupted while the model was loading"),
    }
    let bar = bar(journal.counts())?;
    let answered = |journal: &Journal| {
        bar.set_position(answered(journal.counts()));
        Ok(())
    };
    let stopped = tokio::select! {
        ran = batch::run(&app, input, &mut journal, answered) => ran.map_err(anyhow::Error::from),
        reason = serve::death(&app) => Err(anyhow::anyhow!("the engine stopped: {reason}")),
        () = serve::raised(stop.subscribe()) => Err(anyhow::anyhow!("interrupted")),
    };
    bar.finish_and_clear();
    // What still runs is not wanted any more.
    app.shutdown(Duration::ZERO).await;
    let counts = journal.counts();
    stopped.with_context(|| format!("{}; the same command goes on with the rest", told(counts)))?;
    Ok(counts)
}

fn answered(counts: Counts) -> u64 {
    (counts.completed + counts.failed) as u64
}

fn told(counts: Counts) -> String {
    let Counts { total, completed, failed } = counts;
    let failed = match failed {
        0 => String::new(),
        failed => format!(", {failed} of them with an error, which their results tell"),
    };
    format!("{} of {total} requests are answered{failed}", completed + counts.failed)
}

/// Hidden by indicatif itself where standard error is no terminal.
fn bar(counts: Counts) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("answering {bar:30} {pos}/{len} [{elapsed}, {eta} to go]")?;
    let bar = ProgressBar::new(counts.total as u64).with_style(style);
    // What an earlier run has answered says nothing about how fast this one is.
    bar.set_position(answered(counts));
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_secs(1));
    Ok(bar)
}
