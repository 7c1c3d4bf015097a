//! The kernel's own answers, and the comparison of the agent's forest with them, process by process.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Exit, Process, State, Tree};
use jobwarden::sources::proc::{Proc, Stat};

use crate::agent::Agent;
use crate::wait::{eventually, ms};

/// Nanoseconds of a clock tick in /proc (`USER_HZ` is 100 on every supported machine).
const TICK_NS: u64 = 10_000_000;

/// /proc/PID/stat, if there is such a process.
pub fn stat(pid: u32) -> Result<Stat> {
    Proc::default().stat(pid).with_context(|| format!("/proc/{pid}/stat"))
}

/// The state letter in /proc.
pub fn letter(pid: u32) -> Result<char> {
    Ok(stat(pid)?.state.into())
}

/// What the contract says of a raw wait status; the sender is not in it.
#[must_use]
pub fn exit_matches(exit: Option<&Exit>, status: i32) -> bool {
    match exit {
        Some(Exit::Code { code }) => libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == *code,
        Some(Exit::Signal { signal, core, .. }) => {
            libc::WIFSIGNALED(status)
                && number(signal) == Some(libc::WTERMSIG(status))
                && *core == libc::WCOREDUMP(status)
        }
        None => false,
    }
}

fn number(signal: &str) -> Option<i32> {
    Some(match signal {
        "SIGHUP" => 1,
        "SIGINT" => 2,
        "SIGQUIT" => 3,
        "SIGABRT" => 6,
        "SIGKILL" => 9,
        "SIGSEGV" => 11,
        "SIGTERM" => 15,
        _ => return None,
    })
}

/// All of /proc, by pid: what it said, and whether a thread lives.
pub struct Table {
    /// Boot-time nanoseconds before it was read.
    at: u64,
    rows: BTreeMap<u32, (Stat, bool)>,
}

/// Reads all of /proc.
#[must_use]
pub fn proc_table() -> Table {
    let proc = Proc::default();
    let at = jobwarden::sources::host::boot_now();
    let pids = proc.pids().unwrap_or_default();
    let rows =
        pids.into_iter().filter_map(|p| Some((p, (proc.stat(p).ok()?, proc.has_live_thread(p))))).collect();
    Table { at, rows }
}

/// What the forest and /proc disagree on. Only what /proc said the same before and after the tree was asked for can be
/// held against it.
#[must_use]
pub fn differences(tree: &Tree, before: &Table, after: &Table) -> Vec<String> {
    let mut ours: BTreeMap<u32, Vec<&Process>> = BTreeMap::new();
    for p in tree.processes.iter().filter(|p| p.state != State::Gone) {
        ours.entry(p.pid).or_default().push(p);
    }
    let mut out = Vec::new();
    for (pid, (was, was_live)) in &before.rows {
        let Some((is, is_live)) = after.rows.get(pid) else { continue };
        if was.start_ticks != is.start_ticks {
            continue;
        }
        let found = ours.get(pid).into_iter().flatten().find(|p| p.id.start / TICK_NS == is.start_ticks);
        let Some(p) = found else {
            out.push(format!("{pid} ({:?}) is missing", is.comm));
            continue;
        };
        if was.ppid == is.ppid && p.ppid != Some(is.ppid) {
            out.push(format!("{pid} ({:?}): parent {:?}, /proc says {}", is.comm, p.ppid, is.ppid));
        }
        if was.state == b'Z' && is.state == b'Z' && was_live == is_live {
            let want = if *is_live { State::LeaderExited } else { State::Zombie };
            if p.state != want {
                out.push(format!("{pid} ({:?}): {:?}, /proc says {want:?}", is.comm, p.state));
            }
        } else if was.state != b'Z' && is.state != b'Z' && !matches!(p.state, State::Running | State::Exiting)
        {
            out.push(format!("{pid} ({:?}): {:?}, /proc says {}", is.comm, p.state, is.state as char));
        }
    }
    for (pid, found) in ours {
        for p in found {
            // Who was born after that may have died before the other reading: the client that asks is one of them.
            let earlier = p.id.start < before.at;
            if earlier && !before.rows.contains_key(&pid) && !after.rows.contains_key(&pid) {
                out.push(format!("{} ({}) is {:?} and not in /proc", p.id, p.comm, p.state));
            }
        }
    }
    out
}

/// The forest equals /proc, process by process, as soon as the host stands still long enough to compare.
pub fn forest_is_proc(agent: &Agent<'_>) -> Result<usize> {
    eventually("the forest equals /proc", ms(15_000), || {
        let before = proc_table();
        let tree = agent.tree()?;
        let after = proc_table();
        let bad = differences(&tree, &before, &after);
        ensure!(bad.is_empty(), "{} differences:\n{}", bad.len(), bad.join("\n"));
        Ok(after.rows.len())
    })
}
