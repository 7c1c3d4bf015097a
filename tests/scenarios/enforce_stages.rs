//! The stages of a job's end on the running kernel, by the library: whom a signal reaches, and whom it must not. Each test
//! acts on processes of its own only.

use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::config::{Match, Pattern};
use jobwarden::enforce::{Audit, Enforcer, Guards, Lineage, Member, OrderId, Outcome, audit};
use jobwarden::model::key::Key;
use jobwarden::model::kill::{KillSpec, Reason, What};
use jobwarden::model::schema::SignalledOutcome;
use jobwarden::sources::host::boot_now;
use jobwarden::sources::kernel::{Kernel, Options};
use jobwarden::sources::proc::Proc;
use jobwarden_tests::truth::letter;
use jobwarden_tests::{Fixture, Limit, eventually, fixture, loudly, ms, shape, skip};

fn kernel() -> Result<Arc<Kernel>> {
    Ok(Arc::new(Kernel::start(&Options { ring_bytes: 4096, signal_mask: 0, ..Options::default() })?))
}

fn enforcer(lineage: Arc<dyn Lineage>, audit: Audit) -> Enforcer {
    Enforcer { lineage, proc: Proc::default(), audit: Arc::new(audit), redact: Arc::default() }
}

/// Makes `pid` and its family a job.
fn job(kernel: &Kernel, pid: u32, outer: u64) -> Result<KillSpec> {
    let start = kernel.start_of(pid)?.context("it is gone")?;
    let (root, job) = (Key::new(pid, start), boot_now());
    kernel.label(job, outer, root)?;
    Ok(KillSpec {
        number: job,
        name: "test".into(),
        target: pid.to_string(),
        grace: ms(500),
        settle: ms(1000),
        ..KillSpec::new(root, What::Whole, Reason::Operator)
    })
}

fn run(e: &Enforcer, order: &KillSpec, guards: &Guards) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // In this thread: what `Reused` forks would die with another.
    Ok(runtime.block_on(e.run_here(order, guards))?)
}

fn sh(fixture: &Fixture, script: &str) -> Result<Child> {
    let mut c: Command = fixture.command("/bin/sh");
    Ok(c.args(["-c", script]).spawn()?)
}

/// The one process of the test whose argv ends with `tail`.
fn find(fixture: &Fixture, tail: &str) -> Result<u32> {
    eventually(tail, ms(3000), || {
        let argv = |p: i32| std::fs::read(format!("/proc/{p}/cmdline")).unwrap_or_default();
        let ends = |p: &i32| argv(*p).ends_with(format!("{tail}\0").as_bytes());
        let found = fixture.alive().into_iter().find(ends).context("not there")?;
        Ok(found.cast_unsigned())
    })
}

fn lives(pid: u32) -> bool {
    letter(pid).is_ok_and(|l| l != 'Z')
}

/// `cat` has started and waits for its input: one that still makes system calls is ended by the doom, before any signal.
fn asleep(cat: &mut Child) -> Result<()> {
    let mut stdin = cat.stdin.as_ref().context("no pipe to it")?;
    stdin.write_all(b"\n")?;
    eventually("cat has read, and waits for more", ms(3000), || {
        ensure!(rustix::io::ioctl_fionread(stdin)? == 0 && letter(cat.id())? == 'S');
        Ok(())
    })
}

/// The kernel's answers, but at the `at`th reading the victim dies behind the reader's back and a stranger gets its pid.
struct Reused {
    kernel: Arc<Kernel>,
    at: u32,
    readings: AtomicU32,
    victim: Mutex<Option<Child>>,
    stranger: Mutex<Option<i32>>,
}

impl Reused {
    fn swap(&self) -> io::Result<()> {
        let Some(mut victim) = self.victim.lock().ok().and_then(|mut v| v.take()) else { return Ok(()) };
        let pid = victim.id().cast_signed();
        victim.kill()?;
        victim.wait()?;
        let stranger = shape::fork_as(pid, || {
            shape::nap(60_000);
            0
        })?;
        *self.stranger.lock().map_err(|_| io::Error::other("poisoned"))? = Some(stranger);
        Ok(())
    }
}

