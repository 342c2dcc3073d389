//! The CPU interpreter: threads and SIMD over weights whose codes stay as they are stored.
//!
//! Work is split among threads by rows of a weight, heads of a state, or heads of a query; every element has
//! one writer and sums in one order, so results do not depend on the number of threads or on the batch.

mod attention;
mod conv;
mod crew;
mod nice;
mod norms;
pub mod packed;
pub mod roofline;
pub mod simd;
mod ssm;
mod team;
mod weight;

use std::sync::Arc;

use super::{
    Backend, BlockCopy, Heads, Hidden, Precision, StatePlan, StepInputs,
    host::{Buffer, Routes, State},
};
use crate::model::config::{Attention, Mamba, Moe};
#[cfg(target_arch = "x86_64")]
use crate::ops::cells::Cells;
use crate::ops::lines::Lines;
use crate::ops::{self, linear::Epilogue};
use crate::weights::Linear;
use crew::{Crew, Scratch, split};
use packed::Packed;
use simd::place::{Place, Target};
use simd::{Isa, Operands, Output, Tokens};
use team::Team;
pub use weight::{Experts, Weight};
use weight::{ROWS_PER_PIECE, operands, rows_per_piece};

pub struct Cpu {
    precision: Precision,
    isa: Isa,
    crew: Crew,
    /// Steps of priority that the thread which computes is to give way by, until it has.
    nice: i32,
    experts: ExpertWork,
    /// What is multiplied, as BF16: room for the largest buffer.
    operands: Vec<u16>,
    /// Sequence and first token of each group of queries in a step.
    groups: Vec<(u32, u32)>,
}

/// Who chose which expert, for one step: pairs (token, choice) sorted by expert.
#[derive(Default)]
struct ExpertWork {
    /// [E + 1]: where each expert's pairs start.
    starts: Vec<u32>,
    /// [T * K]
    pairs: Vec<u32>,
    /// Experts with at least one pair.
    active: Vec<u32>,
    /// [T * K, intermediate]; half of it, as BF16, where that is what is multiplied.
    middle: Vec<f32>,
    /// The widest intermediate of any layer.
    intermediate: usize,
}

/// Where the experts leave what is between their two matrices.
#[derive(Clone, Copy)]
enum Middle {
    F32(Output),
    Bf16(Output<u16>),
}

/// A CPU that cannot be set up as asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} compute threads: {source}")]
pub struct ThreadsError {
    threads: usize,
    source: std::io::Error,
}

impl Cpu {
    /// `threads` compute threads with the best instruction set of this machine.
    pub fn new(precision: Precision, threads: usize) -> Result<Self, ThreadsError> {
        Self::with_isa(precision, threads, Isa::detect())
    }

    /// As [`Cpu::new`] with threads that give way to others: they, and whoever calls [`Backend::run`], run `nice` steps
    /// below the priority of the process. 0 asks for nothing; 19 is the most there is.
    pub fn giving_way(precision: Precision, threads: usize, nice: i32) -> Result<Self, ThreadsError> {
        Self::build(precision, threads, Isa::detect(), nice)
    }

    /// As [`Cpu::new`] with a given instruction set, which must be among [`Isa::available`].
    pub fn with_isa(precision: Precision, threads: usize, isa: Isa) -> Result<Self, ThreadsError> {
        Self::build(precision, threads, isa, 0)
    }

