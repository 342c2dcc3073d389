//! `bench`: how fast the model computes, how the server answers under load, what caches and drafts are worth.

mod agents;
mod answer;
pub mod ceiling;
mod chance;
mod client;
mod dataset;
mod decode;
mod front;
mod host;
mod inside;
mod load;
mod loading;
mod local;
mod profile;
mod report;
mod roofline;
mod serve;
mod soak;
mod spec;

use std::io::IsTerminal;

use anyhow::Context;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferrotron bench decode\n  ferrotron bench serve --max-concurrency 1,4,8"
)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// One token per sequence and step
    Decode(decode::DecodeArgs),
    /// Reading a prompt
    Prefill(decode::PrefillArgs),
    /// Opening a checkpoint until it can answer
    Load(loading::Args),
    /// What memory and multipliers of this machine do at most
    Roofline(roofline::Args),
    /// Requests to a server, at seeded times
    Serve(Box<serve::Args>),
    /// What drafts cost, how often they are right, what they gain
    Spec(spec::Args),
    /// Conversations with tools that share a long system prompt: what the prefix cache saves
    Agents(agents::Args),
    /// What the engine itself costs per step, around a model that computes nothing
    Host(host::Args),
    /// What a model behind costs the model in front
    Front(front::Args),
    /// A mixed load for a long time: whether memory stays flat and nothing is left behind
    Soak(soak::Args),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Decode(args) => decode::decode(&args),
        What::Prefill(args) => decode::prefill(&args),
        What::Load(args) => loading::run(&args),
        What::Roofline(args) => roofline::run(&args),
        What::Serve(args) => serve::run(&args),
        What::Spec(args) => spec::run(&args),
        What::Agents(args) => agents::run(&args),
        What::Host(args) => host::run(&args),
        What::Front(args) => front::run(&args),
        What::Soak(args) => soak::run(&args),
    }
}

/// The listener and the streams need little; the cores are for the engine.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("the runtime could not be started")
}

/// Prints a report as one JSON object, or for people.
fn tell<R: Serialize>(report: &R, json: bool, print: impl FnOnce(&R)) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
    } else {
        print(report);
    }
    Ok(())
}

/// A bar for `steps` steps on a terminal; none beside JSON.
fn progress(what: &'static str, steps: usize, hidden: bool) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg:12} {bar:30} {pos}/{len} [{elapsed}]")?;
    let bar = ProgressBar::new(steps as u64).with_style(style).with_message(what);
    if hidden || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    Ok(bar)
}

/// Name of the processor, as the system tells it.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {cores} cores")
}

/// The upper of the two in the middle if their number is even. There is at least one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
