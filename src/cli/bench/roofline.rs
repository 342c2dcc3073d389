//! `bench roofline`: what the memory and the multipliers of this machine do at most, by number of threads.

use anyhow::Context;
use serde::Serialize;

use super::{machine, progress, tell};
use crate::backend::cpu::roofline::{self, Unit};
use crate::cli::resident::count;
use crate::cli::table;

/// Up to here every number of threads has a row; from here on powers of two and all.
const EVERY: usize = 8;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferrotron bench roofline --threads 1,2 --json")]
pub struct Args {
    /// Numbers of threads, one row each [default: from 1 to all]
    #[arg(long, value_delimiter = ',', value_parser = count::<1024>)]
    threads: Option<Vec<usize>>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    threads: usize,
    read_gb_per_s: f64,
    peaks: Vec<Peak>,
}

#[derive(Debug, Serialize)]
struct Peak {
    unit: &'static str,
    gflop_per_s: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.clone().unwrap_or_else(|| counts(cores));
    let units = Unit::available();
    let bar = progress("measuring", threads.len() * (1 + units.len()), args.json)?;
    let mut rows = Vec::with_capacity(threads.len());
    for threads in threads {
        let bandwidth = roofline::read_bandwidth(threads).context("measuring the memory")?;
        bar.inc(1);
        let mut peaks = Vec::with_capacity(units.len());
        for &unit in &units {
            let flops = roofline::peak_of(unit, threads).context("measuring multiply-adds")?;
            peaks.push(Peak { unit: unit.name(), gflop_per_s: flops / 1e9 });
            bar.inc(1);
        }
        rows.push(Row { threads, read_gb_per_s: bandwidth / 1e9, peaks });
    }
    bar.finish_and_clear();
    tell(&Report { machine: machine(), rows }, args.json, print)
}

/// Rows of the table for `cores` cores.
fn counts(cores: usize) -> Vec<usize> {
    (1..=cores).filter(|&n| n <= EVERY || n.is_power_of_two() || n == cores).collect()
}

fn print(report: &Report) {
    println!("{}", report.machine);
    let units = report.rows.first().map_or(&[][..], |row| &row.peaks);
    let names: Vec<String> = units.iter().map(|peak| format!("{} GFLOP/s", peak.unit)).collect();
    let mut header = vec!["threads", "read GB/s", "per thread"];
    header.extend(names.iter().map(String::as_str));
    let right: Vec<usize> = (0..header.len()).collect();
    let mut table = table::table(&header, &right);
    for row in &report.rows {
        let per_thread = row.read_gb_per_s / row.threads as f64;
        let mut cells =
            vec![row.threads.to_string(), format!("{:.1}", row.read_gb_per_s), format!("{per_thread:.1}")];
        cells.extend(row.peaks.iter().map(|peak| format!("{:.0}", peak.gflop_per_s)));
        table.add_row(cells);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_from_one_thread_to_all() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(3), [1, 2, 3]);
        assert_eq!(counts(20), [1, 2, 3, 4, 5, 6, 7, 8, 16, 20]);
    }
}
