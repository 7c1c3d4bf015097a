//! The contract's table of metrics, family by family. All series are there from the start, with 0 where nothing happened
//! yet: a rate over a series that appears with its first event misses that event.

use super::encode::Encoder;
use super::{Counts, Kernel, Notifications, kinds};
use crate::engine::Gauges;
use crate::model::kill::Reason;
use crate::model::schema::{AlertKind, AlertState, SignalledOutcome};
use crate::model::signal;
use crate::model::stats::{Outcome, StoreNumbers, alert_state_label};

const JOB_STATES: [&str; 5] = ["running", "lingering", "expired", "killing", "done"];
const SIGNALS: [u8; 3] = [libc::SIGTERM as u8, libc::SIGCONT as u8, libc::SIGKILL as u8];
const OUTCOMES: [SignalledOutcome; 4] = [
    SignalledOutcome::Ended,
    SignalledOutcome::AlreadyGone,
    SignalledOutcome::Survived,
    SignalledOutcome::Spared,
];

fn bit(b: bool) -> f64 {
    f64::from(u8::from(b))
}

pub(super) fn core(e: &mut Encoder, g: &Gauges, c: &Counts, outside: &[StoreNumbers]) {
    e.gauge("jobwarden_processes", "Processes by state, kernel threads apart.");
    for state in ["running", "leader_exited", "exiting", "zombie"] {
        e.sample(&[("state", state)], g.processes.get(state).copied().unwrap_or(0) as f64);
    }
    e.gauge("jobwarden_zombies", "Zombies by job; an empty job_name is outside of jobs.");
    for (name, j) in &g.jobs {
        e.sample(&[("job_name", name)], j.zombies as f64);
    }
    e.gauge("jobwarden_orphans", "Orphans by job; an empty job_name is outside of jobs.");
    for (name, j) in &g.jobs {
        e.sample(&[("job_name", name)], j.orphans as f64);
    }
    e.gauge("jobwarden_unreaping_parents", "Processes that have at least one zombie child now.")
        .sample(&[], g.unreaping_parents as f64);
    e.gauge("jobwarden_oldest_zombie_age_seconds", "Age of the oldest zombie; 0 when there is none.")
        .sample(&[], g.oldest_zombie_age_s);
    let jobs = || g.jobs.iter().filter(|(name, _)| !name.is_empty());
    e.gauge("jobwarden_jobs", "Jobs by name and state.");
    for (name, j) in jobs() {
        for state in JOB_STATES {
            let n = j.states.get(state).copied().unwrap_or(0);
            e.sample(&[("job_name", name), ("state", state)], n as f64);
        }
    }
    e.counter("jobwarden_jobs_finished_total", "Jobs that ended, by how.");
    for (name, j) in jobs() {
        for outcome in Outcome::ALL {
            let n = j.finished.get(&outcome).copied().unwrap_or(0);
            e.sample(&[("job_name", name), ("outcome", outcome.as_str())], n as f64);
        }
    }
    e.histogram("jobwarden_job_duration_seconds", "From the root's start to the job's end.");
    for (name, j) in jobs() {
        e.buckets(&[("job_name", name)], &j.duration);
    }
    e.histogram("jobwarden_reap_delay_seconds", "From the exit of a process to its reap.")
        .buckets(&[], &g.reap_delay);
    e.histogram("jobwarden_event_lag_seconds", "From the probe to the forest.").buckets(&[], &c.event_lag);
    e.counter("jobwarden_resyncs_total", "Snapshots taken, by reason.");
    for reason in ["start", "loss", "request"] {
        e.sample(&[("reason", reason)], c.resyncs.get(reason).copied().unwrap_or(0) as f64);
    }
    e.counter(
        "jobwarden_lineage_inserts_failed_total",
        "Processes for which the kernel's lineage map had no room; each is tried again.",
    )
    .sample(&[], c.lineage_inserts_failed as f64);
    e.gauge("jobwarden_synced", "1 when the forest is known to equal the kernel's truth.")
        .sample(&[], bit(c.synced));
    let reads = crate::sources::proc::blocking::numbers();
    e.gauge(
        "jobwarden_blocked_reads",
        "Reads of processes that do not come back: their memory holds up its readers.",
    )
    .sample(&[], reads.blocked as f64);
    e.counter("jobwarden_reads_timed_out_total", "Reads of processes that did not come back in time.")
        .sample(&[], reads.timed_out as f64);
    e.counter(
        "jobwarden_reads_refused_total",
        "Reads of processes that were not begun, because reads of that process or user, or too many, are blocked.",
    )
    .sample(&[], reads.refused as f64);
    e.gauge("jobwarden_store_entries", "Entries in each bounded table.");
    for s in g.stores.iter().chain(outside) {
        e.sample(&[("store", s.store)], s.entries as f64);
    }
    e.gauge("jobwarden_store_max_entries", "The bound of each table.");
    for s in g.stores.iter().chain(outside) {
        e.sample(&[("store", s.store)], s.max as f64);
    }
    e.counter("jobwarden_store_evictions_total", "Entries that a full table had to give up.");
    for s in g.stores.iter().chain(outside) {
        e.sample(&[("store", s.store)], s.evictions as f64);
    }
    e.gauge("jobwarden_alerts", "Alerts by kind and state.");
    for kind in AlertKind::ALL {
        for state in [AlertState::Pending, AlertState::Firing] {
            let state = alert_state_label(state);
            let n = g.alerts.get(&(kind, state)).copied().unwrap_or(0);
            e.sample(&[("kind", kind.as_str()), ("state", state)], n as f64);
        }
    }
    e.counter("jobwarden_alerts_fired_total", "Alerts that began to fire.");
    for kind in AlertKind::ALL {
        e.sample(&[("kind", kind.as_str())], g.alerts_fired.get(&kind).copied().unwrap_or(0) as f64);
    }
    e.counter("jobwarden_signals_sent_total", "Signals sent by the agent, by what became of the process.");
    let seen = c.signals_sent.keys().map(|k| k.0).chain(c.signals_passed.keys().copied());
    for signal in SIGNALS.into_iter().chain(seen).collect::<std::collections::BTreeSet<u8>>() {
        for outcome in OUTCOMES {
            let n = c.signals_sent.get(&(signal, outcome)).copied().unwrap_or(0);
            // Metrics have underscores where JSON has hyphens.
            let outcome = outcome.as_str().replace('-', "_");
            e.sample(&[("signal", &signal::name(signal)), ("outcome", &outcome)], n as f64);
        }
        // What `exec` was sent and passed on to its job: nobody waits for what comes of it.
        let n = c.signals_passed.get(&signal).copied().unwrap_or(0);
        e.sample(&[("signal", &signal::name(signal)), ("outcome", "passed_on")], n as f64);
    }
    e.counter("jobwarden_job_kills_total", "Jobs that were ended, by why and whether it worked.");
    for reason in Reason::ALL {
        for outcome in ["ended", "survived"] {
            let n = c.job_kills.get(&(reason, outcome)).copied().unwrap_or(0);
            e.sample(&[("reason", reason.as_str()), ("outcome", outcome)], n as f64);
        }
    }
    e.gauge("jobwarden_enforcement_enabled", "1 when the policy may kill.")
        .sample(&[], bit(g.enforcement_enabled));
    e.gauge(
        "jobwarden_enforcement_fuse_open",
        "1 when too many jobs were ended and the policy stopped killing.",
    )
    .sample(&[], bit(g.fuse_open));
    e.gauge("jobwarden_config_last_reload_successful", "1 when the last config read was accepted.")
        .sample(&[], bit(c.reload_ok));
    e.gauge("jobwarden_config_last_reload_success_timestamp_seconds", "When a config was last accepted.")
        .sample(&[], c.reload_at);
}

