//! The agent's log on a full disk, in a pipe without a reader, and in a pipe whose reader has stopped: the agent lives, keeps
//! its deadlines, kills at once, counts the lines that it drops and says how many they were.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::KillReport;
use jobwarden_tests::agent::Options;
use jobwarden_tests::disk::Disk;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, ms};

const DROPPED: &str = "jobwarden_log_dropped_total";
const TIMEOUT: Duration = Duration::from_secs(1);

/// A rule that ends the test's own processes at their deadline.
fn config(fixture: &Fixture) -> String {
    format!(
        "[enforcement]\nenabled = true\nmax_job_kills_per_minute = 1000\n\
         [[job]]\nname = \"logged\"\nmatch = {{ argv = \"{}\" }}\ntimeout = \"1s\"\non_timeout = \"kill\"\ngrace = \"0s\"\n",
        fixture.tag
    )
}

/// A job meets its deadline, another one is killed on request, and the forest follows both.
fn works(fixture: &Fixture, agent: &Agent<'_>) -> Result<()> {
    let mut late = Shape::start(fixture, "zombie", &["1"])?;
    let begun = Instant::now();
    late.wait(TIMEOUT + ms(2000)).context("the deadline")?;
    ensure!(begun.elapsed() > TIMEOUT / 2, "it ended by itself after {:?}", begun.elapsed());
    let mut other = fixture.command("sleep");
    other.arg("600");
    let mut other = Shape::spawn("sleep", other)?;
    agent.process_when(other.pid(), "it runs", |p| p.comm == "sleep")?;
    let report: KillReport = agent.json(&["kill", "--grace", "0", &other.pid().to_string()])?;
    ensure!(report.survivors.is_empty() && report.took_s < ms(2000).as_secs_f64(), "{report:?}");
    other.wait(ms(2000))?;
    agent.gone(late.pid())
}

fn pipe() -> Result<(File, File)> {
    let (read, write) = std::io::pipe()?;
    Ok((OwnedFd::from(read).into(), OwnedFd::from(write).into()))
}

#[test]
fn a_log_without_room_or_reader_ends_nothing() -> Result<()> {
    let fixture = fixture!("a_log_without_room_or_reader_ends_nothing");
    let full = File::options().write(true).open("/dev/full")?;
    let (reader, unread) = pipe()?;
    let mut reader = Some(reader);
    for (name, log) in [("full", &full), ("pipe", &unread)] {
        let config = config(&fixture);
        let options = Options { config: &config, name, stderr: Some(log), ..Options::default() };
        let agent = Agent::with(&fixture, &options)?;
        if name == "pipe" {
            reader = None;
        }
        works(&fixture, &agent).context(name)?;
        let dropped = agent.metrics()?.one(DROPPED, &[])?;
        ensure!(dropped >= 2.0, "{name}: {dropped} lines dropped");
        agent.stop().context(name)?;
    }
    ensure!(reader.is_none());
    Ok(())
}

/// Lines of the log: each process here is a job of its own, that begins and ends.
fn make_lines(fixture: &Fixture, jobs: usize) -> Result<()> {
    for _ in 0..jobs {
        let mut c = fixture.command("true");
        let status = c.arg(&fixture.tag).stdin(Stdio::null()).status()?;
        ensure!(status.success(), "true: {status}");
    }
    Ok(())
}

#[test]
fn a_reader_of_the_log_that_stops_delays_nothing() -> Result<()> {
    let fixture = fixture!("a_reader_of_the_log_that_stops_delays_nothing");
    let (mut reader, log) = pipe()?;
    let page = rustix::pipe::fcntl_setpipe_size(&log, 4096)?;
    let config = config(&fixture);
    let options = Options { config: &config, stderr: Some(&log), ..Options::default() };
    let agent = Agent::with(&fixture, &options)?;
    drop(log);
    let dropped = |agent: &Agent<'_>| -> Result<f64> { agent.metrics()?.one(DROPPED, &[]) };
    // The pipe is full long before the queue is.
    make_lines(&fixture, 100)?;
    ensure!(dropped(&agent)? < 0.5, "a queue with room in it drops lines");
    works(&fixture, &agent).with_context(|| format!("with a full pipe of {page} bytes"))?;
    for _ in 0..100 {
        make_lines(&fixture, 100)?;
        if dropped(&agent)? > 0.5 {
            break;
        }
    }
    works(&fixture, &agent).context("with a full queue")?;
    let lost = dropped(&agent)?;
    ensure!(lost > 0.5, "the queue has no bound");
    // The reader goes on.
    let text = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    eventually("the queue is written", ms(10_000), || {
        let before = dropped(&agent)?;
        make_lines(&fixture, 1)?;
        ensure!((dropped(&agent)? - before).abs() < 0.5, "lines are dropped still");
        Ok(())
    })?;
    std::thread::sleep(ms(1500));
    let lost = dropped(&agent)?;
    agent.stop()?;
    let Ok(text) = text.join() else { anyhow::bail!("the reader panicked") };
    let text = text?;
    let notices = text.lines().filter(|l| l.contains("log lines were dropped"));
    let told = notices.filter_map(|l| l.rsplit_once("lines=")?.1.parse::<f64>().ok()).sum::<f64>();
    ensure!((told - lost).abs() < 0.5, "{lost} lines dropped, the log says {told}");
    ensure!(text.ends_with("stopped\n"), "the last lines are missing: {:?}", text.lines().last());
    Ok(())
}

#[test]
fn a_reader_that_never_reads_does_not_hold_up_the_stop() -> Result<()> {
    let fixture = fixture!("a_reader_that_never_reads_does_not_hold_up_the_stop");
    let (_reader, log) = pipe()?;
    rustix::pipe::fcntl_setpipe_size(&log, 4096)?;
    let config = config(&fixture);
    let options = Options { config: &config, stderr: Some(&log), ..Options::default() };
    let agent = Agent::with(&fixture, &options)?;
    make_lines(&fixture, 100)?;
    let begun = Instant::now();
    agent.stop()?;
    ensure!(begun.elapsed() < ms(5000), "the stop took {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_disk_that_has_room_again_gets_the_count_without_another_line() -> Result<()> {
    let fixture = fixture!("a_disk_that_has_room_again_gets_the_count_without_another_line");
    let at = fixture.path("disk");
    let disk = Disk::mount(&at, 256 << 10)?;
    let path = at.join("log");
    let log = File::options().append(true).create(true).open(&path)?;
    let config = config(&fixture);
    let options = Options { config: &config, stderr: Some(&log), ..Options::default() };
    let agent = Agent::with(&fixture, &options)?;
    drop(log);
    disk.fill()?;
    make_lines(&fixture, 200)?;
    works(&fixture, &agent)?;
    let lost = agent.metrics()?.one(DROPPED, &[])?;
    ensure!(lost > 0.5, "no line was dropped on a full disk");
    disk.free()?;
    let notice = eventually("the notice", ms(5000), || {
        let text = std::fs::read_to_string(&path)?;
        let line = text.lines().find(|l| l.contains("log lines were dropped"));
        line.map(str::to_owned).context("no notice yet")
    })?;
    ensure!(notice.ends_with(&format!("lines={lost}")), "{lost} lines were dropped: {notice}");
    agent.stop()
}
