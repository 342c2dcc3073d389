//! The binary, asked by the official `openai` package for Python. Needs python3 with the package of
//! tests/clients/requirements.txt (FERROTRON_TEST_PYTHON names another interpreter) and says aloud when it cannot run.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Ends the server when the test does, whichever way.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the tiny model on a free port; returns it with its address.
fn start() -> (Server, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferrotron"))
        .args([
            "serve",
            "--model",
            "tiny",
            "--port",
            "0",
            "--max-model-len",
            "2048",
            "--api-key",
            "key-of-the-test",
        ])
        .args(["--host", "127.0.0.1"])
        .env("NO_COLOR", "1")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was built for this test");
    let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
    let server = Server(child);
    let mut address = None;
    let mut seen = String::new();
    for line in lines.by_ref().map_while(Result::ok) {
        if let Some(at) = line.find("http://") {
            address.get_or_insert_with(|| line[at..].trim().to_owned());
        }
        seen += &line;
        seen.push('\n');
        if line.contains("Application startup complete.") {
            // Nobody reads the log any more; it must not fill the pipe and stop the server.
            std::thread::spawn(move || lines.for_each(drop));
            return (server, address.expect("the address comes before the model"));
        }
    }
    panic!("the server ended before it was ready:\n{seen}");
}

#[test]
fn the_openai_package_works_unchanged() {
    let python = std::env::var("FERROTRON_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_package = Command::new(&python)
        .args(["-c", "import openai"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !has_package {
        eprintln!("NOT RUN: {python} has no openai package; pip install -r tests/clients/requirements.txt");
        return;
    }
    let (_server, address) = start();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/openai_client.py");
    let output = Command::new(&python)
        .args([script, &format!("{address}/v1"), "key-of-the-test"])
        .output()
        .expect("python ran a moment ago");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
