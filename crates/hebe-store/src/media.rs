//! Where persistent bytes go.
//!
//! Every persistent write of this crate passes through [`Media`], so that the
//! tests can stop the world between any two of them. Stores take effect in
//! program order: x86-64 keeps that order for every observer, a kill or a
//! kexec leaves caches coherent, and the flush and the fence keep it on media
//! that a power cut could reach too.

use std::io;

use hebe_types::Extent;

/// Bytes that [`Media::pages`] shows at a time.
pub(crate) const PAGE_LEN: usize = 4096;

/// A range of persistent bytes. Offsets are from the start of the range.
pub(crate) trait Media {
    /// Reads bytes; `offset` is a multiple of 8.
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes bytes, eight at a time, in ascending order. `offset` and the
    /// length are multiples of 8.
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes an extent read as zero.
    fn scrub(&self, extent: Extent) -> io::Result<()>;

    /// Every store before it is persistent before any store after it.
    fn fence(&self);

    /// Shows every page of an extent of whole pages, with its offset.
    fn pages(&self, extent: Extent, visit: &mut dyn FnMut(u64, &[u8; PAGE_LEN])) -> io::Result<()> {
        let mut page = [0; PAGE_LEN];
        for done in (0..extent.len).step_by(PAGE_LEN) {
            let at = extent.offset + done;
            self.load(at, &mut page)?;
            visit(at, &page);
        }
        Ok(())
    }
}
