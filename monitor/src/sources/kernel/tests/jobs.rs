//! Jobs in the kernel's maps: labelling, inheritance, sparing, doom. Only processes that the test started are touched.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::Stdio;

use monitor_abi::LINEAGE_MENDED;

use super::*;
use crate::enforce::OrderId;
use crate::sources::kernel::lineage::Edited;

pub(super) const MINUTE: u64 = 60_000_000_000;

pub(super) fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A shell that does as its stdin says, and dies with its test.
pub(super) struct Shell {
    pub(super) child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Shell {
    pub(super) fn new() -> Self {
        let mut child = Child::spawn(
            Command::new("/bin/sh").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()),
        );
        let out = BufReader::new(child.0.stdout.take().unwrap());
        Self { child, out }
    }
    /// Runs a line that prints one line.
    pub(super) fn ask(&mut self, line: &str) -> String {
        writeln!(self.child.0.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        self.out.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
    /// Runs `command` in the background; its pid. It ends by itself within a minute.
    pub(super) fn background(&mut self, command: &str) -> u32 {
        self.ask(&format!("{command} >/dev/null </dev/null & echo $!")).parse().unwrap()
    }
    pub(super) fn key(&self, kernel: &Kernel) -> Key {
        let pid = self.child.0.id();
        Key::new(pid, kernel.start_of(pid).unwrap().unwrap())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // What it started in the background goes with it.
        let _ = self.child.0.stdin.as_mut().map(|s| writeln!(s, "kill -9 $(jobs -p) 2>/dev/null; exit"));
    }
}

/// Waits for exactly these live members: what the shell forked on the way to them ends in its own time.
pub(super) fn expect_members(kernel: &Kernel, job: u64, expected: &HashSet<u32>) {
    let end = Instant::now() + Duration::from_secs(20);
    while pids(kernel, job) != *expected {
        assert!(Instant::now() < end, "{:?}, expected {expected:?}", pids(kernel, job));
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn pids(kernel: &Kernel, job: u64) -> HashSet<u32> {
    kernel.members(job).unwrap().into_iter().filter(|m| !m.dead).map(|m| m.key.pid).collect()
}

/// A shell, the root of a job, and the job. The programs at a fork are taken away: each fork from here on is one that the kernel
/// skipped them for.
fn passed_over(kernel: &mut Kernel) -> (Shell, Key, u64) {
    let shell = Shell::new();
    let (root, job) = (shell.key(kernel), kernel.now());
    kernel.label(job, 0, root).unwrap();
    kernel.links.retain(|name, _| !name.starts_with("fork"));
    (shell, root, job)
}

#[tokio::test]
async fn one_whose_fork_was_passed_over_is_entered_before_it_is_given_away() {
    let name = "one_whose_fork_was_passed_over_is_entered_before_it_is_given_away";
    let Some(mut kernel) = start_preempted(name) else { return };
    let (mut shell, root, job) = passed_over(&mut kernel);
    // Neither the shell between nor any of those that it leaves is known.
    let many = shell.ask("sh -c 'for i in 1 2 3 4 5; do sleep 60 >/dev/null & p=\"$p $!\"; done; echo $p'");
    let orphans: HashSet<u32> = many.split(' ').map(|p| p.parse().unwrap()).collect();
    assert_eq!(orphans.len(), 5);
    let all = orphans.iter().copied().chain([root.pid]).collect();
    expect_members(&kernel, job, &all);
    for pid in orphans {
        let key = Key::new(pid, kernel.start_of(pid).unwrap().unwrap());
        let l = kernel.lineage_of(key).unwrap().unwrap();
        let between = kernel.lineage_of(l.parent.into()).unwrap().unwrap();
        assert_eq!((Key::from(between.parent), between.job, l.flags), (root, job, LINEAGE_MENDED));
    }
    shell.ask(&format!("kill -9 {many}; echo"));
}

#[tokio::test]
async fn one_whose_fork_was_passed_over_is_entered_when_it_forks() {
    let name = "one_whose_fork_was_passed_over_is_entered_when_it_forks";
    let Some(mut kernel) = start_preempted(name) else { return };
    let (mut shell, root, job) = passed_over(&mut kernel);
    let unseen = shell.background("sh -c 'kill -STOP $$; sleep 60 & wait'");
    let stopped = || crate::sources::proc::Proc::default().stat(unseen).is_ok_and(|s| s.state == b'T');
    wait_for("it stops", Duration::from_secs(20), stopped);
    assert_eq!(pids(&kernel, job), HashSet::from([root.pid]));
    let _fork = sys::attach_tp_btf(kernel.program("fork").unwrap()).unwrap();
    shell.ask(&format!("kill -CONT {unseen}; echo"));
    let mut members = HashSet::new();
    wait_for("it and its child", Duration::from_secs(20), || {
        members = pids(&kernel, job);
        members.len() == 3
    });
    assert!(members.contains(&unseen), "{members:?}");
    let child = *members.iter().find(|&&p| p != unseen && p != root.pid).unwrap();
    shell.ask(&format!("kill -9 {unseen} {child}; echo"));
}

#[tokio::test]
async fn one_that_a_snapshot_finds_is_in_the_job_of_its_parent() {
    let name = "one_that_a_snapshot_finds_is_in_the_job_of_its_parent";
    let Some(mut kernel) = start(name, &Options::default()) else { return };
    let (mut shell, root, job) = passed_over(&mut kernel);
    let unseen = shell.background("sleep 60");
    assert_eq!(pids(&kernel, job), HashSet::from([root.pid]));
    kernel.snapshot().unwrap();
    expect_members(&kernel, job, &HashSet::from([root.pid, unseen]));
}

#[tokio::test]
async fn members_by_lineage() {
    // Started before the probes, as most that is labelled is.
    let mut shell = Shell::new();
    let before = shell.background("sleep 60");
    let Some(kernel) = start("members_by_lineage", &Options::default()) else { return };
    let root = shell.key(&kernel);
    let (outer, inner) = (kernel.now(), kernel.now() + 1);
    kernel.label(outer, 0, root).unwrap();
    assert_eq!(pids(&kernel, outer), HashSet::from([root.pid, before]));
    // Forked later: a member by the fork probe, in a session of its own too.
    let later = shell.background("setsid sleep 60");
    // Its parent is gone at once.
    let orphan: u32 = shell.ask("(sleep 60 >/dev/null </dev/null & echo $!)").parse().unwrap();
    wait_for("the orphan's adoption", Duration::from_secs(10), || {
        crate::sources::proc::Proc::default().stat(orphan).is_ok_and(|s| s.ppid != root.pid)
    });
    let all = HashSet::from([root.pid, before, later, orphan]);
    expect_members(&kernel, outer, &all);
    // An inner job: its members are the outer one's too.
    let start = kernel.start_of(later).unwrap().unwrap();
    kernel.label(inner, outer, Key::new(later, start)).unwrap();
    assert_eq!(pids(&kernel, inner), HashSet::from([later]));
    expect_members(&kernel, outer, &all);
    kernel.forget(inner).unwrap();
    assert_eq!(pids(&kernel, inner), HashSet::new());
    expect_members(&kernel, outer, &all);
    assert_eq!(kernel.job_numbers().unwrap(), [(outer, 0)]);
    // SAFETY: started above, and of this test.
    unsafe { libc::kill(orphan as i32, libc::SIGKILL) };
}

/// Labelling goes on until a pass changes nothing, so what the program in the kernel answers must be true.
#[tokio::test]
async fn an_edit_says_what_it_did() {
    let Some(kernel) = start("an_edit_says_what_it_did", &Options::default()) else { return };
    let shell = Shell::new();
    let key = shell.key(&kernel);
    let edit = |job| kernel.edit(&Edit { job: Some(job), ..Edit::of(key) }).unwrap();
    assert_eq!(
        (edit(7), edit(7), edit(8), edit(0)),
        (Edited::Changed, Edited::Unchanged, Edited::Changed, Edited::Changed)
    );
    let nobody = Key::new(key.pid, key.start + 1);
    assert_eq!(kernel.edit(&Edit { job: Some(7), ..Edit::of(nobody) }).unwrap(), Edited::Missing);
    assert_eq!(kernel.lineage_of(nobody).unwrap(), None);
}

#[tokio::test]
async fn a_job_around_a_job() {
    let Some(kernel) = start("a_job_around_a_job", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let child = shell.background("sleep 60");
    let key = Key::new(child, kernel.start_of(child).unwrap().unwrap());
    let (inner, outer) = (kernel.now(), kernel.now() + 1);
    kernel.label(inner, 0, key).unwrap();
    kernel.label(outer, 0, root).unwrap();
    assert_eq!(pids(&kernel, inner), HashSet::from([child]));
    assert_eq!(pids(&kernel, outer), HashSet::from([root.pid, child]));
    let jobs: HashSet<_> = kernel.job_numbers().unwrap().into_iter().collect();
    assert_eq!(jobs, HashSet::from([(inner, outer), (outer, 0)]));
}

#[tokio::test]
async fn lineage_through_the_dead() {
    let Some(kernel) = start("lineage_through_the_dead", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let orphan: u32 = shell.ask("(sleep 60 >/dev/null </dev/null & echo $!)").parse().unwrap();
    let key = Key::new(orphan, kernel.start_of(orphan).unwrap().unwrap());
    let middle = kernel.lineage_parent(key).unwrap().unwrap();
    assert_ne!(middle, root);
    assert_eq!(kernel.lineage_parent(middle).unwrap(), Some(root));
    // Whether the middle is freed yet or not, and whoever adopted the orphan.
    let job = kernel.now();
    kernel.label(job, 0, root).unwrap();
    expect_members(&kernel, job, &HashSet::from([root.pid, orphan]));
    // SAFETY: started above, and of this test.
    unsafe { libc::kill(orphan as i32, libc::SIGKILL) };
}

#[tokio::test]
async fn the_spare_flag_is_inherited() {
    let Some(kernel) = start("the_spare_flag_is_inherited", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let job = kernel.now();
    kernel.label(job, 0, root).unwrap();
    let order = OrderId::fresh();
    kernel.spare(root, true, order).unwrap();
    let child = shell.background("sleep 60");
    let spared = |pid| kernel.members(job).unwrap().iter().any(|m| m.key.pid == pid && m.spared);
    assert!(spared(root.pid) && spared(child));
    // What is over leaves nobody flagged, nor what it will ever fork.
    kernel.release(order).unwrap();
    let later = shell.background("sleep 60");
    assert!(!spared(root.pid) && !spared(child) && !spared(later));
}

/// The client's shell is spared, and what it forks is not.
#[tokio::test]
async fn who_is_spared_alone_hands_nothing_down() {
    let Some(kernel) = start("who_is_spared_alone_hands_nothing_down", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let (job, order, other) = (kernel.now(), OrderId::fresh(), OrderId::fresh());
    kernel.label(job, 0, root).unwrap();
    let spared = |pid| kernel.members(job).unwrap().iter().any(|m| m.key.pid == pid && m.spared);
    kernel.spare(root, false, order).unwrap();
    let child = shell.background("sleep 60");
    assert!(spared(root.pid) && !spared(child));
    // With its heirs by another order; and the first one, renewed, takes nothing from those.
    kernel.spare(root, true, other).unwrap();
    kernel.spare(root, false, order).unwrap();
    let heir = shell.background("sleep 60");
    assert!(spared(root.pid) && !spared(child) && spared(heir));
    kernel.release(other).unwrap();
    let later = shell.background("sleep 60");
    assert!(spared(root.pid) && !spared(heir) && !spared(later));
    kernel.release(order).unwrap();
    assert!(!spared(root.pid));
}

#[tokio::test]
async fn who_holds_a_pipe() {
    let Some(kernel) = start("who_holds_a_pipe", &Options::default()) else { return };
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let inode = rustix::fs::fstat(&reader).unwrap().st_ino;
    let mut child = Child::spawn(Command::new("/bin/sleep").arg("60").stderr(writer));
    let of = |pid: u32| {
        let rows = kernel.holders(&[inode]).unwrap();
        assert!(rows.iter().all(|r| r.inode == inode));
        let rows = rows.iter().filter(|r| r.key.tgid == pid);
        rows.map(|r| (r.fd, r.mode & 3)).collect::<HashSet<_>>()
    };
    // exec wakes who forked before it closes what is to be closed (`begin_new_exec` in fs/exec.c).
    wait_for("the exec", Duration::from_secs(10), || of(child.0.id()) == HashSet::from([(2, 2)]));
    assert!(of(std::process::id()).contains(&(reader.as_raw_fd() as u32, 1)));
    child.end();
    let after = kernel.holders(&[inode]).unwrap();
    assert!(after.iter().all(|r| r.key.tgid != child.0.id()));
}

/// Chains in which each process forks its successor and exits, until it is killed or `seconds` are over.
fn start_chains(n: u32, seconds: i64) -> (i32, std::os::fd::OwnedFd) {
    let (go_read, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let read_fd = go_read.as_raw_fd();
    // SAFETY: the children call nothing but system calls.
    unsafe {
        let root = libc::fork();
        if root != 0 {
            return (root, go);
        }
        // Nothing else that other tests have open, locks among it, is held on to by a fork without exec.
        libc::dup2(read_fd, 0);
        libc::close_range(3, libc::c_uint::MAX, 0);
        let mut byte = 0_u8;
        libc::read(0, std::ptr::from_mut(&mut byte).cast(), 1);
        let now = || {
            let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t);
            t.tv_sec
        };
        let end = now() + seconds;
        for _ in 0..n {
            if libc::fork() == 0 {
                while now() < end {
                    match libc::fork() {
                        0 => {}
                        _ => libc::_exit(0),
                    }
                }
                libc::_exit(0);
            }
        }
        libc::_exit(0);
    }
}

#[tokio::test]
async fn doom_ends_chains_and_nobody_else() {
    let Some(kernel) = start("doom_ends_chains_and_nobody_else", &Options::default()) else { return };
    let (root, go) = start_chains(5, 60);
    let (stranger, _stays) = start_chains(0, 60);
    let key = Key::new(root as u32, kernel.start_of(root as u32).unwrap().unwrap());
    let job = kernel.now();
    kernel.label(job, 0, key).unwrap();
    rustix::io::write(&go, b"g").unwrap();
    // The root exits when it has begun the last chain.
    wait_for("the chains", Duration::from_mins(1), || {
        let members = kernel.members(job).unwrap();
        members.iter().all(|m| m.key != key || m.dead) && members.iter().any(|m| !m.dead)
    });
    assert!(!kernel.doom_attached());
    let order = OrderId::fresh();
    kernel.doom(job, kernel.now() + 60_000_000_000, order).unwrap();
    assert!(kernel.doom_attached());
    wait_for("the chains' end", Duration::from_secs(30), || pids(&kernel, job).is_empty());
    let kills = kernel.kills().unwrap();
    assert!(kills.ok >= 5, "{kills:?}");
    assert_eq!((kills.busy, kills.perm, kills.other), (0, 0, 0));
    kernel.release(order).unwrap();
    assert!(!kernel.doom_attached());
    // SAFETY: both were forked above; the stranger is still in its read.
    unsafe {
        assert_eq!(libc::kill(stranger, 0), 0);
        assert_eq!(libc::waitpid(stranger, std::ptr::null_mut(), libc::WNOHANG), 0);
        libc::kill(stranger, libc::SIGKILL);
        libc::waitpid(stranger, std::ptr::null_mut(), 0);
        libc::waitpid(root, std::ptr::null_mut(), 0);
    }
}

#[tokio::test]
async fn doom_passes_over_the_spared_and_expires() {
    let Some(kernel) = start("doom_passes_over_the_spared_and_expires", &Options::default()) else { return };
    let mut shell = Shell::new();
    let root = shell.key(&kernel);
    let (outer, inner) = (kernel.now(), kernel.now() + 1);
    kernel.label(outer, 0, root).unwrap();
    let order = OrderId::fresh();
    kernel.spare(root, true, order).unwrap();
    kernel.doom(outer, kernel.now() + MINUTE, order).unwrap();
    // It enters system calls, and is still there; so is what it forks.
    assert_eq!(shell.ask("echo $(echo alive)"), "alive");
    kernel.release(order).unwrap();
    // A doom that has expired kills nobody, and its probe is detached by the next look.
    kernel.doom(outer, kernel.now() - 1, order).unwrap();
    assert!(!kernel.doom_attached());
    assert_eq!(shell.ask("echo alive"), "alive");
    let sleeper = shell.background("sleep 60");
    let sleeper = Key::new(sleeper, kernel.start_of(sleeper).unwrap().unwrap());
    kernel.label(inner + 1, outer, sleeper).unwrap();
    let until = kernel.now() + 1_000_000_000;
    kernel.doom(inner + 1, until, order).unwrap();
    assert!(kernel.doom_attached());
    wait_for("the doom's end", Duration::from_secs(10), || kernel.now() > until);
    kernel.attach_while_doomed().unwrap();
    assert!(!kernel.doom_attached());
    kernel.release(order).unwrap();
    // The doom of the outer job takes the inner one's members.
    kernel.label(inner, outer, root).unwrap();
    kernel.doom(outer, kernel.now() + MINUTE, order).unwrap();
    let _ = writeln!(shell.child.0.stdin.as_mut().unwrap(), "echo dead");
    wait_for("the shell's end", Duration::from_secs(30), || !pids(&kernel, inner).contains(&root.pid));
    kernel.release(order).unwrap();
    assert!(kernel.doom(outer + 7, 1, order).is_err());
    // SAFETY: started above, and of this test: asleep in a system call, so that no probe has reached it.
    unsafe { libc::kill(sleeper.pid as i32, libc::SIGKILL) };
}

/// A bpffs of the test's own, unmounted when it ends.
pub(super) struct OwnBpffs(tempfile::TempDir);

impl OwnBpffs {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    pub(super) fn options(&self) -> Options {
        Options { bpffs: Some(self.0.path().to_owned()), ..Options::default() }
    }
}

impl Drop for OwnBpffs {
    fn drop(&mut self) {
        let _ = unpin(self.0.path());
        let path = std::ffi::CString::new(self.0.path().as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: mounted by this test.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

#[tokio::test]
async fn pins_go_on_while_the_agent_is_down() {
    let bpffs = OwnBpffs::new();
    let Some(first) = start("pins_go_on_while_the_agent_is_down", &bpffs.options()) else { return };
    assert!(!first.from_pins());
    assert!(matches!(Kernel::start(&bpffs.options()), Err(KernelError::Locked { .. })));
    assert!(matches!(unpin(bpffs.0.path()), Err(KernelError::Locked { .. })));
    let mut shell = Shell::new();
    let root = shell.key(&first);
    let job = first.now();
    first.label(job, 0, root).unwrap();
    drop(first);
    // Nobody reads; the fork probe still hands the job down, and the records wait in the ring.
    let child = shell.background("sleep 60");
    let second = Kernel::start(&bpffs.options()).unwrap();
    assert!(second.from_pins());
    expect_members(&second, job, &HashSet::from([root.pid, child]));
    let mut ring = second.take_ring().unwrap();
    let mut forked = false;
    ring.drain(usize::MAX, &mut |b| {
        let e = decode(b).unwrap();
        forked |= e.process.pid == child && matches!(e.body, Body::Fork { job: j, .. } if j == job);
    });
    assert!(forked);
    drop((second, ring));
    // Another layout: beside, copied, and the old one gone.
    let other = Options { dead_entries: Some(1024), ..bpffs.options() };
    let third = Kernel::start(&other).unwrap();
    assert!(!third.from_pins());
    expect_members(&third, job, &HashSet::from([root.pid, child]));
    assert_eq!(
        third.lineage_parent(Key::new(child, third.start_of(child).unwrap().unwrap())).unwrap(),
        Some(root)
    );
    assert_eq!(std::fs::read_dir(bpffs.0.path().join("jobwarden")).unwrap().count(), 1);
    // Who was copied is in reach of a doom.
    let order = OrderId::fresh();
    third.doom(job, third.now() + MINUTE, order).unwrap();
    let _ = writeln!(shell.child.0.stdin.as_mut().unwrap(), "echo dead");
    wait_for("the shell's end", Duration::from_secs(30), || !pids(&third, job).contains(&root.pid));
    third.release(order).unwrap();
    // SAFETY: started above, and of this test: asleep in a system call, so that no probe has reached it.
    unsafe { libc::kill(child as i32, libc::SIGKILL) };
    drop(third);
    assert!(unpin(bpffs.0.path()).unwrap() > 20);
    assert_eq!(unpin(bpffs.0.path()).unwrap(), 0);
}

#[tokio::test]
async fn foreign_pins_are_told_and_left() {
    let bpffs = OwnBpffs::new();
    let Some(first) = start("foreign_pins_are_told_and_left", &bpffs.options()) else { return };
    drop(first);
    let folder = bpffs.0.path().join("jobwarden");
    let set = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    // Not whole.
    std::fs::rename(set.join("link_fork"), set.join("kept")).unwrap();
    let told = Kernel::start(&bpffs.options()).map(drop).unwrap_err().to_string();
    assert!(told.contains("not whole") && told.contains("jobwarden unpin"), "{told}");
    std::fs::rename(set.join("kept"), set.join("link_fork")).unwrap();
    // A map of other sizes in the place of one.
    std::fs::remove_file(set.join("map_JOBS")).unwrap();
    std::fs::rename(set.join("map_INODES"), set.join("map_JOBS")).unwrap();
    assert!(Kernel::start(&bpffs.options()).is_err());
    // A set that was cut off while it was made is not taken for one.
    assert!(unpin(bpffs.0.path()).unwrap() > 0);
    std::fs::create_dir_all(folder.join("unfinished-v2-0")).unwrap();
    assert!(!Kernel::start(&bpffs.options()).unwrap().from_pins());
    assert!(!folder.join("unfinished-v2-0").exists());
}
