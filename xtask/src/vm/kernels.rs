//! Fetches Debian's cloud kernels into target/vm/kernels, once. Uses apt with a private configuration, so that the
//! machine's own lists and packages stay as they are; installs nothing.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::root;

/// The series that are tested.
pub(crate) const SERIES: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", "7.3"];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where those series live: bookworm has 6.1 and 6.12, bullseye 5.10, trixie-backports 6.18 and 7.3.
const SUITES: [&str; 5] =
    ["bookworm", "bookworm-updates", "bookworm-backports", "bullseye", "trixie-backports"];
const SECURITY_SUITES: [&str; 2] = ["bookworm-security", "bullseye-security"];

#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) series: String,
    /// As `uname -r` gives it.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
}

/// The kernels of these series, from the cache or fetched.
pub(crate) fn get(series: &[String]) -> Result<Vec<Kernel>> {
    let mut apt = None;
    let mut kernels = Vec::new();
    for series in series {
        if let Some(kernel) = cached(series) {
            kernels.push(kernel);
            continue;
        }
        if apt.is_none() {
            apt = Some(Apt::new()?);
        }
        if let Some(apt) = &apt {
            kernels.push(apt.fetch(series)?);
        }
    }
    Ok(kernels)
}

fn folder(series: &str) -> PathBuf {
    root::target().join("vm/kernels").join(series)
}

fn cached(series: &str) -> Option<Kernel> {
    let folder = folder(series);
    let vmlinuz = folder.join("vmlinuz");
    let release = fs::read_to_string(folder.join("release")).ok()?;
    vmlinuz.exists().then(|| Kernel {
        series: series.to_owned(),
        release: release.trim().to_owned(),
        vmlinuz,
    })
}

/// apt with lists, cache and sources of its own.
struct Apt {
    folder: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Writes the private configuration and reads the lists.
    fn new() -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!(
                "{KEYRING} is missing, kernels cannot be checked. To mend it: sudo apt-get install debian-archive-keyring"
            );
        }
        let folder = root::target().join("vm/apt");
        for sub in ["lists/partial", "cache/archives/partial", "deb"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        File::create(folder.join("status"))?;
        fs::write(folder.join("sources.list"), sources(&machine_uri()))?;
        let at = folder.display().to_string();
        let options = [
            format!("Dir::Etc::sourcelist={at}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State={at}"),
            format!("Dir::State::lists={at}/lists"),
            format!("Dir::State::status={at}/status"),
            format!("Dir::Cache={at}/cache"),
            "APT::Sandbox::User=root".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ];
        let options = options.into_iter().flat_map(|o| ["-o".to_owned(), o]).collect();
        let apt = Self { folder, options };
        println!("reading the lists of Debian's kernels ...");
        let done = apt.command("apt-get").args(["-q", "update"]).stdout(Stdio::null()).status()?;
        if !done.success() {
            bail!("apt-get update failed ({done}) with the sources in {at}/sources.list");
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).stdin(Stdio::null()).current_dir(self.folder.join("deb"));
        command
    }

    fn fetch(&self, series: &str) -> Result<Kernel> {
        let out = self.command("apt-cache").args(["pkgnames", "linux-"]).output()?;
        let names = String::from_utf8_lossy(&out.stdout).into_owned();
        let (package, release) = newest(names.lines(), series)
            .with_context(|| format!("no linux-image-{series}.*-cloud-amd64 in Debian's lists"))?;
        println!("fetching {package} ...");
        let done =
            self.command("apt-get").args(["-q", "download", package]).stdout(Stdio::null()).status()?;
        if !done.success() {
            bail!("apt-get download {package} failed ({done})");
        }
        let deb = fs::read_dir(self.folder.join("deb"))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("{package}_"))))
            .with_context(|| format!("apt-get download left no file for {package}"))?;
        let folder = folder(series);
        fs::create_dir_all(&folder)?;
        let vmlinuz = folder.join("vmlinuz");
        unpack(&deb, &vmlinuz)?;
        // Last, so that a kernel half fetched is not taken for a cached one.
        fs::write(folder.join("release"), release)?;
        fs::remove_file(deb)?;
        Ok(Kernel { series: series.to_owned(), release: release.to_owned(), vmlinuz })
    }
}

