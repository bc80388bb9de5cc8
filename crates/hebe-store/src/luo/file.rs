//! Small files in shared memory as [`Media`], by reading and writing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hebe_types::Extent;
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::io::{Errno, pread, pwrite};

use crate::StoreError;
use crate::media::Media;

/// A file that was made here, or arrived.
#[derive(Debug)]
pub(super) struct MemoryFile {
    fd: OwnedFd,
}

/// Makes a file of `len` zero bytes whose length is sealed.
pub(super) fn make(name: &str, len: u64) -> Result<OwnedFd, StoreError> {
    let failed = |e: Errno| StoreError::media("make")(e.into());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create(name, flags).map_err(failed)?;
    ftruncate(&fd, len).map_err(failed)?;
    seal(fd.as_fd())?;
    Ok(fd)
}

/// Seals the length of a file. An arrived one has its seals already, or, from
/// a kernel that did not carry them, cannot get any: then nobody but this
/// process and the VMM has it, and neither changes its length.
pub(super) fn seal(fd: BorrowedFd<'_>) -> Result<(), StoreError> {
    let length = SealFlags::SHRINK | SealFlags::GROW;
    if fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(length)) {
        return Ok(());
    }
    match fcntl_add_seals(fd, length | SealFlags::SEAL) {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(e) => Err(StoreError::media("seal")(e.into())),
    }
}

/// Length in bytes.
pub(super) fn len(fd: BorrowedFd<'_>) -> Result<u64, StoreError> {
    let stat = rustix::fs::fstat(fd).map_err(|e| StoreError::media("look at")(e.into()))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

impl MemoryFile {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Media for MemoryFile {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match pread(&self.fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match pwrite(&self.fd, &bytes[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Nothing of such a file is ever given back; it goes as a whole.
    fn scrub(&self, _extent: Extent) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Memory is coherent, and a kexec keeps it so.
    fn fence(&self) {}
}
