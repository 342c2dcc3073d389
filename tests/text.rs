//! The border of the `text` room: what goes in and comes out of `Text` and `Decoder`.
//!
//! Cutting the stream anywhere changes nothing: every answer here is read cut into bytes, whole, and cut at seeded random
//! places (`text/world.rs`), and all must agree.

#[path = "text/answers.rs"]
mod answers;
#[path = "text/calls.rs"]
mod calls;
#[path = "text/prompts.rs"]
mod prompts;
#[path = "text/random.rs"]
mod random;
#[path = "text/stops.rs"]
mod stops;
#[path = "text/templates.rs"]
mod templates;
#[path = "text/tokens.rs"]
mod tokens;
#[path = "text/world.rs"]
mod world;
