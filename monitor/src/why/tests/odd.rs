//! What happens while one looks: processes vanish, files may not be read, the machine is full.

use super::*;

/// Each script says `z`, then does what gives its verdict.
const MIX: [(&str, Verdict); 8] = [
    (
        "r, w = os.pipe(); os.set_inheritable(w, True); c = sleeper(); os.close(w); say(z=dead(), c=c); os.read(r, 1)",
        Verdict::ParentBlockedOnPipe,
    ),
    (
        "p = subprocess.Popen(['sleep', '300'], stdout=-1, stderr=-1); say(z=dead(), c=p.pid); p.communicate()",
        Verdict::ParentBlockedOnPipe,
    ),
    ("c = sleeper(); say(z=dead(), c=c); os.waitpid(c, 0)", Verdict::ParentWaitingForOtherChild),
    ("say(z=dead()); os.kill(os.getpid(), signal.SIGSTOP)", Verdict::ParentStopped),
    ("say(z=dead()); time.sleep(300)", Verdict::ParentBlocked),
    ("l = threading.Lock(); l.acquire(); say(z=dead()); l.acquire()", Verdict::ParentBlocked),
    ("say(z=dead())\nwhile True: pass", Verdict::ParentBusy),
    (
        "os.mkfifo('f'); say(z=dead()); os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(0, 5, 'f', os.O_RDONLY, 0)])",
        Verdict::ParentUninterruptible,
    ),
];

fn ready(made: &Made, verdict: Verdict) {
    let parent = made.child.id();
    match verdict {
        Verdict::ParentBlockedOnPipe => until_in(parent, &["read", "poll", "ppoll"]),
        Verdict::ParentWaitingForOtherChild => until_in(parent, &["wait4"]),
        Verdict::ParentStopped => until("stopped", || state(parent) == Some(b'T')),
        Verdict::ParentBlocked => until_in(parent, &["clock_nanosleep", "futex"]),
        Verdict::ParentUninterruptible => until("uninterruptible", || stays_uninterruptible(parent)),
        _ => {}
    }
}

/// All at once, each asked about in turn. `JWTEST_WHY_ROUNDS` gives the number of rounds.
#[test]
fn a_mixed_crowd() {
    let rounds = std::env::var("JWTEST_WHY_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(1);
    for round in 0..rounds {
        let mut crowd: Vec<(Made, Verdict)> = MIX.iter().map(|(script, v)| (Made::new(script), *v)).collect();
        let zombies: Vec<u32> = crowd.iter_mut().map(|(made, _)| pid(&made.said(), "z")).collect();
        for ((made, verdict), zombie) in crowd.iter().zip(zombies) {
            ready(made, *verdict);
            let c = ask_zombie(zombie, made.child.id());
            assert_eq!(c.verdict, *verdict, "round {round}: {c:#?}");
        }
        // The vfork parent dies only when its child is ended first; both carry the mark.
        drop(crowd);
    }
}

/// The family is ended at a moment that differs each time: no panic, no long wait, and no verdict but those of before
/// and after.
#[test]
fn vanishing_meanwhile() {
    for round in 0..24_u64 {
        let (script, verdict) = MIX[round as usize % 3];
        let mut made = Made::new(script);
        let z = pid(&made.said(), "z");
        until_zombie(z);
        ready(&made, verdict);
        let w = process(made.child.id(), None);
        let q = question(process(z, Some(w.id)), vec![w]);
        let worker = made.child.id();
        std::thread::scope(|s| {
            s.spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 150));
                kill(worker, libc::SIGKILL);
            });
            let began = Instant::now();
            let c = ask(&q);
            assert!(began.elapsed() < Duration::from_secs(10));
            let fits = [
                verdict,
                Verdict::BeingReaped,
                Verdict::InitNotReaping,
                Verdict::Unknown,
                Verdict::NotAZombie,
            ];
            assert!(fits.contains(&c.verdict), "{round}: {c:#?}");
        });
    }
}

