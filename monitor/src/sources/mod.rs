//! Everything that is read: the kernel's probes and iterators, /proc, the records of container runtimes, the host.

pub mod container_records;
pub mod host;
pub mod kernel;
pub mod proc;
