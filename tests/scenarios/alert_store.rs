//! What was accepted is delivered: through SIGKILL at any moment while the receiver flaps, and through a full disk.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::model::schema::{Alert, AlertKind, AlertState};
use jobwarden::notify::{AlertService, Clock, SubmitError};
use jobwarden_tests::alerts::{Hook, alert, resolved, webhook};
use jobwarden_tests::disk::Disk;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, loudly, ms, pause, rounds, skip};

/// (id, state) as the notifier said them; a half line at the end is not said.
fn said(out: &str) -> Vec<(String, AlertState)> {
    let whole = &out[..out.rfind('\n').map_or(0, |i| i + 1)];
    let of = |l: &str| {
        let (id, state) = l.split_once('=')?;
        let state = if state == "resolved" { AlertState::Resolved } else { AlertState::Firing };
        Some((id.to_owned(), state))
    };
    whole.lines().filter_map(of).collect()
}

#[test]
fn sigkill_at_any_moment_loses_no_accepted_alert() -> Result<()> {
    let fixture = Fixture::new("sigkill_at_any_moment_loses_no_accepted_alert")?;
    let hook = Hook::start()?;
    let state = fixture.path("state");
    std::fs::create_dir(&state)?;
    let mut accepted: BTreeMap<String, AlertState> = BTreeMap::new();
    let all_rounds = rounds("JWTEST_KILL_ROUNDS", 50) as u32;
    // From the start to the first alert that is accepted.
    let mut opening = Duration::ZERO;
    for round in 0..=all_rounds {
        let last = round == all_rounds;
        hook.flap.store(round % 2 == 0 && !last, Ordering::SeqCst);
        let mut c = fixture.command(fixture::program("shape-notifier")?);
        c.arg(&state).arg(&hook.url).arg((u64::from(round) * 1_000_000).to_string());
        c.args(last.then_some("last")).stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = c.spawn()?;
        let mut stdout = child.stdout.take().context("no stdout")?;
        let mut text = String::new();
        if round == 0 {
            let mut first = [0];
            let read = stdout.read_exact(&mut first);
            opening = begun.elapsed();
            if read.is_err() {
                child.kill()?;
                bail!("nothing was accepted: {}", child.wait()?);
            }
            text.push(char::from(first[0]));
        }
        let reader = std::thread::spawn(move || {
            let _ = stdout.read_to_string(&mut text);
            text
        });
        if last {
            let ended =
                eventually("the last round", ms(60_000), || child.try_wait()?.context("it still runs"));
            if ended.is_err() {
                child.kill()?;
            }
            child.wait()?;
            ensure!(ended?.success(), "the last round failed");
        } else {
            // From before the store is open to well into the sending, however fast the machine is.
            std::thread::sleep(opening * (7 * round % 20) / 7);
            child.kill()?;
            child.wait()?;
        }
        let Ok(text) = reader.join() else { bail!("the reader panicked") };
        accepted.extend(said(&text).into_iter().filter(|(id, _)| id != "end"));
    }
    ensure!(accepted.len() > all_rounds as usize, "only {} alerts were accepted", accepted.len());
    let mut heard: BTreeMap<String, Vec<AlertState>> = BTreeMap::new();
    for (id, state) in hook.told() {
        heard.entry(id).or_default().push(state);
    }
    for id in accepted.keys() {
        let told = heard.get(id).with_context(|| format!("{id} was accepted and never told"))?;
        // The last round ended all that still fired.
        ensure!(told.last() == Some(&AlertState::Resolved), "{id}: its end was not told: {told:?}");
        let first_end = told.iter().position(|s| *s == AlertState::Resolved).unwrap_or(told.len());
        let overtaken = told[first_end..].contains(&AlertState::Firing);
        ensure!(!overtaken, "{id}: its firing was told after its end: {told:?}");
    }
    let twice = heard.values().map(|t| t.len().saturating_sub(2)).sum::<usize>();
    loudly(&format!("{} alerts accepted in {all_rounds} rounds, {twice} told again", accepted.len()));
    Ok(())
}

