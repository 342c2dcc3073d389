//! The binary under a crowd: two hundred streams at once, of which some leave and some hardly read, while others look at
//! the server's health. How long anything takes is not measured here, only what the crowd gets and what it leaves behind.

#[path = "support/server.rs"]
#[allow(dead_code, reason = "this test uses its own part")]
mod server;

use serde_json::{Value, json};
use server::{Open, Server, eventually};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const STREAMS: usize = 200;
/// The first crowd brings buffers and caches to their size; the others may add to it no more than a page cache sways.
const CROWDS: usize = 3;
const MEMORY_SWAY_BYTES: f64 = (48 << 20) as f64;
const PROMPTS: [&str; 4] = ["Hi! My name is", "One, two,", "Search the web for", "What is 17 + 25?"];
const TOKENS: usize = 12;
/// Events of this many tokens with twenty alternatives each are more than sockets hold.
const LONG_TOKENS: usize = 1200;

/// What a member of the crowd does.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Reads,
    /// Leaves after the first token.
    LeavesEarly,
    /// Leaves before there is any.
    LeavesWaiting,
    /// Reads the first token and then nothing until all others are done.
    Dawdles,
}

impl Kind {
    fn of(number: usize) -> Self {
        match number % 50 {
            7 => Self::Dawdles,
            place if place % 5 == 3 => Self::LeavesEarly,
            place if place % 10 == 4 => Self::LeavesWaiting,
            _ => Self::Reads,
        }
    }

    fn count(self) -> usize {
        (0..STREAMS).filter(|number| Self::of(*number) == self).count()
    }

    fn body(self, number: usize) -> Value {
        let body = |max_tokens: usize| {
            json!({
                "prompt": PROMPTS[number % PROMPTS.len()], "max_tokens": max_tokens, "temperature": 0,
                "ignore_eos": true, "stream": true, "cache_salt": format!("{}", number % 7),
            })
        };
        match self {
            Self::Reads => body(TOKENS),
            // Long enough that whoever leaves has not had it all.
            Self::LeavesEarly | Self::LeavesWaiting => body(8000),
            Self::Dawdles => {
                let mut body = body(LONG_TOKENS);
                body["logprobs"] = json!(20);
                body
            }
        }
    }
}

/// Texts and tokens of a whole stream.
fn told(stream: &str) -> (String, usize) {
    assert!(stream.contains("data: [DONE]"), "a stream that does not end: {stream}");
    let frames = stream.lines().filter_map(|line| line.strip_prefix("data: {"));
    let frames = frames.map(|frame| serde_json::from_str::<Value>(&format!("{{{frame}")).expect("JSON"));
    let mut told = (String::new(), 0);
    for frame in frames {
        assert!(frame.get("error").is_none(), "{frame}");
        let choice = &frame["choices"][0];
        told.0 += choice["text"].as_str().unwrap_or_default();
        told.1 += choice["logprobs"]["tokens"].as_array().map_or(0, Vec::len);
    }
    told
}

fn crowd(server: &Server, alone: &[String]) {
    let dawdlers = std::thread::scope(|scope| {
        let members: Vec<_> = (0..STREAMS)
            .map(|number| {
                scope.spawn(move || {
                    let kind = Kind::of(number);
                    let mut stream = server.begin("/v1/completions", &kind.body(number));
                    match kind {
                        Kind::Reads => assert_eq!(told(&stream.rest()).0, alone[number % PROMPTS.len()]),
                        Kind::LeavesEarly => drop(stream.line("data:")),
                        Kind::LeavesWaiting => drop(stream.line("HTTP/1.1 200")),
                        Kind::Dawdles => {
                            stream.line("data:");
                            return Some(stream);
                        }
                    }
                    None
                })
            })
            .collect();
        members.into_iter().filter_map(|member| member.join().expect("nobody fails")).collect::<Vec<Open>>()
    });
    assert_eq!(dawdlers.len(), Kind::Dawdles.count());
    for stream in dawdlers {
        // Its first line is read already, so a token may be missing, never more.
        let tokens = told(&stream.rest()).1;
        assert!((LONG_TOKENS - 3..=LONG_TOKENS).contains(&tokens), "{tokens} of {LONG_TOKENS}");
    }
}

/// Asks for `/health` and `/metrics` until told to stop; how long each answer took.
fn watch(server: &Server, stop: &AtomicBool) -> Vec<Duration> {
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for path in ["/health", "/metrics"] {
            let asked = Instant::now();
            assert_eq!(server.get(path).status, 200, "{path}");
            times.push(asked.elapsed());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    times
}

fn figure(server: &Server, name: &str) -> f64 {
    let page = server.get("/metrics").body;
    let mut values = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    values.next().unwrap_or_else(|| panic!("no {name} in\n{page}"))
}

fn finished(server: &Server, reason: &str) -> f64 {
    server.metric("vllm:request_success_total", &format!("finished_reason=\"{reason}\""))
}

#[test]
fn a_crowd_gets_its_answers_and_leaves_nothing_behind() {
    let server = Server::ready(&["--threads", "2"]);
    let alone = PROMPTS.map(|prompt| {
        let body = json!({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true});
        server.post("/v1/completions", &body).text()
    });
    let stop = AtomicBool::new(false);
    let (mut memory, mut sockets) = (Vec::new(), Vec::new());
    let times = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&server, &stop));
        for round in 1..=CROWDS {
            crowd(&server, &alone);
            let left = ((Kind::LeavesEarly.count() + Kind::LeavesWaiting.count()) * round) as f64;
            eventually("who left is counted", || (finished(&server, "abort") == left).then_some(()));
            for gauge in ["vllm:num_requests_running", "vllm:num_requests_waiting"] {
                eventually(gauge, || (server.metric(gauge, "") == 0.0).then_some(()));
            }
            memory.push(figure(&server, "process_resident_memory_bytes"));
            sockets.push(figure(&server, "process_open_fds"));
        }
        stop.store(true, Ordering::Relaxed);
        watcher.join().expect("the server is well throughout")
    });
    assert_eq!(finished(&server, "error"), 0.0, "{}", server.log());
    let stayed = (STREAMS * CROWDS + PROMPTS.len()) as f64 - finished(&server, "abort");
    assert_eq!(finished(&server, "length"), stayed);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc", ""), 0.0);
    assert!(memory[CROWDS - 1] - memory[0] < MEMORY_SWAY_BYTES, "memory grows: {memory:?}");
    assert!(sockets[CROWDS - 1] <= sockets[0] + 8.0, "sockets stay open: {sockets:?}");
    // A probe has a second. One in ten is forgiven, because this machine may have stopped for a moment, server and all.
    let late = times.iter().filter(|time| **time > Duration::from_secs(1)).count();
    assert!(late * 10 <= times.len(), "{late} of {} probes took over a second", times.len());
}
