//! `kernels/rms_norm.cu` on the host.

use super::{Bf16Buffer, Error, Launch, launch};
use crate::ops::rms_norm::Args;

/// Threads of a block; `RMS_NORM_THREADS` of the kernel.
const THREADS: u32 = 256;

/// Divides each row by its root mean square and multiplies it by the weight.
/// `x` [rows, width], `weight` [width] bf16 bits; returns y [rows, width].
///
/// # Errors
/// [`Error::Shape`] if two sizes of one name differ, [`Error::Deadlock`], [`Error::Fault`] or [`Error::Overrun`] if
/// the kernel is wrong. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
pub fn rms_norm(
    x: &[u16],
    weight: &[u16],
    rows: u32,
    width: u32,
    eps: f32,
    seed: u64,
) -> Result<Vec<u16>, Error> {
    let expect = |name, expected: usize, got: usize| {
        if expected == got { Ok(()) } else { Err(Error::Shape { name, expected, got }) }
    };
    expect("x", rows as usize * width as usize, x.len())?;
    expect("weight", width as usize, weight.len())?;
    if x.is_empty() {
        return Ok(Vec::new());
    }
    let x = Bf16Buffer::new("x", x);
    let weight = Bf16Buffer::new("weight", weight);
    let mut y = Bf16Buffer::poisoned("y", rows as usize * width as usize);
    let args = Args { x: x.as_ptr(), weight: weight.as_ptr(), y: y.as_mut_ptr(), width, eps };
    let shape = Launch { grid: [rows, 1, 1], block: [THREADS, 1, 1], seed };
    // SAFETY: these are the kernel's args, and the buffers have the sizes that the kernel derives from grid and width.
    unsafe { launch("rms_norm", &args, shape) }?;
    y.read()
}