impl Lineage for Reused {
    fn relabel(&self, job: u64, root: Key) -> io::Result<()> {
        self.kernel.relabel(job, root)
    }
    fn label(&self, job: u64, outer: u64, root: Key) -> io::Result<()> {
        self.kernel.label(job, outer, root)
    }
    fn members(&self, job: u64) -> io::Result<Vec<Member>> {
        let members = self.kernel.members(job)?;
        if self.readings.fetch_add(1, Ordering::Relaxed) + 1 == self.at {
            self.swap()?;
        }
        Ok(members)
    }
    fn label_inside(&self, job: u64, root: Key) -> io::Result<()> {
        self.kernel.label_inside(job, root)
    }
    fn spare(&self, key: Key, heirs: bool, by: OrderId) -> io::Result<()> {
        self.kernel.spare(key, heirs, by)
    }
    fn disinherit(&self) -> io::Result<()> {
        self.kernel.disinherit()
    }
    fn lineage_parent(&self, key: Key) -> io::Result<Option<Key>> {
        self.kernel.lineage_parent(key)
    }
    fn ancestor(&self, key: Key) -> io::Result<Option<Key>> {
        self.kernel.ancestor(key)
    }
    fn doom(&self, job: u64, until: u64, by: OrderId) -> io::Result<()> {
        self.kernel.doom(job, until, by)
    }
    fn release(&self, by: OrderId) -> io::Result<()> {
        self.kernel.release(by)
    }
    fn forget(&self, job: u64) -> io::Result<()> {
        self.kernel.forget(job)
    }
    fn start_of(&self, pid: u32) -> io::Result<Option<u64>> {
        self.kernel.start_of(pid)
    }
}

#[test]
fn a_stranger_that_gets_the_pid_between_reading_and_signalling_lives() -> Result<()> {
    let fixture = fixture!("a_stranger_that_gets_the_pid_between_reading_and_signalling_lives");
    let kernel = kernel()?;
    let mut gone = 0;
    // Whatever the reading after which the pid changes hands.
    for at in 1..=10 {
        let mut victim = fixture.command("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        asleep(&mut victim)?;
        let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, victim.id(), 0)? };
        let reused = Arc::new(Reused {
            kernel: kernel.clone(),
            at,
            readings: AtomicU32::new(0),
            victim: Mutex::new(Some(victim)),
            stranger: Mutex::new(None),
        });
        let out = run(&enforcer(reused.clone(), Audit::log_only()), &order, &Guards::new(Vec::new(), false))?;
        ensure!(out.ended(), "{at}: {:?}", out.report);
        gone += out.report.signalled.iter().filter(|s| s.outcome == SignalledOutcome::AlreadyGone).count();
        let stranger = reused.stranger.lock().ok().and_then(|s| *s);
        if let Some(pid) = stranger {
            let lives = lives(pid.cast_unsigned());
            // Our own child, not reaped.
            shape::kill(pid, libc::SIGKILL);
            let _ = shape::wait(pid);
            ensure!(lives, "reading {at}: the stranger was signalled: {:?}", out.report);
        } else if let Some(mut v) = reused.victim.lock().ok().and_then(|mut v| v.take()) {
            ensure!(v.wait()?.signal() == Some(9), "{at}");
        }
        kernel.forget(order.number)?;
    }
    loudly(&format!("{gone} of 10 were found gone when they were about to be signalled"));
    ensure!(gone > 0, "no pid changed hands between reading and signalling");
    Ok(())
}

#[test]
fn the_protected_live_with_what_descends_from_them_and_lose_their_flags() -> Result<()> {
    let fixture = fixture!("the_protected_live_with_what_descends_from_them_and_lose_their_flags");
    let kernel = kernel()?;
    let mut root = sh(&fixture, "sh -c 'sleep 101 & wait' & sleep 102 & wait")?;
    let (below, other) = (find(&fixture, "101")?, find(&fixture, "102")?);
    let order = job(&kernel, root.id(), 0)?;
    let protect = Match { argv: Some(pattern("^sh -c sleep 101")?), ..Match::default() };
    let guards = Guards::new(vec![protect], false);
    let state = fixture.path("audit");
    std::fs::create_dir(&state)?;
    let e = enforcer(kernel.clone(), Audit::open(&state));
    let dry = run(&e, &KillSpec { dry_run: true, ..order.clone() }, &guards)?;
    ensure!(dry.report.signalled.iter().all(|s| s.outcome == SignalledOutcome::DryRun), "{dry:?}");
    ensure!(lives(root.id()) && lives(below) && lives(other), "a dry run signals nobody");
    let out = run(&e, &KillSpec { grace: Duration::ZERO, ..order.clone() }, &guards)?;
    ensure!(out.ended() && out.report.spared.len() == 2, "{:?}", out.report);
    ensure!(
        out.report.spared.iter().any(|s| s.process.pid == below && s.why.contains("descends")),
        "{out:?}"
    );
    ensure!(lives(below) && !lives(other), "{:?}", out.report);
    ensure!(root.wait()?.signal() == Some(9));
    let flagged: Vec<Member> = kernel.members(order.number)?.into_iter().filter(|m| m.spared).collect();
    ensure!(flagged.is_empty(), "flags stay: {flagged:?}");
    ensure!(!kernel.doom_attached(), "sys_enter stays attached");
    ensure!(e.audit.flush(ms(5000)), "{:?}", e.audit.error());
    let lines = audit::read(&state, None, Some("test"), 100)?;
    for what in [audit::What::Kill, audit::What::Spared, audit::What::Signal, audit::What::Done] {
        ensure!(lines.iter().any(|l| l.what == what), "no {what:?} in {lines:?}");
    }
    // Nobody protects them any more.
    let out = run(&e, &KillSpec { grace: Duration::ZERO, ..order }, &Guards::default())?;
    ensure!(out.ended() && !lives(below), "{:?}", out.report);
    Ok(())
}

