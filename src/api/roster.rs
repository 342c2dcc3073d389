//! Who is here and who comes next: the places of a server's models as a pure state machine, without clock or I/O.
//!
//! ```text
//!             request, load                next: Load              loaded
//!  unloaded ────────────────▶ queued ─────────────────▶ loading ──────────▶ ready ◀──── wake ──── asleep(0)
//!     ▲  ▲                      ▲ └◀───── short ──────────┘ │               │  ▲                     ▲
//!     │  └──────────────────────┼──────────── failed ───────┘               ▼  └── wake (1, 2): queued │
//!     └──────── ended ──────────┴─ (somebody waits) ─────────────────── leaving ─────── ended ───────┘
//! ```
//!
//! Who asks for a model holds a *lease* of its place until the answer is out, or waits in the place's queue for one. A
//! place that is leased, or that loads, is never chosen to make room. What a caller writes:
//!
//! ```text
//! match roster.request(place, wish, waiter) { … }      // leased, waiting, or why not
//! while let Some(order) = roster.next() { … }          // load this one, end that one; then say what came of it:
//! for waiter in roster.loaded(place) { … }             // each of them has a lease now
//! ```

use std::mem;

/// Where a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Of the command line; the start has not come to it.
    Starting,
    Unloaded,
    /// Wanted; loads when it is its turn and there is room.
    Queued,
    Loading,
    Ready,
    /// Takes no more requests, and goes when the last one is out or was told.
    Leaving(Then),
    Asleep(Level),
}

/// What a place is when it has been left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Unloaded,
    Asleep(Level),
}

/// How deep a model sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// It keeps all it has and runs no step.
    Paused,
    /// Its caches are dropped; its weights are where they load from quickly.
    Offloaded,
    /// All is dropped.
    Discarded,
}

impl Level {
    /// Whether weights and caches stay in memory.
    pub fn keeps_memory(self) -> bool {
        self == Self::Paused
    }
}

/// What a request is willing to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// The load of a model that is not here.
    pub load: bool,
    /// The waking of one that sleeps.
    pub wake: bool,
}

/// What a request gets. A waiter that is not taken is given back.
#[derive(Debug, PartialEq)]
pub enum Reply<W> {
    Leased(W),
    /// The same, and its engine must be told to go on.
    Woken(W),
    Waiting,
    Starting,
    NotLoaded,
    Asleep,
    /// So many wait already.
    Full(usize),
}

/// What shall be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Followed by `loaded`, `short` or `failed`.
    Load(usize),
    /// Followed by `ended`.
    Unload(usize),
}

#[derive(Debug)]
struct Place<W> {
    stage: Stage,
    /// Of the command line: never chosen to make room, and not counted.
    pinned: bool,
    /// Requests under way.
    leases: usize,
    waiters: Vec<W>,
    /// Somebody wants it here who does not wait.
    wanted: bool,
    /// There was too little memory at the last try, and nothing has gone since.
    short: bool,
    /// The clock when it was queued.
    queued: u64,
    /// The clock when a lease of it began or ended.
    used: u64,
}

/// All places. `W` is somebody who waits for a lease.
#[derive(Debug)]
pub struct Roster<W> {
    places: Vec<Place<W>>,
    /// Places beside the pinned ones that may be here at one time; 0: any number.
    most: usize,
    /// Waiters of one place.
    waiters_max: usize,
    /// Counts what happens.
    clock: u64,
}

impl<W> Roster<W> {
    pub fn new(most: usize, waiters_max: usize) -> Self {
        Self { places: Vec::new(), most, waiters_max, clock: 0 }
    }

    /// One more place, behind all others.
    pub fn add(&mut self, stage: Stage, pinned: bool) -> usize {
        self.places.push(Place {
            stage,
            pinned,
            leases: 0,
            waiters: Vec::new(),
            wanted: false,
            short: false,
            queued: 0,
            used: 0,
        });
        self.places.len() - 1
    }

    pub fn stage(&self, place: usize) -> Stage {
        self.places[place].stage
    }

    /// Requests under way.
    pub fn leases(&self, place: usize) -> usize {
        self.places[place].leases
    }

    /// The model is here without having been asked for: the start put it there.
    pub fn placed(&mut self, place: usize) {
        self.places[place].stage = Stage::Ready;
    }

