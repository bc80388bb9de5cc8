//! What the lab is made of: QEMU and kernels, fetched as Debian packages.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Distribution, PrivateApt, Tool};
use crate::balancer;
use crate::cache::Cache;
use crate::emulator;
use crate::kernel;
use crate::machine::Accelerator;
use crate::progress::Progress;

/// The oldest QEMU whose multi-threaded emulation runs nested guests soundly.
const QEMU_MAJOR_MIN: u32 = 10;

/// A stock kernel by series and build, such as `6.1-cloud`; or the lab's own
/// small kernel, `lab`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KernelName {
    /// Debian 12's kernel, built for clouds.
    V6_1Cloud,
    /// Debian 12's kernel for every machine.
    V6_1Generic,
    /// The kernel in Debian 13's backports, built for clouds.
    V7_3Cloud,
    /// The kernel in Debian 13's backports for every machine.
    V7_3Generic,
    /// Built by `cargo xtask kernel`.
    Lab,
}

impl KernelName {
    /// Every stock kernel.
    pub const STOCK: [Self; 4] = [
        Self::V6_1Cloud,
        Self::V6_1Generic,
        Self::V7_3Cloud,
        Self::V7_3Generic,
    ];

    /// The name on command lines and in the cache.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V6_1Cloud => "6.1-cloud",
            Self::V6_1Generic => "6.1-generic",
            Self::V7_3Cloud => "7.3-cloud",
            Self::V7_3Generic => "7.3-generic",
            Self::Lab => "lab",
        }
    }

    /// The suite and the meta-package that bring it.
    fn origin(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::V6_1Cloud => Some(("bookworm", "linux-image-cloud-amd64")),
            Self::V6_1Generic => Some(("bookworm", "linux-image-amd64")),
            Self::V7_3Cloud => Some(("trixie-backports", "linux-image-cloud-amd64")),
            Self::V7_3Generic => Some(("trixie-backports", "linux-image-amd64")),
            Self::Lab => None,
        }
    }
}

impl fmt::Display for KernelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for KernelName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match Self::STOCK
            .into_iter()
            .chain([Self::Lab])
            .find(|k| k.as_str() == text)
        {
            Some(kernel) => Ok(kernel),
            None => bail!(
                "'{text}' names no kernel of the lab: use 6.1-cloud, 6.1-generic, 7.3-cloud, 7.3-generic or lab"
            ),
        }
    }
}

/// A kernel ready for use.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// How the lab calls it.
    pub name: String,
    /// What it says of itself (`uname -r`).
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// `…/lib/modules/RELEASE` with `modules.dep`; none for a kernel without modules.
    pub modules: Option<PathBuf>,
}

/// QEMU ready for use.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Where its shared libraries lie, if not in the system (`LD_LIBRARY_PATH`).
    pub libraries: Option<OsString>,
    /// Firmware folders (`-L`).
    pub firmware: Vec<PathBuf>,
    /// Major version.
    pub major: u32,
}

/// haproxy ready for use.
#[derive(Clone, Debug)]
pub struct Haproxy {
    /// The program.
    pub program: PathBuf,
    /// Where its shared libraries lie, if not in the system.
    pub libraries: Option<OsString>,
}

impl Qemu {
    /// A command that runs QEMU with its libraries and firmware.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        for dir in &self.firmware {
            command.arg("-L").arg(dir);
        }
        command
    }

    fn probe(mut self) -> Result<Self> {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let text = apt::run(command.arg("--version"))?;
        self.major = qemu_major(&text)
            .with_context(|| format!("{} does not tell its version", self.program.display()))?;
        Ok(self)
    }
}

fn qemu_major(version_text: &str) -> Option<u32> {
    version_text
        .split("version ")
        .nth(1)?
        .split('.')
        .next()?
        .trim()
        .parse()
        .ok()
}

/// What the user names on the command line instead of what would be fetched.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--qemu`.
    pub qemu: Option<PathBuf>,
    /// `--kernel`: taken for every stock kernel.
    pub kernel: Option<PathBuf>,
    /// `--modules`: the `lib/modules/RELEASE` folder of that kernel.
    pub modules: Option<PathBuf>,
}

/// Fetches and finds the lab's ingredients.
pub struct Assets {
    cache: Cache,
    overrides: Overrides,
    distribution: Distribution,
    emulator: OnceLock<Qemu>,
}

impl Assets {
    /// Opens the cache.
    pub fn open(overrides: Overrides) -> Result<Self> {
        Ok(Self {
            cache: Cache::open()?,
            overrides,
            distribution: Distribution::detect()?,
            emulator: OnceLock::new(),
        })
    }

