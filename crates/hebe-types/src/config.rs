//! VM definitions, as an operator writes them in TOML.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::net::{NetConfig, NetError};
use crate::{ByteSize, CpuLimit, GRANULE, VmName};

/// Most vCPUs of one VM.
pub const VCPUS_MAX: u8 = 8;
/// Least RAM of one VM.
pub const MEMORY_MIN: ByteSize = ByteSize::mib(2);
/// Most RAM of one VM.
pub const MEMORY_MAX: ByteSize = ByteSize::gib(1024);
/// Most disks and NICs of one VM together; PCI slots bound it.
pub const DEVICES_MAX: usize = 24;
/// Most restarts in a row that a definition may ask for.
pub const RESTART_LIMIT_MAX: u32 = 1000;
/// Greatest weight of a VM among others.
pub const WEIGHT_MAX: u32 = 10_000;
/// Most VMs that one may be ordered after.
pub const AFTER_MAX: usize = 64;

/// Which store holds a VM's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// What the host offers: `devdax` where it has such a store, else `luo`
    /// where its kernel can carry memory over a kexec, else `memfd`.
    #[default]
    Auto,
    /// A reserved range of physical memory: outlives the host kernel.
    Devdax,
    /// Ordinary memory that Linux's Live Update Orchestrator carries into the
    /// next host kernel. Lives in the VMM process otherwise.
    Luo,
    /// Anonymous memory: outlives nothing but a VMM process.
    Memfd,
}

/// What a host reboot does to a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RebootMethod {
    /// Frozen in memory and resumed by the new kernel.
    #[default]
    Warm,
    /// Written to a file and restored from it.
    Saved,
    /// Shut down and booted again.
    Cold,
}

/// What a supervisor does with a VM that ended by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Nothing.
    #[default]
    Never,
    /// It is booted again if its VMM or its guest failed.
    OnFailure,
    /// It is booted again, also when its guest powered itself off.
    Always,
}

/// One VM, as its owner defines it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Unique on the host.
    pub name: VmName,
    /// Guest RAM; a multiple of 2 MiB.
    pub memory: ByteSize,
    /// 1 to 8.
    #[serde(default = "one")]
    pub vcpus: u8,
    /// Where guest RAM lives.
    #[serde(default)]
    pub store: StoreKind,
    /// Use 2 MiB huge pages for a `memfd` store; `auto` then is never `luo`.
    #[serde(default)]
    pub hugepages: bool,
    /// bzImage, or an ELF kernel with a PVH entry note. Without one the VM boots
    /// what the boot loader on its first disk would.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; where the kernel is the disk's, what is put behind
    /// that of the disk.
    #[serde(default)]
    pub cmdline: String,
    /// Start with the host.
    #[serde(default)]
    pub autostart: bool,
    /// What happens when it ends by itself. Meant for the daemon; the VMM knows
    /// nothing of it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub restart: RestartPolicy,
    /// How often in a row it is booted again, 1 to `RESTART_LIMIT_MAX`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_limit: Option<u32>,
    /// VMs that are started before this one when the host starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<VmName>,
    /// Its share of the processors where they are short, 1 to `WEIGHT_MAX`; 100
    /// unless said. Like all limits it is meant for the host; the VMM knows nothing
    /// of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// The most it gets of them; no limit unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<CpuLimit>,
    /// Its share of the disks where they are short, as `cpu_weight`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u32>,
    /// A real-time clock, as PCs have it.
    #[serde(default, skip_serializing_if = "is_off")]
    pub rtc: bool,
    /// A device by which the guest tells that its kernel panicked.
    #[serde(default, skip_serializing_if = "is_off")]
    pub pvpanic: bool,
    /// A number that changes when the guest goes on from a state that another
    /// copy of it may go on from, too.
    #[serde(default, skip_serializing_if = "is_off")]
    pub generation_id: bool,
    /// Serial port and virtio console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Sockets between host and guest; none unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// A balloon, by which the guest gives memory back; none unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Block devices, in order.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
    /// NICs, in order.
    #[serde(default, rename = "net")]
    pub nets: Vec<NetConfig>,
}

fn one() -> u8 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_off(flag: &bool) -> bool {
    !flag
}

