//! The caller's side of an engine: submit, watch, cancel by dropping, shut down.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::{Event, Failure, Info, Request, Stats, Status};
use crate::sample;

/// How long [`Handle::shutdown`] waits for the step in progress after the drain time is over: a step cannot be
/// interrupted, and a stuck one must not keep the process alive.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// The door to one engine. Cheap to clone; every method may be called from any thread or task.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Sender<Command>,
}

/// Why a request was not accepted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error("the model is still loading")]
    Loading,
    #[error("{waiting} requests are waiting already; the queue holds {limit}")]
    Overloaded { waiting: usize, limit: usize },
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine stopped: {0}")]
    Dead(String),
    /// `limit` counts prompt and output together, so the prompt must be shorter.
    #[error("the prompt has {prompt} tokens; prompt and output together may have {limit}")]
    TooLong { prompt: usize, limit: usize },
    /// A value that the caller should have refused; its facts are in the [`sample::Error`].
    #[error(transparent)]
    Invalid(#[from] sample::Error),
}

impl Handle {
    /// Hands a request over and returns at once; what comes of it arrives on the stream.
    ///
    /// The queue is bounded by [`super::EngineConfig::queue_len`]: a place is taken here and given back when the
    /// sequence starts to run or is cancelled.
    pub fn submit(&self, mut request: Request) -> Result<RequestStream, SubmitError> {
        let shared = &self.shared;
        match shared.status() {
            Status::Ready => {}
            Status::Loading { .. } => return Err(SubmitError::Loading),
            Status::Draining => return Err(SubmitError::Draining),
            Status::Dead(reason) => return Err(SubmitError::Dead(reason)),
        }
        // The information is published before the status becomes ready.
        let Some(info) = self.info() else { return Err(SubmitError::Loading) };
        check(&mut request, &info)?;

        shared.stats.wake();
        let limit = shared.queue_len as u64;
        let take = |waiting| (waiting < limit).then_some(waiting + 1);
        if let Err(waiting) = shared.stats.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            shared.stats.rejected.fetch_add(1, Ordering::Relaxed);
            return Err(SubmitError::Overloaded { waiting: waiting as usize, limit: shared.queue_len });
        }

        // Unbounded, so that a slow or stuck reader never blocks the engine; its length is bounded all the same,
        // by Started, max_tokens Tokens and one end.
        let (events, receiver) = mpsc::unbounded_channel();
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let stream = RequestStream {
            id,
            events: receiver,
            ended: false,
            shared: shared.clone(),
            commands: self.commands.clone(),
        };
        let submission = Submission { id, request, events, submitted: Instant::now() };
        if self.commands.send(Command::Submit(Box::new(submission))).is_err() {
            shared.stats.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(match shared.status() {
                Status::Dead(reason) => SubmitError::Dead(reason),
                _ => SubmitError::Draining,
            });
        }
        Ok(stream)
    }

    /// Reads atomics only; safe for a health check while the engine is busy, stuck or dead.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    /// What is known of the loaded model; `None` while loading.
    pub fn info(&self) -> Option<Info> {
        self.shared.info.get().copied()
    }

    /// Waits until the model is loaded, or will never be. Look at [`Self::status`] afterwards.
    pub async fn loaded(&self) {
        let mut phase = self.shared.phase.subscribe();
        // The sender lives in `shared`, which we hold, so waiting cannot fail.
        let _ = phase.wait_for(|&phase| phase >= Phase::Serving).await;
    }

    /// Waits until the engine has ended, drained or dead. Look at [`Self::status`] afterwards.
    pub async fn ended(&self) {
        let mut phase = self.shared.phase.subscribe();
        let _ = phase.wait_for(|&phase| phase == Phase::Ended).await;
    }

    /// Runs no step until [`Self::go_on`]; what was accepted keeps its place and its state. Takes effect after the step
    /// in progress.
    pub fn halt(&self) {
        self.shared.stats.halted.store(true, Ordering::Release);
        let _ = self.commands.send(Command::Halt(true));
    }

    /// Ends a [`Self::halt`].
    pub fn go_on(&self) {
        // The time that was spent halted is no stall.
        self.shared.stats.beat();
        self.shared.stats.halted.store(false, Ordering::Release);
        let _ = self.commands.send(Command::Halt(false));
    }

    /// Fails everything that was accepted so far with [`Failure::Aborted`].
    pub fn abort_all(&self) {
        let _ = self.commands.send(Command::AbortAll);
    }

    /// Drops all that the prefix cache holds; returns when it is done, or when the engine has ended.
    pub async fn clear_cache(&self) {
        let (done, told) = oneshot::channel();
        if self.commands.send(Command::ClearCache(done)).is_ok() {
            // An engine that ends without an answer has no cache any more.
            let _ = told.await;
        }
    }

    /// Accepts nothing more, lets what was accepted finish for up to `drain`, then fails the rest with
    /// [`Failure::ShuttingDown`]. Returns when the engine has ended; a step that never ends is not waited for
    /// longer than a second. Needs a tokio runtime with time.
    pub async fn shutdown(&self, drain: Duration) {
        self.shared.drain();
        // A failed send means that the engine has ended already, which is what we want.
        let _ = self.commands.send(Command::Drain);
        if tokio::time::timeout(drain, self.ended()).await.is_err() {
            let _ = self.commands.send(Command::Stop);
            let _ = tokio::time::timeout(STOP_GRACE, self.ended()).await;
        }
    }
}

