use super::*;

/// The worker of the incident; `{wait}` is how it reads.
fn incident(wait: &str) -> Made {
    Made::new(&format!(
        "\
popen = subprocess.Popen(['sh', '-c', 'sleep 300 > /dev/null & echo $!; wait'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
orphan = int(popen.stdout.readline())
say(worker=os.getpid(), command=popen.pid, orphan=orphan)
popen.send_signal(signal.SIGTERM)
{wait}
popen.wait()
say(done=1)
"
    ))
}

struct Incident {
    made: Made,
    worker: u32,
    orphan: u32,
    q: Question,
}

fn happened(wait: &str, calls: &[&str]) -> Incident {
    let mut made = incident(wait);
    let s = made.said();
    let (worker, command, orphan) = (pid(&s, "worker"), pid(&s, "command"), pid(&s, "orphan"));
    until_zombie(command);
    until_in(worker, calls);
    let w = process(worker, None);
    let mut z = process(command, Some(w.id));
    z.exit = Some(by_signal("SIGTERM", Some(w.to_ref())));
    let o = process(orphan, Some(z.id));
    assert!(o.orphan);
    let mut q = question(z, vec![w, o]);
    q.signals.push(sent(15, &q.family[0], &q.subject, SignalResult::Delivered));
    let root = q.family[0].id;
    in_job(&mut q, root);
    Incident { made, worker, orphan, q }
}

