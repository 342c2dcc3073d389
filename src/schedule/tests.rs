use super::*;
use crate::backend::{BlockCopy, Save, SequenceInputs};

fn limits() -> Limits {
    Limits { step_tokens: 8, logit_rows: 4, slots: 4, blocks: 16, block_len: 4, ..Limits::default() }
}

fn scheduler(limits: Limits, sequences_max: usize) -> Scheduler {
    Scheduler::new(Config::new(limits, sequences_max)).unwrap()
}

/// With a prefix cache of so many checkpoints.
fn caching(checkpoints_max: usize) -> Scheduler {
    let limits = Limits { slots: 4 + checkpoints_max, ..limits() };
    let config = Config { checkpoints_max, checkpoint_gap: 4, ..Config::new(limits, 4) };
    Scheduler::new(config).unwrap()
}

fn arrival(id: u64, prompt: Vec<u32>, max_tokens: usize) -> Arrival {
    Arrival { id, prompt, max_tokens, ..Arrival::default() }
}

/// Runs one step: each sampling share gets token 9, each other one advances. Returns (id, past, count, samples).
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize, bool)> {
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    let shares = scheduler.shares().iter().map(|s| (s.id, s.past, s.count, s.samples)).collect();
    commit(scheduler, 0);
    shares
}

/// Commits the planned step: each sampling share gets `accepted` of its drafts and token 9.
fn commit(scheduler: &mut Scheduler, accepted: usize) {
    let (mut sampled, mut outcomes) = (Vec::new(), Vec::new());
    for share in scheduler.shares() {
        if !share.samples {
            outcomes.push(Outcome::Advance);
            continue;
        }
        let first = sampled.len();
        sampled.extend(scheduler.drafts(share).iter().take(accepted));
        sampled.push(9);
        outcomes.push(Outcome::Tokens { first, count: sampled.len() - first });
    }
    scheduler.commit(&outcomes, &sampled);
    scheduler.check();
}

#[test]
fn a_long_prompt_is_read_in_chunks_between_which_others_decode() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(arrival(1, vec![1; 3], 8)).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true)]);
    scheduler.add(arrival(2, vec![1; 16], 4)).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 3, 1, true), (2, 0, 7, false)]);
    assert_eq!(step(&mut scheduler), [(1, 4, 1, true), (2, 7, 7, false)]);
    assert_eq!(step(&mut scheduler), [(1, 5, 1, true), (2, 14, 2, true)]);
    assert_eq!(step(&mut scheduler), [(1, 6, 1, true), (2, 16, 1, true)]);
}

#[test]
fn the_step_names_tokens_blocks_and_rows() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(arrival(1, vec![10, 11, 12, 13, 14], 3)).unwrap();
    scheduler.add(arrival(2, vec![20, 21], 2)).unwrap();
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
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(arrival(1, vec![1; 36], 4)).unwrap(); // 10 of 16 blocks
    scheduler.add(arrival(2, vec![1; 36], 4)).unwrap(); // does not fit beside it
    scheduler.add(arrival(3, vec![1; 1], 1)).unwrap(); // would
    assert_eq!(step(&mut scheduler), [(1, 0, 8, false)]);
    assert_eq!(scheduler.cancel(1), Cancelled::Running);
    assert_eq!(step(&mut scheduler), [(3, 0, 1, true), (2, 0, 7, false)]);
}

#[test]
fn rows_for_every_prompt_token_bound_the_chunk() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(Arrival { every_row: true, ..arrival(1, vec![1; 6], 4) }).unwrap();
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
    let mut scheduler = scheduler(Limits { logit_rows: 2, ..limits() }, 2);
    scheduler.add(Arrival { every_row: true, ..arrival(1, vec![1; 3], 4) }).unwrap();
    scheduler.add(arrival(2, vec![1; 3], 4)).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 2, false), (2, 0, 2, false)]);
    assert_eq!(step(&mut scheduler), [(2, 2, 1, true), (1, 2, 1, true)]);
}

#[test]
fn a_rewound_sequence_reads_all_its_tokens_again() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(arrival(1, vec![1; 3], 8)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    scheduler.commit(&[Outcome::Rewind], &[]);
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [1, 1, 1, 9, 9]);
    assert_eq!(inputs.sequences[0].past, 0);
}

