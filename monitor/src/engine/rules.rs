//! Rules: tried in file order at exec and on those who already run; the first match wins. What a rule asks about and no
//! event tells (the resolved exe, cgroup, container) is read from /proc only if a rule has come that far.

use std::collections::{HashMap, HashSet};

use super::facts;
use super::forest::{Flags, Forest, Idx, NO_UID, Node};
use super::jobs::{NewJob, policy_of};
use super::prefilter::{Known, Prefilter, Set, Unread};
use super::record::JobPolicy;
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use crate::config::{Match, Rule};
use crate::matcher::{self, Needs};
use crate::model::container;
use crate::model::key::Key;
use crate::model::outside::OutsideText;

/// How long a scan waits for facts from /proc before it goes on without.
const SCAN_WAITS: u64 = 2 * SECOND;
/// So often it goes on with those who have nobody above them whose facts have not come; then with all.
const SCAN_TRIES: u32 = 15;

/// More keys than this are looked through for those that are gone, whose facts will not come.
const WAITING_MAX: usize = 4_096;

#[derive(Debug)]
struct Watched {
    rule: Rule,
    needs: Needs,
    policy: JobPolicy,
    /// Its MATCH without what must be read from /proc; None: nothing is left.
    cheap: Option<Match>,
}

impl Watched {
    fn new(r: &Rule) -> Self {
        Self { needs: r.matches.needs(), policy: policy_of(r), cheap: cheap(&r.matches), rule: r.clone() }
    }

    fn reads(&self) -> bool {
        self.needs.exe || self.needs.cgroup || self.needs.container
    }
}

/// A scan of those who already run: it waits until their facts have come.
#[derive(Debug, Default)]
struct Scan {
    waiting: HashSet<Key>,
    until: u64,
    tries: u32,
    /// Roots that it finds already ran when their rule first saw them.
    existing: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    No,
    Yes(usize),
    /// The facts of these must be read first.
    Read(Vec<Idx>),
}

/// The facts of one process, owned so that a chain of them can be borrowed.
#[derive(Default)]
struct Own {
    argv: Option<String>,
    exe: Option<String>,
    comm: String,
    uid: Option<u32>,
    cgroup: Option<String>,
    container: Option<String>,
    name: Option<String>,
}

impl Own {
    fn facts<'a>(&'a self, parent: Option<&'a matcher::Facts<'a>>, read: bool) -> matcher::Facts<'a> {
        matcher::Facts {
            argv: self.argv.as_deref(),
            exe: self.exe.as_deref().filter(|_| read),
            comm: Some(&self.comm),
            uid: self.uid,
            cgroup: self.cgroup.as_deref().filter(|_| read),
            container_id: self.container.as_deref().filter(|_| read),
            container_name: self.name.as_deref().filter(|_| read),
            parent,
        }
    }
}

/// As rules match it.
fn raw(b: &[u8]) -> String {
    OutsideText::from_bytes(b).into_raw()
}

/// argv as rules see it: joined by one space.
fn spaced(argv: &[u8]) -> String {
    let mut joined = argv.to_vec();
    for b in &mut joined {
        if *b == 0 {
            *b = b' ';
        }
    }
    String::from_utf8(joined).unwrap_or_else(|e| raw(e.as_bytes()))
}

/// `m` without what must be read: what is left must hold in any case. None: nothing is left.
fn cheap(m: &Match) -> Option<Match> {
    let m = Match {
        argv: m.argv.clone(),
        comm: m.comm.clone(),
        user: m.user.clone(),
        parent: m.parent.as_deref().and_then(cheap).map(Box::new),
        ..Match::default()
    };
    (!m.is_empty()).then_some(m)
}

/// The rules of the config, and the processes that wait for facts.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// In the order of the config.
    rules: Vec<Watched>,
    /// What any of them asks about.
    needs: Needs,
    prefilter: Prefilter,
    /// A process whose facts are awaited -> the processes that wait for them.
    waiting: HashMap<Key, Vec<Key>>,
    scan: Option<Scan>,
}

