//! Points in time as text.

/// RFC 3339 in UTC with milliseconds, of nanoseconds since the epoch.
#[must_use]
pub fn rfc3339(wall_ns: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(wall_ns);
    humantime::format_rfc3339_millis(at).to_string()
}
