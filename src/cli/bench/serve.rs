//! `bench serve`: a load over HTTP, in the manner of `vllm bench serve`, at one level of concurrency or several.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::chance::Chance;
use super::client::Target;
use super::dataset::{self, DatasetName, Form, RandomLengths};
use super::load::{self, Outcome};
use super::local::Local;
use super::progress;
use super::report::{Asked, Drafts, Metric, Report, details, goal};
use crate::cli::resident::count;
use crate::cli::table::table;

const EXAMPLES: &str = "\
Examples:
  ferrotron bench serve
  ferrotron bench serve --max-concurrency 1,4,8 --num-prompts 50 -- --max-num-batched-tokens 512
  ferrotron bench serve --base-url http://spark:8000 --request-rate 4 --random-input-len 512 --goodput ttft:500";

/// A server with one place is no server; see `--max-num-seqs` of `serve`.
const PLACES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// /v1/completions
    Vllm,
    /// /v1/completions
    Openai,
    /// /v1/chat/completions
    OpenaiChat,
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    pub server: ServerArgs,
    /// Which route is asked [default: openai-chat for chats, vllm for the rest]
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    /// The route's path [default: the backend's]
    #[arg(long, value_name = "PATH")]
    endpoint: Option<String>,
    /// Accepted for scripts: the server counts the tokens
    #[arg(long, value_name = "NAME")]
    tokenizer: Option<String>,

    /// [default: heldout; random with --base-url or --host]
    #[arg(long, value_enum)]
    dataset_name: Option<DatasetName>,
    #[arg(long, value_name = "FILE")]
    dataset_path: Option<PathBuf>,
    /// Tokens of a random prompt
    #[arg(long, default_value_t = 1024, value_parser = count::<10_000_000>)]
    random_input_len: usize,
    /// Tokens of the answer to a random prompt
    #[arg(long, default_value_t = 128, value_parser = count::<10_000_000>)]
    random_output_len: usize,
    /// Tokens that all random prompts begin with
    #[arg(long, default_value_t = 0)]
    random_prefix_len: usize,
    /// Random lengths vary by this share, below and above
    #[arg(long, default_value_t = 0.0, value_parser = ratio)]
    random_range_ratio: f64,
    /// Random ids are below this [default: the vocabulary; 1000 with --base-url or --host]
    #[arg(long, value_name = "N", value_parser = count::<10_000_000>)]
    random_vocab: Option<usize>,
    /// Tokens of an answer to another prompt at most
    #[arg(long, alias = "custom-output-len", default_value_t = 256, value_parser = count::<10_000_000>)]
    output_len: usize,

    /// Requests per level [default: 100; 1000 with --base-url or --host]
    #[arg(long, value_parser = count::<10_000_000>)]
    num_prompts: Option<usize>,
    /// Requests before those that count
    #[arg(long, default_value_t = 1)]
    num_warmups: usize,
    /// Requests per second, or inf: all at once
    #[arg(long, default_value = "inf", value_parser = positive)]
    request_rate: f64,
    /// Shape of the gaps between requests: 1 is Poisson, below it come bursts
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    burstiness: f64,
    /// Requests under way at most; a list is measured level by level
    #[arg(long, value_delimiter = ',', value_parser = count::<4096>)]
    max_concurrency: Vec<usize>,
    /// Of arrivals and prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Answers go on to their full length [default for random prompts]
    #[arg(long)]
    ignore_eos: bool,
    /// Fields for every request, such as '{"top_p": 0.9}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    extra_body: Option<Map<String, Value>>,

    /// Times that are printed
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["ttft", "tpot", "itl"])]
    percentile_metrics: Vec<Metric>,
    #[arg(long, value_delimiter = ',', default_values_t = [99.0], value_parser = percent)]
    metric_percentiles: Vec<f64>,
    /// What a good request keeps, in milliseconds, such as ttft:200 tpot:50
    #[arg(long, num_args = 1.., value_parser = goal, value_name = "METRIC:MS")]
    goodput: Vec<(Metric, f64)>,
    /// Write the figures of each level to a file
    #[arg(long)]
    save_result: bool,
    /// And those of each request
    #[arg(long, requires = "save_result")]
    save_detailed: bool,
    #[arg(long, value_name = "DIR")]
    result_dir: Option<PathBuf>,
    /// [default: named after what was measured]; with several levels, each adds its own
    #[arg(long, value_name = "FILE")]
    result_filename: Option<PathBuf>,
    /// Print one JSON object instead of blocks and a table
    #[arg(long)]
    json: bool,
    /// Flags of the server that is started, after `--`
    #[arg(last = true, value_name = "SERVE_FLAGS")]
    flags: Vec<String>,
}

