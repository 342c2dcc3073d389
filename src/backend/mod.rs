//! The `Backend` trait and who answers it: [`reference`] (plain loops), [`cpu`] (threads and SIMD), [`trace`] (no
//! arithmetic: operations, shapes, bytes) and [`profile`] (another one's arithmetic, and how long each operation takes).
//! `forward` in `model` is written once over it.
//!
//! A backend owns nothing of a model. It makes linears, vectors, buffers and a state once, at start; a step
//! then only writes into what exists.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod host;
mod plan;
pub mod profile;
pub mod reference;
#[cfg(feature = "simt")]
pub mod simt;
pub mod trace;

pub use plan::StateBytes;

use crate::model::config::{Attention, Mamba, Moe};
use crate::ops::linear::Epilogue;
use crate::weights;

/// All that varies from step to step: ragged tokens of many sequences.
///
/// The sequence's tokens stand at `tokens[first .. first + count]`; its KV blocks at
/// `blocks[first_block .. first_block + block_count]`, in order, covering at least `past + count` tokens.
/// A sequence with `past == 0` starts from the zero state: what its slot held is never read.
///
/// A step happens in this order: blocks are copied; each sequence's state is taken from its `source`, brought up to
/// `past` from its lane, advanced by its tokens; on the way it is saved where [`Save`] says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInputs {
    /// [T]
    pub tokens: Vec<u32>,
    /// In the order of their tokens: `first` ascends and the ranges tile `0..T`.
    pub sequences: Vec<SequenceInputs>,
    /// The block tables of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// Indices into `tokens` whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// K and V of every attention layer, the drafter's too, are copied before anything is written.
    pub block_copies: Vec<BlockCopy>,
    /// States to keep, ordered by (sequence, after).
    pub saves: Vec<Save>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SequenceInputs {
    /// Place in the state pool that its state is written to.
    pub slot: u32,
    /// Place its state is read from: `slot`, or a checkpoint that it resumes from and that stays as it is.
    pub source: u32,
    /// Index of its first token of this step in `StepInputs::tokens`.
    pub first: u32,
    /// Its tokens in this step; at least 1.
    pub count: u32,
    /// Its tokens already in state, lane and cache.
    pub past: u32,
    pub first_block: u32,
    pub block_count: u32,
    /// Where the inputs of its drafts are kept until they are judged; read only if `replay` or `drafts` is not 0.
    pub lane: u32,
    /// The first so many drafts in its lane were accepted: they belong to `past`, and the state is advanced by
    /// them before the tokens of this step. 0 if `past` is 0.
    pub replay: u32,
    /// The last so many of its `count` tokens are drafts, fewer than `count`: the state stays as it is before
    /// them, and what would advance it goes to the lane.
    pub drafts: u32,
    /// The first position that attention sees: 0, or later where the cache of the drafter begins later.
    pub visible_from: u32,
}

impl SequenceInputs {
    /// Its tokens of this step that are no drafts.
    pub fn certain(&self) -> u32 {
        self.count - self.drafts
    }
}

/// The block `to` becomes what `from` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: u32,
    pub to: u32,
}

/// A checkpoint: after the first `after` tokens of `sequences[sequence]` in this step, its state (convolution, SSM,
/// and the hidden vector of the last of those tokens) is also written to place `to`.
/// `after` is at least 1 and at most `count - drafts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Save {
    pub sequence: u32,
    pub after: u32,
    pub to: u32,
}

/// One pass of the drafter, after the step whose hidden vectors it reads.
///
/// Entry i joins the embedding of `step.tokens[i]` with the hidden vector of the position before it, and is
/// cached at that token's own position: so a cache of `n` tokens depends on those tokens alone. Position 0 has no
/// entry, and `visible_from` of each sequence is at least 1. `slot`, `source`, `lane`, `replay`, `drafts` and `saves`
/// mean nothing here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftInputs {
    /// `logit_rows`: the entries whose next token is to be drafted.
    pub step: StepInputs,
    /// [T] where the hidden vector of each entry is.
    pub hidden: Vec<Hidden>,
}

