//! A client for OpenAI's API over plain HTTP: one connection per request, streams read as they come.

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// More of a server's complaint is not read: it is for a person.
const COMPLAINT: usize = 4096;

/// Why a request brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "expected a URL such as http://127.0.0.1:8000, got `{0}`: TLS and other schemes are not spoken here"
    )]
    Url(String),
    #[error(
        "nobody listens at {address}: start `ferrotron serve` there, or leave out --base-url and --host for a server \
         that starts by itself"
    )]
    Refused { address: String },
    #[error("{address} cannot be reached: {error}")]
    Unreachable { address: String, error: io::Error },
    #[error("the connection to {address} broke: {error}")]
    Broken { address: String, error: hyper::Error },
    #[error("{path} answered {status}: {body}")]
    Status { path: String, status: u16, body: String },
    #[error("{path} answered with something else than JSON: {error}")]
    Json { path: String, error: serde_json::Error },
    #[error("the stream ended with an error: {0}")]
    Stream(String),
    #[error("the stream ended before it said that it was done")]
    Cut,
    #[error("no answer in {0:?}")]
    TimedOut(Duration),
}

/// A server and how to ask it.
#[derive(Debug, Clone)]
pub struct Target {
    /// `host:port`
    address: String,
    /// What stands before every path, without a slash at its end.
    prefix: String,
    key: Option<String>,
    /// For one whole request.
    timeout: Duration,
}

impl Target {
    /// `base`: `http://host:port`, and perhaps a path. Errors: [`ClientError::Url`].
    pub fn new(base: &str, key: Option<String>, timeout: Duration) -> Result<Self, ClientError> {
        let wrong = || ClientError::Url(base.to_owned());
        let rest = base.trim_end_matches('/').strip_prefix("http://").ok_or_else(wrong)?;
        let (host, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let port = |text: &str| text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        if host.is_empty() || host.starts_with(':') {
            return Err(wrong());
        }
        let address = if port(host) { host.to_owned() } else { format!("{host}:80") };
        Ok(Self { address, prefix: path.to_owned(), key, timeout })
    }

    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        self.whole(Request::get(self.uri(path)), path, Bytes::new()).await
    }

    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        json_of(path, &self.get_text(path).await?)
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        let bytes = Bytes::from(body.to_string());
        json_of(path, &self.whole(Request::post(self.uri(path)), path, bytes).await?)
    }

    /// Sends `body` and hands each event of the stream to `on_event` with the time of its arrival.
    /// Errors: among others [`ClientError::Stream`] for an error event and [`ClientError::Cut`] without `[DONE]`.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        on_event: impl FnMut(Value, Instant),
    ) -> Result<(), ClientError> {
        self.stream_slowly(path, body, Duration::ZERO, on_event).await
    }

    /// The same for a reader who rests for `pause` after each piece of the stream.
    pub async fn stream_slowly(
        &self,
        path: &str,
        body: &Value,
        pause: Duration,
        mut on_event: impl FnMut(Value, Instant),
    ) -> Result<(), ClientError> {
        self.in_time(async {
            let response =
                self.send(Request::post(self.uri(path)), path, Bytes::from(body.to_string())).await?;
            let mut body = response.into_body();
            let (mut events, mut outcome) = (Events::default(), None);
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| self.broken(error))?;
                let Some(data) = frame.data_ref() else { continue };
                let now = Instant::now();
                events.push(data, |data| {
                    if outcome.is_none() {
                        outcome = take(data, path, |event| on_event(event, now));
                    }
                });
                if let Some(outcome) = outcome {
                    return outcome;
                }
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            Err(ClientError::Cut)
        })
        .await
    }

    /// The whole answer at once.
    async fn whole(
        &self,
        request: hyper::http::request::Builder,
        path: &str,
        body: Bytes,
    ) -> Result<String, ClientError> {
        self.in_time(async {
            let response = self.send(request, path, body).await?;
            let body = response.into_body().collect().await.map_err(|error| self.broken(error))?;
            Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
        })
        .await
    }

    fn uri(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    fn broken(&self, error: hyper::Error) -> ClientError {
        ClientError::Broken { address: self.address.clone(), error }
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or(Err(ClientError::TimedOut(self.timeout)))
    }

    /// The response's head, once it says that all is well.
    async fn send(
        &self,
        request: hyper::http::request::Builder,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = request.header(HOST, &self.address).header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        // A path or a key that is no HTTP is the user's, as the address is.
        let request = request.body(Full::new(body)).map_err(|_| ClientError::Url(self.uri(path)))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await?))
                .await
                .map_err(|error| self.broken(error))?;
        // It ends with the response's body; whatever breaks it breaks the body too.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.into_body().collect().await.map_err(|error| self.broken(error))?.to_bytes();
        let body = String::from_utf8_lossy(&body[..body.len().min(COMPLAINT)]).into_owned();
        Err(ClientError::Status { path: path.to_owned(), status: status.as_u16(), body })
    }

    async fn connect(&self) -> Result<TcpStream, ClientError> {
        let address = || self.address.clone();
        let stream = TcpStream::connect(&self.address).await.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => ClientError::Refused { address: address() },
            _ => ClientError::Unreachable { address: address(), error },
        })?;
        stream.set_nodelay(true).map_err(|error| ClientError::Unreachable { address: address(), error })?;
        Ok(stream)
    }
}