fn is_default(policy: &RestartPolicy) -> bool {
    *policy == RestartPolicy::default()
}

/// Which consoles a VM has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// A 16550 serial port, `ttyS0` in the guest.
    pub serial: bool,
    /// A virtio console, `hvc0` in the guest.
    pub virtio: bool,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            serial: true,
            virtio: true,
        }
    }
}

/// Sockets between host and guest, without a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VsockConfig {
    /// The guest's context id, by which it knows itself; not seen outside, so
    /// that VMs may have the same. 3 to 4,294,967,294: 0 to 2 are the
    /// standard's own (virtio 1.2, 5.10.4).
    pub cid: u32,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self { cid: 3 }
    }
}

/// Memory that the guest does not need goes back to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// A guest that runs out of memory takes some back by itself.
    pub deflate_on_oom: bool,
    /// The guest reports memory that it freed, and the host takes it until the
    /// guest uses it again.
    pub reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            deflate_on_oom: true,
            reporting: true,
        }
    }
}

/// How a disk lies in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Byte for byte.
    #[default]
    Raw,
    /// In an image of QEMU's format.
    Qcow2,
}

fn is_raw(format: &DiskFormat) -> bool {
    *format == DiskFormat::Raw
}

/// A block device backed by a file or a block device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The backing file.
    pub path: PathBuf,
    /// The guest cannot write.
    #[serde(default)]
    pub readonly: bool,
    /// The disk stays as it is: what the guest writes is kept beside it, as long
    /// as the VM's life may go on. The host puts an image over it before a VMM
    /// sees it.
    #[serde(default, skip_serializing_if = "is_off")]
    pub snapshot: bool,
    /// Queues for the guest's requests, 1 to 8; without, one for each vCPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u8>,
    /// Never guessed from what is in the file, which is the guest's to write.
    #[serde(default, skip_serializing_if = "is_raw")]
    pub format: DiskFormat,
    /// The files behind a qcow2 image, the nearest first. What an image says of
    /// such files is not believed: only those named here are opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
}

impl DiskConfig {
    /// A raw disk.
    pub fn raw(path: PathBuf, readonly: bool) -> Self {
        Self {
            path,
            readonly,
            snapshot: false,
            queues: None,
            format: DiskFormat::Raw,
            backing: Vec::new(),
        }
    }
}

/// Why a definition is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// RAM size out of range or not a multiple of 2 MiB.
    #[error(
        "memory = \"{0}\" is not possible: it must be a multiple of 2MiB, from {MEMORY_MIN} to {MEMORY_MAX}"
    )]
    Memory(ByteSize),
    /// Linux does not carry huge-page memory.
    #[error(
        "store = \"luo\" and hugepages = true exclude each other: Linux carries no huge-page memory over a kexec"
    )]
    HugePagesCarried,
    /// vCPU count out of range.
    #[error("vcpus = {0} is not possible: a VM has 1 to {VCPUS_MAX}")]
    Vcpus(u8),
    /// A NIC's table.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Two disks share a file.
    #[error("disk '{0}' is named twice")]
    DiskTwice(PathBuf),
    /// Only images have files behind them.
    #[error("disk '{0}' has backing =, which goes with format = \"qcow2\"")]
    RawWithBacking(PathBuf),
    /// Nothing is written over what is not written to.
    #[error(
        "disk '{0}' has readonly = true and snapshot = true, which exclude each other: leave one out"
    )]
    SnapshotOfReadonly(PathBuf),
    /// Queues that no disk has.
    #[error(
        "disk '{path}' has queues = {queues}, which is not possible: it must be from 1 to {VCPUS_MAX}"
    )]
    Queues {
        /// Which disk.
        path: PathBuf,
        /// How many.
        queues: u8,
    },
    /// A chain that no sound disk has.
    #[error("disk '{0}' has more than 16 backing files")]
    BackingTooLong(PathBuf),
    /// Nothing to boot.
    #[error("it has neither a kernel nor a disk to boot from: give kernel = or a [[disk]]")]
    NothingToBoot,
    /// The initrd of a kernel that is not given.
    #[error("initrd = goes with kernel =: without that, both are taken from the first disk")]
    InitrdAlone,
    /// Too many devices.
    #[error("{0} disks and NICs are too many: at most {DEVICES_MAX} together")]
    Devices(usize),
    /// The command line does not fit.
    #[error("the kernel command line has {0} bytes: at most 2047")]
    Cmdline(usize),
    /// Restarts in a row out of range.
    #[error("restart_limit = {0} is not possible: it must be from 1 to {RESTART_LIMIT_MAX}")]
    RestartLimit(u32),
    /// A share out of range.
    #[error(
        "{key} = {weight} is not possible: it must be from 1 to {WEIGHT_MAX}, and 100 is what others have"
    )]
    Weight {
        /// Which one.
        key: &'static str,
        /// What was said.
        weight: u32,
    },
    /// A limit for what never happens.
    #[error(
        "restart_limit says nothing without restarts: say restart = \"on-failure\" or \"always\" too, or leave it out"
    )]
    RestartLimitAlone,
    /// A context id that is not the guest's to have.
    #[error("vsock.cid = {0} is not possible: it must be from 3 to 4294967294")]
    Cid(u32),
    /// A VM cannot wait for itself.
    #[error("after = [\"{0}\"] names the VM itself: leave it out")]
    AfterItself(VmName),
    /// A VM is named twice.
    #[error("after names VM '{0}' twice")]
    AfterTwice(VmName),
    /// Too many VMs to wait for.
    #[error("after names {0} VMs: at most {AFTER_MAX}")]
    After(usize),
}

