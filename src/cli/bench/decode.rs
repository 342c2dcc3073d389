//! `bench decode` and `bench prefill`: tokens per second, and what share of the memory's and the multipliers' speed
//! that is.

use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::ProgressBar;
use serde::Serialize;

use super::ceiling::Ceiling;
use super::profile::{self, Observed, Profile};
use super::{machine, median, progress, tell};
use crate::backend::cpu::roofline::Reader;
use crate::backend::trace::Record;
use crate::backend::{BlockCopy, StepInputs};
use crate::cli::resident::{BLOCK_LEN, Compute, Load, Resident, Watched, count, greedy, limits};
use crate::cli::table;
use crate::model::Limits;
use crate::ops::Cost;

/// Weights of so many bytes and more are read from memory in every step, whatever the caches hold.
const READ_BETWEEN: u64 = 256 << 20;

/// No model of the family reads more tokens.
const LENGTH_MAX: usize = 1 << 20;

/// Tokens of a context that are computed; pages of a longer one are copies of theirs. Attention reads as much, and
/// computing them all would take most of the run.
const COMPUTED: usize = 512;

/// Of `bench decode`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron bench decode --batch 1,4,8
  ferrotron bench decode --model bench-nano --load-format dummy --quantization nvfp4 --batch 1 --context 0,4096,32768
  ferrotron bench decode --model bench-nano --load-format dummy --quantization nvfp4 --batch 1 --profile")]
pub struct DecodeArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences decoded together, one row of the table each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4], value_parser = count::<1024>)]
    batch: Vec<usize>,
    /// Tokens in the context before decoding starts, one row each
    #[arg(long, value_delimiter = ',', default_values_t = [64], value_parser = depth)]
    context: Vec<usize>,
    /// Tokens decoded per sequence and repeat
    #[arg(long, default_value_t = 64, value_parser = count::<LENGTH_MAX>)]
    tokens: usize,
}

/// Of `bench prefill`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron bench prefill --model tiny-nvfp4 --lengths 128,1024 --json
  ferrotron bench prefill --model bench-nano --load-format dummy --lengths 512,2048 --chunk 512 --profile")]
pub struct PrefillArgs {
    #[command(flatten)]
    common: Common,
    /// Prompt lengths, one row of the table each
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512], value_parser = count::<LENGTH_MAX>)]
    lengths: Vec<usize>,
    /// Tokens per step
    #[arg(long, default_value_t = 256, value_parser = count::<LENGTH_MAX>)]
    chunk: usize,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Preset, folder, .gguf file or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    compute: Compute,
    /// Runs per row; the median counts
    #[arg(long, default_value_t = 5, value_parser = count::<100_000>)]
    repeats: usize,
    /// Show what each operation moved, computed and took; the rows are measured with the clocks on
    #[arg(long)]
    profile: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

fn depth(text: &str) -> Result<usize, String> {
    let depth = text.parse().ok().filter(|&depth| depth <= LENGTH_MAX);
    depth.ok_or_else(|| format!("expected a whole number from 0 to {LENGTH_MAX}, got `{text}`"))
}

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    test: String,
    /// Tokens per second of all sequences together, median of the repeats.
    tok_per_s: f64,
    /// To those of the first row.
    to_first: f64,
    /// Time to the first token: prefill and its logits. None where the context was not all computed.
    ttft_ms: Option<f64>,
    /// Weight, state and cache bytes one token must move, from the trace of the step; experts as they were chosen.
    bytes_per_token: u64,
    gb_per_s: f64,
    /// What memory gave between the repeats; None where the caches hold so much of the model that reading other memory
    /// would take it from them.
    memory_gb_per_s: Option<f64>,
    /// Share of that, the median of each repeat's own; else of the read bandwidth measured at the start.
    percent_of_bandwidth: f64,
    /// Share of the fastest unit's multiply-adds measured in this run.
    percent_of_compute: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    compute: String,
    machine: String,
    #[serde(flatten)]
    ceiling: Ceiling,
    weights_bytes: u64,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profiles: Vec<Profile>,
}

pub fn decode(args: &DecodeArgs) -> anyhow::Result<()> {
    let cases: Vec<(usize, usize)> = args
        .batch
        .iter()
        .flat_map(|&batch| args.context.iter().map(move |&context| (batch, context)))
        .collect();
    measure(&args.common, &cases, |bench, &(batch, context)| bench.decode(batch, context, args.tokens))
}