    fn build(precision: Precision, threads: usize, isa: Isa, nice: i32) -> Result<Self, ThreadsError> {
        let team = Team::new(threads, nice).map_err(|source| ThreadsError { threads, source })?;
        let scratch = (0..team.threads()).map(|_| Scratch::default()).collect();
        let crew = Crew { scratch, team: Arc::new(team) };
        Ok(Cpu {
            precision,
            isa,
            crew,
            nice,
            experts: ExpertWork::default(),
            operands: Vec::new(),
            groups: Vec::new(),
        })
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn threads(&self) -> usize {
        self.crew.team.threads()
    }

    fn reserve_rows(&mut self, width: usize) {
        for scratch in &mut self.crew.scratch {
            scratch.rows.resize(scratch.rows.len().max(simd::SCRATCH_ROWS * width), 0.0);
        }
    }

    fn product(
        &mut self,
        tokens: usize,
        weight: &Weight,
        x: &Buffer,
        out: &mut Buffer,
        epilogue: Epilogue,
        rounded: bool,
    ) {
        let isa = self.isa;
        let precision = if rounded { self.precision } else { Precision::F32 };
        let output = Output::new(&mut out.data, out.width);
        let operands = operands(isa, &mut self.crew, weight, x, tokens, &mut self.operands);
        let piece = |scratch: &mut Scratch, from: usize, to: usize| {
            // SAFETY: pieces have disjoint rows of the weight, which are columns of the output.
            let place = unsafe { Place::new(isa, Target::Rows { output, epilogue, precision }) };
            weight.multiply(isa, (from, to), operands, &mut scratch.rows, place);
        };
        let work = weight.rows() * weight.cols() * tokens;
        split(&mut self.crew, weight.rows(), rows_per_piece(weight.rows(), weight.cols()), work, piece);
    }

    /// The pages of a layer, where the kernel for BF16 keys and queries takes them.
    #[cfg(target_arch = "x86_64")]
    fn bf16_pages<'a>(
        &self,
        shape: &Attention,
        keys: &'a Cells,
        values: &'a Cells,
    ) -> Option<(&'a [half::bf16], &'a [half::bf16])> {
        let fits = self.precision == Precision::Bf16
            && self.isa.multiplies_bf16()
            && shape.head_dim == attention::bf16::DIM
            && shape.heads / shape.kv_heads <= attention::bf16::QUERIES;
        match (keys, values) {
            (Cells::Bf16(keys), Cells::Bf16(values)) if fits => Some((keys, values)),
            _ => None,
        }
    }

    /// Packs all of them if all can be, on all threads: so a layer's experts have one kind of operand.
    fn weights_from(&mut self, weights: Vec<Linear>) -> Vec<Weight> {
        let bf16 = self.precision == Precision::Bf16 && self.isa.multiplies_bf16();
        if !bf16 || !weights.iter().all(Packed::takes) {
            return weights.into_iter().map(Weight::Stored).collect();
        }
        self.run(|own| weights.iter().map(|weight| Weight::Packed(own.pack(weight))).collect())
    }

    fn pack(&mut self, weight: &Linear) -> Packed {
        let mut packed = Packed::room(weight);
        let filler = packed.filler(weight);
        split(&mut self.crew, packed.tiles(), 1, weight.rows * weight.cols, |_, from, to| {
            // SAFETY: pieces have disjoint tiles, and `packed` is there until they are done.
            (from..to).for_each(|tile| unsafe { filler.fill(tile) });
        });
        packed
    }
}

impl Backend for Cpu {
    type Linear = Weight;
    type Vector = Lines<f32>;
    type Experts = Experts;
    type Buffer = Buffer;
    type Routes = Routes;
    type State = State;

    fn linear_from(&mut self, weight: Linear) -> Weight {
        self.reserve_rows(weight.cols);
        self.weights_from(vec![weight]).remove(0)
    }

    fn table_from(&mut self, weight: Linear) -> Weight {
        Weight::Stored(weight)
    }

    fn vector_from(&mut self, values: Vec<f32>) -> Lines<f32> {
        Lines::from(values)
    }

