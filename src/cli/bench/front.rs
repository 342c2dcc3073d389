//! `bench front`: what a model behind costs the model in front, when both compute on the same cores. In this process,
//! without HTTP: two engines as `serve --model A --model B` sets them up.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::ensure;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::chance::Chance;
use super::inside::{Inside, greedy};
use super::report::percentile;
use super::{machine, median, progress};
use crate::cli::resident::{Compute, Resident, count, limits};
use crate::cli::serve::NICE_BEHIND;
use crate::cli::table;
use crate::engine::{Busy, EngineConfig, Event, Failure, Handle, Request, Speculation, Stats, SubmitError};
use crate::model::Limits;

/// Tokens of one step of either engine at most: the default of `serve --max-num-batched-tokens`.
const STEP_TOKENS: usize = 256;
/// Requests to the front per run; a run's figure is their median.
const PROBES: usize = 4;
/// How often it is asked whether the one behind is under full load, or idle again.
const PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  ferrotron bench front\n  ferrotron bench front --load 16 --prompt 1024 --json\n  \
    ferrotron bench front --model nano-nvfp4 --behind super-nvfp4 --load 2"
)]
pub struct Args {
    /// In front: preset, folder or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    /// Behind it: preset, folder or hub id
    #[arg(long, default_value = "tiny")]
    behind: String,
    #[command(flatten)]
    compute: Compute,
    /// Runs of each case; the median counts
    #[arg(long, default_value_t = 15, value_parser = count::<10_000>)]
    repeats: usize,
    /// Requests that the one behind serves at once, for ever
    #[arg(long, default_value_t = 8, value_parser = count::<512>)]
    load: usize,
    /// Tokens of a prompt in front
    #[arg(long, default_value_t = 256, value_parser = count::<1_000_000>)]
    prompt: usize,
    /// Tokens of an answer in front
    #[arg(long, default_value_t = 64, value_parser = count::<1_000_000>)]
    tokens: usize,
    /// Tokens of a prompt behind
    #[arg(long, default_value_t = 1024, value_parser = count::<1_000_000>)]
    behind_prompt: usize,
    /// Tokens of an answer behind
    #[arg(long, default_value_t = 256, value_parser = count::<1_000_000>)]
    behind_tokens: usize,
    /// Of prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// Why a request of the bench brought no answer.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("a request was refused: {0}")]
    Refused(#[from] SubmitError),
    #[error("a request failed: {0}")]
    Failed(#[from] Failure),
    #[error("the answer ended after {got} of {expected} tokens")]
    Short { expected: usize, got: usize },
    #[error("a reader of the load panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// One case. Times are of requests to the front.
#[derive(Debug, Clone, Serialize)]
struct Row {
    case: &'static str,
    requests: usize,
    ttft_ms_p50: f64,
    ttft_ms_p99: f64,
    /// Median of the requests, each from its first token to its last.
    decode_tok_per_s: f64,
    /// Medians of the runs, each against the run alone of the same repeat.
    ttft_to_alone: f64,
    decode_to_alone: f64,
    /// What went through the steps of the one behind meanwhile, prompts and answers together, and the answers' part
    /// of it; medians of the runs.
    behind_tok_per_s: f64,
    behind_written_tok_per_s: f64,
}

/// One run of one case.
#[derive(Debug, Clone, Default)]
struct Run {
    ttft_ms: Vec<f64>,
    decode_tok_per_s: Vec<f64>,
    behind_tok_per_s: f64,
    behind_written_tok_per_s: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.tokens > 1, "--tokens: a rate needs at least 2 tokens, got {}", args.tokens);
    let rows = super::runtime()?.block_on(measure(args))?;
    if args.json {
        let report = json!({
            "model": args.model, "behind": args.behind, "compute": args.compute.describe(), "machine": machine(),
            "prompt_tokens": args.prompt, "output_tokens": args.tokens, "load": args.load,
            "repeats": args.repeats, "rows": rows,
        });
        println!("{report}");
    } else {
        let Args { model, behind, load, prompt, tokens, .. } = args;
        println!("{model} in front of {behind} on {}; {}", args.compute.describe(), machine());
        println!("{prompt} tokens in, {tokens} out, one at a time; behind it {load} at once without end\n");
        print(&rows);
    }
    Ok(())
}

async fn measure(args: &Args) -> anyhow::Result<Vec<Row>> {
    let mut pair = Pair::start(args).await?;
    let bar = progress("front", 2 * (args.repeats + 1), args.json)?;
    let mut runs = Vec::new();
    for repeat in 0..=args.repeats {
        // Who comes first changes, so that a machine that warms up or slows down favours neither.
        let (alone, loaded) = if repeat % 2 == 0 {
            let alone = pair.alone(&bar).await?;
            (alone, pair.loaded(&bar).await?)
        } else {
            let loaded = pair.loaded(&bar).await?;
            (pair.alone(&bar).await?, loaded)
        };
        // The first run warms caches and is not counted.
        if repeat > 0 {
            runs.push((alone, loaded));
        }
    }
    bar.finish_and_clear();
    pair.stop().await?;
    let (alone, loaded): (Vec<Run>, Vec<Run>) = runs.into_iter().unzip();
    Ok(vec![row("alone", &alone, &alone), row("loaded behind", &loaded, &alone)])
}

/// Two engines, one behind the other, and where their prompts come from.
struct Pair<'a> {
    args: &'a Args,
    front: Inside,
    behind: Inside,
    front_vocab: usize,
    behind_vocab: usize,
    chance: Chance,
    asked: usize,
}

impl<'a> Pair<'a> {
    /// Errors: a model cannot be loaded, or its context does not hold what is asked of it.
    async fn start(args: &'a Args) -> anyhow::Result<Self> {
        let front = Resident::open(&args.model)?;
        let mut behind = Resident::open(&args.behind)?;
        behind.nice = NICE_BEHIND;
        front.check_context(args.prompt, args.tokens)?;
        behind.check_context(args.behind_prompt, args.behind_tokens)?;
        let (front_vocab, behind_vocab) = (front.config.vocab_size, behind.config.vocab_size);
        let busy = Busy::default();
        let config = EngineConfig { name: "front".to_owned(), busy: busy.clone(), ..EngineConfig::default() };
        let front = start(args, front, 1, args.prompt + args.tokens, config).await?;
        let config =
            EngineConfig { name: "behind".to_owned(), in_front: vec![busy], ..EngineConfig::default() };
        let length = args.behind_prompt + args.behind_tokens;
        let behind = start(args, behind, args.load, length, config).await?;
        let chance = Chance::new(args.seed);
        Ok(Self { args, front, behind, front_vocab, behind_vocab, chance, asked: 0 })
    }