    /// A folder in the cache that `fill` makes where `good` finds none, going
    /// on with what an ended run left in it.
    pub fn resumed(
        &self,
        name: &str,
        progress: &dyn Progress,
        good: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.cache.resumed(name, progress, good, fill)
    }

    pub(crate) fn needs_debian(&self, option: &str) -> Result<()> {
        if self.distribution.is_debian() {
            return Ok(());
        }
        bail!(
            "this is '{}', not Debian: name what this machine has with {option}",
            self.distribution.id
        )
    }

    /// A private apt set-up for `suites`, reached through the machine's own source.
    pub fn apt(
        &self,
        label: &str,
        suites: &[&str],
        with_source: bool,
        prefer: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<PrivateApt> {
        let own = apt::own_source(&self.distribution)?;
        let dir = self.cache.root().join("apt").join(label);
        PrivateApt::open(dir, &own, suites, with_source, prefer, progress)
    }

    /// The QEMU that runs the lab's machines: the one named; with hardware
    /// behind `/dev/kvm` any new one ([`Assets::qemu`]); else one whose
    /// emulated processor is corrected ([`emulator`]), built at first use.
    /// Where it cannot be built, the uncorrected one goes on in its place, and
    /// that is said.
    pub fn machine_qemu(&self, progress: &dyn Progress) -> Result<Qemu> {
        if let Some(qemu) = self.emulator.get() {
            return Ok(qemu.clone());
        }
        let qemu = if self.overrides.qemu.is_some() || Accelerator::detect() == Accelerator::Kvm {
            self.qemu(progress)?
        } else {
            self.corrected_qemu(progress)?
        };
        Ok(self.emulator.get_or_init(|| qemu).clone())
    }

    fn corrected_qemu(&self, progress: &dyn Progress) -> Result<Qemu> {
        let runs = |dir: &Path| emulator::is_of_patch(dir) && unpacked_qemu(dir).probe().is_ok();
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let built = self
            .cache
            .resumed("emulator", progress, runs, |dir| {
                emulator::build_in(self, dir, jobs, progress)
            })
            .and_then(|dir| unpacked_qemu(&dir).probe());
        built.or_else(|error| {
            progress.note(&format!(
                "the emulator could not be built, so QEMU as it is runs the lab, whose processor shuts down now and then (docs/lab.md): {error:#}"
            ));
            self.qemu(progress)
        })
    }

    /// QEMU 10 or newer: the one named, the machine's own, the cached one, or
    /// one fetched from Debian.
    pub fn qemu(&self, progress: &dyn Progress) -> Result<Qemu> {
        if let Some(program) = &self.overrides.qemu {
            return system_qemu(program.clone()).probe();
        }
        if let Some(program) = apt::find_program("qemu-system-x86_64")
            && let Ok(qemu) = system_qemu(program).probe()
            && qemu.major >= QEMU_MAJOR_MIN
        {
            return Ok(qemu);
        }
        self.needs_debian("--qemu")?;
        // The cached one leans on the system's libraries, which may have
        // changed since it was fetched.
        let runs = |dir: &Path| unpacked_qemu(dir).probe().is_ok();
        let dir = self
            .cache
            .filled("qemu", progress, runs, |dir| self.fetch_qemu(dir, progress))?;
        unpacked_qemu(&dir).probe()
    }

    fn fetch_qemu(&self, dir: &Path, progress: &dyn Progress) -> Result<()> {
        let own = self.distribution.codename.clone();
        let backports = format!("{own}-backports");
        let updates = format!("{own}-updates");
        let suites = [own.as_str(), updates.as_str(), backports.as_str()];
        // The base suite wins where it is new enough.
        let mut apt = self.apt("qemu", &suites, false, Some(&own), progress)?;
        if package_major(&apt.candidate("qemu-system-x86")?) < QEMU_MAJOR_MIN {
            apt = apt.preferring(&backports);
        }
        let version = apt.candidate("qemu-system-x86")?;
        if package_major(&version) < QEMU_MAJOR_MIN {
            bail!(
                "Debian's newest QEMU here is {version}, older than {QEMU_MAJOR_MIN}: name one with --qemu"
            );
        }
        progress.step(&format!("downloading QEMU {version}"));
        let debs = apt.download_with_missing("qemu-system-x86")?;
        progress.step("unpacking QEMU");
        apt::unpack(&debs, dir)
    }

    /// A static busybox, for people who look around in a lab host; none where
    /// it cannot be fetched.
    pub fn busybox(&self, progress: &dyn Progress) -> Result<Option<PathBuf>> {
        if !self.distribution.is_debian() {
            return Ok(apt::find_program("busybox"));
        }
        let dir = self.cache.filled(
            "busybox",
            progress,
            |_| true,
            |dir| {
                let codename = self.distribution.codename.as_str();
                let apt = self.apt(codename, &[codename], false, None, progress)?;
                progress.step("downloading busybox");
                let debs = apt.download(&["busybox-static".to_owned()], &dir.join("debs"))?;
                apt::unpack(&debs, dir)
            },
        )?;
        let places = ["bin/busybox", "usr/bin/busybox"].map(|p| dir.join(p));
        Ok(places.into_iter().find(|p| p.is_file()))
    }

    /// etcd, for tests: the machine's own, the cached one, or one fetched from
    /// Debian.
    pub fn etcd(&self, progress: &dyn Progress) -> Result<PathBuf> {
        if let Some(program) = apt::find_program("etcd") {
            return Ok(program);
        }
        if !self.distribution.is_debian() {
            bail!(
                "this is '{}', not Debian: install etcd, so that it is in PATH",
                self.distribution.id
            );
        }
        let runs = |dir: &Path| apt::run(Command::new(unpacked_etcd(dir)).arg("--version")).is_ok();
        let dir = self.cache.filled("etcd", progress, runs, |dir| {
            let codename = self.distribution.codename.as_str();
            let apt = self.apt(codename, &[codename], false, None, progress)?;
            progress.step("downloading etcd");
            let debs = apt.download(&["etcd-server".to_owned()], &dir.join("debs"))?;
            apt::unpack(&debs, dir)
        })?;
        Ok(unpacked_etcd(&dir))
    }

    /// haproxy: the machine's own, the cached one, or one fetched from Debian.
    pub fn haproxy(&self, progress: &dyn Progress) -> Result<Haproxy> {
        if let Some(program) = apt::find_program("haproxy") {
            return Ok(Haproxy {
                program,
                libraries: None,
            });
        }
        if !self.distribution.is_debian() {
            bail!(
                "this is '{}', not Debian: install haproxy, so that it is in PATH",
                self.distribution.id
            );
        }
        let runs = |dir: &Path| apt::run(balancer::unpacked(dir).command().arg("-v")).is_ok();
        let dir = self.cache.filled("haproxy", progress, runs, |dir| {
            let codename = self.distribution.codename.as_str();
            let apt = self.apt("haproxy", &[codename], false, None, progress)?;
            progress.step("downloading haproxy");
            let debs = apt.download_with_missing("haproxy")?;
            apt::unpack(&debs, dir)
        })?;
        Ok(balancer::unpacked(&dir))
    }

    /// A kernel: the one named on the command line, the cached one, or one
    /// fetched from Debian.
    pub fn kernel(&self, name: KernelName, progress: &dyn Progress) -> Result<Kernel> {
        if let Some(image) = &self.overrides.kernel {
            return named_kernel(name, image, self.overrides.modules.as_deref());
        }
        let folder = format!("kernel-{name}");
        let Some((suite, package)) = name.origin() else {
            let jobs = std::thread::available_parallelism().map_or(1, usize::from);
            return kernel::build(self, jobs, progress);
        };
        if !self.cache.root().join(&folder).exists() {
            self.needs_debian("--kernel and --modules")?;
        }
        let dir = self.cache.filled(
            &folder,
            progress,
            |_| true,
            |dir| self.fetch_kernel(dir, suite, package, progress),
        )?;
        cached_kernel(name, &dir)
    }

    /// This machine's distribution.
    pub(crate) fn distribution(&self) -> &Distribution {
        &self.distribution
    }

    /// A folder in the cache that `fill` makes where there is none.
    pub(crate) fn filled(
        &self,
        name: &str,
        progress: &dyn Progress,
        good: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.cache.filled(name, progress, good, fill)
    }

    fn fetch_kernel(
        &self,
        dir: &Path,
        suite: &str,
        package: &str,
        progress: &dyn Progress,
    ) -> Result<()> {
        let tool = |program, package| Tool { program, package };
        apt::ensure_tools(&[tool("depmod", "kmod"), tool("xz", "xz-utils")], progress)?;
        let apt = self
            .apt(suite, &[suite], false, None, progress)?
            .ignoring_installed()?;
        let packages: Vec<String> = apt
            .closure(package, "linux-")?
            .into_iter()
            .filter(|p| p != "linux-base" && !p.starts_with("linux-initramfs"))
            .collect();
        progress.step(&format!(
            "downloading {package} {}",
            apt.candidate(package)?
        ));
        let root = dir.join("root");
        let debs = apt.download(&packages, &dir.join("debs"))?;
        progress.step(&format!("unpacking {package}"));
        apt::unpack(&debs, &root)?;
        fs::remove_dir_all(dir.join("debs")).context("cannot remove unpacked packages")?;
        // One place for modules, wherever the package put them; depmod of
        // either Debian release finds it.
        let usr = root.join("usr/lib/modules");
        let lib = root.join("lib/modules");
        if usr.exists() && !lib.exists() {
            fs::create_dir_all(root.join("lib")).context("cannot create lib")?;
            fs::rename(&usr, &lib).context("cannot move the modules")?;
        }
        fs::create_dir_all(root.join("usr/lib")).context("cannot create usr/lib")?;
        std::os::unix::fs::symlink("../../lib/modules", &usr).context("cannot link the modules")?;
        let release = only_entry(&lib)?;
        let depmod = apt::find_program("depmod").context("depmod is missing: install kmod")?;
        apt::run(Command::new(depmod).arg("-b").arg(&root).arg(release))?;
        Ok(())
    }
}

fn only_entry(dir: &Path) -> Result<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    match names.pop() {
        Some(name) => Ok(name),
        None => bail!("{} is empty", dir.display()),
    }
}