pub(super) fn kernel(e: &mut Encoder, c: &Counts, k: &Kernel) {
    let mut by_kind = |name: &str, help: &str, of: &dyn Fn(usize) -> u64| {
        e.counter(name, help);
        for (i, kind) in kinds() {
            e.sample(&[("kind", kind)], of(i) as f64);
        }
    };
    // A counter that falls to 0 for one scrape would be taken for a restart.
    if let Some(counters) = &k.counters {
        by_kind("jobwarden_probe_hits_total", "What the probes saw: sent + lost + filtered.", &|i| {
            counters[i].hits
        });
        by_kind("jobwarden_events_sent_total", "Records written to the ring.", &|i| counters[i].sent);
        by_kind("jobwarden_events_filtered_total", "What a mask kept out of the ring.", &|i| {
            counters[i].filtered
        });
        by_kind(
            "jobwarden_events_lost_total",
            "Records that were lost: the ring had no room, or the kernel skipped the probe.",
            &|i| counters[i].lost,
        );
    }
    by_kind("jobwarden_events_total", "Records received from the ring.", &|i| c.events[i]);
    e.gauge("jobwarden_ring_used_bytes", "Bytes in the ring that are not read yet.")
        .sample(&[], k.ring_used as f64);
    e.gauge("jobwarden_ring_size_bytes", "Size of the ring.").sample(&[], k.ring_size as f64);
    if let Some(kills) = &k.kills {
        e.counter("jobwarden_kernel_kills_total", "SIGKILLs that the probes sent into doomed jobs.")
            .sample(&[], kills.ok as f64);
    }
    if !k.probes.is_empty() {
        e.gauge("jobwarden_probe_attached", "1 for each probe that is attached.");
    }
    for p in &k.probes {
        e.sample(&[("probe", &p.name)], bit(p.attached));
    }
    // Only where `kernel.bpf_stats_enabled` is on: absent is not zero.
    if k.probes.iter().any(|p| p.run.is_some()) {
        e.counter("jobwarden_probe_runtime_seconds_total", "Time spent in each probe.");
        for (p, run) in k.probes.iter().filter_map(|p| Some((p, p.run?))) {
            e.sample(&[("probe", &p.name)], run.0);
        }
        e.counter("jobwarden_probe_runs_total", "Runs of each probe.");
        for (p, run) in k.probes.iter().filter_map(|p| Some((p, p.run?))) {
            e.sample(&[("probe", &p.name)], run.1 as f64);
        }
    }
}

