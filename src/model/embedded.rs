//! Models that are part of the binary, by name, each as the files of its checkpoint folder.

use crate::weights::StaticFiles;

/// The text files are the same for both: quantising a model does not change what it reads and writes.
macro_rules! checkpoint {
    ($folder:literal $(, $more:literal)*) => {
        &[
            ("config.json", include_bytes!(concat!("../../models/", $folder, "/config.json"))),
            ("model.safetensors", include_bytes!(concat!("../../models/", $folder, "/model.safetensors"))),
            $(($more, include_bytes!(concat!("../../models/", $folder, "/", $more))),)*
            ("generation_config.json", include_bytes!("../../models/tiny/generation_config.json")),
            ("tokenizer.json", include_bytes!("../../models/tiny/tokenizer.json")),
            ("tokenizer_config.json", include_bytes!("../../models/tiny/tokenizer_config.json")),
            ("chat_template.jinja", include_bytes!("../../models/tiny/chat_template.jinja")),
        ]
    };
}

/// (name, files). The first one is served when no model is named.
pub static EMBEDDED: &[(&str, StaticFiles)] =
    &[("tiny", checkpoint!("tiny")), ("tiny-nvfp4", checkpoint!("tiny-nvfp4", "hf_quant_config.json"))];