fn pattern(s: &str) -> Result<Pattern> {
    Pattern::new(s).map_err(anyhow::Error::msg)
}

fn protect(argv: &str) -> Result<Match> {
    Ok(Match { argv: Some(pattern(argv)?), ..Match::default() })
}

#[test]
fn who_descends_from_a_protected_member_that_ran_before_the_probes() -> Result<()> {
    let fixture = fixture!("who_descends_from_a_protected_member_that_ran_before_the_probes");
    let mut root = sh(&fixture, "sh -c 'sleep 111 & wait' & sleep 112 & wait")?;
    let (below, other) = (find(&fixture, "111")?, find(&fixture, "112")?);
    let kernel = kernel()?;
    let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, root.id(), 0)? };
    let e = enforcer(kernel, Audit::log_only());
    let out = run(&e, &order, &Guards::new(vec![protect("^sh -c sleep 111")?], false))?;
    ensure!(out.ended() && out.report.spared.len() == 2, "{:?}", out.report);
    ensure!(lives(below) && !lives(other) && root.wait()?.signal() == Some(9), "{:?}", out.report);
    let out = run(&e, &order, &Guards::default())?;
    ensure!(out.ended() && !lives(below), "{:?}", out.report);
    Ok(())
}

#[test]
fn what_the_client_s_shell_forks_is_not_spared_with_it() -> Result<()> {
    let fixture = fixture!("what_the_client_s_shell_forks_is_not_spared_with_it");
    let kernel = kernel()?;
    // The shell above all waits for a line, and forks when it is spared.
    let script = "sh -c 'sleep 121 & wait' & read go; sleep 122 & wait";
    let mut c = fixture.command("/bin/sh");
    let mut root = c.args(["-c", script]).stdin(std::process::Stdio::piped()).spawn()?;
    let kept = find(&fixture, "121")?;
    let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, root.id(), 0)? };
    let another = OrderId::fresh();
    kernel.spare(order.root, false, another)?;
    io::Write::write_all(root.stdin.as_mut().context("no stdin")?, b"go\n")?;
    let forked = find(&fixture, "122")?;
    let flag = |pid| -> Result<bool> {
        Ok(kernel.members(order.number)?.iter().any(|m| m.key.pid == pid && m.spared))
    };
    ensure!(flag(root.id())? && !flag(forked)?, "a fork inherits the flag");
    let e = enforcer(kernel.clone(), Audit::log_only());
    let mut guards = Guards::new(vec![protect("^sh -c sleep 121")?], false);
    guards.keep(root.id(), "the caller", &e.proc, &*kernel)?;
    let out = run(&e, &order, &guards)?;
    ensure!(out.ended() && !lives(forked), "{:?}", out.report);
    ensure!(lives(root.id()) && lives(kept), "{:?}", out.report);
    ensure!(flag(root.id())?, "the other order is not over");
    kernel.release(another)?;
    ensure!(kernel.members(order.number)?.iter().all(|m| !m.spared), "flags stay");
    let out = run(&e, &order, &Guards::default())?;
    ensure!(out.ended() && !lives(kept), "{:?}", out.report);
    root.wait()?;
    Ok(())
}

