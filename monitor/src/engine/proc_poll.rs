//! When /proc is looked at for a process that is on its way out. The exit event comes before files are closed, children
//! get an adopter and the zombie stands; that can take microseconds or hours.

use super::forest::{Flags, Forest, Idx};
use super::output::Effect;
use super::timers::Timer;
use super::turn::{MS, SECOND, Turn};
use crate::model::schema::State;

/// Most `Effect::Look`s a second, on average, for exits: one whose turn would come above that waits for its next.
pub const LOOKS_PER_S: u64 = 2_000;
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

/// Processes that are on their way out, and when /proc is asked about them.
#[derive(Debug)]
pub(super) struct ExitPolls {
    budget: Budget,
}

impl Default for ExitPolls {
    fn default() -> Self {
        Self { budget: Budget::new(BURST, LOOKS_PER_S) }
    }
}

impl ExitPolls {
    /// The process has exited at `at`, or a dead parent got children.
    pub(super) fn begin(i: Idx, at: u64, forest: &mut Forest, turn: &mut Turn<'_>) {
        let n = forest.node_mut(i);
        if n.flags.has(Flags::LOOKING) {
            return;
        }
        n.flags.set(Flags::LOOKING);
        n.step = 0;
        turn.set(at.saturating_add(STEPS[0] * MS), Timer::Look(i, n.generation));
    }

    pub(super) fn due(&mut self, i: Idx, generation: u32, forest: &mut Forest, turn: &mut Turn<'_>) {
        if !forest.is(i, generation) {
            return;
        }
        let n = forest.node(i);
        let (key, step) = (n.key, usize::from(n.step));
        let own = n.state == State::Exiting;
        let child = if n.alive() { None } else { forest.reapable(i).next() };
        if !own && child.is_none() {
            return forest.node_mut(i).flags.clear(Flags::LOOKING);
        }
        let asked = [own.then_some(key), child.map(|c| forest.node(c).key)];
        let mut spread = 0;
        for k in asked.into_iter().flatten() {
            if self.budget.take(turn.now) {
                turn.effect(Effect::Look(k));
            } else {
                // Refused looks do not all come back at the same moment.
                spread = u64::from(i % SPREAD) * SECOND / u64::from(SPREAD);
            }
        }
        let wait = match STEPS.get(step + 1) {
            Some(next) => (next - STEPS[step]) * MS,
            None => SECOND,
        };
        forest.node_mut(i).step = (step + 1).min(STEPS.len()) as u8;
        turn.set(turn.now.saturating_add(wait + spread), Timer::Look(i, generation));
    }
}
