//! Hosts with a real root disk: Debian, with systemd as PID 1.
//!
//! The root is an image that [`hebe_image::build`] makes, the same code as
//! `hebe image build`; it is made once and kept in the cache, and a machine
//! writes to a throw-away layer above it. It holds no kernel: the lab's kernels
//! boot it, each with the lab's initramfs, whose `lab-init` loads modules,
//! mounts the root and gives PID 1 to systemd ([`crate::loader`] has hosts that
//! start by themselves). The lab's other disk is at
//! `/data` as ever, with the programs in `/data/bin` and the kernels' modules in
//! `/data/modules`, so that neither needs another root.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use hebe_image::build::{self, FileIn, Order, Watch, sources};

use crate::apt::{self, Tool};
use crate::assets::{Assets, Kernel};
use crate::binaries::Binaries;
use crate::disk;
use crate::loader;
use crate::progress::Progress;

/// What `lab-init` and systemd are told by the kernel's command line.
pub const CMDLINE: &str =
    "lab.role=system systemd.show_status=error systemd.log_target=journal rd.udev.log_level=3";
/// Bytes of the root disk; it takes what is in it.
const SIZE: u64 = 4 << 30;
/// What a host has besides that starts by itself: Debian's kernel, what makes its
/// initramfs, and GRUB for a PC's firmware.
const TO_START: [&str; 5] = [
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "e2fsprogs",
    "grub-pc",
];
/// Where udev and modprobe look for modules.
const MODULES: &str = "/usr/lib/modules";
/// What makes images: other code, other images.
const CODE: [&str; 3] = [
    include_str!("../../crates/hebe-image/src/build/mod.rs"),
    include_str!("../../crates/hebe-image/src/build/contents.rs"),
    include_str!("../../crates/hebe-image/src/build/tool.rs"),
];

/// A Debian root disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// Suite or code name.
    pub suite: String,
    /// Packages besides systemd and what goes with it.
    pub packages: Vec<String>,
    /// It starts by its own boot loader, kernel and initramfs ([`crate::loader`]).
    pub has_loader: bool,
}

impl System {
    /// Debian 12, with systemd 252.
    pub fn debian12() -> Self {
        Self::of_suite("bookworm")
    }

    /// Of any suite that the machine's own source has.
    pub fn of_suite(suite: &str) -> Self {
        let suite = suite.to_owned();
        Self {
            suite,
            packages: Vec::new(),
            has_loader: false,
        }
    }

    /// The same, started as a real machine is: by its firmware, GRUB, and its own
    /// kernel and initramfs ([`crate::loader`]).
    pub fn with_boot_loader(mut self) -> Self {
        self.has_loader = true;
        self
    }

    /// The same with more packages; each set is another image in the cache.
    pub fn with(mut self, packages: &[&str]) -> Self {
        self.packages
            .extend(packages.iter().map(|p| (*p).to_owned()));
        self
    }

    /// Its image, made at first use.
    pub fn image(&self, assets: &Assets, progress: &dyn Progress) -> Result<PathBuf> {
        let order = self.order(assets)?;
        match self.has_loader {
            true => loader::cached_image(assets, &self.starting(order), progress),
            false => cached_image(assets, "system", &order, progress),
        }
    }

    /// The order for a host that starts by itself: its kernel's modules are its
    /// own, and its init mounts the lab's disk.
    fn starting(&self, mut order: Order) -> Order {
        let more = TO_START.iter().map(|p| (*p).to_owned());
        order.packages.extend(more);
        order.links.retain(|(at, _)| at != MODULES);
        // The one that the builder writes names the root.
        order.files.retain(|file| file.to != "/etc/fstab");
        order.files.extend(loader::files());
        order.units.push("data.mount".to_owned());
        order
    }

    fn order(&self, assets: &Assets) -> Result<Order> {
        let text = FileIn::text;
        let mask = |unit: &str| {
            (
                format!("/etc/systemd/system/{unit}"),
                "/dev/null".to_owned(),
            )
        };
        Ok(Order {
            suite: self.suite.clone(),
            sources: apt_sources(assets, &self.suite)?,
            packages: self.packages.clone(),
            size: SIZE,
            hostname: "lab".to_owned(),
            files: vec![
                text("/etc/fstab", ""),
                text("/etc/systemd/network/10-br0.netdev", BRIDGE),
                text("/etc/systemd/network/20-uplink.network", UPLINK),
                text("/etc/systemd/network/30-br0.network", ADDRESS),
                text("/etc/systemd/system/lab-agent.service", AGENT),
                text("/etc/profile.d/lab.sh", "PATH=$PATH:/data/bin\n"),
            ],
            links: [
                "serial-getty@ttyS0.service",
                "getty@tty1.service",
                "apt-daily.timer",
                "apt-daily-upgrade.timer",
                "dpkg-db-backup.timer",
                "e2scrub_all.timer",
                "e2scrub_reap.service",
                "fstrim.timer",
                "systemd-networkd-wait-online.service",
            ]
            .into_iter()
            .map(mask)
            .chain([(MODULES.to_owned(), "/data/modules".to_owned())])
            .collect(),
            units: vec![
                "systemd-networkd.service".to_owned(),
                "lab-agent.service".to_owned(),
            ],
            ..Order::default()
        })
    }
}

