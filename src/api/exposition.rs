//! Prometheus' text format for what the engines count in their own atomics.

use super::roster::Level;
use crate::engine::{Histogram, Info, Stats, VERIFY_TOKENS};
use std::fmt::{Display, Write};
use std::sync::atomic::AtomicU64;
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

/// What the page shows of one engine.
pub struct View<'a> {
    pub labels: Labels,
    /// Zeros until there is an engine.
    pub stats: &'a Stats,
    /// Unknown until the model is loaded.
    pub info: Option<Info>,
    /// 0 until the checkpoint's configuration is read.
    pub max_model_len: usize,
    /// Prompt tokens that the answers reported as cached.
    pub cached_tokens: u64,
    /// No step has finished for longer than the server thinks a step can take.
    pub stalled: bool,
    pub asleep: Option<Level>,
}

impl View<'_> {
    /// Drafts of one sequence in one step; 0: the engine does not speculate.
    fn drafts(&self) -> usize {
        self.info.map_or(0, |info| if info.limits.lanes > 0 { info.limits.drafts } else { 0 })
    }
}

/// `{model_name="…",engine="0"}`, and with more.
pub struct Labels {
    head: String,
}

impl Labels {
    pub fn new(model_name: &str, engine: usize) -> Self {
        Self { head: format!("model_name=\"{}\",engine=\"{engine}\"", escape(model_name)) }
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

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

/// The lines of a page that are about one model or none.
pub fn of_model(page: &str, name: &str) -> String {
    let own = format!("model_name=\"{}\"", escape(name));
    let about = |line: &&str| line.starts_with('#') || !line.contains("model_name=\"") || line.contains(&own);
    page.lines().filter(about).flat_map(|line| [line, "\n"]).collect()
}

/// Everything that the engines know, and zeros for what they never do but dashboards ask for. Samples of one
/// family stand together, as the format demands.
pub fn engines(page: &mut Page, views: &[View]) {
    gauges(page, views);
    counters(page, views);
    by_label(page, views);
    speculation(page, views);
    cache_config(page, views);
}

fn gauges(page: &mut Page, views: &[View]) {
    type Gauge = (&'static str, &'static str, fn(&View) -> f64);
    let gauges: [Gauge; 7] = [
        ("vllm:num_requests_running", "Requests in the current batch.", |v| read(&v.stats.running) as f64),
        ("vllm:num_requests_waiting", "Requests waiting for a place.", |v| read(&v.stats.waiting) as f64),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", |v| v.stats.kv_usage()),
        ("vllm:gpu_cache_usage_perc", "The former name of vllm:kv_cache_usage_perc.", |v| v.stats.kv_usage()),
        ("ferrotron:state_slots_used", "Places of the Mamba state pool in use.", |v| {
            read(&v.stats.slots_used) as f64
        }),
        ("ferrotron:checkpoints", "States that the prefix cache holds.", |v| {
            read(&v.stats.cache_checkpoints) as f64
        }),
        ("ferrotron:stalled", "1 while no step finishes and there is work.", |v| {
            f64::from(u8::from(v.stalled))
        }),
    ];
    for (name, help, value) in gauges {
        page.family(name, "gauge", help);
        for view in views {
            page.sample(name, view.labels.alone(), value(view));
        }
    }
}

fn counters(page: &mut Page, views: &[View]) {
    type Counter = (&'static str, &'static str, fn(&Stats) -> u64);
    let counters: [Counter; 16] = [
        ("vllm:prompt_tokens_total", "Prompt tokens prefilled.", |s| read(&s.prompt_tokens)),
        ("vllm:generation_tokens_total", "Tokens generated.", |s| read(&s.generation_tokens)),
        ("vllm:num_preemptions_total", "Sequences that gave their memory to others.", |s| {
            read(&s.preemptions)
        }),
        ("vllm:corrupted_requests_total", "Requests whose logits were not finite.", |s| read(&s.corrupted)),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", |s| {
            read(&s.prefix_queries)
        }),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", |s| {
            read(&s.prefix_hits)
        }),
        ("vllm:external_prefix_cache_queries_total", "There is no external cache.", |_| 0),
        ("vllm:external_prefix_cache_hits_total", "There is no external cache.", |_| 0),
        ("vllm:mm_cache_queries_total", "The models read text only.", |_| 0),
        ("vllm:mm_cache_hits_total", "The models read text only.", |_| 0),
        ("ferrotron:prefix_hit_tokens_total", "Prompt tokens that were not computed again.", |s| {
            read(&s.prefix_hits)
        }),
        ("ferrotron:steps_total", "Steps completed.", |s| read(&s.steps)),
        ("ferrotron:pauses_total", "Sequences paused for a class before theirs.", |s| read(&s.paused)),
        ("ferrotron:recomputed_total", "Sequences whose state was lost to another's failure.", |s| {
            read(&s.recomputed)
        }),
        ("ferrotron:timeouts_total", "Requests whose deadline passed.", |s| read(&s.timed_out)),
        ("ferrotron:copied_blocks_total", "KV blocks copied where two sequences part.", |s| {
            read(&s.copied_blocks)
        }),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        for view in views {
            page.sample(name, view.labels.alone(), value(view.stats));
        }
    }
}