pub fn prefill(args: &PrefillArgs) -> anyhow::Result<()> {
    measure(&args.common, &args.lengths, |bench, &length| bench.prefill(length, args.chunk))
}

/// Measures every case, then prints the report.
fn measure<T>(
    common: &Common,
    cases: &[T],
    mut case: impl FnMut(&mut Bench<'_>, &T) -> anyhow::Result<Row>,
) -> anyhow::Result<()> {
    let resident = Resident::open_as(&common.model, &common.load)?;
    let steps = cases.len() * (common.repeats + 1) + 1;
    let progress = progress("measuring", steps, common.json)?;
    let ceiling = Ceiling::measure(common.compute.threads())?;
    progress.inc(1);
    let reads = resident.bytes() >= READ_BETWEEN;
    let memory = reads.then(|| Reader::new(common.compute.threads())).transpose();
    let memory = memory.context("measuring the memory")?;
    let mut bench = Bench { resident: &resident, common, ceiling, memory, progress, profiles: Vec::new() };
    let mut rows = cases.iter().map(|c| case(&mut bench, c)).collect::<anyhow::Result<Vec<_>>>()?;
    let first = rows.first().map_or(1.0, |row| row.tok_per_s);
    rows.iter_mut().for_each(|row| row.to_first = row.tok_per_s / first);
    bench.progress.finish_and_clear();
    let report = Report {
        model: common.model.clone(),
        compute: common.compute.describe(),
        machine: machine(),
        ceiling: bench.ceiling,
        weights_bytes: resident.bytes(),
        rows,
        profiles: bench.profiles,
    };
    tell(&report, common.json, print)
}

struct Bench<'a> {
    resident: &'a Resident,
    common: &'a Common,
    ceiling: Ceiling,
    /// Asked around every repeat.
    memory: Option<Reader>,
    progress: ProgressBar,
    profiles: Vec<Profile>,
}

/// What the repeats of one case came to.
#[derive(Default)]
struct Times {
    /// Tokens per second.
    rates: Vec<f64>,
    /// Bytes per second of memory before and after each of them.
    memory: Vec<f64>,
    first_ms: Vec<f64>,
    /// What was watched: every step of a profile, else only the last of the run that is not counted.
    observed: Vec<Observed>,
}

