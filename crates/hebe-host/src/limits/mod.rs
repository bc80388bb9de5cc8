//! What a VMM may take of its host, so that one which its guest has taken over
//! exhausts nothing: a control group of its own with limits.
//!
//! Where systemd is PID 1 that is the VMM's scope ([`crate::systemd`]), and a
//! group directly below the mount of control groups elsewhere (module `groups`).
//!
//! A limit must never end a VM that behaves, so each is far from what a VMM
//! needs:
//!
//! - **Memory.** Charged to a VMM is guest RAM that is no reserved memory, what its
//!   kernel side needs for it (page tables, 1/512 of it for each mapping in small
//!   pages; KVM's tables for a guest that runs guests itself, which KVM bounds at
//!   1/50), its own few MiB, and the page cache of its disks. The last is reclaimed
//!   at a limit. What it writes into a file system in memory is not, so that is added.
//!   Beyond RAM a VMM has 1 GiB and an eighth of RAM. From the half of that on the
//!   kernel reclaims and slows it down (`memory.high`); only at its end, which
//!   page cache therefore does not reach, it is killed (`memory.max`).
//! - **Tasks.** A VMM has [`TASKS_MOST`] threads at most, and may have [`TASKS_MAX`].
//! - **Processors and disks.** No limit and the weight of everybody, unless the VM's
//!   definition says otherwise. It is read anew for each VMM.

pub(crate) mod groups;
pub(crate) mod killed;

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use hebe_sys::ring::WORKERS_MAX;
use hebe_types::{
    ByteSize, CpuLimit, DEVICES_MAX, DiskConfig, DiskFormat, VCPUS_MAX, VmConfig, counted,
};
use serde::Serialize;

use crate::definitions;
use crate::host::Host;
use crate::launch::{Launch, Memory, Origin};
use crate::network::life;

pub use killed::OutOfMemory;

/// Threads of a VMM at most: its vCPUs, one for each disk and NIC and for four other
/// devices, 32 control connections, four that serve all, and two that KVM has it
/// start.
pub const TASKS_MOST: u64 = VCPUS_MAX as u64 + DEVICES_MAX as u64 + 4 + 32 + 4 + 2;
/// Threads that it may have.
pub const TASKS_MAX: u64 = 256;
const _: () = assert!(TASKS_MAX >= 3 * TASKS_MOST);
/// Those that the kernel may start for disks' reads come on top.
const _: () = assert!(TASKS_MAX >= TASKS_MOST + DEVICES_MAX as u64 * WORKERS_MAX as u64);

/// What a passt may take: it has some 31 MiB and a socket for each connection of its
/// guest, whose buffers are charged to it, and one thread.
const PASST_HIGH: ByteSize = ByteSize::mib(512);
const PASST_MAX: ByteSize = ByteSize::gib(1);
const PASST_TASKS: u64 = 32;

/// Room for what is not guest RAM.
const ROOM: ByteSize = ByteSize::gib(1);

/// What one VMM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory; `None` where what it needs is not known.
    pub memory: Option<MemoryLimits>,
    /// Threads.
    pub tasks: u64,
    /// Share of the processors, 100 being everybody's; `None`: that.
    pub cpu_weight: Option<u32>,
    /// Most time of processors.
    pub cpu_limit: Option<CpuLimit>,
    /// Share of the disks, as `cpu_weight`.
    pub io_weight: Option<u32>,
}

/// How much memory one VMM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Beyond this it is reclaimed from, and slowed down.
    pub high: ByteSize,
    /// Beyond this it is ended, where nothing can be reclaimed. As much may be
    /// swapped out.
    pub max: ByteSize,
}

impl MemoryLimits {
    /// Of a VM with so much RAM, of which so much is charged to its VMM besides
    /// `extra` for what it may write into memory.
    fn new(ram: ByteSize, charged: ByteSize, extra: ByteSize) -> Self {
        let room = ROOM.0.saturating_add(ram.0 / 8);
        let base = charged.0.saturating_add(extra.0);
        Self {
            high: ByteSize(base.saturating_add(room / 2)),
            max: ByteSize(base.saturating_add(room)),
        }
    }
}