/// Which server is asked: one that runs, or one that is started for the bench.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    /// Preset, folder or hub id; with --base-url or --host the name to ask for [default: tiny; the server's first]
    #[arg(long, short)]
    pub model: Option<String>,
    /// The name to ask for, if it is not --model
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// A server that runs [default: one is started in this process]
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"])]
    pub base_url: Option<String>,
    /// The same as --base-url http://HOST:PORT
    #[arg(long)]
    pub host: Option<String>,
    /// Port of --host
    #[arg(long, default_value_t = 8000, requires = "host")]
    pub port: u16,
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Seconds that one request may take
    #[arg(long, value_name = "SEC", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout: u64,
}

impl ServerArgs {
    /// None: one is to be started.
    fn base(&self) -> Option<String> {
        let host = self.host.as_ref().map(|host| format!("http://{host}:{}", self.port));
        self.base_url.clone().or(host)
    }
}

/// A server that answers, and the name of its model.
pub struct Server {
    pub target: Target,
    pub model: String,
    /// Started by us.
    pub local: Option<Local>,
}

impl Server {
    /// Errors: nobody listens, or the model cannot be loaded.
    pub async fn open(args: &ServerArgs, places: usize, flags: &[String]) -> anyhow::Result<Self> {
        let timeout = Duration::from_secs(args.request_timeout);
        let Some(base) = args.base() else {
            let model = args.model.clone().unwrap_or_else(|| "tiny".to_owned());
            let local = Local::start(&model, places, flags).await?;
            return Ok(Self { target: Target::new(&local.base, None, timeout)?, model, local: Some(local) });
        };
        ensure!(flags.is_empty(), "flags after `--` are for a server that is started, not for {base}");
        let target = Target::new(&base, args.api_key.clone(), timeout)?;
        let models = target.get("/v1/models").await?;
        let first = models["data"][0]["id"].as_str().map(str::to_owned);
        let asked = args.served_model_name.clone().or_else(|| args.model.clone()).or(first);
        let model = asked.with_context(|| format!("{base} names no model: give --model"))?;
        Ok(Self { target, model, local: None })
    }

