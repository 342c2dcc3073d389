//! What the engine counts: atomics that anyone may read at any time without asking the engine.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Upper bounds of the tokens-per-step histogram (`vllm:iteration_tokens_total`).
pub const ITERATION_TOKENS_BOUNDS: [u64; 13] =
    [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// Drafts are counted by their place in the draft; what stands further back counts at the last.
pub const ACCEPTED_POSITIONS: usize = 8;

/// For so many tokens in a step it is known what a step costs.
pub const VERIFY_TOKENS: [u64; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// Gauges (set) and counters (only ever grow) of one engine. Each value is exact; two of them read one after
/// the other may belong to different steps.
#[derive(Debug)]
pub struct Stats {
    /// Gauge: sequences with a slot.
    pub running: AtomicU64,
    /// Gauge: requests accepted and not yet in any step.
    pub waiting: AtomicU64,
    /// Gauge: KV blocks that sequences hold; the prefix cache may hold more.
    pub kv_blocks_used: AtomicU64,
    /// Gauge: KV blocks there are; 0 while loading.
    pub kv_blocks: AtomicU64,
    /// Gauge: places of the state pool that sequences hold; the prefix cache has its own beside them.
    pub slots_used: AtomicU64,
    /// Gauge: places of the state pool; 0 while loading.
    pub slots: AtomicU64,
    /// Tokens of prompts that were read to their end, from the prefix cache or not.
    pub prompt_tokens: AtomicU64,
    /// Ids sampled and sent.
    pub generation_tokens: AtomicU64,
    /// Requests that ended by a stop id. What `text` finds in the ids (stop strings) ends as an abort here.
    pub finished_stop: AtomicU64,
    /// Requests that ended at `max_tokens` or the context's end.
    pub finished_length: AtomicU64,
    /// Requests whose stream was dropped before its end.
    pub finished_abort: AtomicU64,
    /// Requests that got `Failed`.
    pub finished_error: AtomicU64,
    /// Requests refused because the queue was full.
    pub rejected: AtomicU64,
    /// Sequences whose logits were not finite.
    pub corrupted: AtomicU64,
    /// Sequences that lost their state to another's failure and are computed again.
    pub recomputed: AtomicU64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: AtomicU64,
    /// Prompt tokens found there.
    pub prefix_hits: AtomicU64,
    /// Sequences that gave their memory back to others and are computed again.
    pub preemptions: AtomicU64,
    /// Times that a sequence was paused for a class before it, its state kept.
    pub paused: AtomicU64,
    /// Requests whose deadline passed.
    pub timed_out: AtomicU64,
    /// Gauge: states that the prefix cache holds.
    pub cache_checkpoints: AtomicU64,
    /// Gauge: KV blocks that the prefix cache holds, shared with sequences or not.
    pub cache_blocks: AtomicU64,
    /// Gauge: what a state and a KV block cost; see [`Self::set_prices`].
    pub state_bytes: AtomicU64,
    pub block_bytes: AtomicU64,
    /// KV blocks copied, so that two sequences can go on differently.
    pub copied_blocks: AtomicU64,
    /// Drafts verified.
    pub drafts: AtomicU64,
    /// Tokens in them.
    pub drafted_tokens: AtomicU64,
    /// Of those, how many stayed.
    pub accepted_tokens: AtomicU64,
    /// The same by place in the draft: its first token at 0.
    pub accepted_at: [AtomicU64; ACCEPTED_POSITIONS],
    /// Gauge: what a step of [`VERIFY_TOKENS`] tokens was measured to take, in microseconds; 0: not measured yet.
    pub verify_us: [AtomicU64; VERIFY_TOKENS.len()],
    /// Steps completed.
    pub steps: AtomicU64,
    /// Time spent in steps, sampling and drafting included, in microseconds.
    pub step_us: AtomicU64,
    /// The same by phase: planning,
    pub plan_us: AtomicU64,
    /// running the network,
    pub forward_us: AtomicU64,
    /// running the drafter,
    pub draft_us: AtomicU64,
    /// and drawing ids.
    pub sample_us: AtomicU64,
    /// Tokens of each step, prefill and decode together.
    pub iteration_tokens: Histogram,
    /// The engine runs no step because somebody asked it not to.
    pub(super) halted: AtomicBool,
    /// Milliseconds from `epoch` to the last sign of life: a step's end, or work arriving at an idle engine.
    heartbeat_ms: AtomicU64,
    epoch: Instant,
}

impl Default for Stats {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self {
            running: zero(),
            waiting: zero(),
            kv_blocks_used: zero(),
            kv_blocks: zero(),
            slots_used: zero(),
            slots: zero(),
            prompt_tokens: zero(),
            generation_tokens: zero(),
            finished_stop: zero(),
            finished_length: zero(),
            finished_abort: zero(),
            finished_error: zero(),
            rejected: zero(),
            corrupted: zero(),
            recomputed: zero(),
            prefix_queries: zero(),
            prefix_hits: zero(),
            preemptions: zero(),
            paused: zero(),
            timed_out: zero(),
            cache_checkpoints: zero(),
            cache_blocks: zero(),
            state_bytes: zero(),
            block_bytes: zero(),
            copied_blocks: zero(),
            drafts: zero(),
            drafted_tokens: zero(),
            accepted_tokens: zero(),
            accepted_at: Default::default(),
            verify_us: Default::default(),
            steps: zero(),
            step_us: zero(),
            plan_us: zero(),
            forward_us: zero(),
            draft_us: zero(),
            sample_us: zero(),
            iteration_tokens: Histogram::new(&ITERATION_TOKENS_BOUNDS),
            halted: AtomicBool::new(false),
            heartbeat_ms: zero(),
            epoch: Instant::now(),
        }
    }
}

impl Stats {
    /// The share of KV blocks in use, 0 … 1; 0 while loading.
    pub fn kv_usage(&self) -> f64 {
        let blocks = self.kv_blocks.load(Relaxed);
        if blocks == 0 { 0.0 } else { self.kv_blocks_used.load(Relaxed) as f64 / blocks as f64 }
    }

    /// Whoever planned the memory says what a state and a KV block cost, so that counts can be told in bytes.
    pub fn set_prices(&self, state_bytes: u64, block_bytes: u64) {
        self.state_bytes.store(state_bytes, Relaxed);
        self.block_bytes.store(block_bytes, Relaxed);
    }

    /// How long the engine has had something to do without finishing a step; `None` when it is idle or halted.
    /// A caller that finds this longer than it likes may call the engine stuck.
    pub fn stalled(&self) -> Option<Duration> {
        let busy = self.running.load(Relaxed) + self.waiting.load(Relaxed) > 0;
        (busy && !self.halted.load(Relaxed)).then(|| {
            let now = self.epoch.elapsed();
            now.saturating_sub(Duration::from_millis(self.heartbeat_ms.load(Relaxed)))
        })
    }

    /// Work is about to arrive. An idle engine has been silent for good reason, so its time starts now.
    pub(super) fn wake(&self) {
        if self.stalled().is_none() {
            self.beat();
        }
    }

    /// Notes a sign of life.
    pub(super) fn beat(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heartbeat_ms.store(now, Relaxed);
    }
}

/// A histogram with fixed upper bounds; the last bucket takes what is above all of them.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// `bounds.len() + 1` counts, not cumulative.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// `bounds` ascending; a value equal to a bound belongs to it.
    pub fn new(bounds: &'static [u64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    pub fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    /// (upper bound, values up to it), cumulative as Prometheus wants them; the total is [`Self::count`].
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut total = 0;
        self.bounds.iter().zip(&self.buckets).map(move |(&bound, bucket)| {
            total += bucket.load(Relaxed);
            (bound, total)
        })
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    pub fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_belongs_to_it() {
        let histogram = Histogram::new(&[1, 8]);
        for value in [0, 1, 2, 8, 9] {
            histogram.observe(value);
        }
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [(1, 2), (8, 4)]);
        assert_eq!((histogram.count(), histogram.sum()), (5, 20));
    }

    #[test]
    fn an_idle_engine_is_never_stalled() {
        let stats = Stats::default();
        assert_eq!(stats.stalled(), None);
        stats.waiting.store(1, Relaxed);
        assert!(stats.stalled().is_some());
    }
}
