//! What it costs to verify t tokens per sequence in one step, and to draft one.

use std::time::Instant;

use serde::Serialize;

use crate::backend::{DraftInputs, Hidden, SequenceInputs, StepInputs};
use crate::cli::bench::decode::{prompt, push};
use crate::cli::bench::{median, progress};
use crate::cli::table;
use crate::model::Network;

/// Tokens per sequence and step that are compared.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];
pub const WIDEST: usize = 8;
/// Tokens in each sequence before it is measured.
pub const CONTEXT: usize = 64;
/// Steps that are timed together.
const STEPS: usize = 8;

/// Tokens that a sequence may come to: each step advances it by one, and reads drafts beyond.
pub fn capacity(repeats: usize) -> usize {
    CONTEXT + (repeats + 1) * WIDTHS.len() * STEPS + WIDEST + 2
}

#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    pub verify: Vec<VerifyRow>,
    /// Empty without a draft head.
    pub draft: Vec<DraftRow>,
}

/// One step of `sequences` sequences with `tokens` tokens each.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyRow {
    pub sequences: usize,
    pub tokens: usize,
    pub ms: f64,
    /// To the step with one token each.
    pub ratio: f64,
}

/// One pass of the drafter for `sequences` sequences.
#[derive(Debug, Clone, Serialize)]
pub struct DraftRow {
    pub sequences: usize,
    pub ms: f64,
    /// To the step with one token each.
    pub ratio: f64,
}

/// Medians of `repeats`; the widths take turns, so that a slow moment hits all of them.
pub fn measure(
    network: &mut dyn Network,
    concurrency: &[usize],
    repeats: usize,
    json: bool,
) -> anyhow::Result<Cost> {
    let bar = progress("verify", concurrency.len() * (repeats + 1), json)?;
    let mut cost = Cost { verify: Vec::new(), draft: Vec::new() };
    for &sequences in concurrency {
        let mut race = Race::new(network, sequences, capacity(repeats))?;
        let (mut verify, mut draft) = (WIDTHS.map(|_| Vec::new()), Vec::new());
        for repeat in 0..=repeats {
            for (times, width) in verify.iter_mut().zip(WIDTHS) {
                let (step, pass) = race.steps(width)?;
                // The first turn warms caches and branch predictors and is not counted.
                if repeat > 0 {
                    times.push(step);
                    draft.extend(pass);
                }
            }
            bar.inc(1);
        }
        let times = verify.map(median);
        cost.verify.extend(WIDTHS.iter().zip(times).map(|(&tokens, ms)| VerifyRow {
            sequences,
            tokens,
            ms,
            ratio: ms / times[0],
        }));
        if !draft.is_empty() {
            let ms = median(draft);
            cost.draft.push(DraftRow { sequences, ms, ratio: ms / times[0] });
        }
    }
    bar.finish_and_clear();
    Ok(cost)
}

/// Sequences of one length that go on together; none of their drafts is ever accepted.
struct Race<'a> {
    network: &'a mut dyn Network,
    sequences: usize,
    capacity: usize,
    past: usize,
    /// Ids to read: what they are does not matter.
    ids: Vec<u32>,
    inputs: StepInputs,
    entries: DraftInputs,
    drafts: Vec<u32>,
}

impl<'a> Race<'a> {
    fn new(network: &'a mut dyn Network, sequences: usize, capacity: usize) -> anyhow::Result<Self> {
        let ids = prompt(network.vocab_size(), capacity);
        let mut inputs = StepInputs::default();
        for slot in 0..sequences {
            inputs.clear();
            push(&mut inputs, slot, 0, &ids[..CONTEXT], capacity);
            network.step(&inputs)?;
        }
        let (entries, drafts) = (DraftInputs::default(), Vec::with_capacity(sequences));
        Ok(Self { network, sequences, capacity, past: CONTEXT, ids, inputs, entries, drafts })
    }

