//! Ending a job by pidfd so that nothing of it escapes, and nobody else is touched.

pub mod audit;
pub mod cgroup;
pub mod order;
pub mod pidfd;
mod rails;
mod stages;
mod stuck;

use std::io;

pub use self::audit::Audit;
pub use self::order::{AskedBy, EnforceError, Order, Outcome, Reason, What};
pub use self::rails::Rails;
pub use self::stages::{DOOM, Enforcer, preferred};
use crate::event::Comm;
use crate::key::Key;

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

/// What enforcement needs of the kernel side. Jobs are named by their 64-bit numbers, which are never reused (boot-time
/// nanoseconds of their registration).
pub trait Lineage: Send + Sync {
    /// Enters `job` (inside `outer`, 0 = none) and makes `root` and all who descend from it by lineage its members,
    /// repeated until one full pass adds nothing. Inner jobs that are there already become inner jobs of it.
    fn label(&self, job: u64, outer: u64, root: Key) -> io::Result<()>;
    /// All who are in `job`, its inner jobs included; zombies too.
    fn members(&self, job: u64) -> io::Result<Vec<Member>>;
    /// Sets the spare flag of one process; forks inherit it from then on.
    fn spare(&self, key: Key) -> io::Result<()>;
    /// Takes the spare flag away again: a kill that is over must not leave the caller's shell and all it will ever fork
    /// flagged. No entry is no error.
    fn unspare(&self, key: Key) -> io::Result<()>;
    /// Who forked `key`, from the lineage map or from that of the dead; None where neither knows.
    fn lineage_parent(&self, key: Key) -> io::Result<Option<Key>>;
    /// From now to `until` (boot-time ns) the probes kill whoever in `job` enters a system call. Renewed by another call.
    fn doom(&self, job: u64, until: u64) -> io::Result<()>;
    /// Ends the doom; detaches `sys_enter` when no job is doomed any more.
    fn undoom(&self, job: u64) -> io::Result<()>;
    /// Forgets the job: its members fall back to its outer job.
    fn forget(&self, job: u64) -> io::Result<()>;
    /// The full-nanosecond start of the live process with this pid; None if there is none, or more than one entry.
    fn start_of(&self, pid: u32) -> io::Result<Option<u64>>;
}
