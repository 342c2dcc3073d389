//! The compute threads of one backend: the caller leads, the others wait for work without sleeping while a step lasts.
//!
//! A step has some hundred operations of a few microseconds each; waking a thread takes longer than most of them. So the
//! helpers are woken once per step, look for work until it is over, and a little longer, for the next is often near.
//!
//! ```text
//! let team = Team::new(threads, 0)?;
//! team.gather(|| {                              // the helpers come
//!     team.share(&|worker| { … });              // runs on the caller, and on every helper that is there by then
//!     …
//! });
//! ```

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread::JoinHandle;

use super::nice;

/// What helpers run: told which of the threads it is, 0 for the caller.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// Looks for work during a step before a helper lets others have its core: about as long as the longest serial part of
/// a step.
const LOOKS: u32 = 2000;

/// Looks after a step before a helper sleeps: as long as sampling and planning take.
const LOOKS_BETWEEN: u32 = 8000;

/// See the module. Dropping it ends the helpers.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

/// How the threads meet.
#[derive(Default)]
struct Shared {
    /// Odd while there is work; each work has its own number.
    turn: AtomicU32,
    /// Helpers that may be looking at `work`.
    inside: AtomicU32,
    /// A step is under way.
    stepping: AtomicBool,
    /// Helpers sleep, or are about to.
    asleep: AtomicU32,
    /// There will be no more steps.
    ended: AtomicBool,
    /// A helper's work panicked.
    broken: AtomicBool,
    work: UnsafeCell<Option<*const Work<'static>>>,
}

// SAFETY: `work` is written by the leader while no helper is inside and none can come in, and read by helpers that are
// inside while the turn is theirs; everything else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `work` is only followed during `share`, which its target outlives.
unsafe impl Send for Shared {}

impl Team {
    /// `threads` in all, the caller among them; the helpers run `nice` steps below the priority of the process.
    /// Errors: the system has no more threads.
    pub fn new(threads: usize, nice: i32) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut team = Self { shared, helpers: Vec::new() };
        for worker in 1..threads {
            let shared = team.shared.clone();
            let thread = std::thread::Builder::new().name(format!("compute-{worker}"));
            let helper = thread.spawn(move || {
                nice::give_way(nice);
                shared.help(worker);
            })?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Threads in all.
    pub fn threads(&self) -> usize {
        1 + self.helpers.len()
    }

    /// Runs `step`, during which the helpers are awake.
    pub fn gather<R>(&self, step: impl FnOnce() -> R) -> R {
        let shared = &*self.shared;
        shared.stepping.store(true, SeqCst);
        if shared.asleep.load(SeqCst) > 0 {
            self.helpers.iter().for_each(|helper| helper.thread().unpark());
        }
        // Whatever becomes of the step, the helpers may rest.
        let _end = Defer(|| shared.stepping.store(false, SeqCst));
        step()
    }

    /// Runs `work` on the calling thread and on all helpers that come before it is done. It must divide itself: each
    /// thread takes pieces until there are none.
    pub fn share(&self, work: &Work<'_>) {
        self.shared.share(work);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper's panics were caught and told where they happened.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn share(&self, work: &Work<'_>) {
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

    fn help(&self, worker: usize) {
        let (mut done, mut looks) = (0, 0);
        while !self.ended.load(SeqCst) {
            let turn = self.turn.load(SeqCst);
            if turn % 2 == 1 && turn != done {
                self.enter(turn, worker);
                (done, looks) = (turn, 0);
                continue;
            }
            looks += 1;
            std::hint::spin_loop();
            if self.stepping.load(SeqCst) {
                if looks >= LOOKS {
                    looks = 0;
                    std::thread::yield_now();
                }
            } else if looks >= LOOKS_BETWEEN {
                looks = 0;
                self.sleep();
            }
        }
    }

    /// Until a step begins, or there will be none. Sleeping is announced before the last look, so that whoever begins a
    /// step either is seen here or sees it.
    fn sleep(&self) {
        self.asleep.fetch_add(1, SeqCst);
        while !self.stepping.load(SeqCst) && !self.ended.load(SeqCst) {
            std::thread::park();
        }
        self.asleep.fetch_sub(1, SeqCst);
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
    use std::time::{Duration, Instant};

    /// Long enough for a machine that does much else; nobody waits for it when all is well.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Waits until `done` says so. Panics if it never does, so that a helper that stays away is a test that fails.
    fn until(mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain");
            std::thread::yield_now();
        }
    }

    fn team(threads: usize) -> Team {
        Team::new(threads, 0).expect("threads start")
    }

    /// Many small works one after the other: each piece is done once, by whomever.
    #[test]
    fn every_piece_is_done_once() {
        for threads in [1, 2, 3, 5] {
            let team = team(threads);
            for _ in 0..20 {
                let total = team.gather(|| {
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
    fn helpers_that_slept_come_again() {
        let team = team(2);
        for _ in 0..3 {
            until(|| team.shared.asleep.load(SeqCst) > 0);
            let came = AtomicBool::new(false);
            team.gather(|| {
                team.share(&|worker| match worker {
                    // The turn stays open: on a busy machine the two may never run at the same time.
                    0 => until(|| came.load(SeqCst)),
                    _ => came.store(true, SeqCst),
                });
            });
        }
    }

    /// The leader goes on, or is unwound, when nobody works any more at what it shared.
    #[test]
    fn whoever_came_is_waited_for() {
        let team = team(2);
        for fails in [false, true] {
            let (came, left) = (AtomicBool::new(false), AtomicBool::new(false));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.gather(|| {
                    team.share(&|worker| {
                        if worker == 1 {
                            came.store(true, SeqCst);
                            // So long that a leader that does not wait is gone by then.
                            std::thread::sleep(Duration::from_millis(20));
                            return left.store(true, SeqCst);
                        }
                        until(|| came.load(SeqCst));
                        if fails {
                            // Without the message of a panic, which would take as long as the helper.
                            std::panic::resume_unwind(Box::new(()));
                        }
                    })
                })
            }));
            assert_eq!((left.load(SeqCst), outcome.is_err()), (true, fails));
        }
    }

    #[test]
    fn outside_a_step_the_caller_may_do_it_all() {
        let (team, calls) = (team(1), AtomicUsize::new(0));
        team.share(&|worker| {
            assert_eq!(worker, 0);
            calls.fetch_add(1, SeqCst);
        });
        assert_eq!(calls.into_inner(), 1);
    }

    #[test]
    fn a_panic_of_anyone_reaches_the_caller_and_the_team_goes_on() {
        let team = team(2);
        for (who, words) in [(0, "as the test wants it"), (1, "a compute thread panicked")] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.gather(|| {
                    let came = AtomicBool::new(false);
                    team.share(&|worker| {
                        came.fetch_or(worker == 1, SeqCst);
                        assert!(worker != who, "as the test wants it");
                        until(|| came.load(SeqCst));
                    })
                })
            }));
            let panic = outcome.expect_err("somebody fails");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&words), "worker {who}");
            assert_eq!(team.gather(|| 5), 5);
        }
    }
}
