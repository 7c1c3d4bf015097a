//! Who watches while the load runs: jobwarden's agent, or one of its peers. Each is started, waited for until it is
//! attached, and stopped when dropped.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::get;

/// A peer: its name, the programs and their arguments.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) commands: &'static [&'static [&'static str]],
}

/// What Debian has and this kernel runs. bpftrace prints a line an event, as jobwarden reports each.
pub(super) const PEERS: [Peer; 3] = [
    Peer {
        name: "bpftrace",
        commands: &[&[
            "bpftrace",
            "-e",
            "tracepoint:sched:sched_process_fork { printf(\"f %d %d\\n\", args->parent_pid, args->child_pid); } \
             tracepoint:sched:sched_process_exec { printf(\"e %d %s\\n\", pid, str(args->filename)); } \
             tracepoint:sched:sched_process_exit { printf(\"x %d %s\\n\", pid, comm); }",
        ]],
    },
    Peer { name: "execsnoop + exitsnoop", commands: &[&["execsnoop"], &["exitsnoop"]] },
    Peer { name: "forkstat", commands: &[&["forkstat", "-e", "fork,exec,exit"]] },
];

/// The programs of one watcher, running.
pub(super) struct Watch {
    children: Vec<Child>,
}

impl Watch {
    /// Starts a peer and gives it the time to attach.
    pub(super) fn peer(peer: &Peer) -> Result<Self> {
        let mut children = Vec::new();
        for args in peer.commands {
            let program = located(args[0]).with_context(|| format!("{} is not installed", args[0]))?;
            let child = Command::new(program)
                .args(&args[1..])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            children.push(child);
        }
        let mut watch = Self { children };
        std::thread::sleep(Duration::from_millis(2500));
        for child in &mut watch.children {
            if let Some(status) = child.try_wait()? {
                bail!("{} does not run here: it ended with {status}", peer.name);
            }
        }
        Ok(watch)
    }

    /// Nanoseconds that its probes ran, as the kernel counts them where `kernel.bpf_stats_enabled` is on.
    pub(super) fn probe_ns(&self) -> u64 {
        self.children.iter().map(|c| probe_ns(c.id())).sum()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for child in &mut self.children {
            terminate(child);
        }
    }
}

/// The agent in a folder of its own.
pub(super) struct Agent {
    child: Child,
    pub(super) listen: SocketAddr,
    pub(super) binary: PathBuf,
    folder: PathBuf,
    /// From its start to the first `/readyz` 200.
    pub(super) ready_in: Duration,
}

impl Agent {
    pub(super) fn start(binary: &Path) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("jobwarden-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let config = folder.join("jobwarden.toml");
        fs::write(&config, "")?;
        let listen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let begun = Instant::now();
        let child = Command::new(binary)
            .args(["agent", "--no-pin", "--listen", &listen.to_string(), "--config"])
            .arg(&config)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--socket")
            .arg(folder.join("sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("log"))?)
            .spawn()
            .context("the agent could not be started")?;
        let mut agent =
            Self { child, listen, binary: binary.to_path_buf(), folder, ready_in: Duration::ZERO };
        while get(listen, "/readyz").is_none_or(|a| !a.starts_with("HTTP/1.1 200")) {
            if let Some(status) = agent.child.try_wait()? {
                let log = fs::read_to_string(agent.folder.join("log")).unwrap_or_default();
                bail!("the agent ended with {status}: {log}");
            }
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("the agent was not ready within 30 s");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        agent.ready_in = begun.elapsed();
        Ok(agent)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--socket").arg(self.folder.join("sock")).args(args).stdin(Stdio::null());
        command
    }

    /// The sum over all series of a metric whose labels contain `with`; 0 where there is none.
    pub(super) fn metric(&self, name: &str, with: &str) -> f64 {
        let text = get(self.listen, "/metrics").unwrap_or_default();
        let of = |line: &str| -> Option<f64> {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            let fits = labels.is_empty() || labels.starts_with('{');
            (fits && labels.contains(with)).then(|| value.parse().ok()).flatten()
        };
        text.lines().filter_map(of).sum()
    }

    pub(super) fn probe_ns(&self) -> u64 {
        probe_ns(self.pid())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        terminate(&mut self.child);
        // What is left under /tmp is told by the system's own cleaning.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// SIGTERM, and SIGKILL where that does not end it in 5 s.
fn terminate(child: &mut Child) {
    // SAFETY: the child is ours and not reaped yet, so its pid is nobody else's.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
    let end = Instant::now() + Duration::from_secs(5);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    // Both fail only when it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// tracefs, without which the peers find no tracepoint: mounted where it is not, unmounted when dropped.
pub(super) struct Tracefs(bool);

const TRACEFS: &str = "/sys/kernel/tracing";

impl Tracefs {
    pub(super) fn mounted() -> Self {
        let there = Path::new(TRACEFS).join("events").exists();
        let mount = || Command::new("mount").args(["-t", "tracefs", "tracefs", TRACEFS]).status();
        Self(!there && mount().is_ok_and(|s| s.success()))
    }
}

impl Drop for Tracefs {
    fn drop(&mut self) {
        if self.0 {
            // A peer that still holds it open is being stopped; then it stays, which harms nobody.
            let _ = Command::new("umount").arg(TRACEFS).status();
        }
    }
}

/// Debian's libbpf-tools are in /usr/sbin.
pub(super) fn located(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':').map(|dir| Path::new(dir).join(program)).find(|p| p.exists())
}

/// The run times in /proc/PID/fdinfo of a process's programs, each program once.
fn probe_ns(pid: u32) -> u64 {
    let mut seen = Vec::new();
    let mut sum = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|l| l.strip_prefix(name)).and_then(|v| v.trim().parse().ok())
        };
        if let (Some(id), Some(ns)) = (field("prog_id:"), field("run_time_ns:"))
            && !seen.contains(&id)
        {
            seen.push(id);
            sum += ns;
        }
    }
    sum
}

/// What a process and its threads have used: CPU time, and how often they went to sleep.
#[derive(Clone, Copy)]
pub(super) struct Usage {
    pub(super) cpu: Duration,
    pub(super) sleeps: u64,
    pub(super) resident_kib: u64,
}

pub(super) fn usage(pid: u32) -> Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').context("stat without a name")?.1;
    let fields: Vec<u64> = after.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    // utime and stime are fields 14 and 15, in ticks of 10 ms.
    let ticks = fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0);
    let mut sleeps = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        sleeps += status_field(&task.path().join("status"), "voluntary_ctxt_switches:");
    }
    let resident_kib = status_field(Path::new(&format!("/proc/{pid}/status")), "VmRSS:");
    Ok(Usage { cpu: Duration::from_millis(ticks * 10), sleeps, resident_kib })
}

fn status_field(file: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|l| l.strip_prefix(name));
    value.and_then(|v| v.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