/// Only what the rules ask about: this is done at each exec.
fn own_facts(n: &Node, needs: Needs, forest: &Forest) -> Own {
    let get = |s, wanted: bool| if wanted { forest.strings.get(s) } else { None };
    let cgroup = get(n.cgroup, needs.cgroup || needs.container).map(raw);
    Own {
        argv: get(n.argv, needs.argv).map(spaced),
        exe: get(n.exe, needs.exe).map(raw),
        comm: if needs.comm { raw(n.comm.bytes()) } else { String::new() },
        uid: (n.uid != NO_UID).then_some(n.uid),
        container: cgroup.as_deref().and_then(container::named).map(|c| c.id.into_raw()),
        name: cgroup.as_deref().and_then(|c| container::name(container::shown(c))).map(str::to_owned),
        cgroup: cgroup.map(|c| container::shown(&c).to_owned()),
    }
}

/// A process on which rules are tried.
struct Subject<'a> {
    /// The process and its ancestors, nearest first.
    line: &'a [Idx],
    /// The facts of each in `line`.
    own: &'a [Own],
    ask: bool,
    forest: &'a Forest,
}

impl Subject<'_> {
    /// The processes that the rule asks about and that have this property.
    fn of(&self, w: &Watched, property: impl Fn(&Node) -> bool) -> Vec<Idx> {
        let asked_about = &self.line[..=w.needs.parents.min(self.line.len() - 1)];
        asked_about.iter().copied().filter(|&a| property(self.forest.node(a))).collect()
    }
}

/// Whether argv is cut, or may be an older program's, and has not been read from /proc.
fn doubted(n: &Node) -> bool {
    n.alive() && (n.flags.has(Flags::CUT) || n.flags.has(Flags::DOUBTED)) && !n.flags.has(Flags::READ)
}

/// Whether a rule that asks about the cgroup (or about the resolved `exe`: `exe`) has to wait for /proc.
fn unread(n: &Node, exe: bool) -> bool {
    // The exec record has told the cgroup, if its id was known.
    let told = !exe && n.cgroup.is_known();
    n.alive() && !told && !n.flags.has(Flags::READ) && !n.flags.has(Flags::KERNEL)
}

impl Rules {
    pub(super) fn set(&mut self, rules: &[Rule]) {
        self.rules = rules.iter().map(Watched::new).collect();
        self.needs = self.rules.iter().fold(Needs::default(), |n, w| n.and(w.needs));
        self.prefilter = Prefilter::new(self.rules.iter().map(|w| &w.rule.matches));
    }

    /// What a job of this rule is made of.
    pub(super) fn job(&self, rule: usize, existing: bool) -> Option<NewJob> {
        let w = self.rules.get(rule)?;
        Some(NewJob {
            ordinal: rule as u32 + 1,
            name: w.rule.name.clone(),
            rule: Some(w.rule.name.clone()),
            policy: w.policy.clone(),
            existing,
            supervisor: None,
            number: None,
        })
    }

    /// The first rule that matches. `ask`: facts that are missing may be asked for; else they are taken as they are known.
    pub(super) fn verdict(&self, i: Idx, ask: bool, forest: &Forest) -> Verdict {
        let line = self.line(i, forest);
        let own = self.facts_of(&line, forest);
        // The rules that are left out would neither match nor ask for facts. Where argv is in doubt, all rules are tried.
        let doubted = ask && line.iter().any(|&a| doubted(forest.node(a)));
        let tried = if doubted { self.all() } else { self.candidates(forest.node(i), &own[0], ask) };
        self.first_match(&Subject { line: &line, own: &own, ask, forest }, &tried)
    }

    /// The same without the prefilter.
    #[cfg(test)]
    pub(super) fn verdict_one_by_one(&self, i: Idx, ask: bool, forest: &Forest) -> Verdict {
        let line = self.line(i, forest);
        let own = self.facts_of(&line, forest);
        self.first_match(&Subject { line: &line, own: &own, ask, forest }, &self.all())
    }

    /// The process, and those of its ancestors that rules ask about.
    fn line(&self, i: Idx, forest: &Forest) -> Vec<Idx> {
        std::iter::once(i).chain(forest.ancestors(i).take(self.needs.parents)).collect()
    }

