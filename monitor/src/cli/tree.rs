//! `jobwarden tree`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::process::ExitCode;

use jobwarden::api::{AlertQuery, Target, TreeQuery};
use jobwarden::config::user_name;
use jobwarden::contract::{Alerts, Jobs, Tree};
use jobwarden::render::{self, TreeView};

use super::output::Context;
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
        };
        let tree: Tree = client.get("/v1/tree", &query)?;
        // Names are a help only: a tree without them is better than none.
        let names = if context.json { None } else { client.get::<Jobs>("/v1/jobs", &()).ok() };
        let jobs: HashMap<_, _> = names.into_iter().flat_map(|j| j.jobs).map(|j| (j.id, j.name)).collect();
        let alerts =
            if context.json { None } else { client.get::<Alerts>("/v1/alerts", &AlertQuery::default()).ok() };
        let causes = render::causes(&alerts.map(|a| a.alerts).unwrap_or_default());
        context.show(&tree, |style| {
            // Each name is asked for once: the name service reads a file, or asks a server.
            let known = RefCell::new(HashMap::new());
            let users = &|uid| known.borrow_mut().entry(uid).or_insert_with(|| user_name(uid)).clone();
            let kernel_threads = self.all;
            let view = TreeView { tree: &tree, jobs: &jobs, users, causes: &causes, kernel_threads };
            render::tree(&view, style)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
