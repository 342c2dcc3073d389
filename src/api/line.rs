//! One connection's bytes, with as much patience as a client deserves.
//!
//! hyper knows HTTP and little about time. What stands between it and the socket here ends the silences that would
//! hold a connection for ever: a head that does not become complete, a reader that takes nothing, nobody there at all.

use super::door::Limits;
use super::error::ApiError;
use axum::http::StatusCode;
use bytes::{Buf, Bytes};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep};

/// What a socket is, whatever carries it.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Bytes that are read and thrown away at once while a client is waited for that still sends.
const SINK: usize = 16 << 10;

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// Nothing of a request is there.
    Idle,
    /// Some of a request's head is there.
    Head,
    /// A request is being answered; its body may still come.
    Served,
}

/// Tells a line what becomes of its requests.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<AtomicU8>);

impl Progress {
    fn get(&self) -> Phase {
        match self.0.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            _ => Phase::Served,
        }
    }

    fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }

    /// A head was complete; the request counts as under way until the value is dropped.
    pub fn begin(&self) -> Underway {
        self.set(Phase::Served);
        Underway(self.clone())
    }
}

/// Held as long as a request is being answered.
#[derive(Debug)]
pub struct Underway(Progress);

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.set(Phase::Idle);
    }
}

/// Why a connection ends without a request having been served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The head was not complete in time.
    Slow,
    /// The client ended in the middle of it.
    Cut,
    /// It is no HTTP, which hyper says with a status alone.
    Refused(StatusCode),
}

/// A socket with time-outs.
pub struct Line {
    wire: Box<dyn Wire>,
    /// Read before, to be read again.
    again: Bytes,
    progress: Progress,
    limits: Limits,
    /// When the silence that is being read ends, and the phase it was set for.
    read: Pin<Box<Sleep>>,
    phase: Option<Phase>,
    /// The client will send no more.
    ended: bool,
    /// That is passed on when `read` says so.
    patient: bool,
    fault: Option<Fault>,
    /// When a reader that takes nothing is given up.
    write: Pin<Box<Sleep>>,
    /// Since the last byte it took.
    blocked: bool,
    /// Our side is closed, and the client's is waited for.
    lingering: bool,
}

impl Line {
    pub fn new(wire: Box<dyn Wire>, limits: Limits) -> Self {
        Self {
            wire,
            again: Bytes::new(),
            progress: Progress::default(),
            limits,
            read: Box::pin(tokio::time::sleep(limits.idle)),
            phase: None,
            ended: false,
            patient: false,
            fault: None,
            write: Box::pin(tokio::time::sleep(limits.write)),
            blocked: false,
            lingering: false,
        }
    }

    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// The first bytes, enough to tell whether they are `wanted`; they will be read again. Errors: no bytes come.
    pub async fn begins_with(&mut self, wanted: &[u8]) -> io::Result<bool> {
        let mut seen = Vec::with_capacity(wanted.len());
        while seen.len() < wanted.len() && wanted.starts_with(&seen) {
            let mut byte = [0; 64];
            let most = byte.len().min(wanted.len() - seen.len());
            match self.read(&mut byte[..most]).await? {
                0 => break,
                count => seen.extend_from_slice(&byte[..count]),
            }
        }
        let begins = seen == wanted;
        self.again = seen.into();
        Ok(begins)
    }

    /// HTTP/2 has streams and time-outs of its own: from here on only writing is timed.
    pub fn leave_to_protocol(&mut self) {
        self.progress.set(Phase::Served);
    }

