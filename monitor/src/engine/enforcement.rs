//! Whether policy may end jobs: the config, the operator's setting, the fuse, and what is never enforced upon.

use super::forest::{Forest, Idx, Node};
use super::input::Settings;
use super::jobs::Jobs;
use super::output::Change;
use super::record::EnforcementState;
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use crate::config;
use crate::model::key::Key;

pub(super) const MINUTE: u64 = 60 * SECOND;
/// Ancestors of the agent that are looked through.
const ANCESTORS_MAX: usize = 4_096;

#[derive(Debug, Default)]
pub(super) struct Enforcement {
    enabled: bool,
    pub(super) max_per_minute: u32,
    pub(super) state: EnforcementState,
}

impl Enforcement {
    pub(super) fn new(c: &config::Enforcement) -> Self {
        Self { enabled: c.enabled, max_per_minute: c.max_job_kills_per_minute, ..Self::default() }
    }

    pub(super) fn configure(&mut self, c: &config::Enforcement) {
        (self.enabled, self.max_per_minute) = (c.enabled, c.max_job_kills_per_minute);
    }

    /// By config and operator; the fuse is another matter.
    pub(super) fn on(&self, now: u64) -> bool {
        match (self.state.by_operator, self.state.until) {
            (Some(on), None) => on,
            (Some(on), Some(until)) if now < until => on,
            _ => self.enabled,
        }
    }

    /// Counts a job; false: one too many within a minute. A job that is counted already costs nothing more.
    fn count(&mut self, number: u64, now: u64) -> bool {
        let ended = &mut self.state.ended;
        while ended.front().is_some_and(|(at, _)| at.saturating_add(MINUTE) <= now) {
            ended.pop_front();
        }
        if ended.iter().any(|&(_, n)| n == number) {
            return true;
        }
        if ended.len() >= self.max_per_minute as usize {
            return false;
        }
        ended.push_back((now, number));
        true
    }

    /// How many jobs policy has ended within the last minute.
    pub(super) fn kills_last_minute(&self, now: u64) -> u32 {
        self.state.ended.iter().filter(|(at, _)| at.saturating_add(MINUTE) > now).count() as u32
    }

    /// Whether policy may end this job now; asked before its first signal. `Err` says why not. The fuse counts it here, and may open.
    pub(super) fn permit(
        &mut self,
        g: Idx,
        ready: bool,
        (forest, jobs, settings): (&Forest, &Jobs, &Settings),
        turn: &mut Turn<'_>,
    ) -> Result<(), &'static str> {
        let Some(j) = jobs.get(g) else { return Err("the job is not known") };
        let (number, root) = (j.record.number, j.record.id.root);
        if !self.on(turn.now) {
            return Err("enforcement is off");
        }
        if self.state.fuse_open {
            return Err("the fuse is open (`jobwarden enforcement on` closes it)");
        }
        if untouchable(root, settings.agent, forest) {
            return Err("its root is PID 1, or jobwarden itself or an ancestor of it");
        }
        if j.record.existing && !j.record.policy.enforce_existing {
            return Err("its root already ran when the rule first saw it (`enforce_existing` is not set)");
        }
        if !ready {
            return Err("the forest is not synced yet");
        }
        let counted = self.count(number, turn.now);
        self.state.fuse_open = !counted;
        // Saved before the first signal: a restart must not give the fuse a new minute.
        turn.change(Change::Enforcement(self.state.clone()));
        if counted { Ok(()) } else { Err("the fuse has opened: too many jobs ended within a minute") }
    }

    pub(super) fn restore(&mut self, s: EnforcementState, turn: &mut Turn<'_>) {
        if let Some(until) = s.until {
            turn.set(until, Timer::EnforcementOver);
        }
        self.state = s;
    }

    /// `enforcement on|off`. True: that closed the fuse.
    pub(super) fn operator(&mut self, on: bool, until: Option<u64>, turn: &mut Turn<'_>) -> bool {
        self.state.by_operator = Some(on);
        self.state.until = until;
        if let Some(until) = until {
            turn.set(until, Timer::EnforcementOver);
        }
        let closed = on && std::mem::take(&mut self.state.fuse_open);
        if closed {
            self.state.ended.clear();
        }
        turn.change(Change::Enforcement(self.state.clone()));
        closed
    }

    /// The time of the operator's setting may be over. True: it is.
    pub(super) fn operator_over(&mut self, turn: &mut Turn<'_>) -> bool {
        let over = self.state.until.is_some_and(|u| u <= turn.now);
        if over {
            (self.state.by_operator, self.state.until) = (None, None);
            turn.change(Change::Enforcement(self.state.clone()));
        }
        over
    }
}

/// A job that is never enforced: its root is the host's PID 1, the agent, or an ancestor of the agent.
fn untouchable(root: Key, agent: Key, forest: &Forest) -> bool {
    if root.pid == 1 {
        return true;
    }
    let Some(first) = forest.find(agent) else { return root == agent };
    let is_above = |up: fn(&Node) -> Idx| {
        let mut at = first;
        for _ in 0..ANCESTORS_MAX {
            let Some(n) = forest.get(at) else { return false };
            if n.key == root {
                return true;
            }
            at = up(n);
        }
        false
    };
    is_above(|n| n.lineage) || is_above(|n| n.parent)
}