#[test]
fn the_incident() {
    let mut i = happened("popen.stderr.read()", &["read"]);
    let c = ask(&i.q);
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{c:#?}");
    let (call, fd, inode) = blocked_in(&c);
    let link = std::fs::read_link(format!("/proc/{}/fd/{}", i.worker, fd.unwrap())).unwrap();
    assert_eq!((call, inode), ("read", link.to_str().unwrap()));
    let adopter = Proc::default().stat(i.orphan).unwrap().ppid;
    let held = holders(&c);
    assert_eq!((held[0].0, held[0].1, held.len()), (i.orphan, inode, 1));
    assert!(
        held[0].2.contains("orphan of this job") && held[0].2.contains(&format!("({adopter}) 42 s ago")),
        "{held:?}"
    );
    let signal = |e: &Evidence| {
        matches!(e, Evidence::Signal { signal, sender: Some(s), target, .. }
            if signal == "SIGTERM" && s.pid == i.worker && target.id == i.q.subject.id)
    };
    assert!(c.evidence.iter().any(signal), "{c:#?}");
    assert!(c.summary.contains("SIGTERM from python3"), "{}", c.summary);
    let line = |e: &Evidence| {
        matches!(e, Evidence::Python { file, source: Some(s), .. }
            if s == "popen.stderr.read()" && std::path::Path::new(file.raw()).starts_with(i.made.dir.path()))
    };
    assert_eq!(c.evidence.iter().any(line), cfg!(feature = "python"), "{c:#?}");
    assert_eq!(c.remedy, format!("jobwarden kill {}", key(i.orphan)));
    // What the remedy does frees the worker.
    kill(i.orphan, libc::SIGKILL);
    assert_eq!(pid(&i.made.said(), "done"), 1);
}

#[test]
fn the_incident_read_by_poll_select_epoll() {
    let by_epoll = "e = select.epoll(); e.register(popen.stderr, select.EPOLLIN); e.poll()";
    for (wait, call) in [
        ("popen.communicate()", &["poll", "ppoll"][..]),
        ("select.select([popen.stderr], [], [])", &["select", "pselect6"]),
        (by_epoll, &["epoll_wait", "epoll_pwait"]),
        ("os.readv(popen.stderr.fileno(), [bytearray(9)])", &["readv"]),
    ] {
        let i = happened(wait, call);
        let c = ask(&i.q);
        assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{wait}: {c:#?}");
        assert!(call.contains(&blocked_in(&c).0), "{c:#?}");
        assert!(holders(&c).iter().all(|h| h.0 == i.orphan) && !holders(&c).is_empty(), "{c:#?}");
        assert_eq!(c.remedy, format!("jobwarden kill {}", key(i.orphan)));
    }
}

/// A worker whose dead child's child holds `theirs`, while it reads `ours`.
fn through(open: &str, read: &str) -> (Made, Cause, u32) {
    let mut made = Made::new(&format!(
        "\
{open}
r, w = os.pipe()
z = os.fork()
if z == 0:
    os.close(ours)
    os.write(w, str(sleeper()).encode())
    os._exit(0)
os.close(theirs)
say(worker=os.getpid(), zombie=z, orphan=int(os.read(r, 9)))
{read}
"
    ));
    let s = made.said();
    let (worker, zombie, orphan) = (pid(&s, "worker"), pid(&s, "zombie"), pid(&s, "orphan"));
    until_zombie(zombie);
    until_in(worker, &["read", "recvfrom", "recvmsg"]);
    let w = process(worker, None);
    let z = process(zombie, Some(w.id));
    let o = process(orphan, Some(z.id));
    let c = ask(&question(z, vec![w, o]));
    (made, c, orphan)
}

#[test]
fn through_a_terminal_a_socket_pair_and_a_fifo() {
    let fifo = "os.mkfifo('f'); ours = os.open('f', os.O_RDONLY | os.O_NONBLOCK); theirs = os.open('f', os.O_WRONLY); os.set_blocking(ours, True)";
    let pair =
        "a, b = socket.socketpair(); ours, theirs = a.fileno(), b.fileno(); os.set_inheritable(theirs, True)";
    for (open, read, inode) in [
        ("ours, theirs = os.openpty(); os.set_inheritable(theirs, True)", "os.read(ours, 9)", "/dev/pts/"),
        (pair, "a.recv(9)", "socket:["),
        (pair, "os.read(ours, 9)", "socket:["),
        (&format!("{fifo}; os.set_inheritable(theirs, True)"), "os.read(ours, 9)", "/f"),
    ] {
        let (_made, c, orphan) = through(open, read);
        assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{open}: {c:#?}");
        let held = holders(&c);
        assert!(held.iter().any(|h| h.0 == orphan && h.1.contains(inode)), "{open}: {c:#?}");
        assert_eq!(held.len(), 1, "{c:#?}");
        assert_eq!(c.remedy, format!("jobwarden kill {}", key(orphan)));
    }
}

#[test]
fn a_holder_two_adoptions_away() {
    let mut made = Made::new(
        "\
r, w = os.pipe()
say_r, say_w = os.pipe()
z = os.fork()
if z == 0:
    a = os.fork()
    if a == 0:
        libc.prctl(36, 1, 0, 0, 0)
        b = os.fork()
        if b == 0:
            os.set_inheritable(w, True)
            holder = sleeper()
            os.write(say_w, f'{os.getppid()} {os.getpid()} {holder}'.encode())
            os._exit(0)
        os.waitpid(b, 0)
        time.sleep(0.1)
        os._exit(0)
    os.waitpid(a, 0)
    os._exit(0)
os.close(w)
a, b, holder = (int(x) for x in os.read(say_r, 99).split())
say(z=z, a=a, b=b, holder=holder)
os.read(r, 1)
",
    );
    let s = made.said();
    let (worker, z, holder) = (made.child.id(), pid(&s, "z"), pid(&s, "holder"));
    until_zombie(z);
    until_in(worker, &["read"]);
    let w = process(worker, None);
    let z = process(z, Some(w.id));
    let a = reaped(Key::new(pid(&s, "a"), 5), Some(z.id), Exit::Code { code: 0 });
    let b = reaped(Key::new(pid(&s, "b"), 6), Some(a.id), Exit::Code { code: 0 });
    let h = process(holder, Some(b.id));
    let c = ask(&question(z, vec![w, a, b, h]));
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{c:#?}");
    let held = holders(&c);
    assert_eq!(held[0].0, holder);
    assert!(held[0].2.contains("descends from the zombie"), "{held:?}");
    assert_eq!(c.remedy, format!("jobwarden kill {}", key(holder)));
}

#[test]
fn the_parent_holds_the_other_end_itself() {
    let mut made = Made::new("r, w = os.pipe()\nsay(z=dead())\nos.read(r, 1)");
    let z = pid(&made.said(), "z");
    until_in(made.child.id(), &["read"]);
    let c = ask_zombie(z, made.child.id());
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{c:#?}");
    assert_eq!(holders(&c)[0].0, made.child.id());
    assert!(!c.remedy.contains("jobwarden kill"), "{}", c.remedy);
}

#[test]
fn waits_for_another_child() {
    let script = "z = dead(); c = sleeper()\nsay(z=z, c=c)\n";
    for (wait, call) in [
        ("os.waitpid(c, 0)", "wait4"),
        ("os.waitid(os.P_PID, c, os.WEXITED)", "waitid"),
        ("os.waitid(os.P_PIDFD, os.pidfd_open(c), os.WEXITED)", "waitid"),
        ("p = select.poll(); p.register(os.pidfd_open(c), 1); p.poll()", "poll"),
    ] {
        let mut made = Made::new(&format!("{script}{wait}"));
        let s = made.said();
        until_in(made.child.id(), &[call]);
        until_in(pid(&s, "c"), &["clock_nanosleep"]);
        let c = ask_zombie(pid(&s, "z"), made.child.id());
        assert_eq!(c.verdict, Verdict::ParentWaitingForOtherChild, "{wait}: {c:#?}");
        assert_eq!(waits_for(&c), [pid(&s, "c")]);
        assert!(c.summary.contains("sleep"), "{}", c.summary);
        assert_eq!(c.remedy, format!("jobwarden why {}", key(pid(&s, "c"))));
    }
}

#[test]
fn a_stopped_parent_and_who_stopped_it() {
    let mut made = Made::new("say(z=dead())\ntime.sleep(300)");
    let z = pid(&made.said(), "z");
    until_zombie(z);
    let me = process(std::process::id(), None);
    kill(made.child.id(), libc::SIGSTOP);
    until("stopped", || state(made.child.id()) == Some(b'T'));
    let p = process(made.child.id(), Some(me.id));
    let mut q = question(process(z, Some(p.id)), vec![p.clone()]);
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::ParentStopped, "{c:#?}");
    assert!(!c.evidence.iter().any(|e| matches!(e, Evidence::Signal { .. })));
    q.signals = vec![
        sent(19, &p, &p, SignalResult::Delivered),
        sent(18, &me, &p, SignalResult::Delivered),
        sent(19, &me, &p, SignalResult::Delivered),
    ];
    let c = ask(&q);
    let by = |e: &Evidence| matches!(e, Evidence::Signal { signal, sender: Some(s), .. } if signal == "SIGSTOP" && s.pid == me.pid);
    assert_eq!(c.evidence.iter().filter(|e| by(e)).count(), 1, "{c:#?}");
    assert!(c.summary.contains(&format!("SIGSTOP from {}", family::short(&me.to_ref()))), "{}", c.summary);
    assert!(c.remedy.contains(&p.id.to_string()), "{}", c.remedy);
    assert!(c.remedy.ends_with(&format!("kill -CONT {}", p.pid)), "{}", c.remedy);
}

/// The probes do not tell of SIGCONT: that it was continued in between is not seen, and a signal that waits has not stopped it.
#[test]
fn of_several_stop_signals_the_one_that_it_took() {
    let mut made = Made::new("say(z=dead())\ntime.sleep(300)");
    let z = pid(&made.said(), "z");
    until_zombie(z);
    let (me, top) = (process(std::process::id(), None), made.child.id());
    let other = Process { id: Key::new(me.pid, 1), ..me.clone() };
    let stops = || until("stopped", || state(top) == Some(b'T'));
    kill(top, libc::SIGSTOP);
    stops();
    kill(top, libc::SIGSTOP);
    let p = process(top, Some(me.id));
    let mut q = question(process(z, Some(p.id)), vec![p.clone()]);
    let by = |q: &Question| {
        let one =
            |e: &Evidence| if let Evidence::Signal { sender: Some(s), .. } = e { Some(s.id) } else { None };
        ask(q).evidence.iter().filter_map(one).collect::<Vec<_>>()
    };
    q.signals = vec![
        sent(19, &me, &p, SignalResult::Delivered),
        sent(19, &other, &p, SignalResult::Delivered),
        sent(19, &other, &p, SignalResult::AlreadyPending),
    ];
    assert_eq!(by(&q), [me.id], "the second waits until it goes on");
    // SIGCONT throws away what waits.
    kill(top, libc::SIGCONT);
    until("goes on", || state(top) == Some(b'S'));
    kill(top, libc::SIGSTOP);
    stops();
    q.signals.truncate(2);
    assert_eq!(by(&q), [other.id]);
    q.signals.push(sent(20, &me, &p, SignalResult::Ignored));
    assert_eq!(by(&q), [other.id], "SIGTSTP was ignored");
}

/// `PTRACE_ATTACH` is 16, `PTRACE_SEIZE` 0x4206.
fn tracer(how: u32, target: u32) -> Made {
    let mut made = Made::new(&format!(
        "\
libc.ptrace.argtypes = [ctypes.c_long] * 4
say(r=libc.ptrace({how}, {target}, 0, 0))
time.sleep(300)
"
    ));
    assert_eq!(pid(&made.said(), "r"), 0);
    made
}

#[test]
fn a_traced_parent() {
    let mut made = Made::new("say(z=dead())\ntime.sleep(300)");
    let z = pid(&made.said(), "z");
    until_zombie(z);
    let tracer = tracer(16, made.child.id());
    until("traced", || state(made.child.id()) == Some(b't'));
    let c = ask_zombie(z, made.child.id());
    assert_eq!(c.verdict, Verdict::ParentTraced, "{c:#?}");
    assert!(
        c.evidence
            .iter()
            .any(|e| matches!(e, Evidence::Tracer { process } if process.pid == tracer.child.id()))
    );
    assert!(c.remedy.contains(&key(tracer.child.id()).to_string()));
}

#[test]
fn a_zombie_held_by_a_tracer() {
    let mut made = Made::new("z = sleeper()\nsay(z=z)\nos.waitpid(z, 0)");
    let z = pid(&made.said(), "z");
    until("sleep", || Proc::default().stat(z).is_ok_and(|s| s.comm.bytes() == b"sleep"));
    let tracer = tracer(0x4206, z);
    kill(z, libc::SIGKILL);
    let c = ask_zombie(z, made.child.id());
    assert_eq!(c.verdict, Verdict::HeldByTracer, "{c:#?}");
    assert!(
        c.evidence
            .iter()
            .any(|e| matches!(e, Evidence::Tracer { process } if process.pid == tracer.child.id()))
    );
    assert_eq!(c.remedy, format!("jobwarden kill {}", key(tracer.child.id())));
}

/// A dead thread that its tracer keeps blocks the reaping of the whole process.
#[test]
fn a_zombie_with_a_thread_held_by_a_tracer() {
    let mut made = Made::new(
        "\
z = os.fork()
if z == 0:
    t = threading.Thread(target=time.sleep, args=(300,))
    t.start()
    say(z=os.getpid(), t=t.native_id)
    time.sleep(300)
os.waitpid(z, 0)
",
    );
    let s = made.said();
    let (z, t) = (pid(&s, "z"), pid(&s, "t"));
    let tracer = tracer(0x4206, t);
    kill(z, libc::SIGKILL);
    until("all dead", || state(z) == Some(b'Z') && !Proc::default().has_live_thread(z));
    let c = ask_zombie(z, made.child.id());
    assert_eq!(c.verdict, Verdict::HeldByTracer, "{c:#?}");
    assert!(c.summary.contains(&format!("its dead thread {t}")), "{}", c.summary);
    assert_eq!(c.remedy, format!("jobwarden kill {}", key(tracer.child.id())));
}

#[test]
fn a_busy_parent_and_parents_blocked_otherwise() {
    for (does, verdict, call) in [
        ("while True: pass", Verdict::ParentBusy, ""),
        ("l = threading.Lock(); l.acquire(); l.acquire()", Verdict::ParentBlocked, "futex"),
        (
            "t = threading.Thread(target=time.sleep, args=(300,)); t.start(); t.join()",
            Verdict::ParentBlocked,
            "futex",
        ),
        ("time.sleep(300)", Verdict::ParentBlocked, "clock_nanosleep"),
        ("signal.pause()", Verdict::ParentBlocked, "pause"),
        ("select.select([], [], [])", Verdict::ParentBlocked, "select"),
        (
            "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); s.accept()",
            Verdict::ParentBlocked,
            "accept",
        ),
        // An event loop with a pipe of its own to be woken by is not blocked on that.
        (
            "r, w = os.pipe(); e = select.epoll(); e.register(r, 1); e.poll()",
            Verdict::ParentBlocked,
            "epoll_wait",
        ),
    ] {
        let mut made = Made::new(&format!("say(z=dead())\n{does}"));
        let z = pid(&made.said(), "z");
        until_zombie(z);
        if !call.is_empty() {
            let call = if call == "select" { "pselect6" } else { call };
            until_in(made.child.id(), &[call, "accept4", "select", "epoll_wait"]);
        }
        let c = ask_zombie(z, made.child.id());
        assert_eq!(c.verdict, verdict, "{does}: {c:#?}");
        if !call.is_empty() {
            assert!(blocked_in(&c).0.contains(call), "{c:#?}");
        }
    }
}

#[test]
fn a_vfork_parent_in_uninterruptible_sleep() {
    let mut made = Made::new(
        "\
os.mkfifo('f')
say(z=dead())
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 5, 'f', os.O_RDONLY, 0)])
",
    );
    let z = pid(&made.said(), "z");
    until("uninterruptible", || stays_uninterruptible(made.child.id()));
    let c = ask_zombie(z, made.child.id());
    assert_eq!(c.verdict, Verdict::ParentUninterruptible, "{c:#?}");
    let child = waits_for(&c)[0];
    assert_eq!(Proc::default().stat(child).unwrap().ppid, made.child.id());
    assert_eq!(c.remedy, format!("jobwarden why {}", key(child)));
    assert!(c.evidence.iter().any(|e| matches!(e, Evidence::Wchan { .. })));
    assert!(c.summary.contains("which is in openat of f"), "{}", c.summary);
    // Open and close the FIFO's other end, so that both go on.
    let fifo = made.dir.path().join("f");
    until("the end", || {
        drop(std::fs::OpenOptions::new().read(true).write(true).open(&fifo));
        state(made.child.id()) != Some(b'D')
    });
}

const NS: &[&str] = &["unshare", "--pid", "--fork", "--kill-child"];

#[test]
fn an_init_that_does_not_reap() {
    let mut made = Made::by(
        NS,
        "\
a = os.fork()
if a == 0:
    if os.fork() == 0:
        time.sleep(0.05)
        os._exit(0)
    os._exit(0)
os.waitpid(a, 0)
say(ok=1)
time.sleep(300)
",
    );
    made.said();
    let proc = Proc::default();
    let init = proc.children(made.child.id()).unwrap()[0];
    let z = proc.children(init).unwrap()[0];
    until_zombie(z);
    let dead = Key::new(999, 9);
    let q = question(
        process(z, Some(dead)),
        vec![reaped(dead, None, Exit::Code { code: 0 }), process(init, None)],
    );
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::InitNotReaping, "{c:#?}");
    assert!(c.remedy.contains("--init"));
}

