use super::*;

/// A parent, its child, and how the parent ends; the child says who they are.
fn orphaned(child: &str, parent: &str) -> (Made, Process, Process) {
    let mut made = Made::new(&format!(
        "\
p = os.fork()
if p == 0:
    c = os.fork()
    if c == 0:
{child}
        say(child=os.getpid(), parent=os.getppid())
        time.sleep(300)
    {parent}
    os._exit(0)
os.waitpid(p, 0)
time.sleep(300)
"
    ));
    let s = made.said();
    let (child, parent) = (pid(&s, "child"), pid(&s, "parent"));
    let known = (parent != made.child.id()).then(|| process(parent, Some(key(made.child.id()))));
    let parent = known.unwrap();
    kill(parent.pid, libc::SIGTERM);
    until("adopted", || Proc::default().stat(child).unwrap().ppid != parent.pid);
    let mut dead = reaped(parent.id, parent.lineage_parent, by_signal("SIGTERM", None));
    dead.argv = parent.argv;
    let child = process(child, Some(dead.id));
    (made, child, dead)
}

const WAIT: &str = "time.sleep(300)";

#[test]
fn the_signal_went_to_the_parent_only() {
    let (made, child, parent) = orphaned("        pass", WAIT);
    let me = process(std::process::id(), None);
    let top = process(made.child.id(), None);
    // Another member that is there, though no child of the dead one.
    let sibling = process(made.child.id(), Some(Key::new(3, 3)));
    let sibling = Process { id: Key { start: sibling.id.start + 1, ..sibling.id }, ..sibling };
    let mut q = question(child.clone(), vec![parent.clone(), top, sibling]);
    let root = q.family[1].id;
    in_job(&mut q, root);
    q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::ParentKilled, "{c:#?}");
    let exit = |e: &Evidence| matches!(e, Evidence::ParentExit { process, exit: Some(Exit::Signal { .. }) } if process.id == parent.id);
    let signal = |e: &Evidence| matches!(e, Evidence::Signal { sender: Some(s), target, .. } if s.pid == me.pid && target.id == parent.id);
    let without =
        |e: &Evidence| matches!(e, Evidence::Note { text } if text.contains("without SIGTERM: python3"));
    for found in [&exit as &dyn Fn(&Evidence) -> bool, &signal, &without] {
        assert!(c.evidence.iter().any(found), "{c:#?}");
    }
    assert!(c.summary.contains("was not sent to"), "{}", c.summary);
    assert_eq!(c.remedy, format!("jobwarden kill {}", child.id));
}

#[test]
fn it_ignored_or_blocked_the_signal() {
    for (how, word) in [
        ("        signal.signal(signal.SIGTERM, signal.SIG_IGN)", "ignores"),
        ("        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])", "blocks"),
    ] {
        let (_made, child, parent) = orphaned(how, WAIT);
        kill(child.pid, libc::SIGTERM);
        let me = process(std::process::id(), None);
        let mut q = question(child.clone(), vec![parent.clone()]);
        q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
        let result = if word == "ignores" { SignalResult::Ignored } else { SignalResult::Delivered };
        q.signals.push(sent(15, &me, &child, result));
        let c = ask(&q);
        assert_eq!(c.verdict, Verdict::IgnoredSignal, "{c:#?}");
        assert!(c.summary.contains(word), "{}", c.summary);
    }
}

#[test]
fn a_daemon_and_a_shells_background_job() {
    let mut made = Made::new(
        "\
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        say(child=os.getpid(), parent=os.getsid(0))
        time.sleep(300)
    os._exit(0)
os.wait()
time.sleep(300)
",
    );
    let s = made.said();
    let child = pid(&s, "child");
    until("adopted", || Proc::default().stat(child).unwrap().ppid != pid(&s, "parent"));
    let top = process(made.child.id(), None);
    let mut middle = reaped(Key::new(pid(&s, "parent"), 7), Some(top.id), Exit::Code { code: 0 });
    middle.argv.clone_from(&top.argv);
    let mut q = question(process(child, Some(middle.id)), vec![middle, top]);
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::Daemonized, "{c:#?}");
    // The leader of the session had executed a program: a shell that ended.
    q.family[0].argv = vec!["bash".into()];
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::ParentExited, "{c:#?}");
    q.family.clear();
    q.subject.lineage_parent = None;
    assert_eq!(ask(&q).verdict, Verdict::Unknown);
}

#[test]
fn who_waits_for_what_the_orphan_holds() {
    let mut made = Made::new(
        "\
r, w = os.pipe()
os.set_inheritable(w, True)
z = os.fork()
if z == 0:
    say(child=sleeper(r))
    os._exit(3)
os.close(w)
os.waitpid(z, 0)
say(z=z)
os.read(r, 1)
",
    );
    let child = pid(&made.said(), "child");
    let z = pid(&made.said(), "z");
    until_in(made.child.id(), &["read"]);
    let dead = reaped(Key::new(z, 7), Some(key(made.child.id())), Exit::Code { code: 3 });
    let c = ask(&question(process(child, Some(dead.id)), vec![dead]));
    assert_eq!(c.verdict, Verdict::ParentExited, "{c:#?}");
    let waiter = |e: &Evidence| matches!(e, Evidence::Blocked { process: Some(p), syscall, .. } if p.pid == made.child.id() && syscall == "read");
    assert!(c.evidence.iter().any(waiter), "{c:#?}");
    assert_eq!(holders(&c)[0], (child, blocked_in(&c).2, "this orphan"));
}

