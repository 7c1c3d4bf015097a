//! Delivery to the real Alertmanager, Debian's, on loopback: what arrives, that it groups, that a silence works, that it
//! ends, and a cluster of two.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::Alert;
use jobwarden::notify::{AlertService, Clock};
use jobwarden_tests::agent::free_port;
use jobwarden_tests::alerts::{alert, ask, receivers, resolved};
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, ms, promised, skip};
use rustix::process::Signal;
use serde_json::Value;

const CONFIG: &str = "\
route:
  receiver: nobody
  group_by: [alertname, job_name]
  group_wait: 0s
receivers:
  - name: nobody
";

/// As Debian calls it, or as its makers do, wherever the path has it.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let names = ["prometheus-alertmanager", "alertmanager"];
    names.into_iter().find_map(|n| folders.iter().map(|f| f.join(n)).find(|p| p.is_file()))
}

/// Debian's has its files under /usr/share by a fixed name. One that is only unpacked sees its own there, in a mount
/// namespace that ends with it.
fn command(fixture: &Fixture, program: &Path) -> Command {
    let template = "prometheus/alertmanager/default.tmpl";
    let share = program.parent().and_then(Path::parent).map(|p| p.join("share")).unwrap_or_default();
    if Path::new("/usr/share").join(template).exists() || !share.join(template).exists() {
        return fixture.command(program);
    }
    let mut c = fixture.command("unshare");
    c.args(["--mount", "sh", "-c", "mount --bind \"$1\" /usr/share && shift && exec \"$@\"", "sh"]);
    c.arg(share).arg(program);
    c
}

/// One running Alertmanager; killed when dropped.
struct Alertmanager {
    child: Child,
    port: u16,
    cluster: u16,
}

