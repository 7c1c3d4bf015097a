//! The probes. On the host this is an empty program: the BPF object is built by `cargo xtask ebpf`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// `atomic_xadd` without a result is what 5.10 has; core's atomics are not there on a target without compare-and-swap.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics, asm_experimental_arch))]
#![cfg_attr(target_arch = "bpf", expect(internal_features, reason = "atomic_xadd"))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
