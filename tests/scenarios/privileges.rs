//! Each capability that the agent starts with or keeps, taken away alone: what it is for fails then and says so, and works
//! with it. What only some kernels ask for is shown on those, and that the others do not ask for it on them.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::model::schema::KillReport;
use jobwarden::privileges::{KEPT, TO_START, WHERE_ASKED, asked_for};
use jobwarden::sources::kernel::Kernel;
use jobwarden_tests::agent::Options;
use jobwarden_tests::{Agent, Fixture, Shape, fixture, ms, skip};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

const NOBODY: u32 = 65534;
/// The limit that a program has where nobody gave it another.
const MEMLOCK: u64 = 64 << 10;

/// What deploy/jobwarden.service gives: memory for maps is a limit there.
fn units() -> CapabilitySet {
    let all = KEPT.iter().chain(&WHERE_ASKED).chain(&TO_START).fold(CapabilitySet::empty(), |s, k| s | k.0);
    all - CapabilitySet::SYS_RESOURCE
}

/// The kernel's series: 5.10 is (5, 10).
fn series() -> Result<(u32, u32)> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut n = release.split('.').map_while(|n| n.parse().ok());
    n.next().zip(n.next()).with_context(|| release.clone())
}

/// Why the agent did not start.
fn refused(fixture: &Fixture, o: &Options<'_>) -> Result<String> {
    match Agent::with(fixture, o) {
        Ok(agent) => {
            agent.stop()?;
            bail!("it started");
        }
        Err(e) => Ok(format!("{e:#}")),
    }
}

/// A set of the running agent.
fn set_of(agent: &Agent<'_>, name: &str) -> Result<CapabilitySet> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(CapabilitySet::from_bits_retain(u64::from_str_radix(line.trim(), 16)?))
}

#[test]
fn what_the_unit_gives_is_enough() -> Result<()> {
    let fixture = fixture!("what_the_unit_gives_is_enough");
    let agent = Agent::with(&fixture, &Options { capabilities: Some(units()), ..Options::default() })?;
    // Another user's process: seen, and ended.
    let mut c = fixture.command("sleep");
    c.arg("600").uid(NOBODY).gid(NOBODY);
    let mut other = Shape::spawn("sleep", c)?;
    agent.process_when(other.pid(), "it runs", |p| p.uid == Some(NOBODY))?;
    let report: KillReport = agent.json(&["kill", "--grace", "1s", &other.pid().to_string()])?;
    ensure!(report.survivors.is_empty() && report.signalled.len() == 1, "{report:?}");
    other.wait(ms(5000))?;
    agent.stop()
}

#[test]
fn without_bpf_or_perfmon_no_probe_is_loaded() -> Result<()> {
    let fixture = fixture!("without_bpf_or_perfmon_no_probe_is_loaded");
    let says = ["no permission to create the map", "no permission to load the program"];
    let both = [(CapabilitySet::BPF, "BPF"), (CapabilitySet::PERFMON, "PERFMON")];
    for ((one, name), says) in both.into_iter().zip(says) {
        let o = Options { capabilities: Some(units() - one), name, ..Options::default() };
        let why = refused(&fixture, &o).with_context(|| format!("without {name}"))?;
        ensure!(why.contains(says) && why.contains(&format!("CAP_{name}")), "without {name}: {why}");
    }
    Ok(())
}

#[test]
fn without_chown_no_group_gets_the_socket() -> Result<()> {
    let fixture = fixture!("without_chown_no_group_gets_the_socket");
    let groups = std::fs::read_to_string("/etc/group")?;
    let of = |l: &str| -> Option<(String, u32)> {
        let mut f = l.split(':');
        let (name, gid) = (f.next()?, f.nth(1)?.parse().ok()?);
        (gid != 0).then(|| (name.to_owned(), gid))
    };
    let Some((name, gid)) = groups.lines().find_map(of) else {
        skip!("without_chown_no_group_gets_the_socket: no group but root's");
    };
    let config = format!("[agent]\nsocket_group = \"{name}\"\n");
    let with = |capabilities, config, name| Options {
        config,
        name,
        capabilities: Some(capabilities),
        ..Options::default()
    };
    let without = units() - CapabilitySet::CHOWN;
    let why = refused(&fixture, &with(without, &config, "without"))?;
    ensure!(why.contains("giving it to its group") && why.contains("not permitted"), "{why}");
    // The socket for root alone needs none.
    Agent::with(&fixture, &with(without, "", "alone"))?.stop()?;
    let agent = Agent::with(&fixture, &with(units(), &config, "with"))?;
    ensure!(std::fs::metadata(&agent.socket)?.gid() == gid, "the socket is not the group's");
    agent.stop()
}

