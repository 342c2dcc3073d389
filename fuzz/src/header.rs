//! The header of a safetensors file.

use std::collections::HashSet;
use std::fmt::Write;

use ferrotron::weights::header::parse;

use super::Choices;

/// A header is refused or consistent: the tensors have different names, stand behind each other from `data_start` to the
/// end of the file, and each has the bytes that its type and shape ask for.
pub fn header(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    let file = if kind.is_multiple_of(4) { rest.to_vec() } else { file(&mut Choices(rest), kind % 4 == 1) };
    let Ok(header) = parse("fuzzed", &file) else { return };
    let (mut next, mut names) = (header.data_start, HashSet::new());
    for entry in &header.entries {
        assert!(names.insert(&entry.name), "{header:?}");
        assert_eq!(entry.start, next, "{header:?}");
        // A file is shorter than 2^64 bits, and so is every partial product unless the shape holds a zero.
        let bits =
            entry.shape.iter().try_fold(entry.dtype.bitsize() as u128, |n, &d| n.checked_mul(d as u128));
        let got = entry.end.checked_sub(entry.start).map(|bytes| u128::from(bytes) * 8);
        assert!(got.is_some() && got == bits, "{header:?}");
        next = entry.end;
    }
    assert_eq!(next, file.len() as u64, "{header:?}");
}

/// A file of a few tensors. A `sound` one has the offsets and the length that its shapes ask for, whatever else it says.
fn file(choices: &mut Choices, sound: bool) -> Vec<u8> {
    const NAMES: [&str; 6] = ["a", "b", "", "é", "__metadata__", "a\\u0062"];
    const TYPES: [(&str, u64); 9] = [
        ("F32", 32),
        ("BF16", 16),
        ("U8", 8),
        ("F4", 4),
        ("F8_E4M3", 8),
        ("F6_E2M3", 6),
        ("BOOL", 8),
        ("F64", 64),
        ("Q4", 4),
    ];
    const SIZES: [u64; 9] = [1, 2, 3, 0, 16, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
    const OFFSETS: [u64; 6] = [0, 1, 4, 64, 1 << 63, u64::MAX];
    let (mut json, mut end) = (String::from("{"), 0u64);
    for index in 0..choices.byte() % 4 {
        let comma = if index > 0 { "," } else { "" };
        let (dtype, bits) = choices.of(&TYPES);
        let shape: Vec<u64> = (0..choices.byte() % 10).map(|_| choices.of(&SIZES)).collect();
        let len = shape.iter().fold(1, |n: u64, &d| n.wrapping_mul(d)).wrapping_mul(bits) / 8;
        let start = if sound { end } else { choices.of(&OFFSETS) };
        end = if sound { end.wrapping_add(len) } else { choices.of(&OFFSETS) };
        let name = choices.of(&NAMES);
        write!(
            json,
            r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        )
        .expect("a String takes any text");
    }
    json.push('}');
    let claimed =
        if sound { json.len() as u64 } else { (json.len() as u64).wrapping_add(choices.of(&OFFSETS)) };
    let mut file = claimed.to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    // What does not fit into a test's memory is missing from the file, which is a lie as well.
    let data = if sound { end } else { u64::from(choices.byte()) };
    file.resize(file.len() + data.min(1 << 16) as usize, 0);
    file
}
