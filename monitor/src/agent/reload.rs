//! The config read anew while the agent runs: one reload after the other, each whole or not at all. What the new config means
//! is the engine's and the receivers'.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Core, Internal, default_config, wall_seconds};
use crate::api::{ApiError, Class, Peer, Reloaded, Reply};
use crate::config::{Config, Overrides};
use crate::engine::{Input, Output};
use crate::redact::Redactor;
use crate::sources::host;

/// For reading the config file.
const READ: Duration = Duration::from_secs(10);

/// One is under way; the others wait for its end, so that the last config that was read is the one in force.
#[derive(Debug, Default)]
pub(super) struct Reloads {
    under_way: bool,
    waiting: VecDeque<(Option<Peer>, Option<Reply<Reloaded>>)>,
}

/// Beside the core: thousands of rules take a while, and a file that blocks its readers does not block the next reload.
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

impl Core {
    /// The config file again; all of it or nothing. It is read and the receivers are tried beside the core, and the rest is
    /// swapped when they are there.
    pub(super) fn reload(&mut self, peer: Option<Peer>, reply: Option<Reply<Reloaded>>) {
        self.reloads.waiting.push_back((peer, reply));
        self.next_reload();
    }

    fn next_reload(&mut self) {
        if self.reloads.under_way {
            return;
        }
        let Some((peer, reply)) = self.reloads.waiting.pop_front() else { return };
        self.reloads.under_way = true;
        self.service_manager.reloading(host::monotonic_us());
        let o = &self.options;
        let read = read(o.config_path.clone(), o.env.clone(), o.overrides.clone());
        let (center, tx) = (self.center.clone(), self.internal.clone());
        self.beside.spawn(async move {
            let result = match read.await {
                Ok(config) => center.reload(&config).await.map(|()| config).map_err(|e| e.to_string()),
                Err(e) => Err(e),
            };
            let _ = tx.send(Internal::Reloaded { result, peer, reply });
        });
    }

    pub(super) fn reloaded(
        &mut self,
        result: Result<Box<Config>, String>,
        peer: Option<Peer>,
        reply: Option<Reply<Reloaded>>,
    ) {
        self.reloads.under_way = false;
        self.service_manager.reloaded();
        let done = result.map(|c| self.swap(*c)).map_err(|e| {
            self.counts.reload_ok = false;
            tracing::error!(error = %e, "the new config is refused, the old one stays");
            ApiError::new(Class::Failed, "invalid-config", e)
                .hint("the old config stays in force; `jobwarden check` shows what is wrong")
        });
        if let Some(peer) = peer {
            super::answer::audited(self, &peer, "reload", &done);
        }
        if let Some(reply) = reply {
            let _ = reply.send(done);
        }
        self.next_reload();
    }

    fn swap(&mut self, config: Config) -> Reloaded {
        let needs_restart = super::answer::needs_restart(&self.config, &config);
        let mut out = Output::default();
        self.engine.handle(Input::Reload(Cow::Borrowed(&config)), host::boot_now(), &mut out);
        self.redact = Arc::new(Redactor::new(config.agent.redact.clone()));
        self.enforcer.redact = Arc::clone(&self.redact);
        self.counts.reload_ok = true;
        self.counts.reload_at = wall_seconds();
        let reloaded = Reloaded {
            config: self.options.config_path.clone().or_else(default_config),
            jobs: config.jobs.len(),
            receivers: config.receivers.len(),
            needs_restart,
        };
        super::rule_check::log_warnings(&config, &self.beside);
        self.config = config;
        self.apply(out);
        tracing::info!(jobs = reloaded.jobs, receivers = reloaded.receivers, "config reloaded");
        reloaded
    }
}