    async fn alone(&mut self, bar: &ProgressBar) -> Result<Run, ProbeError> {
        let run = self.probe().await?;
        bar.inc(1);
        Ok(run)
    }

    /// The same while the one behind has all that it can take.
    async fn loaded(&mut self, bar: &ProgressBar) -> Result<Run, ProbeError> {
        let mut load = JoinSet::new();
        let behind = self.behind.handle.clone();
        let (_, written) = tokens(&behind);
        for place in 1..=self.args.load {
            let chance = Chance::new(self.chance.below(usize::MAX) as u64);
            // The first prompts grow from place to place, so that some write while others still read.
            let first = (self.args.behind_prompt * place).div_ceil(self.args.load);
            load.spawn(endless(behind.clone(), self.args.clone(), self.behind_vocab, first, chance));
        }
        let wanted = self.args.load as u64;
        let measured = async {
            until(&behind, |stats| {
                stats.running.load(Relaxed) == wanted && stats.generation_tokens.load(Relaxed) > written
            })
            .await;
            self.probe().await
        };
        let run = tokio::select! {
            run = measured => run?,
            // The load never ends by itself.
            Some(ended) = load.join_next() => return Err(ended?),
        };
        // Dropping a stream cancels its request.
        load.shutdown().await;
        until(&behind, |stats| stats.running.load(Relaxed) + stats.waiting.load(Relaxed) == 0).await;
        bar.inc(1);
        Ok(run)
    }

