//! What is wrong with a config, and where: file, line, column, what was expected, and the line itself.

use std::fmt::{self, Write as _};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// More than this many problems are counted, not shown.
const SHOWN: usize = 20;
/// Of a longer line only the part around the problem is shown.
const WIDTH: usize = 100;

/// Why there is no [`Config`](super::Config). Nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the config {} has more than {max} bytes", path.display())]
    TooLarge { path: PathBuf, max: u64 },
    #[error("{}:{line}:{column}: the config must be UTF-8", path.display())]
    NotUtf8 { path: PathBuf, line: usize, column: usize },
    #[error("{}", shown(.0))]
    Invalid(Vec<Problem>),
}

impl ConfigError {
    /// All that was found wrong in the text; empty if it could not even be read.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid(all) => all,
            _ => &[],
        }
    }
}

fn shown(problems: &[Problem]) -> String {
    let mut out = problems.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("\n");
    if problems.len() > SHOWN {
        // Writing to a String cannot fail.
        let _ = write!(out, "\nand {} more", problems.len() - SHOWN);
    }
    out
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    /// What was expected and what was found.
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    File {
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// The line, ready for a terminal: escaped, and cut around the problem.
        text: String,
        /// What of `text` is meant, in characters.
        mark: Range<usize>,
    },
    /// An environment variable.
    Environment(String),
    /// An option of the command line.
    Flag(&'static str),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Environment(name) => write!(f, "environment variable {name}: {}", self.message),
            Place::Flag(name) => write!(f, "option {name}: {}", self.message),
            Place::File { path, line, column, text, mark } => {
                writeln!(f, "{}:{line}:{column}: {}", path.display(), self.message)?;
                let number = line.to_string();
                let margin = " ".repeat(number.len());
                writeln!(f, "  {number} | {text}")?;
                let blank = " ".repeat(mark.start);
                let carets = "^".repeat(mark.len().max(1));
                write!(f, "  {margin} | {blank}{carets}")
            }
        }
    }
}

/// Where `span` (bytes of `text`) begins, with the line shown. What `hide` covers is a secret in the wrong place and is
/// not shown.
pub(super) fn place(path: &Path, text: &str, span: Range<usize>, hide: Option<&Range<usize>>) -> Place {
    let start = floor(text, span.start);
    let end = floor(text, span.end.max(start));
    let from = text[..start].rfind('\n').map_or(0, |i| i + 1);
    let to = text[start..].find('\n').map_or(text.len(), |i| start + i);
    let line = text[..from].matches('\n').count() + 1;
    let column = text[from..start].chars().count() + 1;

    let mut out = String::new();
    let mut cells = 0;
    let mut mark = 0..0;
    let before = column.saturating_sub(WIDTH / 2);
    let mut hidden = false;
    for (skipped, (i, c)) in text[from..to].char_indices().enumerate() {
        let at = from + i;
        if skipped < before {
            continue;
        }
        if at <= start {
            mark.start = cells;
        }
        if cells >= WIDTH {
            out.push_str("..");
            break;
        }
        let piece = if hide.is_some_and(|h| h.contains(&at)) {
            if hidden { String::new() } else { "\"...\"".into() }
        } else if c == '\t' {
            " ".into()
        } else if c.is_control() || is_bidi(c) {
            c.escape_unicode().to_string()
        } else {
            c.into()
        };
        hidden = hide.is_some_and(|h| h.contains(&at));
        cells += piece.chars().count();
        out.push_str(&piece);
        if at < end {
            mark.end = cells;
        }
    }
    if start >= to {
        mark.start = cells;
    }
    mark.end = mark.end.max(mark.start + 1);
    Place::File { path: path.to_owned(), line, column, text: out, mark }
}

/// Characters that reorder or hide what follows them on a terminal.
const fn is_bidi(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The nearest character boundary at or before `i`.
fn floor(text: &str, i: usize) -> usize {
    let mut i = i.min(text.len());
    while !text.is_char_boundary(i) {
        i -= 1;
    }
    i
}