    /// Milliseconds of a step with `width` tokens per sequence, and of a pass of the drafter after a step of one.
    fn steps(&mut self, width: usize) -> anyhow::Result<(f64, Option<f64>)> {
        let (mut step, mut pass) = (0.0, 0.0);
        let drafts = width == 1 && self.network.can_draft();
        for _ in 0..STEPS {
            self.plan(width);
            let began = Instant::now();
            self.network.step(&self.inputs)?;
            step += began.elapsed().as_secs_f64();
            self.past += 1;
            if drafts {
                self.plan_drafts();
                let began = Instant::now();
                self.network.draft(&self.entries, &mut self.drafts)?;
                pass += began.elapsed().as_secs_f64();
            }
        }
        let millis = |seconds: f64| seconds * 1e3 / STEPS as f64;
        Ok((millis(step), drafts.then(|| millis(pass))))
    }

    fn plan(&mut self, width: usize) {
        self.inputs.clear();
        for slot in 0..self.sequences {
            let tokens = &self.ids[self.past..][..width];
            push(&mut self.inputs, slot, self.past, tokens, self.capacity);
            if let Some(sequence) = self.inputs.sequences.last_mut() {
                sequence.lane = slot as u32;
                sequence.drafts = width as u32 - 1;
            }
        }
        self.inputs.logit_rows.clear();
        self.inputs.logit_rows.extend(0..self.inputs.tokens.len() as u32);
    }

    /// The token after the last step's, for each sequence; the drafter's cache begins with it.
    fn plan_drafts(&mut self) {
        let DraftInputs { step, hidden } = &mut self.entries;
        step.clear();
        hidden.clear();
        for slot in 0..self.sequences {
            let token = self.ids[self.past];
            push(step, slot, self.past, &[token], self.capacity);
            if let Some(SequenceInputs { visible_from, .. }) = step.sequences.last_mut() {
                *visible_from = self.past as u32;
            }
            hidden.push(Hidden::Step(slot as u32));
        }
    }
}

pub fn print(cost: &Cost) {
    let header = ["sequences", "tokens each", "ms", "to one token"];
    let cells = cost.verify.iter().map(|row| {
        let (sequences, tokens) = (row.sequences.to_string(), row.tokens.to_string());
        [sequences, tokens, format!("{:.3}", row.ms), format!("{:.2}", row.ratio)]
    });
    println!("\nVerifying t tokens per sequence in one step");
    table::print(header, &[0, 1, 2, 3], cells);
    if cost.draft.is_empty() {
        println!("\nNo draft head here: drafts can only come from what stood before.");
        return;
    }
    let header = ["sequences", "ms", "to a step of one token"];
    let cells = cost
        .draft
        .iter()
        .map(|row| [row.sequences.to_string(), format!("{:.3}", row.ms), format!("{:.2}", row.ratio)]);
    println!("\nOne pass of the drafter");
    table::print(header, &[0, 1, 2], cells);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::resident::limits;
    use crate::model::Limits;
    use crate::model::null::{Drafter, Null};

    #[test]
    fn every_width_is_measured_at_every_concurrency_and_drafts_once() {
        let sizes = Limits { lanes: 2, drafts: WIDEST - 1, ..limits(2, capacity(1), 2 * CONTEXT) };
        let mut null = Null::new(sizes, 50, Some(Drafter { acceptance: 1.0, seed: 1 }));
        let cost = measure(&mut null, &[1, 2], 1, true).expect("it cannot fail");
        let rows: Vec<_> = cost.verify.iter().map(|row| (row.sequences, row.tokens)).collect();
        assert_eq!(rows, [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (2, 8)]);
        assert_eq!(cost.verify[0].ratio, 1.0);
        assert_eq!(cost.draft.iter().map(|row| row.sequences).collect::<Vec<_>>(), [1, 2]);
        let mut mute = Null::new(sizes, 50, None);
        assert!(measure(&mut mute, &[1], 1, true).expect("it cannot fail").draft.is_empty());
    }
}
