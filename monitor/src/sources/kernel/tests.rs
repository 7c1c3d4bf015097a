//! On the running kernel, as root. Each test has probes of its own; others may run beside it.

mod jobs;
mod marks;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::enforce::Lineage as _;
use crate::model::event::{Body, decode};
use crate::model::key::Key;

/// The probes, or None (loudly) where this user or kernel cannot have them.
fn start(name: &str, options: &Options) -> Option<Kernel> {
    start_by(name, || Kernel::start(options))
}

/// As on a kernel that preempts programs.
fn start_preempted(name: &str) -> Option<Kernel> {
    start_by(name, || {
        let mut layout = Layout::read()?;
        layout.features.preempted = 1;
        Kernel::of(&Options::default(), &layout)
    })
}

fn start_by(name: &str, start: impl FnOnce() -> Result<Kernel, KernelError>) -> Option<Kernel> {
    if !rustix::process::geteuid().is_root() {
        crate::testing::skipped(name, "needs root");
        return None;
    }
    match start() {
        Ok(k) => Some(k),
        Err(KernelError::Permission { what, source }) => {
            crate::testing::skipped(name, format_args!("{what}: {source}"));
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// A child that does not outlive its test, however that ends.
struct Child(std::process::Child);

impl Child {
    fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }
    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Some microVMs' kernels run no BPF program while a thread of their PID 1 is on the CPU, and RCU may let go of a process right then
/// (one in 300 where that was counted). So a life may lack its reap, but nothing else, and not each of so many.
const LIVES: usize = 3;

/// The kinds of the records of one process, in order.
async fn watch(ring: &mut Ring, pid: u32, until: &str) -> Vec<String> {
    let mut seen = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end && seen.last().is_none_or(|s| s != until) {
        let _ = tokio::time::timeout(Duration::from_millis(500), ring.readable()).await;
        ring.drain(usize::MAX, &mut |b| {
            let e = decode(b).unwrap();
            if e.process.pid != pid {
                return;
            }
            seen.push(match e.body {
                Body::Fork { lineage_parent, parent, .. } => {
                    assert_eq!((lineage_parent.pid, parent.pid), (std::process::id(), std::process::id()));
                    assert!(e.process.start > lineage_parent.start && e.process.start <= e.at);
                    "fork".to_owned()
                }
                Body::Exec { filename, argv, argv_cut, .. } => {
                    assert!(!argv_cut);
                    format!("exec {} {}", String::from_utf8_lossy(filename), String::from_utf8_lossy(argv))
                }
                Body::Exit { status, .. } => format!("exit {:#x}", status.0),
                Body::LeaderExit { status, .. } => format!("leader-exit {:#x}", status.0),
                Body::Reap { status } => format!("reap {:#x}", status.0),
                Body::Signal { signal, sender, result, .. } => {
                    format!("signal {signal} {sender:?} {result:?}")
                }
                Body::Kill { result, .. } => format!("kill {result}"),
            });
        });
    }
    seen
}

#[tokio::test]
async fn one_life_in_order() {
    let Some(kernel) = start("one_life_in_order", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    assert!(kernel.take_ring().is_err());
    let whole = ["fork", "exec /bin/sh /bin/sh\0-c\0exit 3\0a b\0\0", "exit 0x300", "reap 0x300"];
    for _ in 0..LIVES {
        let mut child = Command::new("/bin/sh").args(["-c", "exit 3", "a b", ""]).spawn().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3));
        let seen = watch(&mut ring, child.id(), "reap 0x300").await;
        if seen == whole {
            return;
        }
        assert_eq!(seen, whole[..3]);
    }
    panic!("{LIVES} lives without a reap");
}

#[tokio::test]
async fn what_is_unread_is_what_comes_next() {
    let Some(kernel) = start("what_is_unread_is_what_comes_next", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    let mut child = Command::new("/bin/true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let unread: Vec<Vec<u8>> = ring.unread().filter(|b| !b.is_empty()).map(<[u8]>::to_vec).collect();
    assert!(unread.len() >= 3, "a fork, an exec and an exit: {unread:?}");
    let me = std::process::id();
    let fork = unread.iter().find(|b| decode(b).unwrap().process.pid == pid).unwrap();
    assert_eq!(crate::model::event::forker(fork).map(|k| k.pid), Some(me));
    assert_eq!(crate::model::event::forker(&fork[..40]), None);
    let forks = |b: &&Vec<u8>| matches!(decode(b).unwrap().body, Body::Fork { .. });
    assert!(unread.iter().all(|b| crate::model::event::forker(b).is_some() == forks(&b)));
    let mut given = Vec::new();
    assert_eq!(ring.drain(1, &mut |b| given.push(b.to_vec())), 1);
    assert_eq!(ring.drain(unread.len() - 1, &mut |b| given.push(b.to_vec())), unread.len() - 1);
    assert_eq!(given, unread);
}

/// Records that are kept stand in the ring for a successor, those behind them are read all the same, and new ones arrive
/// although the kernel wakes no reader of a ring with unread records.
#[tokio::test]
async fn records_are_kept_until_they_are_let_go() {
    let Some(kernel) = start("records_are_kept_until_they_are_let_go", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    let life = || assert!(Command::new("/bin/true").status().unwrap().success());
    life();
    let begin = kernel.ring_positions().0;
    let mut n = 0;
    // The first and the third wait for the numbers 1 and 2.
    ring.drain_keeping(usize::MAX, &mut |_| {
        n += 1;
        match n {
            1 => Some(1),
            3 => Some(2),
            _ => None,
        }
    });
    assert!(n >= 3 && ring.is_keeping());
    assert_eq!(kernel.ring_positions().0, begin);
    life();
    let readable = tokio::time::timeout(Duration::from_secs(5), ring.readable());
    readable.await.expect("a reader that keeps records looks by itself").unwrap();
    let mut more = 0;
    ring.drain(usize::MAX, &mut |_| more += 1);
    assert!(more >= 3, "{more}");
    ring.let_go(0);
    assert_eq!(kernel.ring_positions().0, begin);
    ring.let_go(1);
    let third = kernel.ring_positions().0;
    assert!(third > begin && third < ring.position() && ring.is_keeping());
    ring.let_go(2);
    assert!(!ring.is_keeping());
    assert_eq!(kernel.ring_positions().0, ring.position());
}

#[tokio::test]
async fn a_killed_child_and_who_killed_it() {
    let Some(kernel) = start("a_killed_child_and_who_killed_it", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    let me = kernel.start_of(std::process::id()).unwrap().unwrap();
    let signal = format!("signal 9 Process({:?}) Delivered", Key::new(std::process::id(), me));
    for _ in 0..LIVES {
        let mut child = Child::spawn(Command::new("/bin/sleep").arg("1000"));
        child.end();
        let mut seen = watch(&mut ring, child.0.id(), "reap 0x9").await;
        assert!(seen.contains(&signal), "{signal} not in {seen:?}");
        let reaped = seen.pop_if(|s| s == "reap 0x9").is_some();
        assert_eq!(seen.last().map(String::as_str), Some("exit 0x9"), "{seen:?}");
        if reaped {
            return;
        }
    }
    panic!("{LIVES} lives without a reap");
}

#[tokio::test]
async fn snapshot_has_everybody() {
    let Some(kernel) = start("snapshot_has_everybody", &Options::default()) else { return };
    let mut child = Child::spawn(Command::new("/bin/sleep").arg("1000"));
    let taken = kernel.snapshot().unwrap();
    let rows = &taken.snapshot.rows;
    let of = |pid: u32| rows.iter().find(|r| r.key.pid == pid);
    let mine = of(std::process::id()).unwrap();
    assert!(mine.lineage.is_some_and(|l| l.mended), "forked before the probes were there");
    let his = of(child.0.id()).unwrap();
    assert_eq!(his.parent, Some(mine.key));
    assert_eq!(his.lineage.map(|l| (l.parent, l.mended)), Some((mine.key, false)));
    assert!(of(1).is_some_and(|r| r.adopts));
    let proc = crate::sources::proc::Proc::default();
    for pid in proc.pids().unwrap() {
        let Ok(stat) = proc.stat(pid) else { continue };
        if kernel.ticks_to_ns(stat.start_ticks) + 20_000_000 < taken.snapshot.t0 {
            let row = of(pid).unwrap_or_else(|| panic!("{pid} is not in the snapshot"));
            assert_eq!(kernel.ns_to_ticks(row.key.start), stat.start_ticks, "{pid}");
        }
    }
    child.end();
}

#[tokio::test]
async fn letters_as_proc_has_them() {
    let Some(kernel) = start("letters_as_proc_has_them", &Options::default()) else { return };
    let [mut sleeper, mut stopped, mut zombie] =
        ["sleep", "sleep", "true"].map(|p| Child::spawn(Command::new(p).arg("1000")));
    // SAFETY: a child of this test, not reaped.
    assert_eq!(unsafe { libc::kill(stopped.0.id() as i32, libc::SIGSTOP) }, 0);
    let proc = crate::sources::proc::Proc::default();
    for (child, letter) in [(&sleeper, b'S'), (&stopped, b'T'), (&zombie, b'Z')] {
        let pid = child.0.id();
        jobs::wait_for("its state", Duration::from_secs(20), || {
            proc.stat(pid).is_ok_and(|s| s.state == letter)
        });
        let stat = proc.stat(pid).unwrap();
        let letters = kernel.task_states().unwrap();
        let (key, shown) = letters.iter().find(|(k, _)| k.pid == pid).unwrap();
        assert_eq!(kernel.ns_to_ticks(key.start), stat.start_ticks);
        assert_eq!(*shown, (letter, stat.comm));
    }
    // Kernel threads that idle, are parked, and what else there is: whoever shows the same before and after.
    let read = || -> Vec<_> { proc.pids().unwrap().iter().filter_map(|&p| proc.stat(p).ok()).collect() };
    let (before, letters, after) = (read(), kernel.task_states().unwrap(), read());
    let mut same = 0;
    for s in before.iter().filter(|s| after.iter().any(|a| (a.pid, a.state) == (s.pid, s.state))) {
        let Some((_, (letter, _))) = letters.iter().find(|(k, _)| k.pid == s.pid) else { continue };
        // It may have run, or waited for a disk, just then.
        if !b"RD".contains(letter) && s.state != b'R' {
            assert_eq!(*letter as char, s.state as char, "{s:?}");
            same += 1;
        }
    }
    assert!(same > 3, "{same}");
    sleeper.end();
    stopped.end();
    zombie.end();
}

#[tokio::test]
async fn accounts_to_the_last_event() {
    let Some(kernel) = start("accounts_to_the_last_event", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    let mut seen = Seen { since: kernel.now(), ..Seen::default() };
    for _ in 0..500 {
        for _ in 0..10 {
            // SAFETY: the child calls nothing but `_exit`.
            unsafe {
                match libc::fork() {
                    0 => libc::_exit(0),
                    pid => {
                        assert_eq!(libc::waitpid(pid, std::ptr::null_mut(), 0), pid);
                        seen.pids.insert(pid as u32);
                    }
                }
            }
        }
        ring.drain(usize::MAX, &mut |b| seen.count(b));
    }
    // The machine does other things too, so the two sides are compared until they stand still together.
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        ring.drain(usize::MAX, &mut |b| seen.count(b));
        let totals = kernel.totals().unwrap();
        let sent: u64 = totals.iter().map(|c| c.sent).sum();
        let balanced = totals.iter().all(|c| c.hits == c.sent + c.lost + c.filtered);
        // What the kernel has not freed yet (RCU takes its time, seconds where it is lazy) still has its entry.
        let unfreed =
            seen.mine.iter().filter(|k| kernel.maps.lineage.get(&(**k).into()).unwrap().is_some()).count();
        let whole = seen.of_mine == [SPAWNS, SPAWNS, SPAWNS - unfreed as u32] && unfreed < 100;
        if balanced && sent == seen.received && whole {
            assert_eq!(totals.iter().map(|c| c.lost).sum::<u64>(), 0);
            assert_eq!(kernel.lost().unwrap(), 0);
            break;
        }
        assert!(
            Instant::now() < end,
            "sent {sent}, received {}, {:?}, {totals:?}",
            seen.received,
            seen.of_mine
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

const SPAWNS: u32 = 5000;

#[derive(Default)]
struct Seen {
    received: u64,
    since: u64,
    pids: std::collections::HashSet<u32>,
    mine: std::collections::HashSet<Key>,
    /// Forks, exits and reaps of this process's children.
    of_mine: [u32; 3],
}

impl Seen {
    fn count(&mut self, b: &[u8]) {
        self.received += 1;
        let e = decode(b).unwrap();
        let what = match e.body {
            Body::Fork { .. } if self.pids.contains(&e.process.pid) && e.process.start >= self.since => {
                self.mine.insert(e.process);
                0
            }
            Body::Exit { .. } if self.mine.contains(&e.process) => 1,
            Body::Reap { .. } if self.mine.contains(&e.process) => 2,
            _ => return,
        };
        self.of_mine[what] += 1;
    }
}

/// Many at a time, so that a kernel that preempts programs skips some (Linux 7): each life is told whole, by the one or the other of
/// two programs, and nothing of it twice.
#[tokio::test]
async fn lives_beside_each_other_are_told_once() {
    const THREADS: usize = 16;
    const EACH: usize = 20;
    let Some(kernel) = start("lives_beside_each_other_are_told_once", &Options::default()) else { return };
    let mut ring = kernel.take_ring().unwrap();
    let me = kernel.start_of(std::process::id()).unwrap().unwrap();
    let me = Key::new(std::process::id(), me);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    assert!(Command::new("/bin/true").status().unwrap().success());
                }
            });
        }
    });
    let mut told: BTreeMap<Key, [u32; 4]> = BTreeMap::new();
    let end = Instant::now() + Duration::from_secs(20);
    let unreaped = |told: &BTreeMap<Key, [u32; 4]>| {
        let waits = |k: &Key| kernel.maps.lineage.get(&(*k).into()).unwrap().is_some();
        told.iter().filter(|(k, n)| n[3] == 0 && waits(k)).count()
    };
    // Reaps come when RCU lets go.
    while (told.is_empty() || unreaped(&told) > 0) && Instant::now() < end {
        ring.drain(usize::MAX, &mut |b| {
            let e = decode(b).unwrap();
            let what = match e.body {
                Body::Fork { lineage_parent, .. } if lineage_parent == me => 0,
                Body::Exec { .. } => 1,
                Body::Exit { .. } => 2,
                Body::Reap { .. } => 3,
                _ => return,
            };
            if what == 0 {
                told.insert(e.process, [0; 4]);
            }
            if let Some(n) = told.get_mut(&e.process) {
                n[what] += 1;
            }
        });
        std::thread::sleep(Duration::from_millis(20));
    }
    let others = kernel.probes().unwrap();
    let skipped = others.iter().filter_map(|p| p.recursion_misses.filter(|&n| n > 0).map(|n| (p.name, n)));
    println!("skipped: {:?}", skipped.collect::<Vec<_>>());
    assert!(told.values().flatten().all(|&n| n <= 1), "{told:?}");
    let whole = told.values().filter(|n| n[..3] == [1, 1, 1]).count() as u64;
    let lost = kernel.lost().unwrap();
    assert!(whole + lost >= (THREADS * EACH) as u64, "{whole} whole, {lost} lost: {told:?}");
}

#[test]
fn time_offsets() {
    assert_eq!(parse_time_offset("monotonic 0 0\nboottime 1000 5\n"), 1_000_000_000_005);
    assert_eq!(parse_time_offset("boottime -3 0\n"), -3_000_000_000);
    assert_eq!(parse_time_offset(""), 0);
    assert_eq!(parse_time_offset("boottime x"), 0);
}

#[tokio::test]
async fn writers_of_lines_load_and_attach() {
    let options = Options { trace: true, ..Options::default() };
    let Some(kernel) = start("writers_of_lines_load_and_attach", &options) else { return };
    // It ends only when something is wrong.
    let ended = tokio::time::timeout(Duration::from_millis(300), kernel.tracer().unwrap().run()).await;
    assert!(ended.is_err(), "{ended:?}");
    let plain = start("writers_of_lines_load_and_attach", &Options::default()).unwrap();
    assert!(plain.tracer().is_err());
}

#[test]
fn an_old_kernel_is_refused_by_both_versions() {
    let said = recent_enough("5.4.0-150-generic").unwrap_err();
    assert!(matches!(said, KernelError::TooOld { .. }));
    let text = said.to_string();
    assert!(text.contains("5.4.0-150-generic") && text.contains("5.10"), "{text}");
    for fine in ["5.10.0-30-amd64", "6.18.44-fc", "7.3.0", "odd"] {
        recent_enough(fine).unwrap();
    }
}

#[tokio::test]
async fn whom_the_full_map_lacks_is_entered_when_there_is_room() {
    let options = Options { lineage_entries: Some(16), ..Options::default() };
    let Some(kernel) = start("whom_the_full_map_lacks_is_entered_when_there_is_room", &options) else {
        return;
    };
    let mut ring = kernel.take_ring().unwrap();
    // A preallocated map has some spare elements for each CPU.
    let mut all: Vec<Child> =
        (0..100).map(|_| Child::spawn(Command::new("/bin/sleep").arg("1000"))).collect();
    let mut missed = Vec::new();
    let mut drain = |missed: &mut Vec<(Key, Key)>| {
        ring.drain(usize::MAX, &mut |b| {
            let e = decode(b).unwrap();
            if let Body::Fork { lineage_parent, no_entry: true, .. } = e.body
                && lineage_parent.pid == std::process::id()
            {
                missed.push((e.process, lineage_parent));
            }
        })
    };
    while drain(&mut missed) > 0 {}
    let (key, parent) = *missed.last().expect("no fork found the map full");
    assert_eq!(kernel.lineage_of(key).unwrap(), None);
    let job = kernel.now();
    let error = kernel.enter(key, parent, job).unwrap_err();
    assert!(entry::is_full(&error), "{error}");
    // A snapshot does not fail for it.
    assert!(kernel.snapshot().unwrap().unentered > 0);
    // Whoever has an entry goes; the newest has none and stays.
    all.retain_mut(|c| {
        let stays = c.0.id() == key.pid;
        if !stays {
            c.end();
        }
        stays
    });
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(e) = kernel.enter(key, parent, job) {
        assert!(entry::is_full(&e) && Instant::now() < end, "{e}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let l = kernel.lineage_of(key).unwrap().unwrap();
    assert_eq!((Key::from(l.parent), l.job, l.flags), (parent, job, 0));
    // Who is gone leaves no entry behind.
    all[0].end();
    kernel.enter(key, parent, job).unwrap();
    assert_eq!(kernel.maps.lineage.get(&key.into()).unwrap().map(|l| l.job), None);
}
