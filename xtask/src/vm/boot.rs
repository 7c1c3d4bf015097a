//! One boot: starts QEMU, reads the guest's serial line, ends it when nothing comes or its time is up. The guest says `VM-UP` when
//! its root is ready and `VM-RC n` when its script has ended; without the latter the kernel died.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::report::CONSOLE;

/// How a boot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The script's own exit status.
    Status(i32),
    /// It said nothing for too long.
    Hang,
    /// Its time was up, or too short to start.
    Late,
    /// QEMU ended without a status from the script: the kernel or its init died.
    Died,
    /// QEMU itself was ended by this signal, so nothing is known of the guest.
    Killed(i32),
}

pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) initramfs: &'a Path,
    pub(crate) memory_mib: u64,
    /// How long a guest may say nothing. How fast it is depends on the machine; a line is a test, or a part of one.
    pub(crate) silence: Duration,
    pub(crate) deadline: Option<Instant>,
    /// More kernel arguments.
    pub(crate) append: &'a str,
    /// Where the kernel's own messages and the script's output are kept.
    pub(crate) logs: PathBuf,
}

impl Boot<'_> {
    /// Boots and gives each line of the script's output to `line`.
    pub(crate) fn run(&self, mut line: impl FnMut(&str)) -> Result<End> {
        fs::create_dir_all(&self.logs)?;
        let console = self.logs.join(format!("{}.console", self.kernel.series));
        let mut log = File::create(self.logs.join(format!("{}.log", self.kernel.series)))?;
        let mut qemu = self.command(&console).spawn().context("qemu-system-x86_64 could not be started")?;
        let output = qemu.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for bytes in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&bytes).trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        let mut end = End::Died;
        loop {
            let left = self.deadline.map(|d| d.saturating_duration_since(Instant::now()));
            match lines.recv_timeout(left.map_or(self.silence, |left| left.min(self.silence))) {
                Ok(text) => {
                    writeln!(log, "{text}")?;
                    match text.strip_prefix("VM-RC ").and_then(|rc| rc.trim().parse().ok()) {
                        Some(status) => end = End::Status(status),
                        None => line(&text),
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let late = left.is_some_and(|left| left < self.silence);
                    end = if late { End::Late } else { End::Hang };
                    break;
                }
            }
        }
        let status = over(&mut qemu, end)?;
        if let (End::Died, Some(signal)) = (end, status.and_then(|s| s.signal())) {
            end = End::Killed(signal);
        }
        if reader.join().is_err() {
            end = End::Died;
        }
        if end != End::Status(0) {
            // A panic says what it was before its registers and its trace.
            for text in tail(&console, 80) {
                line(&format!("{CONSOLE}{text}"));
            }
        }
        Ok(end)
    }

    /// Always software emulation on one processor: KVM may hang where it is nested, and with more than one
    /// processor emulation loses code patching between them (6.1 locks up when probes are attached).
    fn command(&self, console: &Path) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=single", "-cpu", "max", "-machine", "q35", "-smp", "1"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-m", &format!("{}M", self.memory_mib)])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel.vmlinuz)
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 panic=-1 quiet {}", self.append))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu
    }
}

/// How QEMU ended by itself. None: it was ended here, since its guest hung, its time was up, or it did not get out after its last
/// output; so what it is ended by here is never taken for an end of its own.
fn over(qemu: &mut Child, end: End) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !matches!(end, End::Hang | End::Late) && Instant::now() < deadline {
        if let Some(status) = qemu.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = qemu.kill();
    qemu.wait()?;
    Ok(None)
}

fn tail(file: &Path, lines: usize) -> Vec<String> {
    let text = fs::read(file).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned).collect();
    all[all.len().saturating_sub(lines)..].to_vec()
}
