//! What is written beside the RAM: a VM's manifest, and the host's head.
//!
//! ```text
//! manifest (16 KiB)                       head (2 MiB + 8 KiB per slot)
//! 0x0000  segment record, copies A, B     0x00_0000  roster, copies A, B
//! 0x2000  carried, copies A, B            0x08_0000  report, two slots
//!                                         0x20_0000  for each slot: record, copies A, B
//! ```
//! Records, reports and copies are those of a store on devdax, at the same
//! places of the head; the other two are below. A change is a new version
//! beside the old one.

use std::fmt;
use std::io;

use hebe_types::{GRANULE, SegmentId};
use rustix::rand::{GetRandomFlags, getrandom};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::plan::PARTS_MAX;
use super::{CarryError, Piece, VMS_MAX};
use crate::StoreError;
use crate::layout::{Bounds, Owner, Record, RecordV1, STORE_GRANULES_MAX, record_place, unpadded};
use crate::media::Media;
use crate::mirror::{self, COPY_LEN_MAX, Place, Reading};

/// Length of a manifest.
pub(super) const MANIFEST_LEN: u64 = 4 * COPY_LEN_MAX as u64;

/// The record's place in a manifest.
const RECORD: Place = Place {
    a: 0,
    b: COPY_LEN_MAX as u64,
    ..record_place(0)
};

const CARRIED: Place = Place {
    a: 2 * COPY_LEN_MAX as u64,
    b: 3 * COPY_LEN_MAX as u64,
    magic: *b"HEBECARR",
    version: 1,
    payload_len: size_of::<CarriedV1>(),
};

const ROSTER: Place = Place {
    a: 0,
    b: COPY_LEN_MAX as u64,
    magic: *b"HEBEROST",
    version: 1,
    payload_len: size_of::<RosterV1>(),
};

const _: () = {
    assert!(size_of::<CarriedV1>() == 136);
    assert!(size_of::<RosterV1>() == 128);
};

/// Length of a head with so many slots.
pub(super) fn head_len(slots: u32) -> u64 {
    record_place(slots).a
}

/// Drawn for each live update, so that what belongs to another is found out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CarrierId(pub [u8; 16]);

impl CarrierId {
    /// A new one.
    ///
    /// # Errors
    /// [`StoreError::Media`].
    pub fn draw() -> Result<Self, StoreError> {
        let mut id = [0; 16];
        getrandom(&mut id, GetRandomFlags::empty())
            .map_err(|e| StoreError::media("draw an id for")(e.into()))?;
        Ok(Self(id))
    }
}

impl fmt::Debug for CarrierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Which parts of a VM's RAM its session holds.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct CarriedV1 {
    /// See [`CarrierId`].
    carrier: [u8; 16],
    /// When it was written: nanoseconds since 1970.
    written_ns: U64,
    /// Bytes per part; the last may be shorter.
    part_len: U64,
    /// A bit for each part, lowest first: set when it is in the session. The
    /// others were empty.
    present: U64,
    /// Number of parts.
    parts: U32,
    /// Zero.
    reserved: U32,
    /// The kernel that sent it, zero-padded text.
    kernel: [u8; 56],
    /// Hebe's release, zero-padded text.
    release: [u8; 32],
}

/// What the host's session says of all.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RosterV1 {
    /// See [`CarrierId`].
    carrier: [u8; 16],
    /// When it was written: nanoseconds since 1970.
    written_ns: U64,
    /// Slots in the head, each with a record.
    slots: U32,
    /// Zero.
    reserved: U32,
    /// The kernel that sent it, zero-padded text.
    kernel: [u8; 56],
    /// Hebe's release, zero-padded text.
    release: [u8; 32],
    /// Zero.
    reserved_end: U64,
}

/// Who sends, and when.
#[derive(Clone, Debug)]
pub(super) struct Sender {
    pub carrier: CarrierId,
    pub kernel: String,
    pub now_ns: u64,
}

/// Which parts are in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Present {
    pub part_len: u64,
    pub parts: u32,
    pub bits: u64,
}

impl Present {
    pub(super) fn has(&self, part: u32) -> bool {
        part < self.parts && self.bits & (1 << part) != 0
    }

    pub(super) fn add(&mut self, part: u32) {
        self.bits |= 1 << part;
    }

    /// Untrusted input.
    fn check(self) -> Result<Self, String> {
        let beyond = self.bits.checked_shr(self.parts).unwrap_or(0) != 0;
        let sane = (1..=PARTS_MAX).contains(&self.parts)
            && !beyond
            && self.part_len > 0
            && self.part_len.is_multiple_of(GRANULE);
        sane.then_some(self)
            .ok_or_else(|| "it names impossible parts".to_owned())
    }
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let mut len = text.len().min(N);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out[..len].copy_from_slice(&text.as_bytes()[..len]);
    out
}