fn json_of(path: &str, text: &str) -> Result<Value, ClientError> {
    serde_json::from_str(text).map_err(|error| ClientError::Json { path: path.to_owned(), error })
}

/// One event of a stream; something once the stream has come to its end.
fn take(data: &str, path: &str, on_event: impl FnOnce(Value)) -> Option<Result<(), ClientError>> {
    if data.trim() == "[DONE]" {
        return Some(Ok(()));
    }
    match serde_json::from_str::<Value>(data) {
        Ok(event) if event.get("error").is_some_and(|error| !error.is_null()) => {
            Some(Err(ClientError::Stream(event["error"].to_string())))
        }
        Ok(event) => {
            on_event(event);
            None
        }
        Err(error) => Some(Err(ClientError::Json { path: path.to_owned(), error })),
    }
}

/// Server-sent events out of bytes, however they are cut.
#[derive(Debug, Default)]
struct Events {
    line: Vec<u8>,
    data: String,
}

impl Events {
    /// Hands out the data of each event that is complete now.
    fn push(&mut self, bytes: &[u8], mut on_data: impl FnMut(&str)) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line(&mut on_data);
            } else {
                self.line.push(byte);
            }
        }
    }

    fn end_line(&mut self, on_data: &mut impl FnMut(&str)) {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.strip_suffix('\r').unwrap_or(&line);
        if line.is_empty() {
            if !self.data.is_empty() {
                on_data(self.data.trim_end_matches('\n'));
            }
            self.data.clear();
        } else if let Some(data) = line.strip_prefix("data:") {
            self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            self.data.push('\n');
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let stream =
            ": alive\r\n\r\ndata: {\"a\": \"ü\"}\n\nevent: x\ndata: one\ndata: two\n\ndata:[DONE]\n\n";
        for size in 1..stream.len() {
            let (mut events, mut found) = (Events::default(), Vec::new());
            for piece in stream.as_bytes().chunks(size) {
                events.push(piece, |data| found.push(data.to_owned()));
            }
            assert_eq!(found, ["{\"a\": \"ü\"}", "one\ntwo", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn a_base_url_is_an_address_and_a_prefix() {
        let check = |base: &str, expected: Option<(&str, &str)>| {
            let target = Target::new(base, None, Duration::ZERO).ok();
            let got = target.as_ref().map(|target| (target.address.as_str(), target.prefix.as_str()));
            assert_eq!(got, expected, "{base}");
        };
        check("http://localhost:8000", Some(("localhost:8000", "")));
        check("http://localhost:8000/gate/", Some(("localhost:8000", "/gate")));
        check("http://spark", Some(("spark:80", "")));
        check("http://[::1]:80", Some(("[::1]:80", "")));
        check("https://spark", None);
        check("http://", None);
        check("http://:80", None);
        check("spark:8000", None);
    }

    #[tokio::test]
    async fn nobody_at_the_door_is_said_to_be_so() {
        // A port that was free a moment ago.
        let address = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let target = Target::new(&format!("http://{address}"), None, Duration::from_secs(5)).unwrap();
        let error = target.get("/v1/models").await.unwrap_err().to_string();
        assert!(error.contains("nobody listens") && error.contains("ferrotron serve"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_waited_for_only_so_long() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let target = Target::new(&base, None, Duration::from_millis(20)).unwrap();
        assert!(matches!(target.get("/").await, Err(ClientError::TimedOut(_))));
    }

    /// What a client makes of an answer to a stream request.
    async fn answered(answer: &'static str) -> (Vec<Value>, Result<(), ClientError>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The head and the body `{}` may come apart.
            let mut request = Vec::new();
            while !request.ends_with(b"{}") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0);
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let target = Target::new(&base, None, Duration::from_secs(5)).unwrap();
        let mut events = Vec::new();
        let result = target.stream("/v1/x", &serde_json::json!({}), |event, _| events.push(event)).await;
        server.await.unwrap();
        (events, result)
    }

    #[tokio::test]
    async fn the_ends_of_a_stream_are_told_apart() {
        let (events, result) = answered("HTTP/1.1 200 OK\r\n\r\ndata: {\"n\":1}\n\ndata: [DONE]\n\n").await;
        assert_eq!((events.len(), result.is_ok()), (1, true));
        let (events, result) = answered("HTTP/1.1 200 OK\r\n\r\ndata: {\"n\":1}\n\n").await;
        assert!(events.len() == 1 && matches!(result, Err(ClientError::Cut)), "{result:?}");
        let (_, result) = answered("HTTP/1.1 200 OK\r\n\r\ndata: {\"error\":{\"code\":500}}\n\n").await;
        assert!(matches!(result, Err(ClientError::Stream(_))), "{result:?}");
        let (_, result) = answered("HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nfull").await;
        assert!(
            matches!(&result, Err(ClientError::Status { status: 429, body, .. }) if body == "full"),
            "{result:?}"
        );
    }
}
