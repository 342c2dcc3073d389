//! `/v1/files` and `/v1/batches`: a file of lines goes in, files of results come out.

use super::world::{CHAT, Server, chat, names, read};
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use ferrotron::api::batch::{self, FileOptions};
use ferrotron::api::{App, Options};
use serde_json::{Value, json};
use std::time::Duration;
use tempfile::TempDir;

const BOUNDARY: &str = "a-boundary";

fn line(id: &str, url: &str, body: &Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string()
}

fn chats(count: usize) -> String {
    let lines: Vec<String> =
        (0..count).map(|id| line(&format!("line {id}"), CHAT, &chat(json!({})))).collect();
    lines.join("\n")
}

fn form(purpose: &str, content: &str) -> Request<Body> {
    let body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n--{BOUNDARY}\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{content}\r\n--{BOUNDARY}--\r\n"
    );
    Request::post("/v1/files")
        .header(header::CONTENT_TYPE, format!("multipart/form-data; boundary={BOUNDARY}"))
        .body(Body::from(body))
        .expect("a request")
}

async fn upload(server: &Server, content: &str) -> String {
    let (status, file) = sent(server, form("batch", content)).await;
    assert_eq!(status, StatusCode::OK, "{file}");
    file["id"].as_str().expect("an id").to_owned()
}

async fn sent(server: &Server, request: Request<Body>) -> (StatusCode, Value) {
    let (status, text) = read(server.call(request).await).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
}

async fn got(server: &Server, path: &str) -> (StatusCode, Value) {
    sent(server, Request::get(path).body(Body::empty()).expect("a request")).await
}

async fn begun(server: &Server, file: &str, window: &str) -> String {
    let asked = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": window});
    let (status, batch) = server.json("/v1/batches", asked).await;
    assert_eq!((status, &batch["status"]), (StatusCode::OK, &json!("validating")), "{batch}");
    batch["id"].as_str().expect("an id").to_owned()
}

