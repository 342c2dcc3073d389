//! The instruction sets of the CPU backend, chosen once at start.
//!
//! [`tile`] is the one hot loop: R rows of a weight, decoded from their stored form in registers, against T
//! tokens. Each (row, token) pair has 16 running sums in a fixed order, so its bits depend neither on how
//! many tokens share the step nor on how rows are split among threads.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod blocks;
pub mod place;
mod portable;

use super::packed::Packed;
use crate::ops::linear::Epilogue;
use crate::weights::codec::{e2m1_to_f32, e4m3_to_f32};
use crate::weights::{Format, Linear};
use place::Place;

/// Every E4M3 code as f32: block scales and cached numbers are looked up.
pub static E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3_to_f32(code as u8);
        code += 1;
    }
    table
};

/// Every E2M1 code as f32: one register's worth.
static E2M1: [f32; 16] = {
    let mut table = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = e2m1_to_f32(code as u8);
        code += 1;
    }
    table
};

/// An instruction set this process can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Portable,
    /// AVX2, FMA and F16C
    Avx2,
    /// AVX-512 F, BW, DQ, VL
    Avx512,
    /// Those and BF16
    Avx512Bf16,
    Neon,
}

impl Isa {
    /// The best one this machine has.
    pub fn detect() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa::Portable)
    }

    /// All that this machine has, slowest first; tests run each of them.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(Isa::Avx2);
            }
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                all.push(Isa::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    all.push(Isa::Avx512Bf16);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Isa::Neon);
        all
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Neon => "neon",
        }
    }

    /// Whether the kernels written in AVX-512 run.
    pub fn has_avx512(self) -> bool {
        matches!(self, Isa::Avx512 | Isa::Avx512Bf16)
    }

    /// Whether there are instructions for products of BF16, and so kernels for [`Packed`] weights.
    pub fn multiplies_bf16(self) -> bool {
        self == Isa::Avx512Bf16
    }
}

/// Compiles one portable body for every instruction set and calls the chosen one.
///
/// The body is `#[inline(always)]` and takes `const FMA: bool`: whether `mul_add` is one instruction.
macro_rules! versions {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::backend::cpu::simd::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) {
                    $body::<true>($($arg),*)
                }
                match isa {
                    // SAFETY: `Isa::available` lists a set only after the CPU reported its features.
                    isa if isa.has_avx512() => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::backend::cpu::simd::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            if isa == $crate::backend::cpu::simd::Isa::Neon {
                return $body::<true>($($arg),*);
            }
            let _ = isa;
            $body::<false>($($arg),*)
        }
    };
}
pub(crate) use versions;

/// a * b + c, fused where that is one instruction. Without hardware FMA `mul_add` is a library call.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e to the power of `x` within 2 ulp from -87 to 88, saturating outside. Without a call or a branch, so that
/// loops over it become vector code.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding 1.5 · 2^23 rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has so few bits that its multiples are exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN_2_LOW, fma::<FMA>(n, -LN_2_HIGH, x));
    // The series to r^7: for |r| at most ln 2 / 2 the next term is below 1e-8.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = fma::<FMA>(sum, r, coefficient);
    }
    sum * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// x · sigmoid(x)
#[inline(always)]
pub fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// 16 running sums, added up in a fixed tree.
#[inline(always)]
pub fn reduce(mut lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// a · b in 16 running sums.
#[inline(always)]
pub fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (mut left, mut right) = (a.chunks_exact(16), b.chunks_exact(16));
    for (a, b) in left.by_ref().zip(right.by_ref()) {
        for l in 0..16 {
            lanes[l] = fma::<FMA>(a[l], b[l], lanes[l]);
        }
    }
    let mut sum = reduce(lanes);
    for (&a, &b) in left.remainder().iter().zip(right.remainder()) {
        sum = fma::<FMA>(a, b, sum);
    }
    sum
}

/// Rows of tokens that share one product: token i's operand is row `index(i)` of `x`, its result row
/// `index_out(i)` of the output.
#[derive(Clone, Copy)]
pub struct Tokens<'a, X = f32> {
    pub x: &'a [X],
    /// Which rows of `x`; all of them in order where `None`.
    pub rows: Option<&'a [u32]>,
    /// Divides `rows` entries: pair p of token t is `t * K + j`, and its operand is row p / K.
    pub divisor: u32,
    pub count: usize,
}