impl Bench<'_> {
    fn decode(&mut self, batch: usize, context: usize, tokens: usize) -> anyhow::Result<Row> {
        self.resident.check_context(context, tokens)?;
        let (capacity, computed) = (context + tokens, context.min(COMPUTED));
        let limits = limits(batch, capacity, computed.max(batch));
        let mut network = self.resident.watched(&self.common.compute, limits)?;
        let prompt = prompt(network.vocab_size(), computed.max(1));
        let mut times = Times::default();
        let mut last = vec![prompt[0]; batch];
        let mut inputs = StepInputs::default();
        // The first run warms caches and branch predictors and is not counted.
        for repeat in 0..=self.common.repeats {
            let whole = context == computed;
            if computed > 0 && (whole || repeat == 0) {
                let start = Instant::now();
                for (slot, last) in last.iter_mut().enumerate() {
                    let inputs = spread(&[(slot, 0, &prompt)], capacity);
                    *last = greedy(network.step(&inputs)?)?;
                    if whole && slot == 0 && repeat > 0 {
                        times.first_ms.push(start.elapsed().as_secs_f64() * 1e3);
                    }
                }
            }
            let before = self.memory()?;
            let start = Instant::now();
            for i in 0..tokens {
                decode_step(&mut inputs, &last, context + i, capacity);
                if repeat == 0 && i == 0 {
                    copy_pages(&mut inputs, batch, context, capacity);
                }
                let watched = if repeat == 0 { i + 1 == tokens } else { self.common.profile };
                times.observed.extend(step(network.as_mut(), &inputs, watched, &mut last)?);
            }
            let seconds = start.elapsed().as_secs_f64();
            if repeat > 0 {
                times.rates.push((batch * tokens) as f64 / seconds);
                times.memory.extend(before.zip(self.memory()?).map(|(before, after)| (before + after) / 2.0));
            }
            self.progress.inc(1);
        }
        // The step in the middle stands for all of them.
        decode_step(&mut inputs, &last, context + tokens / 2, capacity);
        self.row(format!("decode, batch {batch}, context {context}"), times, limits, &[inputs], batch)
    }

    fn prefill(&mut self, length: usize, chunk: usize) -> anyhow::Result<Row> {
        self.resident.check_context(length, 0)?;
        let limits = limits(1, length, chunk.min(length));
        let mut network = self.resident.watched(&self.common.compute, limits)?;
        let prompt = prompt(network.vocab_size(), length);
        let mut steps: Vec<StepInputs> = prompt
            .chunks(chunk)
            .enumerate()
            .map(|(i, piece)| StepInputs::single(piece, i * chunk, BLOCK_LEN))
            .collect();
        if let Some((_, before)) = steps.split_last_mut() {
            before.iter_mut().for_each(|inputs| inputs.logit_rows.clear());
        }
        let mut times = Times::default();
        for repeat in 0..=self.common.repeats {
            let mut run = Observed { wall: Duration::ZERO, spans: Vec::new() };
            let watched = repeat == 0 || self.common.profile;
            let before = self.memory()?;
            let start = Instant::now();
            for inputs in &steps {
                if let Some(part) = step(network.as_mut(), inputs, watched, &mut [0])? {
                    run.wall += part.wall;
                    run.spans.extend(part.spans);
                }
            }
            let seconds = start.elapsed().as_secs_f64();
            times.observed.extend(watched.then_some(run));
            if repeat > 0 {
                times.rates.push(length as f64 / seconds);
                times.first_ms.push(seconds * 1e3);
                times.memory.extend(before.zip(self.memory()?).map(|(before, after)| (before + after) / 2.0));
            }
            self.progress.inc(1);
        }
        self.row(format!("prefill {length}, chunks of {chunk}"), times, limits, &steps, length)
    }

    /// Bytes per second that memory gives now.
    fn memory(&self) -> anyhow::Result<Option<f64>> {
        self.memory.as_ref().map(Reader::sample).transpose().context("measuring the memory")
    }

    /// `steps` are those of one run over `tokens` tokens.
    fn row(
        &mut self,
        test: String,
        times: Times,
        limits: Limits,
        steps: &[StepInputs],
        tokens: usize,
    ) -> anyhow::Result<Row> {
        let Times { rates, memory, first_ms, mut observed } = times;
        if self.common.profile {
            // The run that only warms up is not counted here either.
            observed.remove(0);
        }
        let runs = profile::undisturbed(observed);
        let records = self.records(limits, steps, &profile::distinct(&runs))?;
        let mut cost = Cost::default();
        records.iter().for_each(|record| cost += record.cost);
        let bytes = (cost.weights + cost.state) as f64 / tokens as f64;
        let shares = rates.iter().zip(&memory).map(|(rate, memory)| 100.0 * bytes * rate / memory);
        let share = (!memory.is_empty()).then(|| median(shares.collect()));
        let memory = (!memory.is_empty()).then(|| median(memory));
        let ceiling = memory.map_or(self.ceiling.clone(), |memory| self.ceiling.with_memory(memory));
        if self.common.profile {
            self.profiles.push(profile::join(test.clone(), &runs, &records, &ceiling)?);
        }
        let tok_per_s = median(rates);
        let gb_per_s = bytes * tok_per_s / 1e9;
        let gflop_per_s = cost.flops as f64 / tokens as f64 * tok_per_s / 1e9;
        Ok(Row {
            test,
            tok_per_s,
            to_first: 1.0,
            ttft_ms: (!first_ms.is_empty()).then(|| median(first_ms)),
            bytes_per_token: bytes as u64,
            gb_per_s,
            memory_gb_per_s: memory.map(|memory| memory / 1e9),
            percent_of_bandwidth: share.unwrap_or_else(|| self.ceiling.memory_percent(gb_per_s)),
            percent_of_compute: self.ceiling.compute_percent(gflop_per_s),
        })
    }

    /// The operations of `steps`, whose layers read so many `distinct` experts.
    fn records(
        &self,
        limits: Limits,
        steps: &[StepInputs],
        distinct: &[usize],
    ) -> anyhow::Result<Vec<Record>> {
        let mut trace = self.resident.trace(&self.common.compute, limits)?;
        trace.backend_mut().distinct.extend(distinct);
        for inputs in steps {
            trace.forward(inputs);
        }
        Ok(std::mem::take(&mut trace.backend_mut().records))
    }
}