    fn experts_from(&mut self, up: Vec<Linear>, down: Vec<Linear>) -> Self::Experts {
        self.reserve_rows(up[0].cols.max(down[0].cols));
        self.experts.intermediate = self.experts.intermediate.max(up[0].rows);
        self.experts.starts.resize(self.experts.starts.len().max(up.len() + 1), 0);
        self.experts.active.reserve(up.len());
        for scratch in &mut self.crew.scratch {
            scratch.scores.resize(scratch.scores.len().max(2 * up.len()), 0.0);
        }
        Experts { up: self.weights_from(up), down: self.weights_from(down) }
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Buffer {
        self.operands.resize(self.operands.len().max(rows * width), 0);
        self.groups.reserve(rows.saturating_sub(self.groups.len()));
        Buffer::new(rows, width)
    }

    fn routes(&mut self, rows: usize, chosen: usize) -> Routes {
        // The widest intermediate is known by now: experts are made before the workspace.
        let work = &mut self.experts;
        let pairs = (rows * chosen).max(work.pairs.len());
        work.pairs.resize(pairs, 0);
        work.middle.resize(pairs * work.intermediate, 0.0);
        Routes::new(rows, chosen)
    }

    fn state(&mut self, plan: &StatePlan) -> State {
        let head = plan.mamba.iter().map(|m| (m.head_dim + 1) * m.state_size).max().unwrap_or(0);
        let page = plan.attention.iter().map(|a| plan.block_len * a.head_dim).max().unwrap_or(0);
        for scratch in &mut self.crew.scratch {
            scratch.scores.resize(scratch.scores.len().max(plan.blocks * plan.block_len), 0.0);
            scratch.page.resize(page, 0.0);
            scratch.state.resize(head, 0.0);
        }
        State::new(plan, self.precision)
    }

    fn run_within<T: Send, R: Send>(
        whole: &mut T,
        part: impl Fn(&mut T) -> &mut Self,
        step: impl FnOnce(&mut T) -> R + Send,
    ) -> R {
        let cpu = part(whole);
        // The caller leads, so it is the caller who has to give way.
        nice::give_way(std::mem::take(&mut cpu.nice));
        let team = Arc::clone(&cpu.crew.team);
        team.gather(|| step(whole))
    }

    fn embed(&mut self, tokens: &[u32], table: &Weight, out: &mut Buffer) {
        let Weight::Stored(table) = table else { unreachable!("a table is not packed") };
        ops::embed::reference(table, tokens, out.rows_mut(tokens.len()));
        self.precision.round(out.rows_mut(tokens.len()));
    }

    fn rms_norm(
        &mut self,
        tokens: usize,
        x: &Buffer,
        weight: &Lines<f32>,
        eps: f32,
        out: &mut Buffer,
        column: usize,
    ) {
        let (isa, precision, width) = (self.isa, self.precision, x.width);
        let output = Output::new(&mut out.data, out.width);
        split(&mut self.crew, tokens, 8, tokens * width, |_, from, to| {
            for t in from..to {
                // SAFETY: pieces have disjoint tokens, which are rows of the output.
                let out = unsafe { output.slice(t, column, width) };
                norms::rms_norm(isa, x.row(t), weight, eps, out);
                precision.round(out);
            }
        });
    }

    fn linear(&mut self, tokens: usize, weight: &Weight, x: &Buffer, out: &mut Buffer, epilogue: Epilogue) {
        self.product(tokens, weight, x, out, epilogue, true);
    }

    fn conv(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &Buffer,
        weight: &Lines<f32>,
        bias: &Lines<f32>,
        state: &mut State,
        out: &mut Buffer,
    ) {
        let (channels, tokens) = (shape.conv_channels(), inputs.tokens.len());
        let lanes = &mut state.lanes[layer];
        let conv = conv::Conv {
            isa: self.isa,
            precision: self.precision,
            shape,
            projected: projected.rows(tokens),
            weight,
            bias,
            tails: Output::new(&mut state.conv[layer], channels),
            drafts: lanes.drafts,
            lanes: Output::new(&mut lanes.raw, channels),
            output: Output::new(&mut out.data, out.width),
        };
        let work = tokens * channels * shape.conv_kernel * 4;
        split(&mut self.crew, channels, 256, work, |_, from, to| {
            for (index, sequence) in inputs.sequences.iter().enumerate() {
                // SAFETY: pieces have disjoint channels from..to of every row they touch.
                unsafe { conv.run(sequence, inputs.saves_of(index), (from, to)) };
            }
        });
    }

    fn ssm(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &Buffer,
        xbc: &Buffer,
        heads: Heads<'_, Lines<f32>>,
        state: &mut State,
        out: &mut Buffer,
    ) {
        let tokens = inputs.tokens.len();
        let (projected, xbc) = (projected.rows(tokens), xbc.rows(tokens));
        let head_state = shape.head_dim * shape.state_size;
        let scan = ssm::Scan {
            isa: self.isa,
            shape,
            layer,
            projected,
            xbc,
            heads: ops::ssm::Heads { a_log: heads.a_log, d: heads.d, dt_bias: heads.dt_bias },
            lanes: &state.lanes[layer],
            states: ssm::States::new(&mut state.ssm[layer], head_state),
            output: Output::new(&mut out.data, out.width),
        };
        let count = inputs.sequences.len() * shape.heads;
        let work = tokens * shape.heads * head_state * 2;
        split(&mut self.crew, count, 2, work, |scratch, from, to| {
            for unit in from..to {
                let (index, head) = (unit / shape.heads, unit % shape.heads);
                let (sequence, saves) = (&inputs.sequences[index], inputs.saves_of(index));
                // SAFETY: one unit of work owns this head of the sequence's places, and its columns of the output.
                unsafe { scan.run(sequence, saves, head, &mut scratch.state) };
            }
        });
        state.lanes[layer].keep(shape, inputs, projected, xbc);
    }

    fn gated_norm(
        &mut self,
        tokens: usize,
        shape: &Mamba,
        eps: f32,
        projected: &Buffer,
        weight: &Lines<f32>,
        y: &mut Buffer,
    ) {
        let (isa, precision, d) = (self.isa, self.precision, shape.inner());
        let groups = shape.groups;
        let output = Output::new(&mut y.data, y.width);
        split(&mut self.crew, tokens * groups, 2, tokens * d * 16, |_, from, to| {
            for unit in from..to {
                let (t, columns) = (unit / groups, unit % groups * (d / groups));
                // SAFETY: one unit of work owns one group of one token.
                let y = unsafe { output.slice(t, columns, d / groups) };
                let z = &projected.row(t)[columns..][..d / groups];
                norms::gated_norm(isa, z, &weight[columns..][..d / groups], eps, y);
                precision.round(y);
            }
        });
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy], state: &mut State) {
        state.copy_blocks(copies);
    }

