//! Responses that can be asked for again, continued and cancelled: in memory, bounded by count, bytes and age.

use crate::api::error::ApiError;
use futures_util::future::AbortHandle;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much is kept. A count of 0 keeps nothing: then every request is as if it said `store: false`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    pub count: usize,
    /// Of requests and answers, as they lie in memory.
    pub bytes: usize,
    /// After this nobody comes back.
    pub age: Duration,
    /// Responses that are made in the background at one time: they are never dropped for others.
    pub running: usize,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self { count: 1000, bytes: 64 << 20, age: Duration::from_secs(3600), running: 256 }
    }
}

/// What is kept; the one that was not asked for the longest goes first.
pub struct Store {
    limits: StoreLimits,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<String, Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    response: Arc<Value>,
    /// All items before the answer, those of earlier responses included.
    input: Arc<Vec<Value>>,
    bytes: usize,
    used: u64,
    since: Instant,
    background: bool,
    /// Ends the work, while there is some.
    running: Option<AbortHandle>,
}

impl Store {
    pub fn new(limits: StoreLimits) -> Self {
        Self { limits, kept: Mutex::default() }
    }

    /// Whether anything is kept at all.
    pub fn is_on(&self) -> bool {
        self.limits.count > 0
    }

    /// Keeps a response that has ended.
    pub fn insert(&self, id: &str, response: Value, input: Arc<Vec<Value>>) {
        let entry = Entry::new(response, input, None);
        self.lock().insert(id, entry, self.limits);
    }

    /// Keeps a response that is still being made, until [`Self::finish`], [`Self::cancel`] or [`Self::remove`].
    /// Errors: too many are.
    pub fn begin(
        &self,
        id: &str,
        response: Value,
        input: Arc<Vec<Value>>,
        running: AbortHandle,
    ) -> Result<(), ApiError> {
        let mut kept = self.lock();
        if kept.entries.values().filter(|entry| entry.running.is_some()).count() >= self.limits.running {
            return Err(ApiError::Busy { limit: self.limits.running });
        }
        kept.insert(id, Entry::new(response, input, Some(running)), self.limits);
        Ok(())
    }

    /// What there is of a response that is still being made. Nothing happens if it was cancelled or removed.
    pub fn progress(&self, id: &str, response: Value) {
        if let Some(entry) = self.lock().entries.get_mut(id).filter(|entry| entry.running.is_some()) {
            entry.response = Arc::new(response);
        }
    }

    /// The end of a response that was being made. Nothing happens if it was cancelled or removed.
    pub fn finish(&self, id: &str, response: Value) {
        let mut kept = self.lock();
        let Some(entry) = kept.entries.get(id).filter(|entry| entry.running.is_some()) else { return };
        let mut entry = Entry::new(response, entry.input.clone(), None);
        entry.background = true;
        kept.insert(id, entry, self.limits);
    }

    pub fn get(&self, id: &str) -> Result<Arc<Value>, ApiError> {
        let mut kept = self.lock();
        kept.expire(self.limits.age);
        kept.touch(id).map(|entry| entry.response.clone()).ok_or_else(|| unknown(id))
    }

    /// The items that a request continues which names `id` as its `previous_response_id`: all that was said before
    /// the answer, and the answer. Errors: 400 if it is not kept or has no end yet.
    pub fn conversation(&self, id: &str) -> Result<Vec<Value>, ApiError> {
        let mut kept = self.lock();
        kept.expire(self.limits.age);
        let bad = |message| ApiError::bad("previous_response_id", message);
        let entry = kept.touch(id).ok_or_else(|| bad(unknown(id).to_string()))?;
        let status = entry.response["status"].as_str().unwrap_or_default();
        if !matches!(status, "completed" | "incomplete") {
            return Err(bad(format!("The previous response has the status {status}: it has no answer.")));
        }
        let output = entry.response["output"].as_array().into_iter().flatten();
        Ok(entry.input.iter().chain(output).cloned().collect())
    }

    /// Ends the work on a response and says what became of it; once it has ended, that stays so. Errors: it is not
    /// kept, or was not made in the background.
    pub fn cancel(&self, id: &str) -> Result<Arc<Value>, ApiError> {
        let mut kept = self.lock();
        let entry = kept.touch(id).ok_or_else(|| unknown(id))?;
        if !entry.background {
            return Err(ApiError::bad(
                "response_id",
                "Only a response that was asked for with `background: true` can be cancelled.",
            ));
        }
        if let Some(running) = entry.running.take() {
            running.abort();
            let mut response = Value::clone(&entry.response);
            response["status"] = json!("cancelled");
            entry.response = Arc::new(response);
        }
        Ok(entry.response.clone())
    }

