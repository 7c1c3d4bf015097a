//! What a process that SIGKILL does not end waits for. Reads /proc only.

use super::Lineage;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::{Ref, Stuck};
use crate::sources::proc::Proc;

/// Looks at the thread that holds the process back: one in uninterruptible sleep or in a tracer's stop before any other.
pub(super) fn look(proc: &Proc, lineage: &dyn Lineage, process: Ref) -> Stuck {
    let pid = process.pid;
    let weight = |s: u8| match s {
        b'D' => 0,
        b't' => 1,
        b'T' => 2,
        b'Z' | b'X' => 4,
        _ => 3,
    };
    let states = proc.threads(pid).unwrap_or_default().into_iter();
    let worst = states
        .filter_map(|t| proc.thread_stat(pid, t).ok().map(|s| (t, s.state)))
        .min_by_key(|&(_, s)| weight(s));
    let wchan = worst
        .and_then(|(t, _)| std::fs::read_to_string(proc.path(pid, &format!("task/{t}/wchan"))).ok())
        .filter(|w| !w.is_empty() && w != "0");
    let tracer = worst
        .and_then(|(t, _)| {
            let b = crate::sources::proc::read(&proc.path(pid, &format!("task/{t}/status"))).ok()?;
            Some(crate::sources::proc::parse_status(&b).tracer).filter(|&t| t > 0)
        })
        .and_then(|t| reference(proc, lineage, t));
    Stuck {
        state: worst.map_or_else(|| "?".into(), |(_, s)| char::from(s).to_string()),
        wchan,
        tracer,
        frozen: super::cgroup::frozen(proc, pid),
        process,
    }
}

fn reference(proc: &Proc, lineage: &dyn Lineage, pid: u32) -> Option<Ref> {
    let start = lineage.start_of(pid).ok().flatten()?;
    let comm = OutsideText::from_bytes(proc.stat(pid).ok()?.comm.bytes());
    let argv = proc.argv(pid).unwrap_or_default().iter().map(|a| OutsideText::from_bytes(a)).collect();
    Some(Ref { id: Key::new(pid, start), pid, comm, argv })
}
