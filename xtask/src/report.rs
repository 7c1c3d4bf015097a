//! Counts what tests say, line by line, and prints the closing line. Runs nothing.

use std::collections::{BTreeMap, BTreeSet};

/// A counted stream of libtest output. A test that cannot run here prints `SKIPPED: name: why` and passes for
/// libtest; here it counts as skipped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) failures: Vec<Failure>,
    /// By name, with the reason.
    pub(crate) skipped: BTreeMap<String, String>,
    /// Promises of the contract that were tested with a longer time, since this machine is slow.
    scaled: BTreeSet<String>,
    /// Tests that said SKIPPED and that libtest therefore counts as passed.
    said_skipped: u32,
    /// Which failed test's output is being read.
    reading: Option<usize>,
    /// Whether libtest's list of the failed is being read.
    listing: bool,
    /// The end of a guest's console.
    console: Vec<String>,
}

/// What failed, and what it said of it.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) name: String,
    said: Vec<String>,
}

/// More lines of a failure are only where it happened, not at the end of all.
const SAID: usize = 30;
/// Before each line of a guest's console.
pub(crate) const CONSOLE: &str = "console: ";

impl Tally {
    /// Takes one line of output.
    ///
    /// What a test and its children print beside libtest may stand between a test's name and its verdict, so the failed are also
    /// taken from the headings of their output and from the list at the end.
    pub(crate) fn line(&mut self, line: &str) {
        if self.listing
            && let Some(name) = line.strip_prefix("    ")
        {
            self.failed_test(name);
            return;
        }
        self.listing = false;
        if let Some((_, rest)) = line.split_once("SKIPPED").filter(|(_, r)| r.starts_with([':', ' '])) {
            let (name, why) = split(rest.trim_start_matches([':', ' ']));
            if self.skipped.insert(name, why).is_none() {
                self.said_skipped += 1;
            }
        } else if let Some((_, promise)) = line.split_once("SCALED: ") {
            self.scaled.insert(promise.trim().to_owned());
        } else if let Some(text) = line.strip_prefix(CONSOLE) {
            self.console.push(text.to_owned());
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----")) {
            self.reading = Some(self.failed_test(name));
        } else if line == "failures:" {
            (self.reading, self.listing) = (None, true);
        } else if line.trim_start().to_lowercase().starts_with("stack backtrace:") {
            self.reading = None;
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.passed += number_before(rest, " passed");
            self.failed += number_before(rest, " failed");
        } else if let Some(rest) = line.strip_prefix("test ") {
            if let Some(name) = rest.strip_suffix("... FAILED") {
                self.failed_test(name.trim());
            } else if let Some((name, why)) = rest.split_once(" ... ignored") {
                let why = why.trim_start_matches(',').trim();
                let why = if why.is_empty() { "ignored" } else { why };
                self.skipped.insert(name.trim().to_owned(), why.to_owned());
            }
        } else if let Some(failure) = self.reading.and_then(|i| self.failures.get_mut(i))
            && failure.said.len() < SAID
            && !line.trim().is_empty()
        {
            failure.said.push(line.to_owned());
        }
    }

    /// Where the failure of this test is, noted now if it was not.
    fn failed_test(&mut self, name: &str) -> usize {
        let at = self.failures.iter().position(|f| f.name == name);
        at.unwrap_or_else(|| {
            self.failures.push(Failure { name: name.to_owned(), said: Vec::new() });
            self.failures.len() - 1
        })
    }

    /// Notes a failure that no test could report itself: a crash, a time limit.
    pub(crate) fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(Failure { name: what, said: std::mem::take(&mut self.console) });
    }

    /// Notes a part that did not run at all.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.skipped.insert(name.to_owned(), why.to_owned());
    }

    /// Adds another stream's counts; `prefix` keeps the same test on two kernels apart.
    pub(crate) fn add(&mut self, other: Self, prefix: &str) {
        self.passed += other.passed.saturating_sub(other.said_skipped);
        self.failed += other.failed;
        let named = |f: Failure| Failure { name: format!("{prefix}{}", f.name), ..f };
        self.failures.extend(other.failures.into_iter().map(named));
        self.scaled.extend(other.scaled);
        self.skipped.extend(other.skipped.into_iter().map(|(name, why)| (format!("{prefix}{name}"), why)));
    }

    /// `N passed, N failed, N skipped`.
    pub(crate) fn closing(&self) -> String {
        let passed = self.passed.saturating_sub(self.said_skipped);
        format!("{passed} passed, {} failed, {} skipped", self.failed, self.skipped.len())
    }

    /// Prints what was skipped and what failed by name, the latter with what it said, and the closing line last.
    pub(crate) fn print(&self) {
        println!();
        for promise in &self.scaled {
            println!("SCALED: {promise}");
        }
        for (name, why) in &self.skipped {
            println!("SKIPPED: {name}: {why}");
        }
        for failure in &self.failures {
            println!("FAILED: {}", failure.name);
            failure.said.iter().for_each(|line| println!("    {line}"));
        }
        println!("{}", self.closing());
    }
}

