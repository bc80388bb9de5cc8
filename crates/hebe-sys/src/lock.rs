//! Advisory locks on whole files (`flock(2)`).
//!
//! Such a lock belongs to the open file description: it is shared with every
//! duplicate of the descriptor, in this process and in others, and ends when
//! the last of them, and the last mapping made through them, is gone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
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

/// Opens (or creates) a lock file and takes its lock; `None` if another holds
/// it. The lock lasts as long as the file that is returned and its duplicates.
///
/// # Errors
/// The system's, but for the lock being taken.
pub fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path)?;
    Ok(try_lock_exclusive(file.as_fd())?.then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_duplicates_share_it() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("lock");
        let held = lock_file(&path).expect("open").expect("free");
        assert!(lock_file(&path).expect("open").is_none());
        let copy = held.try_clone().expect("dup");
        drop(held);
        assert!(lock_file(&path).expect("the duplicate holds it").is_none());
        drop(copy);
        assert!(lock_file(&path).expect("open").is_some());
    }
}
