//! The program: one file in `cli/` for each subcommand. Everything that it does is in the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
