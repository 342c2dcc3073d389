//! `bench decode` and `bench prefill`: tokens per second, and what share of the memory's speed that is.

use std::time::Instant;

use anyhow::Context;
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde::Serialize;

use super::{machine, median, progress};
use crate::backend::{SequenceInputs, StepInputs};
use crate::cli::resident::{BLOCK_LEN, Compute, Resident, count, greedy, limits};
use crate::cli::table::table;
use crate::ops::Cost;

/// The host backends keep keys and values as f32.
const CACHE_BYTES: usize = 4;
/// No model of the family reads more tokens.
const LENGTH_MAX: usize = 1 << 20;

/// Of `bench decode`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferrotron bench decode --batch 1,4,8")]
pub struct DecodeArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences decoded together, one row of the table each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4], value_parser = count::<1024>)]
    batch: Vec<usize>,
    /// Tokens in the context before decoding starts
    #[arg(long, default_value_t = 64, value_parser = count::<LENGTH_MAX>)]
    context: usize,
    /// Tokens decoded per sequence and repeat
    #[arg(long, default_value_t = 64, value_parser = count::<LENGTH_MAX>)]
    tokens: usize,
}

/// Of `bench prefill`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferrotron bench prefill --model tiny-nvfp4 --lengths 128,1024 --json")]
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
    compute: Compute,
    /// Runs per row; the median counts
    #[arg(long, default_value_t = 5, value_parser = count::<100_000>)]
    repeats: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    test: String,
    /// Tokens per second of all sequences together, median of the repeats.
    tok_per_s: f64,
    /// Time to the first token: prefill and its logits.
    ttft_ms: f64,
    /// Weight, state and cache bytes one token must move, from the trace of the step.
    bytes_per_token: u64,
    gb_per_s: f64,
    /// Share of the read bandwidth measured in this run.
    percent_of_bandwidth: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    compute: String,
    machine: String,
    /// Measured in this run by reading a buffer larger than the caches.
    bandwidth_gb_per_s: f64,
    weights_bytes: u64,
    rows: Vec<Row>,
}

pub fn decode(args: &DecodeArgs) -> anyhow::Result<()> {
    measure(&args.common, &args.batch, |bench, &batch| bench.decode(batch, args.context, args.tokens))
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
    let resident = Resident::open(&common.model)?;
    let steps = cases.len() * (common.repeats + 1) + 1;
    let progress = progress("measuring", steps, common.json)?;
    let bandwidth = read_bandwidth(common.compute.threads())?;
    progress.inc(1);
    let mut bench = Bench { resident: &resident, common, bandwidth, progress };
    let rows = cases.iter().map(|c| case(&mut bench, c)).collect::<anyhow::Result<Vec<_>>>()?;
    bench.progress.finish_and_clear();
    let report = Report {
        model: common.model.clone(),
        compute: common.compute.describe(),
        machine: machine(),
        bandwidth_gb_per_s: bandwidth / 1e9,
        weights_bytes: resident.checkpoint.bytes(),
        rows,
    };
    if common.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

struct Bench<'a> {
    resident: &'a Resident,
    common: &'a Common,
    /// Bytes per second.
    bandwidth: f64,
    progress: ProgressBar,
}

