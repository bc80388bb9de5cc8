//! Disks that this host uses itself.
//!
//! A block device that is mounted here while a VM runs with it has two writers,
//! of which neither knows of the other; and one that was mounted while its VM
//! stood still is not what that VM's memory holds, which nothing else shows. So
//! such a VM is neither booted nor continued.
//!
//! A file system may lie on the device itself, on a partition of it, on the disk
//! that it is a partition of, or on a volume or array that is made of any of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hebe_types::DiskConfig;

/// Most devices that are looked at below one: volumes lie on volumes.
const BELOW_MAX: usize = 256;

/// Refuses disks of which one is to be written to, and is mounted here or swapped to.
///
/// # Errors
/// Which one, and the way out.
pub(crate) fn refuse_mounted(disks: &[DiskConfig]) -> Result<(), String> {
    let written = disks.iter().filter(|d| !d.readonly && !d.snapshot);
    let devices: Vec<(&PathBuf, Device)> = written
        .filter_map(|disk| Some((&disk.path, Device::at(&disk.path)?)))
        .collect();
    if devices.is_empty() {
        return Ok(());
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut used = mounts(&read("/proc/self/mountinfo"));
    used.extend(swaps(&read("/proc/swaps")));
    let sysfs = Path::new("/sys");
    for (path, disk) in devices {
        if let Some(used) = used.iter().find(|used| used.is_on(disk, sysfs)) {
            return Err(format!(
                "its disk {} is used by this host, which writes to it, too ({}): let go of it first; of a VM that stood still meanwhile its memory may not fit what is there any more",
                path.display(),
                used.how
            ));
        }
    }
    Ok(())
}

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Device {
    major: u32,
    minor: u32,
}

impl Device {
    fn at(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        found.file_type().is_block_device().then(|| Self {
            major: rustix::fs::major(found.rdev()),
            minor: rustix::fs::minor(found.rdev()),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    fn folder(self, sysfs: &Path) -> PathBuf {
        sysfs.join(format!("dev/block/{}:{}", self.major, self.minor))
    }

    /// The disk that it is a partition of.
    fn whole(self, sysfs: &Path) -> Option<Self> {
        let folder = fs::canonicalize(self.folder(sysfs)).ok()?;
        let disk = folder
            .parent()
            .filter(|_| folder.join("partition").exists())?;
        Self::parse(&fs::read_to_string(disk.join("dev")).ok()?)
    }

    /// It, and every device that it lies on.
    fn below(self, sysfs: &Path) -> BTreeSet<Self> {
        let (mut found, mut open) = (BTreeSet::new(), vec![self]);
        while let Some(device) = open.pop() {
            if found.len() == BELOW_MAX || !found.insert(device) {
                continue;
            }
            open.extend(device.whole(sysfs));
            let parts = fs::read_dir(device.folder(sysfs).join("slaves"));
            for part in parts.into_iter().flatten().flatten() {
                let number = fs::read_to_string(part.path().join("dev"));
                open.extend(number.ok().and_then(|text| Self::parse(&text)));
            }
        }
        found
    }
}

/// A use that this host makes of a device.
#[derive(Debug, PartialEq, Eq)]
struct Used {
    device: Device,
    how: String,
}

impl Used {
    fn is_on(&self, disk: Device, sysfs: &Path) -> bool {
        self.device.below(sysfs).contains(&disk) || disk.whole(sysfs) == Some(self.device)
    }
}

/// Of proc_pid_mountinfo(5). A file system of several devices has a number that is
/// none of theirs (major 0), and names one of them.
fn mounts(text: &str) -> Vec<Used> {
    let parse = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let (number, at) = (Device::parse(mount.get(2)?)?, mount.get(4)?);
        let source = Path::new(kind.split(' ').nth(1)?);
        let named = || source.is_absolute().then(|| Device::at(source))?;
        let device = Some(number).filter(|n| n.major != 0).or_else(named)?;
        let how = format!("mounted at {at}");
        Some(Used { device, how })
    };
    text.lines().filter_map(parse).collect()
}

/// Of proc_swaps(5).
fn swaps(text: &str) -> Vec<Used> {
    let parse = |line: &str| {
        let device = Device::at(Path::new(line.split_whitespace().next()?))?;
        let how = "swapped to".to_owned();
        Some(Used { device, how })
    };
    text.lines().skip(1).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn device(text: &str) -> Device {
        Device::parse(text).expect("a number")
    }

    /// `sda` with two partitions, and a volume on the second.
    fn sysfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("dir");
        let numbers = root.path().join("dev/block");
        fs::create_dir_all(&numbers).expect("mkdir");
        for (name, number, is_part) in [
            ("sda", "8:0", false),
            ("sda/sda1", "8:1", true),
            ("sda/sda2", "8:2", true),
            ("dm-0", "253:0", false),
        ] {
            let folder = root.path().join("devices").join(name);
            fs::create_dir_all(folder.join("slaves")).expect("mkdir");
            fs::write(folder.join("dev"), format!("{number}\n")).expect("number");
            if is_part {
                fs::write(folder.join("partition"), "1\n").expect("partition");
            }
            symlink(folder, numbers.join(number)).expect("link");
        }
        let devices = root.path().join("devices");
        symlink(devices.join("sda/sda2"), devices.join("dm-0/slaves/sda2")).expect("link");
        root
    }

    #[test]
    fn what_lies_on_a_disk_or_below_it_uses_it() {
        let root = sysfs();
        let used = |number: &str, disk: &str| {
            let device = device(number);
            let how = String::new();
            Used { device, how }.is_on(self::device(disk), root.path())
        };
        for (number, disk, is_on) in [
            ("8:0", "8:0", true),
            // A partition, and a volume on one.
            ("8:1", "8:0", true),
            ("253:0", "8:0", true),
            ("253:0", "8:2", true),
            // The whole disk of a partition.
            ("8:0", "8:1", true),
            // Beside it.
            ("8:1", "8:2", false),
            ("253:0", "8:1", false),
            ("8:16", "8:0", false),
        ] {
            assert_eq!(used(number, disk), is_on, "{number} {disk}");
        }
    }

    #[test]
    fn mounts_are_read_as_the_kernel_writes_them() {
        let text = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            36 22 8:1 /sub /mnt/a\\040b rw master:1 - xfs /dev/sda1 rw\n\
            23 22 0:21 / /proc rw - proc proc rw\n\
            24 22 0:40 / /srv rw - btrfs /dev/null rw\n\
            nonsense\n";
        let all = mounts(text);
        let found: Vec<(Device, &str)> = all.iter().map(|u| (u.device, u.how.as_str())).collect();
        let wanted = [
            (device("254:0"), "mounted at /"),
            (device("8:1"), "mounted at /mnt/a\\040b"),
        ];
        assert_eq!(found, wanted, "/dev/null is no block device");
        assert_eq!(swaps("Filename Type\n/dev/null partition 1 0 -2\n"), []);
    }
}
