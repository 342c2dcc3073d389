//! ferrotron: one native process that serves NVIDIA's Nemotron-H hybrid models (Mamba-2, attention, MoE).
//!
//! Text becomes ids, ids become a step, a step becomes ids, ids become text. Knowledge points one way:
//! `cli → api → text, engine`; `engine → schedule, sample, model`; `model → backend, weights`;
//! `backend → ops`. See ARCHITECTURE.md for the map.

pub mod api;
pub mod backend;
pub mod cli;
pub mod engine;
pub mod model;
pub mod ops;
pub mod sample;
pub mod schedule;
pub mod text;
pub mod weights;