/// Runs a step and takes the likeliest id of each row; what is seen of it if it is `watched`.
fn step(
    network: &mut dyn Watched,
    inputs: &StepInputs,
    watched: bool,
    ids: &mut [u32],
) -> anyhow::Result<Option<Observed>> {
    if watched {
        network.watch(true);
    }
    let vocab = network.vocab_size();
    let start = Instant::now();
    let logits = network.step(inputs)?;
    let wall = start.elapsed();
    for (id, logits) in ids.iter_mut().zip(logits.chunks_exact(vocab)) {
        *id = greedy(logits)?;
    }
    if !watched {
        return Ok(None);
    }
    let spans = network.spans().to_vec();
    network.watch(false);
    Ok(Some(Observed { wall, spans }))
}

/// Fills the pages of a context that was computed only up to [`COMPUTED`].
fn copy_pages(inputs: &mut StepInputs, batch: usize, context: usize, capacity: usize) {
    let (own, computed) = (capacity.div_ceil(BLOCK_LEN), COMPUTED / BLOCK_LEN);
    for slot in 0..batch {
        for block in computed..context.div_ceil(BLOCK_LEN) {
            let [from, to] = [block % computed, block].map(|block| (slot * own + block) as u32);
            inputs.block_copies.push(BlockCopy { from, to });
        }
    }
}

/// Ids without meaning but spread over the vocabulary, so that many experts are chosen.
pub fn prompt(vocab: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
}

/// Sequences of (slot, past, tokens); sequence i owns the i-th run of blocks for `capacity` tokens.
fn spread(parts: &[(usize, usize, &[u32])], capacity: usize) -> StepInputs {
    let mut inputs = StepInputs::default();
    for &(slot, past, tokens) in parts {
        push(&mut inputs, slot, past, tokens, capacity);
    }
    inputs
}

pub fn push(inputs: &mut StepInputs, slot: usize, past: usize, tokens: &[u32], capacity: usize) {
    let own = capacity.div_ceil(BLOCK_LEN) as u32;
    let block_count = (past + tokens.len()).div_ceil(BLOCK_LEN) as u32;
    let slot = slot as u32;
    inputs.push(slot, past, tokens.iter().copied(), (0..block_count).map(|b| slot * own + b));
    inputs.logit_rows.push(inputs.tokens.len() as u32 - 1);
}

fn decode_step(inputs: &mut StepInputs, last: &[u32], past: usize, capacity: usize) {
    inputs.clear();
    for (slot, &token) in last.iter().enumerate() {
        push(inputs, slot, past, &[token], capacity);
    }
}

fn print(report: &Report) {
    println!("{} ({:.1} MB) on {}", report.model, report.weights_bytes as f64 / 1e6, report.compute);
    println!("{}; {}", report.machine, report.ceiling.describe());
    let header = [
        "test",
        "tok/s",
        "to first",
        "TTFT ms",
        "MB/token",
        "GB/s",
        "memory GB/s",
        "% of memory",
        "% of compute",
    ];
    let cells = report.rows.iter().map(|row| {
        [
            row.test.clone(),
            format!("{:.1}", row.tok_per_s),
            format!("{:.3}", row.to_first),
            row.ttft_ms.map_or_else(|| "–".into(), |ms| format!("{ms:.2}")),
            format!("{:.3}", row.bytes_per_token as f64 / 1e6),
            format!("{:.2}", row.gb_per_s),
            row.memory_gb_per_s.map_or_else(|| "–".into(), |gb| format!("{gb:.1}")),
            format!("{:.1}", row.percent_of_bandwidth),
            format!("{:.1}", row.percent_of_compute),
        ]
    });
    table::print(header, &[1, 2, 3, 4, 5, 6, 7, 8], cells);
    if report.rows.iter().any(|row| row.percent_of_bandwidth > 100.0) {
        println!("More than 100 %: weights and states of this size are served by the caches, not by memory.");
    }
    report.profiles.iter().for_each(profile::print);
}
