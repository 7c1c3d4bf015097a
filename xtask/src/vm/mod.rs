//! Boots other kernels in QEMU and runs the scenarios, or one given program, inside. Writes under target/vm only.

mod boot;
mod initramfs;
mod kernels;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub(crate) use self::boot::{Boot, End};
pub(crate) use self::initramfs::Initramfs;
use self::kernels::{Kernel, SERIES};
pub(crate) use self::kernels::{get as kernels, machine_uri};
use crate::cargo::{self, Built};
use crate::report::Tally;
use crate::{needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel series; may be given several times. All five when not given
    #[arg(long = "kernel", value_name = "V")]
    kernels: Vec<String>,
    /// Seconds without a line of output after which a guest counts as hung
    #[arg(long, default_value_t = SILENCE)]
    timeout: u64,
    /// Minutes for all guests together; a kernel that finds no time is skipped, by name
    #[arg(long, value_name = "MINUTES")]
    within: Option<u64>,
    /// Memory of the guest in MiB; by default what the files need
    #[arg(long)]
    memory: Option<u64>,
    /// A file or folder to pack beside the program, under the path it has here; may be given several times
    #[arg(long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// More kernel arguments
    #[arg(long, default_value = "")]
    append: String,
    /// How many guests run at a time
    #[arg(long, default_value_t = 2)]
    parallel: usize,
    /// Only fetch the kernels
    #[arg(long)]
    fetch: bool,
    /// A program to run in the guests instead of the tests, with its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// Real programs, so that a process has the name the tests expect; busybox gives the rest.
const PROGRAMS: [&str; 15] = [
    "bash", "cat", "chmod", "cut", "dash", "env", "false", "kill", "ls", "mkdir", "setsid", "sh", "sleep",
    "timeout", "true",
];

/// How much longer than on a host a test may wait under emulation.
const SLOW: u32 = 20;
/// How many processes are spawned as fast as possible there, where one takes tens of milliseconds; 5,000 on the host.
const SPAWN: u32 = 500;

/// By default; the longest test takes a minute in a guest on a machine of its own.
const SILENCE: u64 = 600;
/// A guest is not started with less time left than this: none was seen to need less.
const AT_LEAST: Duration = Duration::from_mins(5);

/// One kernel's outcome.
struct Verdict {
    kernel: Kernel,
    end: End,
    tally: Tally,
    took: Duration,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let series: Vec<String> = if args.kernels.is_empty() {
        SERIES.iter().map(|&s| s.to_owned()).collect()
    } else {
        args.kernels.clone()
    };
    if let Some(unknown) = series.iter().find(|s| !SERIES.contains(&s.as_str())) {
        bail!("no kernel {unknown}: those that are tested are {}", SERIES.join(", "));
    }
    needs::check(&needs::for_vm())?;
    let kernels = kernels::get(&series)?;
    if args.fetch {
        return Ok(true);
    }
    let mut total = Tally::default();
    println!();
    sum(boot_all(args, &kernels)?, &mut total);
    total.print();
    Ok(total.failed == 0)
}

fn sum(verdicts: Vec<Verdict>, total: &mut Tally) {
    for verdict in verdicts {
        println!("{}", line(&verdict));
        total.add(settled(verdict.tally, verdict.end), &format!("{}: ", verdict.kernel.series));
    }
}

/// The tests on all kernels, added to `total`; a guest that hangs or dies is a failure.
pub(crate) fn run_tests(total: &mut Tally) -> Result<()> {
    let args = Args {
        kernels: Vec::new(),
        timeout: SILENCE,
        within: None,
        memory: None,
        files: Vec::new(),
        append: String::new(),
        parallel: 2,
        fetch: false,
        program: Vec::new(),
    };
    needs::check(&needs::for_vm())?;
    let series: Vec<String> = SERIES.iter().map(|&s| s.to_owned()).collect();
    sum(boot_all(&args, &kernels::get(&series)?)?, total);
    Ok(())
}

fn boot_all(args: &Args, kernels: &[Kernel]) -> Result<Vec<Verdict>> {
    let deadline = args.within.map(|m| Instant::now() + Duration::from_mins(m));
    let image = root::target().join("vm").join(format!("initramfs-{}.cpio", std::process::id()));
    let size = pack(args, &image)?;
    // Unpacking holds the archive and the files at once; the rest is for the kernel and the tests.
    let memory_mib = args.memory.unwrap_or(320 + 2 * (size as u64 >> 20));
    println!("{} MiB of files, {memory_mib} MiB of memory a guest", size >> 20);
    let queue: Mutex<VecDeque<&Kernel>> = Mutex::new(kernels.iter().collect());
    // From both ends, oldest and newest first: where time is short those tell most.
    let next = |newest: bool| {
        let mut queue = queue.lock().ok()?;
        if newest { queue.pop_back() } else { queue.pop_front() }
    };
    let work = &|newest: bool| -> Result<Vec<Verdict>> {
        let mut verdicts: Vec<Verdict> = Vec::new();
        while let Some(kernel) = next(newest) {
            let needs = verdicts.iter().map(|v| v.took).fold(AT_LEAST, Duration::max);
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left < needs) {
                let (tally, took) = (Tally::default(), Duration::ZERO);
                verdicts.push(Verdict { kernel: kernel.clone(), end: End::Late, tally, took });
                continue;
            }
            let boot = Boot {
                kernel,
                initramfs: &image,
                memory_mib,
                silence: Duration::from_secs(args.timeout),
                deadline,
                append: &args.append,
                logs: root::target().join("vm/logs"),
            };
            verdicts.push(boot_one(&boot)?);
        }
        Ok(verdicts)
    };
    let outcomes: Vec<Result<Vec<Verdict>>> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..args.parallel.clamp(1, 8)).map(|i| scope.spawn(move || work(i % 2 == 1))).collect();
        threads.into_iter().filter_map(|t| t.join().ok()).collect()
    });
    fs::remove_file(&image)?;
    let mut verdicts: Vec<Verdict> =
        outcomes.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    verdicts.sort_by_key(|v| SERIES.iter().position(|&s| s == v.kernel.series));
    Ok(verdicts)
}

