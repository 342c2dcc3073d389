//! The steps of engines as a Chrome trace (chrome://tracing, ui.perfetto.dev): who ran, how many tokens, how long.
//!
//! ```text
//! let trace = TraceWriter::start(path)?;                       // one file, one thread that writes it
//! let engine = trace.engine("engine");                         // one process of the trace per engine
//! let mut record = engine.begin(Instant::now());               // None: all records are on their way to the file
//! record.mark(Phase::Plan, Instant::now());                    // the plan took from the last mark until now
//! record.push(Span { .. });
//! engine.record(record);
//! trace.finish()?;                                             // what was recorded is in the file
//! ```
//!
//! An engine never waits for the file: records come from a pool of fixed size, and a step that finds it empty is
//! not recorded but counted.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Steps that may be on their way to the file.
const RECORDS: usize = 1024;
/// Names of engines and the end, which are waited for, find room beside the records.
const OTHERS: usize = 8;
/// Room in a record before its lists grow; they keep what they grew to.
const MARKS: usize = 8;
const SPANS: usize = 64;
/// Written at once while more is waiting; when nothing waits, what there is.
const PIECE: usize = 1 << 16;

/// Writes one trace file from any number of engines. Clones write to the same file.
#[derive(Debug, Clone)]
pub struct TraceWriter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    messages: SyncSender<Message>,
    pool: Mutex<Vec<StepRecord>>,
    engines: AtomicU32,
    dropped: AtomicU64,
    writer: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

/// One engine's side of a [`TraceWriter`].
#[derive(Debug, Clone)]
pub struct EngineTrace {
    shared: Arc<Shared>,
    process: u32,
}

/// What a step spent its time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Plan,
    Forward,
    Sample,
    Draft,
    Commit,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Forward => "forward",
            Self::Sample => "sample",
            Self::Draft => "draft",
            Self::Commit => "commit",
        }
    }
}

/// What a sequence does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads a part of its prompt.
    Prefill,
    /// One token.
    Decode,
    /// One token and drafts.
    Verify,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Prefill, Self::Decode, Self::Verify];

    fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Verify => "verify",
        }
    }
}

/// One sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The request's id.
    pub id: u64,
    /// Its place in the state pool: the track it is drawn on.
    pub slot: u32,
    pub kind: Kind,
    /// Its tokens in this step, drafts among them.
    pub tokens: u32,
    /// Its tokens before this step.
    pub past: u32,
    /// Drafts that were accepted; known when the step is over.
    pub accepted: u32,
}

/// One step. Made by [`EngineTrace::begin`] from the pool, given back by [`EngineTrace::record`].
#[derive(Debug)]
pub struct StepRecord {
    process: u32,
    began: Instant,
    /// In order, each from the end of the one before.
    marks: Vec<(Phase, Instant)>,
    spans: Vec<Span>,
}

impl StepRecord {
    fn empty(now: Instant) -> Self {
        let (marks, spans) = (Vec::with_capacity(MARKS), Vec::with_capacity(SPANS));
        Self { process: 0, began: now, marks, spans }
    }

    /// The phase that ends at `now`; it began where the one before it ended, the first with the step.
    /// A phase may come more than once.
    pub fn mark(&mut self, phase: Phase, now: Instant) {
        self.marks.push((phase, now));
    }

    pub fn push(&mut self, span: Span) {
        self.spans.push(span);
    }

    /// The sequences so far, to be completed when the step is over.
    pub fn spans_mut(&mut self) -> &mut [Span] {
        &mut self.spans
    }
}

enum Message {
    Engine { process: u32, name: String },
    Step(StepRecord),
    End,
}

