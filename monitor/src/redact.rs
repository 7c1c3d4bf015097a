//! Masks secrets in what people and receivers are shown: `[agent] redact = ["regex", ..]`. It changes contract values
//! on their way out; what is matched (rules) and killed never passes through it.

use std::borrow::Cow;

use regex::Regex;
use serde_json::Value;

use crate::model::outside::OutsideText;
use crate::model::schema::{Alert, Cause, EventLine, Evidence, Exit, Process, Ref};

/// What stands in a match's place.
const MASK: &str = "***";
/// Bytes of argv in an item of evidence.
const EVIDENCE_ARGV: usize = 512;

/// The config's patterns. Each is matched against argv joined by one space, so `--password \S+` works whether the
/// secret is an argument of its own or not. A pattern with groups masks what the groups matched, one without masks
/// the whole match.
#[derive(Clone, Debug, Default)]
pub struct Redactor(Vec<Regex>);

impl Redactor {
    #[must_use]
    pub fn new(patterns: Vec<Regex>) -> Self {
        Self(patterns)
    }

    /// Byte ranges to mask, in order, overlapping ones joined.
    fn ranges(&self, text: &str) -> Vec<(usize, usize)> {
        let mut v: Vec<(usize, usize)> = Vec::new();
        for c in self.0.iter().flat_map(|re| re.captures_iter(text)) {
            let whole = c.len() == 1;
            let parts = c.iter().skip(usize::from(!whole)).flatten();
            v.extend(parts.filter(|m| !m.is_empty()).map(|m| (m.start(), m.end())));
        }
        v.sort_unstable();
        v.dedup_by(|next, kept| {
            let joined = next.0 <= kept.1;
            if joined {
                kept.1 = kept.1.max(next.1);
            }
            joined
        });
        v
    }

    /// Of a line of text: a summary, a remedy, a log line.
    #[must_use]
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let ranges = self.ranges(text);
        if ranges.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(masked(text, 0, &ranges)) }
    }

    pub fn argv(&self, argv: &mut [OutsideText]) {
        if self.0.is_empty() || argv.is_empty() {
            return;
        }
        let joined = argv.iter().map(OutsideText::raw).collect::<Vec<_>>().join(" ");
        let ranges = self.ranges(&joined);
        let mut at = 0;
        for arg in argv {
            let next = at + arg.raw().len() + 1;
            if ranges.iter().any(|&(from, to)| from < next - 1 && to > at) {
                *arg = masked(arg.raw(), at, &ranges).into();
            }
            at = next;
        }
    }

    pub fn reference(&self, r: &mut Ref) {
        self.argv(&mut r.argv);
        self.outside(&mut r.comm);
    }

    pub fn process(&self, p: &mut Process) {
        self.argv(&mut p.argv);
        self.outside(&mut p.comm);
        p.exe.iter_mut().for_each(|s| self.outside(s));
        p.adopter.iter_mut().for_each(|r| self.reference(r));
        self.exit(&mut p.exit);
    }

    pub fn cause(&self, c: &mut Cause) {
        self.process(&mut c.process);
        self.string(&mut c.summary);
        self.string(&mut c.remedy);
        c.evidence.iter_mut().for_each(|e| self.evidence(e));
    }

    pub fn alert(&self, a: &mut Alert) {
        a.subject.iter_mut().for_each(|p| self.process(p));
        a.cause.iter_mut().for_each(|c| self.cause(c));
        self.string(&mut a.summary);
    }

    pub fn event_line(&self, e: &mut EventLine) {
        if self.0.is_empty() {
            return;
        }
        e.process.iter_mut().for_each(|r| self.reference(r));
        e.more.values_mut().for_each(|v| self.value(v));
    }

    /// argv, references and texts inside JSON of no fixed shape.
    fn value(&self, v: &mut Value) {
        match v {
            Value::String(s) => self.string(s),
            Value::Array(all) if all.iter().all(Value::is_string) => {
                let mut argv: Vec<OutsideText> =
                    all.iter().filter_map(|v| v.as_str().map(OutsideText::from)).collect();
                self.argv(&mut argv);
                *all = argv.into_iter().map(|a| Value::String(a.into_raw())).collect();
            }
            Value::Array(all) => all.iter_mut().for_each(|v| self.value(v)),
            Value::Object(o) => o.values_mut().for_each(|v| self.value(v)),
            _ => {}
        }
    }

    fn string(&self, s: &mut String) {
        if let Cow::Owned(masked) = self.text(s) {
            *s = masked;
        }
    }

    fn outside(&self, s: &mut OutsideText) {
        if let Cow::Owned(masked) = self.text(s.raw()) {
            *s = masked.into();
        }
    }

    fn exit(&self, e: &mut Option<Exit>) {
        if let Some(Exit::Signal { sender: Some(r), .. }) = e {
            self.reference(r);
        }
    }

    /// A process in evidence: masked first, then cut, so that no half of a secret escapes its pattern.
    fn shown(&self, r: &mut Ref) {
        self.reference(r);
        r.argv = cut(&r.argv, EVIDENCE_ARGV);
    }

    fn evidence(&self, e: &mut Evidence) {
        match e {
            Evidence::Blocked { process, inode, .. } => {
                if let Some(r) = process {
                    self.shown(r);
                }
                if let Some(s) = inode {
                    self.outside(s);
                }
            }
            Evidence::Holder { process, inode, relation, .. } => {
                self.shown(process);
                self.outside(inode);
                self.string(relation);
            }
            Evidence::Wchan { process, .. }
            | Evidence::Tracer { process }
            | Evidence::WaitsFor { process } => self.shown(process),
            Evidence::Signal { sender, target, .. } => {
                if let Some(r) = sender {
                    self.shown(r);
                }
                self.shown(target);
            }
            Evidence::ParentExit { process, exit } => {
                self.shown(process);
                self.exit(exit);
            }
            Evidence::Python { file, function, source, .. } => {
                self.outside(file);
                self.outside(function);
                if let Some(s) = source {
                    self.outside(s);
                }
            }
            Evidence::Note { text } => self.string(text),
        }
    }
}

