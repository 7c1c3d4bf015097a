//! `replay` of recordings that were damaged or made to harm: it always ends, with an answer or an error, in bounded time and
//! memory.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Options, Output, run};
use jobwarden_tests::fixture::program;
use jobwarden_tests::mutate::{self, Chance, Frame, Pool};
use jobwarden_tests::{Agent, Fixture, Shape, fixture, loudly, ms, pause, rounds};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Address space of a replay. Its own needs are a tenth of this.
const MEMORY: u64 = 1 << 30;

/// Kills only what this test started: only its shapes have its tag at the end of their argv.
fn config(fixture: &Fixture) -> String {
    format!(
        "[zombies]\nafter = \"200ms\"\n[enforcement]\nenabled = true\nmax_job_kills_per_minute = 3\n\
         [[job]]\nname = \"late\"\nmatch = {{ argv = \"shape-fork .*{tag}$\" }}\ntimeout = \"700ms\"\non_timeout = \"kill\"\ngrace = \"100ms\"\n\
         [[job]]\nname = \"left\"\nmatch = {{ exe = \"shape-brood$\", argv = \"{tag}$\" }}\norphan_after = \"200ms\"\non_orphan = \"kill\"\ngrace = \"100ms\"\n\
         [[job]]\nname = \"other\"\nmatch = {{ argv = \"{tag}$\" }}\ntimeout = \"1h\"\nzombie_after = \"100ms\"\n",
        tag = fixture.tag
    )
}

/// A recording in which every part of the engine had something to do.
fn recorded(fixture: &Fixture) -> Result<Vec<Frame>> {
    let file = fixture.path("recording");
    let name = file.to_string_lossy().into_owned();
    let config = config(fixture);
    let agent =
        Agent::with(fixture, &Options { config: &config, args: &["--record", &name], ..Options::default() })?;
    let mut zombie = Shape::start(fixture, "zombie", &["2"])?;
    zombie.fact::<u32>("dead")?;
    let mut brood = Shape::start(fixture, "brood", &[])?;
    brood.fact::<u32>("orphan")?;
    let mut fork = Shape::start(fixture, "fork", &[])?;
    fork.fact::<u32>("grandchild")?;
    let mut setsid = Shape::start(fixture, "setsid", &[])?;
    setsid.fact::<u32>("grandchild")?;
    for args in [
        &["jobs", "extend", "--", "name:other", "1h"][..],
        &["enforcement", "off", "--for", "300ms"],
        &["enforcement", "on"],
        &["reload"],
        &["exec", "--name", "alone", "--timeout", "1s", "--", "sleep", "0.1"],
    ] {
        // A name may have several matches: what matters is that the engine was asked.
        agent.cli(args)?;
    }
    pause(1500);
    agent.cli(&["kill", "--grace", "100ms", &setsid.pid().to_string()])?;
    zombie.step()?;
    zombie.fact::<u32>("reaped")?;
    zombie.finish()?;
    pause(300);
    drop((brood, fork, setsid));
    agent.stop()?;
    mutate::read(&std::fs::read(&file)?)
}

fn replay(fixture: &Fixture, file: &Path) -> Result<Output> {
    let mut c: Command = fixture.command(program("jobwarden")?);
    c.arg("replay").arg(file).env("RUST_BACKTRACE", "1");
    // SAFETY: one system call.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut c, || {
            Ok(setrlimit(Resource::As, Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) })?)
        });
    }
    run(c, ms(20_000))
}

/// It ended, and by itself: an answer, or an error that is said.
fn ended(fixture: &Fixture, file: &Path) -> Result<()> {
    let out = replay(fixture, file)?;
    match out.code() {
        Some(0) => Ok(()),
        Some(1) if !out.err().is_empty() => Ok(()),
        _ => anyhow::bail!("{}: {}", out.status, out.err()),
    }
}

fn mutants(fixture: &Fixture, n: u64) -> Result<()> {
    let frames = recorded(fixture)?;
    let pool = Pool::new(&frames);
    let file = fixture.path("mutant");
    std::fs::write(&file, mutate::write(&frames)?)?;
    let whole = replay(fixture, &file)?;
    ensure!(whole.code() == Some(0) && whole.out().contains("\"kind\":\"alert\""), "{whole:?}");
    let first = rounds("JWTEST_REPLAY_SEED", u64::from(std::process::id()) << 32);
    let (began, mut slowest) = (Instant::now(), 0.0_f64);
    for seed in first..first + n {
        let mut mutant = frames.clone();
        mutate::mutate(&mut mutant, &mut Chance(seed), &pool);
        std::fs::write(&file, mutate::write(&mutant)?)?;
        let this = Instant::now();
        let held = ended(fixture, &file);
        slowest = slowest.max(this.elapsed().as_secs_f64());
        if let Err(e) = held {
            // The recording itself is another one in the next run.
            let kept = std::env::temp_dir().join(format!("jobwarden-mutant-{seed}"));
            std::fs::copy(&file, &kept)?;
            return Err(e.context(format!("seed {seed}, kept as {}", kept.display())));
        }
    }
    let took = began.elapsed().as_secs_f64();
    loudly(&format!(
        "{n} mutants of {} frames replayed in {took:.0} s, the slowest in {slowest:.1} s",
        frames.len()
    ));
    Ok(())
}

#[test]
fn mutated_recordings_end() -> Result<()> {
    let fixture = fixture!("mutated_recordings_end");
    mutants(&fixture, 100)
}