/// Where packages of a suite come from.
pub fn apt_sources(assets: &Assets, suite: &str) -> Result<Vec<sources::Source>> {
    let own = &assets.distribution().codename;
    Ok(sources::for_suite(&apt::machine_sources()?, own, suite))
}

/// An image in the cache, made at first use, and anew when it would be another
/// one.
pub fn cached_image(
    assets: &Assets,
    label: &str,
    order: &Order,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let name = format!("{label}-{}-{:08x}", order.suite, fingerprint(order));
    let file = |dir: &Path| dir.join("disk.img");
    let fill = |dir: &Path| make_image(label, order, &file(dir), progress);
    let dir = assets.filled(&name, progress, |dir| file(dir).is_file(), fill)?;
    Ok(file(&dir))
}

/// Makes an image, which is not there yet.
pub(crate) fn make_image(
    label: &str,
    order: &Order,
    image: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let tool = |program, package| Tool { program, package };
    let tools = [
        tool("mmdebstrap", "mmdebstrap"),
        tool("mke2fs", "e2fsprogs"),
    ];
    apt::ensure_tools(&tools, progress)?;
    let say = |text: &str| progress.step(&format!("{label} image: {text}"));
    let stop = AtomicBool::new(false);
    let watch = Watch {
        say: &say,
        stop: &stop,
    };
    let built = build::build(order, image, false, watch);
    built.map(drop).with_context(|| format!("no {label} image"))
}

impl FromStr for System {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let suite = match text {
            "debian12" => "bookworm",
            "debian13" => "trixie",
            other => other,
        };
        if suite.is_empty() || suite.starts_with('-') {
            bail!("'{text}' is no system: use debian12, debian13 or a suite of Debian");
        }
        Ok(Self::of_suite(suite))
    }
}

/// One number for all that is in an image.
pub(crate) fn fingerprint(order: &Order) -> u32 {
    number_of(&(CODE.concat() + &format!("{order:?}")))
}

/// One number for a text, by FNV-1a: the same in every release of the compiler.
pub(crate) fn number_of(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

const BRIDGE: &str = "[NetDev]\nName=br0\nKind=bridge\nMACAddress=52:54:00:6c:61:0f\n\n[Bridge]\nSTP=no\nForwardDelaySec=0\n";
const UPLINK: &str = "[Match]\nName=en* eth*\n\n[Network]\nBridge=br0\n";
const ADDRESS: &str = "[Match]\nName=br0\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nDNS=10.0.2.3\nLinkLocalAddressing=no\n";
/// It is not stopped when the system goes down, so that this can be watched.
/// What it starts is left alone when it ends.
const AGENT: &str = "[Unit]\nDescription=Agent of the lab\nDefaultDependencies=no\nAfter=local-fs.target systemd-tmpfiles-setup.service\nRequiresMountsFor=/data\n\n[Service]\nExecStart=/data/bin/lab-init system-agent\nEnvironment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/data/bin HOME=/root\nKillMode=process\nTasksMax=infinity\n\n[Install]\nWantedBy=sysinit.target\n";

/// The programs, where a host with a system finds them.
pub(crate) fn place_programs(binaries: &Binaries, tree: &Path) -> Result<()> {
    for program in std::iter::once(&binaries.init).chain(&binaries.product) {
        let name = program.file_name().context("a program without a name")?;
        disk::place(program, &tree.join("bin").join(name))?;
    }
    Ok(())
}

/// A kernel's modules, which udev and modprobe find by a link in the root.
pub(crate) fn place_modules(kernel: &Kernel, tree: &Path) -> Result<()> {
    match &kernel.modules {
        Some(from) => place_tree(from, &tree.join("modules").join(&kernel.release)),
        None => Ok(()),
    }
}

fn place_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        let to = to.join(entry.file_name());
        if kind.is_dir() {
            place_tree(&entry.path(), &to)?;
        } else if kind.is_file() {
            disk::place(&entry.path(), &to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_named_by_its_release_or_its_suite() {
        let of = |text: &str| text.parse::<System>().map(|s| s.suite);
        assert_eq!(of("debian12").expect("a name"), "bookworm");
        assert_eq!(of("unstable").expect("a suite"), "unstable");
        assert!(of("").is_err() && of("--x").is_err());
    }

    #[test]
    fn another_content_is_another_image() {
        let order = Order::default();
        let more = Order {
            packages: vec!["nginx-light".to_owned()],
            ..Order::default()
        };
        assert_eq!(fingerprint(&order), fingerprint(&Order::default()));
        assert_ne!(fingerprint(&order), fingerprint(&more));
    }
}
