//! The program: one file in `cli/` for each subcommand. Everything that it does is in the library.

#![deny(clippy::print_stdout, clippy::print_stderr)] // they panic when the reader is gone: see `jobwarden::output`

mod cli;

fn main() -> std::process::ExitCode {
    // Before anything else: `why` runs this program once more to read a Python process's memory.
    jobwarden::why::helper_main().unwrap_or_else(cli::main)
}
