//! What a load came to: the figures, the block and the JSON of `vllm bench serve`.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::load::Outcome;

/// Width of the block.
const WIDTH: usize = 50;

/// One of the times that are measured for each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Metric {
    Ttft,
    Tpot,
    Itl,
    E2el,
}

impl Metric {
    pub const ALL: [Self; 4] = [Self::Ttft, Self::Tpot, Self::Itl, Self::E2el];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to First Token",
            Self::Tpot => "Time per Output Token (excl. 1st token)",
            Self::Itl => "Inter-token Latency",
            Self::E2el => "End-to-end Latency",
        }
    }

    /// Seconds, of one request that succeeded.
    fn of(self, outcome: &Outcome) -> Vec<f64> {
        match self {
            Self::Ttft => vec![outcome.ttft],
            Self::Tpot => outcome.tpot().into_iter().collect(),
            Self::Itl => outcome.gaps.clone(),
            Self::E2el => vec![outcome.latency],
        }
    }
}

/// Milliseconds; 0 where nothing was measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    pub mean: f64,
    pub median: f64,
    pub std: f64,
    /// Ascending.
    values: Vec<f64>,
}

impl Summary {
    fn new(seconds: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = seconds.map(|value| value * 1e3).collect();
        values.sort_by(f64::total_cmp);
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Self { mean, median: percentile(&values, 50.0), std: variance.sqrt(), values }
    }

    pub fn percentile(&self, percent: f64) -> f64 {
        percentile(&self.values, percent)
    }
}

/// Of ascending values, linear between the two that lie nearest; 0 of none.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = percent.clamp(0.0, 100.0) / 100.0 * last as f64;
    let (below, share) = (place.floor() as usize, place.fract());
    sorted[below] + share * (sorted[(below + 1).min(last)] - sorted[below])
}

/// What a request must keep to count as good, in milliseconds.
pub type Goals = Vec<(Metric, f64)>;

/// `ttft:200`. Errors say what is expected.
pub fn goal(text: &str) -> Result<(Metric, f64), String> {
    let wrong = || format!("expected ttft, tpot or e2el with milliseconds, such as ttft:200, got `{text}`");
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let value = value.parse::<f64>().ok().filter(|value| *value >= 0.0).ok_or_else(wrong)?;
    let metric = match name {
        "ttft" => Metric::Ttft,
        "tpot" => Metric::Tpot,
        "e2el" => Metric::E2el,
        _ => return Err(wrong()),
    };
    Ok((metric, value))
}

/// What speculation did, from the server's counters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drafts {
    pub drafts: f64,
    pub tokens: f64,
    pub accepted: f64,
    /// Accepted, by how deep in their draft.
    pub by_position: Vec<f64>,
}

impl Drafts {
    /// From the text of `/metrics`; None if the server has no such counters.
    pub fn read(metrics: &str) -> Option<Self> {
        let total = |name: &str| {
            let series = metrics.lines().filter_map(|line| value_of(line, name));
            series.map(|(_, value)| value).reduce(|sum, value| sum + value)
        };
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos";
        let mut by_position = Vec::new();
        for (labels, value) in metrics.lines().filter_map(|line| value_of(line, name)) {
            let position = labels.split("position=\"").nth(1).and_then(|rest| rest.split('"').next());
            let Some(position) = position.and_then(|text| text.parse::<usize>().ok()) else { continue };
            // No drafter goes deeper.
            if position < 1024 {
                by_position.resize(by_position.len().max(position + 1), 0.0);
                by_position[position] += value;
            }
        }
        Some(Self {
            drafts: total("vllm:spec_decode_num_drafts")?,
            tokens: total("vllm:spec_decode_num_draft_tokens")?,
            accepted: total("vllm:spec_decode_num_accepted_tokens")?,
            by_position,
        })
    }

    /// What came since `before`; None if nothing was drafted.
    pub fn since(&self, before: &Self) -> Option<Self> {
        let earlier = |i: usize| before.by_position.get(i).copied().unwrap_or(0.0);
        let now = Self {
            drafts: self.drafts - before.drafts,
            tokens: self.tokens - before.tokens,
            accepted: self.accepted - before.accepted,
            by_position: (0..).zip(&self.by_position).map(|(i, value)| value - earlier(i)).collect(),
        };
        (now.drafts > 0.0).then_some(now)
    }

