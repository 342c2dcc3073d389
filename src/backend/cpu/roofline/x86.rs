//! Reading and multiplying on x86-64: AVX-512, AVX2 or what every such machine has; BF16 pairs; AMX tiles.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::Unit;
use crate::backend::cpu::simd::Isa;

/// Sums that do not wait for each other: more than latency times units of any core, and few enough for the registers.
const SUMS: usize = 12;
/// Tiles that are added to; the other four of the eight hold operands.
const TILE_SUMS: usize = 4;
/// Words read per round: four cache lines, so that four loads are under way.
const WORDS: usize = 32;

pub fn has(unit: Unit) -> bool {
    match unit {
        Unit::F32 => true,
        Unit::Bf16Dot => is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f"),
        Unit::Bf16Tile => tile::available(),
    }
}

/// Multiplications and additions of one round.
pub fn flops_per_round(unit: Unit) -> usize {
    match unit {
        Unit::F32 => 2 * SUMS * f32_lanes(),
        Unit::Bf16Dot => 2 * SUMS * 32,
        Unit::Bf16Tile => 2 * TILE_SUMS * 16 * 16 * 32,
    }
}

fn f32_lanes() -> usize {
    match Isa::detect() {
        Isa::Avx512 | Isa::Avx512Bf16 => 16,
        Isa::Avx2 => 8,
        Isa::Portable | Isa::Neon => 4,
    }
}

/// Runs `rounds` rounds of `unit`, which the machine [`has`].
pub fn multiply(unit: Unit, rounds: usize) {
    black_box(sum(unit, rounds, 1e-9));
}

/// The sum of all sums after `rounds` rounds of products of `x` and 1.
pub fn sum(unit: Unit, rounds: usize, x: f32) -> f32 {
    match (unit, Isa::detect()) {
        // SAFETY: `Isa::detect` found these features.
        (Unit::F32, Isa::Avx512 | Isa::Avx512Bf16) => unsafe { f32_avx512(rounds, x) },
        // SAFETY: as above.
        (Unit::F32, Isa::Avx2) => unsafe { f32_avx2(rounds, x) },
        (Unit::F32, _) => f32_sse(rounds, x),
        // SAFETY: the caller asked `has`.
        (Unit::Bf16Dot, _) => unsafe { bf16_avx512(rounds, x) },
        (Unit::Bf16Tile, _) => tile::sum(rounds, x),
    }
}

#[target_feature(enable = "avx512f")]
fn f32_avx512(rounds: usize, x: f32) -> f32 {
    let (x, one) = (_mm512_set1_ps(black_box(x)), _mm512_set1_ps(black_box(1.0)));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(x, one, *sum);
        }
    }
    sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
}

#[target_feature(enable = "avx2,fma")]
fn f32_avx2(rounds: usize, x: f32) -> f32 {
    let (x, one) = (_mm256_set1_ps(black_box(x)), _mm256_set1_ps(black_box(1.0)));
    let mut sums = [_mm256_setzero_ps(); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(x, one, *sum);
        }
    }
    let mut lanes = [0.0f32; 8];
    let mut total = 0.0;
    for sum in sums {
        // SAFETY: eight numbers fit `lanes`, and the store needs no alignment.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        total += lanes.iter().sum::<f32>();
    }
    total
}

fn f32_sse(rounds: usize, x: f32) -> f32 {
    let (x, one) = ([black_box(x); 4], [black_box(1.0); 4]);
    let mut sums = [[0.0f32; 4]; SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in 0..4 {
                sum[lane] += x[lane] * one[lane];
            }
        }
    }
    sums.iter().flatten().sum()
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_avx512(rounds: usize, x: f32) -> f32 {
    let pairs = |value: f32| {
        let wide = _mm512_set1_ps(black_box(value));
        _mm512_cvtne2ps_pbh(wide, wide)
    };
    let (x, one) = (pairs(x), pairs(1.0));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, one);
        }
    }
    sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
}

