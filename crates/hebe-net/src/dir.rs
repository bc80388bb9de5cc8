//! Files of the run directory, reached from its descriptor: a helper that began
//! in an initramfs has no names for anything once the host's own root file
//! system took over (`switch_root(8)`), but the directory is the same.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir as Entries, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest file that is read, in bytes.
const LEN_MAX: u64 = 1 << 20;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir(OwnedFd);

impl Dir {
    /// Opens `path`, made if absent.
    pub(crate) fn make(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens a directory in it, made if absent; others cannot look into it.
    pub(crate) fn sub(&self, name: &str) -> io::Result<Self> {
        match rustix::fs::mkdirat(&self.0, name, Mode::RWXU) {
            Err(e) if e != Errno::EXIST => return Err(e.into()),
            _ => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.0, name, flags, Mode::empty())?;
        Ok(Self(opened))
    }

    pub(crate) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match rustix::fs::openat(&self.0, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => File::from(opened?),
        };
        let mut bytes = Vec::new();
        file.take(LEN_MAX).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        let bytes = self.read(name)?;
        Ok(bytes.map(|b| serde_json::from_slice(&b)).transpose()?)
    }

    /// Whole or not at all; not durable, for it describes what runs.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let fresh = format!("{name}.new");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.0, &fresh, flags, Mode::RUSR | Mode::WUSR)?;
        File::from(opened).write_all(bytes)?;
        Ok(rustix::fs::renameat(&self.0, &fresh, &self.0, name)?)
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        self.write(name, &serde_json::to_vec(value)?)
    }

    pub(crate) fn append(&self, name: &str, text: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.0, name, flags, Mode::RUSR | Mode::WUSR)?;
        File::from(opened).write_all(text.as_bytes())
    }

    /// An absent file is fine.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            Err(e) if e != Errno::NOENT => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// The names in it that end so, without the ending.
    pub(crate) fn names(&self, ending: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Entries::read_from(&self.0)? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok();
            names.extend(name.and_then(|n| n.strip_suffix(ending)).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// A file to be locked, made if absent.
    pub(crate) fn lock_file(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::openat(&self.0, name, flags, mode)?)
    }

    /// Whether somebody holds the lock of a file alone. Makes nothing.
    pub(crate) fn is_locked(&self, name: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(&self.0, name, flags, Mode::empty()) else {
            return false;
        };
        // Shared and let go with the descriptor: lookers do not see each other.
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }
}

/// Takes a lock alone; `None` when somebody has it and it is not waited for.
pub(crate) fn take(file: OwnedFd, wait: bool) -> io::Result<Option<OwnedFd>> {
    let how = match wait {
        true => FlockOperation::LockExclusive,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        match flock(&file, how) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_whole_and_locks_are_seen() {
        let root = tempfile::tempdir().expect("dir");
        let dir = Dir::make(&root.path().join("run")).expect("made");
        let sub = dir.sub("net").expect("made");
        assert_eq!(sub.read("a.json").expect("absent"), None);
        sub.write_json("a.json", &vec![1, 2]).expect("written");
        sub.write_json("a.json", &vec![3]).expect("written anew");
        assert_eq!(sub.read_json("a.json").expect("read"), Some(vec![3]));
        assert_eq!(
            dir.sub("net")
                .and_then(|d| d.names(".json"))
                .expect("names"),
            ["a"]
        );
        sub.remove("a.json").expect("removed");
        sub.remove("a.json").expect("gone already");
        assert!(!dir.is_locked("lock"));
        let held = take(dir.lock_file("lock").expect("made"), false).expect("io");
        assert!(held.is_some() && dir.is_locked("lock"));
        let second = take(dir.lock_file("lock").expect("there"), false).expect("io");
        assert!(second.is_none());
        drop(held);
        assert!(!dir.is_locked("lock"));
    }
}