impl TraceWriter {
    /// Makes the file, or empties it, and starts the thread that writes it.
    /// Errors: the file cannot be written, the thread cannot be started.
    pub fn start(path: &Path) -> io::Result<TraceWriter> {
        let file = File::create(path)?;
        let (messages, inbox) = sync_channel(RECORDS + OTHERS);
        let began = Instant::now();
        let pool = (0..RECORDS).map(|_| StepRecord::empty(began)).collect();
        let shared = Arc::new(Shared {
            messages,
            pool: Mutex::new(pool),
            engines: AtomicU32::new(0),
            dropped: AtomicU64::new(0),
            writer: Mutex::new(None),
        });
        let thread = {
            // The thread must not keep the channel open that it waits at.
            let shared = Arc::downgrade(&shared);
            let give_back = move |record| {
                if let Some(shared) = shared.upgrade() {
                    shared.give_back(record);
                }
            };
            std::thread::Builder::new()
                .name("trace".into())
                .spawn(move || write(file, began, &inbox, give_back))?
        };
        *lock(&shared.writer) = Some(thread);
        Ok(TraceWriter { shared })
    }

    /// A process of the trace for one engine.
    pub fn engine(&self, name: &str) -> EngineTrace {
        let process = self.shared.engines.fetch_add(1, Relaxed) + 1;
        // Fails only after the end, when nothing is written any more.
        let _ = self.shared.messages.send(Message::Engine { process, name: name.to_owned() });
        EngineTrace { shared: self.shared.clone(), process }
    }

    /// Steps that were not recorded because too many were on their way, or because the file could not be written.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Writes what was recorded and closes the file; what is recorded later is dropped. Errors: the file could not
    /// be written. Whoever calls it again is told that all is well.
    pub fn finish(&self) -> io::Result<()> {
        let Some(writer) = lock(&self.shared.writer).take() else { return Ok(()) };
        // Fails only if the thread has ended by itself, and the join tells why.
        let _ = self.shared.messages.send(Message::End);
        writer.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes the trace panicked")))
    }
}

impl EngineTrace {
    /// A record for the step that begins now; `None`, and counted, if all records are on their way to the file.
    pub fn begin(&self, now: Instant) -> Option<StepRecord> {
        let Some(mut record) = lock(&self.shared.pool).pop() else {
            self.shared.dropped.fetch_add(1, Relaxed);
            return None;
        };
        record.process = self.process;
        record.began = now;
        Some(record)
    }

    /// Sends a step to the file. Never waits.
    pub fn record(&self, record: StepRecord) {
        match self.shared.messages.try_send(Message::Step(record)) {
            Ok(()) => {}
            Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) => {
                self.shared.dropped.fetch_add(1, Relaxed);
                if let Message::Step(record) = message {
                    self.shared.give_back(record);
                }
            }
        }
    }
}

impl Shared {
    fn give_back(&self, mut record: StepRecord) {
        record.marks.clear();
        record.spans.clear();
        lock(&self.pool).push(record);
    }
}

/// What the locks hold is whole at any time, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The life of the thread. The file grows by whole events and the closing bracket is optional in this format, so
/// that the trace of a process that was killed can be read.
fn write(
    mut file: File,
    began: Instant,
    inbox: &Receiver<Message>,
    give_back: impl Fn(StepRecord),
) -> io::Result<()> {
    let mut page = Page { began, text: String::from("[\n"), first: true, tracks: HashSet::new(), steps: 0 };
    let mut next = None;
    loop {
        let message = match next.take() {
            Some(message) => message,
            None => match inbox.recv() {
                Ok(message) => message,
                Err(_) => break, // Nobody is left who could record.
            },
        };
        match message {
            Message::Engine { process, name } => page.engine(process, &name),
            Message::Step(record) => {
                page.step(&record);
                give_back(record);
            }
            Message::End => break,
        }
        next = inbox.try_recv().ok();
        if next.is_none() || page.text.len() >= PIECE {
            file.write_all(page.text.as_bytes())?;
            page.text.clear();
        }
    }
    page.text.push_str("\n]\n");
    file.write_all(page.text.as_bytes())
}

