//! Rules: tried in file order at exec and on those who already run; the first match wins. What a rule asks about and no
//! event tells (the resolved exe, cgroup, container) is read from /proc only if a rule has come that far.

use std::collections::HashSet;

use super::jobs::{Begin, Job, policy_of};
use super::timers::Timer;
use super::{Effect, Engine, JobPolicy, Refused, SECOND};
use crate::config::{Match, Rule};
use crate::engine::forest::{Flags, Idx, NO_UID, Node};
use crate::matcher::{self, Needs};
use crate::model::container;
use crate::model::key::Key;
use crate::model::schema::text;

/// How long a scan waits for facts from /proc before it goes on without.
const SCAN_WAITS: u64 = 2 * SECOND;
/// So often it goes on with those who have nobody above them whose facts have not come; then with all.
const SCAN_TRIES: u32 = 15;

/// More keys than this are looked through for those that are gone, whose facts will not come.
const WAITING_MAX: usize = 4_096;

#[derive(Debug)]
pub(super) struct Watched {
    pub(super) rule: Rule,
    needs: Needs,
    pub(super) policy: JobPolicy,
}

impl Watched {
    fn reads(&self) -> bool {
        self.needs.exe || self.needs.cgroup || self.needs.container
    }
}

/// A scan of those who already run: it waits until their facts have come.
#[derive(Debug, Default)]
pub(super) struct Scan {
    waiting: HashSet<Key>,
    until: u64,
    tries: u32,
    /// Roots that it finds already ran when their rule first saw them.
    existing: bool,
}

