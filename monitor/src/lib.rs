//! jobwarden's library: the live forest of processes, its policy, the cause of what is stuck, and the ending of jobs.
//!
//! `forest` and `policy` are pure; `kernel`, `why`, `enforce`, `alert` and `api` touch the world. See ARCHITECTURE.md.

pub mod agent;
pub mod alert;
pub mod api;
pub mod config;
pub mod container;
pub mod contract;
pub mod enforce;
pub mod event;
pub mod exec;
pub mod forest;
pub mod fuzzing;
pub mod host;
mod huge;
pub mod kernel;
pub mod key;
pub mod matcher;
pub mod metrics;
pub mod policy;
pub mod privileges;
pub mod proc;
pub mod recording;
mod records;
pub mod redact;
pub mod render;
pub mod signal;
pub mod state;
pub mod why;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that this was built from; `unknown` outside a repository.
pub const REVISION: &str = env!("JOBWARDEN_REVISION");