/// A guest whose QEMU was ended by a signal (it crashed, or the machine had no memory for it) is booted once more: that tells
/// nothing of what runs in it.
fn boot_one(boot: &Boot<'_>) -> Result<Verdict> {
    let started = Instant::now();
    let series = &boot.kernel.series;
    let try_it = || -> Result<(End, Tally)> {
        let mut tally = Tally::default();
        let end = boot.run(|text| {
            tally.line(text);
            println!("[{series}] {text}");
        })?;
        Ok((end, tally))
    };
    let (mut end, mut tally) = try_it()?;
    if let End::Killed(signal) = end {
        println!("[{series}] QEMU was ended by signal {signal}: once more");
        (end, tally) = try_it()?;
    }
    Ok(Verdict { kernel: boot.kernel.clone(), end, tally, took: started.elapsed() })
}

/// A guest that did not end well failed, whatever its tests said before.
fn settled(mut tally: Tally, end: End) -> Tally {
    match end {
        End::Status(0) => {}
        End::Status(_) if tally.failed > 0 => {}
        End::Status(status) => tally.fail(format!("the program ended with status {status}")),
        End::Hang => tally.fail("the guest hung".to_owned()),
        End::Late => {
            // Its closing line may not have come.
            tally.failed = tally.failed.max(tally.failures.len() as u32);
            tally.skip("the rest", "there was no time left for it");
        }
        End::Died => tally.fail("the guest's kernel died or never came up".to_owned()),
        End::Killed(signal) => tally.fail(format!("QEMU was ended by signal {signal}")),
    }
    tally
}

/// The verdict line of a kernel.
fn line(verdict: &Verdict) -> String {
    let tally = &verdict.tally;
    let word = match verdict.end {
        End::Status(0) => "ok".to_owned(),
        End::Status(status) => format!("FAILED (status {status})"),
        End::Hang => "HUNG".to_owned(),
        End::Late => "NO TIME".to_owned(),
        End::Died => "DIED".to_owned(),
        End::Killed(signal) => format!("QEMU KILLED (signal {signal})"),
    };
    let mut text = format!(
        "kernel {} ({}): {word}, {} in {:.0} s",
        verdict.kernel.series,
        verdict.kernel.release,
        tally.closing(),
        verdict.took.as_secs_f64()
    );
    for (name, why) in &tally.skipped {
        // Writing to a String cannot fail.
        let _ = write!(text, "; skipped {name}: {why}");
    }
    text
}

