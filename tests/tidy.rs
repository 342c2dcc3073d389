//! The rules of the house that a compiler does not check: which room may know which.

use std::path::{Path, PathBuf};

/// What each room may name of the others. `ops` and `backend` read layer shapes from `model::config`, which is
/// plain data; that is the one arrow that points up.
const ARROWS: [(&str, &[&str]); 9] = [
    ("api", &["text", "engine", "sample"]),
    ("engine", &["schedule", "sample", "model"]),
    ("model", &["backend", "weights", "ops"]),
    ("backend", &["ops", "weights", "model::config"]),
    ("ops", &["weights", "backend::SequenceInputs", "backend::StepInputs", "model::config"]),
    ("schedule", &["backend", "model::Limits"]),
    ("text", &[]),
    ("sample", &[]),
    ("weights", &[]),
];

/// Crates that stay in one room.
const GUESTS: [(&str, &[&str]); 8] = [
    ("axum", &["api", "cli"]),
    ("hyper", &["api", "cli"]),
    ("tokenizers", &["text"]),
    ("minijinja", &["text"]),
    ("safetensors", &["weights"]),
    ("rayon", &["backend", "model", "cli"]),
    ("hf_hub", &["cli"]),
    ("llguidance", &["sample"]),
];

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("src is readable") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).expect("sources are UTF-8");
                found.push((path, text));
            }
        }
    }
    found
}

/// The room a source file stands in: the first folder below src.
fn room(path: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let inside = path.strip_prefix(root).expect("under src");
    inside.components().next().expect("a name").as_os_str().to_string_lossy().replace(".rs", "")
}

/// Code without line comments and without what follows the first test module.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]").unwrap_or(text.len());
    text[..end].lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

#[test]
fn knowledge_points_one_way() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == room) else { continue };
        let code = code(&text);
        for (at, _) in code.match_indices("crate::") {
            let named = &code[at + 7..];
            let target: String = named.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let permitted = target == room
                || target == "backend" && room == "backend"
                || allowed.iter().any(|a| named.starts_with(a));
            if ARROWS.iter().any(|(name, _)| *name == target) && !permitted {
                let line: String = named.chars().take(40).collect();
                wrong.push(format!("{}: {room} names crate::{line}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn guests_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let (room, code) = (room(&path), code(&text));
        for (guest, rooms) in GUESTS {
            if code.contains(&format!("{guest}::")) && !rooms.contains(&room.as_str()) {
                wrong.push(format!("{}: {guest} is a guest of {rooms:?}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn only_the_command_line_prints_or_reads_the_environment() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        if room == "cli" || room == "main" {
            continue;
        }
        for word in ["println!(", "print!(", "env::var(", "dbg!("] {
            if code(&text).contains(word) {
                wrong.push(format!("{}: {word}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let bare = line.trim_start();
            if bare.starts_with("//") || !(bare.contains("unsafe {") || bare.starts_with("unsafe impl")) {
                continue;
            }
            let above = lines[i.saturating_sub(6)..=i].iter().any(|l| l.contains("SAFETY"));
            if !above {
                wrong.push(format!("{}:{}: {bare}", path.display(), i + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
