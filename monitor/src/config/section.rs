//! The file as tables whose keys are asked for by name: what nobody asked for is an unknown key, what does not read is
//! noted with its place, and reading goes on, so that all problems of a file are told at once.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Pattern;
use super::error::{Place, Problem, place};
use super::value::{self, Value};

/// Of all regular expressions together, in states: they take about 40 bytes each where all are in use.
const PATTERNS: usize = 32_000_000;
/// What even a small one costs.
const PATTERN_MIN: usize = 500;

/// The whole text, the environment, and what was found wrong so far.
pub(super) struct Doc<'s> {
    pub(super) path: &'s Path,
    pub(super) text: &'s str,
    pub(super) env: &'s BTreeMap<String, String>,
    used: RefCell<BTreeSet<String>>,
    problems: RefCell<Vec<Problem>>,
    /// What is left of [`PATTERNS`].
    patterns: Cell<usize>,
}

impl<'s> Doc<'s> {
    pub(super) fn new(path: &'s Path, text: &'s str, env: &'s BTreeMap<String, String>) -> Self {
        Self {
            path,
            text,
            env,
            used: RefCell::default(),
            problems: RefCell::default(),
            patterns: Cell::new(PATTERNS),
        }
    }

    /// A regular expression, if there is room for it beside the others.
    pub(super) fn pattern(&self, v: &DeValue<'_>) -> Value<Pattern> {
        let p = value::pattern(v)?;
        let left = self.patterns.get().checked_sub(p.size().max(PATTERN_MIN));
        self.patterns.set(left.unwrap_or(0));
        match left {
            Some(_) => {
                p.compile_large().map(|()| p).map_err(|why| format!("expected a smaller expression: {why}"))
            }
            None => {
                Err("expected fewer or simpler regular expressions: all together are too large".to_owned())
            }
        }
    }

    pub(super) fn problem(&self, span: Range<usize>, message: impl Into<String>) {
        self.report(place(self.path, self.text, span, None), message);
    }

    pub(super) fn report(&self, place: Place, message: impl Into<String>) {
        self.problems.borrow_mut().push(Problem { place, message: message.into() });
    }

    /// What of the environment was asked for.
    pub(super) fn used(&self, name: &str) -> bool {
        self.used.borrow().contains(name)
    }

    /// The environment variables that a config reads.
    pub(super) fn asked_variables(&self) -> BTreeSet<String> {
        self.used.borrow().clone()
    }

    /// In the order of the file.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut all = self.problems.into_inner();
        all.sort_by_key(|p| match &p.place {
            Place::File { line, column, .. } => (*line, *column),
            Place::Environment(_) | Place::Flag(_) => (usize::MAX, 0),
        });
        all
    }
}

/// One table of the file (or none, where the section is absent).
pub(super) struct Section<'d, 's> {
    pub(super) doc: &'d Doc<'s>,
    /// As it is called in messages: `[agent]`, `[[job]]`, `match`.
    title: String,
    table: Option<&'d DeTable<'s>>,
    /// Where the table begins.
    pub(super) span: Range<usize>,
    /// `JOBWARDEN_AGENT_`: scalars can be overridden by the environment.
    env_prefix: Option<String>,
    asked: BTreeSet<&'static str>,
}

impl<'d, 's> Section<'d, 's> {
    pub(super) fn new(doc: &'d Doc<'s>, title: &str, table: &'d DeTable<'s>, span: Range<usize>) -> Self {
        Self { doc, title: title.into(), table: Some(table), span, env_prefix: None, asked: BTreeSet::new() }
    }