impl Bench<'_> {
    fn decode(&mut self, batch: usize, context: usize, tokens: usize) -> anyhow::Result<Row> {
        self.resident.check_context(context, tokens)?;
        let limits = limits(batch, context + tokens, context.max(batch));
        let mut network = self.resident.network(&self.common.compute, limits, &|_| {})?;
        let vocab = network.vocab_size();
        let prompt = prompt(vocab, context);
        let (mut rates, mut first) = (Vec::new(), Vec::new());
        // The first run warms caches and branch predictors and is not counted.
        for repeat in 0..=self.common.repeats {
            let start = Instant::now();
            let mut last = Vec::new();
            for sequence in 0..batch {
                let inputs = spread(&[(sequence, 0, &prompt)], context + tokens);
                last.push(greedy(network.step(&inputs)?)?);
                if sequence == 0 && repeat > 0 {
                    first.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
            let mut inputs = StepInputs::default();
            let start = Instant::now();
            for i in 0..tokens {
                decode_step(&mut inputs, &last, context + i, context + tokens);
                for (last, logits) in last.iter_mut().zip(network.step(&inputs)?.chunks_exact(vocab)) {
                    *last = greedy(logits)?;
                }
            }
            if repeat > 0 {
                rates.push((batch * tokens) as f64 / start.elapsed().as_secs_f64());
            }
            self.progress.inc(1);
        }
        let mut inputs = StepInputs::default();
        decode_step(&mut inputs, &vec![0; batch], context + tokens / 2, context + tokens);
        let moved = self.cost(limits, &inputs)?;
        Ok(self.row(format!("decode, batch {batch}, context {context}"), rates, first, moved, batch))
    }

    fn prefill(&mut self, length: usize, chunk: usize) -> anyhow::Result<Row> {
        self.resident.check_context(length, 0)?;
        let limits = limits(1, length, chunk.min(length));
        let mut network = self.resident.network(&self.common.compute, limits, &|_| {})?;
        let prompt = prompt(network.vocab_size(), length);
        let mut times = Vec::new();
        for repeat in 0..=self.common.repeats {
            let start = Instant::now();
            for (i, piece) in prompt.chunks(chunk).enumerate() {
                let mut inputs = StepInputs::single(piece, i * chunk, BLOCK_LEN);
                if (i + 1) * chunk < length {
                    inputs.logit_rows.clear();
                }
                network.step(&inputs)?;
            }
            if repeat > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
            self.progress.inc(1);
        }
        let mut moved = Cost::default();
        for (i, piece) in prompt.chunks(chunk).enumerate() {
            moved += self.cost(limits, &StepInputs::single(piece, i * chunk, BLOCK_LEN))?;
        }
        let rates = times.iter().map(|t| length as f64 / t).collect();
        let first = times.iter().map(|t| t * 1e3).collect();
        Ok(self.row(format!("prefill {length}, chunks of {chunk}"), rates, first, moved, length))
    }

    fn cost(&self, limits: crate::model::Limits, inputs: &StepInputs) -> anyhow::Result<Cost> {
        let mut trace = self.resident.trace(limits, CACHE_BYTES)?;
        trace.forward(inputs);
        Ok(trace.backend().total())
    }

    fn row(&self, test: String, rates: Vec<f64>, first: Vec<f64>, moved: Cost, tokens: usize) -> Row {
        let tok_per_s = median(rates);
        let bytes = (moved.weights + moved.state) as f64 / tokens as f64;
        Row {
            test,
            tok_per_s,
            ttft_ms: median(first),
            bytes_per_token: bytes as u64,
            gb_per_s: bytes * tok_per_s / 1e9,
            percent_of_bandwidth: 100.0 * bytes * tok_per_s / self.bandwidth,
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
    let (first, first_block) = (inputs.tokens.len() as u32, inputs.blocks.len() as u32);
    let own = capacity.div_ceil(BLOCK_LEN) as u32;
    let block_count = (past + tokens.len()).div_ceil(BLOCK_LEN) as u32;
    inputs.tokens.extend_from_slice(tokens);
    inputs.blocks.extend((0..block_count).map(|b| slot as u32 * own + b));
    inputs.logit_rows.push(inputs.tokens.len() as u32 - 1);
    let (slot, count, past) = (slot as u32, tokens.len() as u32, past as u32);
    inputs.sequences.push(SequenceInputs {
        slot,
        source: slot,
        first,
        count,
        past,
        first_block,
        block_count,
        ..SequenceInputs::default()
    });
}

fn decode_step(inputs: &mut StepInputs, last: &[u32], past: usize, capacity: usize) {
    inputs.clear();
    for (slot, &token) in last.iter().enumerate() {
        push(inputs, slot, past, &[token], capacity);
    }
}

/// Bytes per second that `threads` threads read from memory: the best of several passes over 512 MiB.
fn read_bandwidth(threads: usize) -> anyhow::Result<f64> {
    const BYTES: usize = 512 << 20;
    const PASSES: usize = 6;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("bandwidth threads")?;
    let data = vec![1u64; BYTES / 8];
    let piece = data.len().div_ceil(threads);
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        let sum: u64 = pool.install(|| data.par_chunks(piece).map(sum_lanes).sum());
        // The sum is used, so that the reads are not optimised away.
        anyhow::ensure!(sum == data.len() as u64, "the bandwidth buffer changed while it was read");
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(BYTES as f64 / best)
}

fn sum_lanes(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 16];
    for chunk in values.chunks_exact(16) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().sum::<u64>() + values.chunks_exact(16).remainder().iter().sum::<u64>()
}

fn print(report: &Report) {
    println!("{} ({:.1} MB) on {}", report.model, report.weights_bytes as f64 / 1e6, report.compute);
    println!("{}; memory reads at {:.1} GB/s", report.machine, report.bandwidth_gb_per_s);
    let header = ["test", "tok/s", "TTFT ms", "MB/token", "GB/s", "% of memory"];
    let mut table = table(&header, &[1, 2, 3, 4, 5]);
    for row in &report.rows {
        table.add_row([
            row.test.clone(),
            format!("{:.1}", row.tok_per_s),
            format!("{:.2}", row.ttft_ms),
            format!("{:.3}", row.bytes_per_token as f64 / 1e6),
            format!("{:.2}", row.gb_per_s),
            format!("{:.1}", row.percent_of_bandwidth),
        ]);
    }
    println!("{table}");
    if report.rows.iter().any(|row| row.percent_of_bandwidth > 100.0) {
        println!("More than 100 %: weights and states of this size are served by the caches, not by memory.");
    }
}
