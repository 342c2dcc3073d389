//! What came of the requests, counted by all clients together.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::cli::bench::client::ClientError;

/// More kinds of complaint than this are counted as one, so that a broken server does not fill our own memory.
const FAILURES_MAX: usize = 20;
/// Of a complaint, so much is kept.
const COMPLAINT_CHARS: usize = 200;

/// How a request ended that did what it was sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// Answered with 400, as it should be.
    Refused,
    /// The client left before the end.
    Cancelled,
    /// The request's own time was over.
    TimedOut,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub done: u64,
    pub failed: u64,
    pub refused: u64,
    pub cancelled: u64,
    pub timed_out: u64,
}

#[derive(Debug, Default)]
pub struct Tally(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    counts: Counts,
    kinds: BTreeMap<&'static str, u64>,
    failures: BTreeMap<String, u64>,
}

/// Why a request is counted as failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("what should be refused was answered: {0}")]
    Accepted(String),
    #[error("expected {expected} choices, got {got}")]
    Choices { expected: usize, got: usize },
    #[error("the answer is not of the form that was asked for: {0}")]
    Form(String),
}

impl Tally {
    pub fn add(&self, kind: &'static str, result: &Result<Ending, Fault>) {
        let mut inner = self.lock();
        *inner.kinds.entry(kind).or_default() += 1;
        let counts = &mut inner.counts;
        match result {
            Ok(Ending::Done) => counts.done += 1,
            Ok(Ending::Refused) => counts.refused += 1,
            Ok(Ending::Cancelled) => counts.cancelled += 1,
            Ok(Ending::TimedOut) => counts.timed_out += 1,
            Err(fault) => {
                counts.failed += 1;
                let mut why = format!("{kind}: {fault}").chars().take(COMPLAINT_CHARS).collect::<String>();
                if inner.failures.len() >= FAILURES_MAX && !inner.failures.contains_key(&why) {
                    why = "other".to_owned();
                }
                *inner.failures.entry(why).or_default() += 1;
            }
        }
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    pub fn kinds(&self) -> Vec<(&'static str, u64)> {
        self.lock().kinds.iter().map(|(kind, count)| (*kind, *count)).collect()
    }

    pub fn failures(&self) -> Vec<(String, u64)> {
        self.lock().failures.iter().map(|(why, count)| (why.clone(), *count)).collect()
    }

    /// Counts stay sound whatever a client that panicked was about to count.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_what_was_said_and_never_too_many() {
        let tally = Tally::default();
        tally.add("chat", &Ok(Ending::Done));
        for number in 0..2 * FAILURES_MAX {
            tally.add("chat", &Err(Fault::Form(number.to_string())));
            tally.add("chat", &Err(Fault::Form("0".to_owned())));
        }
        let (counts, failures) = (tally.counts(), tally.failures());
        assert_eq!((counts.done, counts.failed), (1, 4 * FAILURES_MAX as u64));
        assert_eq!(failures.len(), FAILURES_MAX + 1);
        assert_eq!(failures.iter().map(|(_, count)| count).sum::<u64>(), counts.failed);
        assert_eq!(tally.kinds(), [("chat", 1 + counts.failed)]);
    }
}