fn split(text: &str) -> (String, String) {
    match text.split_once(": ") {
        Some((name, why)) => (name.trim().to_owned(), why.trim().to_owned()),
        None => (text.trim().to_owned(), "no reason given".to_owned()),
    }
}

/// The number that stands right before `word` in `text`, 0 if there is none.
fn number_before(text: &str, word: &str) -> u32 {
    let Some(end) = text.find(word) else { return 0 };
    let digits: String = text[..end].chars().rev().take_while(char::is_ascii_digit).collect();
    digits.chars().rev().collect::<String>().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 4 tests
test a ... ok
test b ... FAILED
test c ... ignored, long
SKIPPED: d: no podman here
test d ... ok

failures:

---- b stdout ----
Error: no exit

Stack backtrace:
   0: b

failures:
    b

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s";

    #[test]
    fn a_failure_whose_line_was_broken_is_named() {
        let broken = OUTPUT.replace("test b ... FAILED", "test b ... started=1\nFAILED");
        let mut tally = Tally::default();
        broken.lines().for_each(|l| tally.line(l));
        assert_eq!(names(&tally), ["b"]);
        assert_eq!(tally.failures[0].said, ["Error: no exit"]);
        let mut silent = Tally::default();
        "test b ... x\nFAILED\n\nfailures:\n\nfailures:\n    b\n\ntest result: FAILED. 0 passed; 1 failed"
            .lines()
            .for_each(|l| silent.line(l));
        assert_eq!(names(&silent), ["b"]);
        assert_eq!(silent.closing(), "0 passed, 1 failed, 0 skipped");
    }

    fn names(tally: &Tally) -> Vec<&str> {
        tally.failures.iter().map(|f| f.name.as_str()).collect()
    }

    #[test]
    fn a_guest_that_died_is_told_with_the_end_of_its_console() {
        let mut tally = Tally::default();
        tally.line("console: Kernel panic");
        tally.fail("died".to_owned());
        assert_eq!(tally.failures[0].said, ["Kernel panic"]);
    }

    #[test]
    fn what_libtest_says_is_counted_and_skipped_tests_are_not_passed() {
        let mut tally = Tally::default();
        OUTPUT.lines().for_each(|l| tally.line(l));
        assert_eq!(tally.closing(), "1 passed, 1 failed, 2 skipped");
        assert_eq!(names(&tally), ["b"]);
        assert_eq!(tally.failures[0].said, ["Error: no exit"]);
        assert_eq!(tally.skipped["d"], "no podman here");
        assert_eq!(tally.skipped["c"], "long");
    }

    #[test]
    fn a_promise_tested_with_more_time_is_repeated_and_changes_no_count() {
        let mut tally = Tally::default();
        let scaled =
            "test a ... SCALED: an alert fires: 1s, here 2s (JWTEST_SLOW=2)\nSCALED: x: 1s, here 2s\n";
        (scaled.to_owned() + OUTPUT).lines().for_each(|l| tally.line(l));
        let mut all = Tally::default();
        all.add(tally, "6.1: ");
        assert_eq!(all.closing(), "1 passed, 1 failed, 2 skipped");
        let scaled: Vec<&str> = all.scaled.iter().map(String::as_str).collect();
        assert_eq!(scaled, ["an alert fires: 1s, here 2s (JWTEST_SLOW=2)", "x: 1s, here 2s"]);
    }

    #[test]
    fn streams_add_up() {
        let mut tally = Tally::default();
        OUTPUT.lines().for_each(|l| tally.line(l));
        let mut all = Tally::default();
        all.add(tally.clone(), "6.1: ");
        all.add(tally, "5.10: ");
        all.fail("hang".to_owned());
        assert_eq!(all.closing(), "2 passed, 3 failed, 4 skipped");
        assert_eq!(names(&all), ["6.1: b", "5.10: b", "hang"]);
    }
}