impl VmConfig {
    /// What a definition means that says these two things alone.
    pub fn minimal(name: VmName, memory: ByteSize) -> Self {
        Self {
            name,
            memory,
            vcpus: one(),
            store: StoreKind::default(),
            hugepages: false,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            autostart: false,
            restart: RestartPolicy::default(),
            restart_limit: None,
            after: Vec::new(),
            cpu_weight: None,
            cpu_limit: None,
            io_weight: None,
            rtc: false,
            pvpanic: false,
            generation_id: false,
            console: ConsoleConfig::default(),
            vsock: None,
            balloon: None,
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }

    /// Every file of the host that it names.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let boot = self.kernel.iter_mut().chain(&mut self.initrd);
        let disks = self.disks.iter_mut();
        boot.chain(disks.flat_map(|disk| std::iter::once(&mut disk.path).chain(&mut disk.backing)))
    }

    /// Checks everything that can be checked without the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let memory = self.memory;
        if memory < MEMORY_MIN || memory > MEMORY_MAX || !memory.0.is_multiple_of(GRANULE) {
            return Err(ConfigError::Memory(memory));
        }
        if self.hugepages && self.store == StoreKind::Luo {
            return Err(ConfigError::HugePagesCarried);
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if self.cmdline.len() > 2047 {
            return Err(ConfigError::Cmdline(self.cmdline.len()));
        }
        if self.kernel.is_none() && self.initrd.is_some() {
            return Err(ConfigError::InitrdAlone);
        }
        if self.kernel.is_none() && self.disks.is_empty() {
            return Err(ConfigError::NothingToBoot);
        }
        let devices = self.disks.len() + self.nets.len();
        if devices > DEVICES_MAX {
            return Err(ConfigError::Devices(devices));
        }
        if let Some(VsockConfig { cid }) = self.vsock
            && !(3..u32::MAX).contains(&cid)
        {
            return Err(ConfigError::Cid(cid));
        }
        crate::net::validate(&self.nets)?;
        let mut disks = HashSet::new();
        for disk in &self.disks {
            if disk.format == DiskFormat::Raw && !disk.backing.is_empty() {
                return Err(ConfigError::RawWithBacking(disk.path.clone()));
            }
            if disk.readonly && disk.snapshot {
                return Err(ConfigError::SnapshotOfReadonly(disk.path.clone()));
            }
            if let Some(queues) = disk.queues
                && !(1..=VCPUS_MAX).contains(&queues)
            {
                let path = disk.path.clone();
                return Err(ConfigError::Queues { path, queues });
            }
            // With an image over it, the disk itself is one of them.
            if disk.backing.len() + usize::from(disk.snapshot) > 16 {
                return Err(ConfigError::BackingTooLong(disk.path.clone()));
            }
            if !disks.insert(&disk.path) {
                return Err(ConfigError::DiskTwice(disk.path.clone()));
            }
        }
        let weights = [
            ("cpu_weight", self.cpu_weight),
            ("io_weight", self.io_weight),
        ];
        for (key, weight) in weights {
            if let Some(weight) = weight.filter(|w| !(1..=WEIGHT_MAX).contains(w)) {
                return Err(ConfigError::Weight { key, weight });
            }
        }
        self.validate_supervision()
    }