/// The batch once it is `status`, or anything that it stays.
async fn ended(server: &Server, id: &str, status: &str) -> Value {
    let end = ["completed", "failed", "expired", "cancelled"];
    for _ in 0..6000 {
        let (_, batch) = got(server, &format!("/v1/batches/{id}")).await;
        if batch["status"] == status {
            return batch;
        }
        assert!(!end.iter().any(|end| batch["status"] == *end), "{batch}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{id} is never {status}");
}

/// The results in a file, by the names of their lines.
async fn results(server: &Server, file: &Value) -> Vec<(String, Value)> {
    let path = format!("/v1/files/{}/content", file.as_str().expect("a file"));
    let (status, text) = server.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON"));
    let mut results: Vec<(String, Value)> =
        lines.map(|line| (line["custom_id"].as_str().expect("a name").to_owned(), line)).collect();
    results.sort_by(|a, b| a.0.cmp(&b.0));
    results
}

#[tokio::test]
async fn every_line_gets_its_answer_in_one_file_or_the_other() {
    let server = Server::answering("</think>yes").await;
    let lines = [
        line("good", CHAT, &chat(json!({"priority": -9}))),
        String::new(),
        line("bad", CHAT, &chat(json!({"temperature": 9}))),
        line("unknown", CHAT, &chat(json!({"model": "gpt-9"}))),
        line("häßlich 🦀", CHAT, &chat(json!({"n": 2, "temperature": 1}))),
    ];
    let file = upload(&server, &lines.join("\n")).await;
    let id = begun(&server, &file, "24h").await;
    let batch = ended(&server, &id, "completed").await;
    assert_eq!(batch["request_counts"], json!({"total": 4, "completed": 2, "failed": 2}));
    assert_eq!((&batch["input_file_id"], &batch["errors"]), (&json!(file), &Value::Null));
    for time in ["created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at"] {
        assert!(batch[time].is_u64(), "{time}: {batch}");
    }
    let good = results(&server, &batch["output_file_id"]).await;
    assert_eq!(good.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["good", "häßlich 🦀"]);
    let result = &good[0].1;
    assert!(result["id"].as_str().is_some_and(|id| id.starts_with("batch_req_")), "{result}");
    assert_eq!((&result["error"], &result["response"]["status_code"]), (&Value::Null, &json!(200)));
    assert_eq!(result["response"]["body"]["choices"][0]["message"]["content"], "yes");
    assert!(result["response"]["request_id"].as_str().is_some_and(|id| !id.is_empty()), "{result}");
    let bad = results(&server, &batch["error_file_id"]).await;
    let told = |at: usize| (bad[at].0.clone(), bad[at].1["response"]["status_code"].clone());
    assert_eq!((told(0), told(1)), (("bad".into(), json!(400)), ("unknown".into(), json!(404))));
    assert_eq!(bad[0].1["response"]["body"]["error"]["param"], "temperature");
}

#[tokio::test]
async fn a_file_that_is_no_batch_fails_with_its_lines() {
    let server = Server::answering("yes").await;
    let good = line("a", CHAT, &chat(json!({})));
    let elsewhere = line("b", "/v1/completions", &json!({"prompt": "x"}));
    let file = upload(&server, &format!("{good}\n\n{good}\nno JSON\n{elsewhere}")).await;
    let batch = ended(&server, &begun(&server, &file, "24h").await, "failed").await;
    let errors = batch["errors"]["data"].as_array().expect("a list").clone();
    let told: Vec<_> = errors.iter().map(|error| (error["line"].as_u64(), error["code"].as_str())).collect();
    let expected = [
        (Some(3), Some("duplicate_custom_id")),
        (Some(4), Some("invalid_json_line")),
        (Some(5), Some("invalid_url")),
    ];
    assert_eq!(told, expected, "{batch}");
    assert_eq!(batch["output_file_id"], Value::Null);
    let empty = upload(&server, "\n \n").await;
    let batch = ended(&server, &begun(&server, &empty, "24h").await, "failed").await;
    assert_eq!(batch["errors"]["data"][0]["code"], "empty_file");
}

#[tokio::test]
async fn what_is_cancelled_or_late_says_so_of_each_line_that_got_no_answer() {
    let script = "word ".repeat(300);
    let server = Server::start(&script, Duration::from_millis(5), Options::new(names())).await;
    let file = upload(&server, &chats(12)).await;
    let late = begun(&server, &file, "1s").await;
    let waiting = begun(&server, &file, "24h").await;
    let (status, batch) = server.json(&format!("/v1/batches/{waiting}/cancel"), json!({})).await;
    assert_eq!((status, &batch["status"]), (StatusCode::OK, &json!("cancelling")));
    for (id, status, code) in [(waiting, "cancelled", "batch_cancelled"), (late, "expired", "batch_expired")]
    {
        let batch = ended(&server, &id, status).await;
        assert_eq!(batch["request_counts"]["total"], 12);
        let mut all = results(&server, &batch["error_file_id"]).await;
        assert!(all.iter().any(|(_, result)| result["error"]["code"] == code), "{all:?}");
        if batch["output_file_id"].is_string() {
            all.extend(results(&server, &batch["output_file_id"]).await);
        }
        assert_eq!(all.len(), 12, "{status}");
        let (again, error) = server.json(&format!("/v1/batches/{id}/cancel"), json!({})).await;
        assert_eq!(again, StatusCode::BAD_REQUEST, "{error}");
    }
    let running = "vllm:num_requests_running{model_name=\"nvidia/tiny\",engine=\"0\"} 0";
    for _ in 0..600 {
        if server.get("/metrics").await.1.contains(running) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("lines of batches that have ended still run");
}

#[tokio::test]
async fn files_are_listed_fetched_and_deleted_and_bounded() {
    let mut options = Options::new(names());
    options.files = FileOptions { directory: None, bytes_max: 400, count_max: 3 };
    let server = Server::start("yes", Duration::ZERO, options).await;
    let first = upload(&server, "one\r\n").await;
    let second = upload(&server, "").await;
    let (_, list) = got(&server, "/v1/files?purpose=batch&limit=1").await;
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(second), &json!(true)));
    let (_, list) = got(&server, &format!("/v1/files?after={second}")).await;
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(first), &json!(false)));
    assert_eq!(got(&server, "/v1/files?limit=none").await.0, StatusCode::BAD_REQUEST);
    let (_, file) = got(&server, &format!("/v1/files/{first}")).await;
    assert_eq!((&file["bytes"], &file["filename"]), (&json!(5), &json!("in.jsonl")));
    assert_eq!(server.get(&format!("/v1/files/{first}/content")).await.1, "one\r\n");

    let (status, error) = sent(&server, form("batch", &"x".repeat(400))).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{error}");
    // What was refused takes no space.
    let third = upload(&server, &"x".repeat(395)).await;
    let (status, error) = sent(&server, form("batch", "")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
    let delete =
        |id: &str| Request::delete(format!("/v1/files/{id}")).body(Body::empty()).expect("a request");
    let (_, deleted) = sent(&server, delete(&third)).await;
    assert_eq!(deleted, json!({"id": third, "object": "file", "deleted": true}));
    upload(&server, &"x".repeat(395)).await;
    for path in
        [format!("/v1/files/{third}"), format!("/v1/files/{third}/content"), "/v1/files/..%2Flock".into()]
    {
        assert_eq!(got(&server, &path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(sent(&server, delete(&third)).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn what_cannot_be_handed_in_is_told_why() {
    let server = Server::answering("yes").await;
    let file = upload(&server, &chats(1)).await;
    let check = async |body: Value, status: StatusCode, param: Value| {
        let (got, error) = server.json("/v1/batches", body).await;
        assert_eq!((got, &error["error"]["param"]), (status, &param), "{error}");
    };
    let asked = |key: &str, value: Value| {
        let mut body = json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"});
        body[key] = value;
        body
    };
    check(asked("endpoint", json!("/v1/embeddings")), StatusCode::BAD_REQUEST, json!("endpoint")).await;
    check(asked("completion_window", json!("soon")), StatusCode::BAD_REQUEST, json!("completion_window"))
        .await;
    check(asked("input_file_id", json!(7)), StatusCode::BAD_REQUEST, json!("input_file_id")).await;
    check(asked("input_file_id", Value::Null), StatusCode::BAD_REQUEST, json!("input_file_id")).await;
    check(asked("input_file_id", json!("file-none")), StatusCode::NOT_FOUND, Value::Null).await;
    check(asked("metadata", json!([1])), StatusCode::BAD_REQUEST, json!("metadata")).await;
    assert_eq!(got(&server, "/v1/batches/batch_none").await.0, StatusCode::NOT_FOUND);

    let (status, error) = sent(&server, form("fine-tune", "x")).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("purpose")));
    let mut stranger = form("batch", "x");
    stranger.headers_mut().insert(header::ORIGIN, "https://example.com".parse().expect("a value"));
    assert_eq!(sent(&server, stranger).await.0, StatusCode::BAD_REQUEST);
    for (kind, body) in [
        ("application/json", "{}"),
        ("multipart/form-data", "x"),
        ("multipart/form-data; boundary=b", "--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx"),
        (
            "multipart/form-data; boundary=b",
            "--b\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\ny\r\n--b--",
        ),
    ] {
        let request = Request::post("/v1/files").header(header::CONTENT_TYPE, kind);
        let (status, error) = sent(&server, request.body(Body::from(body)).expect("a request")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{kind} {body}: {error}");
    }
    assert_eq!(got(&server, "/v1/files").await.1["data"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_key_of_the_server_opens_its_own_door_to_batches_and_to_nobody_else() {
    let mut options = Options::new(names());
    options.api_keys = vec!["secret".into()];
    let server = Server::start("</think>yes", Duration::ZERO, options).await;
    let with_key = |mut request: Request<Body>| {
        request.headers_mut().insert("x-api-key", "secret".parse().expect("a value"));
        request
    };
    assert_eq!(sent(&server, form("batch", "x")).await.0, StatusCode::UNAUTHORIZED);
    let (_, file) = sent(&server, with_key(form("batch", &chats(2)))).await;
    let asked = json!({"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"});
    let (_, batch) = sent(&server, with_key(super::world::post("/v1/batches", asked.to_string()))).await;
    let path = format!("/v1/batches/{}", batch["id"].as_str().expect("an id"));
    for _ in 0..6000 {
        let request = Request::get(&path).body(Body::empty()).expect("a request");
        let (_, batch) = sent(&server, with_key(request)).await;
        if batch["status"] == "completed" {
            assert_eq!(batch["request_counts"]["completed"], 2);
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the batch never ends");
}

fn kept(folder: &TempDir) -> Options {
    let mut options = Options::new(names());
    options.files.directory = Some(folder.path().join("files"));
    options
}

#[tokio::test]
async fn files_and_batches_outlive_the_server_in_a_folder_of_their_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, done, ids) = {
        let server = Server::start("</think>yes", Duration::ZERO, kept(&folder)).await;
        batch::resume(&server.app).expect("a new folder");
        let other = App::new(kept(&folder));
        assert!(batch::resume(&other).is_err_and(|error| error.contains("another server")));
        let file = upload(&server, &chats(3)).await;
        let id = begun(&server, &file, "24h").await;
        let done = ended(&server, &id, "completed").await;
        let count = results(&server, &json!(file)).await.len();
        (file, done, count)
    };
    assert_eq!(ids, 3);
    let server = Server::start("</think>no", Duration::ZERO, kept(&folder)).await;
    // The tasks of the first server let go of the folder a moment after it.
    for _ in 0..600 {
        if batch::resume(&server.app).is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (_, list) = got(&server, "/v1/batches").await;
    assert_eq!(list["data"], json!([done]));
    assert_eq!(results(&server, &done["output_file_id"]).await.len(), 3);
    let again = begun(&server, &file, "24h").await;
    ended(&server, &again, "completed").await;
}
