//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod chat;
mod completions;
mod models;
mod fallback;
mod probes;
mod refused;
mod steer;
mod world;
