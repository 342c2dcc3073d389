//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod batch;
mod chat;
mod completions;
mod fallback;
mod models;
mod probes;
mod refused;
mod steer;
mod world;
