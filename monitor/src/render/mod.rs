//! The contract's values as text for people. Pure: strings are built, nothing is read or printed.
//!
//! Whatever comes from a process (argv, comm, paths) or from a file is escaped here: a newline, an escape sequence or a
//! character that turns the direction of writing never reaches the terminal raw.

mod alerts;
mod audit;
mod escape;
mod event;
mod jobs;
mod kill;
mod status;
mod style;
mod table;
#[cfg(test)]
mod tests;
mod tree;
mod why;

pub use crate::model::outside::command_line as argv;
pub use alerts::alerts;
pub use audit::audit;
pub use escape::{age, escape, exit, process, wall};
pub use event::event;
pub use jobs::jobs;
pub use kill::kill;
pub use status::{enforcement, status};
pub use style::{Paint, Style};
pub use table::Table;
pub use tree::{TreeView, tree, tree_with};
pub use why::why;