/// Where a hidden vector is. All entries of one pass are of `Draft`, or none is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// Row of the last step, after the final norm.
    Step(u32),
    /// Of the last token before the checkpoint at this place.
    Saved(u32),
    /// Index in the `logit_rows` of the last pass of the drafter: its output there.
    Draft(u32),
}

impl DraftInputs {
    /// One entry per token of one sequence alone, from position `past` on, in blocks 0, 1, 2 …; entry i joins row i of
    /// the last step. The last one drafts.
    pub fn single(tokens: &[u32], past: usize, block_len: usize) -> DraftInputs {
        let mut step = StepInputs::single(tokens, past, block_len);
        step.sequences[0].visible_from = 1;
        DraftInputs { step, hidden: (0..tokens.len() as u32).map(Hidden::Step).collect() }
    }

    pub fn clear(&mut self) {
        self.step.clear();
        self.hidden.clear();
    }

    /// Whether this pass goes on from the last one.
    pub fn recursive(&self) -> bool {
        matches!(self.hidden.first(), Some(Hidden::Draft(_)))
    }

    /// As [`StepInputs::check`].
    pub fn check(&self) {
        assert_eq!(self.hidden.len(), self.step.tokens.len(), "one hidden vector per entry");
        let recursive = |hidden: &Hidden| matches!(hidden, Hidden::Draft(_)) == self.recursive();
        assert!(self.hidden.iter().all(recursive), "{:?}", self.hidden);
        for s in &self.step.sequences {
            assert!(s.past >= s.visible_from && s.visible_from >= 1, "position 0 has no entry: {s:?}");
        }
    }
}

impl StepInputs {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
        self.blocks.clear();
        self.logit_rows.clear();
        self.block_copies.clear();
        self.saves.clear();
    }

    /// Panics where the step breaks a rule that the types above state; for debug builds.
    pub fn check(&self) {
        let mut next = 0;
        for (index, s) in self.sequences.iter().enumerate() {
            assert_eq!(s.first, next, "sequence {index}: tokens tile the step");
            next += s.count;
            assert!(s.drafts < s.count, "sequence {index}: one token at least is certain: {s:?}");
            assert!(s.replay <= s.past && s.visible_from <= s.past, "sequence {index}: {s:?}");
            let clash = |other: &SequenceInputs| other.slot == s.slot || other.source == s.slot;
            let (before, after) = (&self.sequences[..index], &self.sequences[index + 1..]);
            assert!(!before.iter().chain(after).any(clash), "sequence {index}: its slot is in use");
        }
        assert_eq!(next as usize, self.tokens.len(), "tokens tile the step");
        assert!(self.saves.is_sorted_by_key(|save| (save.sequence, save.after)), "{:?}", self.saves);
        for save in &self.saves {
            let sequence = &self.sequences[save.sequence as usize];
            assert!((1..=sequence.certain()).contains(&save.after), "{save:?} of {sequence:?}");
            let taken = |s: &SequenceInputs| s.slot == save.to || s.source == save.to;
            assert!(!self.sequences.iter().any(taken), "{save:?}: the place is in use");
        }
    }

    /// A sequence's blocks, in order.
    pub fn blocks_of(&self, sequence: &SequenceInputs) -> &[u32] {
        &self.blocks[sequence.first_block as usize..][..sequence.block_count as usize]
    }

    /// The saves of `sequences[sequence]`, in the order of their tokens.
    pub fn saves_of(&self, sequence: usize) -> &[Save] {
        let from = self.saves.partition_point(|save| (save.sequence as usize) < sequence);
        let count = self.saves[from..].partition_point(|save| save.sequence as usize == sequence);
        &self.saves[from..][..count]
    }

    /// Rows of lanes that are read or written: replayed drafts and judged ones to come.
    pub fn lane_rows(&self) -> usize {
        self.sequences.iter().map(|s| (s.replay + s.drafts) as usize).sum()
    }

    /// Appends a sequence in `slot` that goes on with `tokens` at position `past`, and the blocks of its table. What else is to be said of it goes into the answer; no logits are wanted of it yet.
    pub fn push(
        &mut self,
        slot: u32,
        past: usize,
        tokens: impl IntoIterator<Item = u32>,
        blocks: impl IntoIterator<Item = u32>,
    ) -> &mut SequenceInputs {
        let (first, first_block) = (self.tokens.len(), self.blocks.len());
        self.tokens.extend(tokens);
        self.blocks.extend(blocks);
        self.sequences.push_mut(SequenceInputs {
            slot,
            source: slot,
            first: first as u32,
            count: (self.tokens.len() - first) as u32,
            past: past as u32,
            first_block: first_block as u32,
            block_count: (self.blocks.len() - first_block) as u32,
            ..SequenceInputs::default()
        })
    }

    /// The step of one sequence alone in slot 0 with blocks 0, 1, 2 …; logits of the last token.
    pub fn single(tokens: &[u32], past: usize, block_len: usize) -> StepInputs {
        let mut inputs = StepInputs::default();
        let blocks = (past + tokens.len()).div_ceil(block_len) as u32;
        inputs.push(0, past, tokens.iter().copied(), 0..blocks);
        inputs.logit_rows.push(tokens.len() as u32 - 1);
        inputs
    }
}