    fn facts_of(&self, line: &[Idx], forest: &Forest) -> Vec<Own> {
        line.iter().map(|&a| own_facts(forest.node(a), self.needs, forest)).collect()
    }

    fn all(&self) -> Set {
        Set::all(self.rules.len())
    }

    fn candidates(&self, n: &Node, own: &Own, ask: bool) -> Set {
        let facts = own.facts(None, true);
        let unread = |exe| ask && unread(n, exe);
        self.prefilter.candidates(&Known {
            argv: facts.argv,
            comm: facts.comm,
            uid: facts.uid,
            exe: if unread(true) { Err(Unread) } else { Ok(facts.exe.map(matcher::existing)) },
            cgroup: if unread(false) { Err(Unread) } else { Ok(facts.cgroup) },
        })
    }

    /// The first of the rules in `tried` that matches, or that asks for missing facts.
    fn first_match(&self, s: &Subject<'_>, tried: &Set) -> Verdict {
        let decide =
            |cheap: &matcher::Facts<'_>| chain(s.own, true, |facts| self.decide(s, cheap, facts, tried));
        chain(s.own, false, decide).flatten().unwrap_or(Verdict::No)
    }

    /// `cheap`: the facts without those that are read from /proc.
    fn decide(
        &self,
        s: &Subject<'_>,
        cheap: &matcher::Facts<'_>,
        facts: &matcher::Facts<'_>,
        tried: &Set,
    ) -> Verdict {
        for index in tried.iter() {
            let w = &self.rules[index];
            // Where argv is cut, or may be an older program's, it may match or not for that alone: all of it is read first.
            if w.needs.argv && s.ask {
                let missing = s.of(w, doubted);
                if !missing.is_empty() {
                    return Verdict::Read(missing);
                }
            }
            if w.reads() {
                if w.cheap.as_ref().is_some_and(|m| !m.matches(cheap)) {
                    continue;
                }
                if s.ask {
                    let missing = s.of(w, |n| unread(n, w.needs.exe));
                    if !missing.is_empty() {
                        return Verdict::Read(missing);
                    }
                }
            }
            if w.rule.matches.matches(facts) {
                return Verdict::Yes(index);
            }
        }
        Verdict::No
    }

    /// The process has execed, or facts that it waited for have come. Gives the rule that matches, or asks for what is missing.
    pub(super) fn matching(&mut self, i: Idx, forest: &mut Forest, turn: &mut Turn<'_>) -> Option<usize> {
        if self.rules.is_empty() || forest.node(i).flags.has(Flags::KERNEL) {
            return None;
        }
        match self.verdict(i, true, forest) {
            Verdict::No => None,
            Verdict::Yes(rule) => Some(rule),
            Verdict::Read(missing) => {
                forest.node_mut(i).flags.set(Flags::MATCHING);
                let key = forest.node(i).key;
                if self.waiting.len() >= WAITING_MAX {
                    self.waiting.retain(|k, _| forest.find(*k).is_some());
                }
                for a in missing {
                    let asked = forest.node(a).key;
                    facts::read(a, forest, turn);
                    if a != i {
                        self.waiting.entry(asked).or_default().push(key);
                    }
                }
                None
            }
        }
    }

    /// Facts have come (or will not): the processes that waited for them, to be tried again.
    pub(super) fn waited_for(&mut self, key: Key, forest: &mut Forest) -> Vec<Idx> {
        let mut keys = self.waiting.remove(&key).unwrap_or_default();
        keys.push(key);
        let mut found: Vec<Idx> = keys.into_iter().filter_map(|k| forest.find(k)).collect();
        found.retain(|&i| {
            let flags = &mut forest.node_mut(i).flags;
            let waits = flags.has(Flags::MATCHING);
            flags.clear(Flags::MATCHING);
            waits
        });
        found
    }

