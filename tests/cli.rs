//! Every command of the binary but `serve` (see tests/serve.rs): what it prints, and what it says to mistakes.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny");

struct Run {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs `ferrotron` with a hub cache that is empty and a hub that nobody answers at. Nothing may panic.
fn run(arguments: &[&str]) -> Run {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
    command.args(arguments).env("HF_HOME", home.path()).env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN");
    // Port 9 is for discarding, and where it is not, there is nobody.
    let output = command.env("HF_ENDPOINT", "http://127.0.0.1:9").output().expect("the binary was built");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("what is printed is UTF-8");
    let run = Run { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
    assert!(!run.err.contains("panicked"), "{arguments:?}: {}", run.err);
    run
}

/// Runs what must work; what it printed.
fn good(arguments: &[&str]) -> String {
    let run = run(arguments);
    assert_eq!(run.code, Some(0), "{arguments:?}: {}{}", run.out, run.err);
    run.out
}

fn good_json(arguments: &[&str]) -> Value {
    let out = good(arguments);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {out}"))
}

/// Runs what must fail with a message that holds all of `words`.
fn bad(arguments: &[&str], words: &[&str]) {
    let run = run(arguments);
    assert!(run.code.is_some_and(|code| code != 0), "{arguments:?} ended with {:?}: {}", run.code, run.out);
    for word in words {
        assert!(run.err.contains(word), "{arguments:?}: no {word:?} in {}", run.err);
    }
}

/// A file that lives as long as its folder.
fn file(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path.to_str().expect("a temporary path is UTF-8").to_owned()
}

fn rows(value: &Value) -> Vec<Vec<f64>> {
    serde_json::from_value(value.clone()).expect("rows of numbers")
}

fn score(model: &str, ids: &[u32], count: usize, more: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let input = file(&folder, "in.json", json!({"ids": ids, "gen": count}).to_string());
    let arguments = [&["score", "--model", model, "--input", &input], more].concat();
    good_json(&arguments)
}

#[test]
fn score_prints_a_row_per_id_and_per_token() {
    let answer = score("tiny", &[10, 42, 11], 4, &[]);
    let (logits, further) = (rows(&answer["logits"]), rows(&answer["gen_logits"]));
    assert_eq!((logits.len(), further.len()), (3, 4));
    assert!(logits.iter().chain(&further).all(|row| row.len() == 1280));
    assert_eq!(further[0], logits[2]);
    let best = |row: &Vec<f64>| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let tokens: Vec<usize> = serde_json::from_value(answer["tokens"].clone()).unwrap();
    assert_eq!(further.iter().filter_map(best).collect::<Vec<_>>(), tokens);

    let plain = score("tiny", &[10, 42, 11], 0, &[]);
    assert_eq!(plain["logits"], answer["logits"]);
    assert_eq!(plain.as_object().map(|object| object.len()), Some(1));
}

#[test]
fn score_is_the_same_on_every_backend() {
    let ids: Vec<u32> = (0..20).map(|i| 7 + 31 * i).collect();
    let fast = score("tiny", &ids, 3, &["--dtype", "f32"]);
    let plain = score("tiny", &ids, 3, &["--backend", "reference", "--dtype", "f32"]);
    assert_eq!(fast["tokens"], plain["tokens"]);
    for (fast, plain) in rows(&fast["logits"]).iter().flatten().zip(rows(&plain["logits"]).iter().flatten()) {
        assert!((fast - plain).abs() <= 1e-3 * (1.0 + plain.abs()), "{fast} and {plain}");
    }
}

#[test]
fn score_gives_the_perplexity_of_its_own_logits() {
    let (folder, ids) = (tempfile::tempdir().unwrap(), [10, 42, 11, 300]);
    let input = file(&folder, "in.json", json!({ "ids": ids }).to_string());
    let answer = good_json(&["score", "--ppl", "--input", &input]);
    assert_eq!(answer["tokens"], 3);
    let logits = rows(&score("tiny", &ids, 0, &[])["logits"]);
    let loss = |(row, &id): (&Vec<f64>, &u32)| {
        row.iter().map(|logit| logit.exp()).sum::<f64>().ln() - row[id as usize]
    };
    let expected = (logits.iter().zip(&ids[1..]).map(loss).sum::<f64>() / 3.0).exp();
    let got = answer["ppl"].as_f64().unwrap();
    assert!((got / expected - 1.0).abs() < 1e-4, "{got} and {expected}");
}

#[test]
fn score_says_what_is_wrong_with_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let check = |content: &str, words: &[&str]| {
        bad(&["score", "--input", &file(&folder, "in.json", content)], words);
    };
    check(r#"{"ids": []}"#, &["ids", "empty"]);
    check(r#"{"ids": [1, 1280]}"#, &["1280", "the vocabulary has 1280"]);
    check(r#"{"ids": [-1]}"#, &["in.json", "-1"]);
    check(r#"{"ids": "a"}"#, &["in.json", "ids"]);
    check(r#"{"gen": 1}"#, &["in.json", "ids"]);
    check("{", &["in.json", "EOF"]);
    check(r#"{"ids": [1], "gen": 18446744073709551615}"#, &["exceed the context of 8192"]);
    check(r#"{"ids": [1], "gen": 8192}"#, &["exceed the context of 8192"]);
    bad(&["score", "--ppl", "--input", &file(&folder, "in.json", r#"{"ids": [1]}"#)], &["at least two"]);
    bad(&["score", "--input", "/nowhere/in.json"], &["/nowhere/in.json", "No such file"]);
}

#[test]
fn bench_measures_and_says_so_in_json_and_in_a_table() {
    let decode = ["bench", "decode", "--tokens", "4", "--context", "4", "--repeats", "1", "--batch", "1,2"];
    let prefill = ["bench", "prefill", "--lengths", "8", "--chunk", "4", "--repeats", "1"];
    let report = good_json(&[&decode[..], &["--json"]].concat());
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(2));
    check_positive(&report);
    let table = good(&prefill);
    assert!(table.contains("tok/s") && table.contains("prefill 8, chunks of 4"), "{table}");
    check_positive(&good_json(&[&prefill[..], &["--json"]].concat()));
}

#[test]
fn bench_measures_random_weights_of_every_format_from_a_configuration() {
    let decode = [
        "bench",
        "decode",
        "--tokens",
        "2",
        "--repeats",
        "1",
        "--batch",
        "1",
        "--load-format",
        "dummy",
        "--json",
    ];
    let mut sizes = Vec::new();
    for format in ["bf16", "fp8", "nvfp4"] {
        let report = good_json(&[&decode[..], &["--quantization", format]].concat());
        check_positive(&report);
        sizes.push(report["weights_bytes"].as_u64().expect("bytes"));
    }
    assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");

    bad(&["bench", "decode", "--quantization", "fp8"], &["--quantization", "--load-format dummy"]);
    bad(&["bench", "decode", "--quantization", "int3", "--load-format", "dummy"], &["int3", "nvfp4"]);
    bad(&["bench", "decode", "--model", "bench-nano"], &["bench-nano", "--load-format", "dummy"]);
}

#[test]
fn a_deep_context_is_a_row_of_its_own_and_moves_its_keys_and_values() {
    let decode = [
        "bench",
        "decode",
        "--tokens",
        "2",
        "--repeats",
        "1",
        "--batch",
        "1",
        "--context",
        "0,16,640",
        "--dtype",
        "f32",
        "--json",
    ];
    let report = good_json(&decode);
    let rows = report["rows"].as_array().expect("rows");
    let bytes: Vec<u64> = rows.iter().map(|row| row["bytes_per_token"].as_u64().expect("bytes")).collect();
    // Two attention layers of tiny, keys and values of two heads of 128, f32.
    assert_eq!((bytes[1] - bytes[0], bytes[2] - bytes[0]), (16 * 4096, 640 * 4096));
    assert!(rows[0]["ttft_ms"].is_null() && rows[1]["ttft_ms"].is_number() && rows[2]["ttft_ms"].is_null());
    assert_eq!(rows[0]["to_first"], json!(1.0));
}

#[test]
fn a_profile_adds_up_to_its_total() {
    let decode = ["bench", "decode", "--tokens", "3", "--repeats", "1", "--batch", "2"];
    let prefill = ["bench", "prefill", "--lengths", "8", "--chunk", "4", "--repeats", "1"];
    for (bench, calls) in [(&decode[..], 68.0), (&prefill[..], 65.0 + 68.0)] {
        let report = good_json(&[bench, &["--profile", "--json"]].concat());
        let profile = &report["profiles"][0];
        let number =
            |value: &Value, name: &str| value[name].as_f64().unwrap_or_else(|| panic!("{name} in {value}"));
        let lines = profile["lines"].as_array().expect("lines");
        let sum = |name: &str| lines.iter().map(|line| number(line, name)).sum::<f64>();
        let total = &profile["total"];
        for name in ["bytes", "flops", "calls"] {
            assert_eq!(sum(name), number(total, name), "{name}");
        }
        assert_eq!(number(total, "calls"), calls);
        assert!((sum("ms") + number(profile, "rest_ms") - number(total, "ms")).abs() < 1e-6);
        let table = good(&[bench, &["--profile"]].concat());
        for word in ["experts", "in no operation", "% of memory", "GFLOP/s"] {
            assert!(table.contains(word), "no {word} in {table}");
        }
    }
}

#[test]
fn the_ceilings_and_a_load_are_measured() {
    let report = good_json(&["bench", "roofline", "--threads", "1", "--json"]);
    let row = &report["rows"][0];
    assert!(row["read_gb_per_s"].as_f64().is_some_and(|value| value > 0.0), "{report}");
    assert!(row["peaks"][0]["gflop_per_s"].as_f64().is_some_and(|value| value > 0.0), "{report}");
    let report = good_json(&["bench", "load", "--repeats", "1", "--json"]);
    assert_eq!(report["weights_bytes"], json!(9_122_496));
    assert!(report["gb_per_s"].as_f64().is_some_and(|value| value > 0.0), "{report}");
    bad(&["bench", "load", "--model", "bench-super"], &["bench-super", "safetensors"]);
}

#[test]
fn quantize_writes_random_weights_that_are_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().expect("a temporary path is UTF-8").to_owned();
    let (a, b, c) = (path("a"), path("b"), path("c"));
    let write = ["quantize", "--random", "--quantization", "fp8", "--seed", "5", "tiny"];
    assert!(good(&[&write[..], &[&a]].concat()).contains("4,561,"));
    good(&[&write[..], &[&b]].concat());
    good(&["quantize", "--random", "--quantization", "fp8", "tiny", &c]);
    let weights = |path: &str| fs::read(Path::new(path).join("model.safetensors")).expect("weights");
    assert!(weights(&a) == weights(&b) && weights(&a) != weights(&c), "the seed alone decides");
    assert!(good(&["check", &a]).contains("every tensor of the network is there"));
    let logits = rows(&score(&a, &[10, 42, 11], 0, &[])["logits"]);
    assert!(logits.iter().flatten().all(|logit| logit.is_finite()));
    bad(&["quantize", "--random", "tiny", &a], &[&a, "--force"]);
    bad(&["quantize", "--seed", "5", "tiny", &path("d")], &["--random"]);
    bad(&["quantize", "--random", "nowhere", &path("d")], &["\"nowhere\"", "bench-nano"]);
}

/// The figures of `vllm bench serve` in a level of `bench serve --json`, for four requests.
fn check_level(level: &Value, concurrency: u64) {
    assert_eq!((&level["completed"], &level["failed"]), (&json!(4), &json!(0)), "{level}");
    assert_eq!(level["max_concurrency"], json!(concurrency));
    for name in [
        "duration",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "max_concurrent_requests",
    ] {
        assert!(level[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {level}");
    }
    for time in ["ttft", "tpot", "itl", "e2el"] {
        for figure in ["mean", "median", "p99"] {
            let value = level[format!("{figure}_{time}_ms")].as_f64();
            assert!(value.is_some_and(|value| value > 0.0), "{figure} {time} in {level}");
        }
    }
    assert!(level["max_concurrent_requests"].as_u64().is_some_and(|most| most <= concurrency), "{level}");
}

#[test]
fn bench_serve_measures_a_server_of_its_own_level_by_level() {
    let folder = tempfile::tempdir().unwrap();
    let few = ["bench", "serve", "--num-prompts", "4", "--output-len", "8", "--goodput", "ttft:600000"];
    let ladder = ["--max-concurrency", "1,2", "--json", "--save-result", "--save-detailed", "--result-dir"];
    let place = folder.path().to_str().expect("a temporary path is UTF-8");
    let report = good_json(&[&few[..], &ladder, &[place, "--result-filename", "r.json"]].concat());
    let levels = report["levels"].as_array().expect("levels");
    assert_eq!(levels.len(), 2);
    levels.iter().zip([1, 2]).for_each(|(level, concurrency)| check_level(level, concurrency));
    let saved = fs::read_to_string(folder.path().join("r-concurrency2.json")).expect("a file per level");
    let saved: Value = serde_json::from_str(&saved).expect("valid JSON");
    check_level(&saved, 2);
    assert_eq!(saved["ttfts"].as_array().map(Vec::len), Some(4));

    let random = ["--dataset-name", "random", "--random-input-len", "20", "--request-rate", "1000"];
    let block = good(&[&few[..], &random, &["--random-output-len", "4"]].concat());
    for line in ["Successful requests:                     4", "Total generated tokens:                  16"]
    {
        assert!(block.contains(line), "{block}");
    }
}

#[test]
fn bench_serve_says_who_does_not_answer() {
    bad(&["bench", "serve", "--base-url", "http://127.0.0.1:9"], &["127.0.0.1:9", "ferrotron serve"]);
    bad(&["bench", "serve", "--base-url", "https://x"], &["https://x", "http://"]);
    bad(&["bench", "serve", "--dataset-name", "custom"], &["--dataset-path"]);
    bad(&["bench", "serve", "--", "--no-such-flag"], &["--no-such-flag"]);
}

#[test]
fn bench_host_spec_and_agents_report_what_they_are_asked() {
    let few = ["--concurrency", "1,2", "--repeats", "1", "--json"];
    let host = good_json(&[&["bench", "host", "--tokens", "20"], &few[..]].concat());
    let rows = host["host"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|row| row["us_per_step"].as_f64().is_some_and(|time| time > 0.0)), "{host}");

    let spec = good_json(&[&["bench", "spec", "--prompts", "2", "--max-tokens", "6"], &few[..]].concat());
    assert_eq!(spec["verify"].as_array().map(Vec::len), Some(8), "{spec}");
    let gains = spec["speedup"].as_array().expect("rows");
    assert_eq!(gains.len(), 2);
    for name in ["off_tok_per_s", "on_tok_per_s", "speedup", "decode_speedup", "on_tokens_per_step"] {
        assert!(
            gains.iter().all(|row| row[name].as_f64().is_some_and(|value| value > 0.0)),
            "{name} in {spec}"
        );
    }
    for row in spec["acceptance"].as_array().expect("rows") {
        assert!(row["right"].as_u64() <= row["asked"].as_u64(), "{row}");
    }

    let short =
        ["bench", "agents", "--agents", "2", "--turns", "1", "--system-tokens", "60", "--max-tokens", "8"];
    let agents = good_json(&[&short[..], &["--json"]].concat());
    let all = &agents["all"];
    let count = |name: &str| all[name].as_u64().unwrap_or_else(|| panic!("no {name} in {agents}"));
    assert!(count("requests") >= 2 && agents["system_tokens"].as_u64() >= Some(60), "{agents}");
    // The second agent's prompt begins with the first one's system prompt.
    assert!(count("reusable_tokens") >= 60 && count("reusable_tokens") < count("prompt_tokens"), "{agents}");
    assert!(count("cached_tokens") <= count("reusable_tokens"), "{agents}");
}

#[test]
fn bench_front_compares_a_loaded_machine_with_a_quiet_one() {
    let few = ["--repeats", "1", "--load", "2", "--prompt", "16", "--tokens", "4"];
    let behind = ["--behind-prompt", "32", "--behind-tokens", "16", "--json"];
    let front = good_json(&[&["bench", "front"], &few[..], &behind].concat());
    let rows = front["rows"].as_array().expect("rows");
    assert_eq!(rows.iter().map(|row| &row["case"]).collect::<Vec<_>>(), ["alone", "loaded behind"]);
    for name in ["ttft_ms_p50", "ttft_ms_p99", "decode_tok_per_s", "ttft_to_alone", "decode_to_alone"] {
        assert!(
            rows.iter().all(|row| row[name].as_f64().is_some_and(|value| value > 0.0)),
            "{name} in {front}"
        );
    }
    // Nobody asks the one behind anything while the front is alone.
    assert_eq!(rows[0]["behind_tok_per_s"], json!(0.0), "{front}");
    // How far it gets in a run so short is the machine's affair.
    assert!(rows[1]["behind_tok_per_s"].is_number(), "{front}");
    assert_eq!((&front["load"], &rows[1]["requests"]), (&json!(2), &json!(4)));
    bad(&["bench", "front", "--prompt", "8190"], &["8190", "the context of 8192"]);
    bad(&["bench", "front", "--tokens", "1"], &["--tokens", "at least 2"]);
}

#[test]
fn bench_soak_counts_all_kinds_and_leaves_nothing_behind() {
    let soak = good_json(&["bench", "soak", "--minutes", "0.03", "--concurrency", "4", "--json"]);
    let rows = soak["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 40, "{soak}");
    let last = &rows[39];
    for name in ["elapsed_s", "rss_bytes"] {
        assert!(last[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {soak}");
    }
    for name in
        ["done", "refused", "cancelled", "timed_out", "tok_per_s", "kv_blocks", "checkpoints", "hit_percent"]
    {
        assert!(last[name].as_f64().is_some_and(|value| value >= 0.0), "{name} in {soak}");
    }
    assert_eq!((&last["failed"], &soak["failures"]), (&json!(0), &json!([])), "{soak}");
    assert!(soak["kinds"].as_array().is_some_and(|kinds| !kinds.is_empty()), "{soak}");
    let memory = &soak["memory"];
    assert!(memory["flat"].is_boolean() && memory["growth_mb"].is_number(), "{soak}");
    for gauge in ["running", "waiting", "slots_used", "kv_blocks_used"] {
        assert_eq!(soak["left"][gauge], json!(0), "{gauge} in {soak}");
    }
    bad(&["bench", "soak", "--minutes", "0"], &["--minutes", "from 0.01"]);
    bad(&["bench", "soak", "--", "--no-such-flag"], &["--no-such-flag"]);
}

/// Every number of a report is one that was measured.
fn check_positive(report: &Value) {
    for name in ["bandwidth_gb_per_s", "weights_bytes"] {
        assert!(report[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {report}");
    }
    for row in report["rows"].as_array().expect("rows") {
        for name in ["tok_per_s", "ttft_ms", "bytes_per_token", "gb_per_s", "percent_of_bandwidth"] {
            let value = row[name].as_f64();
            assert!(value.is_some_and(|value| value > 0.0 && value.is_finite()), "{name} in {row}");
        }
    }
}

#[test]
fn bench_refuses_what_cannot_be_measured() {
    let most = usize::MAX.to_string();
    for value in ["0", "-1", "x", "1,0", "", &most] {
        bad(&["bench", "decode", &format!("--batch={value}")], &["--batch", "from 1 to 1024"]);
        bad(&["bench", "decode", &format!("--tokens={value}")], &["--tokens", "from 1 to 1048576"]);
        bad(&["bench", "prefill", &format!("--lengths={value}")], &["--lengths", "from 1 to 1048576"]);
        bad(&["bench", "prefill", &format!("--repeats={value}")], &["--repeats", "from 1 to"]);
    }
    bad(&["bench", "decode", "--context", "8190"], &["8190", "64", "the context of 8192"]);
    bad(&["bench", "prefill", "--lengths", "8193"], &["8193", "the context of 8192"]);
}

#[test]
fn eval_answers_the_prompts_of_a_file() {
    let heldout = fs::read_to_string(Path::new(TINY).join("heldout.jsonl")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let two = heldout.lines().take(2).collect::<Vec<_>>().join("\n");
    let report = good_json(&["eval", "--json", "--prompts", &file(&folder, "two.jsonl", two)]);
    assert_eq!((&report["asked"], &report["right"]), (&json!(2), &json!(2)), "{report}");
    bad(&["eval", "--prompts", &file(&folder, "bad.jsonl", "{\"family\": 1}")], &["bad.jsonl"]);
    bad(&["eval", "--prompts", &file(&folder, "none.jsonl", "")], &["none.jsonl", "no prompts"]);
    bad(&["eval", "--max-tokens", &usize::MAX.to_string()], &["the context of 8192"]);
}

#[test]
fn models_lists_what_has_a_name() {
    let list = good(&["models"]);
    for name in ["tiny", "bench-nano", "nano-nvfp4", "super-nvfp4", "nano-4b", "in this program"] {
        assert!(list.contains(name), "no {name} in {list}");
    }
}

#[test]
fn an_unknown_model_is_told_the_known_ones() {
    for command in
        [&["check"][..], &["eval", "--model"], &["serve"], &["bench", "decode", "--model"], &["pull"]]
    {
        bad(&[command, &["nothing"]].concat(), &["\"nothing\"", "tiny", "nano-nvfp4", "super-bf16"]);
    }
}

#[test]
fn pull_without_a_network_says_where_the_files_are() {
    let words =
        ["nano-4b", "https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", "Connection refused"];
    bad(&["pull", "nano-4b"], &words);
    bad(&["serve", "nano-4b"], &words[..2]);
}

#[test]
fn every_command_shows_an_example() {
    let help = good(&["--help"]);
    let commands = ["serve", "chat", "bench", "score", "eval", "check", "pull", "quantize", "models"];
    for command in commands {
        assert!(help.contains(&format!("  {command} ")), "{command} in {help}");
        let help = good(&[command, "--help"]);
        assert!(help.contains("Example") && help.contains("  ferrotron "), "{command}: {help}");
    }
    for bench in ["decode", "prefill", "load", "roofline", "serve", "spec", "agents", "host", "front", "soak"]
    {
        let help = good(&["bench", bench, "--help"]);
        assert!(help.contains("Example") && help.contains("  ferrotron "), "bench {bench}: {help}");
    }
}

#[test]
fn check_counts_the_tensors_of_a_whole_model() {
    let tiny = good(&["check", "tiny"]);
    assert!(tiny.contains("253") && tiny.contains("9,122,496"), "{tiny}");
    assert!(tiny.contains("every tensor of the network is there"), "{tiny}");
    let published = good(&["check", "super-nvfp4"]);
    assert!(published.contains("165,860") && published.contains("80,297,329,824"), "{published}");
    assert!(published.contains("No file was checked"), "{published}");
}

#[test]
fn what_quantize_writes_is_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("tiny-nvfp4");
    let out = out.to_str().unwrap();
    assert!(good(&["quantize", "tiny", out]).contains("NVFP4"));
    let checked = good(&["check", out]);
    assert!(checked.contains("NVFP4") && checked.contains("FP8"), "{checked}");
    let (small, whole) = (score(out, &[10, 42, 11], 0, &[]), score("tiny", &[10, 42, 11], 0, &[]));
    let (small, whole) = (rows(&small["logits"]), rows(&whole["logits"]));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let lost = norm(&mut small.iter().flatten().zip(whole.iter().flatten()).map(|(a, b)| a - b));
    let all = norm(&mut whole.iter().flatten().copied());
    // Weights lose a tenth; logits must lose something, and not be another model's.
    assert!(lost > 0.0 && lost < 0.5 * all, "{lost} of {all}");
    bad(&["quantize", "tiny", out], &[out, "--force"]);
}

/// A copy of the tiny model to be broken.
struct Broken(TempDir);

impl Broken {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"] {
            fs::copy(Path::new(TINY).join(name), folder.path().join(name)).unwrap();
        }
        fs::copy(Path::new(TINY).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.path("model.safetensors")).unwrap()
    }

    /// The weights with another header over the same data.
    fn with_header(self, change: impl FnOnce(&mut Value)) -> Self {
        let bytes = self.weights();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let mut header: Value = serde_json::from_slice(header).unwrap();
        change(&mut header);
        let header = header.to_string().into_bytes();
        let length = (header.len() as u64).to_le_bytes();
        self.with_weights([&length[..], &header, data].concat())
    }

    fn with_weights(self, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.path("model.safetensors"), bytes).unwrap();
        self
    }

    fn with_config(self, change: impl FnOnce(&mut Value)) -> Self {
        let mut config: Value = serde_json::from_slice(&fs::read(self.path("config.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(self.path("config.json"), config.to_string()).unwrap();
        self
    }

    fn without(self, name: &str) -> Self {
        fs::remove_file(self.path(name)).unwrap();
        self
    }

    /// `check` says `words`, and `serve` does not start.
    fn is_refused(&self, words: &[&str]) {
        let folder = self.0.path().to_str().unwrap();
        bad(&["check", folder], words);
        bad(&["serve", "--port", "0", folder], words);
    }
}

/// A matrix whose sides differ: [H, attention width].
const MATRIX: &str = "backbone.layers.3.mixer.o_proj.weight";

#[test]
fn a_missing_file_is_named() {
    let broken = Broken::new();
    let first = "model-00001-of-00002.safetensors";
    fs::rename(broken.path("model.safetensors"), broken.path(first)).unwrap();
    let missing = "model-00002-of-00002.safetensors";
    let index = json!({"weight_map": {MATRIX: missing, "lm_head.weight": first}});
    fs::write(broken.path("model.safetensors.index.json"), index.to_string()).unwrap();
    broken.is_refused(&[missing]);
    Broken::new().without("model.safetensors").is_refused(&["safetensors"]);
    Broken::new().without("config.json").is_refused(&["config.json"]);
    Broken::new().without("tokenizer.json").is_refused(&["tokenizer.json"]);
}

#[test]
fn a_missing_tensor_is_named() {
    let broken = Broken::new().with_header(|header| {
        let tensor = header.as_object_mut().unwrap().remove(MATRIX).unwrap();
        header["another"] = tensor;
    });
    broken.is_refused(&[MATRIX, "no such tensor"]);
}

#[test]
fn a_wrong_shape_is_told_with_the_right_one() {
    let broken = Broken::new().with_header(|header| header[MATRIX]["shape"] = json!([512, 128]));
    broken.is_refused(&[MATRIX, "[128, 512]", "[512, 128]"]);
}

#[test]
fn a_file_that_was_cut_is_named() {
    let whole = Broken::new().weights();
    for length in [0, 7, 8, 1000, whole.len() / 2, whole.len() - 1] {
        let broken = Broken::new().with_weights(&whole[..length]);
        broken.is_refused(&["model.safetensors"]);
    }
}

#[test]
fn a_header_that_lies_is_not_believed() {
    let huge = |length: u64| {
        let mut bytes = Broken::new().weights();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        Broken::new().with_weights(bytes).is_refused(&["model.safetensors"]);
    };
    huge(u64::MAX);
    huge(1 << 40);
    huge(3);
    let lie = |field: &str, value: Value| {
        let broken = Broken::new().with_header(|header| header[MATRIX][field] = value);
        broken.is_refused(&["model.safetensors"]);
    };
    lie("dtype", json!("F32"));
    lie("dtype", json!("F3"));
    lie("shape", json!([u64::MAX, 2]));
    lie("shape", json!([-1]));
    lie("data_offsets", json!([0, u64::MAX]));
    lie("data_offsets", json!([8, 0]));
    lie("data_offsets", json!([0, 131_072]));
}

#[test]
fn a_configuration_of_another_network_is_refused() {
    let check = |field: &str, value: Value, words: &[&str]| {
        Broken::new().with_config(|config| config[field] = value).is_refused(words);
    };
    check("hybrid_override_pattern", json!("MEMXEMEM*E"), &["hybrid_override_pattern", "X"]);
    check("hybrid_override_pattern", Value::Null, &["hybrid_override_pattern"]);
    check("hidden_size", json!("128"), &["hidden_size"]);
    check("hidden_size", json!(0), &["hidden_size", "0"]);
    check("num_hidden_layers", json!(11), &["11", "10"]);
    check("vocab_size", json!(1281), &["1281", "1280"]);
}

#[test]
fn a_shell_can_complete_every_command_and_flag() {
    for (shell, words) in
        [("bash", "complete -F"), ("zsh", "#compdef ferrotron"), ("fish", "complete -c ferrotron")]
    {
        let script = good(&["completions", shell]);
        for word in [words, "served-model-name", "ssl-certfile", "quantize"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    bad(&["completions", "tcsh"], &["tcsh", "bash"]);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("man1");
    good(&["man", target.to_str().expect("UTF-8")]);
    for (page, word) in
        [("ferrotron.1", "serve"), ("ferrotron-serve.1", "uds"), ("ferrotron-bench-serve.1", "goodput")]
    {
        let text = fs::read_to_string(target.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert!(text.starts_with(".ie") && text.contains(word), "{page}");
    }
    let file = file(&folder, "a file", "");
    bad(&["man", &file], &["a file cannot be written"]);
}