    /// Somebody wants an answer of the model.
    pub fn request(&mut self, place: usize, wish: Wish, waiter: W) -> Reply<W> {
        let waiters_max = self.waiters_max;
        let now = self.tick();
        let at = &mut self.places[place];
        match at.stage {
            Stage::Ready => {
                at.leases += 1;
                at.used = now;
                return Reply::Leased(waiter);
            }
            Stage::Asleep(level) if wish.wake && level.keeps_memory() => {
                at.stage = Stage::Ready;
                at.leases += 1;
                at.used = now;
                return Reply::Woken(waiter);
            }
            Stage::Starting => return Reply::Starting,
            Stage::Leaving(Then::Asleep(level)) if level.keeps_memory() => return Reply::Asleep,
            Stage::Leaving(Then::Asleep(_)) | Stage::Asleep(_) if !wish.wake => return Reply::Asleep,
            Stage::Unloaded | Stage::Leaving(Then::Unloaded) if !wish.load => return Reply::NotLoaded,
            _ => {}
        }
        if at.waiters.len() >= waiters_max {
            return Reply::Full(waiters_max);
        }
        at.waiters.push(waiter);
        if matches!(at.stage, Stage::Unloaded | Stage::Asleep(_)) {
            at.enqueue(now);
        }
        Reply::Waiting
    }

    /// The answer to a lease is out, or nobody wants it any more.
    pub fn release(&mut self, place: usize) {
        let now = self.tick();
        let at = &mut self.places[place];
        at.leases =
            at.leases.checked_sub(1).expect("a lease is given back once, by the guard it was given to");
        at.used = now;
    }

    /// Waiters that `keep` does not want have left.
    pub fn retain(&mut self, place: usize, keep: impl FnMut(&W) -> bool) {
        let at = &mut self.places[place];
        at.waiters.retain(keep);
        if at.stage == Stage::Queued && at.waiters.is_empty() && !at.wanted {
            at.stage = Stage::Unloaded;
        }
    }

    /// Somebody wants the model here. Errors: where it is already, or is on its way to.
    pub fn load(&mut self, place: usize) -> Result<(), Stage> {
        let now = self.tick();
        let at = &mut self.places[place];
        match at.stage {
            Stage::Unloaded => at.enqueue(now),
            Stage::Leaving(Then::Unloaded) => {}
            stage => return Err(stage),
        }
        at.wanted = true;
        Ok(())
    }

    /// Somebody wants the model to go; its waiters, who will not be served. Leases are waited for by the caller, who
    /// says [`Self::ended`]. Errors: where it is instead.
    pub fn unload(&mut self, place: usize) -> Result<Vec<W>, Stage> {
        let at = &mut self.places[place];
        at.stage = match at.stage {
            Stage::Ready => Stage::Leaving(Then::Unloaded),
            Stage::Queued => Stage::Unloaded,
            Stage::Asleep(level) if level.keeps_memory() => Stage::Leaving(Then::Unloaded),
            Stage::Asleep(_) => Stage::Unloaded,
            stage => return Err(stage),
        };
        at.wanted = false;
        Ok(mem::take(&mut at.waiters))
    }

    /// Somebody wants the model to sleep; the caller says [`Self::ended`] when it does. Errors: where it is instead.
    pub fn sleep(&mut self, place: usize, level: Level) -> Result<(), Stage> {
        let at = &mut self.places[place];
        if at.stage != Stage::Ready {
            return Err(at.stage);
        }
        at.stage = Stage::Leaving(Then::Asleep(level));
        Ok(())
    }

    /// Somebody wants the model awake: it is at once if it kept what it had, else it is queued. Errors: where it is
    /// instead.
    pub fn wake(&mut self, place: usize) -> Result<(), Stage> {
        let now = self.tick();
        let at = &mut self.places[place];
        match at.stage {
            Stage::Asleep(level) if level.keeps_memory() => at.stage = Stage::Ready,
            Stage::Asleep(_) => {
                at.enqueue(now);
                at.wanted = true;
            }
            stage => return Err(stage),
        }
        Ok(())
    }

