//! The fuzzers' corpus, run in the ordinary tests: what once made a parser stumble never does again.

#![expect(clippy::unwrap_used, reason = "a test: what cannot be read fails it")]

use std::path::PathBuf;

fn each(target: &str, f: fn(&[u8])) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut n = 0;
    for e in std::fs::read_dir(&dir).unwrap() {
        let path = e.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let done = std::panic::catch_unwind(|| {
            f(&bytes);
            // And every prefix, as a torn write leaves it; long files at some places.
            let step = (bytes.len() / 512).max(1);
            (0..bytes.len()).step_by(step).for_each(|cut| f(&bytes[..cut]));
        });
        assert!(done.is_ok(), "{} makes it panic", path.display());
        n += 1;
    }
    assert!(n > 0, "{} is empty", dir.display());
}

#[test]
fn record() {
    each("record", jobwarden::fuzzing::record);
}

#[test]
fn recording() {
    each("recording", jobwarden::fuzzing::recording);
}

#[test]
fn replay() {
    each("replay", jobwarden::fuzzing::replay);
}

#[test]
fn config() {
    each("config", jobwarden::fuzzing::config);
}

#[test]
fn proc() {
    each("proc", jobwarden::fuzzing::proc);
}