enum Verdict {
    No,
    Yes(usize),
    /// These must be read first.
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

/// argv as rules see it: joined by one space.
fn spaced(argv: &[u8]) -> String {
    let mut joined = argv.to_vec();
    for b in &mut joined {
        if *b == 0 {
            *b = b' ';
        }
    }
    String::from_utf8(joined).unwrap_or_else(|e| text(e.as_bytes()))
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

pub(super) fn watched(rules: &[Rule]) -> Vec<(Watched, Option<Match>)> {
    let one = |r: &Rule| {
        let w = Watched { needs: r.matches.needs(), policy: policy_of(r), rule: r.clone() };
        (w, cheap(&r.matches))
    };
    rules.iter().map(one).collect()
}

impl Engine {
    /// Only what the rules ask about: this is done at each exec.
    fn own_facts(&self, n: &Node, needs: Needs) -> Own {
        let get = |s, wanted: bool| if wanted { self.forest.strings.get(s) } else { None };
        let cgroup = get(n.cgroup, needs.cgroup || needs.container).map(text);
        Own {
            argv: get(n.argv, needs.argv).map(spaced),
            exe: get(n.exe, needs.exe).map(text),
            comm: if needs.comm { text(n.comm.bytes()) } else { String::new() },
            uid: (n.uid != NO_UID).then_some(n.uid),
            container: cgroup.as_deref().and_then(container::named).map(|c| c.id),
            name: cgroup.as_deref().and_then(|c| container::name(container::shown(c))).map(str::to_owned),
            cgroup: cgroup.map(|c| container::shown(&c).to_owned()),
        }
    }

    /// `ask`: facts that are missing may be asked for; else they are taken as they are known.
    fn verdict(&self, i: Idx, ask: bool) -> Verdict {
        let needs = self.rules.iter().fold(Needs::default(), |n, (w, _)| n.and(w.needs));
        let parents = needs.parents;
        let line: Vec<Idx> = std::iter::once(i).chain(self.forest.ancestors(i).take(parents)).collect();
        let own: Vec<Own> = line.iter().map(|&a| self.own_facts(self.forest.node(a), needs)).collect();
        for (index, (w, cheap)) in self.rules.iter().enumerate() {
            let with = |m: &Match, read: bool| chain(&own, read, |f| m.matches(f));
            let asked_about = &line[..=w.needs.parents.min(line.len() - 1)];
            // Where argv is cut, or may be an older program's, it may match or not for that alone: all of it is read first.
            if w.needs.argv && ask {
                let cut = |&&a: &&Idx| {
                    let n = self.forest.node(a);
                    let unsure = n.flags.has(Flags::CUT) || n.flags.has(Flags::DOUBTED);
                    n.alive() && unsure && !n.flags.has(Flags::READ)
                };
                let cut: Vec<Idx> = asked_about.iter().filter(cut).copied().collect();
                if !cut.is_empty() {
                    return Verdict::Read(cut);
                }
            }
            if w.reads() {
                if cheap.as_ref().is_some_and(|m| !with(m, false)) {
                    continue;
                }
                let unread = |&&a: &&Idx| {
                    let n = self.forest.node(a);
                    // The exec record has told the cgroup, if its id was known.
                    let told = !w.needs.exe && n.cgroup.is_known();
                    n.alive() && !told && !n.flags.has(Flags::READ) && !n.flags.has(Flags::KERNEL)
                };
                let missing: Vec<Idx> = asked_about.iter().filter(unread).copied().collect();
                if ask && !missing.is_empty() {
                    return Verdict::Read(missing);
                }
            }
            if with(&w.rule.matches, true) {
                return Verdict::Yes(index);
            }
        }
        Verdict::No
    }

    /// It has execed (or its facts have come).
    pub(super) fn try_rules(&mut self, i: Idx, now: u64, fx: &mut Vec<Effect>) {
        if self.rules.is_empty() || self.forest.node(i).flags.has(Flags::KERNEL) {
            return;
        }
        match self.verdict(i, true) {
            Verdict::No => {}
            Verdict::Yes(rule) => self.matched(i, rule, false, now, fx),
            Verdict::Read(whom) => {
                self.forest.node_mut(i).flags.set(Flags::MATCHING);
                let key = self.forest.node(i).key;
                if self.waiting.len() >= WAITING_MAX {
                    self.waiting.retain(|k, _| self.forest.find(*k).is_some());
                }
                for a in whom {
                    let asked = self.forest.node(a).key;
                    self.read_facts(a, fx);
                    if a != i {
                        self.waiting.entry(asked).or_default().push(key);
                    }
                }
            }
        }
    }

    /// The first rule that matches `i` is `rule`.
    fn matched(&mut self, i: Idx, rule: usize, existing: bool, now: u64, fx: &mut Vec<Effect>) {
        let (w, _) = &self.rules[rule];
        let name = &w.rule.name;
        let same = |g: Idx| self.jobs.get(g).is_some_and(|j| j.record.rule.as_ref() == Some(name));
        if self.forest.groups.chain(self.forest.node(i).group).any(same) || !self.forest.node(i).alive() {
            return;
        }
        // Its exec record comes again after a restart: the job is the saved one, whose members no row has told yet.
        let (key, group) = (self.forest.node(i).key, self.forest.node(i).group);
        let saved = |j: &Job| j.restored && j.record.id.root == key && j.record.rule.as_ref() == Some(name);
        let saved = self.jobs.iter().find(|(_, j)| j.done.is_none() && saved(j)).map(|(g, _)| g);
        if let Some(g) = saved {
            self.enroll(g, group, i);
            return;
        }
        let name = name.clone();
        let b = Begin {
            ordinal: rule as u32 + 1,
            name: name.clone(),
            rule: Some(name.clone()),
            policy: w.policy.clone(),
            existing,
            supervisor: None,
            number: None,
        };
        if let Err(refused @ Refused::TooDeep(..)) = self.begin(i, b, now, fx) {
            self.capacity_told(format!("Rule {name} matches, but {refused}."), now, fx);
        }
    }

    /// Facts have come (or will not): whoever waited for them is tried again.
    pub(super) fn facts_came(&mut self, key: Key, now: u64, fx: &mut Vec<Effect>) {
        let mut whom = self.waiting.remove(&key).unwrap_or_default();
        whom.push(key);
        for k in whom {
            if let Some(i) = self.forest.find(k)
                && self.forest.node(i).flags.has(Flags::MATCHING)
            {
                self.forest.node_mut(i).flags.clear(Flags::MATCHING);
                self.try_rules(i, now, fx);
            }
        }
        if let Some(s) = &mut self.scan
            && s.waiting.remove(&key)
            && s.waiting.is_empty()
        {
            self.scan_now(now, fx);
        }
    }

    /// Tries the rules on all who run. `existing`: all of them ran before their rule saw them; else only those who
    /// started before the agent was ready.
    pub(super) fn scan(&mut self, existing: bool, now: u64, fx: &mut Vec<Effect>) {
        if self.rules.is_empty() {
            return;
        }
        let argv = self.rules.iter().any(|(w, _)| w.needs.argv);
        let mut ask: Vec<Idx> = Vec::new();
        for (i, n) in self.forest.iter() {
            if !n.alive() || n.flags.has(Flags::KERNEL) {
                continue;
            }
            if argv && !n.argv.is_known() && !n.flags.has(Flags::READ) {
                ask.push(i);
            } else if let Verdict::Read(v) = self.verdict(i, true) {
                ask.extend(v);
            }
        }
        let waiting = ask.iter().map(|&i| self.forest.node(i).key).collect();
        for i in ask {
            self.read_facts(i, fx);
        }
        // One that still waits is taken over by this one: who was there before their rule stays so.
        let existing = existing || self.scan.as_ref().is_some_and(|s| s.existing);
        self.scan = Some(Scan { waiting, until: now.saturating_add(SCAN_WAITS), tries: 0, existing });
        if self.scan.as_ref().is_some_and(|s| s.waiting.is_empty()) {
            self.scan_now(now, fx);
        } else {
            self.timers.set(now.saturating_add(SCAN_WAITS), Timer::Scan);
        }
    }

    pub(super) fn scan_late(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.scan.as_ref().is_some_and(|s| s.until <= now) {
            self.scan_now(now, fx);
        }
    }

    /// Oldest first: an ancestor is older than its descendants, so the topmost match of a rule becomes the root, and those
    /// below it are in a job of that rule already. Where the facts of one above have not come yet (a host that is overloaded
    /// is slow to answer), that one may be the root: it is waited for.
    fn scan_now(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let Some(mut scan) = self.scan.take() else { return };
        scan.tries += 1;
        if scan.tries >= SCAN_TRIES {
            scan.waiting.clear();
        }
        scan.waiting.retain(|k| self.forest.find(*k).is_some_and(|i| self.forest.node(i).alive()));
        let waits = |i: Idx| scan.waiting.contains(&self.forest.node(i).key);
        let mut all: Vec<(u64, Idx)> =
            self.forest.iter().filter(|(_, n)| n.alive()).map(|(i, n)| (n.key.start, i)).collect();
        all.retain(|&(_, i)| scan.waiting.is_empty() || !(waits(i) || self.forest.ancestors(i).any(waits)));
        all.sort_unstable();
        for (start, i) in all {
            if self.forest.node(i).flags.has(Flags::KERNEL) {
                continue;
            }
            if let Verdict::Yes(rule) = self.verdict(i, false) {
                let existing = scan.existing || self.ready.is_none_or(|r| start < r);
                self.matched(i, rule, existing, now, fx);
            }
        }
        if !scan.waiting.is_empty() {
            scan.until = now.saturating_add(SCAN_WAITS);
            self.timers.set(scan.until, Timer::Scan);
            self.scan = Some(scan);
        }
    }

    /// A job that is never enforced: its root is the host's PID 1, the agent, or one of the agent's ancestors.
    pub(super) fn untouchable(&self, root: Key) -> bool {
        if root.pid == 1 {
            return true;
        }
        let Some(agent) = self.forest.find(self.settings.agent) else { return root == self.settings.agent };
        let above = |first: Idx, up: fn(&Node) -> Idx| {
            let mut at = first;
            for _ in 0..4096 {
                let Some(n) = self.forest.get(at) else { return false };
                if n.key == root {
                    return true;
                }
                at = up(n);
            }
            false
        };
        above(agent, |n| n.lineage) || above(agent, |n| n.parent)
    }
}

/// Links the facts of a line of ancestors, nearest first, and hands the first to `f`.
fn chain(own: &[Own], read: bool, f: impl FnOnce(&matcher::Facts<'_>) -> bool) -> bool {
    fn go(own: &[Own], read: bool, f: &mut dyn FnMut(Option<&matcher::Facts<'_>>)) {
        let Some((first, rest)) = own.split_first() else { return f(None) };
        go(rest, read, &mut |parent| {
            // Shortens the lifetimes to that of this call.
            let parent = parent.copied();
            f(Some(&first.facts(parent.as_ref(), read)));
        });
    }
    let mut f = Some(f);
    let mut result = false;
    go(own, read, &mut |facts| {
        if let (Some(facts), Some(f)) = (facts, f.take()) {
            result = f(facts);
        }
    });
    result
}
