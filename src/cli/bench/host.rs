//! `bench host`: what the engine itself costs per step, around a model that computes nothing.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;

use super::inside::{Inside, greedy};
use super::{machine, median, progress};
use crate::cli::resident::{count, limits};
use crate::cli::table;
use crate::engine::{EngineConfig, Request, Speculation};
use crate::model::Limits;
use crate::model::null::{Drafter, Null};

/// Tokens of each prompt.
const PROMPT: usize = 4;
/// Tokens of one step; a prefill of all prompts fits.
const STEP_TOKENS: usize = 512;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Example:\n  ferrotron bench host --concurrency 1,64 --json")]
pub struct Args {
    /// Sequences at once, one row of the table each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64], value_parser = count::<512>)]
    pub concurrency: Vec<usize>,
    /// Tokens per sequence and repeat
    #[arg(long, default_value_t = 2000, value_parser = count::<1_000_000>)]
    pub tokens: usize,
    /// Width of a row of logits
    #[arg(long, default_value_t = 1280, value_parser = count::<1_000_000>)]
    pub vocab: usize,
    /// How often a draft is right
    #[arg(long, default_value_t = 0.7, value_parser = share)]
    pub acceptance: f64,
    /// Drafts per sequence and step at most
    #[arg(long, default_value_t = 3, value_parser = count::<16>)]
    pub depth: usize,
    /// Runs per row; the median counts
    #[arg(long, default_value_t = 5, value_parser = count::<10_000>)]
    pub repeats: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (0.0..=1.0).contains(value));
    value.ok_or_else(|| format!("expected a share from 0 to 1, got `{text}`"))
}

/// One row of the table. Times are medians of the repeats, without the model's own.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub sequences: usize,
    pub speculation: bool,
    pub us_per_step: f64,
    pub us_per_token: f64,
    pub tokens_per_step: f64,
    /// What was subtracted: the time inside the model.
    pub model_us_per_step: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let rows = super::runtime()?.block_on(measure(args))?;
    if args.json {
        println!("{}", serde_json::json!({ "machine": machine(), "vocab": args.vocab, "host": rows }));
    } else {
        println!("The engine around a model that computes nothing; {}", machine());
        print(&rows);
    }
    Ok(())
}

pub fn print(rows: &[Row]) {
    let header = ["sequences", "drafts", "host us/step", "us/token", "tokens/step", "model us/step"];
    let cells = rows.iter().map(|row| {
        [
            row.sequences.to_string(),
            if row.speculation { "on" } else { "off" }.to_owned(),
            format!("{:.2}", row.us_per_step),
            format!("{:.3}", row.us_per_token),
            format!("{:.2}", row.tokens_per_step),
            format!("{:.2}", row.model_us_per_step),
        ]
    });
    table::print(header, &[0, 2, 3, 4, 5], cells);
}

pub async fn measure(args: &Args) -> anyhow::Result<Vec<Row>> {
    let bar = progress("host", args.concurrency.len() * 2 * (args.repeats + 1), args.json)?;
    let mut rows = Vec::new();
    for &sequences in &args.concurrency {
        for speculation in [false, true] {
            rows.push(row(args, sequences, speculation, &bar).await?);
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

async fn row(
    args: &Args,
    sequences: usize,
    speculation: bool,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<Row> {
    let null =
        Null::new(sizes(args, sequences), args.vocab, Some(Drafter { acceptance: args.acceptance, seed: 1 }));
    let clock = null.clock();
    let config = EngineConfig { max_sequences: sequences, ..EngineConfig::default() };
    let engine = Inside::start(config, move |_| Ok(Box::new(null))).await?;
    let asked = if speculation {
        // What stood before says nothing of what this model says next.
        Speculation { ngram: false, ..Speculation::default() }
    } else {
        Speculation { depth_max: 0, ..Speculation::default() }
    };
    let requests: Arc<Vec<Request>> = Arc::new((0..sequences).map(|i| request(args, i, asked)).collect());
    let (mut host, mut model, mut per_step) = (Vec::new(), Vec::new(), Vec::new());
    for repeat in 0..=args.repeats {
        let before = clock.spent();
        let run = engine.run(&requests, sequences).await?;
        let spent = clock.spent() - before;
        ensure!(run.tokens() == sequences * args.tokens, "the engine gave {} tokens", run.tokens());
        bar.inc(1);
        // The first run warms caches and branch predictors and is not counted.
        if repeat > 0 {
            let steps = run.steps.max(1) as f64;
            let micros = |time: Duration| time.as_secs_f64() * 1e6 / steps;
            host.push(micros(run.wall.saturating_sub(spent)));
            model.push(micros(spent));
            per_step.push(run.tokens() as f64 / steps);
        }
    }
    engine.stop().await?;
    let (us_per_step, tokens_per_step) = (median(host), median(per_step));
    Ok(Row {
        sequences,
        speculation,
        us_per_step,
        us_per_token: us_per_step / tokens_per_step,
        tokens_per_step,
        model_us_per_step: median(model),
    })
}

/// Twice the places, so that the prefix cache has room for its checkpoints.
fn sizes(args: &Args, sequences: usize) -> Limits {
    let step_tokens = STEP_TOKENS.max(sequences * (1 + args.depth));
    Limits {
        lanes: sequences,
        drafts: args.depth,
        ..limits(2 * sequences, PROMPT + args.tokens + args.depth, step_tokens)
    }
}

/// A prompt that begins like no other, so that nothing is shared.
fn request(args: &Args, index: usize, speculation: Speculation) -> Request {
    let prompt = (0..PROMPT).map(|i| ((index + i * 7) % args.vocab) as u32).collect();
    Request { speculation, ..Request::new(prompt, greedy(), args.tokens) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_row_for_each_number_of_sequences_with_and_without_drafts() {
        let args = Args {
            concurrency: vec![1, 3],
            tokens: 20,
            vocab: 64,
            acceptance: 1.0,
            depth: 2,
            repeats: 1,
            json: true,
        };
        let rows = measure(&args).await.expect("it cannot fail");
        let shape: Vec<_> = rows.iter().map(|row| (row.sequences, row.speculation)).collect();
        assert_eq!(shape, [(1, false), (1, true), (3, false), (3, true)]);
        // A prefill and nineteen single tokens.
        assert_eq!(rows[0].tokens_per_step, 1.0);
        assert!(rows.iter().all(|row| row.us_per_step > 0.0 && row.model_us_per_step > 0.0));
    }
}
