//! The binary as a server, and a client made by hand, because a good one cannot misbehave.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Long enough for a machine that does much else; nobody waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done` gives something. Panics, naming `what`, if it never does.
pub fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `ferrotron serve` on a free port. Ended when dropped, whichever way the test ends.
pub struct Server {
    child: Child,
    /// Of the line that says where it listens; `127.0.0.1:PORT` if it listens everywhere, `unix:FILE` at a socket.
    pub address: String,
    log: Arc<Mutex<String>>,
    /// Fills `log`.
    reader: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts it, whatever comes of that.
    pub fn started(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
        command.arg("serve").args(arguments);
        if !arguments.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        for name in ["FERROTRON_HOST", "VLLM_API_KEY", "VLLM_LOGGING_LEVEL", "VLLM_SERVER_DEV_MODE"] {
            command.env_remove(name);
        }
        command.env("NO_COLOR", "1").envs(variables.iter().copied());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary was built for this test");
        let lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let writer = log.clone();
        // Read to the end, or the pipe would fill and stop the server.
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *writer.lock().unwrap_or_else(PoisonError::into_inner) += &(line + "\n");
            }
        });
        Self { child, address: String::new(), log, reader: Some(reader) }
    }

    /// Starts it and waits until it listens, which is before the model is there.
    pub fn listening(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut server = Self::started(arguments, variables);
        server.address = eventually("the server listens", || {
            let log = server.log();
            assert!(server.child.try_wait().expect("our child").is_none(), "it ended:\n{log}");
            let place = log.split_once("Listening on ")?.1.split_once('\n')?.0.trim();
            let address = place.split_once("://").map_or(place, |(_, address)| address);
            Some(address.replace("0.0.0.0", "127.0.0.1"))
        });
        server
    }

    /// Starts it and waits until it answers.
    pub fn ready(arguments: &[&str]) -> Self {
        let server = Self::listening(arguments, &[]);
        server.wait_until_ready();
        server
    }

    pub fn wait_until_ready(&self) {
        self.wait_for_log("Application startup complete.");
    }

    pub fn wait_for_log(&self, words: &str) {
        eventually(words, || self.log().contains(words).then_some(()));
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn get(&self, path: &str) -> Answer {
        Open::send(&self.address, &format!("GET {path} HTTP/1.1\r\n"), "").answer()
    }

    /// Sends and does not wait.
    pub fn begin(&self, path: &str, body: &Value) -> Open {
        self.begin_text(path, &body.to_string())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.begin(path, body).answer()
    }

    pub fn post_text(&self, path: &str, body: &str) -> Answer {
        self.begin_text(path, body).answer()
    }

    fn begin_text(&self, path: &str, body: &str) -> Open {
        let head = format!("POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n");
        Open::send(&self.address, &head, body)
    }

    /// The value of the series that begins with `name` and has `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let page = self.get("/metrics").body;
        let series = |line: &&str| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')) && line.contains(label)
        };
        let line = page.lines().find(series).unwrap_or_else(|| panic!("no {name}{{{label}}} in\n{page}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a series ends with a number")
    }

    /// `TERM` or `INT`, as a service manager or a terminal sends it.
    #[cfg(unix)]
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status().expect("kill is everywhere");
        assert!(sent.success());
    }

    /// How it ended, once it has; its log is complete then.
    pub fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        let status = eventually("the server ends", || child.try_wait().expect("our child"));
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader only adds lines");
        }
        status
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection with a request on its way. Dropping it is a client that leaves.
pub struct Open(BufReader<TcpStream>);

impl Open {
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a valid time");
        Self(BufReader::new(stream))
    }

    /// `head` is the request line and own headers, each with its line's end.
    pub fn send(address: &str, head: &str, body: &str) -> Self {
        let mut open = Self::connect(address);
        let length = body.len();
        open.write(&format!(
            "{head}Host: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        open
    }

    pub fn write(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("the server reads");
    }

    /// Reads until a line begins with `start`; the line.
    pub fn line(&mut self, start: &str) -> String {
        let mut seen = String::new();
        loop {
            let from = seen.len();
            let read = self.0.read_line(&mut seen).expect("the server goes on writing");
            assert!(read > 0, "ended without a line {start:?}:\n{seen}");
            if seen[from..].starts_with(start) {
                return seen[from..].to_owned();
            }
        }
    }

    /// All that is left to read, with or without the head.
    pub fn rest(mut self) -> String {
        let mut text = String::new();
        self.0.read_to_string(&mut text).expect("the server closes properly");
        text
    }

    pub fn answer(self) -> Answer {
        let text = self.rest();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let head = head.to_ascii_lowercase();
        let body = if head.contains("transfer-encoding: chunked") { joined(body) } else { body.to_owned() };
        Answer { status: status.expect("a status line"), head, body }
    }
}

/// The chunks of a body without their lengths.
fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((length, rest)) = chunks.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a chunk begins with its length");
        body += &rest[..length];
        chunks = &rest[length + 2..];
    }
    body
}

pub struct Answer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The text of the first choice of a completion.
    pub fn text(&self) -> String {
        let json = self.json();
        json["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {json}")).to_owned()
    }
}
