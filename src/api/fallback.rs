//! Work that can be done elsewhere goes elsewhere while there is no engine here: `--fallback URL`.
//!
//! A request marked as background (a priority above 0) that this server would answer with 503, because its engine is
//! loading, dead or ending, is sent on to the other server as it came, and its answer is passed through, streams as they
//! come. Whoever waits for an answer learns of the trouble at once instead: it knows better where else to ask.
//!
//! What is sent on says so, and is never sent on again: two servers may stand in for each other.

use super::body::{self, read_object};
use super::door::Limits;
use super::request_id::RequestId;
use super::state::App;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// Says that a request was sent on once, and must be answered where it is.
pub const RELAYED: HeaderName = HeaderName::from_static("x-ferrotron-relayed");
/// Says of an answer who gave it.
const ANSWERED_BY: HeaderName = HeaderName::from_static("x-ferrotron-fallback");
/// Routes that generate.
const ROUTES: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
];
/// What the other server must know of a request. Keys are not among it: they are for this door.
const SENT: [HeaderName; 5] = [
    header::CONTENT_TYPE,
    header::ACCEPT,
    HeaderName::from_static("x-vllm-priority"),
    HeaderName::from_static("anthropic-version"),
    HeaderName::from_static("anthropic-beta"),
];
/// What belongs to a connection rather than to an answer, and what this door says itself.
const NOT_PASSED: [HeaderName; 6] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("x-request-id"),
];
/// A server that is there takes a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The server that stands in.
#[derive(Debug, Clone, PartialEq)]
pub struct Fallback {
    /// `host:port`
    address: String,
    /// What stands before every path, without a slash at its end.
    prefix: String,
    key: Option<HeaderValue>,
    /// What requests are told to ask for there; else they name no model, and its front one answers.
    model: Option<String>,
}

/// Why the other server gave no answer.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("no connection in {CONNECT_TIMEOUT:?}")]
    TimedOut,
    #[error("no connection: {0}")]
    Unreachable(#[from] std::io::Error),
    #[error("{0}")]
    Broken(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] axum::http::Error),
}

impl Fallback {
    /// `url`: `http://host:port`, and perhaps a path. Errors, as a sentence: no such URL, a key that no header can hold.
    pub fn new(url: &str, key: Option<&str>, model: Option<String>) -> Result<Self, String> {
        let wrong = || format!("expected a URL such as http://titan:8000, got `{url}`");
        let rest = url.trim_end_matches('/').strip_prefix("http://").ok_or_else(wrong)?;
        let (host, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:80") };
        let valid = format!("http://{address}{path}").parse::<axum::http::Uri>().is_ok();
        if host.is_empty() || host.starts_with(':') || !valid {
            return Err(wrong());
        }
        let key = key.map(|key| HeaderValue::from_str(&format!("Bearer {key}"))).transpose();
        let key = key.map_err(|_| "the key of the fallback cannot be sent in a header".to_owned())?;
        Ok(Self { address, prefix: path.to_owned(), key, model })
    }

    async fn ask(&self, parts: &Parts, body: Bytes) -> Result<Response, RelayError> {
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = hyper::Request::post(format!("{}{path}", self.prefix))
            .header(header::HOST, &self.address)
            .header(RELAYED, "1");
        for name in SENT {
            for value in parts.headers.get_all(&name) {
                request = request.header(&name, value);
            }
        }
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, key);
        }
        if let Some(RequestId(id)) = parts.extensions.get::<RequestId>() {
            request = request.header("x-request-id", id);
        }
        let request = request.body(Full::new(self.renamed(body)))?;
        let connect = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.address));
        let stream = connect.await.map_err(|_| RelayError::TimedOut)??;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the answer's body, or when our client goes away and drops that.
        tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        let (mut parts, body) = response.into_parts();
        for name in NOT_PASSED {
            parts.headers.remove(name);
        }
        drop_cors(&mut parts.headers);
        // Checked by `new`: an address is part of a URI.
        if let Ok(address) = HeaderValue::from_str(&self.address) {
            parts.headers.insert(ANSWERED_BY, address);
        }
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    /// The body with the model's name there in place of that here.
    fn renamed(&self, body: Bytes) -> Bytes {
        let Ok(mut map) = read_object(&body) else { return body };
        match &self.model {
            Some(model) => map.insert("model".to_owned(), model.as_str().into()),
            None => map.shift_remove("model"),
        };
        serde_json::Value::Object(map).to_string().into()
    }
}

