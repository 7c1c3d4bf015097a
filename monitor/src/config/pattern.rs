//! Regular expressions of rules. Of thousands few are ever run, so each is parsed when the config is read, and compiled when
//! it is first needed. What every match must contain is kept, for the engine's search over all rules at once.

use std::fmt;
use std::sync::{Arc, OnceLock};

use regex::Regex;
use regex_syntax::hir::{Class, Hir, HirKind};

/// Up to this size an expression compiles within a millisecond and far below the limit of the regex crate, so that it can
/// be put off. A larger one is compiled when the config is read: it may be refused.
const SMALL: usize = 10_000;
/// Most alternatives of the text that a match must contain.
const ALTERNATIVES: usize = 64;

/// A regular expression that is known to be valid. Clones share the compiled one.
#[derive(Clone)]
pub struct Pattern(Arc<Inner>);

struct Inner {
    text: Box<str>,
    required: Vec<Box<str>>,
    size: usize,
    compiled: OnceLock<Option<Regex>>,
}

impl Pattern {
    /// Parses it.
    ///
    /// # Errors
    /// In words, why it is none of the regex crate's.
    pub fn new(text: &str) -> Result<Self, String> {
        let hir = regex_syntax::parse(text).map_err(|e| last_line(&e.to_string()))?;
        let (size, compiled) = (size(&hir), OnceLock::new());
        let required = required(&hir).unwrap_or_default();
        Ok(Self(Arc::new(Inner { text: text.into(), required, size, compiled })))
    }

    /// Compiles one that is too large to be sure of it.
    ///
    /// # Errors
    /// In words: it is larger than the regex crate allows.
    pub fn compile_large(&self) -> Result<(), String> {
        if self.0.size > SMALL {
            let regex = Regex::new(&self.0.text).map_err(|e| last_line(&e.to_string()))?;
            let _ = self.0.compiled.set(Some(regex));
        }
        Ok(())
    }

    #[must_use]
    pub fn is_match(&self, haystack: &str) -> bool {
        let r = &self.0.required;
        if self.0.compiled.get().is_none() && !r.is_empty() && !r.iter().any(|t| haystack.contains(&**t)) {
            return false;
        }
        // One that is put off is small enough to compile.
        let regex = self.0.compiled.get_or_init(|| Regex::new(&self.0.text).ok());
        regex.as_ref().is_some_and(|r| r.is_match(haystack))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Every match contains one of these; empty: nothing is known of that kind.
    #[must_use]
    pub fn required(&self) -> &[Box<str>] {
        &self.0.required
    }

    /// How large it is when it is compiled, in states, about.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.size
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// The crate draws an expression over several lines; the last one says what is wrong.
fn last_line(e: &str) -> String {
    e.lines().last().unwrap_or_default().trim_start_matches("error: ").trim().to_owned()
}

/// The number of states, about; saturating.
fn size(hir: &Hir) -> usize {
    let sum = |all: &[Hir]| all.iter().map(size).fold(1, usize::saturating_add);
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => 1,
        HirKind::Literal(l) => l.0.len(),
        // Even one range of characters is several sequences of bytes; many share their beginnings.
        HirKind::Class(Class::Unicode(c)) => c.ranges().len().saturating_add(8),
        HirKind::Class(Class::Bytes(c)) => c.ranges().len(),
        HirKind::Capture(c) => size(&c.sub).saturating_add(2),
        HirKind::Repetition(r) => {
            let copies = r.max.unwrap_or(r.min.saturating_add(1)).max(1);
            size(&r.sub).saturating_add(1).saturating_mul(copies as usize)
        }
        HirKind::Concat(all) | HirKind::Alternation(all) => sum(all),
    }
}

/// Texts of which every match contains one. None: not known.
fn required(hir: &Hir) -> Option<Vec<Box<str>>> {
    match hir.kind() {
        HirKind::Literal(l) => std::str::from_utf8(&l.0).ok().map(|t| vec![t.into()]),
        HirKind::Capture(c) => required(&c.sub),
        HirKind::Repetition(r) if r.min > 0 => required(&r.sub),
        // The one whose shortest text is the longest is found least often where there is no match.
        HirKind::Concat(all) => all
            .iter()
            .filter_map(required)
            .max_by_key(|r| (r.iter().map(|t| t.len()).min(), std::cmp::Reverse(r.len()))),
        HirKind::Alternation(all) => {
            let each: Option<Vec<_>> = all.iter().map(required).collect();
            each.map(|r| r.concat()).filter(|r| r.len() <= ALTERNATIVES)
        }
        HirKind::Empty | HirKind::Look(_) | HirKind::Class(_) | HirKind::Repetition(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(pattern: &str) -> Vec<String> {
        Pattern::new(pattern).unwrap().required().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_every_match_contains() {
        for (pattern, want) in [
            ("abc", &["abc"][..]),
            ("^/usr/bin/worker --id [0-9]+$", &["/usr/bin/worker --id "]),
            (".*foo.*longer.*", &["longer"]),
            ("(?:a|bc)+d?", &["a", "bc"]),
            ("(one|two) and", &[" and"]),
            ("(seven|eight)x", &["seven", "eight"]),
            ("x{0,3}y{2}", &["y"]),
            ("a?b*", &[]),
            ("(?i)abc", &[]),
            ("a|", &[]),
            (".", &[]),
            ("^$", &[]),
        ] {
            assert_eq!(texts(pattern), want, "{pattern}");
        }
    }

    #[test]
    fn what_is_put_off_compiles() {
        // The largest that is put off, of what grows most when it is compiled.
        for unit in [r"\w", r"\p{L}", ".", "[^a]", "(?i)straße", r"\b\pN"] {
            let one = Pattern::new(unit).unwrap().size() + 1;
            let pattern = format!("(?:{unit}){{{}}}", (SMALL / one).max(1));
            assert!(Pattern::new(&pattern).unwrap().size() <= SMALL, "{unit}");
            assert!(Regex::new(&pattern).is_ok(), "{unit}");
        }
    }

    #[test]
    fn what_is_too_large_is_refused_when_it_is_read() {
        let large = |text| Pattern::new(text).and_then(|p| p.compile_large());
        let e = large(r"(?:\w{1000}){1000}").unwrap_err();
        assert!(e.contains("size limit"), "{e}");
        assert!(Pattern::new("(").is_err());
        assert!(large(r"\w{100}").is_ok());
    }
}