/// Tokens as the kernels for a weight read them.
#[derive(Clone, Copy)]
pub enum Operands<'a> {
    F32(Tokens<'a>),
    /// BF16, for [`Packed`] weights.
    Bf16(Tokens<'a, u16>),
}

impl<'a> Operands<'a> {
    /// Token `t` alone; rows are `width` long.
    pub fn one(self, t: usize, width: usize) -> Self {
        match self {
            Operands::F32(tokens) => Operands::F32(Tokens::all(tokens.row(t, width), 1)),
            Operands::Bf16(tokens) => Operands::Bf16(Tokens::all(tokens.row(t, width), 1)),
        }
    }

    /// Those of pairs: `divisor` pairs to a row.
    pub fn of_pairs(self, pairs: &'a [u32], divisor: usize) -> Self {
        match self {
            Operands::F32(tokens) => Operands::F32(tokens.of_pairs(pairs, divisor)),
            Operands::Bf16(tokens) => Operands::Bf16(tokens.of_pairs(pairs, divisor)),
        }
    }
}

impl<'a, X: Copy> Tokens<'a, X> {
    fn of_pairs(self, pairs: &'a [u32], divisor: usize) -> Self {
        Tokens { rows: Some(pairs), divisor: divisor as u32, count: pairs.len(), ..self }
    }

    pub fn all(x: &'a [X], count: usize) -> Self {
        Tokens { x, rows: None, divisor: 1, count }
    }

    #[inline(always)]
    pub fn row(&self, i: usize, width: usize) -> &'a [X] {
        let row = self.rows.map_or(i, |rows| (rows[i] / self.divisor) as usize);
        &self.x[row * width..][..width]
    }
}

/// Rows of a weight in one tile.
const ROWS: usize = 16;

/// Products of a tile: for each of up to 4 tokens, those of its rows.
type Sums = [[f32; ROWS]; 4];

/// Products of rows `from..to` of `weight` with every token, put into their place as they are ready.
/// `scratch` [[`SCRATCH_ROWS`] * cols] holds decoded rows when there are enough tokens to pay for decoding once.
pub fn rows(
    isa: Isa,
    weight: &Linear,
    from: usize,
    to: usize,
    tokens: Tokens<'_>,
    scratch: &mut [f32],
    place: Place<'_>,
) {
    /// From here on a decoded copy in the L1 cache is cheaper than decoding again. Decoding in registers costs two to
    /// six instructions per 16 weights and 4 tokens, so a copy has to serve many.
    const DECODE_ONCE: usize = 32;
    let (width, scale) = (weight.cols, weight_scale(weight));
    let Some(stored) = Rows::of(weight) else {
        if let Some(rows) = blocks::BlockRows::of(weight) {
            blocks::rows(isa, rows, scale, (from, to), tokens, scratch, place);
        }
        return;
    };
    if tokens.count < DECODE_ONCE || matches!(weight.format, Format::F32) {
        for r in (from..to).step_by(ROWS) {
            token_tiles(isa, &stored, scale, (r, r), ROWS.min(to - r), width, tokens, place);
        }
        return;
    }
    for r in (from..to).step_by(SCRATCH_ROWS) {
        let count = SCRATCH_ROWS.min(to - r);
        let scratch = &mut scratch[..count * width];
        for (i, row) in scratch.chunks_exact_mut(width).enumerate() {
            portable::decode(isa, stored, r + i, row);
        }
        let decoded = Rows::F32(bytes_of(scratch));
        token_tiles(isa, &decoded, scale, (0, r), count, width, tokens, place);
    }
}

/// Rows that are decoded together: a copy of more leaves the L1 cache.
pub const SCRATCH_ROWS: usize = 4;

/// As [`rows`], of a weight in the order of the BF16 kernels. `from` must be a multiple of 16.
pub fn packed_rows(
    isa: Isa,
    weight: &Packed,
    from: usize,
    to: usize,
    tokens: Tokens<'_, u16>,
    place: Place<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        return avx512bf16::rows(weight, from, to, tokens, place);
    }
    let _ = (weight, from, to, tokens, place);
    unreachable!("{} has no kernel for packed weights", isa.name());
}

/// Runs tiles of at most 4 tokens over `count` rows from `first`, which the place knows as rows from `named` on.
fn token_tiles(
    isa: Isa,
    rows: &Rows<'_>,
    scale: f32,
    (first, named): (usize, usize),
    count: usize,
    width: usize,
    tokens: Tokens<'_>,
    place: Place<'_>,
) {
    let mut sums = [[0.0f32; ROWS]; 4];
    let mut t = 0;
    while t < tokens.count {
        let batch = (tokens.count - t).min(4);
        let mut x = [tokens.row(t, width); 4];
        for (i, x) in x.iter_mut().enumerate().take(batch).skip(1) {
            *x = tokens.row(t + i, width);
        }
        tile(isa, rows, first, count, width, &x[..batch], &mut sums);
        for (j, sums) in sums.iter_mut().enumerate().take(batch) {
            for sum in sums.iter_mut() {
                *sum *= scale;
            }
            place.put(named, t + j, &mut sums[..count]);
        }
        t += batch;
    }
}

