//! The binary, asked by the official `openai` package for Python. Needs python3 with the package of
//! tests/clients/requirements.txt (FERROTRON_TEST_PYTHON names another interpreter) and says aloud when it cannot run.

#[path = "support/server.rs"]
#[allow(dead_code, reason = "the package is the client here; only the server is wanted")]
mod server;

use server::Server;
use std::process::{Command, Stdio};

#[test]
fn the_openai_package_works_unchanged() {
    suite("openai_client.py");
}

#[test]
fn the_openai_package_keeps_and_continues_responses() {
    suite("responses_client.py");
}

fn suite(script: &str) {
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
    let server =
        Server::ready(&["--max-model-len", "2048", "--api-key", "key-of-the-test", "--host", "127.0.0.1"]);
    let script = format!("{}/tests/clients/{script}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(&python)
        .args([&script, &format!("http://{}/v1", server.address), &"key-of-the-test".to_owned()])
        .output()
        .expect("python ran a moment ago");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
