//! jobwarden's library: the live forest of processes, the decisions over it, the cause of what is stuck, and the ending of jobs.
//!
//! Reading path for a newcomer, in the order of the data:
//! 1. [`model`]: the shared words: keys, events, signals, the contract's JSON.
//! 2. [`sources`]: everything that is read: the kernel's probes, /proc, container records, the host.
//! 3. [`engine`]: pure: [`engine::Input`] in, [`engine::Output`] out; the forest, jobs, rules, alerts.
//! 4. [`agent`]: the event loop that feeds the engine and carries out its outputs.
//! 5. [`enforce`], [`why`], [`notify`]: ending jobs, explaining waits, delivering alerts.
//! 6. [`api`], [`client`], [`render`]: the sockets, their client, and the contract's values as text.
//!
//! `engine` reads no clock and opens no file. See ARCHITECTURE.md.

#![deny(clippy::print_stdout, clippy::print_stderr)] // they panic when the reader is gone: `output` is the only writer

pub mod agent;
pub mod api;
pub mod client;
pub mod config;
pub mod enforce;
pub mod engine;
pub mod exec;
pub mod files;
pub mod fuzzing;
mod huge_pages;
pub mod logging;
pub mod matcher;
pub mod metrics;
pub mod model;
pub mod notify;
pub mod output;
pub mod privileges;
pub mod recording;
pub mod redact;
pub mod render;
pub mod rule_check;
pub mod sources;
pub mod state;
#[cfg(test)]
mod testing;
pub mod why;

/// The version of this program, from its manifest.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that this was built from; `unknown` outside a repository.
pub const REVISION: &str = env!("JOBWARDEN_REVISION");