/// Any place: each segment has an address space and an id of its own.
const ANYWHERE: Bounds = Bounds {
    uuid: None,
    start: 0,
    end: STORE_GRANULES_MAX * GRANULE,
};

/// Writes a record that no reader has seen yet.
pub(super) fn write_manifest(
    media: &impl Media,
    sender: &Sender,
    owner: &Owner,
    present: &Present,
) -> io::Result<()> {
    let record = RecordV1::owned(owner, true);
    mirror::write_first(media, &RECORD, record.as_bytes())?;
    mirror::write_first(media, &CARRIED, carried(sender, present).as_bytes())
}

/// Changes which parts are in the session.
pub(super) fn update_present(
    media: &impl Media,
    sender: &Sender,
    present: &Present,
) -> io::Result<()> {
    let current = mirror::read(media, &CARRIED)?;
    mirror::update(
        media,
        &CARRIED,
        &current,
        carried(sender, present).as_bytes(),
    )
    .map(drop)
}

fn carried(sender: &Sender, present: &Present) -> CarriedV1 {
    CarriedV1 {
        carrier: sender.carrier.0,
        written_ns: U64::new(sender.now_ns),
        part_len: U64::new(present.part_len),
        present: U64::new(present.bits),
        parts: U32::new(present.parts),
        reserved: U32::ZERO,
        kernel: padded(&sender.kernel),
        release: padded(env!("CARGO_PKG_VERSION")),
    }
}

/// Writes the head of a new live update, with no record.
pub(super) fn write_head(media: &impl Media, sender: &Sender, slots: u32) -> io::Result<()> {
    let roster = RosterV1 {
        carrier: sender.carrier.0,
        written_ns: U64::new(sender.now_ns),
        slots: U32::new(slots),
        reserved: U32::ZERO,
        kernel: padded(&sender.kernel),
        release: padded(env!("CARGO_PKG_VERSION")),
        reserved_end: U64::ZERO,
    };
    for slot in 0..slots {
        let free = RecordV1::free(slot, sender.carrier.0);
        mirror::write_first(media, &record_place(slot), free.as_bytes())?;
    }
    mirror::write_first(media, &ROSTER, roster.as_bytes())
}

/// Enters a VM into the head.
pub(super) fn write_entry(media: &impl Media, owner: &Owner) -> io::Result<()> {
    let place = record_place(owner.spec.id.0);
    let current = mirror::read(media, &place)?;
    let record = RecordV1::owned(owner, true);
    mirror::update(media, &place, &current, record.as_bytes()).map(drop)
}

/// Takes a VM out of the head: nobody is to miss it.
pub(super) fn strike_entry(
    media: &impl Media,
    owner: &Owner,
    carrier: CarrierId,
) -> io::Result<()> {
    let slot = owner.spec.id.0;
    let place = record_place(slot);
    let current = mirror::read(media, &place)?;
    let record = RecordV1::free(slot, carrier.0);
    mirror::update(media, &place, &current, record.as_bytes()).map(drop)
}

/// A manifest, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub owner: Owner,
    pub present: Present,
    pub carrier: CarrierId,
    pub kernel: String,
}

fn payload(media: &impl Media, place: &Place, piece: Piece) -> Result<Vec<u8>, CarryError> {
    match mirror::read(media, place).map_err(StoreError::media("read"))? {
        Reading::Valid { payload, .. } => Ok(payload),
        Reading::Blank => Err(CarryError::damaged(piece, "it is empty")),
        Reading::Damaged(why) => Err(CarryError::damaged(piece, why)),
        Reading::Newer(version) => Err(CarryError::damaged(
            piece,
            format!(
                "it has version {version}, and this release reads {}",
                place.version
            ),
        )),
    }
}

fn record(media: &impl Media, place: &Place, slot: u32) -> Result<Option<Owner>, CarryError> {
    let bytes = payload(media, place, Piece::Manifest)?;
    match RecordV1::decode(&bytes, slot, &ANYWHERE) {
        Ok(Record::Live(owner)) => Ok(Some(owner)),
        Ok(Record::Free) => Ok(None),
        Ok(_) => Err(CarryError::damaged(
            Piece::Manifest,
            "its record has a state that is never carried",
        )),
        Err(why) => Err(CarryError::damaged(Piece::Manifest, why)),
    }
}

