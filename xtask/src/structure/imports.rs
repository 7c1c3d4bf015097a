//! Which file of a crate imports which other: by `use`, and by paths that begin with `crate`, `super`, `self` or a module of
//! the file's own. What is compiled for tests only does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::text;

/// Segments from the crate's root.
type Module = Vec<String>;

/// The files of one crate by their modules.
#[derive(Default)]
struct Crate {
    files: BTreeMap<Module, PathBuf>,
    sources: BTreeMap<Module, Vec<u8>>,
}

/// Pairs of files that import each other, of the crate whose root this is.
pub(super) fn cycles(root: &Path) -> Result<BTreeSet<(PathBuf, PathBuf)>> {
    let mut all = Crate::default();
    let dir = root.parent().context("a crate's root without a folder")?;
    all.read(Module::new(), root, dir)?;
    let mut edges = BTreeSet::new();
    for (module, code) in &all.sources {
        edges.extend(all.imports(module, code).into_iter().map(|to| (module.clone(), to)));
    }
    let both = edges.iter().filter(|(a, b)| a < b && edges.contains(&(b.clone(), a.clone())));
    Ok(both.map(|(a, b)| (all.files[a].clone(), all.files[b].clone())).collect())
}

impl Crate {
    /// `below`: where the files of its modules lie.
    fn read(&mut self, module: Module, file: &Path, below: &Path) -> Result<()> {
        let source = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let code = text::code(&source);
        for name in declared(&code) {
            let (plain, folder) = (below.join(format!("{name}.rs")), below.join(&name));
            let child = [plain, folder.join("mod.rs")].into_iter().find(|f| f.exists());
            // One with a `#[path]` belongs to another crate.
            if let Some(child) = child {
                let path = [module.clone(), vec![name]].concat();
                self.read(path, &child, &folder)?;
            }
        }
        let mut code = code;
        text::without_tests(&mut code);
        self.sources.insert(module.clone(), code);
        self.files.insert(module, file.to_path_buf());
        Ok(())
    }

    /// The modules with files of their own that this file imports from.
    fn imports(&self, module: &[String], code: &[u8]) -> BTreeSet<Module> {
        let own = declared(code);
        let words = words(code);
        let mut found = BTreeSet::new();
        // The modules written out in this file, and the depth at which each ends.
        let (mut inline, mut depth): (Vec<(String, usize)>, usize) = (Vec::new(), 0);
        for (i, word) in words.iter().enumerate() {
            match *word {
                "{" => {
                    depth += 1;
                    if i >= 2 && words[i - 2] == "mod" {
                        inline.push((words[i - 1].to_owned(), depth));
                    }
                }
                "}" => {
                    inline.pop_if(|(_, at)| *at == depth);
                    depth = depth.saturating_sub(1);
                }
                _ => {}
            }
            let begins = i == 0 || !["::", ".", "mod"].contains(&words[i - 1]);
            let starts = ["crate", "super", "self"].contains(word) || own.iter().any(|o| o == word);
            if begins && starts && words.get(i + 1) == Some(&"::") {
                let here = module.iter().chain(inline.iter().map(|(name, _)| name)).cloned().collect();
                let mut paths = Vec::new();
                expand(&words[i..], here, &mut paths);
                found.extend(paths.iter().map(|p| self.file_of(p)));
            }
        }
        found.remove(module);
        found
    }

    /// The longest beginning of a path that has a file of its own.
    fn file_of(&self, path: &[String]) -> Module {
        let known = (0..=path.len()).rev().map(|n| &path[..n]).find(|p| self.files.contains_key(*p));
        known.unwrap_or_default().to_vec()
    }
}