/// The image alone; cloud kernels have what the tests need built in, so the modules stay packed.
fn unpack(deb: &Path, vmlinuz: &Path) -> Result<()> {
    let mut tar = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb).stdout(Stdio::piped()).spawn()?;
    let pipe = tar.stdout.take().context("dpkg-deb has no output")?;
    let done = Command::new("tar")
        .args(["-xO", "--wildcards", "*/vmlinuz*"])
        .stdin(pipe)
        .stdout(File::create(vmlinuz)?)
        .status()?;
    let status = tar.wait()?;
    if !done.success() || !status.success() || fs::metadata(vmlinuz)?.len() < 1 << 20 {
        bail!("{} holds no vmlinuz", deb.display());
    }
    Ok(())
}

/// The newest cloud kernel of a series as (package, release). From 7.3 on the image is in linux-binary-.
fn newest<'a>(names: impl Iterator<Item = &'a str>, series: &str) -> Option<(&'a str, &'a str)> {
    let start = format!("{series}.");
    let of_series = |name: &'a str| {
        let (split, release) = name
            .strip_prefix("linux-binary-")
            .map(|r| (true, r))
            .or_else(|| name.strip_prefix("linux-image-").map(|r| (false, r)))?;
        let fits = (release.starts_with(&start) || release.starts_with(&format!("{series}+")))
            && release.ends_with("-cloud-amd64");
        fits.then_some((name, release, split))
    };
    names
        .filter_map(of_series)
        .max_by(|a, b| by_numbers(a.1, b.1).then(a.2.cmp(&b.2)))
        .map(|(name, release, _)| (name, release))
}

/// Compares versions by the numbers in them, in order.
fn by_numbers(a: &str, b: &str) -> Ordering {
    let numbers = |s: &str| -> Vec<u64> {
        s.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
    };
    numbers(a).cmp(&numbers(b))
}

/// The archive that the machine itself uses, so that a mirror is honoured.
pub(crate) fn machine_uri() -> String {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(parts.filter_map(|e| e.ok().map(|e| e.path())));
    }
    files.sort();
    let texts = files.iter().filter_map(|f| fs::read_to_string(f).ok());
    texts
        .into_iter()
        .find_map(|t| debian_uri(&t))
        .unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())
}

/// The first URI of a sources file that ends in `/debian`.
fn debian_uri(text: &str) -> Option<String> {
    text.lines()
        .filter(|l| !l.trim_start().starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(|w| w.trim_end_matches('/'))
        .find(|w| w.contains("://") && w.ends_with("/debian"))
        .map(str::to_owned)
}

fn sources(uri: &str) -> String {
    let line = |uri: &str, suite: &str| format!("deb [signed-by={KEYRING} arch=amd64] {uri} {suite} main\n");
    let security = format!("{uri}-security");
    let plain = SUITES.iter().map(|s| line(uri, s));
    plain.chain(SECURITY_SUITES.iter().map(|s| line(&security, s))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cloud_kernel_of_the_series_is_taken() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-40-cloud-amd64",
            "linux-image-6.1.0-41-cloud-amd64-dbg",
            "linux-image-6.1.0-41-amd64",
            "linux-image-6.12.41+deb12-cloud-amd64",
            "linux-headers-6.1.0-50-cloud-amd64",
        ];
        let newest = |s| newest(names.into_iter(), s).map(|n| n.1);
        assert_eq!(newest("6.1"), Some("6.1.0-40-cloud-amd64"));
        assert_eq!(newest("6.12"), Some("6.12.41+deb12-cloud-amd64"));
        assert_eq!(newest("5.10"), None);
    }

    #[test]
    fn a_split_package_is_preferred() {
        let names = ["linux-image-7.3.1+deb13-cloud-amd64", "linux-binary-7.3.1+deb13-cloud-amd64"];
        let found = newest(names.into_iter(), "7.3").expect("one");
        assert_eq!(found.0, "linux-binary-7.3.1+deb13-cloud-amd64");
    }

    #[test]
    fn the_mirror_is_taken_from_either_form_of_sources() {
        let deb822 =
            "Types: deb\n# http://old/debian\nURIs: http://mirror.example/debian/\nSuites: bookworm\n";
        assert_eq!(debian_uri(deb822).as_deref(), Some("http://mirror.example/debian"));
        let old = "deb http://m.example/debian bookworm main";
        assert_eq!(debian_uri(old).as_deref(), Some("http://m.example/debian"));
        assert_eq!(debian_uri("URIs: http://m.example/debian-security\n"), None);
    }
}