/// The type activations are rounded to between operations. Sums, norms, softmax, dt, the SSM state and
/// logits are f32 (or better) under both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

/// How numbers are kept in the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvType {
    /// As wide as activations: f32, or bf16 under [`Precision::Bf16`].
    #[default]
    Auto,
    F32,
    Bf16,
    /// E4M3, scale 1.
    Fp8,
}

/// How the SSM state is kept between steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SsmType {
    #[default]
    F32,
    /// Rounded stochastically after every token; the chance depends on the position, layer, head and element
    /// alone, so that the state depends neither on chunks, drafts nor batch.
    F16,
}

/// State and cache sizes of a network, fixed at start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StatePlan {
    pub slots: usize,
    pub blocks: usize,
    pub block_len: usize,
    pub lanes: usize,
    /// Drafts one lane can hold.
    pub drafts: usize,
    pub kv: KvType,
    pub ssm: SsmType,
    /// Width of the hidden vector that a checkpoint keeps; 0 without a drafter.
    pub hidden: usize,
    /// One entry per Mamba layer, in order.
    pub mamba: Vec<Mamba>,
    /// One entry per attention layer, in order; the MTP block's attention comes last.
    pub attention: Vec<Attention>,
}

/// What `forward` asks of whoever computes. Buffers are `[T, width]`, row-major; an operation reads and writes
/// the first T rows. Sizes were checked when the model was put together, so operations do not fail.
pub trait Backend: Send {
    /// A linear weight as this backend holds it.
    type Linear: Send + Sync;
    /// Small f32 vectors: norms, biases, per-head constants.
    type Vector: Send + Sync;
    /// All experts of one layer.
    type Experts: Send + Sync;
    /// Activations of a step.
    type Buffer: Send;
    /// Chosen experts and their weights, `[T, K]`.
    type Routes: Send;
    /// Convolution and SSM states by slot, K/V pages by block.
    type State: Send;

    fn linear_from(&mut self, weight: weights::Linear) -> Self::Linear;
    /// A weight of which only rows are read ([`Backend::embed`]).
    fn table_from(&mut self, weight: weights::Linear) -> Self::Linear {
        self.linear_from(weight)
    }
    fn vector_from(&mut self, values: Vec<f32>) -> Self::Vector;
    fn experts_from(&mut self, up: Vec<weights::Linear>, down: Vec<weights::Linear>) -> Self::Experts;
    fn buffer(&mut self, rows: usize, width: usize) -> Self::Buffer;
    fn routes(&mut self, rows: usize, chosen: usize) -> Self::Routes;
    fn state(&mut self, plan: &StatePlan) -> Self::State;

    /// Runs a whole step where the backend wants it run (its own threads, for one).
    fn run<R: Send>(&mut self, step: impl FnOnce(&mut Self) -> R + Send) -> R
    where
        Self: Sized,
    {
        Self::run_within(self, |own| own, step)
    }