#[test]
fn a_full_disk_is_told_costs_no_crash_and_heals() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        skip!("a_full_disk_is_told_costs_no_crash_and_heals: needs root for a tmpfs");
    }
    let fixture = Fixture::new("a_full_disk_is_told_costs_no_crash_and_heals")?;
    let at = fixture.path("disk");
    let disk = Disk::mount(&at, 512 << 10)?;
    let hook = Hook::start()?;
    let rt = tokio::runtime::Runtime::new()?;
    let (began, ended) = ("2026-01-01T00:00:00.000Z", "2026-01-01T00:01:00.000Z");
    rt.block_on(async {
        let center = AlertService::start(&webhook(&hook.url)?, &at, Clock::fast(20))?;
        center.submit(&alert(0, began)).await?;
        disk.fill()?;
        // The log has room for a few more before it must grow.
        let mut refused = 0;
        for n in 1..200 {
            match center.submit(&alert(n, began)).await {
                Ok(()) => {}
                Err(SubmitError::Storage(text)) => {
                    ensure!(text.contains("full"), "{text}");
                    refused += 1;
                }
                Err(e) => return Err(e.into()),
            }
        }
        ensure!(refused > 0, "200 alerts went to a full disk");
        let error = center.storage_error().borrow().clone();
        ensure!(error.as_ref().is_some_and(|e| e.contains("full")), "{error:?}");
        // They are delivered all the same, and not again and again.
        eventually("all of them", ms(10_000), || {
            ensure!(center.pending() == 0, "{} wait", center.pending());
            Ok(())
        })?;
        pause(500);
        ensure!(hook.told().len() == 200, "{} were told", hook.told().len());
        disk.free()?;
        eventually("the store", ms(5000), || {
            let error = center.storage_error().borrow().clone();
            ensure!(error.is_none(), "{error:?}");
            Ok(())
        })?;
        center.submit(&resolved(&alert(7, began), ended)).await?;
        center.stop(Duration::from_secs(5)).await;
        let center = AlertService::start(&webhook(&hook.url)?, &at, Clock::system())?;
        ensure!(center.restore().await.len() == 199, "what was kept in memory was not written");
        ensure!(center.history(None).await.len() == 1);
        eventually("the end", ms(5000), || {
            ensure!(hook.told().len() == 201, "{} were told", hook.told().len());
            Ok(())
        })?;
        center.stop(Duration::from_secs(5)).await;
        Ok(())
    })
}

/// A parent that does not reap.
struct Parent {
    shape: Shape,
    pid: u32,
}

impl Parent {
    fn start(fixture: &Fixture) -> Result<Self> {
        let mut shape = Shape::start(fixture, "zombie", &["1"])?;
        shape.fact::<u32>("dead")?;
        Ok(Self { pid: shape.pid(), shape })
    }

    /// It reaps and ends.
    fn cure(self) -> Result<u32> {
        self.shape.finish()?;
        Ok(self.pid)
    }
}

/// What was told last about each subject.
fn last_about(taken: &[Alert]) -> BTreeMap<u32, AlertState> {
    let zombies = taken.iter().filter(|a| a.kind == AlertKind::Zombie);
    zombies.filter_map(|a| Some((a.subject.as_ref()?.pid, a.state))).collect()
}

