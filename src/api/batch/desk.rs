//! The desk where files and batches are handed in and fetched: what there is of both, in memory and on disk.

use super::files::{FileInfo, FileOptions, Root, Space, Upload, disk};
use super::journal::Counts;
use crate::api::error::ApiError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Batches that have not ended; each holds the places of its lines in memory.
const OPEN_MAX: usize = 64;
/// Batches that are remembered: of more, the oldest that has ended is forgotten.
const REMEMBERED_MAX: usize = 1000;

/// How far a batch is, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Validating,
    InProgress,
    Finalizing,
    Completed,
    Failed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Expired | Self::Cancelled)
    }
}

/// A batch as OpenAI shows it, and as it is kept. Times in unix seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Batch {
    pub id: String,
    pub object: String,
    pub endpoint: String,
    pub errors: Option<Value>,
    pub input_file_id: String,
    pub completion_window: String,
    pub status: Status,
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub created_at: u64,
    pub in_progress_at: Option<u64>,
    pub expires_at: u64,
    pub finalizing_at: Option<u64>,
    pub completed_at: Option<u64>,
    pub failed_at: Option<u64>,
    pub expired_at: Option<u64>,
    pub cancelling_at: Option<u64>,
    pub cancelled_at: Option<u64>,
    pub request_counts: Counts,
    pub metadata: Option<Map<String, Value>>,
}

impl Batch {
    /// One that begins now.
    pub fn new(id: String, endpoint: String, input_file_id: String, window: (String, u64)) -> Self {
        let created_at = now();
        let (completion_window, seconds) = window;
        Self {
            id,
            object: "batch".to_owned(),
            endpoint,
            errors: None,
            input_file_id,
            completion_window,
            status: Status::Validating,
            output_file_id: None,
            error_file_id: None,
            created_at,
            in_progress_at: None,
            expires_at: created_at + seconds,
            finalizing_at: None,
            completed_at: None,
            failed_at: None,
            expired_at: None,
            cancelling_at: None,
            cancelled_at: None,
            request_counts: Counts::default(),
            metadata: None,
        }
    }

    /// Goes over to `status`, and notes when.
    pub fn turn(&mut self, status: Status) {
        self.status = status;
        let time = match status {
            Status::Validating => return,
            Status::InProgress => &mut self.in_progress_at,
            Status::Finalizing => &mut self.finalizing_at,
            Status::Completed => &mut self.completed_at,
            Status::Failed => &mut self.failed_at,
            Status::Expired => &mut self.expired_at,
            Status::Cancelling => &mut self.cancelling_at,
            Status::Cancelled => &mut self.cancelled_at,
        };
        *time = Some(now());
    }
}

/// A batch and the bell that stops it.
struct Open {
    batch: Batch,
    cancel: watch::Sender<bool>,
}

#[derive(Default)]
struct Table {
    root: Option<Arc<Root>>,
    /// The server is ending: nothing is made any more.
    closed: bool,
    /// Both in the order in which they came.
    files: Vec<FileInfo>,
    batches: Vec<Open>,
}

impl Table {
    fn root(&self) -> Result<Arc<Root>, ApiError> {
        self.root.clone().ok_or_else(|| ApiError::Internal("There are no files here.".to_owned()))
    }

    fn check_count(&self, most: usize) -> Result<(), ApiError> {
        let count = self.files.len();
        if count < most {
            return Ok(());
        }
        let message =
            format!("There are {count} files, and there may be {most}: delete some that nobody needs.");
        Err(ApiError::bad("file", message))
    }
}

/// Files and batches of a server.
pub struct Desk {
    options: FileOptions,
    space: Space,
    table: Mutex<Table>,
    /// One batch runs at a time, in the order in which they came: two would only wait for each other.
    pub turn: tokio::sync::Mutex<()>,
}

