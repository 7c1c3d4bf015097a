//! The effective config as TOML, for `check --print`. Secrets appear only as the paths of their files.

use std::fmt::Write as _;
use std::path::Path;

use toml::Value;

use super::value::duration_text;
use super::{Action, Agent, Config, Enforcement, Match, Pattern, Receiver, ReceiverKind, Rule};

impl Config {
    /// Reads back to the same config.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut out = Out(String::new());
        agent(&mut out, &self.agent);
        out.head("\n[zombies]");
        out.key("after", duration_text(self.zombies.after));
        enforcement(&mut out, &self.enforcement);
        for r in &self.jobs {
            rule(&mut out, r);
        }
        for r in &self.receivers {
            receiver(&mut out, r);
        }
        out.0
    }
}

struct Out(String);

impl Out {
    fn head(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn key(&mut self, key: &str, v: impl Into<Value>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{key} = {}", v.into());
    }

    fn path(&mut self, key: &str, v: Option<&Path>) {
        if let Some(p) = v {
            self.key(key, p.display().to_string());
        }
    }
}

fn agent(out: &mut Out, a: &Agent) {
    out.head("[agent]");
    out.path("socket", Some(&a.socket));
    out.key("socket_group", a.socket_group.as_str());
    out.path("state_dir", Some(&a.state_dir));
    out.key("listen", a.listen.to_string());
    out.key("allow_plain", a.allow_plain);
    out.key("pin", a.pin);
    out.path("bpffs", Some(&a.bpffs));
    out.key("ring_bytes", i64::from(a.ring_bytes));
    out.key("lineage_entries", i64::from(a.lineage_entries));
    out.key("log", a.log.as_str());
    out.key("log_format", if a.log_json { "json" } else { "text" });
    out.key("labels", a.labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect::<toml::Table>());
    out.key("redact", a.redact.iter().map(|r| r.as_str().into()).collect::<Vec<Value>>());
}

fn enforcement(out: &mut Out, e: &Enforcement) {
    out.head("\n[enforcement]");
    out.key("enabled", e.enabled);
    out.key("max_job_kills_per_minute", i64::from(e.max_job_kills_per_minute));
    out.key("protect", e.protect.iter().map(matches).collect::<Vec<Value>>());
    out.key("protect_defaults", e.protect_defaults);
}

fn matches(m: &Match) -> Value {
    let mut t = toml::Table::new();
    let mut put = |k: &str, v: Option<Value>| {
        if let Some(v) = v {
            t.insert(k.into(), v);
        }
    };
    let text = |r: &Option<Pattern>| r.as_ref().map(|r| r.as_str().into());
    put("argv", text(&m.argv));
    put("exe", text(&m.exe));
    put("comm", text(&m.comm));
    put("user", m.user.as_ref().map(|u| u.given.as_str().into()));
    put("cgroup", text(&m.cgroup));
    put("container", m.container.as_deref().map(Into::into));
    put("parent", m.parent.as_deref().map(matches));
    t.into()
}

fn rule(out: &mut Out, r: &Rule) {
    let action = |a| if a == Action::Kill { "kill" } else { "alert" };
    out.head("\n[[job]]");
    out.key("name", r.name.as_str());
    out.key("match", matches(&r.matches));
    if let Some(d) = r.timeout {
        out.key("timeout", duration_text(d));
    }
    if let Some(d) = r.zombie_after {
        out.key("zombie_after", duration_text(d));
    }
    out.key("orphan_after", duration_text(r.orphan_after));
    out.key("on_timeout", action(r.on_timeout));
    out.key("on_orphan", action(r.on_orphan));
    out.key("kill_daemons", r.kill_daemons);
    out.key("enforce_existing", r.enforce_existing);
    out.key("stop_signal", crate::model::signal::name(r.stop_signal));
    out.key("grace", duration_text(r.grace));
    if let Some(s) = r.severity {
        out.key("severity", s.as_str());
    }
}

fn receiver(out: &mut Out, r: &Receiver) {
    let list = |words: &[String]| words.iter().map(|w| w.as_str().into()).collect::<Vec<Value>>();
    out.head("\n[[receiver]]");
    out.key("name", r.name.as_str());
    out.key("type", r.kind.as_str());
    match &r.kind {
        ReceiverKind::Alertmanager { urls, bearer_token_file, ca_file } => {
            out.key("urls", list(urls));
            out.path("bearer_token_file", bearer_token_file.as_deref());
            out.path("ca_file", ca_file.as_deref());
        }
        ReceiverKind::Pagerduty { url, routing_key_file, ca_file } => {
            out.key("url", url.as_str());
            out.path("routing_key_file", Some(routing_key_file));
            out.path("ca_file", ca_file.as_deref());
        }
        ReceiverKind::Webhook { url, secret_file, bearer_token_file, ca_file } => {
            out.key("url", url.as_str());
            out.path("secret_file", secret_file.as_deref());
            out.path("bearer_token_file", bearer_token_file.as_deref());
            out.path("ca_file", ca_file.as_deref());
        }
        ReceiverKind::Exec { command } => out.key("command", list(command)),
    }
    if !r.kinds.is_empty() {
        out.key("kinds", r.kinds.iter().map(|k| k.as_str().into()).collect::<Vec<Value>>());
    }
    out.key("min_severity", r.min_severity.as_str());
    out.key("send_resolved", r.send_resolved);
    out.key("timeout", duration_text(r.timeout));
}
