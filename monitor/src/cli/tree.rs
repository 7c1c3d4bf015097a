//! `jobwarden tree`.

use std::process::ExitCode;

use jobwarden::api::{Target, TreeQuery};
use jobwarden::config::user_name;
use jobwarden::model::tree_rows::TreeRows;
use jobwarden::render;

use super::output::{Context, print, print_json};
use super::{Outcome, values};

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
        let query = TreeQuery {
            target: self.target,
            zombies: self.zombies,
            orphans: self.orphans,
            uid: self.user,
            container: self.container,
            rows: !context.json,
            ..TreeQuery::default()
        };
        if context.json {
            print_json(client.get_text("/v1/tree", &query)?)?;
        } else {
            let (json, jobs, alerts) = client.tree(&query)?;
            let tree = TreeRows::parse(&json).map_err(|e| client.not_understood(&e))?;
            print(&render::tree_with(&tree, jobs, alerts, &user_name, self.all, context.style()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