fn package_major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, v)| v);
    upstream
        .split(['.', '+', '-', '~'])
        .next()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

fn system_qemu(program: PathBuf) -> Qemu {
    Qemu {
        program,
        libraries: None,
        firmware: Vec::new(),
        major: 0,
    }
}

fn unpacked_etcd(dir: &Path) -> PathBuf {
    dir.join("usr/bin/etcd")
}

fn unpacked_qemu(dir: &Path) -> Qemu {
    let share = dir.join("usr/share");
    let folders = ["qemu", "seabios", "../lib/ipxe/qemu"];
    Qemu {
        program: dir.join("usr/bin/qemu-system-x86_64"),
        libraries: std::env::join_paths([
            dir.join("usr/lib/x86_64-linux-gnu"),
            dir.join("lib/x86_64-linux-gnu"),
            dir.join("usr/lib/x86_64-linux-gnu/pulseaudio"),
        ])
        .ok(),
        firmware: folders
            .iter()
            .map(|f| share.join(f))
            // Where the system holds the firmware packages already, they
            // were not fetched again.
            .chain(folders.iter().map(|f| Path::new("/usr/share").join(f)))
            .filter(|p| p.exists())
            .collect(),
        major: 0,
    }
}

pub(crate) fn named_kernel(
    name: KernelName,
    image: &Path,
    modules: Option<&Path>,
) -> Result<Kernel> {
    if !image.is_file() {
        bail!("--kernel {}: no such file", image.display());
    }
    let release = match modules {
        Some(dir) if dir.join("modules.dep").is_file() => dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default(),
        Some(dir) => bail!(
            "--modules {}: holds no modules.dep; run depmod",
            dir.display()
        ),
        None => kernel::release_of(image)?,
    };
    Ok(Kernel {
        name: name.to_string(),
        release,
        image: image.to_owned(),
        modules: modules.map(Path::to_owned),
    })
}

