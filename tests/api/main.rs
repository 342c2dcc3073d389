//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod abuse;
mod anthropic;
mod batch;
mod chat;
mod completions;
mod doors;
mod fallback;
mod models;
mod ollama;
mod probes;
mod refused;
mod responses;
mod router;
mod steer;
mod world;
