//! `--profile`: what each operation of a step moved, computed and took, as shares of the ceilings.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;

use super::ceiling::Ceiling;
use crate::backend::profile::Span;
use crate::backend::trace::Record;
use crate::cli::table;
use crate::ops::Cost;

/// One run of what is profiled: a step, or all steps of a prompt.
pub struct Observed {
    pub wall: Duration,
    pub spans: Vec<Span>,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Profile {
    pub test: String,
    /// Runs that the times are means of: the faster half, for the slower was disturbed.
    pub runs: usize,
    /// Operations that are alike share a line; the one that took longest comes first.
    pub lines: Vec<Line>,
    /// What no operation took.
    pub rest_ms: f64,
    pub total: Line,
}

/// Times and amounts are those of one run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Line {
    pub op: String,
    pub shape: String,
    pub calls: usize,
    pub ms: f64,
    pub percent_of_time: f64,
    /// Weights, state and cache as stored; distinct experts are counted.
    pub bytes: u64,
    pub gb_per_s: f64,
    pub percent_of_bandwidth: f64,
    pub flops: u64,
    pub gflop_per_s: f64,
    pub percent_of_compute: f64,
}

impl Line {
    fn add(&mut self, cost: Cost, ms: f64) {
        self.calls += 1;
        self.ms += ms;
        self.bytes += cost.weights + cost.state;
        self.flops += cost.flops;
    }

    /// Fills in what follows from amounts and time.
    fn rate(&mut self, total_ms: f64, ceiling: &Ceiling) {
        let per_second = |amount: u64| if self.ms > 0.0 { amount as f64 / self.ms / 1e6 } else { 0.0 };
        (self.gb_per_s, self.gflop_per_s) = (per_second(self.bytes), per_second(self.flops));
        self.percent_of_time = if total_ms > 0.0 { 100.0 * self.ms / total_ms } else { 0.0 };
        self.percent_of_bandwidth = ceiling.memory_percent(self.gb_per_s);
        self.percent_of_compute = ceiling.compute_percent(self.gflop_per_s);
    }
}

/// The faster half of the runs, at least one.
pub fn undisturbed(mut runs: Vec<Observed>) -> Vec<Observed> {
    runs.sort_by_key(|run| run.wall);
    runs.truncate(runs.len().div_ceil(2));
    runs
}

/// The mean number of distinct experts of each `experts` operation.
pub fn distinct(runs: &[Observed]) -> Vec<usize> {
    let counts = |run: &Observed| -> Vec<usize> {
        run.spans.iter().filter(|span| span.op == "experts").map(|span| span.experts).collect()
    };
    let all: Vec<Vec<usize>> = runs.iter().map(counts).collect();
    let places = all.first().map_or(0, Vec::len);
    let mean = |place: usize| {
        let sum: usize = all.iter().filter_map(|counts| counts.get(place)).sum();
        (sum + all.len() / 2) / all.len()
    };
    (0..places).map(mean).collect()
}

/// Joins the times of `runs` with `records` of the same steps.
///
/// Errors: they are not the same operations, or there are no runs.
pub fn join(
    test: String,
    runs: &[Observed],
    records: &[Record],
    ceiling: &Ceiling,
) -> anyhow::Result<Profile> {
    ensure!(!runs.is_empty(), "{test}: nothing was measured");
    for run in runs {
        let same = run.spans.len() == records.len()
            && run.spans.iter().zip(records).all(|(span, record)| span.op == record.op);
        ensure!(same, "{test}: the operations that were timed are not those of the trace");
    }
    let mean = |time: &dyn Fn(&Observed) -> Duration| {
        runs.iter().map(|run| time(run).as_secs_f64() * 1e3).sum::<f64>() / runs.len() as f64
    };
    let mut places = HashMap::new();
    let mut lines: Vec<Line> = Vec::new();
    let mut total = Line { op: "all".into(), ..Line::default() };
    for (at, record) in records.iter().enumerate() {
        let shape = alike(record);
        let place = *places.entry((record.op, shape)).or_insert_with(|| {
            lines.push(Line { op: record.op.into(), shape: shape.into(), ..Line::default() });
            lines.len() - 1
        });
        let ms = mean(&|run| run.spans[at].time);
        lines[place].add(record.cost, ms);
        total.add(record.cost, ms);
    }
    let wall = mean(&|run| run.wall);
    let rest_ms = wall - total.ms;
    total.ms = wall;
    for line in lines.iter_mut().chain([&mut total]) {
        line.rate(wall, ceiling);
    }
    lines.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    Ok(Profile { test, runs: runs.len(), lines, rest_ms, total })
}

