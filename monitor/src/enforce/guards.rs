//! Whom nobody may signal: the host's PID 1, kernel threads, the agent and its ancestors, the calling client and its
//! ancestors, members that `protect` matches and what descends from such a member. It reads /proc and asks for lineage; it
//! signals nobody and sets no flag.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{Lineage, Member};
use crate::config::Match;
use crate::matcher::{self, Facts, Needs};
use crate::model::container::{self, Cgroups};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::Ref;
use crate::redact::Redactor;
use crate::sources::proc::Proc;

/// Most ancestors that are looked at: a chain longer than this is a loop or an attack.
const CHAIN: usize = 4096;
/// Time for reading argv that only the report needs, in one order. A process that forks all the time holds the lock that
/// such a reading waits for, and a bomb of some hundred must not buy time by being asked for its names.
const NAMES: Duration = Duration::from_millis(40);
/// PF_KTHREAD, include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

/// What the config protects, and whose ancestors are kept whole. Made anew for each order.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    protect: Vec<Match>,
    defaults: bool,
    kept: Vec<Kept>,
    members: Vec<(Key, String)>,
}

#[derive(Clone, Debug)]
struct Kept {
    pid: u32,
    /// None: it could not be asked (PID 1 is hidden from the iterator on some hosts).
    start: Option<u64>,
    why: String,
}

impl Guards {
    #[must_use]
    pub fn new(protect: Vec<Match>, defaults: bool) -> Self {
        Self { protect, defaults, kept: Vec::new(), members: Vec::new() }
    }

    /// Keeps `pid` and its ancestors, by present parents and by lineage, but not what else descends from those. `who` is
    /// "the agent", "the client", ..
    pub fn keep(&mut self, pid: u32, who: &str, proc: &Proc, lineage: &dyn Lineage) -> io::Result<()> {
        let mut next = Some(pid);
        let mut why = who.to_owned();
        for _ in 0..CHAIN {
            let Some(pid) = next.filter(|&p| p > 0) else { break };
            let start = lineage.start_of(pid)?;
            self.kept.push(Kept { pid, start, why });
            if let Some(start) = start {
                self.keep_lineage(Key::new(pid, start), who, lineage)?;
            }
            why = format!("an ancestor of {who}");
            next = proc.stat(pid).ok().map(|s| s.ppid);
        }
        Ok(())
    }

    /// Keeps one process by its key, dead or alive.
    pub fn keep_key(&mut self, key: Key, why: &str) {
        self.kept.push(Kept { pid: key.pid, start: Some(key.start), why: why.to_owned() });
    }

    /// All that are kept by key.
    #[must_use]
    pub fn kept_keys(&self) -> Vec<Key> {
        self.kept.iter().filter_map(|k| Some(Key::new(k.pid, k.start?))).collect()
    }

    fn keep_lineage(&mut self, key: Key, who: &str, lineage: &dyn Lineage) -> io::Result<()> {
        let mut at = key;
        for _ in 0..CHAIN {
            let Some(up) = lineage.lineage_parent(at)? else { return Ok(()) };
            // Once a chain joins one that is kept already, so is all above it.
            if self.kept.iter().any(|k| k.pid == up.pid && k.start == Some(up.start)) {
                return Ok(());
            }
            self.kept.push(Kept { pid: up.pid, start: Some(up.start), why: format!("an ancestor of {who}") });
            at = up;
        }
        Ok(())
    }

    /// Protects one member, and what descends from it, as `protect` would: for who knows more than /proc does.
    pub fn protect_member(&mut self, key: Key, why: impl Into<String>) {
        self.members.push((key, why.into()));
    }

    /// Why this one is never signalled, by itself or for the sake of agent and client; nothing of what descends from it
    /// follows from that.
    fn kept(&self, m: &Member, kernel_thread: bool) -> Option<String> {
        if m.key.pid == 1 {
            return Some("PID 1 of the host".into());
        }
        if kernel_thread {
            return Some("a kernel thread".into());
        }
        let k = self.kept.iter().find(|k| k.pid == m.key.pid && k.start.is_none_or(|s| s == m.key.start))?;
        Some(k.why.clone())
    }

    /// Why this member is protected, and with it what descends from it.
    fn protects(&self, m: &Member, facts: &Facts<'_>) -> Option<String> {
        if let Some((_, why)) = self.members.iter().find(|(k, _)| *k == m.key) {
            return Some(why.clone());
        }
        if self.defaults && matcher::protected_by_default(facts.exe, facts.uid) {
            let exe = OutsideText::from(facts.exe.unwrap_or_default());
            return Some(format!("protected by default ({exe})"));
        }
        let n = self.protect.iter().position(|p| p.matches(facts))?;
        Some(format!("protected by enforcement.protect, entry {}", n + 1))
    }

    fn needs(&self) -> Needs {
        let all = self.protect.iter().fold(Needs::default(), |n, m| n.and(m.needs()));
        Needs { exe: all.exe || self.defaults, ..all }
    }
}

