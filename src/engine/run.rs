//! The engine thread: plan, step, sample, commit, tell.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Instant;

use super::handle::{Command, Handle, LoadProgress, Runner, Shared, Submission};
use super::ids::ById;
use super::sequence::{Digest, Sequence, View};
use super::speculate::Speculator;
use super::stats::VERIFY_TOKENS;
use super::trace::{EngineTrace, Kind, Phase, Span, StepRecord};
use super::{Busy, EngineConfig, Event, Failure, Finish, Info};
use crate::model::{Network, StepError};
use crate::sample::Workspace;
use crate::schedule::{self, Arrival, Outcome, Scheduler, StepInputs};

/// While an engine in front has work, the steps of those behind are this many times shorter.
const YIELD: usize = 4;

/// Steps after which the gauges of measured times are set anew.
const COSTS_EVERY: u64 = 64;

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
    speculator: Speculator,
    workspace: Workspace,
    busy: Busy,
    in_front: Vec<Busy>,
    trace: Option<EngineTrace>,
    /// Queued in the scheduler, their prompts moved there. Samplers are made when they start to run, so that
    /// a full queue does not hold a thousand tables of counts.
    waiting: HashMap<u64, Box<Submission>>,
    running: ById<Sequence>,
    inputs: StepInputs,
    outcomes: Vec<Outcome>,
    /// The ids drawn in this step, one share's after the other's.
    sampled: Vec<u32>,
    /// Who ended in this step; told after the commit, when everything they held is free.
    ended: Vec<(u64, Result<Finish, Failure>)>,
    /// The earliest deadline of all who are here, or an earlier one of somebody who has left.
    deadline: Option<Instant>,
    draining: bool,
    halted: bool,
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
        let scheduler = Scheduler::new(schedule::Config {
            checkpoints_max: config.checkpoints_max,
            state_bytes: config.state_bytes,
            block_bytes: config.block_bytes,
            ..schedule::Config::new(limits, config.max_sequences)
        })
        .map_err(|error| error.to_string())?;
        let (places, context_len) = (scheduler.places(), config.context_len.min(scheduler.len_limit()));
        let mut network = network;
        let speculator = Speculator::new(config.speculation, &scheduler, &mut *network);
        shared.ready(Info { vocab_size: vocab, limits, context_len, max_sequences: places });
        let inputs = scheduler.inputs();
        Ok(Self {
            shared,
            inbox,
            network,
            vocab,
            scheduler,
            speculator,
            workspace: Workspace::new(vocab),
            busy: config.busy.clone(),
            in_front: config.in_front.clone(),
            trace: config.trace.as_ref().map(|trace| trace.engine(&config.name)),
            waiting: HashMap::new(),
            running: ById::with_capacity_and_hasher(places, Default::default()),
            inputs,
            outcomes: Vec::with_capacity(places),
            sampled: Vec::with_capacity(limits.logit_rows),
            ended: Vec::with_capacity(places),
            deadline: None,
            draining: false,
            halted: false,
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
            let idle = self.scheduler.is_idle();
            self.busy.set(!idle && !self.halted);
            let command = if idle || self.halted {
                if idle && self.draining {
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
                Command::Halt(halted) => self.halted = halted && !self.draining,
                Command::AbortAll => self.abort_all(),
                Command::ClearCache(done) => {
                    self.scheduler.clear_cache();
                    self.publish();
                    // Whoever asked may have left.
                    let _ = done.send(());
                }
                // What was accepted before a halt may still be finished.
                Command::Drain => (self.draining, self.halted) = (true, false),
                Command::Stop => return Next::End,
            }
        }
    }

    fn queue(&mut self, mut submission: Box<Submission>) {
        let request = &mut submission.request;
        let arrival = Arrival {
            id: submission.id,
            prompt: std::mem::take(&mut request.prompt),
            max_tokens: request.max_tokens,
            every_row: request.prompt_logprobs.is_some(),
            priority: request.priority,
            salt: request.cache_salt.take(),
            borders: std::mem::take(&mut request.borders),
            siblings: request.group.is_some(),
        };
        if let Some(deadline) = request.deadline {
            self.deadline = Some(self.deadline.map_or(deadline, |first| first.min(deadline)));
        }
        self.scheduler
            .add(arrival)
            .expect("submit refuses empty prompts and cuts max_tokens to the context, which fits the pool");
        self.waiting.insert(submission.id, submission);
    }

    fn cancel(&mut self, id: u64) {
        if self.forget(id).is_some() {
            self.shared.stats.finished_abort.fetch_add(1, Relaxed);
            self.publish();
        }
    }

    fn abort_all(&mut self) {
        let ids: Vec<u64> = self.waiting.keys().chain(self.running.keys()).copied().collect();
        for id in ids {
            if let Some(events) = self.forget(id) {
                // A reader that has left already needs no answer.
                let _ = events.send(Event::Failed(Failure::Aborted));
                self.shared.stats.finished_error.fetch_add(1, Relaxed);
            }
        }
        self.publish();
    }

    /// Takes a request out, wherever it is; gives where its events go. `None` if it has ended already.
    fn forget(&mut self, id: u64) -> Option<tokio::sync::mpsc::UnboundedSender<Event>> {
        self.scheduler.cancel(id);
        if let Some(submission) = self.waiting.remove(&id) {
            self.shared.stats.waiting.fetch_sub(1, Relaxed);
            return Some(submission.events);
        }
        self.running.remove(&id).map(|sequence| sequence.events().clone())
    }

    /// Fails whoever's deadline has passed, and finds the next one.
    fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let waiting = self.waiting.iter().map(|(&id, submission)| (id, submission.request.deadline));
        let running = self.running.iter().map(|(&id, sequence)| (id, sequence.deadline()));
        let due: Vec<_> = waiting.chain(running).filter_map(|(id, at)| Some((id, at?))).collect();
        self.deadline = due.iter().map(|&(_, at)| at).filter(|&at| at > now).min();
        for (id, _) in due.into_iter().filter(|&(_, at)| at <= now) {
            if let Some(events) = self.forget(id) {
                // A reader that has left already needs no answer.
                let _ = events.send(Event::Failed(Failure::TimedOut));
                self.shared.stats.timed_out.fetch_add(1, Relaxed);
                self.shared.stats.finished_error.fetch_add(1, Relaxed);
            }
        }
        self.publish();
    }

    /// One step of everyone who runs.
    fn step(&mut self) -> Result<(), String> {
        let began = Instant::now();
        self.expire(began);
        // While those in front have work, a step is short: it is what they wait for.
        let yields = self.in_front.iter().any(Busy::is_busy);
        let tokens = if yields { self.network.limits().step_tokens / YIELD } else { usize::MAX };
        if !self.scheduler.plan_within(&mut self.inputs, tokens) {
            // The last of them may just have run out of time.
            let idle = self.scheduler.is_idle();
            return if idle { Ok(()) } else { Err("the scheduler has sequences and planned nothing".into()) };
        }
        self.admit(began);
        self.publish();
        let planned = Instant::now();
        let mut record = self.trace.as_ref().and_then(|trace| trace.begin(began));
        if let Some(record) = &mut record {
            record.mark(Phase::Plan, planned);
            self.describe(record);
        }
        self.outcomes.clear();
        self.sampled.clear();
        let rows = self.inputs.logit_rows.len();
        let mut stepped = planned;
        match self.network.step(&self.inputs) {
            Ok(logits) if logits.len() == rows * self.vocab => {
                stepped = Instant::now();
                for share in self.scheduler.shares() {
                    let sequence = self.running.get_mut(&share.id).expect("admit added every share's id");
                    let view = View {
                        share,
                        tokens: self.scheduler.tokens(share),
                        drafts: self.scheduler.drafts(share),
                        logits: &logits[share.first_row * self.vocab..][..share.rows * self.vocab],
                    };
                    let first = self.sampled.len();
                    let digest = sequence.digest(view, &mut self.workspace, stepped, &mut self.sampled);
                    let count = self.sampled.len() - first;
                    self.outcomes.push(match digest {
                        Ok(Digest::Read) => Outcome::Advance,
                        Ok(Digest::Drew) => Outcome::Tokens { first, count },
                        Ok(Digest::Ended(finish)) => {
                            self.ended.push((share.id, Ok(finish)));
                            Outcome::End { first, count }
                        }
                        Err(Failure::NotFinite) => {
                            self.ended.push((share.id, Err(Failure::NotFinite)));
                            Outcome::Fail
                        }
                        // The request's own fault: its numbers are as good as anyone's.
                        Err(failure) => {
                            self.ended.push((share.id, Err(failure)));
                            Outcome::End { first, count }
                        }
                    });
                }
            }
            Ok(logits) => {
                let got = logits.len();
                return Err(format!("the step gave {got} logits, expected {rows} rows of {}", self.vocab));
            }
            Err(StepError::Device(reason)) => return Err(format!("the device failed: {reason}")),
            Err(StepError::NotFinite { row }) => self.fail_row(row)?,
        }
        let drawn = Instant::now();
        self.scheduler.commit(&self.outcomes, &self.sampled);
        let sampled = Instant::now();
        let us = |from: Instant, to: Instant| (to - from).as_micros() as u64;
        let stats = &self.shared.stats;
        stats.iteration_tokens.observe(self.inputs.tokens.len() as u64);
        stats.steps.fetch_add(1, Relaxed);
        stats.plan_us.fetch_add(us(began, planned), Relaxed);
        stats.forward_us.fetch_add(us(planned, stepped), Relaxed);
        stats.sample_us.fetch_add(us(stepped, sampled), Relaxed);
        stats.step_us.fetch_add(us(began, sampled), Relaxed);
        stats.beat();
        self.publish();
        self.tell_ends();
        // The readers have their ids; what follows is for the next step.
        let drafted = self.speculator.draft(&mut self.scheduler, &mut *self.network, &mut self.running);
        drafted.map_err(|error| format!("drafting failed: {error}"))?;
        let drafted = Instant::now();
        if stepped > planned {
            self.speculator.learn(&self.inputs, drafted - began);
        }
        self.publish_costs();
        self.shared.stats.draft_us.fetch_add(us(sampled, drafted), Relaxed);
        self.shared.stats.step_us.fetch_add(us(sampled, drafted), Relaxed);
        if let (Some(trace), Some(mut record)) = (&self.trace, record) {
            let phases = [Phase::Forward, Phase::Sample, Phase::Commit, Phase::Draft];
            for (phase, end) in phases.into_iter().zip([stepped, drawn, sampled, drafted]) {
                record.mark(phase, end);
            }
            for (span, outcome) in record.spans_mut().iter_mut().zip(&self.outcomes) {
                if let Outcome::Tokens { count, .. } | Outcome::End { count, .. } = *outcome {
                    span.accepted = count.saturating_sub(1) as u32;
                }
            }
            trace.record(record);
        }
        Ok(())
    }

    /// Who is in the planned step.
    fn describe(&self, record: &mut StepRecord) {
        for (share, inputs) in self.scheduler.shares().iter().zip(&self.inputs.sequences) {
            let kind = match (share.drafts, share.samples && share.count == 1) {
                (0, true) => Kind::Decode,
                (0, false) => Kind::Prefill,
                _ => Kind::Verify,
            };
            let (tokens, past) = (inputs.count, inputs.past);
            record.push(Span { id: share.id, slot: inputs.slot, kind, tokens, past, accepted: 0 });
        }
    }

    /// Whoever is in a step for the first time has left the queue.
    fn admit(&mut self, now: Instant) {
        for share in self.scheduler.shares() {
            // Later shares have read more; one that starts anew is running already.
            if share.past != share.cached || self.running.contains_key(&share.id) {
                continue;
            }
            if let Some(submission) = self.waiting.remove(&share.id) {
                let prompt = self.scheduler.tokens(share);
                let mut sequence = Sequence::new(*submission, prompt, self.vocab, now, self.shared.clone());
                if sequence.is_steered() {
                    // Its first mask is made while its prompt is read.
                    sequence.prepare(&mut Vec::new());
                }
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
                Outcome::Fail
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

    /// Sets what the engine alone knows.
    fn publish(&self) {
        let (stats, scheduler) = (&self.shared.stats, &self.scheduler);
        let (counts, held) = (scheduler.counts(), scheduler.cache().holdings());
        let here = scheduler.running_count() + scheduler.paused_count();
        stats.running.store(here as u64, Relaxed);
        stats.slots_used.store(here as u64, Relaxed);
        stats.kv_blocks_used.store(scheduler.blocks_used() as u64, Relaxed);
        stats.cache_checkpoints.store(held.checkpoints as u64, Relaxed);
        stats.cache_blocks.store(held.blocks as u64, Relaxed);
        stats.prefix_queries.store(counts.queried_tokens, Relaxed);
        stats.prefix_hits.store(counts.hit_tokens, Relaxed);
        stats.preemptions.store(counts.preempted, Relaxed);
        stats.paused.store(counts.paused, Relaxed);
        stats.copied_blocks.store(counts.copied_blocks, Relaxed);
    }

    /// Now and then, what steps were measured to take.
    fn publish_costs(&self) {
        let stats = &self.shared.stats;
        if !stats.steps.load(Relaxed).is_multiple_of(COSTS_EVERY) {
            return;
        }
        for (gauge, tokens) in stats.verify_us.iter().zip(VERIFY_TOKENS) {
            let us = self.speculator.speed().steps.predict(tokens as usize);
            gauge.store(us.unwrap_or(0.0) as u64, Relaxed);
        }
    }

    /// The end of the thread: nobody who waits is left without an answer. The status must say so already, so
    /// that no new request comes in behind.
    fn fail_everyone(self, failure: &Failure) {
        let Self { shared, inbox, network, waiting, running, busy, .. } = self;
        // Whoever stands behind may have the machine to itself.
        busy.set(false);
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
