//! Guest RAM as this crate sees it.

use std::fmt;
use std::ptr::NonNull;

use hebe_types::Gpa;

/// One range of guest RAM to be saved.
#[derive(Clone, Copy)]
pub struct RamView<'a> {
    pub(crate) gpa: Gpa,
    pub(crate) bytes: &'a [u8],
}

/// One range of guest RAM to be loaded into. It must read as zero: pages of
/// zeros are neither stored nor written, so that a fresh segment gets only the
/// memory that its VM used.
pub struct RamViewMut<'a> {
    pub(crate) gpa: Gpa,
    pub(crate) bytes: &'a mut [u8],
}

impl<'a> RamView<'a> {
    /// Guest RAM that is ordinary memory of this process.
    pub fn from_slice(gpa: Gpa, bytes: &'a [u8]) -> Self {
        Self { gpa, bytes }
    }

    /// Guest RAM that is mapped at `host`.
    ///
    /// # Safety
    /// For the lifetime `'a`, `host` is valid for reads of `len` bytes and
    /// nobody writes them: the VM's vCPUs are stopped, its devices drained, and
    /// no other process writes its segment.
    pub unsafe fn new(gpa: Gpa, host: NonNull<u8>, len: u64) -> Self {
        // SAFETY: the caller's promise is what a shared slice needs.
        let bytes = unsafe { std::slice::from_raw_parts(host.as_ptr(), len as usize) };
        Self { gpa, bytes }
    }
}

impl<'a> RamViewMut<'a> {
    /// Guest RAM that is ordinary memory of this process; reads as zero.
    pub fn from_slice(gpa: Gpa, bytes: &'a mut [u8]) -> Self {
        Self { gpa, bytes }
    }

    /// Guest RAM that is mapped at `host`; reads as zero.
    ///
    /// # Safety
    /// For the lifetime `'a`, `host` is valid for reads and writes of `len`
    /// bytes and nobody else reads or writes them: the VM does not run yet.
    pub unsafe fn new(gpa: Gpa, host: NonNull<u8>, len: u64) -> Self {
        // SAFETY: the caller's promise is what an exclusive slice needs.
        let bytes = unsafe { std::slice::from_raw_parts_mut(host.as_ptr(), len as usize) };
        Self { gpa, bytes }
    }
}

impl fmt::Debug for RamView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamView({:#x}+{:#x})", self.gpa.0, self.bytes.len())
    }
}

impl fmt::Debug for RamViewMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamViewMut({:#x}+{:#x})", self.gpa.0, self.bytes.len())
    }
}
