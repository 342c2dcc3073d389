//! A network without a model, and a strict one: its logits are a pure function of all tokens of the sequence, and
//! it panics when a step contradicts the steps before it.
//!
//! A state is the hash of all tokens it has seen. Each row of a block remembers its token and that hash, so that a
//! sequence finds out whether the blocks it was given hold its own past; the drafter's entries likewise.
#![allow(dead_code, reason = "each test binary uses its own part")]

use ferrotron::backend::{DraftInputs, Hidden, SequenceInputs, StepInputs};
use ferrotron::model::{Limits, Network, StepError};
use ferrotron::sample::SamplingParams;

/// The hash of no tokens.
const START: u64 = 1;

/// The state after `len` tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct State {
    len: u32,
    hash: u64,
}

impl State {
    fn advance(&mut self, token: u32) {
        self.len += 1;
        self.hash = mix(self.hash ^ u64::from(token));
    }
}

/// A position in a block.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    token: u32,
    /// Of all tokens up to this one.
    hash: u64,
    /// What the drafter has for this position; the same hash if its entry is right.
    entry: u64,
}

/// See the module. `before` and `fault` let a test look into a step, delay it, or let it go wrong.
pub struct Null {
    limits: Limits,
    vocab: usize,
    /// The state at each place, and with it the hidden vector of its last token, which is the same hash.
    places: Vec<State>,
    lanes: Vec<Vec<u32>>,
    /// `[blocks][block_len]`
    blocks: Vec<Vec<Row>>,
    logits: Vec<f32>,
    /// Of each token of the last step.
    hidden: Vec<u64>,
    /// Of each logit row of the drafter's last pass.
    drafted: Vec<u64>,
    drafter: Option<Drafter>,
    pub before: Box<dyn FnMut(&StepInputs) + Send>,
    /// May turn the logits of a step into something else, or into an error.
    pub fault: Fault,
}

pub type Fault = Box<dyn FnMut(&StepInputs, &mut [f32]) -> Result<(), StepError> + Send>;

/// Proposes the likeliest id, or now and then another.
struct Drafter {
    chance: Chance,
    /// Of 100 drafts so many are right.
    right: usize,
}

impl Null {
    pub fn new(limits: Limits, vocab: usize) -> Self {
        Self {
            limits,
            vocab,
            places: vec![State::default(); limits.slots],
            lanes: vec![Vec::with_capacity(limits.drafts); limits.lanes],
            blocks: vec![vec![Row::default(); limits.block_len]; limits.blocks],
            logits: Vec::with_capacity(limits.logit_rows * vocab),
            hidden: Vec::with_capacity(limits.step_tokens),
            drafted: Vec::with_capacity(limits.logit_rows),
            drafter: None,
            before: Box::new(|_| {}),
            fault: Box::new(|_, _| Ok(())),
        }
    }

    /// With a draft head of which `right` in a hundred drafts are the likeliest ids.
    pub fn with_drafter(mut self, seed: u64, right: usize) -> Self {
        self.drafter = Some(Drafter { chance: Chance(seed), right });
        self
    }

    fn row(&mut self, table: &[u32], position: u32) -> &mut Row {
        let block_len = self.limits.block_len as u32;
        &mut self.blocks[table[(position / block_len) as usize] as usize][(position % block_len) as usize]
    }

