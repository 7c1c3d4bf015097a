//! The types that every part shares: keys, signals, kernel events, kills, counts, the contract's JSON. No I/O, no aya, no tokio.

pub mod argv;
pub mod audience;
pub mod container;
pub mod daemon;
pub mod event;
pub mod key;
pub mod kill;
pub mod outside;
pub mod question;
pub mod schema;
pub mod signal;
pub mod stats;
pub mod time;
pub mod tree_rows;
