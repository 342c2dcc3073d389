//! The interpreter that takes the time: every operation is another backend's, between two looks at the clock.
//!
//! What an operation must move it does not say: [`super::trace`] says it of the same step in the same order, because
//! both interpret the same `forward`. Only how many experts were chosen is known here alone.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::host::Routes;
use super::{Backend, BlockCopy, Heads, Hidden, StatePlan, StepInputs};
use crate::model::config::{Attention, Mamba, Moe};
use crate::ops::linear::Epilogue;
use crate::weights;

/// One operation of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// As [`super::trace::Record::op`].
    pub op: &'static str,
    pub time: Duration,
    /// Experts that were read; 0 for other operations.
    pub experts: usize,
}

/// Wraps a backend of host memory; passes everything on as it is until it is told to watch.
pub struct Profile<B> {
    inner: B,
    watching: bool,
    spans: Vec<Span>,
    chosen: HashSet<u32>,
}

impl<B> Profile<B> {
    pub fn new(inner: B) -> Self {
        Profile { inner, watching: false, spans: Vec::new(), chosen: HashSet::new() }
    }

    /// From now on operations are timed, or are not. What was seen is forgotten.
    pub fn watch(&mut self, on: bool) {
        self.watching = on;
        self.spans.clear();
    }

    /// Of all operations since the last [`Profile::watch`], in their order.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    fn time(&mut self, op: &'static str, work: impl FnOnce(&mut B)) {
        if !self.watching {
            return work(&mut self.inner);
        }
        let start = Instant::now();
        work(&mut self.inner);
        self.spans.push(Span { op, time: start.elapsed(), experts: 0 });
    }
}

impl<B: Backend<Routes = Routes>> Backend for Profile<B> {
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Experts = B::Experts;
    type Buffer = B::Buffer;
    type Routes = Routes;
    type State = B::State;

    fn linear_from(&mut self, weight: weights::Linear) -> B::Linear {
        self.inner.linear_from(weight)
    }

    fn table_from(&mut self, weight: weights::Linear) -> B::Linear {
        self.inner.table_from(weight)
    }

    fn vector_from(&mut self, values: Vec<f32>) -> B::Vector {
        self.inner.vector_from(values)
    }

    fn experts_from(&mut self, up: Vec<weights::Linear>, down: Vec<weights::Linear>) -> B::Experts {
        self.inner.experts_from(up, down)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> B::Buffer {
        self.inner.buffer(rows, width)
    }

    fn routes(&mut self, rows: usize, chosen: usize) -> Routes {
        self.inner.routes(rows, chosen)
    }

    fn state(&mut self, plan: &StatePlan) -> B::State {
        self.inner.state(plan)
    }

    fn run_within<T: Send, R: Send>(
        whole: &mut T,
        part: impl Fn(&mut T) -> &mut Self,
        step: impl FnOnce(&mut T) -> R + Send,
    ) -> R {
        B::run_within(whole, |whole| &mut part(whole).inner, step)
    }

    fn embed(&mut self, tokens: &[u32], table: &B::Linear, out: &mut B::Buffer) {
        self.time("embed", |inner| inner.embed(tokens, table, out));
    }

    fn rms_norm(
        &mut self,
        tokens: usize,
        x: &B::Buffer,
        weight: &B::Vector,
        eps: f32,
        out: &mut B::Buffer,
        column: usize,
    ) {
        self.time("rms_norm", |inner| inner.rms_norm(tokens, x, weight, eps, out, column));
    }

    fn linear(
        &mut self,
        tokens: usize,
        weight: &B::Linear,
        x: &B::Buffer,
        out: &mut B::Buffer,
        epilogue: Epilogue,
    ) {
        self.time(epilogue.linear_name(), |inner| inner.linear(tokens, weight, x, out, epilogue));
    }

    fn conv(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &B::Buffer,
        weight: &B::Vector,
        bias: &B::Vector,
        state: &mut B::State,
        out: &mut B::Buffer,
    ) {
        self.time("conv", |inner| {
            inner.conv(inputs, layer, shape, projected, weight, bias, state, out);
        });
    }

    fn ssm(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Mamba,
        projected: &B::Buffer,
        xbc: &B::Buffer,
        heads: Heads<'_, B::Vector>,
        state: &mut B::State,
        out: &mut B::Buffer,
    ) {
        self.time("ssm", |inner| inner.ssm(inputs, layer, shape, projected, xbc, heads, state, out));
    }

    fn gated_norm(
        &mut self,
        tokens: usize,
        shape: &Mamba,
        eps: f32,
        projected: &B::Buffer,
        weight: &B::Vector,
        y: &mut B::Buffer,
    ) {
        self.time("gated_norm", |inner| inner.gated_norm(tokens, shape, eps, projected, weight, y));
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy], state: &mut B::State) {
        self.time("copy_blocks", |inner| inner.copy_blocks(copies, state));
    }

    fn attention(
        &mut self,
        inputs: &StepInputs,
        layer: usize,
        shape: &Attention,
        q: &B::Buffer,
        k: &B::Buffer,
        v: &B::Buffer,
        state: &mut B::State,
        out: &mut B::Buffer,
    ) {
        self.time("attention", |inner| inner.attention(inputs, layer, shape, q, k, v, state, out));
    }

    fn route(
        &mut self,
        tokens: usize,
        shape: &Moe,
        u: &B::Buffer,
        gate: &B::Linear,
        bias: &B::Vector,
        routes: &mut Routes,
    ) {
        self.time("route", |inner| inner.route(tokens, shape, u, gate, bias, routes));
    }

    fn experts(
        &mut self,
        tokens: usize,
        shape: &Moe,
        v: &B::Buffer,
        routes: &Routes,
        experts: &B::Experts,
        out: &mut B::Buffer,
        epilogue: Epilogue,
    ) {
        self.time("experts", |inner| inner.experts(tokens, shape, v, routes, experts, out, epilogue));
        if !self.watching {
            return;
        }
        self.chosen.clear();
        self.chosen.extend(&routes.ids[..tokens * shape.experts_per_token]);
        if let Some(span) = self.spans.last_mut() {
            span.experts = self.chosen.len();
        }
    }

    fn gather(&mut self, rows: &[u32], x: &B::Buffer, out: &mut B::Buffer) {
        self.time("gather", |inner| inner.gather(rows, x, out));
    }

    fn keep_hidden(&mut self, inputs: &StepInputs, x: &B::Buffer, state: &mut B::State) {
        self.time("keep_hidden", |inner| inner.keep_hidden(inputs, x, state));
    }

    fn hidden(
        &mut self,
        hidden: &[Hidden],
        x: &B::Buffer,
        drafted: &B::Buffer,
        state: &B::State,
        out: &mut B::Buffer,
    ) {
        self.time("hidden", |inner| inner.hidden(hidden, x, drafted, state, out));
    }

    fn logits(&mut self, rows: usize, weight: &B::Linear, x: &B::Buffer, out: &mut B::Buffer) {
        self.time("logits", |inner| inner.logits(rows, weight, x, out));
    }

    fn largest(&mut self, rows: usize, x: &B::Buffer, indices: &mut Vec<u32>) {
        self.time("largest", |inner| inner.largest(rows, x, indices));
    }

    fn read<'a>(&'a mut self, rows: usize, buffer: &'a B::Buffer) -> &'a [f32] {
        self.inner.read(rows, buffer)
    }
}
