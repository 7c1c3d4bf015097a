//! Who watches while the load runs: jobwarden's agent, or one of its peers. Each is started, waited for until it is
//! attached, and stopped when dropped.

use std::ffi::CString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::stop::going_on;

/// A peer: its name, the programs and their arguments, and how many events it tells of one life.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) commands: &'static [&'static [&'static str]],
    pub(crate) events: f64,
}

/// The one that Debian's python3-psutil is for, whatever else is in PATH.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Of ours: fork, exec, exit, reap.
pub(crate) const EVENTS: f64 = 4.0;

/// What Debian has and this kernel runs. bpftrace prints a line an event, as jobwarden reports each.
pub(crate) const PEERS: [Peer; 3] = [
    Peer {
        name: "bpftrace",
        commands: &[&[
            "bpftrace",
            "-e",
            "tracepoint:sched:sched_process_fork { printf(\"f %d %d\\n\", args->parent_pid, args->child_pid); } \
             tracepoint:sched:sched_process_exec { printf(\"e %d %s\\n\", pid, str(args->filename)); } \
             tracepoint:sched:sched_process_exit { printf(\"x %d %s\\n\", pid, comm); }",
        ]],
        events: 3.0,
    },
    Peer { name: "execsnoop + exitsnoop", commands: &[&["execsnoop"], &["exitsnoop"]], events: 2.0 },
    Peer { name: "forkstat", commands: &[&["forkstat", "-e", "fork,exec,exit"]], events: 3.0 },
];

impl Peer {
    /// It has no probes: it reads the process connector.
    pub(crate) fn probes(&self) -> bool {
        self.name != "forkstat"
    }
}

/// A folder of its own under the system's for temporary files, removed when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("jobwarden-bench-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left under /tmp is told by the system's own cleaning.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A mount, undone when dropped. All of them are in a mount namespace of the benchmark's own, and gone with it at the latest.
pub(crate) struct Mount(CString);

impl Mount {
    pub(crate) fn new(kind: &str, at: &Path) -> Result<Self> {
        let (kind, at) = (CString::new(kind)?, CString::new(at.as_os_str().as_bytes())?);
        // SAFETY: three strings that end, no flags, no data.
        let done = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
        ensure!(done == 0, "mount {}: {}", at.to_string_lossy(), std::io::Error::last_os_error());
        Ok(Self(at))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // SAFETY: a string that ends. Detached, so that one who still looks into it keeps nobody waiting.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

/// From here on mounts are seen by this process and its children only.
pub(crate) fn own_mounts() -> Result<()> {
    // SAFETY: plain calls; null where the kernel ignores it.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
    };
    ensure!(done, "a mount namespace: {}", std::io::Error::last_os_error());
    Ok(())
}

/// tracefs, without which the peers find no tracepoint: mounted where it is not.
pub(crate) fn tracefs() -> Option<Mount> {
    let at = Path::new("/sys/kernel/tracing");
    // Where that fails, the peers say so.
    if at.join("events").exists() { None } else { Mount::new("tracefs", at).ok() }
}

/// The child ends with this process, whatever ends it.
pub(crate) fn bound(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

/// The programs of one watcher, running.
pub(crate) struct Watch {
    children: Vec<Child>,
    _folder: Folder,
}

impl Watch {
    /// Starts a peer and waits until it has attached what it attaches.
    pub(crate) fn peer(peer: &Peer) -> Result<Self> {
        going_on()?;
        let folder = Folder::new()?;
        let log = folder.0.join("log");
        let mut watch = Self { children: Vec::new(), _folder: folder };
        for args in peer.commands {
            let program = located(args[0])?;
            let mut command = Command::new(program);
            command.args(&args[1..]).stdin(Stdio::null()).stdout(Stdio::null());
            bound(&mut command);
            watch.children.push(command.stderr(fs::File::create(&log)?).spawn()?);
        }
        let end = Instant::now() + Duration::from_secs(10);
        // As long as nothing is added to it for this long, it is attached.
        let (mut seen, mut since) = (0, Instant::now());
        while since.elapsed() < Duration::from_millis(400) || (seen == 0 && peer.probes()) {
            std::thread::sleep(Duration::from_millis(50));
            let now = watch.children.iter().map(|c| descriptors(c.id())).sum();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            for child in &mut watch.children {
                if let Some(status) = child.try_wait()? {
                    let said = fs::read_to_string(&log).unwrap_or_default();
                    let last = said.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("it said nothing");
                    bail!("does not run here: {status}: {}", last.trim());
                }
            }
            ensure!(Instant::now() < end, "attached nothing within 10 s");
        }
        Ok(watch)
    }

    /// Nanoseconds that its probes ran, as the kernel counts them where `kernel.bpf_stats_enabled` is on.
    pub(crate) fn probe_ns(&self) -> u64 {
        self.children.iter().map(|c| probe_ns(c.id())).sum()
    }

    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.children.iter().map(|c| cpu(c.id())).sum()
    }
}

/// A program that serves metrics, as a peer of the scrape.
pub(crate) struct Exporter {
    child: Child,
    listen: SocketAddr,
    _folder: Folder,
}

impl Exporter {
    /// Every process in a group by its name, threads and smaps left out: the least that it can do.
    pub(crate) fn start() -> Result<Self> {
        let program = located("prometheus-process-exporter")?;
        let folder = Folder::new()?;
        let (config, log) = (folder.0.join("all.yml"), folder.0.join("log"));
        fs::write(&config, "process_names:\n  - name: \"{{.Comm}}\"\n    cmdline: ['.+']\n")?;
        let listen = free()?;
        let mut command = Command::new(program);
        command
            .args(["-threads=false", "-gather-smaps=false", "-web.listen-address", &listen.to_string()])
            .arg("-config.path")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        bound(&mut command);
        let mut exporter = Self { child: command.spawn()?, listen, _folder: folder };
        let end = Instant::now() + Duration::from_secs(20);
        while exporter.scrape().is_err() {
            if let Some(status) = exporter.child.try_wait()? {
                let said = fs::read_to_string(&log).unwrap_or_default();
                bail!("does not run here: {status}: {}", said.lines().last().unwrap_or("it said nothing"));
            }
            ensure!(Instant::now() < end, "served nothing within 20 s");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(exporter)
    }

    pub(crate) fn scrape(&self) -> Result<()> {
        let page = fetch(self.listen, "/metrics")?;
        ensure!(page.contains("namedprocess_namegroup_num_procs{"), "its page has no processes");
        Ok(())
    }

    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu(self.child.id())
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        terminate(&mut self.child);
    }
}

/// The whole answer to a GET.
pub(crate) fn fetch(at: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "{path} is not answered with 200");
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

impl Drop for Watch {
    fn drop(&mut self) {
        for child in &mut self.children {
            terminate(child);
        }
    }
}

/// The agent on its defaults, with folders and a bpffs of its own.
pub(crate) struct Agent {
    child: Child,
    pub(crate) listen: SocketAddr,
    binary: PathBuf,
    /// From its start to the first `/readyz` 200.
    pub(crate) ready_in: Duration,
    _bpffs: Mount,
    folder: Folder,
}

impl Agent {
    pub(crate) fn start(binary: &Path) -> Result<Self> {
        Self::with(binary, "")
    }