/// The agent is killed at random moments while its receiver flaps and parents come and are cured, some of them while it is
/// down. In the end the receiver knows what is so.
fn agent_killed(fixture: &Fixture, n: u64) -> Result<()> {
    let hook = Hook::start()?;
    let config = format!(
        "[zombies]\nafter = \"200ms\"\n[[receiver]]\nname = \"hook\"\ntype = \"webhook\"\nurl = \"{}\"\ntimeout = \"1s\"\n",
        hook.url
    );
    let (mut sick, mut cured): (Vec<Parent>, Vec<u32>) = (Vec::new(), Vec::new());
    for round in 0..n {
        hook.flap.store(round % 3 != 2, Ordering::SeqCst);
        let agent = Agent::start(fixture, &config)?;
        sick.push(Parent::start(fixture)?);
        if sick.len() > 4 {
            cured.push(sick.remove(0).cure()?);
        }
        // From before the alert to after its delivery.
        std::thread::sleep(Duration::from_millis(137 * round % 700));
        agent.crash()?;
        if round % 2 == 1 && sick.len() > 2 {
            cured.push(sick.remove(1).cure()?);
        }
    }
    hook.flap.store(false, Ordering::SeqCst);
    let agent = Agent::start(fixture, &config)?;
    eventually("the truth at the receiver", ms(60_000), || {
        let last = last_about(&hook.taken());
        for p in &sick {
            ensure!(last.get(&p.pid) == Some(&AlertState::Firing), "{} does not reap: {last:?}", p.pid);
        }
        for pid in &cured {
            ensure!(last.get(pid) != Some(&AlertState::Firing), "{pid} was cured: {last:?}");
        }
        let left = agent.alerts(&["--undelivered"])?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    let mut ended = std::collections::BTreeSet::new();
    for a in hook.taken() {
        let episode = (a.id.clone(), a.since.clone());
        match a.state {
            AlertState::Resolved => drop(ended.insert(episode)),
            _ => ensure!(!ended.contains(&episode), "a firing was told after its end: {a:?}"),
        }
    }
    let told = hook.taken().len();
    loudly(&format!(
        "{n} rounds, {} parents, {} cured, {told} alerts told",
        sick.len() + cured.len(),
        cured.len()
    ));
    for p in sick {
        p.cure()?;
    }
    agent.stop()
}

#[test]
fn a_killed_agent_loses_no_alert() -> Result<()> {
    let fixture = fixture!("a_killed_agent_loses_no_alert");
    agent_killed(&fixture, 6)
}

#[test]
#[ignore = "long: JWTEST_ALERT_ROUNDS (50)"]
fn a_killed_agent_loses_no_alert_in_many_rounds() -> Result<()> {
    let fixture = fixture!("a_killed_agent_loses_no_alert_in_many_rounds");
    agent_killed(&fixture, rounds("JWTEST_ALERT_ROUNDS", 50))
}

/// Resident bytes of this process.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kb: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kb * 1024)
}

/// Ten thousand alerts with a long cause each, while the receiver is down: they wait on the disk, not in memory; then it
/// comes back.
#[test]
fn ten_thousand_waiting_alerts_cost_little_memory() -> Result<()> {
    const ALERTS: u64 = 10_000;
    let fixture = Fixture::new("ten_thousand_waiting_alerts_cost_little_memory")?;
    let hook = Hook::start()?;
    let began = "2026-01-01T00:00:00.000Z";
    let rt = tokio::runtime::Runtime::new()?;
    rt.block_on(async {
        // Nobody listens there.
        let center = AlertService::start(&webhook("http://127.0.0.1:1/")?, &fixture.path(""), Clock::fast(100))?;
        let before = resident()?;
        let started = std::time::Instant::now();
        for chunk in (0..ALERTS).collect::<Vec<_>>().chunks(250) {
            let long = |n: &u64| Alert { summary: format!("{n} {}", "x".repeat(4000)), ..alert(*n, began) };
            center.submit_all(chunk.iter().map(long).collect()).await?;
        }
        let took = started.elapsed();
        let grown = resident()?.saturating_sub(before) >> 20;
        ensure!(center.pending() == ALERTS, "{} wait", center.pending());
        ensure!(grown < 32, "{ALERTS} alerts of 4 KB cost {grown} MiB");
        center.reload(&webhook(&hook.url)?).await?;
        let back = std::time::Instant::now();
        eventually("all of them", ms(120_000), || {
            ensure!(center.pending() == 0, "{} wait", center.pending());
            Ok(())
        })?;
        let ids: std::collections::BTreeSet<String> = hook.told().into_iter().map(|t| t.0).collect();
        ensure!(ids.len() as u64 == ALERTS, "{} arrived", ids.len());
        loudly(&format!(
            "{ALERTS} alerts accepted in {took:?}, {grown} MiB more resident; delivered in {:?} with the clock a hundredfold",
            back.elapsed()
        ));
        center.stop(Duration::from_secs(5)).await;
        Ok(())
    })
}
