//! The engine thread: plan, step, sample, commit, tell.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Instant;

use super::handle::{Command, Handle, LoadProgress, Runner, Shared, Submission};
use super::sequence::{Digest, Sequence};
use super::{EngineConfig, Event, Failure, Finish, Info};
use crate::model::{Network, StepError};
use crate::sample::Workspace;
use crate::schedule::{Cancelled, Outcome, Scheduler, StepInputs};

/// Starts the engine thread: it loads the model, then serves until it is shut down or dies.
///
/// Returns at once; the status is `Loading` until `load` returns, and `Dead` with its message if it fails.
pub fn start(
    config: EngineConfig,
    load: impl FnOnce(&LoadProgress) -> Result<Box<dyn Network>, String> + Send + 'static,
) -> (Handle, Runner) {
    let shared = Arc::new(Shared::new(config.queue_len));
    let (commands, inbox) = mpsc::channel();
    let handle = Handle { shared: shared.clone(), commands };
    let thread = std::thread::Builder::new().name(config.name.clone());
    let on_thread = {
        let shared = shared.clone();
        move || {
            run(&config, &shared, inbox, load);
            shared.end();
        }
    };
    let thread = match thread.spawn(on_thread) {
        Ok(thread) => Some(thread),
        Err(error) => {
            shared.die(format!("the engine thread could not be started: {error}"));
            shared.end();
            None
        }
    };
    (handle, Runner { thread, shared })
}

