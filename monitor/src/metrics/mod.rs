//! What Prometheus scrapes: the contract's table, encoded from one [`Sources`].

pub mod encode;
pub mod own;
