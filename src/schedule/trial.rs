//! Steps that serve nobody: to measure what a step and a pass of the drafter cost before anyone is there.

use crate::backend::Hidden;
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
        let share = (tokens - inputs.tokens.len()).div_ceil(count - slot as usize);
        let sequence = inputs.push(slot, 0, std::iter::repeat_n(0, share), [slot]);
        sequence.lane = slot;
        sequence.drafts = share as u32 - 1;
    }
    inputs.logit_rows.extend(0..inputs.tokens.len() as u32);
    Some(inputs)
}

/// Fills `inputs` with a pass of one entry for each sequence of a trial step, to be run after it.
pub fn trial_pass(step: &StepInputs, inputs: &mut DraftInputs) {
    inputs.clear();
    for (index, sequence) in (0..).zip(&step.sequences) {
        let block = step.blocks[sequence.first_block as usize];
        inputs.step.push(sequence.slot, 1, [0], [block]).visible_from = 1;
        inputs.step.logit_rows.push(index);
        inputs.hidden.push(Hidden::Step(sequence.first));
    }
}