#[test]
fn protect_by_the_container_s_name_and_by_parents_of_whom_one_is_dead() -> Result<()> {
    let fixture = fixture!("protect_by_the_container_s_name_and_by_parents_of_whom_one_is_dead");
    let Some(container) = Limit::new(&fixture, 50) else {
        skip!("protect_by_the_container_s_name_and_by_parents_of_whom_one_is_dead: no pids controller here");
    };
    let kernel = kernel()?;
    // In the middle a shell that is gone at once.
    let mut root = sh(&fixture, "(sleep 131 &); sleep 132 & sleep 133 & wait")?;
    let (far, named, other) = (find(&fixture, "131")?, find(&fixture, "132")?, find(&fixture, "133")?);
    std::fs::write(container.procs(), named.to_string())?;
    eventually("the middle is gone", ms(3000), || {
        let key = Key::new(far, kernel.start_of(far)?.context("gone")?);
        let middle = kernel.lineage_parent(key)?.context("no lineage")?;
        ensure!(middle.pid != root.id() && letter(middle.pid).is_err(), "{middle} is there");
        Ok(())
    })?;
    let grandparent =
        Match { parent: Some(Box::new(protect("^/bin/sh -c .sleep 131")?)), ..Match::default() };
    let guards = Guards::new(
        vec![
            Match { parent: Some(Box::new(grandparent)), ..protect("^sleep 131")? },
            Match { container: Some(fixture.tag.clone()), ..Match::default() },
        ],
        false,
    );
    let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, root.id(), 0)? };
    let e = enforcer(kernel, Audit::log_only());
    let out = run(&e, &order, &guards)?;
    ensure!(out.ended() && out.report.spared.len() == 2, "{:?}", out.report);
    ensure!(lives(far) && lives(named) && !lives(other), "{:?}", out.report);
    let out = run(&e, &order, &Guards::default())?;
    ensure!(out.ended() && !lives(far) && !lives(named), "{:?}", out.report);
    root.wait()?;
    Ok(())
}

#[test]
fn a_part_of_a_job_that_is_spared_stays_in_the_job() -> Result<()> {
    let fixture = fixture!("a_part_of_a_job_that_is_spared_stays_in_the_job");
    let kernel = kernel()?;
    let mut root = sh(&fixture, "sh -c 'sh -c \"sleep 141 & wait\" & sleep 142 & wait' & sleep 143 & wait")?;
    let (kept, ended, beside) = (find(&fixture, "141")?, find(&fixture, "142")?, find(&fixture, "143")?);
    let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, root.id(), 0)? };
    let key = Key::new(ended, kernel.start_of(ended)?.context("gone")?);
    let part = kernel.lineage_parent(key)?.context("no parent")?;
    // `kill PID`: whatever job it is in, the order names none.
    let what = What::Descendants { number: boot_now(), roots: vec![part] };
    let of_pid = KillSpec { number: 0, root: part, what, ..order.clone() };
    let e = enforcer(kernel.clone(), Audit::log_only());
    let out = run(&e, &of_pid, &Guards::new(vec![protect("^sh -c sleep 141")?], false))?;
    ensure!(out.ended() && lives(kept) && lives(beside) && !lives(ended), "{:?}", out.report);
    let members = kernel.members(order.number)?;
    ensure!(members.iter().any(|m| m.key.pid == kept && m.job == order.number), "{members:?}");
    // Who was spared is reached by the job's end, now that nobody protects him.
    let out = run(&e, &order, &Guards::default())?;
    ensure!(out.ended() && !lives(kept) && !lives(beside), "{:?}", out.report);
    root.wait()?;
    Ok(())
}

#[test]
fn descendants_end_and_the_rest_of_the_job_does_not() -> Result<()> {
    let fixture = fixture!("descendants_end_and_the_rest_of_the_job_does_not");
    let kernel = kernel()?;
    let mut root = sh(&fixture, "sh -c 'setsid sleep 103 & wait' & sleep 104 & wait")?;
    let (ended, kept) = (find(&fixture, "103")?, find(&fixture, "104")?);
    let order = job(&kernel, root.id(), 0)?;
    let orphan = Key::new(ended, kernel.start_of(ended)?.context("gone")?);
    let what = What::Descendants { number: boot_now(), roots: vec![orphan] };
    let e = enforcer(kernel.clone(), Audit::log_only());
    let part = KillSpec { what, reason: Reason::Orphan, ..order.clone() };
    let out = run(&e, &part, &Guards::default())?;
    ensure!(out.ended() && out.report.signalled.len() == 1, "{:?}", out.report);
    ensure!(!lives(ended) && lives(kept) && lives(root.id()), "{:?}", out.report);
    ensure!(kernel.job_numbers()?.len() == 1, "the job of the part is forgotten");
    let out = run(&e, &order, &Guards::default())?;
    ensure!(out.ended() && !lives(kept), "{:?}", out.report);
    root.wait()?;
    Ok(())
}

