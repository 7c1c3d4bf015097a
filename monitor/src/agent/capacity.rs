//! How full the stores outside of the engine are: the kernel's maps and the alerts' queue. The maps are walked for that,
//! so it is done now and then beside the core, and on a quiet host seldom: nothing enters them but by a fork. `/metrics`
//! shows what was found last, and one that is full is an alert.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::message::Message;
use super::scrape::Page;
use super::storage::Health;
use crate::model::stats::StoreNumbers;
use crate::notify::AlertService;
use crate::sources::kernel::{Fill, Kernel};

const EVERY: Duration = Duration::from_secs(10);
/// After so many of these the maps are walked also if little was forked: what leaves them is to be seen too.
const SELDOM: u32 = 6;
/// This part of the lineage map is little.
const LITTLE: u64 = 100;
/// Percent from which a store is full ..
const FULL: u64 = 95;
/// .. and below which it has room again.
const ROOM: u64 = 90;
/// The newest of the dead are kept, so it is full as a matter of course.
const KEEPS_THE_NEWEST: &str = "kernel_dead";

/// Which stores are full.
#[derive(Debug, Default)]
struct Full(BTreeSet<&'static str>);

impl Full {
    /// What is wrong, if that has changed.
    fn look(&mut self, stores: &[StoreNumbers]) -> Option<Health> {
        let before = self.0.clone();
        for s in stores.iter().filter(|s| s.store != KEEPS_THE_NEWEST) {
            let percent = if self.0.contains(s.store) { ROOM } else { FULL };
            if s.entries * 100 >= s.max * percent {
                self.0.insert(s.store);
            } else {
                self.0.remove(s.store);
            }
        }
        if self.0 == before {
            return None;
        }
        let one =
            |s: &StoreNumbers| format!("{} holds {} of {}, and no more than that", s.store, s.entries, s.max);
        let said: Vec<String> = stores.iter().filter(|s| self.0.contains(s.store)).map(one).collect();
        Some(Health::of(said))
    }
}

/// Looks until the core has ended.
pub(super) async fn watch(
    kernel: Arc<Kernel>,
    center: AlertService,
    page: Arc<Page>,
    core: mpsc::UnboundedSender<Message>,
) {
    let mut full = Full::default();
    let (mut maps, mut walked_at, mut turns) = (Vec::new(), 0, 0);
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !core.is_closed() {
        every.tick().await;
        let forks = kernel.totals().map_or(u64::MAX, |t| t[usize::from(monitor_abi::KIND_FORK)].hits);
        let many = forks.saturating_sub(walked_at) >= u64::from(kernel.lineage_max()) / LITTLE;
        if many || turns % SELDOM == 0 {
            (walked_at, turns) = (forks, 0);
            let kernel = Arc::clone(&kernel);
            let Ok(fills) = tokio::task::spawn_blocking(move || kernel.fills()).await else { return };
            maps = fills.unwrap_or_else(|e| {
                tracing::error!(error = %e, "how full the kernel's maps are cannot be read");
                Vec::new()
            });
        }
        turns += 1;
        let store = |f: &Fill| StoreNumbers { store: f.name, entries: f.entries, max: f.max, evictions: 0 };
        let mut stores: Vec<StoreNumbers> = maps.iter().map(store).collect();
        stores.push(center.store());
        if let Some(health) = full.look(&stores) {
            // The core has ended, and this ends with it.
            let _ = core.send(Message::StoresFull(health.wrong()));
        }
        page.set_stores(stores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(store: &'static str, entries: u64) -> StoreNumbers {
        StoreNumbers { store, entries, max: 100, evictions: 0 }
    }

    #[test]
    fn a_full_store_is_told_once_and_has_room_again_only_when_it_has() {
        let mut f = Full::default();
        assert_eq!(f.look(&[store("kernel_jobs", 94), store("kernel_dead", 100)]), None);
        let said = f.look(&[store("kernel_jobs", 95), store("alert_queue", 3)]).unwrap().wrong().unwrap();
        assert!(said.contains("kernel_jobs holds 95 of 100") && !said.contains("alert_queue"), "{said}");
        assert_eq!(f.look(&[store("kernel_jobs", 100)]), None);
        assert_eq!(f.look(&[store("kernel_jobs", 90)]), None);
        assert_eq!(f.look(&[store("kernel_jobs", 89)]), Some(Health::Well));
        assert_eq!(f.look(&[store("kernel_jobs", 94)]), None);
    }
}
