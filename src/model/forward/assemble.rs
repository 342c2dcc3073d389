//! Putting a network together: every size is checked, every weight handed to the backend, everything a step will
//! touch allocated. After this nothing about sizes can fail.

use super::{Block, BlockMixer, Body, Model, ModelError, Mtp, MtpWorkspace, Uses, Workspace};
use crate::backend::Backend;
use crate::model::config::{Attention, Layer, Mamba, ModelConfig, Moe};
use crate::model::fields::{AttentionFields, Fields, LayerFields, MambaFields, Mixer, MoeFields, MtpFields};
use crate::model::{Limits, plan};
use crate::ops::{ShapeError, agree};
use crate::weights::Linear;

impl<B: Backend> Model<B> {
    /// Puts a network together: checks every size, hands the weights to the backend, allocates everything
    /// that a step will touch.
    pub fn new(
        mut backend: B,
        config: ModelConfig,
        fields: Fields<Linear>,
        limits: Limits,
    ) -> Result<Self, ModelError> {
        // Without weights there is no drafter, whatever the configuration says, and no state of one.
        let config = ModelConfig { mtp: config.mtp.filter(|_| fields.mtp.is_some()), ..config };
        let (h, v) = (config.hidden_size, config.vocab_size);
        let at = |layer: &str| {
            let layer = layer.to_owned();
            move |source| ModelError::Layer { layer, source }
        };
        check(&fields.embeddings, "embeddings", v, h).map_err(at("embeddings"))?;
        check(&fields.lm_head, "lm_head", v, h).map_err(at("lm_head"))?;
        agree("norm_f", "width", h, fields.norm_f.len()).map_err(at("norm_f"))?;
        agree("layers", "count", config.layers.len(), fields.layers.len()).map_err(at("layers"))?;

        let mut builder = Builder::<B>::new(h, limits);
        let mut layers = Vec::with_capacity(fields.layers.len());
        for (i, (layer, fields)) in config.layers.iter().zip(fields.layers).enumerate() {
            layers.push(builder.block(&mut backend, &i.to_string(), layer, fields)?);
        }
        let mtp = match (&config.mtp, fields.mtp) {
            (Some(kinds), Some(fields)) => Some(builder.mtp(&mut backend, kinds, fields)?),
            _ => None,
        };
        let body = Body {
            embeddings: backend.table_from(fields.embeddings),
            lm_head: backend.linear_from(fields.lm_head),
            norm_f: backend.vector_from(fields.norm_f),
            layers,
        };
        let state = backend.state(&plan::state_plan(&config, &limits));
        let x = backend.buffer(limits.step_tokens, h);
        let work = builder.finish(&mut backend, v);
        Ok(Model { backend, config, limits, body, mtp, x, work, state })
    }
}

/// Collects what the layers need while they are checked: buffers by width. Counts them by kind, as the state does.
struct Builder<B: Backend> {
    hidden: usize,
    limits: Limits,
    mamba: usize,
    attention: usize,
    widths: Widths,
    uses: Vec<Uses>,
    kind: std::marker::PhantomData<B>,
}

/// Distinct widths per list of [`Workspace`], in the order of its buffers.
#[derive(Default)]
struct Widths {
    projected: Vec<usize>,
    xbc: Vec<usize>,
    y: Vec<usize>,
    q: Vec<usize>,
    k: Vec<usize>,
    latent: Vec<usize>,
    inner: Vec<usize>,
    chosen: Vec<usize>,
}

/// Index of `width` in `list`, added if it is not there.
fn slot_of(list: &mut Vec<usize>, width: usize) -> usize {
    list.iter().position(|&w| w == width).unwrap_or_else(|| {
        list.push(width);
        list.len() - 1
    })
}

fn check(weight: &Linear, name: &'static str, rows: usize, cols: usize) -> Result<(), ShapeError> {
    crate::ops::linear::check(name, weight, rows, cols)
}

impl<B: Backend> Builder<B> {
    fn new(hidden: usize, limits: Limits) -> Self {
        let (widths, uses) = (Widths::default(), Vec::new());
        Builder { hidden, limits, mamba: 0, attention: 0, widths, uses, kind: std::marker::PhantomData }
    }

