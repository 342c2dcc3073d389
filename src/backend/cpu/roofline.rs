//! What this machine can do at most: bytes read from memory, and multiply-adds of each unit. Every bench gives its
//! figures as shares of these.
//!
//! ```no_run
//! use ferrotron::backend::cpu::roofline;
//! let memory = roofline::read_bandwidth(2)?;              // bytes per second of two threads
//! let compute = roofline::peak(2)?;                       // of the fastest unit there is
//! println!("{} GB/s, {} {} GFLOP/s", memory / 1e9, compute.unit.name(), compute.flops / 1e9);
//! # Ok::<(), std::io::Error>(())
//! ```

#[cfg(target_arch = "aarch64")]
#[path = "roofline/aarch64.rs"]
mod arch;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "roofline/portable.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "roofline/x86.rs"]
mod arch;
mod memory;

use std::io;
use std::sync::{Barrier, OnceLock};
use std::time::{Duration, Instant};

/// Runs of each measurement; the best one is the ceiling, for whatever disturbs a run only makes it slower.
const RUNS: usize = 7;

/// How long one run of multiply-adds takes at least: long against the threads' start and the clock's grain.
const RUN: Duration = Duration::from_millis(20);

/// Multiply-adds in a fixed number of rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// f32 multiply-adds of the widest vectors
    F32,
    /// BF16 pairs into f32 sums: `vdpbf16ps`, `bfmmla`
    Bf16Dot,
    /// BF16 tiles: AMX
    Bf16Tile,
}

impl Unit {
    /// Those that this machine has.
    pub fn available() -> Vec<Unit> {
        [Unit::F32, Unit::Bf16Dot, Unit::Bf16Tile].into_iter().filter(|&unit| arch::has(unit)).collect()
    }

    /// As tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Unit::F32 => "f32 multiply-add",
            Unit::Bf16Dot => "bf16 dot",
            Unit::Bf16Tile => "bf16 tiles",
        }
    }
}

/// The most that a unit does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    pub unit: Unit,
    /// Multiplications and additions per second.
    pub flops: f64,
}

/// The fastest unit on `threads` threads.
///
/// Errors: the system has no more threads.
pub fn peak(threads: usize) -> io::Result<Peak> {
    let mut best = Peak { unit: Unit::F32, flops: 0.0 };
    for unit in Unit::available() {
        let flops = peak_of(unit, threads)?;
        if flops > best.flops {
            best = Peak { unit, flops };
        }
    }
    Ok(best)
}

/// Multiplications and additions per second of `unit`, which must be among [`Unit::available`], on `threads` threads
/// at once. Operands stay in registers. Errors: as [`peak`].
pub fn peak_of(unit: Unit, threads: usize) -> io::Result<f64> {
    let mut rounds = 1 << 12;
    while best_time(1, 1, || Ok(()), |()| arch::multiply(unit, rounds))? < RUN {
        rounds *= 2;
    }
    let best = best_time(threads, RUNS, || Ok(()), |()| arch::multiply(unit, rounds))?;
    Ok(threads as f64 * rounds as f64 * arch::flops_per_round(unit) as f64 / best.as_secs_f64())
}

/// Bytes per second that `threads` threads read from memory together, each from a share of its own that it has
/// written itself. Errors: as [`peak`], or there is not enough memory.
pub fn read_bandwidth(threads: usize) -> io::Result<f64> {
    let share = memory::size() / threads;
    let best = best_time(threads, RUNS, || memory::share(share), |words| arch::read(words))?;
    Ok((threads * share) as f64 / best.as_secs_f64())
}

/// Reads memory now and again, for figures that are to be compared with what the memory did at that time: where others
/// share it, that changes twofold within seconds.
pub struct Reader {
    shares: Vec<Vec<u64>>,
}

