//! cli

pub mod check;
pub mod models;
pub mod pull;
pub mod quantize;
pub mod table;