/// Looks at members and remembers what it saw of each: its name for the report, and the rails' verdict.
pub(super) struct Judge<'a> {
    pub guards: &'a Guards,
    pub proc: &'a Proc,
    pub lineage: &'a dyn Lineage,
    pub redact: &'a Redactor,
    /// The roots of what is judged: nobody above one is asked for the sake of who is below.
    tops: Vec<Key>,
    seen: HashMap<Key, Seen>,
    /// Who was found to descend from which protected member, which is so for good. Those that a chain forks later are joined to
    /// them: the links further up may be in no map any more by then.
    below: HashMap<Key, Key>,
    names_left: Duration,
}

enum Above {
    Protected(Key),
    Nobody,
    /// The chain is broken: an ancestor is in no map any more.
    Unknown,
}

struct Seen {
    reference: Ref,
    kept: Option<String>,
    protected: Option<String>,
}

/// The rails' verdicts on the members of one reading.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    pub spared: HashMap<Key, Spare>,
}

#[derive(Clone, Debug)]
pub(super) struct Spare {
    pub why: String,
    /// What it forks is spared with it.
    pub heirs: bool,
}

impl<'a> Judge<'a> {
    pub(super) fn new(
        guards: &'a Guards,
        proc: &'a Proc,
        lineage: &'a dyn Lineage,
        redact: &'a Redactor,
        tops: Vec<Key>,
    ) -> Self {
        Self {
            guards,
            proc,
            lineage,
            redact,
            tops,
            seen: HashMap::new(),
            below: HashMap::new(),
            names_left: NAMES,
        }
    }

    /// Forgets the verdicts, so that a member that has become another program by exec is judged as that. Names stay.
    pub(super) fn again(&mut self, members: &[Member]) {
        for m in members {
            if let Some(old) = self.seen.remove(&m.key) {
                let mut new = self.look(m);
                if new.reference.argv.is_empty() {
                    new.reference = old.reference;
                }
                self.seen.insert(m.key, new);
            }
        }
    }

    /// Who of `members` is spared. `scope` is the reading within which "descends from a protected member" holds.
    pub(super) fn verdicts(&mut self, members: &[Member], scope: &[Member]) -> io::Result<Verdicts> {
        for m in members.iter().chain(scope) {
            if !self.seen.contains_key(&m.key) {
                let seen = self.look(m);
                self.seen.insert(m.key, seen);
            }
        }
        // Of all that were ever looked at: what descends from a protected member stays spared when that one has died.
        let protected: HashSet<Key> =
            self.seen.iter().filter(|(_, s)| s.protected.is_some()).map(|(k, _)| *k).collect();
        let mut v = Verdicts::default();
        for m in members {
            let Some(seen) = self.seen.get(&m.key) else { continue };
            let spare = |why: String, heirs| Some(Spare { why, heirs });
            let verdict = match (&seen.kept, &seen.protected) {
                (Some(w), p) => spare(w.clone(), p.is_some()),
                (None, Some(w)) => spare(w.clone(), true),
                (None, None) if protected.is_empty() => None,
                (None, None) => match self.above(m.key, &protected)? {
                    Above::Protected(k) => {
                        self.below.insert(m.key, k);
                        spare(format!("descends from the protected member {k}"), true)
                    }
                    // Then the flag is all that is known of its ancestors.
                    Above::Unknown if m.spared => spare("descends from a protected member".into(), true),
                    Above::Nobody | Above::Unknown => None,
                },
            };
            if let Some(spare) = verdict {
                v.spared.insert(m.key, spare);
            }
        }
        Ok(v)
    }

    /// Whether a protected member is among the ancestors. The spare flag does not say so: who another order spares has it too.
    fn above(&self, key: Key, protected: &HashSet<Key>) -> io::Result<Above> {
        let mut at = key;
        for _ in 0..CHAIN {
            if self.tops.contains(&at) {
                return Ok(Above::Nobody);
            }
            let Some(up) = self.lineage.ancestor(at)? else { return Ok(Above::Unknown) };
            if protected.contains(&up) {
                return Ok(Above::Protected(up));
            }
            if let Some(&k) = self.below.get(&up) {
                return Ok(Above::Protected(k));
            }
            at = up;
        }
        Ok(Above::Unknown)
    }

    /// The name of a process, as it was when it was first looked at.
    pub(super) fn reference(&self, m: &Member) -> Ref {
        let masked = || {
            let mut r = bare(m);
            self.redact.reference(&mut r);
            r
        };
        self.seen.get(&m.key).map_or_else(masked, |s| s.reference.clone())
    }

    /// The name of a process by key; None if it was never looked at.
    pub(super) fn named(&self, key: Key) -> Option<&Ref> {
        self.seen.get(&key).map(|s| &s.reference)
    }

