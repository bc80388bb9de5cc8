//! Advisory locks on whole files (`flock(2)`) and on ranges of them (open file
//! description locks, `fcntl_locking(2)`).
//!
//! Both belong to the open file description: a lock is shared with every
//! duplicate of the descriptor, in this process and in others, and ends when
//! the last of them, and the last mapping made through them, is gone. So a
//! process that maps a range, locks it and closes the descriptor holds the
//! lock exactly as long as it holds the mapping. Character devices have both
//! kinds, devdax included.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Takes the exclusive lock if it is free; `false` if another holds it.
///
/// # Errors
/// The system's, but for the lock being taken.
pub fn try_lock_exclusive(fd: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        match flock(fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// An exclusive `flock(2)` on a file, let go when this is dropped.
///
/// Closing the descriptor would not do: a child that another thread has forked
/// and that has not called `execve` yet holds a duplicate, and with it the
/// lock, for that instant. So nobody else may be given the file to hold on to.
#[derive(Debug)]
pub struct FileLock(File);

impl FileLock {
    /// Takes the lock of an open file; `None` if another holds it.
    ///
    /// # Errors
    /// The system's, but for the lock being taken.
    pub fn take(file: File) -> io::Result<Option<Self>> {
        Ok(try_lock_exclusive(file.as_fd())?.then_some(Self(file)))
    }

    /// Opens (or creates) a lock file and takes its lock; `None` if another
    /// holds it.
    ///
    /// # Errors
    /// The system's, but for the lock being taken.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        Self::take(options.open(path)?)
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // It cannot fail for a lock that is held; if it did, the last
        // descriptor's end would let go of it.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the exclusive lock on `len` bytes from `start` on; `false` if another
/// open file description has a lock in the range. The descriptor is open for
/// writing.
///
/// # Errors
/// The system's, but for the lock being taken.
pub fn try_lock_range(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<bool> {
    match ofd_lock(fd, libc::F_OFD_SETLK, libc::F_WRLCK, start, len) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives back what [`try_lock_range`] took.
///
/// # Errors
/// The system's.
pub fn unlock_range(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    ofd_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, start, len).map(drop)
}

/// Whether another open file description has a lock in the range.
///
/// # Errors
/// The system's.
pub fn is_range_locked(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<bool> {
    let found = ofd_lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, start, len)?;
    Ok(found != libc::F_UNLCK)
}

/// One call; gives the type of lock that the system wrote back.
fn ofd_lock(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    start: u64,
    len: u64,
) -> io::Result<libc::c_int> {
    let offset =
        |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    if len == 0 {
        // To the system that would be everything from `start` on.
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset(start)?,
        l_len: offset(len)?,
        // Must be 0 for locks of this kind.
        l_pid: 0,
    };
    loop {
        // SAFETY: the descriptor is open, and `lock` is a flock that outlives
        // the call, which writes to nothing else.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut lock) };
        if result >= 0 {
            return Ok(libc::c_int::from(lock.l_type));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> File {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.expect("open")
    }

    #[test]
    fn a_locked_range_lasts_as_long_as_its_mapping() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("store");
        File::create(&path)
            .expect("create")
            .set_len(8192)
            .expect("len");
        let (owner, other) = (open(&path), open(&path));
        assert!(try_lock_range(owner.as_fd(), 4096, 4096).expect("free"));
        assert!(!try_lock_range(other.as_fd(), 0, 4097).expect("overlaps"));
        assert!(is_range_locked(other.as_fd(), 8191, 1).expect("look"));
        assert!(!is_range_locked(other.as_fd(), 0, 4096).expect("look"));
        assert!(!is_range_locked(owner.as_fd(), 4096, 1).expect("its own"));
        let (prot, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, prot, flags, &owner, 4096) };
        let at = at.expect("map");
        drop(owner);
        assert!(!try_lock_range(other.as_fd(), 4096, 1).expect("still mapped"));
        // SAFETY: the mapping made above, which nothing points into.
        unsafe { rustix::mm::munmap(at, 4096) }.expect("unmap");
        assert!(try_lock_range(other.as_fd(), 4096, 1).expect("free"));
        unlock_range(other.as_fd(), 4096, 1).expect("unlock");
        assert!(!is_range_locked(open(&path).as_fd(), 0, 8192).expect("look"));
        let empty = try_lock_range(other.as_fd(), 0, 0).expect_err("no range");
        assert_eq!(empty.kind(), io::ErrorKind::InvalidInput);
    }

    /// Stores are such devices.
    #[test]
    fn character_devices_have_range_locks_too() {
        let (one, other) = (open(Path::new("/dev/null")), open(Path::new("/dev/null")));
        let start = u64::from(std::process::id()) << 21;
        assert!(try_lock_range(one.as_fd(), start, 4096).expect("free"));
        assert!(!try_lock_range(other.as_fd(), start, 4096).expect("taken"));
        drop(one);
        assert!(try_lock_range(other.as_fd(), start, 4096).expect("free"));
    }

    /// As a child has one that was forked and has not called `execve` yet.
    #[test]
    fn one_holder_at_a_time_and_no_duplicate_keeps_it() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("lock");
        let held = FileLock::open(&path).expect("open").expect("free");
        assert!(FileLock::open(&path).expect("open").is_none());
        let copy = held.0.try_clone().expect("dup");
        drop(held);
        assert!(FileLock::open(&path).expect("open").is_some());
        drop(copy);
        assert!(FileLock::open(&path).expect("open").is_some());
    }
}
