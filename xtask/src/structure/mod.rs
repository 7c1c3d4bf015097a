//! `cargo xtask structure`: no two files import each other, no file has more than 500 lines, no function more than 80, and a test
//! that does not run says so where the runner sees it.
//!
//! What does not hold yet stands in `xtask/structure-exceptions.txt`, one fault a line. The list only shrinks: a fault that is not
//! in it fails, a longer file or function fails, and so does a line without its fault, until `--prune` removes it.

mod imports;
mod size;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::root;
use crate::sources::rust_files;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Remove the exceptions that are no longer needed, and lower those that became smaller
    #[arg(long)]
    prune: bool,
}

const FILE: usize = 500;
const FUNCTION: usize = 80;
const EXCEPTIONS: &str = "xtask/structure-exceptions.txt";
/// Folders of the sources.
const FOLDERS: [&str; 7] =
    ["bench", "fuzz/fuzz_targets", "monitor", "monitor-ebpf/src", "tests/scenarios", "tests/src", "xtask"];
/// The roots of the crates.
const ROOTS: [&str; 7] = [
    "bench/src/main.rs",
    "monitor/src/lib.rs",
    "monitor/src/main.rs",
    "monitor-ebpf/src/lib.rs",
    "monitor-ebpf/src/main.rs",
    "tests/src/lib.rs",
    "xtask/src/main.rs",
];
/// Tables of definitions, which are as long as what they define, each with its reason.
const TABLES: [(&str, &str); 2] = [
    ("file monitor/src/model/schema.rs", "the contract's JSON, one type after the other"),
    ("function monitor/src/metrics/table.rs core", "one line for each metric"),
];
/// What is wrong, and how large it is: 1 where it has no size.
type Faults = BTreeMap<String, usize>;

pub(crate) fn run(args: &Args) -> Result<bool> {
    let dir = root::dir();
    let faults = faults(&dir)?;
    let file = dir.join(EXCEPTIONS);
    let excepted = parse(&fs::read_to_string(&file).with_context(|| file.display().to_string())?);
    if args.prune {
        fs::write(&file, pruned(&excepted, &faults))?;
        return Ok(true);
    }
    let complaints = compare(&faults, &excepted);
    for complaint in &complaints {
        println!("{complaint}");
    }
    println!("{} faults, {} known exceptions", complaints.len(), excepted.len());
    Ok(complaints.is_empty())
}

fn faults(dir: &Path) -> Result<Faults> {
    let mut faults = Faults::new();
    let relative = |p: &Path| p.strip_prefix(dir).unwrap_or(p).display().to_string();
    for root in ROOTS {
        for (a, b) in imports::cycles(&dir.join(root))? {
            let mut both = [relative(&a), relative(&b)];
            both.sort();
            faults.insert(format!("cycle {}", both.join(" ")), 1);
        }
    }
    let mut files = Vec::new();
    for folder in FOLDERS {
        let folder = dir.join(folder);
        rust_files(&folder, &mut files).with_context(|| folder.display().to_string())?;
    }
    for path in files {
        let source = fs::read_to_string(&path)?;
        let name = relative(&path);
        let lines = size::count(source.as_bytes());
        if lines > FILE {
            faults.insert(format!("file {name}"), lines);
        }
        for (function, lines) in size::long_functions(&text::code(&source), FUNCTION) {
            faults.insert(format!("function {name} {function}"), lines);
        }
        let is_test = name.starts_with("monitor/") || name.starts_with("tests/");
        if is_test && prints_a_skip(&source) {
            faults.insert(format!("silent-skip {name}"), 1);
        }
    }
    faults.retain(|what, _| !TABLES.iter().any(|(table, _)| table == what));
    Ok(faults)
}

/// What a passing test prints so is thrown away.
fn prints_a_skip(source: &str) -> bool {
    source.split("println!(").skip(1).any(|after| after.trim_start().starts_with("\"SKIPPED"))
}

/// A line is `KIND WHERE.. [SIZE]`.
fn parse(text: &str) -> Faults {
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let fault = |line: &str| match line.rsplit_once(' ') {
        Some((what, size)) if size.bytes().all(|b| b.is_ascii_digit()) => {
            (what.to_owned(), size.parse().unwrap_or(1))
        }
        _ => (line.to_owned(), 1),
    };
    lines.map(fault).collect()
}

fn compare(faults: &Faults, excepted: &Faults) -> Vec<String> {
    let mut complaints = Vec::new();
    for (what, size) in faults {
        match excepted.get(what) {
            None => complaints.push(line(what, *size)),
            Some(known) if size > known => {
                complaints.push(format!("{} (it had {known})", line(what, *size)));
            }
            Some(_) => {}
        }
    }
    for what in excepted.keys().filter(|w| !faults.contains_key(*w)) {
        complaints.push(format!("{what}: holds now: cargo xtask structure --prune"));
    }
    complaints
}

fn pruned(excepted: &Faults, faults: &Faults) -> String {
    let head = "# What `cargo xtask structure` finds and still accepts. This list only shrinks: --prune removes what holds now.\n";
    let kept = excepted.iter().filter_map(|(what, known)| {
        let size = faults.get(what)?;
        Some(line(what, *size.min(known)) + "\n")
    });
    head.to_owned() + &kept.collect::<String>()
}

fn line(what: &str, size: usize) -> String {
    if size == 1 { what.to_owned() } else { format!("{what} {size}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_fault_passes_and_a_new_a_larger_and_a_mended_one_do_not() {
        let known = parse("# head\ncycle a.rs b.rs\nfile c.rs 600\n\nfunction d.rs f 90\n");
        let faults = |text| parse(text);
        assert!(compare(&known, &known).is_empty());
        let smaller = faults("cycle a.rs b.rs\nfile c.rs 550\nfunction d.rs f 90");
        assert!(compare(&smaller, &known).is_empty());
        let worse = faults("cycle a.rs b.rs\ncycle a.rs e.rs\nfile c.rs 601\nfunction d.rs f 90");
        assert_eq!(compare(&worse, &known), ["cycle a.rs e.rs", "file c.rs 601 (it had 600)"]);
        let mended = faults("file c.rs 550\nfunction d.rs f 90");
        assert_eq!(compare(&mended, &known).len(), 1);
        let left = pruned(&known, &mended);
        assert_eq!(parse(&left), mended);
        assert!(compare(&mended, &parse(&left)).is_empty());
    }

    #[test]
    fn a_skip_that_libtest_throws_away_is_found() {
        assert!(prints_a_skip("eprintln!(\"SKIPPED x\")"));
        assert!(prints_a_skip("println!(\n    \"SKIPPED: x\")"));
        assert!(!prints_a_skip("skipped(\"SKIPPED\"); println!(\"ok\")"));
    }
}
