//! Steps that serve nobody: to measure what a step and a pass of the drafter cost before anyone is there.

use crate::backend::{Hidden, SequenceInputs};
use crate::model::Limits;

use super::{DraftInputs, StepInputs};

/// A step of so many tokens as verifying has them: at most `sequences` sequences of one known token and up to `depth`
/// drafts, each in a slot, a lane and a block of its own. `None` if there are not enough of those.
pub fn trial_step(tokens: usize, depth: usize, sequences: usize, limits: &Limits) -> Option<StepInputs> {
    // The drafter's entry of a trial stands at position 1.
    let depth = depth.min(limits.block_len.checked_sub(2)?);
    let count = tokens.div_ceil(1 + depth);
    if count > sequences.min(limits.lanes).min(limits.slots).min(limits.blocks) {
        return None;
    }
    let mut inputs = StepInputs::default();
    for slot in 0..count as u32 {
        let first = inputs.tokens.len();
        let share = (tokens - first).div_ceil(count - slot as usize);
        inputs.tokens.resize(first + share, 0);
        inputs.logit_rows.extend((first..first + share).map(|row| row as u32));
        inputs.blocks.push(slot);
        inputs.sequences.push(SequenceInputs {
            slot,
            source: slot,
            first: first as u32,
            count: share as u32,
            first_block: slot,
            block_count: 1,
            lane: slot,
            drafts: share as u32 - 1,
            ..SequenceInputs::default()
        });
    }
    Some(inputs)
}

/// Fills `inputs` with a pass of one entry for each sequence of a trial step, to be run after it.
pub fn trial_pass(step: &StepInputs, inputs: &mut DraftInputs) {
    inputs.clear();
    for (index, sequence) in (0..).zip(&step.sequences) {
        inputs.step.tokens.push(0);
        inputs.hidden.push(Hidden::Step(sequence.first));
        inputs.step.blocks.push(step.blocks[sequence.first_block as usize]);
        inputs.step.logit_rows.push(index);
        inputs.step.sequences.push(SequenceInputs {
            slot: sequence.slot,
            source: sequence.slot,
            first: index,
            count: 1,
            past: 1,
            first_block: index,
            block_count: 1,
            visible_from: 1,
            ..SequenceInputs::default()
        });
    }
}
