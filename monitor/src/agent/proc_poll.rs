//! Reads from /proc what the engine asked for: states at once, everything that may block in the background.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use super::core::Core;
use super::effects;
use super::intake::{DRAIN_MAX, drain};
use super::message::Message;
use super::missed_reaps::MissedReaps;
use crate::engine::{Input, Observation};
use crate::sources::host;
use crate::sources::kernel::Ring;

/// What an observation shows may ask for another one at once; this many rounds a turn, the rest in the next turn.
const ROUNDS: usize = 8;
/// No further round after this time: before the engine gets an observation the ring is read up to it, which takes a while if it is
/// full.
const ROUNDS_TIME: Duration = Duration::from_millis(20);
/// Keys whose facts are read by one blocking task: a process that blocks its readers delays only this many.
const FACTS_BATCH: usize = 64;
/// How long such a task waits for its turn at most.
const FACTS_WAIT: Duration = Duration::from_secs(1);

/// States of processes, several rounds of them.
pub(super) fn look(core: &mut Core, ring: &mut Ring) {
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        if core.proc_reads.looks.is_empty() || begun.elapsed() > ROUNDS_TIME {
            break;
        }
        look_once(core, ring);
    }
}

/// The engine gets what happened before the observation first: where the ring lags, a process that is gone from /proc may still have
/// children in the ring, and would be forgotten with its lineage.
fn look_once(core: &mut Core, ring: &mut Ring) {
    let wanted = std::mem::take(&mut core.proc_reads.looks);
    let seen: Vec<_> = wanted.into_iter().map(|k| (k, host::boot_now(), core.proc_reader.look(k))).collect();
    let until = host::boot_now();
    while drain(core, ring) == DRAIN_MAX && core.read_to < until {}
    for (key, at, seen) in seen {
        let Some(seen) = seen else {
            core.sync.unseen.push(key);
            continue;
        };
        let missed = MissedReaps::prepare(&mut core.engine, &mut core.feed, key, at);
        core.handle(Input::Observation(Cow::Owned(Observation::Look { key, at, seen })));
        if let Some(missed) = missed.filter(|_| core.engine.is_gone(key)) {
            core.reaps.mark_missed(key, missed);
        }
    }
    effects::apply(core);
}

/// Starts the background tasks that read cgroups and facts.
pub(super) fn start_readers(core: &mut Core) {
    let wanted = std::mem::take(&mut core.proc_reads.cgroups);
    if !wanted.is_empty() {
        // In the background: the kernel makes the file under a lock that a slow change of cgroups holds.
        let (proc_reader, tx) = (core.proc_reader.clone(), core.messages.clone());
        core.background.spawn_blocking(move || {
            let all = wanted.into_iter().map(|(k, id)| proc_reader.cgroup(k, id)).collect();
            let _ = tx.send(Message::Cgroups(all));
        });
    }
    let wanted = std::mem::take(&mut core.proc_reads.facts);
    for keys in wanted.chunks(FACTS_BATCH) {
        let (keys, proc_reader, tx) = (keys.to_vec(), core.proc_reader.clone(), core.messages.clone());
        let turns = core.proc_reads.fact_readers.clone();
        core.background.spawn(async move {
            // As many at a time as there are processors, so that the core keeps its own. Readers that are blocked delay the others by
            // no more than this.
            let turn = tokio::time::timeout(FACTS_WAIT, turns.acquire_owned()).await;
            tokio::task::spawn_blocking(move || {
                let all = keys.into_iter().map(|k| (k, proc_reader.facts(k))).collect();
                let _ = tx.send(Message::Facts(all));
                drop(turn);
            });
        });
    }
}
