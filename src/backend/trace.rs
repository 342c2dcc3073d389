//! The interpreter that computes nothing: it writes down each operation with its shape and its bytes.
//! `plan`, the benches and the snapshot tests read the step of a model from it, without the weights.

use std::collections::VecDeque;

use super::{Backend, BlockCopy, Heads, Hidden, KvType, Precision, StatePlan, StepInputs};
use crate::model::config::{Attention, Mamba, Moe};
use crate::ops::{self, Cost, attention::Pages, linear::Epilogue};
use crate::weights::Linear;

/// One operation of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub op: &'static str,
    /// As people write it: `[1, 128] -> [1, 2576] bf16`.
    pub shape: String,
    pub cost: Cost,
}

/// Collects [`Record`]s.
pub struct Trace {
    pub records: Vec<Record>,
    /// Distinct experts that the next `experts` operations read, in order, where somebody counted them; else as many as
    /// their tokens can choose.
    pub distinct: VecDeque<usize>,
    cache_bytes: usize,
}

impl Trace {
    /// `cache_bytes` is the width of one cached K or V number where the plan leaves it open.
    pub fn new(cache_bytes: usize) -> Self {
        Trace { records: Vec::new(), distinct: VecDeque::new(), cache_bytes }
    }

    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.records.iter().for_each(|r| total += r.cost);
        total
    }

    fn note(&mut self, op: &'static str, shape: String, cost: Cost) {
        self.records.push(Record { op, shape, cost });
    }
}

/// How much state there is and how wide its numbers are.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    /// Numbers in one block of K and V over all attention layers.
    block: usize,
    cache_bytes: usize,
    ssm_bytes: usize,
}

fn arrow(tokens: usize, weight: &Linear) -> String {
    format!("[{tokens}, {}] -> [{tokens}, {}] {}", weight.cols, weight.rows, weight.kind().name())
}

impl Backend for Trace {
    type Linear = Linear;
    type Vector = usize;
    type Experts = (Linear, Linear);
    type Buffer = usize;
    type Routes = ();
    type State = Kept;

    fn linear_from(&mut self, weight: Linear) -> Linear {
        weight
    }

    fn vector_from(&mut self, values: Vec<f32>) -> usize {
        values.len()
    }

    fn experts_from(&mut self, mut up: Vec<Linear>, mut down: Vec<Linear>) -> (Linear, Linear) {
        (up.swap_remove(0), down.swap_remove(0))
    }

    fn buffer(&mut self, _rows: usize, width: usize) -> usize {
        width
    }

    fn routes(&mut self, _rows: usize, _chosen: usize) {}

    fn state(&mut self, plan: &StatePlan) -> Kept {
        let cache_bytes = match plan.kv {
            KvType::Auto => self.cache_bytes,
            given => given.cell(Precision::F32).bytes(),
        };
        let block = plan.attention.iter().map(|a| 2 * Pages::new(a, plan.block_len).block_size()).sum();
        Kept { block, cache_bytes, ssm_bytes: plan.ssm.cell().bytes() }
    }

    fn embed(&mut self, tokens: &[u32], table: &Linear, _out: &mut usize) {
        let shape = format!("[{}] -> [{}, {}]", tokens.len(), tokens.len(), table.cols);
        self.note("embed", shape, ops::embed::cost(tokens.len(), table));
    }

    fn rms_norm(&mut self, tokens: usize, x: &usize, _: &usize, _: f32, _: &mut usize, _: usize) {
        self.note("rms_norm", format!("[{tokens}, {x}]"), ops::rms_norm::cost(tokens, *x));
    }

    fn linear(&mut self, tokens: usize, weight: &Linear, _: &usize, _: &mut usize, epilogue: Epilogue) {
        self.note(epilogue.linear_name(), arrow(tokens, weight), ops::linear::cost(tokens, weight));
    }

    fn conv(
        &mut self,
        inputs: &StepInputs,
        _: usize,
        shape: &Mamba,
        _: &usize,
        _: &usize,
        _: &usize,
        _: &mut Kept,
        _: &mut usize,
    ) {
        let tokens = inputs.tokens.len();
        let text = format!("[{tokens}, {}] taps {}", shape.conv_channels(), shape.conv_kernel);
        self.note("conv", text, ops::conv::cost(shape, inputs));
    }

