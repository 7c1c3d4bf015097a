//! What goes over the control socket beside the contract's own types; used by the server and by its clients.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ApiError, Matched, Target};
use crate::model::key::Key;
use crate::model::schema::{Cause, Tree};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtendBody {
    pub job: Target,
    /// Seconds.
    pub by_s: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnforcementBody {
    pub on: bool,
    /// Seconds; None: until it is switched again.
    pub for_s: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NotifyBody {
    pub receiver: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditQuery {
    /// Seconds back.
    pub since_s: Option<f64>,
    pub job: Option<Target>,
}

/// `why`, with no argument: of every firing alert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Causes {
    pub causes: Vec<Cause>,
    /// Further ones that were not looked for: there are too many.
    #[serde(default)]
    pub more: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    pub matches: Vec<Matched>,
}

/// Seconds from outside as a duration: finite, not negative, at most about 300 years.
pub(super) fn seconds(what: &str, s: f64) -> Result<Duration, ApiError> {
    const MOST: f64 = 1e10;
    Duration::try_from_secs_f64(s)
        .ok()
        .filter(|d| d.as_secs_f64() <= MOST)
        .ok_or_else(|| ApiError::usage(format!("{what}: {s} is no number of seconds from 0 to {MOST}")))
}

/// Keeps the processes of a container (its id, or the beginning of it) and their ancestors.
pub(super) fn only_container(tree: &mut Tree, id: &str) {
    let parents: HashMap<Key, Option<Key>> =
        tree.processes.iter().map(|p| (p.id, p.lineage_parent)).collect();
    let mut keep = HashSet::new();
    let inside =
        tree.processes.iter().filter(|p| p.container.as_ref().is_some_and(|c| c.id.raw().starts_with(id)));
    for p in inside {
        let mut at = Some(p.id);
        // Each is entered once, so a loop in what was sent could not hold this up.
        while let Some(k) = at.filter(|k| keep.insert(*k)) {
            at = parents.get(&k).copied().flatten();
        }
    }
    tree.processes.retain(|p| keep.contains(&p.id));
}