/// The life of the thread. Whatever panics in it becomes a reason of death, so that everyone who waits hears of it.
fn run(
    config: &EngineConfig,
    shared: &Arc<Shared>,
    inbox: Receiver<Command>,
    load: impl FnOnce(&LoadProgress) -> Result<Box<dyn Network>, String>,
) {
    let progress = LoadProgress { shared: shared.clone() };
    let loaded = catch_unwind(AssertUnwindSafe(|| load(&progress)))
        .unwrap_or_else(|panic| Err(format!("loading panicked: {}", panic_text(&*panic))))
        .and_then(|network| Engine::new(config, shared.clone(), inbox, network));
    let mut engine = match loaded {
        Ok(engine) => engine,
        Err(reason) => {
            tracing::error!(engine = config.name, reason, "the model could not be loaded");
            return shared.die(reason);
        }
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.serve()))
        .unwrap_or_else(|panic| Err(format!("a step panicked: {}", panic_text(&*panic))));
    match outcome {
        Ok(()) => {
            shared.drain();
            engine.fail_everyone(&Failure::ShuttingDown);
        }
        Err(reason) => {
            tracing::error!(engine = config.name, reason, "the engine stopped");
            shared.die(reason.clone());
            engine.fail_everyone(&Failure::Dead(reason));
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// What the thread owns. The vectors are reused from step to step.
struct Engine {
    shared: Arc<Shared>,
    inbox: Receiver<Command>,
    network: Box<dyn Network>,
    vocab: usize,
    scheduler: Scheduler,
    workspace: Workspace,
    /// Queued in the scheduler, their prompts moved there. Samplers are made when they start to run, so that
    /// a full queue does not hold a thousand tables of counts.
    waiting: HashMap<u64, Box<Submission>>,
    running: HashMap<u64, Sequence>,
    inputs: StepInputs,
    outcomes: Vec<Outcome>,
    /// Who ended in this step; told after the commit, when everything they held is free.
    ended: Vec<(u64, Result<Finish, Failure>)>,
    draining: bool,
}

/// What to do after the commands were taken.
enum Next {
    Step,
    End,
}

impl Engine {
    fn new(
        config: &EngineConfig,
        shared: Arc<Shared>,
        inbox: Receiver<Command>,
        network: Box<dyn Network>,
    ) -> Result<Self, String> {
        let (limits, vocab) = (*network.limits(), network.vocab_size());
        let scheduler = Scheduler::new(limits, config.max_sequences).map_err(|error| error.to_string())?;
        let (places, context_len) = (scheduler.places(), config.context_len.min(scheduler.len_limit()));
        shared.ready(Info { vocab_size: vocab, limits, context_len, max_sequences: places });
        let inputs = scheduler.inputs();
        Ok(Self {
            shared,
            inbox,
            network,
            vocab,
            scheduler,
            workspace: Workspace::new(vocab),
            waiting: HashMap::new(),
            running: HashMap::with_capacity(places),
            inputs,
            outcomes: Vec::with_capacity(places),
            ended: Vec::with_capacity(places),
            draining: false,
        })
    }

    /// Until it is drained or told to stop; `Err` holds why the engine cannot go on.
    fn serve(&mut self) -> Result<(), String> {
        loop {
            match self.take_commands() {
                Next::End => return Ok(()),
                Next::Step => self.step()?,
            }
        }
    }

    /// Takes what callers sent; parks while there is nothing to run.
    fn take_commands(&mut self) -> Next {
        loop {
            let command = if self.scheduler.is_idle() {
                if self.draining {
                    return Next::End;
                }
                match self.inbox.recv() {
                    Ok(command) => command,
                    Err(_) => return Next::End, // Every handle and stream is gone.
                }
            } else {
                match self.inbox.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Next::Step,
                }
            };
            match command {
                Command::Submit(submission) => self.queue(submission),
                Command::Cancel(id) => self.cancel(id),
                Command::Drain => self.draining = true,
                Command::Stop => return Next::End,
            }
        }
    }

    fn queue(&mut self, mut submission: Box<Submission>) {
        let request = &mut submission.request;
        let prompt = std::mem::take(&mut request.prompt);
        self.scheduler
            .add(submission.id, prompt, request.max_tokens, request.prompt_logprobs.is_some())
            .expect("submit refuses empty prompts and cuts max_tokens to the context, which fits the pool");
        self.waiting.insert(submission.id, submission);
    }

    fn cancel(&mut self, id: u64) {
        let stats = &self.shared.stats;
        match self.scheduler.cancel(id) {
            Cancelled::Waiting => {
                self.waiting.remove(&id);
                stats.waiting.fetch_sub(1, Relaxed);
            }
            Cancelled::Running => {
                self.running.remove(&id);
            }
            Cancelled::Unknown => return, // It ended before its reader left.
        }
        stats.finished_abort.fetch_add(1, Relaxed);
        self.publish();
    }

    /// One step of everyone who runs.
    fn step(&mut self) -> Result<(), String> {
        let began = Instant::now();
        if !self.scheduler.plan(&mut self.inputs) {
            return Err("the scheduler has sequences and planned nothing".into());
        }
        self.admit(began);
        for share in self.scheduler.shares().iter().filter(|share| share.samples) {
            let sequence = self.running.get_mut(&share.id).expect("admit added every share's id");
            sequence.prepare(&mut Vec::new());
        }
        self.publish();
        self.outcomes.clear();
        let rows = self.inputs.logit_rows.len();
        match self.network.step(&self.inputs) {
            Ok(logits) if logits.len() == rows * self.vocab => {
                let now = Instant::now();
                for share in self.scheduler.shares() {
                    let rows = &logits[share.first_row * self.vocab..][..share.rows * self.vocab];
                    let tokens = self.scheduler.tokens(share);
                    let sequence = self.running.get_mut(&share.id).expect("admit added every share's id");
                    let outcome = match sequence.digest(share, tokens, rows, &mut self.workspace, now) {
                        Ok(Digest::Read) => Outcome::Advance,
                        Ok(Digest::Drew(id)) => Outcome::Token(id),
                        Ok(Digest::Ended(finish)) => {
                            self.ended.push((share.id, Ok(finish)));
                            Outcome::End
                        }
                        Err(failure) => {
                            self.ended.push((share.id, Err(failure)));
                            Outcome::End
                        }
                    };
                    self.outcomes.push(outcome);
                }
            }
            Ok(logits) => {
                let got = logits.len();
                return Err(format!("the step gave {got} logits, expected {rows} rows of {}", self.vocab));
            }
            Err(StepError::Device(reason)) => return Err(format!("the device failed: {reason}")),
            Err(StepError::NotFinite { row }) => self.fail_row(row)?,
        }
        self.scheduler.commit(&self.outcomes);
        let stats = &self.shared.stats;
        stats.iteration_tokens.observe(self.inputs.tokens.len() as u64);
        stats.steps.fetch_add(1, Relaxed);
        stats.step_us.fetch_add(began.elapsed().as_micros() as u64, Relaxed);
        stats.beat();
        self.publish();
        self.tell_ends();
        Ok(())
    }

    /// Whoever is in a step for the first time has left the queue.
    fn admit(&mut self, now: Instant) {
        for share in self.scheduler.shares() {
            if share.past > 0 {
                continue;
            }
            // A rewound sequence starts from 0 too and is running already.
            if let Some(submission) = self.waiting.remove(&share.id) {
                let prompt = self.scheduler.tokens(share);
                let sequence = Sequence::new(*submission, prompt, self.vocab, now, self.shared.clone());
                self.running.insert(share.id, sequence);
                self.shared.stats.waiting.fetch_sub(1, Relaxed);
            }
        }
    }

    /// The step failed under one row: its sequence fails, the states of the others are lost with it and are
    /// computed again from their tokens. Each such step ends a sequence, so this cannot go on for ever.
    fn fail_row(&mut self, row: usize) -> Result<(), String> {
        for share in self.scheduler.shares() {
            let outcome = if (share.first_row..share.first_row + share.rows).contains(&row) {
                self.ended.push((share.id, Err(Failure::NotFinite)));
                Outcome::End
            } else {
                self.shared.stats.recomputed.fetch_add(1, Relaxed);
                Outcome::Rewind
            };
            self.outcomes.push(outcome);
        }
        if self.ended.is_empty() {
            return Err(format!("the step failed in row {row}, which nobody asked for"));
        }
        Ok(())
    }

    fn tell_ends(&mut self) {
        let stats = &self.shared.stats;
        for (id, end) in self.ended.drain(..) {
            let Some(sequence) = self.running.remove(&id) else { continue };
            let counter = match &end {
                Ok(Finish::Stop { .. }) => &stats.finished_stop,
                Ok(Finish::Length) => &stats.finished_length,
                Err(_) => &stats.finished_error,
            };
            counter.fetch_add(1, Relaxed);
            if end == Err(Failure::NotFinite) {
                stats.corrupted.fetch_add(1, Relaxed);
            }
            sequence.end(end);
        }
    }

    /// Sets the gauges that the engine alone knows.
    fn publish(&self) {
        let (stats, scheduler) = (&self.shared.stats, &self.scheduler);
        stats.running.store(scheduler.running_count() as u64, Relaxed);
        stats.slots_used.store(scheduler.slots().taken_count() as u64, Relaxed);
        stats.kv_blocks_used.store(scheduler.blocks().taken_count() as u64, Relaxed);
    }

    /// The end of the thread: nobody who waits is left without an answer. The status must say so already, so
    /// that no new request comes in behind.
    fn fail_everyone(self, failure: &Failure) {
        let Self { shared, inbox, network, waiting, running, .. } = self;
        let stats = &shared.stats;
        let fail = |events: &tokio::sync::mpsc::UnboundedSender<Event>| {
            // A reader that has left already needs no answer.
            let _ = events.send(Event::Failed(failure.clone()));
            stats.finished_error.fetch_add(1, Relaxed);
        };
        waiting.values().for_each(|submission| fail(&submission.events));
        running.values().for_each(|sequence| fail(sequence.events()));
        for command in inbox.try_iter() {
            if let Command::Submit(submission) = command {
                fail(&submission.events);
            }
        }
        drop(inbox);
        for gauge in [&stats.running, &stats.waiting, &stats.slots_used, &stats.kv_blocks_used] {
            gauge.store(0, Relaxed);
        }
        // A network that broke in a step may panic once more when it is dropped; everyone has been told by now.
        if catch_unwind(AssertUnwindSafe(|| drop(network))).is_err() {
            tracing::error!("the model panicked while it was dropped");
        }
    }
}
