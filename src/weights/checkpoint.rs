//! A checkpoint: tensors by name, wherever they are stored.

use std::collections::btree_map::{BTreeMap, Entry as Slot};

use bytes::Bytes;
use safetensors::Dtype;
use serde::Deserialize;

use super::header;
use super::{Blocks, Error, Source, Stored};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Puzzle keeps its MTP block in a file beside the rest, which its index may not mention.
const MTP: &str = "mtp.safetensors";

/// The tensors of all files. Opening reads headers only; the data stays on disk until it is touched.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    files: Vec<String>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    encoding: Encoding,
    shape: Box<[usize]>,
    order: RowOrder,
    bytes: Bytes,
}

/// How the elements of a stored tensor are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Plain(Dtype),
    /// Along the last dimension.
    Blocks(Blocks),
}

impl Encoding {
    /// Elements that are encoded together.
    pub fn elements(self) -> usize {
        match self {
            Encoding::Plain(_) => 1,
            Encoding::Blocks(blocks) => blocks.weights(),
        }
    }

    /// Bytes of so many elements. No type of a part of a byte is read.
    pub fn bytes(self) -> usize {
        match self {
            Encoding::Plain(dtype) => dtype.bitsize() / 8,
            Encoding::Blocks(blocks) => blocks.bytes(),
        }
    }

    pub fn name(self) -> String {
        match self {
            Encoding::Plain(dtype) => format!("{dtype:?}"),
            Encoding::Blocks(blocks) => blocks.name().into(),
        }
    }
}

/// How the rows of a stored matrix follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    AsIs,
    /// In each head of `head` rows, row 2 j is row j and row 2 j + 1 is row head / 2 + j: what rotary embeddings of
    /// neighbouring pairs want, and llama.cpp's converter writes for models without them too.
    Interleaved {
        head: usize,
    },
}

impl RowOrder {
    /// Where row `row` of the matrix is stored.
    pub fn stored_at(self, row: usize) -> usize {
        match self {
            RowOrder::AsIs => row,
            RowOrder::Interleaved { head } => {
                let (first, row, half) = (row / head * head, row % head, head / 2);
                first + if row < half { 2 * row } else { 2 * (row - half) + 1 }
            }
        }
    }
}

/// A tensor to make a checkpoint of.
#[derive(Debug, Clone)]
pub struct Part {
    /// As safetensors checkpoints name it.
    pub name: String,
    pub encoding: Encoding,
    pub shape: Vec<usize>,
    pub order: RowOrder,
    pub bytes: Bytes,
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

    /// A checkpoint of tensors that were found elsewhere: of each file its name and tensors. `source` answers for the
    /// files beside them.
    ///
    /// Errors: a name that is there twice.
    pub fn from_parts(source: Source, files: Vec<(String, Vec<Part>)>) -> Result<Self, Error> {
        let mut checkpoint = Checkpoint { source, files: Vec::new(), tensors: BTreeMap::new() };
        for (name, parts) in files {
            checkpoint.files.push(name);
            for part in parts {
                checkpoint.insert(part)?;
            }
        }
        Ok(checkpoint)
    }

    /// Adds a tensor of the last file.
    fn insert(&mut self, part: Part) -> Result<(), Error> {
        let file = self.files.len() - 1;
        match self.tensors.entry(part.name) {
            Slot::Occupied(slot) => {
                let other = self.files[slot.get().file].clone();
                let file = self.files[file].clone();
                Err(Error::TwiceAcrossFiles { file, other, tensor: slot.key().clone() })
            }
            Slot::Vacant(slot) => {
                let Part { encoding, shape, order, bytes, .. } = part;
                slot.insert(Place { file, encoding, shape: shape.into(), order, bytes });
                Ok(())
            }
        }
    }

    /// Adds one file; `expected` are the tensors that the index puts there.
    fn add(&mut self, shard: String, expected: &[String]) -> Result<(), Error> {
        let Some(bytes) = self.source.file(&shard)? else {
            return Err(Error::MissingShard { place: self.source.place(), shard, tensors: expected.len() });
        };
        let entries = header::parse(&shard, &bytes)?.entries;
        self.files.push(shard);
        for entry in entries {
            // Offsets inside a mapped file fit usize, because the mapping does.
            let bytes = bytes.slice(entry.start as usize..entry.end as usize);
            self.insert(Part {
                name: entry.name,
                encoding: Encoding::Plain(entry.dtype),
                shape: entry.shape,
                order: RowOrder::AsIs,
                bytes,
            })?;
        }
        let file = self.files.len() - 1;
        for name in expected {
            if self.tensors.get(name).is_none_or(|place| place.file != file) {
                let shard = self.files[file].clone();
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
        self.files.iter().map(String::as_str)
    }

    /// A tensor of plain elements; `None` where there is none, or one in blocks.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let place = self.tensors.get(name)?;
        match place.encoding {
            Encoding::Plain(dtype) => {
                Some(Tensor { dtype, shape: place.shape.to_vec(), bytes: place.bytes.clone() })
            }
            Encoding::Blocks(_) => None,
        }
    }

    /// The bytes of a tensor in blocks of exactly this shape; `None` where there is none.
    pub(super) fn in_blocks(&self, name: &str, shape: &[usize]) -> Option<(Blocks, Bytes)> {
        let place = self.tensors.get(name).filter(|place| *place.shape == *shape)?;
        match place.encoding {
            Encoding::Blocks(blocks) => Some((blocks, place.bytes.clone())),
            Encoding::Plain(_) => None,
        }
    }

    /// How the rows of a matrix are stored.
    pub(super) fn row_order(&self, name: &str) -> RowOrder {
        self.tensors.get(name).map_or(RowOrder::AsIs, |place| place.order)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type and shape of a tensor without its bytes; for messages too.
    pub fn stored(&self, name: &str) -> Stored {
        match self.tensors.get(name) {
            Some(Place { encoding: Encoding::Plain(dtype), shape, .. }) => {
                Stored::Tensor(*dtype, shape.to_vec())
            }
            Some(Place { encoding: Encoding::Blocks(blocks), shape, .. }) => {
                Stored::Blocks(*blocks, shape.to_vec())
            }
            None => Stored::Nothing,
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors, without headers.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|p| p.bytes.len() as u64).sum()
    }

    /// Bytes of one tensor; 0 where there is none.
    pub fn bytes_of(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |p| p.bytes.len() as u64)
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
