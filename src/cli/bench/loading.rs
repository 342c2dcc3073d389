//! `bench load`: from the files of a checkpoint to a network that answers, again and again, so that the files are in
//! the page cache.

use std::time::Instant;

use anyhow::ensure;
use serde::Serialize;

use super::ceiling::Ceiling;
use super::{machine, median, progress, tell};
use crate::cli::resident::{Compute, Resident, count, limits};
use crate::cli::table;

/// Room of the network that is made: what a step needs is not what is measured.
const SEQUENCES: usize = 1;
const LENGTH: usize = 64;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferrotron bench load --model /tmp/bench-nano")]
pub struct Args {
    /// Preset, folder or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    #[command(flatten)]
    compute: Compute,
    /// Runs; the median counts
    #[arg(long, default_value_t = 5, value_parser = count::<100_000>)]
    repeats: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    compute: String,
    machine: String,
    ceiling: Ceiling,
    weights_bytes: u64,
    load_ms: f64,
    gb_per_s: f64,
    percent_of_bandwidth: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let bar = progress("loading", args.repeats + 2, args.json)?;
    let ceiling = Ceiling::measure(args.compute.threads())?;
    bar.inc(1);
    let mut times = Vec::with_capacity(args.repeats);
    let mut bytes = 0;
    // The first run fills the page cache and is not counted.
    for repeat in 0..=args.repeats {
        let start = Instant::now();
        let resident = Resident::open(&args.model)?;
        let network = resident.network(&args.compute, limits(SEQUENCES, LENGTH, LENGTH), &|_| {})?;
        if repeat > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
        ensure!(network.vocab_size() > 0, "{}: no vocabulary", args.model);
        bytes = resident.bytes();
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = median(times);
    let gb_per_s = bytes as f64 / seconds / 1e9;
    let report = Report {
        model: args.model.clone(),
        compute: args.compute.describe(),
        machine: machine(),
        percent_of_bandwidth: ceiling.memory_percent(gb_per_s),
        ceiling,
        weights_bytes: bytes,
        load_ms: seconds * 1e3,
        gb_per_s,
    };
    tell(&report, args.json, print)
}

fn print(report: &Report) {
    println!("{} on {}", report.model, report.compute);
    println!("{}; {}", report.machine, report.ceiling.describe());
    let header = ["size", "load ms", "GB/s", "% of memory"];
    let row = [
        table::bytes(report.weights_bytes),
        format!("{:.1}", report.load_ms),
        format!("{:.2}", report.gb_per_s),
        format!("{:.1}", report.percent_of_bandwidth),
    ];
    table::print(header, &[0, 1, 2, 3], [row]);
}
