use super::*;

fn limits() -> Limits {
    Limits { step_tokens: 8, logit_rows: 4, slots: 4, blocks: 16, block_len: 4, ..Limits::default() }
}

/// Runs one step: each sampling share gets token 9, each other one advances. Returns (id, past, count, samples).
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize, bool)> {
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    let outcomes: Vec<_> = scheduler
        .shares()
        .iter()
        .map(|share| if share.samples { Outcome::Token(9) } else { Outcome::Advance })
        .collect();
    let shares = scheduler.shares().iter().map(|s| (s.id, s.past, s.count, s.samples)).collect();
    scheduler.commit(&outcomes);
    scheduler.check();
    shares
}

#[test]
fn a_long_prompt_is_read_in_chunks_between_which_others_decode() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![1; 3], 8, false).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true)]);
    scheduler.add(2, vec![1; 16], 4, false).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 3, 1, true), (2, 0, 7, false)]);
    assert_eq!(step(&mut scheduler), [(1, 4, 1, true), (2, 7, 7, false)]);
    assert_eq!(step(&mut scheduler), [(1, 5, 1, true), (2, 14, 2, true)]);
    assert_eq!(step(&mut scheduler), [(1, 6, 1, true), (2, 16, 1, true)]);
}

#[test]
fn the_step_names_tokens_blocks_and_rows() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![10, 11, 12, 13, 14], 3, false).unwrap();
    scheduler.add(2, vec![20, 21], 2, false).unwrap();
    let mut inputs = StepInputs::default();
    assert!(scheduler.plan(&mut inputs));
    assert_eq!(inputs.tokens, [10, 11, 12, 13, 14, 20, 21]);
    assert_eq!(inputs.blocks, [0, 1, 2]);
    assert_eq!(inputs.logit_rows, [4, 6]);
    let first = SequenceInputs {
        slot: 0,
        first: 0,
        count: 5,
        past: 0,
        first_block: 0,
        block_count: 2,
        ..SequenceInputs::default()
    };
    let second = SequenceInputs {
        slot: 1,
        source: 1,
        first: 5,
        count: 2,
        past: 0,
        first_block: 2,
        block_count: 1,
        ..SequenceInputs::default()
    };
    assert_eq!(inputs.sequences, [first, second]);
}

#[test]
fn nobody_overtakes_a_sequence_that_does_not_fit_yet() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![1; 4], 36, false).unwrap(); // 10 of 16 blocks
    scheduler.add(2, vec![1; 4], 36, false).unwrap(); // does not fit beside it
    scheduler.add(3, vec![1; 1], 1, false).unwrap(); // would
    assert_eq!(step(&mut scheduler), [(1, 0, 4, true)]);
    assert_eq!(scheduler.cancel(1), Cancelled::Running);
    assert_eq!(step(&mut scheduler), [(2, 0, 4, true), (3, 0, 1, true)]);
}

#[test]
fn rows_for_every_prompt_token_bound_the_chunk() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![1; 6], 4, true).unwrap();
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.logit_rows, [0, 1, 2, 3]);
    assert_eq!(step(&mut scheduler), [(1, 0, 4, false)]);
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.logit_rows, [0, 1]);
    assert_eq!(step(&mut scheduler), [(1, 4, 2, true)]);
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.logit_rows, [0]);
}

#[test]
fn without_a_row_left_the_last_token_of_a_prompt_waits() {
    let mut scheduler = Scheduler::new(Limits { logit_rows: 2, ..limits() }, 2).unwrap();
    scheduler.add(1, vec![1; 3], 4, true).unwrap();
    scheduler.add(2, vec![1; 3], 4, false).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 2, false), (2, 0, 2, false)]);
    assert_eq!(step(&mut scheduler), [(1, 2, 1, true), (2, 2, 1, true)]);
}

#[test]
fn a_rewound_sequence_reads_all_its_tokens_again() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![1; 3], 8, false).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    scheduler.commit(&[Outcome::Rewind]);
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [1, 1, 1, 9, 9]);
    assert_eq!(inputs.sequences[0].past, 0);
}

#[test]
fn a_cancel_in_mid_step_is_passed_over_by_the_commit() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    scheduler.add(1, vec![1; 3], 8, false).unwrap();
    scheduler.add(2, vec![1; 3], 8, false).unwrap();
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(scheduler.cancel(1), Cancelled::Running);
    scheduler.commit(&[Outcome::Token(5), Outcome::Token(6)]);
    scheduler.check();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [6]);
    assert_eq!(scheduler.cancel(1), Cancelled::Unknown);
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = Scheduler::new(limits(), 4).unwrap();
    assert_eq!(scheduler.add(1, vec![1; 60], 4, false), Ok(()));
    let too_long = Error::TooLong { id: 2, limit: 64, got: 65 };
    assert_eq!(scheduler.add(2, vec![1; 60], 5, false), Err(too_long));
    assert_eq!(scheduler.add(3, vec![], 5, false), Err(Error::Empty { id: 3, prompt: 0, output: 5 }));
    assert!(scheduler.add(4, vec![1], usize::MAX, false).is_err());
    let none = Scheduler::new(Limits { blocks: 0, ..limits() }, 4);
    assert_eq!(none.err(), Some(Error::Limit { name: "blocks", got: 0 }));
}

#[test]
fn no_more_run_than_a_step_has_tokens_and_rows() {
    let tight = Limits { step_tokens: 3, logit_rows: 2, ..limits() };
    assert_eq!(Scheduler::new(tight, 9).unwrap().places(), 2);
    assert_eq!(Scheduler::new(Limits { logit_rows: 9, ..tight }, 9).unwrap().places(), 3);
}
