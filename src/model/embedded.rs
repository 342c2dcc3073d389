//! Models that are part of the binary, by name, each as the files of its checkpoint folder; and two that are all
//! configuration, to measure speed with.

use crate::weights::StaticFiles;

/// The text files are tiny's for all of them: quantising a model does not change what it reads and writes, and what a
/// model without weights reads and writes does not matter.
macro_rules! files {
    ($folder:literal, $generation:literal $(, $more:literal)*) => {
        &[
            ("config.json", include_bytes!(concat!("../../models/", $folder, "/config.json"))),
            $(($more, include_bytes!(concat!("../../models/", $folder, "/", $more))),)*
            ("generation_config.json", include_bytes!(concat!("../../models/", $generation, "/generation_config.json"))),
            ("tokenizer.json", include_bytes!("../../models/tiny/tokenizer.json")),
            ("tokenizer_config.json", include_bytes!("../../models/tiny/tokenizer_config.json")),
            ("chat_template.jinja", include_bytes!("../../models/tiny/chat_template.jinja")),
        ]
    };
}

/// (name, files). The first one is served when no model is named.
pub static EMBEDDED: &[(&str, StaticFiles)] = &[
    ("tiny", files!("tiny", "tiny", "model.safetensors")),
    ("tiny-nvfp4", files!("tiny-nvfp4", "tiny", "model.safetensors", "hf_quant_config.json")),
];

/// (name, files) of models without weights, which run with random ones.
pub static BLUEPRINTS: &[(&str, StaticFiles)] = &[
    ("bench-nano", files!("bench-nano", "bench-nano")),
    ("bench-super", files!("bench-super", "bench-super")),
];