impl Desk {
    pub fn new(options: FileOptions) -> Self {
        let space = Space::new(options.bytes_max);
        Self { options, space, table: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// A panic elsewhere leaves the table as it was between two changes.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory that the files lie in. Errors: there is none, as there are no files.
    pub fn root(&self) -> Result<Arc<Root>, ApiError> {
        self.table().root()
    }

    /// The same, opened or made if nobody has needed it yet; `name` tells a temporary one from others.
    /// Errors: see [`Root::open`].
    fn open_root(&self, name: &str) -> Result<Arc<Root>, String> {
        let mut table = self.table();
        match &table.root {
            Some(root) => return Ok(root.clone()),
            None if table.closed => return Err("the server is ending".to_owned()),
            None => {}
        }
        let root = Arc::new(Root::open(self.options.directory.as_deref(), name)?);
        table.root = Some(root.clone());
        Ok(root)
    }

    /// Reads what an earlier server has left in the directory that was given, if one was; the batches that have not
    /// ended. Errors: the directory cannot be used.
    pub fn recall(&self) -> Result<Vec<Batch>, String> {
        if self.options.directory.is_none() {
            return Ok(Vec::new());
        }
        let root = self.open_root("")?;
        let wrong = |error: io::Error| format!("the files of earlier batches cannot be read: {error}");
        let mut files: Vec<FileInfo> = root.read("file-").map_err(wrong)?;
        // What is known is written before the content is in its place; a kill falls between the two.
        files.retain(|file| root.place(&file.id).exists());
        files.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let mut batches: Vec<Batch> = root.read("batch_").map_err(wrong)?;
        batches.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        self.space.hold(files.iter().map(|file| file.bytes).sum());
        let open = batches.iter().filter(|batch| !batch.status.has_ended()).cloned().collect();
        let mut table = self.table();
        table.files = files;
        table.batches =
            batches.into_iter().map(|batch| Open { batch, cancel: watch::Sender::new(false) }).collect();
        Ok(open)
    }

    /// Removes a temporary directory; what still writes there finds nothing.
    pub fn close(&self) {
        let mut table = self.table();
        table.closed = true;
        if let Some(root) = table.root.take() {
            root.close();
        }
    }

    /// A place to write the next file to. Errors: there are too many, or the disk does not take one.
    pub fn upload(&self, name: &str) -> Result<Upload<'_>, ApiError> {
        let most = self.options.count_max;
        self.table().check_count(most)?;
        let root = self.open_root(name).map_err(ApiError::Internal)?;
        let place = root.place(&format!("upload-{name}.part"));
        Upload::start(&self.space, place, most).map_err(|error| disk(&error))
    }

    /// A place to write results to; they may always be kept, for their number is that of the batches.
    pub fn result(&self, name: &str) -> Result<Upload<'_>, ApiError> {
        let place = self.root()?.place(&format!("{name}.part"));
        Upload::start(&self.space, place, usize::MAX).map_err(|error| disk(&error))
    }

    /// An upload becomes a file. Errors: others were faster and there are too many now; the disk does not take it.
    pub fn keep(&self, upload: Upload, file: FileInfo) -> Result<(), ApiError> {
        let mut table = self.table();
        table.check_count(upload.files_max())?;
        let root = table.root()?;
        root.write(&format!("{}.json", file.id), &file).map_err(|error| disk(&error))?;
        upload.keep(&root.place(&file.id)).map_err(|error| disk(&error))?;
        // Results that are written again after a kill take the place of the first ones.
        if let Some(before) = table.files.iter().position(|kept| kept.id == file.id) {
            self.space.free(table.files.remove(before).bytes);
        }
        table.files.push(file);
        Ok(())
    }

    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The oldest first.
    pub fn files(&self) -> Vec<FileInfo> {
        self.table().files.clone()
    }

    /// Errors: 404.
    pub fn file(&self, id: &str) -> Result<FileInfo, ApiError> {
        let found = self.table().files.iter().find(|file| file.id == id).cloned();
        found.ok_or_else(|| ApiError::NotFound { what: "file", id: id.to_owned() })
    }

    /// Where the content of a file lies. Errors: 404.
    pub fn content(&self, id: &str) -> Result<PathBuf, ApiError> {
        let file = self.file(id)?;
        Ok(self.root()?.place(&file.id))
    }

