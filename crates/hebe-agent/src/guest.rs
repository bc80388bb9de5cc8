//! What the agent does to its guest.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::protocol::{Facts, is_phase};

/// Where the phase stands, in a directory that is empty after a boot.
pub const PHASE_FILE: &str = "/run/hebe-agent/phase";
/// The phase of a guest that says nothing of it.
const PHASE_UP: &str = "up";
/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` (<linux/fs.h>).
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// A guest, as the agent needs it.
pub trait Guest: Send + Sync {
    /// How it is; protocol and release are filled in elsewhere.
    fn facts(&self) -> Facts;
    /// Sets the wall clock; says how far it was ahead, in nanoseconds.
    ///
    /// # Errors
    /// What the system says.
    fn set_time(&self, realtime_ns: u64) -> io::Result<i64>;
    /// Freezes file systems for at most `time`; says how many.
    ///
    /// # Errors
    /// Why none is frozen.
    fn freeze(&self, time: Duration) -> Result<u32, String>;
    /// Thaws them; says how many.
    ///
    /// # Errors
    /// Why they are as they were.
    fn thaw(&self) -> Result<u32, String>;
    /// Begins to shut down.
    ///
    /// # Errors
    /// What the system says.
    fn shut_down(&self, reboot: bool) -> io::Result<()>;
}

/// File systems that are frozen.
#[derive(Debug, Default)]
struct Frozen {
    /// Of the freeze, so that a late end of one does not end the next.
    number: u64,
    mounts: Vec<File>,
}

/// The Linux that the agent runs in.
#[derive(Debug, Default)]
pub struct Linux {
    frozen: Arc<Mutex<Frozen>>,
}

fn lock(frozen: &Mutex<Frozen>) -> MutexGuard<'_, Frozen> {
    frozen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest for Linux {
    fn facts(&self) -> Facts {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let boot_id = text("/proc/sys/kernel/random/boot_id").trim().to_owned();
        let uptime = text("/proc/uptime");
        let uptime_s = uptime.split('.').next().and_then(|s| s.parse().ok());
        Facts {
            phase: phase(Path::new(PHASE_FILE)),
            boot_id,
            uptime_s: uptime_s.unwrap_or(0),
            frozen: !lock(&self.frozen).mounts.is_empty(),
            ..Facts::default()
        }
    }

    fn set_time(&self, realtime_ns: u64) -> io::Result<i64> {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Ten digits of seconds: no overflow.
        let wanted = libc::timespec {
            tv_sec: (realtime_ns / 1_000_000_000).cast_signed(),
            tv_nsec: (realtime_ns % 1_000_000_000).cast_signed(),
        };
        // SAFETY: both calls get a pointer to a live timespec.
        let set = unsafe {
            libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
            libc::clock_settime(libc::CLOCK_REALTIME, &raw const wanted)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        let was = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        let ahead = was - i128::from(realtime_ns);
        Ok(i64::try_from(ahead).unwrap_or(if ahead < 0 { i64::MIN } else { i64::MAX }))
    }

    fn freeze(&self, time: Duration) -> Result<u32, String> {
        let mut frozen = lock(&self.frozen);
        if !frozen.mounts.is_empty() {
            return Err("file systems are frozen already: thaw them first".into());
        }
        let table = fs::read_to_string("/proc/self/mountinfo");
        let table = table.map_err(|e| format!("mounts cannot be listed: {e}"))?;
        frozen.mounts = freeze_all(&mounts(&table))?;
        frozen.number += 1;
        let (count, number) = (frozen.mounts.len() as u32, frozen.number);
        let again = Arc::clone(&self.frozen);
        let late = thread::Builder::new().spawn(move || {
            thread::sleep(time);
            let mut frozen = lock(&again);
            if frozen.number == number {
                thaw_all(&mut frozen.mounts);
            }
        });
        if let Err(error) = late {
            thaw_all(&mut frozen.mounts);
            return Err(format!("nothing could thaw them in time: {error}"));
        }
        Ok(count)
    }

    fn thaw(&self) -> Result<u32, String> {
        let mut frozen = lock(&self.frozen);
        if frozen.mounts.is_empty() {
            return Err("no file system is frozen (any more)".into());
        }
        Ok(thaw_all(&mut frozen.mounts))
    }

    fn shut_down(&self, reboot: bool) -> io::Result<()> {
        let systemd = Path::new("/run/systemd/system").exists();
        let word = if reboot { "reboot" } else { "poweroff" };
        let mut command = if systemd {
            let mut command = Command::new("systemctl");
            command.arg(word);
            command
        } else {
            Command::new(word)
        };
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = quiet.status()?;
        if !status.success() {
            return Err(io::Error::other(format!("`{word}` ended with {status}")));
        }
        Ok(())
    }
}

/// The phase that stands in a file.
fn phase(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let text = text.trim();
    let text = if is_phase(text) { text } else { PHASE_UP };
    text.to_owned()
}

/// Notes the guest's phase, for `hebe-agent phase NAME`.
///
/// # Errors
/// If it is no phase, or cannot be noted.
pub fn set_phase(file: &Path, phase: &str) -> io::Result<()> {
    if !is_phase(phase) {
        let why = format!("'{phase}' is no phase: 1 to 64 of a-z, 0-9 and '-'");
        return Err(io::Error::other(why));
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    // Whole or not at all: the agent may read it now.
    let part = file.with_extension("part");
    fs::write(&part, phase)?;
    fs::rename(part, file)
}

/// Mount points of file systems on block devices that can be written to, each
/// once, those mounted last first (proc_pid_mountinfo(5)).
fn mounts(table: &str) -> Vec<PathBuf> {
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

fn freeze_all(points: &[PathBuf]) -> Result<Vec<File>, String> {
    // All are open before the first is frozen: opening may need another.
    let mut open = Vec::new();
    for point in points {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(point);
        // Hidden below another mount, or gone: not ours to freeze.
        open.extend(directory.ok().map(|file| (file, point)));
    }
    let mut frozen = Vec::new();
    for (file, point) in open {
        // SAFETY: FIFREEZE takes no argument.
        if unsafe { libc::ioctl(file.as_raw_fd(), FIFREEZE as _, 0) } == 0 {
            frozen.push(file);
            continue;
        }
        let error = io::Error::last_os_error();
        // It cannot be frozen, or somebody else froze it.
        if matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::EBUSY | libc::ENOTTY)
        ) {
            continue;
        }
        thaw_all(&mut frozen);
        return Err(format!("{} cannot be frozen: {error}", point.display()));
    }
    if frozen.is_empty() {
        return Err("there is no file system that can be frozen".into());
    }
    Ok(frozen)
}

/// Thaws in the opposite order; says how many.
fn thaw_all(mounts: &mut Vec<File>) -> u32 {
    let mut count = 0;
    while let Some(file) = mounts.pop() {
        // SAFETY: FITHAW takes no argument. It fails where somebody else
        // thawed the file system already.
        count += u32::from(unsafe { libc::ioctl(file.as_raw_fd(), FITHAW as _, 0) } == 0);
    }
    count
}

#[cfg(test)]
mod tests {
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
    fn a_phase_is_what_the_guest_says_if_it_is_one() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("run/phase");
        assert_eq!(phase(&file), "up");
        set_phase(&file, "ready").expect("set");
        assert_eq!(phase(&file), "ready");
        assert!(set_phase(&file, "no good").is_err());
        assert_eq!(phase(&file), "ready");
        fs::write(&file, "\x1b[31m").expect("write");
        assert_eq!(phase(&file), "up");
    }

    #[test]
    fn what_is_no_mount_point_is_not_frozen() {
        let refused = freeze_all(&["/no/such/mount".into()]).expect_err("nothing");
        assert!(refused.contains("no file system"), "{refused}");
    }

    #[test]
    fn thawing_what_is_not_frozen_is_refused() {
        let guest = Linux::default();
        assert!(
            guest
                .thaw()
                .is_err_and(|why| why.contains("no file system"))
        );
        let facts = guest.facts();
        assert!(!facts.frozen && !facts.boot_id.is_empty());
    }
}
