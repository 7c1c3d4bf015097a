//! Fires and ends alerts as fast as the store takes them, until it is killed; says what was accepted, after it was.
//! `notifier STATE_DIR URL FIRST [last]`: goes on with what fired at the last stop, then with numbers from FIRST; with
//! `last` only what fired is ended, and it ends by itself when all is delivered.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jobwarden::notify::{AlertService, Clock};
use jobwarden_tests::alerts::{alert, resolved, webhook};

const BEGAN: &str = "2026-01-01T00:00:00.000Z";
const ENDED: &str = "2026-01-01T00:01:00.000Z";

fn say(id: &str, state: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{id}={state}")?;
    Ok(out.flush()?)
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (dir, url) = (args.get(1).context("no folder")?, args.get(2).context("no URL")?);
    let first: u64 = args.get(3).context("no number")?.parse()?;
    let last = args.get(4).is_some_and(|a| a == "last");
    // Twenty times as fast: a retry after a second comes after 50 ms.
    let center = AlertService::start(&webhook(url)?, Path::new(dir), Clock::fast(20))?;
    for a in center.restore().await {
        // Half of them end now, the others at the next round, or in the last.
        if last || u64::from_str_radix(&a.id, 16)?.is_multiple_of(2) {
            center.submit(&resolved(&a, ENDED)).await?;
            say(&a.id, "resolved")?;
        }
    }
    if last {
        while center.pending() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        center.stop(Duration::from_secs(5)).await;
        return say("end", "clean");
    }
    for n in first.. {
        let a = alert(n, BEGAN);
        center.submit(&a).await?;
        say(&a.id, "firing")?;
        if n.is_multiple_of(3) {
            center.submit(&resolved(&a, ENDED)).await?;
            say(&a.id, "resolved")?;
        }
    }
    Ok(())
}
