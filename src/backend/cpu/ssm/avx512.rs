//! The recurrence in AVX-512, where rows of a state are 128 numbers: two rows stay in registers over the tokens.

#![allow(clippy::needless_range_loop, reason = "one index serves a register and its numbers in memory")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{BLOCK, Block, Head, Token};
use crate::backend::cpu::simd::{Output, avx512::reduce};

/// Registers of a row.
const REGISTERS: usize = 8;
/// Rows whose results are added up and written together.
const ROWS: usize = 16;
/// Rows in registers at once.
const HELD: usize = 2;

/// Running sums of [`ROWS`] rows for each token.
type Sums = [[MaybeUninit<__m512>; ROWS]; BLOCK];
/// dt x of [`ROWS`] rows for each token.
type Inputs = [[f32; ROWS]; BLOCK];

/// Whether [`advance`] can do heads of `rows` rows of `width` numbers.
pub fn fits(rows: usize, width: usize) -> bool {
    rows.is_multiple_of(ROWS) && width == 16 * REGISTERS
}

/// See [`super::advance`]; AVX-512 must have been detected.
pub fn advance(head: Head, block: Block<'_>, state: &mut [f32], output: Output) {
    const ROW: usize = 16 * REGISTERS;
    let rows = state.len() / ROW;
    assert!(fits(rows, ROW) && block.tokens.len() <= BLOCK && block.kept <= block.tokens.len());
    for token in block.tokens {
        assert!(token.x.len() == rows && token.b.len() == ROW && token.c.len() == ROW);
    }
    let mut sums: Sums = [[MaybeUninit::uninit(); ROWS]; BLOCK];
    let mut inputs: Inputs = [[0.0; ROWS]; BLOCK];
    for (part, state) in state.chunks_exact_mut(ROWS * ROW).enumerate() {
        for (inputs, token) in inputs.iter_mut().zip(block.tokens) {
            for (input, &x) in inputs.iter_mut().zip(&token.x[ROWS * part..]) {
                *input = token.dt * x;
            }
        }
        for (pair, state) in state.chunks_exact_mut(HELD * ROW).enumerate() {
            // SAFETY: two rows by the chunk's size, tokens of 128 numbers by the assertions above.
            unsafe { pass(block, HELD * pair, state, &inputs, &mut sums) };
        }
        for (token, sums) in block.tokens.iter().zip(&sums).skip(block.replayed) {
            // SAFETY: the caller owns this head's columns of the output.
            let out = unsafe { output.slice(token.row, head.index * rows + ROWS * part, ROWS) };
            // SAFETY: `pass` was called for all pairs of rows and wrote their sums for every token that is not replayed.
            unsafe { finish(head.d, &token.x[ROWS * part..][..ROWS], sums, out) };
        }
    }
}

/// Two rows, `state` [2, 128], over all tokens; their inputs and sums are columns from `column` on.
///
/// # Safety
/// AVX-512F must be there; `state` has 256 numbers, b and c of a token have 128; `column` + 2 is at most [`ROWS`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pass(block: Block<'_>, column: usize, state: &mut [f32], inputs: &Inputs, sums: &mut Sums) {
    let mut rows = [[_mm512_setzero_ps(); REGISTERS]; HELD];
    for i in 0..HELD {
        for k in 0..REGISTERS {
            // SAFETY: 16 numbers inside the two rows.
            rows[i][k] = unsafe { _mm512_loadu_ps(state.as_ptr().add(16 * (REGISTERS * i + k))) };
        }
    }
    let (kept, drafts) = block.tokens.split_at(block.kept);
    let (before, after) = sums.split_at_mut(block.kept);
    for (i, ((token, sums), inputs)) in kept.iter().zip(before).zip(inputs).enumerate() {
        let (inputs, sums) = (&inputs[column..][..HELD], &mut sums[column..][..HELD]);
        // SAFETY: passed on from the caller.
        unsafe {
            if i < block.replayed {
                // Its output is known.
                step::<false>(token, inputs, &mut rows, sums)
            } else {
                step::<true>(token, inputs, &mut rows, sums)
            }
        }
    }
    if block.kept > 0 {
        for i in 0..HELD {
            for k in 0..REGISTERS {
                // SAFETY: 16 numbers inside the two rows.
                unsafe { _mm512_storeu_ps(state.as_mut_ptr().add(16 * (REGISTERS * i + k)), rows[i][k]) };
            }
        }
    }
    for ((token, sums), inputs) in drafts.iter().zip(after).zip(&inputs[block.kept..]) {
        // SAFETY: passed on from the caller.
        unsafe { step::<true>(token, &inputs[column..][..HELD], &mut rows, &mut sums[column..][..HELD]) };
    }
}

/// One token and two rows; its sums where OUTPUT, which is where [`advance`] reads them.
///
/// # Safety
/// As for [`pass`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn step<const OUTPUT: bool>(
    token: &Token<'_>,
    inputs: &[f32],
    rows: &mut [[__m512; REGISTERS]; HELD],
    sums: &mut [MaybeUninit<__m512>],
) {
    let decay = _mm512_set1_ps(token.decay);
    let inputs: [__m512; HELD] = std::array::from_fn(|i| _mm512_set1_ps(inputs[i]));
    // Two chains of additions a row: one would be longer than the rest of the work.
    let mut lanes = [[_mm512_setzero_ps(); 2]; HELD];
    for k in 0..REGISTERS {
        // SAFETY: 16 of the 128 numbers.
        let (b, c) = unsafe {
            (_mm512_loadu_ps(token.b.as_ptr().add(16 * k)), _mm512_loadu_ps(token.c.as_ptr().add(16 * k)))
        };
        for i in 0..HELD {
            rows[i][k] = _mm512_fmadd_ps(rows[i][k], decay, _mm512_mul_ps(inputs[i], b));
            if OUTPUT {
                lanes[i][k % 2] = _mm512_fmadd_ps(rows[i][k], c, lanes[i][k % 2]);
            }
        }
    }
    if OUTPUT {
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            sum.write(_mm512_add_ps(lanes[0], lanes[1]));
        }
    }
}

/// out = y + d x for [`ROWS`] rows.
///
/// # Safety
/// AVX-512F must be there; all of `sums` must be written; `x` and `out` have 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn finish(d: f32, x: &[f32], sums: &[MaybeUninit<__m512>; ROWS], out: &mut [f32]) {
    // SAFETY: written, and of the lengths, by the caller's promise.
    unsafe {
        let y = reduce(&*std::ptr::from_ref(sums).cast());
        let x = _mm512_loadu_ps(x.as_ptr());
        _mm512_storeu_ps(out.as_mut_ptr(), _mm512_fmadd_ps(_mm512_set1_ps(d), x, y));
    }
}