    fn ssm(
        &mut self,
        inputs: &StepInputs,
        _: usize,
        shape: &Mamba,
        _: &usize,
        _: &usize,
        _: Heads<'_, usize>,
        kept: &mut Kept,
        _: &mut usize,
    ) {
        let (tokens, sequences) = (inputs.tokens.len(), inputs.sequences.len());
        let Mamba { heads, head_dim, state_size, .. } = shape;
        let text = format!("[{tokens}] state [{sequences}, {heads}, {head_dim}, {state_size}]");
        self.note("ssm", text, ops::ssm::cost(shape, inputs, kept.ssm_bytes));
    }

    fn gated_norm(&mut self, tokens: usize, shape: &Mamba, _: f32, _: &usize, _: &usize, _: &mut usize) {
        let text = format!("[{tokens}, {}] groups {}", shape.inner(), shape.groups);
        self.note("gated_norm", text, ops::gated_norm::cost(shape, tokens));
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy], kept: &mut Kept) {
        let block = kept.block;
        let state = (2 * copies.len() * block * kept.cache_bytes) as u64;
        self.note("copy_blocks", format!("[{}, {block}]", copies.len()), Cost { state, ..Cost::default() });
    }

    fn attention(
        &mut self,
        inputs: &StepInputs,
        _: usize,
        shape: &Attention,
        _: &usize,
        _: &usize,
        _: &usize,
        kept: &mut Kept,
        _: &mut usize,
    ) {
        let Attention { heads, kv_heads, head_dim } = shape;
        let past: u32 = inputs.sequences.iter().map(|s| s.past).sum();
        let text = format!("[{}, {heads}/{kv_heads}, {head_dim}] past {past}", inputs.tokens.len());
        self.note("attention", text, ops::attention::cost(shape, inputs, kept.cache_bytes));
    }

    fn route(&mut self, tokens: usize, shape: &Moe, _: &usize, gate: &Linear, _: &usize, _: &mut ()) {
        let text = format!("[{tokens}, {}] top {} of {}", gate.cols, shape.experts_per_token, shape.experts);
        self.note("route", text, ops::route::cost(shape, gate.cols, gate.bytes(), tokens));
    }

    fn experts(
        &mut self,
        tokens: usize,
        shape: &Moe,
        _: &usize,
        _: &(),
        (up, down): &(Linear, Linear),
        _: &mut usize,
        _: Epilogue,
    ) {
        let most = (tokens * shape.experts_per_token).min(shape.experts);
        let distinct = self.distinct.pop_front().unwrap_or(most);
        let text = format!(
            "[{tokens}, {}] -> {} -> {} {}, {distinct} experts",
            up.cols,
            up.rows,
            down.rows,
            up.kind().name()
        );
        self.note("experts", text, ops::experts::cost(shape, up, down, tokens, distinct));
    }

    fn gather(&mut self, rows: &[u32], x: &usize, _: &mut usize) {
        let cost = Cost { activations: (rows.len() * x * 8) as u64, ..Cost::default() };
        self.note("gather", format!("[{}, {x}]", rows.len()), cost);
    }

    fn keep_hidden(&mut self, inputs: &StepInputs, x: &usize, _: &mut Kept) {
        let rows = inputs.saves.len() + inputs.sequences.len();
        let cost =
            Cost { state: (rows * x * 4) as u64, activations: (rows * x * 4) as u64, ..Cost::default() };
        self.note("keep_hidden", format!("[{rows}, {x}]"), cost);
    }

    fn hidden(&mut self, hidden: &[Hidden], x: &usize, _: &usize, _: &Kept, _: &mut usize) {
        let cost = Cost { activations: (hidden.len() * x * 8) as u64, ..Cost::default() };
        self.note("hidden", format!("[{}, {x}]", hidden.len()), cost);
    }

    fn logits(&mut self, rows: usize, weight: &Linear, _: &usize, _: &mut usize) {
        self.note("logits", arrow(rows, weight), ops::linear::cost(rows, weight));
    }

    fn largest(&mut self, rows: usize, x: &usize, indices: &mut Vec<u32>) {
        indices.resize(indices.len() + rows, 0);
        let cost = Cost { activations: (rows * x * 4) as u64, ..Cost::default() };
        self.note("largest", format!("[{rows}, {x}]"), cost);
    }

    fn read<'a>(&'a mut self, _: usize, _: &'a usize) -> &'a [f32] {
        &[]
    }
}
