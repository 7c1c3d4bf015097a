//! Which of many rules can match a process at all, found by one search over each of its texts instead of one for each rule.
//! It may name too many, never too few: whoever asks tries those that are named, in the config's order. Pure.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::config::{Match, Pattern};

/// Rules by their place in the config, as bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Set(Vec<u64>);

impl Set {
    fn new(rules: usize) -> Self {
        Self(vec![0; rules.div_ceil(64)])
    }

    pub(crate) fn all(rules: usize) -> Self {
        let mut s = Self::new(rules);
        (0..rules).for_each(|i| s.insert(i));
        s
    }

    fn has(&self, i: usize) -> bool {
        self.0[i / 64] & 1 << (i % 64) != 0
    }

    fn insert(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }

    fn add(&mut self, o: &Self) {
        self.0.iter_mut().zip(&o.0).for_each(|(a, b)| *a |= b);
    }

    /// In order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(word, &bits)| {
            let next = |b: &u64| Some(b & b.wrapping_sub(1)).filter(|&b| b != 0);
            let first = Some(bits).filter(|&b| b != 0);
            std::iter::successors(first, next).map(move |b| word * 64 + b.trailing_zeros() as usize)
        })
    }
}

/// What is known of a process when rules are looked for. None: unknown, which matches nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    pub(crate) argv: Option<&'a str>,
    pub(crate) comm: Option<&'a str>,
    pub(crate) uid: Option<u32>,
    /// Err: it must be read first, by whichever rule asks about it.
    pub(crate) exe: Result<Option<&'a str>, Unread>,
    pub(crate) cgroup: Result<Option<&'a str>, Unread>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unread;

/// Texts, and the rules that can only match where one of theirs is found.
#[derive(Debug, Default)]
struct Texts {
    found: HashMap<Box<str>, usize>,
    /// By the number of the text.
    rules: Vec<Vec<u32>>,
    /// None: there are no texts, or more than can be searched for; then these rules are always tried.
    search: Option<AhoCorasick>,
    all: Set,
}

impl Texts {
    fn insert(&mut self, texts: &[Box<str>], rule: usize) {
        for t in texts {
            let next = self.rules.len();
            let n = *self.found.entry(t.clone()).or_insert(next);
            if n == next {
                self.rules.push(Vec::new());
            }
            self.rules[n].push(rule as u32);
        }
    }

    fn build(&mut self, rules: usize) {
        self.all = Set::new(rules);
        self.rules.iter().flatten().for_each(|&r| self.all.insert(r as usize));
        let mut texts: Vec<(Box<str>, usize)> = std::mem::take(&mut self.found).into_iter().collect();
        texts.sort_unstable_by_key(|&(_, n)| n);
        if !texts.is_empty() {
            let texts = texts.iter().map(|(t, _)| &**t);
            self.search = AhoCorasick::builder().match_kind(MatchKind::Standard).build(texts).ok();
        }
    }

    fn find(&self, text: Option<&str>, set: &mut Set) {
        let (Some(text), Some(search)) = (text, &self.search) else {
            if text.is_some() {
                set.add(&self.all);
            }
            return;
        };
        // Each text once, however often it occurs: thousands of rules may stand under it.
        let mut seen = Set::default();
        for m in search.find_overlapping_iter(text) {
            if seen.0.is_empty() {
                seen = Set::new(self.rules.len());
            }
            let n = m.pattern().as_usize();
            if !seen.has(n) {
                seen.insert(n);
                self.rules[n].iter().for_each(|&r| set.insert(r as usize));
            }
        }
    }
}

/// Each rule stands under one of its conditions, or is always tried.
#[derive(Debug, Default)]
pub(crate) struct Prefilter {
    rules: usize,
    always: Set,
    argv: Texts,
    comm: Texts,
    users: HashMap<u32, Set>,
    exe: Texts,
    cgroup: Texts,
}

impl Prefilter {
    pub(crate) fn new<'a>(rules: impl ExactSizeIterator<Item = &'a Match>) -> Self {
        let n = rules.len();
        let mut p = Self { rules: n, always: Set::new(n), ..Self::default() };
        for (i, m) in rules.enumerate() {
            p.insert(i, m);
        }
        for texts in [&mut p.argv, &mut p.comm, &mut p.exe, &mut p.cgroup] {
            texts.build(n);
        }
        p
    }

    fn insert(&mut self, i: usize, m: &Match) {
        fn required(p: Option<&Pattern>) -> Option<&[Box<str>]> {
            p.map(Pattern::required).filter(|r| !r.is_empty())
        }
        // What is known without reading comes first. With a condition on the parent, the parent may have to be read too.
        let alone = m.parent.is_none();
        if let Some(texts) = required(m.argv.as_ref()) {
            self.argv.insert(texts, i);
        } else if let Some(texts) = required(m.comm.as_ref()) {
            self.comm.insert(texts, i);
        } else if let Some(u) = &m.user {
            self.users.entry(u.uid).or_insert_with(|| Set::new(self.rules)).insert(i);
        } else if let Some(texts) = required(m.exe.as_ref()).filter(|_| alone) {
            self.exe.insert(texts, i);
        } else if let Some(texts) = required(m.cgroup.as_ref()).filter(|_| alone && m.exe.is_none()) {
            self.cgroup.insert(texts, i);
        } else {
            self.always.insert(i);
        }
    }

    /// The rules that may match, or for which something must be read.
    pub(crate) fn candidates(&self, k: &Known<'_>) -> Set {
        let mut set = self.always.clone();
        self.argv.find(k.argv, &mut set);
        self.comm.find(k.comm, &mut set);
        if let Some(rules) = k.uid.and_then(|u| self.users.get(&u)) {
            set.add(rules);
        }
        for (texts, known) in [(&self.exe, k.exe), (&self.cgroup, k.cgroup)] {
            match known {
                Ok(text) => texts.find(text, &mut set),
                Err(Unread) => set.add(&texts.all),
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_in_order() {
        let mut s = Set::new(200);
        for i in [199, 0, 64, 63, 128] {
            s.insert(i);
        }
        assert_eq!(s.iter().collect::<Vec<_>>(), [0, 63, 64, 128, 199]);
        assert_eq!(Set::all(130).iter().count(), 130);
        assert_eq!(Set::all(0).iter().count(), 0);
    }

    #[test]
    fn few_of_many_are_tried() {
        let m = |text: &str| Match { argv: Pattern::new(text).ok(), ..Match::default() };
        let rules: Vec<Match> =
            (0..1_000).map(|i| m(&format!("worker-{i:04} "))).chain([m("^\\d+$")]).collect();
        let p = Prefilter::new(rules.iter());
        let argv = Some("run worker-0007 now");
        let k = Known { argv, comm: None, uid: None, exe: Ok(None), cgroup: Err(Unread) };
        assert_eq!(p.candidates(&k).iter().collect::<Vec<_>>(), [7, 1_000]);
    }
}
