//! Carries out what the roster decides: loads and ends engines, gives out leases, and tells who waits.

use super::error::ApiError;
use super::loader::{Known, LoadError, Loader};
use super::roster::{Level, Order, Reply, Roster, Stage, Then, Wish};
use super::seat::{Seat, lock, read, write};
use super::state::Resident;
use super::steer::Grammars;
use crate::engine::Status;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};

/// How requests under way are treated when their model goes to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Abort,
    Wait,
    /// They stand still until it wakes.
    Keep,
}

/// Who waits for a lease.
type Waiter = oneshot::Sender<Result<Lease, ApiError>>;

/// How the models are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Keeping {
    /// `--models-max`: models beside those of the command line that are here at one time; 0: any number.
    pub most: usize,
    /// A request for a model that is not here loads it.
    pub autoload: bool,
    /// A request for a model that sleeps wakes it.
    pub auto_wake: bool,
    /// Requests that may wait for one model.
    pub waiters_max: usize,
    /// How long a request waits for another's end when there is no room.
    pub patience: Duration,
}

impl Default for Keeping {
    fn default() -> Self {
        Self {
            most: 4,
            autoload: true,
            auto_wake: false,
            waiters_max: 1024,
            patience: Duration::from_secs(30),
        }
    }
}

/// All places of a server.
pub struct Keeper {
    keeping: Keeping,
    roster: Mutex<Roster<Waiter>>,
    seats: RwLock<Vec<Arc<Seat>>>,
    loader: OnceLock<Arc<dyn Loader>>,
    /// What was compiled for models that are gone is dropped with them.
    grammars: Arc<Grammars>,
    /// There may be an order to carry out.
    work: Notify,
    /// Counts changes, for those who wait for one.
    changed: watch::Sender<u64>,
}

/// A model that stays until this is dropped. Clones share it.
#[derive(Clone)]
pub struct Lease {
    resident: Resident,
    guard: Arc<Guard>,
}

struct Guard {
    keeper: Arc<Keeper>,
    place: usize,
}

impl Deref for Lease {
    type Target = Resident;

    fn deref(&self) -> &Resident {
        &self.resident
    }
}

impl Lease {
    /// The model is on its way out, and takes along who has not finished.
    pub fn is_ending(&self) -> bool {
        self.guard.keeper.stage(self.guard.place) != Stage::Ready
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(seat) = self.keeper.seat(self.place) {
            seat.touch();
        }
        self.keeper.roster().release(self.place);
        self.keeper.tell();
    }
}

/// A place in the queue. Dropping it gives the place up.
struct Wait {
    answer: oneshot::Receiver<Result<Lease, ApiError>>,
    // Behind the receiver, which must be closed when this looks.
    _withdrawal: Withdrawal,
}

struct Withdrawal {
    keeper: Arc<Keeper>,
    place: usize,
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        self.keeper.roster().retain(self.place, |waiter| !waiter.is_closed());
        self.keeper.tell();
    }
}

impl Keeper {
    pub fn new(keeping: Keeping, grammars: Arc<Grammars>) -> Arc<Self> {
        Arc::new(Self {
            roster: Mutex::new(Roster::new(keeping.most, keeping.waiters_max)),
            keeping,
            seats: RwLock::default(),
            loader: OnceLock::new(),
            grammars,
            work: Notify::new(),
            changed: watch::Sender::new(0),
        })
    }

    /// One more place: `starting` if the start of the server fills it.
    pub fn add(&self, known: Known, starting: bool) -> usize {
        let stage = if starting { Stage::Starting } else { Stage::Unloaded };
        write(&self.seats).push(Arc::new(Seat::new(known)));
        self.roster().add(stage, starting)
    }

    /// Who opens models from here on; the first stays. Needs a tokio runtime: what is ordered is carried out there.
    pub fn employ(self: &Arc<Self>, loader: Arc<dyn Loader>) {
        if self.loader.set(loader).is_ok() {
            tokio::spawn(self.clone().carry_out());
        }
    }

    /// The model of a place that the start has put there; only the first counts.
    pub fn put(&self, place: usize, resident: Resident) {
        let Some(seat) = self.seat(place) else { return };
        if !seat.fill(resident) {
            return;
        }
        self.roster().placed(place);
        self.tell();
    }

    /// Errors: nobody opens models here.
    pub fn loader(&self) -> Result<Arc<dyn Loader>, ApiError> {
        self.loader.get().cloned().ok_or(ApiError::Loading { percent: 0.0 })
    }

