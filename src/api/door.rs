//! Where connections come in: a port or a socket file, TLS or not, and how much of everything one client may take.

use super::error::ApiError;
use super::line::{self, Line, Underway, Wire};
use super::tls::Tls;
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, Response, Uri};
use axum::response::IntoResponse;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// What HTTP/2 begins with, RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What the first byte of TLS is: a handshake record, RFC 8446 section 5.1.
const HANDSHAKE: u8 = 22;
/// Fields of a head that are kept to be counted; more than these hyper refuses by itself.
const FIELDS_MOST: usize = 1024;
/// Requests of one HTTP/2 connection that run at once.
const STREAMS_MOST: u32 = 256;
/// How often a silent HTTP/2 connection is asked whether it lives, and how long it may take to say so.
const ASK: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(20));
/// Descriptors may be used up; they come back, and asking for them in a circle would only take the time.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How much a client may take, and how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Open at once; who comes then is told so.
    pub connections: usize,
    /// Bytes of a request's line and fields.
    pub head_bytes: usize,
    /// Fields of a request.
    pub fields: usize,
    /// From a head's first byte to its last, and for TLS to agree.
    pub head: Duration,
    /// For the first part of a body; after it every KiB brings a further second.
    pub body: Duration,
    /// Without a request. Pools of clients hold connections for a minute and more.
    pub idle: Duration,
    /// For a reader to take the next byte.
    pub write: Duration,
    /// For an answer to become complete whose client will send no more.
    pub farewell: Duration,
    /// For a client to see that we have closed.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            head_bytes: 64 << 10,
            fields: 256,
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            idle: Duration::from_secs(120),
            write: Duration::from_secs(120),
            farewell: Duration::from_millis(500),
            linger: Duration::from_secs(1),
        }
    }
}

/// Marks a request that gets no line in the log.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

/// A listener and its rules.
pub struct Door {
    listener: Listener,
    tls: Option<Tls>,
    rules: Rules,
}

enum Listener {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

/// What holds for every request of a door.
#[derive(Debug, Clone, Default)]
struct Rules {
    limits: Limits,
    /// Stands before every path; empty, or `/…` without a slash at the end.
    root: Arc<str>,
    /// Paths whose requests nobody wants to read about.
    quiet: Arc<[String]>,
}

impl From<TcpListener> for Door {
    fn from(listener: TcpListener) -> Self {
        Self { listener: Listener::Tcp(listener), tls: None, rules: Rules::default() }
    }
}

#[cfg(unix)]
impl From<UnixListener> for Door {
    fn from(listener: UnixListener) -> Self {
        Self { listener: Listener::Unix(listener), tls: None, rules: Rules::default() }
    }
}

impl Door {
    pub fn with_tls(self, tls: Option<Tls>) -> Self {
        Self { tls, ..self }
    }

    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.rules.limits = limits;
        self
    }

    /// `--root-path`: what a proxy in front puts before every path. Without it the paths are served all the same.
    pub fn with_root(mut self, root: &str) -> Self {
        let root = root.trim_matches('/');
        self.rules.root = if root.is_empty() { "".into() } else { format!("/{root}").into() };
        self
    }

    /// `--disable-access-log-for-endpoints`
    pub fn with_quiet(mut self, paths: Vec<String>) -> Self {
        self.rules.quiet = paths.into();
        self
    }

    /// Lets connections in until `stop` is raised, then waits until each has had its answers.
    pub async fn serve(self, router: Router, mut stop: watch::Receiver<bool>) -> io::Result<()> {
        let Self { listener, tls, rules } = self;
        let places = Arc::new(Semaphore::new(rules.limits.connections));
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                () = raised(&mut stop) => break,
                stream = listener.accept() => stream,
                Some(_) = connections.join_next() => continue,
            };
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::debug!("accept: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let place = places.clone().try_acquire_owned();
            let guest = Guest { rules: rules.clone(), router: router.clone(), stop: stop.clone() };
            let tls = tls.clone();
            connections.spawn(async move {
                match place {
                    Ok(_place) => guest.meet(stream, tls).await,
                    Err(_) => guest.turn_away(stream, tls.is_some()).await,
                }
            });
        }
        // No port is held while the last answers are written.
        drop(listener);
        while connections.join_next().await.is_some() {}
        Ok(())
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Streams are many small writes, which must not wait for each other.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!("nodelay: {error}");
                }
                Ok(Stream::Tcp(stream))
            }
            #[cfg(unix)]
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl Stream {
    fn wire(self) -> Box<dyn Wire> {
        match self {
            Self::Tcp(stream) => Box::new(stream),
            #[cfg(unix)]
            Self::Unix(stream) => Box::new(stream),
        }
    }

    /// Whether TLS begins. Errors: nothing begins.
    async fn speaks_tls(&self) -> io::Result<bool> {
        match self {
            Self::Tcp(stream) => {
                let mut first = [0];
                Ok(stream.peek(&mut first).await? > 0 && first[0] == HANDSHAKE)
            }
            #[cfg(unix)]
            Self::Unix(_) => Ok(true),
        }
    }
}

/// What a connection needs to be served.
struct Guest {
    rules: Rules,
    router: Router,
    stop: watch::Receiver<bool>,
}