    fn attention(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Attention,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        state: &mut State,
        out: &mut Buffer,
    ) {
        let (isa, precision) = (self.isa, self.precision);
        let pages = ops::attention::Pages::new(shape, state.block_len);
        let (keys, values) = (&mut state.keys[layer], &mut state.values[layer]);
        attention::append(inputs, pages, k, keys);
        attention::append(inputs, pages, v, values);
        let (keys, values): (&_, &_) = (keys, values);
        let output = Output::new(&mut out.data, out.width);
        let work = ops::attention::cost(shape, inputs, 4).flops as usize / 2;
        #[cfg(target_arch = "x86_64")]
        if let Some((keys, values)) = self.bf16_pages(shape, keys, values) {
            return attention::groups::attend_in_groups(
                &mut self.crew,
                &mut self.groups,
                inputs,
                shape,
                pages,
                q,
                keys,
                values,
                output,
                work,
            );
        }
        let count = inputs.tokens.len() * shape.heads;
        split(&mut self.crew, count, 1, work, |scratch, from, to| {
            for unit in from..to {
                let (token, head) = (unit / shape.heads, unit % shape.heads);
                let owner = inputs.sequences.partition_point(|s| s.first as usize <= token) - 1;
                let sequence = &inputs.sequences[owner];
                let query = &q.row(token)[head * shape.head_dim..][..shape.head_dim];
                // SAFETY: one unit of work owns one head of one token.
                let out = unsafe { output.slice(token, head * shape.head_dim, shape.head_dim) };
                let own = (sequence.past + token as u32 - sequence.first) as usize;
                let from = sequence.visible_from as usize;
                let view = attention::View { pages, blocks: inputs.blocks_of(sequence), from };
                let kv_head = head / (shape.heads / shape.kv_heads);
                let (scores, page) = (&mut scratch.scores[..own + 1 - from], &mut scratch.page[..]);
                attention::attend(isa, view, kv_head, query, keys, values, page, scores, out);
                precision.round(out);
            }
        });
    }

