//! What many rules cost: reading them, the engine with them, and an exec that none of them matches; as memory too. Prints one
//! `name value` a line. `cargo bench -p jobwarden --bench rules`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use jobwarden::config::{self, Config, Overrides};
use jobwarden::engine::{Engine, Input, Output, Settings};
use jobwarden::model::event::{Body, Comm, Event};
use jobwarden::model::key::Key;

const EXECS: u64 = 20_000;

/// Of every kind that a site generates: a command, a path, a user's program, one whose texts alone say little.
fn rules(n: usize) -> String {
    let mut text = String::new();
    for i in 0..n {
        let m = match i % 4 {
            0 => format!("argv = '^/usr/bin/worker --queue q{i:05}( |$)'"),
            1 => format!("comm = '^task{i:05}$', user = 0"),
            2 => format!("argv = 'job-{i:05}-[0-9a-f]+', parent = {{ comm = 'runner' }}"),
            _ => format!(r"argv = '\bservice{i:05}\b.*--mode (batch|once)'"),
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "[[job]]\nname = \"r{i}\"\nmatch = {{ {m} }}\ntimeout = \"1h\"\n");
    }
    text
}

fn parse(text: &str) -> Config {
    let read = config::parse(Path::new("bench.toml"), text, &BTreeMap::new(), &Overrides::default());
    read.unwrap_or_else(|e| panic!("{e}"))
}

/// Resident memory, KiB.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn main() {
    for n in [0, 2_000, 10_000] {
        let text = rules(n);
        let before = resident();
        let begun = Instant::now();
        let config = parse(&text);
        println!("rules_{n}_read_ms {:.1}", begun.elapsed().as_secs_f64() * 1e3);
        let begun = Instant::now();
        let mut engine = Engine::new(Settings::default(), &config);
        println!("rules_{n}_engine_ms {:.1}", begun.elapsed().as_secs_f64() * 1e3);
        let mut out = Output::default();
        engine.handle(Input::Ready, 1, &mut out);
        let (parent, child) = (Key::new(1, 1), Key::new(7, 7));
        let mut at = 10;
        let mut event = |process, body| {
            at += 1;
            let event = Event { at, cpu: 0, process, body };
            engine.handle(Input::Record { event: &event, bytes: &[] }, at, &mut out);
            out.effects.clear();
            out.changes.clear();
        };
        event(
            child,
            Body::Fork {
                lineage_parent: parent,
                parent,
                job: 0,
                uid: 0,
                comm: Comm::from_bytes(b"sh"),
                kernel_thread: false,
                no_entry: false,
            },
        );
        let argv =
            b"/usr/bin/python3\0/srv/app/service/run.py\0--queue\0q99999\0--job\0job-2f\0--mode\0batch\0";
        let mut exec = || {
            let (comm, filename) = (Comm::from_bytes(b"python3"), &b"/usr/bin/python3"[..]);
            let body = Body::Exec { old_tid: 7, uid: 0, cgroup: 0, comm, filename, argv, argv_cut: false };
            event(child, body);
        };
        exec();
        let begun = Instant::now();
        for _ in 0..EXECS {
            exec();
        }
        println!("rules_{n}_exec_us {:.2}", begun.elapsed().as_secs_f64() * 1e6 / EXECS as f64);
        println!("rules_{n}_memory_kib {}", resident().saturating_sub(before));
    }
}
