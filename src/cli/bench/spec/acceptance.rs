//! How often the draft head is right, by how far ahead it guesses. One sequence at a time, greedily, without the
//! engine, so that nothing decides how deep it may go.

use serde::Serialize;

use crate::backend::{DraftInputs, Hidden, StepInputs};
use crate::cli::resident::{BLOCK_LEN, greedy};
use crate::cli::table;
use crate::model::Network;

/// Guesses at one depth, of those whose earlier guesses were all right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DepthRow {
    /// 1 is the id after the one that was sampled last.
    pub depth: usize,
    pub asked: usize,
    pub right: usize,
}

impl DepthRow {
    fn percent(&self) -> f64 {
        100.0 * self.right as f64 / self.asked.max(1) as f64
    }
}

/// Answers `prompts` and guesses `depth` ids ahead at every step.
pub fn measure(
    network: &mut dyn Network,
    prompts: &[Vec<u32>],
    depth: usize,
    max_tokens: usize,
    stop: &[u32],
) -> anyhow::Result<Vec<DepthRow>> {
    let mut rows: Vec<DepthRow> =
        (1..=depth).map(|depth| DepthRow { depth, ..DepthRow::default() }).collect();
    for prompt in prompts {
        let (ids, guesses) = answer(network, prompt, depth, max_tokens, stop)?;
        for (at, guess) in guesses {
            judge(&mut rows, &guess, ids.get(at..).unwrap_or_default());
        }
    }
    Ok(rows)
}

/// Counts a guess against what came; it is over with the first that is wrong or not known.
fn judge(rows: &mut [DepthRow], guess: &[u32], came: &[u32]) {
    for ((row, guess), came) in rows.iter_mut().zip(guess).zip(came) {
        row.asked += 1;
        if guess != came {
            return;
        }
        row.right += 1;
    }
}

/// Where a guess begins in the ids, and its ids.
type Guesses = Vec<(usize, Vec<u32>)>;

/// All ids, and every guess.
fn answer(
    network: &mut dyn Network,
    prompt: &[u32],
    depth: usize,
    max_tokens: usize,
    stop: &[u32],
) -> anyhow::Result<(Vec<u32>, Guesses)> {
    let (mut ids, mut guesses) = (prompt.to_vec(), Vec::new());
    let mut read = 0;
    for _ in 0..max_tokens {
        let next = greedy(network.step(&StepInputs::single(&ids[read..], read, BLOCK_LEN))?)?;
        ids.push(next);
        guesses.push((ids.len(), guess(network, &ids, read, depth)?));
        if stop.contains(&next) {
            break;
        }
        read = ids.len() - 1;
    }
    Ok((ids, guesses))
}

/// The drafter takes in the ids after `read`, each with the hidden vector of the one before it from the last step,
/// and goes on from its own guesses.
fn guess(network: &mut dyn Network, ids: &[u32], read: usize, depth: usize) -> anyhow::Result<Vec<u32>> {
    let mut guess = Vec::with_capacity(depth);
    let mut drafts = Vec::new();
    let mut inputs = DraftInputs::single(&ids[read + 1..], read + 1, BLOCK_LEN);
    while guess.len() < depth {
        network.draft(&inputs, &mut drafts)?;
        let Some(&id) = drafts.first() else { break };
        let position = ids.len() + guess.len();
        guess.push(id);
        inputs =
            DraftInputs { hidden: vec![Hidden::Draft(0)], ..DraftInputs::single(&[id], position, BLOCK_LEN) };
    }
    Ok(guess)
}

pub fn print(rows: &[DepthRow]) {
    let Some(first) = rows.first() else { return };
    let header = ["depth", "asked", "right", "% of asked", "% of all"];
    let cells = rows.iter().map(|row| {
        let all = 100.0 * row.right as f64 / first.asked.max(1) as f64;
        let (depth, asked, right) = (row.depth.to_string(), row.asked.to_string(), row.right.to_string());
        [depth, asked, right, format!("{:.1}", row.percent()), format!("{all:.1}")]
    });
    println!("\nHow often the draft head is right, greedily");
    table::print(header, &[0, 1, 2, 3, 4], cells);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::resident::limits;
    use crate::model::null::{Drafter, Null};

    fn rows(acceptance: f64) -> Vec<DepthRow> {
        let mut null = Null::new(limits(1, 1200, 64), 1000, Some(Drafter { acceptance, seed: 3 }));
        measure(&mut null, &[vec![1, 2, 3], vec![9]], 3, 1000, &[]).expect("it cannot fail")
    }

    #[test]
    fn a_perfect_drafter_is_right_at_every_depth() {
        for row in rows(1.0) {
            assert_eq!(row.right, row.asked, "{row:?}");
            // The last guesses of an answer look beyond its end.
            assert_eq!(row.asked, 2 * (1000 - row.depth), "{row:?}");
        }
    }

    #[test]
    fn a_guess_counts_only_behind_right_ones() {
        let rows = rows(0.5);
        for pair in rows.windows(2) {
            assert!(pair[1].asked <= pair[0].right, "{rows:?}");
        }
        for row in rows {
            assert!((row.percent() - 50.0).abs() < 10.0, "{row:?}");
        }
    }

    #[test]
    fn a_guess_is_over_with_the_first_that_is_wrong() {
        let mut rows = [DepthRow::default(); 3];
        judge(&mut rows, &[1, 2, 3], &[1, 9, 3]);
        judge(&mut rows, &[1, 2, 3], &[1]);
        assert_eq!(rows.map(|row| (row.asked, row.right)), [(2, 2), (1, 0), (0, 0)]);
    }
}