impl Limits {
    /// Of the process that carries a VM's own network.
    pub(crate) fn of_passt() -> Self {
        Self {
            memory: Some(MemoryLimits {
                high: PASST_HIGH,
                max: PASST_MAX,
            }),
            tasks: PASST_TASKS,
            cpu_weight: None,
            cpu_limit: None,
            io_weight: None,
        }
    }

    /// Of the VMM that `order` starts.
    pub(crate) fn of(host: &Host, order: &Launch) -> Self {
        // As booted, for what it has; as defined now, for what it gets.
        let (booted, defined) = match &order.origin {
            Origin::Boot(config) => (Some((**config).clone()), Some((**config).clone())),
            Origin::Frozen | Origin::File(_) => (
                life(&host.layout, &order.name, order.vm),
                definitions::load(&host.layout, &order.name)
                    .ok()
                    .map(|d| d.1),
            ),
        };
        let charged = match &order.memory {
            Memory::Segment { .. } => ByteSize(0),
            Memory::Files { .. } | Memory::Memfd => order.size,
        };
        let disks = booted.or_else(|| defined.clone()).map(|c| c.disks);
        let extra = disks.and_then(|disks| in_memory(host, order.size, &disks));
        let said = defined.as_ref();
        Self {
            memory: extra.map(|extra| MemoryLimits::new(order.size, charged, extra)),
            tasks: TASKS_MAX,
            cpu_weight: said.and_then(|c: &VmConfig| c.cpu_weight),
            cpu_limit: said.and_then(|c| c.cpu_limit),
            io_weight: said.and_then(|c| c.io_weight),
        }
    }
}

/// How much of what a VMM writes may come to lie in memory: its saved file, and
/// its disks. `None` where that cannot be told.
fn in_memory(host: &Host, ram: ByteSize, disks: &[DiskConfig]) -> Option<ByteSize> {
    let mut bytes = 0u64;
    if host.system.is_volatile(&host.layout.state).ok()? {
        bytes = bytes.saturating_add(ram.0);
    }
    for disk in disks.iter().filter(|disk| !disk.readonly) {
        let meta = fs::metadata(&disk.path).ok()?;
        let most = if meta.file_type().is_block_device() {
            most_behind(host, meta.rdev())?
        } else if host
            .system
            .is_volatile(&fs::canonicalize(&disk.path).ok()?)
            .ok()?
        {
            most_of(disk)?
        } else {
            0
        };
        bytes = bytes.saturating_add(most);
    }
    Some(ByteSize(bytes))
}

/// What a block device may write into memory: where it is a loop device, its file.
fn most_behind(host: &Host, device: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("/sys/dev/block/{major}:{minor}/loop/backing_file");
    let Ok(file) = fs::read_to_string(file) else {
        return Some(0);
    };
    let file = PathBuf::from(file.trim_end());
    match host.system.is_volatile(&file).ok()? {
        true => Some(fs::metadata(&file).ok()?.len()),
        false => Some(0),
    }
}

/// How large a disk's file may become.
fn most_of(disk: &DiskConfig) -> Option<u64> {
    let mut file = File::open(&disk.path).ok()?;
    let len = file.metadata().ok()?.len();
    if disk.format == DiskFormat::Raw {
        return Some(len);
    }
    // "QFI\xfb", and at byte 24 the size that the guest sees, big-endian (QEMU,
    // docs/interop/qcow2.txt).
    let mut head = [0; 32];
    file.read_exact(&mut head).ok()?;
    let mut size = [0; 8];
    size.copy_from_slice(&head[24..]);
    let size = u64::from_be_bytes(size);
    let grown = size.saturating_add(size / 64);
    head.starts_with(b"QFI\xfb").then_some(len.max(grown))
}

/// The control group that a VMM is in, and what holds there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GroupView {
    /// Its path below the mount of control groups.
    pub path: String,
    /// Most memory, in bytes; `None`: no limit.
    pub memory_max: Option<u64>,
    /// Memory charged to it, in bytes, where the kernel counts.
    pub memory_now: Option<u64>,
    /// Most threads; `None`: no limit.
    pub tasks_max: Option<u64>,
    /// Most time of processors, in percent of one; `None`: no limit.
    pub cpu_percent: Option<u64>,
    /// Share of the processors, where it is counted.
    pub cpu_weight: Option<u64>,
}

impl GroupView {
    /// Whether a VMM there can exhaust neither the host's memory nor its tasks.
    pub fn is_limited(&self) -> bool {
        self.memory_max.is_some() && self.tasks_max.is_some()
    }
}