impl Guest {
    async fn meet(self, stream: Stream, tls: Option<Tls>) {
        let limits = self.rules.limits;
        let Some(tls) = tls else { return self.plain(Line::new(stream.wire(), limits)).await };
        match tokio::time::timeout(limits.head, stream.speaks_tls()).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                let error = ApiError::malformed("This port speaks TLS: use https://.");
                return line::say(Line::new(stream.wire(), limits), &error).await;
            }
            _ => return,
        }
        match tokio::time::timeout(limits.head, tls.acceptor().accept(stream.wire())).await {
            Ok(Ok(stream)) => {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                let line = Line::new(Box::new(stream), limits);
                if is_http2 { self.http2(line).await } else { self.http1(line).await }
            }
            Ok(Err(error)) => tracing::debug!("TLS: {error}"),
            Err(_) => tracing::debug!("TLS: no agreement in time"),
        }
    }

    async fn turn_away(self, stream: Stream, is_tls: bool) {
        if !is_tls {
            let error = ApiError::Crowded { limit: self.rules.limits.connections };
            line::say(Line::new(stream.wire(), self.rules.limits), &error).await;
        }
    }

    /// HTTP/1 or, from who knows that we can, HTTP/2 without a word before.
    async fn plain(mut self, mut line: Line) {
        let begins = tokio::select! {
            begins = line.begins_with(PREFACE) => begins,
            () = raised(&mut self.stop) => return,
        };
        match begins {
            Ok(true) => self.http2(line).await,
            Ok(false) => self.http1(line).await,
            Err(_) => line.explain().await,
        }
    }

    async fn http1(mut self, line: Line) {
        let (rules, router, progress) = (self.rules.clone(), self.router, line.progress());
        let service = service_fn(move |request| {
            let underway = progress.begin();
            let answer = answer(&rules, &router, request);
            async move { Ok::<_, Infallible>(answer.await.map(|body| Tracked { body, _underway: underway })) }
        });
        let mut connection = http1::Builder::new()
            .header_read_timeout(None)
            .max_headers(FIELDS_MOST)
            .serve_connection(TokioIo::new(line), service);
        let mut connected = Pin::new(&mut connection);
        let ended = tokio::select! {
            ended = connected.as_mut() => ended,
            () = raised(&mut self.stop) => {
                connected.as_mut().graceful_shutdown();
                connected.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
        connection.into_parts().io.into_inner().explain().await;
    }

    async fn http2(mut self, mut line: Line) {
        line.leave_to_protocol();
        let (rules, router) = (self.rules.clone(), self.router);
        let head_bytes = u32::try_from(rules.limits.head_bytes).unwrap_or(u32::MAX);
        let service = service_fn(move |request| {
            let answer = answer(&rules, &router, request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(ASK.0)
            .keep_alive_timeout(ASK.1)
            .max_concurrent_streams(STREAMS_MOST)
            .max_header_list_size(head_bytes)
            .serve_connection(TokioIo::new(line), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = raised(&mut self.stop) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
    }
}

/// Resolves when the server shall end, or when nobody could say so any more.
async fn raised(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The router's answer to a request whose head is no larger than it may be.
fn answer(
    rules: &Rules,
    router: &Router,
    mut request: Request<Incoming>,
) -> impl Future<Output = Response<Body>> + Send + use<> {
    let fits = check(request.uri(), request.headers(), &rules.limits);
    if let Some(inner) = below(request.uri(), &rules.root) {
        *request.uri_mut() = inner;
    }
    if rules.quiet.iter().any(|path| path == request.uri().path()) {
        request.extensions_mut().insert(Quiet);
    }
    request.extensions_mut().insert(rules.limits);
    let router = TowerToHyperService::new(router.clone());
    async move {
        match fits {
            Ok(()) => router.call(request).await.unwrap_or_else(|never| match never {}),
            Err(error) => error.into_response(),
        }
    }
}

fn check(uri: &Uri, headers: &HeaderMap, limits: &Limits) -> Result<(), ApiError> {
    let line = uri.path_and_query().map_or(0, |path| path.as_str().len());
    let fields = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len());
    if line + fields.sum::<usize>() > limits.head_bytes {
        return Err(ApiError::HeadTooLarge { limit: limits.head_bytes });
    }
    if headers.len() > limits.fields {
        return Err(ApiError::TooManyFields { limit: limits.fields });
    }
    Ok(())
}

/// A path behind `root`, if it is there.
fn below(uri: &Uri, root: &str) -> Option<Uri> {
    let whole = uri.path_and_query()?.as_str();
    let rest = whole.strip_prefix(root).filter(|_| !root.is_empty())?;
    match rest.chars().next() {
        Some('/') => rest.parse().ok(),
        None | Some('?') => format!("/{rest}").parse().ok(),
        Some(_) => None,
    }
}

/// A body, and with it the time in which its request is under way.
struct Tracked {
    body: Body,
    _underway: Underway,
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_proxy_puts_before_paths_is_taken_off() {
        let check = |root: &str, path: &str, expected: &str| {
            let uri: Uri = path.parse().expect("a path");
            let served = below(&uri, root).unwrap_or(uri);
            assert_eq!(served.to_string(), expected, "{root} {path}");
        };
        check("", "/health", "/health");
        check("/llm", "/health", "/health");
        check("/llm", "/llm/health?x=1", "/health?x=1");
        check("/llm", "/llm", "/");
        check("/llm", "/llm?x=1", "/?x=1");
        check("/llm", "/llmore", "/llmore");
    }
}
