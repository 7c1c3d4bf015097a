//! Colours and the width of what is written to.

/// What is written to: a terminal of some width, or a pipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    pub color: bool,
    /// Columns; None: nothing is ever cut (a pipe, a file).
    pub width: Option<usize>,
}

/// What a colour means here, not which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// Zombies, survivors, critical.
    Bad,
    /// Orphans, warnings.
    Odd,
    /// The dead, headings, what matters less.
    Dim,
    Job,
    Good,
    Strong,
    Plain,
}

impl Paint {
    const fn code(self) -> &'static str {
        match self {
            Self::Bad => "\x1b[1;31m",
            Self::Odd => "\x1b[33m",
            Self::Dim => "\x1b[2m",
            Self::Job => "\x1b[36m",
            Self::Good => "\x1b[32m",
            Self::Strong => "\x1b[1m",
            Self::Plain => "",
        }
    }
}

const RESET: &str = "\x1b[0m";

impl Style {
    /// `text` must be escaped already.
    #[must_use]
    pub fn paint(self, paint: Paint, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        self.paint_to(&mut out, paint, text);
        out
    }

    /// The same, behind what `out` has already.
    pub(super) fn paint_to(self, out: &mut String, paint: Paint, text: &str) {
        if !self.color || paint == Paint::Plain || text.is_empty() {
            out.push_str(text);
            return;
        }
        out.extend([paint.code(), text, RESET]);
    }
}

/// Columns that a text without escape sequences takes. East Asian wide characters and most pictographs take two
/// (Unicode's EastAsianWidth, in its large blocks only; a rare one that is missed costs alignment, no more).
#[must_use]
pub(super) fn width(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.chars().map(char_width).sum() }
}

const fn char_width(c: char) -> usize {
    match c as u32 {
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1_f300..=0x1_f64f
        | 0x1_f900..=0x1_f9ff
        | 0x2_0000..=0x3_fffd => 2,
        _ => 1,
    }
}

/// The beginning of `text` in at most `columns`, with an ellipsis where something was left out.
#[must_use]
pub(super) fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(1);
    let mut used = 0;
    let fits = text.chars().take_while(|&c| {
        used += char_width(c);
        used <= room
    });
    let mut out: String = fits.collect();
    if columns > 0 {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_counts_columns() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("日本語", 4), "日…");
        assert_eq!(cut("abc", 0), "");
        assert!(width(&cut("日本語日本語", 7)) <= 7);
    }

    #[test]
    fn no_colour_no_escape() {
        assert_eq!(Style::default().paint(Paint::Bad, "x"), "x");
        assert_eq!(Style { color: true, width: None }.paint(Paint::Bad, "x"), "\x1b[1;31mx\x1b[0m");
    }
}
