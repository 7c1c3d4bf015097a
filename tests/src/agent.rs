//! The real agent in a folder of its own, and the real commands against it.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::model::schema;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, pidfd_open, pidfd_send_signal, setrlimit};
use rustix::thread::{
    CapabilitySet, capability_is_in_bounding_set, remove_capability_from_bounding_set, set_no_new_privs,
};
use serde::de::DeserializeOwned;

use crate::fixture::{self, Fixture};
use crate::metrics::Metrics;
use crate::wait::{eventually, loudly, ms};

/// What a command gave.
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n--- stdout:\n{}--- stderr:\n{}---", self.status, self.out(), self.err())
    }
}

impl Output {
    /// Exit code; None after a signal.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
    /// The output of a command that shall have ended 0, as one of the contract's types.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        ensure!(self.code() == Some(0), "it ended {:?}: {}{}", self.status, self.err(), self.out());
        self.any_json()
    }
    /// As [`Output::json`], whatever the status.
    pub fn any_json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.stdout).with_context(|| format!("{}{}", self.out(), self.err()))
    }
    /// The contract's error object of a command that failed with `--json`.
    pub fn error(&self) -> Result<schema::ErrorInfo> {
        ensure!(self.stdout.is_empty(), "an error leaves stdout empty: {}", self.out());
        let body: schema::ErrorBody =
            serde_json::from_slice(&self.stderr).with_context(|| format!("stderr: {}", self.err()))?;
        Ok(body.error)
    }
}

/// Runs a command to its end; one that takes longer than `within` is killed and is an error.
pub fn run(mut c: Command, within: Duration) -> Result<Output> {
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let reader = |r: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut v = Vec::new();
            if let Some(mut r) = r {
                let _ = r.read_to_end(&mut v);
            }
            v
        })
    };
    let stdout = reader(child.stdout.take().map(|s| Box::new(s) as _));
    let stderr = reader(child.stderr.take().map(|s| Box::new(s) as _));
    let end = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            bail!("{c:?}: did not end within {:.1} s", within.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let take = |t: std::thread::JoinHandle<Vec<u8>>| t.join().unwrap_or_default();
    Ok(Output { status, stdout: take(stdout), stderr: take(stderr) })
}

/// A TCP port that nobody listens on at this moment.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// One HTTP request to the agent's TCP port: status and body.
pub fn http(port: u16, method: &str, path: &str, headers: &str) -> Result<(u16, String)> {
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut s = TcpStream::connect_timeout(&addr, ms(1000))?;
    s.set_read_timeout(Some(ms(5000)))?;
    write!(s, "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{headers}\r\n")?;
    let mut b = Vec::new();
    s.read_to_end(&mut b)?;
    let text = String::from_utf8_lossy(&b).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no HTTP status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.into() }))
}

fn unchunk(mut b: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = b.split_once("\r\n") {
        let n = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some(chunk) = rest.get(..n).filter(|_| n > 0) else { break };
        out.push_str(chunk);
        b = rest.get(n + 2..).unwrap_or_default();
    }
    out
}

/// How an agent is started.
pub struct Options<'a> {
    pub config: &'a str,
    pub args: &'a [&'a str],
    pub env: &'a [(&'a str, &'a str)],
    /// Folder under the ground that holds socket, state and log; another one makes another agent.
    pub name: &'a str,
    pub pin: bool,
    /// The capabilities that it has from the start, of those that the test has; None = all.
    pub capabilities: Option<CapabilitySet>,
    /// Its limit of locked memory in bytes, soft and hard; None = the test's.
    pub memlock: Option<u64>,
    /// Its stderr, which is its log; None = the file [`Agent::log`].
    pub stderr: Option<&'a std::fs::File>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            config: "",
            args: &[],
            env: &[],
            name: "agent",
            pin: false,
            capabilities: None,
            memlock: None,
            stderr: None,
        }
    }
}

/// As a service manager does it: root's exec gives what is in the bounding set.
fn bounded(capabilities: Option<CapabilitySet>, memlock: Option<u64>) -> std::io::Result<()> {
    if memlock.is_some() {
        setrlimit(Resource::Memlock, Rlimit { current: memlock, maximum: memlock })?;
    }
    let Some(capabilities) = capabilities else { return Ok(()) };
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        // EINVAL: this kernel has no such capability, nor a later one.
        let Ok(there) = capability_is_in_bounding_set(one) else { break };
        if there && !capabilities.contains(one) {
            remove_capability_from_bounding_set(one)?;
        }
    }
    Ok(set_no_new_privs(true)?)
}

/// A running agent; stopped by SIGTERM when dropped, which must be a clean exit.
pub struct Agent<'g> {
    fixture: &'g Fixture,
    child: Option<(Child, OwnedFd)>,
    pub socket: PathBuf,
    pub state: PathBuf,
    pub config: PathBuf,
    pub port: u16,
    pub log: PathBuf,
    /// From its start to `/readyz` 200.
    pub ready_in: Duration,
}

impl<'g> Agent<'g> {
    /// Starts the agent with this config text, unpinned, and waits until it is ready.
    pub fn start(fixture: &'g Fixture, config: &str) -> Result<Self> {
        Self::with(fixture, &Options { config, ..Options::default() })
    }

