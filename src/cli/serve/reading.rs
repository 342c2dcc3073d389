//! Which checkpoint is read, from where, and how.

use crate::cli::resident::{Hub, Load, LoadFormat, Resident, WeightFormat, text_of};
use crate::text::Text;
use crate::weights::{Kind, Source};
use anyhow::{Context as _, bail};
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// Flags about the checkpoint's files.
#[derive(Debug, Clone, clap::Args)]
pub struct Reading {
    /// `dummy` makes random weights from the configuration alone; every other name is the one loader, which maps the files
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// How weights are stored: must agree with the checkpoint; with --load-format dummy it decides
    #[arg(long, short = 'q', value_enum, default_value_t = Quantization::Auto)]
    pub quantization: Quantization,
    /// Folder, preset or hub id whose tokenizer and chat template take the place of the model's
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<String>,
    /// Branch, tag or commit of a hub id, as it lies in the local cache
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// The hub's cache on this machine [default: HF_HUB_CACHE, or the hub's own default]
    #[arg(long, value_name = "FOLDER")]
    pub download_dir: Option<PathBuf>,
}

/// `--quantization`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    Auto,
    Bf16,
    Fp8,
    #[value(alias = "modelopt_fp4")]
    Nvfp4,
    Modelopt,
    CompressedTensors,
}

impl Quantization {
    /// Of dummy weights. Errors: a name that leaves it open.
    fn format(self) -> anyhow::Result<Option<WeightFormat>> {
        Ok(match self {
            Self::Auto => None,
            Self::Bf16 => Some(WeightFormat::Bf16),
            Self::Fp8 => Some(WeightFormat::Fp8),
            Self::Nvfp4 => Some(WeightFormat::Nvfp4),
            Self::Modelopt | Self::CompressedTensors => {
                bail!("--quantization: with --load-format dummy expected bf16, fp8 or nvfp4")
            }
        })
    }

    /// Whether a checkpoint whose weights are of these kinds is what was asked for.
    fn fits(self, kinds: &[Kind]) -> bool {
        let any = |wanted: &[Kind]| kinds.iter().any(|kind| wanted.contains(kind));
        match self {
            Self::Auto => true,
            Self::Bf16 => kinds.iter().all(|kind| *kind == Kind::BF16),
            Self::Fp8 => any(&[Kind::Fp8]),
            Self::Nvfp4 => any(&[Kind::Nvfp4]),
            // Both are ways to write either.
            Self::Modelopt | Self::CompressedTensors => any(&[Kind::Fp8, Kind::Nvfp4]),
        }
    }
}

impl Reading {
    /// The model, its weights not yet loaded. Errors: it is not there, or is not what the flags say.
    pub fn open(&self, model: &str) -> anyhow::Result<Resident> {
        let hub = self.hub();
        if self.load_format == LoadFormat::Dummy {
            let load = Load { load_format: LoadFormat::Dummy, quantization: self.quantization.format()? };
            tracing::info!("--load-format dummy: the weights are random, and so is what the model says");
            return Resident::open_from(&hub, model, &load);
        }
        let resident = Resident::open_from(&hub, model, &Load::default())?;
        if self.quantization != Quantization::Auto && !self.quantization.fits(&resident.kinds()?) {
            let name = self.quantization.to_possible_value().map(|value| value.get_name().to_owned());
            bail!(
                "--quantization: {model} is not stored as {}; leave the flag out to take it as it is",
                name.unwrap_or_default()
            );
        }
        Ok(resident)
    }

    /// Its tokenizer and template, or those of `--tokenizer`; `own` in place of the template.
    pub fn text(&self, resident: &Resident, own: Option<&str>) -> anyhow::Result<Text> {
        let Some(tokenizer) = &self.tokenizer else { return resident.text_with(own) };
        let folder = Path::new(tokenizer);
        // A tokenizer needs no model beside it.
        let source = if folder.join("tokenizer.json").is_file() {
            Some(Source::folder(folder))
        } else {
            self.hub().resolve(tokenizer).with_context(|| format!("--tokenizer {tokenizer}"))?.source()
        };
        let source =
            source.with_context(|| format!("--tokenizer {tokenizer}: expected a folder, got GGUF"))?;
        text_of(&source, own).with_context(|| format!("--tokenizer {tokenizer}"))
    }

    fn hub(&self) -> Hub {
        let hub = Hub::default();
        Hub { cache: self.download_dir.clone().unwrap_or(hub.cache), revision: self.revision.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Reading {
        crate::cli::flags(format!("serve {line}").split_whitespace().collect::<Vec<_>>())
            .expect("valid flags")
    }

    fn opened(line: &str, model: &str) -> Result<u64, String> {
        read(line).open(model).map(|resident| resident.bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_name_of_the_loader_means_the_one_there_is() {
        let plain = opened("", "tiny").expect("it is embedded");
        for name in ["auto", "safetensors", "fastsafetensors", "runai_streamer"] {
            assert_eq!(opened(&format!("--load-format {name}"), "tiny"), Ok(plain), "{name}");
        }
    }

    #[test]
    fn dummy_weights_are_as_large_as_their_format() {
        let bytes = |format: &str| {
            opened(&format!("--load-format dummy -q {format}"), "tiny").expect("random weights")
        };
        assert!(bytes("nvfp4") < bytes("fp8") && bytes("fp8") < bytes("bf16"));
        assert_eq!(bytes("auto"), bytes("bf16"));
        assert!(
            opened("--load-format dummy -q modelopt", "tiny").is_err_and(|error| error.contains("nvfp4"))
        );
        // No weights are needed for what has none.
        assert!(opened("", "bench-nano").is_err() && opened("--load-format dummy", "bench-nano").is_ok());
    }

    #[test]
    fn a_quantization_that_is_not_the_checkpoints_is_refused() {
        for name in ["auto", "nvfp4", "modelopt_fp4", "modelopt", "compressed-tensors"] {
            assert!(opened(&format!("-q {name}"), "tiny-nvfp4").is_ok(), "{name}");
        }
        assert!(opened("-q bf16", "tiny").is_ok());
        for (name, model) in
            [("nvfp4", "tiny"), ("fp8", "tiny"), ("bf16", "tiny-nvfp4"), ("modelopt", "tiny")]
        {
            assert!(
                opened(&format!("-q {name}"), model).is_err_and(|error| error.contains(name)),
                "{name} {model}"
            );
        }
    }

    #[test]
    fn another_tokenizer_is_taken_from_where_it_lies() {
        let check = |line: &str, words: Option<&str>| {
            let reading = read(line);
            let resident = reading.open("tiny").expect("it is embedded");
            match (reading.text(&resident, None), words) {
                (Ok(_), None) => {}
                (Err(error), Some(words)) => assert!(format!("{error:#}").contains(words), "{error:#}"),
                (other, _) => panic!("{line}: {:?}", other.map(|_| ())),
            }
        };
        check("", None);
        check("--tokenizer tiny-nvfp4", None);
        check("--tokenizer models/tiny", None);
        check("--tokenizer /nowhere", Some("--tokenizer /nowhere"));
    }
}
