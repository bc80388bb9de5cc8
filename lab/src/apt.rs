//! Debian packages without touching the machine's own apt set-up.
//!
//! Everything private (source entries, package lists, archives) lives in the
//! cache. Packages are downloaded and unpacked there, never installed.
//! [`ensure_tools`] is the exception: it installs missing tools, and only as
//! root; otherwise it prints the line that does.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hebe_image::build::sources::{self, Source};

use crate::cache;
use crate::progress::Progress;

/// How often a download is tried.
const TRIES: u32 = 4;

/// The running distribution, from os-release(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// `debian`.
    pub id: String,
    /// `bookworm`.
    pub codename: String,
}

impl Distribution {
    /// Reads `/etc/os-release`.
    pub fn detect() -> Result<Self> {
        let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let field = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
                .map(|v| v.trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        Ok(Self {
            id: field("ID"),
            codename: field("VERSION_CODENAME"),
        })
    }

    /// Whether the lab knows how to fetch packages here.
    pub fn is_debian(&self) -> bool {
        self.id == "debian" && !self.codename.is_empty()
    }
}

/// One private apt set-up for a list of suites.
pub struct PrivateApt {
    dir: PathBuf,
    default_release: Option<String>,
    status: Option<PathBuf>,
    /// Two runs do not share package lists while they change.
    _lock: File,
}

impl PrivateApt {
    /// Makes the set-up under `dir` for `suites` and reads their package lists.
    /// `prefer` names the suite whose packages win.
    pub fn open(
        dir: PathBuf,
        own: &Source,
        suites: &[&str],
        with_source: bool,
        prefer: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        for sub in ["sources", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("cannot create {}", dir.join(sub).display()))?;
        }
        let apt = Self {
            default_release: prefer.map(str::to_owned),
            status: None,
            _lock: cache::lock(&dir.join("lock"), progress)?,
            dir,
        };
        let text = own.with_suites(suites, with_source).to_deb822();
        fs::write(apt.dir.join("sources/lab.sources"), text).context("cannot write apt sources")?;
        progress.step(&format!(
            "reading the package lists of {}",
            suites.join(", ")
        ));
        retry("apt-get update", || {
            run(apt.command("apt-get").arg("update"))
        })?;
        Ok(apt)
    }

    /// The same, with packages of `release` preferred.
    pub fn preferring(mut self, release: &str) -> Self {
        self.default_release = Some(release.to_owned());
        self
    }

    /// The same, as if nothing were installed: else a newer installed package
    /// would win over the suite's own.
    pub fn ignoring_installed(mut self) -> Result<Self> {
        let status = self.dir.join("status");
        fs::write(&status, "").context("cannot write an empty package status")?;
        self.status = Some(status);
        Ok(self)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={dir}/sources"),
            format!("Dir::State::Lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
            "Debug::NoLocking=1".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        if let Some(status) = &self.status {
            command
                .arg("-o")
                .arg(format!("Dir::State::status={}", status.display()));
        }
        if let Some(release) = &self.default_release {
            command.arg("-t").arg(release);
        }
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// The candidate version of `package`.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let text = run(self.command("apt-cache").args(["policy", package]))?;
        let version = text
            .lines()
            .find_map(|l| l.trim().strip_prefix("Candidate:"))
            .map(str::trim)
            .filter(|v| *v != "(none)");
        match version {
            Some(version) => Ok(version.to_owned()),
            None => bail!("no package {package} in the suites of this machine's apt source"),
        }
    }

    /// `package` and everything it depends on whose name starts with
    /// `prefix`, each once.
    pub fn closure(&self, package: &str, prefix: &str) -> Result<Vec<String>> {
        let mut seen = BTreeSet::new();
        let mut queue = vec![package.to_owned()];
        while let Some(name) = queue.pop() {
            if !seen.insert(name.clone()) {
                continue;
            }
            let text = run(self.command("apt-cache").args([
                "depends",
                "--no-recommends",
                "--no-suggests",
                "--no-conflicts",
                "--no-breaks",
                "--no-replaces",
                "--no-enhances",
                &name,
            ]))?;
            queue.extend(
                text.lines()
                    .filter_map(|l| l.trim().trim_start_matches('|').strip_prefix("Depends: "))
                    .filter(|d| d.starts_with(prefix))
                    .map(str::to_owned),
            );
        }
        Ok(seen.into_iter().collect())
    }

    /// Downloads packages by name into `dir`.
    pub fn download(&self, packages: &[String], dir: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        retry("apt-get download", || {
            run(self
                .command("apt-get")
                .arg("download")
                .args(packages)
                .current_dir(dir))
        })?;
        debs_in(dir)
    }

    /// Downloads the files of a source package into `dir`; their checksums are
    /// checked, they are not unpacked.
    pub fn download_source(&self, package: &str, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        retry("apt-get source --download-only", || {
            run(self
                .command("apt-get")
                .args(["source", "--download-only", package])
                .current_dir(dir))
        })
        .map(drop)
    }

    /// Downloads `package` and what it needs and the machine lacks.
    pub fn download_with_missing(&self, package: &str) -> Result<Vec<PathBuf>> {
        let archives = self.dir.join("cache/archives");
        retry("apt-get install --download-only", || {
            run(self.command("apt-get").args([
                "install",
                "--download-only",
                "--reinstall",
                "--no-install-recommends",
                "-y",
                package,
            ]))
        })?;
        debs_in(&archives)
    }
}

fn debs_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut debs: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "deb"))
        .collect();
    debs.sort();
    Ok(debs)
}