    /// After all else: why the request that never was is not answered, if anybody is there to read it.
    pub async fn explain(mut self) {
        let Some(fault) = self.fault.take() else { return };
        let error = match fault {
            Fault::Slow => ApiError::Slow { what: "head", seconds: self.limits.head.as_secs() },
            Fault::Cut => ApiError::malformed("The request ended before its head was complete."),
            Fault::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                ApiError::HeadTooLarge { limit: self.limits.head_bytes }
            }
            Fault::Refused(StatusCode::URI_TOO_LONG) => {
                ApiError::HeadTooLarge { limit: self.limits.head_bytes }
            }
            Fault::Refused(_) => ApiError::malformed("This is not an HTTP request."),
        };
        say(self, &error).await;
    }

    /// The end of a silence. Ready: it has lasted too long.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let phase = self.progress.get();
        if self.phase != Some(phase) {
            self.phase = Some(phase);
            let patience = match phase {
                Phase::Idle => self.limits.idle,
                Phase::Head => self.limits.head,
                Phase::Served => return Poll::Pending,
            };
            self.read.as_mut().reset(Instant::now() + patience);
        }
        match phase {
            Phase::Served => Poll::Pending,
            _ => self.read.as_mut().poll(cx),
        }
    }

    /// A reader that takes no byte for too long has left, whatever its socket says.
    fn poll_blocked<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.blocked = false;
            return written;
        }
        if !std::mem::replace(&mut self.blocked, true) {
            let patience = self.limits.write;
            self.write.as_mut().reset(Instant::now() + patience);
        }
        ready!(self.write.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.again.is_empty() {
            let count = this.again.len().min(buf.remaining());
            buf.put_slice(&this.again[..count]);
            this.again.advance(count);
            return Poll::Ready(Ok(()));
        }
        if this.ended {
            if this.patient {
                ready!(this.read.as_mut().poll(cx));
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut this.wire).poll_read(cx, buf) {
            Poll::Ready(Ok(())) if buf.filled().len() == before => {
                this.ended = true;
                match this.progress.get() {
                    // Whether the client has left or only has no more to say cannot be seen: it gets a moment to
                    // take an answer that is nearly there.
                    Phase::Served => {
                        this.patient = true;
                        let patience = this.limits.farewell;
                        this.read.as_mut().reset(Instant::now() + patience);
                        ready!(this.read.as_mut().poll(cx));
                    }
                    Phase::Head => this.fault = Some(Fault::Cut),
                    Phase::Idle => {}
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(())) => {
                if this.progress.get() == Phase::Idle {
                    this.progress.set(Phase::Head);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                ready!(this.poll_silence(cx));
                if this.progress.get() == Phase::Head {
                    this.fault = Some(Fault::Slow);
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                // An end in silence is the end of a connection that nobody uses.
                this.ended = true;
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // Only a request that was no request is answered before it is one; the rest of an earlier answer looks different.
        if let Some(status) = refusal(bytes).filter(|_| self.progress.get() == Phase::Head) {
            self.fault.get_or_insert(Fault::Refused(status));
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.wire).poll_write(cx, bytes);
        self.poll_blocked(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.wire).poll_flush(cx);
        self.poll_blocked(cx, flushed)
    }

    /// Says that nothing more comes, then reads what the client still sends: a socket closed with bytes unread is
    /// reset, and the client may lose the answer with it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.fault.is_some() {
            return Poll::Ready(Ok(()));
        }
        if !self.lingering {
            let shut = Pin::new(&mut self.wire).poll_shutdown(cx);
            ready!(self.poll_blocked(cx, shut))?;
            self.lingering = true;
            let patience = self.limits.linger;
            self.read.as_mut().reset(Instant::now() + patience);
        }
        let mut sink = [0; SINK];
        loop {
            if self.ended || self.read.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut sink = ReadBuf::new(&mut sink);
            match ready!(Pin::new(&mut self.wire).poll_read(cx, &mut sink)) {
                Ok(()) if !sink.filled().is_empty() => {}
                _ => self.ended = true,
            }
        }
    }
}

/// Writes an error as a whole HTTP/1.1 answer and closes.
pub async fn say(mut line: Line, error: &ApiError) {
    let body = error.body().to_string();
    let status = error.kind().0;
    let again = error.retry_after().map_or_else(String::new, |seconds| format!("retry-after: {seconds}\r\n"));
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{again}connection: close\r\n\r\n{body}",
        body.len()
    );
    // What is said from here on is an answer, and its reader may have left.
    line.progress.set(Phase::Served);
    if line.write_all(answer.as_bytes()).await.is_ok() {
        let _ = line.shutdown().await;
    }
}

/// The status of the bare head that hyper answers with what it cannot read.
fn refusal(bytes: &[u8]) -> Option<StatusCode> {
    let head = std::str::from_utf8(bytes).ok()?.strip_suffix("\r\n\r\n")?;
    let code = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "))?.get(..3)?;
    let is_bare = !head.contains("\r\n\r\n") && head.to_ascii_lowercase().contains("\r\ncontent-length: 0");
    StatusCode::from_bytes(code.as_bytes()).ok().filter(|status| is_bare && status.is_client_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_refusal_is_taken_for_one() {
        let check = |bytes: &str, expected: Option<u16>| {
            assert_eq!(refusal(bytes.as_bytes()).map(|status| status.as_u16()), expected, "{bytes:?}");
        };
        check(
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\ndate: x\r\n\r\n",
            Some(431),
        );
        check("HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", Some(400));
        check("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None);
        check("HTTP/1.1 400 Bad Request\r\ncontent-length: 5\r\n\r\n", None);
        check("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\nrest", None);
        check("data: [DONE]\r\n\r\n", None);
    }
}
