//! The one task that owns the engine. Each turn hands it one kind of input (records of the ring, a request, a message, the time), then
//! empties the queue of what the engine wants done. Everything slow (reading a process's memory, killing, explaining, sending) runs in
//! the background and comes back as a [`Message`], so the ring is always read in time.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::core::Core;
use super::message::Message;
use super::options::AgentError;
use super::{alert_causes, effects, intake, kills, messages, proc_poll, requests};
use crate::api::Request;
use crate::engine::Input;
use crate::sources::host;
use crate::sources::kernel::Ring;

/// How often the loss counters are read, and the periodic work is done.
const CHECK: Duration = Duration::from_secs(1);

/// The core before its first turn, and the channels that it reads.
pub(super) struct EventLoop {
    pub core: Core,
    pub requests: mpsc::Receiver<Request>,
    pub messages: mpsc::UnboundedReceiver<Message>,
    pub stop: watch::Receiver<bool>,
    pub reload: mpsc::Receiver<()>,
}

impl EventLoop {
    /// Runs until `stop` is set.
    pub(super) async fn run(self) -> Result<(), AgentError> {
        let Self { mut core, mut requests, mut messages, mut stop, mut reload } = self;
        // Here, because the ring wakes the runtime in which it is made.
        let mut ring = core.kernel.take_ring().map_err(AgentError::Ring)?;
        core.first_sync(&mut ring)?;
        kills::resume_all(&mut core);
        settle(&mut core, &mut ring);
        let mut check = tokio::time::interval(CHECK);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // However busy the ring is, each turn handles one request: a fork bomb must not delay the kill that ends it.
            if let Ok(r) = requests.try_recv() {
                request(&mut core, r, &mut ring);
            }
            if let Ok(m) = messages.try_recv() {
                message(&mut core, m, &mut ring);
            }
            let wake = next_wake(&core);
            tokio::select! {
                r = stop.changed() => {
                    if r.is_err() || *stop.borrow() { break }
                }
                r = ring.readable() => {
                    r.map_err(AgentError::Ring)?;
                    intake::drain(&mut core, &mut ring);
                }
                Some(m) = messages.recv() => message(&mut core, m, &mut ring),
                Some(r) = requests.recv() => request(&mut core, r, &mut ring),
                () = at(wake) => drop(core.handle(Input::Tick)),
                () = at(core.sync.resync_at) => core.resync("loss", &mut ring),
                _ = check.tick() => each_second(&mut core, &mut ring),
                Some(()) = reload.recv() => requests::request_reload(&mut core, None, None),
            }
            settle(&mut core, &mut ring);
        }
        core.service_manager.stopping();
        intake::drain(&mut core, &mut ring);
        settle(&mut core, &mut ring);
        end(core).await;
        Ok(())
    }
}

fn request(core: &mut Core, r: Request, ring: &mut Ring) {
    // Drain the ring first, so that replies are linearizable.
    intake::drain(core, ring);
    requests::handle(core, r);
    effects::apply(core);
}

fn message(core: &mut Core, m: Message, ring: &mut Ring) {
    if matches!(m, Message::Scrape(_)) {
        intake::drain(core, ring);
    }
    messages::handle(core, m);
    effects::apply(core);
}

fn next_wake(core: &Core) -> Option<Instant> {
    let wake = if core.proc_reads.looks.is_empty() { core.engine.next_wake()? } else { 0 };
    Some(Instant::now() + Duration::from_nanos(wake.saturating_sub(host::boot_now())))
}

/// At the end of each turn: empties the queue, and starts what was only collected.
fn settle(core: &mut Core, ring: &mut Ring) {
    effects::apply(core);
    proc_poll::look(core, ring);
    core.count_emptied(ring);
    proc_poll::start_readers(core);
}

fn each_second(core: &mut Core, ring: &mut Ring) {
    core.service_manager.alive();
    core.handle(Input::Clock { boot_to_wall_ns: host::boot_to_wall().cast_signed() });
    core.engine.flush();
    // A doom that was not renewed has expired in the kernel; its probe slows down every system call until it is detached.
    if core.kernel.doom_attached()
        && let Err(e) = core.kernel.attach_while_doomed()
    {
        tracing::error!(error = %e, "sys_enter could not be detached");
    }
    if !core.sync.carried {
        core.carry_over(ring);
    }
    let unseen = std::mem::take(&mut core.sync.unseen);
    if !unseen.is_empty() {
        tracing::warn!(processes = unseen.len(), "/proc could not be read, trying again");
        core.proc_reads.looks.extend(unseen);
    }
    core.reaps.announce_overdue(&core.engine, &core.redact, &mut core.feed, host::boot_now());
    core.enter_waiting();
    core.check_storage();
    core.release_saved(ring);
    alert_causes::renew(core);
    if let Some(totals) = core.totals() {
        core.sweep(&totals);
        if core.count_lost(&totals) {
            core.sync.resync_at.get_or_insert_with(Instant::now);
        }
    }
}

async fn end(mut core: Core) {
    // Pins stay after a clean stop, and no agent is left that renews or ends a doom.
    if let Err(e) = core.kernel.stop_dooms() {
        tracing::error!(error = %e, "the dooms in force could not be ended; they expire by themselves");
    }
    // Clients are told that the agent stops; only a crash leaves a kill to be resumed.
    core.kills.clear();
    core.save_last().await;
    for (_, alert) in std::mem::take(&mut core.awaiting_cause) {
        effects::submit(&core, alert);
    }
    if let Err(e) = core.engine.finish() {
        tracing::error!(error = %e, "the recording could not be finished");
    }
}

/// A time that may never come.
async fn at(when: Option<Instant>) {
    match when {
        Some(t) => tokio::time::sleep_until(t).await,
        None => std::future::pending().await,
    }
}
