//! The header of a safetensors file, believed only where it is consistent.
//!
//! A file is: u64 little-endian header length, that many bytes of JSON (a map from tensor name to dtype,
//! shape and data offsets), then the data, without holes. The `safetensors` crate checks much of this but
//! keeps the last of two entries of one name and does not name the tensor at fault, so the few lines of
//! parsing are ours and the dtypes are the crate's.

use std::collections::HashSet;
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::Error;

/// The format's own limit; Super's largest real header is about 1 MB.
pub const HEADER_LIMIT: u64 = 100_000_000;

/// Dimensions of a tensor. Real ones have at most 3; a longer list is a mistake or an attack on memory.
const RANK_LIMIT: usize = 8;

/// The tensors of one file, in the order of their data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub entries: Vec<Entry>,
    /// Where the data begins in the file.
    pub data_start: u64,
}

/// One tensor: its bytes are `file[start..end]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub start: u64,
    pub end: u64,
}

/// Reads the header at the front of `bytes`, the whole content of `file` (only a name, for messages).
///
/// Never panics and allocates no more than a small multiple of the header's true length. Every returned
/// range lies inside `bytes` and has exactly the length that dtype and shape ask for.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Header, Error> {
    let got = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::TooShort { file: file.into(), expected: 8, got });
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        return Err(Error::HeaderLength { file: file.into(), got: length, limit: HEADER_LIMIT });
    }
    // The cast is safe: the length is at most HEADER_LIMIT.
    let Some(json) = rest.get(..length as usize) else {
        return Err(Error::TooShort { file: file.into(), expected: 8 + length, got });
    };
    let text = std::str::from_utf8(json)
        .map_err(|e| Error::HeaderText { file: file.into(), reason: format!("not UTF-8: {e}") })?;
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|e| Error::HeaderText { file: file.into(), reason: e.to_string() })?;
    place(file, raw, 8 + length, got)
}

/// Checks the entries against each other and against the file's length.
fn place(file: &str, raw: RawHeader, data_start: u64, file_len: u64) -> Result<Header, Error> {
    let mut names = HashSet::with_capacity(raw.tensors.len());
    let mut entries = Vec::with_capacity(raw.tensors.len());
    for (name, tensor) in &raw.tensors {
        if !names.insert(name.as_str()) {
            return Err(entry_error(file, name, "the name occurs twice"));
        }
        let (start, end) = tensor.data_offsets;
        if start > end {
            return Err(entry_error(file, name, &format!("data_offsets [{start}, {end}] run backwards")));
        }
        if tensor.shape.len() > RANK_LIMIT {
            let reason = format!("{} dimensions; expected at most {RANK_LIMIT}", tensor.shape.len());
            return Err(entry_error(file, name, &reason));
        }
        let Some(expected) = data_len(tensor.dtype, &tensor.shape) else {
            let reason =
                format!("{:?} {:?} is not a whole number of bytes below 2^64", tensor.dtype, tensor.shape);
            return Err(entry_error(file, name, &reason));
        };
        if expected != end - start {
            return Err(Error::Length {
                file: file.into(),
                tensor: name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                expected,
                got: end - start,
            });
        }
        entries.push(Entry {
            name: name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            start,
            end,
        });
    }
    entries.sort_by_key(|e| (e.start, e.end));
    let mut next = 0;
    for entry in &entries {
        if entry.start != next {
            return Err(Error::Layout {
                file: file.into(),
                tensor: entry.name.clone(),
                expected: next,
                got: entry.start,
            });
        }
        next = entry.end;
    }
    let expected = data_start.checked_add(next);
    if expected != Some(file_len) {
        return Err(Error::FileLength {
            file: file.into(),
            expected: expected.unwrap_or(u64::MAX),
            got: file_len,
        });
    }
    // The last end fits the file, so none of these sums can overflow.
    for entry in &mut entries {
        entry.start += data_start;
        entry.end += data_start;
    }
    Ok(Header { entries, data_start })
}

/// Bytes of a tensor; `None` where they overflow or do not fill the last byte.
pub fn data_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn entry_error(file: &str, tensor: &str, reason: &str) -> Error {
    Error::Entry { file: file.into(), tensor: tensor.into(), reason: reason.into() }
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The JSON map as a list, so that a repeated name is still visible.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor name to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader { tensors })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file with this header text and so many bytes of data.
    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}"#;

    #[test]
    fn a_good_header_gives_absolute_ranges_in_data_order() {
        let header = parse("f", &file(GOOD, 16)).unwrap();
        let start = 8 + GOOD.len() as u64;
        let found: Vec<_> = header.entries.iter().map(|e| (e.name.as_str(), e.start, e.end)).collect();
        assert_eq!(found, [("a", start, start + 12), ("b", start + 12, start + 16)]);
    }

    #[track_caller]
    fn check(json: &str, data: usize, message: &str) {
        let error = parse("f", &file(json, data)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn lies_are_named() {
        check(GOOD, 15, "expected 167 from the header");
        check(GOOD, 17, "expected 167 from the header");
        check("{", 0, "not valid");
        check(r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}}"#, 1, "Q4");
        check(
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}"#,
            1,
            "needs 2 bytes; data_offsets give 1",
        );
        check(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}"#, 1, "backwards");
        check(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, 2, "starts at byte 1");
        check(
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            2,
            "twice",
        );
        check(
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
            3,
            "tensor b starts at byte 1 of the data; expected 2",
        );
        check(
            r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
            0,
            "not a whole number of bytes below 2^64",
        );
        check(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, 1, "whole number of bytes");
        check(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1, "not valid");
        check(r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#, 1, "9 dimensions");
    }

    #[test]
    fn short_and_absurd_lengths_are_refused_before_anything_is_allocated() {
        assert!(matches!(parse("f", b"1234"), Err(Error::TooShort { got: 4, .. })));
        assert!(matches!(parse("f", &u64::MAX.to_le_bytes()), Err(Error::HeaderLength { .. })));
        let mut claims = 1000u64.to_le_bytes().to_vec();
        claims.extend_from_slice(b"{}");
        assert!(matches!(parse("f", &claims), Err(Error::TooShort { expected: 1008, got: 10, .. })));
        let mut not_text = 2u64.to_le_bytes().to_vec();
        not_text.extend_from_slice(&[0xFF, 0xFE]);
        assert!(parse("f", &not_text).unwrap_err().to_string().contains("UTF-8"));
    }

    proptest! {
        #[test]
        fn a_mutated_header_never_panics_and_never_points_outside(
            edits in prop::collection::vec((0usize..200, any::<u8>()), 1..6),
            cut in 0usize..220,
        ) {
            let mut bytes = file(GOOD, 16);
            for (at, value) in edits {
                let len = bytes.len();
                bytes[at % len] = value;
            }
            bytes.truncate(cut.max(1));
            if let Ok(header) = parse("f", &bytes) {
                for entry in header.entries {
                    prop_assert!(entry.start <= entry.end && entry.end <= bytes.len() as u64);
                    prop_assert_eq!(data_len(entry.dtype, &entry.shape), Some(entry.end - entry.start));
                }
            }
        }

        #[test]
        fn bytes_without_meaning_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse("f", &bytes);
        }
    }
}
