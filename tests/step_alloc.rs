//! A step allocates nothing: everything it touches was made at start.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use ferrotron::backend::cpu::Cpu;
use ferrotron::backend::{BlockCopy, DraftInputs, Hidden, Precision, Save, StepInputs};
use ferrotron::model::config::ModelConfig;
use ferrotron::model::{Limits, Model, Network, load};
use ferrotron::weights::{Checkpoint, Source};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged; only a counter is touched besides.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_and_drafts_allocate_nothing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let checkpoint = Checkpoint::open(Source::folder(folder)).expect("tiny opens");
    let json = checkpoint.file("config.json").expect("readable").expect("config.json is there");
    let config = ModelConfig::from_json(&json).expect("the config is understood");
    let fields = load::load(&config, &checkpoint, &|_| {}).expect("tiny loads").fields;
    let limits = Limits {
        step_tokens: 64,
        logit_rows: 8,
        slots: 2,
        blocks: 64,
        block_len: 16,
        lanes: 1,
        drafts: 3,
        ..Limits::default()
    };
    let cpu = Cpu::new(Precision::F32, 2).expect("threads start");
    let mut model = Model::new(cpu, config, fields, limits).expect("the sizes agree");
    let prompt: Vec<u32> = (0..60).collect();
    let prefill = StepInputs::single(&prompt, 0, 16);
    let decode: Vec<_> = (60..120).map(|past| StepInputs::single(&[7], past, 16)).collect();
    // Three drafts, two of which are accepted; the state is saved; the drafter makes three drafts.
    let verify: Vec<_> = (120..180).step_by(3).map(verify).collect();
    let passes: Vec<_> = (120..180).step_by(3).map(passes).collect();
    let mut drafts = Vec::with_capacity(8);
    // The threads' own start is not part of a step.
    model.step(&prefill).expect("the step runs");

    let before = ALLOCATIONS.load(Ordering::Relaxed);
    model.step(&prefill).expect("the step runs");
    for inputs in &decode {
        model.step(inputs).expect("the step runs");
    }
    for (inputs, passes) in verify.iter().zip(&passes) {
        model.step(inputs).expect("the step runs");
        for pass in passes {
            model.draft(pass, &mut drafts).expect("the pass runs");
            assert!(!drafts.is_empty());
        }
    }
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
    // Entering the thread pool takes a place in its queue, which grows by a block every few dozen entries:
    // that is the one allocation that is not per step.
    let steps = decode.len() + 1 + 4 * verify.len();
    assert!(allocated <= steps / 16, "{allocated} allocations in {steps} steps");
}

/// One certain token and three drafts after two of the last three were accepted.
fn verify(past: usize) -> StepInputs {
    let mut inputs = StepInputs::single(&[7, 8, 9, 10], past, 16);
    inputs.sequences[0].replay = if past == 120 { 0 } else { 2 };
    inputs.sequences[0].drafts = 3;
    inputs.logit_rows = vec![0, 1, 2, 3];
    inputs.saves.push(Save { sequence: 0, after: 1, to: 1 });
    inputs.block_copies.push(BlockCopy { from: 0, to: 60 });
    inputs
}

/// The entries of a step at `past`, and two of drafts.
fn passes(past: usize) -> [DraftInputs; 3] {
    let mut first = DraftInputs::single(&[8, 9, 10], past + 1, 16);
    first.hidden[0] = Hidden::Saved(1);
    [0, 1, 2].map(|depth| {
        if depth == 0 {
            return first.clone();
        }
        let mut pass = DraftInputs::single(&[11], past + 3 + depth, 16);
        pass.hidden[0] = Hidden::Draft(0);
        pass
    })
}
