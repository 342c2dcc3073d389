//! A weight as its kernels read it, the operands it takes, and the pieces it is shared in.

use super::crew::{Crew, split};
use super::packed::{Packed, TILE};
use super::simd::place::Place;
use super::simd::{self, Isa, Operands, Output, Tokens};
use crate::backend::host::Buffer;
use crate::weights::Linear;

/// Rows of a weight per piece of work at least. Small enough to balance, large enough that taking one is free.
pub const ROWS_PER_PIECE: usize = 2 * TILE;
/// Numbers of a weight per piece, where that makes enough pieces: where a piece ends, reading ahead ends too.
const WEIGHTS_PER_PIECE: usize = 1 << 16;
/// Pieces of a weight that are enough to share.
const PIECES: usize = 16;

/// Rows per piece of a weight, a whole number of tiles.
pub fn rows_per_piece(rows: usize, cols: usize) -> usize {
    let most = rows.div_ceil(PIECES).next_multiple_of(TILE);
    WEIGHTS_PER_PIECE.div_ceil(cols).next_multiple_of(2 * TILE).min(most).max(ROWS_PER_PIECE)
}

/// A weight as its kernels read it.
pub enum Weight {
    /// As in the checkpoint, multiplied with f32 operands.
    Stored(Linear),
    /// In the order of the kernels for BF16 operands.
    Packed(Packed),
}

impl Weight {
    pub fn rows(&self) -> usize {
        match self {
            Weight::Stored(weight) => weight.rows,
            Weight::Packed(weight) => weight.rows,
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Weight::Stored(weight) => weight.cols,
            Weight::Packed(weight) => weight.cols,
        }
    }

    pub fn is_packed(&self) -> bool {
        matches!(self, Weight::Packed(_))
    }

    /// Products of rows `from..to`, of which `from` begins a tile, with operands as this weight takes them.
    pub fn multiply(
        &self,
        isa: Isa,
        (from, to): (usize, usize),
        operands: Operands<'_>,
        scratch: &mut [f32],
        place: Place<'_>,
    ) {
        match (self, operands) {
            (Weight::Stored(weight), Operands::F32(x)) => {
                simd::rows(isa, weight, from, to, x, scratch, place)
            }
            (Weight::Packed(weight), Operands::Bf16(x)) => simd::packed_rows(isa, weight, from, to, x, place),
            _ => unreachable!("operands are made for the weight"),
        }
    }
}

/// The routed experts of a layer: the up matrices are all packed or all stored, and so are the down matrices.
pub struct Experts {
    pub up: Vec<Weight>,
    pub down: Vec<Weight>,
}

/// The first `tokens` rows of `x` as `weight` takes them: as they are, or as BF16 in `memory`.
pub fn operands<'a>(
    isa: Isa,
    crew: &mut Crew,
    weight: &Weight,
    x: &'a Buffer,
    tokens: usize,
    memory: &'a mut [u16],
) -> Operands<'a> {
    if !weight.is_packed() {
        return Operands::F32(Tokens::all(x.rows(tokens), tokens));
    }
    let memory = &mut memory[..tokens * x.width];
    let output = Output::new(memory, x.width);
    split(crew, tokens, 8, tokens * x.width, |_, from, to| {
        for t in from..to {
            // SAFETY: pieces have disjoint tokens.
            simd::narrow(isa, x.row(t), unsafe { output.slice(t, 0, x.width) });
        }
    });
    Operands::Bf16(Tokens::all(memory, tokens))
}
