//! `exec` on a terminal: what is typed reaches CMD, and a shell's job control works as with any other program.

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::exec::{both, nothing_left};
use jobwarden_tests::fixture::program;
use jobwarden_tests::truth::letter;
use jobwarden_tests::{eventually, fixture, loudly, ms};

/// A terminal of its own for a command: the other end, with which a test types.
fn on_a_terminal(c: &mut std::process::Command) -> Result<std::fs::File> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::os::unix::process::CommandExt as _;
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let slave = std::fs::File::options().read(true).write(true).open(name.to_string_lossy().as_ref())?;
    c.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        c.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(std::io::stdin())?;
            Ok(())
        });
    }
    Ok(master.into())
}

#[test]
fn ctrl_c_on_a_terminal() -> Result<()> {
    let fixture = fixture!("ctrl_c_on_a_terminal");
    both(&fixture, |exec| {
        let begun = fixture.path("typed");
        let _ = std::fs::remove_file(&begun);
        let script = format!(
            "trap 'exit 5' INT; read line; echo $line >{}; while :; do sleep 0.05; done",
            begun.display()
        );
        let mut c = exec.command(&["--", "/bin/sh", "-c", &script])?;
        let mut terminal = on_a_terminal(&mut c)?;
        let mut child = c.spawn()?;
        drop(c);
        std::io::Write::write_all(&mut terminal, b"hello\n")?;
        eventually("CMD reads its terminal", ms(5000), || {
            ensure!(std::fs::read_to_string(&begun)? == "hello\n", "not yet");
            Ok(())
        })?;
        std::io::Write::write_all(&mut terminal, b"\x03")?;
        let status = eventually("the end", ms(5000), || child.try_wait()?.context("it runs"));
        if status.is_err() {
            child.kill()?;
            child.wait()?;
        }
        ensure!(status?.code() == Some(5), "Ctrl-C reaches CMD");
        nothing_left(&fixture)
    })
}

/// Ctrl-Z as a person types it, to a shell with job control: `exec` and CMD stop together, the shell goes on, and `fg` makes
/// both go on, still in reach of Ctrl-C.
#[test]
fn ctrl_z_and_fg() -> Result<()> {
    let fixture = fixture!("ctrl_z_and_fg");
    both(&fixture, |exec| {
        let file = |name: &str| fixture.path(name);
        for name in ["pid", "stopped", "go", "on", "status"] {
            let _ = std::fs::remove_file(file(name));
        }
        let command = format!(
            "trap 'exit 5' INT; echo $$ >{}; while :; do [ -e {} ] && touch {}; sleep 0.05; done",
            file("pid").display(),
            file("go").display(),
            file("on").display()
        );
        let script = format!(
            "set -m; {} --socket {} exec -- /bin/sh -c \"$1\"; echo $? >{}; until [ -e {} ]; do sleep 0.05; done; \
             fg >/dev/null; echo $? >{}",
            program("jobwarden")?.display(),
            exec.socket,
            file("stopped").display(),
            file("go").display(),
            file("status").display()
        );
        let mut c = fixture.command("/bin/bash");
        c.args(["-c", &script, "bash", &command]);
        let mut terminal = on_a_terminal(&mut c)?;
        let mut shell = c.spawn()?;
        drop(c);
        let read = |name: &str| -> Result<i32> { Ok(std::fs::read_to_string(file(name))?.trim().parse()?) };
        let typed = (|| {
            let pid = eventually("CMD runs", ms(10_000), || read("pid"))?.cast_unsigned();
            std::io::Write::write_all(&mut terminal, b"\x1a")?;
            let status = eventually("the shell goes on", ms(5000), || read("stopped"))?;
            ensure!(status == 128 + libc::SIGTSTP, "as a stopped job has it: {status}");
            let supervisor = jobwarden::sources::proc::Proc::default().stat(pid)?.ppid;
            eventually("both are stopped", ms(3000), || {
                // D: it was just starting its sleep by vfork, which has stopped.
                ensure!(['T', 'D'].contains(&letter(pid)?) && letter(supervisor)? == 'T');
                Ok(())
            })?;
            std::fs::write(file("go"), "")?;
            eventually("CMD goes on", ms(5000), || Ok(std::fs::metadata(file("on")).map(drop)?))?;
            ensure!(letter(supervisor)? != 'T', "exec goes on with it");
            std::io::Write::write_all(&mut terminal, b"\x03")?;
            eventually("its end", ms(5000), || read("status"))
        })();
        if let Err(e) = &typed {
            let states: Vec<_> =
                fixture.alive().into_iter().map(|p| (p, letter(p.cast_unsigned()).ok())).collect();
            loudly(&format!("{e:#}; {states:?}"));
        }
        // Its terminal hangs up, should anybody still be on it.
        drop(terminal);
        if typed.is_err() {
            shell.kill()?;
        }
        shell.wait()?;
        ensure!(typed? == 5, "Ctrl-C reaches CMD, and its status the shell");
        nothing_left(&fixture)
    })
}
