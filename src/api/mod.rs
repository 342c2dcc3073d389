//! api
pub mod error;
pub mod fields;
pub mod ids;
pub mod model;
pub mod types;
