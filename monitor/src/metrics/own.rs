//! The agent's own cost, as the `process_*` metrics that every Prometheus client library exports.

use crate::metrics::encode::Encoder;
use crate::sources::proc::Proc;

/// Writes `process_cpu_seconds_total` and its kin. What cannot be read is left out rather than given as 0.
pub fn encode(e: &mut Encoder, proc: &Proc, boot_to_wall_ns: u64) {
    let pid = std::process::id();
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    if let Ok(stat) = proc.stat(pid) {
        e.counter("process_cpu_seconds_total", "User and system CPU time of the agent, in seconds.")
            .sample(&[], stat.cpu_ticks as f64 / ticks);
        e.gauge("process_start_time_seconds", "When the agent started, in seconds since the epoch.")
            .sample(&[], boot_to_wall_ns as f64 / 1e9 + stat.start_ticks as f64 / ticks);
    }
    if let Some(pages) = std::fs::read_to_string(proc.path(pid, "statm"))
        .ok()
        .and_then(|s| s.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
    {
        e.gauge("process_resident_memory_bytes", "Resident memory of the agent.")
            .sample(&[], (pages * rustix::param::page_size() as u64) as f64);
    }
    if let Ok(dir) = std::fs::read_dir(proc.path(pid, "fd")) {
        e.gauge("process_open_fds", "Open file descriptors of the agent.").sample(&[], dir.count() as f64);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    e.gauge("process_max_fds", "Most file descriptors that the agent may open.")
        .sample(&[], limit.current.map_or(f64::INFINITY, |n| n as f64));
}
