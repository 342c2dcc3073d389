//! The device's own interpreter. For now it holds the kernels that a later launch loads.

/// Every kernel of `kernels/`, compiled for each target of build.rs: a fat binary, as `cuModuleLoadData` takes it.
pub static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