    /// As [`Backend::run`] for a backend that is `part` of another, which takes the step: it runs where its part wants.
    fn run_within<T: Send, R: Send>(
        whole: &mut T,
        _part: impl Fn(&mut T) -> &mut Self,
        step: impl FnOnce(&mut T) -> R + Send,
    ) -> R {
        step(whole)
    }

    /// out[t] = table[tokens[t]]
    fn embed(&mut self, tokens: &[u32], table: &Self::Linear, out: &mut Self::Buffer);

    /// out[t][column ..] = rms(x[t]) * weight
    fn rms_norm(
        &mut self,
        tokens: usize,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
        column: usize,
    );

    /// out[t] = epilogue(weight x[t])
    fn linear(
        &mut self,
        tokens: usize,
        weight: &Self::Linear,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
        epilogue: Epilogue,
    );

    /// Convolves x, B, C of `projected` with `weight` [K, c] into `out` [T, c] and advances the tails of Mamba layer
    /// `layer`.
    fn conv(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &Self::Buffer,
        weight: &Self::Vector,
        bias: &Self::Vector,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    );

    /// Runs the recurrence of Mamba layer `layer`: `xbc` [T, c] and dt of `projected` into `out` [T, d].
    fn ssm(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &Self::Buffer,
        xbc: &Self::Buffer,
        heads: Heads<'_, Self::Vector>,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    );

    /// y[t] = group_rms(y[t] * silu(z[t])) * weight, with z the first d columns of `projected`.
    fn gated_norm(
        &mut self,
        tokens: usize,
        shape: &Mamba,
        eps: f32,
        projected: &Self::Buffer,
        weight: &Self::Vector,
        y: &mut Self::Buffer,
    );

    /// Copies pages of every attention layer, in the given order.
    fn copy_blocks(&mut self, copies: &[BlockCopy], state: &mut Self::State);

    /// Appends k and v to the pages of attention layer `layer` and attends causally.
    fn attention(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Attention,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    );

    /// Scores `u` [T, h] with `gate` [E, h] in f32 and chooses.
    fn route(
        &mut self,
        tokens: usize,
        shape: &Moe,
        u: &Self::Buffer,
        gate: &Self::Linear,
        bias: &Self::Vector,
        routes: &mut Self::Routes,
    );

    /// out[t] = epilogue(Σ weight · expert(v[t])) over the routes of t.
    fn experts(
        &mut self,
        tokens: usize,
        shape: &Moe,
        v: &Self::Buffer,
        routes: &Self::Routes,
        experts: &Self::Experts,
        out: &mut Self::Buffer,
        epilogue: Epilogue,
    );

    /// out[i] = x[rows[i]]
    fn gather(&mut self, rows: &[u32], x: &Self::Buffer, out: &mut Self::Buffer);

    /// Keeps rows of `x`, the residual stream after the last layer: that of each sequence's last certain token at its
    /// slot, for the slot may become a checkpoint, and those of the step's saves at their places.
    fn keep_hidden(&mut self, inputs: &StepInputs, x: &Self::Buffer, state: &mut Self::State);

    /// out[i] = what `hidden[i]` names: a row of the last step's `x`, what [`Self::keep_hidden`] kept, or a row of
    /// `drafted`.
    fn hidden(
        &mut self,
        hidden: &[Hidden],
        x: &Self::Buffer,
        drafted: &Self::Buffer,
        state: &Self::State,
        out: &mut Self::Buffer,
    );

    /// out[i] = weight x[i], never rounded: logits.
    fn logits(&mut self, rows: usize, weight: &Self::Linear, x: &Self::Buffer, out: &mut Self::Buffer);

    /// Appends the index of the largest number of each row; of equals the lowest.
    fn largest(&mut self, rows: usize, x: &Self::Buffer, indices: &mut Vec<u32>);

    /// The first `rows` rows of a buffer on the host; empty where nothing was computed (trace).
    fn read<'a>(&'a mut self, rows: usize, buffer: &'a Self::Buffer) -> &'a [f32];
}

/// Per-head constants of a Mamba mixer, [H] each.
pub struct Heads<'a, V> {
    pub a_log: &'a V,
    pub d: &'a V,
    pub dt_bias: &'a V,
}
