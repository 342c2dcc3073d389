//! Files that clients upload and batches write: kept in one directory, counted, and found again after a restart.

use crate::api::error::ApiError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where files are kept, and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct FileOptions {
    /// Nothing: a temporary one, made with the first file and gone with the server.
    pub directory: Option<PathBuf>,
    /// Of all files together.
    pub bytes_max: u64,
    pub count_max: usize,
}

impl Default for FileOptions {
    /// A gigabyte holds some dozens of full batches with their results.
    fn default() -> Self {
        Self { directory: None, bytes_max: 1 << 30, count_max: 1000 }
    }
}

/// What is known of a file besides its content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileInfo {
    pub id: String,
    pub bytes: u64,
    /// Unix seconds.
    pub created_at: u64,
    pub filename: String,
    pub purpose: String,
}

impl FileInfo {
    /// As OpenAI shows a file.
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": self.created_at, "expires_at": null,
            "filename": self.filename, "purpose": self.purpose, "status": "processed", "status_details": null,
        })
    }
}

/// The directory. Nobody else may write there while we do.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    is_temporary: bool,
    /// Held as long as this lives.
    _lock: File,
}

impl Root {
    /// Opens or makes it. Errors, as a sentence: it cannot be made, or another server uses it.
    pub fn open(directory: Option<&Path>, name: &str) -> Result<Self, String> {
        let path = directory
            .map_or_else(|| std::env::temp_dir().join(format!("ferrotron-files-{name}")), Path::to_owned);
        let shown = path.display();
        let wrong = |error: io::Error| format!("{shown} cannot hold files: {error}");
        make(&path).map_err(wrong)?;
        let lock = File::create(path.join("lock")).map_err(wrong)?;
        lock.try_lock().map_err(|_| format!("{shown} is used by another server"))?;
        Ok(Self { is_temporary: directory.is_none(), _lock: lock, path })
    }

    /// Where `name`, one of our own, is kept.
    pub fn place(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes `value` such that a kill leaves the old or the new.
    pub fn write(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        let part = self.place(&format!("{name}.part"));
        fs::write(&part, serde_json::to_vec(value)?)?;
        fs::rename(part, self.place(name))
    }

    /// Everything of `prefix` that [`Self::write`] has written.
    pub fn read<T: for<'a> Deserialize<'a>>(&self, prefix: &str) -> io::Result<Vec<T>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.ends_with(".part") {
                // Was being written when the server was killed.
                fs::remove_file(&path)?;
            } else if name.starts_with(prefix) && name.ends_with(".json") {
                match serde_json::from_slice(&fs::read(&path)?) {
                    Ok(value) => found.push(value),
                    Err(error) => tracing::warn!("{} is left alone: {error}", path.display()),
                }
            }
        }
        Ok(found)
    }

    pub fn remove(&self, name: &str) {
        let path = self.place(name);
        if let Err(error) = fs::remove_file(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }) {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
    }
}

impl Root {
    /// Removes it if it is temporary.
    pub fn close(&self) {
        if self.is_temporary {
            // What cannot be removed is left to whoever cleans the place for temporary things.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.close();
    }
}

/// What is asked there is nobody else's business.
#[cfg(unix)]
fn make(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(not(unix))]
fn make(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Bytes that are taken of those there may be.
#[derive(Debug)]
pub struct Space {
    used: AtomicU64,
    max: u64,
}

impl Space {
    pub fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max }
    }

    /// Takes so many. Errors: 413.
    pub fn take(&self, bytes: u64) -> Result<(), ApiError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.max);
        let taken = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits);
        taken
            .map(drop)
            .map_err(|_| ApiError::TooLarge { limit: usize::try_from(self.max).unwrap_or(usize::MAX) })
    }

    /// Takes what is there already, whatever the limit.
    pub fn hold(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    pub fn free(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// A file that is being written; gone with its bytes unless it is [kept](super::Desk::keep).
pub struct Upload<'a> {
    space: &'a Space,
    file: File,
    path: PathBuf,
    bytes: u64,
    kept: bool,
    files_max: usize,
}

impl<'a> Upload<'a> {
    /// `files_max`: how many files there may be with it.
    pub fn start(space: &'a Space, path: PathBuf, files_max: usize) -> io::Result<Self> {
        Ok(Self { space, file: File::create(&path)?, path, bytes: 0, kept: false, files_max })
    }

    pub fn files_max(&self) -> usize {
        self.files_max
    }

    /// Errors: 413 when there is no space, 500 when the disk does not take it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        self.space.take(bytes.len() as u64)?;
        self.put(bytes)
    }

    /// The same for results, which there was space for when they were in the journal. Errors: 500.
    pub fn write_anyway(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        self.space.hold(bytes.len() as u64);
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| disk(&error))
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives it its place for good.
    pub fn keep(mut self, place: &Path) -> io::Result<()> {
        fs::rename(&self.path, place)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.space.free(self.bytes);
            // Where the server starts again, what is left of it is removed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The disk is ours, so what it refuses is no client's fault.
pub fn disk(error: &io::Error) -> ApiError {
    tracing::error!("files: {error}");
    ApiError::Internal("The server could not keep the file.".to_owned())
}