    pub fn len(&self) -> usize {
        read(&self.seats).len()
    }

    pub fn seat(&self, place: usize) -> Option<Arc<Seat>> {
        read(&self.seats).get(place).cloned()
    }

    pub fn seats(&self) -> Vec<Arc<Seat>> {
        read(&self.seats).clone()
    }

    pub fn stage(&self, place: usize) -> Stage {
        self.roster().stage(place)
    }

    /// Counts changes of stages and ends of leases.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A model to answer one request with, and perhaps the wait for it. `load` in place of the server's own rule.
    /// Errors: it is not here and does not come.
    pub async fn lease(self: &Arc<Self>, place: usize, load: Option<bool>) -> Result<Lease, ApiError> {
        let (waiter, answer) = oneshot::channel();
        let reply = {
            let mut roster = self.roster();
            // Read under the lock, so that nobody finds a model that dozes off and may not wake it.
            let dozes = self.seat(place).is_some_and(|seat| seat.dozes());
            let wish = Wish {
                load: load.unwrap_or(self.keeping.autoload) && self.loader.get().is_some(),
                wake: self.keeping.auto_wake || dozes,
            };
            roster.request(place, wish, waiter)
        };
        let name = || self.name(place);
        match reply {
            Reply::Leased(_) => self.leased(place).ok_or(ApiError::Loading { percent: 0.0 }),
            Reply::Woken(_) => {
                let lease = self.leased(place).ok_or(ApiError::Loading { percent: 0.0 })?;
                lease.engine.go_on();
                self.tell();
                Ok(lease)
            }
            Reply::Waiting => {
                self.tell();
                let withdrawal = Withdrawal { keeper: self.clone(), place };
                self.wait(Wait { answer, _withdrawal: withdrawal }, place).await
            }
            Reply::Starting => Err(ApiError::Loading { percent: 0.0 }),
            Reply::NotLoaded => Err(ApiError::NotLoaded(name())),
            Reply::Asleep => Err(ApiError::Asleep(name())),
            Reply::Full(limit) => Err(ApiError::Busy { limit }),
        }
    }

    async fn wait(&self, mut wait: Wait, place: usize) -> Result<Lease, ApiError> {
        loop {
            tokio::select! {
                answer = &mut wait.answer => return answer.unwrap_or(Err(ApiError::ShuttingDown)),
                () = tokio::time::sleep(self.keeping.patience) => {
                    let roster = self.roster();
                    if roster.stage(place) == Stage::Queued && roster.is_stuck() {
                        return Err(ApiError::NoRoom);
                    }
                }
            }
        }
    }

    /// The lease that the roster has counted; without a resident, which it always has then, the count is given back.
    fn leased(self: &Arc<Self>, place: usize) -> Option<Lease> {
        let guard = Arc::new(Guard { keeper: self.clone(), place });
        let resident = self.seat(place)?.resident()?;
        Some(Lease { resident, guard })
    }

