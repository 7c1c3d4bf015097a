//! What scenarios of `exec` share: the command with an agent and without one, and whether anything is left.

use anyhow::{Context as _, Result, ensure};

use crate::agent::{Agent, Output, run};
use crate::fixture::{Fixture, program};
use crate::wait::{eventually, ms};

/// `exec` with an agent (its socket) or without one.
pub struct Exec<'a> {
    fixture: &'a Fixture,
    pub socket: String,
}

impl<'a> Exec<'a> {
    #[must_use]
    pub fn alone(fixture: &'a Fixture) -> Self {
        Self { fixture, socket: fixture.path("nobody").to_string_lossy().into_owned() }
    }

    #[must_use]
    pub fn with(fixture: &'a Fixture, agent: &Agent<'_>) -> Self {
        Self { fixture, socket: agent.socket.to_string_lossy().into_owned() }
    }

    pub fn command(&self, args: &[&str]) -> Result<std::process::Command> {
        let mut c = self.fixture.command(program("jobwarden")?);
        c.args(["--socket", &self.socket, "exec"]).args(args);
        Ok(c)
    }
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        run(self.command(args)?, ms(20_000)).with_context(|| format!("exec {args:?}"))
    }
    pub fn sh(&self, options: &[&str], script: &str) -> Result<Output> {
        let mut args = options.to_vec();
        args.extend(["--", "/bin/sh", "-c", script]);
        self.run(&args)
    }
}

/// Runs the test twice: with an agent, and alone.
pub fn both(fixture: &Fixture, test: impl Fn(&Exec<'_>) -> Result<()>) -> Result<()> {
    test(&Exec::alone(fixture)).context("without an agent")?;
    let agent = Agent::start(fixture, "")?;
    test(&Exec::with(fixture, &agent)).context("with an agent")
}

/// Live processes of the test, but for an agent and those of `exec` itself.
#[must_use]
pub fn left(fixture: &Fixture) -> Vec<String> {
    let argv = |pid: i32| {
        let b = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&b).replace('\0', " ")
    };
    fixture
        .alive()
        .into_iter()
        .map(|p| format!("{p} {}", argv(p)))
        .filter(|a| !a.contains(" agent "))
        .collect()
}

pub fn nothing_left(fixture: &Fixture) -> Result<()> {
    eventually("nothing is left", ms(500), || {
        let left = left(fixture);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