    pub async fn close(self) -> anyhow::Result<()> {
        match self.local {
            Some(local) => local.stop().await,
            None => Ok(()),
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    super::runtime()?.block_on(measure(args))
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let levels: Vec<Option<usize>> = match args.max_concurrency.as_slice() {
        [] => vec![None],
        levels => levels.iter().copied().map(Some).collect(),
    };
    let places = args.max_concurrency.iter().copied().max().unwrap_or(0).clamp(PLACES, 1024);
    let plan = plan(args)?;
    let server = Server::open(&args.server, places, &args.flags).await?;
    let bodies = bodies(args, &plan, &server)?;
    let (warmups, bodies) = bodies.split_at(args.num_warmups.min(bodies.len()));

    let at_once = vec![Duration::ZERO; warmups.len()];
    let bar = progress("warming up", warmups.len(), args.json)?;
    let (warm, _) = load::run(&server.target, &plan.path, warmups, &at_once, Some(1), &bar).await;
    bar.finish_and_clear();
    if let Some(error) = warm.iter().map(|outcome| &outcome.error).find(|error| !error.is_empty()) {
        bail!("the first request failed: {error}");
    }

    let mut reports = Vec::new();
    for level in &levels {
        let (report, outcomes) = measure_level(args, &plan, &server, bodies, *level).await?;
        if args.save_result {
            save(args, &report, &outcomes, levels.len() > 1)?;
        }
        if !args.json {
            println!("{}", report.block());
        }
        let failed = outcomes.iter().filter(|outcome| !outcome.error.is_empty());
        if let Some(first) = failed.clone().next() {
            eprintln!("{} requests failed; the first: {}", failed.count(), first.error);
        }
        reports.push(report);
    }
    server.close().await?;
    if args.json {
        let date = date();
        let levels: Vec<Value> = reports.iter().map(|report| Value::Object(report.json(&date))).collect();
        println!("{}", json!({ "levels": levels }));
    } else if reports.len() > 1 {
        println!("{}", compare(&reports));
    }
    ensure!(reports.iter().all(|report| report.completed > 0), "no request succeeded");
    Ok(())
}

async fn measure_level(
    args: &Args,
    plan: &Plan,
    server: &Server,
    bodies: &[Value],
    level: Option<usize>,
) -> anyhow::Result<(Report, Vec<Outcome>)> {
    let arrivals =
        load::arrivals(bodies.len(), args.request_rate, args.burstiness, &mut Chance::new(args.seed));
    let drafts = async || Drafts::read(&server.target.get_text("/metrics").await.unwrap_or_default());
    let bodies = if args.max_concurrency.len() > 1 { &salted(bodies, level) } else { bodies };
    let bar = progress("requests", bodies.len(), args.json)?;
    let before = drafts().await;
    let (outcomes, duration) = load::run(&server.target, &plan.path, bodies, &arrivals, level, &bar).await;
    let after = drafts().await;
    bar.finish_and_clear();
    let asked = Asked {
        backend: plan.backend.to_owned(),
        dataset: plan.dataset.name().to_owned(),
        model: server.model.clone(),
        rate: args.request_rate,
        burstiness: args.burstiness,
        concurrency: level,
        goals: args.goodput.clone(),
        shown: args.percentile_metrics.clone(),
        percentiles: args.metric_percentiles.clone(),
    };
    let drafts = after.and_then(|after| after.since(&before.unwrap_or_default()));
    Ok((Report::new(asked, &outcomes, duration.as_secs_f64(), drafts), outcomes))
}

/// The levels of a ladder ask the same, and none is to be served from the prefix cache that another left.
fn salted(bodies: &[Value], level: Option<usize>) -> Vec<Value> {
    let salt = format!("bench-{}-{}", date(), level.unwrap_or(0));
    let mut bodies = bodies.to_vec();
    bodies.iter_mut().for_each(|body| body["cache_salt"] = json!(salt));
    bodies
}

/// What the flags mean together.
struct Plan {
    dataset: DatasetName,
    form: Form,
    backend: &'static str,
    path: String,
    count: usize,
}

fn plan(args: &Args) -> anyhow::Result<Plan> {
    let remote = args.server.base().is_some();
    let dataset =
        args.dataset_name.unwrap_or(if remote { DatasetName::Random } else { DatasetName::Heldout });
    let chats = matches!(dataset, DatasetName::Heldout);
    let (backend, form, path) = match (args.backend, chats) {
        (Some(Backend::OpenaiChat), _) | (None, true) => ("openai-chat", Form::Chat, "/v1/chat/completions"),
        (Some(Backend::Openai), _) => ("openai", Form::Completion, "/v1/completions"),
        (Some(Backend::Vllm) | None, _) => ("vllm", Form::Completion, "/v1/completions"),
    };
    match (dataset, form) {
        (DatasetName::Random, Form::Chat) => {
            bail!("--dataset-name random sends token ids, which chats do not take: --backend vllm")
        }
        (DatasetName::Heldout, Form::Completion) => {
            bail!("--dataset-name heldout holds chats: --backend openai-chat")
        }
        _ => {}
    }
    let path = args.endpoint.clone().unwrap_or_else(|| path.to_owned());
    ensure!(path.starts_with('/'), "--endpoint: expected a path such as /v1/completions, got `{path}`");
    let count = args.num_prompts.unwrap_or(if remote { 1000 } else { 100 });
    Ok(Plan { dataset, form, backend, path, count })
}

/// Those of the warm-up first.
fn bodies(args: &Args, plan: &Plan, server: &Server) -> anyhow::Result<Vec<Value>> {
    let (count, output) = (plan.count + args.num_warmups, args.output_len);
    let mut chance = Chance::new(args.seed.wrapping_add(1));
    let bodies = match plan.dataset {
        DatasetName::Random => {
            let resident = server.local.as_ref().and_then(|local| local.app.resident(0));
            let vocab = args.random_vocab.or(resident.map(|resident| resident.model.vocab_size));
            let lengths = RandomLengths {
                prefix: args.random_prefix_len,
                input: args.random_input_len,
                output: args.random_output_len,
                range_ratio: args.random_range_ratio,
                vocab: vocab.unwrap_or(1000),
            };
            dataset::random(lengths, count, &mut chance)
        }
        DatasetName::Heldout => dataset::heldout(count, output, &mut chance)?,
        DatasetName::Custom | DatasetName::Sharegpt => {
            let path = args.dataset_path.as_deref();
            let path =
                path.with_context(|| format!("--dataset-name {} needs --dataset-path", plan.dataset.name()))?;
            dataset::file(plan.dataset, path, plan.form, count, output, &mut chance)?
        }
    };
    let ignore_eos = args.ignore_eos || plan.dataset == DatasetName::Random;
    let complete = |mut body: Map<String, Value>| {
        body.insert("model".into(), json!(server.model));
        body.insert("stream".into(), json!(true));
        body.insert("stream_options".into(), json!({"include_usage": true}));
        body.insert("temperature".into(), json!(args.temperature));
        if ignore_eos {
            body.insert("ignore_eos".into(), json!(true));
        }
        body.extend(args.extra_body.clone().unwrap_or_default());
        Value::Object(body)
    };
    Ok(bodies.into_iter().map(complete).collect())
}

/// One row per level.
fn compare(reports: &[Report]) -> comfy_table::Table {
    let header = [
        "concurrency",
        "output tok/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "ITL p50",
        "ITL p99 ms",
    ];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7]);
    for report in reports {
        let mut row = vec![
            report.concurrency().map_or("all".to_owned(), |level| level.to_string()),
            format!("{:.1}", report.output_rate()),
        ];
        for metric in [Metric::Ttft, Metric::Tpot, Metric::Itl] {
            let times = report.times(metric);
            row.extend([50.0, 99.0].map(|percent| format!("{:.2}", times.percentile(percent))));
        }
        table.add_row(row);
    }
    table
}

