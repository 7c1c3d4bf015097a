//! The agent as a service: what it tells the service manager, which privileges it keeps, and that the unit and the DaemonSet
//! fit it.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden::privileges::{KEPT, TO_START, WHERE_ASKED};
use jobwarden_tests::{Agent, Shape, agent, eventually, fixture, ms, skip};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// Waits for a message of the agent that has this line.
fn told(from: &UnixDatagram, line: &str) -> Result<()> {
    let end = Instant::now() + ms(10_000);
    let mut seen = Vec::new();
    while Instant::now() < end {
        let mut b = [0; 512];
        if let Ok(n) = from.recv(&mut b) {
            let text = String::from_utf8_lossy(&b[..n]).into_owned();
            if text.lines().any(|l| l == line) {
                return Ok(());
            }
            seen.push(text);
        }
    }
    anyhow::bail!("the manager was not told {line}, but {seen:?}")
}

#[test]
fn the_manager_is_told() -> Result<()> {
    let fixture = fixture!("the_manager_is_told");
    let path = fixture.path("notify");
    let manager = UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(ms(100)))?;
    let socket = path.display().to_string();
    let options = agent::Options { env: &[("NOTIFY_SOCKET", &socket)], ..agent::Options::default() };
    let agent = Agent::with(&fixture, &options)?;
    told(&manager, "READY=1")?;
    for _ in 0..2 {
        told(&manager, "WATCHDOG=1")?;
    }
    ensure!(agent.cli(&["reload"])?.code() == Some(0));
    told(&manager, "RELOADING=1")?;
    told(&manager, "READY=1")?;
    // A config that is refused leaves it running, and ready.
    std::fs::write(&agent.config, "[agent\n")?;
    ensure!(agent.cli(&["reload"])?.code() == Some(1));
    told(&manager, "RELOADING=1")?;
    told(&manager, "READY=1")?;
    agent.stop()?;
    told(&manager, "STOPPING=1")
}

/// A line of a /proc status file as a number.
fn field(status: &str, name: &str) -> Result<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(u64::from_str_radix(line.trim(), 16)?)
}

#[test]
fn what_is_not_needed_is_given_up_by_every_thread() -> Result<()> {
    let fixture = fixture!("what_is_not_needed_is_given_up_by_every_thread");
    let said = fixture.path("said");
    // The receiver's program writes down what it may; the agent has the same program as root.
    let config = format!(
        "[[receiver]]\nname = \"r\"\ntype = \"exec\"\ncommand = [\"/bin/sh\", \"-c\", \"cat /proc/self/status > {}\"]\n",
        said.display()
    );
    let agent = Agent::start(&fixture, &config)?;
    let may = KEPT.iter().chain(&WHERE_ASKED).fold(0, |s, k| s | k.0.bits());
    let must = KEPT.iter().fold(0, |s, k| s | k.0.bits());
    let pid = agent.json::<jobwarden::api::Status>(&["status"])?.pid;
    let mut threads = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(entry?.path().join("status"))?;
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            let has = field(&status, set)?;
            ensure!(has & !may == 0 && has & must == must, "{set} {has:x}\n{status}");
        }
        ensure!(field(&status, "CapInh:")? == 0 && field(&status, "CapAmb:")? == 0, "{status}");
        ensure!(field(&status, "NoNewPrivs:")? == 1, "{status}");
        threads += 1;
    }
    ensure!(threads > 1, "an agent of one thread proves little");

    ensure!(agent.cli(&["notify", "r"])?.code() == Some(0));
    let status = eventually("the receiver's word", ms(5000), || Ok(std::fs::read_to_string(&said)?))?;
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        ensure!(field(&status, set)? == 0, "{status}");
    }
    ensure!(field(&status, "NoNewPrivs:")? == 1, "{status}");
    agent.stop()
}

#[test]
fn the_readme_names_each_capability() -> Result<()> {
    let readme = std::fs::read_to_string(top().join("README.md"))?;
    let from = readme.find("| kept | for |").context("no table of what is kept")?;
    let (kept, start) =
        readme[from..].split_once("| needed to start").context("no table of what is given up")?;
    for (_, name, why) in KEPT.iter().chain(&WHERE_ASKED) {
        ensure!(
            kept.contains(&format!("CAP_{name}")),
            "CAP_{name} is kept ({why}) and the README does not say so"
        );
    }
    for (_, name, why) in TO_START.iter().chain(&WHERE_ASKED) {
        ensure!(
            start.contains(&format!("CAP_{name}")),
            "CAP_{name} is needed ({why}) and the README does not say so"
        );
    }
    let known = KEPT.iter().chain(&WHERE_ASKED).chain(&TO_START).map(|k| k.1).chain(["DAC_OVERRIDE"]);
    let known: Vec<String> = known.map(|n| format!("CAP_{n}")).collect();
    let named = kept.split(|c: char| !(c.is_ascii_uppercase() || c == '_')).filter(|w| w.starts_with("CAP_"));
    let wrong: Vec<&str> = named.filter(|n| !known.iter().any(|k| k == n)).collect();
    ensure!(wrong.is_empty(), "the README names {wrong:?}");
    Ok(())
}

