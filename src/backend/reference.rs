//! The obviously right interpreter: every operation is its plain scalar loop from `ops`, on one thread.

use super::{
    Backend, BlockCopy, Heads, Hidden, Precision, StatePlan, StepInputs,
    host::{Buffer, Routes, State},
};
use crate::model::config::{Attention, Mamba, Moe};
use crate::ops::lines::Lines;
use crate::ops::{self, attention::Pages, linear::Epilogue};
use crate::weights::Linear;

pub struct Reference {
    precision: Precision,
    /// One dequantised row, and a second for what needs two.
    row: Vec<f32>,
    scores: Vec<f32>,
}

impl Reference {
    pub fn new(precision: Precision) -> Self {
        Reference { precision, row: Vec::new(), scores: Vec::new() }
    }

    fn product(&mut self, tokens: usize, weight: &Linear, x: &Buffer, out: &mut Buffer, epilogue: Epilogue) {
        self.row.resize(weight.cols.max(self.row.len()), 0.0);
        let row = &mut self.row[..weight.cols];
        ops::linear::reference(weight, x.rows(tokens), out.rows_mut(tokens), epilogue, row);
    }
}

impl Backend for Reference {
    type Linear = Linear;
    type Vector = Lines<f32>;
    type Experts = (Vec<Linear>, Vec<Linear>);
    type Buffer = Buffer;
    type Routes = Routes;
    type State = State;

    fn linear_from(&mut self, weight: Linear) -> Linear {
        weight
    }

    fn vector_from(&mut self, values: Vec<f32>) -> Lines<f32> {
        values.into()
    }

    fn experts_from(&mut self, up: Vec<Linear>, down: Vec<Linear>) -> Self::Experts {
        (up, down)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Buffer {
        Buffer::new(rows, width)
    }

    fn routes(&mut self, rows: usize, chosen: usize) -> Routes {
        Routes::new(rows, chosen)
    }

    fn state(&mut self, plan: &StatePlan) -> State {
        State::new(plan, self.precision)
    }

    fn embed(&mut self, tokens: &[u32], table: &Linear, out: &mut Buffer) {
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
        for t in 0..tokens {
            let out = &mut out.row_mut(t)[column..][..x.width];
            ops::rms_norm::reference(x.row(t), weight, eps, out);
            self.precision.round(out);
        }
    }

    fn linear(&mut self, tokens: usize, weight: &Linear, x: &Buffer, out: &mut Buffer, epilogue: Epilogue) {
        self.product(tokens, weight, x, out, epilogue);
        self.precision.round(out.rows_mut(tokens));
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
        let count = inputs.tokens.len();
        ops::conv::reference(
            shape,
            inputs,
            projected.rows(count),
            weight,
            bias,
            &mut state.conv[layer],
            &mut state.lanes[layer],
            out.rows_mut(count),
        );
        self.precision.round(out.rows_mut(count));
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
        let count = inputs.tokens.len();
        let heads = ops::ssm::Heads { a_log: heads.a_log, d: heads.d, dt_bias: heads.dt_bias };
        ops::ssm::reference(
            shape,
            layer,
            inputs,
            projected.rows(count),
            xbc.rows(count),
            heads,
            &mut state.ssm[layer],
            &mut state.lanes[layer],
            out.rows_mut(count),
        );
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
        for t in 0..tokens {
            let z = &projected.row(t)[..shape.inner()];
            ops::gated_norm::reference(shape.groups, eps, z, weight, y.row_mut(t));
        }
        self.precision.round(y.rows_mut(tokens));
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
        let count = inputs.tokens.len();
        let pages = Pages::new(shape, state.block_len);
        ops::attention::reference(
            shape,
            inputs,
            pages,
            q.rows(count),
            k.rows(count),
            v.rows(count),
            &mut state.keys[layer],
            &mut state.values[layer],
            out.rows_mut(count),
        );
        self.precision.round(out.rows_mut(count));
    }

    fn route(
        &mut self,
        tokens: usize,
        shape: &Moe,
        u: &Buffer,
        gate: &Linear,
        bias: &Lines<f32>,
        routes: &mut Routes,
    ) {
        let (experts, chosen) = (shape.experts, shape.experts_per_token);
        self.row.resize(gate.cols.max(self.row.len()), 0.0);
        self.scores.resize((2 * experts).max(self.scores.len()), 0.0);
        let (logits, selection) = self.scores.split_at_mut(experts);
        for t in 0..tokens {
            let row = &mut self.row[..gate.cols];
            ops::linear::reference(gate, u.row(t), logits, Epilogue::Store, row);
            let range = t * chosen..(t + 1) * chosen;
            let (ids, weights) = (&mut routes.ids[range.clone()], &mut routes.weights[range]);
            ops::route::choose(shape, bias, logits, &mut selection[..experts], ids, weights);
        }
    }

    fn experts(
        &mut self,
        tokens: usize,
        shape: &Moe,
        v: &Buffer,
        routes: &Routes,
        experts: &Self::Experts,
        out: &mut Buffer,
        epilogue: Epilogue,
    ) {
        let (ids, weights) = (&routes.ids, &routes.weights);
        let (v, to) = (v.rows(tokens), out.rows_mut(tokens));
        ops::experts::reference(shape, &experts.0, &experts.1, ids, weights, v, to, epilogue);
        self.precision.round(to);
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

    fn logits(&mut self, rows: usize, weight: &Linear, x: &Buffer, out: &mut Buffer) {
        self.product(rows, weight, x, out, Epilogue::Store);
    }

    fn largest(&mut self, rows: usize, x: &Buffer, indices: &mut Vec<u32>) {
        x.largest(rows, indices);
    }

    fn read<'a>(&'a mut self, rows: usize, buffer: &'a Buffer) -> &'a [f32] {
        buffer.rows(rows)
    }
}
