//! When a process counts as daemonized.

use crate::model::schema::{Exit, Process};

/// Whether a process put itself apart on purpose: a session that it or a dead ancestor made after a fork without an
/// exec, and a parent that exited with 0 (`daemon(7)`, `daemon(3)`).
///
/// `session` is the process's own; `ancestors` are its lineage ancestors, nearest first. A shell's background job is none:
/// its session's leader had executed the shell.
#[must_use]
pub fn daemonized(me: &Process, session: u32, ancestors: &[&Process]) -> bool {
    let Some((parent, above)) = ancestors.split_first() else { return false };
    if parent.exit != Some(Exit::Code { code: 0 }) {
        return false;
    }
    // fork without exec leaves argv as it was.
    let forked_only = |child: &Process, parent: &Process| !child.argv.is_empty() && child.argv == parent.argv;
    if session == me.pid {
        return forked_only(me, parent);
    }
    let mut chain = ancestors.iter().zip(above.iter().map(Some).chain(std::iter::once(None)));
    let leader = chain.find(|(p, _)| p.pid == session);
    leader.is_some_and(|(leader, its_parent)| {
        leader.exit == Some(Exit::Code { code: 0 }) && its_parent.is_some_and(|p| forked_only(leader, p))
    })
}
