//! `jobwarden tree`.

use std::process::ExitCode;

use axum::http::HeaderMap;
use jobwarden::api::{AlertQuery, NAMELESS, Target, TreeQuery};
use jobwarden::client::Client;
use jobwarden::config::user_name;
use jobwarden::model::schema::Tree;
use jobwarden::render::{self, Style};

use super::output::{Context, print};
use super::{Failure, Outcome, values};

/// The forest by who started whom: ancestors, it, descendants; the dead and the zombies included
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A line says who forked whom; behind `\\?` that was not seen, and the line says only who would reap it.

Example:
  jobwarden tree name:nightly      # one job, with what it left behind
  jobwarden tree 4123              # one process, from PID 1 to its last descendant
  jobwarden tree --zombies         # who is not reaped, and by whom")]
pub(crate) struct Args {
    /// PID, ID, JOB or name:NAME; none: everything
    #[arg(value_name = "PID|JOB", value_parser = values::target)]
    target: Option<Target>,
    /// Kernel threads too (JSON has them always)
    #[arg(long)]
    all: bool,
    /// Only zombies, and the way to them
    #[arg(long)]
    zombies: bool,
    /// Only orphans, and the way to them
    #[arg(long)]
    orphans: bool,
    /// Only this user's processes (name or uid), and the way to them
    #[arg(long, value_name = "U", value_parser = values::user)]
    user: Option<u32>,
    /// Only one container's processes (its id, or the beginning of it), and the way to them
    #[arg(long, value_name = "ID")]
    container: Option<String>,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let client = context.client()?;
        let style = context.style();
        let query = TreeQuery {
            target: self.target,
            zombies: self.zombies,
            orphans: self.orphans,
            uid: self.user,
            container: self.container,
            text: !context.json,
            kernel_threads: self.all,
            color: style.color,
            width: style.width,
            ..TreeQuery::default()
        };
        let (headers, mut answer) = client.get_text("/v1/tree", &query)?;
        if context.json {
            answer.push('\n');
        } else if named_here(&headers) {
            answer = drawn_here(&client, TreeQuery { text: false, ..query }, style)?;
        }
        print(&answer)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Whether a name is known here, of a directory service, for a user whom the agent has no name of.
fn named_here(headers: &HeaderMap) -> bool {
    let uids = headers.get(NAMELESS).and_then(|v| v.to_str().ok()).unwrap_or_default();
    uids.split(' ').filter_map(|u| u.parse().ok()).any(|u| user_name(u).is_some())
}

/// The text, with the names of users as they are known here.
fn drawn_here(client: &Client, query: TreeQuery, style: Style) -> Result<String, Failure> {
    let tree: Tree = client.get("/v1/tree", &query)?;
    let jobs = client.get("/v1/jobs", &()).ok();
    let alerts = client.get("/v1/alerts", &AlertQuery::default()).ok();
    Ok(render::tree_with(&tree, jobs, alerts, &user_name, query.kernel_threads, style))
}
