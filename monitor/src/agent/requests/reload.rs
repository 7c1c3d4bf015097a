//! Reading the config again while the agent runs: one reload after the other, each whole or not at all. What the new config means
//! is the engine's and the receivers' business.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::core::{Core, wall_seconds};
use crate::agent::message::Message;
use crate::agent::options::default_config;
use crate::agent::replies::audited;
use crate::agent::rule_check;
use crate::api::{ApiError, Class, Peer, Reloaded, Reply};
use crate::config::{Config, Overrides};
use crate::engine::Input;
use crate::redact::Redactor;
use crate::sources::host;

/// For reading the config file.
const READ: Duration = Duration::from_secs(10);

/// Reads the config file again. The reading and the test of the receivers run in the background; [`finish`] swaps the configs.
pub(in crate::agent) fn request(core: &mut Core, peer: Option<Peer>, reply: Option<Reply<Reloaded>>) {
    core.reloads.waiting.push_back((peer, reply));
    start_next(core);
}

/// In the background: thousands of rules take a while, and a file that blocks its readers does not block the next reload.
async fn read(
    path: Option<PathBuf>,
    env: BTreeMap<String, String>,
    overrides: Overrides,
) -> Result<Box<Config>, String> {
    let load = move || crate::config::load(path.as_deref(), &env, &overrides);
    match tokio::time::timeout(READ, tokio::task::spawn_blocking(load)).await {
        Ok(Ok(Ok(config))) => Ok(Box::new(config)),
        Ok(Ok(Err(e))) => Err(e.to_string()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("the config file could not be read within {} s", READ.as_secs())),
    }
}

fn start_next(core: &mut Core) {
    if core.reloads.running {
        return;
    }
    let Some((peer, reply)) = core.reloads.waiting.pop_front() else { return };
    core.reloads.running = true;
    core.service_manager.reloading(host::monotonic_us());
    let o = &core.options;
    let read = read(o.config_path.clone(), o.env.clone(), o.overrides.clone());
    let (service, messages) = (core.alert_service.clone(), core.messages.clone());
    core.background.spawn(async move {
        let result = match read.await {
            Ok(config) => service.reload(&config).await.map(|()| config).map_err(|e| e.to_string()),
            Err(e) => Err(e),
        };
        let _ = messages.send(Message::Reloaded { result, peer, reply });
    });
}

/// The config has been read and the receivers took it, or an error.
pub(in crate::agent) fn finish(
    core: &mut Core,
    result: Result<Box<Config>, String>,
    peer: Option<Peer>,
    reply: Option<Reply<Reloaded>>,
) {
    core.reloads.running = false;
    core.service_manager.reloaded();
    let done = result.map(|c| swap(core, *c)).map_err(|e| {
        core.counts.reload_ok = false;
        tracing::error!(error = %e, "invalid config, keeping the previous one");
        ApiError::new(Class::Failed, "invalid-config", e)
            .hint("the old config stays in force; `jobwarden check` shows what is wrong")
    });
    if let Some(peer) = peer {
        audited(core, &peer, "reload", &done);
    }
    if let Some(reply) = reply {
        let _ = reply.send(done);
    }
    start_next(core);
}

fn swap(core: &mut Core, config: Config) -> Reloaded {
    let needs_restart = needs_restart(&core.config, &config);
    core.handle(Input::Reload(Cow::Borrowed(&config)));
    core.redact = Arc::new(Redactor::new(config.agent.redact.clone()));
    core.enforcer.redact = Arc::clone(&core.redact);
    core.counts.reload_ok = true;
    core.counts.reload_at = wall_seconds();
    let reloaded = Reloaded {
        config: core.options.config_path.clone().or_else(default_config),
        jobs: config.jobs.len(),
        receivers: config.receivers.len(),
        needs_restart,
    };
    rule_check::log_warnings(&config, &core.background);
    core.config = config;
    tracing::info!(jobs = reloaded.jobs, receivers = reloaded.receivers, "config reloaded");
    reloaded
}

/// The names of settings that differ and are read only at start.
fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let (a, b) = (&old.agent, &new.agent);
    let mut all = Vec::new();
    let mut differs = |name: &str, d: bool| {
        if d {
            all.push(name.to_owned());
        }
    };
    differs("agent.socket", a.socket != b.socket);
    differs("agent.socket_group", a.socket_group != b.socket_group);
    differs("agent.state_dir", a.state_dir != b.state_dir);
    differs("agent.listen", a.listen != b.listen);
    differs("agent.pin", a.pin != b.pin);
    differs("agent.allow_plain", a.allow_plain != b.allow_plain);
    differs("agent.bpffs", a.bpffs != b.bpffs);
    differs("agent.ring_bytes", a.ring_bytes != b.ring_bytes);
    differs("agent.log", a.log != b.log || a.log_json != b.log_json);
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_is_read_only_at_the_start_is_named_when_it_changes() {
        let config = |text: &str| {
            let none = BTreeMap::new();
            crate::config::parse("t.toml".as_ref(), text, &none, &crate::config::Overrides::default())
                .unwrap_or_else(|e| panic!("{e}"))
        };
        let old = config("");
        let named = |text: &str| needs_restart(&old, &config(text));
        assert_eq!(named("[zombies]\nafter = \"1m\"\n[agent]\nlabels = { dc = \"x\" }"), [""; 0]);
        assert_eq!(named("[agent]\nring_bytes = 16777216"), ["agent.ring_bytes"]);
        assert_eq!(
            named("[agent]\nlisten = \"0.0.0.0:1\"\nallow_plain = true"),
            ["agent.listen", "agent.allow_plain"]
        );
        assert_eq!(named("[agent]\npin = false\nlog = \"debug\""), ["agent.pin", "agent.log"]);
    }
}
