//! Text from outside: names, arguments and paths that other processes choose. It can only be shown escaped, so that no such
//! text starts a line of a log, moves a terminal's cursor or reverses the direction of what stands beside it.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

/// comm, an argument, exe, a cgroup path, a file's path, a line of source. `Display` and `Debug` escape; JSON has the text
/// itself (bytes that are not UTF-8 as `\xNN`), since JSON escapes by its own rules.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OutsideText(String);

impl OutsideText {
    /// Valid UTF-8 as it is, any other byte as `\xNN`.
    #[must_use]
    pub fn from_bytes(mut b: &[u8]) -> Self {
        let mut out = String::with_capacity(b.len());
        loop {
            match std::str::from_utf8(b) {
                Ok(s) => {
                    out.push_str(s);
                    return Self(out);
                }
                Err(e) => {
                    let (good, bad) = b.split_at(e.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(good));
                    let n = e.error_len().unwrap_or(bad.len());
                    for x in &bad[..n] {
                        // Writing to a String cannot fail.
                        let _ = write!(out, "\\x{x:02x}");
                    }
                    b = &bad[n..];
                }
            }
        }
    }

    /// The text itself: to compare, match and mask it. Never to show it.
    #[must_use]
    pub fn raw(&self) -> &str {
        &self.0
    }

    /// As [`OutsideText::raw`].
    #[must_use]
    pub fn into_raw(self) -> String {
        self.0
    }
}

impl From<String> for OutsideText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for OutsideText {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<&std::path::Path> for OutsideText {
    fn from(path: &std::path::Path) -> Self {
        Self::from_bytes(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
    }
}

impl PartialEq<str> for OutsideText {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for OutsideText {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl PartialEq<String> for OutsideText {
    fn eq(&self, other: &String) -> bool {
        self.0 == *other
    }
}

impl fmt::Display for OutsideText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&escape(&self.0))
    }
}

impl fmt::Debug for OutsideText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Control characters, and those that change the direction of writing or are invisible, as escapes; all else as it is, so
/// that escaping twice is escaping once.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|b| matches!(b, b' '..=b'~')) || !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        // Writing to a String cannot fail.
        let _ = match c {
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            c if c.is_ascii_control() => write!(out, "\\x{:02x}", c as u32),
            c if is_unsafe(c) => write!(out, "\\u{{{:x}}}", c as u32),
            c => out.write_char(c),
        };
    }
    Cow::Owned(out)
}

/// argv as one line: joined by a space, what is empty or has a space in it quoted, so that the words can be told apart.
#[must_use]
pub fn command_line(argv: &[OutsideText]) -> String {
    command_line_of(argv.iter().map(OutsideText::raw))
}

/// As [`command_line`], of the words themselves.
pub fn command_line_of<'a>(argv: impl Iterator<Item = &'a str>) -> String {
    let mut out = String::new();
    for (n, word) in argv.enumerate() {
        if n > 0 {
            out.push(' ');
        }
        // An escape neither has such a character nor takes one away.
        let escaped = escape(word);
        if escaped.is_empty() || escaped.contains([' ', '\'', '"']) {
            // Writing to a String cannot fail.
            let _ = write!(out, "'{}'", escaped.replace('\'', r"'\''"));
        } else {
            out.push_str(&escaped);
        }
    }
    out
}

/// As [`escape`], for a text of several lines: its line breaks are the author's, who has escaped those of others.
#[must_use]
pub fn escape_lines(text: &str) -> String {
    text.split('\n').map(escape).collect::<Vec<_>>().join("\n")
}

/// The same characters in JSON, as JSON escapes them: the value is the same, and safe on a terminal. serde_json leaves DEL, the
/// C1 controls and Unicode's invisible characters as they are; in JSON they can only stand within a string.
#[must_use]
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let is_unsafe = |c: char| is_unsafe(c) && !matches!(c, '\n' | '\r' | '\t');
    if json.is_ascii() && !json.contains('\x7f') || !json.chars().any(is_unsafe) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_unsafe(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Unicode's format characters that a terminal or an eye is fooled by, and its line separators, are unsafe too.
const fn is_unsafe(c: char) -> bool {
    matches!(c as u32,
        0..=0x1f | 0x7f..=0x9f | 0xad | 0x61c | 0x180e | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff
        | 0xfff9..=0xfffb | 0xe_0000..=0xe_0fff)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "a\nb\t\x1b[2J\x1b]0;t\x07\u{9b}31m\u{202e}gnp\u{200b}\u{7f}\u{e0041}é日";

    #[test]
    fn text_from_outside_is_only_shown_escaped() {
        let safe = r"a\nb\t\x1b[2J\x1b]0;t\x07\u{9b}31m\u{202e}gnp\u{200b}\x7f\u{e0041}é日";
        let text = OutsideText::from(EVIL);
        assert_eq!(text.to_string(), safe);
        assert_eq!(format!("{text:?}"), format!("\"{safe}\""));
        assert_eq!(escape(safe), safe, "twice is once");
        assert_eq!(escape_lines("ours\nand \x1b"), "ours\nand \\x1b");
        assert_eq!(format!("{:>4}|", OutsideText::from("é")), "   é|");
    }

    #[test]
    fn words_of_argv_can_be_told_apart() {
        let a = ["sh", "-c", "it's a\nb", ""].map(OutsideText::from);
        assert_eq!(command_line(&a), r"sh -c 'it'\''s a\nb' ''");
    }

    #[test]
    fn json_has_the_text_itself() {
        let json = serde_json::to_string(&OutsideText::from(EVIL)).unwrap();
        let safe = escape_json(&json);
        assert!(!safe.chars().any(is_unsafe), "{safe}");
        for json in [&*json, &*safe] {
            assert_eq!(serde_json::from_str::<OutsideText>(json).unwrap().raw(), EVIL);
        }
        assert_eq!(escape_json("{}\n"), "{}\n");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_escaped() {
        assert_eq!(OutsideText::from_bytes(b"a\xffb\xc3"), "a\\xffb\\xc3");
        assert_eq!(OutsideText::from_bytes("é".as_bytes()), "é");
    }
}
