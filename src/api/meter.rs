//! What is counted of each request, and who counts it: the meter that follows an answer to its end.
//!
//! Requests are counted where their text ends (a stop string is found here, not in the engine); tokens and steps
//! where they are computed.

use super::metrics::Maker;
use crate::engine::Timings;
use prometheus::{Histogram, IntCounter, IntCounterVec};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_SECONDS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// 1, 2, 5, 10, 20, 50, … up to the largest context of the family.
const TOKEN_COUNTS: [f64; 19] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
const CHOICE_COUNTS: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
/// How a request ended; the label `finished_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Stop,
    Length,
    /// The client went away.
    Abort,
    Error,
}

impl Ending {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// The counters of the requests to one model.
pub struct ModelMetrics {
    in_flight: AtomicUsize,
    success: IntCounterVec,
    cached_tokens: IntCounter,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_generation_tokens: Histogram,
    params_max_tokens: Histogram,
    params_n: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    /// The name that inter-token latency had before.
    inter_token_alias: Histogram,
    time_per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
}

impl ModelMetrics {
    /// Registers all of them with 0.
    pub fn new(maker: &Maker) -> Self {
        let success =
            maker.counters("vllm:request_success_total", "Requests by how they ended.", "finished_reason");
        for reason in Ending::ALL.map(Ending::label).into_iter().chain(["repetition"]) {
            success.with_label_values(&[reason]);
        }
        Self {
            in_flight: AtomicUsize::new(0),
            success,
            cached_tokens: maker
                .counter("vllm:prompt_tokens_cached_total", "Prompt tokens found in the cache."),
            prompt_tokens: maker.histogram("vllm:request_prompt_tokens", "Prompt tokens.", &TOKEN_COUNTS),
            generation_tokens: maker.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens.",
                &TOKEN_COUNTS,
            ),
            max_generation_tokens: maker.histogram(
                "vllm:request_max_num_generation_tokens",
                "The longest of a request's answers, in tokens.",
                &TOKEN_COUNTS,
            ),
            params_max_tokens: maker.histogram(
                "vllm:request_params_max_tokens",
                "max_tokens as asked.",
                &TOKEN_COUNTS,
            ),
            params_n: maker.histogram("vllm:request_params_n", "n as asked.", &CHOICE_COUNTS),
            first_token: maker.histogram(
                "vllm:time_to_first_token_seconds",
                "From arrival to the first sampled token.",
                &FIRST_TOKEN_SECONDS,
            ),
            inter_token: maker.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two steps that gave a request tokens.",
                &TOKEN_SECONDS,
            ),
            inter_token_alias: maker.histogram(
                "vllm:time_per_output_token_seconds",
                "The former name of vllm:inter_token_latency_seconds.",
                &TOKEN_SECONDS,
            ),
            time_per_token: maker.histogram(
                "vllm:request_time_per_output_token_seconds",
                "A finished request's mean time per token after its first.",
                &TOKEN_SECONDS,
            ),
            end_to_end: maker.histogram(
                "vllm:e2e_request_latency_seconds",
                "From arrival to the end.",
                &REQUEST_SECONDS,
            ),
            queue: maker.histogram(
                "vllm:request_queue_time_seconds",
                "Until the first step.",
                &REQUEST_SECONDS,
            ),
            prefill: maker.histogram(
                "vllm:request_prefill_time_seconds",
                "From the first step to the first token.",
                &REQUEST_SECONDS,
            ),
            decode: maker.histogram(
                "vllm:request_decode_time_seconds",
                "From the first token to the last.",
                &REQUEST_SECONDS,
            ),
            inference: maker.histogram(
                "vllm:request_inference_time_seconds",
                "Prefill and decode.",
                &REQUEST_SECONDS,
            ),
        }
    }

    /// Requests being answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Prompt tokens that the prefix cache held.
    pub fn cached_tokens(&self) -> u64 {
        self.cached_tokens.get()
    }
}

/// Follows one answer from arrival to its end, whichever comes. Dropped before an end, it counts an abort.
pub struct RequestMeter {
    metrics: Arc<ModelMetrics>,
    arrived: Instant,
    /// Queue and prefill, once the prompt is read.
    timings: Option<Timings>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    generated: usize,
    ended: bool,
}

impl RequestMeter {
    pub fn new(
        metrics: Arc<ModelMetrics>,
        arrived: Instant,
        prompt_tokens: usize,
        max_tokens: Option<usize>,
        n: usize,
    ) -> Self {
        metrics.in_flight.fetch_add(1, Ordering::Relaxed);
        metrics.prompt_tokens.observe(prompt_tokens as f64);
        metrics.params_n.observe(n as f64);
        if let Some(max_tokens) = max_tokens {
            metrics.params_max_tokens.observe(max_tokens as f64);
        }
        Self {
            metrics,
            arrived,
            timings: None,
            first_token: None,
            last_token: None,
            generated: 0,
            ended: false,
        }
    }

    /// The prompt is read; `timings` are the engine's so far. Decoding is timed here, because a request whose
    /// text ends it never hears of its end from the engine.
    pub fn started(&mut self, cached_tokens: usize, timings: Timings) {
        self.metrics.cached_tokens.inc_by(cached_tokens as u64);
        self.timings = Some(timings);
    }

    pub fn token(&mut self) {
        let now = Instant::now();
        match self.last_token {
            None => {
                self.first_token = Some(now);
                self.metrics.first_token.observe((now - self.arrived).as_secs_f64());
            }
            Some(last) => {
                let gap = (now - last).as_secs_f64();
                self.metrics.inter_token.observe(gap);
                self.metrics.inter_token_alias.observe(gap);
            }
        }
        self.last_token = Some(now);
        self.generated += 1;
    }

    /// Queue and prefill as the engine told, decoding as it was seen here; without drafts, of which the engine tells
    /// only those that it ends itself.
    pub fn timings(&self) -> Timings {
        let decode = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) => last - first,
            _ => Duration::ZERO,
        };
        Timings { decode, ..self.timings.unwrap_or_default() }
    }

    pub fn ended(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let metrics = &self.metrics;
        metrics.success.with_label_values(&[ending.label()]).inc();
        metrics.generation_tokens.observe(self.generated as f64);
        metrics.max_generation_tokens.observe(self.generated as f64);
        metrics.end_to_end.observe(self.arrived.elapsed().as_secs_f64());
        if let (Some(timings), Some(first), Some(last)) = (self.timings, self.first_token, self.last_token) {
            let (prefill, decode) = (timings.prefill.as_secs_f64(), (last - first).as_secs_f64());
            metrics.queue.observe(timings.queue.as_secs_f64());
            metrics.prefill.observe(prefill);
            metrics.decode.observe(decode);
            metrics.inference.observe(prefill + decode);
            if self.generated > 1 {
                metrics.time_per_token.observe(decode / (self.generated - 1) as f64);
            }
        }
    }

    /// The engine did not take it: that is counted there, and no answer ended here.
    pub fn refused(mut self) {
        self.ended = true;
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        self.ended(Ending::Abort);
        self.metrics.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