    fn block(
        &mut self,
        backend: &mut B,
        name: &str,
        layer: &Layer,
        fields: LayerFields<Linear>,
    ) -> Result<Block<B>, ModelError> {
        let got = kind_of(&fields.mixer);
        let at = |source| ModelError::Layer { layer: name.to_owned(), source };
        agree("norm", "width", self.hidden, fields.norm.len()).map_err(at)?;
        let mixer = match (*layer, fields.mixer) {
            (Layer::Mamba(shape), Mixer::Mamba(fields)) => self.mamba(backend, shape, fields).map_err(at)?,
            (Layer::Attention(shape), Mixer::Attention(fields)) => {
                self.attention(backend, shape, fields).map_err(at)?
            }
            (Layer::Moe(shape), Mixer::Moe(fields)) => self.moe(backend, shape, fields).map_err(at)?,
            (Layer::Mlp(shape), Mixer::Mlp(fields)) => {
                check(&fields.up, "up_proj", shape.intermediate, self.hidden).map_err(at)?;
                check(&fields.down, "down_proj", self.hidden, shape.intermediate).map_err(at)?;
                let c = slot_of(&mut self.widths.inner, shape.intermediate);
                self.uses.push(Uses { c, ..Uses::default() });
                BlockMixer::Mlp { up: backend.linear_from(fields.up), down: backend.linear_from(fields.down) }
            }
            (layer, _) => {
                let expected = match layer {
                    Layer::Mamba(_) => "mamba",
                    Layer::Attention(_) => "attention",
                    Layer::Moe(_) => "moe",
                    Layer::Mlp(_) => "mlp",
                };
                return Err(ModelError::Kind { layer: name.to_owned(), expected, got });
            }
        };
        Ok(Block { norm: backend.vector_from(fields.norm), mixer })
    }

    fn mamba(
        &mut self,
        backend: &mut B,
        shape: Mamba,
        fields: MambaFields<Linear>,
    ) -> Result<BlockMixer<B>, ShapeError> {
        let (d, c, heads) = (shape.inner(), shape.conv_channels(), shape.heads);
        check(&fields.in_proj, "in_proj", shape.projection(), self.hidden)?;
        check(&fields.out_proj, "out_proj", self.hidden, d)?;
        agree("conv1d.weight", "elements", c * shape.conv_kernel, fields.conv_weight.len())?;
        agree("conv1d.bias", "elements", c, fields.conv_bias.len())?;
        agree("A_log", "elements", heads, fields.a_log.len())?;
        agree("D", "elements", heads, fields.d.len())?;
        agree("dt_bias", "elements", heads, fields.dt_bias.len())?;
        agree("mixer.norm", "elements", d, fields.norm.len())?;
        self.uses.push(Uses {
            a: slot_of(&mut self.widths.projected, shape.projection()),
            b: slot_of(&mut self.widths.xbc, c),
            c: slot_of(&mut self.widths.y, d),
        });
        let index = self.mamba;
        self.mamba += 1;
        Ok(BlockMixer::Mamba {
            index,
            shape,
            in_proj: backend.linear_from(fields.in_proj),
            conv_weight: backend.vector_from(by_taps(&fields.conv_weight, shape.conv_kernel)),
            conv_bias: backend.vector_from(fields.conv_bias),
            a_log: backend.vector_from(fields.a_log),
            d: backend.vector_from(fields.d),
            dt_bias: backend.vector_from(fields.dt_bias),
            norm: backend.vector_from(fields.norm),
            out_proj: backend.linear_from(fields.out_proj),
        })
    }

    fn attention(
        &mut self,
        backend: &mut B,
        shape: Attention,
        fields: AttentionFields<Linear>,
    ) -> Result<BlockMixer<B>, ShapeError> {
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        check(&fields.q_proj, "q_proj", wide, self.hidden)?;
        check(&fields.k_proj, "k_proj", narrow, self.hidden)?;
        check(&fields.v_proj, "v_proj", narrow, self.hidden)?;
        check(&fields.o_proj, "o_proj", self.hidden, wide)?;
        let (a, b) = (slot_of(&mut self.widths.q, wide), slot_of(&mut self.widths.k, narrow));
        self.uses.push(Uses { a, b, ..Uses::default() });
        let index = self.attention;
        self.attention += 1;
        Ok(BlockMixer::Attention {
            index,
            shape,
            q_proj: backend.linear_from(fields.q_proj),
            k_proj: backend.linear_from(fields.k_proj),
            v_proj: backend.linear_from(fields.v_proj),
            o_proj: backend.linear_from(fields.o_proj),
        })
    }