/// A family whose samples differ by one more label.
fn family<V: Display>(
    page: &mut Page,
    views: &[View],
    (name, kind, help): (&str, &str, &str),
    label: &str,
    samples: impl Fn(&View) -> Vec<(String, V)>,
) {
    page.family(name, kind, help);
    for view in views {
        for (value, sample) in samples(view) {
            page.sample(name, view.labels.with(label, value), sample);
        }
    }
}

fn by_label(page: &mut Page, views: &[View]) {
    let waiting =
        ("vllm:num_requests_waiting_by_reason", "gauge", "Requests waiting, by what they wait for.");
    family(page, views, waiting, "reason", |v| {
        vec![("capacity".into(), read(&v.stats.waiting)), ("deferred".into(), 0)]
    });
    let refused = ("vllm:admission_rejections_total", "counter", "Requests refused before they were queued.");
    family(page, views, refused, "reason", |v| vec![("queue_full".into(), read(&v.stats.rejected))]);
    let asleep = ("vllm:engine_sleep_state", "gauge", "1 for the state the engine is in.");
    family(page, views, asleep, "sleep_state", |v| {
        let states = [
            ("awake", v.asleep.is_none_or(Level::keeps_memory)),
            ("weights_offloaded", v.asleep == Some(Level::Offloaded)),
            ("discard_all", v.asleep == Some(Level::Discarded)),
        ];
        states.map(|(state, is)| (state.into(), u64::from(is))).into()
    });
    let sources = ("vllm:prompt_tokens_by_source_total", "counter", "Prompt tokens by where they came from.");
    family(page, views, sources, "source", |v| {
        let computed = read(&v.stats.prompt_tokens).saturating_sub(v.cached_tokens);
        let cached = v.cached_tokens;
        vec![
            ("local_compute".into(), computed),
            ("local_cache_hit".into(), cached),
            ("external_kv_transfer".into(), 0),
        ]
    });
    let bytes = ("ferrotron:cache_bytes", "gauge", "What the prefix cache holds, by kind.");
    family(page, views, bytes, "kind", |v| {
        let (blocks, states) = (read(&v.stats.cache_blocks), read(&v.stats.cache_checkpoints));
        vec![
            ("kv".into(), blocks * read(&v.stats.block_bytes)),
            ("state".into(), states * read(&v.stats.state_bytes)),
        ]
    });
    let phases = ("ferrotron:step_seconds_sum", "counter", "Time spent in steps, by phase.");
    family(page, views, phases, "phase", |v| {
        let s = v.stats;
        let phases = [
            ("plan", &s.plan_us),
            ("forward", &s.forward_us),
            ("draft", &s.draft_us),
            ("sample", &s.sample_us),
        ];
        phases.map(|(phase, us)| (phase.to_owned(), read(us) as f64 / 1e6)).into()
    });
    let name = "vllm:iteration_tokens_total";
    page.family(name, "histogram", "Tokens of one step.");
    for view in views {
        histogram(page, &view.labels, name, &view.stats.iteration_tokens);
    }
}

/// These series exist only where somebody speculates: their presence is how clients tell.
fn speculation(page: &mut Page, views: &[View]) {
    if views.iter().all(|view| view.drafts() == 0) {
        return;
    }
    type Counter = (&'static str, &'static str, fn(&Stats) -> u64);
    let counters: [Counter; 3] = [
        ("vllm:spec_decode_num_drafts_total", "Drafts verified.", |s| read(&s.drafts)),
        ("vllm:spec_decode_num_draft_tokens_total", "Tokens in them.", |s| read(&s.drafted_tokens)),
        ("vllm:spec_decode_num_accepted_tokens_total", "Of those, how many stayed.", |s| {
            read(&s.accepted_tokens)
        }),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        for view in views.iter().filter(|view| view.drafts() > 0) {
            page.sample(name, view.labels.alone(), value(view.stats));
        }
    }
    let places = ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter", "The same by place.");
    family(page, views, places, "position", |v| {
        let places = v.stats.accepted_at.iter().take(v.drafts()).enumerate();
        places.map(|(place, count)| (place.to_string(), read(count))).collect()
    });
    let cost =
        ("ferrotron:verify_us", "gauge", "Measured time of a step of so many tokens; 0: not measured.");
    family(page, views, cost, "tokens", |v| {
        let costs = VERIFY_TOKENS.iter().zip(&v.stats.verify_us).filter(|_| v.drafts() > 0);
        costs.map(|(tokens, us)| (tokens.to_string(), read(us))).collect()
    });
}

