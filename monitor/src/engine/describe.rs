//! One process in the contract's words, and what `why` is asked with.

use super::Engine;
use crate::engine::forest::signals::Signal;
use crate::engine::forest::{Flags, Idx, NO_UID, NONE, Node};
use crate::model::argv::split_argv;
use crate::model::container;
use crate::model::event::{Comm, Sender};
use crate::model::key::Key;
use crate::model::question::{Question, SignalSeen};
use crate::model::schema::{Container, Exit, JobId, LineageKnown, Process, Ref, SignalBy, State, text};

/// Most processes that a question names: a job of ten thousand is not told in full.
const FAMILY_MAX: usize = 4_096;

impl Engine {
    /// RFC 3339 of a boot time.
    pub(super) fn wall(&self, boot_ns: u64) -> String {
        crate::model::time::rfc3339(boot_ns.saturating_add_signed(self.settings.boot_to_wall_ns))
    }

    pub(super) fn argv_of(&self, n: &Node) -> Vec<String> {
        let bytes = self.forest.strings.get(n.argv).unwrap_or_default();
        split_argv(bytes).map(text).collect()
    }

    pub(super) fn ref_of(&self, i: Idx) -> Ref {
        let n = self.forest.node(i);
        Ref { id: n.key, pid: n.key.pid, comm: text(n.comm.bytes()), argv: self.argv_of(n) }
    }

    /// Of a process that may be forgotten already: then by the name that it had.
    pub(super) fn ref_of_key(&self, key: Key, comm: Comm) -> Ref {
        self.forest.find(key).map_or_else(
            || Ref { id: key, pid: key.pid, comm: text(comm.bytes()), argv: Vec::new() },
            |i| self.ref_of(i),
        )
    }

    pub(super) fn container_of(&self, i: Idx) -> Option<Container> {
        let cgroup = self.forest.strings.get(self.forest.node(i).cgroup)?;
        container::named(&text(cgroup))
    }

    /// Innermost first.
    pub(super) fn job_ids(&self, i: Idx) -> Vec<JobId> {
        let chain = self.forest.groups.chain(self.forest.node(i).group);
        chain.filter_map(|g| self.jobs.get(g)).map(|j| j.record.id).collect()
    }

    pub(super) fn exit_of(&self, i: Idx) -> Option<Exit> {
        let n = self.forest.node(i);
        let status = n.wait_status()?;
        Some(match status.signal() {
            None => Exit::Code { code: status.code().unwrap_or_default() },
            Some(s) => {
                let killer = self.forest.extra(i).and_then(|x| x.killer.as_ref());
                let sender = killer.and_then(|k| Some(self.ref_of_key(k.sender_key()?, k.sender_comm)));
                Exit::Signal { signal: crate::model::signal::name(s), core: status.core(), sender }
            }
        })
    }