/// The factor left out of the running sums and applied to their total.
fn weight_scale(weight: &Linear) -> f32 {
    match weight.format {
        Format::Fp8 { scale } => scale,
        Format::Nvfp4 { global_scale, .. } => global_scale,
        Format::Blocks { scale, .. } => scale,
        _ => 1.0,
    }
}

/// Rows of a weight in the form [`tile`] reads. Scales per tensor are not applied here.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    F32(&'a [u8]),
    F16(&'a [u8]),
    Bf16(&'a [u8]),
    Fp8(&'a [u8]),
    Nvfp4 { codes: &'a [u8], scales: &'a [u8] },
}

impl<'a> Rows<'a> {
    /// `None` for blocks of GGUF, whose rows [`blocks`] reads.
    fn of(weight: &'a Linear) -> Option<Rows<'a>> {
        Some(match &weight.format {
            Format::F32 => Rows::F32(&weight.data),
            Format::F16 => Rows::F16(&weight.data),
            Format::BF16 => Rows::Bf16(&weight.data),
            Format::Fp8 { .. } => Rows::Fp8(&weight.data),
            Format::Nvfp4 { scales, .. } => Rows::Nvfp4 { codes: &weight.data, scales },
            Format::Blocks { .. } => return None,
        })
    }
}

fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four plain bytes, u8 has no alignment, and the length is the slice's own.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The same memory as numbers of half the size.
pub fn halves_of(values: &mut [f32]) -> &mut [u16] {
    // SAFETY: any bits are a u16 and any two of them an f32, whose alignment is more than enough.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), 2 * values.len()) }
}

/// sums[j][i] = row (first + i) · x[j], for up to 16 rows and up to 4 tokens of `width` numbers.
fn tile(isa: Isa, rows: &Rows<'_>, first: usize, count: usize, width: usize, x: &[&[f32]], sums: &mut Sums) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        return avx512::tile(rows, first, count, width, x, sums);
    }
    portable::tile(isa, *rows, first, count, width, x, sums);
}

/// Rounds to BF16, to even.
pub fn narrow(isa: Isa, from: &[f32], to: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        return avx512bf16::narrow(from, to);
    }
    let _ = isa;
    for (from, to) in from.iter().zip(to) {
        *to = half::bf16::from_f32(*from).to_bits();
    }
}

/// Rows that several threads write at once, each its own columns.
pub struct Output<T = f32> {
    data: *mut T,
    len: usize,
    width: usize,
}

impl<T> Clone for Output<T> {
    fn clone(&self) -> Self {
        *self
    }
}

// Not derived: that would ask it of T as well.
impl<T> Copy for Output<T> {}

// SAFETY: callers split rows and columns among threads so that no element has two writers.
unsafe impl<T: Send> Send for Output<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    /// `data` [rows, width]
    pub fn new(data: &mut [T], width: usize) -> Self {
        Output { data: data.as_mut_ptr(), len: data.len(), width }
    }

    /// # Safety
    /// No other thread may touch these elements from `(row, column)` on meanwhile, and what `new` was given must still
    /// be borrowed.
    #[inline(always)]
    pub unsafe fn slice<'a>(self, row: usize, column: usize, len: usize) -> &'a mut [T] {
        let at = row * self.width + column;
        assert!(at + len <= self.len);
        // SAFETY: in bounds by the assertion, unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}

impl Output {
    /// `y` goes to columns from `column` on of `row`; returns what is there then.
    ///
    /// # Safety
    /// As for [`Output::slice`].
    #[inline(always)]
    pub unsafe fn apply<'a>(self, row: usize, column: usize, y: &[f32], epilogue: Epilogue) -> &'a mut [f32] {
        // SAFETY: passed on from the caller.
        let out = unsafe { self.slice(row, column, y.len()) };
        match epilogue {
            // A whole tile is one store, where a copy of any length is a call.
            Epilogue::Store if y.len() == ROWS => out[..ROWS].copy_from_slice(&y[..ROWS]),
            epilogue => out.iter_mut().zip(y).for_each(|(out, &y)| epilogue.apply(y, out)),
        }
        out
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0 + 0.003_7;
            let exact = f64::from(x).exp();
            for got in [super::exp::<true>(x), super::exp::<false>(x)] {
                let error = (f64::from(got) - exact).abs() / exact;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "e^{x} is {got}, expected {exact}");
            }
        }
        assert!(
            super::exp::<true>(-1e9) < 1e-37 && super::silu::<true>(-1e9) == -1e9 / super::exp::<true>(88.0)
        );
        assert!(super::exp::<true>(f32::NAN).is_nan());
    }
}
