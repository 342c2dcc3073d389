//! The life of one batch behind `/v1/batches`: its file is checked, its lines are answered, its results become files.

use super::desk::{Batch, Status, now};
use super::files::{FileInfo, Upload, disk};
use super::input::{Input, InputError, Limits};
use super::journal::{Journal, result_line, succeeded};
use super::run::{RunError, run};
use crate::api::error::ApiError;
use crate::api::state::App;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// As many as OpenAI takes.
const LINES_MAX: usize = 50_000;

/// Goes on with the batches that an earlier server has left in the directory of files, if there is one. Needs a tokio
/// runtime. Errors: the directory cannot be used.
pub fn resume(app: &Arc<App>) -> Result<(), String> {
    for batch in app.batches.recall()? {
        if let Some(cancelled) = app.batches.bell(&batch.id) {
            tracing::info!("The batch {} goes on", batch.id);
            begin(app, batch, cancelled);
        }
    }
    Ok(())
}

/// Does all that is to be done for `batch`, aside.
pub fn begin(app: &Arc<App>, batch: Batch, cancelled: watch::Receiver<bool>) {
    let app = app.clone();
    tokio::spawn(async move {
        let id = batch.id.clone();
        if let Err(failure) = work(&app, batch, cancelled).await {
            tracing::warn!("The batch {id} failed: {}", failure.message);
            // Only what was forgotten cannot be changed, and nobody asks for that.
            let _ = app.batches.change(&id, |batch| {
                batch.errors = Some(failure.into_json());
                batch.turn(Status::Failed);
            });
        }
    });
}

/// Why a batch came to nothing.
struct Failure {
    code: &'static str,
    message: String,
    /// The lines at fault, where that is the reason.
    lines: Vec<Value>,
}

impl Failure {
    fn new(code: &'static str, message: impl ToString) -> Self {
        Self { code, message: message.to_string(), lines: Vec::new() }
    }

    /// As a batch shows it.
    fn into_json(self) -> Value {
        let data = if self.lines.is_empty() {
            vec![json!({"code": self.code, "message": self.message, "param": null, "line": null})]
        } else {
            self.lines
        };
        json!({"object": "list", "data": data})
    }
}

impl From<InputError> for Failure {
    fn from(error: InputError) -> Self {
        let code = match &error {
            InputError::Io(_) | InputError::Changed(_) => "unreadable_file",
            InputError::Empty => "empty_file",
            InputError::TooMany { .. } => "too_many_lines",
            InputError::Faulty { .. } => "invalid_lines",
        };
        let mut failure = Self::new(code, &error);
        if let InputError::Faulty { shown, .. } = error {
            let line = |(line, fault): (usize, super::Fault)| json!({"code": fault.code(), "message": fault.to_string(), "param": fault.param(), "line": line});
            failure.lines = shown.into_iter().map(line).collect();
        }
        failure
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Input(error) => error.into(),
            RunError::Output(_) => Self::new("server_error", error),
            RunError::Full => Self::new("storage_full", error),
        }
    }
}

/// Why no more lines are answered.
enum Ending {
    Answered,
    Expired,
    Cancelled,
    Failed(Failure),
}

impl Ending {
    /// What is said of a request that got no answer.
    fn error(&self) -> Value {
        let (code, message) = match self {
            Self::Expired => {
                ("batch_expired", "This request could not be executed before the completion window expired.")
            }
            Self::Answered | Self::Cancelled => {
                ("batch_cancelled", "This request was not executed before the batch was cancelled.")
            }
            Self::Failed(failure) => (failure.code, failure.message.as_str()),
        };
        json!({"code": code, "message": message})
    }
}

async fn work(app: &Arc<App>, batch: Batch, cancelled: watch::Receiver<bool>) -> Result<(), Failure> {
    let desk = &app.batches;
    let place = desk.content(&batch.input_file_id).map_err(|error| Failure::new("unreadable_file", error))?;
    let root = desk.root().map_err(|error| Failure::new("server_error", error))?;
    let journal_place = root.place(&format!("{}.journal", batch.id));
    let (line, endpoint) = (app.options.body_limit, batch.endpoint.clone());
    let opened = blocking(move || {
        let limits = Limits { line, lines: LINES_MAX, endpoint: Some(&endpoint) };
        let input = Input::read(&place, &limits)?;
        let journal =
            Journal::open(&journal_place, &input).map_err(|error| Failure::new("server_error", error))?;
        Ok::<_, Failure>((input, journal))
    });
    let (input, mut journal) = opened.await??;
    desk.space().hold(journal.bytes());
    let began = desk.change(&batch.id, |batch| {
        batch.request_counts = journal.counts();
        if batch.status == Status::Validating {
            batch.turn(Status::InProgress);
        }
    });
    began.map_err(|error| Failure::new("server_error", error))?;

    let ending = answer(app, &batch, &input, &mut journal, cancelled).await;
    let status = desk.change(&batch.id, |batch| {
        if batch.status != Status::Cancelling {
            batch.turn(Status::Finalizing);
        }
    });
    let status = status.map_or(batch.status, |batch| batch.status);
    let ending = if status == Status::Cancelling { Ending::Cancelled } else { ending };
    let app = app.clone();
    blocking(move || finish(&app, &batch.id, &input, journal, ending)).await?
}