    /// Errors: 404; 400 if a batch is reading it.
    pub fn delete(&self, id: &str) -> Result<(), ApiError> {
        let file = self.file(id)?;
        let mut table = self.table();
        let root = table.root()?;
        let reader = table.batches.iter().map(|open| &open.batch);
        if let Some(batch) = reader.into_iter().find(|b| b.input_file_id == id && !b.status.has_ended()) {
            let message = format!("The file `{id}` is being read by `{}`: cancel that first.", batch.id);
            return Err(ApiError::bad("file_id", message));
        }
        table.files.retain(|kept| kept.id != id);
        drop(table);
        root.remove(&format!("{id}.json"));
        root.remove(id);
        self.space.free(file.bytes);
        Ok(())
    }

    /// Takes a batch in; what rings when it is cancelled. Errors: too many have not ended yet.
    pub fn open(&self, batch: Batch) -> Result<watch::Receiver<bool>, ApiError> {
        let mut table = self.table();
        let root = table.root()?;
        if table.batches.iter().filter(|open| !open.batch.status.has_ended()).count() >= OPEN_MAX {
            return Err(ApiError::Busy { limit: OPEN_MAX });
        }
        root.write(&format!("{}.json", batch.id), &batch).map_err(|error| disk(&error))?;
        if table.batches.len() >= REMEMBERED_MAX
            && let Some(oldest) = table.batches.iter().position(|open| open.batch.status.has_ended())
        {
            let forgotten = table.batches.remove(oldest).batch;
            root.remove(&format!("{}.json", forgotten.id));
        }
        let (cancel, cancelled) = watch::channel(false);
        table.batches.push(Open { batch, cancel });
        Ok(cancelled)
    }

    /// What rings when a batch of an earlier server is cancelled; it does at once if that was asked for already.
    pub fn bell(&self, id: &str) -> Option<watch::Receiver<bool>> {
        let table = self.table();
        let open = table.batches.iter().find(|open| open.batch.id == id)?;
        open.cancel.send_replace(open.batch.status == Status::Cancelling);
        Some(open.cancel.subscribe())
    }

    /// The oldest first.
    pub fn batches(&self) -> Vec<Batch> {
        self.table().batches.iter().map(|open| open.batch.clone()).collect()
    }

    /// Errors: 404.
    pub fn batch(&self, id: &str) -> Result<Batch, ApiError> {
        let found =
            self.table().batches.iter().find(|open| open.batch.id == id).map(|open| open.batch.clone());
        found.ok_or_else(|| ApiError::NotFound { what: "batch", id: id.to_owned() })
    }

    /// How far it is, for whoever looks; the journal knows it too, so it is not written down.
    pub fn count(&self, id: &str, counts: Counts) {
        if let Some(open) = self.table().batches.iter_mut().find(|open| open.batch.id == id) {
            open.batch.request_counts = counts;
        }
    }

    /// Changes a batch and writes it down; the batch as it is then. Errors: 404.
    pub fn change(&self, id: &str, change: impl FnOnce(&mut Batch)) -> Result<Batch, ApiError> {
        let mut table = self.table();
        let root = table.root.clone();
        let open = table.batches.iter_mut().find(|open| open.batch.id == id);
        let open = open.ok_or_else(|| ApiError::NotFound { what: "batch", id: id.to_owned() })?;
        change(&mut open.batch);
        if let Some(root) = root
            && let Err(error) = root.write(&format!("{id}.json"), &open.batch)
        {
            // It goes on; after a restart it would be where it was before.
            tracing::error!("{id} cannot be written down: {error}");
        }
        Ok(open.batch.clone())
    }

    /// Errors: 404; 400 if it is too late.
    pub fn cancel(&self, id: &str) -> Result<Batch, ApiError> {
        let mut late = None;
        let batch = self.change(id, |batch| match batch.status {
            Status::Validating | Status::InProgress => batch.turn(Status::Cancelling),
            Status::Cancelling => {}
            other => late = Some(other),
        })?;
        if let Some(status) = late {
            let status = serde_json::to_value(status).unwrap_or_default();
            let message = format!("The batch `{id}` cannot be cancelled any more: it is {status}.");
            return Err(ApiError::bad("batch_id", message));
        }
        if let Some(open) = self.table().batches.iter().find(|open| open.batch.id == id) {
            open.cancel.send_replace(true);
        }
        Ok(batch)
    }
}

/// Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
