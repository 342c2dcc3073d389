//! The compute threads with their memory, and how an operation is split among them.

use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use super::attention;
use super::simd::Output;
use super::team::Team;

/// Below this many multiply-adds an operation stays on the calling thread: waking the others costs more.
const PARALLEL_FROM: usize = 1 << 14;

/// The threads' memory, one each, and how they meet.
pub struct Crew {
    pub scratch: Vec<Scratch>,
    pub team: Arc<Team>,
}

/// Memory of one thread, aligned so that two threads never share a cache line.
#[repr(align(128))]
#[derive(Default)]
pub struct Scratch {
    pub rows: Vec<f32>,
    pub scores: Vec<f32>,
    /// One head's keys or values of one block, decoded.
    pub page: Vec<f32>,
    /// A row and the state of one head, where they are worked on and not kept.
    pub state: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    pub attention: attention::bf16::Memory,
}

/// Calls `piece(scratch, from, to)` over `0..count` in pieces, on all threads of the step when `work` multiply-adds
/// are worth it.
pub fn split(
    crew: &mut Crew,
    count: usize,
    per_piece: usize,
    work: usize,
    piece: impl Fn(&mut Scratch, usize, usize) + Sync,
) {
    let Crew { scratch, team } = crew;
    let pieces = count.div_ceil(per_piece);
    if work < PARALLEL_FROM || pieces < 2 || scratch.len() < 2 {
        piece(&mut scratch[0], 0, count);
        return;
    }
    // Each thread takes the next piece when it is done with one: a thread that the system delays then
    // holds up one piece, not its share of the whole.
    let next = std::sync::atomic::AtomicUsize::new(0);
    let memory = Output::new(scratch, 1);
    team.share(&|worker| {
        // SAFETY: each worker has a number, and so a scratch, of its own.
        let scratch = &mut unsafe { memory.slice(worker, 0, 1) }[0];
        loop {
            let from = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) * per_piece;
            if from >= count {
                return;
            }
            piece(scratch, from, (from + per_piece).min(count));
        }
    });
}
