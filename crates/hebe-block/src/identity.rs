//! Which disk it is, and whether somebody wrote to it meanwhile.
//!
//! A suspended VM's memory holds what its disks held: file systems, caches,
//! requests that were answered. With another disk, or with the same one
//! written to by others, it destroys what is there. So the state says which
//! disk it was, and what it is resumed with must be that one.
//!
//! Only what outlives a reload of the host kernel can say so. Device numbers
//! do not, of file systems nor of disks; a file's inode number does, and so
//! does the time of its last change once it is synced with the data. The time
//! of the last change of the *inode* is left out: it moves with rights, names
//! and links, which are the operator's business. Hebe itself changes neither
//! between suspend and resume: opening, locking and reading do not.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hebe_state::v2::devices::{DiskFileV2, DiskIdentityV2};

/// Where sysfs is.
pub(crate) const SYSFS: &str = "/sys";

/// What may tell a block device from another one, by falling stability.
const ID_ATTRIBUTES: [&str; 6] = [
    "dm/uuid",
    "wwid",
    "device/wwid",
    "serial",
    "device/serial",
    "loop/backing_file",
];

/// How a disk differs from the one that was saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskChange {
    /// A file became a device, or the other way round.
    #[error("it was a {saved} and is a {found}")]
    Kind {
        /// What it was.
        saved: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// Another inode.
    #[error("another file lies there")]
    OtherFile,
    /// The same inode with other contents.
    #[error("it was written to, or its time was set")]
    Written,
    /// Another block device.
    #[error("it was the device {saved} and is {}", found.as_deref().unwrap_or("one without an id"))]
    OtherDevice {
        /// Its id in the state.
        saved: String,
        /// Its id now, if it has one.
        found: Option<String>,
    },
}

/// How the disk `found` differs from the `saved` one; `None` where nothing
/// shows that it does.
pub fn disk_change(saved: &DiskIdentityV2, found: &DiskIdentityV2) -> Option<DiskChange> {
    use DiskIdentityV2::{Chain, Device, File};
    match (saved, found) {
        (Chain { files }, Chain { files: now }) => {
            let others = |(a, b): (&DiskFileV2, &DiskFileV2)| a.inode != b.inode;
            if files.len() != now.len() || files.iter().zip(now).any(others) {
                return Some(DiskChange::OtherFile);
            }
            (files != now).then_some(DiskChange::Written)
        }
        (File { inode, .. }, File { inode: now, .. }) if inode != now => {
            Some(DiskChange::OtherFile)
        }
        (File { .. }, File { .. }) => (saved != found).then_some(DiskChange::Written),
        // A newer kernel may know an id that the older one did not.
        (Device { id: None }, Device { .. }) => None,
        (Device { id: Some(saved) }, Device { id: found }) => {
            (found.as_ref() != Some(saved)).then(|| DiskChange::OtherDevice {
                saved: saved.clone(),
                found: found.clone(),
            })
        }
        _ => Some(DiskChange::Kind {
            saved: kind(saved),
            found: kind(found),
        }),
    }
}

fn kind(identity: &DiskIdentityV2) -> &'static str {
    match identity {
        DiskIdentityV2::File { .. } => "file",
        DiskIdentityV2::Device { .. } => "block device",
        DiskIdentityV2::Chain { .. } => "qcow2 image",
    }
}

/// Of a regular file, from what the system says of it now.
pub(crate) fn of_file(metadata: &Metadata) -> DiskIdentityV2 {
    DiskIdentityV2::File {
        inode: metadata.ino(),
        mtime_s: metadata.mtime(),
        // Always below 10^9.
        mtime_ns: metadata.mtime_nsec() as u32,
    }
}

/// Of a file of a chain.
pub(crate) fn link(metadata: &Metadata) -> DiskFileV2 {
    DiskFileV2 {
        inode: metadata.ino(),
        mtime_s: metadata.mtime(),
        // Always below 10^9.
        mtime_ns: metadata.mtime_nsec() as u32,
    }
}

/// Of a block device, from sysfs; `None` for anything else.
pub(crate) fn of_device(metadata: &Metadata, sysfs: &Path) -> Option<DiskIdentityV2> {
    if !metadata.file_type().is_block_device() {
        return None;
    }
    let (major, minor) = (
        rustix::fs::major(metadata.rdev()),
        rustix::fs::minor(metadata.rdev()),
    );
    let entry = sysfs.join(format!("dev/block/{major}:{minor}"));
    let id = fs::canonicalize(entry).ok().and_then(|dir| device_id(&dir));
    Some(DiskIdentityV2::Device { id })
}

/// The first attribute that is there and says something, with its name; for a
/// partition that of its disk, and where on it the partition begins.
fn device_id(dir: &Path) -> Option<String> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let text = text.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    if dir.join("partition").exists() {
        let disk = device_id(dir.parent()?)?;
        return Some(format!("{disk} from sector {}", read(dir.join("start"))?));
    }
    ID_ATTRIBUTES.iter().find_map(|name| {
        let text = read(dir.join(name))?;
        Some(format!("{name}={text}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_what_its_driver_says() {
        let sysfs = tempfile::tempdir().expect("dir");
        let disk = sysfs.path().join("sda");
        let put = |name: &str, text: &str| {
            let path = disk.join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("dir");
            fs::write(path, text).expect("write");
        };
        fs::create_dir(&disk).expect("dir");
        assert_eq!(device_id(&disk), None);
        put("serial", "\n");
        put("part/partition", "1\n");
        put("part/start", "2048\n");
        let part = disk.join("part");
        assert_eq!((device_id(&disk), device_id(&part)), (None, None));
        put("serial", " 4711 \n");
        assert_eq!(device_id(&disk).as_deref(), Some("serial=4711"));
        put("device/wwid", "naa.5000\n");
        let (disk, part) = (device_id(&disk), device_id(&part));
        assert_eq!(disk.as_deref(), Some("device/wwid=naa.5000"));
        let wanted = "device/wwid=naa.5000 from sector 2048";
        assert_eq!(part.as_deref(), Some(wanted));
    }

    #[test]
    fn only_the_same_disk_as_it_was_left_is_the_same() {
        let file = |inode, mtime_s, mtime_ns| DiskIdentityV2::File {
            inode,
            mtime_s,
            mtime_ns,
        };
        let device = |id: Option<&str>| DiskIdentityV2::Device {
            id: id.map(str::to_owned),
        };
        let saved = file(7, 100, 5);
        assert_eq!(disk_change(&saved, &saved), None);
        let change = |found| disk_change(&saved, &found);
        assert_eq!(change(file(8, 100, 5)), Some(DiskChange::OtherFile));
        for written in [file(7, 101, 5), file(7, 100, 6), file(7, 99, 5)] {
            assert_eq!(change(written), Some(DiskChange::Written));
        }
        let kind = change(device(None)).expect("a change").to_string();
        assert_eq!(kind, "it was a file and is a block device");
        for (was, is, same) in [
            (None, None, true),
            (None, Some("a"), true),
            (Some("a"), Some("a"), true),
            (Some("a"), Some("b"), false),
            (Some("a"), None, false),
        ] {
            let change = disk_change(&device(was), &device(is));
            assert_eq!(change.is_none(), same, "{was:?} {is:?}: {change:?}");
        }
    }
}
