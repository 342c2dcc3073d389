//! The header of a GGUF file, believed only where it is consistent.
//!
//! A file is: `GGUF`, u32 version, u64 count of tensors, u64 count of metadata entries; the entries (name, type, value);
//! for each tensor its name, dimensions (innermost first), type and offset; padding to `general.alignment`; the data.
//! All numbers are little-endian. A string is a u64 length and that many bytes of UTF-8.
//!
//! ```no_run
//! use ferrotron::weights::{Source, gguf};
//! let source = Source::folder("models");
//! let file = gguf::parse("nano.gguf", source.file("nano.gguf")?.unwrap_or_default())?;
//! let layers = file.metadata.size("nemotron_h.block_count")?;
//! # Ok::<(), ferrotron::weights::Error>(())
//! ```

mod metadata;

use std::collections::HashSet;

use bytes::Bytes;
use safetensors::Dtype;

use super::{Blocks, Encoding, Error};
pub use metadata::{List, Metadata, Value};

/// Dimensions of a tensor: the format's own limit.
const RANK_LIMIT: usize = 4;

/// Bytes of a name: the format's own limit for keys; those of tensors are far shorter.
const NAME_LIMIT: u64 = 1 << 16;

/// What data is aligned to where the file does not say.
const ALIGNMENT: u64 = 32;

/// No file aligns further than a large page; a larger number is a mistake.
const ALIGNMENT_LIMIT: u64 = 1 << 21;

/// One file: what it says of the model, and its tensors.
#[derive(Debug)]
pub struct Gguf {
    pub metadata: Metadata,
    /// In the file's order.
    pub tensors: Vec<Stored>,
}

/// A tensor of a file.
#[derive(Debug, Clone)]
pub struct Stored {
    pub name: String,
    pub encoding: Encoding,
    /// Outermost first, as everywhere else here.
    pub shape: Vec<usize>,
    /// A part of the file, not a copy.
    pub bytes: Bytes,
}

/// Reads the header at the front of `bytes`, the whole content of `file` (only a name, for messages).
///
/// Never panics, and allocates no more than a small multiple of the header's true length. Every tensor lies inside
/// the file, has exactly the bytes that type and dimensions ask for, and shares them with no other.
pub fn parse(file: &str, bytes: Bytes) -> Result<Gguf, Error> {
    let mut reader = Reader { file, bytes: &bytes, at: 0 };
    if reader.take(4, "the magic number")? != b"GGUF" {
        let got = bytes.iter().take(4).copied().collect();
        return Err(Error::NotGguf { file: file.into(), got });
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        got => return Err(Error::GgufVersion { file: file.into(), got }),
    }
    let tensors = reader.u64("the count of tensors")?;
    let entries = reader.u64("the count of metadata entries")?;
    let metadata = metadata::read(&mut reader, &bytes, entries)?;
    let mut headers = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let header = tensor(&mut reader)?;
        if !names.insert(header.name.clone()) {
            return Err(entry(file, &header.name, "is listed twice"));
        }
        headers.push(header);
    }
    let alignment = metadata.size_or("general.alignment", ALIGNMENT)?;
    if !alignment.is_power_of_two() || alignment > ALIGNMENT_LIMIT {
        let expected = format!("a power of two up to {ALIGNMENT_LIMIT}");
        return Err(metadata.wrong("general.alignment", expected, alignment));
    }
    // A position inside a file that is in memory fits usize, and so does the next multiple of a small number.
    let start = (reader.at as u64).next_multiple_of(alignment);
    let tensors = place(file, &bytes, start, alignment, headers)?;
    Ok(Gguf { metadata, tensors })
}

/// A tensor as the header lists it.
struct Header {
    name: String,
    encoding: Encoding,
    shape: Vec<usize>,
    /// Bytes from the beginning of the data.
    offset: u64,
    len: u64,
}

fn tensor(reader: &mut Reader<'_>) -> Result<Header, Error> {
    let name = reader.name("a tensor's name")?.to_owned();
    let rank = reader.u32("a tensor's count of dimensions")? as usize;
    if !(1..=RANK_LIMIT).contains(&rank) {
        let reason = format!("has {rank} dimensions; expected 1 to {RANK_LIMIT}");
        return Err(entry(reader.file, &name, reason));
    }
    let mut shape = Vec::with_capacity(rank);
    for _ in 0..rank {
        shape.push(reader.u64("a dimension")?);
    }
    let code = reader.u32("a tensor's type")?;
    let offset = reader.u64("a tensor's offset")?;
    let Some(encoding) = encoding(code) else {
        let (file, got) = (reader.file.into(), type_name(code));
        return Err(Error::GgufType { file, tensor: name, got });
    };
    let width = encoding.elements() as u64;
    if !shape[0].is_multiple_of(width) {
        let reason =
            format!("has rows of {}; expected a multiple of {width}, as {} asks", shape[0], encoding.name());
        return Err(entry(reader.file, &name, reason));
    }
    let elements = shape.iter().try_fold(1u64, |product, &d| product.checked_mul(d)).filter(|&n| n > 0);
    let len = elements.and_then(|n| (n / width).checked_mul(encoding.bytes() as u64));
    let sizes = shape.iter().rev().map(|&d| usize::try_from(d)).collect::<Result<_, _>>();
    match (len, sizes) {
        (Some(len), Ok(shape)) => Ok(Header { name, encoding, shape, offset, len }),
        _ => Err(entry(reader.file, &name, format!("has the dimensions {shape:?}, which no file can hold"))),
    }
}