impl Drop for Alertmanager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Alertmanager {
    fn start(fixture: &Fixture, program: &Path, name: &str, peer: Option<u16>) -> Result<Self> {
        let dir = fixture.path(name);
        std::fs::create_dir(&dir)?;
        let config = dir.join("config.yml");
        std::fs::write(&config, CONFIG)?;
        let (port, cluster) = (free_port()?, free_port()?);
        let log = std::fs::File::create(dir.join("log"))?;
        let mut c = command(fixture, program);
        c.arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.path={}", dir.display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg(format!("--cluster.listen-address=127.0.0.1:{cluster}"))
            .arg("--cluster.advertise-address=127.0.0.1:".to_owned() + &cluster.to_string())
            .args(["--cluster.settle-timeout=0s", "--cluster.gossip-interval=50ms"])
            .args(["--cluster.pushpull-interval=500ms"])
            .args(peer.map(|p| format!("--cluster.peer=127.0.0.1:{p}")))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let am = Self { child: c.spawn()?, port, cluster };
        eventually("Alertmanager", ms(20_000), || {
            let (status, _) = ask(port, "GET", "/-/ready", "")?;
            ensure!(status == 200, "{status}");
            Ok(())
        })
        .with_context(|| std::fs::read_to_string(dir.join("log")).unwrap_or_default())?;
        Ok(am)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn alerts(&self, query: &str) -> Result<Vec<Value>> {
        let (status, body) = ask(self.port, "GET", &format!("/api/v2/alerts{query}"), "")?;
        ensure!(status == 200, "{status} {body}");
        Ok(body.as_array().cloned().unwrap_or_default())
    }

    /// The alert with this id, if it is there.
    fn alert(&self, id: &str) -> Result<Option<Value>> {
        Ok(self.alerts("")?.into_iter().find(|a| a["labels"]["alert_id"] == id))
    }
}

fn now() -> String {
    jobwarden::model::time::rfc3339(
        jobwarden::sources::host::boot_now() + jobwarden::sources::host::boot_to_wall(),
    )
}

fn center(fixture: &Fixture, urls: &[String]) -> Result<AlertService> {
    let text = format!("[[receiver]]\nname = \"am\"\ntype = \"alertmanager\"\nurls = {urls:?}\n");
    Ok(AlertService::start(&receivers(&text)?, &fixture.path(""), Clock::system())?)
}

fn stands(am: &Alertmanager, a: &Alert) -> Result<Value> {
    eventually("the alert in Alertmanager", ms(5000), || am.alert(&a.id)?.context("it is not there"))
}

fn goes(am: &Alertmanager, a: &Alert) -> Result<()> {
    eventually("its end in Alertmanager", ms(5000), || {
        ensure!(am.alert(&a.id)?.is_none(), "it is still there");
        Ok(())
    })
}

#[test]
fn an_alert_stands_groups_is_silenced_and_resolves() -> Result<()> {
    let Some(program) = program() else {
        skip!(
            "an_alert_stands_groups_is_silenced_and_resolves: no Alertmanager (apt-get install prometheus-alertmanager)"
        );
    };
    let fixture = Fixture::new("an_alert_stands_groups_is_silenced_and_resolves")?;
    let am = Alertmanager::start(&fixture, &program, "am", None)?;
    let rt = tokio::runtime::Runtime::new()?;
    rt.block_on(async {
        let center = center(&fixture, &[am.url()])?;
        let all: Vec<Alert> = (1..=3).map(|n| alert(n, &now())).collect();
        let submitted = Instant::now();
        center.submit_all(all.clone()).await?;
        let there = stands(&am, &all[0])?;
        println!("in Alertmanager {:?} after it was submitted", submitted.elapsed());
        for (k, v) in &all[0].labels {
            ensure!(there["labels"][k] == *v, "label {k}: {there}");
        }
        ensure!(there["annotations"]["summary"] == "worker 1 does not reap", "{there}");
        let runbook = there["annotations"]["runbook"].as_str().unwrap_or_default();
        ensure!(runbook.ends_with("/docs/alerts/zombie.md"), "{there}");
        ensure!(there["status"]["state"] == "active", "{there}");
        stands(&am, &all[2])?;

        let (status, groups) = ask(am.port, "GET", "/api/v2/alerts/groups", "")?;
        let groups = groups.as_array().context("no groups")?;
        ensure!(status == 200 && groups.len() == 1, "{groups:?}");
        ensure!(groups[0]["alerts"].as_array().is_some_and(|a| a.len() == 3), "{groups:?}");

        let ends = jobwarden::model::time::rfc3339(
            jobwarden::sources::host::boot_now()
                + jobwarden::sources::host::boot_to_wall()
                + 3_600_000_000_000,
        );
        let silence = serde_json::json!({
            "matchers": [{ "name": "alert_id", "value": all[1].id, "isRegex": false, "isEqual": true }],
            "startsAt": now(), "endsAt": ends, "createdBy": "test", "comment": "test",
        });
        let (status, said) = ask(am.port, "POST", "/api/v2/silences", &silence.to_string())?;
        ensure!(status == 200, "{status} {said}");
        eventually("the silence", ms(5000), || {
            let a = am.alert(&all[1].id)?.context("it is gone")?;
            ensure!(a["status"]["state"] == "suppressed", "{a}");
            Ok(())
        })?;

        for a in &all {
            center.submit(&resolved(a, &now())).await?;
        }
        let submitted = Instant::now();
        for a in &all {
            goes(&am, a)?;
        }
        println!("resolved there {:?} after it was submitted", submitted.elapsed());
        let report = center.notify("am").await.context("no such receiver")?;
        ensure!(report.delivered, "{report:?}");
        center.stop(Duration::from_secs(2)).await;
        Ok(())
    })
}

#[test]
fn both_peers_of_a_cluster_know_and_one_may_be_down() -> Result<()> {
    let Some(program) = program() else {
        skip!(
            "both_peers_of_a_cluster_know_and_one_may_be_down: no Alertmanager (apt-get install prometheus-alertmanager)"
        );
    };
    let fixture = Fixture::new("both_peers_of_a_cluster_know_and_one_may_be_down")?;
    let one = Alertmanager::start(&fixture, &program, "one", None)?;
    let two = Alertmanager::start(&fixture, &program, "two", Some(one.cluster))?;
    let rt = tokio::runtime::Runtime::new()?;
    rt.block_on(async {
        let center = center(&fixture, &[one.url(), two.url()])?;
        let first = alert(1, &now());
        center.submit(&first).await?;
        stands(&one, &first)?;
        stands(&two, &first)?;
        drop(one);
        let second = alert(2, &now());
        center.submit(&second).await?;
        stands(&two, &second)?;
        center.submit(&resolved(&first, &now())).await?;
        goes(&two, &first)?;
        eventually("nothing waits", ms(5000), || {
            ensure!(center.pending() == 0, "{:?}", center.notifications());
            Ok(())
        })?;
        center.stop(Duration::from_secs(2)).await;
        Ok(())
    })
}

/// Alertmanager refuses a batch for one alert: the others arrive, that one is parked with what was said.
#[test]
fn a_batch_that_alertmanager_refuses_costs_only_the_bad_one() -> Result<()> {
    let Some(program) = program() else {
        skip!(
            "a_batch_that_alertmanager_refuses_costs_only_the_bad_one: no Alertmanager (apt-get install prometheus-alertmanager)"
        );
    };
    let fixture = Fixture::new("a_batch_that_alertmanager_refuses_costs_only_the_bad_one")?;
    let am = Alertmanager::start(&fixture, &program, "am", None)?;
    let rt = tokio::runtime::Runtime::new()?;
    rt.block_on(async {
        let center = center(&fixture, &[am.url()])?;
        let mut bad = alert(1, &now());
        bad.labels.insert("no-label-name".into(), "x".into());
        let good = alert(2, &now());
        center.submit_all(vec![bad.clone(), good.clone()]).await?;
        stands(&am, &good)?;
        eventually("the refusal", ms(5000), || {
            let parked = center.notifications().iter().map(|n| n.parked).sum::<u64>();
            ensure!(parked == 1, "{:?}", center.notifications());
            Ok(())
        })?;
        let left = center.undelivered().await;
        ensure!(left.len() == 1 && left[0].alert.id == bad.id, "{left:?}");
        let error = left[0].undelivered[0].error.clone().unwrap_or_default();
        ensure!(error.contains("400") && error.contains("label"), "{error}");
        center.stop(Duration::from_secs(2)).await;
        Ok(())
    })
}

/// What Alertmanager has about the incident's worker.
fn incident(am: &Alertmanager, worker: u32) -> Result<Value> {
    let about = format!("{worker}:");
    let all = am.alerts("")?;
    let found = all.iter().find(|a| {
        let of = |k: &str| a["annotations"][k].as_str().unwrap_or_default();
        a["labels"]["alertname"] == "JobwardenZombie" && of("tree").contains(&about)
    });
    found.cloned().with_context(|| format!("nothing about {worker} among {all:?}"))
}

/// The incident, end to end: from the dead command to the pager with its cause, and from the cure to its end there; the
/// second time the agent is killed between the two.
#[test]
fn the_incident_pages_with_its_cause_and_ends_when_cured() -> Result<()> {
    let fixture = fixture!("the_incident_pages_with_its_cause_and_ends_when_cured");
    let Some(program) = program() else {
        skip!(
            "the_incident_pages_with_its_cause_and_ends_when_cured: no Alertmanager (apt-get install prometheus-alertmanager)"
        );
    };
    let am = Alertmanager::start(&fixture, &program, "am", None)?;
    let config = format!(
        "[zombies]\nafter = \"1s\"\n[[receiver]]\nname = \"am\"\ntype = \"alertmanager\"\nurl = \"{}\"\n",
        am.url()
    );
    let mut agent = Agent::start(&fixture, &config)?;
    for killed in [false, true] {
        let mut worker = Shape::start(&fixture, "incident", &[])?;
        let holder: i32 = worker.fact("holder")?;
        worker.fact::<u32>("command")?;
        let dead = Instant::now();
        let there = eventually("the page", ms(6000), || {
            let a = incident(&am, worker.pid())?;
            let cause = a["annotations"]["cause"].as_str().unwrap_or_default();
            ensure!(cause.contains("pipe"), "its cause is {cause:?}");
            Ok(a)
        })?;
        let took = dead.elapsed();
        let late = promised("an alert is at Alertmanager at most 1 s after its timeout", 1000);
        ensure!(took <= Duration::from_secs(1) + late, "it stood there after {took:?}, its timeout is 1 s");
        for k in ["summary", "remedy", "runbook"] {
            ensure!(there["annotations"][k].as_str().is_some_and(|v| !v.is_empty()), "no {k}: {there}");
        }
        if killed {
            agent.crash()?;
            fixture.signal(holder, Signal::KILL)?;
            worker.fact::<i32>("status")?;
            agent = Agent::start(&fixture, &config)?;
        } else {
            fixture.signal(holder, Signal::KILL)?;
        }
        let cured = Instant::now();
        eventually("its end", ms(10_000), || {
            let a = incident(&am, worker.pid());
            ensure!(a.is_err(), "{a:?}");
            Ok(())
        })?;
        let ended = cured.elapsed();
        ensure!(ended <= ms(5000), "it ended there {ended:?} after the cure");
        println!(
            "agent killed: {killed}; paged {took:?} after the death (timeout 1 s), ended {ended:?} after the cure"
        );
        worker.finish()?;
    }
    agent.stop()
}
