//! `ferrotron models`: the names that a model argument knows, and what is on this machine.

use super::pull::hub_cache;
use super::table::{bytes, table};
use crate::model::config::ModelConfig;
use crate::model::embedded::{BLUEPRINTS, EMBEDDED};
use crate::model::manifest::Manifest;
use crate::model::presets::{self, PRESETS};
use crate::model::quantization::Recipe;
use crate::weights::{Checkpoint, Kind, Source};

/// List the models that have a name here, and the ones on this machine
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  ferrotron models")]
pub struct Args {}

/// Prints one line per model.
pub fn run(_: Args) -> anyhow::Result<()> {
    let cache = hub_cache();
    let mut out = table(&["name", "parameters", "size", "context", "here", "where"], &[1, 2, 3]);
    for (name, files) in EMBEDDED {
        let source = Source::embedded(name, files);
        let (parameters, size, context) = sizes(source).unwrap_or_default();
        out.add_row([name.to_string(), parameters, size, context, "yes".into(), "in this program".into()]);
    }
    for (name, files) in BLUEPRINTS {
        let source = Source::embedded(name, files);
        let config = ModelConfig::from_json(&source.file("config.json")?.unwrap_or_default())?;
        let totals = Manifest::new(&config, &Recipe::uniform(Kind::BF16)).totals();
        out.add_row([
            name.to_string(),
            billions(totals.parameters),
            bytes(totals.bytes),
            config.max_position_embeddings.to_string(),
            "yes".into(),
            "in this program, without weights: `bench decode --load-format dummy`".into(),
        ]);
    }
    let mut known = Vec::new();
    for preset in PRESETS {
        let (config, policy, recipe) = (preset.config()?, preset.policy()?, preset.recipe()?);
        let totals = Manifest::new(&config, &recipe).totals();
        let local = presets::snapshot(&cache, &policy.hub, &policy.revision);
        out.add_row([
            preset.name.to_string(),
            billions(totals.parameters),
            bytes(totals.bytes),
            policy.context.to_string(),
            if local.is_some() { "yes" } else { "no" }.into(),
            local.map_or_else(|| format!("hub: {}", policy.hub), |path| path.display().to_string()),
        ]);
        known.push(policy.hub);
    }
    for (hub, path) in presets::cached(&cache).into_iter().filter(|(hub, _)| !known.contains(hub)) {
        let (parameters, size, context) = sizes(Source::folder(&path)).unwrap_or_default();
        out.add_row([hub, parameters, size, context, "yes".into(), path.display().to_string()]);
    }
    println!("{out}");
    println!(
        "\nAny folder with config.json and *.safetensors, any .gguf file and any hub id (org/name) of the family works as \
         well."
    );
    Ok(())
}

/// (parameters, bytes, context) of files that are here; `None` where they are incomplete.
fn sizes(source: Source) -> Option<(String, String, String)> {
    let checkpoint = Checkpoint::open(source).ok()?;
    let config = ModelConfig::from_json(&checkpoint.file("config.json").ok()??).ok()?;
    let recipe = Recipe::uniform(Kind::BF16);
    let parameters = Manifest::new(&config, &recipe).totals().parameters;
    Some((billions(parameters), bytes(checkpoint.bytes()), config.max_position_embeddings.to_string()))
}

fn billions(parameters: u64) -> String {
    match parameters {
        0..1_000_000_000 => format!("{:.1} M", parameters as f64 / 1e6),
        _ => format!("{:.1} B", parameters as f64 / 1e9),
    }
}