    /// Forgets a response; work on it ends. Errors: it is not kept.
    pub fn remove(&self, id: &str) -> Result<(), ApiError> {
        let entry = self.lock().remove(id).ok_or_else(|| unknown(id))?;
        if let Some(running) = entry.running {
            running.abort();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(response: Value, input: Arc<Vec<Value>>, running: Option<AbortHandle>) -> Self {
        let bytes = size(&response) + input.iter().map(size).sum::<usize>();
        Self {
            response: Arc::new(response),
            input,
            bytes,
            used: 0,
            since: Instant::now(),
            background: running.is_some(),
            running,
        }
    }
}

impl Kept {
    fn touch(&mut self, id: &str) -> Option<&mut Entry> {
        self.clock += 1;
        let entry = self.entries.get_mut(id)?;
        entry.used = self.clock;
        Some(entry)
    }

    fn insert(&mut self, id: &str, mut entry: Entry, limits: StoreLimits) {
        self.expire(limits.age);
        self.clock += 1;
        entry.used = self.clock;
        self.bytes += entry.bytes;
        if let Some(before) = self.entries.insert(id.to_owned(), entry) {
            self.bytes -= before.bytes;
        }
        while self.entries.len() > limits.count || self.bytes > limits.bytes {
            let ended = self.entries.iter().filter(|(_, entry)| entry.running.is_none());
            let Some(oldest) = ended.min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone()) else {
                break;
            };
            self.remove(&oldest);
        }
    }

    fn expire(&mut self, age: Duration) {
        let old = |entry: &Entry| entry.running.is_none() && entry.since.elapsed() > age;
        let gone: Vec<String> =
            self.entries.iter().filter(|(_, entry)| old(entry)).map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.remove(&id);
        }
    }

    fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        self.bytes -= entry.bytes;
        Some(entry)
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::UnknownResponse(id.to_owned())
}

/// About the bytes that a value takes in memory.
fn size(value: &Value) -> usize {
    let inside = match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| key.len() + size_of::<String>() + size(value)).sum()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    };
    size_of::<Value>() + inside
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(count: usize, bytes: usize, age: Duration) -> Store {
        Store::new(StoreLimits { count, bytes, age, running: 2 })
    }

    fn response(text: &str) -> Value {
        json!({"status": "completed", "output": [{"text": text}]})
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn the_count_is_bounded_and_what_is_used_stays() {
        let store = store(3, usize::MAX, HOUR);
        for index in 0..50 {
            store.insert(&index.to_string(), response("x"), Arc::default());
            assert!(store.get("0").is_ok(), "what is asked for stays");
        }
        assert_eq!(store.lock().entries.len(), 3);
        assert!(store.get("49").is_ok() && store.get("47").is_err());
    }

    #[test]
    fn the_bytes_are_bounded_however_few_there_are() {
        let store = store(1000, 10_000, HOUR);
        for index in 0..50 {
            store.insert(&index.to_string(), response(&"x".repeat(1000)), Arc::default());
            let kept = store.lock();
            let counted: usize = kept.entries.values().map(|entry| entry.bytes).sum();
            assert!(kept.bytes <= 10_000 && kept.bytes == counted);
        }
        assert!(store.get("49").is_ok());
        store.insert("large", response(&"x".repeat(20_000)), Arc::default());
        assert!(store.get("large").is_err());
        assert_eq!(store.lock().bytes, 0);
    }

    #[test]
    fn what_is_old_is_gone() {
        let store = store(10, usize::MAX, Duration::ZERO);
        store.insert("a", response("x"), Arc::default());
        assert!(store.get("a").is_err() && store.conversation("a").is_err());
    }

    #[test]
    fn work_is_neither_dropped_nor_without_bound() {
        let store = store(1, usize::MAX, Duration::ZERO);
        let begin =
            |id| store.begin(id, json!({"status": "queued"}), Arc::default(), AbortHandle::new_pair().0);
        assert_eq!([begin("a"), begin("b")], [Ok(()), Ok(())]);
        assert_eq!(begin("c"), Err(ApiError::Busy { limit: 2 }));
        assert!(store.get("a").is_ok() && store.get("b").is_ok());
        assert_eq!(store.cancel("a").map(|response| response["status"].clone()), Ok(json!("cancelled")));
        store.finish("a", response("late"));
        assert!(store.get("a").is_err(), "an end that comes after the cancel changes nothing");
        assert_eq!(begin("c"), Ok(()));
    }

    #[test]
    fn a_follow_up_needs_an_answer() {
        let store = store(9, usize::MAX, HOUR);
        store.insert("a", response("said"), Arc::new(vec![json!("asked")]));
        assert_eq!(store.conversation("a"), Ok(vec![json!("asked"), json!({"text": "said"})]));
        store.insert("b", json!({"status": "failed", "output": []}), Arc::default());
        assert!(store.conversation("b").is_err_and(|error| error.to_string().contains("failed")));
        assert!(store.cancel("a").is_err_and(|error| error.to_string().contains("background")));
        assert_eq!((store.remove("a"), store.remove("a").is_err()), (Ok(()), true));
    }
}
