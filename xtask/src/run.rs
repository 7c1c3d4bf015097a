//! `cargo xtask run`: the agent in the foreground, built here, with everything it writes under target/run/.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the agent serves its metrics
    #[arg(long, default_value = "127.0.0.1:19750")]
    listen: SocketAddr,
    /// More arguments for `jobwarden agent`
    #[arg(last = true)]
    agent: Vec<String>,
}

/// Relative, since the path of a unix socket may have 107 bytes and a clone may lie deep.
const SOCKET: &str = "target/run/jobwarden.sock";
const STATE: &str = "target/run/state";
const READY_WITHIN: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &Args) -> Result<bool> {
    needs::check(&needs::for_agent())?;
    needs::check_port(args.listen)?;
    let binary = cargo::jobwarden("dev")?;
    let dir = root::dir();
    std::env::set_current_dir(&dir)?;
    fs::create_dir_all("target/run")?;
    let mut command = root::command(&binary, []);
    command
        .args(["agent", "--no-pin", "--socket", SOCKET, "--state-dir", STATE])
        .args(["--listen", &args.listen.to_string()])
        .args(&args.agent);
    let mut agent = root::spawn_for_terminal(&mut command).context("the agent could not be started")?;
    let status = if let Some(status) = ready(&mut agent, args.listen)? {
        status
    } else {
        announce(&binary.strip_prefix(&dir).unwrap_or(&binary).display().to_string(), args.listen);
        agent.wait()?
    };
    if status.success() {
        println!("stopped");
    } else {
        eprintln!("the agent ended with {status}: its last lines above say why");
    }
    Ok(status.success())
}

fn announce(binary: &str, listen: SocketAddr) {
    let sudo = if root::is_root() { "" } else { "sudo " };
    println!();
    println!("jobwarden watches this host: http://{listen}/");
    println!("  next, in another terminal here: {sudo}{binary} --socket {SOCKET} tree");
    println!("  Ctrl-C stops it; nothing of it stays behind");
    println!();
}

/// Waits until `/readyz` says 200. `Some` when the agent ended instead.
fn ready(agent: &mut Child, listen: SocketAddr) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        if let Some(status) = agent.try_wait()? {
            return Ok(Some(status));
        }
        if get(listen, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            return Ok(None);
        }
        if Instant::now() > deadline {
            agent.kill()?;
            agent.wait()?;
            bail!("the agent was not ready within {} s", READY_WITHIN.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The whole answer to a GET, or `None` while nobody answers.
pub(crate) fn get(at: SocketAddr, path: &str) -> Option<String> {
    let wait = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&at, wait).ok()?;
    stream.set_read_timeout(Some(wait)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}
