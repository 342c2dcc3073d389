//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod abuse;
mod anthropic;
mod batch;
mod chat;
mod completions;
mod doors;
mod fallback;
mod models;
#[path = "../support/models.rs"]
mod models_in_memory;
mod ollama;
mod openapi;
mod probes;
mod refused;
mod responses;
mod router;
mod same;
mod steer;
mod world;
