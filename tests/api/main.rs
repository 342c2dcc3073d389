//! The wire, called in memory: one file per route or rule, and the server that all of them call (`world`).

mod chat;
mod completions;
mod models;
mod probes;
mod refused;
mod responses;
mod steer;
mod world;
