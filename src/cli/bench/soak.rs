//! `bench soak`: a server of its own under a mixed load for a long time. Does memory stay flat, and is nothing left
//! behind when the last client has gone?

mod client;
mod mix;
mod tally;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::task::JoinSet;

use super::client::Target;
use super::local::Local;
use super::{machine, progress, tell};
use crate::api::Health;
use crate::cli::resident::count;
use crate::cli::table::bytes;
use crate::engine::Handle;
use client::Client;
use tally::{Counts, Tally};

/// Rows are this far apart at most; a short run has [`ROWS`] of them.
const EVERY_MAX: Duration = Duration::from_secs(15);
const ROWS: u32 = 40;
/// A single request of the mix takes seconds; one that takes this long hangs, and is a failure.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the engine may take to notice that the last client has gone.
const SETTLE: Duration = Duration::from_secs(10);
/// Memory is flat if it grew by less than both. A small model's leak shows in percent long before it has 8 MB, a
/// large model's in MB long before it has a percent.
const FLAT_PERCENT: f64 = 2.0;
const FLAT_MB: f64 = 8.0;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferrotron bench soak\n  ferrotron bench soak --minutes 60 --concurrency 32 --json\n  \
    ferrotron bench soak --minutes 1 -- --max-num-seqs 2 --kv-cache-tokens 4096\n\nMemory is that of the whole process, \
    clients included. It is called flat if from the first quarter of the time to the end it grew by less than 2 % and \
    less than 8 MB."
)]
pub struct Args {
    /// Preset, folder or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    /// How long requests are sent
    #[arg(long, default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
    /// Clients at once; the server has half as many places, so that some wait
    #[arg(long, default_value_t = 16, value_parser = count::<1024>)]
    concurrency: usize,
    /// Of what the clients ask
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Flags of the server that is started, after `--`
    #[arg(last = true, value_name = "SERVE_FLAGS")]
    flags: Vec<String>,
}

fn minutes(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value >= 0.01 && *value <= 100_000.0);
    value.ok_or_else(|| format!("expected minutes from 0.01 to 100000, got `{text}`"))
}

/// Why a soak ended badly.
#[derive(Debug, thiserror::Error)]
enum SoakError {
    #[error("/proc/self/status tells no VmRSS: the memory of the process is not known on this system")]
    MemoryUnknown,
    #[error("the server is no longer well after {0:.0?}")]
    Unwell(Duration),
    #[error(
        "the engine is not empty {SETTLE:?} after the last request: {running} running, {waiting} waiting, {slots_used} \
         slots and {kv_blocks_used} KV blocks in use"
    )]
    NotEmpty { running: u64, waiting: u64, slots_used: u64, kv_blocks_used: u64 },
}

/// What was so at one time. Requests are counted from the start; rates are since the row before.
#[derive(Debug, Clone, Serialize)]
struct Row {
    elapsed_s: f64,
    #[serde(flatten)]
    counts: Counts,
    tok_per_s: f64,
    rss_bytes: u64,
    /// Held by the prefix cache.
    kv_blocks: u64,
    checkpoints: u64,
    /// Of the prompt tokens looked up.
    hit_percent: f64,
}

/// Gauges of the engine; all zero once nobody asks for anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Left {
    running: u64,
    waiting: u64,
    slots_used: u64,
    kv_blocks_used: u64,
}

