//! `tree`: the handler copies what the engine knows; the kernel and /proc are read in the background, so that the ring is read
//! meanwhile.

use std::collections::HashMap;
use std::sync::Arc;

use crate::agent::core::Core;
use crate::agent::message::Message;
use crate::agent::proc_reader::ProcReader;
use crate::agent::replies::refused;
use crate::api::{ApiError, Reply, TreeQuery as Asked};
use crate::engine::{Observation, TreeQuery};
use crate::model::audience::Audience;
use crate::model::event::Comm;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::{State, Tree, Unread};
use crate::redact::Redactor;
use crate::sources::host;
use crate::sources::kernel::Kernel;
use crate::sources::proc::blocking;

/// From this many processes on the states of all are read from the kernel at once, rather than each from /proc.
const MANY: usize = 256;

type TaskStates = HashMap<Key, (u8, Comm)>;

/// Completes a tree with what the kernel and /proc say now.
struct Reader {
    kernel: Arc<Kernel>,
    proc_reader: ProcReader,
    redact: Arc<Redactor>,
    audience: Audience,
}

pub(super) fn tree(core: &Core, q: &Asked, reply: Reply<Tree>) {
    // For the whole tree: the kernel is read while the engine copies what it knows.
    let kernel = Arc::clone(&core.kernel);
    let states = q
        .target
        .is_none()
        .then(|| core.background.spawn_blocking(move || kernel.task_states().unwrap_or_default()));
    let tree = match known(core, q) {
        Ok(tree) => tree,
        Err(e) => return drop(reply.send(Err(e))),
    };
    let reader = Reader {
        kernel: Arc::clone(&core.kernel),
        proc_reader: core.proc_reader.clone(),
        redact: Arc::clone(&core.redact),
        audience: q.audience,
    };
    let messages = core.messages.clone();
    core.background.spawn(async move {
        let states = match states {
            Some(s) => s.await.ok(),
            None => None,
        };
        let completed = tokio::task::spawn_blocking(move || reader.complete(tree, states)).await;
        let answer = completed.map_err(|e| ApiError::failed(format!("the tree: {e}")));
        let _ = reply.send(answer.map(|(tree, read)| {
            // The next view need not read it again.
            if !read.is_empty() {
                let _ = messages.send(Message::Cgroups(read));
            }
            tree
        }));
    });
}

/// As the engine has it, with no reading.
pub(super) fn known(core: &Core, q: &Asked) -> Result<Tree, ApiError> {
    let query = TreeQuery {
        of: q.target.as_ref().map(ToString::to_string),
        all: true,
        zombies: q.zombies,
        orphans: q.orphans,
        uid: q.uid,
    };
    core.engine.tree(&query, host::boot_now()).map_err(refused)
}

fn unread(b: &blocking::Blocked) -> Unread {
    Unread { pid: b.pid, what: b.what.to_owned(), blocked_s: b.since.elapsed().as_secs_f64() }
}

impl Reader {
    fn complete(&self, mut tree: Tree, states: Option<TaskStates>) -> (Tree, Vec<Observation>) {
        let states = states.unwrap_or_else(|| {
            if tree.processes.len() < MANY {
                HashMap::new()
            } else {
                self.kernel.task_states().unwrap_or_default()
            }
        });
        let host_ns = self.proc_reader.own_pid_ns();
        let mut read = Vec::new();
        for p in &mut tree.processes {
            read.extend(self.proc_reader.place(p, host_ns).into_iter().flatten());
            match states.get(&p.id) {
                Some((letter, comm)) if p.state != State::Gone => {
                    (p.kernel_state, p.comm) =
                        (Some(char::from(*letter).to_string()), OutsideText::from_bytes(comm.bytes()));
                }
                _ => self.proc_reader.show(p),
            }
            // Last: what was read just now may hold a secret too.
            self.redact.process(p);
            self.audience.process(p);
        }
        let is_shown =
            |b: &blocking::Blocked| tree.processes.iter().any(|p| p.pid == b.pid && p.state != State::Gone);
        tree.unread = blocking::blocked().iter().filter(|b| is_shown(b)).map(unread).collect();
        (tree, read)
    }
}
