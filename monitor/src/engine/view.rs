//! Processes and jobs in the contract's words. Read only.

use super::forest::signals::Signal;
use super::forest::{Flags, Forest, Idx, NO_UID, Node};
use super::input::Settings;
use super::jobs::Jobs;
use crate::model::argv::split_argv;
use crate::model::container;
use crate::model::event::{Comm, Sender};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::question::SignalSeen;
use crate::model::schema::{Container, Exit, JobId, LineageKnown, Process, Ref, SignalBy, State};

/// What the descriptions are made from.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) settings: &'a Settings,
    pub(super) forest: &'a Forest,
    pub(super) jobs: &'a Jobs,
}

impl View<'_> {
    /// RFC 3339 of a boot time.
    pub(super) fn wall(&self, boot_ns: u64) -> String {
        crate::model::time::rfc3339(boot_ns.saturating_add_signed(self.settings.boot_to_wall_ns))
    }

    pub(super) fn argv_of(&self, n: &Node) -> Vec<OutsideText> {
        let bytes = self.forest.strings.get(n.argv).unwrap_or_default();
        split_argv(bytes).map(OutsideText::from_bytes).collect()
    }

    pub(super) fn ref_of(&self, i: Idx) -> Ref {
        let n = self.forest.node(i);
        Ref {
            id: n.key,
            pid: n.key.pid,
            comm: OutsideText::from_bytes(n.comm.bytes()),
            argv: self.argv_of(n),
        }
    }

    /// Of a process that may be forgotten already: then by the name that it had.
    pub(super) fn ref_of_key(&self, key: Key, comm: Comm) -> Ref {
        self.forest.find(key).map_or_else(
            || Ref { id: key, pid: key.pid, comm: OutsideText::from_bytes(comm.bytes()), argv: Vec::new() },
            |i| self.ref_of(i),
        )
    }

    pub(super) fn container_of(&self, i: Idx) -> Option<Container> {
        let cgroup = self.forest.strings.get(self.forest.node(i).cgroup)?;
        container::named(OutsideText::from_bytes(cgroup).raw())
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
        let get = |s| self.forest.strings.get(s).map(OutsideText::from_bytes);
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
            comm: OutsideText::from_bytes(n.comm.bytes()),
            exe: get(n.exe),
            argv: self.argv_of(n),
            uid: (n.uid != NO_UID).then_some(n.uid),
            job: jobs.first().copied(),
            jobs,
            container: cgroup.as_ref().and_then(|c| container::named(c.raw())),
            cgroup: cgroup.map(|c| container::shown(c.raw()).into()),
            pid_ns,
            ns_pid,
            kernel_thread: n.flags.has(Flags::KERNEL),
            exit: if matches!(n.state, State::Exiting | State::Zombie | State::Gone) {
                self.exit_of(i)
            } else {
                None
            },
            children: self.forest.children(i).map(|c| self.forest.node(c).key).collect(),
            elided: n.elided,
            argv_cut: n.flags.has(Flags::CUT),
        })
    }

    pub(super) fn signal_by(&self, s: &Signal) -> SignalBy {
        match s.sender {
            _ if s.probe => SignalBy::Jobwarden,
            Sender::Process(k) if k == self.settings.agent || self.jobs.supervises(k) => SignalBy::Jobwarden,
            Sender::Process(_) => SignalBy::Process,
            Sender::ParentDeath(_) => SignalBy::ParentDeath,
            Sender::Timer => SignalBy::Timer,
            Sender::Kernel => SignalBy::Kernel,
        }
    }

    pub(super) fn signal_seen(&self, s: &Signal) -> SignalSeen {
        SignalSeen {
            at: s.at,
            signal: s.number,
            by: self.signal_by(s),
            sender: s.sender_key().map(|k| self.ref_of_key(k, s.sender_comm)),
            target: self.ref_of_key(s.target, s.target_comm),
            result: s.result,
        }
    }
}
