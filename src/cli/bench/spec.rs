//! `bench spec`: what drafts cost, how often they are right, and what they gain. In this process, without HTTP.

mod acceptance;
mod cost;
mod gain;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::json;

use super::host;
use super::machine;
use crate::cli::eval::{self, HELDOUT, Problem};
use crate::cli::resident::{Compute, Resident, count, limits};
use crate::engine::Speculation;
use crate::model::Limits;

/// Sequences and tokens per sequence of the table of host times.
const HOST_SEQUENCES: [usize; 2] = [1, 64];
const HOST_TOKENS: usize = 1000;
const HOST_DEPTH: usize = 3;
/// Deeper drafts are not asked for, whatever `--depth` says.
const DEPTH_MAX: usize = 8;

/// Who drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// The model's own draft head
    Mtp,
    /// What stood in the sequence before
    Ngram,
    /// Whichever there is
    All,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferrotron bench spec\n  ferrotron bench spec --concurrency 1,4 --method mtp \
    --depth 2 --json"
)]
pub struct Args {
    /// Preset, folder, .gguf file or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    #[command(flatten)]
    compute: Compute,
    /// Sequences at once, one row of the tables each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16], value_parser = count::<512>)]
    concurrency: Vec<usize>,
    /// Runs per row; the median counts
    #[arg(long, default_value_t = 5, value_parser = count::<10_000>)]
    repeats: usize,
    /// Prompts per run, from the held-out chats of the tiny model
    #[arg(long, default_value_t = 32, value_parser = count::<205>)]
    prompts: usize,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 160, value_parser = count::<1_000_000>)]
    max_tokens: usize,
    /// Who drafts
    #[arg(long, value_enum, default_value_t = Method::All)]
    method: Method,
    /// Drafts per sequence and step at most [default: as `serve`, 3]
    #[arg(long, value_parser = count::<DEPTH_MAX>)]
    depth: Option<usize>,
    /// As many drafts as --depth says, whether they pay or not
    #[arg(long)]
    always: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

impl Args {
    fn most(&self) -> usize {
        self.concurrency.iter().copied().max().unwrap_or(1)
    }

    fn speculation(&self) -> Speculation {
        Speculation {
            depth_max: self.depth.map_or(Speculation::DEPTH_DEFAULT, |depth| depth as u32),
            mtp: self.method != Method::Ngram,
            ngram: self.method != Method::Mtp,
            adaptive: !self.always,
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let resident = Resident::open(&args.model)?;
    let prompts = prompts(&resident, args.prompts)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1) + args.max_tokens;
    resident.check_context(longest, DEPTH_MAX)?;
    let stop = resident.stop_ids();

    // One model at a time: the network is dropped before the engine loads its own.
    let (cost, acceptance) = {
        let mut network = resident.network(&args.compute, network_limits(args, longest), &|_| {})?;
        let network = network.as_mut();
        let cost = cost::measure(network, &args.concurrency, args.repeats, args.json)?;
        let acceptance = match (network.can_draft(), args.method) {
            (true, Method::Mtp | Method::All) => {
                let depth = args.depth.unwrap_or(DEPTH_MAX.min(4));
                acceptance::measure(network, &prompts, depth, args.max_tokens, &stop)?
            }
            _ => Vec::new(),
        };
        (cost, acceptance)
    };
    let runtime = super::runtime()?;
    let machine = machine();
    let gains = runtime.block_on(gain::measure(args, resident, prompts, stop, longest))?;
    let hosts = runtime.block_on(host::measure(&host_args(args)))?;

    if args.json {
        let report = json!({
            "model": args.model, "compute": args.compute.describe(), "machine": machine,
            "verify": cost.verify, "draft": cost.draft, "acceptance": acceptance, "speedup": gains, "host": hosts,
        });
        println!("{report}");
        return Ok(());
    }
    println!("{} on {}; {machine}", args.model, args.compute.describe());
    cost::print(&cost);
    acceptance::print(&acceptance);
    gain::print(&gains);
    println!("\nThe engine alone, around a model that computes nothing");
    host::print(&hosts);
    Ok(())
}

/// Held-out prompts, spread over their families.
fn prompts(resident: &Resident, count: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let text = resident.text()?;
    let lines: Vec<&str> = HELDOUT.lines().collect();
    ensure!(count <= lines.len(), "--prompts: expected at most {}, got {count}", lines.len());
    let ids = |i: usize| {
        let problem: Problem =
            serde_json::from_str(lines[i * lines.len() / count]).context("heldout.jsonl")?;
        eval::prompt(&text, &problem.request)
    };
    (0..count).map(ids).collect()
}

/// Enough for [`cost`] at the highest concurrency and for [`acceptance`] of the longest prompt.
fn network_limits(args: &Args, longest: usize) -> Limits {
    let sequences = args.most();
    let length = cost::capacity(args.repeats).max(longest + DEPTH_MAX);
    let step_tokens = longest.max(sequences * cost::WIDEST).max(cost::CONTEXT);
    Limits { lanes: sequences, drafts: cost::WIDEST - 1, ..limits(sequences, length, step_tokens) }
}

fn host_args(args: &Args) -> host::Args {
    host::Args {
        concurrency: HOST_SEQUENCES.to_vec(),
        tokens: HOST_TOKENS,
        vocab: 1280,
        acceptance: 0.7,
        depth: HOST_DEPTH,
        repeats: args.repeats,
        json: args.json,
    }
}
