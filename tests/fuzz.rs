//! The fuzz targets' bodies on seeded random bytes: the short run that every `cargo test` makes. The long one is in
//! `fuzz/README.md`.

#[path = "../fuzz/src/lib.rs"]
mod bodies;

/// Calls `body` on `count` random inputs; a failure names its seed.
fn run(count: u64, body: fn(&[u8])) {
    for seed in 0..count {
        let mut state = seed;
        let len = random(&mut state) % 64;
        // Half the inputs favour the low values, which choose markup.
        let width = if seed % 2 == 0 { 256 } else { 26 };
        let data: Vec<u8> = (0..len).map(|_| (random(&mut state) % width) as u8).collect();
        if std::panic::catch_unwind(|| body(&data)).is_err() {
            panic!("seed {seed} fails with {data:?}");
        }
    }
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
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

#[test]
fn gguf() {
    run(20_000, bodies::gguf);
}

#[test]
fn header() {
    run(20_000, bodies::header);
}

#[test]
fn request() {
    run(20_000, bodies::request);
}