#[test]
fn who_ends_in_time_is_not_signalled() -> Result<()> {
    let fixture = fixture!("who_ends_in_time_is_not_signalled");
    let kernel = kernel()?;
    let mut root = sh(&fixture, "sleep 0.3; exit 7")?;
    let order = KillSpec { delay: ms(20_000), ..job(&kernel, root.id(), 0)? };
    let begun = Instant::now();
    let out = run(&enforcer(kernel, Audit::log_only()), &order, &Guards::default())?;
    ensure!(out.ended() && out.report.signalled.is_empty(), "{:?}", out.report);
    ensure!(begun.elapsed() < ms(10_000), "its end was not noticed");
    ensure!(root.wait()?.code() == Some(7));
    Ok(())
}

#[test]
fn a_survivor_is_named_with_what_holds_it() -> Result<()> {
    let fixture = fixture!("a_survivor_is_named_with_what_holds_it");
    let kernel = kernel()?;
    let mut s = jobwarden_tests::Shape::start(&fixture, "traced", &[])?;
    let (held, tracer): (u32, u32) = (s.fact("held")?, s.fact("tracer")?);
    let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, held, 0)? };
    let out = run(&enforcer(kernel.clone(), Audit::log_only()), &order, &Guards::default())?;
    ensure!(!out.ended(), "{:?}", out.report);
    let stuck = out.report.stuck.first().context("nobody is stuck")?;
    ensure!(stuck.process.pid == held && stuck.state == "t", "{stuck:?}");
    ensure!(stuck.tracer.as_ref().is_some_and(|t| t.pid == tracer), "{stuck:?}");
    ensure!(stuck.to_string().contains(&tracer.to_string()), "{stuck}");
    ensure!(!kernel.doom_attached(), "sys_enter stays attached");
    s.finish()?;
    Ok(())
}

/// A chain in which each process forks one successor and exits, below a protected member: its head forks while the flags are
/// set, faster than it is read.
#[test]
fn a_chain_below_a_protected_member_is_spared() -> Result<()> {
    let fixture = fixture!("a_chain_below_a_protected_member_is_spared");
    a_chain_below_a_protected(&fixture).inspect_err(|e| loudly(&format!("{e:#}")))
}

fn a_chain_below_a_protected(fixture: &Fixture) -> Result<()> {
    let Some(limit) = Limit::new(fixture, 300) else {
        skip!("a_chain_below_a_protected_member_is_spared: no pids controller here");
    };
    let kernel = kernel()?;
    let bomb = jobwarden_tests::fixture::program("shape-bomb")?;
    // The chain's dead count against the limit for a while: all others are forked before it, and after those are freed.
    let script = format!("exec 3<&0; sleep 152 & {} chains 1 30 {} <&3 & wait", bomb.display(), fixture.tag);
    let e = enforcer(kernel.clone(), Audit::log_only());
    for round in 0..6 {
        let mut c = fixture.command("/bin/sh");
        c.args(["-c", &script]).stdin(std::process::Stdio::piped());
        limit.holds(&mut c);
        let mut root = c.spawn()?;
        let other = find(fixture, "152")?;
        let order = KillSpec { grace: Duration::ZERO, ..job(&kernel, root.id(), 0)? };
        let bombs = || -> Result<Vec<Member>> {
            let mut all = kernel.members(order.number)?;
            all.retain(|m| m.comm.bytes().starts_with(b"shape-bomb") && !m.dead);
            all.sort_by_key(|m| m.key.start);
            Ok(all)
        };
        // The oldest is no chain's; a reading may find the chain between two of its processes.
        let founder = eventually("a chain", ms(3000), || {
            let all = bombs()?;
            ensure!(all.len() > 1, "{all:?}");
            Ok(all[0].key)
        })?;
        let mut guards = Guards::default();
        guards.protect_member(founder, "it is this test's");
        let out = run(&e, &order, &guards)?;
        ensure!(out.ended() && !lives(other) && !lives(root.id()), "round {round}: {:?}", out.report);
        ensure!(lives(founder.pid), "round {round}: the protected is gone");
        eventually("the chain lives on", ms(1000), || {
            ensure!(bombs()?.iter().any(|m| m.key != founder), "round {round}: it is gone: {:?}", out.report);
            Ok(())
        })?;
        let out = run(&e, &order, &Guards::default())?;
        ensure!(out.ended() && bombs()?.is_empty(), "round {round}: {:?}", out.report);
        root.wait()?;
        limit.empty()?;
    }
    Ok(())
}