/// The worker as PID 1 of a container: its own child is not "adopted by an init".
#[test]
fn the_incident_with_the_worker_as_init() {
    let mut made = Made::by(
        NS,
        "\
r, w = os.pipe()
os.set_inheritable(w, True)
z = os.fork()
if z == 0:
    sleeper()
    os._exit(0)
os.close(w)
say(ok=1)
os.read(r, 1)
",
    );
    made.said();
    let proc = Proc::default();
    let init = proc.children(made.child.id()).unwrap()[0];
    until("two", || proc.children(init).unwrap().len() == 2);
    until_in(init, &["read"]);
    let children = proc.children(init).unwrap();
    until("a zombie", || children.iter().any(|&c| state(c) == Some(b'Z')));
    let z = children.iter().copied().find(|&c| state(c) == Some(b'Z')).unwrap();
    let holder = children.iter().copied().find(|&c| c != z).unwrap();
    let i = process(init, None);
    let zp = process(z, Some(i.id));
    let mut h = process(holder, Some(zp.id));
    h.orphan = true;
    let c = ask(&question(zp, vec![i, h]));
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{c:#?}");
    assert_eq!(holders(&c)[0].0, holder);
}

#[test]
fn a_leader_that_exited_is_no_zombie() {
    let mut made =
        Made::new("threading.Thread(target=time.sleep, args=(300,)).start()\nsay(ok=1)\nlibc.syscall(60, 0)");
    made.said();
    until_zombie(made.child.id());
    let c = ask(&question(process(made.child.id(), None), Vec::new()));
    assert_eq!(c.verdict, Verdict::LeaderExited, "{c:#?}");
    let proc = Proc::default();
    let live = proc.threads(made.child.id()).unwrap().into_iter().find(|&t| t != made.child.id()).unwrap();
    assert!(c.summary.contains(&format!("({live})")), "{}", c.summary);
}

/// A namespace's init waits in its exit for all who are in the namespace; one of them is kept by a tracer outside.
#[test]
fn a_process_that_is_still_exiting() {
    let mut made = Made::by(NS, "sleeper()\nsay(ok=1)\ntime.sleep(300)");
    made.said();
    let proc = Proc::default();
    let init = proc.children(made.child.id()).unwrap()[0];
    let inner = proc.children(init).unwrap()[0];
    let tracer = tracer(0x4206, inner);
    let mut p = process(init, None);
    kill(init, libc::SIGKILL);
    until_zombie(inner);
    until("exiting", || proc.stat(init).is_ok_and(|s| s.flags & PF_EXITING != 0));
    p.state = State::Exiting;
    let c = ask(&question(p, Vec::new()));
    assert_eq!(c.verdict, Verdict::StillExiting, "{c:#?}");
    assert!(
        c.evidence.iter().any(|e| matches!(e, Evidence::Wchan { process, .. } if process.pid == init)),
        "{c:#?}"
    );
    drop(tracer);
}

#[test]
fn two_nested_causes_are_followed_to_the_root() {
    let mut made = Made::new(
        "\
r, w = os.pipe()
os.set_inheritable(w, True)
say_r, say_w = os.pipe()
z = os.fork()
if z == 0:
    h = os.fork()
    if h == 0:
        c = sleeper(w)
        os.kill(c, signal.SIGSTOP)
        os.write(say_w, f'{os.getpid()} {c}'.encode())
        os.waitpid(c, 0)
    os._exit(0)
os.close(w)
h, c = (int(x) for x in os.read(say_r, 99).split())
say(z=z, h=h, c=c)
os.read(r, 1)
",
    );
    let s = made.said();
    let (z, h, last) = (pid(&s, "z"), pid(&s, "h"), pid(&s, "c"));
    until_zombie(z);
    until_in(made.child.id(), &["read"]);
    until_in(h, &["wait4"]);
    let w = process(made.child.id(), None);
    let zp = process(z, Some(w.id));
    let hp = process(h, Some(zp.id));
    let lp = process(last, Some(hp.id));
    let c = ask(&question(zp, vec![w, hp, lp]));
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe);
    assert_eq!(waits_for(&c), [last], "{c:#?}");
    let stopped = |e: &Evidence| matches!(e, Evidence::Note { text } if text.contains("stopped"));
    assert!(c.evidence.iter().any(stopped), "{c:#?}");
}

