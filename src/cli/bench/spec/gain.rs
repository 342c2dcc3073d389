//! What drafts gain: the same prompts with and without them, in turns, and the same ids both ways.

use std::sync::Arc;

use anyhow::bail;
use serde::Serialize;

use super::{Args, DEPTH_MAX};
use crate::cli::bench::inside::{Inside, Run, greedy};
use crate::cli::bench::{median, progress};
use crate::cli::resident::{Resident, limits};
use crate::cli::table;
use crate::engine::{EngineConfig, Request, Speculation};
use crate::model::Limits;

/// Tokens of one step at least.
const STEP_TOKENS: usize = 256;

/// One concurrency. Figures are medians of the repeats, ratios medians of each repeat's own.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub sequences: usize,
    /// Output tokens per second of all together, prompts included in the time.
    pub off_tok_per_s: f64,
    pub on_tok_per_s: f64,
    pub speedup: f64,
    /// Tokens per second of one sequence while it is decoded.
    pub off_decode_tok_per_s: f64,
    pub on_decode_tok_per_s: f64,
    pub decode_speedup: f64,
    /// Output tokens per step.
    pub off_tokens_per_step: f64,
    pub on_tokens_per_step: f64,
    /// Of the tokens drafted in all repeats; 0 if none was.
    pub accepted_percent: f64,
}

pub async fn measure(
    args: &Args,
    resident: Resident,
    prompts: Vec<Vec<u32>>,
    stop: Vec<u32>,
    longest: usize,
) -> anyhow::Result<Vec<Row>> {
    let sizes = sizes(args, prompts.len(), longest);
    let config = EngineConfig { max_sequences: args.most(), context_len: longest, ..EngineConfig::default() };
    let engine = Inside::load(config, resident, &args.compute, sizes).await?;
    // Each has a prefix cache of its own: a prompt that was read without drafts left nothing that the draft head knows.
    let requests = |speculation, salt: &str| {
        let request = |prompt: &Vec<u32>| Request {
            stop_ids: stop.clone(),
            speculation,
            cache_salt: Some(salt.into()),
            ..Request::new(prompt.clone(), greedy(), args.max_tokens)
        };
        Arc::new(prompts.iter().map(request).collect::<Vec<_>>())
    };
    let off = requests(Speculation { depth_max: 0, ..Speculation::default() }, "off");
    let on = requests(args.speculation(), "on");
    let bar = progress("on and off", args.concurrency.len() * (args.repeats + 1), args.json)?;
    let mut rows = Vec::new();
    for &sequences in &args.concurrency {
        let mut pairs = Vec::new();
        for repeat in 0..=args.repeats {
            // Who comes first changes, so that a machine that warms up or slows down favours neither.
            let pair = if repeat % 2 == 0 {
                let off = engine.run(&off, sequences).await?;
                (off, engine.run(&on, sequences).await?)
            } else {
                let on = engine.run(&on, sequences).await?;
                (engine.run(&off, sequences).await?, on)
            };
            same(&pair.0, &pair.1, sequences)?;
            if repeat > 0 {
                pairs.push(pair);
            }
            bar.inc(1);
        }
        rows.push(row(sequences, &pairs));
    }
    bar.finish_and_clear();
    engine.stop().await?;
    Ok(rows)
}

/// Places enough that the prefix cache keeps every prompt and answer, of both kinds: what it drops would be read again
/// by one of them and not by the other.
fn sizes(args: &Args, prompts: usize, longest: usize) -> Limits {
    let sequences = args.most();
    let step_tokens = STEP_TOKENS.max(sequences * (1 + DEPTH_MAX));
    let drafts = args.depth.unwrap_or(Speculation::DEPTH_DEFAULT as usize);
    Limits { lanes: sequences, drafts, ..limits(sequences + 4 * prompts, longest + DEPTH_MAX, step_tokens) }
}

/// Drafts change when tokens come, never which.
fn same(off: &Run, on: &Run, sequences: usize) -> anyhow::Result<()> {
    for (prompt, (off, on)) in off.ids.iter().zip(&on.ids).enumerate() {
        if off != on {
            let at = off.iter().zip(on).take_while(|(off, on)| off == on).count();
            bail!(
                "with {sequences} sequences, the answer to prompt {prompt} differs with drafts from token {at} on: \
                 {:?} became {:?}",
                &off[at..off.len().min(at + 4)],
                &on[at..on.len().min(at + 4)]
            );
        }
    }
    Ok(())
}

