//! The threads of one step: they come once, at its beginning, and then wait for work without sleeping.
//!
//! A step has some hundred operations of a few microseconds each; waking a thread takes longer than most of them.
//!
//! ```text
//! team.gather(&pool, || {                       // the leader, on a thread of the pool; the others come to help
//!     team.share(&|worker| { … });              // runs on the leader, and on every helper that is free by then
//!     …
//! });
//! ```

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// What helpers run: told which of the threads it is, 0 for the leader.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// Looks for work before a helper lets others have its core: about as long as the longest serial part of a step.
const LOOKS: u32 = 2000;

/// How the threads of a step meet.
#[derive(Default)]
pub struct Team {
    /// Odd while there is work; each work has its own number.
    turn: AtomicU32,
    /// Helpers that may be looking at `work`.
    inside: AtomicU32,
    /// The step is over.
    ended: AtomicBool,
    /// A helper's work panicked.
    broken: AtomicBool,
    work: UnsafeCell<Option<*const Work<'static>>>,
}

// SAFETY: `work` is written by the leader while no helper is inside and none can come in, and read by helpers that are
// inside while the turn is theirs; everything else is atomic.
unsafe impl Sync for Team {}
// SAFETY: the pointer in `work` is only followed during `share`, which its target outlives.
unsafe impl Send for Team {}

impl Team {
    /// Runs `step` on a thread of the pool while its other threads help.
    pub fn gather<R: Send>(&self, pool: &rayon::ThreadPool, step: impl FnOnce() -> R + Send) -> R {
        let helpers = pool.current_num_threads() - 1;
        if helpers == 0 {
            return pool.install(step);
        }
        self.ended.store(false, SeqCst);
        let lead = || {
            // Whatever becomes of the step, the helpers are sent home.
            let _end = Defer(|| self.ended.store(true, SeqCst));
            step()
        };
        pool.install(|| rayon::join(lead, || self.help_all(helpers)).0)
    }

    /// Runs `work` on the calling thread, which leads, and on all helpers that come before it is done. It must divide
    /// itself: each thread takes pieces until there are none.
    pub fn share(&self, work: &Work<'_>) {
        // SAFETY: only the lifetime is changed; nobody follows the pointer after this function, which waits for all
        // who are inside, and `work` outlives it.
        let work_static: *const Work<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(work)) };
        // SAFETY: the turn is even and nobody is inside, so no helper reads it.
        unsafe { *self.work.get() = Some(work_static) };
        let turn = self.turn.fetch_add(1, SeqCst) + 1;
        {
            // Also when `work` panics here: a helper must not go on with what is being unwound.
            let _close = Defer(|| {
                self.turn.store(turn.wrapping_add(1), SeqCst);
                while self.inside.load(SeqCst) > 0 {
                    std::hint::spin_loop();
                }
            });
            work(0);
        }
        assert!(!self.broken.swap(false, SeqCst), "a compute thread panicked");
    }

    /// The helpers `1 ..= count`, each on a thread of its own if the pool has one to spare.
    fn help_all(&self, count: usize) {
        if count > 1 {
            rayon::join(|| self.help(count), || self.help_all(count - 1));
        } else {
            self.help(count);
        }
    }

    fn help(&self, worker: usize) {
        let (mut done, mut looks) = (0, 0);
        while !self.ended.load(SeqCst) {
            let turn = self.turn.load(SeqCst);
            if turn % 2 == 1 && turn != done {
                self.enter(turn, worker);
                (done, looks) = (turn, 0);
            } else if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                looks = 0;
                std::thread::yield_now();
            }
        }
    }

    fn enter(&self, turn: u32, worker: usize) {
        self.inside.fetch_add(1, SeqCst);
        // The leader closes the turn before it looks who is inside; so if the turn is still open here, it will see us.
        if self.turn.load(SeqCst) == turn {
            // SAFETY: the leader wrote it before it opened the turn, and waits for us before it changes or leaves it.
            let work = unsafe { (*self.work.get()).map(|work| &*work) };
            if let Some(work) = work
                && catch_unwind(AssertUnwindSafe(|| work(worker))).is_err()
            {
                self.broken.store(true, SeqCst);
            }
        }
        self.inside.fetch_sub(1, SeqCst);
    }
}

/// Runs when it is dropped.
struct Defer<F: FnMut()>(F);

impl<F: FnMut()> Drop for Defer<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start")
    }

    /// Many small works one after the other: each piece is done once, by whomever.
    #[test]
    fn every_piece_is_done_once() {
        for threads in [1, 2, 3, 5] {
            let (team, pool) = (Team::default(), pool(threads));
            for _ in 0..20 {
                let total = team.gather(&pool, || {
                    let total = AtomicUsize::new(0);
                    for _ in 0..300 {
                        let (next, seen) = (AtomicUsize::new(0), AtomicUsize::new(0));
                        team.share(&|worker| {
                            assert!(worker < threads);
                            while next.fetch_add(1, SeqCst) < 7 {
                                seen.fetch_add(1, SeqCst);
                            }
                        });
                        assert_eq!(seen.load(SeqCst), 7);
                        total.fetch_add(7, SeqCst);
                    }
                    total.into_inner()
                });
                assert_eq!(total, 2100);
            }
        }
    }

    #[test]
    fn without_helpers_the_leader_does_it_all() {
        let (team, calls) = (Team::default(), AtomicUsize::new(0));
        team.share(&|worker| {
            assert_eq!(worker, 0);
            calls.fetch_add(1, SeqCst);
        });
        assert_eq!(calls.into_inner(), 1);
    }

    #[test]
    fn a_panic_of_anyone_reaches_the_caller_and_the_team_goes_on() {
        let (team, pool) = (Team::default(), pool(2));
        for who in [0, 1] {
            let failed = catch_unwind(AssertUnwindSafe(|| {
                team.gather(&pool, || {
                    // Until the one who is to fail has come.
                    loop {
                        team.share(&|worker| assert_ne!(worker, who, "as the test wants it"));
                    }
                })
            }));
            assert!(failed.is_err(), "worker {who}");
            assert_eq!(team.gather(&pool, || 5), 5);
        }
    }
}
