//! One file per operation: its sizes, its cost in bytes, its scalar reference, its tests.
//!
//! The references are plain loops with f64 sums: slow, and obviously right. Every backend is compared with
//! them. A reference takes `[T, width]` rows as flat slices and writes where it is told.

pub mod attention;
pub mod cells;
pub mod conv;
pub mod embed;
pub mod experts;
pub mod gated_norm;
pub mod lanes;
pub mod linear;
pub mod lines;
pub mod rms_norm;
pub mod route;
pub mod ssm;

/// What one call of an operation must move and compute, whatever the implementation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Weight bytes read, in their stored format.
    pub weights: u64,
    /// State and cache bytes read and written.
    pub state: u64,
    /// Activation bytes read and written.
    pub activations: u64,
    /// Multiply-adds times two.
    pub flops: u64,
}

impl Cost {
    pub fn bytes(&self) -> u64 {
        self.weights + self.state + self.activations
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.weights += other.weights;
        self.state += other.state;
        self.activations += other.activations;
        self.flops += other.flops;
    }
}

/// Two sizes of one name disagree: a weight does not fit where the network wants to use it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{op}: {what} is {got}, expected {expected}")]
pub struct ShapeError {
    pub op: &'static str,
    pub what: &'static str,
    pub expected: usize,
    pub got: usize,
}

/// Fails unless `got == expected`.
pub fn agree(op: &'static str, what: &'static str, expected: usize, got: usize) -> Result<(), ShapeError> {
    if got == expected { Ok(()) } else { Err(ShapeError { op, what, expected, got }) }
}

/// softplus in the form every engine uses: the identity above 20, where f32 cannot tell the difference.
pub fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
