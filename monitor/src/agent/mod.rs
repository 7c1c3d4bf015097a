//! The agent: wiring only.
mod look;
