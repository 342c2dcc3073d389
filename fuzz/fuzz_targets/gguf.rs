#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ferrotron_fuzz::gguf(data));
