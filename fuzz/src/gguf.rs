//! The header of a GGUF file.

use std::collections::HashSet;

use ferrotron::weights::gguf::parse;

use super::Choices;

/// A file is refused or consistent: tensors have different names and exactly the bytes that type and shape ask for, and
/// no two share one; lists give as many elements as they say.
pub fn gguf(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    let file = if kind.is_multiple_of(4) { rest.to_vec() } else { file(&mut Choices(rest), kind % 4 == 1) };
    let whole = file.len();
    let Ok(parsed) = parse("fuzzed", file.into()) else { return };
    let mut names = HashSet::new();
    let mut bytes = 0;
    for tensor in &parsed.tensors {
        assert!(names.insert(&tensor.name), "{}", tensor.name);
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.bytes.len(), elements / tensor.encoding.elements() * tensor.encoding.bytes());
        bytes += tensor.bytes.len();
    }
    assert!(bytes < whole, "{bytes} bytes of tensors in a file of {whole}");
    if let Ok(list) = parsed.metadata.texts("list") {
        assert!(list.is_empty() || list.texts().count() == list.len());
    }
    if let Ok(Some(list)) = parsed.metadata.optional_list("list") {
        assert_eq!(list.values().count(), list.len());
    }
}

/// A file of a few entries and tensors. A `sound` one has the lengths and offsets that it needs, whatever else it says.
fn file(choices: &mut Choices, sound: bool) -> Vec<u8> {
    const NAMES: [&str; 5] = ["list", "a", "", "é", "general.alignment"];
    const KINDS: [u32; 12] = [0, 1, 2, 4, 6, 7, 8, 9, 10, 12, 13, 1 << 31];
    /// Type, elements and bytes of a block.
    const TYPES: [(u32, u64, u64); 8] = [
        (0, 1, 4),
        (30, 1, 2),
        (8, 32, 34),
        (12, 256, 144),
        (14, 256, 210),
        (40, 64, 36),
        (10, 256, 84),
        (99, 1, 1),
    ];
    const SIZES: [u64; 9] = [1, 2, 32, 64, 256, 0, 1 << 32, 1 << 62, u64::MAX];
    const LIES: [u64; 6] = [0, 1, 32, 1 << 20, 1 << 63, u64::MAX];
    let text = |out: &mut Vec<u8>, text: &str, len: u64| {
        out.extend(len.to_le_bytes());
        out.extend(text.as_bytes());
    };
    let (mut out, mut end) = (Vec::new(), 0u64);
    let (tensors, entries) = (u64::from(choices.byte() % 4), u64::from(choices.byte() % 4));
    for _ in 0..entries {
        let name = choices.of(&NAMES);
        text(&mut out, name, if sound { name.len() as u64 } else { choices.of(&LIES) });
        let kind = choices.of(&KINDS);
        out.extend(kind.to_le_bytes());
        if kind == 9 {
            let count = u64::from(choices.byte() % 4);
            out.extend(choices.of(&KINDS).to_le_bytes());
            out.extend(if sound { count } else { choices.of(&LIES) }.to_le_bytes());
        }
        // Enough for any value, or for the beginning of the next thing that is not there.
        out.extend((0..choices.byte() % 16).map(|i| i & 1));
    }
    for index in 0..tensors {
        let name = ["w", "x", "y", "w"][index as usize];
        text(&mut out, name, 1);
        let (kind, elements, bytes) = choices.of(&TYPES);
        let shape: Vec<u64> = (0..choices.byte() % 6).map(|_| choices.of(&SIZES)).collect();
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        let len = shape.iter().fold(1, |n: u64, &d| n.wrapping_mul(d)).wrapping_mul(bytes) / elements;
        out.extend(if sound { end } else { choices.of(&LIES) }.to_le_bytes());
        end = end.wrapping_add(len).wrapping_add(31) & !31;
    }
    let mut file = b"GGUF".to_vec();
    file.extend(if sound { 3 } else { u32::from(choices.byte() % 5) }.to_le_bytes());
    file.extend(if sound { tensors } else { choices.of(&LIES) }.to_le_bytes());
    file.extend(if sound { entries } else { choices.of(&LIES) }.to_le_bytes());
    file.extend(out);
    // What does not fit into a test's memory is missing from the file, which is a lie as well.
    let data = if sound { end } else { u64::from(choices.byte()) };
    file.resize(file.len().next_multiple_of(32) + data.min(1 << 16) as usize, 0);
    file
}
