//! Memory mappings of a store: the one place with raw pointers.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use hebe_types::{Extent, GRANULE};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::media::Media;

const LINE: usize = 64;
const PAGE: usize = 4096;

/// An owned stretch of address space, aligned to 2 MiB and a multiple of it
/// long, in which extents of a store are mapped. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Mapping` owns its address space and hands out no references into
// it; its accessors copy through raw pointers, which any thread may do.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent accessors at most tear each other's copies,
// which every reader of this crate checks for.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of address space (a multiple of 2 MiB) that fault
    /// until extents are mapped into it.
    pub(crate) fn reserve(len: u64) -> io::Result<Self> {
        let too_long = || io::Error::from(io::ErrorKind::OutOfMemory);
        let granule = GRANULE as usize;
        let len = usize::try_from(len).map_err(|_| too_long())?;
        debug_assert!(len > 0 && len.is_multiple_of(granule));
        let padded = len.checked_add(granule).ok_or_else(too_long)?;
        // SAFETY: a new private mapping at an address the kernel chooses; it
        // replaces nothing.
        let raw = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                padded,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let before = raw.addr().wrapping_neg() % granule;
        let start = raw.wrapping_byte_add(before);
        let after = padded - before - len;
        // SAFETY: both stretches are inside the mapping made above, which
        // nobody else knows of, and outside [start, start + len).
        unsafe {
            if before > 0 {
                munmap(raw, before)?;
            }
            if after > 0 {
                munmap(start.wrapping_byte_add(len), after)?;
            }
        }
        let start = NonNull::new(start.cast()).ok_or_else(too_long)?;
        Ok(Self { start, len })
    }

    /// Maps one extent of `fd`, shared, at `offset` of this stretch.
    pub(crate) fn place(
        &self,
        offset: u64,
        fd: BorrowedFd<'_>,
        extent: Extent,
        writable: bool,
    ) -> io::Result<()> {
        let fits = offset
            .checked_add(extent.len)
            .is_some_and(|end| end <= self.len as u64);
        if !fits || !offset.is_multiple_of(GRANULE) || !extent.len.is_multiple_of(GRANULE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let prot = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: MAP_FIXED replaces pages inside this stretch only (checked
        // above), which is ours and which no reference points into.
        unsafe {
            let at = self.start.as_ptr().add(offset as usize);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            mmap(
                at.cast(),
                extent.len as usize,
                prot,
                flags,
                fd,
                extent.offset,
            )?;
        }
        Ok(())
    }

    /// One extent of `fd`, alone.
    pub(crate) fn of(fd: BorrowedFd<'_>, extent: Extent, writable: bool) -> io::Result<Self> {
        let mapping = Self::reserve(extent.len)?;
        mapping.place(0, fd, extent, writable)?;
        mapping.advise(Advice::LinuxDontFork)?;
        mapping.advise(Advice::LinuxDontDump)?;
        Ok(mapping)
    }

    /// Advises the kernel about the whole stretch.
    pub(crate) fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the stretch is ours; the advices used in this crate
        // (don't fork, don't dump, huge page) change no contents.
        unsafe { madvise(self.start.as_ptr().cast(), self.len, advice) }?;
        Ok(())
    }

    /// First byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// A pointer to `len` bytes at `offset`, or an error when they are not inside.
    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        let end = usize::try_from(offset)
            .ok()
            .and_then(|o| o.checked_add(len));
        match end {
            // SAFETY: offset <= end <= self.len, so the result stays in (or
            // one past the end of) the mapped stretch.
            Some(end) if end <= self.len => Ok(unsafe { self.start.as_ptr().add(end - len) }),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Media for Mapping {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, buf.len())?;
        // SAFETY: `from` is valid for buf.len() bytes of mapped memory, and
        // `buf` is exclusive and outside of it. Another process may write at
        // the same time: the copy may then be torn, which every caller finds
        // by checksum.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        // The compiler must not assume a second load gives the same bytes.
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        debug_assert!(offset.is_multiple_of(8) && bytes.len().is_multiple_of(8));
        let to = self.at(offset, bytes.len())?;
        for (i, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: word i lies in the checked range, aligned to 8 because
            // the mapping is aligned and `offset` a multiple of 8.
            unsafe {
                to.cast::<u64>()
                    .add(i)
                    .write_volatile(u64::from_ne_bytes(*word))
            };
        }
        for line in (0..bytes.len()).step_by(LINE) {
            // SAFETY: CLFLUSH takes any mapped address and changes no contents.
            unsafe { std::arch::x86_64::_mm_clflush(to.add(line)) };
        }
        if let Some(last) = bytes.len().checked_sub(1) {
            // SAFETY: as above; covers the last line of an unaligned range.
            unsafe { std::arch::x86_64::_mm_clflush(to.add(last)) };
        }
        Ok(())
    }

    fn scrub(&self, extent: Extent) -> io::Result<()> {
        static ZERO: [u8; PAGE] = [0; PAGE];
        let len = usize::try_from(extent.len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let start = self.at(extent.offset, len)?;
        for page in (0..len).step_by(PAGE) {
            let piece = PAGE.min(len - page);
            // SAFETY: the page is inside the checked range. By the table's
            // protocol nobody else maps or writes an extent that is being
            // scrubbed. Only pages that are not zero are written: reading is
            // cheaper, and most pages of a fresh segment are clean.
            unsafe {
                let at = start.add(page);
                if libc::memcmp(at.cast(), ZERO.as_ptr().cast(), piece) != 0 {
                    ptr::write_bytes(at, 0, piece);
                }
            }
        }
        Ok(())
    }

    fn fence(&self) {
        // SAFETY: SFENCE touches no memory; every x86-64 processor has it.
        unsafe { std::arch::x86_64::_mm_sfence() };
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the stretch is ours, and nothing derived from it outlives
        // its owner (see `Segment` for the pointers it hands out).
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
