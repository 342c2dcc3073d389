//! A network without a model, and a strict one: its logits are a pure function of all tokens of the sequence, and
//! it panics when a step contradicts the steps before it.
#![allow(dead_code, reason = "each test binary uses its own part")]

use ferrotron::backend::{SequenceInputs, StepInputs};
use ferrotron::model::{Limits, Network, StepError};
use ferrotron::sample::SamplingParams;

/// What the network remembers of a slot: the tokens that were run in it, so that their count must be `past`.
#[derive(Clone, Default)]
struct Slot {
    tokens: Vec<u32>,
    /// Which sequence of this slot: grows each time one starts from the zero state.
    tenant: u64,
}

/// See the module. `before` and `fault` let a test look into a step, delay it, or let it go wrong.
pub struct Null {
    limits: Limits,
    vocab: usize,
    slots: Vec<Slot>,
    /// Which tenant of which slot wrote a block last: (slot, tenant).
    owners: Vec<(u32, u64)>,
    logits: Vec<f32>,
    pub before: Box<dyn FnMut(&StepInputs) + Send>,
    /// May turn the logits of a step into something else, or into an error.
    pub fault: Fault,
}

pub type Fault = Box<dyn FnMut(&StepInputs, &mut [f32]) -> Result<(), StepError> + Send>;

impl Null {
    pub fn new(limits: Limits, vocab: usize) -> Self {
        Self {
            limits,
            vocab,
            slots: vec![Slot::default(); limits.slots],
            owners: vec![(u32::MAX, 0); limits.blocks],
            logits: Vec::with_capacity(limits.logit_rows * vocab),
            before: Box::new(|_| {}),
            fault: Box::new(|_, _| Ok(())),
        }
    }

    /// Room for `len` tokens per slot, so that a step allocates nothing.
    pub fn reserve(mut self, len: usize) -> Self {
        self.slots.iter_mut().for_each(|slot| slot.tokens.reserve(len));
        self
    }

    /// The laws that hold between steps: a slot goes on where it was, and nobody has touched its blocks.
    fn enter(&mut self, inputs: &StepInputs, sequence: &SequenceInputs) {
        let SequenceInputs { slot, first, count, past, first_block, block_count, .. } = *sequence;
        let state = &mut self.slots[slot as usize];
        if past == 0 {
            state.tokens.clear();
            state.tenant += 1;
        }
        assert!(count > 0, "slot {slot} has no tokens");
        assert_eq!(state.tokens.len(), past as usize, "slot {slot} goes on from another place");
        let tokens = &inputs.tokens[first as usize..][..count as usize];
        state.tokens.extend_from_slice(tokens);
        let end = past + count;
        assert_eq!(block_count, end.div_ceil(self.limits.block_len as u32), "slot {slot} of {end} tokens");
        let owner = (slot, state.tenant);
        let old_blocks = past.div_ceil(self.limits.block_len as u32);
        let blocks = &inputs.blocks[first_block as usize..][..block_count as usize];
        for (index, &block) in blocks.iter().enumerate() {
            if index < old_blocks as usize {
                assert_eq!(self.owners[block as usize], owner, "block {block} was given to another");
            }
            self.owners[block as usize] = owner;
        }
    }

    /// The laws inside a step: ragged parts lie side by side, no slot or block appears twice.
    fn check(&self, inputs: &StepInputs) {
        assert!(!inputs.tokens.is_empty() && inputs.tokens.len() <= self.limits.step_tokens);
        assert!(inputs.logit_rows.len() <= self.limits.logit_rows);
        assert!(inputs.logit_rows.is_sorted_by(|a, b| a < b), "rows ascend");
        let (mut token, mut block) = (0, 0);
        for (index, sequence) in inputs.sequences.iter().enumerate() {
            assert_eq!((sequence.first, sequence.first_block), (token, block));
            token += sequence.count;
            block += sequence.block_count;
            assert!(
                inputs.sequences[..index].iter().all(|other| other.slot != sequence.slot),
                "a slot twice"
            );
        }
        assert_eq!((token as usize, block as usize), (inputs.tokens.len(), inputs.blocks.len()));
        for (index, block) in inputs.blocks.iter().enumerate() {
            assert!(!inputs.blocks[..index].contains(block), "block {block} twice in a step");
        }
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
        self.logits.clear();
        for sequence in &inputs.sequences {
            self.enter(inputs, sequence);
            let tokens = &self.slots[sequence.slot as usize].tokens;
            for row in &inputs.logit_rows {
                if (sequence.first..sequence.first + sequence.count).contains(row) {
                    let len = sequence.past + (row - sequence.first) + 1;
                    push_logits(&tokens[..len as usize], self.vocab, &mut self.logits);
                }
            }
        }
        (self.fault)(inputs, &mut self.logits)?;
        Ok(&self.logits)
    }
}

/// Logits in [-4, 4) that depend on every token and its place.
fn push_logits(tokens: &[u32], vocab: usize, out: &mut Vec<f32>) {
    let seen = tokens.iter().fold(1, |hash, &token| mix(hash ^ u64::from(token)));
    out.extend((0..vocab as u64).map(|id| (mix(seen ^ id << 32) % 4096) as f32 / 512.0 - 4.0));
}

/// The logits after `tokens`.
pub fn logits(tokens: &[u32], vocab: usize) -> Vec<f32> {
    let mut out = Vec::new();
    push_logits(tokens, vocab, &mut out);
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
    SamplingParams {
        temperature,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        allowed_ids: None,
        seed,
        logprobs: None,
    }
}
