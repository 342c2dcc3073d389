//! The one definition of the network: `forward` over any [`Backend`]. Spec nemotron-h §2 and §3.
//!
//! [`assemble`] checks the sizes and allocates; from then on a step only writes into what exists.

mod assemble;

use super::config::{Attention, Mamba, ModelConfig, Moe};
use super::{Limits, Network, StepError};
use crate::backend::{Backend, DraftInputs, Heads, StepInputs};
use crate::ops::{ShapeError, linear::Epilogue};

/// A network whose weights and configuration do not fit each other, or a config this code cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("layer {layer}: {source}")]
    Layer { layer: String, source: ShapeError },
    #[error("layer {layer} is configured as {expected} but its weights are those of {got}")]
    Kind { layer: String, expected: &'static str, got: &'static str },
    #[error(
        "layer {layer} of the drafter is a Mamba layer: expected attention, MoE or MLP, whose drafts can be forgotten"
    )]
    DrafterState { layer: String },
}

/// A resident network: weights as its backend holds them, workspace and state, all made at start.
pub struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    limits: Limits,
    body: Body<B>,
    mtp: Option<Mtp<B>>,
    /// Residual stream [T, h]; after a step the drafter reads it.
    x: B::Buffer,
    work: Workspace<B>,
    state: B::State,
}

/// The weights every step reads.
struct Body<B: Backend> {
    embeddings: B::Linear,
    lm_head: B::Linear,
    norm_f: B::Vector,
    layers: Vec<Block<B>>,
}

/// One layer: a norm and a mixer. The index is that of its state among layers of its kind.
struct Block<B: Backend> {
    norm: B::Vector,
    mixer: BlockMixer<B>,
}

enum BlockMixer<B: Backend> {
    Mamba {
        index: usize,
        shape: Mamba,
        in_proj: B::Linear,
        conv_weight: B::Vector,
        conv_bias: B::Vector,
        a_log: B::Vector,
        d: B::Vector,
        dt_bias: B::Vector,
        norm: B::Vector,
        out_proj: B::Linear,
    },
    Attention {
        index: usize,
        shape: Attention,
        q_proj: B::Linear,
        k_proj: B::Linear,
        v_proj: B::Linear,
        o_proj: B::Linear,
    },
    Moe {
        shape: Moe,
        gate: B::Linear,
        correction_bias: B::Vector,
        latent: Option<(B::Linear, B::Linear)>,
        experts: B::Experts,
        shared: Option<(B::Linear, B::Linear)>,
    },
    Mlp {
        up: B::Linear,
        down: B::Linear,
    },
}

struct Mtp<B: Backend> {
    enorm: B::Vector,
    hnorm: B::Vector,
    eh_proj: B::Linear,
    layers: Vec<Block<B>>,
    final_norm: B::Vector,
    work: MtpWorkspace<B>,
}

/// Activations of one step, named as `forward` uses them; `[step_tokens, …]` unless noted.
struct Workspace<B: Backend> {
    /// Normed input of the mixer [T, h].
    u: B::Buffer,
    /// in_proj's output [T, 2d + 2GN + H]; z and dt are read in place.
    projected: Vec<B::Buffer>,
    /// Convolved x, B, C [T, c].
    xbc: Vec<B::Buffer>,
    /// Mixer inner width [T, d].
    y: Vec<B::Buffer>,
    q: Vec<B::Buffer>,
    k: Vec<B::Buffer>,
    v: Vec<B::Buffer>,
    attended: Vec<B::Buffer>,
    latent: Vec<B::Buffer>,
    combined: Vec<B::Buffer>,
    /// Inner activation of the shared expert or the dense MLP.
    inner: Vec<B::Buffer>,
    routes: Vec<B::Routes>,
    /// Which buffers of the lists above a layer uses: layers of one width share.
    uses: Vec<Uses>,
    /// Rows whose logits are wanted [R, h], normed, and their logits [R, V].
    picked: B::Buffer,
    final_rows: B::Buffer,
    logits: B::Buffer,
}

