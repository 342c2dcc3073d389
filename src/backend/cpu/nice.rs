//! Threads that give way: on Linux each thread has a priority of its own.

/// Lowers the priority of the calling thread by `steps`; what the system refuses stays as it was, because a thread
/// that does not give way is still right.
#[cfg(target_os = "linux")]
pub fn give_way(steps: i32) {
    if steps > 0 {
        // SAFETY: both calls only read and set a number of the calling thread (0), and have no preconditions.
        unsafe {
            let now = libc::getpriority(libc::PRIO_PROCESS, 0);
            libc::setpriority(libc::PRIO_PROCESS, 0, now + steps);
        }
    }
}

/// Elsewhere a priority belongs to the whole process, which would slow the one in front as well.
#[cfg(not(target_os = "linux"))]
pub fn give_way(_steps: i32) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use crate::backend::{Backend, Precision, cpu::Cpu};
    use std::sync::Mutex;

    fn priority() -> i32 {
        // SAFETY: reads a number of the calling thread and has no preconditions.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    /// Of the thread that computes and its helper, as a step finds them.
    fn priorities(make: impl FnOnce() -> Cpu + Send) -> [i32; 2] {
        // On a thread of its own, for it will give way.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let mut cpu = make();
                let seen = Mutex::new([None; 2]);
                cpu.run(|cpu| {
                    while seen.lock().is_ok_and(|seen| seen.iter().any(Option::is_none)) {
                        cpu.crew.team.share(&|worker| {
                            if let Ok(mut seen) = seen.lock() {
                                seen[worker] = Some(priority());
                            }
                        });
                    }
                });
                seen.into_inner().expect("nobody panicked").map(|seen| seen.expect("both came"))
            });
            thread.join().expect("the thread did not panic")
        })
    }

    #[test]
    fn only_the_threads_of_the_one_behind_give_way() {
        let ours = priority();
        let front = priorities(|| Cpu::new(Precision::F32, 2).expect("two threads"));
        let behind = priorities(|| Cpu::giving_way(Precision::F32, 2, 10).expect("two threads"));
        assert_eq!(front, [ours; 2]);
        assert_eq!(behind, [(ours + 10).min(19); 2]);
        assert_eq!(priority(), ours);
    }
}
