//! Checkpoints: safetensors files and the formats of their weights.

pub mod linear;

pub use linear::{Format, Linear};
