//! Forest and policy alone, over a synthetic stream: events a second on one core, what a tick costs, bytes a process. Prints
//! one `name value` a line, for `cargo xtask bench`; `-- --short` does a twentieth of it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use jobwarden::config::{self, Config, Overrides};
use jobwarden::engine::{Effect, Engine, Input, Observation, Output, Settings};
use jobwarden::model::event::{Body, Comm, Event, WaitStatus};
use jobwarden::model::key::Key;
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

/// Records that the agent reads from its ring at a time.
const BATCH: usize = 64;

/// What happens to a process.
enum Step {
    Fork { by: Key },
    Exec,
    Exit,
    Reap,
}

/// A host with `live` processes, on which processes are started and end.
struct Host {
    now: u64,
    pid: u32,
    live: Vec<Key>,
    /// What has happened and is not read, oldest first.
    ring: Vec<(u64, Key, Step)>,
    forkers: Vec<Key>,
    engine: Engine,
    out: Output,
    events: u64,
    argv: Vec<u8>,
}

impl Host {
    fn new(live: usize) -> Self {
        let engine = Engine::new(Settings::default(), &config());
        let mut h = Self {
            now: 1,
            pid: 1,
            live: Vec::new(),
            ring: Vec::new(),
            forkers: Vec::new(),
            engine,
            out: Output::default(),
            events: 0,
            argv: Vec::new(),
        };
        h.engine.handle(Input::Ready, 1, &mut h.out);
        let init = Key::new(1, 1);
        h.live.push(init);
        while h.live.len() < live {
            // Families of eight, as services and shells are.
            let by = if h.live.len() % 8 == 1 { init } else { h.live[h.live.len() - 1] };
            let key = h.fork(by);
            h.happens(key, Step::Exec);
            h.live.push(key);
        }
        h.read();
        h
    }

    fn happens(&mut self, process: Key, step: Step) {
        self.now += 5_000;
        self.ring.push((self.now, process, step));
        if self.ring.len() == BATCH {
            self.read();
        }
    }

    fn fork(&mut self, by: Key) -> Key {
        self.pid = self.pid % 4_000_000 + 1;
        let key = Key::new(self.pid + 1, self.now + 5_000);
        self.happens(key, Step::Fork { by });
        key
    }

    /// What has happened, handed over as the agent does.
    fn read(&mut self) {
        self.forkers.clear();
        self.forkers.extend(self.ring.iter().filter_map(|(_, _, step)| match step {
            Step::Fork { by } => Some(*by),
            _ => None,
        }));
        self.engine.expect(&self.forkers);
        self.events += self.ring.len() as u64;
        for (at, process, step) in self.ring.drain(..) {
            let body = match step {
                Step::Fork { by } => Body::Fork {
                    lineage_parent: by,
                    parent: by,
                    job: 0,
                    uid: 1000,
                    comm: Comm::from_bytes(b"sh"),
                    kernel_thread: false,
                    no_entry: false,
                },
                Step::Exec => {
                    argv(process.pid, &mut self.argv);
                    Body::Exec {
                        old_tid: process.pid,
                        uid: 1000,
                        cgroup: 1,
                        comm: Comm::from_bytes(b"cc"),
                        filename: b"/usr/bin/cc",
                        argv: &self.argv,
                        argv_cut: false,
                    }
                }
                Step::Exit => Body::Exit { status: WaitStatus(0), comm: Comm::from_bytes(b"cc") },
                Step::Reap => Body::Reap { status: WaitStatus(0) },
            };
            let event = Event { at, cpu: 0, process, body };
            self.engine.handle(Input::Record { event: &event, bytes: &[] }, at, &mut self.out);
        }
    }

    /// Who forks, chosen before anything is measured: in truth it stands in the record.
    fn chosen(&self, n: u64) -> Vec<Key> {
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
            self.happens(key, Step::Exec);
            open.push_back(key);
            if open.len() > 16
                && let Some(k) = open.pop_front()
            {
                self.happens(k, Step::Exit);
                self.happens(k, Step::Reap);
            }
            if i % 256 == 0 {
                self.read();
                self.engine.handle(Input::Tick, self.now, &mut self.out);
                self.answer();
            }
        }
        for k in open {
            self.happens(k, Step::Exit);
            self.happens(k, Step::Reap);
        }
        self.read();
    }

    /// The edge is no part of what is measured: it says that all have gone.
    fn answer(&mut self) {
        for f in std::mem::take(&mut self.out).effects {
            if let Effect::Look(key) = f {
                let seen = jobwarden::engine::forest::Seen::Absent;
                let look = Observation::Look { key, at: self.now, seen };
                self.engine.handle(Input::Observation(Cow::Owned(look)), self.now, &mut self.out);
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
        let forkers = host.chosen(2_000_000 / scale);
        let begin = cpu();
        host.lives(forkers);
        let took = (cpu() - begin) as f64 / 1e9;
        println!("forest_events_per_s_{name} {:.0}", host.events as f64 / took);
        // What a tick costs when one thing is due.
        let mut ns = Vec::new();
        for _ in 0..1_000 {
            let key = host.fork(host.live[0]);
            host.happens(key, Step::Exit);
            host.read();
            host.now += 2_000_000;
            let begin = cpu();
            host.engine.handle(Input::Tick, host.now, &mut host.out);
            ns.push(cpu() - begin);
            host.answer();
        }
        ns.sort_unstable();
        println!("forest_tick_ns_{name} {}", ns[ns.len() / 2]);
    }
}