/// Writes the guests' root and returns its size in bytes.
fn pack(args: &Args, image: &Path) -> Result<usize> {
    let mut root = Initramfs::new();
    root.file(Path::new("/init"), 0o755, include_bytes!("init.sh"));
    root.host_file_as(Path::new("/bin/busybox"), Path::new("/bin/busybox"))?;
    for program in PROGRAMS {
        let path = Path::new("/usr/bin").join(program);
        if path.exists() {
            root.host_file(&path)?;
        }
    }
    for file in &args.files {
        let file = std::path::absolute(file)?;
        if file.is_dir() {
            root.host_folder(&file)?;
        } else {
            root.host_file(&file)?;
        }
    }
    let script = match args.program.split_first() {
        Some((program, rest)) => {
            let program = std::path::absolute(program)?;
            root.host_file(&program)?;
            program_script(&program, rest)
        }
        None => pack_tests(&mut root)?,
    };
    root.file(Path::new("/run.sh"), 0o755, script.as_bytes());
    fs::create_dir_all(root::target().join("vm"))?;
    root.write(image)
}

fn program_script(program: &Path, args: &[String]) -> String {
    let mut script = String::from("export RUST_BACKTRACE=1\ncd /tmp\n");
    // Writing to a String cannot fail.
    let _ = write!(script, "export JWTEST_SLOW={SLOW}\nexec ");
    script.push_str(&quoted(&program.to_string_lossy()));
    for arg in args {
        script.push(' ');
        script.push_str(&quoted(arg));
    }
    script.push('\n');
    script
}

/// The scenarios that depend on the kernel. The others are about programs and files, the same on each.
const SCENARIOS: [&str; 8] =
    ["lifecycle", "accounting", "restart", "exec", "alerts", "kill", "enforce_stages", "privileges"];
/// What takes minutes where a fork takes 6 ms; the host runs it.
const TOO_SLOW: [&str; 3] =
    ["a_family_that_changes_while_it_is_ended", "a_fork_bomb", "a_thousand_that_ignore_sigterm"];

/// Builds the agent's own tests of the kernel side and the scenarios with all programs they start, packs them, and
/// returns the script that runs them.
fn pack_tests(root: &mut Initramfs) -> Result<String> {
    let programs = cargo::build(&["build", "--workspace", "--bins"])?;
    let tests = cargo::build(&["test", "--no-run", "--workspace"])?;
    for built in programs.iter().filter(|b| b.kind == "bin" && b.package != "xtask") {
        root.host_file(&built.executable)?;
    }
    let mut script = format!("export RUST_BACKTRACE=1 JWTEST_SLOW={SLOW} JWTEST_SPAWN={SPAWN}\nfailed=0\n");
    let skips: Vec<String> = TOO_SLOW.iter().map(|name| format!("--skip {name}")).collect();
    let skips = skips.join(" ");
    for name in TOO_SLOW {
        // Writing to a String cannot fail.
        let _ = writeln!(
            script,
            "echo 'test {name} ... ignored, takes minutes under emulation; the host runs it'"
        );
    }
    let mut run = |built: &Built, filter: &str| -> Result<()> {
        root.host_file(&built.executable)?;
        root.folder(&built.package_dir);
        let folder = quoted(&built.package_dir.to_string_lossy());
        let program = quoted(&built.executable.to_string_lossy());
        // Writing to a String cannot fail.
        let _ = write!(
            script,
            "echo 'running {}'\ncd {folder}\n\
             CARGO_MANIFEST_DIR={folder} {program} --test-threads=1 {filter} || failed=$?\n",
            built.name
        );
        Ok(())
    };
    let test = |b: &&Built| b.is_test;
    for built in tests.iter().filter(test) {
        match (built.package.as_str(), built.kind.as_str()) {
            ("monitor", "lib") => run(built, "kernel::")?,
            ("tests", "test") if SCENARIOS.contains(&built.name.as_str()) => run(built, &skips)?,
            _ => {}
        }
    }
    script.push_str("exit $failed\n");
    Ok(script)
}

/// For a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_spaces_and_quotes_reaches_the_shell_whole() {
        let script = program_script(Path::new("/a b"), &["it's".to_owned()]);
        assert!(script.ends_with("exec '/a b' 'it'\\''s'\n"), "{script}");
    }

    #[test]
    fn a_guest_that_hangs_fails_even_if_its_tests_passed() {
        let mut tally = Tally::default();
        tally.line("test result: ok. 3 passed; 0 failed; 0 ignored");
        assert_eq!(settled(tally.clone(), End::Hang).closing(), "3 passed, 1 failed, 0 skipped");
        assert_eq!(settled(tally.clone(), End::Late).closing(), "3 passed, 0 failed, 1 skipped");
        assert_eq!(settled(tally, End::Status(0)).closing(), "3 passed, 0 failed, 0 skipped");
    }
}