/// The bytes of every tensor, checked to be aligned, inside the file, and nobody else's.
fn place(
    file: &str,
    bytes: &Bytes,
    start: u64,
    alignment: u64,
    headers: Vec<Header>,
) -> Result<Vec<Stored>, Error> {
    let got = bytes.len() as u64;
    if let Some(header) = headers.iter().find(|h| !h.offset.is_multiple_of(alignment)) {
        let reason = format!("starts at byte {}; expected a multiple of {alignment}", header.offset);
        return Err(entry(file, &header.name, reason));
    }
    let mut order: Vec<&Header> = headers.iter().collect();
    order.sort_by_key(|h| h.offset);
    let mut end = 0;
    for header in order {
        if header.offset < end {
            let reason = format!(
                "starts at byte {} of the data; the tensor before it ends at byte {end}",
                header.offset
            );
            return Err(entry(file, &header.name, reason));
        }
        let expected = header.offset.checked_add(header.len).and_then(|n| n.checked_add(start));
        match expected {
            Some(expected) if expected <= got => end = expected - start,
            expected => {
                let expected = expected.unwrap_or(u64::MAX);
                return Err(Error::FileLength { file: file.into(), expected, got });
            }
        }
    }
    let stored = |header: Header| {
        let from = (start + header.offset) as usize;
        let bytes = bytes.slice(from..from + header.len as usize);
        Stored { name: header.name, encoding: header.encoding, shape: header.shape, bytes }
    };
    Ok(headers.into_iter().map(stored).collect())
}

/// What the format's type numbers mean to us.
fn encoding(code: u32) -> Option<Encoding> {
    Some(match code {
        0 => Encoding::Plain(Dtype::F32),
        1 => Encoding::Plain(Dtype::F16),
        30 => Encoding::Plain(Dtype::BF16),
        2 => Encoding::Blocks(Blocks::Q4_0),
        8 => Encoding::Blocks(Blocks::Q8_0),
        12 => Encoding::Blocks(Blocks::Q4K),
        13 => Encoding::Blocks(Blocks::Q5K),
        14 => Encoding::Blocks(Blocks::Q6K),
        20 => Encoding::Blocks(Blocks::Iq4Nl),
        23 => Encoding::Blocks(Blocks::Iq4Xs),
        40 => Encoding::Blocks(Blocks::Nvfp4),
        _ => return None,
    })
}

/// The name of a type that is not read here, so that a message says what a user knows it by.
fn type_name(code: u32) -> String {
    let name = match code {
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24..=28 => "integers or F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("type {code}"),
    };
    name.into()
}

fn entry(file: &str, tensor: &str, reason: impl Into<String>) -> Error {
    Error::Entry { file: file.into(), tensor: tensor.into(), reason: reason.into() }
}

/// Reads on from a place in a file, never past its end.
struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], Error> {
        match self.at.checked_add(len).and_then(|end| self.bytes.get(self.at..end)) {
            Some(bytes) => {
                self.at += len;
                Ok(bytes)
            }
            None => Err(self.wrong(format!(
                "{what} takes {len} bytes, {} are left (truncated or incomplete download?)",
                self.bytes.len() - self.at
            ))),
        }
    }

    fn word<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut word = [0; N];
        word.copy_from_slice(self.take(N, what)?);
        Ok(word)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.word(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.word(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<&'a str, Error> {
        let len = self.u64(what)?;
        // A length beyond the address space is beyond the file as well.
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX), what)?;
        std::str::from_utf8(bytes).map_err(|e| self.wrong(format!("{what} is not UTF-8: {e}")))
    }

    fn name(&mut self, what: &str) -> Result<&'a str, Error> {
        let name = self.text(what)?;
        match name.len() as u64 {
            1..=NAME_LIMIT => Ok(name),
            len => Err(self.wrong(format!("{what} has {len} bytes; expected 1 to {NAME_LIMIT}"))),
        }
    }

    fn wrong(&self, reason: String) -> Error {
        Error::GgufHeader { file: self.file.into(), at: self.at as u64, reason }
    }
}
