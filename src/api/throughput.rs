//! The line that tells every ten seconds how busy an engine is. Scripts read it, so its words are vLLM's.

use super::state::App;
use crate::engine::{ACCEPTED_POSITIONS, Stats};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(10);

/// Logs for ever while an engine is busy; drop the future to stop.
pub async fn log_throughput(app: Arc<App>) {
    let mut before = Vec::new();
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        before.resize(app.keeper.len(), Counts::default());
        for resident in app.residents() {
            let stats = resident.engine.stats();
            let now = Counts::of(stats);
            // The model was loaded anew, and its engine counts from the beginning.
            if now.prompt < before[resident.index].prompt
                || now.generation < before[resident.index].generation
            {
                before[resident.index] = Counts::default();
            }
            let counts = now.since(&before[resident.index]);
            let (running, waiting) = (stats.running.load(Relaxed), stats.waiting.load(Relaxed));
            if counts != Counts::default() || running + waiting > 0 {
                let place = resident.index;
                tracing::info!("{}", counts.line(place, running, waiting, stats.kv_usage()));
                if counts.drafts > 0 {
                    tracing::info!("{}", counts.drafting());
                }
            }
            before[resident.index] = now;
        }
    }
}

/// Counters at one time, or between two.
#[derive(Debug, Clone, Default, PartialEq)]
struct Counts {
    prompt: u64,
    generation: u64,
    queries: u64,
    hits: u64,
    drafts: u64,
    drafted: u64,
    accepted: u64,
    accepted_at: [u64; ACCEPTED_POSITIONS],
}

impl Counts {
    fn of(stats: &Stats) -> Self {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Self {
            prompt: read(&stats.prompt_tokens),
            generation: read(&stats.generation_tokens),
            queries: read(&stats.prefix_queries),
            hits: read(&stats.prefix_hits),
            drafts: read(&stats.drafts),
            drafted: read(&stats.drafted_tokens),
            accepted: read(&stats.accepted_tokens),
            accepted_at: stats.accepted_at.each_ref().map(read),
        }
    }

    fn since(&self, before: &Self) -> Self {
        let mut accepted_at = self.accepted_at;
        accepted_at
            .iter_mut()
            .zip(before.accepted_at)
            .for_each(|(now, before)| *now = now.saturating_sub(before));
        Self {
            prompt: self.prompt.saturating_sub(before.prompt),
            generation: self.generation.saturating_sub(before.generation),
            queries: self.queries.saturating_sub(before.queries),
            hits: self.hits.saturating_sub(before.hits),
            drafts: self.drafts.saturating_sub(before.drafts),
            drafted: self.drafted.saturating_sub(before.drafted),
            accepted: self.accepted.saturating_sub(before.accepted),
            accepted_at,
        }
    }

    fn line(&self, engine: usize, running: u64, waiting: u64, kv_usage: f64) -> String {
        format!(
            "Engine {engine:03}: Avg prompt throughput: {:.1} tokens/s, Avg generation throughput: {:.1} tokens/s, \
             Running: {running} reqs, Waiting: {waiting} reqs, GPU KV cache usage: {:.1}%, Prefix cache hit rate: \
             {:.1}%",
            per_second(self.prompt),
            per_second(self.generation),
            kv_usage * 100.0,
            share(self.hits, self.queries) * 100.0,
        )
    }

    fn drafting(&self) -> String {
        let deepest = self.accepted_at.iter().rposition(|&count| count > 0).map_or(1, |last| last + 1);
        let places: Vec<String> = self.accepted_at[..deepest]
            .iter()
            .map(|&count| format!("{:.3}", share(count, self.drafts)))
            .collect();
        format!(
            "SpecDecoding metrics: Mean acceptance length: {:.2}, Accepted throughput: {:.2} tokens/s, Drafted \
             throughput: {:.2} tokens/s, Accepted: {} tokens, Drafted: {} tokens, Per-position acceptance rate: {}, \
             Avg Draft acceptance rate: {:.1}%",
            1.0 + share(self.accepted, self.drafts),
            per_second(self.accepted),
            per_second(self.drafted),
            self.accepted,
            self.drafted,
            places.join(", "),
            share(self.accepted, self.drafted) * 100.0,
        )
    }
}

fn per_second(count: u64) -> f64 {
    count as f64 / EVERY.as_secs_f64()
}

/// 0 of nothing.
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_words_that_scripts_look_for() {
        let counts = Counts { prompt: 5120, generation: 712, queries: 1000, hits: 402, ..Counts::default() };
        assert_eq!(
            counts.line(0, 1, 0, 0.031),
            "Engine 000: Avg prompt throughput: 512.0 tokens/s, Avg generation throughput: 71.2 tokens/s, \
             Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 3.1%, Prefix cache hit rate: 40.2%"
        );
    }

    #[test]
    fn drafts_are_told_by_place() {
        let mut counts = Counts { drafts: 100, drafted: 200, accepted: 130, ..Counts::default() };
        counts.accepted_at[..2].copy_from_slice(&[90, 40]);
        assert_eq!(
            counts.drafting(),
            "SpecDecoding metrics: Mean acceptance length: 2.30, Accepted throughput: 13.00 tokens/s, Drafted \
             throughput: 20.00 tokens/s, Accepted: 130 tokens, Drafted: 200 tokens, Per-position acceptance rate: \
             0.900, 0.400, Avg Draft acceptance rate: 65.0%"
        );
    }

    #[test]
    fn only_what_is_new_counts() {
        let before = Counts { prompt: 10, accepted: 3, ..Counts::default() };
        let now = Counts { prompt: 25, accepted: 3, ..Counts::default() };
        assert_eq!(now.since(&before), Counts { prompt: 15, ..Counts::default() });
    }
}