pub(super) fn notifications(e: &mut Encoder, all: &[Notifications]) {
    let mut each = |name: &str, help: &str, counter: bool, of: &dyn Fn(&Notifications) -> u64| {
        if counter {
            e.counter(name, help);
        } else {
            e.gauge(name, help);
        }
        for n in all {
            e.sample(&[("receiver", &n.receiver)], of(n) as f64);
        }
    };
    each("jobwarden_notifications_total", "Deliveries that a receiver took.", true, &|n| n.sent);
    each("jobwarden_notifications_pending", "Notifications waiting to be delivered.", false, &|n| n.pending);
    each("jobwarden_notifications_parked", "Notifications that a receiver refused for good.", false, &|n| {
        n.parked
    });
    each(
        "jobwarden_notifications_dropped_total",
        "Notifications given up: too old or too many.",
        true,
        &|n| n.dropped,
    );
    e.counter("jobwarden_notifications_failed_total", "Attempts that failed, by reason.");
    for n in all {
        for (reason, count) in &n.failed {
            e.sample(&[("receiver", &n.receiver), ("reason", reason)], *count as f64);
        }
    }
    e.histogram("jobwarden_notification_duration_seconds", "How long one delivery took.");
    for n in all {
        e.buckets(&[("receiver", &n.receiver)], &n.duration);
    }
}