    /// In percent.
    pub fn rate(&self) -> f64 {
        100.0 * self.accepted / self.tokens.max(1.0)
    }

    pub fn length(&self) -> f64 {
        1.0 + self.accepted / self.drafts.max(1.0)
    }

    /// In percent.
    fn rates(&self) -> impl Iterator<Item = f64> {
        self.by_position.iter().map(|accepted| 100.0 * accepted / self.drafts.max(1.0))
    }
}

/// (labels, value) of a line of `/metrics` that holds `name`, with or without `_total`.
fn value_of<'a>(line: &'a str, name: &str) -> Option<(&'a str, f64)> {
    let rest = line.strip_prefix(name)?;
    let rest = rest.strip_prefix("_total").unwrap_or(rest);
    if !rest.starts_with(['{', ' ']) {
        return None;
    }
    let (labels, value) = rest.rsplit_once(' ')?;
    Some((labels, value.parse().ok()?))
}

/// How a load was asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    pub backend: String,
    pub dataset: String,
    pub model: String,
    pub rate: f64,
    pub burstiness: f64,
    pub concurrency: Option<usize>,
    pub goals: Goals,
    pub shown: Vec<Metric>,
    pub percentiles: Vec<f64>,
}

/// One load and its figures.
#[derive(Debug, Clone)]
pub struct Report {
    asked: Asked,
    /// Seconds.
    duration: f64,
    pub completed: usize,
    pub failed: usize,
    input: usize,
    output: usize,
    cached: usize,
    good: usize,
    peak_tokens: f64,
    peak_concurrency: usize,
    times: [Summary; 4],
    drafts: Option<Drafts>,
}