    /// The laws that hold between steps: a state goes on where it was, and its blocks hold its own past.
    fn enter(&mut self, inputs: &StepInputs, index: usize) {
        let sequence = inputs.sequences[index];
        let SequenceInputs { slot, source, first, count, past, lane, replay, drafts, .. } = sequence;
        assert!(count > drafts, "slot {slot} has {count} tokens of which {drafts} are drafts");
        let mut state = if past == 0 { State { len: 0, hash: START } } else { self.places[source as usize] };
        for &token in &self.lanes.get(lane as usize).map_or(&[][..], |lane| lane)[..replay as usize] {
            state.advance(token);
        }
        assert_eq!(state.len, past, "slot {slot} goes on from another place");
        let end = past + count;
        let block_count = end.div_ceil(self.limits.block_len as u32);
        assert_eq!(sequence.block_count, block_count, "slot {slot} of {end} tokens");
        let table = &inputs.blocks[sequence.first_block as usize..][..block_count as usize];
        self.check_past(table, state);
        let tokens = &inputs.tokens[first as usize..][..count as usize];
        let mut saves = inputs.saves.iter().filter(|save| save.sequence as usize == index);
        let mut save = saves.next();
        let mut committed = state;
        for (number, &token) in (1..).zip(tokens) {
            state.advance(token);
            let row = self.row(table, state.len - 1);
            (row.token, row.hash) = (token, state.hash);
            self.hidden.push(state.hash);
            if number <= count - drafts {
                committed = state;
            }
            if let Some(due) = save.filter(|save| save.after == number) {
                assert!(number <= count - drafts, "a draft is saved");
                self.places[due.to as usize] = state;
                save = saves.next();
            }
        }
        assert!(save.is_none(), "a save of slot {slot} is beyond its tokens: {save:?}");
        self.places[slot as usize] = committed;
        if drafts > 0 {
            assert!(drafts as usize <= self.limits.drafts, "{drafts} drafts in a lane");
            let lane = &mut self.lanes[lane as usize];
            lane.clear();
            lane.extend_from_slice(&tokens[(count - drafts) as usize..]);
        }
    }

    fn check_past(&mut self, table: &[u32], state: State) {
        let mut seen = State { len: 0, hash: START };
        for position in 0..state.len {
            let row = *self.row(table, position);
            seen.advance(row.token);
            assert_eq!(row.hash, seen.hash, "position {position} of {} holds another's past", state.len);
        }
        assert_eq!(seen.hash, if state.len == 0 { START } else { state.hash }, "state and blocks disagree");
    }

    /// The laws inside a step: ragged parts lie side by side, nothing is written that another reads or writes.
    fn check(&self, inputs: &StepInputs) {
        assert!(!inputs.tokens.is_empty() && inputs.tokens.len() <= self.limits.step_tokens);
        assert!(inputs.logit_rows.len() <= self.limits.logit_rows);
        assert!(inputs.logit_rows.is_sorted_by(|a, b| a < b), "rows ascend");
        let (mut token, mut block) = (0, 0);
        for (index, sequence) in inputs.sequences.iter().enumerate() {
            assert_eq!((sequence.first, sequence.first_block), (token, block));
            token += sequence.count;
            block += sequence.block_count;
            let others = || inputs.sequences.iter().enumerate().filter(move |(other, _)| *other != index);
            assert!(others().all(|(_, other)| other.slot != sequence.slot), "a slot twice");
            assert!(others().all(|(_, other)| other.source != sequence.slot), "a slot is another's source");
            let drafts = |sequence: &SequenceInputs| sequence.drafts + sequence.replay > 0;
            let lane_twice = others().any(|(_, other)| drafts(other) && other.lane == sequence.lane);
            assert!(!drafts(sequence) || !lane_twice, "a lane twice");
            let uses = |to: u32| to == sequence.slot || (sequence.past > 0 && to == sequence.source);
            assert!(!inputs.saves.iter().any(|save| uses(save.to)), "a save overwrites a state in use");
            // What is written to blocks belongs to this sequence alone.
            for position in sequence.past..sequence.past + sequence.count {
                let written = self.block_at(inputs, sequence, position);
                let reads = |other: &SequenceInputs| {
                    let table = &inputs.blocks[other.first_block as usize..][..other.block_count as usize];
                    let row = position % self.limits.block_len as u32;
                    let at = table.iter().position(|&block| block == written);
                    at.is_some_and(|at| {
                        at as u32 * self.limits.block_len as u32 + row < other.past + other.count
                    })
                };
                assert!(!others().any(|(_, other)| reads(other)), "block {written} is written and read");
            }
        }
        assert_eq!((token as usize, block as usize), (inputs.tokens.len(), inputs.blocks.len()));
    }