/// The events of one request. Dropping it cancels the request, whatever phase it is in.
#[derive(Debug)]
pub struct RequestStream {
    id: u64,
    events: mpsc::UnboundedReceiver<Event>,
    /// The last event was handed out.
    ended: bool,
    shared: Arc<Shared>,
    commands: Sender<Command>,
}

impl RequestStream {
    /// The next event, in order; `None` after `Finished` or `Failed`. Cancel-safe: no event is lost when the
    /// future is dropped.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await.unwrap_or_else(|| self.broken_off());
        self.ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
        Some(event)
    }

    /// The next event if it has already arrived; `None` if it has not, or after the end.
    pub fn try_next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = match self.events.try_recv() {
            Ok(event) => event,
            Err(mpsc::error::TryRecvError::Empty) => return None,
            Err(mpsc::error::TryRecvError::Disconnected) => self.broken_off(),
        };
        self.ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
        Some(event)
    }

    /// The engine always sends an end, except to a request that was submitted while the engine was ending.
    fn broken_off(&self) -> Event {
        Event::Failed(match self.shared.status() {
            Status::Dead(reason) => Failure::Dead(reason),
            _ => Failure::ShuttingDown,
        })
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

/// The engine thread, to be joined by the owner of the process.
#[derive(Debug)]
pub struct Runner {
    /// `None` when the thread could not be started; the status is `Dead` then.
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) shared: Arc<Shared>,
}

impl Runner {
    /// Blocks until the engine has ended. `Err` holds why it died; `Ok` means that it was shut down.
    pub fn join(self) -> Result<(), String> {
        let crashed = self.thread.is_some_and(|thread| thread.join().is_err());
        match self.shared.status() {
            Status::Dead(reason) => Err(reason),
            _ if crashed => Err("the engine thread panicked while ending".into()),
            _ => Ok(()),
        }
    }

    /// The engine has ended; [`Self::join`] will not block.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// How the load closure reports, and learns that nobody wants its model any more.
#[derive(Debug, Clone)]
pub struct LoadProgress {
    pub(super) shared: Arc<Shared>,
}

impl LoadProgress {
    /// `done` of `total`, usually bytes.
    pub fn set(&self, done: u64, total: u64) {
        let fraction = if total == 0 { 0.0 } else { (done as f64 / total as f64).clamp(0.0, 1.0) };
        self.shared.progress.store((fraction as f32).to_bits(), Ordering::Relaxed);
    }

    /// The server is shutting down: loading may stop with any error.
    pub fn cancelled(&self) -> bool {
        matches!(self.shared.status(), Status::Draining)
    }
}

/// What callers tell the engine thread. The channel is unbounded but its length is not: each `Submit` holds a
/// place of the bounded queue until it is taken out, each request has at most one `Cancel`.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    Cancel(u64),
    /// Run no step, or go on.
    Halt(bool),
    /// Fail what was accepted, and go on.
    AbortAll,
    /// Forget every prefix, then say so.
    ClearCache(oneshot::Sender<()>),
    /// Finish what was accepted, then end.
    Drain,
    /// Fail what is left and end.
    Stop,
}