impl Report {
    pub fn new(asked: Asked, outcomes: &[Outcome], duration: f64, drafts: Option<Drafts>) -> Self {
        let done: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.error.is_empty()).collect();
        let sum = |of: fn(&Outcome) -> usize| done.iter().map(|outcome| of(outcome)).sum();
        let good = |outcome: &&&Outcome| {
            asked
                .goals
                .iter()
                .all(|(metric, limit)| metric.of(outcome).iter().all(|value| value * 1e3 <= *limit))
        };
        Self {
            duration: duration.max(1e-9),
            completed: done.len(),
            failed: outcomes.len() - done.len(),
            input: sum(|outcome| outcome.prompt_tokens),
            output: sum(|outcome| outcome.output_tokens),
            cached: sum(|outcome| outcome.cached_tokens),
            good: done.iter().filter(good).count(),
            peak_tokens: peak_tokens(&done),
            peak_concurrency: peak_concurrency(outcomes),
            times: Metric::ALL.map(|metric| Summary::new(done.iter().flat_map(|outcome| metric.of(outcome)))),
            drafts,
            asked,
        }
    }

    pub fn concurrency(&self) -> Option<usize> {
        self.asked.concurrency
    }

    pub fn times(&self, metric: Metric) -> &Summary {
        &self.times[metric as usize]
    }

    /// Tokens per second.
    pub fn output_rate(&self) -> f64 {
        self.output as f64 / self.duration
    }

    /// As `vllm bench serve` prints it.
    pub fn block(&self) -> String {
        let mut block = Block(String::new());
        block.title(" Serving Benchmark Result ", '=');
        block.count("Successful requests:", self.completed);
        block.count("Failed requests:", self.failed);
        if let Some(concurrency) = self.asked.concurrency {
            block.count("Maximum request concurrency:", concurrency);
        }
        if self.asked.rate.is_finite() {
            block.number("Request rate configured (RPS):", self.asked.rate);
        }
        block.number("Benchmark duration (s):", self.duration);
        block.count("Total input tokens:", self.input);
        block.count("Total generated tokens:", self.output);
        block.number("Request throughput (req/s):", self.completed as f64 / self.duration);
        if !self.asked.goals.is_empty() {
            block.number("Request goodput (req/s):", self.good as f64 / self.duration);
        }
        block.number("Output token throughput (tok/s):", self.output_rate());
        block.number("Peak output token throughput (tok/s):", self.peak_tokens);
        block.count("Peak concurrent requests:", self.peak_concurrency);
        block.number("Total token throughput (tok/s):", (self.input + self.output) as f64 / self.duration);
        for metric in &self.asked.shown {
            let (times, name) = (self.times(*metric), metric.name().to_uppercase());
            block.title(metric.title(), '-');
            block.number(&format!("Mean {name} (ms):"), times.mean);
            block.number(&format!("Median {name} (ms):"), times.median);
            for &percent in &self.asked.percentiles {
                block.number(&format!("P{percent} {name} (ms):"), times.percentile(percent));
            }
        }
        if let Some(drafts) = &self.drafts {
            block.title("Speculative Decoding", '-');
            block.number("Acceptance rate (%):", drafts.rate());
            block.number("Acceptance length:", drafts.length());
            block.count("Drafts:", drafts.drafts as usize);
            block.count("Draft tokens:", drafts.tokens as usize);
            block.count("Accepted tokens:", drafts.accepted as usize);
            block.0.push_str("Per-position acceptance (%):\n");
            for (position, rate) in drafts.rates().enumerate() {
                block.number(&format!("  Position {position}:"), rate);
            }
        }
        block.title("", '=');
        block.0
    }

    /// The fields of `vllm bench serve --save-result`, and `total_cached_tokens`.
    pub fn json(&self, date: &str) -> Map<String, Value> {
        let asked = &self.asked;
        // JSON has no infinity; vLLM writes the word.
        let rate = if asked.rate.is_finite() { json!(asked.rate) } else { json!("inf") };
        let value = json!({
            "date": date,
            "endpoint_type": asked.backend,
            "backend": asked.backend,
            "label": null,
            "dataset_name": asked.dataset,
            "model_id": asked.model,
            "tokenizer_id": asked.model,
            "num_prompts": self.completed + self.failed,
            "request_rate": rate,
            "burstiness": asked.burstiness,
            "max_concurrency": asked.concurrency,
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.input,
            "total_output_tokens": self.output,
            "total_cached_tokens": self.cached,
            "request_throughput": self.completed as f64 / self.duration,
            "request_goodput": (!asked.goals.is_empty()).then_some(self.good as f64 / self.duration),
            "output_throughput": self.output_rate(),
            "total_token_throughput": (self.input + self.output) as f64 / self.duration,
            "max_output_tokens_per_s": self.peak_tokens,
            "max_concurrent_requests": self.peak_concurrency,
        });
        let mut map = value.as_object().cloned().unwrap_or_default();
        for metric in Metric::ALL {
            let (times, name) = (self.times(metric), metric.name());
            let mut add = |what: &str, value: f64| map.insert(format!("{what}_{name}_ms"), json!(value));
            add("mean", times.mean);
            add("median", times.median);
            add("std", times.std);
            for &percent in &asked.percentiles {
                add(&format!("p{percent}"), times.percentile(percent));
            }
        }
        if let Some(drafts) = &self.drafts {
            map.extend([
                ("spec_decode_acceptance_rate".to_owned(), json!(drafts.rate())),
                ("spec_decode_acceptance_length".to_owned(), json!(drafts.length())),
                ("spec_decode_num_drafts".to_owned(), json!(drafts.drafts)),
                ("spec_decode_draft_tokens".to_owned(), json!(drafts.tokens)),
                ("spec_decode_accepted_tokens".to_owned(), json!(drafts.accepted)),
                ("spec_decode_per_position_acceptance_rates".to_owned(), drafts.rates().collect()),
            ]);
        }
        map
    }
}

/// `--save-detailed`: lists with an entry per request.
pub fn details(outcomes: &[Outcome]) -> Map<String, Value> {
    let list = |of: fn(&Outcome) -> Value| outcomes.iter().map(of).collect::<Value>();
    Map::from_iter([
        ("input_lens".to_owned(), list(|outcome| json!(outcome.prompt_tokens))),
        ("output_lens".to_owned(), list(|outcome| json!(outcome.output_tokens))),
        ("start_times".to_owned(), list(|outcome| json!(outcome.sent))),
        ("ttfts".to_owned(), list(|outcome| json!(outcome.ttft))),
        ("itls".to_owned(), list(|outcome| json!(outcome.gaps))),
        ("generated_texts".to_owned(), list(|outcome| json!(outcome.text))),
        ("errors".to_owned(), list(|outcome| json!(outcome.error))),
    ])
}

