//! A checkpoint: tensors by name, wherever they are stored.

use std::collections::btree_map::{BTreeMap, Entry as Slot};

use bytes::Bytes;
use safetensors::Dtype;
use serde::Deserialize;

use super::header;
use super::{Error, Source, Stored};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Puzzle keeps its MTP block in a file beside the rest, which its index may not mention.
const MTP: &str = "mtp.safetensors";

/// The tensors of all files. Opening reads headers only; the data stays on disk until it is touched.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    files: Vec<(String, Bytes)>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Box<[usize]>,
    start: usize,
    end: usize,
}

/// A tensor as stored: row-major, little-endian.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards of its index, or else every `*.safetensors` there is.
    ///
    /// Errors: a missing shard, a header that lies, a tensor that is in two files or not where the index says.
    pub fn open(source: Source) -> Result<Self, Error> {
        let names = source.names()?;
        let has = |name: &str| names.iter().any(|n| n == name);
        let index = if has(INDEX) { read_index(&source)? } else { BTreeMap::new() };
        let mut shards: Vec<String> = if has(INDEX) {
            index.keys().cloned().collect()
        } else if has(SINGLE) {
            vec![SINGLE.into()]
        } else {
            names.iter().filter(|n| n.ends_with(".safetensors")).cloned().collect()
        };
        if has(MTP) && !shards.iter().any(|s| s == MTP) {
            shards.push(MTP.into());
        }
        if shards.is_empty() {
            return Err(Error::NoWeights { place: source.place() });
        }
        let mut checkpoint = Checkpoint { source, files: Vec::new(), tensors: BTreeMap::new() };
        for shard in shards {
            let expected = index.get(&shard).map(Vec::as_slice).unwrap_or_default();
            checkpoint.add(shard, expected)?;
        }
        Ok(checkpoint)
    }

    /// Adds one file; `expected` are the tensors that the index puts there.
    fn add(&mut self, shard: String, expected: &[String]) -> Result<(), Error> {
        let Some(bytes) = self.source.file(&shard)? else {
            return Err(Error::MissingShard { place: self.source.place(), shard, tensors: expected.len() });
        };
        let file = self.files.len();
        for entry in header::parse(&shard, &bytes)?.entries {
            match self.tensors.entry(entry.name) {
                Slot::Occupied(slot) => {
                    let other = self.files[slot.get().file].0.clone();
                    return Err(Error::TwiceAcrossFiles { file: shard, other, tensor: slot.key().clone() });
                }
                Slot::Vacant(slot) => {
                    // Offsets inside a mapped file fit usize, because the mapping does.
                    slot.insert(Place {
                        file,
                        dtype: entry.dtype,
                        shape: entry.shape.into(),
                        start: entry.start as usize,
                        end: entry.end as usize,
                    });
                }
            }
        }
        self.files.push((shard, bytes));
        for name in expected {
            if self.tensors.get(name).is_none_or(|place| place.file != file) {
                let shard = self.files[file].0.clone();
                return Err(Error::NotInShard { shard, tensor: name.clone() });
            }
        }
        Ok(())
    }

    /// Another file beside the weights, such as `config.json`.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>, Error> {
        self.source.file(name)
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The files that hold the tensors.
    pub fn shards(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let place = self.tensors.get(name)?;
        let bytes = self.files[place.file].1.slice(place.start..place.end);
        Some(Tensor { dtype: place.dtype, shape: place.shape.to_vec(), bytes })
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Dtype and shape of a tensor without its bytes; for messages too.
    pub fn stored(&self, name: &str) -> Stored {
        match self.tensors.get(name) {
            Some(place) => Stored::Tensor(place.dtype, place.shape.to_vec()),
            None => Stored::Nothing,
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors, without headers.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|p| (p.end - p.start) as u64).sum()
    }

    /// Bytes of one tensor; 0 where there is none.
    pub fn bytes_of(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |p| (p.end - p.start) as u64)
    }
}

/// The index turned round: shard to its tensors.
fn read_index(source: &Source) -> Result<BTreeMap<String, Vec<String>>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bad = |reason: String| Error::Index { index: format!("{}/{INDEX}", source.place()), reason };
    let bytes = source.file(INDEX)?.unwrap_or_default();
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut shards = BTreeMap::<String, Vec<String>>::new();
    for (tensor, shard) in index.weight_map {
        // A shard is a file of this folder; a path would let a checkpoint read what is outside it.
        if shard.contains(['/', '\\']) || shard == ".." {
            return Err(bad(format!("tensor {tensor}: shard {shard:?} is a path; expected a file name")));
        }
        shards.entry(shard).or_default().push(tensor);
    }
    if shards.is_empty() {
        return Err(bad("weight_map is empty".into()));
    }
    Ok(shards)
}