#[test]
fn a_cancel_in_mid_step_is_passed_over_by_the_commit() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.add(arrival(1, vec![1; 3], 8)).unwrap();
    scheduler.add(arrival(2, vec![1; 3], 8)).unwrap();
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(scheduler.cancel(1), Cancelled::Running);
    let outcomes = [Outcome::Tokens { first: 0, count: 1 }, Outcome::Tokens { first: 1, count: 1 }];
    scheduler.commit(&outcomes, &[5, 6]);
    scheduler.check();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [6]);
    assert_eq!(scheduler.cancel(1), Cancelled::Unknown);
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = scheduler(limits(), 4);
    assert_eq!(scheduler.add(arrival(1, vec![1; 60], 4)), Ok(()));
    assert_eq!(scheduler.add(arrival(1, vec![1; 60], 4)), Err(Error::Twice { id: 1 }));
    let too_long = Error::TooLong { id: 2, limit: 64, got: 65 };
    assert_eq!(scheduler.add(arrival(2, vec![1; 60], 5)), Err(too_long));
    assert_eq!(scheduler.add(arrival(3, vec![], 5)), Err(Error::Empty { id: 3, prompt: 0, output: 5 }));
    assert!(scheduler.add(arrival(4, vec![1], usize::MAX)).is_err());
    let none = Scheduler::new(Config::new(Limits { blocks: 0, ..limits() }, 4));
    assert_eq!(none.err(), Some(Error::Limit { name: "blocks", got: 0 }));
}

#[test]
fn no_more_run_than_a_step_has_tokens_and_rows() {
    let tight = Limits { step_tokens: 3, logit_rows: 2, ..limits() };
    assert_eq!(scheduler(tight, 9).places(), 2);
    assert_eq!(scheduler(Limits { logit_rows: 9, ..tight }, 9).places(), 3);
}

#[test]
fn a_long_prompt_leaves_half_of_the_step_to_those_behind_it() {
    let mut scheduler = scheduler(Limits { step_tokens: 64, blocks: 64, ..limits() }, 4);
    scheduler.add(arrival(1, vec![1; 100], 4)).unwrap();
    scheduler.add(arrival(2, vec![2; 60], 4)).unwrap();
    scheduler.add(arrival(3, vec![3; 5], 4)).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 43, false), (2, 0, 16, false), (3, 0, 5, true)]);
}

#[test]
fn a_higher_class_takes_the_place_of_a_lower_one_and_gives_it_back_as_it_was() {
    let mut scheduler = scheduler(limits(), 1);
    scheduler.add(Arrival { priority: 5, ..arrival(1, vec![1; 3], 8) }).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true)]);
    scheduler.add(arrival(2, vec![2; 2], 2)).unwrap();
    assert_eq!(step(&mut scheduler), [(2, 0, 2, true)]);
    assert_eq!((scheduler.paused_count(), scheduler.counts().paused), (1, 1));
    assert_eq!(scheduler.cancel(2), Cancelled::Running);
    assert_eq!(step(&mut scheduler), [(1, 3, 1, true)], "nothing is read twice");
}

#[test]
fn the_last_of_the_lowest_class_gives_back_its_blocks_when_there_are_none() {
    let mut scheduler = scheduler(Limits { blocks: 4, ..limits() }, 2);
    scheduler.add(Arrival { priority: 1, ..arrival(1, vec![1; 6], 10) }).unwrap();
    scheduler.add(arrival(2, vec![2; 3], 10)).unwrap();
    for _ in 0..3 {
        step(&mut scheduler);
    }
    assert_eq!(scheduler.counts().preempted, 0);
    // The blocks of 1 are full with 9 tokens, those of 2 with 5.
    while scheduler.counts().preempted == 0 {
        step(&mut scheduler);
    }
    assert_eq!((scheduler.running_count(), scheduler.waiting_count()), (1, 1));
    assert_eq!(scheduler.running[0].id, 2);
}

/// Ends the running sequences in the next step.
fn end(scheduler: &mut Scheduler) {
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    let outcomes: Vec<_> = scheduler.shares().iter().map(|_| Outcome::End { first: 0, count: 1 }).collect();
    scheduler.commit(&outcomes, &[9]);
    scheduler.check();
}

#[test]
fn a_prompt_resumes_at_the_last_border_and_copies_the_block_it_will_write() {
    let mut scheduler = caching(4);
    let prompt: Vec<u32> = (1..8).collect();
    scheduler.add(Arrival { borders: vec![6], ..arrival(1, prompt.clone(), 4) }).unwrap();
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.saves, [Save { sequence: 0, after: 6, to: 1 }]);
    commit(&mut scheduler, 0);
    end(&mut scheduler);
    scheduler.add(arrival(2, [&prompt[..6], &[8, 9]].concat(), 4)).unwrap();
    scheduler.plan(&mut inputs);
    assert_eq!(
        (inputs.tokens.as_slice(), inputs.sequences[0].past, inputs.sequences[0].source),
        (&[8, 9][..], 6, 1)
    );
    assert_eq!(inputs.block_copies, [BlockCopy { from: 1, to: inputs.blocks[1] }]);
    assert_ne!(inputs.blocks[1], 1);
    assert_eq!(inputs.blocks[0], 0, "a whole block is shared");
    assert_eq!(scheduler.shares()[0].cached, 6);
    commit(&mut scheduler, 0);
    assert_eq!(scheduler.counts().hit_tokens, 6);
}

