//! The bodies of the fuzz targets, as plain functions over bytes: libFuzzer calls them through `fuzz_targets/`, and
//! `tests/fuzz.rs` includes this file and runs them on seeded random bytes, so that `cargo test` needs no nightly
//! compiler. Each states what must hold for every input, and panics if it does not.

mod gguf;
mod header;
mod request;
mod text;

pub use gguf::gguf;
pub use header::header;
pub use request::request;
pub use text::{detokenizer, reasoning, stop_strings, template, tools};

/// The bytes of an input as choices, one after the other; where they end, every choice is the first.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }
}
