//! When /proc is asked for the facts of a process: argv, exe, cgroup, uid, pid namespace. Each is asked once.

use super::forest::{Flags, Forest, Idx};
use super::output::Effect;
use super::turn::Turn;
use crate::model::schema::State;

/// A process that is known by name only, or whose parent is not known.
pub(super) fn ask_all(i: Idx, forest: &mut Forest, turn: &mut Turn<'_>) {
    let n = forest.node(i);
    if n.state != State::Gone {
        turn.effect(Effect::Look(n.key));
        ask_argv(i, forest, turn);
    }
}

/// Its argv never came, or is an older program's: /proc may have it.
pub(super) fn ask_argv(i: Idx, forest: &mut Forest, turn: &mut Turn<'_>) {
    let n = forest.node(i);
    let wanted = !n.argv.is_known() || n.flags.has(Flags::DOUBTED);
    if n.alive() && wanted && !n.flags.has(Flags::KERNEL) {
        read(i, forest, turn);
    }
}

/// Before an alert names it: its container and its pid inside stand in labels that freeze then. True: the answer is awaited.
pub(super) fn ask_place(i: Idx, forest: &mut Forest, turn: &mut Turn<'_>) -> bool {
    let Some(n) = forest.get(i) else { return false };
    let unread = !n.flags.has(Flags::READ) && !n.flags.has(Flags::KERNEL) && n.state != State::Gone;
    if unread {
        read(i, forest, turn);
    }
    unread
}

pub(super) fn read(i: Idx, forest: &mut Forest, turn: &mut Turn<'_>) {
    let n = forest.node_mut(i);
    if !n.flags.has(Flags::ASKED) {
        n.flags.set(Flags::ASKED);
        turn.effect(Effect::ReadFacts(n.key));
    }
}