#[test]
fn where_there_is_no_job_none_is_named() {
    let mut i = happened("popen.stderr.read()", &["read"]);
    i.q.subject.jobs.clear();
    i.q.family.iter_mut().for_each(|p| p.jobs.clear());
    let c = ask(&i.q);
    let held = holders(&c);
    assert!(held[0].2.starts_with("orphan of this family, forked by"), "{held:?}");
}

#[test]
fn a_circle_ends() {
    let mut made = Made::new(
        "\
ar, aw = os.pipe()
br, bw = os.pipe()
z = dead()
c = os.fork()
if c == 0:
    os.close(bw); os.close(ar)
    os.read(br, 1)
    os._exit(0)
os.close(aw); os.close(br)
say(z=z, c=c)
os.read(ar, 1)
",
    );
    let s = made.said();
    until_in(made.child.id(), &["read"]);
    until_in(pid(&s, "c"), &["read"]);
    let c = ask_zombie(pid(&s, "z"), made.child.id());
    assert_eq!(c.verdict, Verdict::ParentBlockedOnPipe, "{c:#?}");
    let (a, b) = (made.child.id(), pid(&s, "c"));
    let circle = |e: &Evidence| {
        let Evidence::Note { text } = e else { return false };
        let Some((words, names)) = text.split_once(": ") else { return false };
        let names: Vec<&str> = names.split(" -> ").collect();
        words == "they wait for each other in a circle"
            && names.len() == 3
            && names[0].contains(&a.to_string())
            && names[1].contains(&b.to_string())
            && names[2] == names[0]
    };
    assert!(c.evidence.iter().any(circle), "{c:#?}");
}