    fn validate_supervision(&self) -> Result<(), ConfigError> {
        if let Some(limit) = self.restart_limit {
            if self.restart == RestartPolicy::Never {
                return Err(ConfigError::RestartLimitAlone);
            }
            if !(1..=RESTART_LIMIT_MAX).contains(&limit) {
                return Err(ConfigError::RestartLimit(limit));
            }
        }
        if self.after.len() > AFTER_MAX {
            return Err(ConfigError::After(self.after.len()));
        }
        let mut named = HashSet::new();
        for name in &self.after {
            if *name == self.name {
                return Err(ConfigError::AfterItself(name.clone()));
            }
            if !named.insert(name) {
                return Err(ConfigError::AfterTwice(name.clone()));
            }
        }
        Ok(())
    }

    /// The definition as its VMM needs it, without what is for the host alone:
    /// it becomes part of a VM's state, which other releases read too.
    pub fn for_vmm(&self) -> Self {
        Self {
            restart: RestartPolicy::default(),
            restart_limit: None,
            after: Vec::new(),
            cpu_weight: None,
            cpu_limit: None,
            io_weight: None,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> VmConfig {
        VmConfig {
            vcpus: 2,
            kernel: Some("/k".into()),
            disks: vec![DiskConfig::raw("/d".into(), false)],
            nets: vec![NetConfig::tap("tap0".into(), None)],
            ..VmConfig::minimal("web".parse().expect("name"), ByteSize::mib(256))
        }
    }

    #[test]
    fn a_minimal_one_is_what_two_lines_mean() {
        let text = "name = \"web\"\nmemory = \"256MiB\"\n";
        let read: VmConfig = toml::from_str(text).expect("a definition");
        let made = VmConfig::minimal("web".parse().expect("name"), ByteSize::mib(256));
        assert_eq!(read, made);
    }

    fn refused(change: fn(&mut VmConfig)) -> String {
        let mut config = sample();
        change(&mut config);
        config.validate().expect_err("must be refused").to_string()
    }

    #[test]
    fn every_file_that_is_named_is_found() {
        let mut config = sample();
        config.initrd = Some("/i".into());
        config.disks[0].backing = vec!["/b".into()];
        let names: Vec<_> = config.paths_mut().map(|path| path.clone()).collect();
        assert_eq!(names, ["/k", "/i", "/d", "/b"].map(PathBuf::from));
    }

    #[test]
    fn a_sane_definition_is_accepted() {
        assert_eq!(sample().validate(), Ok(()));
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        assert!(refused(|c| c.memory = ByteSize(0)).contains("memory"));
        assert!(refused(|c| c.memory = ByteSize((256 << 20) + 4096)).contains("memory"));
        assert!(refused(|c| (c.store, c.hugepages) = (StoreKind::Luo, true)).contains("hugepages"));
        assert!(refused(|c| c.vcpus = 9).contains("vcpus = 9"));
        for cid in [0, 2, u32::MAX] {
            let mut config = sample();
            config.vsock = Some(VsockConfig { cid });
            assert_eq!(config.validate(), Err(ConfigError::Cid(cid)));
        }
        assert!(refused(|c| c.vcpus = 0).contains("vcpus = 0"));
        assert!(refused(|c| c.nets[0].tap = "a/b".into()).contains("a/b"));
        assert!(refused(|c| c.nets.push(c.nets[0].clone())).contains("twice"));
        assert!(refused(|c| c.disks.push(c.disks[0].clone())).contains("twice"));
        assert!(refused(|c| c.disks[0].backing.push("/b".into())).contains("backing"));
        let both = |c: &mut VmConfig| (c.disks[0].readonly, c.disks[0].snapshot) = (true, true);
        assert!(refused(both).contains("snapshot = true"));
        assert!(refused(|c| c.disks[0].queues = Some(0)).contains("queues = 0"));
        assert!(refused(|c| c.disks[0].queues = Some(9)).contains("queues = 9"));
        let deep = |c: &mut VmConfig| {
            let disk = &mut c.disks[0];
            (disk.format, disk.snapshot) = (DiskFormat::Qcow2, true);
            disk.backing = vec!["/b".into(); 16];
        };
        assert!(refused(deep).contains("16 backing files"));
        assert!(refused(|c| c.cmdline = "x".repeat(3000)).contains("command line"));
        assert!(refused(|c| (c.kernel, c.disks) = (None, Vec::new())).contains("neither"));
        assert!(refused(|c| (c.kernel, c.initrd) = (None, Some("i".into()))).contains("initrd"));
    }

    #[test]
    fn sockets_are_off_unless_asked_for_and_leave_no_trace_then() {
        let off = toml::to_string(&sample()).expect("text");
        for key in [
            "snapshot",
            "queues",
            "vsock",
            "pvpanic",
            "generation_id",
            "balloon",
            "rtc",
        ] {
            assert!(!off.contains(key), "{off}");
        }
        let on = format!("{off}\n[vsock]\n");
        let config: VmConfig = toml::from_str(&on).expect("definition");
        assert_eq!(config.vsock, Some(VsockConfig { cid: 3 }));
        assert_eq!(config.for_vmm().vsock, config.vsock, "the VMM needs it");
        let text = toml::to_string(&config).expect("text");
        assert_eq!(toml::from_str::<VmConfig>(&text).as_ref(), Ok(&config));
    }

    #[test]
    fn a_balloon_is_there_only_if_asked_for() {
        let off = toml::to_string(&sample()).expect("text");
        let read = |more: &str| toml::from_str::<VmConfig>(&format!("{off}\n{more}"));
        let config = read("[balloon]\n").expect("definition");
        let both = BalloonConfig {
            deflate_on_oom: true,
            reporting: true,
        };
        assert_eq!(config.balloon, Some(both));
        assert_eq!(config.for_vmm().balloon, config.balloon);
        let text = toml::to_string(&config).expect("text");
        assert_eq!(toml::from_str::<VmConfig>(&text).as_ref(), Ok(&config));
        let config = read("[balloon]\nreporting = false\n").expect("definition");
        assert!(
            config
                .balloon
                .is_some_and(|b| b.deflate_on_oom && !b.reporting)
        );
        let unknown = read("[balloon]\ntarget = '1GiB'\n").expect_err("unknown key");
        assert!(unknown.to_string().contains("target"), "{unknown}");
    }

    #[test]
    fn a_disk_is_enough_to_boot_from() {
        let mut config = sample();
        config.kernel = None;
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn a_bad_order_of_supervision_is_refused() {
        assert!(refused(|c| c.restart_limit = Some(3)).contains("restart = "));
        let limited = |limit| {
            let mut config = sample();
            (config.restart, config.restart_limit) = (RestartPolicy::Always, Some(limit));
            config.validate()
        };
        assert_eq!(limited(0), Err(ConfigError::RestartLimit(0)));
        assert_eq!(limited(1001), Err(ConfigError::RestartLimit(1001)));
        assert_eq!(limited(1000), Ok(()));
        assert!(refused(|c| c.cpu_weight = Some(0)).contains("cpu_weight = 0"));
        assert!(refused(|c| c.io_weight = Some(10_001)).contains("io_weight"));
        assert!(refused(|c| c.after = vec![c.name.clone()]).contains("itself"));
        let name = |i: usize| format!("db{i}").parse::<VmName>().expect("name");
        let mut config = sample();
        config.after = vec![name(1), name(1)];
        assert_eq!(config.validate(), Err(ConfigError::AfterTwice(name(1))));
        config.after = (0..65).map(name).collect();
        assert_eq!(config.validate(), Err(ConfigError::After(65)));
    }

    #[test]
    fn what_is_for_the_host_alone_does_not_reach_the_vmm() {
        let mut config = sample();
        config.restart = RestartPolicy::OnFailure;
        config.restart_limit = Some(3);
        config.after = vec!["db".parse().expect("name")];
        (config.cpu_weight, config.io_weight) = (Some(200), Some(50));
        config.cpu_limit = "150%".parse().ok();
        assert_eq!(config.for_vmm(), sample());
    }
}