    fn route(
        &mut self,
        tokens: usize,
        shape: &Moe,
        u: &Buffer,
        gate: &Weight,
        bias: &Lines<f32>,
        routes: &mut Routes,
    ) {
        let (isa, chosen, experts) = (self.isa, shape.experts_per_token, shape.experts);
        let ids = Output::new(&mut routes.ids, chosen);
        let weights = Output::new(&mut routes.weights, chosen);
        let operands = operands(isa, &mut self.crew, gate, u, tokens, &mut self.operands);
        split(&mut self.crew, tokens, 4, tokens * gate.rows() * gate.cols(), |scratch, from, to| {
            let Scratch { rows, scores, .. } = scratch;
            let (logits, selection) = scores.split_at_mut(experts);
            for t in from..to {
                let (output, precision) = (Output::new(logits, experts), Precision::F32);
                let target = Target::Rows { output, epilogue: Epilogue::Store, precision };
                // SAFETY: the logits are this thread's own.
                let place = unsafe { Place::new(isa, target) };
                gate.multiply(isa, (0, experts), operands.one(t, gate.cols()), rows, place);
                // SAFETY: pieces have disjoint tokens, which are rows of ids and weights.
                let (ids, weights) = unsafe { (ids.slice(t, 0, chosen), weights.slice(t, 0, chosen)) };
                ops::route::choose(shape, bias, logits, &mut selection[..experts], ids, weights);
            }
        });
    }

