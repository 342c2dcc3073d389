//! Writing a safetensors file whose tensors are known by shape before their data is: data may come in any order,
//! and the file takes its name only when it is complete.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{Error, header};

/// Data begins at a multiple of this, so that mapped tensors are aligned for every load.
const ALIGNMENT: usize = 64;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Planned {
    /// Its bytes; such a tensor is made from one that exists, so its size cannot overflow.
    pub fn bytes(&self) -> u64 {
        header::data_len(self.dtype, &self.shape).unwrap_or(u64::MAX)
    }
}

/// One file being written, under a temporary name until [`Writer::finish`].
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    /// Start and length of every tensor not yet written.
    missing: BTreeMap<String, (u64, u64)>,
}

impl Writer {
    /// Creates `path` with room for `tensors`. Wide elements come first, so that each is aligned to its size.
    pub fn create(path: &Path, mut tensors: Vec<Planned>) -> Result<Self, Error> {
        tensors.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut ranges = Vec::with_capacity(tensors.len());
        let mut end = 0u64;
        for tensor in tensors {
            let (start, bytes) = (end, tensor.bytes());
            end += bytes;
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
            entries.insert(tensor.name.clone(), entry);
            ranges.push((tensor.name, (start, bytes)));
        }
        let mut text = Value::Object(entries).to_string().into_bytes();
        // The format allows trailing spaces for exactly this.
        text.resize((8 + text.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
        let data_start = 8 + text.len() as u64;

        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let io = |e| Error::io(&partial, e);
        let mut file = File::create(&partial).map_err(io)?;
        file.write_all(&(text.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&text).map_err(io)?;
        file.set_len(data_start + end).map_err(io)?;
        let missing =
            ranges.into_iter().map(|(name, (start, len))| (name, (data_start + start, len))).collect();
        Ok(Writer { path: path.into(), partial, file, missing })
    }

    /// Writes the data of one planned tensor.
    ///
    /// Panics if it was not planned, was written before, or has another length: the caller planned it.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), Error> {
        let place = self.missing.remove(name);
        let (start, len) = place.unwrap_or_else(|| panic!("{name} is not waiting to be written"));
        assert_eq!(len, data.len() as u64, "bytes of {name}");
        let io = |e| Error::io(&self.partial, e);
        self.file.seek(SeekFrom::Start(start)).map_err(io)?;
        self.file.write_all(data).map_err(io)
    }

    /// Gives the file its name. Panics if a planned tensor was not written.
    pub fn finish(self) -> Result<(), Error> {
        assert!(self.missing.is_empty(), "not written: {:?}", self.missing.keys().next());
        self.file.sync_all().map_err(|e| Error::io(&self.partial, e))?;
        std::fs::rename(&self.partial, &self.path).map_err(|e| Error::io(&self.path, e))
    }
}
