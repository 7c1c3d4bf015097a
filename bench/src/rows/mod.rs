//! The groups of rows: what is measured, how, and what is to be reached.

mod cost;
mod ending;
mod forest;
mod grown;
mod many;

use std::path::Path;
use std::time::Instant;

use crate::row::{Row, Scale};
use crate::stop::going_on;

/// A group of rows, measured with the program at this path.
type Group = fn(&Path, Scale) -> Vec<Row>;

/// With the agent.
const GROUPS: [(&str, Group); 11] = [
    ("probes", cost::probes),
    ("spawn", cost::spawning),
    ("flood", cost::flood),
    ("notice", cost::notice),
    ("idle", cost::idle),
    ("many", many::many),
    ("why", many::why),
    ("kill", ending::kill),
    ("bomb", ending::bomb),
    ("doom", ending::doom),
    ("growth", grown::growth),
];

/// All groups, or those whose name is in `only`.
pub(crate) fn all(agent: &Path, forest: &Path, scale: Scale, only: &[String]) -> Vec<Row> {
    let with_agent = GROUPS.iter().map(|&(name, group)| (name, group, agent));
    let groups = with_agent.chain([("forest", forest::forest as Group, forest)]);
    let mut rows = Vec::new();
    for (name, group, program) in groups.filter(|g| only.is_empty() || only.iter().any(|o| o == g.0)) {
        if going_on().is_err() {
            break;
        }
        println!("{name} ...");
        let begun = Instant::now();
        let more = group(program, scale);
        for row in &more {
            println!("  {}: {}", row.what, row.said());
        }
        println!("  ({:.0} s)", begun.elapsed().as_secs_f64());
        rows.extend(more);
    }
    rows
}