/// Reads all of `words`.
pub fn read(words: &[u64]) {
    black_box(match Isa::detect() {
        // SAFETY: `Isa::detect` found these features.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { read_avx512(words) },
        // SAFETY: as above.
        Isa::Avx2 => unsafe { read_avx2(words) },
        Isa::Portable | Isa::Neon => words.iter().fold(0, |sum, word| sum ^ word),
    });
}

#[target_feature(enable = "avx512f")]
fn read_avx512(words: &[u64]) -> u64 {
    let mut sums = [_mm512_setzero_si512(); WORDS / 8];
    for line in words.chunks_exact(WORDS) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a line has `WORDS` words, and the load needs no alignment.
            let word = unsafe { _mm512_loadu_si512(line.as_ptr().add(8 * i).cast()) };
            *sum = _mm512_xor_si512(*sum, word);
        }
    }
    sums.iter().fold(0, |all, &sum| all ^ _mm512_reduce_or_epi64(sum) as u64)
}

#[target_feature(enable = "avx2")]
fn read_avx2(words: &[u64]) -> u64 {
    let mut sums = [_mm256_setzero_si256(); WORDS / 4];
    for line in words.chunks_exact(WORDS) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a line has `WORDS` words, and the load needs no alignment.
            let word = unsafe { _mm256_loadu_si256(line.as_ptr().add(4 * i).cast()) };
            *sum = _mm256_xor_si256(*sum, word);
        }
    }
    sums.iter().fold(0, |all, &sum| all ^ _mm256_extract_epi64::<0>(sum) as u64)
}

/// AMX, whose intrinsics the compiler keeps unstable: in assembly, which it is not asked about.
mod tile {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    use std::sync::OnceLock;

    use half::bf16;

    /// Rows of a tile, and bytes of a row.
    const ROWS: usize = 16;
    const ROW: usize = 64;

    /// What `ldtilecfg` reads: palette 1, all eight tiles full.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Whether the processor has BF16 tiles, and the system gave this process room for them.
    pub fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| detected() && permitted())
    }

    fn detected() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const STATE: u64 = 3 << 17;
        if !std::arch::is_x86_feature_detected!("xsave") || __cpuid_count(0, 0).eax < 7 {
            return false;
        }
        let both = AMX_BF16 | AMX_TILE;
        // SAFETY: `xsave` is there, and usable by programs, or it would not have been detected.
        __cpuid_count(7, 0).edx & both == both && unsafe { _xgetbv(0) } & STATE == STATE
    }

    /// Linux grows a process's register state for tiles only when it is asked to.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but what this process may use.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }

    /// As [`super::sum`]; [`available`] must have said yes.
    pub fn sum(rounds: usize, x: f32) -> f32 {
        assert!(available(), "this machine has no BF16 tiles");
        let mut row_bytes = [0; 16];
        let mut rows = [0; 16];
        row_bytes[..8].fill(ROW as u16);
        rows[..8].fill(ROWS as u8);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        let fill = |value: f32| [bf16::from_f32(value); ROWS * ROW / 2];
        let (left, right) = (fill(x), fill(1.0));
        let mut sums = [[0.0f32; ROWS * ROW / 4]; super::TILE_SUMS];
        if rounds == 0 {
            return 0.0;
        }
        // SAFETY: the machine has tiles and Linux gave leave; all loads and stores are of whole tiles inside the arrays;
        // the tiles are released, so nobody else sees them.
        unsafe {
            asm!(
                "ldtilecfg [{configuration}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{left} + {stride}]",
                "tileloadd tmm5, [{left} + {stride}]",
                "tileloadd tmm6, [{right} + {stride}]",
                "tileloadd tmm7, [{right} + {stride}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "sub {rounds}, 1",
                "jnz 2b",
                "tilestored [{sums} + {stride}], tmm0",
                "tilestored [{sums} + {stride} + 1024], tmm1",
                "tilestored [{sums} + {stride} + 2048], tmm2",
                "tilestored [{sums} + {stride} + 3072], tmm3",
                "tilerelease",
                configuration = in(reg) &raw const configuration,
                left = in(reg) left.as_ptr(),
                right = in(reg) right.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) ROW,
                rounds = inout(reg) rounds => _,
                options(nostack),
            );
        }
        sums.iter().flatten().sum()
    }
}