impl Reader {
    /// Errors: as [`read_bandwidth`].
    pub fn new(threads: usize) -> io::Result<Self> {
        let share = memory::size() / threads;
        // Each thread writes its own, so that its pages lie where it is.
        let shares: io::Result<Vec<Vec<u64>>> = std::thread::scope(|scope| {
            let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, || memory::share(share));
            let all: io::Result<Vec<_>> = (0..threads).map(spawn).collect();
            all?.into_iter().map(|thread| thread.join().expect("writing ones does not panic")).collect()
        });
        Ok(Self { shares: shares? })
    }

    /// Bytes per second of one pass of all threads over memory. Errors: as [`peak`].
    pub fn sample(&self) -> io::Result<f64> {
        let ready = Barrier::new(self.shares.len());
        let read = &|words: &Vec<u64>| {
            ready.wait();
            let start = Instant::now();
            arch::read(words);
            (start, Instant::now())
        };
        let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
            let (own, others) = self.shares.split_first().expect("a reader has a thread");
            let helpers: Vec<_> = others.iter().map(|share| scope.spawn(move || read(share))).collect();
            let helpers = helpers.into_iter().map(|helper| helper.join().expect("a kernel does not panic"));
            std::iter::once(read(own)).chain(helpers).collect()
        });
        let start = spans.iter().map(|span| span.0).min();
        let end = spans.iter().map(|span| span.1).max();
        let wall = start.zip(end).map_or(Duration::MAX, |(start, end)| end - start);
        let bytes: usize = self.shares.iter().map(|share| size_of_val(&share[..])).sum();
        Ok(bytes as f64 / wall.as_secs_f64())
    }
}

/// Of `runs` runs the shortest, from when all of `threads` threads are ready until the last one is done. Each thread
/// works on what it has prepared itself, so that its pages lie where it is.
fn best_time<S>(
    threads: usize,
    runs: usize,
    prepare: impl Fn() -> io::Result<S> + Sync,
    work: impl Fn(&S) + Sync,
) -> io::Result<Duration> {
    let ready = Barrier::new(threads);
    let run = || {
        let own = prepare();
        let one = |_| {
            ready.wait();
            let start = Instant::now();
            // Who could not prepare still comes to the barrier, or the others would wait for ever.
            own.iter().for_each(&work);
            (start, Instant::now())
        };
        let spans: Vec<(Instant, Instant)> = (0..runs).map(one).collect();
        own.map(|_| spans)
    };
    // Nobody may come to the barrier before it is known that all can.
    let all_there = OnceLock::new();
    let help = || if *all_there.wait() { run() } else { Ok(Vec::new()) };
    let all: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let spawn = |number: usize| {
            let thread = std::thread::Builder::new().name(format!("roofline-{number}"));
            thread.spawn_scoped(scope, help)
        };
        let helpers: io::Result<Vec<_>> = (1..threads).map(spawn).collect();
        all_there.get_or_init(|| helpers.is_ok());
        let joined = helpers?.into_iter().map(|helper| helper.join().expect("a kernel does not panic"));
        std::iter::once(run()).chain(joined).collect::<io::Result<_>>()
    })?;
    let wall = |run: usize| {
        let start = all.iter().map(|spans| spans[run].0).min();
        let end = all.iter().map(|spans| spans[run].1).max();
        start.zip(end).map_or(Duration::MAX, |(start, end)| end - start)
    };
    Ok((0..runs).map(wall).min().unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_reads_all_it_has() {
        let reader = Reader { shares: vec![vec![1; 1 << 16]; 2] };
        let seconds = 2.0 * 8.0 * 65536.0 / reader.sample().unwrap();
        assert!(seconds > 1e-7 && seconds < 60.0, "{seconds} s");
    }

    #[test]
    fn every_unit_of_this_machine_computes_what_it_says() {
        for unit in Unit::available() {
            // The sum of products of ones counts them: a round that does nothing, or does it twice, is seen.
            assert_eq!(arch::sum(unit, 3, 1.0), (3 * arch::flops_per_round(unit) / 2) as f32, "{unit:?}");
        }
    }
}
