//! For unit tests that cannot run on every host.

use std::io::Write as _;

/// Reports a test that does not run here. The caller returns after it. libtest discards what a passing test prints by `println!`
/// and `eprintln!`, so this writes to stderr itself; `cargo xtask test` counts the line as a skipped test.
pub(crate) fn skipped(test: &str, why: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}
