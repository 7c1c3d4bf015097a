//! What `jobwarden check --against-host` warns of, in the agent's log: at its start and for each new config. All of it is done
//! beside the core: thousands of rules take a while, and the processes are read within a time limit.

use std::time::Duration;

use tokio::runtime::Handle;

use crate::config::Config;
use crate::render::escape;
use crate::rule_check;
use crate::sources::proc::Proc;

const LIMIT: Duration = Duration::from_secs(10);

pub(super) fn log_warnings(config: &Config, beside: &Handle) {
    let config = config.clone();
    beside.spawn_blocking(move || {
        let log = |warnings: Vec<String>| warnings.iter().for_each(|w| tracing::warn!("{}", escape(w)));
        log(rule_check::warnings(&config));
        if rule_check::any_kills(&config) {
            let this = (std::process::id(), "the agent");
            let survey = rule_check::host::survey(&config, &Proc::default(), this, LIMIT);
            log(survey.warnings);
            if survey.incomplete {
                tracing::warn!(
                    "not all processes could be read in time, so rules were not compared with all of them"
                );
            }
        }
    });
}
