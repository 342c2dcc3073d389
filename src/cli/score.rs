//! `score`: the logits of given ids, as JSON: the door for anyone's oracle.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::resident::{BLOCK_LEN, Compute, Resident, greedy, limits};
use crate::backend::StepInputs;
use crate::model::Network;

/// Tokens per prefill step.
const CHUNK: usize = 256;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  echo '{\"ids\": [10, 42, 11], \"gen\": 4}' > in.json\n  \
    ferrotron score --model tiny --input in.json --backend reference --dtype f32")]
pub struct Args {
    /// Preset, folder, .gguf file or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    /// JSON file: {"ids": [token ids], "gen": how many ids to continue greedily}
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Print the perplexity of the ids instead
    #[arg(long)]
    ppl: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Debug, Deserialize)]
struct Input {
    ids: Vec<u32>,
    #[serde(default)]
    r#gen: usize,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let path = args.input.display();
    let json = std::fs::read(&args.input).with_context(|| format!("cannot read {path}"))?;
    let input: Input = serde_json::from_slice(&json)
        .with_context(|| format!("{path} is not {{\"ids\": [..], \"gen\": N}}"))?;
    let resident = Resident::open(&args.model)?;
    let (count, vocab) = (input.ids.len(), resident.config.vocab_size);
    if count == 0 {
        bail!("\"ids\" of {path} is empty: at least one token id is needed");
    }
    if let Some(id) = input.ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("\"ids\" of {path} holds {id}; the vocabulary has {vocab} ids");
    }
    resident.check_context(count, input.r#gen)?;
    let limits = limits(1, count + input.r#gen, CHUNK.min(count));
    let mut network = resident.network(&args.compute, limits, &|_| {})?;
    let out = BufWriter::new(std::io::stdout().lock());
    if args.ppl { perplexity(&mut *network, &input.ids, out) } else { score(&mut *network, &input, out) }
}

/// Prefills in chunks and hands every position's logits to `row`.
fn prefill(
    network: &mut dyn Network,
    ids: &[u32],
    mut row: impl FnMut(usize, &[f32]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let vocab = network.vocab_size();
    let mut past = 0;
    for chunk in ids.chunks(network.limits().step_tokens) {
        let mut inputs = StepInputs::single(chunk, past, BLOCK_LEN);
        inputs.logit_rows = (0..chunk.len() as u32).collect();
        for (i, logits) in network.step(&inputs)?.chunks_exact(vocab).enumerate() {
            row(past + i, logits)?;
        }
        past += chunk.len();
    }
    Ok(())
}

fn score(network: &mut dyn Network, input: &Input, mut out: impl Write) -> anyhow::Result<()> {
    let mut last = Vec::new();
    write!(out, "{{\"logits\": [")?;
    prefill(network, &input.ids, |position, logits| {
        last.clear();
        last.extend_from_slice(logits);
        write!(out, "{}", if position == 0 { "" } else { ", " })?;
        Ok(serde_json::to_writer(&mut out, logits)?)
    })?;
    write!(out, "]")?;
    if input.r#gen > 0 {
        // gen_logits[i] is the row that chose tokens[i]; the first one is the prompt's last.
        let mut tokens = vec![greedy(&last)?];
        write!(out, ", \"gen_logits\": [")?;
        serde_json::to_writer(&mut out, &last)?;
        for i in 1..input.r#gen {
            let past = input.ids.len() + i - 1;
            let inputs = StepInputs::single(&tokens[i - 1..], past, BLOCK_LEN);
            let logits = network.step(&inputs)?;
            tokens.push(greedy(logits)?);
            write!(out, ", ")?;
            serde_json::to_writer(&mut out, logits)?;
        }
        write!(out, "], \"tokens\": ")?;
        serde_json::to_writer(&mut out, &tokens)?;
    }
    writeln!(out, "}}")?;
    Ok(out.flush()?)
}

fn perplexity(network: &mut dyn Network, ids: &[u32], mut out: impl Write) -> anyhow::Result<()> {
    if ids.len() < 2 {
        bail!("perplexity needs at least two ids: the first has nothing before it");
    }
    let mut sum = 0.0f64;
    prefill(network, ids, |position, logits| {
        if let Some(&id) = ids.get(position + 1) {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
            sum -= f64::from(logits[id as usize] - max) - total.ln();
        }
        Ok(())
    })?;
    let count = ids.len() - 1;
    let ppl = (sum / count as f64).exp();
    writeln!(out, "{}", serde_json::json!({ "ppl": ppl, "tokens": count }))?;
    Ok(out.flush()?)
}
