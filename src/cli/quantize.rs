//! `ferrotron quantize`: an unquantised checkpoint in, Super's mixed NVFP4 and FP8 layout out. With `--random` a
//! configuration in, a checkpoint out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use super::pull::hub_cache;
use super::resident::{SEED, WeightFormat, configured};
use super::table::{bytes, grouped, table};
use crate::model::convert::{Outcome, Plan};
use crate::model::names::Part;
use crate::model::{presets, random};

/// Write a BF16 checkpoint again with NVFP4 experts and FP8 Mamba projections
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron quantize models/tiny /tmp/tiny-nvfp4
  ferrotron quantize --random --quantization bf16 bench-nano /tmp/bench-nano

Routed experts become NVFP4, Mamba in_proj and out_proj FP8; everything else, the MTP block included, stays as it is.
The result is weight-only: nothing is calibrated, so no input_scale is written. The tables show what each weight lost.
With --random only SRC's configuration and text files are read; every linear weight is of one format, and the same seed
gives the same bytes on every machine, those that --load-format dummy computes with.")]
pub struct Args {
    /// A folder, a known name or a hub id, in BF16, F16 or F32; with --random its weights need not be there
    #[arg(value_name = "SRC")]
    source: String,

    /// The folder to write; must be empty or absent
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Replace the weights that are in OUT already
    #[arg(long)]
    force: bool,

    /// Data of one file at most, in GB
    #[arg(long, value_name = "GB", default_value_t = 5.0, value_parser = shard_gb)]
    shard_gb: f64,

    /// One line per weight instead of one per layer
    #[arg(long, conflicts_with = "random")]
    per_tensor: bool,

    /// Write random weights, sized so that activations stay finite
    #[arg(long)]
    random: bool,

    /// Format of the random weights
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = WeightFormat::Bf16, requires = "random")]
    quantization: WeightFormat,

    /// Of the random weights
    #[arg(long, default_value_t = SEED, requires = "random")]
    seed: u64,
}

fn shard_gb(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(gb) if (0.001..=1000.0).contains(&gb) => Ok(gb),
        _ => Err(format!("expected a number of GB from 0.001 to 1000; got {text}")),
    }
}

/// Converts, then prints what was lost.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.random {
        return write_random(&args);
    }
    let Some(source) = presets::resolve(&args.source, &hub_cache())?.source() else {
        bail!(
            "{} is GGUF: expected a checkpoint in safetensors, from which weights are quantised once",
            args.source
        );
    };
    let plan = Plan::new(source, (args.shard_gb * 1e9) as u64)?;
    let bar = ProgressBar::new(plan.bytes()).with_style(style()?);
    let outcomes = plan.run(&args.out, args.force, &|done| bar.inc(done));
    bar.finish_and_clear();
    let outcomes = outcomes?;
    print_losses(&outcomes, args.per_tensor);
    print_summary(&outcomes);
    println!("\nweight-only: no activation was calibrated, so there is no input_scale");
    println!("{}: {} weights quantised", args.out.display(), outcomes.len());
    Ok(())
}

fn write_random(args: &Args) -> anyhow::Result<()> {
    let (source, _) = configured(&args.source)?;
    let (kind, shard_bytes) = (args.quantization.kind(), (args.shard_gb * 1e9) as u64);
    let plan = random::Plan::new(source, kind, args.seed, shard_bytes)?;
    let bar = ProgressBar::new(plan.bytes()).with_style(style()?);
    let written = plan.run(&args.out, args.force, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    written?;
    println!(
        "{}: {} random parameters in {}, {}, seed {}",
        args.out.display(),
        grouped(plan.parameters()),
        kind.name(),
        bytes(plan.bytes()),
        args.seed
    );
    Ok(())
}

fn style() -> anyhow::Result<ProgressStyle> {
    let template = "{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}";
    Ok(ProgressStyle::with_template(template)?)
}

fn print_losses(outcomes: &[Outcome], per_tensor: bool) {
    let mut out = table(&["weight", "format", "count", "relative RMS", "max error"], &[2, 3, 4]);
    // Experts of one layer and projection share a line.
    let line = |o: &Outcome| match per_tensor {
        true => o.module.clone(),
        false => without_expert(&o.module),
    };
    let mut order = Vec::new();
    let mut lines = BTreeMap::<String, Vec<&Outcome>>::new();
    for outcome in outcomes {
        let name = line(outcome);
        lines.entry(name.clone()).or_insert_with(|| {
            order.push(name);
            Vec::new()
        });
        lines.entry(line(outcome)).or_default().push(outcome);
    }
    for name in order {
        let group = &lines[&name];
        let Some(first) = group.first() else { continue };
        out.add_row([name, first.kind.name().into(), group.len().to_string(), rms(group), max(group)]);
    }
    println!("{out}\n");
}

/// `layers.1.mixer.experts.1.up_proj` as `layers.1.mixer.experts.*.up_proj`.
fn without_expert(module: &str) -> String {
    let parts =
        module.split_once(".experts.").and_then(|(mixer, rest)| Some((mixer, rest.split_once('.')?.1)));
    match parts {
        Some((mixer, projection)) => format!("{mixer}.experts.*.{projection}"),
        None => module.to_string(),
    }
}

fn print_summary(outcomes: &[Outcome]) {
    let mut out = table(
        &["part", "format", "count", "relative RMS", "worst", "max error", "before", "after"],
        &[2, 3, 4, 5, 6, 7],
    );
    let mut groups = BTreeMap::<_, Vec<&Outcome>>::new();
    for outcome in outcomes {
        groups.entry((Part::of(&outcome.module), outcome.kind)).or_default().push(outcome);
    }
    for ((part, kind), group) in groups {
        let worst = group.iter().map(|o| o.loss.relative_rms).fold(0.0, f64::max);
        out.add_row([
            part.name().into(),
            kind.name().into(),
            group.len().to_string(),
            rms(&group),
            format!("{:.3} %", 100.0 * worst),
            max(&group),
            bytes(group.iter().map(|o| o.bytes_before).sum()),
            bytes(group.iter().map(|o| o.bytes_after).sum()),
        ]);
    }
    println!("{out}");
}

/// The mean of the weights' own relative errors.
fn rms(group: &[&Outcome]) -> String {
    let sum: f64 = group.iter().map(|o| o.loss.relative_rms).sum();
    format!("{:.3} %", 100.0 * sum / group.len().max(1) as f64)
}

fn max(group: &[&Outcome]) -> String {
    format!("{:.2e}", group.iter().map(|o| o.loss.max).fold(0.0, f32::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_of_one_layer_share_a_line_even_where_the_numbers_are_equal() {
        for expert in [1, 17] {
            let name = without_expert(&format!("backbone.layers.1.mixer.experts.{expert}.up_proj"));
            assert_eq!(name, "backbone.layers.1.mixer.experts.*.up_proj");
        }
        assert_eq!(without_expert("backbone.layers.0.mixer.in_proj"), "backbone.layers.0.mixer.in_proj");
    }
}
