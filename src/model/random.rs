//! A network with random weights whose activations stay finite: for tests, and for measuring speed without files.

use super::config::ModelConfig;
use super::fields::Fields;
use super::manifest;
use super::names::{self, Naming, Role, Tensors};
use super::quantization::Recipe;
use crate::weights::linear::NVFP4_BLOCK;
use crate::weights::{Kind, Linear, quantize};

/// The network of `config` in the formats of `recipe` (see [`Recipe::uniform`]); the same seed gives the same
/// weights. A linear whose width does not divide into NVFP4 blocks is BF16.
pub fn random(config: &ModelConfig, seed: u64, recipe: &Recipe) -> Fields<Linear> {
    names::network(config, &Naming::OFFICIAL, &mut Random { recipe, state: seed })
}

struct Random<'a> {
    recipe: &'a Recipe,
    state: u64,
}

impl Random<'_> {
    /// SplitMix64 (Steele, Lea and Flood 2014), the upper 24 bits as a number in [0, 1).
    fn unit(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }
}

impl Tensors for Random<'_> {
    type Linear = Linear;

    fn linear(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let kind = match manifest::linear_scheme(self.recipe, module).kind {
            Kind::Nvfp4 if !cols.is_multiple_of(NVFP4_BLOCK) => Kind::BF16,
            kind => kind,
        };
        // Uniform with variance 1 / cols, so that a product is about as large as its input.
        let bound = (3.0 / cols as f32).sqrt();
        let values: Vec<f32> = (0..rows * cols).map(|_| self.between(-bound, bound)).collect();
        quantize::quantize(&values, rows, cols, kind)
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let bound = (3.0 / cols as f32).sqrt();
        let values: Vec<f32> = (0..rows * cols).map(|_| self.between(-bound, bound)).collect();
        let kind = manifest::gate_kind(self.recipe, module);
        quantize::quantize(&values, rows, cols, kind)
    }

    fn vector(&mut self, _: &str, shape: &[usize], role: Role) -> Vec<f32> {
        let taps = shape.last().copied().unwrap_or(1) as f32;
        let value = |random: &mut Self| match role {
            Role::Norm => random.between(0.8, 1.2),
            Role::ConvWeight => random.between(-1.0, 1.0) / taps.sqrt(),
            Role::ConvBias | Role::CorrectionBias => random.between(-0.1, 0.1),
            // As Mamba-2 is initialised: A in [-16, -1], dt in [0.001, 0.1] through the inverse of softplus.
            Role::ALog => random.between(1.0, 16.0).ln(),
            Role::D => random.between(0.8, 1.2),
            Role::DtBias => random.between(0.001f32.ln(), 0.1f32.ln()).exp().exp_m1().ln(),
        };
        (0..shape.iter().product()).map(|_| value(self)).collect()
    }

    fn cache_scale(&mut self, _: &str) -> f32 {
        1.0
    }
}
