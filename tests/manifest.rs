//! Every preset's tensors, from configuration alone, against what is published of the real files.

use ferrotron::model::config::{Layer, ModelConfig};
use ferrotron::model::manifest::{Manifest, Totals};
use ferrotron::model::names::Part;
use ferrotron::model::presets::{self, PRESETS};

fn totals(name: &str) -> Totals {
    let preset = presets::find(name).expect("a known name");
    Manifest::new(&preset.config().unwrap(), &preset.recipe().unwrap()).totals()
}

/// Totals without the MTP block.
fn body(name: &str) -> Totals {
    let preset = presets::find(name).expect("a known name");
    let config = ModelConfig { mtp: None, ..preset.config().unwrap() };
    Manifest::new(&config, &preset.recipe().unwrap()).totals()
}

#[test]
fn nano_nvfp4_has_the_published_tensors_and_bytes() {
    let totals = totals("nano-nvfp4");
    assert_eq!((totals.tensors, totals.bytes), (24_147, 19_339_781_632));
}

#[test]
fn super_nvfp4_has_the_published_tensors_and_bytes() {
    let totals = totals("super-nvfp4");
    assert_eq!((totals.tensors, totals.bytes), (165_860, 80_297_329_824));
}

#[test]
fn supers_drafter_has_the_published_tensors_and_bytes() {
    let (all, body) = (totals("super-nvfp4"), body("super-nvfp4"));
    assert_eq!((all.tensors - body.tensors, all.bytes - body.bytes), (1_040, 5_884_651_520));
    let (all, body) = (totals("lightning-nvfp4"), self::body("lightning-nvfp4"));
    assert_eq!(all.tensors - body.tensors, 270);
}

/// (name, 10^9 parameters, GB), without the MTP block.
#[test]
fn the_other_sizes_agree_to_the_digits_published() {
    for (name, parameters, gigabytes) in [
        ("nano-bf16", "31.578", "63.156"),
        ("nano-nvfp4", "31.578", "19.340"),
        ("super-bf16", "120.669", "241.337"),
        ("super-nvfp4", "120.669", "74.413"),
        ("lightning-nvfp4", "31.578", "18.889"),
        ("nano-4b", "3.974", "7.947"),
    ] {
        let totals = body(name);
        assert_eq!(format!("{:.3}", totals.parameters as f64 / 1e9), parameters, "{name}");
        assert_eq!(format!("{:.3}", totals.bytes as f64 / 1e9), gigabytes, "{name}");
    }
}

#[test]
fn published_totals_in_the_presets_are_the_manifests() {
    for preset in PRESETS {
        if let Some(published) = preset.policy().unwrap().published {
            let totals = totals(preset.name);
            assert_eq!(
                (totals.tensors, totals.bytes),
                (published.tensors, published.bytes),
                "{}",
                preset.name
            );
        }
    }
}

#[test]
fn groups_add_up_and_name_the_formats() {
    let preset = presets::find("super-nvfp4").unwrap();
    let (config, recipe) = (preset.config().unwrap(), preset.recipe().unwrap());
    let manifest = Manifest::new(&config, &recipe);
    let groups = manifest.groups();
    assert_eq!(groups.values().map(|t| t.bytes).sum::<u64>(), 80_297_329_824);
    // 40 layers of 512 experts of two matrices of four tensors.
    assert_eq!(groups[&(Part::RoutedExperts, "NVFP4")].tensors, 40 * 512 * 2 * 4);
    // 28 in_proj and 29 out_proj of three tensors.
    assert_eq!(groups[&(Part::Mamba, "FP8")].tensors, 57 * 3);
    // The modules the map names: 139 in FP8 and 40,961 in NVFP4.
    let modules = |format: &str| {
        let scales = manifest.entries().filter(|e| e.name.ends_with(".input_scale"));
        scales.filter(|e| e.format.is_some_and(|f| f.name() == format)).count()
    };
    assert_eq!((modules("FP8"), modules("NVFP4")), (139, 40_961));
}