/// Adds the paths of a `use` tree, or the one path of an expression, from the crate's root; returns how many words it read.
fn expand(words: &[&str], mut at: Module, into: &mut Vec<Module>) -> usize {
    let mut i = 0;
    loop {
        match words.get(i).copied() {
            Some("crate") => at.clear(),
            Some("super") => _ = at.pop(),
            Some("self" | "*") | None => {}
            Some("{") => {
                i += 1;
                while words.get(i).is_some_and(|w| *w != "}") {
                    i += expand(&words[i..], at.clone(), into);
                    // Over a renaming and the comma.
                    while words.get(i).is_some_and(|w| !["}", ","].contains(w)) {
                        i += 1;
                    }
                    i += usize::from(words.get(i) == Some(&","));
                }
                return i + 1;
            }
            Some(name) => at.push(name.to_owned()),
        }
        i += 1;
        if words.get(i) != Some(&"::") {
            into.push(at);
            return i;
        }
        i += 1;
        // A turbofish is no part of a path.
        if words.get(i).is_some_and(|w| w.starts_with('<')) {
            into.push(at);
            return i;
        }
    }
}

/// The modules that have files: `mod NAME;`.
fn declared(code: &[u8]) -> Vec<String> {
    let words = words(code);
    let of = |w: &[&str]| (w[0] == "mod" && w[2] == ";").then(|| w[1].to_owned());
    words.windows(3).filter_map(of).collect()
}

/// Names, `::`, and every other sign by itself.
fn words(code: &[u8]) -> Vec<&str> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < code.len() {
        let rest = &code[at..];
        let n = match rest[0] {
            b if text::is_word(b) => rest.iter().take_while(|b| text::is_word(**b)).count(),
            b':' if rest.starts_with(b"::") => 2,
            _ => 1,
        };
        // Beyond ASCII there is nothing to be found.
        if let Ok(word) = std::str::from_utf8(&rest[..n])
            && !word.trim().is_empty()
        {
            all.push(word);
        }
        at += n;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate of these files in a folder of its own; the names of the files that import each other.
    fn found(name: &str, files: &[(&str, &str)]) -> Vec<(String, String)> {
        let dir = std::env::temp_dir().join(format!("jobwarden-structure-{}-{name}", std::process::id()));
        for (file, source) in files {
            let file = dir.join(file);
            fs::create_dir_all(file.parent().expect("a folder")).expect("made");
            fs::write(file, source).expect("written");
        }
        let cycles = cycles(&dir.join("lib.rs")).expect("read");
        let relative = |p: &Path| p.strip_prefix(&dir).expect("inside").display().to_string();
        let found = cycles.iter().map(|(a, b)| (relative(a), relative(b))).collect();
        fs::remove_dir_all(&dir).expect("removed");
        found
    }

    #[test]
    fn two_files_that_import_each_other_are_found_however_they_do() {
        for (i, (a, b)) in [
            ("use crate::b::B;", "use crate::a::A;"),
            ("use super::b;", "fn f() { crate::a::f(); }"),
            ("use super::{b::{B as C, D}, x};", "use super::{x, a};"),
            ("mod m { fn f() { super::super::b::f(); } }", "type T = super::a::T;"),
        ]
        .into_iter()
        .enumerate()
        {
            let files = [("lib.rs", "mod a; mod b; mod x;"), ("a.rs", a), ("b.rs", b), ("x.rs", "")];
            assert_eq!(found(&i.to_string(), &files), [("a.rs".to_owned(), "b.rs".to_owned())], "{a} {b}");
        }
        let parent = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b; fn f() { b::g(); } struct S;"),
            ("a/b.rs", "use super::S;"),
        ];
        assert_eq!(found("parent", &parent), [("a/mod.rs".to_owned(), "a/b.rs".to_owned())]);
    }

    #[test]
    fn one_way_tests_and_comments_are_no_cycle() {
        let files = [
            ("lib.rs", "mod a; mod b;\n#[cfg(test)]\nmod tests;"),
            ("a.rs", "use crate::b::B; #[cfg(test)] mod tests { use crate::b; }"),
            (
                "b.rs",
                "// crate::a\nconst S: &str = \"crate::a\"; #[cfg(test)] use crate::a::A; fn f() { x.a::<T>(); }",
            ),
            ("tests.rs", "use super::*; use crate::a::A;"),
        ];
        assert_eq!(found("none", &files), []);
    }
}
