//! A linear weight as the checkpoint stores it. Nothing is expanded: backends read these bytes.

use bytes::Bytes;

/// `[rows, cols]` = `[out, in]`, row-major, in its stored format.
#[derive(Debug, Clone)]
pub struct Linear {
    pub rows: usize,
    pub cols: usize,
    pub format: Format,
    /// The stored codes; empty for a weight that is only described (trace, plan).
    pub data: Bytes,
}

/// How the elements of a [`Linear`] are encoded, with what is needed to read them.
#[derive(Debug, Clone)]
pub enum Format {
    F32,
    F16,
    BF16,
    /// E4M3, times one scale per tensor.
    Fp8 { scale: f32 },
    /// E2M1, low nibble first; E4M3 block scales `[rows, cols/16]` linear; times `global_scale`
    /// (already inverted for compressed-tensors files).
    Nvfp4 { scales: Bytes, global_scale: f32 },
}
