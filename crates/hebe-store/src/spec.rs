//! A segment's own description: the P2M table of one VM.

use hebe_types::{ByteSize, Extent, GRANULE, Gpa, RamRange, SegmentId, VmId, VmName, ram_ranges};
use serde::{Deserialize, Serialize};

use crate::StoreError;

/// One guest-physical range and its place in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// First guest-physical address.
    pub gpa: Gpa,
    /// Where it lies; the length is the range's.
    pub place: Extent,
}

/// Everything a VMM needs to map one segment, besides the store's device.
/// Travels as JSON from the manager to the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentSpec {
    /// Slot in the store's table.
    pub id: SegmentId,
    /// Whose RAM it is.
    pub vm: VmId,
    /// The VM's name.
    pub name: VmName,
    /// Which store the places refer to.
    pub store_uuid: [u8; 16],
    /// The execution-state area, one granule.
    pub exec: Extent,
    /// Where guest RAM lies, in ascending guest-physical order.
    pub ram: Vec<Placement>,
}

impl SegmentSpec {
    /// Bytes of guest RAM.
    pub fn memory(&self) -> ByteSize {
        ByteSize(self.ram.iter().map(|p| p.place.len).sum())
    }

    /// End of the last extent: how long the store must be, in bytes.
    pub fn end(&self) -> u64 {
        let end = |e: &Extent| e.offset.saturating_add(e.len);
        let places = self.ram.iter().map(|p| end(&p.place));
        places.chain([end(&self.exec)]).max().unwrap_or(0)
    }

    /// Every extent, the execution-state area first.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        std::iter::once(self.exec).chain(self.ram.iter().map(|p| p.place))
    }

    /// Checks a description from outside before anything is mapped by it:
    /// granule-aligned, no overflow, no overlap in the store, and guest RAM
    /// that covers exactly the ranges of a VM of that size.
    ///
    /// # Errors
    /// [`StoreError::BadSpec`] with the first thing that is wrong.
    pub fn check(&self) -> Result<(), StoreError> {
        let refuse = |why: String| Err(StoreError::BadSpec(why));
        if self.exec.len != GRANULE {
            return refuse("its execution-state area is not 2MiB".into());
        }
        let mut extents: Vec<Extent> = Vec::with_capacity(self.ram.len() + 1);
        let mut memory = 0u64;
        for extent in self.extents() {
            let aligned =
                extent.offset.is_multiple_of(GRANULE) && extent.len.is_multiple_of(GRANULE);
            if !aligned || extent.len == 0 || extent.offset.checked_add(extent.len).is_none() {
                return refuse(format!(
                    "extent {:#x}+{:#x} is not made of 2MiB granules",
                    extent.offset, extent.len
                ));
            }
            memory = memory.saturating_add(extent.len);
            extents.push(extent);
        }
        extents.sort_by_key(|e| e.offset);
        for pair in extents.windows(2) {
            if pair[0].offset + pair[0].len > pair[1].offset {
                return refuse(format!("two extents overlap at {:#x}", pair[1].offset));
            }
        }
        if covers(&self.ram, &ram_ranges(ByteSize(memory - GRANULE))) {
            Ok(())
        } else {
            refuse("its guest-physical ranges are not those of a VM of that size".into())
        }
    }
}

/// Whether the placements, in order, tile the ranges exactly.
fn covers(ram: &[Placement], ranges: &[RamRange]) -> bool {
    let mut placements = ram.iter();
    for range in ranges {
        let mut covered = 0;
        while covered < range.len {
            let Some(p) = placements.next() else {
                return false;
            };
            if p.gpa.0 != range.gpa.0 + covered || p.place.len > range.len - covered {
                return false;
            }
            covered += p.place.len;
        }
    }
    !ram.is_empty() && placements.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(gpa: u64, granule: u64, granules: u64) -> Placement {
        Placement {
            gpa: Gpa(gpa),
            place: Extent {
                offset: granule * GRANULE,
                len: granules * GRANULE,
            },
        }
    }

    fn sample() -> SegmentSpec {
        SegmentSpec {
            id: SegmentId(3),
            vm: VmId([7; 16]),
            name: "web".parse().expect("name"),
            store_uuid: [9; 16],
            exec: Extent {
                offset: 4 * GRANULE,
                len: GRANULE,
            },
            ram: vec![placement(0, 5, 2), placement(2 * GRANULE, 9, 1)],
        }
    }

    #[test]
    fn json_round_trips() {
        let spec = sample();
        let text = serde_json::to_string(&spec).expect("json");
        let back: SegmentSpec = serde_json::from_str(&text).expect("back");
        assert_eq!(back, spec);
        back.check().expect("a sane table");
        assert_eq!(back.memory(), ByteSize(3 * GRANULE));
        assert_eq!(back.end(), 10 * GRANULE);
    }

    #[test]
    fn corrupted_tables_are_refused() {
        let refused = |change: fn(&mut SegmentSpec)| {
            let mut spec = sample();
            change(&mut spec);
            spec.check().expect_err("must be refused").to_string()
        };
        assert!(refused(|s| s.ram[1].place.offset = 6 * GRANULE).contains("overlap"));
        assert!(refused(|s| s.exec.offset = 9 * GRANULE).contains("overlap"));
        assert!(refused(|s| s.ram[0].place.offset += 4096).contains("granules"));
        assert!(refused(|s| s.ram[0].place.len = 0).contains("granules"));
        assert!(refused(|s| s.ram[0].place.offset = u64::MAX - GRANULE + 1).contains("granules"));
        assert!(refused(|s| s.ram[1].gpa = Gpa(0)).contains("guest-physical"));
        assert!(refused(|s| s.ram[1].gpa = Gpa(3 * GRANULE)).contains("guest-physical"));
        assert!(refused(|s| s.ram.clear()).contains("guest-physical"));
        assert!(refused(|s| s.exec.len = 2 * GRANULE).contains("execution-state"));
        assert!(refused(|s| s.ram.reverse()).contains("guest-physical"));
    }

    #[test]
    fn ram_over_the_hole_is_split_there() {
        let mut spec = sample();
        let low = hebe_types::MMIO_HOLE_START / GRANULE;
        spec.ram = vec![
            placement(0, 5, low),
            placement(hebe_types::MMIO_HOLE_END, 5 + low, 4),
        ];
        spec.check().expect("3 GiB below, 8 MiB above");
        spec.ram = vec![placement(0, 5, low + 4)];
        spec.check().expect_err("RAM in the hole");
    }
}
