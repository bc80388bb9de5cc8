//! Guest RAM as this crate sees it.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;

use hebe_types::Gpa;

use crate::format::PAGE;

/// One range of guest RAM to be saved.
#[derive(Clone, Copy)]
pub struct RamView<'a> {
    pub(crate) gpa: Gpa,
    pub(crate) bytes: &'a [u8],
    used: Option<&'a UsedRun<'a>>,
}

/// Of guest RAM from an address on, so many bytes: the first run that has
/// memory, if any. The rest is zeros that nobody has to read.
pub type UsedRun<'a> = dyn Fn(Gpa, u64) -> Option<(Gpa, u64)> + 'a;

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
        Self {
            gpa,
            bytes,
            used: None,
        }
    }

    /// The same, of which only what `used` tells is read: reading what a guest
    /// gave back would take memory for it again.
    #[must_use]
    pub fn with_holes(self, used: &'a UsedRun<'a>) -> Self {
        Self {
            used: Some(used),
            ..self
        }
    }

    /// The runs of a chunk that are to be read, in order.
    pub(crate) fn runs(&self, chunk: Range<usize>) -> Vec<Range<usize>> {
        let Some(used) = self.used else {
            let whole = 0..chunk.len();
            return std::iter::once(whole).collect();
        };
        let page = PAGE as usize;
        let (mut runs, mut at) = (Vec::new(), chunk.start);
        while at < chunk.end {
            let from = Gpa(self.gpa.0 + at as u64);
            let Some((start, len)) = used(from, (chunk.end - at) as u64) else {
                break;
            };
            let start = (start.0.saturating_sub(self.gpa.0) as usize).max(at) / page * page;
            let end = start.saturating_add(len as usize).next_multiple_of(page);
            let end = end.min(chunk.end);
            // A run that leads nowhere ends it: what is left is read.
            if start >= chunk.end || end <= at {
                runs.push(at - chunk.start..chunk.len());
                break;
            }
            runs.push(start - chunk.start..end - chunk.start);
            at = end;
        }
        runs
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
        Self::from_slice(gpa, bytes)
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