fn cache_config(page: &mut Page, views: &[View]) {
    let name = "vllm:cache_config_info";
    page.family(name, "gauge", "How the cache is laid out.");
    for view in views {
        let limits = view.info.map(|info| info.limits).unwrap_or_default();
        let caches = view.info.is_some_and(|info| info.limits.slots > info.max_sequences);
        let config = format!(
            "{{{},block_size=\"{}\",cache_dtype=\"{}\",num_gpu_blocks=\"{}\",num_cpu_blocks=\"0\",\
             enable_prefix_caching=\"{}\",sliding_window=\"None\",max_model_len=\"{}\"}}",
            view.labels.head,
            limits.block_len,
            format!("{:?}", limits.kv).to_ascii_lowercase(),
            limits.blocks,
            if caches { "True" } else { "False" },
            view.max_model_len,
        );
        page.sample(name, config, 1);
    }
}

fn histogram(page: &mut Page, labels: &Labels, name: &str, histogram: &Histogram) {
    let bucket = format!("{name}_bucket");
    for (bound, count) in histogram.cumulative() {
        page.sample(&bucket, labels.with("le", format_args!("{bound}.0")), count);
    }
    page.sample(&bucket, labels.with("le", "+Inf"), histogram.count());
    page.sample(&format!("{name}_sum"), labels.alone(), histogram.sum());
    page.sample(&format!("{name}_count"), labels.alone(), histogram.count());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Limits;

    fn page(drafts: [usize; 2], stats: &[Stats; 2]) -> String {
        let mut page = Page::new(String::new());
        let views: Vec<View> = ["front", "behind"]
            .iter()
            .zip(stats)
            .enumerate()
            .map(|(engine, (name, stats))| {
                let limits = Limits { lanes: 1, drafts: drafts[engine], ..Limits::default() };
                View {
                    labels: Labels::new(name, engine),
                    stats,
                    info: Some(Info { vocab_size: 9, limits, context_len: 9, max_sequences: 1 }),
                    max_model_len: 9,
                    cached_tokens: 0,
                    stalled: false,
                    asleep: None,
                }
            })
            .collect();
        engines(&mut page, &views);
        page.into_text()
    }

    #[test]
    fn samples_of_a_family_stand_together_once_per_engine() {
        let text = page([2, 1], &Default::default());
        let mut seen = std::collections::HashSet::new();
        let mut family = "";
        for line in text.lines() {
            if let Some(head) = line.strip_prefix("# TYPE ") {
                family = head.split(' ').next().unwrap_or_default();
                assert!(seen.insert(family), "{family} twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} below {family}");
                assert!(
                    seen.insert(line.rsplit_once(' ').map_or(line, |(series, _)| series)),
                    "{line} twice"
                );
            }
        }
        for engine in ["{model_name=\"front\",engine=\"0\"}", "{model_name=\"behind\",engine=\"1\"}"] {
            assert!(text.contains(&format!("\nvllm:num_requests_running{engine} 0\n")), "{text}");
        }
    }

    #[test]
    fn counts_of_drafts_are_shown_where_somebody_drafts() {
        let stats: [Stats; 2] = Default::default();
        stats[0].accepted_at[1].store(7, Relaxed);
        let text = page([2, 0], &stats);
        let places: Vec<&str> = text.lines().filter(|line| line.contains("per_pos_total{")).collect();
        assert_eq!(
            places,
            [0, 1].map(|place| format!(
                "vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name=\"front\",engine=\"0\",\
                 position=\"{place}\"}} {}",
                place * 7
            ))
        );
        assert!(!page([0, 0], &stats).contains("spec_decode"));
    }

    #[test]
    fn the_cache_is_told_in_bytes() {
        let stats: [Stats; 2] = Default::default();
        stats[1].set_prices(1000, 10);
        stats[1].cache_checkpoints.store(3, Relaxed);
        stats[1].cache_blocks.store(5, Relaxed);
        let text = page([0, 0], &stats);
        for (kind, bytes) in [("state", 3000), ("kv", 50)] {
            let line = format!(
                "ferrotron:cache_bytes{{model_name=\"behind\",engine=\"1\",kind=\"{kind}\"}} {bytes}\n"
            );
            assert!(text.contains(&line), "{text}");
        }
    }
}