struct MtpWorkspace<B: Backend> {
    /// Hidden vectors of the entries [T, h].
    hidden: B::Buffer,
    /// Residual stream of the drafter [T, h].
    x: B::Buffer,
    /// enorm(embedding) and hnorm(hidden) side by side [T, 2h].
    joined: B::Buffer,
    /// Output of the last pass [R, h], which the next may join.
    drafted: B::Buffer,
}

/// Indices of a layer's buffers in the lists of [`Workspace`].
#[derive(Clone, Copy, Default)]
struct Uses {
    a: usize,
    b: usize,
    c: usize,
}

impl<B: Backend> Model<B> {
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Runs one step; returns `[logit_rows, V]`.
    pub fn forward(&mut self, inputs: &StepInputs) -> &[f32] {
        if cfg!(debug_assertions) {
            inputs.check();
        }
        let Model { backend, config, limits, body, mtp, x, work, state, .. } = self;
        let (rows, drafts) = (inputs.logit_rows.len(), mtp.is_some() && limits.lanes > 0);
        backend.run(|backend| {
            forward(backend, config, body, x, work, state, inputs);
            if drafts {
                backend.keep_hidden(inputs, x, state);
            }
            if rows > 0 {
                backend.gather(&inputs.logit_rows, x, &mut work.picked);
                let eps = config.norm_eps;
                backend.rms_norm(rows, &work.picked, &body.norm_f, eps, &mut work.final_rows, 0);
                backend.logits(rows, &body.lm_head, &work.final_rows, &mut work.logits);
            }
        });
        self.backend.read(rows, &self.work.logits)
    }

    /// Runs one pass of the drafter; returns its logits `[inputs.step.logit_rows, V]`, of which there are none without
    /// a drafter.
    pub fn forward_draft(&mut self, inputs: &DraftInputs) -> &[f32] {
        let rows = self.run_draft(inputs);
        self.backend.read(rows, &self.work.logits)
    }

    /// Leaves the logits in the workspace and returns how many rows they have.
    fn run_draft(&mut self, inputs: &DraftInputs) -> usize {
        if cfg!(debug_assertions) {
            inputs.check();
        }
        let Model { backend, config, body, mtp, x, work, state, .. } = self;
        let Some(mtp) = mtp else { return 0 };
        backend.run(move |backend| draft(backend, config, body, mtp, x, work, state, inputs));
        inputs.step.logit_rows.len()
    }
}

impl<B: Backend> Network for Model<B> {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
        Ok(self.forward(inputs))
    }

    fn can_draft(&self) -> bool {
        self.mtp.is_some()
    }

    fn draft(&mut self, inputs: &DraftInputs, drafts: &mut Vec<u32>) -> Result<(), StepError> {
        drafts.clear();
        let rows = self.run_draft(inputs);
        self.backend.largest(rows, &self.work.logits, drafts);
        Ok(())
    }
}

/// Embedding and every layer: leaves the residual stream in `x`.
fn forward<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    body: &Body<B>,
    x: &mut B::Buffer,
    work: &mut Workspace<B>,
    state: &mut B::State,
    inputs: &StepInputs,
) {
    if !inputs.block_copies.is_empty() {
        backend.copy_blocks(&inputs.block_copies, state);
    }
    backend.embed(&inputs.tokens, &body.embeddings, x);
    for (i, block) in body.layers.iter().enumerate() {
        layer(backend, block, i, config.norm_eps, x, work, state, inputs);
    }
}

/// One pass of the MTP block over `step`, the residual stream of the last step, or over its own last output.
fn draft<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    body: &Body<B>,
    mtp: &mut Mtp<B>,
    step: &B::Buffer,
    work: &mut Workspace<B>,
    state: &mut B::State,
    inputs: &DraftInputs,
) {
    let (tokens, rows) = (inputs.step.tokens.len(), inputs.step.logit_rows.len());
    let (h, eps) = (config.hidden_size, config.norm_eps);
    let MtpWorkspace { hidden, x, joined, drafted } = &mut mtp.work;
    backend.hidden(&inputs.hidden, step, drafted, state, hidden);
    if inputs.recursive() {
        backend.rms_norm(tokens, hidden, &mtp.hnorm, eps, joined, h);
    } else {
        // The drafter was trained on what lm_head sees; its own output went through its own final norm.
        backend.rms_norm(tokens, hidden, &body.norm_f, eps, x, 0);
        backend.rms_norm(tokens, x, &mtp.hnorm, eps, joined, h);
    }
    backend.embed(&inputs.step.tokens, &body.embeddings, x);
    backend.rms_norm(tokens, x, &mtp.enorm, eps, joined, 0);
    backend.linear(tokens, &mtp.eh_proj, joined, x, Epilogue::Store);
    for (i, block) in mtp.layers.iter().enumerate() {
        layer(backend, block, body.layers.len() + i, eps, x, work, state, &inputs.step);
    }
    if rows > 0 {
        backend.gather(&inputs.step.logit_rows, x, &mut work.picked);
        backend.rms_norm(rows, &work.picked, &mtp.final_norm, eps, drafted, 0);
        backend.logits(rows, &body.lm_head, drafted, &mut work.logits);
    }
}

