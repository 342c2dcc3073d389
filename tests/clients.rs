//! The binary, asked by the packages that its users ask it with: a suite of tests/clients per test, all of them against
//! one server, in turn, because some count what the server counts.
//!
//! Needs python3 with the packages of tests/clients/requirements.txt and node with those of package.json, and says
//! aloud what it cannot run. Where FERROTRON_TEST_PYTHON or FERROTRON_TEST_NODE names an interpreter, that is a failure.

#[path = "support/server.rs"]
#[allow(dead_code, reason = "the packages are the clients here; only the server is wanted")]
mod server;

use server::Server;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const KEY: &str = "key-of-the-test";
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");

#[test]
fn openai_for_python() {
    python("openai_client.py", "openai");
}

#[test]
fn openai_for_python_comes_again_to_a_full_server() {
    let Some(command) = Interpreter::PYTHON.with("openai") else { return };
    let full = ready(&["--max-model-len", "8192", "--max-num-seqs", "1", "--max-num-queued-reqs", "1"]);
    run(command, "retries_client.py", &full);
}

#[test]
fn openai_for_javascript() {
    suite(&Interpreter::NODE, "openai_client.mjs", "openai");
}

#[test]
fn openai_for_python_keeps_and_continues_responses() {
    python("responses_client.py", "openai");
}

#[test]
fn anthropic_for_python() {
    python("anthropic_client.py", "anthropic");
}

#[test]
fn ollama_for_python() {
    python("ollama_client.py", "ollama");
}

#[test]
fn langchain() {
    python("langchain_client.py", "langchain_openai");
}

#[test]
fn litellm() {
    python("litellm_client.py", "litellm");
}

#[test]
fn openai_agents() {
    python("agents_client.py", "agents");
}

#[test]
fn pipecat() {
    python("pipecat_client.py", "pipecat");
}

#[test]
fn recipes_of_the_readme() {
    python("recipes_client.py", "openai");
}

#[test]
fn schemathesis() {
    python("schema_client.py", "schemathesis");
}

#[test]
fn prometheus() {
    python("metrics_client.py", "prometheus_client");
}

fn python(script: &str, package: &str) {
    suite(&Interpreter::PYTHON, script, package);
}

/// Who runs a suite.
struct Interpreter {
    variable: &'static str,
    usual: &'static str,
    /// Ends well if the interpreter finds the package that follows.
    finds: &'static [&'static str],
    install: &'static str,
}

impl Interpreter {
    const PYTHON: Self = Self {
        variable: "FERROTRON_TEST_PYTHON",
        usual: "python3",
        finds: &["-c", "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)"],
        install: "pip install -r tests/clients/requirements.txt",
    };
    const NODE: Self = Self {
        variable: "FERROTRON_TEST_NODE",
        usual: "node",
        finds: &["-e", "require.resolve(process.argv[1])"],
        install: "npm ci --prefix tests/clients",
    };

    /// A command that has `package`. Panics if it has not and was promised.
    fn with(&self, package: &str) -> Option<Command> {
        let promised = std::env::var(self.variable).ok();
        let program = promised.as_deref().unwrap_or(self.usual);
        let mut question = Command::new(program);
        question.current_dir(FOLDER).args(self.finds).arg(package).stderr(Stdio::null());
        if question.status().is_ok_and(|status| status.success()) {
            return Some(Command::new(program));
        }
        let lack = format!("{program} does not find the package {package}; {}", self.install);
        assert!(promised.is_none(), "{lack}");
        eprintln!("NOT RUN: {lack}");
        None
    }
}

/// Runs `script` against the server of all suites, in its turn.
fn suite(interpreter: &Interpreter, script: &str, package: &str) {
    static TURN: Mutex<()> = Mutex::new(());
    let Some(command) = interpreter.with(package) else { return };
    let server = shared();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run(command, script, &server);
}

/// Runs `script` with the base URL and the key.
fn run(mut command: Command, script: &str, server: &Server) {
    // The server is on this machine, whatever stands between it and others.
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    let url = format!("http://{}/v1", server.address);
    let output = command.current_dir(FOLDER).args([script, &url, KEY]).output().expect("it ran a moment ago");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let said = said.concat();
    assert!(output.status.success(), "{said}\nthe server:\n{}", server.log());
    print!("{said}");
}

/// The server of all suites that run or wait: it ends with the last of them.
fn shared() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server =
            Arc::new(ready(&["--max-model-len", "8192", "--served-model-name", "tiny", "toys/tiny"]));
        *shared = Arc::downgrade(&server);
        server
    })
}

fn ready(flags: &[&str]) -> Server {
    Server::ready(&[&["--api-key", KEY, "--host", "127.0.0.1"], flags].concat())
}
