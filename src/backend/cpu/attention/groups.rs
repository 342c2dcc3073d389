//! The queries of a step in groups that share keys.

use half::bf16;

use super::View;
use super::bf16::{DIM, Group, QUERIES, attend};
use crate::backend::cpu::crew::{Crew, split};
use crate::backend::cpu::simd::Output;
use crate::backend::host::Buffer;
use crate::backend::{Precision, StepInputs};
use crate::model::config::Attention;
use crate::ops::attention::Pages;

/// Queries that share keys, as many as go over a page together: each group is a piece of work.
pub fn attend_in_groups(
    crew: &mut Crew,
    groups: &mut Vec<(u32, u32)>,
    inputs: &StepInputs,
    shape: &Attention,
    pages: Pages,
    q: &Buffer,
    keys: &[bf16],
    values: &[bf16],
    output: Output,
    work: usize,
) {
    let heads = shape.heads / shape.kv_heads;
    let tokens_max = QUERIES / heads;
    groups.clear();
    for (index, sequence) in inputs.sequences.iter().enumerate() {
        groups.extend((0..sequence.count).step_by(tokens_max).map(|first| (index as u32, first)));
    }
    // Later tokens see more: they go first, so that no thread is left with a long one.
    let groups = &groups[..];
    split(crew, groups.len() * shape.kv_heads, 1, work, |scratch, from, to| {
        for unit in from..to {
            let (index, first) = groups[groups.len() - 1 - unit / shape.kv_heads];
            let kv_head = unit % shape.kv_heads;
            let sequence = &inputs.sequences[index as usize];
            let from = sequence.visible_from as usize;
            let group = Group {
                view: View { pages, blocks: inputs.blocks_of(sequence), from },
                kv_head,
                tokens: tokens_max.min((sequence.count - first) as usize),
                heads,
                positions: (sequence.past + first) as usize + 1 - from,
            };
            let at = |query: usize| {
                let token = (sequence.first + first) as usize + query / heads;
                (token, (kv_head * heads + query % heads) * DIM)
            };
            let query = |i| &q.row(at(i).0)[at(i).1..][..DIM];
            // SAFETY: one unit of work owns these heads of these tokens.
            let out = |i| unsafe { output.slice(at(i).0, at(i).1, DIM) };
            attend(group, query, keys, values, &mut scratch.attention, out);
            (0..group.tokens * heads).for_each(|i| Precision::Bf16.round(out(i)));
        }
    });
}