/// `x += mixer(rms(x))`: exactly one mixer and one norm per layer.
fn layer<B: Backend>(
    backend: &mut B,
    block: &Block<B>,
    index: usize,
    eps: f32,
    x: &mut B::Buffer,
    work: &mut Workspace<B>,
    state: &mut B::State,
    inputs: &StepInputs,
) {
    let tokens = inputs.tokens.len();
    let uses = work.uses[index];
    let u = &mut work.u;
    backend.rms_norm(tokens, x, &block.norm, eps, u, 0);
    match &block.mixer {
        BlockMixer::Mamba {
            index,
            shape,
            in_proj,
            conv_weight,
            conv_bias,
            a_log,
            d,
            dt_bias,
            norm,
            out_proj,
        } => {
            let projected = &mut work.projected[uses.a];
            let (xbc, y) = (&mut work.xbc[uses.b], &mut work.y[uses.c]);
            let heads = Heads { a_log, d, dt_bias };
            backend.linear(tokens, in_proj, u, projected, Epilogue::Store);
            backend.conv(inputs, *index, shape, projected, conv_weight, conv_bias, state, xbc);
            backend.ssm(inputs, *index, shape, projected, xbc, heads, state, y);
            backend.gated_norm(tokens, shape, eps, projected, norm, y);
            backend.linear(tokens, out_proj, y, x, Epilogue::Add);
        }
        BlockMixer::Attention { index, shape, q_proj, k_proj, v_proj, o_proj } => {
            let (q, attended) = (&mut work.q[uses.a], &mut work.attended[uses.a]);
            let (k, v) = (&mut work.k[uses.b], &mut work.v[uses.b]);
            backend.linear(tokens, q_proj, u, q, Epilogue::Store);
            backend.linear(tokens, k_proj, u, k, Epilogue::Store);
            backend.linear(tokens, v_proj, u, v, Epilogue::Store);
            backend.attention(inputs, *index, shape, q, k, v, state, attended);
            backend.linear(tokens, o_proj, attended, x, Epilogue::Add);
        }
        BlockMixer::Moe { shape, gate, correction_bias, latent, experts, shared } => {
            let routes = &mut work.routes[uses.a];
            backend.route(tokens, shape, u, gate, correction_bias, routes);
            match latent {
                // Only the routed experts live in the latent space; router and shared expert see u.
                Some((fc1, fc2)) => {
                    let (narrow, combined) = (&mut work.latent[uses.b], &mut work.combined[uses.b]);
                    backend.linear(tokens, fc1, u, narrow, Epilogue::Store);
                    backend.experts(tokens, shape, narrow, routes, experts, combined, Epilogue::Store);
                    backend.linear(tokens, fc2, combined, x, Epilogue::Add);
                }
                None => backend.experts(tokens, shape, u, routes, experts, x, Epilogue::Add),
            }
            if let Some((up, down)) = shared {
                let inner = &mut work.inner[uses.c];
                backend.linear(tokens, up, u, inner, Epilogue::Relu2);
                backend.linear(tokens, down, inner, x, Epilogue::Add);
            }
        }
        BlockMixer::Mlp { up, down } => {
            let inner = &mut work.inner[uses.c];
            backend.linear(tokens, up, u, inner, Epilogue::Relu2);
            backend.linear(tokens, down, inner, x, Epilogue::Add);
        }
    }
}

#[cfg(test)]
mod tests;