    fn moe(
        &mut self,
        backend: &mut B,
        shape: Moe,
        fields: MoeFields<Linear>,
    ) -> Result<BlockMixer<B>, ShapeError> {
        let (h, width) = (self.hidden, shape.latent.unwrap_or(self.hidden));
        check(&fields.gate, "gate", shape.experts, h)?;
        agree("e_score_correction_bias", "elements", shape.experts, fields.correction_bias.len())?;
        agree("experts.up_proj", "count", shape.experts, fields.up.len())?;
        agree("experts.down_proj", "count", shape.experts, fields.down.len())?;
        for (up, down) in fields.up.iter().zip(&fields.down) {
            check(up, "experts.up_proj", shape.intermediate, width)?;
            check(down, "experts.down_proj", width, shape.intermediate)?;
        }
        agree("latent projections", "count", shape.latent.is_some().into(), fields.latent.is_some().into())?;
        if let Some((fc1, fc2)) = &fields.latent {
            check(fc1, "fc1_latent_proj", width, h)?;
            check(fc2, "fc2_latent_proj", h, width)?;
        }
        if let Some((up, down)) = &fields.shared {
            check(up, "shared_experts.up_proj", shape.shared_intermediate, h)?;
            check(down, "shared_experts.down_proj", h, shape.shared_intermediate)?;
        }
        self.uses.push(Uses {
            a: slot_of(&mut self.widths.chosen, shape.experts_per_token),
            b: shape.latent.map_or(0, |width| slot_of(&mut self.widths.latent, width)),
            c: slot_of(&mut self.widths.inner, shape.shared_intermediate),
        });
        let mut pair = |(a, b)| (backend.linear_from(a), backend.linear_from(b));
        Ok(BlockMixer::Moe {
            shape,
            latent: fields.latent.map(&mut pair),
            shared: fields.shared.map(&mut pair),
            gate: backend.linear_from(fields.gate),
            correction_bias: backend.vector_from(fields.correction_bias),
            experts: backend.experts_from(fields.up, fields.down),
        })
    }

    fn mtp(
        &mut self,
        backend: &mut B,
        kinds: &[Layer],
        fields: MtpFields<Linear>,
    ) -> Result<Mtp<B>, ModelError> {
        let (h, limits) = (self.hidden, self.limits);
        let at = |source| ModelError::Layer { layer: "mtp".to_owned(), source };
        check(&fields.eh_proj, "eh_proj", h, 2 * h).map_err(at)?;
        for (name, vector) in
            [("enorm", &fields.enorm), ("hnorm", &fields.hnorm), ("final_layernorm", &fields.final_norm)]
        {
            agree(name, "width", h, vector.len()).map_err(at)?;
        }
        agree("mtp.layers", "count", kinds.len(), fields.layers.len()).map_err(at)?;
        let mut layers = Vec::with_capacity(kinds.len());
        for (i, (kind, fields)) in kinds.iter().zip(fields.layers).enumerate() {
            let name = format!("mtp.{i}");
            if matches!(kind, Layer::Mamba(_)) {
                return Err(ModelError::DrafterState { layer: name });
            }
            layers.push(self.block(backend, &name, kind, fields)?);
        }
        Ok(Mtp {
            enorm: backend.vector_from(fields.enorm),
            hnorm: backend.vector_from(fields.hnorm),
            eh_proj: backend.linear_from(fields.eh_proj),
            layers,
            final_norm: backend.vector_from(fields.final_norm),
            work: MtpWorkspace {
                hidden: backend.buffer(limits.step_tokens, h),
                x: backend.buffer(limits.step_tokens, h),
                joined: backend.buffer(limits.step_tokens, 2 * h),
                drafted: backend.buffer(limits.logit_rows, h),
            },
        })
    }

    fn finish(self, backend: &mut B, vocab: usize) -> Workspace<B> {
        let (tokens, rows, h) = (self.limits.step_tokens, self.limits.logit_rows, self.hidden);
        let widths = self.widths;
        let mut all = |list: &[usize]| list.iter().map(|&w| backend.buffer(tokens, w)).collect::<Vec<_>>();
        Workspace {
            projected: all(&widths.projected),
            xbc: all(&widths.xbc),
            y: all(&widths.y),
            q: all(&widths.q),
            attended: all(&widths.q),
            k: all(&widths.k),
            v: all(&widths.k),
            latent: all(&widths.latent),
            combined: all(&widths.latent),
            inner: all(&widths.inner),
            routes: widths.chosen.iter().map(|&k| backend.routes(tokens, k)).collect(),
            u: backend.buffer(tokens, h),
            picked: backend.buffer(rows, h),
            final_rows: backend.buffer(rows, h),
            logits: backend.buffer(rows, vocab),
            uses: self.uses,
        }
    }
}

fn kind_of<L>(mixer: &Mixer<L>) -> &'static str {
    match mixer {
        Mixer::Mamba(_) => "mamba",
        Mixer::Attention(_) => "attention",
        Mixer::Moe(_) => "moe",
        Mixer::Mlp(_) => "mlp",
    }
}

/// `weight` [c, K], as checkpoints have it, to [K, c]: neighbouring channels are computed together.
fn by_taps(weight: &[f32], taps: usize) -> Vec<f32> {
    (0..taps).flat_map(|tap| weight.iter().skip(tap).step_by(taps).copied()).collect()
}