#[test]
fn what_a_broken_sequence_came_from_is_forgotten() {
    let mut scheduler = caching(4);
    let prompt: Vec<u32> = (1..8).collect();
    scheduler.add(Arrival { borders: vec![2, 6], ..arrival(1, prompt.clone(), 4) }).unwrap();
    step(&mut scheduler);
    end(&mut scheduler);
    scheduler.add(arrival(2, prompt.clone(), 4)).unwrap();
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(scheduler.shares()[0].past, 6);
    scheduler.commit(&[Outcome::Fail], &[]);
    scheduler.check();
    scheduler.add(arrival(3, prompt, 4)).unwrap();
    assert_eq!(step(&mut scheduler), [(3, 0, 7, true)]);
}

#[test]
fn another_salt_finds_nothing() {
    let mut scheduler = caching(4);
    let prompt: Vec<u32> = (1..8).collect();
    scheduler.add(Arrival { borders: vec![6], ..arrival(1, prompt.clone(), 4) }).unwrap();
    step(&mut scheduler);
    end(&mut scheduler);
    scheduler.add(Arrival { salt: Some("other".into()), ..arrival(2, prompt, 4) }).unwrap();
    assert_eq!(step(&mut scheduler), [(2, 0, 7, true)]);
}

#[test]
fn siblings_wait_until_the_first_has_read_the_prompt() {
    let mut scheduler = caching(4);
    for id in 1..4 {
        let prompt = (1..14).collect();
        scheduler.add(Arrival { siblings: true, ..arrival(id, prompt, 4) }).unwrap();
    }
    assert_eq!(step(&mut scheduler), [(1, 0, 8, false)]);
    assert_eq!(step(&mut scheduler), [(1, 8, 5, true)]);
    assert_eq!(step(&mut scheduler), [(1, 13, 1, true), (2, 12, 1, true), (3, 12, 1, true)]);
}

#[test]
fn drafts_are_verified_behind_the_token_that_is_known() {
    let limits = Limits { lanes: 2, drafts: 3, logit_rows: 8, ..limits() };
    let mut scheduler = scheduler(limits, 2);
    scheduler.add(arrival(1, vec![1; 3], 20)).unwrap();
    step(&mut scheduler);
    scheduler.set_drafts(1, &[5, 6, 7, 8]);
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [9, 5, 6, 7]);
    assert_eq!(inputs.logit_rows, [0, 1, 2, 3]);
    assert_eq!((inputs.sequences[0].drafts, inputs.sequences[0].replay), (3, 0));
    commit(&mut scheduler, 2);
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [9]);
    assert_eq!((inputs.sequences[0].past, inputs.sequences[0].replay), (6, 2));
    commit(&mut scheduler, 0);
    scheduler.plan(&mut inputs);
    assert_eq!((inputs.sequences[0].past, inputs.sequences[0].replay), (7, 0));
}

#[test]
fn drafts_end_where_the_sequence_must() {
    let mut scheduler = scheduler(Limits { lanes: 2, drafts: 3, logit_rows: 8, ..limits() }, 2);
    scheduler.add(arrival(1, vec![1; 3], 3)).unwrap();
    step(&mut scheduler);
    scheduler.set_drafts(1, &[5, 6, 7]);
    let mut inputs = StepInputs::default();
    scheduler.plan(&mut inputs);
    assert_eq!(inputs.tokens, [9, 5], "one draft and the token after it fill the sequence");
}

#[test]
fn tables_of_shared_blocks_grow_at_an_admission_and_never_after() {
    let limits = Limits { step_tokens: 128, logit_rows: 8, slots: 16, blocks: 200, ..limits() };
    let config = Config { checkpoints_max: 8, checkpoint_gap: 4, ..Config::new(limits, 8) };
    let mut scheduler = Scheduler::new(config).unwrap();
    let mut inputs = scheduler.inputs();
    for id in 0..8 {
        scheduler.add(Arrival { siblings: true, ..arrival(id, vec![1; 97], 64) }).unwrap();
    }
    while scheduler.running_count() < 8 {
        scheduler.plan(&mut inputs);
        commit(&mut scheduler, 0);
    }
    scheduler.plan(&mut inputs);
    let room = inputs.blocks.capacity();
    for _ in 0..50 {
        commit(&mut scheduler, 0);
        scheduler.plan(&mut inputs);
    }
    assert_eq!((scheduler.counts().preempted, inputs.blocks.capacity()), (0, room));
    assert!(inputs.blocks.len() > limits.blocks, "the tables name only {} blocks", inputs.blocks.len());
}

#[test]
fn a_step_has_room_for_several_checkpoints_of_one_sequence() {
    let limits = Limits { step_tokens: 64, slots: 9, ..limits() };
    let config = Config { checkpoints_max: 8, checkpoint_gap: 4, ..Config::new(limits, 1) };
    let mut scheduler = Scheduler::new(config).unwrap();
    let mut inputs = scheduler.inputs();
    let room = inputs.saves.capacity();
    let borders = vec![8, 16, 24, 32, 40];
    scheduler.add(Arrival { borders, ..arrival(1, vec![1; 44], 2) }).unwrap();
    scheduler.plan(&mut inputs);
    assert_eq!((inputs.saves.len(), inputs.saves.capacity()), (5, room));
}