    /// Starts to try the rules on all that run. `existing`: all of them ran before their rule saw them; else only those that
    /// started before the agent was ready. True: no facts are awaited, [`Self::scan_candidates`] follows at once.
    pub(super) fn scan(&mut self, existing: bool, forest: &mut Forest, turn: &mut Turn<'_>) -> bool {
        if self.rules.is_empty() {
            return false;
        }
        let argv = self.needs.argv;
        let mut ask: Vec<Idx> = Vec::new();
        for (i, n) in forest.iter() {
            if !n.alive() || n.flags.has(Flags::KERNEL) {
                continue;
            }
            if argv && !n.argv.is_known() && !n.flags.has(Flags::READ) {
                ask.push(i);
            } else if let Verdict::Read(v) = self.verdict(i, true, forest) {
                ask.extend(v);
            }
        }
        let waiting: HashSet<Key> = ask.iter().map(|&i| forest.node(i).key).collect();
        for i in ask {
            facts::read(i, forest, turn);
        }
        // A scan that still waits is taken over by this one: what was there before its rule stays so.
        let existing = existing || self.scan.as_ref().is_some_and(|s| s.existing);
        let complete = waiting.is_empty();
        let until = turn.now.saturating_add(SCAN_WAITS);
        self.scan = Some(Scan { waiting, until, tries: 0, existing });
        if !complete {
            turn.set(until, Timer::Scan);
        }
        complete
    }

    /// Facts that a scan waits for have come. True: they were the last.
    pub(super) fn scan_got(&mut self, key: Key) -> bool {
        self.scan.as_mut().is_some_and(|s| s.waiting.remove(&key) && s.waiting.is_empty())
    }

    /// The time of a scan is over, whatever has come.
    pub(super) fn scan_is_due(&self, now: u64) -> bool {
        self.scan.as_ref().is_some_and(|s| s.until <= now)
    }

    /// The processes that a scan tries now, and whether all of them count as existing. Oldest first: an ancestor is older than its
    /// descendants, so the topmost match of a rule becomes the root, and those below it are in a job of that rule already. Where the
    /// facts of an ancestor have not come yet (an overloaded host is slow to answer), that one may be the root: it is waited for.
    pub(super) fn scan_candidates(&mut self, forest: &Forest, turn: &mut Turn<'_>) -> (Vec<Idx>, bool) {
        let Some(mut scan) = self.scan.take() else { return (Vec::new(), false) };
        scan.tries += 1;
        if scan.tries >= SCAN_TRIES {
            scan.waiting.clear();
        }
        scan.waiting.retain(|k| forest.find(*k).is_some_and(|i| forest.node(i).alive()));
        let waits = |i: Idx| scan.waiting.contains(&forest.node(i).key);
        let mut all: Vec<(u64, Idx)> =
            forest.iter().filter(|(_, n)| n.alive()).map(|(i, n)| (n.key.start, i)).collect();
        all.retain(|&(_, i)| scan.waiting.is_empty() || !(waits(i) || forest.ancestors(i).any(waits)));
        all.retain(|&(_, i)| !forest.node(i).flags.has(Flags::KERNEL));
        all.sort_unstable();
        let existing = scan.existing;
        if !scan.waiting.is_empty() {
            scan.until = turn.now.saturating_add(SCAN_WAITS);
            turn.set(scan.until, Timer::Scan);
            self.scan = Some(scan);
        }
        (all.into_iter().map(|(_, i)| i).collect(), existing)
    }

    /// The first rule that matches by what is known now.
    pub(super) fn matching_now(&self, i: Idx, forest: &Forest) -> Option<usize> {
        match self.verdict(i, false, forest) {
            Verdict::Yes(rule) => Some(rule),
            Verdict::No | Verdict::Read(_) => None,
        }
    }
}

/// Links the facts of a line of ancestors, nearest first, and hands the first to `f`.
fn chain<R>(own: &[Own], read: bool, f: impl FnOnce(&matcher::Facts<'_>) -> R) -> Option<R> {
    fn go(own: &[Own], read: bool, f: &mut dyn FnMut(Option<&matcher::Facts<'_>>)) {
        let Some((first, rest)) = own.split_first() else { return f(None) };
        go(rest, read, &mut |parent| {
            // Shortens the lifetimes to that of this call.
            let parent = parent.copied();
            f(Some(&first.facts(parent.as_ref(), read)));
        });
    }
    let mut f = Some(f);
    let mut result = None;
    go(own, read, &mut |facts| {
        if let (Some(facts), Some(f)) = (facts, f.take()) {
            result = Some(f(facts));
        }
    });
    result
}