/// The text of events that are not yet in the file.
struct Page {
    began: Instant,
    text: String,
    first: bool,
    /// (process, slot) that have a name.
    tracks: HashSet<(u32, u32)>,
    steps: u64,
}

impl Page {
    fn engine(&mut self, process: u32, name: &str) {
        let name = serde_json::Value::from(name);
        self.event(format_args!(
            r#"{{"ph":"M","name":"process_name","pid":{process},"args":{{"name":{name}}}}}"#
        ));
        self.track(process, 0, "steps");
    }

    fn track(&mut self, process: u32, track: u32, name: &str) {
        self.event(format_args!(
            r#"{{"ph":"M","name":"thread_name","pid":{process},"tid":{track},"args":{{"name":"{name}"}}}}"#
        ));
        self.event(format_args!(
            r#"{{"ph":"M","name":"thread_sort_index","pid":{process},"tid":{track},"args":{{"sort_index":{track}}}}}"#
        ));
    }

    fn event(&mut self, event: std::fmt::Arguments<'_>) {
        self.text.push_str(if self.first { "" } else { ",\n" });
        self.first = false;
        self.text.write_fmt(event).expect("a string takes all that is written to it");
    }

    /// Microseconds since the trace began.
    fn at(&self, time: Instant) -> f64 {
        time.saturating_duration_since(self.began).as_nanos() as f64 / 1e3
    }

