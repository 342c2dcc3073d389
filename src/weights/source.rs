//! Where a checkpoint's files are: a folder, or the binary itself.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::Error;

/// Files by name that are part of the binary.
pub type StaticFiles = &'static [(&'static str, &'static [u8])];

/// A set of files by name. All kinds give their bytes without copying them.
#[derive(Debug, Clone)]
pub enum Source {
    Folder(PathBuf),
    Embedded {
        name: &'static str,
        files: StaticFiles,
    },
    /// Files that were made from one of another kind, `place`.
    Made {
        place: String,
        files: Vec<(&'static str, Bytes)>,
    },
}

impl Source {
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Source::Folder(path.into())
    }

    pub fn embedded(name: &'static str, files: StaticFiles) -> Self {
        Source::Embedded { name, files }
    }

    /// How messages call this place.
    pub fn place(&self) -> String {
        match self {
            Source::Folder(path) => path.display().to_string(),
            Source::Embedded { name, .. } => format!("embedded {name}"),
            Source::Made { place, .. } => place.clone(),
        }
    }

    /// The bytes of a file, mapped into memory; `None` where there is no such file.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>, Error> {
        match self {
            Source::Folder(folder) => map(&folder.join(name)),
            Source::Embedded { files, .. } => {
                Ok(files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| Bytes::from_static(bytes)))
            }
            Source::Made { files, .. } => {
                Ok(files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.clone()))
            }
        }
    }

    /// The names of all files, sorted; folders inside are not entered.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let mut names: Vec<String> = match self {
            Source::Folder(folder) => {
                let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
                let mut names = Vec::new();
                for entry in entries {
                    let entry = entry.map_err(|e| Error::io(folder, e))?;
                    // A name that is not UTF-8 is no file of a checkpoint. The hub's cache holds links.
                    if let Ok(name) = entry.file_name().into_string()
                        && entry.path().is_file()
                    {
                        names.push(name);
                    }
                }
                names
            }
            Source::Embedded { files, .. } => files.iter().map(|(name, _)| name.to_string()).collect(),
            Source::Made { files, .. } => files.iter().map(|(name, _)| name.to_string()).collect(),
        };
        names.sort();
        Ok(names)
    }
}

/// Maps a file; `None` where it does not exist.
fn map(path: &Path) -> Result<Option<Bytes>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    if file.metadata().map_err(|e| Error::io(path, e))?.len() == 0 {
        // An empty file cannot be mapped.
        return Ok(Some(Bytes::new()));
    }
    // SAFETY: the mapping is read-only and owned by the `Bytes`. That nobody truncates a checkpoint while it is
    // served is the one assumption of every program that maps weights; writers here replace files by rename.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    Ok(Some(Bytes::from_owner(map)))
}