#[test]
#[ignore = "long: JWTEST_REPLAY_ROUNDS (20000)"]
fn many_mutated_recordings_end() -> Result<()> {
    let fixture = fixture!("many_mutated_recordings_end");
    mutants(&fixture, rounds("JWTEST_REPLAY_ROUNDS", 20_000))
}

/// The tag of the first frame.
const HEADER: u8 = 3;

/// The first frame of a recording, of an agent with these limits.
fn start(limits: &str, config: &str) -> Result<Frame> {
    let config = serde_json::to_string(config)?;
    let text = format!(
        "{{\"settings\":{{\"host\":\"h\",\"machine_id\":\"\",\"boot_id\":\"\",\"agent\":\"1:1\",\"pid_ns\":null,\
         \"boot_to_wall_ns\":0,\"limits\":{limits}}},\"config\":{config}}}"
    );
    Ok((HEADER, text.into_bytes()))
}

const LIMITS: &str =
    "{\"processes\":4194304,\"jobs\":65536,\"alerts\":16384,\"signals\":8192,\"tombstones\":262144}";

#[test]
fn a_recording_that_asks_for_much_memory() -> Result<()> {
    let fixture = fixture!("a_recording_that_asks_for_much_memory");
    let huge = format!(
        "{{\"processes\":{m},\"jobs\":{m},\"alerts\":{m},\"signals\":{m},\"tombstones\":{m}}}",
        m = u64::MAX
    );
    let row = "{\"key\":\"7:7\",\"parent\":null,\"lineage\":null,\"job\":0,\"state\":\"Running\",\"status\":0,\"uid\":0,\
               \"comm\":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0],\"kernel_thread\":false,\"adopts\":false,\"argv\":null,\"exe\":null}";
    let snapshot = |rows: usize| {
        let rows = vec![row; rows].join(",");
        let text = format!("{{\"now\":2,\"input\":{{\"Snapshot\":{{\"t0\":1,\"rows\":[{rows}]}}}}}}");
        (2, text.into_bytes())
    };
    let file = fixture.path("huge");
    // Limits that nobody has, with a tick to use them.
    let tick = (2, b"{\"now\":18446744073709551615,\"input\":\"Tick\"}".to_vec());
    std::fs::write(&file, mutate::write(&[start(&huge, "")?, tick.clone(), snapshot(10), tick])?)?;
    let out = replay(&fixture, &file)?;
    ensure!(out.code() == Some(0), "{out:?}");
    // 200,000 rows of one process; a frame that says it is 4 GiB long.
    std::fs::write(&file, mutate::write(&[start(LIMITS, "")?, snapshot(200_000)])?)?;
    let out = replay(&fixture, &file)?;
    ensure!(out.code() == Some(0), "{out:?}");
    Ok(())
}

/// Jobs nested in a circle by the saved state: every walk outwards ends.
#[test]
fn restored_jobs_that_contain_each_other() -> Result<()> {
    let fixture = fixture!("restored_jobs_that_contain_each_other");
    let job = |n: u64, outer: u64| {
        format!(
            "{{\"number\":{n},\"id\":\"j-{n}:{n}-1\",\"name\":\"n\",\"rule\":null,\"outer\":{outer},\"started\":{n},\
             \"deadline\":18446744073709551615,\"policy\":{{\"timeout_ns\":null,\"zombie_after_ns\":18446744073709551615,\
             \"orphan_after_ns\":18446744073709551615,\"kill_on_timeout\":true,\"kill_on_orphan\":true,\"kill_daemons\":true,\
             \"enforce_existing\":true,\"stop_signal\":15,\"grace_ns\":18446744073709551615,\"severity\":null}},\
             \"existing\":false,\"supervisor\":\"5:5\",\"expired\":true,\"members\":[\"{n}:{n}\"]}}"
        )
    };
    // Deeper than the kernel's bound on nesting, and the outermost inside the innermost.
    let jobs: Vec<String> = (1..=100).map(|n| job(n, if n == 1 { 100 } else { n - 1 })).collect();
    let rows: Vec<String> = (1..=100_u64)
        .map(|n| {
            format!(
                "{{\"key\":\"{n}:{n}\",\"parent\":null,\"lineage\":null,\"job\":{n},\"state\":\"Running\",\"status\":0,\"uid\":0,\
                 \"comm\":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0],\"kernel_thread\":false,\"adopts\":false,\"argv\":null,\"exe\":null}}"
            )
        })
        .collect();
    let look = |n: u64| {
        (2, format!("{{\"now\":{n}000,\"input\":{{\"Observation\":{{\"Look\":{{\"key\":\"{n}:{n}\",\"at\":9,\"seen\":\"Absent\"}}}}}}}}").into_bytes())
    };
    let mut frames = vec![
        start(LIMITS, "")?,
        (2, format!("{{\"now\":1,\"input\":{{\"RestoreJobs\":[{}]}}}}", jobs.join(",")).into_bytes()),
        (
            2,
            format!(
                "{{\"now\":901,\"input\":{{\"Snapshot\":{{\"t0\":900,\"rows\":[{}]}}}}}}",
                rows.join(",")
            )
            .into_bytes(),
        ),
        (2, b"{\"now\":902,\"input\":\"Ready\"}".to_vec()),
    ];
    frames.extend((1..=100).map(look));
    frames.push((2, b"{\"now\":18446744073709551615,\"input\":\"Tick\"}".to_vec()));
    let file = fixture.path("circle");
    std::fs::write(&file, mutate::write(&frames)?)?;
    let out = replay(&fixture, &file).context("a circle of jobs")?;
    ensure!(out.code() == Some(0), "{out:?}");
    Ok(())
}
