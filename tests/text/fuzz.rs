//! The fuzz targets' bodies on seeded random bytes: the short run that every `cargo test` makes. The long one is in
//! `fuzz/README.md`.

use crate::world::Rng;

#[path = "../../fuzz/src/lib.rs"]
mod bodies;

/// Calls `body` on `count` random inputs; a failure names its seed.
fn run(count: u64, body: fn(&[u8])) {
    for seed in 0..count {
        let mut rng = Rng(seed);
        let len = rng.below(64);
        // Half the inputs favour the low values, which choose markup.
        let width = if seed % 2 == 0 { 256 } else { 26 };
        let data: Vec<u8> = (0..len).map(|_| rng.below(width) as u8).collect();
        if std::panic::catch_unwind(|| body(&data)).is_err() {
            panic!("seed {seed} fails with {data:?}");
        }
    }
}

#[test]
fn detokenizer() {
    run(400, bodies::detokenizer);
}

#[test]
fn reasoning() {
    run(800, bodies::reasoning);
}

#[test]
fn tools() {
    run(1200, bodies::tools);
}

#[test]
fn stop_strings() {
    run(800, bodies::stop_strings);
}

#[test]
fn template() {
    run(100, bodies::template);
}