fn save(args: &Args, report: &Report, outcomes: &[Outcome], several: bool) -> anyhow::Result<()> {
    let date = date();
    let mut map = report.json(&date);
    if args.save_detailed {
        map.extend(details(outcomes));
    }
    let level = report.concurrency();
    let name = match &args.result_filename {
        Some(name) if several => named_by_level(name, level),
        Some(name) => name.clone(),
        None => PathBuf::from(default_name(&map, level, &date)),
    };
    let path = args.result_dir.as_deref().unwrap_or(Path::new("")).join(name);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("--result-dir: {}", folder.display()))?;
    }
    std::fs::write(&path, Value::Object(map).to_string())
        .with_context(|| format!("the result cannot be written to {}", path.display()))
}

fn default_name(map: &Map<String, Value>, level: Option<usize>, date: &str) -> String {
    let text = |key: &str| {
        map.get(key).map_or(String::new(), |value| value.as_str().map_or(value.to_string(), str::to_owned))
    };
    let model = text("model_id");
    let model = model.rsplit('/').find(|part| !part.is_empty()).unwrap_or("model");
    let level = level.map_or(String::new(), |level| format!("-concurrency{level}"));
    format!("{}-{}qps{level}-{model}-{date}.json", text("backend"), text("request_rate"))
}