    /// [`PROBES`] requests to the front, one after the other.
    async fn probe(&mut self) -> Result<Run, ProbeError> {
        let (stepped, written) = tokens(&self.behind.handle);
        let (began, mut run) = (Instant::now(), Run::default());
        for _ in 0..PROBES {
            let Args { prompt, tokens, .. } = *self.args;
            let salt = format!("front-{}", self.asked);
            self.asked += 1;
            let request = request(&mut self.chance, self.front_vocab, prompt, tokens, &salt);
            let (first, rate) = answer(&self.front.handle, request).await?;
            run.ttft_ms.push(first.as_secs_f64() * 1e3);
            run.decode_tok_per_s.push(rate);
        }
        let seconds = began.elapsed().as_secs_f64().max(1e-9);
        let (stepped_now, written_now) = tokens(&self.behind.handle);
        run.behind_tok_per_s = (stepped_now - stepped) as f64 / seconds;
        run.behind_written_tok_per_s = (written_now - written) as f64 / seconds;
        Ok(run)
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.front.stop().await?;
        self.behind.stop().await
    }
}

async fn start(
    args: &Args,
    resident: Resident,
    sequences: usize,
    length: usize,
    config: EngineConfig,
) -> anyhow::Result<Inside> {
    let config = EngineConfig { max_sequences: sequences, context_len: length, ..config };
    Inside::load(config, resident, &args.compute, sizes(sequences, length)).await
}

/// Twice the places, so that the prefix cache has room for its checkpoints, as it has in `serve`.
fn sizes(sequences: usize, length: usize) -> Limits {
    let step_tokens = STEP_TOKENS.min(sequences * length);
    limits(2 * sequences, length, step_tokens)
}

/// Random ids under a salt of their own, so that nothing is cached; without drafts, so that every request is the
/// same work; and without stop ids, so that it goes on to its full length.
fn request(chance: &mut Chance, vocab: usize, prompt: usize, tokens: usize, salt: &str) -> Request {
    let prompt = (0..prompt).map(|_| chance.below(vocab) as u32).collect();
    Request {
        cache_salt: Some(Arc::from(salt)),
        speculation: Speculation::OFF,
        ..Request::new(prompt, greedy(), tokens)
    }
}

/// Time to the first token, and tokens per second from there to the last.
async fn answer(handle: &Handle, request: Request) -> Result<(Duration, f64), ProbeError> {
    let (expected, sent) = (request.max_tokens, Instant::now());
    let mut stream = handle.submit(request)?;
    let (mut first, mut last, mut got) = (sent, sent, 0);
    while let Some(event) = stream.next().await {
        match event {
            Event::Token { .. } => {
                last = Instant::now();
                if got == 0 {
                    first = last;
                }
                got += 1;
            }
            Event::Failed(failure) => return Err(failure.into()),
            Event::Started { .. } | Event::Finished { .. } => {}
        }
    }
    if got < expected {
        return Err(ProbeError::Short { expected, got });
    }
    Ok((first - sent, (got - 1) as f64 / (last - first).as_secs_f64().max(1e-9)))
}

/// One request after the other, the first with a prompt of `first` tokens; what comes back is why it could not go on.
async fn endless(handle: Handle, args: Args, vocab: usize, first: usize, mut chance: Chance) -> ProbeError {
    let mut prompt = first;
    loop {
        let salt = format!("behind-{}", chance.below(usize::MAX));
        let request = request(&mut chance, vocab, prompt, args.behind_tokens, &salt);
        if let Err(error) = answer(&handle, request).await {
            return error;
        }
        prompt = args.behind_prompt;
    }
}

/// Waits until what the engine counts is as `wanted`.
async fn until(handle: &Handle, wanted: impl Fn(&Stats) -> bool) {
    while !wanted(handle.stats()) {
        tokio::time::sleep(PAUSE).await;
    }
}

/// Tokens that went through the steps so far, and those that were written. The count of prompts would not do: it
/// takes in a prompt only when it is read to its end.
fn tokens(handle: &Handle) -> (u64, u64) {
    let stats = handle.stats();
    (stats.iteration_tokens.sum(), stats.generation_tokens.load(Relaxed))
}

/// `runs` of a case, with the runs alone of the same repeats.
fn row(case: &'static str, runs: &[Run], alone: &[Run]) -> Row {
    let all = |of: fn(&Run) -> &Vec<f64>| {
        let mut values: Vec<f64> = runs.iter().flat_map(of).copied().collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let ratio = |of: fn(&Run) -> &Vec<f64>| {
        let middle = |run: &Run| median(of(run).clone());
        median(runs.iter().zip(alone).map(|(run, alone)| middle(run) / middle(alone)).collect())
    };
    let (ttft, decode) = (all(|run| &run.ttft_ms), all(|run| &run.decode_tok_per_s));
    Row {
        case,
        requests: ttft.len(),
        ttft_ms_p50: percentile(&ttft, 50.0),
        ttft_ms_p99: percentile(&ttft, 99.0),
        decode_tok_per_s: percentile(&decode, 50.0),
        ttft_to_alone: ratio(|run| &run.ttft_ms),
        decode_to_alone: ratio(|run| &run.decode_tok_per_s),
        behind_tok_per_s: median(runs.iter().map(|run| run.behind_tok_per_s).collect()),
        behind_written_tok_per_s: median(runs.iter().map(|run| run.behind_written_tok_per_s).collect()),
    }
}

fn print(rows: &[Row]) {
    let header =
        ["case", "TTFT ms p50", "p99", "to alone", "decode tok/s", "to alone", "behind tok/s", "written"];
    let cells = rows.iter().map(|row| {
        [
            row.case.to_owned(),
            format!("{:.2}", row.ttft_ms_p50),
            format!("{:.2}", row.ttft_ms_p99),
            format!("{:.2}", row.ttft_to_alone),
            format!("{:.1}", row.decode_tok_per_s),
            format!("{:.2}", row.decode_to_alone),
            format!("{:.1}", row.behind_tok_per_s),
            format!("{:.1}", row.behind_written_tok_per_s),
        ]
    });
    table::print(header, &[1, 2, 3, 4, 5, 6, 7], cells);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ttft_ms: [f64; 3], rate: f64) -> Run {
        Run {
            ttft_ms: ttft_ms.to_vec(),
            decode_tok_per_s: vec![rate],
            behind_tok_per_s: 5.0,
            behind_written_tok_per_s: 2.0,
        }
    }

    #[test]
    fn a_case_is_compared_with_the_runs_alone_of_its_own_repeats() {
        // The machine is twice as slow in the second repeat, for both.
        let alone = [run([9.0, 10.0, 11.0], 100.0), run([19.0, 20.0, 21.0], 50.0)];
        let loaded = [run([30.0, 20.0, 10.0], 80.0), run([60.0, 40.0, 20.0], 40.0)];
        let row = row("loaded behind", &loaded, &alone);
        assert_eq!((row.requests, row.ttft_to_alone, row.decode_to_alone), (6, 2.0, 0.8));
        assert_eq!((row.ttft_ms_p50, row.behind_tok_per_s), (25.0, 5.0));
    }
}
