//! `ferrotron check`: does a checkpoint hold the network that it says, tensor by tensor, without loading it?

use std::collections::BTreeMap;

use anyhow::{Context, bail};

use super::pull::hub_cache;
use super::table::{bytes, grouped, table};
use crate::model::config::ModelConfig;
use crate::model::load::{self, Inspection, Problems};
use crate::model::manifest::{Comparison, Group, Manifest, Totals};
use crate::model::presets::{self, Preset};
use crate::model::quantization::Recipe;
use crate::weights::Checkpoint;

/// Lines listed of any kind of finding before the rest is only counted.
const LISTED: usize = 8;

/// Resolve every tensor name, shape and type of a checkpoint, without loading it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron check ./my-checkpoint        a folder with config.json and *.safetensors
  ferrotron check nano-Q4_K_M.gguf       a GGUF file: its metadata stands for the other files
  ferrotron check super-nvfp4            files in the hub's cache if they are there, else sizes from configuration")]
pub struct Args {
    /// A known name, a hub id (org/name), a folder or a .gguf file
    #[arg(value_name = "NAME|DIR")]
    model: String,
}

/// Prints what was found. Errors if a tensor is missing or wrong.
pub fn run(args: Args) -> anyhow::Result<()> {
    match presets::resolve(&args.model, &hub_cache()) {
        Ok(location) => check_files(&location.open()?, location.preset()),
        Err(presets::Error::NotDownloaded { .. }) if presets::find(&args.model).is_some() => {
            let preset = presets::find(&args.model).context("it was just found")?;
            check_preset(preset)
        }
        Err(error) => Err(error.into()),
    }
}

/// The manifest of a preset, from its configuration alone.
fn check_preset(preset: &Preset) -> anyhow::Result<()> {
    let (config, recipe, policy) = (preset.config()?, preset.recipe()?, preset.policy()?);
    let manifest = Manifest::new(&config, &recipe);
    println!("{} ({})\n", policy.title, policy.hub);
    print_groups(&manifest.groups());
    let totals = manifest.totals();
    if let Some(published) = policy.published {
        let agrees = (published.tensors, published.bytes) == (totals.tensors, totals.bytes);
        println!(
            "published: {} tensors, {} bytes: {}",
            grouped(published.tensors),
            grouped(published.bytes),
            if agrees { "the same" } else { "NOT the same" }
        );
        if !agrees {
            bail!("{}: the manifest differs from what is published", preset.name);
        }
    }
    println!(
        "\nNo file was checked: {0} is not on this machine. `ferrotron pull {0}` downloads it.",
        preset.name
    );
    Ok(())
}

fn check_files(checkpoint: &Checkpoint, preset: Option<&Preset>) -> anyhow::Result<()> {
    let place = checkpoint.source().place();
    let text = checkpoint.file("config.json")?.with_context(|| format!("{place}: no config.json"))?;
    let config = ModelConfig::from_json(&text).with_context(|| format!("{place}/config.json"))?;
    let recipe = Recipe::of_checkpoint(&text, checkpoint.file("hf_quant_config.json")?.as_deref())
        .with_context(|| format!("{place}: quantization config"))?;
    let inspection = load::inspect(&config, checkpoint, &recipe)?;
    println!("{place}: {} file(s)\n", checkpoint.shards().count());
    print_groups(&inspection.groups);
    print_findings(&inspection);
    for file in ["chat_template.jinja", "generation_config.json"] {
        if checkpoint.file(file)?.is_none() {
            println!("warning: no {file}");
        }
    }
    if let Some(preset) = preset {
        let (config, recipe) = (preset.config()?, preset.recipe()?);
        let manifest = Manifest::with_naming(&config, &recipe, inspection.naming.clone());
        print_comparison(preset.name, &manifest.compare(checkpoint));
    }
    if !inspection.problems.is_empty() {
        bail!("{}", Problems(&inspection.problems));
    }
    if checkpoint.file("tokenizer.json")?.is_none() {
        bail!(
            "{place}: expected a tokenizer.json beside the weights, got none: every tensor is right, but no text \
             can be read; copy it from the model's release"
        );
    }
    println!("every tensor of the network is there, with the right shape and a readable type");
    Ok(())
}

fn print_groups(groups: &BTreeMap<Group, Totals>) {
    let mut out = table(&["part", "format", "tensors", "parameters", "bytes", "size"], &[2, 3, 4, 5]);
    let mut sum = Totals::default();
    for ((part, format), totals) in groups {
        out.add_row(row(part.name(), format, totals));
        sum.tensors += totals.tensors;
        sum.bytes += totals.bytes;
        sum.parameters += totals.parameters;
    }
    out.add_row(row("total", "", &sum));
    println!("{out}\n");
}

fn row(part: &str, format: &str, totals: &Totals) -> Vec<String> {
    vec![
        part.into(),
        format.into(),
        grouped(totals.tensors),
        grouped(totals.parameters),
        grouped(totals.bytes),
        bytes(totals.bytes),
    ]
}

fn print_findings(inspection: &Inspection) {
    for warning in &inspection.warnings {
        println!("warning: {warning}");
    }
    list("tensors are no part of the network", inspection.leftovers.iter().cloned());
    let disagreements = inspection.disagreements.iter();
    list(
        "weights are stored in another format than the recipe says",
        disagreements.map(|(m, recipe, stored)| {
            format!("{m}: {} in the recipe, {} stored", recipe.name(), stored.name())
        }),
    );
}

fn print_comparison(name: &str, comparison: &Comparison) {
    if comparison.is_clean() {
        println!("exactly the tensors of {name}'s manifest");
        return;
    }
    let differences = comparison.differences.iter();
    list(
        &format!("tensors differ from {name}'s manifest"),
        differences
            .map(|(e, stored)| format!("{}: expected {:?} {:?}; got {stored}", e.name, e.dtype, e.shape)),
    );
    list(&format!("tensors are not in {name}'s manifest"), comparison.unexpected.iter().cloned());
}

fn list(what: &str, items: impl ExactSizeIterator<Item = String>) {
    let count = items.len();
    if count == 0 {
        return;
    }
    println!("warning: {count} {what}:");
    for item in items.take(LISTED) {
        println!("  {item}");
    }
    if count > LISTED {
        println!("  and {} more", count - LISTED);
    }
}
