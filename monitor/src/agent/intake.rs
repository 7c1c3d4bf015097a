//! Reads the ring: every record goes to the engine and to the feed of `events`.

use super::core::Core;
use super::effects;
use crate::engine::{Effect, Input};
use crate::model::event::{self, Body, Event};
use crate::sources::host;
use crate::sources::kernel::Ring;

/// Records that are expected together, and handled with one reading of the clock.
const BATCH: usize = 64;
/// Most records that one drain handles, so that a flood does not starve the rest of the event loop.
pub(super) const DRAIN_MAX: usize = 128 * BATCH;
/// Turns without a record in which a record that is being written at the ring's head is waited for.
const SPINS: usize = 1_000;

/// Reads what is in the ring, up to a bound of its own. A job is labelled at once, and its exec record is kept in the ring until its
/// registration is saved: after a SIGKILL in between, the record comes again. Nothing waits for the disk: records behind a kept one are
/// read all the same.
pub(super) fn drain(core: &mut Core, ring: &mut Ring) -> usize {
    core.release_saved(ring);
    let mut forkers = Vec::new();
    let mut read = 0;
    while read < DRAIN_MAX {
        // Reading the clock costs more than handling a record.
        let now = host::boot_now();
        forkers.clear();
        forkers.extend(ring.unread().take(BATCH).filter_map(event::forker));
        core.engine.expect(&forkers);
        let batch = ring.drain_keeping(BATCH, &mut |bytes| match event::decode(bytes) {
            Ok(e) => record(core, &e, bytes, now),
            Err(e) => {
                tracing::error!(error = %e, "a record of the ring is unreadable");
                None
            }
        });
        read += batch;
        if batch < BATCH {
            break;
        }
    }
    effects::apply(core);
    read
}

/// Reads the ring up to its current head. False: a record in it is being written all the while.
pub(super) fn catch_up(core: &mut Core, ring: &mut Ring) -> bool {
    let (_, until) = core.kernel.ring_positions();
    let mut idle = 0;
    while ring.position() < until {
        if drain(core, ring) == 0 {
            idle += 1;
            if idle > SPINS {
                return false;
            }
            std::thread::yield_now();
        }
    }
    true
}

/// Returns the number of the state that must be saved before the record is released, if it registered a job.
fn record(core: &mut Core, e: &Event<'_>, bytes: &[u8], now: u64) -> Option<u64> {
    core.read_to = e.at;
    core.counts.events[usize::from(e.kind())] += 1;
    // A record from before the start did not lag: it waited in the pinned ring for an agent.
    if e.at >= core.started {
        core.counts.event_lag.observe(now.saturating_sub(e.at) as f64 / 1e9);
    }
    let context = core.engine.event_context(e);
    let before = core.feed.chain(core.engine.named_jobs(e.process));
    let first = core.queue.effects.len();
    core.handle_at(Input::Record { event: e, bytes }, e.at);
    // A fork's child is in its jobs only now, a reaped process only before.
    let jobs = before.or_else(|| core.feed.chain(core.engine.named_jobs(e.process)));
    if !matches!(e.body, Body::Reap { .. }) || core.reaps.record_seen(e.process) {
        core.feed.publish(e, bytes, context, jobs, &core.engine.event_formatter(&core.redact));
    }
    let new = &core.queue.effects[first..];
    let registers = new.iter().any(|f| matches!(f, Effect::LabelJob(_)));
    if registers || new.iter().any(|f| matches!(f, Effect::EnterProcess { .. })) {
        effects::apply(core);
    }
    registers.then(|| core.unsaved())
}