    fn experts(
        &mut self,
        tokens: usize,
        shape: &Moe,
        v: &Buffer,
        routes: &Routes,
        Experts { up, down }: &Experts,
        out: &mut Buffer,
        epilogue: Epilogue,
    ) {
        let (isa, precision, chosen) = (self.isa, self.precision, shape.experts_per_token);
        let ExpertWork { starts, pairs, active, middle, .. } = &mut self.experts;
        sort_by_expert(&routes.ids[..tokens * chosen], shape.experts, starts, pairs, active);
        let (starts, pairs, active) = (&starts[..], &pairs[..tokens * chosen], &active[..]);
        let (width, inner) = (up[0].cols(), shape.intermediate);
        let range = |expert: u32| starts[expert as usize] as usize..starts[expert as usize + 1] as usize;
        let work = tokens * chosen * width * inner;

        // Up: pieces are (expert, rows), each expert's weights are read once for all who chose it.
        let hidden = match down[0].is_packed() {
            true => Middle::Bf16(Output::new(simd::halves_of(middle), inner)),
            false => Middle::F32(Output::new(&mut middle[..tokens * chosen * inner], inner)),
        };
        let operands = operands(isa, &mut self.crew, &up[0], v, tokens, &mut self.operands);
        let pieces = inner.div_ceil(ROWS_PER_PIECE);
        split(&mut self.crew, active.len() * pieces, 1, work, |scratch, from, to| {
            for unit in from..to {
                let (expert, rows) = (active[unit / pieces], unit % pieces * ROWS_PER_PIECE);
                let pairs = &pairs[range(expert)];
                let end = (rows + ROWS_PER_PIECE).min(inner);
                let target = match hidden {
                    Middle::Bf16(output) => Target::HiddenBf16 { output, pairs },
                    Middle::F32(output) => Target::Hidden { output, pairs, precision },
                };
                // SAFETY: one unit of work owns these rows of this expert's pairs.
                let place = unsafe { Place::new(isa, target) };
                let x = operands.of_pairs(pairs, chosen);
                up[expert as usize].multiply(isa, (rows, end), x, &mut scratch.rows, place);
            }
        });

        // Down: pieces are rows of the output; each walks the experts in order and adds in that order.
        let operands = match down[0].is_packed() {
            true => Operands::Bf16(Tokens::all(&simd::halves_of(middle)[..tokens * chosen * inner], tokens)),
            false => Operands::F32(Tokens::all(&middle[..tokens * chosen * inner], tokens)),
        };
        let output = Output::new(&mut out.data, out.width);
        split(&mut self.crew, width, ROWS_PER_PIECE, work, |scratch, from, to| {
            if epilogue == Epilogue::Store {
                for t in 0..tokens {
                    // SAFETY: pieces have disjoint columns from..to.
                    unsafe { output.slice(t, from, to - from) }.fill(0.0);
                }
            }
            for &expert in active {
                let pairs = &pairs[range(expert)];
                let target = Target::Weighted { output, pairs, weights: &routes.weights, chosen };
                // SAFETY: pieces have disjoint rows of the weight, which are columns of the output.
                let place = unsafe { Place::new(isa, target) };
                let x = operands.of_pairs(pairs, 1);
                down[expert as usize].multiply(isa, (from, to), x, &mut scratch.rows, place);
            }
            if precision != Precision::F32 {
                for t in 0..tokens {
                    // SAFETY: as above.
                    precision.round(unsafe { output.slice(t, from, to - from) });
                }
            }
        });
    }

    fn gather(&mut self, rows: &[u32], x: &Buffer, out: &mut Buffer) {
        for (i, &row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(row as usize));
        }
    }

    fn keep_hidden(&mut self, inputs: &StepInputs, x: &Buffer, state: &mut State) {
        state.keep_hidden(inputs, x);
    }

    fn hidden(&mut self, hidden: &[Hidden], x: &Buffer, drafted: &Buffer, state: &State, out: &mut Buffer) {
        state.hidden(hidden, x, drafted, out);
    }

    fn logits(&mut self, rows: usize, weight: &Weight, x: &Buffer, out: &mut Buffer) {
        self.product(rows, weight, x, out, Epilogue::Store, false);
    }

    fn largest(&mut self, rows: usize, x: &Buffer, indices: &mut Vec<u32>) {
        x.largest(rows, indices);
    }

    fn read<'a>(&'a mut self, rows: usize, buffer: &'a Buffer) -> &'a [f32] {
        buffer.rows(rows)
    }
}

/// Counting sort of pairs (token, choice) by the expert they chose.
fn sort_by_expert(ids: &[u32], experts: usize, starts: &mut [u32], pairs: &mut [u32], active: &mut Vec<u32>) {
    let starts = &mut starts[..experts + 1];
    starts.fill(0);
    for &id in ids {
        starts[id as usize + 1] += 1;
    }
    active.clear();
    for expert in 0..experts {
        if starts[expert + 1] > 0 {
            active.push(expert as u32);
        }
        starts[expert + 1] += starts[expert];
    }
    // Filling moves each start to its end; walking back afterwards would cost a second array, so fill from
    // the back: the last pair of an expert goes to its end, and `starts` ends up where it began.
    for (pair, &id) in ids.iter().enumerate().rev() {
        let end = &mut starts[id as usize + 1];
        *end -= 1;
        pairs[*end as usize] = pair as u32;
    }
    // Now starts[e + 1] is where expert e begins: shift the array down by one.
    starts.copy_within(1.., 0);
    starts[experts] = ids.len() as u32;
}
