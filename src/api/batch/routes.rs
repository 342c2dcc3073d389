//! `/v1/files` and `/v1/batches`, as OpenAI has them.

use super::desk::{Batch, now};
use super::files::FileInfo;
use super::input::Line;
use super::multipart::{Event, FormError, Splitter};
use super::work::begin;
use crate::api::body::JsonBody;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::state::App;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

/// A field that is no file, and a file's name, are words.
const WORD_BYTES_MAX: usize = 512;
/// A completion window in seconds: a month is as good as for ever.
const WINDOW_MAX: u64 = 30 * 24 * 3600;
/// Pieces in which a content is read.
const PIECE: usize = 64 << 10;

type Asked = Query<HashMap<String, String>>;

/// The routes of this room.
pub fn add_to(router: Router<Arc<App>>) -> Router<Arc<App>> {
    router
        .route("/v1/files", post(upload).get(list_files).layer(DefaultBodyLimit::disable()))
        .route("/v1/files/{id}", get(file).delete(delete))
        .route("/v1/files/{id}/content", get(content))
        .route("/v1/batches", post(create).get(list_batches))
        .route("/v1/batches/{id}", get(batch))
        .route("/v1/batches/{id}/cancel", post(cancel))
}

/// Errors: 400 for what is no form with a file and the purpose `batch`, 413 when there is no space.
async fn upload(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    check_origin(&app, request.headers())?;
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let mut splitter = Splitter::new(kind.unwrap_or_default()).map_err(malformed)?;
    let mut form = Form::default();
    let name = app.ids.hex();
    let mut upload = app.batches.upload(&name)?;
    let mut chunks = request.into_body().into_data_stream();
    let mut events = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|error| ApiError::malformed(format!("The body ended too early: {error}")))?;
        splitter.push(&chunk, &mut events).map_err(malformed)?;
        for event in events.drain(..) {
            if let Some(content) = form.take(event)? {
                upload.write(&content)?;
            }
        }
    }
    splitter.finish().map_err(malformed)?;
    let filename = form.filename.ok_or_else(|| ApiError::bad("file", "`file` is required."))?;
    match form.purpose.as_str() {
        "batch" => {}
        "" => return Err(ApiError::bad("purpose", "`purpose` is required.")),
        other => {
            let message = format!("`purpose` must be `batch`, got `{other}`: files serve nothing else here.");
            return Err(ApiError::bad("purpose", message));
        }
    }
    let file = FileInfo {
        id: format!("file-{name}"),
        bytes: upload.bytes(),
        created_at: now(),
        filename,
        purpose: form.purpose,
    };
    app.batches.keep(upload, file.clone())?;
    Ok(Json(file.to_json()))
}

/// A form is the one body that a page of another origin can send without asking first.
fn check_origin(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    if app.options.cors.allows(origin, !app.options.api_keys.is_empty()) {
        return Ok(());
    }
    let origin = String::from_utf8_lossy(origin.as_bytes()).into_owned();
    Err(ApiError::bad("Origin", format!("Pages of `{origin}` may not upload here; see --allowed-origins.")))
}

fn malformed(error: FormError) -> ApiError {
    ApiError::malformed(format!("The form cannot be read: {error}."))
}

/// The fields of an upload as they come.
#[derive(Default)]
struct Form {
    purpose: String,
    /// Of the file, once it has begun.
    filename: Option<String>,
    part: Part,
}

#[derive(Default)]
enum Part {
    Purpose,
    File,
    /// Such as `expires_after[seconds]`: fields we do not know are no mistake.
    #[default]
    Other,
}

impl Form {
    /// More of the file's content, if it is that.
    fn take(&mut self, event: Event) -> Result<Option<Vec<u8>>, ApiError> {
        match (event, &self.part) {
            (Event::Part { name, filename }, _) => self.begin(&name, filename)?,
            (Event::Data(data), Part::File) => return Ok(Some(data)),
            (Event::Data(data), Part::Purpose) => {
                self.purpose.push_str(&String::from_utf8_lossy(&data));
                if self.purpose.len() > WORD_BYTES_MAX {
                    return Err(ApiError::bad("purpose", "`purpose` must be `batch`."));
                }
            }
            (Event::Data(_), Part::Other) | (Event::PartEnd, _) => {}
        }
        Ok(None)
    }

    fn begin(&mut self, name: &str, filename: Option<String>) -> Result<(), ApiError> {
        self.part = match name {
            "purpose" => Part::Purpose,
            "file" if self.filename.is_some() => {
                return Err(ApiError::bad("file", "`file` must be there once."));
            }
            "file" => {
                let filename = filename.unwrap_or_else(|| "upload".to_owned());
                self.filename = Some(filename.chars().take(WORD_BYTES_MAX / 4).collect());
                Part::File
            }
            _ => Part::Other,
        };
        Ok(())
    }
}