/// Reads and checks a manifest. Untrusted input.
pub(super) fn read_manifest(media: &impl Media, slot: u32) -> Result<Manifest, CarryError> {
    let damaged = |why: &str| CarryError::damaged(Piece::Manifest, why);
    let owner = record(media, &RECORD, slot)?.ok_or_else(|| damaged("its record is free"))?;
    let bytes = payload(media, &CARRIED, Piece::Manifest)?;
    let carried = CarriedV1::read_from_bytes(&bytes).map_err(|_| damaged("it is cut short"))?;
    let present = Present {
        part_len: carried.part_len.get(),
        parts: carried.parts.get(),
        bits: carried.present.get(),
    };
    let present = present
        .check()
        .map_err(|why| CarryError::damaged(Piece::Manifest, why))?;
    let memory = owner.spec.memory().bytes();
    if memory.div_ceil(present.part_len) != u64::from(present.parts) {
        return Err(damaged("its parts are not those of its RAM"));
    }
    super::files::check_places(&owner.spec)
        .map_err(|e| CarryError::damaged(Piece::Manifest, e.to_string()))?;
    Ok(Manifest {
        owner,
        present,
        carrier: CarrierId(carried.carrier),
        kernel: unpadded(&carried.kernel).unwrap_or_default().to_owned(),
    })
}

/// The head's roster, checked: who sent it, and which slots hold a VM. A record
/// that cannot be read stands as the reason.
#[derive(Clone, Debug)]
pub(super) struct Roster {
    pub carrier: CarrierId,
    pub kernel: String,
    pub entries: Vec<(u32, Result<Owner, String>)>,
}

/// Reads and checks a head. Untrusted input.
pub(super) fn read_head(media: &impl Media, len: u64) -> Result<Roster, CarryError> {
    let damaged = |why: &str| CarryError::damaged(Piece::Head, why);
    let bytes = payload(media, &ROSTER, Piece::Head)?;
    let roster = RosterV1::read_from_bytes(&bytes).map_err(|_| damaged("it is cut short"))?;
    let slots = roster.slots.get();
    if slots > VMS_MAX || len < head_len(slots) {
        return Err(damaged("it is shorter than its table"));
    }
    let mut entries = Vec::new();
    for slot in 0..slots {
        match record(media, &record_place(slot), slot) {
            Ok(Some(owner)) => entries.push((slot, Ok(owner))),
            Ok(None) => {}
            Err(why) => entries.push((slot, Err(why.to_string()))),
        }
    }
    Ok(Roster {
        carrier: CarrierId(roster.carrier),
        kernel: unpadded(&roster.kernel).unwrap_or_default().to_owned(),
        entries,
    })
}

/// The VM's record for slot `slot`.
pub(super) fn owner_in(slot: u32, spec: &crate::SegmentSpec, created_ns: u64) -> Owner {
    let mut spec = spec.clone();
    spec.id = SegmentId(slot);
    Owner { spec, created_ns }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMedia;

    fn sender() -> Sender {
        Sender {
            carrier: CarrierId(*b"0123456789abcdef"),
            kernel: "7.3.4-lab".into(),
            now_ns: 0x1122_3344_5566_7788,
        }
    }

    /// The formats as documented, byte by byte.
    #[test]
    fn pieces_have_their_documented_bytes() {
        let present = Present {
            part_len: 16 << 20,
            parts: 3,
            bits: 0b101,
        };
        let bytes = carried(&sender(), &present);
        let bytes = bytes.as_bytes();
        assert_eq!(&bytes[..16], b"0123456789abcdef");
        assert_eq!(
            &bytes[16..24],
            [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
        );
        assert_eq!(&bytes[24..32], [0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(
            &bytes[32..48],
            [5, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(&bytes[48..58], b"7.3.4-lab\0");
        assert_eq!(unpadded(&bytes[104..]), Some(env!("CARGO_PKG_VERSION")));

        let media = TestMedia::default();
        write_head(&media, &sender(), 2).expect("head");
        let image = media.snapshot();
        for copy in [0, 0x1000] {
            assert_eq!(image.bytes(copy, 8), b"HEBEROST");
            assert_eq!(image.bytes(copy + 32, 16), b"0123456789abcdef");
            assert_eq!(image.bytes(copy + 32 + 24, 8), [2, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(image.bytes(copy + 32 + 32, 9), b"7.3.4-lab");
        }
        assert_eq!(image.bytes(0x20_2000, 8), b"HEBESEGM");
        assert_eq!(head_len(2), 0x20_4000);
        let roster = read_head(&media, head_len(2)).expect("back");
        assert!(roster.entries.is_empty() && roster.kernel == "7.3.4-lab");
        assert!(read_head(&media, head_len(2) - 1).is_err(), "cut short");
    }

    #[test]
    fn impossible_parts_are_refused() {
        let fine = Present {
            part_len: GRANULE,
            parts: 64,
            bits: u64::MAX,
        };
        fine.check().expect("64 of 64");
        let wrong: [fn(&mut Present); 5] = [
            |p| p.parts = 65,
            |p| p.parts = 0,
            |p| p.parts = 63,
            |p| p.part_len = 0,
            |p| p.part_len += 4096,
        ];
        for change in wrong {
            let mut present = fine;
            change(&mut present);
            assert!(present.check().is_err(), "{present:?}");
        }
    }
}