    fn block_at(&self, inputs: &StepInputs, sequence: &SequenceInputs, position: u32) -> u32 {
        inputs.blocks[sequence.first_block as usize + position as usize / self.limits.block_len]
    }
}

impl Network for Null {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        (self.before)(inputs);
        self.check(inputs);
        for copy in &inputs.block_copies {
            for row in 0..self.limits.block_len {
                self.blocks[copy.to as usize][row] = self.blocks[copy.from as usize][row];
            }
        }
        self.hidden.clear();
        self.logits.clear();
        for index in 0..inputs.sequences.len() {
            self.enter(inputs, index);
        }
        for &row in &inputs.logit_rows {
            push_logits(self.hidden[row as usize], self.vocab, &mut self.logits);
        }
        (self.fault)(inputs, &mut self.logits)?;
        Ok(&self.logits)
    }

    fn can_draft(&self) -> bool {
        self.drafter.is_some()
    }

    fn draft(&mut self, inputs: &DraftInputs, drafts: &mut Vec<u32>) -> Result<(), StepError> {
        drafts.clear();
        let DraftInputs { step, hidden } = inputs;
        assert!(step.tokens.len() <= self.limits.step_tokens && hidden.len() == step.tokens.len());
        let mut outputs = Vec::new();
        for sequence in &step.sequences {
            let &SequenceInputs { first, count, past, visible_from, .. } = sequence;
            let table = &step.blocks[sequence.first_block as usize..][..sequence.block_count as usize];
            assert!(visible_from >= 1 && visible_from <= past, "entries from {visible_from}, first {past}");
            for position in past..past + count {
                let at = (first + position - past) as usize;
                let before = match hidden[at] {
                    Hidden::Step(row) => self.hidden[row as usize],
                    Hidden::Saved(place) => self.places[place as usize].hash,
                    Hidden::Draft(row) => self.drafted[row as usize],
                };
                if !matches!(hidden[at], Hidden::Draft(_)) {
                    assert_eq!(self.row(table, position - 1).hash, before, "entry {position}");
                }
                let output = mix(before ^ u64::from(step.tokens[at]));
                self.row(table, position).entry = output;
                outputs.push(output);
            }
            if !matches!(hidden[first as usize], Hidden::Draft(_)) {
                for position in visible_from..past {
                    let row = *self.row(table, position);
                    assert_eq!(
                        row.entry, row.hash,
                        "the drafter sees another's entry at {position} of {past}"
                    );
                }
            }
        }
        self.drafted.clear();
        let drafter = self.drafter.as_mut().expect("nobody asks a network that cannot draft");
        for &row in &step.logit_rows {
            let output = outputs[row as usize];
            self.drafted.push(output);
            self.logits.clear();
            push_logits(output, self.vocab, &mut self.logits);
            let best = argmax(&self.logits);
            let wrong = drafter.chance.below(100) >= drafter.right;
            drafts.push((best + u32::from(wrong)) % self.vocab as u32);
        }
        Ok(())
    }
}

/// Logits in [-4, 4) that depend on every token and its place.
fn push_logits(seen: u64, vocab: usize, out: &mut Vec<f32>) {
    out.extend((0..vocab as u64).map(|id| (mix(seen ^ id << 32) % 4096) as f32 / 512.0 - 4.0));
}

/// The first of the greatest.
pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// The logits after `tokens`.
pub fn logits(tokens: &[u32], vocab: usize) -> Vec<f32> {
    let mut out = Vec::new();
    let seen = tokens.iter().fold(START, |hash, &token| mix(hash ^ u64::from(token)));
    push_logits(seen, vocab, &mut out);
    out
}

/// A step of splitmix64: also the tests' source of reproducible chance.
pub fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seeded source of small numbers.
pub struct Chance(pub u64);

impl Chance {
    /// 0 … bound - 1
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = mix(self.0);
        (self.0 % bound as u64) as usize
    }
}

pub fn sampling(temperature: f32, seed: u64) -> SamplingParams {
    SamplingParams::plain(temperature, seed)
}
