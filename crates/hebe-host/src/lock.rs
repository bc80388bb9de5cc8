//! A VM's lock: whoever holds it owns the VM.
//!
//! The lock is an exclusive `flock(2)` on `vms/<name>/lock`. It belongs to the
//! open file, so it passes to the VMM together with the descriptor, and falls
//! when the last process that has it ends, however that ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// How long one who takes a lock waits for those who only look at it.
const LOOKERS_WAIT: Duration = Duration::from_millis(200);

/// The held lock of one VM.
#[derive(Debug)]
pub struct VmLock {
    file: File,
    dir: PathBuf,
}

impl VmLock {
    /// Takes the lock of the VM whose directory is `dir`, creating the
    /// directory. `None` when somebody else holds it.
    pub fn take(dir: &Path) -> io::Result<Option<Self>> {
        Self::take_as(dir, Kind::Exclusive, LOOKERS_WAIT)
    }

    /// Takes the lock together with others that do so; `None` when somebody
    /// holds it alone.
    pub fn take_shared(dir: &Path) -> io::Result<Option<Self>> {
        Self::take_as(dir, Kind::Shared, LOOKERS_WAIT)
    }

    /// [`VmLock::take`], which waits for those who share the lock, and not for
    /// one who holds it alone.
    pub fn take_from_sharers(dir: &Path, wait: Duration) -> io::Result<Option<Self>> {
        Self::take_as(dir, Kind::Exclusive, wait)
    }

    fn take_as(dir: &Path, kind: Kind, wait: Duration) -> io::Result<Option<Self>> {
        let began = Instant::now();
        loop {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
            let path = dir.join("lock");
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            let file = match opened {
                // The directory went between the two calls.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if !acquire(&file, kind, began + wait)? {
                return Ok(None);
            }
            // The holder before may have removed the directory: a lock on a
            // file that no longer has the name protects nothing.
            let inode = file.metadata()?.ino();
            if fs::metadata(&path).is_ok_and(|m| m.ino() == inode) {
                let dir = dir.to_owned();
                return Ok(Some(Self { file, dir }));
            }
        }
    }

    /// Whether somebody holds the lock of the VM whose directory is `dir`.
    /// Does not create anything.
    pub fn is_held(dir: &Path) -> bool {
        let Ok(file) = File::open(dir.join("lock")) else {
            return false;
        };
        // A shared lock, dropped at once with `file`: two lookers never see
        // each other as a holder.
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// A second descriptor of the same lock, to be passed to the VMM.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Removes the VM's directory and lets the lock go.
    pub fn remove_dir(self) -> io::Result<()> {
        fs::remove_dir_all(&self.dir)
    }
}

/// Alone, or together with others of this kind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exclusive,
    Shared,
}

/// False when somebody else holds the lock alone, or when others still share
/// it at `deadline`. A process that looks whether a lock is held shares it for
/// an instant, and is no holder.
fn acquire(file: &File, kind: Kind, deadline: Instant) -> io::Result<bool> {
    let try_lock = |operation| match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(io::Error::from(e)),
    };
    if kind == Kind::Shared {
        return try_lock(FlockOperation::NonBlockingLockShared);
    }
    let mut pause = Duration::from_micros(200);
    loop {
        if try_lock(FlockOperation::NonBlockingLockExclusive)? {
            return Ok(true);
        }
        if !try_lock(FlockOperation::NonBlockingLockShared)? {
            return Ok(false);
        }
        flock(file, FlockOperation::Unlock)?;
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_looker_of_an_instant_does_not_keep_the_lock_from_anybody() {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("vms/web");
        drop(VmLock::take(&dir).expect("io").expect("free"));
        let looker = VmLock::take_shared(&dir).expect("io").expect("free");
        assert!(VmLock::take_shared(&dir).expect("io").is_some());
        assert!(VmLock::take(&dir).expect("io").is_none(), "it stays");
        let end = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            drop(looker);
        });
        let lock = VmLock::take(&dir).expect("io").expect("after the looker");
        end.join().expect("join");
        assert!(VmLock::take_shared(&dir).expect("io").is_none());
        drop(lock);
    }

    #[test]
    fn one_holder_at_a_time_and_lookers_do_not_count() {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("vms/web");
        assert!(!VmLock::is_held(&dir));
        let lock = VmLock::take(&dir).expect("io").expect("free");
        assert!(VmLock::is_held(&dir));
        assert!(VmLock::take(&dir).expect("io").is_none());
        let shared = lock.share().expect("share");
        drop(lock);
        assert!(VmLock::is_held(&dir), "the VMM's copy keeps it");
        drop(shared);
        assert!(!VmLock::is_held(&dir));
        let lock = VmLock::take(&dir).expect("io").expect("free again");
        lock.remove_dir().expect("remove");
        assert!(!dir.exists());
    }
}
