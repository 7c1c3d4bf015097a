//! The real Prometheus, Debian's, scrapes the agent; then its API is asked for each metric.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::free_port;
use jobwarden_tests::alerts::ask;
use jobwarden_tests::{Agent, Shape, eventually, fixture, ms, rounds, skip};

struct Prometheus(Child);

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn prometheus_has_every_metric_that_is_exported() -> Result<()> {
    let fixture = fixture!("prometheus_has_every_metric_that_is_exported");
    if Command::new("prometheus").arg("--version").output().is_err() {
        skip!("prometheus_has_every_metric_that_is_exported: no prometheus (apt-get install prometheus)");
    }
    let config = format!(
        "[zombies]\nafter = \"500ms\"\n\
         [[job]]\nname = \"scraped\"\nmatch = {{ argv = \"{}\" }}\n\
         [[receiver]]\nname = \"none\"\ntype = \"exec\"\ncommand = [\"/bin/true\"]\n",
        fixture.tag
    );
    let agent = Agent::start(&fixture, &config)?;
    let mut zombie = Shape::start(&fixture, "zombie", &["1"])?;
    zombie.fact::<u32>("dead")?;

    let dir = fixture.path("prometheus");
    std::fs::create_dir(&dir)?;
    let file = dir.join("prometheus.yml");
    std::fs::write(
        &file,
        format!(
            "global: {{ scrape_interval: 1s }}\nscrape_configs:\n  - job_name: jobwarden\n    static_configs:\n      - targets: ['127.0.0.1:{}']\n",
            agent.port
        ),
    )?;
    let port = free_port()?;
    let log = std::fs::File::create(dir.join("log"))?;
    let mut c = fixture.command("prometheus");
    c.arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let _prometheus = Prometheus(c.spawn()?);
    let query = |expr: &str| -> Result<Vec<serde_json::Value>> {
        let (status, body) = ask(port, "GET", &format!("/api/v1/query?query={expr}"), "")?;
        ensure!(status == 200, "{status} {body}");
        Ok(body["data"]["result"].as_array().cloned().unwrap_or_default())
    };
    eventually("the first scrape", ms(20_000), || {
        let up = query("up")?;
        ensure!(up.iter().any(|r| r["value"][1] == "1"), "{up:?}");
        Ok(())
    })
    .with_context(|| std::fs::read_to_string(dir.join("log")).unwrap_or_default())?;
    std::thread::sleep(Duration::from_secs(rounds("JWTEST_SCRAPE_SECONDS", 10)));

    let (_, metrics) = agent.get("/metrics")?;
    let heads = metrics.lines().filter_map(|l| l.strip_prefix("# TYPE ")).filter_map(|l| l.split_once(' '));
    let mut missing = Vec::new();
    let mut seen = 0;
    for (name, kind) in heads {
        let series = if kind == "histogram" { format!("{name}_count") } else { name.to_owned() };
        // A family that has no series at this moment has none to be scraped.
        if !metrics.lines().any(|l| l.starts_with(&series)) {
            continue;
        }
        seen += 1;
        if query(&series)?.is_empty() {
            missing.push(series);
        }
    }
    ensure!(missing.is_empty() && seen > 30, "of {seen} metrics Prometheus has not: {missing:?}");
    let failed = query("scrape_samples_scraped%20==%200")?;
    ensure!(failed.is_empty(), "{failed:?}");
    let gaps = query("min_over_time(up[8s])")?;
    ensure!(gaps.iter().all(|r| r["value"][1] == "1"), "a scrape failed: {gaps:?}");
    println!("{seen} metrics scraped");
    zombie.finish()?;
    agent.stop()
}
