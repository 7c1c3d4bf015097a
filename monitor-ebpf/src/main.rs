//! The probes. On the host this is an empty program: the BPF object is built by `cargo xtask ebpf`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}