#[test]
fn what_is_no_zombie_or_gone() {
    let mut made = Made::new("say(ok=1)\nsys.stdin.read()\ntime.sleep(300)");
    made.said();
    let live = process(made.child.id(), None);
    assert_eq!(ask(&question(live.clone(), Vec::new())).verdict, Verdict::NotAZombie);
    // Another process that has its pid.
    let mut other = live.clone();
    other.id.start -= 2 * holders::NS_PER_TICK;
    assert_eq!(ask(&question(other, Vec::new())).verdict, Verdict::NotAZombie);
    let mut gone = live;
    gone.state = State::Zombie;
    drop(made);
    assert_eq!(ask(&question(gone, Vec::new())).verdict, Verdict::BeingReaped);
}

/// A process that is neither zombie nor orphan, but has zombies, is explained by them.
#[test]
fn the_parent_is_asked_about() {
    let mut made = Made::new("z = dead()\nsay(z=z)\ntime.sleep(300)");
    until_zombie(pid(&made.said(), "z"));
    until_in(made.child.id(), &["clock_nanosleep"]);
    let c = ask(&question(process(made.child.id(), None), Vec::new()));
    assert_eq!((c.verdict, c.process.pid), (Verdict::ParentBlocked, made.child.id()), "{c:#?}");
}
