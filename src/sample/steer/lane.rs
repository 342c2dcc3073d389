//! Masks, computed beside the engine thread: a lane per sequence, a few threads for all of them.
//!
//! A lane's matcher is either at rest, where the engine thread may use it, or under way in a worker, which walks
//! along the drafts, leaves a mask for each row it was asked for, and walks back before it rests again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use llguidance::Matcher;
use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;

use super::Grammar;

/// What a row of logits may give, once known.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// These ids, and if `ends` the stop ids too.
    Mask { ids: SimpleVob, ends: bool },
    /// The text is complete: stop ids only.
    Complete,
    /// Not one id goes on from here.
    Nothing,
    /// The parser gave up: too complex, or a fault of its own.
    Broken,
}

/// One thing for a worker to do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Leaves a verdict.
    Judge,
    Feed(u32),
}

/// Where one sequence's matcher is.
pub struct Lane {
    grammar: Grammar,
    work: Mutex<Work>,
    progress: Condvar,
    /// The rows still to come are not wanted any more.
    cancelled: AtomicBool,
}

pub struct Work {
    /// `None` while it is under way.
    matcher: Option<Matcher>,
    pub tasks: Vec<Task>,
    /// One for each [`Task::Judge`] so far; taken by the sampler.
    verdicts: Vec<Option<Verdict>>,
}

impl Lane {
    /// Its matcher is made beside the caller's thread, for it copies the lexer's tables.
    pub fn new(grammar: Grammar) -> Arc<Self> {
        let work = Work { matcher: None, tasks: Vec::new(), verdicts: Vec::new() };
        let (work, progress) = (Mutex::new(work), Condvar::new());
        let lane = Arc::new(Self { grammar, work, progress, cancelled: AtomicBool::new(false) });
        lane.grammar.pool().run(Errand { lane: Arc::clone(&lane), matcher: None, tasks: Vec::new() });
        lane
    }

    pub fn grammar(&self) -> &Grammar {
        &self.grammar
    }

    /// Waits until the matcher is at rest. What is under way ends after its current row.
    pub fn rest(&self) -> MutexGuard<'_, Work> {
        self.cancelled.store(true, Ordering::Release);
        let at_rest = self.progress.wait_while(self.lock(), |work| work.matcher.is_none());
        at_rest.unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts what [`Work::tasks`] say; the guard is of this lane, at rest.
    pub fn start(self: &Arc<Self>, mut work: MutexGuard<'_, Work>) {
        self.cancelled.store(false, Ordering::Release);
        work.verdicts.clear();
        let Some(matcher) = work.matcher.take() else { return };
        let tasks = std::mem::take(&mut work.tasks);
        drop(work);
        self.grammar.pool().run(Errand { lane: Arc::clone(self), matcher: Some(matcher), tasks });
    }

    /// Waits for the verdict of the row that was the `index`-th to be judged.
    pub fn verdict(&self, index: usize) -> Verdict {
        let waiting = self
            .progress
            .wait_while(self.lock(), |work| work.verdicts.len() <= index && work.matcher.is_none());
        let mut work = waiting.unwrap_or_else(PoisonError::into_inner);
        work.verdicts.get_mut(index).and_then(Option::take).unwrap_or(Verdict::Broken)
    }

    /// The lock is never held over foreign code, so what it guards is whole even if someone panicked.
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, verdict: Verdict) {
        self.lock().verdicts.push(Some(verdict));
        self.progress.notify_all();
    }
}

impl Work {
    /// Of a lane at rest.
    pub fn matcher(&mut self) -> &mut Matcher {
        self.matcher.as_mut().expect("Lane::rest waits until the matcher is back")
    }
}

fn judge(matcher: &mut Matcher, grammar: &Grammar) -> Verdict {
    if matcher.is_stopped() && !matcher.is_error() {
        return Verdict::Complete;
    }
    let (Ok(ends), Ok(mut ids)) = (matcher.is_accepting(), matcher.compute_mask()) else {
        return refusal(matcher);
    };
    // Which ids end the answer is the request's choice, not the vocabulary's.
    for &id in grammar.eos() {
        ids.disallow_token(id);
    }
    match (ids.is_zero(), ends) {
        (true, true) => Verdict::Complete,
        (true, false) => Verdict::Nothing,
        (false, ends) => Verdict::Mask { ids, ends },
    }
}

fn refusal(matcher: &Matcher) -> Verdict {
    let reason = matcher.get_error().unwrap_or_default();
    if is_dead_end(&reason) {
        return Verdict::Nothing;
    }
    tracing::warn!(reason, "a grammar could not be followed");
    Verdict::Broken
}

/// The error of a matcher says that not one id goes on from here.
pub fn is_dead_end(reason: &str) -> bool {
    reason.starts_with(&StopReason::NoExtensionBias.to_string())
}

/// A lane's work on its way through the pool. Whatever becomes of it, the lane gets a matcher back.
struct Errand {
    lane: Arc<Lane>,
    matcher: Option<Matcher>,
    tasks: Vec<Task>,
}

impl Errand {
    fn walk(&mut self) {
        let matcher = self.matcher.get_or_insert_with(|| self.lane.grammar.matcher());
        let mut fed = 0;
        for task in &self.tasks {
            if self.lane.cancelled.load(Ordering::Acquire) {
                break;
            }
            match *task {
                Task::Judge => self.lane.leave(judge(matcher, &self.lane.grammar)),
                Task::Feed(id) => {
                    if matcher.consume_token(id).is_err() {
                        break;
                    }
                    fed += 1;
                }
            }
        }
        // A matcher that fails here says so at its next use.
        let _ = matcher.rollback(fed);
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        let mut work = self.lane.lock();
        // Lost only to a panic of our own; the fresh one does not fit the text, and the sequence finds that out.
        work.matcher = self.matcher.take().or_else(|| Some(self.lane.grammar.matcher()));
        work.tasks = std::mem::take(&mut self.tasks);
        work.tasks.clear();
        drop(work);
        self.lane.progress.notify_all();
    }
}

/// A few threads that compute masks. They end when the pool is dropped.
pub struct Pool {
    errands: mpsc::Sender<Errand>,
}

/// Masks take some 0.1 ms each; more threads would only take cores from the model.
const THREADS_MAX: usize = 4;

impl Pool {
    pub fn new() -> Arc<Self> {
        let (errands, inbox) = mpsc::channel::<Errand>();
        let inbox = Arc::new(Mutex::new(inbox));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores.min(THREADS_MAX) {
            let inbox = Arc::clone(&inbox);
            let thread = std::thread::Builder::new().name("masks".into());
            // With fewer threads it is slower; with none, `run` does the work itself.
            let _ = thread.spawn(move || serve(&inbox));
        }
        Arc::new(Self { errands })
    }

    fn run(&self, errand: Errand) {
        if let Err(mpsc::SendError(mut errand)) = self.errands.send(errand) {
            errand.walk();
        }
    }
}

fn serve(inbox: &Mutex<mpsc::Receiver<Errand>>) {
    loop {
        let next = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut errand) = next else { return };
        if catch_unwind(AssertUnwindSafe(|| errand.walk())).is_err() {
            tracing::error!("computing a mask panicked");
            errand.matcher = None;
        }
    }
}
