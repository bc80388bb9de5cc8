//! A VM's lock: whoever holds it owns the VM.
//!
//! The lock is an exclusive `flock(2)` on `vms/<name>/lock`. It belongs to the
//! open file, so it passes to the VMM together with the descriptor, and falls
//! when the last process that has it ends, however that ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// The file that is locked.
const LOCK: &str = "lock";
/// How long one who takes a lock waits for those who only look at it.
const LOOKERS_WAIT: Duration = Duration::from_secs(2);

/// The held lock of one VM.
#[derive(Debug)]
pub struct VmLock {
    file: File,
    dir: PathBuf,
    /// A VMM has it, too.
    shared: AtomicBool,
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
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir);
            match made {
                // It was there, and the holder before removed it that instant.
                Err(e) if e.kind() == ErrorKind::AlreadyExists && !is_no_dir(dir) => continue,
                other => other?,
            }
            let path = dir.join(LOCK);
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            let file = match opened {
                // The directory went between the two calls.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
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
                let shared = AtomicBool::new(false);
                return Ok(Some(Self { file, dir, shared }));
            }
        }
    }

    /// Whether somebody holds the lock of the VM whose directory is `dir`; also
    /// where that cannot be told ([`VmLock::look`]): a VM that may run counts as
    /// one that does. Does not create anything.
    pub fn is_held(dir: &Path) -> bool {
        Self::look(dir).unwrap_or(true)
    }

    /// [`VmLock::is_held`], where the difference matters.
    ///
    /// # Errors
    /// The lock cannot be looked at: this process may open no more files, for one.
    pub fn look(dir: &Path) -> io::Result<bool> {
        let file = match File::open(dir.join(LOCK)) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        // A shared lock, dropped at once with `file`: two lookers never see
        // each other as a holder.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// A second descriptor of the same lock, to be passed to the VMM.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.shared.store(true, Ordering::Relaxed);
        self.file.as_fd().try_clone_to_owned()
    }

    /// Removes the VM's directory and lets the lock go. The name of the lock goes
    /// last: once it is gone the next one may hold the VM, and nothing that it
    /// puts there is ours to remove.
    pub fn remove_dir(self) -> io::Result<()> {
        let gone = |removed: io::Result<()>| match removed {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        };
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name() == LOCK {
                continue;
            }
            let path = entry.path();
            gone(match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            })?;
        }
        gone(fs::remove_file(self.dir.join(LOCK)))?;
        match gone(fs::remove_dir(&self.dir)) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
            other => other,
        }
    }
}

/// A lock that was not shared is let go at once: a child that another thread
/// has forked and that has not called `execve` yet holds a duplicate of the
/// descriptor, and would keep the VM from the next one for that instant.
impl Drop for VmLock {
    fn drop(&mut self) {
        if !self.shared.load(Ordering::Relaxed) {
            // A held lock can be let go; the descriptor's end is the rest.
            let _ = flock(&self.file, FlockOperation::Unlock);
        }
    }
}

/// Something else has the directory's name.
fn is_no_dir(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|found| !found.is_dir())
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

    /// One who removes the directory takes nothing of the next one's along.
    #[test]
    fn what_a_holder_puts_there_stays_as_long_as_it_holds_the_lock() {
        const FILES: [&str; 4] = ["config.toml", "exit.json", "instance.json", "log"];
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("vms/web");
        let turns = |own: u8| {
            let mut left = 500;
            while left > 0 {
                let Some(lock) = VmLock::take(&dir).expect("io") else {
                    thread::yield_now();
                    continue;
                };
                for file in FILES {
                    fs::write(dir.join(file), [own]).expect("write");
                }
                thread::yield_now();
                for file in FILES {
                    let found = fs::read(dir.join(file)).ok();
                    assert_eq!(found, Some(vec![own]), "{file}, {left} turns left");
                }
                lock.remove_dir().expect("remove");
                left -= 1;
            }
        };
        thread::scope(|scope| {
            for own in 1..=4 {
                scope.spawn(move || turns(own));
            }
        });
        assert!(!dir.exists());
    }

    /// A loop of links stands for whatever keeps a process from opening a file.
    #[test]
    fn who_cannot_be_looked_at_counts_as_up() {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("vms/web");
        assert!(!VmLock::look(&dir).expect("nobody"));
        fs::create_dir_all(&dir).expect("mkdir");
        assert!(!VmLock::look(&dir).expect("nobody"));
        std::os::unix::fs::symlink(LOCK, dir.join(LOCK)).expect("link");
        assert!(VmLock::look(&dir).is_err() && VmLock::is_held(&dir));
        let file = root.path().join("file");
        fs::write(&file, "").expect("write");
        assert!(!VmLock::is_held(&file));
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
        // A child that another test has just forked may have it for an instant.
        let deadline = Instant::now() + Duration::from_secs(60);
        while VmLock::is_held(&dir) {
            assert!(Instant::now() < deadline, "nobody lets it go");
            thread::yield_now();
        }
        let lock = VmLock::take(&dir).expect("io").expect("free again");
        lock.remove_dir().expect("remove");
        assert!(!dir.exists());
    }

    /// As a child has one that was forked and has not called `execve` yet.
    #[test]
    fn a_duplicate_that_no_vmm_was_given_keeps_it_from_nobody() {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("vms/web");
        let lock = VmLock::take(&dir).expect("io").expect("free");
        let copy = lock.file.try_clone().expect("dup");
        drop(lock);
        assert!(!VmLock::is_held(&dir));
        assert!(VmLock::take(&dir).expect("io").is_some());
        drop(copy);
    }
}
