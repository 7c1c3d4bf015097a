//! Ending a job by pidfd so that nothing of it escapes, and nobody else is touched.

pub mod audit;
pub mod cgroup;
pub(crate) mod guards;
mod outcome;
pub mod pidfd;
mod stages;
mod stuck;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

pub use self::audit::Audit;
pub use self::guards::Guards;
pub use self::outcome::{EnforceError, Outcome};
pub use self::stages::{DOOM, Enforcer, preferred};
use crate::model::event::Comm;
use crate::model::key::Key;

/// A member of a job, as the kernel's iterator gives it at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub key: Key,
    /// The real parent: who would reap it now. Lineage is asked of [`Lineage::lineage_parent`].
    pub parent: Key,
    pub comm: Comm,
    pub uid: u32,
    /// Innermost job's number.
    pub job: u64,
    /// No live thread: a zombie, or exiting.
    pub dead: bool,
    /// Through with its exit: a zombie. One that is dead and not over may hang in its exit for good.
    pub over: bool,
    /// Carries the spare flag.
    pub spared: bool,
}

/// An order while it is carried out: whose marks are whose, since orders overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrderId(u64);

impl OrderId {
    /// One that this process has not used yet.
    #[must_use]
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What enforcement needs of the kernel side. Jobs are named by their 64-bit numbers, which are never reused (boot-time
/// nanoseconds of their registration).
pub trait Lineage: Send + Sync {
    /// Enters `job` (inside `outer`, 0 = none) and makes `root` and all who descend from it by lineage its members,
    /// repeated until one full pass adds nothing. Inner jobs that are there already become inner jobs of it.
    fn label(&self, job: u64, outer: u64, root: Key) -> io::Result<()>;
    /// The same for a job that lasts as long as an order: inside the innermost job that `root` is in at that moment, so that
    /// it falls back to that one when this is forgotten, and that one's doom reaches it too.
    fn label_inside(&self, job: u64, root: Key) -> io::Result<()>;
    /// Labels once more a job that is labelled: whom a fork probe missed, or a labelling that did not come to its end.
    fn relabel(&self, job: u64, root: Key) -> io::Result<()>;
    /// All who are in `job`, its inner jobs included; zombies too.
    fn members(&self, job: u64) -> io::Result<Vec<Member>>;
    /// Sets the spare flag of one process for an order. `heirs`: whom it forks from then on inherits it.
    fn spare(&self, key: Key, heirs: bool, by: OrderId) -> io::Result<()>;
    /// Takes the flag from those who have it by no order that is under way.
    fn disinherit(&self) -> io::Result<()>;
    /// Who forked `key`, from the lineage map or from that of the dead; None where neither knows.
    fn lineage_parent(&self, key: Key) -> io::Result<Option<Key>>;
    /// The same; for one that was forked unseen, the parent that it had when its entry was made, which is an ancestor too.
    fn ancestor(&self, key: Key) -> io::Result<Option<Key>>;
    /// From now to `until` (boot-time ns) the probes kill whoever in `job` enters a system call. Renewed by another call.
    fn doom(&self, job: u64, until: u64, by: OrderId) -> io::Result<()>;
    /// The order is over: its dooms end, and the flags that it set go, with those inherited from them (a kill that is over must
    /// not leave the caller's shell and all it will ever fork flagged), but for what another order marked too. `sys_enter` is
    /// detached when no job is doomed any more.
    fn release(&self, by: OrderId) -> io::Result<()>;
    /// Forgets the job: its members fall back to its outer job.
    fn forget(&self, job: u64) -> io::Result<()>;
    /// The full-nanosecond start of the live process with this pid; None if there is none, or more than one entry.
    fn start_of(&self, pid: u32) -> io::Result<Option<u64>>;
}
