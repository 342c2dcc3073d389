//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod chat;
mod completions;
mod models;
#[path = "../support/models.rs"]
mod models_in_memory;
mod openapi;
mod probes;
mod refused;
mod same;
mod steer;
mod world;
