//! Where guest RAM lies in guest-physical space, and where it lies in a store.

use serde::{Deserialize, Serialize};

use crate::{ByteSize, GRANULE};

/// A guest-physical address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Gpa(pub u64);

/// Guest RAM below 4 GiB ends here; PCI windows, IOAPIC and LAPIC lie above.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;

/// Guest RAM that does not fit below the hole goes on here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// A piece of a store: byte offset and length, both multiples of [`GRANULE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Offset from the start of the store, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// One contiguous range of guest-physical RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RamRange {
    /// First guest-physical address.
    pub gpa: Gpa,
    /// Length in bytes, a multiple of [`GRANULE`].
    pub len: u64,
}

/// The guest-physical ranges of a VM with `size` bytes of RAM: one range from
/// 0, and a second above 4 GiB when the first would reach the MMIO hole.
pub fn ram_ranges(size: ByteSize) -> Vec<RamRange> {
    debug_assert!(size.bytes().is_multiple_of(GRANULE));
    let low = size.bytes().min(MMIO_HOLE_START);
    let high = size.bytes() - low;
    let mut ranges = vec![RamRange {
        gpa: Gpa(0),
        len: low,
    }];
    if high > 0 {
        ranges.push(RamRange {
            gpa: Gpa(MMIO_HOLE_END),
            len: high,
        });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_never_covers_the_hole_and_adds_up() {
        for gib in [1, 2, 3, 4, 16] {
            let ranges = ram_ranges(ByteSize::gib(gib));
            assert_eq!(ranges.iter().map(|r| r.len).sum::<u64>(), gib << 30);
            for r in ranges {
                let end = r.gpa.0 + r.len;
                assert!(end <= MMIO_HOLE_START || r.gpa.0 >= MMIO_HOLE_END);
            }
        }
    }
}