/// A /proc with only some files of a zombie and its parent.
fn fake(parent: &[(&str, &str)]) -> (tempfile::TempDir, Question) {
    let dir = tempfile::tempdir().unwrap();
    let put = |pid: u32, files: &[(&str, &str)]| {
        for (name, text) in files {
            let path = dir.path().join(pid.to_string()).join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    };
    let stat = |pid: u32, state: char, ppid: u32| {
        format!("{pid} (x) {state} {ppid} 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 500 0 0")
    };
    let (z, p) = (stat(20, 'Z', 10), stat(10, 'S', 1));
    put(20, &[("stat", &z), ("task/20/stat", &z)]);
    put(10, &[("stat", &p), ("task/10/stat", &p)]);
    put(10, parent);
    let mut subject = process(std::process::id(), None);
    (subject.id, subject.pid, subject.state) = (Key::new(20, 5_000_000_000), 20, State::Zombie);
    (dir, question(subject, Vec::new()))
}

fn ask_fake(parent: &[(&str, &str)]) -> Cause {
    let (dir, q) = fake(parent);
    let proc = Proc::at(dir.path());
    ask_by(&q, &proc, &ProcHolders(proc.clone()))
}

#[test]
fn what_may_not_be_read_is_said_and_not_guessed() {
    let c = ask_fake(&[]);
    assert_eq!(c.verdict, Verdict::Unknown, "{c:#?}");
    let unread = |what: &str| {
        let said = |e: &Evidence| matches!(e, Evidence::Note { text } if text.contains(what));
        assert!(c.evidence.iter().any(said), "{c:#?}");
    };
    unread("could not be read: status of 10");
    unread("could not be read: system call of thread 10");
    // With what stands in the other files it can be told.
    let sleeps = "230 0x0 0x0 0x1 0x0 0x0 0x0 0x7ffc7e1e4228 0x7fedde92c503\n";
    assert_eq!(ask_fake(&[("task/10/syscall", sleeps)]).verdict, Verdict::ParentBlocked);
    let traced = "TracerPid:\t10\nNSpid:\t10\n";
    assert_eq!(ask_fake(&[("status", traced)]).verdict, Verdict::Unknown);
    // A 32-bit program's calls have other numbers: 0 is not read there.
    let small = "0 0x4 0x0 0x1 0x0 0x0 0x0 0xffc7e1e4 0xf7ed2503\n";
    assert_eq!(ask_fake(&[("task/10/syscall", small)]).verdict, Verdict::Unknown);
}

#[test]
fn nothing_in_proc_at_all() {
    let (_dir, q) = fake(&[]);
    let proc = Proc::at("/nonexistent");
    let c = ask_by(&q, &proc, &ProcHolders(proc.clone()));
    assert_eq!(c.verdict, Verdict::BeingReaped);
}

/// Answers by the kernel's iterator are believed only if /proc agrees; its failure is said, and /proc used instead.
struct Lying(io::Result<Vec<FdRow>>);

use std::io;

impl Holders for Lying {
    fn holders(&self, _: &[u64]) -> io::Result<Vec<FdRow>> {
        self.0.as_ref().map(Clone::clone).map_err(|e| io::Error::from(e.kind()))
    }
}

#[test]
fn the_iterator_is_checked_and_its_failure_is_said() {
    let mut made = Made::new(MIX[0].0);
    let said = made.said();
    let (z, holder) = (pid(&said, "z"), pid(&said, "c"));
    until_zombie(z);
    until_in(made.child.id(), &["read"]);
    let w = process(made.child.id(), None);
    let q = question(process(z, Some(w.id)), vec![w]);
    let proc = Proc::default();
    let me = key(std::process::id());
    let wrong = FdRow { process: me, fd: 0, inode: 1, read: true, write: true };
    let c = ask_by(&q, &proc, &Lying(Ok(vec![wrong])));
    assert_eq!(c.verdict, Verdict::ParentBlocked, "{c:#?}");
    let c = ask_by(&q, &proc, &Lying(Err(io::ErrorKind::PermissionDenied.into())));
    assert_eq!((c.verdict, holders(&c)[0].0), (Verdict::ParentBlockedOnPipe, holder), "{c:#?}");
    let note =
        |e: &Evidence| matches!(e, Evidence::Note { text } if text.contains("iterator over open files"));
    assert!(c.evidence.iter().any(note), "{c:#?}");
}

/// 2,000 processes with 25 open files each beside the incident: time by the kernel's iterator, if this user may have
/// it, and by /proc. Printed, not judged: run it alone, on a quiet machine.
#[test]
#[ignore = "a measurement: cargo test -p jobwarden --lib -- --ignored --nocapture why::tests::odd::measured"]
fn measured() {
    let mut crowd = Made::new(
        "\
r, w = os.pipe()
for _ in range(2000):
    if os.fork() == 0:
        os.close(w)
        while len(os.listdir('/proc/self/fd')) < 26:
            os.pipe()
        os.read(r, 1)
        os._exit(0)
say(ok=1)
time.sleep(3000)
",
    );
    crowd.said();
    let mut made = Made::new(MIX[0].0);
    let z = pid(&made.said(), "z");
    until_zombie(z);
    until_in(made.child.id(), &["read"]);
    let w = process(made.child.id(), None);
    let q = question(process(z, Some(w.id)), vec![w]);
    let proc = Proc::default();
    let no_python = Limits { python: Duration::ZERO, ..Limits::default() };
    let time = |what: &str, holders: &dyn Holders| {
        let cpu = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let cpu = || Duration::new(cpu().tv_sec as u64, cpu().tv_nsec as u32);
        let mut took: Vec<(Duration, Duration)> = (0..11)
            .map(|_| {
                let (began, before) = (Instant::now(), cpu());
                assert_eq!(explain(&q, &proc, holders, &no_python).verdict, Verdict::ParentBlockedOnPipe);
                (began.elapsed(), cpu().saturating_sub(before))
            })
            .collect();
        took.sort_unstable();
        println!(
            "why by {what}: median {:?} (of it on a CPU {:?}), most {:?}",
            took[5].0, took[5].1, took[10].0
        );
    };
    time("/proc", &ProcHolders(proc.clone()));
    let options = crate::sources::kernel::Options::default();
    match crate::sources::kernel::Kernel::start(&options) {
        Ok(kernel) => time("iter/task_file", &kernel),
        Err(e) => println!("no kernel side: {e}"),
    }
}
