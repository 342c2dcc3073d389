//! Where the products of a weight go, and what becomes of them there.

use super::{Isa, Output, narrow};
use crate::backend::Precision;
use crate::ops::linear::{Epilogue, relu2};

/// Row r of the weight is a column of what these say; `i` counts the tokens, or pairs of a token and an expert.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// Row `i`, rounded as `precision` says.
    Rows { output: Output, epilogue: Epilogue, precision: Precision },
    /// What is between the two matrices of an expert: the square of what is positive, in row `pairs[i]`.
    Hidden { output: Output, pairs: &'a [u32], precision: Precision },
    /// The same as BF16.
    HiddenBf16 { output: Output<u16>, pairs: &'a [u32] },
    /// What an expert adds to its token, row `pairs[i] / chosen`, times `weights[pairs[i]]`.
    Weighted { output: Output, pairs: &'a [u32], weights: &'a [f32], chosen: usize },
}

/// A [`Target`] that one thread may write to.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    isa: Isa,
    target: Target<'a>,
}

impl<'a> Place<'a> {
    /// # Safety
    /// While this is used, no other thread may touch the columns that its products go to, in any row of the target, and
    /// what the target was made of must still be borrowed.
    pub unsafe fn new(isa: Isa, target: Target<'a>) -> Self {
        Self { isa, target }
    }

    /// Rows from `r` on of the weight times token `i` are `y`, which is memory of the caller's.
    #[inline(always)]
    pub fn put(&self, r: usize, i: usize, y: &mut [f32]) {
        // SAFETY: in all of them by the promise that this was made with.
        unsafe {
            match self.target {
                Target::Rows { output, epilogue, precision } => {
                    precision.round(output.apply(i, r, y, epilogue));
                }
                Target::Hidden { output, pairs, precision } => {
                    precision.round(output.apply(pairs[i] as usize, r, y, Epilogue::Relu2));
                }
                Target::HiddenBf16 { output, pairs } => {
                    y.iter_mut().for_each(|y| *y = relu2(*y));
                    narrow(self.isa, y, output.slice(pairs[i] as usize, r, y.len()));
                }
                Target::Weighted { output, pairs, weights, chosen } => {
                    let pair = pairs[i] as usize;
                    y.iter_mut().for_each(|y| *y *= weights[pair]);
                    output.apply(pair / chosen, r, y, Epilogue::Add);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Place, Target};
    use crate::backend::Precision;
    use crate::ops::linear::Epilogue;

    impl Place<'_> {
        /// As `put`, of the first `count` of 16 products.
        ///
        /// # Safety
        /// AVX-512 F, BW, VL and BF16 must be there.
        #[inline(always)]
        pub unsafe fn put_register(&self, r: usize, i: usize, y: __m512, count: usize) {
            let mask = ((1u32 << count) - 1) as u16;
            // SAFETY: every slice has `count` numbers, which is what the mask leaves; they are this thread's by the
            // promise that the place was made with.
            unsafe {
                match self.target {
                    Target::Rows { output, epilogue, precision } => {
                        let out = output.slice(i, r, count).as_mut_ptr();
                        let y = match epilogue {
                            Epilogue::Store => y,
                            Epilogue::Relu2 => square_of_positive(y),
                            Epilogue::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), y),
                        };
                        _mm512_mask_storeu_ps(out, mask, rounded(y, precision));
                    }
                    Target::Hidden { output, pairs, precision } => {
                        let out = output.slice(pairs[i] as usize, r, count).as_mut_ptr();
                        _mm512_mask_storeu_ps(out, mask, rounded(square_of_positive(y), precision));
                    }
                    Target::HiddenBf16 { output, pairs } => {
                        let out = output.slice(pairs[i] as usize, r, count).as_mut_ptr();
                        let narrow: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(square_of_positive(y)));
                        _mm256_mask_storeu_epi16(out.cast(), mask, narrow);
                    }
                    Target::Weighted { output, pairs, weights, chosen } => {
                        let pair = pairs[i] as usize;
                        let out = output.slice(pair / chosen, r, count).as_mut_ptr();
                        let y = _mm512_mul_ps(y, _mm512_set1_ps(weights[pair]));
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), y);
                        _mm512_mask_storeu_ps(out, mask, sum);
                    }
                }
            }
        }
    }

    /// # Safety
    /// AVX-512 F must be there.
    #[inline(always)]
    unsafe fn square_of_positive(y: __m512) -> __m512 {
        // SAFETY: by the caller's promise. Of NaN and zero this takes zero, as `f32::max` does.
        unsafe {
            let positive = _mm512_max_ps(y, _mm512_setzero_ps());
            _mm512_mul_ps(positive, positive)
        }
    }

    /// # Safety
    /// AVX-512 F and BF16 must be there.
    #[inline(always)]
    unsafe fn rounded(y: __m512, precision: Precision) -> __m512 {
        if precision == Precision::F32 {
            return y;
        }
        // SAFETY: by the caller's promise; a BF16 is the upper half of an f32.
        unsafe {
            let narrow: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(y));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
        }
    }
}