/// Unpacks packages into `dir` without installing them.
pub fn unpack(debs: &[PathBuf], dir: &Path) -> Result<()> {
    for deb in debs {
        run(Command::new("dpkg").arg("-x").arg(deb).arg(dir))?;
    }
    Ok(())
}

/// Every source entry of this machine.
pub fn machine_sources() -> Result<Vec<Source>> {
    let all = sources::read_machine(Path::new("/etc/apt")).context("cannot read apt's sources")?;
    if all.is_empty() {
        bail!(
            "no apt sources under /etc/apt; name what this machine has with --qemu, --kernel and --modules"
        );
    }
    Ok(all)
}

/// Finds the machine's own source entry.
pub fn own_source(distribution: &Distribution) -> Result<Source> {
    let all = machine_sources()?;
    sources::own_source(&all, &distribution.codename).with_context(|| {
        format!(
            "no apt source of this machine names the suite '{}'; name what this machine has with --qemu, --kernel and --modules",
            distribution.codename
        )
    })
}

/// A program and the Debian package that brings it.
pub struct Tool {
    /// Looked for in `PATH`, `/usr/sbin` and `/sbin`; a name with a slash is a file.
    pub program: &'static str,
    /// What to install when it is missing.
    pub package: &'static str,
}

/// Installs the packages of missing tools when root; otherwise fails with
/// the line that installs them.
pub fn ensure_tools(tools: &[Tool], progress: &dyn Progress) -> Result<()> {
    let missing: BTreeSet<&str> = tools
        .iter()
        .filter(|t| find_program(t.program).is_none())
        .map(|t| t.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.iter().copied().collect::<Vec<_>>().join(" ");
    let line = format!("apt-get install --no-install-recommends {list}");
    if !rustix::process::geteuid().is_root() {
        bail!("packages are missing; install them with: sudo {line}");
    }
    if find_program("apt-get").is_none() {
        bail!("install what the Debian packages {list} hold, with this distribution's own tools");
    }
    progress.step(&format!("installing {list}"));
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "--no-install-recommends", "-y"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        run(&mut command)
    };
    if install().is_err() {
        // A machine whose package lists were never read knows no package.
        retry("apt-get update", || {
            run(Command::new("apt-get").arg("update"))
        })?;
        retry(&line, install)?;
    }
    Ok(())
}

/// The full path of a program.
pub fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|p| p.exists());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

fn retry<T>(what: &str, mut act: impl FnMut() -> Result<T>) -> Result<T> {
    let mut pause = Duration::from_secs(2);
    for _ in 1..TRIES {
        match act() {
            Ok(value) => return Ok(value),
            Err(_) => std::thread::sleep(pause),
        }
        pause *= 2;
    }
    act().with_context(|| format!("{what} failed {TRIES} times"))
}

/// Runs a command to its end and returns what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = text.lines().rev().take(12).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("{name} ended with {}: {}", output.status, tail.join("\n"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
