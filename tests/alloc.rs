//! Nothing is allocated in a step: a counting allocator watches the steady decode loop.

mod null;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ferrotron::engine::{self, EngineConfig, Event, Request};
use ferrotron::model::{Limits, Network};
use ferrotron::sample::{Sampler, SamplingParams, Workspace};
use ferrotron::schedule::{Arrival, Config, Outcome, Scheduler};
use null::{Null, sampling};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Allocations of this thread so far.
fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches a constant-initialised
// thread-local without a destructor, which never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VOCAB: usize = 512;
const SEQUENCES: u64 = 4;

fn limits() -> Limits {
    Limits { step_tokens: 64, logit_rows: 8, slots: 8, blocks: 512, block_len: 8, ..Limits::default() }
}

/// Everything that has a table or a selection of its own.
fn costly(seed: u64) -> SamplingParams {
    SamplingParams {
        top_k: if seed.is_multiple_of(2) { 40 } else { 0 },
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        logit_bias: vec![(3, 1.0)],
        bad_words: vec![vec![4], vec![1, 2, 3]],
        ..sampling(1.0, seed)
    }
}

#[test]
fn planning_and_sampling_allocate_nothing() {
    let mut scheduler = Scheduler::new(Config::new(limits(), 8)).unwrap();
    let mut network = Null::new(limits(), VOCAB);
    let mut workspace = Workspace::new(VOCAB);
    let mut samplers: Vec<_> =
        (0..SEQUENCES).map(|id| Sampler::new(costly(id), vec![], 0, &[1; 20], 400, VOCAB)).collect();
    for id in 0..SEQUENCES {
        scheduler.add(Arrival { id, prompt: vec![1; 20], max_tokens: 400, ..Arrival::default() }).unwrap();
    }
    let (mut inputs, mut outcomes, mut sampled) = (scheduler.inputs(), Vec::new(), Vec::new());
    // The first steps read the prompts; the last of them still grow `outcomes`.
    let mut steady = None;
    for step in 0..300 {
        assert!(scheduler.plan(&mut inputs));
        let logits = network.step(&inputs).unwrap();
        outcomes.clear();
        sampled.clear();
        for share in scheduler.shares() {
            if !share.samples {
                outcomes.push(Outcome::Advance);
                continue;
            }
            let row = &logits[share.first_row * VOCAB..][..VOCAB];
            let position = scheduler.tokens(share).len() as u64;
            let sampler = &mut samplers[share.id as usize];
            let id = sampler.sample(&mut workspace, row, position).unwrap();
            sampler.accept(id);
            outcomes.push(Outcome::Tokens { first: sampled.len(), count: 1 });
            sampled.push(id);
        }
        scheduler.commit(&outcomes, &sampled);
        if step == 20 {
            steady = Some(allocations());
        }
    }
    assert_eq!(Some(allocations()), steady);
}

/// The event channel allocates by blocks of 32 events and reuses what was read; nothing else may.
#[tokio::test]
async fn the_engine_allocates_only_blocks_of_events() {
    const STEPS: u64 = 320;
    let counted = Arc::new(AtomicU64::new(0));
    let on_thread = counted.clone();
    let (handle, _runner) = engine::start(EngineConfig::default(), move |_| {
        let mut network = Null::new(limits(), VOCAB);
        let (mut steps, mut first) = (0, 0);
        network.before = Box::new(move |inputs| {
            // From the first step in which all decode, every step with the same four.
            if inputs.sequences.len() as u64 == SEQUENCES && inputs.tokens.len() as u64 == SEQUENCES {
                steps += 1;
                match steps {
                    20 => first = allocations(),
                    s if s == 20 + STEPS => on_thread.store(allocations() - first, Relaxed),
                    _ => {}
                }
            }
        });
        Ok(Box::new(network))
    });
    handle.loaded().await;
    let streams: Vec<_> = (0..SEQUENCES)
        .map(|seed| handle.submit(Request::new(vec![1; 20], costly(seed), 400)).unwrap())
        .collect();
    for mut stream in streams {
        while let Some(event) = stream.next().await {
            assert!(!matches!(event, Event::Failed(_)));
        }
    }
    let blocks = SEQUENCES * STEPS.div_ceil(32);
    let counted = counted.load(Relaxed);
    println!("{counted} allocations in {STEPS} steps of {SEQUENCES} sequences; blocks of events: {blocks}");
    assert!(counted <= blocks + SEQUENCES, "{counted} allocations, expected at most {blocks}");
}
