//! A network with random weights whose activations stay finite: for tests, and for measuring speed without files.
//!
//! A weight depends on the seed and on its own name alone, through operations that every machine rounds alike: the
//! same seed gives the same bytes everywhere, in memory ([`random`]) and in files ([`write`]).

mod write;

pub use write::Plan;

use rayon::prelude::*;

use super::config::ModelConfig;
use super::fields::Fields;
use super::manifest;
use super::names::{self, Naming, Role, Tensors};
use super::quantization::Recipe;
use crate::weights::linear::NVFP4_BLOCK;
use crate::weights::{Dtype, Kind, Linear, codec, quantize};

/// Values that one task makes.
const CHUNK: usize = 1 << 16;

/// The network of `config` in the formats of `recipe` (see [`Recipe::uniform`]). A linear whose width does not divide
/// into NVFP4 blocks is BF16.
///
/// `progress` hears the bytes of matrices made so far.
pub fn random(config: &ModelConfig, seed: u64, recipe: &Recipe, progress: &dyn Fn(u64)) -> Fields<Linear> {
    names::network(config, &Naming::OFFICIAL, &mut Random { recipe, seed, made: 0, progress })
}

struct Random<'a> {
    recipe: &'a Recipe,
    seed: u64,
    made: u64,
    progress: &'a dyn Fn(u64),
}

impl Random<'_> {
    fn count(&mut self, bytes: usize) {
        self.made += bytes as u64;
        (self.progress)(self.made);
    }
}

impl Tensors for Random<'_> {
    type Linear = Linear;

    fn linear(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let kind = kind(self.recipe, module, cols);
        let linear = linear(self.seed, module, rows, cols, kind);
        self.count(linear.bytes());
        linear
    }

    fn gate(&mut self, module: &str, rows: usize, cols: usize) -> Linear {
        let gate = linear(self.seed, module, rows, cols, manifest::gate_kind(self.recipe, module));
        self.count(gate.bytes());
        gate
    }

    fn vector(&mut self, name: &str, shape: &[usize], role: Role) -> Vec<f32> {
        vector(self.seed, name, shape, role)
    }

    fn cache_scale(&mut self, _: &str) -> f32 {
        1.0
    }

    fn experts(
        &mut self,
        mixer: &str,
        projection: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Vec<Linear> {
        let one = |expert: usize| {
            let module = format!("{mixer}.experts.{expert}.{projection}");
            linear(self.seed, &module, rows, cols, kind(self.recipe, &module, cols))
        };
        let experts: Vec<Linear> = (0..count).into_par_iter().map(one).collect();
        self.count(experts.iter().map(Linear::bytes).sum());
        experts
    }
}

/// The format that `module` gets: the recipe's, where its rows divide into blocks.
fn kind(recipe: &Recipe, module: &str, cols: usize) -> Kind {
    match manifest::linear_scheme(recipe, module).kind {
        Kind::Nvfp4 if !cols.is_multiple_of(NVFP4_BLOCK) => Kind::BF16,
        kind => kind,
    }
}

/// Uniform with variance 1 / cols, so that a product is about as large as its input.
fn linear(seed: u64, module: &str, rows: usize, cols: usize, kind: Kind) -> Linear {
    let stream = Stream::new(seed, module);
    let bound = (3.0 / cols as f32).sqrt();
    let mut values = vec![0.0f32; rows * cols];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        for (i, value) in values.iter_mut().enumerate() {
            *value = stream.between(chunk * CHUNK + i, -bound, bound);
        }
    });
    quantize::quantize(&values, rows, cols, kind)
}

/// Of the type that releases store it in, so that a file holds the very numbers.
fn vector(seed: u64, name: &str, shape: &[usize], role: Role) -> Vec<f32> {
    let stream = Stream::new(seed, name);
    let taps = shape.last().copied().unwrap_or(1) as f32;
    let (low, high) = match role {
        Role::Norm | Role::D => (0.8, 1.2),
        Role::ConvWeight => (-1.0 / taps.sqrt(), 1.0 / taps.sqrt()),
        Role::ConvBias | Role::CorrectionBias => (-0.1, 0.1),
        // As Mamba-2 is initialised, in logarithms so that no library's `ln` is asked: A from 1 to 16, and dt from 0.001
        // to 0.1, whose softplus is almost the exponential.
        Role::ALog => (0.0, 2.75),
        Role::DtBias => (-6.9, -2.25),
    };
    let stored = |value: f32| match manifest::vector_dtype(role) {
        Dtype::F32 => value,
        _ => codec::bf16_to_f32(codec::f32_to_bf16(value)),
    };
    (0..shape.iter().product()).map(|i| stored(stream.between(i, low, high))).collect()
}

/// The random numbers of one tensor, each by its index.
#[derive(Clone, Copy)]
struct Stream(u64);

impl Stream {
    /// FNV-1a of the name, mixed with the seed.
    fn new(seed: u64, name: &str) -> Self {
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        Stream(mix(seed ^ mix(hash)))
    }

    /// The number at `index`, uniform in [low, high).
    fn between(self, index: usize, low: f32, high: f32) -> f32 {
        let word = mix(self.0.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        // The upper 24 bits are exact in f32.
        let unit = (word >> 40) as f32 / (1 << 24) as f32;
        low + (high - low) * unit
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another number here is another checkpoint for the same seed: figures that were measured with it do not compare.
    #[test]
    fn the_numbers_of_a_seed_never_change() {
        let stream = Stream::new(1, "lm_head");
        let bits = [0, 1, 1 << 40].map(|index| stream.between(index, -1.0, 1.0).to_bits());
        assert_eq!(bits, [0x3DA7_2340, 0xBE07_98B8, 0x3F03_B694]);
    }
}