    pub(super) fn describe(&self, i: Idx, now: u64) -> Option<Process> {
        let n = self.forest.get(i)?;
        let get = |s| self.forest.strings.get(s).map(text);
        let parent = self.forest.get(n.parent);
        let adopter = parent.filter(|p| n.flags.has(Flags::ADOPTED) && p.alive() && n.state != State::Gone);
        let jobs = self.job_ids(i);
        let extra = self.forest.extra(i);
        let read = [Flags::READ, Flags::KERNEL, Flags::OUTSIDE].into_iter().any(|f| n.flags.has(f));
        let inside = extra.filter(|x| x.pid_ns.is_some() || x.ns_pid.is_some());
        let (pid_ns, ns_pid) = match inside {
            Some(x) => (x.pid_ns, x.ns_pid),
            None => (self.settings.pid_ns.filter(|_| read), read.then_some(n.key.pid)),
        };
        let leader_dead = matches!(n.state, State::Zombie | State::LeaderExited);
        let cgroup = get(n.cgroup);
        Some(Process {
            id: n.key,
            pid: n.key.pid,
            ppid: match (n.state, parent) {
                (State::Gone, _) => None,
                (_, Some(p)) => Some(p.key.pid),
                // Nobody above it: PID 1 and kthreadd.
                (_, None) => n.flags.has(Flags::LINEAGE).then_some(0),
            },
            lineage_parent: self.forest.get(n.lineage).map(|p| p.key),
            lineage: if n.flags.has(Flags::LINEAGE) { LineageKnown::Known } else { LineageKnown::Unknown },
            adopter: adopter.map(|_| self.ref_of(n.parent)),
            state: n.state,
            kernel_state: leader_dead.then(|| "Z".to_owned()),
            orphan: n.orphan(),
            state_s: now.saturating_sub(n.since) as f64 / 1e9,
            started: self.wall(n.key.start),
            comm: text(n.comm.bytes()),
            exe: get(n.exe),
            argv: self.argv_of(n),
            uid: (n.uid != NO_UID).then_some(n.uid),
            job: jobs.first().copied(),
            jobs,
            container: cgroup.as_deref().and_then(container::named),
            cgroup: cgroup.map(|c| container::shown(&c).to_owned()),
            pid_ns,
            ns_pid,
            kernel_thread: n.flags.has(Flags::KERNEL),
            exit: if super::summary::exits(n.state) { self.exit_of(i) } else { None },
            children: self.forest.children(i).map(|c| self.forest.node(c).key).collect(),
            elided: n.elided,
            argv_cut: n.flags.has(Flags::CUT),
        })
    }

    pub(super) fn ask_why(&self, key: Key, now: u64) -> Option<Question> {
        let i = self.forest.find(key)?;
        let n = self.forest.node(i);
        let mut family: Vec<Idx> = self.forest.ancestors(i).collect();
        if n.parent != NONE {
            family.push(n.parent);
            family.extend(self.forest.ancestors(n.parent));
        }
        let near = family.len();
        family.extend(self.forest.children(i));
        family.extend(self.forest.reapable(i));
        // The siblings that the same parent would have to reap, and the members of all its jobs.
        if n.parent != NONE && self.forest.node(n.parent).key.pid != 1 {
            family.extend(self.forest.reapable(n.parent));
        }
        let outermost = self.forest.groups.chain(n.group).last();
        if let Some(g) = outermost {
            family.extend(self.with_inner(g).into_iter().flat_map(|g| self.forest.members(g)));
        }
        let mut seen = std::collections::HashSet::from([i]);
        family.retain(|&x| seen.insert(x));
        family.truncate(FAMILY_MAX.max(near));
        let about: std::collections::HashSet<Key> =
            family.iter().chain([&i]).map(|&x| self.forest.node(x).key).collect();
        let signals = self.forest.signals.iter().filter(|s| about.contains(&s.target));
        let alert = self.alerts.iter().find(|e| {
            let subject = e.alert.subject.as_ref().map(|p| p.id);
            e.alert.state == crate::model::schema::AlertState::Firing
                && (subject == Some(key) || e.oldest == Some(key))
        });
        Some(Question {
            subject: self.describe(i, now)?,
            family: family.into_iter().filter_map(|x| self.describe(x, now)).collect(),
            signals: signals.map(|s| self.seen(s)).collect(),
            lost: Some(self.lost.2).filter(|&at| at > 0),
            alert: alert.map(|e| e.alert.id.clone()),
        })
    }

    pub(super) fn by(&self, s: &Signal) -> SignalBy {
        match s.sender {
            _ if s.probe => SignalBy::Jobwarden,
            Sender::Process(k) if k == self.settings.agent || self.supervisors.contains_key(&k) => {
                SignalBy::Jobwarden
            }
            Sender::Process(_) => SignalBy::Process,
            Sender::ParentDeath(_) => SignalBy::ParentDeath,
            Sender::Timer => SignalBy::Timer,
            Sender::Kernel => SignalBy::Kernel,
        }
    }

    fn seen(&self, s: &Signal) -> SignalSeen {
        SignalSeen {
            at: s.at,
            signal: s.number,
            by: self.by(s),
            sender: s.sender_key().map(|k| self.ref_of_key(k, s.sender_comm)),
            target: self.ref_of_key(s.target, s.target_comm),
            result: s.result,
        }
    }
}