    /// The step, its phases inside it, and each sequence on the track of its slot.
    fn step(&mut self, record: &StepRecord) {
        let StepRecord { process, began, marks, spans } = record;
        let start = self.at(*began);
        let end = marks.last().map_or(start, |&(_, end)| self.at(end));
        let duration = (end - start).max(0.0);
        let tokens: u64 = spans.iter().map(|span| u64::from(span.tokens)).sum();
        let [prefill, decode, verify] =
            Kind::ALL.map(|kind| spans.iter().filter(|span| span.kind == kind).count());
        let ids = spans.iter().map(|span| span.id.to_string()).collect::<Vec<_>>().join(",");
        self.steps += 1;
        let number = self.steps;
        self.event(format_args!(
            r#"{{"ph":"X","name":"step","pid":{process},"tid":0,"ts":{start:.3},"dur":{duration:.3},"args":{{"step":{number},"tokens":{tokens},"prefill":{prefill},"decode":{decode},"verify":{verify},"ids":[{ids}]}}}}"#
        ));
        let mut from = start;
        for &(phase, until) in marks {
            let (name, until) = (phase.name(), self.at(until));
            let duration = (until - from).max(0.0);
            self.event(format_args!(
                r#"{{"ph":"X","name":"{name}","pid":{process},"tid":0,"ts":{from:.3},"dur":{duration:.3}}}"#
            ));
            from = until;
        }
        for span in spans {
            let Span { id, slot, kind, tokens, past, accepted } = *span;
            let (track, name) = (slot + 1, kind.name());
            if self.tracks.insert((*process, slot)) {
                self.track(*process, track, &format!("slot {slot}"));
            }
            self.event(format_args!(
                r#"{{"ph":"X","name":"{name}","pid":{process},"tid":{track},"ts":{start:.3},"dur":{duration:.3},"args":{{"id":{id},"step":{number},"tokens":{tokens},"past":{past},"accepted":{accepted}}}}}"#
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::time::Duration;

    fn span(id: u64, slot: u32, kind: Kind) -> Span {
        Span { id, slot, kind, tokens: 3, past: 7, accepted: 1 }
    }

    /// The events of the given name, in order.
    fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
        events.iter().filter(|event| event["name"] == name).collect()
    }

    fn read(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Records one step of each number of microseconds.
    fn record(engine: &EngineTrace, lengths: impl IntoIterator<Item = u64>) {
        for length in lengths {
            let began = Instant::now();
            let Some(mut record) = engine.begin(began) else { continue };
            record.push(span(length, 0, Kind::Verify));
            record.push(span(length + 1, 5, Kind::Prefill));
            record.mark(Phase::Plan, began + Duration::from_micros(length));
            record.mark(Phase::Forward, began + Duration::from_micros(3 * length));
            engine.record(record);
        }
    }

    #[test]
    fn every_step_is_in_the_file_with_its_phases_and_its_sequences() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = TraceWriter::start(&path).unwrap();
        record(&trace.engine("front \"voice\""), 1..=20);
        trace.finish().unwrap();
        let events = read(&path);
        let steps = named(&events, "step");
        assert_eq!(steps.len(), 20);
        for (step, length) in steps.iter().zip(1u64..) {
            let args = &step["args"];
            let kinds = ["prefill", "decode", "verify", "tokens"].map(|name| args[name].as_u64());
            assert_eq!(kinds, [Some(1), Some(0), Some(1), Some(6)]);
            assert_eq!(args["ids"], serde_json::json!([length, length + 1]));
            assert_eq!(step["dur"].as_f64(), Some(3.0 * length as f64));
        }
        let (plan, forward) = (named(&events, "plan"), named(&events, "forward"));
        assert_eq!((plan.len(), forward.len()), (20, 20));
        assert_eq!(plan[4]["dur"].as_f64(), Some(5.0));
        assert_eq!(forward[4]["dur"].as_f64(), Some(10.0));
        assert_eq!(named(&events, "verify")[0]["tid"], 1);
        assert_eq!(named(&events, "prefill").len(), 20);
        assert_eq!(named(&events, "process_name")[0]["args"]["name"], "front \"voice\"");
        let tracks: Vec<_> =
            named(&events, "thread_name").iter().map(|event| &event["args"]["name"]).collect();
        assert_eq!(tracks, ["steps", "slot 0", "slot 5"]);
        assert_eq!(trace.dropped(), 0);
    }

    #[test]
    fn a_trace_that_nobody_finished_is_readable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = TraceWriter::start(&path).unwrap();
        record(&trace.engine("engine"), 1..=3);
        let text = loop {
            let text = std::fs::read_to_string(&path).unwrap();
            if text.matches("\"step\":3").count() == 3 {
                break text;
            }
            std::thread::yield_now();
        };
        let events: Vec<Value> = serde_json::from_str(&format!("{text}]")).unwrap();
        assert_eq!(named(&events, "step").len(), 3);
    }

    #[test]
    fn a_step_without_a_record_is_counted_and_the_next_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = TraceWriter::start(&path).unwrap();
        let engine = trace.engine("engine");
        let held: Vec<_> = std::iter::from_fn(|| engine.begin(Instant::now())).collect();
        assert_eq!((held.len(), trace.dropped()), (RECORDS, 1));
        held.into_iter().for_each(|record| engine.record(record));
        record_one_more(&engine);
        trace.finish().unwrap();
        assert_eq!(named(&read(&path), "step").len(), RECORDS + 1);
    }

    /// Waits until the writer has given a record back.
    fn record_one_more(engine: &EngineTrace) {
        let record = loop {
            match engine.begin(Instant::now()) {
                Some(record) => break record,
                None => std::thread::yield_now(),
            }
        };
        engine.record(record);
    }

    #[test]
    fn what_comes_after_the_end_is_dropped_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = TraceWriter::start(&path).unwrap();
        let engine = trace.engine("engine");
        trace.finish().unwrap();
        record(&engine, 1..=4);
        trace.finish().unwrap();
        assert_eq!(trace.dropped(), 4);
        assert!(named(&read(&path), "step").is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_made_is_an_error_at_start() {
        let error = TraceWriter::start(Path::new("/nowhere/trace.json")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_at_the_end_and_stops_nobody() {
        let trace = TraceWriter::start(Path::new("/dev/full")).unwrap();
        let engine = trace.engine("engine");
        record(&engine, 1..=3000);
        assert_eq!(trace.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
        record(&engine, 1..=2);
        assert!(trace.dropped() >= 2);
    }
}