    /// Starts an agent as told and waits until it is ready.
    pub fn with(fixture: &'g Fixture, o: &Options<'_>) -> Result<Self> {
        let dir = fixture.path(o.name);
        std::fs::create_dir_all(&dir)?;
        let (socket, state, log) = (dir.join("sock"), dir.join("state"), dir.join("log"));
        let config = dir.join("jobwarden.toml");
        std::fs::write(&config, o.config)?;
        let port = free_port()?;
        let out = std::fs::File::options().create(true).append(true).open(&log)?;
        let mut c = fixture.command(fixture::program("jobwarden")?);
        c.arg("--socket").arg(&socket).arg("agent").arg("--config").arg(&config);
        c.arg("--listen").arg(format!("127.0.0.1:{port}"));
        if !o.args.contains(&"--state-dir") {
            c.arg("--state-dir").arg(&state);
        }
        if !o.pin {
            c.arg("--no-pin");
        }
        c.args(o.args).envs(o.env.iter().copied());
        let stderr = o.stderr.unwrap_or(&out).try_clone()?;
        c.stdin(Stdio::null()).stdout(out).stderr(stderr);
        let (capabilities, memlock) = (o.capabilities, o.memlock);
        // SAFETY: system calls only.
        unsafe { c.pre_exec(move || bounded(capabilities, memlock)) };
        let begun = Instant::now();
        let child = c.spawn()?;
        // Not reaped yet, so the pid is its own.
        let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let mut agent = Self {
            fixture,
            child: Some((child, fd)),
            socket,
            state,
            config,
            port,
            log,
            ready_in: Duration::ZERO,
        };
        agent.ready(begun)?;
        Ok(agent)
    }

    fn ready(&mut self, begun: Instant) -> Result<()> {
        let end = begun + ms(10_000);
        loop {
            let said = http(self.port, "GET", "/readyz", "");
            if let Ok((200, _)) = said {
                self.ready_in = begun.elapsed();
                return Ok(());
            }
            let ended = match self.child.as_mut() {
                Some((child, _)) => child.try_wait()?,
                None => None,
            };
            if let Some(status) = ended {
                self.child = None;
                bail!("the agent ended {status} before it was ready:\n{}", self.log_tail());
            }
            if Instant::now() >= end {
                bail!("the agent is not ready: {said:?}\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of the agent's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let all = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&all[all.len().saturating_sub(4000)..]).into_owned()
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, |(c, _)| c.id())
    }

    /// Signals the agent by its pidfd.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let (_, fd) = self.child.as_ref().context("the agent has ended")?;
        Ok(pidfd_send_signal(fd, signal)?)
    }

    /// Ends it by SIGKILL and reaps it.
    pub fn crash(mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        if let Some((mut child, _)) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }

    /// Stops it by SIGTERM; it must exit 0.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some((mut child, fd)) = self.child.take() else { return Ok(()) };
        let sent = pidfd_send_signal(&fd, Signal::TERM);
        let ended = eventually("end of the agent", ms(10_000), || child.try_wait()?.context("it still runs"));
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let status = ended?;
        sent.context("the agent had ended before it was told to")?;
        ensure!(status.success(), "the agent ended {status}:\n{}", self.log_tail());
        ensure!(!self.socket.exists(), "a clean stop leaves no socket");
        Ok(())
    }

    /// A prepared `jobwarden ARGS` for this agent.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut c = self.fixture.command(fixture::program("jobwarden")?);
        c.arg("--socket").arg(&self.socket).args(args);
        Ok(c)
    }

    /// Runs `jobwarden ARGS`.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        run(self.command(args)?, ms(30_000)).with_context(|| format!("jobwarden {args:?}"))
    }

    /// Runs `jobwarden --json ARGS`, which must end 0, and parses what it printed.
    pub fn json<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T> {
        let mut all = vec!["--json"];
        all.extend(args);
        self.cli(&all)?.json().with_context(|| format!("jobwarden {args:?}"))
    }

    /// The whole forest.
    pub fn tree(&self) -> Result<schema::Tree> {
        self.json(&["tree", "--all"])
    }

    /// One process of the forest that is not gone.
    pub fn process(&self, pid: u32) -> Result<schema::Process> {
        self.tree()?
            .processes
            .into_iter()
            .find(|p| p.pid == pid && p.state != schema::State::Gone)
            .with_context(|| format!("{pid} is not in the tree"))
    }

    /// Waits until the forest has this process so.
    pub fn process_when(
        &self,
        pid: u32,
        what: &str,
        good: impl Fn(&schema::Process) -> bool,
    ) -> Result<schema::Process> {
        eventually(&format!("{pid}: {what}"), ms(5000), || {
            let p = self.process(pid)?;
            ensure!(good(&p), "{p:?}");
            Ok(p)
        })
    }

    /// Waits until the forest has no live or dead process with this pid but gone ones.
    pub fn gone(&self, pid: u32) -> Result<()> {
        eventually(&format!("{pid}: gone"), ms(15_000), || {
            let p = self.process(pid);
            ensure!(p.is_err(), "{p:?}");
            Ok(())
        })
    }

    pub fn alerts(&self, args: &[&str]) -> Result<Vec<schema::Alert>> {
        let mut all = vec!["alerts"];
        all.extend(args);
        Ok(self.json::<schema::Alerts>(&all)?.alerts)
    }

    pub fn jobs(&self) -> Result<Vec<schema::Job>> {
        Ok(self.json::<schema::Jobs>(&["jobs"])?.jobs)
    }

    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        http(self.port, "GET", path, "")
    }

    pub fn metrics(&self) -> Result<Metrics> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics: {status}");
        Metrics::parse(&body)
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        let ended = self.end();
        if std::thread::panicking() {
            loudly(&format!("the agent's log ends:\n{}", self.log_tail()));
        } else if let Err(e) = ended {
            panic!("{e:#}");
        }
    }
}