    pub(crate) fn with(binary: &Path, config: &str) -> Result<Self> {
        going_on()?;
        let folder = Folder::new()?;
        let path = |name| folder.0.join(name);
        fs::write(path("jobwarden.toml"), config)?;
        fs::create_dir(path("bpf"))?;
        let bpffs = Mount::new("bpf", &path("bpf"))?;
        let listen = free()?;
        let mut command = Command::new(binary);
        command.args(["agent", "--listen", &listen.to_string()]);
        for (flag, name) in [
            ("--config", "jobwarden.toml"),
            ("--state-dir", "state"),
            ("--socket", "sock"),
            ("--bpffs", "bpf"),
        ] {
            command.arg(flag).arg(path(name));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(path("log"))?);
        bound(&mut command);
        let begun = Instant::now();
        let child = command.spawn().context("the agent could not be started")?;
        let binary = binary.to_path_buf();
        let mut agent = Self { child, listen, binary, ready_in: Duration::ZERO, _bpffs: bpffs, folder };
        while fetch(listen, "/readyz").is_err() {
            if let Some(status) = agent.child.try_wait()? {
                let log = fs::read_to_string(agent.folder.0.join("log")).unwrap_or_default();
                bail!("the agent ended with {status}: {log}");
            }
            ensure!(begun.elapsed() < Duration::from_secs(30), "the agent was not ready within 30 s");
            std::thread::sleep(Duration::from_millis(1));
        }
        agent.ready_in = begun.elapsed();
        Ok(agent)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu(self.pid())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--socket").arg(self.folder.0.join("sock")).args(args).stdin(Stdio::null());
        command
    }

    /// The sum over all series of a metric whose labels contain `with`; 0 where there is none.
    pub(crate) fn metric(&self, name: &str, with: &str) -> Result<f64> {
        let text = fetch(self.listen, "/metrics")?;
        let of = |line: &str| -> Option<f64> {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            let fits = labels.is_empty() || labels.starts_with('{');
            (fits && labels.contains(with)).then(|| value.parse().ok()).flatten()
        };
        Ok(text.lines().filter_map(of).sum())
    }

    /// Nanoseconds that its probes ran. (Pinned, they need not stand among its descriptors.)
    pub(crate) fn probe_ns(&self) -> Result<f64> {
        Ok(self.metric("jobwarden_probe_runtime_seconds_total", "")? * 1e9)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Before its folder and its bpffs go.
        terminate(&mut self.child);
    }
}

/// SIGTERM, and SIGKILL where that does not end it in 5 s.
pub(crate) fn terminate(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
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

/// Debian's libbpf-tools are in /usr/sbin.
pub(crate) fn located(program: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').map(|dir| Path::new(dir).join(program)).find(|p| p.exists());
    found.with_context(|| format!("{program} is not installed and could not be"))
}

fn fdinfo(pid: u32) -> impl Iterator<Item = String> {
    let dir = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    dir.into_iter().flatten().flatten().map(|e| fs::read_to_string(e.path()).unwrap_or_default())
}

/// How many descriptors of programs and of what they are attached by it has.
fn descriptors(pid: u32) -> usize {
    fdinfo(pid).filter(|t| t.contains("prog_id:") || t.contains("link_id:")).count()
}

/// The run times in /proc/PID/fdinfo of a process's programs, each program once.
fn probe_ns(pid: u32) -> u64 {
    let mut seen = Vec::new();
    let mut sum = 0;
    for text in fdinfo(pid) {
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

/// CPU time of a process with all its threads, those that have ended too.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both are valid for writing.
    let done = unsafe {
        libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    ensure!(done, "the CPU clock of {pid}: {}", std::io::Error::last_os_error());
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// How often the threads of a process went to sleep.
pub(crate) fn sleeps(pid: u32) -> Result<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    Ok(tasks.map(|t| status_field(&t.path().join("status"), "voluntary_ctxt_switches:")).sum())
}

pub(crate) fn resident_kib(pid: u32) -> u64 {
    status_field(Path::new(&format!("/proc/{pid}/status")), "VmRSS:")
}

fn status_field(file: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|l| l.strip_prefix(name));
    value.and_then(|v| v.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
