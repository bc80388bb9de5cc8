//! Freezes and thaws file systems.
//!
//! A freeze outlasts whoever did it: what an agent that died left frozen is
//! thawed by [`thaw_left`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` (<linux/fs.h>).
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// What is done to a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Freeze,
    Thaw,
}

/// Who does it: the kernel, or a test in its place.
pub(crate) type Control = dyn Fn(&File, Act) -> io::Result<()> + Send + Sync;

pub(crate) fn kernel(file: &File, act: Act) -> io::Result<()> {
    let request = match act {
        Act::Freeze => FIFREEZE,
        Act::Thaw => FITHAW,
    };
    // SAFETY: neither takes an argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Thaws every file system that the agent could have frozen, and says how many
/// were frozen: for an agent that begins, or after one that ended.
///
/// # Errors
/// If mounts cannot be listed, or one cannot be thawed; the others are all the
/// same.
pub fn thaw_left() -> Result<u32, String> {
    thaw_mounts(&mounts(&table()?), &kernel)
}

fn thaw_mounts(points: &[PathBuf], control: &Control) -> Result<u32, String> {
    let (mut count, mut failed) = (0, None);
    // In the opposite order of their freeze.
    for (file, point) in open_all(points).into_iter().rev() {
        match control(&file, Act::Thaw) {
            Ok(()) => count += 1,
            // It is not frozen, or cannot be.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY)
                ) => {}
            Err(e) => failed = Some(format!("{} cannot be thawed: {e}", point.display())),
        }
    }
    failed.map_or(Ok(count), Err)
}

/// The table of mounts.
pub(crate) fn table() -> Result<String, String> {
    let table = fs::read_to_string("/proc/self/mountinfo");
    table.map_err(|e| format!("mounts cannot be listed: {e}"))
}

/// Mount points of file systems on block devices that can be written to, each
/// once, those mounted last first (proc_pid_mountinfo(5)).
pub(crate) fn mounts(table: &str) -> Vec<PathBuf> {
    let mut devices = Vec::new();
    let mut found = Vec::new();
    for line in table.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (Some(device), Some(point)) = (before.get(2), before.get(4)) else {
            continue;
        };
        let (Some(source), Some(options)) = (after.get(1), after.get(2)) else {
            continue;
        };
        let writable = options.split(',').any(|o| o == "rw");
        if source.starts_with("/dev/") && writable && !devices.contains(device) {
            devices.push(*device);
            found.push(unescaped(point));
        }
    }
    found.reverse();
    found
}

/// A path in which the kernel wrote spaces and others as `\040`.
fn unescaped(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let octal = octal.and_then(|t| std::str::from_utf8(t).ok());
        match octal.and_then(|t| u8::from_str_radix(t, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn open_all(points: &[PathBuf]) -> Vec<(File, &PathBuf)> {
    let mut open = Vec::new();
    for point in points {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(point);
        // Hidden below another mount, or gone: not ours to freeze.
        open.extend(directory.ok().map(|file| (file, point)));
    }
    open
}

pub(crate) fn freeze_all(points: &[PathBuf], control: &Control) -> Result<Vec<File>, String> {
    let mut frozen = Vec::new();
    // All are open before the first is frozen: opening may need another.
    for (file, point) in open_all(points) {
        let Err(error) = control(&file, Act::Freeze) else {
            frozen.push(file);
            continue;
        };
        // It cannot be frozen, or somebody else froze it.
        if matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::EBUSY | libc::ENOTTY)
        ) {
            continue;
        }
        thaw_all(&mut frozen, control);
        return Err(format!("{} cannot be frozen: {error}", point.display()));
    }
    if frozen.is_empty() {
        return Err("there is no file system that can be frozen".into());
    }
    Ok(frozen)
}

/// Thaws in the opposite order; says how many.
pub(crate) fn thaw_all(mounts: &mut Vec<File>, control: &Control) -> u32 {
    let mut count = 0;
    while let Some(file) = mounts.pop() {
        // Fails where somebody else thawed the file system already.
        count += u32::from(control(&file, Act::Thaw).is_ok());
    }
    count
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn only_writable_file_systems_on_devices_are_frozen_and_each_once() {
        let table = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:5 / /proc rw,nosuid - proc proc rw
24 22 254:16 / /mnt/with\\040space\\134 rw - xfs /dev/vdb rw,attr2
25 22 254:1 /sub /bind rw - ext4 /dev/vda1 rw
26 22 254:32 / /cd ro - iso9660 /dev/vdc ro
27 22 254:48 / /ro rw - ext4 /dev/vdd ro,errors=rw-not
nonsense
28 22 - x";
        let wanted = ["/mnt/with space\\", "/"].map(PathBuf::from);
        assert_eq!(mounts(table), wanted);
        assert_eq!(mounts(""), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_is_no_mount_point_is_not_frozen() {
        let refused = freeze_all(&["/no/such/mount".into()], &kernel).expect_err("nothing");
        assert!(refused.contains("no file system"), "{refused}");
    }

    fn inode(file: &File) -> u64 {
        file.metadata().expect("metadata").ino()
    }

    #[test]
    fn what_another_agent_left_frozen_is_thawed_and_the_rest_is_as_it_was() {
        let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().expect("dir")).collect();
        let mut points: Vec<PathBuf> = dirs.iter().map(|d| d.path().into()).collect();
        points.push("/no/such/mount".into());
        let inodes: Vec<u64> = points[..4]
            .iter()
            .map(|point| inode(&File::open(point).expect("open")))
            .collect();
        let said = [0, libc::EINVAL, libc::EIO, 0];
        let tried = Arc::new(Mutex::new(Vec::new()));
        let (seen, known) = (Arc::clone(&tried), inodes.clone());
        let fake = move |file: &File, act| {
            let at = known.iter().position(|known| *known == inode(file));
            let at = at.expect("a mount");
            seen.lock().expect("seen").push((at, act));
            match said[at] {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        };
        assert_eq!(thaw_mounts(&points[..2], &fake), Ok(1));
        let failed = thaw_mounts(&points, &fake).expect_err("one is broken");
        assert!(failed.contains(&*points[2].to_string_lossy()), "{failed}");
        let tried = tried.lock().expect("tried");
        let wanted = [1, 0, 3, 2, 1, 0].map(|at| (at, Act::Thaw));
        assert_eq!(*tried, wanted);
    }
}
