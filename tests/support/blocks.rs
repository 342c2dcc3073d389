//! Weights in GGUF's blocks: random ones, whose numbers are of the order of 1.

use bytes::Bytes;
use ferrotron::weights::codec::f32_to_f16;
use ferrotron::weights::{Blocks, Format, Linear};

/// Half-precision scales of a block: where they stand, and what they are so that weights stay below 2.
fn halves(blocks: Blocks) -> &'static [(usize, f32)] {
    match blocks {
        Blocks::Q4_0 => &[(0, 1.0 / 8.0)],
        Blocks::Q8_0 | Blocks::Iq4Nl => &[(0, 1.0 / 128.0)],
        Blocks::Q4K => &[(0, 1.0 / 945.0), (2, 1.0 / 63.0)],
        Blocks::Q5K => &[(0, 1.0 / 1953.0), (2, 1.0 / 63.0)],
        Blocks::Q6K => &[(208, 1.0 / 4096.0)],
        Blocks::Iq4Xs => &[(0, 1.0 / 4096.0)],
        Blocks::Nvfp4 => &[],
    }
}

/// Random codes and scales [rows, cols] times `scale`.
pub fn weight(seed: u64, rows: usize, cols: usize, blocks: Blocks, scale: f32) -> Linear {
    let mut random = Random(seed);
    let mut data = vec![0u8; blocks.bytes_of(rows * cols)];
    for block in data.chunks_exact_mut(blocks.bytes()) {
        block.iter_mut().for_each(|byte| *byte = random.below(256) as u8);
        for &(at, value) in halves(blocks) {
            let value = value * (0.25 + random.below(64) as f32 / 85.0);
            block[at..at + 2].copy_from_slice(&f32_to_f16(value).to_le_bytes());
        }
        if blocks == Blocks::Nvfp4 {
            // E4M3 below 1/4.
            block[..4].iter_mut().for_each(|byte| *byte &= 0x27);
        }
    }
    Linear { rows, cols, format: Format::Blocks { blocks, scale }, data: Bytes::from(data) }
}

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