    /// Brings a model here in the background; returns when it is known whether it can be. Errors: it is here already,
    /// or it cannot be opened.
    pub async fn load(self: &Arc<Self>, place: usize) -> Result<(), ApiError> {
        self.loader()?;
        let loaded = self.roster().load(place);
        loaded.map_err(|stage| {
            let state = match stage {
                Stage::Ready | Stage::Leaving(_) => "already loaded",
                Stage::Asleep(_) => "asleep: wake it",
                _ => "already loading",
            };
            ApiError::bad("model", format!("The model `{}` is {state}.", self.name(place)))
        })?;
        let mut changes = self.changes();
        self.obey();
        self.tell();
        let Some(seat) = self.seat(place) else { return Ok(()) };
        loop {
            let stage = self.stage(place);
            let is_reading = seat.is_loading();
            match stage {
                Stage::Unloaded => return seat.failure().map_or(Ok(()), Err),
                Stage::Loading if !is_reading => {}
                // It waits for others, which may take long.
                _ => return Ok(()),
            }
            if changes.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// Ends a model in the background: its requests may finish for as long as its place says. Errors: it is not here.
    pub fn unload(self: &Arc<Self>, place: usize) -> Result<(), ApiError> {
        let unloaded = if self.is_reading(place) { Err(Stage::Loading) } else { self.roster().unload(place) };
        let waiters = unloaded.map_err(|stage| {
            let state = match stage {
                Stage::Starting | Stage::Loading => "is still loading",
                _ => "is not loaded",
            };
            ApiError::bad("model", format!("The model `{}` {state}.", self.name(place)))
        })?;
        dismiss(waiters, &ApiError::NotLoaded(self.name(place)));
        if matches!(self.stage(place), Stage::Leaving(_)) {
            let grace = self.seat(place).map_or(Duration::ZERO, |seat| seat.known.stop_timeout);
            tokio::spawn(self.clone().leave(place, Some(grace)));
        }
        self.tell();
        Ok(())
    }

    /// Puts a model to sleep and returns when it does; `false` if it slept already, or is not here. Errors: 503 while
    /// it loads.
    pub async fn sleep(self: &Arc<Self>, place: usize, level: Level, mode: Mode) -> Result<bool, ApiError> {
        let slept =
            if self.is_reading(place) { Err(Stage::Loading) } else { self.roster().sleep(place, level) };
        match slept {
            Ok(()) => {}
            Err(Stage::Asleep(_) | Stage::Unloaded | Stage::Leaving(_)) => return Ok(false),
            Err(_) => return Err(ApiError::Loading { percent: 0.0 }),
        }
        if let Some(seat) = self.seat(place) {
            seat.falls_asleep(false);
        }
        self.tell();
        // It must come to its end even if whoever asked goes away.
        let falling = tokio::spawn(self.clone().fall_asleep(place, level, mode));
        falling.await.map_err(|error| ApiError::Internal(format!("Falling asleep failed: {error}")))?;
        tracing::info!("The model {} sleeps: {level:?}", self.name(place));
        Ok(true)
    }

    /// Puts models to sleep that nobody has asked for in so long; whoever asks for one again wakes it. Runs for ever;
    /// drop the future to stop.
    pub async fn doze(self: Arc<Self>, idle: Duration) {
        let mut looks =
            tokio::time::interval((idle / 4).clamp(Duration::from_millis(1), Duration::from_secs(1)));
        loop {
            looks.tick().await;
            for (place, seat) in self.seats().iter().enumerate() {
                if seat.idle_for() < idle || self.is_reading(place) {
                    continue;
                }
                let slept = {
                    let mut roster = self.roster();
                    let slept = roster.leases(place) == 0 && roster.sleep(place, Level::Offloaded).is_ok();
                    if slept {
                        seat.falls_asleep(true);
                    }
                    slept
                };
                if slept {
                    tracing::info!("The model {} sleeps: nobody has asked for it", seat.canonical());
                    tokio::spawn(self.clone().leave(place, Some(Duration::ZERO)));
                }
            }
        }
    }

    async fn fall_asleep(self: Arc<Self>, place: usize, level: Level, mode: Mode) {
        let Some(resident) = self.seat(place).and_then(|seat| seat.resident()) else { return };
        match mode {
            Mode::Abort => resident.engine.abort_all(),
            Mode::Wait => self.idle(place).await,
            Mode::Keep => {}
        }
        if level.keeps_memory() {
            resident.engine.halt();
            self.roster().ended(place);
            self.tell();
        } else {
            self.leave(place, Some(Duration::ZERO)).await;
        }
    }

    /// Wakes a model and returns when it is awake; `false` if it did not sleep. Errors: it cannot be loaded.
    pub async fn wake(self: &Arc<Self>, place: usize) -> Result<bool, ApiError> {
        let woken = self.roster().wake(place);
        if woken.is_err() {
            return Ok(false);
        }
        if let Some(resident) = self.seat(place).and_then(|seat| seat.resident()) {
            resident.engine.go_on();
        }
        self.tell();
        self.lease(place, Some(true)).await?;
        tracing::info!("The model {} is awake", self.name(place));
        Ok(true)
    }

    /// Nobody who waits will be served.
    pub fn close(&self) {
        let waiters = self.roster().dismissed();
        dismiss(waiters, &ApiError::ShuttingDown);
    }

    fn name(&self, place: usize) -> String {
        self.seat(place).map_or_else(String::new, |seat| seat.canonical().to_owned())
    }

    fn roster(&self) -> MutexGuard<'_, Roster<Waiter>> {
        lock(&self.roster)
    }

    /// Something has changed: there may be work, and somebody may wait for this.
    fn tell(&self) {
        self.work.notify_one();
        self.changed.send_modify(|count| *count += 1);
    }

    /// Until nobody has a lease of the place.
    async fn idle(&self, place: usize) {
        let mut changes = self.changes();
        while self.roster().leases(place) > 0 {
            // The sender lives in `self`, so waiting cannot fail.
            let _ = changes.changed().await;
        }
    }

    /// Carries out orders for as long as the server lives.
    async fn carry_out(self: Arc<Self>) {
        loop {
            self.obey();
            self.work.notified().await;
        }
    }

    fn obey(self: &Arc<Self>) {
        loop {
            let order = self.roster().next();
            match order {
                Some(Order::Load(place)) => drop(tokio::spawn(self.clone().bring(place))),
                Some(Order::Unload(place)) => {
                    tracing::info!("The model {} makes room", self.name(place));
                    drop(tokio::spawn(self.clone().leave(place, None)));
                }
                None => return,
            }
        }
    }

    /// The start has put a model there whose weights are not read yet.
    fn is_reading(&self, place: usize) -> bool {
        let resident = self.seat(place).and_then(|seat| seat.resident());
        resident.is_some_and(|resident| matches!(resident.engine.status(), Status::Loading { .. }))
    }

    /// Loads a model to its end, good or bad.
    async fn bring(self: Arc<Self>, place: usize) {
        let (Some(loader), Some(seat)) = (self.loader.get().cloned(), self.seat(place)) else { return };
        seat.set_failure(None);
        let opener = loader.clone();
        let opened = tokio::task::spawn_blocking(move || opener.start(place)).await;
        let opened =
            opened.unwrap_or_else(|error| Err(LoadError::Failed(format!("opening it failed: {error}"))));
        let error = match opened {
            Ok(resident) => match self.reads(&seat, &resident).await {
                Ok(()) => return self.arrived(place, &seat, resident),
                Err(error) => {
                    loader.ended(place);
                    error
                }
            },
            Err(LoadError::NoRoom(words)) => {
                tracing::info!("The model {} waits for room: {words}", seat.canonical());
                self.roster().short(place);
                return self.tell();
            }
            Err(LoadError::NeverFits(words)) => ApiError::DoesNotFit(words),
            Err(LoadError::Failed(words)) => ApiError::LoadFailed(words),
        };
        tracing::error!("The model {} could not be loaded: {error}", seat.canonical());
        seat.set_failure(Some(error.clone()));
        let waiters = self.roster().failed(place);
        self.tell();
        dismiss(waiters, &error);
    }

    /// Waits until a model's weights are read. Errors: why they are not.
    async fn reads(&self, seat: &Seat, resident: &Resident) -> Result<(), ApiError> {
        seat.set_loading(Some(resident.engine.clone()));
        self.tell();
        resident.engine.loaded().await;
        seat.set_loading(None);
        match resident.engine.status() {
            Status::Ready => Ok(()),
            Status::Dead(reason) => Err(ApiError::LoadFailed(reason)),
            Status::Draining | Status::Loading { .. } => Err(ApiError::ShuttingDown),
        }
    }

    fn arrived(self: &Arc<Self>, place: usize, seat: &Seat, resident: Resident) {
        super::steer::warm(&self.grammars, &resident);
        seat.fill(resident);
        tracing::info!("The model {} is loaded", seat.canonical());
        let waiters = self.roster().loaded(place);
        self.tell();
        for waiter in waiters {
            let lease = self.leased(place).ok_or(ApiError::Loading { percent: 100.0 });
            // Whoever has left gives the lease back by this.
            drop(waiter.send(lease));
        }
    }

    /// Ends the model of a place when its leases are given back, or after `grace`; then nothing of it is left.
    async fn leave(self: Arc<Self>, place: usize, grace: Option<Duration>) {
        let Some(seat) = self.seat(place) else { return };
        match grace {
            None => self.idle(place).await,
            Some(grace) => drop(tokio::time::timeout(grace, self.idle(place)).await),
        }
        if let Some(resident) = seat.resident() {
            resident.engine.shutdown(Duration::ZERO).await;
            // Longer than that only if a step does not end: then its memory is not free either.
            resident.engine.ended().await;
            self.grammars.forget(&resident.text);
            seat.clear();
        }
        if let Some(loader) = self.loader.get() {
            loader.ended(place);
        }
        if self.stage(place) == Stage::Leaving(Then::Unloaded) {
            tracing::info!("The model {} is unloaded", seat.canonical());
        }
        self.roster().ended(place);
        self.tell();
    }
}

fn dismiss(waiters: Vec<Waiter>, error: &ApiError) {
    for waiter in waiters {
        // Whoever has left needs no answer.
        drop(waiter.send(Err(error.clone())));
    }
}
