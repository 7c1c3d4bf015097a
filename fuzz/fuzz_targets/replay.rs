//! Any bytes: an answer or a typed error, never a panic. `RUSTC_BOOTSTRAP=1 cargo fuzz run replay`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| jobwarden::fuzzing::replay(bytes));