#[derive(Debug)]
pub(super) struct Submission {
    pub id: u64,
    pub request: Request,
    pub events: mpsc::UnboundedSender<Event>,
    pub submitted: Instant,
}

/// Where the engine thread is; only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Loading,
    Serving,
    Ended,
}

/// What both sides see.
#[derive(Debug)]
pub(super) struct Shared {
    pub stats: Stats,
    pub info: OnceLock<Info>,
    pub phase: watch::Sender<Phase>,
    queue_len: usize,
    next_id: AtomicU64,
    /// One of the constants below; only ever grows, so that a late `ready` cannot undo `drain`.
    state: AtomicU8,
    progress: AtomicU32,
    reason: OnceLock<String>,
}

const LOADING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;
const DEAD: u8 = 3;

impl Shared {
    pub fn new(queue_len: usize) -> Self {
        Self {
            stats: Stats::default(),
            info: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            queue_len,
            next_id: AtomicU64::new(0),
            state: AtomicU8::new(LOADING),
            progress: AtomicU32::new(0),
            reason: OnceLock::new(),
        }
    }

    pub fn status(&self) -> Status {
        match self.state.load(Ordering::Acquire) {
            LOADING => Status::Loading { progress: f32::from_bits(self.progress.load(Ordering::Relaxed)) },
            READY => Status::Ready,
            DRAINING => Status::Draining,
            _ => Status::Dead(self.reason.get().cloned().unwrap_or_default()),
        }
    }

    /// `info` is published first, so that whoever sees `Ready` sees it too.
    pub fn ready(&self, info: Info) {
        let _ = self.info.set(info);
        self.stats.kv_blocks.store(info.limits.blocks as u64, Ordering::Relaxed);
        self.stats.slots.store(info.limits.slots as u64, Ordering::Relaxed);
        self.state.fetch_max(READY, Ordering::AcqRel);
        self.phase.send_replace(Phase::Serving);
    }

    pub fn drain(&self) {
        self.state.fetch_max(DRAINING, Ordering::AcqRel);
    }

    /// The first reason stays.
    pub fn die(&self, reason: String) {
        let _ = self.reason.set(reason);
        self.state.fetch_max(DEAD, Ordering::AcqRel);
    }

    /// The engine thread is done; wakes everyone who waits for it.
    pub fn end(&self) {
        self.drain();
        self.phase.send_replace(Phase::Ended);
    }
}

/// The last check before the engine: nothing that passes can make it panic. Cuts `max_tokens` to the context.
fn check(request: &mut Request, info: &Info) -> Result<(), SubmitError> {
    let vocab = info.vocab_size;
    let refuse = |field, expected: String, got: String| {
        Err(SubmitError::Invalid(sample::Error { field, expected, got }))
    };
    let prompt = request.prompt.len();
    if prompt == 0 {
        return refuse("prompt", "at least 1 token".into(), "none".into());
    }
    if prompt >= info.context_len {
        return Err(SubmitError::TooLong { prompt, limit: info.context_len });
    }
    for (field, ids) in [("prompt", &request.prompt), ("stop_token_ids", &request.stop_ids)] {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return refuse(field, format!("ids below {vocab}"), id.to_string());
        }
    }
    if request.max_tokens == 0 {
        return refuse("max_tokens", "at least 1".into(), "0".into());
    }
    if request.min_tokens > request.max_tokens {
        let expected = format!("at most max_tokens ({})", request.max_tokens);
        return refuse("min_tokens", expected, request.min_tokens.to_string());
    }
    if let Some(count) = request.prompt_logprobs.filter(|&count| count as usize > vocab) {
        return refuse("prompt_logprobs", format!("at most {vocab}"), count.to_string());
    }
    request.sampling.check(vocab)?;
    request.max_tokens = request.max_tokens.min(info.context_len - prompt);
    Ok(())
}
