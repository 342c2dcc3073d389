//! Batches as their users meet them: a process that is killed at any time, and started again.

#[path = "support/server.rs"]
#[allow(dead_code, reason = "what a batch does not need of a server is used by its own tests")]
mod server;

use serde_json::{Value, json};
use server::{Open, Server, eventually};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

const LINES: usize = 36;

/// Prompts of different lengths with answers of different lengths, in two dialects; every ninth is a mistake.
fn lines() -> String {
    let line = |number: usize| {
        let words = ["Hi! My name is", "One, two,", "Search the web for", "What is 17 + 25?"][number % 4];
        let words = format!("{words} {number}");
        let (url, mut body) = match number % 3 {
            0 => ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": words}]})),
            _ => ("/v1/completions", json!({"prompt": words, "ignore_eos": true})),
        };
        body["temperature"] = json!(if number % 9 == 8 { 9 } else { 0 });
        body["max_tokens"] = json!(8 + number % 17);
        json!({"custom_id": format!("line {number}"), "method": "POST", "url": url, "body": body}).to_string()
    };
    (0..LINES).map(|number| line(number) + "\n").collect()
}

struct Batch {
    folder: TempDir,
}

impl Batch {
    fn new(lines: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("in.jsonl"), lines).unwrap();
        Self { folder }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out.jsonl")
    }

    fn start(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
        command.arg("batch").arg(self.folder.path().join("in.jsonl")).arg(self.out());
        command.args(["--", "--max-num-seqs", "4", "--max-model-len", "512"]);
        command.env_remove("VLLM_API_KEY").stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the binary was built for this test")
    }

    /// Lets it come to its end; what it said.
    fn run(&self) -> (Option<i32>, String) {
        told(self.start().wait_with_output().expect("our child"))
    }

    /// Starts it and kills it, as a power switch does, when so many bytes of results are there.
    fn kill_at(&self, bytes: u64) {
        let mut child = self.start();
        eventually("results come", || {
            let there = self.out().metadata().map_or(0, |meta| meta.len());
            let ended = child.try_wait().expect("our child").is_some();
            (there >= bytes || ended).then_some(())
        });
        child.kill().expect("our child");
        child.wait().expect("our child");
    }

    /// The answers by their lines' names. Panics if one is there twice or is no line.
    fn results(&self) -> HashMap<String, Value> {
        by_name(&std::fs::read_to_string(self.out()).expect("there are results"))
    }
}

fn told(output: Output) -> (Option<i32>, String) {
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).expect("UTF-8"))
}

fn by_name(text: &str) -> HashMap<String, Value> {
    let mut results = HashMap::new();
    for line in text.lines() {
        let result: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let name = result["custom_id"].as_str().expect("a name").to_owned();
        assert!(results.insert(name.clone(), answer(&result)).is_none(), "{name} is answered twice");
    }
    results
}

/// What does not differ from run to run: the status, and the text or the field at fault.
fn answer(result: &Value) -> Value {
    let body = &result["response"]["body"];
    let choice = &body["choices"][0];
    json!([
        result["id"],
        result["response"]["status_code"],
        choice["text"],
        choice["message"],
        body["error"]["param"]
    ])
}

/// Seeded numbers, by SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

#[test]
fn killed_again_and_again_every_line_is_answered_exactly_once() {
    let whole = Batch::new(&lines());
    let (code, said) = whole.run();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("36 of 36 requests are answered, 4 of them with an error"), "{said}");
    let expected = whole.results();
    assert_eq!(expected.len(), LINES);
    let bytes = whole.out().metadata().unwrap().len();

    for seed in 0..3 {
        let mut chance = Chance(seed);
        let batch = Batch::new(&lines());
        let mut marks: Vec<u64> = (0..4).map(|_| chance.below(bytes * 9 / 10)).collect();
        marks.sort_unstable();
        for mark in marks {
            batch.kill_at(mark);
            // What was being written when the power went may be there in part.
            let torn = std::fs::read(batch.out()).unwrap_or_default();
            let cut = chance.below(200).min(torn.len() as u64) as usize;
            std::fs::write(batch.out(), &torn[..torn.len() - cut]).unwrap();
        }
        let (code, said) = batch.run();
        assert_eq!(code, Some(0), "seed {seed}: {said}");
        assert_eq!(batch.results(), expected, "seed {seed}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_batch_ends_cleanly_and_goes_on() {
    let batch = Batch::new(&lines().replace("\"max_tokens\":", "\"min_tokens\":40,\"max_tokens\":4"));
    let child = batch.start();
    eventually("a result is there", || batch.out().metadata().is_ok_and(|meta| meta.len() > 0).then_some(()));
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &id]).status().expect("kill is everywhere").success());
    let (code, said) = told(child.wait_with_output().expect("our child"));
    let text = std::fs::read_to_string(batch.out()).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    let there = batch.results().len();
    assert!((1..LINES).contains(&there), "{there}");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("{there} of 36 requests are answered")) && said.contains("interrupted"),
        "{said}"
    );
    assert_eq!(batch.run().0, Some(0));
    assert_eq!(batch.results().len(), LINES);
    // Nothing is left, so nothing is loaded or changed.
    let before = std::fs::read(batch.out()).unwrap();
    assert_eq!(batch.run().0, Some(0));
    assert_eq!(std::fs::read(batch.out()).unwrap(), before);
}

