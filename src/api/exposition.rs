//! Prometheus' text format for what the engine counts in its own atomics.

use crate::engine::{Histogram, Stats};
use std::fmt::{Display, Write};
use std::sync::atomic::Ordering::Relaxed;

/// A growing page of metrics.
pub struct Page {
    text: String,
}

impl Page {
    pub fn new(text: String) -> Self {
        Self { text }
    }

    pub fn into_text(self) -> String {
        self.text
    }

    /// The head of a family: `kind` is gauge, counter or histogram.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    pub fn sample(&mut self, name: &str, labels: impl Display, value: impl Display) {
        self.line(format_args!("{name}{labels} {value}"));
    }

    fn line(&mut self, line: std::fmt::Arguments) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// `{model_name="…",engine="0"}`, and with more.
pub struct Labels {
    head: String,
}

impl Labels {
    pub fn new(model_name: &str) -> Self {
        Self { head: format!("model_name=\"{}\",engine=\"0\"", escape(model_name)) }
    }

    fn alone(&self) -> String {
        format!("{{{}}}", self.head)
    }

    fn with(&self, name: &str, value: impl Display) -> String {
        format!("{{{},{name}=\"{}\"}}", self.head, escape(&value.to_string()))
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Everything that the engine knows, and zeros for what it does not do yet but dashboards ask for.
pub fn engine(page: &mut Page, labels: &Labels, stats: &Stats, max_model_len: Option<usize>) {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
    let usage = stats.kv_usage();
    let gauges: [(&str, &str, f64); 4] = [
        ("vllm:num_requests_running", "Requests in the current batch.", read(&stats.running) as f64),
        ("vllm:num_requests_waiting", "Requests waiting for a place.", read(&stats.waiting) as f64),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage),
        ("vllm:gpu_cache_usage_perc", "The former name of vllm:kv_cache_usage_perc.", usage),
    ];
    for (name, help, value) in gauges {
        page.family(name, "gauge", help);
        page.sample(name, labels.alone(), value);
    }
    let name = "vllm:num_requests_waiting_by_reason";
    page.family(name, "gauge", "Requests waiting, by what they wait for.");
    page.sample(name, labels.with("reason", "capacity"), read(&stats.waiting));
    page.sample(name, labels.with("reason", "deferred"), 0);

    let counters: [(&str, &str, u64); 11] = [
        ("vllm:prompt_tokens_total", "Prompt tokens prefilled.", read(&stats.prompt_tokens)),
        ("vllm:generation_tokens_total", "Tokens generated.", read(&stats.generation_tokens)),
        ("vllm:num_preemptions_total", "Sequences computed again.", read(&stats.recomputed)),
        ("vllm:corrupted_requests_total", "Requests whose logits were not finite.", read(&stats.corrupted)),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", 0),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", 0),
        ("vllm:external_prefix_cache_queries_total", "There is no external cache.", 0),
        ("vllm:external_prefix_cache_hits_total", "There is no external cache.", 0),
        ("vllm:mm_cache_queries_total", "The models read text only.", 0),
        ("vllm:mm_cache_hits_total", "The models read text only.", 0),
        ("ferrotron:steps_total", "Steps completed.", read(&stats.steps)),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        page.sample(name, labels.alone(), value);
    }
    let name = "vllm:admission_rejections_total";
    page.family(name, "counter", "Requests refused before they were queued.");
    page.sample(name, labels.with("reason", "queue_full"), read(&stats.rejected));

    histogram(page, labels, "vllm:iteration_tokens_total", "Tokens of one step.", &stats.iteration_tokens);

    let name = "vllm:engine_sleep_state";
    page.family(name, "gauge", "1 for the state the engine is in.");
    for (state, value) in [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)] {
        page.sample(name, labels.with("sleep_state", state), value);
    }
    let name = "vllm:cache_config_info";
    page.family(name, "gauge", "How the cache is laid out.");
    let config = format!(
        "{{{},num_gpu_blocks=\"{}\",num_cpu_blocks=\"0\",enable_prefix_caching=\"False\",sliding_window=\"None\",\
         max_model_len=\"{}\"}}",
        labels.head,
        read(&stats.kv_blocks),
        max_model_len.unwrap_or(0),
    );
    page.sample(name, config, 1);
    let name = "ferrotron:state_slots_used";
    page.family(name, "gauge", "Places of the Mamba state pool in use.");
    page.sample(name, labels.alone(), read(&stats.slots_used));
}

/// Where prompt tokens came from; `cached` of them from the cache.
pub fn prompt_sources(page: &mut Page, labels: &Labels, stats: &Stats, cached: u64) {
    let name = "vllm:prompt_tokens_by_source_total";
    page.family(name, "counter", "Prompt tokens by where they came from.");
    let computed = stats.prompt_tokens.load(Relaxed).saturating_sub(cached);
    page.sample(name, labels.with("source", "local_compute"), computed);
    page.sample(name, labels.with("source", "local_cache_hit"), cached);
    page.sample(name, labels.with("source", "external_kv_transfer"), 0);
}

fn histogram(page: &mut Page, labels: &Labels, name: &str, help: &str, histogram: &Histogram) {
    page.family(name, "histogram", help);
    let bucket = format!("{name}_bucket");
    for (bound, count) in histogram.cumulative() {
        page.sample(&bucket, labels.with("le", format_args!("{bound}.0")), count);
    }
    page.sample(&bucket, labels.with("le", "+Inf"), histogram.count());
    page.sample(&format!("{name}_sum"), labels.alone(), histogram.sum());
    page.sample(&format!("{name}_count"), labels.alone(), histogram.count());
}