/// Tokens of the busiest second: each answer's tokens are spread evenly over its chunks.
fn peak_tokens(outcomes: &[&Outcome]) -> f64 {
    let mut seconds: Vec<f64> = Vec::new();
    for outcome in outcomes {
        let share = outcome.output_tokens as f64 / (outcome.gaps.len() + 1) as f64;
        let mut at = outcome.sent + outcome.ttft;
        for gap in std::iter::once(0.0).chain(outcome.gaps.iter().copied()) {
            at += gap;
            let second = at.max(0.0) as usize;
            seconds.resize(seconds.len().max(second + 1), 0.0);
            seconds[second] += share;
        }
    }
    seconds.into_iter().fold(0.0, f64::max)
}

/// How many were under way at once, at most.
fn peak_concurrency(outcomes: &[Outcome]) -> usize {
    let mut edges: Vec<(f64, i64)> = outcomes
        .iter()
        .flat_map(|outcome| [(outcome.sent, 1), (outcome.sent + outcome.latency, -1)])
        .collect();
    // Who ends when another begins made room for it.
    edges.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most) = (0, 0);
    for (_, change) in edges {
        now += change;
        most = most.max(now);
    }
    usize::try_from(most).unwrap_or(0)
}

/// Rows of a label in 40 columns and a value.
struct Block(String);

impl Block {
    fn title(&mut self, text: &str, fill: char) {
        let rest = WIDTH.saturating_sub(text.chars().count());
        let side = |count: usize| fill.to_string().repeat(count);
        self.0 += &format!("{}{text}{}\n", side(rest / 2), side(rest - rest / 2));
    }

    fn count(&mut self, label: &str, value: usize) {
        writeln!(self.0, "{label:<40} {value:<10}").expect("a string takes all that is written to it");
    }

    fn number(&mut self, label: &str, value: f64) {
        writeln!(self.0, "{label:<40} {value:<10.2}").expect("a string takes all that is written to it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(goals: Goals) -> Asked {
        Asked {
            backend: "vllm".into(),
            dataset: "random".into(),
            model: "tiny".into(),
            rate: f64::INFINITY,
            burstiness: 1.0,
            concurrency: Some(2),
            goals,
            shown: vec![Metric::Ttft, Metric::Tpot, Metric::Itl],
            percentiles: vec![50.0, 99.0],
        }
    }

    /// Sent at `sent`, first text after 0.1 s, three tokens 0.2 s apart.
    fn outcome(sent: f64) -> Outcome {
        Outcome {
            sent,
            ttft: 0.1,
            latency: 0.5,
            gaps: vec![0.2, 0.2],
            prompt_tokens: 10,
            output_tokens: 3,
            ..Outcome::default()
        }
    }

    fn near(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got} and {expected}");
    }

    #[test]
    fn percentiles_lie_between_their_neighbours() {
        let check = |values: &[f64], percent, expected| near(percentile(values, percent), expected);
        check(&[], 99.0, 0.0);
        check(&[7.0], 99.0, 7.0);
        check(&[1.0, 2.0, 3.0, 4.0], 50.0, 2.5);
        check(&[1.0, 2.0, 3.0, 4.0], 0.0, 1.0);
        check(&[1.0, 2.0, 3.0, 4.0], 100.0, 4.0);
        check(&[10.0, 20.0], 99.0, 19.9);
    }

    #[test]
    fn a_summary_has_the_moments_of_its_values() {
        let summary = Summary::new([0.003, 0.001].into_iter());
        near(summary.mean, 2.0);
        near(summary.median, 2.0);
        near(summary.std, 1.0);
        assert_eq!(Summary::new(std::iter::empty()).percentile(99.0), 0.0);
    }