/// Whose pages may read an answer is for this door to say.
fn drop_cors(headers: &mut HeaderMap) {
    let theirs: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in theirs {
        headers.remove(name);
    }
}

/// Lets the request be answered here, and where that cannot be, by the fallback.
pub async fn relay(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(fallback) = app.options.fallback.as_ref().filter(|_| may_leave(&request)) else {
        return next.run(request).await;
    };
    let (parts, body) = request.into_parts();
    let patience = parts.extensions.get::<Limits>().copied().unwrap_or_default().body;
    let bytes = match body::read(body, app.options.body_limit, patience).await {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) => return error.into_response(),
    };
    let is_background = is_background(&parts.headers, &bytes);
    let here = next.run(Request::from_parts(parts.clone(), Body::from(bytes.clone()))).await;
    if !is_background || here.status() != StatusCode::SERVICE_UNAVAILABLE {
        return here;
    }
    match fallback.ask(&parts, bytes).await {
        Ok(there) => {
            tracing::info!("{} was answered by {}", parts.uri.path(), fallback.address);
            there
        }
        Err(error) => {
            tracing::warn!("The fallback {} cannot help: {error}", fallback.address);
            here
        }
    }
}

fn may_leave(request: &Request) -> bool {
    request.method() == Method::POST
        && ROUTES.contains(&request.uri().path())
        && !request.headers().contains_key(RELAYED)
}

/// Whether nobody waits for the answer: the field `priority`, or the header where there is none, is above 0.
fn is_background(headers: &HeaderMap, bytes: &[u8]) -> bool {
    let by_header = body::priority(headers).ok().flatten();
    let by_field = read_object(bytes).ok().and_then(|map| map.get("priority")?.as_f64());
    by_field.map_or_else(|| by_header.is_some_and(|priority| priority > 0), |priority| priority > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_an_address_and_a_prefix() {
        let check = |url: &str, expected: Option<(&str, &str)>| {
            let fallback = Fallback::new(url, None, None).ok();
            let got = fallback.as_ref().map(|f| (f.address.as_str(), f.prefix.as_str()));
            assert_eq!(got, expected, "{url}");
        };
        check("http://titan:8000", Some(("titan:8000", "")));
        check("http://titan/gate/", Some(("titan:80", "/gate")));
        check("http://[::1]:80", Some(("[::1]:80", "")));
        for wrong in ["https://titan", "http://", "http://:80", "titan:8000", "http://a b"] {
            check(wrong, None);
        }
        assert!(Fallback::new("http://titan", Some("a\nb"), None).is_err());
    }

    #[test]
    fn only_who_says_that_it_can_wait_is_sent_elsewhere() {
        let check = |header: Option<&'static str>, body: &str, expected| {
            let mut headers = HeaderMap::new();
            if let Some(value) = header {
                headers.insert("x-vllm-priority", HeaderValue::from_static(value));
            }
            assert_eq!(is_background(&headers, body.as_bytes()), expected, "{header:?} {body}");
        };
        check(None, "{}", false);
        check(None, r#"{"priority": 1}"#, true);
        check(None, r#"{"priority": 5.0}"#, true);
        check(None, r#"{"priority": 0}"#, false);
        check(Some("3"), "{}", true);
        check(Some("3"), r#"{"priority": null}"#, true);
        check(Some("3"), r#"{"priority": -1}"#, false);
        check(Some("-3"), "{}", false);
        check(Some("much"), "{}", false);
        check(None, "no object", false);
    }

    #[test]
    fn the_model_has_its_name_there() {
        let renamed = |model: Option<&str>, body: &'static str| {
            let fallback = Fallback::new("http://titan", None, model.map(str::to_owned)).unwrap();
            String::from_utf8(fallback.renamed(Bytes::from_static(body.as_bytes())).to_vec()).unwrap()
        };
        assert_eq!(renamed(None, r#"{"a":1,"model":"super","b":2}"#), r#"{"a":1,"b":2}"#);
        assert_eq!(renamed(Some("nano"), r#"{"model":"super","b":2}"#), r#"{"model":"nano","b":2}"#);
        assert_eq!(renamed(Some("nano"), "[]"), "[]");
    }
}
