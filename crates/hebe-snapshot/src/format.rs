//! The file's bytes. All numbers little-endian; a change is a new version.

use hebe_types::{GRANULE, Gpa, RamRange};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) const MAGIC: [u8; 8] = *b"HEBESAVE";
pub(crate) const VERSION: u32 = 1;
/// Bytes of the header's page, of a page of RAM, and of every alignment.
pub(crate) const PAGE: u64 = 4096;
/// RAM covered by one checksum.
pub(crate) const CHUNK: u64 = GRANULE;
/// Most ranges of guest RAM.
pub(crate) const RANGES_MAX: usize = 64;
/// Longest execution state.
pub(crate) const STATE_LEN_MAX: u64 = 64 << 20;
/// Most guest RAM: 4 TiB bounds the table of checksums at 8 MiB.
pub(crate) const RAM_LEN_MAX: u64 = 4 << 40;

/// The header. The checksum covers everything before it.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct HeaderV1 {
    pub magic: [u8; 8],
    pub version: U32,
    /// 1 when everything is in the file.
    pub complete: U32,
    /// Of the whole file.
    pub file_len: U64,
    /// When it was saved: nanoseconds since 1970.
    pub saved_ns: U64,
    pub state_len: U64,
    pub ram_len: U64,
    pub ranges: U32,
    /// CRC-32 of the ranges and the table of checksums.
    pub tables_crc: U32,
    pub state_crc: U32,
    pub header_crc: U32,
}

/// One range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RangeV1 {
    pub gpa: U64,
    pub len: U64,
}

const _: () = assert!(size_of::<HeaderV1>() == 64);
pub(crate) const HEADER_CRC_AT: usize = 60;

/// Where everything lies; follows from three lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub tables_at: u64,
    pub tables_len: u64,
    pub state_at: u64,
    pub ram_at: u64,
    pub file_len: u64,
}

impl Plan {
    /// The caller checked the lengths against this module's limits.
    pub(crate) fn new(ranges: usize, state_len: u64, ram_len: u64) -> Self {
        let chunks = ram_len.div_ceil(CHUNK);
        let tables_len = ranges as u64 * size_of::<RangeV1>() as u64 + chunks * 4;
        let state_at = (PAGE + tables_len).next_multiple_of(PAGE);
        let ram_at = (state_at + state_len).next_multiple_of(GRANULE);
        Self {
            tables_at: PAGE,
            tables_len,
            state_at,
            ram_at,
            file_len: ram_at + ram_len,
        }
    }
}

/// Whether ranges are what a VM can have: whole granules, ascending, apart.
pub(crate) fn check_ranges(ranges: &[RamRange]) -> Result<u64, String> {
    if ranges.len() > RANGES_MAX {
        return Err(format!("it has more than {RANGES_MAX} ranges of RAM"));
    }
    let mut end = 0;
    let mut total = 0u64;
    for range in ranges {
        let whole = range.gpa.0.is_multiple_of(GRANULE) && range.len.is_multiple_of(GRANULE);
        let range_end = range.gpa.0.checked_add(range.len);
        match range_end {
            Some(range_end) if whole && range.len > 0 && range.gpa.0 >= end => end = range_end,
            _ => return Err(format!("its RAM at {:#x} is not in order", range.gpa.0)),
        }
        total = total.saturating_add(range.len);
    }
    if total > RAM_LEN_MAX {
        return Err("it has more RAM than the format holds".into());
    }
    Ok(total)
}

impl From<&RangeV1> for RamRange {
    fn from(range: &RangeV1) -> Self {
        Self {
            gpa: Gpa(range.gpa.get()),
            len: range.len.get(),
        }
    }
}

impl From<&RamRange> for RangeV1 {
    fn from(range: &RamRange) -> Self {
        Self {
            gpa: U64::new(range.gpa.0),
            len: U64::new(range.len),
        }
    }
}

/// A page of zeros.
pub(crate) static ZERO_PAGE: [u8; PAGE as usize] = [0; PAGE as usize];

/// Checksum of a chunk of zeros.
pub(crate) fn zero_chunk_crc() -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for _ in 0..CHUNK / PAGE {
        hasher.update(&ZERO_PAGE);
    }
    hasher.finalize()
}