#[test]
fn names_and_shapes_are_the_checkpoints() {
    let preset = presets::find("nano-nvfp4").unwrap();
    let (config, recipe) = (preset.config().unwrap(), preset.recipe().unwrap());
    let entries: Vec<_> = Manifest::new(&config, &recipe).entries().collect();
    let check = |name: &str, expected: &str| {
        let entry = entries.iter().find(|e| e.name == name).unwrap_or_else(|| panic!("{name} is not listed"));
        assert_eq!(format!("{:?} {:?}", entry.dtype, entry.shape), expected, "{name}");
    };
    check("backbone.embeddings.weight", "BF16 [131072, 2688]");
    check("lm_head.weight", "BF16 [131072, 2688]");
    check("backbone.layers.0.mixer.in_proj.weight", "U8 [10304, 1344]");
    check("backbone.layers.0.mixer.in_proj.weight_scale", "F8_E4M3 [10304, 168]");
    check("backbone.layers.0.mixer.in_proj.weight_scale_2", "F32 []");
    check("backbone.layers.4.mixer.in_proj.weight", "BF16 [10304, 2688]");
    check("backbone.layers.0.mixer.conv1d.weight", "BF16 [6144, 1, 4]");
    check("backbone.layers.1.mixer.gate.weight", "F32 [128, 2688]");
    check("backbone.layers.1.mixer.gate.e_score_correction_bias", "F32 [128]");
    check("backbone.layers.1.mixer.experts.127.down_proj.weight", "U8 [2688, 928]");
    check("backbone.layers.1.mixer.shared_experts.down_proj.weight_scale", "F8_E4M3 [2688, 232]");
    check("backbone.layers.5.mixer.k_proj.weight", "BF16 [256, 2688]");
    check("backbone.norm_f.weight", "BF16 [2688]");
}

#[test]
fn every_preset_can_be_read() {
    for preset in PRESETS {
        let policy = preset.policy().unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        assert_eq!(policy.stop_token_ids, [2, 11], "{}", preset.name);
        assert!(presets::find(&policy.hub).is_some_and(|p| p.name == preset.name));
        assert!(preset.description.len() > 500, "{}/MODEL.md tells too little", preset.name);
        let config = preset.config().unwrap();
        assert_eq!(config.max_position_embeddings, policy.context, "{}", preset.name);
    }
}

#[test]
fn the_patterns_put_attention_where_it_is() {
    for (name, expected) in [
        ("nano-bf16", &[5, 12, 19, 26, 33, 42][..]),
        ("super-bf16", &[7, 16, 25, 36, 47, 58, 69, 78]),
        ("nano-4b", &[12, 17, 24, 32]),
    ] {
        let config = presets::find(name).unwrap().config().unwrap();
        let layers = config.layers.iter().enumerate();
        let found: Vec<_> =
            layers.filter(|(_, l)| matches!(l, Layer::Attention(_))).map(|(i, _)| i).collect();
        assert_eq!(found, expected, "{name}");
    }
}

/// Which layers have a module in a format follows no rule, and totals do not notice two that change places: so their
/// numbers are counted, and their squares added up.
#[test]
fn the_formats_are_those_of_their_own_layers() {
    let check = |preset: &str, module: &str, format: &str, expected: (usize, usize)| {
        let preset = presets::find(preset).expect("a known name");
        let (config, recipe) = (preset.config().unwrap(), preset.recipe().unwrap());
        let layer = |name: &str| -> Option<usize> {
            let name = name.strip_prefix("backbone.layers.")?.strip_suffix(".weight")?;
            let (layer, found) = name.split_once(".mixer.")?;
            (found == module).then(|| layer.parse().expect("a layer has a number"))
        };
        let manifest = Manifest::new(&config, &recipe);
        let of_format = manifest.entries().filter(|e| e.format.is_some_and(|f| f.name() == format));
        let layers: Vec<usize> = of_format.filter_map(|e| layer(&e.name)).collect();
        let squares = layers.iter().map(|layer| layer * layer).sum();
        assert_eq!((layers.len(), squares), expected, "{} {module} {format}: {layers:?}", preset.name);
    };
    check("super-nvfp4", "in_proj", "FP8", (28, 67562));
    check("super-nvfp4", "out_proj", "FP8", (29, 91564));
    check("super-nvfp4", "shared_experts.up_proj", "FP8", (39, 102729));
    check("super-nvfp4", "shared_experts.down_proj", "FP8", (37, 98569));
    check("super-nvfp4", "shared_experts.down_proj", "NVFP4", (1, 1));
    check("super-nvfp4", "fc1_latent_proj", "FP8", (3, 35));
    check("super-nvfp4", "fc2_latent_proj", "FP8", (1, 9));
    check("super-nvfp4", "o_proj", "FP8", (2, 10845));
    check("nano-nvfp4", "in_proj", "BF16", (6, 3791));
    check("nano-nvfp4", "out_proj", "BF16", (6, 3791));
}