/// CPython ignores SIGPIPE, and the kernel sends it to who writes: nobody wanted to end it by that.
#[test]
fn a_broken_pipe_is_no_signal_that_it_ignored() {
    let broken = "        r, w = os.pipe(); os.close(r)
        for _ in range(9):
            try: os.write(w, b'x')
            except BrokenPipeError: pass";
    let (_made, child, parent) = orphaned(broken, WAIT);
    let me = process(std::process::id(), None);
    let mut q = question(child.clone(), vec![parent.clone()]);
    q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
    let pipe = sent(13, &child, &child, SignalResult::Ignored);
    q.signals.extend((0..9).map(|_| pipe.clone()));
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::ParentKilled, "{c:#?}");
    assert!(!c.evidence.iter().any(|e| matches!(e, Evidence::Signal { signal, .. } if signal == "SIGPIPE")));
    // Nor do they push out the one that it did ignore.
    q.signals.insert(1, sent(15, &me, &child, SignalResult::Ignored));
    let c = ask(&q);
    assert_eq!(c.verdict, Verdict::IgnoredSignal, "{c:#?}");
    assert!(c.summary.contains("SIGTERM from"), "{}", c.summary);
    // Its own kill of itself, and its own timer.
    let timer =
        SignalSeen { by: SignalBy::Timer, sender: None, ..sent(14, &me, &child, SignalResult::Ignored) };
    q.signals = vec![sent(15, &child, &child, SignalResult::Ignored), timer];
    assert_eq!(ask(&q).verdict, Verdict::ParentKilled);
}

#[test]
fn what_was_not_seen_is_not_said() {
    let (_made, child, parent) = orphaned("        pass", WAIT);
    let mut q = question(child, vec![parent.clone()]);
    let known = |q: &Question| {
        let c = ask(q);
        assert_eq!(c.verdict, Verdict::ParentKilled, "{c:#?}");
        assert_ne!(
            c.summary.contains("is not known"),
            c.summary.contains("was not sent to"),
            "{}",
            c.summary
        );
        c.summary.contains("was not sent to")
    };
    assert!(!known(&q), "nothing was seen");
    let at = 60_000_000_000;
    let me = process(std::process::id(), None);
    q.signals.push(SignalSeen { at, ..sent(15, &me, &parent, SignalResult::Delivered) });
    assert!(known(&q));
    q.lost = Some(at + 1_000_000_000);
    assert!(!known(&q), "the child's may have been lost");
    q.lost = Some(at - 30_000_000_000);
    assert!(known(&q), "that was long before");
}

#[test]
fn why_it_lives_on_after_the_signal() {
    let handler = "        signal.signal(signal.SIGTERM, lambda *a: None)";
    for (how, stop, word) in [(handler, false, "has a handler"), ("        pass", true, "it is stopped")] {
        let (_made, child, parent) = orphaned(how, WAIT);
        if stop {
            kill(child.pid, libc::SIGSTOP);
            until("stopped", || state(child.pid) == Some(b'T'));
        }
        kill(child.pid, libc::SIGTERM);
        let me = process(std::process::id(), None);
        let mut q = question(child.clone(), vec![parent.clone()]);
        q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
        q.signals.push(sent(15, &me, &child, SignalResult::Delivered));
        let c = ask(&q);
        assert_eq!(c.verdict, Verdict::ParentKilled, "{c:#?}");
        assert!(c.summary.contains("got SIGTERM too") && c.summary.contains(word), "{}", c.summary);
    }
    // Neither: then nothing is claimed of a handler.
    let (_made, child, parent) = orphaned("        pass", WAIT);
    let me = process(std::process::id(), None);
    let mut q = question(child.clone(), vec![parent.clone()]);
    q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
    q.signals.push(sent(15, &me, &child, SignalResult::Delivered));
    assert!(ask(&q).summary.contains("lives on."), "{}", ask(&q).summary);
}

/// Where another thread takes it, the signal is not blocked.
#[test]
fn blocked_by_the_main_thread_alone() {
    let how = "        signal.signal(signal.SIGTERM, lambda *a: None)
        threading.Thread(target=time.sleep, args=(300,)).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])";
    let (_made, child, parent) = orphaned(how, WAIT);
    let me = process(std::process::id(), None);
    let mut q = question(child.clone(), vec![parent.clone()]);
    q.signals.push(sent(15, &me, &parent, SignalResult::Delivered));
    q.signals.push(sent(15, &me, &child, SignalResult::Delivered));
    assert_eq!(ask(&q).verdict, Verdict::ParentKilled, "{:#?}", ask(&q));
}