    /// What to do now; `None` until something else has happened. One loads at a time, in the order of asking; who
    /// can only wait for the end of somebody's request lets those behind pass.
    pub fn next(&mut self) -> Option<Order> {
        if self.places.iter().any(|at| at.stage == Stage::Loading) {
            return None;
        }
        let leaves = self.places.iter().any(|at| matches!(at.stage, Stage::Leaving(_)));
        let is_full = self.most > 0 && self.count() >= self.most;
        let victim = self.victim();
        let queued = |place: &usize| self.places[*place].stage == Stage::Queued;
        let mut queue: Vec<usize> = (0..self.places.len()).filter(queued).collect();
        queue.sort_by_key(|place| self.places[*place].queued);
        for place in queue {
            let at = &mut self.places[place];
            if !at.short && (at.pinned || !is_full) {
                at.stage = Stage::Loading;
                return Some(Order::Load(place));
            }
            // Room is on its way already.
            if leaves {
                return None;
            }
            if let Some(victim) = victim {
                self.places[victim].stage = Stage::Leaving(Then::Unloaded);
                return Some(Order::Unload(victim));
            }
        }
        None
    }

    /// Nothing that is under way will bring the next one of the queue its turn: only the end of somebody's request.
    pub fn is_stuck(&self) -> bool {
        let moves = |at: &Place<W>| matches!(at.stage, Stage::Loading | Stage::Leaving(_));
        !self.places.iter().any(moves)
    }

    /// The model is here; its waiters, each of whom has a lease now.
    pub fn loaded(&mut self, place: usize) -> Vec<W> {
        let now = self.tick();
        let at = &mut self.places[place];
        at.stage = Stage::Ready;
        at.wanted = false;
        at.used = now;
        at.leases += at.waiters.len();
        mem::take(&mut at.waiters)
    }

    /// There is too little memory for it now; others may go.
    pub fn short(&mut self, place: usize) {
        let at = &mut self.places[place];
        (at.stage, at.short) = (Stage::Queued, true);
        if at.waiters.is_empty() && !at.wanted {
            at.stage = Stage::Unloaded;
        }
    }

    /// It cannot be loaded; its waiters, who will not be served.
    pub fn failed(&mut self, place: usize) -> Vec<W> {
        let at = &mut self.places[place];
        at.stage = Stage::Unloaded;
        at.wanted = false;
        mem::take(&mut at.waiters)
    }

    /// What was leaving has left, and its memory is free.
    pub fn ended(&mut self, place: usize) {
        let now = self.tick();
        self.places.iter_mut().for_each(|at| at.short = false);
        let at = &mut self.places[place];
        at.stage = match at.stage {
            Stage::Leaving(Then::Asleep(level)) => Stage::Asleep(level),
            _ => Stage::Unloaded,
        };
        // Whoever asked while it was leaving wants it back.
        if at.wanted || !at.waiters.is_empty() {
            at.enqueue(now);
        }
    }

    /// Everybody who waits, none of whom will be served.
    pub fn dismissed(&mut self) -> Vec<W> {
        self.places.iter_mut().flat_map(|at| mem::take(&mut at.waiters)).collect()
    }

    /// Places that `most` counts: those that hold memory or are about to.
    fn count(&self) -> usize {
        let counts = |at: &&Place<W>| !at.pinned && at.holds_memory();
        self.places.iter().filter(counts).count()
    }

    /// Whose place is needed least: idle, and for the longest time.
    fn victim(&self) -> Option<usize> {
        let idle = |at: &Place<W>| at.stage == Stage::Ready && at.leases == 0 && !at.pinned;
        let idle = self.places.iter().enumerate().filter(|(_, at)| idle(at));
        idle.min_by_key(|(_, at)| at.used).map(|(place, _)| place)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

impl<W> Place<W> {
    fn enqueue(&mut self, now: u64) {
        self.stage = Stage::Queued;
        self.queued = now;
        self.short = false;
    }

    fn holds_memory(&self) -> bool {
        match self.stage {
            Stage::Starting | Stage::Loading | Stage::Ready | Stage::Leaving(_) => true,
            Stage::Asleep(level) => level.keeps_memory(),
            Stage::Unloaded | Stage::Queued => false,
        }
    }
}

#[cfg(test)]
mod tests;