/// `result.json` at level 4 is `result-concurrency4.json`.
fn named_by_level(name: &Path, level: Option<usize>) -> PathBuf {
    let stem = name.file_stem().unwrap_or_default().to_string_lossy();
    let level = level.map_or("all".to_owned(), |level| level.to_string());
    let ending = name.extension().map_or(String::new(), |ending| format!(".{}", ending.to_string_lossy()));
    name.with_file_name(format!("{stem}-concurrency{level}{ending}"))
}

/// As vLLM writes it: 20260131-235959.
fn date() -> String {
    jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string()
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0);
    value.ok_or_else(|| format!("expected a number above 0, got `{text}`"))
}

fn ratio(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (0.0..1.0).contains(value));
    value.ok_or_else(|| format!("expected a share from 0 up to 1, got `{text}`"))
}

fn percent(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (0.0..=100.0).contains(value));
    value.ok_or_else(|| format!("expected a percentage, got `{text}`"))
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::flags;

    fn parse(line: &str) -> Result<Args, String> {
        flags(line.split(' ')).map_err(|error| error.to_string())
    }

    fn planned(line: &str) -> Result<(&'static str, &'static str, usize), String> {
        let plan = plan(&parse(line)?).map_err(|error| error.to_string())?;
        Ok((plan.dataset.name(), plan.backend, plan.count))
    }

    #[test]
    fn a_script_written_for_vllm_is_understood() {
        let args = parse(
            "serve --backend vllm --base-url http://x:1 --model nvidia/y --tokenizer nvidia/y --dataset-name random \
             --random-input-len 100 --random-output-len 5 --random-range-ratio 0.2 --num-prompts 7 --request-rate inf \
             --burstiness 0.5 --max-concurrency 4 --percentile-metrics ttft,e2el --metric-percentiles 50,99.9 \
             --ignore-eos --goodput ttft:200 tpot:50 --save-result --result-dir r --result-filename f.json",
        )
        .expect("valid flags");
        assert_eq!(args.max_concurrency, [4]);
        assert_eq!(args.goodput, [(Metric::Ttft, 200.0), (Metric::Tpot, 50.0)]);
        assert_eq!(args.metric_percentiles, [50.0, 99.9]);
        assert!(args.request_rate.is_infinite());
    }

    #[test]
    fn defaults_fit_the_server_that_is_asked() {
        assert_eq!(planned("serve"), Ok(("heldout", "openai-chat", 100)));
        assert_eq!(planned("serve --host x"), Ok(("random", "vllm", 1000)));
        assert_eq!(planned("serve --dataset-name random --num-prompts 3"), Ok(("random", "vllm", 3)));
        for wrong in [
            "serve --dataset-name random --backend openai-chat",
            "serve --backend vllm",
            "serve --endpoint v1",
            "serve --port 9",
            "serve --request-rate 0",
            "serve --goodput fast",
            "serve --max-concurrency 0",
        ] {
            assert!(planned(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn flags_behind_two_dashes_are_the_servers() {
        let args = parse("serve --num-prompts 2 -- --max-num-seqs 3").expect("valid flags");
        assert_eq!(args.flags, ["--max-num-seqs", "3"]);
    }

    #[test]
    fn each_level_has_its_file() {
        let check = |name: &str, level, expected: &str| {
            assert_eq!(named_by_level(Path::new(name), level), Path::new(expected));
        };
        check("r/a.json", Some(4), "r/a-concurrency4.json");
        check("a", None, "a-concurrencyall");
    }
}