/// Memory after the first quarter of the time, when pools and caches are warm, against the end.
#[derive(Debug, Clone, Copy, Serialize)]
struct Memory {
    quarter_bytes: u64,
    end_bytes: u64,
    growth_mb: f64,
    growth_percent: f64,
    flat: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    machine: String,
    concurrency: usize,
    rows: Vec<Row>,
    /// Requests by kind.
    kinds: Vec<(&'static str, u64)>,
    /// Failures by what was said.
    failures: Vec<(String, u64)>,
    memory: Memory,
    left: Left,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let report = super::runtime()?.block_on(soak(args))?;
    tell(&report, args.json, print)?;
    let Left { running, waiting, slots_used, kv_blocks_used } = report.left;
    if running + waiting + slots_used + kv_blocks_used > 0 {
        return Err(SoakError::NotEmpty { running, waiting, slots_used, kv_blocks_used }.into());
    }
    Ok(())
}

async fn soak(args: &Args) -> anyhow::Result<Report> {
    let local = Local::start(&args.model, args.concurrency.div_ceil(2), &args.flags).await?;
    let engine = local.app.resident(0).context("the server has no model")?.engine.clone();
    let target = Target::new(&local.base, None, REQUEST_TIMEOUT)?;
    let tally = Arc::new(Tally::default());
    let lasts = Duration::from_secs_f64(args.minutes * 60.0);
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for index in 0..args.concurrency {
        let seed = args.seed.wrapping_mul(1_000_003).wrapping_add(index as u64);
        let client = Client::new(target.clone(), args.model.clone(), tally.clone(), seed);
        clients.spawn(client.until(began + lasts));
    }
    let rows = watch(args, &local, &engine, &tally, began, lasts).await?;
    while let Some(ended) = clients.join_next().await {
        ended.context("a client panicked")?;
    }
    let left = settle(&engine).await;
    local.stop().await?;
    Ok(Report {
        model: args.model.clone(),
        machine: machine(),
        concurrency: args.concurrency,
        memory: memory(&rows, lasts),
        rows,
        kinds: tally.kinds(),
        failures: tally.failures(),
        left,
    })
}

/// A row now and then until `lasts` is over.
async fn watch(
    args: &Args,
    local: &Local,
    engine: &Handle,
    tally: &Tally,
    began: Instant,
    lasts: Duration,
) -> anyhow::Result<Vec<Row>> {
    let every = EVERY_MAX.min(lasts / ROWS);
    let count = (lasts.as_secs_f64() / every.as_secs_f64()).round() as u32;
    let bar = progress("soaking", count as usize, args.json)?;
    if !args.json {
        println!(
            "{}: {} clients for {:.1} minutes; {}",
            args.model,
            args.concurrency,
            args.minutes,
            machine()
        );
        println!("{HEADER}");
    }
    let (mut rows, mut before) = (Vec::new(), Sums::of(engine));
    for number in 1..=count {
        tokio::time::sleep_until((began + every * number).into()).await;
        if local.app.health() != Health::Ready {
            return Err(SoakError::Unwell(began.elapsed()).into());
        }
        let now = Sums::of(engine);
        let row = row(engine, tally, began.elapsed(), &before, &now)?;
        before = now;
        if !args.json {
            show(&row, &bar);
        }
        rows.push(row);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Counters whose growth is shown.
struct Sums {
    at: Instant,
    generated: u64,
    queried: u64,
    hit: u64,
}

impl Sums {
    fn of(engine: &Handle) -> Self {
        let stats = engine.stats();
        Self {
            at: Instant::now(),
            generated: stats.generation_tokens.load(Relaxed),
            queried: stats.prefix_queries.load(Relaxed),
            hit: stats.prefix_hits.load(Relaxed),
        }
    }
}

fn row(
    engine: &Handle,
    tally: &Tally,
    elapsed: Duration,
    before: &Sums,
    now: &Sums,
) -> Result<Row, SoakError> {
    let (stats, seconds) = (engine.stats(), (now.at - before.at).as_secs_f64().max(1e-9));
    Ok(Row {
        elapsed_s: elapsed.as_secs_f64(),
        counts: tally.counts(),
        tok_per_s: (now.generated - before.generated) as f64 / seconds,
        rss_bytes: resident_bytes().ok_or(SoakError::MemoryUnknown)?,
        kv_blocks: stats.cache_blocks.load(Relaxed),
        checkpoints: stats.cache_checkpoints.load(Relaxed),
        hit_percent: 100.0 * (now.hit - before.hit) as f64 / (now.queried - before.queried).max(1) as f64,
    })
}

/// Memory of this process that is in RAM.
fn resident_bytes() -> Option<u64> {
    vm_rss(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The kernel counts in kB and means 1024 bytes.
fn vm_rss(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What the engine still holds once it is empty, or [`SETTLE`] after the last request.
async fn settle(engine: &Handle) -> Left {
    const PAUSE: Duration = Duration::from_millis(20);
    const EMPTY: Left = Left { running: 0, waiting: 0, slots_used: 0, kv_blocks_used: 0 };
    let ended = Instant::now();
    loop {
        let stats = engine.stats();
        let left = Left {
            running: stats.running.load(Relaxed),
            waiting: stats.waiting.load(Relaxed),
            slots_used: stats.slots_used.load(Relaxed),
            kv_blocks_used: stats.kv_blocks_used.load(Relaxed),
        };
        if left == EMPTY || ended.elapsed() > SETTLE {
            return left;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The first row past a quarter of the time against the last one: both under load.
fn memory(rows: &[Row], lasts: Duration) -> Memory {
    let quarter = rows.iter().find(|row| row.elapsed_s >= lasts.as_secs_f64() / 4.0);
    let bytes = |row: Option<&Row>| row.map_or(0, |row| row.rss_bytes);
    let (quarter_bytes, end_bytes) = (bytes(quarter), bytes(rows.last()));
    let growth = end_bytes as f64 - quarter_bytes as f64;
    let (growth_mb, growth_percent) = (growth / 1e6, 100.0 * growth / quarter_bytes.max(1) as f64);
    let flat = growth_mb < FLAT_MB && growth_percent < FLAT_PERCENT;
    Memory { quarter_bytes, end_bytes, growth_mb, growth_percent, flat }
}

const HEADER: &str = " elapsed s      done  failed refused cancelled timed out     tok/s       memory  KV blocks   \
                      states  hit %";

/// At once, for who watches.
fn show(row: &Row, bar: &ProgressBar) {
    let Row { elapsed_s, counts, tok_per_s, rss_bytes, kv_blocks, checkpoints, hit_percent } = row;
    let Counts { done, failed, refused, cancelled, timed_out } = counts;
    let memory = bytes(*rss_bytes);
    bar.suspend(|| {
        println!(
            "{elapsed_s:>10.1} {done:>9} {failed:>7} {refused:>7} {cancelled:>9} {timed_out:>9} {tok_per_s:>9.1} \
             {memory:>12} {kv_blocks:>10} {checkpoints:>8} {hit_percent:>6.1}"
        );
    });
}

fn print(report: &Report) {
    let kinds: Vec<String> = report.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    println!("\nRequests: {}", kinds.join(", "));
    for (why, count) in &report.failures {
        println!("Failed {count} times: {why}");
    }
    let Memory { quarter_bytes, end_bytes, growth_mb, growth_percent, flat } = report.memory;
    let word = if flat { "flat" } else { "not flat" };
    println!(
        "Memory was {word}: {} after a quarter of the time, {} at the end, {growth_mb:+.1} MB, {growth_percent:+.2} % \
         (flat: below {FLAT_MB} MB and {FLAT_PERCENT} %)",
        bytes(quarter_bytes),
        bytes(end_bytes),
    );
    let Left { running, waiting, slots_used, kv_blocks_used } = report.left;
    println!(
        "After the last request: {running} running, {waiting} waiting, {slots_used} slots and {kv_blocks_used} KV blocks \
         in use"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(megabytes: &[u64]) -> Vec<Row> {
        let row = |(index, megabytes): (usize, &u64)| Row {
            elapsed_s: 1.0 + index as f64,
            counts: Counts::default(),
            tok_per_s: 0.0,
            rss_bytes: megabytes * 1_000_000,
            kv_blocks: 0,
            checkpoints: 0,
            hit_percent: 0.0,
        };
        megabytes.iter().enumerate().map(row).collect()
    }

    #[test]
    fn memory_is_flat_if_it_grew_little_in_both_measures_after_the_first_quarter() {
        let check = |megabytes: [u64; 4], growth, flat| {
            let memory = memory(&rows(&megabytes), Duration::from_secs(8));
            assert_eq!((memory.growth_mb, memory.flat), (growth, flat), "{megabytes:?}");
        };
        check([100, 500, 900, 507], 7.0, true);
        check([500, 500, 500, 400], -100.0, true);
        check([100, 100, 100, 103], 3.0, false);
        check([1000, 1000, 1000, 1009], 9.0, false);
    }

    #[test]
    fn the_kernels_kilobytes_are_read() {
        assert_eq!(vm_rss("VmHWM:\t  9 kB\nVmRSS:\t    1532 kB\nThreads:\t1\n"), Some(1_568_768));
        assert_eq!((vm_rss("VmHWM: 9 kB"), vm_rss("VmRSS: many kB")), (None, None));
    }

    #[test]
    fn minutes_are_a_positive_number() {
        assert_eq!(minutes("0.02"), Ok(0.02));
        for text in ["0", "-1", "inf", "NaN", "ten"] {
            assert!(minutes(text).is_err(), "{text}");
        }
    }
}
