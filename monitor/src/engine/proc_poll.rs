//! When /proc is looked at for a process that is on its way out. The exit event comes before files are closed, children
//! get an adopter and the zombie stands; that can take microseconds or hours.

use super::timers::Timer;
use super::{Effect, Engine, LOOKS_PER_S, MS, SECOND};
use crate::engine::forest::{Flags, Idx};
use crate::model::schema::State;

/// After the exit, ms; then each second.
const STEPS: [u64; 5] = [1, 4, 16, 64, 250];
/// Parts of a second over which refused looks are spread.
const SPREAD: u32 = 256;
/// Looks that may come at once.
const BURST: u64 = 512;
/// The same for the zombies of firing alerts: what ten thousand of them need to be found gone within a second.
const ALERT_BURST: u64 = 16_384;
const ALERT_LOOKS_PER_S: u64 = 8_192;
/// Cgroups that are read at exec, where an id does not tell them.
const CGROUPS_PER_S: u64 = 200;

/// A bucket of looks. A burst of exits empties it, and most of those are reaped before their next turn.
#[derive(Debug)]
pub(super) struct Budget {
    /// In looks * `SECOND`, so that no time is lost to rounding.
    level: u64,
    at: u64,
    burst: u64,
    per_s: u64,
}

impl Budget {
    fn new(burst: u64, per_s: u64) -> Self {
        Self { level: burst * SECOND, at: 0, burst, per_s }
    }

    pub(super) fn exits() -> Self {
        Self::new(BURST, LOOKS_PER_S)
    }

    pub(super) fn alerts() -> Self {
        Self::new(ALERT_BURST, ALERT_LOOKS_PER_S)
    }

    pub(super) fn cgroups() -> Self {
        Self::new(CGROUPS_PER_S, CGROUPS_PER_S)
    }

    pub(super) fn take(&mut self, now: u64) -> bool {
        let grown = now.saturating_sub(self.at).saturating_mul(self.per_s);
        self.level = self.level.saturating_add(grown).min(self.burst * SECOND);
        self.at = now;
        let ok = self.level >= SECOND;
        if ok {
            self.level -= SECOND;
        }
        ok
    }
}

impl Engine {
    /// The process has exited, or a dead parent got children.
    pub(super) fn look_soon(&mut self, i: Idx, at: u64) {
        let n = self.forest.node_mut(i);
        if n.flags.has(Flags::LOOKING) {
            return;
        }
        n.flags.set(Flags::LOOKING);
        n.step = 0;
        let generation = n.generation;
        self.timers.set(at.saturating_add(STEPS[0] * MS), Timer::Look(i, generation));
    }

    pub(super) fn look_due(&mut self, i: Idx, generation: u32, now: u64, fx: &mut Vec<Effect>) {
        if !self.forest.is(i, generation) {
            return;
        }
        let n = self.forest.node(i);
        let (key, step) = (n.key, usize::from(n.step));
        let own = n.state == State::Exiting;
        let child = if n.alive() { None } else { self.forest.reapable(i).next() };
        if !own && child.is_none() {
            return self.forest.node_mut(i).flags.clear(Flags::LOOKING);
        }
        let whom = [own.then_some(key), child.map(|c| self.forest.node(c).key)];
        let mut spread = 0;
        for k in whom.into_iter().flatten() {
            if self.looks.take(now) {
                fx.push(Effect::Look(k));
            } else {
                // Those who got no turn do not all come back at the same moment.
                spread = u64::from(i % SPREAD) * SECOND / u64::from(SPREAD);
            }
        }
        let wait = match STEPS.get(step + 1) {
            Some(next) => (next - STEPS[step]) * MS,
            None => SECOND,
        };
        self.forest.node_mut(i).step = (step + 1).min(STEPS.len()) as u8;
        self.timers.set(now.saturating_add(wait + spread), Timer::Look(i, generation));
    }

    /// A process that is known by name only, or whose parent is not known.
    pub(super) fn ask(&mut self, i: Idx, fx: &mut Vec<Effect>) {
        let n = self.forest.node(i);
        if n.state != State::Gone {
            fx.push(Effect::Look(n.key));
            self.ask_facts(i, fx);
        }
    }

    /// Its argv was never heard, or is an older program's: /proc may have it.
    pub(super) fn ask_facts(&mut self, i: Idx, fx: &mut Vec<Effect>) {
        let n = self.forest.node(i);
        let wanted = !n.argv.is_known() || n.flags.has(Flags::DOUBTED);
        if n.alive() && wanted && !n.flags.has(Flags::KERNEL) {
            self.read_facts(i, fx);
        }
    }

    /// Before an alert speaks of it: its container and its pid inside stand in labels that are frozen then.
    pub(super) fn ask_place(&mut self, i: Idx, fx: &mut Vec<Effect>) -> bool {
        let Some(n) = self.forest.get(i) else { return false };
        let unread = !n.flags.has(Flags::READ) && !n.flags.has(Flags::KERNEL) && n.state != State::Gone;
        if unread {
            self.read_facts(i, fx);
        }
        unread
    }

    pub(super) fn read_facts(&mut self, i: Idx, fx: &mut Vec<Effect>) {
        let n = self.forest.node_mut(i);
        if !n.flags.has(Flags::ASKED) {
            n.flags.set(Flags::ASKED);
            fx.push(Effect::ReadFacts(n.key));
        }
    }
}