/// Answers until all is answered, somebody cancels, or the time is over.
async fn answer(
    app: &Arc<App>,
    batch: &Batch,
    input: &Input,
    journal: &mut Journal,
    mut cancelled: watch::Receiver<bool>,
) -> Ending {
    let desk = &app.batches;
    let time = Duration::from_secs(batch.expires_at.saturating_sub(now()));
    let mut held = journal.bytes();
    let ran = async {
        let _turn = desk.turn.lock().await;
        run(app, input, journal, |journal| {
            desk.space().take(journal.bytes() - held).map_err(|_| RunError::Full)?;
            held = journal.bytes();
            desk.count(&batch.id, journal.counts());
            Ok(())
        })
        .await
    };
    tokio::select! {
        biased;
        // The desk keeps the other end as long as it knows the batch.
        _ = cancelled.wait_for(|cancelled| *cancelled) => Ending::Cancelled,
        ran = ran => ran.map_or_else(|error| Ending::Failed(error.into()), |()| Ending::Answered),
        () = tokio::time::sleep(time) => Ending::Expired,
    }
}

/// Makes the two files of results, and says that the batch is over. Blocks.
fn finish(app: &App, id: &str, input: &Input, journal: Journal, ending: Ending) -> Result<(), Failure> {
    let desk = &app.batches;
    let wrong = |error: ApiError| Failure::new("server_error", error);
    let root = desk.root().map_err(|error| Failure::new("server_error", error))?;
    let journal_name = format!("{id}.journal");
    let mut results = Results::open(app, id).map_err(wrong)?;
    results.sort(&root.place(&journal_name), journal.bytes()).map_err(wrong)?;
    results.refuse(input, &journal.left(), &ending.error()).map_err(wrong)?;
    let (output, errors) = results.keep().map_err(wrong)?;
    let mut counts = journal.counts();
    counts.failed = counts.total - counts.completed;
    let ended = desk.change(id, |batch| {
        (batch.output_file_id, batch.error_file_id) = (output, errors);
        batch.request_counts = counts;
        let status = match ending {
            Ending::Answered => Status::Completed,
            Ending::Expired => Status::Expired,
            Ending::Cancelled => Status::Cancelled,
            Ending::Failed(failure) => {
                batch.errors = Some(failure.into_json());
                Status::Failed
            }
        };
        batch.turn(status);
    });
    desk.space().free(journal.bytes());
    drop(journal);
    root.remove(&journal_name);
    ended.map(drop).map_err(wrong)
}

/// The files that a batch leaves: what succeeded, and the rest.
struct Results<'a> {
    app: &'a App,
    batch: &'a str,
    files: [(Upload<'a>, &'static str); 2],
}

impl<'a> Results<'a> {
    fn open(app: &'a App, batch: &'a str) -> Result<Self, ApiError> {
        let file = |kind| Ok::<_, ApiError>((app.batches.result(&format!("{batch}-{kind}"))?, kind));
        Ok(Self { app, batch, files: [file("output")?, file("errors")?] })
    }

    /// The lines of the journal, each to its file; what may stand behind `bytes` was not written to its end.
    fn sort(&mut self, journal: &Path, bytes: u64) -> Result<(), ApiError> {
        let journal = File::open(journal).map_err(|error| disk(&error))?;
        for line in BufReader::new(journal.take(bytes)).split(b'\n') {
            let mut line = line.map_err(|error| disk(&error))?;
            line.push(b'\n');
            let file = if succeeded(&line) { 0 } else { 1 };
            self.files[file].0.write_anyway(&line)?;
        }
        Ok(())
    }

    /// A result for each request that got none.
    fn refuse(&mut self, input: &Input, left: &[usize], error: &Value) -> Result<(), ApiError> {
        for &index in left {
            let line = input.line(index).map_err(|error| ApiError::Internal(error.to_string()))?;
            let line = result_line(&input.id(index), &line.custom_id, Value::Null, error.clone());
            self.files[1].0.write_anyway(&line)?;
        }
        Ok(())
    }

    /// Their ids, where there is anything in them.
    fn keep(self) -> Result<(Option<String>, Option<String>), ApiError> {
        let name = self.batch.strip_prefix("batch_").unwrap_or(self.batch);
        let [output, errors] = self.files.map(|(upload, kind)| {
            if upload.bytes() == 0 {
                return Ok(None);
            }
            // The same after a kill, so that nothing is there twice.
            let id = format!("file-{name}-{kind}");
            let info = FileInfo {
                id: id.clone(),
                bytes: upload.bytes(),
                created_at: now(),
                filename: format!("{}_{kind}.jsonl", self.batch),
                purpose: "batch_output".to_owned(),
            };
            self.app.batches.keep(upload, info).map(|()| Some(id))
        });
        Ok((output?, errors?))
    }
}

/// Runs what reads and writes files where nobody waits for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::new("server_error", error))
}
