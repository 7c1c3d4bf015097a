//! Everything that is done with this repository, one subcommand each. Builds as the caller; only the agent
//! and the test binaries run as root.

mod bench;
mod cargo;
mod demo;
mod ebpf;
mod needs;
mod package;
mod report;
mod root;
mod run;
mod sources;
mod structure;
mod test;
mod unpack;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything that is done with this repository", version)]
struct Cli {
    /// Install nothing on this machine; name what is missing instead
    #[arg(long, global = true)]
    no_setup: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the agent and run it in the foreground, with its socket and state under target/run/
    Run(run::Args),
    /// Build and run every test on the running kernel; ends with 'N passed, N failed, N skipped'
    Test(test::Args),
    /// The incident that jobwarden was made for, found, explained and cured, on this machine
    Demo(demo::Args),
    /// jobwarden and its peers, measured in the same run; writes docs/BENCHMARKS.md
    Bench(bench::Args),
    /// The layout of the sources: no two files import each other, no file over 500 lines, no function over 80
    Structure(structure::Args),
    /// A .deb and a tarball under target/package
    Package(package::Args),
    /// What the check of the package runs in its VM
    #[command(hide = true)]
    Guest,
    /// Build the probe object that is kept in the repository (fetches rust-src and bpf-linker when absent)
    Ebpf(ebpf::Args),
    /// Boot other kernels in QEMU and run the tests, or a given program, inside
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.no_setup {
        needs::forbid_setup();
    }
    let done = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Structure(args) => structure::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Guest => package::guest::run(),
        Command::Ebpf(args) => ebpf::run(&args),
        Command::Vm(args) => vm::run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
