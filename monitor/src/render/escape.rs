//! Small pieces that all the texts are made of.

use std::fmt::Write as _;
use std::time::SystemTime;

use crate::model::schema::{Exit, Ref};

/// Untrusted text, safe on a terminal: control characters, and those that change the direction of writing or are
/// invisible, as escapes. (Bytes that are not UTF-8 are `\xNN` already, see [`crate::model::schema::text`].)
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape_to(&mut out, text);
    out
}

/// The same, behind what `out` has already.
fn escape_to(out: &mut String, text: &str) {
    if text.bytes().all(|b| matches!(b, b' '..=b'~')) {
        out.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c if c.is_control() || hidden(c) => {
                let _ = write!(out, "\\u{{{:x}}}", c as u32);
            }
            c => out.push(c),
        }
    }
}

/// Unicode's format characters that a terminal or an eye is fooled by, and its line separators.
const fn hidden(c: char) -> bool {
    matches!(c as u32,
        0xad | 0x61c | 0x180e | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb
        | 0xe_0000..=0xe_0fff)
}

/// argv as one line: joined by a space, what is empty or has a space in it quoted, so that the words can be told apart.
#[must_use]
pub fn argv<S: AsRef<str>>(argv: &[S]) -> String {
    let mut out = String::with_capacity(argv.iter().map(|a| a.as_ref().len() + 1).sum());
    for (n, word) in argv.iter().map(AsRef::as_ref).enumerate() {
        if n > 0 {
            out.push(' ');
        }
        // An escape neither has such a character nor takes one away.
        if word.is_empty() || word.contains([' ', '\'', '"']) {
            // Writing to a String cannot fail.
            let _ = write!(out, "'{}'", escape(word).replace('\'', r"'\''"));
        } else {
            escape_to(&mut out, word);
        }
    }
    out
}

/// `4110 (python3)`.
#[must_use]
pub fn process(r: &Ref) -> String {
    name(r.pid, &r.comm)
}

/// The same, of its parts.
#[must_use]
pub(super) fn name(pid: u32, comm: &str) -> String {
    format!("{pid} ({})", escape(comm))
}

/// How it ended: `exit 1`, `killed by SIGTERM from 4110 (python3)`.
#[must_use]
pub fn exit(e: &Exit) -> String {
    match e {
        Exit::Code { code } => format!("exit {code}"),
        Exit::Signal { signal, core, sender } => {
            let mut out = format!("killed by {}", escape(signal));
            if *core {
                out.push_str(" (core dumped)");
            }
            if let Some(s) = sender {
                let _ = write!(out, " from {}", process(s));
            }
            out
        }
    }
}

/// Seconds in at most two units: `0.4s`, `42s`, `3m12s`, `2h05m`, `3d4h`.
#[must_use]
pub fn age(seconds: f64) -> String {
    // NaN becomes 0.
    let s = seconds.max(0.0);
    if s < 9.95 {
        return format!("{s:.1}s");
    }
    let s = s as u64;
    match (s / 86_400, s / 3600, s / 60) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => format!("{m}m{:02}s", s % 60),
        (0, h, m) => format!("{h}h{:02}m", m % 60),
        (d, h, _) => format!("{d}d{:02}h", h % 24),
    }
}

/// A point in time of the contract.
#[must_use]
pub fn wall(rfc3339: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(rfc3339).ok()
}

/// Seconds from `from` to `to`, both RFC 3339; negative if `to` is earlier.
#[must_use]
pub(super) fn between(from: &str, to: SystemTime) -> Option<f64> {
    let from = wall(from)?;
    Some(match to.duration_since(from) {
        Ok(d) => d.as_secs_f64(),
        Err(e) => -e.duration().as_secs_f64(),
    })
}

/// `4 processes`, `1 process`.
#[must_use]
pub(super) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Only the time of day, of an RFC 3339 time in UTC.
#[must_use]
pub(super) fn clock(rfc3339: &str) -> String {
    escape(rfc3339.split_once('T').map_or(rfc3339, |(_, t)| t.trim_end_matches('Z')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_untrusted_reaches_the_terminal_raw() {
        let evil = "a\nb\t\x1b[2J\x1b]0;t\x07\u{9b}31m\u{202e}gnp\u{200b}\u{7f}é日";
        let e = escape(evil);
        assert_eq!(e, r"a\nb\t\x1b[2J\x1b]0;t\x07\u{9b}31m\u{202e}gnp\u{200b}\x7fé日");
        assert!(!e.chars().any(char::is_control));
    }

    #[test]
    fn words_of_argv_can_be_told_apart() {
        let a = ["sh", "-c", "it's a\nb", ""].map(String::from);
        assert_eq!(argv(&a), r"sh -c 'it'\''s a\nb' ''");
    }

    #[test]
    fn ages_have_two_units() {
        for (s, t) in [
            (f64::NAN, "0.0s"),
            (-1.0, "0.0s"),
            (0.44, "0.4s"),
            (9.96, "9s"),
            (59.9, "59s"),
            (192.0, "3m12s"),
            (7500.0, "2h05m"),
            (273_600.0, "3d04h"),
        ] {
            assert_eq!(age(s), t);
        }
    }
}
