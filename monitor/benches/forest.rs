//! Forest and policy alone, over a synthetic stream: events a second on one core, what a tick costs, bytes a process. Prints
//! one `name value` a line, for `cargo xtask bench`; `-- --short` does a twentieth of it.

use std::collections::BTreeMap;
use std::path::Path;

use jobwarden::config::{self, Config, Overrides};
use jobwarden::event::{Body, Comm, Event, WaitStatus};
use jobwarden::key::Key;
use jobwarden::policy::{Effect, Engine, Observation, Settings};
use rustix::time::{ClockId, clock_gettime};

/// One rule, as a host that runs jobs has: it is tried at each exec.
const CONFIG: &str = "[[job]]\nname = \"ci\"\nmatch = { argv = \"^/usr/bin/ci-runner\" }";
/// Each process has its own, with its pid where the `_` stand, as most have in truth: what is interned is shared by none.
const ARGV: [(&[u8], usize); 4] = [
    (b"/bin/sh\0-c\0make all -j ________\0", 23),
    (b"cc\0-O2\0-c\0src/________.c\0-o\0obj/x.o\0", 14),
    (b"/usr/bin/env\0________\0", 13),
    (b"sleep\0________\0", 6),
];

/// The argv of process `pid`, written into `buffer`.
fn argv(pid: u32, buffer: &mut Vec<u8>) {
    let (plan, at) = ARGV[pid as usize % ARGV.len()];
    buffer.clear();
    buffer.extend_from_slice(plan);
    for n in 0..8 {
        buffer[at + n] = b"0123456789abcdef"[(pid >> (4 * n)) as usize & 15];
    }
}

fn config() -> Config {
    match config::parse(Path::new("bench.toml"), CONFIG, &BTreeMap::new(), &Overrides::default()) {
        Ok(c) => c,
        Err(e) => panic!("{e}"),
    }
}

/// A host with `live` processes, on which processes are started and end.
struct Host {
    now: u64,
    pid: u32,
    live: Vec<Key>,
    engine: Engine,
    fx: Vec<Effect>,
    events: u64,
    argv: Vec<u8>,
}

impl Host {
    fn new(live: usize) -> Self {
        let engine = Engine::new(Settings::default(), &config());
        let mut h =
            Self { now: 1, pid: 1, live: Vec::new(), engine, fx: Vec::new(), events: 0, argv: Vec::new() };
        h.engine.ready(1, &mut h.fx);
        let init = Key::new(1, 1);
        h.live.push(init);
        while h.live.len() < live {
            // Families of eight, as services and shells are.
            let by = if h.live.len() % 8 == 1 { init } else { h.live[h.live.len() - 1] };
            let key = h.fork(by);
            h.exec(key);
            h.live.push(key);
        }
        h
    }

    fn event(&mut self, process: Key, body: Body<'_>) {
        self.now += 5_000;
        self.events += 1;
        self.engine.event(&Event { at: self.now, cpu: 0, process, body }, &mut self.fx);
    }

    fn fork(&mut self, by: Key) -> Key {
        self.pid = self.pid % 4_000_000 + 1;
        let key = Key::new(self.pid + 1, self.now + 5_000);
        let comm = Comm::from_bytes(b"sh");
        let body = Body::Fork {
            lineage_parent: by,
            parent: by,
            job: 0,
            uid: 1000,
            comm,
            kernel_thread: false,
            no_entry: false,
        };
        self.event(key, body);
        key
    }

    fn exec(&mut self, key: Key) {
        let mut buffer = std::mem::take(&mut self.argv);
        argv(key.pid, &mut buffer);
        let comm = Comm::from_bytes(b"cc");
        let body = Body::Exec {
            old_tid: key.pid,
            uid: 1000,
            cgroup: 1,
            comm,
            filename: b"/usr/bin/cc",
            argv: &buffer,
            argv_cut: false,
        };
        self.event(key, body);
        self.argv = buffer;
    }

    /// Who forks, chosen before anything is measured: in truth it stands in the record.
    fn forkers(&self, n: u64) -> Vec<Key> {
        let mut dice = 12_345_usize;
        let throw = |_| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.live[(dice >> 33) % self.live.len()]
        };
        (0..n).map(throw).collect()
    }

    /// The short lives of a build: fork, exec, exit, reap, a few of them at a time.
    fn lives(&mut self, forkers: Vec<Key>) {
        let mut open = std::collections::VecDeque::new();
        for (i, by) in forkers.into_iter().enumerate() {
            let key = self.fork(by);
            self.exec(key);
            open.push_back(key);
            if open.len() > 16
                && let Some(k) = open.pop_front()
            {
                self.event(k, Body::Exit { status: WaitStatus(0), comm: Comm::from_bytes(b"cc") });
                self.event(k, Body::Reap { status: WaitStatus(0) });
            }
            if i % 256 == 0 {
                self.engine.tick(self.now, &mut self.fx);
                self.answer();
            }
        }
        for k in open {
            self.event(k, Body::Exit { status: WaitStatus(0), comm: Comm::from_bytes(b"cc") });
            self.event(k, Body::Reap { status: WaitStatus(0) });
        }
    }

    /// The edge is no part of what is measured: it says that all have gone.
    fn answer(&mut self) {
        for f in std::mem::take(&mut self.fx) {
            if let Effect::Look(key) = f {
                let seen = jobwarden::forest::Seen::Absent;
                self.engine.observe(Observation::Look { key, at: self.now, seen }, self.now, &mut self.fx);
            }
        }
    }
}

/// CPU time of this thread, ns: what other programs do at the same time does not count.
fn cpu() -> u64 {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|p| p.parse::<u64>().ok()).unwrap_or(0);
    pages * 4096
}

fn main() {
    let scale = if std::env::args().any(|a| a == "--short") { 20 } else { 1 };
    // Memory first: nothing has been freed yet that could be used again.
    let processes = 100_000 / scale as usize;
    let empty = resident();
    let host = Host::new(processes);
    println!("forest_bytes_per_process {:.0}", (resident() - empty) as f64 / processes as f64);
    drop(host);
    for (name, live) in [("few", 10_000), ("many", 1_000_000 / scale as usize)] {
        let mut host = Host::new(live);
        host.events = 0;
        let forkers = host.forkers(2_000_000 / scale);
        let begin = cpu();
        host.lives(forkers);
        let took = (cpu() - begin) as f64 / 1e9;
        println!("forest_events_per_s_{name} {:.0}", host.events as f64 / took);
        // What a tick costs when one thing is due.
        let mut ns = Vec::new();
        for _ in 0..1_000 {
            let key = host.fork(host.live[0]);
            host.event(key, Body::Exit { status: WaitStatus(0), comm: Comm::from_bytes(b"x") });
            host.now += 2_000_000;
            let begin = cpu();
            host.engine.tick(host.now, &mut host.fx);
            ns.push(cpu() - begin);
            host.answer();
        }
        ns.sort_unstable();
        println!("forest_tick_ns_{name} {}", ns[ns.len() / 2]);
    }
}