pub(crate) fn cached_kernel(name: KernelName, dir: &Path) -> Result<Kernel> {
    let lib = dir.join("root/lib/modules");
    let (release, modules) = if lib.exists() {
        let release = only_entry(&lib)?;
        let modules = lib.join(&release);
        (release, Some(modules))
    } else {
        let text = fs::read_to_string(dir.join("release"))
            .context("the cached kernel has no release file")?;
        (text.trim().to_owned(), None)
    };
    let candidates = [
        dir.join("bzImage"),
        dir.join("root/boot").join(format!("vmlinuz-{release}")),
        lib.join(&release).join("vmlinuz"),
    ];
    match candidates.into_iter().find(|p| p.is_file()) {
        Some(image) => Ok(Kernel {
            name: name.to_string(),
            release,
            image,
            modules,
        }),
        None => bail!(
            "the cached kernel in {} has no image; remove that folder and run again",
            dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(package_major("1:10.0.2+ds-2+deb13u1~bpo12+1"), 10);
        assert_eq!(package_major("1:7.2+dfsg-7"), 7);
        assert_eq!(
            qemu_major("QEMU emulator version 10.0.2 (Debian 1:10)\n"),
            Some(10)
        );
        assert_eq!(qemu_major("nonsense"), None);
    }

    #[test]
    fn every_kernel_name_parses_back() {
        for name in KernelName::STOCK {
            assert_eq!(name.as_str().parse::<KernelName>().expect("name"), name);
        }
        assert!("5.10".parse::<KernelName>().is_err());
    }
}
