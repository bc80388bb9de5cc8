//! Guards: stretches of a store that say whether anything else used it.
//!
//! A host kernel that is booted without the reservation, or with a smaller
//! one, takes the range for ordinary RAM. What it then writes into the head or
//! into an execution state is found by checksums. Guest RAM has none: R-14
//! forbids to read it at suspend and resume. So a kernel that overwrites guest
//! RAM alone would leave valid states over RAM that is no longer theirs.
//!
//! A guard is written once with a pattern made of the store's uuid and each
//! word's place, and never again; a pattern of an earlier store, or one that
//! was copied to another place, is wrong. There are two kinds:
//!
//! - the **tail**, the store's last granule, written at formatting and
//!   verified by every [`crate::Store::open`]. Linux's early allocator hands
//!   memory out from the top down, so a kernel for which the range is the top
//!   of its RAM, or of a node's, puts its first allocations here: page
//!   structures, per-CPU areas, hash tables. A reservation cut short frees this
//!   end, too. A wrong tail means that nothing in the store is resumed or
//!   changed any more; it can be looked at, and formatted anew.
//! - **one in each segment**, the last two pages of its execution-state area,
//!   written when the segment is created and verified whenever that area is
//!   read or changed. A wrong one costs its VM alone, because a stray write of
//!   its own VMM explains it as well.
//!
//! **What guards cannot detect.** They are samples. A kernel that never wrote
//! to one of them goes unnoticed, whatever else it overwrote: for example one
//! with enough RAM above the range, whose early allocations lie there, and
//! whose later ones happened to miss every guard. So does a device that writes
//! to single pages of guest RAM. Guards make a wrong boot unlikely to pass;
//! what prevents it is the reservation in every kernel's command line.

use std::io;

use hebe_types::Extent;

use crate::media::Media;

/// The pattern of one guard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard {
    key: u64,
    place: Extent,
}

/// A permutation of the words that leaves no visible order (the finaliser of
/// SplitMix64).
const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Guard {
    /// The guard of a store at `place`, counted from the store's first byte.
    pub(crate) const fn new(store_uuid: [u8; 16], place: Extent) -> Self {
        let uuid = u128::from_le_bytes(store_uuid);
        Self {
            key: mix(uuid as u64 ^ mix((uuid >> 64) as u64)),
            place,
        }
    }

    /// Where it lies in the store.
    pub(crate) fn place(&self) -> Extent {
        self.place
    }

    /// The word at `offset` of the guard.
    fn word(&self, offset: u64) -> u64 {
        mix(self.key.wrapping_add(self.place.offset + offset))
    }

    /// Writes it to `at` of `media`: its place in the store, if that is what
    /// `media` is.
    pub(crate) fn write(&self, media: &impl Media, at: u64) -> io::Result<()> {
        let words = (0..self.place.len).step_by(8);
        let bytes: Vec<u8> = words.flat_map(|i| self.word(i).to_le_bytes()).collect();
        media.store(at, &bytes)?;
        media.fence();
        Ok(())
    }

    /// The first word of the store that is not what was written, if any. Reads
    /// at `at` of `media`, and allocates nothing.
    pub(crate) fn first_wrong(&self, media: &impl Media, at: u64) -> io::Result<Option<u64>> {
        let extent = Extent {
            offset: at,
            len: self.place.len,
        };
        let mut wrong = None;
        media.pages(extent, &mut |offset, page| {
            let from = offset - at;
            let words = page.as_chunks::<8>().0.iter().zip((from..).step_by(8));
            let mut bad = words
                .filter(|(word, i)| u64::from_le_bytes(**word) != self.word(*i))
                .map(|(_, i)| self.place.offset + i);
            wrong = wrong.or_else(|| bad.next());
        })?;
        Ok(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMedia;

    const PLACE: Extent = Extent {
        offset: 0x60_0000,
        len: 0x2000,
    };

    #[test]
    fn any_changed_byte_is_found_and_named() {
        let guard = Guard::new([0x77; 16], PLACE);
        let media = TestMedia::default();
        assert_eq!(
            guard.first_wrong(&media, 8192).expect("read"),
            Some(PLACE.offset)
        );
        guard.write(&media, 8192).expect("write");
        assert_eq!(guard.first_wrong(&media, 8192).expect("read"), None);
        for byte in (0..PLACE.len).step_by(13) {
            media.image.borrow_mut().flip(8192 + byte, 2);
            let found = guard.first_wrong(&media, 8192).expect("read");
            assert_eq!(found, Some(PLACE.offset + byte - byte % 8));
            media.image.borrow_mut().flip(8192 + byte, 2);
        }
    }

    #[test]
    fn another_store_or_another_place_has_another_pattern() {
        let media = TestMedia::default();
        let guard = Guard::new([0x77; 16], PLACE);
        guard.write(&media, 0).expect("write");
        let moved = Extent {
            offset: PLACE.offset + 8,
            ..PLACE
        };
        for other in [Guard::new([0x78; 16], PLACE), Guard::new([0x77; 16], moved)] {
            assert!(other.first_wrong(&media, 0).expect("read").is_some());
        }
    }

    /// The first words of a guard, computed by another implementation.
    #[test]
    fn a_guard_has_its_golden_bytes() {
        let media = TestMedia::default();
        Guard::new(*b"0123456789abcdef", PLACE)
            .write(&media, 0)
            .expect("write");
        let image = media.snapshot();
        let words: Vec<u64> = [0u64, 8, 0x1ff8]
            .iter()
            .map(|at| u64::from_le_bytes(image.bytes(*at, 8).try_into().expect("word")))
            .collect();
        assert_eq!(words, GOLDEN);
    }

    const GOLDEN: [u64; 3] = [
        0x4a8b_8ec6_d3e9_f377,
        0x97ac_9313_5751_1606,
        0xd244_3b73_64d6_6115,
    ];
}
