//! What can be wrong with a checkpoint's files and tensors.

use std::fmt;
use std::path::PathBuf;

use safetensors::Dtype;

use super::Blocks;

/// Everything that opening and reading a checkpoint can fail with. Each names the thing, the expected and the got.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("{place}: no *.safetensors file and no model.safetensors.index.json")]
    NoWeights { place: String },

    #[error("{index}: {reason}")]
    Index { index: String, reason: String },

    #[error("{place}: shard {shard} is missing; the index puts {tensors} tensors in it")]
    MissingShard { place: String, shard: String, tensors: usize },

    #[error("{shard}: tensor {tensor} is missing; the index puts it there")]
    NotInShard { shard: String, tensor: String },

    #[error("{file}: tensor {tensor} is also in {other}")]
    TwiceAcrossFiles { file: String, other: String, tensor: String },

    #[error("{file}: not a safetensors file: {got} bytes, expected at least {expected}")]
    TooShort { file: String, expected: u64, got: u64 },

    #[error("{file}: the header claims {got} bytes; expected at most {limit}")]
    HeaderLength { file: String, got: u64, limit: u64 },

    #[error("{file}: the header is not valid: {reason}")]
    HeaderText { file: String, reason: String },

    #[error("{file}: tensor {tensor}: {reason}")]
    Entry { file: String, tensor: String, reason: String },

    #[error("{file}: tensor {tensor}: {dtype:?} {shape:?} needs {expected} bytes; data_offsets give {got}")]
    Length { file: String, tensor: String, dtype: Dtype, shape: Vec<usize>, expected: u64, got: u64 },

    #[error(
        "{file}: tensor {tensor} starts at byte {got} of the data; expected {expected} (no holes, no overlaps)"
    )]
    Layout { file: String, tensor: String, expected: u64, got: u64 },

    #[error("{file}: {got} bytes; expected {expected} from the header (truncated or incomplete download?)")]
    FileLength { file: String, expected: u64, got: u64 },

    #[error("{file}: not a GGUF file: it begins with {got:?}; expected \"GGUF\"", got = String::from_utf8_lossy(got))]
    NotGguf { file: String, got: Vec<u8> },

    #[error("{file}: GGUF version {got}; expected 2 or 3 (a number like 50331648 means a big-endian file)")]
    GgufVersion { file: String, got: u32 },

    #[error("{file}: at byte {at}: {reason}")]
    GgufHeader { file: String, at: u64, reason: String },

    #[error(
        "{file}: tensor {tensor} is stored as {got}; expected F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K, IQ4_NL, \
         IQ4_XS or NVFP4: take the file in another quantisation, such as Q4_K_M"
    )]
    GgufType { file: String, tensor: String, got: String },

    #[error("{file}: {key}: expected {expected}; got {got}")]
    Metadata { file: String, key: String, expected: String, got: String },

    #[error("{tensor}: expected {expected}; got {got}")]
    Tensor { tensor: String, expected: String, got: Stored },

    #[error("{tensor}: expected {expected}; got the value {got}")]
    Value { tensor: String, expected: &'static str, got: f32 },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }
}

/// What the checkpoint holds under a name, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    Nothing,
    Tensor(Dtype, Vec<usize>),
    Blocks(Blocks, Vec<usize>),
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stored::Nothing => f.write_str("no such tensor"),
            Stored::Tensor(dtype, shape) => write!(f, "{dtype:?} {shape:?}"),
            Stored::Blocks(blocks, shape) => write!(f, "{} {shape:?}", blocks.name()),
        }
    }
}