/// What operations that share a line have in common: how many experts were chosen differs from layer to layer.
fn alike(record: &Record) -> &str {
    match record.op {
        "experts" => record.shape.rsplit_once(", ").map_or(&record.shape, |(alike, _)| alike),
        _ => &record.shape,
    }
}

pub fn print(profile: &Profile) {
    println!("\n{}: one run, mean of the faster {} runs", profile.test, profile.runs);
    let header = [
        "operation",
        "shape",
        "calls",
        "ms",
        "% of time",
        "MB",
        "GB/s",
        "% of memory",
        "GFLOP/s",
        "% of compute",
    ];
    let cells = |line: &Line| {
        [
            line.op.clone(),
            line.shape.clone(),
            line.calls.to_string(),
            format!("{:.3}", line.ms),
            format!("{:.1}", line.percent_of_time),
            format!("{:.3}", line.bytes as f64 / 1e6),
            format!("{:.2}", line.gb_per_s),
            format!("{:.1}", line.percent_of_bandwidth),
            format!("{:.1}", line.gflop_per_s),
            format!("{:.1}", line.percent_of_compute),
        ]
    };
    let mut rest = [const { String::new() }; 10];
    rest[0] = "in no operation".into();
    rest[3] = format!("{:.3}", profile.rest_ms);
    rest[4] = format!("{:.1}", 100.0 * profile.rest_ms / profile.total.ms);
    let rows = profile.lines.iter().map(cells).chain([rest, cells(&profile.total)]);
    table::print(header, &[2, 3, 4, 5, 6, 7, 8, 9], rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(op: &'static str, shape: &str, weights: u64, flops: u64) -> Record {
        Record { op, shape: shape.into(), cost: Cost { weights, flops, state: weights, activations: 7 } }
    }

    fn run(wall: u64, spans: &[(&'static str, u64, usize)]) -> Observed {
        let span = |&(op, ms, experts): &(&'static str, u64, usize)| Span {
            op,
            time: Duration::from_millis(ms),
            experts,
        };
        Observed { wall: Duration::from_millis(wall), spans: spans.iter().map(span).collect() }
    }

    #[test]
    fn alike_operations_share_a_line_and_the_rest_is_what_remains_of_the_time() {
        let records = [
            record("linear", "a", 10_000_000, 1_000_000_000),
            record("experts", "[1, 8] -> 4 -> 8 BF16, 3 experts", 5_000_000, 0),
            record("linear", "a", 10_000_000, 1_000_000_000),
            record("experts", "[1, 8] -> 4 -> 8 BF16, 2 experts", 5_000_000, 0),
        ];
        let runs = [
            run(10, &[("linear", 1, 0), ("experts", 2, 3), ("linear", 1, 0), ("experts", 3, 1)]),
            run(20, &[("linear", 3, 0), ("experts", 4, 2), ("linear", 3, 0), ("experts", 5, 2)]),
        ];
        assert_eq!(distinct(&runs), [3, 2]);
        let profile = join("test".into(), &runs, &records, &Ceiling::round()).unwrap();
        let [experts, linear] = &profile.lines[..] else { panic!("{profile:?}") };
        assert_eq!((experts.op.as_str(), experts.calls, experts.bytes), ("experts", 2, 20_000_000));
        assert_eq!((linear.shape.as_str(), linear.calls, linear.flops), ("a", 2, 2_000_000_000));
        // 40 MB in 4 ms are 10 GB/s of 100; 2 GFLOP in 4 ms are 500 of 1000 GFLOP/s.
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-9, "{got} {expected}");
        close(linear.ms, 4.0);
        close(linear.percent_of_bandwidth, 10.0);
        close(linear.percent_of_compute, 50.0);
        close(profile.rest_ms, 15.0 - 11.0);
        close(profile.total.percent_of_time, 100.0);
        assert_eq!((profile.total.calls, profile.total.bytes), (4, 60_000_000));
    }

    #[test]
    fn other_operations_than_those_of_the_trace_are_an_error() {
        let records = [record("linear", "a", 1, 1)];
        for runs in [vec![], vec![run(1, &[("conv", 1, 0)])], vec![run(1, &[])]] {
            assert!(join("test".into(), &runs, &records, &Ceiling::round()).is_err());
        }
    }

    #[test]
    fn the_slower_half_does_not_count() {
        let kept = |walls: &[u64]| {
            let runs = undisturbed(walls.iter().map(|&wall| run(wall, &[])).collect());
            runs.iter().map(|run| run.wall.as_millis()).collect::<Vec<_>>()
        };
        assert_eq!(kept(&[5, 1, 9]), [1, 5]);
        assert_eq!(kept(&[4]), [4]);
    }
}
