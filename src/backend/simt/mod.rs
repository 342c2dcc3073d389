//! The kernels of `kernels/` on the host: each CUDA thread is a fiber, resumed in an order drawn from a seed.
//!
//! This is how a kernel is tested without a GPU. An operation builds its [`Bf16Buffer`]s and its `#[repr(C)]` args,
//! calls [`launch`] and reads the buffers back; whatever changes with the seed is a missing barrier.
//! `kernels/simt/simt.h` says what the shim models and what it does not.

mod buffer;
mod rms_norm;

use std::ffi::{CStr, CString, c_char, c_int, c_void};

pub use buffer::Bf16Buffer;
pub use rms_norm::rms_norm;

/// Room for the shim's account of a deadlock: a line for each place where threads wait.
const REPORT_BYTES: usize = 4096;

/// More numbers than any args struct has fields.
const LAYOUT_CAPACITY: usize = 64;

/// Why a launch gave no answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("kernel {kernel}: expected one of those listed in kernels/simt/kernels.cpp")]
    UnknownKernel { kernel: String },
    #[error("kernel {kernel}: its args have another size than the {got} bytes passed")]
    ArgsBytes { kernel: String, got: usize },
    #[error(
        "kernel {kernel}: expected a grid of at least 1 and a block of 1 to 1024 threads, got {grid:?}, {block:?}"
    )]
    LaunchSize { kernel: String, grid: [u32; 3], block: [u32; 3] },
    #[error("kernel {kernel}, seed {seed}: deadlock: {report}")]
    Deadlock { kernel: String, seed: u64, report: String },
    #[error("kernel {kernel}, seed {seed}: {report}")]
    Fault { kernel: String, seed: u64, report: String },
    #[error("{name}: expected {expected} elements, got {got}")]
    Shape { name: &'static str, expected: usize, got: usize },
    #[error("{name}: written outside its {len} elements, at {at}")]
    Overrun { name: &'static str, len: usize, at: isize },
}

/// How many threads run, and which of the many possible orders they run in.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z; at most 1024 together.
    pub block: [u32; 3],
    /// Any number. The same seed gives the same order.
    pub seed: u64,
}

/// Runs `kernel` over every thread of `launch` and returns when the last has ended.
///
/// # Errors
/// [`Error::Deadlock`] if no thread can go on, [`Error::Fault`] if one does what the device forbids, and the errors of
/// a launch that fits no kernel.
///
/// # Safety
/// `A` must be the kernel's own args struct, and its pointers must be good for what the kernel reads and writes.
pub unsafe fn launch<A: Copy>(kernel: &str, args: &A, launch: Launch) -> Result<(), Error> {
    let unknown = || Error::UnknownKernel { kernel: kernel.to_owned() };
    let name = CString::new(kernel).map_err(|_| unknown())?;
    let mut report = [0 as c_char; REPORT_BYTES];
    // SAFETY: the name is a C string, the args are theirs by this function's own contract and their size is passed
    // along, the report has the room it is said to have, and nothing of it is kept after the call.
    let status = unsafe {
        ferrotron_simt_launch(
            name.as_ptr(),
            std::ptr::from_ref(args).cast(),
            size_of::<A>(),
            &launch,
            report.as_mut_ptr(),
            report.len(),
        )
    };
    let kernel = kernel.to_owned();
    let Launch { grid, block, seed } = launch;
    // SAFETY: the shim always writes a text and its closing zero.
    let report = unsafe { CStr::from_ptr(report.as_ptr()) }.to_string_lossy().into_owned();
    // The numbers are `Status` of kernels/simt/launch.h.
    match status {
        0 => Ok(()),
        1 => Err(Error::Deadlock { kernel, seed, report }),
        3 => Err(Error::UnknownKernel { kernel }),
        4 => Err(Error::ArgsBytes { kernel, got: size_of::<A>() }),
        5 => Err(Error::LaunchSize { kernel, grid, block }),
        _ => Err(Error::Fault { kernel, seed, report }),
    }
}

/// The size of `kernel`'s args struct as C++ sees it, then the offsets of its fields in order.
///
/// # Errors
/// [`Error::UnknownKernel`].
pub fn layout(kernel: &str) -> Result<Vec<usize>, Error> {
    let unknown = || Error::UnknownKernel { kernel: kernel.to_owned() };
    let name = CString::new(kernel).map_err(|_| unknown())?;
    let mut layout = [0; LAYOUT_CAPACITY];
    // SAFETY: the name is a C string and the shim writes no more numbers than it is told there is room for.
    let count = unsafe { ferrotron_simt_layout(name.as_ptr(), layout.as_mut_ptr(), layout.len()) };
    match layout.get(..count) {
        None | Some([]) => Err(unknown()),
        Some(numbers) => Ok(numbers.to_vec()),
    }
}

unsafe extern "C" {
    fn ferrotron_simt_launch(
        name: *const c_char,
        args: *const c_void,
        args_bytes: usize,
        launch: *const Launch,
        report: *mut c_char,
        report_bytes: usize,
    ) -> c_int;

    fn ferrotron_simt_layout(name: *const c_char, layout: *mut usize, capacity: usize) -> usize;
}