#[test]
fn files_that_do_not_fit_are_refused_before_anything_is_done() {
    let check = |lines: &str, out: Option<&str>, words: &str| {
        let batch = Batch::new(lines);
        if let Some(out) = out {
            std::fs::write(batch.out(), out).unwrap();
        }
        let (code, said) = batch.run();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(words), "{said}");
        assert_eq!(std::fs::read_to_string(batch.out()).ok().as_deref(), out);
    };
    let all = lines();
    let first = all.lines().next().unwrap();
    check("", None, "it has no lines");
    check(&format!("{first}\n\n{first}"), None, "line 3: `custom_id` `line 0` is on line 1 already");
    check(&format!("{first}\n{{"), None, "line 2: not a JSON object");
    check(&first.replace("/v1/chat", "/v2/chat"), None, "line 1: `url` must be one of /v1/chat/completions");
    check(first, Some("my diary"), "line 1 is no result of a batch");
    let foreign =
        r#"{"id":"batch_req_00","custom_id":"line 0","response":null,"error":null}"#.to_owned() + "\n";
    check(first, Some(&foreign), "it belongs to another input");
    let batch = Batch::new(first);
    let path = batch.folder.path().join("in.jsonl");
    let same =
        Command::new(env!("CARGO_BIN_EXE_ferrotron")).arg("batch").args([&path, &path]).output().unwrap();
    let (code, said) = told(same);
    assert!(code == Some(1) && said.contains("OUT is IN"), "{said}");
    assert_eq!(std::fs::read_to_string(path).unwrap(), first);
}

/// Uploads `lines` and begins their batch; its path.
fn begun(server: &Server, lines: &str) -> String {
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--b\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n{lines}\r\n--b--\r\n"
    );
    let head = "POST /v1/files HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b\r\n";
    let file = Open::send(&server.address, head, &form).answer().json();
    let asked =
        json!({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
    let batch = server.post("/v1/batches", &asked).json();
    format!("/v1/batches/{}", batch["id"].as_str().unwrap_or_else(|| panic!("{batch}")))
}

fn served(folder: &Path) -> Server {
    Server::ready(&[
        "--files-dir",
        folder.to_str().expect("UTF-8"),
        "--max-num-seqs",
        "2",
        "--max-model-len",
        "512",
    ])
}

#[test]
fn a_server_that_is_killed_goes_on_with_its_batches() {
    let lines: String =
        lines().lines().filter(|line| !line.contains("chat")).map(|line| format!("{line}\n")).collect();
    let count = lines.lines().count();
    let folder = tempfile::tempdir().unwrap();
    let mut server = served(folder.path());
    let path = begun(&server, &lines);
    let done =
        |server: &Server| server.get(&path).json()["request_counts"]["completed"].as_u64().unwrap_or(0);
    for mark in [3, 9, 15] {
        eventually("lines are answered", || (done(&server) >= mark).then_some(()));
        // Dropped is killed.
        drop(server);
        server = served(folder.path());
    }
    let batch = eventually("the batch is complete", || {
        let batch = server.get(&path).json();
        (batch["status"] == "completed").then_some(batch)
    });
    let mut text = String::new();
    for file in ["output_file_id", "error_file_id"] {
        let file = batch[file].as_str().unwrap_or_else(|| panic!("{batch}"));
        text += &server.get(&format!("/v1/files/{file}/content")).body;
    }
    let results = by_name(&text);
    assert_eq!((results.len(), &batch["request_counts"]["total"]), (count, &json!(count)));
    assert_eq!(server.get("/v1/files").json()["data"].as_array().map(Vec::len), Some(3));
}
