//! Which VMMs the kernel ended for want of memory, by its own log.
//!
//! A group's `memory.events` counts that too, but systemd removes a scope with its
//! last process, and Hebe a group of its own with the next order; and who was ended
//! for the whole host's sake stands in neither. The log (Linux,
//! Documentation/ABI/testing/dev-kmsg) is there with every PID 1, holds what
//! was said since the boot, as far as there is room, and takes words in the kernel's
//! name from nobody.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const LOG: &str = "/dev/kmsg";
/// Longest record, in bytes (`PRINTK_MESSAGE_MAX` is 2048, `CONSOLE_EXT_LOG_MAX`,
/// as of Linux 6.1, 8192).
const RECORD_MAX: usize = 8192;
/// Most records that are read: the largest log has room for some millions of
/// them, and usual ones for thousands.
const RECORDS_MAX: usize = 1 << 20;
/// Process of a VM's VMM, in its directory.
const PID_FILE: &str = "pid";

/// Whose memory was at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfMemory {
    /// That of the VMM's control group.
    Group,
    /// That of the host.
    Host,
}

impl OutOfMemory {
    /// What an operator should know of a VMM that is gone.
    pub fn words(self) -> &'static str {
        match self {
            Self::Group => {
                "ended by the kernel: out of the memory that its control group allows, which no VMM needs: its guest may have broken into it, or this is a fault of Hebe; start it again, and where it happens again look at `hebe show` for what it takes"
            }
            Self::Host => {
                "ended by the kernel: the host was out of memory; give its VMs less or the host more, and start it again"
            }
        }
    }
}

/// Notes the process of a VMM that was started for the VM with this directory.
/// Without it the VM runs as well.
pub(crate) fn note(dir: &Path, pid: u32) {
    let _ = fs::write(dir.join(PID_FILE), pid.to_string());
}

/// Forgets that of the VMM before.
///
/// # Errors
/// It is still there.
pub(crate) fn forget(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(PID_FILE)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The process of the last VMM of the VM with this directory.
pub(crate) fn noted(dir: &Path) -> Option<u32> {
    let text = fs::read_to_string(dir.join(PID_FILE)).ok()?;
    text.trim().parse().ok()
}

/// Whether the kernel ended this process for want of memory; `None` also where that
/// cannot be told.
pub(crate) fn look(pid: u32) -> Option<OutOfMemory> {
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    look_in(options.open(LOG).ok()?, pid)
}

/// One record a read. The last word about the process counts.
fn look_in(mut log: impl Read, pid: u32) -> Option<OutOfMemory> {
    let mut buffer = [0; RECORD_MAX];
    let mut found = None;
    for _ in 0..RECORDS_MAX {
        match log.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                let record = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default());
                found = of_record(&record, pid).or(found);
            }
            // It was overwritten meanwhile; or longer than any.
            Err(e) if is_skipped(&e) => {}
            // All was read.
            Err(_) => break,
        }
    }
    found
}

fn is_skipped(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::PIPE | Errno::INVAL | Errno::INTR))
}

/// `PRIORITY,SEQUENCE,TIME,FLAGS[,…];TEXT`, and the text as mm/oom_kill.c prints it
/// (`__oom_kill_process`, the same from Linux 5.0 to 7.0): `Memory cgroup out of
/// memory: Killed process 42 (hebe-vmm) total-vm:…`, without the first two words
/// where the host was out of memory. What stands behind the number is not the
/// kernel's.
fn of_record(record: &str, pid: u32) -> Option<OutOfMemory> {
    let (head, text) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    // Above the level is the facility: 0 is the kernel, and nobody else can be it.
    (priority >> 3 == 0).then_some(())?;
    let (why, rest) = text.split_once(": Killed process ")?;
    let of: u32 = rest.split(' ').next()?.parse().ok()?;
    (of == pid).then_some(())?;
    if why == "Memory cgroup out of memory" {
        Some(OutOfMemory::Group)
    } else {
        why.starts_with("Out of memory")
            .then_some(OutOfMemory::Host)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// As Linux says it.
    const GROUP: &str = "3,846,91712042,-;Memory cgroup out of memory: Killed process 42 (hebe-vmm) total-vm:270964kB, anon-rss:1536kB, file-rss:2176kB, shmem-rss:4kB, UID:995 pgtables:100kB oom_score_adj:0\n SUBSYSTEM=x\n";
    const HOST: &str = "3,900,99712042,-;Out of memory: Killed process 43 (hebe-vmm) total-vm:270964kB, anon-rss:1536kB\n";

    /// A log gives one record a read, and fails where one is not there any more.
    struct Log(VecDeque<Result<String, rustix::io::Errno>>);

    impl Read for Log {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let record = self
                .0
                .pop_front()
                .unwrap_or(Err(rustix::io::Errno::AGAIN))?;
            buffer[..record.len()].copy_from_slice(record.as_bytes());
            Ok(record.len())
        }
    }

    #[test]
    fn the_kernel_says_whom_it_ended_and_why() {
        let log = || {
            Log(VecDeque::from([
                Ok("6,1,0,-;Linux version 6.1\n".to_owned()),
                Err(rustix::io::Errno::PIPE),
                Ok(GROUP.to_owned()),
                Ok(HOST.to_owned()),
                Ok("no record".to_owned()),
            ]))
        };
        assert_eq!(look_in(log(), 42), Some(OutOfMemory::Group));
        assert_eq!(look_in(log(), 43), Some(OutOfMemory::Host));
        for other in [4, 2, 420, 0] {
            assert_eq!(look_in(log(), other), None, "{other}");
        }
    }

    #[test]
    fn nobody_else_is_believed() {
        // Written by a process: another facility.
        let forged = GROUP.replacen("3,", "11,", 1);
        assert_eq!(of_record(&forged, 42), None);
        // A process that is called so.
        let called = GROUP.replace("hebe-vmm", "x: Killed process 7 (");
        assert_eq!(of_record(&called, 7), None);
        assert_eq!(of_record(&called, 42), Some(OutOfMemory::Group));
        // Systems that are asked to by hand, and other words.
        let other = "3,1,2,-;Something else: Killed process 42 (hebe-vmm)";
        assert_eq!(of_record(other, 42), None);
    }

    #[test]
    fn the_process_is_that_of_the_last_vmm() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(noted(dir.path()), None);
        forget(dir.path()).expect("nothing to be forgotten");
        note(dir.path(), 42);
        assert_eq!(noted(dir.path()), Some(42));
        forget(dir.path()).expect("forgotten");
        assert_eq!(noted(dir.path()), None);
    }

    /// The real one, where it may be read; this process lives.
    #[test]
    fn the_kernels_own_log_is_read_to_its_end() {
        assert_eq!(look(std::process::id()), None);
    }
}