    // /proc may tell of another process here if the pid was reused just now: then this verdict is about a member that is
    // dead, and its signal is not sent, since the pidfd is compared after this.
    fn look(&mut self, m: &Member) -> Seen {
        let mut needs = self.guards.needs();
        // A program has an executable, which is cheaper to ask for.
        let exe = self.proc.exe(m.key.pid).ok();
        let kernel_thread =
            exe.is_none() && self.proc.stat(m.key.pid).is_ok_and(|s| s.flags & PF_KTHREAD != 0);
        needs.argv |= !self.names_left.is_zero();
        let begun = Instant::now();
        let own = Own::read(self.proc, m.key.pid, Some(m.uid), m.comm.bytes(), exe, needs);
        self.names_left = self.names_left.saturating_sub(begun.elapsed());
        let kept = self.guards.kept(m, kernel_thread);
        let parents = self.parents(m, needs);
        let protected = with_parents(&own, &parents, &mut |f| self.guards.protects(m, f));
        let mut reference = Ref { argv: own.argv, ..bare(m) };
        self.redact.reference(&mut reference);
        Seen { reference, kept, protected }
    }

    /// Lineage parents, nearest first. Of a dead one nothing is known, but who was above it counts all the same.
    fn parents(&self, m: &Member, needs: Needs) -> Vec<Own> {
        let mut all = Vec::new();
        let mut at = m.key;
        while all.len() < needs.parents {
            let Ok(Some(up)) = self.lineage.ancestor(at) else { break };
            all.push(self.parent(up, needs).unwrap_or_default());
            at = up;
        }
        all
    }

    fn parent(&self, key: Key, needs: Needs) -> Option<Own> {
        let stat = self.proc.stat(key.pid).ok()?;
        let uid = self.proc.status(key.pid).ok().and_then(|s| s.uid);
        let exe = if needs.exe { self.proc.exe(key.pid).ok() } else { None };
        let own = Own::read(self.proc, key.pid, uid, stat.comm.bytes(), exe, needs);
        // What was read is about `key` only if it holds the pid still.
        self.lineage.start_of(key.pid).is_ok_and(|s| s == Some(key.start)).then_some(own)
    }
}

fn bare(m: &Member) -> Ref {
    Ref { id: m.key, pid: m.key.pid, comm: OutsideText::from_bytes(m.comm.bytes()), argv: Vec::new() }
}

/// Facts that own what they point to.
#[derive(Default)]
pub(crate) struct Own {
    pub(crate) argv: Vec<OutsideText>,
    joined: Option<String>,
    pub(crate) exe: Option<String>,
    pub(crate) comm: Option<String>,
    pub(crate) uid: Option<u32>,
    cgroup: Option<String>,
    container: Option<String>,
}

impl Own {
    pub(crate) fn read(
        proc: &Proc,
        pid: u32,
        uid: Option<u32>,
        comm: &[u8],
        exe: Option<PathBuf>,
        needs: Needs,
    ) -> Self {
        let argv = if needs.argv { proc.argv(pid).unwrap_or_default() } else { Vec::new() };
        let argv: Vec<OutsideText> = argv.iter().map(|a| OutsideText::from_bytes(a)).collect();
        let cgroups = (needs.cgroup || needs.container)
            .then(|| crate::sources::proc::read(&proc.path(pid, "cgroup")).ok())
            .flatten()
            .map(|b| {
                let mut all = Cgroups::parse(&b);
                all.recorded = crate::sources::container_records::path(proc, &all);
                all
            })
            .unwrap_or_default();
        Self {
            joined: Some(argv.iter().map(OutsideText::raw).collect::<Vec<_>>().join(" ")),
            argv,
            exe: exe.map(|e| OutsideText::from(e.as_path()).into_raw()),
            comm: Some(OutsideText::from_bytes(comm).into_raw()),
            uid,
            cgroup: cgroups.path().map(str::to_owned),
            container: cgroups.container().map(|c| c.id.into_raw()),
        }
    }

    fn facts<'a>(&'a self, parent: Option<&'a Facts<'a>>) -> Facts<'a> {
        Facts {
            argv: self.joined.as_deref(),
            exe: self.exe.as_deref(),
            comm: self.comm.as_deref(),
            uid: self.uid,
            cgroup: self.cgroup.as_deref(),
            container_id: self.container.as_deref(),
            container_name: self.cgroup.as_deref().and_then(container::name),
            parent,
        }
    }
}

/// Calls `f` with the facts of `own`, whose parents are `parents` (nearest first).
pub(crate) fn with_parents<R>(
    own: &Own,
    parents: &[impl Borrow<Own>],
    f: &mut dyn FnMut(&Facts<'_>) -> R,
) -> R {
    fn build<R>(
        own: &Own,
        rest: &[impl Borrow<Own>],
        above: Option<&Facts<'_>>,
        f: &mut dyn FnMut(&Facts<'_>) -> R,
    ) -> R {
        match rest.split_last() {
            None => f(&own.facts(above)),
            Some((top, rest)) => build(own, rest, Some(&top.borrow().facts(above)), f),
        }
    }
    build(own, parents, None, f)
}
