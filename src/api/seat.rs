//! A place of the server and who is in it.

use super::error::ApiError;
use super::loader::Known;
use super::model::ModelInfo;
use super::state::Resident;
use crate::engine::{self, Status};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// Read by every handler; set by the keeper alone.
pub struct Seat {
    pub known: Known,
    /// The model that answers.
    resident: RwLock<Option<Resident>>,
    /// The engine that reads its weights.
    loading: Mutex<Option<engine::Handle>>,
    /// What was known of the model when it was last here.
    model: RwLock<Option<Arc<ModelInfo>>>,
    failure: Mutex<Option<ApiError>>,
    /// Parts that somebody has asked to wake: weights, caches.
    asked: Mutex<[bool; 2]>,
    /// It fell asleep because nobody asked for it; whoever asks wakes it.
    dozes: AtomicBool,
    /// When a request for it last began or ended.
    used: Mutex<Instant>,
}

impl Seat {
    /// Empty.
    pub fn new(known: Known) -> Self {
        Self {
            model: RwLock::new(known.model.clone().map(Arc::new)),
            known,
            resident: RwLock::default(),
            loading: Mutex::default(),
            failure: Mutex::default(),
            asked: Mutex::default(),
            dozes: AtomicBool::new(false),
            used: Mutex::new(Instant::now()),
        }
    }

    /// The model is here; false if one is already.
    pub fn fill(&self, resident: Resident) -> bool {
        let mut there = write(&self.resident);
        if there.is_some() {
            return false;
        }
        *write(&self.model) = Some(resident.model.clone());
        *there = Some(resident);
        self.touch();
        true
    }

    /// Nobody is here.
    pub fn clear(&self) {
        *write(&self.resident) = None;
    }

    /// The engine that reads its weights now.
    pub fn set_loading(&self, engine: Option<engine::Handle>) {
        *lock(&self.loading) = engine;
    }

    pub fn is_loading(&self) -> bool {
        lock(&self.loading).is_some()
    }

    pub fn set_failure(&self, failure: Option<ApiError>) {
        *lock(&self.failure) = failure;
    }

    /// A request for it begins or ends.
    pub fn touch(&self) {
        *lock(&self.used) = Instant::now();
    }

    pub fn idle_for(&self) -> Duration {
        lock(&self.used).elapsed()
    }

    /// It falls asleep; by itself, if it `dozes`.
    pub fn falls_asleep(&self, dozes: bool) {
        *lock(&self.asked) = [false; 2];
        self.dozes.store(dozes, Ordering::Release);
    }

    pub fn dozes(&self) -> bool {
        self.dozes.load(Ordering::Acquire)
    }

    pub fn resident(&self) -> Option<Resident> {
        read(&self.resident).clone()
    }

    /// What is or was known of the model.
    pub fn model(&self) -> Option<Arc<ModelInfo>> {
        read(&self.model).clone()
    }

    /// Why it could not be loaded, the last time somebody tried.
    pub fn failure(&self) -> Option<ApiError> {
        lock(&self.failure).clone()
    }

    /// Share of the weights that is read, 0 to 1, while they are.
    pub fn progress(&self) -> Option<f32> {
        match lock(&self.loading).as_ref()?.status() {
            Status::Loading { progress } => Some(progress),
            _ => None,
        }
    }

    /// Parts are wanted awake; whether now all of them are.
    pub fn ask(&self, parts: [bool; 2]) -> bool {
        let mut asked = lock(&self.asked);
        asked.iter_mut().zip(parts).for_each(|(asked, part)| *asked |= part);
        let all = asked.iter().all(|asked| *asked);
        if all {
            *asked = [false; 2];
        }
        all
    }

    pub fn canonical(&self) -> &str {
        self.known.names.first().map_or("", String::as_str)
    }
}

// A panic under one of these locks leaves whole values behind: each is set in one go.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
