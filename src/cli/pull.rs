//! `ferrotron pull`: a checkpoint from the Hugging Face hub into its cache, resumed where it stopped, checked when
//! it is there.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use super::table::bytes;
use crate::model::presets;

/// Download a checkpoint from the Hugging Face hub; a download that stopped goes on where it was
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron pull nano-nvfp4
  ferrotron pull nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16
  HF_HOME=/data/hf ferrotron pull super-nvfp4       where the files go; HF_TOKEN and HF_ENDPOINT are read as well")]
pub struct Args {
    /// A known name or a hub id (org/name)
    name: String,

    /// Branch, tag or commit instead of the one that the name stands for
    #[arg(long)]
    revision: Option<String>,

    /// Do not compare the SHA-256 of large files with the hub's
    #[arg(long)]
    no_verify: bool,
}

/// The hub's cache: `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`.
pub fn hub_cache() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|h| h.join(".cache")));
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|h| h.join("hub")))
        .or_else(|| home().map(|h| h.join("huggingface").join("hub")))
        .unwrap_or_else(|| PathBuf::from("huggingface").join("hub"))
}

/// Downloads every file that a served checkpoint needs, and prints where it is.
pub fn run(args: Args) -> anyhow::Result<()> {
    let policy = presets::find(&args.name).map(|p| p.policy()).transpose()?;
    let hub = match &policy {
        Some(policy) => policy.hub.clone(),
        None if presets::is_hub_id(&args.name) => args.name.clone(),
        None => return Err(presets::Error::Unknown { name: args.name }.into()),
    };
    let revision = args.revision.or(policy.map(|p| p.revision)).unwrap_or_else(|| "main".into());
    let cache = hub_cache();
    let offline =
        || presets::Error::NotDownloaded { name: args.name.clone(), hub: hub.clone(), cache: cache.clone() };

    let api = api(&cache)?;
    let repo = Repo::with_revision(hub.clone(), RepoType::Model, revision);
    let remote = api.repo(repo.clone());
    let info = remote.info().map_err(anyhow::Error::from).with_context(|| offline().to_string())?;
    // Pinned to the commit, so that all files belong together even if the branch moves meanwhile.
    let pinned = api.repo(Repo::with_revision(hub.clone(), RepoType::Model, info.sha.clone()));
    let files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).filter(|f| wanted(f)).collect();
    if !files.iter().any(|f| f.ends_with(".safetensors")) {
        bail!("{hub}: no *.safetensors among its files; expected a checkpoint");
    }
    let local = Cache::new(cache.clone()).repo(repo);
    let folder = local.pointer_path(&info.sha);
    for (number, file) in files.iter().enumerate() {
        let label = format!("[{}/{}] {file}", number + 1, files.len());
        let present = folder.join(file);
        let (path, fresh) = match present.is_file() {
            true => (present, false),
            false => (download(&pinned, file, &label)?, true),
        };
        if !args.no_verify {
            verify(&api, &pinned, file, &path, &label, fresh)?;
        }
    }
    // The branch's own ref is what `resolve` reads; written last, so that it never names an incomplete snapshot.
    local.create_ref(&info.sha).context("writing the ref in the hub's cache")?;
    println!("{hub} at {}: {} files in {}", info.sha, files.len(), folder.display());
    Ok(())
}

fn api(cache: &Path) -> anyhow::Result<Api> {
    let mut builder = ApiBuilder::from_env().with_cache_dir(cache.into()).with_retries(5);
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    Ok(builder.build()?)
}

/// What serving needs: weights, configuration, tokenizer, template. Not pictures, papers or other formats.
fn wanted(file: &str) -> bool {
    let plain = !file.contains('/');
    plain && [".safetensors", ".json", ".jinja"].iter().any(|end| file.ends_with(end))
}

fn download(repo: &ApiRepo, file: &str, label: &str) -> anyhow::Result<PathBuf> {
    let bar = Bar(bar(0, label)?);
    let path = repo
        .download_with_progress(file, bar)
        .with_context(|| format!("{file}: the download stopped; the same command goes on where it was"))?;
    println!("{label}: {}", bytes(path.metadata()?.len()));
    Ok(path)
}

/// The hub names a large file by the SHA-256 of its content; a small one by a git hash, which is not checked.
fn verify(
    api: &Api,
    repo: &ApiRepo,
    file: &str,
    path: &Path,
    label: &str,
    fresh: bool,
) -> anyhow::Result<()> {
    let blob = path.canonicalize()?;
    // In the cache a blob's name is its etag; only where links do not work must the hub be asked again.
    let name = blob.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
    let etag = match is_sha256(&name) {
        true => name,
        false if fresh => api.metadata(&repo.url(file))?.etag().to_string(),
        false => return Ok(()),
    };
    if !is_sha256(&etag) {
        return Ok(());
    }
    let got = sha256(&blob, &format!("{label} (checking)"))?;
    if got != etag {
        // Both go, or the next run would take the file for complete.
        std::fs::remove_file(&blob)?;
        if blob != path {
            std::fs::remove_file(path)?;
        }
        bail!("{file}: SHA-256 {got}; expected {etag}. The file was removed; run the same command again");
    }
    Ok(())
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn sha256(path: &Path, label: &str) -> anyhow::Result<String> {
    let mut file = File::open(path)?;
    let bar = bar(file.metadata()?.len(), label)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        bar.inc(count as u64);
    }
    bar.finish_and_clear();
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn bar(length: u64, label: &str) -> anyhow::Result<ProgressBar> {
    let template = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}";
    let bar = ProgressBar::new(length).with_style(ProgressStyle::with_template(template)?);
    bar.set_message(label.to_string());
    Ok(bar)
}

/// Our bar as the hub's client drives it.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
        // What an earlier run left is no speed of this one.
        self.0.reset_eta();
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_hash_is_the_one_the_hub_gives() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        let hash = sha256(file.path(), "abc").unwrap();
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(is_sha256(&hash) && !is_sha256("da39a3ee5e6b4b0d3255bfef95601890afd80709"));
    }

    #[test]
    fn only_what_serving_needs_is_downloaded() {
        let files =
            ["model-00001-of-00017.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"];
        assert!(files.iter().all(|f| wanted(f)));
        assert!(
            ["README.md", "bias.md", "images/a.json", "model.gguf", "nano_v3_reasoning_parser.py"]
                .iter()
                .all(|f| !wanted(f))
        );
    }
}