/// `text`, which stands at byte `at` of what `ranges` are about, with the mask in each range.
fn masked(text: &str, at: usize, ranges: &[(usize, usize)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for &(from, to) in ranges {
        let from = from.saturating_sub(at).clamp(done, text.len());
        let to = to.saturating_sub(at).min(text.len());
        if from < to {
            // A match's bounds are char boundaries of the joined text, so of each argument too.
            out.push_str(text.get(done..from).unwrap_or_default());
            out.push_str(MASK);
            done = to;
        }
    }
    out.push_str(text.get(done..).unwrap_or_default());
    out
}

/// argv for an alert: at most `max` bytes in all; what is longer ends in `…`.
#[must_use]
pub fn cut(argv: &[OutsideText], max: usize) -> Vec<OutsideText> {
    let mut left = max;
    let mut out = Vec::new();
    for arg in argv {
        let text = arg.raw();
        if text.len() <= left {
            left = left.saturating_sub(text.len() + 1);
            out.push(arg.clone());
            continue;
        }
        let mut end = left;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        out.push(format!("{}…", &text[..end]).into());
        break;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(patterns: &[&str], argv: &[&str]) -> Vec<String> {
        let r = Redactor::new(patterns.iter().map(|p| Regex::new(p).unwrap()).collect());
        let mut v: Vec<OutsideText> = argv.iter().map(|s| OutsideText::from(*s)).collect();
        r.argv(&mut v);
        v.into_iter().map(OutsideText::into_raw).collect()
    }

    #[test]
    fn over_argument_bounds_and_inside_them() {
        assert_eq!(argv(&[r"--password \S+"], &["x", "--password", "s3cret", "y"]), ["x", "***", "***", "y"]);
        assert_eq!(argv(&[r"--password[= ](\S+)"], &["--password", "s3"]), ["--password", "***"]);
        assert_eq!(argv(&[r"token=(\w+)"], &["a?token=abc&b", "token=é1"]), ["a?token=***&b", "token=***"]);
        assert_eq!(argv(&["b", "bc", ""], &["abcd", "", "é"]), ["a***d", "", "é"]);
        assert_eq!(argv(&[], &["a"]), ["a"]);
    }

    #[test]
    fn a_secret_never_survives_whatever_the_bounds() {
        let all = ["pw", "S3", "CRET", "x"];
        for split in 0..4 {
            let (a, b) = all.split_at(split);
            let joined = [a.concat(), b.concat()];
            let v = argv(&["S3 ?CRET"], &[&joined[0], &joined[1]]);
            assert!(!v.concat().contains("S3CRET"), "{v:?}");
        }
    }

    #[test]
    fn evidence_is_masked_before_it_is_cut() {
        let secret = "A".repeat(20);
        let argv = vec!["x".repeat(EVIDENCE_ARGV - 10).into(), secret.into()];
        let process = Ref { id: crate::model::key::Key::new(1, 1), pid: 1, comm: "x".into(), argv };
        let mut e = Evidence::WaitsFor { process };
        Redactor::new(vec![Regex::new("A{20}").unwrap()]).evidence(&mut e);
        let Evidence::WaitsFor { process } = e else { panic!("another kind") };
        assert_eq!(process.argv[1], MASK);
    }

    /// A name may be a piece of argv, and the files that a process has open are its own to name.
    #[test]
    fn names_and_paths_in_evidence_are_masked_too() {
        let r = Redactor::new(vec![Regex::new("s3cret").unwrap()]);
        let text = || OutsideText::from("/run/s3cret/x");
        let process = || Ref {
            id: crate::model::key::Key::new(1, 1),
            pid: 1,
            comm: "s3cret".into(),
            argv: vec![text()],
        };
        for mut e in [
            Evidence::Blocked {
                process: Some(process()),
                thread: 1,
                syscall: "read".into(),
                fd: Some(1),
                inode: Some(text()),
            },
            Evidence::Holder {
                process: process(),
                fd: 1,
                mode: "w".into(),
                inode: text(),
                relation: "orphan, forked by s3cret (7)".into(),
            },
            Evidence::Python {
                thread: 1,
                file: text(),
                line: 1,
                function: "s3cret".into(),
                source: Some(text()),
            },
            Evidence::Note { text: text().into_raw() },
        ] {
            r.evidence(&mut e);
            let shown = serde_json::to_string(&e).unwrap();
            assert!(!shown.contains("s3cret") && shown.contains(MASK), "{shown}");
        }
    }

    #[test]
    fn cut_keeps_char_bounds_and_says_so() {
        let v = ["ab", "éé", "z"].map(OutsideText::from);
        assert_eq!(cut(&v, 100), v);
        assert_eq!(cut(&v, 6), ["ab", "é…"]);
        assert_eq!(cut(&v, 0), ["…"]);
    }
}
