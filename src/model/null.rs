//! A network that computes nothing, so that a bench measures the host alone: the next id is a cheap function of the
//! last id and its position, and its drafter guesses it as often as it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::{Limits, Network, StepError};
use crate::backend::{DraftInputs, StepInputs};

/// See the module. A row of its logits is 1 at the next id and 0 elsewhere.
pub struct Null {
    limits: Limits,
    vocab: usize,
    drafter: Option<Drafter>,
    clock: NullClock,
    /// [logit_rows, V]
    logits: Vec<f32>,
    /// The next id in each row that was written last: all that has to be undone.
    hot: Vec<usize>,
}

/// How the drafter of a [`Null`] guesses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drafter {
    /// How often a guess is right, 0 … 1, independently of the others.
    pub acceptance: f64,
    pub seed: u64,
}

/// Time spent inside a [`Null`]: what a bench subtracts. Clones share one count.
#[derive(Debug, Clone, Default)]
pub struct NullClock(Arc<AtomicU64>);

impl NullClock {
    pub fn spent(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }

    fn add(&self, began: Instant) {
        self.0.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
}

impl Null {
    /// `vocab` (V) is at least 1.
    pub fn new(limits: Limits, vocab: usize, drafter: Option<Drafter>) -> Self {
        Self {
            limits,
            vocab,
            drafter,
            clock: NullClock::default(),
            logits: vec![0.0; limits.logit_rows * vocab],
            hot: Vec::with_capacity(limits.logit_rows),
        }
    }

    pub fn clock(&self) -> NullClock {
        self.clock.clone()
    }

    /// What follows `token` at `position`.
    pub fn next(&self, token: u32, position: u32) -> u32 {
        (mix(u64::from(token) << 32 | u64::from(position)) % self.vocab as u64) as u32
    }

    fn write(&mut self, inputs: &StepInputs) {
        for (row, hot) in self.hot.drain(..).enumerate() {
            self.logits[row * self.vocab + hot] = 0.0;
        }
        let mut places = Places::new(inputs);
        for (row, &index) in inputs.logit_rows.iter().enumerate() {
            let next = self.next(inputs.tokens[index as usize], places.position(index)) as usize;
            self.logits[row * self.vocab + next] = 1.0;
            self.hot.push(next);
        }
    }

    fn guess(&self, drafter: Drafter, token: u32, position: u32) -> u32 {
        let right = self.next(token, position);
        let chance = mix(drafter.seed ^ mix(u64::from(token) << 32 | u64::from(position)));
        // 53 bits are what an f64 holds of it.
        let chance = (chance >> 11) as f64 / (1u64 << 53) as f64;
        if chance < drafter.acceptance { right } else { (right + 1) % self.vocab as u32 }
    }
}

impl Network for Null {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        let began = Instant::now();
        self.write(inputs);
        self.clock.add(began);
        Ok(&self.logits[..inputs.logit_rows.len() * self.vocab])
    }

    fn can_draft(&self) -> bool {
        self.drafter.is_some()
    }

    fn draft(&mut self, inputs: &DraftInputs, drafts: &mut Vec<u32>) -> Result<(), StepError> {
        let began = Instant::now();
        drafts.clear();
        if let Some(drafter) = self.drafter {
            let mut places = Places::new(&inputs.step);
            for &index in &inputs.step.logit_rows {
                drafts.push(self.guess(drafter, inputs.step.tokens[index as usize], places.position(index)));
            }
        }
        self.clock.add(began);
        Ok(())
    }
}

/// Positions of ascending rows, found in one walk over the sequences.
struct Places<'a> {
    inputs: &'a StepInputs,
    sequence: usize,
}

impl<'a> Places<'a> {
    fn new(inputs: &'a StepInputs) -> Self {
        Self { inputs, sequence: 0 }
    }

    fn position(&mut self, index: u32) -> u32 {
        let sequences = &self.inputs.sequences;
        while index >= sequences[self.sequence].first + sequences[self.sequence].count {
            self.sequence += 1;
        }
        let sequence = &sequences[self.sequence];
        sequence.past + (index - sequence.first)
    }
}

/// A step of splitmix64 (Steele, Lea and Flood 2014).
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SequenceInputs;

    const VOCAB: usize = 50;

    fn null(acceptance: f64) -> Null {
        let limits = Limits { step_tokens: 4096, logit_rows: 4096, slots: 2, ..Limits::default() };
        Null::new(limits, VOCAB, Some(Drafter { acceptance, seed: 7 }))
    }

    /// Two sequences, the second of them far along; all rows but the first.
    fn two() -> StepInputs {
        let sequence =
            |first, count, past| SequenceInputs { first, count, past, ..SequenceInputs::default() };
        StepInputs {
            tokens: vec![3, 4, 5, 9],
            sequences: vec![sequence(0, 3, 0), sequence(3, 1, 40)],
            logit_rows: vec![1, 2, 3],
            ..StepInputs::default()
        }
    }

    #[test]
    fn a_row_is_one_at_the_next_id_and_nought_elsewhere() {
        let mut null = null(1.0);
        let expected = [null.next(4, 1), null.next(5, 2), null.next(9, 40)];
        for _ in 0..2 {
            let logits = null.step(&two()).expect("it cannot fail").to_vec();
            for (row, &next) in logits.chunks_exact(VOCAB).zip(&expected) {
                assert_eq!(row.iter().sum::<f32>(), 1.0);
                assert_eq!(row[next as usize], 1.0);
            }
            // What another step wrote before leaves no trace.
            null.step(&StepInputs::single(&[6; 30], 0, 16)).expect("it cannot fail");
        }
    }

    #[test]
    fn drafts_are_right_as_often_as_asked() {
        let tokens: Vec<u32> = (0..4000).map(|i| i % VOCAB as u32).collect();
        let step = StepInputs { logit_rows: (0..4000).collect(), ..StepInputs::single(&tokens, 0, 16) };
        let inputs = DraftInputs { step, ..DraftInputs::default() };
        for acceptance in [0.0, 0.7, 1.0] {
            let (mut null, mut drafts) = (null(acceptance), Vec::new());
            null.draft(&inputs, &mut drafts).expect("it cannot fail");
            let right = (0..)
                .zip(drafts.iter().zip(&tokens))
                .filter(|(at, (draft, token))| **draft == null.next(**token, *at));
            let share = right.count() as f64 / tokens.len() as f64;
            // 0.7 ± four standard deviations of 4000 draws.
            assert!((share - acceptance).abs() < 0.03, "{share} of {acceptance}");
        }
    }

    #[test]
    fn its_time_is_counted() {
        let mut null = null(1.0);
        let clock = null.clock();
        assert_eq!(clock.spent(), Duration::ZERO);
        null.step(&two()).expect("it cannot fail");
        assert!(clock.spent() > Duration::ZERO);
    }
}