fn row(sequences: usize, pairs: &[(Run, Run)]) -> Row {
    let off = |of: fn(&Run) -> f64| median(pairs.iter().map(|(off, _)| of(off)).collect());
    let on = |of: fn(&Run) -> f64| median(pairs.iter().map(|(_, on)| of(on)).collect());
    let ratio = |of: fn(&Run) -> f64| median(pairs.iter().map(|(off, on)| of(on) / of(off)).collect());
    let sum = |of: fn(&Run) -> u64| pairs.iter().map(|(_, on)| of(on)).sum::<u64>();
    let (drafted, accepted) = (sum(|run| run.drafted), sum(|run| run.accepted));
    let per_step = |run: &Run| run.tokens() as f64 / run.steps.max(1) as f64;
    Row {
        sequences,
        off_tok_per_s: off(Run::rate),
        on_tok_per_s: on(Run::rate),
        speedup: ratio(Run::rate),
        off_decode_tok_per_s: off(Run::decode_rate),
        on_decode_tok_per_s: on(Run::decode_rate),
        decode_speedup: ratio(Run::decode_rate),
        off_tokens_per_step: off(per_step),
        on_tokens_per_step: on(per_step),
        accepted_percent: 100.0 * accepted as f64 / drafted.max(1) as f64,
    }
}

pub fn print(rows: &[Row]) {
    let header = [
        "sequences",
        "off tok/s",
        "on tok/s",
        "gain",
        "off decode tok/s each",
        "on decode tok/s each",
        "gain",
        "off tokens/step",
        "on tokens/step",
        "accepted %",
    ];
    let cells = rows.iter().map(|row| {
        [
            row.sequences.to_string(),
            format!("{:.1}", row.off_tok_per_s),
            format!("{:.1}", row.on_tok_per_s),
            format!("{:.2}", row.speedup),
            format!("{:.1}", row.off_decode_tok_per_s),
            format!("{:.1}", row.on_decode_tok_per_s),
            format!("{:.2}", row.decode_speedup),
            format!("{:.2}", row.off_tokens_per_step),
            format!("{:.2}", row.on_tokens_per_step),
            format!("{:.1}", row.accepted_percent),
        ]
    });
    println!("\nWithout and with drafts, the same ids both ways");
    table::print(header, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], cells);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn run(ids: &[&[u32]], millis: u64) -> Run {
        let time = Duration::from_millis(millis);
        Run {
            ids: ids.iter().map(|ids| ids.to_vec()).collect(),
            wall: time,
            decode: time / 2,
            steps: 4,
            drafted: 8,
            accepted: 2,
        }
    }

    #[test]
    fn other_ids_with_drafts_are_an_error_that_says_where() {
        let (off, on) = (run(&[&[1], &[1, 2, 3]], 1), run(&[&[1], &[1, 2, 4]], 1));
        assert!(same(&off, &off, 1).is_ok());
        let error = same(&off, &on, 7).unwrap_err().to_string();
        assert!(
            error.contains("7 sequences") && error.contains("prompt 1") && error.contains("token 2"),
            "{error}"
        );
        let short = run(&[&[1], &[1, 2]], 1);
        assert!(same(&off, &short, 1).is_err());
    }

    #[test]
    fn a_gain_is_the_median_of_the_gains() {
        let ids: &[&[u32]] = &[&[1, 2, 3], &[4]];
        let pair = |off, on| (run(ids, off), run(ids, on));
        let row = row(2, &[pair(100, 50), pair(100, 25), pair(300, 100)]);
        assert_eq!((row.speedup, row.decode_speedup), (3.0, 3.0));
        assert_eq!((row.off_tok_per_s, row.on_tokens_per_step, row.accepted_percent), (40.0, 1.0, 25.0));
        // Two tokens come after a first one, in the half of 100 ms.
        assert_eq!(row.off_decode_tok_per_s, 40.0);
    }
}
