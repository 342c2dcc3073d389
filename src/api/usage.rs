//! What an answer cost: tokens in OpenAI's `usage`, time in llama-server's `timings`.

use crate::engine::Timings;
use serde_json::{Value, json};
use std::time::Duration;

/// Tokens and time spent, over all choices so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Each prompt once, however many answers it gets.
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    pub reasoning_tokens: usize,
    /// Of the choices that have ended: the longest times, because choices run side by side, and all drafts.
    pub timings: Timings,
}

impl Usage {
    /// Takes in what one choice spent since it was last asked. Prompts were counted when they were submitted.
    pub fn add(&mut self, spent: Self) {
        self.cached_tokens += spent.cached_tokens;
        self.completion_tokens += spent.completion_tokens;
        self.reasoning_tokens += spent.reasoning_tokens;
        let (all, one) = (&mut self.timings, spent.timings);
        all.queue = all.queue.max(one.queue);
        all.prefill = all.prefill.max(one.prefill);
        all.decode = all.decode.max(one.decode);
        all.drafted += one.drafted;
        all.accepted += one.accepted;
    }

    pub fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        })
    }

    /// The object `timings`, in milliseconds; `prompt_n` are the tokens that were computed, `cache_n` those that
    /// were not.
    pub fn timings_json(self) -> Value {
        let Timings { queue, prefill, decode, drafted, accepted } = self.timings;
        let computed = self.prompt_tokens.saturating_sub(self.cached_tokens);
        json!({
            "queue_ms": milliseconds(queue),
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": milliseconds(prefill),
            "prompt_per_second": rate(computed, prefill),
            "predicted_n": self.completion_tokens,
            "predicted_ms": milliseconds(decode),
            "predicted_per_second": rate(self.completion_tokens, decode),
            "draft_n": drafted,
            "draft_n_accepted": accepted,
        })
    }
}

fn milliseconds(time: Duration) -> f64 {
    // Microseconds are finer than any clock here deserves.
    time.as_micros() as f64 / 1000.0
}

/// 0 for what took no time.
fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(cached: usize, tokens: usize, milliseconds: [u64; 3]) -> Usage {
        let [queue, prefill, decode] = milliseconds.map(Duration::from_millis);
        let timings = Timings { queue, prefill, decode, drafted: 4, accepted: 3 };
        Usage { cached_tokens: cached, completion_tokens: tokens, timings, ..Usage::default() }
    }

    #[test]
    fn choices_side_by_side_add_tokens_and_not_times() {
        let mut usage = Usage { prompt_tokens: 30, ..Usage::default() };
        usage.add(choice(10, 5, [1, 40, 100]));
        usage.add(choice(0, 20, [2, 10, 500]));
        let json = usage.timings_json();
        assert_eq!((&json["prompt_n"], &json["cache_n"]), (&json!(20), &json!(10)));
        assert_eq!((&json["prompt_ms"], &json["prompt_per_second"]), (&json!(40.0), &json!(500.0)));
        assert_eq!((&json["predicted_n"], &json["predicted_per_second"]), (&json!(25), &json!(50.0)));
        assert_eq!((&json["draft_n"], &json["draft_n_accepted"]), (&json!(8), &json!(6)));
        assert_eq!(json["queue_ms"], json!(2.0));
    }

    #[test]
    fn what_took_no_time_has_no_infinite_rate() {
        assert_eq!(choice(0, 1, [0, 0, 0]).timings_json()["predicted_per_second"], json!(0.0));
    }
}
