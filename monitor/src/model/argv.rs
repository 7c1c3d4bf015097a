//! The bytes of a command line.

/// argv as /proc and the exec record have it: each argument ends with a NUL.
pub fn split_argv(b: &[u8]) -> impl Iterator<Item = &[u8]> {
    let b = b.strip_suffix(&[0]).unwrap_or(b);
    // Nothing is no word, and not an empty one.
    (!b.is_empty()).then(|| b.split(|&c| c == 0)).into_iter().flatten()
}