    #[test]
    fn a_request_is_good_that_keeps_every_goal() {
        let check = |goals: &[&str], expected| {
            let goals = goals.iter().map(|text| goal(text).expect("valid")).collect();
            assert_eq!(Report::new(asked(goals), &[outcome(0.0)], 1.0, None).good, expected);
        };
        check(&[], 1);
        check(&["ttft:100.1", "tpot:200.1", "e2el:501"], 1);
        check(&["ttft:99"], 0);
        check(&["ttft:100.1", "tpot:199"], 0);
        check(&["e2el:499"], 0);
        for wrong in ["ttft", "itl:3", "ttft:-1", "ttft:x", ""] {
            assert!(goal(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn failed_requests_count_as_such_and_as_nothing_else() {
        let failed = Outcome { error: "cut".into(), latency: 9.0, output_tokens: 50, ..Outcome::default() };
        let report = Report::new(asked(vec![]), &[outcome(0.0), failed, outcome(0.3)], 2.0, None);
        assert_eq!((report.completed, report.failed, report.output, report.input), (2, 1, 6, 20));
        near(report.output_rate(), 3.0);
        near(report.times(Metric::Ttft).mean, 100.0);
        near(report.times(Metric::Tpot).mean, 200.0);
        assert_eq!(report.times(Metric::Itl).values.len(), 4);
    }

    #[test]
    fn peaks_are_those_of_the_busiest_time() {
        let three = [outcome(0.0), outcome(0.4), outcome(0.5)];
        assert_eq!(peak_concurrency(&three), 2);
        assert_eq!(peak_concurrency(&[outcome(0.0), outcome(0.6)]), 1);
        // Chunks at 0.1, 0.3, 0.5; 0.5, 0.7, 0.9; 0.6, 0.8, 1.0.
        near(peak_tokens(&three.iter().collect::<Vec<_>>()), 8.0);
    }

    #[test]
    fn the_block_has_vllms_lines() {
        let drafts = Drafts { drafts: 10.0, tokens: 20.0, accepted: 15.0, by_position: vec![9.0, 6.0] };
        let block =
            Report::new(asked(vec![(Metric::Ttft, 200.0)]), &[outcome(0.0)], 2.0, Some(drafts)).block();
        let lines: Vec<&str> = block.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "============ Serving Benchmark Result ============");
        for line in [
            "Successful requests:                     1",
            "Maximum request concurrency:             2",
            "Benchmark duration (s):                  2.00",
            "Request goodput (req/s):                 0.50",
            "Output token throughput (tok/s):         1.50",
            "---------------Time to First Token----------------",
            "-----Time per Output Token (excl. 1st token)------",
            "Mean TTFT (ms):                          100.00",
            "P99 ITL (ms):                            200.00",
            "Acceptance rate (%):                     75.00",
            "Acceptance length:                       2.50",
            "  Position 1:                            60.00",
        ] {
            assert!(lines.contains(&line), "no {line:?} in\n{block}");
        }
        assert_eq!(lines.last(), Some(&"=".repeat(50).as_str()));
    }

    #[test]
    fn drafts_are_read_from_the_counters() {
        let metrics = "# HELP vllm:spec_decode_num_drafts_total x\n\
            vllm:spec_decode_num_drafts_total{model_name=\"m\"} 4\n\
            vllm:spec_decode_num_draft_tokens_total{model_name=\"m\"} 12\n\
            vllm:spec_decode_num_accepted_tokens_total{model_name=\"m\"} 6\n\
            vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"m\",position=\"1\"} 2\n\
            vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"m\",position=\"0\"} 4\n";
        let drafts = Drafts::read(metrics).expect("they are there");
        assert_eq!(drafts, Drafts { drafts: 4.0, tokens: 12.0, accepted: 6.0, by_position: vec![4.0, 2.0] });
        assert_eq!(drafts.since(&drafts), None);
        let before = Drafts { drafts: 2.0, tokens: 6.0, accepted: 5.0, by_position: vec![4.0] };
        let since = drafts.since(&before).expect("two more");
        assert_eq!((since.drafts, since.accepted, since.by_position), (2.0, 1.0, vec![0.0, 2.0]));
        assert_eq!(Drafts::read("vllm:prompt_tokens_total 3\n"), None);
    }
}