#[test]
fn without_setpcap_the_bounding_set_stays_as_it_is() -> Result<()> {
    let fixture = fixture!("without_setpcap_the_bounding_set_stays_as_it_is");
    let without = units() - CapabilitySet::SETPCAP;
    for (given, name, closed) in [(units(), "with", true), (without, "without", false)] {
        let agent =
            Agent::with(&fixture, &Options { capabilities: Some(given), name, ..Options::default() })?;
        // It is given up all the same, and no_new_privs keeps it from coming back.
        let effective = set_of(&agent, "CapEff:")?;
        ensure!(!effective.contains(CapabilitySet::CHOWN), "{name}: {effective:?}");
        let bounding = set_of(&agent, "CapBnd:")?;
        ensure!(bounding == if closed { effective } else { given }, "{name}: {bounding:?}");
        ensure!(agent.log_tail().contains(&format!("bounding={closed}")), "{}", agent.log_tail());
        agent.stop()?;
    }
    Ok(())
}

/// It starts all the same; a bomb may then hold its own end up.
#[test]
fn without_sys_nice_the_scheduler_does_not_prefer_it() -> Result<()> {
    let fixture = fixture!("without_sys_nice_the_scheduler_does_not_prefer_it");
    let nice = |pid: u32| -> Result<String> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The fields behind the name begin with the state, the third of all; nice is the 19th.
        stat.rsplit_once(") ").and_then(|(_, l)| l.split(' ').nth(16)).map(String::from).context("no nice")
    };
    let without = units() - CapabilitySet::SYS_NICE;
    let own = nice(std::process::id())?;
    for (given, name, expected) in [(units(), "with", "-20"), (without, "without", own.as_str())] {
        let agent =
            Agent::with(&fixture, &Options { capabilities: Some(given), name, ..Options::default() })?;
        let seen = nice(agent.pid())?;
        ensure!(seen == expected, "{name}: {seen}");
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn without_sys_resource_an_old_kernel_has_no_memory_for_maps() -> Result<()> {
    let test = "without_sys_resource_an_old_kernel_has_no_memory_for_maps";
    let fixture = fixture!(test);
    let small = |capabilities, name| Options {
        name,
        capabilities: Some(capabilities),
        memlock: Some(MEMLOCK),
        ..Options::default()
    };
    if series()? >= (5, 11) {
        // Not counted here: it is not needed.
        Agent::with(&fixture, &small(units(), "without"))?.stop()?;
        skip!("{test}: kernels from 5.11 on do not count map memory against the limit");
    }
    let why = refused(&fixture, &small(units(), "without"))?;
    ensure!(why.contains("no permission to create the map") && why.contains("CAP_SYS_RESOURCE"), "{why}");
    Agent::with(&fixture, &small(units() | CapabilitySet::SYS_RESOURCE, "with"))?.stop()
}

/// The agent asks for what it keeps by trying; here each one that it asked for is left out once more, and so are those that
/// it gave up.
#[test]
fn bpf_is_kept_where_the_kernel_asks_for_it() -> Result<()> {
    let fixture = fixture!("bpf_is_kept_where_the_kernel_asks_for_it");
    let tried = || -> Result<CapabilitySet> {
        let kernel = Kernel::start(&jobwarden::sources::kernel::Options::default())?;
        let asked = asked_for(&|| kernel.self_test())?;
        let all = capabilities(None)?;
        let kept = KEPT.iter().fold(CapabilitySet::empty(), |s, k| s | k.0);
        let may = |more| -> Result<bool> {
            set_capabilities(None, CapabilitySets { effective: kept | more, ..all })?;
            let may = kernel.self_test().is_ok();
            set_capabilities(None, all)?;
            Ok(may)
        };
        ensure!(may(asked)?, "{asked:?} is not enough");
        for (one, name, _) in WHERE_ASKED {
            ensure!(!asked.contains(one) || !may(asked - one)?, "{name} is kept and not needed");
        }
        Ok(asked)
    };
    // A thread of its own: capabilities are a thread's.
    let asked = std::thread::scope(|s| s.spawn(tried).join());
    let asked = asked.map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    let (closed, series) =
        (std::fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled")?, series()?);
    if series < (5, 15) && closed.trim() != "0" {
        ensure!(asked == CapabilitySet::BPF, "{series:?}: {asked:?}");
    }
    if series >= (6, 1) {
        ensure!(asked.is_empty(), "{series:?}: {asked:?}");
    }
    let agent = Agent::with(&fixture, &Options { capabilities: Some(units()), ..Options::default() })?;
    let has = set_of(&agent, "CapEff:")?;
    let given = KEPT.iter().fold(asked, |s, k| s | k.0);
    ensure!(has == given, "the agent has {has:?}, the kernel asks for {asked:?}");
    jobwarden_tests::loudly(&format!("kernel {series:?} asks for {asked:?} of a running agent"));
    agent.stop()
}

/// Its owner could put symbolic links in the place of the files that root writes.
#[test]
fn a_state_folder_of_another_user_is_refused() -> Result<()> {
    let fixture = fixture!("a_state_folder_of_another_user_is_refused");
    let state = fixture.path("agent").join("state");
    std::fs::create_dir_all(&state)?;
    std::os::unix::fs::chown(&state, Some(NOBODY), Some(NOBODY))?;
    let victim = fixture.path("victim");
    std::fs::write(&victim, "precious")?;
    for name in ["jobs.json", "jobs.json.new", "alerts.db", "alerts.db-wal", "audit.log"] {
        std::os::unix::fs::symlink(&victim, state.join(name))?;
    }
    let why = refused(&fixture, &Options::default())?;
    ensure!(why.contains(&*state.to_string_lossy()) && why.contains("uid 65534"), "{why}");
    ensure!(why.contains("chown 0") && why.contains("--state-dir"), "it says what to do: {why}");
    ensure!(std::fs::read(&victim)? == b"precious");
    // Given back, with the links in it: the agent starts, and follows none of them.
    std::os::unix::fs::chown(&state, Some(0), Some(0))?;
    std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let why = refused(&fixture, &Options::default())?;
    ensure!(why.contains("0777") && why.contains("chmod go-w"), "{why}");
    std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let agent = Agent::start(&fixture, "")?;
    agent.stop()?;
    ensure!(std::fs::read(&victim)? == b"precious", "a symbolic link was followed");
    Ok(())
}

/// On the way to the folder too: a link or a folder of another user decides where it is.
#[test]
fn a_path_through_a_folder_of_another_user_is_refused() -> Result<()> {
    let fixture = fixture!("a_path_through_a_folder_of_another_user_is_refused");
    let theirs = fixture.path("theirs");
    std::fs::create_dir_all(theirs.join("state"))?;
    std::fs::create_dir(fixture.path("ours"))?;
    std::os::unix::fs::symlink(fixture.path("ours"), theirs.join("link"))?;
    for path in [&theirs, &theirs.join("link")] {
        std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY))?;
    }
    for args in [
        ["--state-dir", &theirs.join("state").to_string_lossy()],
        ["--state-dir", &theirs.join("link/state").to_string_lossy()],
        ["--socket", &theirs.join("s.sock").to_string_lossy()],
        ["--socket", &theirs.join("new/s.sock").to_string_lossy()],
    ] {
        let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
        c.args([
            "agent",
            "--no-pin",
            "--listen",
            &format!("127.0.0.1:{}", jobwarden_tests::agent::free_port()?),
        ]);
        c.args(args);
        if args[0] == "--socket" {
            c.arg("--state-dir").arg(fixture.path("state"));
        } else {
            c.arg("--socket").arg(fixture.path("sock"));
        }
        let out = jobwarden_tests::agent::run(c, jobwarden_tests::ms(10_000))?;
        ensure!(out.code() == Some(1) && out.err().contains("uid 65534"), "{args:?}: {out:?}");
        ensure!(!theirs.join("s.sock").exists() && !theirs.join("new").exists());
    }
    ensure!(std::fs::read_dir(fixture.path("ours"))?.next().is_none(), "something was made behind the link");
    Ok(())
}