impl fmt::Display for GroupView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        match self.memory_max {
            Some(max) => write!(f, "{} of memory", mib(max))?,
            None => f.write_str("NO LIMIT of memory")?,
        }
        if let Some(now) = self.memory_now {
            write!(f, " ({} now)", mib(now))?;
        }
        match self.tasks_max {
            Some(max) => write!(f, ", {}", counted(max, "thread"))?,
            None => f.write_str(", NO LIMIT of threads")?,
        }
        if let Some(percent) = self.cpu_percent {
            write!(f, ", {percent}% of a processor")?;
        }
        if let Some(weight) = self.cpu_weight {
            write!(f, ", weight {weight}")?;
        }
        write!(f, " (in {})", self.path)
    }
}

/// What holds of a process, as the kernel says.
///
/// # Errors
/// It cannot be told, and why.
pub fn look(pid: u32) -> Result<GroupView, String> {
    let mount = groups::mount()?;
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    groups::look(&mount, &text)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::system::Machine;

    #[test]
    fn a_vmm_has_generous_room_beside_its_ram() {
        let (gib, none) = (ByteSize::gib, ByteSize(0));
        let small = MemoryLimits::new(ByteSize::mib(128), ByteSize::mib(128), none);
        assert_eq!(small.max, ByteSize((1024 + 128 + 16) << 20));
        assert_eq!(small.high, ByteSize((512 + 128 + 8) << 20));
        // What KVM may take for a guest that runs guests is below the first limit.
        for ram in [gib(1), gib(64), gib(1024)] {
            let limits = MemoryLimits::new(ram, ram, none);
            assert!(limits.high.0 > ram.0 + ram.0 / 50 + 2 * (ram.0 / 512));
            assert!(limits.max > limits.high);
        }
        // In reserved memory nothing of its RAM is charged to it.
        let apart = MemoryLimits::new(gib(64), none, none);
        assert_eq!(apart.max, gib(9));
        let disk = MemoryLimits::new(gib(1), gib(1), gib(20));
        assert!(disk.high > gib(21));
        let huge = MemoryLimits::new(ByteSize(u64::MAX), ByteSize(u64::MAX), none);
        assert_eq!(huge.max, ByteSize(u64::MAX));
    }

    #[test]
    fn a_disk_in_memory_is_added_with_all_that_it_may_become() {
        let dir = tempfile::tempdir().expect("dir");
        let raw = dir.path().join("raw");
        File::create(&raw)
            .and_then(|f| f.set_len(3 << 20))
            .expect("raw");
        let disk = DiskConfig::raw(raw, false);
        assert_eq!(most_of(&disk), Some(3 << 20));
        let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
        image.resize(24, 0);
        image.extend((640u64 << 20).to_be_bytes());
        let path = dir.path().join("image");
        fs::write(&path, &image).expect("image");
        let mut disk = DiskConfig::raw(path.clone(), false);
        disk.format = DiskFormat::Qcow2;
        assert_eq!(most_of(&disk), Some(650 << 20));
        fs::write(&path, "short").expect("image");
        assert_eq!(most_of(&disk), None, "no limit is better than a wrong one");
        let mut host = Host::here();
        host.layout = crate::host::Layout::below(dir.path());
        host.system = Arc::new(Machine::default());
        let volatile = host.system.is_volatile(dir.path()).expect("statfs");
        let unknown = in_memory(&host, ByteSize(1), std::slice::from_ref(&disk));
        assert_eq!(unknown.is_none(), volatile);
        disk.readonly = true;
        let saved = in_memory(&host, ByteSize(1), &[disk]).expect("known");
        assert!(saved.0 <= 1);
    }

    #[test]
    fn what_holds_is_told_in_words() {
        let mut view = GroupView {
            path: "/hebe/web".into(),
            ..GroupView::default()
        };
        let words = view.to_string();
        assert!(
            !view.is_limited() && words.contains("NO LIMIT of memory"),
            "{words}"
        );
        view.memory_max = Some(1 << 30);
        view.tasks_max = Some(256);
        view.cpu_percent = Some(150);
        let expected = "1024 MiB of memory, 256 threads, 150% of a processor (in /hebe/web)";
        assert_eq!(view.to_string(), expected);
        assert!(view.is_limited());
    }
}