async fn list_files(State(app): State<Arc<App>>, Query(asked): Asked) -> Result<Json<Value>, ApiError> {
    let mut files = app.batches.files();
    if let Some(purpose) = asked.get("purpose") {
        files.retain(|file| file.purpose == *purpose);
    }
    if asked.get("order").is_none_or(|order| order != "asc") {
        files.reverse();
    }
    page(&files, &asked, 10_000, |file| &file.id, FileInfo::to_json)
}

async fn file(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(app.batches.file(&id)?.to_json()))
}

async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.batches.delete(&id)?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

/// The bytes as they were uploaded or written, read while they are sent.
async fn content(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let info = app.batches.file(&id)?;
    let file = File::open(app.batches.content(&id)?).map_err(|error| super::files::disk(&error))?;
    let pieces = stream::try_unfold(file, |mut file| async {
        let read = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; PIECE];
            let count = file.read(&mut piece)?;
            piece.truncate(count);
            io::Result::Ok((count > 0).then_some((Bytes::from(piece), file)))
        });
        read.await.map_err(io::Error::other)?
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, info.bytes.to_string()),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Errors: 400 for a window or an endpoint that is none, 404 for a file that is not there, 429 when too many batches
/// wait. What is wrong in the file is said by the batch.
async fn create(State(app): State<Arc<App>>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::top(&body.map);
    let required = |name: &str| {
        fields.required(name)?;
        Ok::<_, ApiError>(fields.string(name)?.unwrap_or_default().to_owned())
    };
    let (file, endpoint, window) =
        (required("input_file_id")?, required("endpoint")?, required("completion_window")?);
    if !Line::may_ask(&endpoint) {
        return Err(ApiError::bad("endpoint", format!("There are no batches for `{endpoint}`.")));
    }
    let seconds = seconds(&window).ok_or_else(|| {
        ApiError::bad(
            "completion_window",
            format!("`completion_window` must be such as `24h`, got `{window}`."),
        )
    })?;
    app.batches.file(&file)?;
    let mut batch = Batch::new(format!("batch_{}", app.ids.hex()), endpoint, file, (window, seconds));
    batch.metadata = match fields.get("metadata") {
        None => None,
        Some(Value::Object(metadata)) => Some(metadata.clone()),
        Some(_) => return Err(ApiError::bad("metadata", "`metadata` must be an object.")),
    };
    let shown = shown(&batch);
    let cancelled = app.batches.open(batch.clone())?;
    begin(&app, batch, cancelled);
    Ok(Json(shown))
}

async fn list_batches(State(app): State<Arc<App>>, Query(asked): Asked) -> Result<Json<Value>, ApiError> {
    let mut batches = app.batches.batches();
    batches.reverse();
    page(&batches, &asked, 20, |batch| &batch.id, shown)
}

async fn batch(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(shown(&app.batches.batch(&id)?)))
}

async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(shown(&app.batches.cancel(&id)?)))
}

fn shown(batch: &Batch) -> Value {
    serde_json::to_value(batch).expect("words and numbers are JSON")
}

/// Those behind `after`, `limit` of them. Errors: 400 for either.
fn page<T>(
    items: &[T],
    asked: &HashMap<String, String>,
    limit: usize,
    id: impl Fn(&T) -> &String,
    show: impl Fn(&T) -> Value,
) -> Result<Json<Value>, ApiError> {
    let limit = match asked.get("limit").map(|limit| limit.parse::<usize>()) {
        None => limit,
        Some(Ok(limit)) if limit > 0 => limit,
        Some(_) => return Err(ApiError::bad("limit", "`limit` must be a whole number above 0.")),
    };
    let from = match asked.get("after") {
        None => 0,
        Some(after) => match items.iter().position(|item| id(item) == after) {
            Some(at) => at + 1,
            None => {
                return Err(ApiError::bad(
                    "after",
                    format!("`after` must be one of the list, got `{after}`."),
                ));
            }
        },
    };
    let rest = &items[from..];
    let part = &rest[..limit.min(rest.len())];
    Ok(Json(json!({
        "object": "list",
        "data": part.iter().map(show).collect::<Vec<_>>(),
        "first_id": part.first().map(&id),
        "last_id": part.last().map(&id),
        "has_more": part.len() < rest.len(),
    })))
}

/// `24h`, `90m`, `30s`, `7d`.
fn seconds(window: &str) -> Option<u64> {
    let (digits, unit) = window.split_at_checked(window.len().checked_sub(1)?)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    let seconds = digits.parse::<u64>().ok()?.checked_mul(unit)?;
    (1..=WINDOW_MAX).contains(&seconds).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_a_number_and_a_unit() {
        let check = |window: &str, expected| assert_eq!(seconds(window), expected, "{window}");
        check("24h", Some(86_400));
        check("30d", Some(WINDOW_MAX));
        check("1s", Some(1));
        for wrong in
            ["", "h", "24", "0h", "31d", "-1h", "24 h", "ü", "99999999999999999999d", "9999999999999999d"]
        {
            check(wrong, None);
        }
    }
}