#[test]
fn the_unit_is_accepted_and_closed() -> Result<()> {
    let analyze = |args: &[&str], unit: &Path| Command::new("systemd-analyze").args(args).arg(unit).output();
    let unit = top().join("deploy/jobwarden.service");
    let text = std::fs::read_to_string(&unit)?;
    // The unit gives the memory itself, and so not what would raise its limit.
    ensure!(text.contains("\nLimitMEMLOCK=infinity\n"), "no memory for maps on kernels before 5.11");
    let needed = || KEPT.iter().chain(&WHERE_ASKED).chain(&TO_START).filter(|k| k.1 != "SYS_RESOURCE");
    for (_, name, _) in needed() {
        ensure!(
            text.contains(&format!("CAP_{name}")) && text.contains(&format!("#   {name}"))
                || text.contains("#   BPF, PERFMON"),
            "{name} and its reason"
        );
    }
    let line =
        text.lines().find_map(|l| l.strip_prefix("CapabilityBoundingSet=")).context("no bounding set")?;
    let mut given: Vec<&str> = line.split(' ').collect();
    let mut needed: Vec<String> = needed().map(|k| format!("CAP_{}", k.1)).collect();
    given.sort_unstable();
    needed.sort_unstable();
    ensure!(given == needed, "{line}, needed {needed:?}");
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        skip!("the_unit_is_accepted_and_closed: no systemd-analyze (Debian's package systemd)");
    }
    // It looks whether the program is there: here it is the one that was built, and the man page is not installed.
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("jobwarden.service");
    let program = jobwarden_tests::fixture::program("jobwarden")?;
    std::fs::write(&copy, text.replace("/usr/bin/jobwarden", &program.display().to_string()))?;
    let out = analyze(&["verify", "--man=no"], &copy)?;
    ensure!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = analyze(&["security", "--offline=true", "--threshold=50", "--no-pager"], &copy)?;
    let said = String::from_utf8_lossy(&out.stdout);
    let last = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
    ensure!(out.status.success() && last.contains("OK"), "{last}");
    jobwarden_tests::loudly(last);
    Ok(())
}

#[test]
fn the_config_page_has_every_key() -> Result<()> {
    let page = std::fs::read_to_string(top().join("deploy/man/jobwarden.toml.5"))?;
    let bold: Vec<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix(".B ").or_else(|| l.strip_prefix(".BR ")))
        .flat_map(|l| l.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
        .collect();
    let example = std::fs::read_to_string(top().join("deploy/jobwarden.toml"))?;
    let mut keys = 0;
    for line in example.lines().map(|l| l.trim_start_matches(['#', ' '])) {
        let Some((key, _)) = line.split_once(" = ") else { continue };
        if key.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
            ensure!(bold.contains(&key), "jobwarden.toml(5) does not tell of {key}");
            keys += 1;
        }
    }
    ensure!(keys > 30, "the example was not read: {keys}");
    Ok(())
}

/// What the DaemonSet must have, by python3's yaml.
const LOOK: &str = r#"
import json, sys, yaml
docs = [d for d in yaml.safe_load_all(open(sys.argv[1])) if d]
print(json.dumps({d["kind"]: d for d in docs}))
"#;

#[test]
fn the_daemonset_gives_what_the_agent_needs_and_no_more() -> Result<()> {
    let file = top().join("deploy/kubernetes/daemonset.yaml");
    let out = Command::new("python3").args(["-c", LOOK]).arg(&file).output();
    let Ok(out) = out else { skip!("the_daemonset: no python3") };
    if String::from_utf8_lossy(&out.stderr).contains("No module named") {
        skip!("the_daemonset: no yaml for python3 (Debian's package python3-yaml)");
    }
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let kinds: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    let pod = &kinds["DaemonSet"]["spec"]["template"]["spec"];
    ensure!(pod["hostPID"] == true && pod["automountServiceAccountToken"] == false, "{pod}");
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    ensure!(security["readOnlyRootFilesystem"] == true, "{security}");
    ensure!(security["allowPrivilegeEscalation"] == false && security["privileged"].is_null(), "{security}");
    ensure!(security["capabilities"]["drop"] == serde_json::json!(["ALL"]), "{security}");
    let mut add: Vec<&str> = security["capabilities"]["add"]
        .as_array()
        .context("no add")?
        .iter()
        .filter_map(|v| v.as_str())
        .collect();
    // No socket_group in a container: nobody is given the socket.
    let needed = KEPT.iter().chain(&WHERE_ASKED).chain(&TO_START).map(|k| k.1).filter(|n| *n != "CHOWN");
    let mut needed: Vec<&str> = needed.collect();
    add.sort_unstable();
    needed.sort_unstable();
    ensure!(add == needed, "{add:?}, needed {needed:?}");
    let mounts = container["volumeMounts"].as_array().context("no mounts")?;
    for m in mounts {
        ensure!(pod["volumes"].as_array().is_some_and(|v| v.iter().any(|v| v["name"] == m["name"])), "{m}");
    }
    // All that it writes to is a volume: its root is read-only.
    for path in ["/sys/fs/bpf", "/var/lib/jobwarden", "/run/jobwarden"] {
        let there = mounts.iter().any(|m| m["mountPath"] == path && m["readOnly"] != true);
        ensure!(there, "{path} cannot be written");
    }
    Ok(())
}

#[test]
fn the_probes_own_lines() -> Result<()> {
    let fixture = fixture!("the_probes_own_lines");
    let running =
        Agent::with(&fixture, &agent::Options { args: &["--trace-probes"], ..agent::Options::default() })?;
    // The agent has given up its privileges by now.
    let mut s = Shape::start(&fixture, "fork", &[])?;
    let child: u32 = s.fact("child")?;
    eventually("a line about the fork", ms(5000), || {
        let log = std::fs::read_to_string(&running.log)?;
        ensure!(
            log.lines().any(|l| l.contains("probes") && l.contains(&format!("fork {child}:"))),
            "{}",
            running.log_tail()
        );
        Ok(())
    })?;
    s.step()?;
    s.finish()?;
    running.stop()
}
