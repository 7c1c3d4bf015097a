//! What journald needs of a line on stderr: its level in front (sd-daemon(3)), and no time, since it has its own.

use tracing::Level;

/// The mark of an error.
pub(super) const ERROR: &str = "<3>";

/// Whether journald reads stderr: systemd tells the stream's device and inode (systemd.exec(5), `$JOURNAL_STREAM`).
pub(super) fn reads_stderr() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(std::io::stderr())
        .is_ok_and(|s| stream.to_str() == Some(&format!("{}:{}", s.st_dev, s.st_ino)))
}

/// The mark of a level.
pub(super) fn mark(level: Level) -> &'static str {
    match level {
        Level::ERROR => ERROR,
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}
