//! What preserving a VM would fill, and what is done about it.
//!
//! The kernel fills every hole of a file that it preserves. Memory that the
//! guest never touched, or gave back, is holes: on a host that counts on it, a
//! reboot would need memory that is not there. So nothing is filled unnoticed:
//! it is measured, and chosen.

use std::fmt;

use hebe_types::{ByteSize, VmName};

use super::CarryError;

/// Most parts of one VM's RAM: a bit each in the manifest, and few enough
/// descriptors for one message.
pub const PARTS_MAX: u32 = 64;
/// The smallest part: eight granules. Smaller ones save little and cost a
/// descriptor each.
const PART_LEN_MIN: u64 = 16 << 20;
/// What the kernel notes of each page that it preserves (`memfd_luo_folio_ser`),
/// where no page is larger.
const NOTE_LEN: u64 = 16;
const PAGE_LEN: u64 = 4096;

/// Length of the parts of a VM with `memory` of RAM; the last may be shorter.
pub(super) fn part_len(memory: ByteSize) -> u64 {
    let even = memory.bytes().div_ceil(u64::from(PARTS_MAX));
    even.next_power_of_two().max(PART_LEN_MIN)
}

/// Lengths of all parts.
pub(super) fn part_lens(memory: ByteSize, part_len: u64) -> impl Iterator<Item = u64> {
    let starts = (0..memory.bytes()).step_by(part_len as usize);
    starts.map(move |at| part_len.min(memory.bytes() - at))
}

/// How much of one part is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartUse {
    /// Its length in bytes.
    pub len: u64,
    /// Bytes that have memory, swapped-out ones counted.
    pub allocated: u64,
}

impl PartUse {
    /// Bytes that preserving it would fill.
    pub fn holes(self) -> u64 {
        self.len.saturating_sub(self.allocated)
    }
}

/// What is done about memory that a guest does not use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HolePolicy {
    /// Parts that hold nothing are left out, and made anew by the next kernel;
    /// holes of the others are filled.
    #[default]
    Trim,
    /// All of it is filled: nothing is left to do when the VM is frozen.
    Fill,
}

/// What will be preserved of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// For each part, whether it is preserved now.
    pub parts: Vec<bool>,
    /// Bytes of RAM.
    pub memory: ByteSize,
    /// Bytes that preserving will allocate and zero.
    pub fill: ByteSize,
    /// Bytes of parts that are left out.
    pub left_out: ByteSize,
    /// Most bytes that the kernel needs for its own notes.
    pub notes: ByteSize,
}

impl Plan {
    /// Chooses, from what was measured.
    pub fn new(uses: &[PartUse], policy: HolePolicy) -> Self {
        let keep = |u: &PartUse| policy == HolePolicy::Fill || u.allocated > 0;
        let sum = |bytes: &dyn Fn(&PartUse) -> u64| ByteSize(uses.iter().map(bytes).sum());
        let kept = |u: &PartUse| if keep(u) { u.len } else { 0 };
        let preserved = sum(&kept);
        Self {
            parts: uses.iter().map(keep).collect(),
            memory: sum(&|u| u.len),
            fill: sum(&|u| if keep(u) { u.holes() } else { 0 }),
            left_out: sum(&|u| u.len - kept(u)),
            notes: ByteSize(preserved.bytes() / PAGE_LEN * NOTE_LEN),
        }
    }

    /// Refuses what fills more than `limit` of a VM's unused memory.
    ///
    /// # Errors
    /// [`CarryError::WouldFill`].
    pub fn within(&self, limit: ByteSize, name: &VmName) -> Result<(), CarryError> {
        if self.fill <= limit {
            return Ok(());
        }
        Err(CarryError::WouldFill {
            name: name.clone(),
            fill: self.fill,
            limit,
        })
    }

    /// Memory that has to be free for it.
    pub fn needs(&self) -> ByteSize {
        ByteSize(self.fill.bytes() + self.notes.bytes())
    }
}

/// As pre-flight says it.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.memory.bytes() - self.fill.bytes() - self.left_out.bytes();
        write!(f, "{} of {} in use", ByteSize(used), self.memory)?;
        if self.left_out.bytes() > 0 {
            write!(f, ", {} in empty parts is left out", self.left_out)?;
        }
        if self.fill.bytes() > 0 {
            write!(f, ", {} will be filled with zeros", self.fill)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn uses() -> impl Strategy<Value = Vec<PartUse>> {
        let one = (1u64..64, 0u64..=64).prop_map(|(len, used)| PartUse {
            len: len * 2 * MIB,
            allocated: (used * 2 * MIB).min(len * 2 * MIB),
        });
        proptest::collection::vec(one, 1..64)
    }

    proptest! {
        #[test]
        fn every_byte_is_used_filled_or_left_out(uses in uses()) {
            for policy in [HolePolicy::Fill, HolePolicy::Trim] {
                let plan = Plan::new(&uses, policy);
                let allocated: u64 = uses.iter().map(|u| u.allocated).sum();
                let whole: u64 = uses.iter().map(|u| u.len).sum();
                prop_assert_eq!(plan.memory.bytes(), whole);
                prop_assert_eq!(
                    allocated + plan.fill.bytes() + plan.left_out.bytes(),
                    whole
                );
                for (kept, part) in plan.parts.iter().zip(&uses) {
                    prop_assert!(*kept || part.allocated == 0, "nothing in use is left out");
                }
            }
            let (trim, fill) = (
                Plan::new(&uses, HolePolicy::Trim),
                Plan::new(&uses, HolePolicy::Fill),
            );
            prop_assert!(trim.needs() <= fill.needs());
            prop_assert!(fill.left_out.bytes() == 0);
        }

        #[test]
        fn parts_tile_the_ram(granules in 1u64..=524_288) {
            let memory = ByteSize(granules * hebe_types::GRANULE);
            let len = part_len(memory);
            let lens: Vec<u64> = part_lens(memory, len).collect();
            prop_assert!(lens.len() <= PARTS_MAX as usize && len >= PART_LEN_MIN);
            prop_assert_eq!(lens.iter().sum::<u64>(), memory.bytes());
            prop_assert!(lens.iter().all(|l| l.is_multiple_of(hebe_types::GRANULE)));
        }
    }

    #[test]
    fn the_plan_is_said_in_words() {
        let used = PartUse {
            len: 64 * MIB,
            allocated: 16 * MIB,
        };
        let empty = PartUse {
            len: 64 * MIB,
            allocated: 0,
        };
        let plan = Plan::new(&[used, empty], HolePolicy::Trim);
        assert_eq!(
            plan.to_string(),
            "16MiB of 128MiB in use, 64MiB in empty parts is left out, 48MiB will be filled with zeros"
        );
        let plan = Plan::new(&[used, empty], HolePolicy::Fill);
        assert_eq!(plan.fill, ByteSize(112 * MIB));
        assert_eq!(plan.notes, ByteSize(128 * MIB / 256));
    }
}