    /// What stands under `key`, which is hereby known.
    pub(super) fn get(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'s>>> {
        self.asked.insert(key);
        self.table?.iter().find(|(k, _)| k.get_ref() == key).map(|(_, v)| v)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|t| t.iter().any(|(k, _)| k.get_ref() == key))
    }

    /// Reads the value of `key`: the file's, overridden by the environment's. None if neither is given or both are wrong.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Value<T>,
    ) -> Option<T> {
        let from_file = self.get(key).and_then(|v| self.check(key, v, &read));
        self.read_env(key, &read).or(from_file)
    }

    fn read_env<T>(&self, key: &str, read: impl Fn(&DeValue<'_>) -> Value<T>) -> Option<T> {
        let name = format!("{}{}", self.env_prefix.as_ref()?, key.to_ascii_uppercase());
        self.doc.used.borrow_mut().insert(name.clone());
        let text = self.doc.env.get(&name)?;
        let as_string = read(&DeValue::String(text.as_str().into()));
        let as_number = || match DeValue::parse(text) {
            Ok(v) if v.get_ref().is_bool() || v.get_ref().is_integer() => read(v.get_ref()).ok(),
            _ => None,
        };
        match as_string {
            Ok(t) => Some(t),
            Err(message) => as_number().or_else(|| {
                self.doc.report(Place::Environment(name), message);
                None
            }),
        }
    }

    fn check<T>(
        &self,
        key: &str,
        v: &Spanned<DeValue<'_>>,
        read: impl Fn(&DeValue<'_>) -> Value<T>,
    ) -> Option<T> {
        match read(v.get_ref()) {
            Ok(t) => Some(t),
            Err(message) => {
                // The only value that may hold a secret by mistake and still is a string of the right key.
                let hide = key.starts_with("url").then(|| v.span());
                let message = if hide.is_some() { without_value(&message) } else { message };
                let place = place(self.doc.path, self.doc.text, v.span(), hide.as_ref());
                self.doc.report(place, format!("`{key}`: {message}"));
                None
            }
        }
    }

    /// As [`read`](Self::read), for a key that must be there.
    pub(super) fn must<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Value<T>,
    ) -> Option<T> {
        if !self.has(key) {
            self.missing(key);
        }
        self.read(key, read)
    }

    pub(super) fn missing(&mut self, key: &'static str) {
        self.asked.insert(key);
        self.doc.problem(self.span.clone(), format!("expected the key `{key}` in {}", self.title));
    }

    /// A list, each element read and blamed on its own.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Value<T>,
    ) -> Option<Vec<T>> {
        let v = self.get(key)?;
        let Some(items) = v.get_ref().as_array() else {
            let found = value::found(v.get_ref());
            self.doc.problem(v.span(), format!("`{key}`: expected a list, found {found}"));
            return None;
        };
        Some(items.iter().filter_map(|item| self.check(key, item, &read)).collect())
    }

    /// A table below this one.
    pub(super) fn table(&mut self, key: &'static str, title: &str) -> Option<Section<'d, 's>> {
        let v = self.get(key)?;
        self.sub(key, v, title)
    }

    fn sub(&self, key: &str, v: &'d Spanned<DeValue<'s>>, title: &str) -> Option<Section<'d, 's>> {
        if let Some(t) = v.get_ref().as_table() {
            return Some(Section::new(self.doc, title, t, v.span()));
        }
        let found = value::found(v.get_ref());
        self.doc.problem(v.span(), format!("`{key}`: expected a table, found {found}"));
        None
    }

    /// A section of the top level: there even if the file has none of it, since the environment may set its keys.
    pub(super) fn top(&mut self, key: &'static str) -> Section<'d, 's> {
        let title = format!("[{key}]");
        let mut section = self.table(key, &title).unwrap_or_else(|| Section {
            doc: self.doc,
            title,
            table: None,
            span: 0..0,
            env_prefix: None,
            asked: BTreeSet::new(),
        });
        section.env_prefix = Some(format!("JOBWARDEN_{}_", key.to_ascii_uppercase()));
        section
    }

    /// `[[key]]`, or a list of inline tables.
    pub(super) fn tables(&mut self, key: &'static str, title: &str) -> Vec<Section<'d, 's>> {
        let Some(v) = self.get(key) else { return Vec::new() };
        if let Some(items) = v.get_ref().as_array() {
            return items.iter().filter_map(|item| self.sub(key, item, title)).collect();
        }
        let found = value::found(v.get_ref());
        self.doc.problem(v.span(), format!("`{key}`: expected {title}, found {found}"));
        Vec::new()
    }

    /// All keys and values, for tables whose keys are the user's.
    pub(super) fn entries(
        &self,
    ) -> impl Iterator<Item = (&'d Spanned<toml::de::DeString<'s>>, &'d Spanned<DeValue<'s>>)> {
        self.table.into_iter().flatten()
    }

    /// Each key that was not asked for is unknown.
    pub(super) fn finish(self) {
        for (k, v) in self.table.into_iter().flatten() {
            if self.asked.contains(k.get_ref().as_ref()) {
                continue;
            }
            let near = self.asked.iter().min_by_key(|known| distance(known, k.get_ref()));
            let hint = match near {
                Some(known) if distance(known, k.get_ref()) <= 1 + known.len() / 4 => {
                    format!("did you mean `{known}`?")
                }
                _ => {
                    let known: Vec<_> = self.asked.iter().map(|a| format!("`{a}`")).collect();
                    format!("expected one of {}", known.join(", "))
                }
            };
            let message = format!("unknown key {} in {}; {hint}", value::quoted(k.get_ref()), self.title);
            // Somebody may have put the secret itself where its file was meant.
            let hide = is_secret(k.get_ref()).then(|| v.span());
            self.doc.report(place(self.doc.path, self.doc.text, k.span(), hide.as_ref()), message);
        }
    }
}

fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    ["key", "secret", "token", "pass", "auth", "cred"].iter().any(|word| key.contains(word))
}

/// The message up to what was found.
fn without_value(message: &str) -> String {
    message.split(", found").next().unwrap_or_default().to_owned()
}

/// Levenshtein's distance; both are short, the second is cut.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(40).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}
