//! What the head of a store looks like, byte by byte.
//!
//! All numbers little-endian, all structs without padding. A change of any of
//! them is a new version beside the old one, never an edit; the golden bytes
//! in this module's tests fail otherwise.

use hebe_types::{Extent, GRANULE, Gpa, SegmentId, VmId, VmName};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::guard::Guard;
use crate::mirror::{COPY_HEADER_LEN, COPY_LEN_MAX, Place};
use crate::spec::{Placement, SegmentSpec};

/// Most segments in one store.
pub const SEGMENTS_MAX: u32 = 256;
/// Room for extents in one record.
pub(crate) const PLACES: usize = 240;
/// Most pieces that one VM's RAM can lie in. A segment that is being zeroed
/// lists its execution-state area among its extents, so one place is kept.
pub const EXTENTS_MAX: usize = PLACES - 1;
/// Granules of the head: superblock and report, then the table.
pub(crate) const HEAD_GRANULES: u32 = 2;
/// Bytes of the head.
pub(crate) const HEAD_LEN: u64 = HEAD_GRANULES as u64 * GRANULE;
/// Granules of the guard at the end; see the `guard` module.
pub(crate) const GUARD_GRANULES: u32 = 1;
/// Bytes of the guard at the end.
pub(crate) const GUARD_LEN: u64 = GUARD_GRANULES as u64 * GRANULE;
/// The smallest store: one VM with one granule of RAM.
pub(crate) const STORE_LEN_MIN: u64 = HEAD_LEN + 2 * GRANULE + GUARD_LEN;
/// The largest store: granule numbers are 32 bits wide.
pub(crate) const STORE_GRANULES_MAX: u64 = u32::MAX as u64;

/// Where the report's two slots begin.
pub(crate) const REPORT_SLOTS: [u64; 2] = [0x8_0000, 0xc_0000];
const REPORT_SLOT_LEN: u64 = 0x4_0000;
/// Most bytes of a report.
pub const REPORT_LEN_MAX: usize = (REPORT_SLOT_LEN as usize) - COPY_LEN_MAX;

const TABLE_OFFSET: u64 = GRANULE;

/// The superblock.
pub(crate) const SUPERBLOCK: Place = Place {
    a: 0,
    b: COPY_LEN_MAX as u64,
    magic: *b"HEBESTOR",
    version: 2,
    payload_len: size_of::<SuperblockV2>(),
};

/// The record in one slot of the table.
pub(crate) const fn record_place(slot: u32) -> Place {
    let a = TABLE_OFFSET + slot as u64 * 2 * COPY_LEN_MAX as u64;
    Place {
        a,
        b: a + COPY_LEN_MAX as u64,
        magic: *b"HEBESEGM",
        version: 1,
        payload_len: size_of::<RecordV1>(),
    }
}

const _: () = {
    assert!(size_of::<SuperblockV2>() == 112);
    assert!(size_of::<RecordV1>() == 3936);
    assert!(COPY_HEADER_LEN + size_of::<RecordV1>() <= COPY_LEN_MAX);
    assert!(TABLE_OFFSET + SEGMENTS_MAX as u64 * 2 * COPY_LEN_MAX as u64 <= HEAD_LEN);
    assert!(REPORT_SLOTS[1] + REPORT_SLOT_LEN <= TABLE_OFFSET);
};

/// What a store is.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SuperblockV2 {
    /// Drawn when the store was formatted.
    pub uuid: [u8; 16],
    /// Bytes of the store, head and guard included.
    pub capacity: U64,
    /// Physical address it was made at, if known.
    pub phys_start: U64,
    /// Length of the physical range; 0 when unknown.
    pub phys_len: U64,
    /// When it was formatted: nanoseconds since 1970.
    pub created_ns: U64,
    /// Bytes per granule.
    pub granule: U32,
    /// Granules of the head.
    pub head_granules: U32,
    /// Slots of the table.
    pub slots: U32,
    /// Granules of the guard at the end.
    pub guard_granules: U32,
    /// Release that formatted it, zero-padded text.
    pub release: [u8; 32],
    /// Zero.
    pub reserved: [U32; 4],
}

/// One granule-aligned piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct PlaceV1 {
    /// Guest-physical address.
    pub gpa: U64,
    /// First granule in the store.
    pub granule: U32,
    /// Number of granules.
    pub granules: U32,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RecordV1 {
    /// Its own slot, so that a misplaced record is found out.
    pub slot: U32,
    /// See [`State`].
    pub state: U32,
    /// The store's uuid, so that a record of an earlier store is found out.
    pub store_uuid: [u8; 16],
    /// Whose RAM.
    pub vm: [u8; 16],
    /// Zero-padded text.
    pub name: [u8; 32],
    /// When it was created: nanoseconds since 1970.
    pub created_ns: U64,
    /// Granule of the execution-state area.
    pub exec_granule: U32,
    /// How many of `places` are used.
    pub places_len: U32,
    /// Pieces of RAM.
    pub places: [PlaceV1; PLACES],
    /// Zero.
    pub reserved: [U32; 2],
}

/// Where a segment is in its life; see the crate's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free = 1,
    Allocating = 2,
    Live = 3,
    Scrubbing = 4,
}

impl State {
    fn from_number(number: u32) -> Option<Self> {
        [Self::Free, Self::Allocating, Self::Live, Self::Scrubbing]
            .into_iter()
            .find(|s| *s as u32 == number)
    }
}

/// A segment that owns granules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub spec: SegmentSpec,
    pub created_ns: u64,
}

/// A decoded and checked record: what its state says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Owns nothing.
    Free,
    /// Owns granules that no VMM has seen yet.
    Allocating(Owner),
    /// A VM's.
    Live(Owner),
    /// Owns granules that are being zeroed.
    Scrubbing(Vec<Extent>),
}

/// Granule number of a byte offset; the caller checked the bounds.
fn granule_of(bytes: u64) -> U32 {
    U32::new((bytes / GRANULE) as u32)
}

fn bytes_of(granules: U32) -> u64 {
    u64::from(granules.get()) * GRANULE
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let len = text.len().min(N);
    out[..len].copy_from_slice(&text.as_bytes()[..len]);
    out
}

/// The text before the zero padding.
pub(crate) fn unpadded(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let clean = bytes[end..].iter().all(|b| *b == 0);
    clean.then(|| std::str::from_utf8(&bytes[..end]).ok())?
}

impl SuperblockV2 {
    /// A new store's.
    pub(crate) fn new(
        uuid: [u8; 16],
        capacity: u64,
        slots: u32,
        phys: Option<(u64, u64)>,
        created_ns: u64,
    ) -> Self {
        let (phys_start, phys_len) = phys.unwrap_or_default();
        Self {
            uuid,
            capacity: U64::new(capacity),
            phys_start: U64::new(phys_start),
            phys_len: U64::new(phys_len),
            created_ns: U64::new(created_ns),
            granule: U32::new(GRANULE as u32),
            head_granules: U32::new(HEAD_GRANULES),
            slots: U32::new(slots),
            guard_granules: U32::new(GUARD_GRANULES),
            release: padded(env!("CARGO_PKG_VERSION")),
            reserved: [U32::ZERO; 4],
        }
    }

    /// Decodes and checks what does not depend on the device.
    pub(crate) fn decode(payload: &[u8]) -> Result<Self, &'static str> {
        let sb = Self::read_from_bytes(payload).map_err(|_| "its superblock has a wrong length")?;
        let capacity = sb.capacity.get();
        let sane = sb.granule.get() == GRANULE as u32
            && sb.head_granules.get() == HEAD_GRANULES
            && sb.guard_granules.get() == GUARD_GRANULES
            && (1..=SEGMENTS_MAX).contains(&sb.slots.get())
            && capacity.is_multiple_of(GRANULE)
            && (STORE_LEN_MIN..=STORE_GRANULES_MAX * GRANULE).contains(&capacity);
        sane.then_some(sb)
            .ok_or("its superblock has impossible values")
    }

    /// Where segments end and the guard begins.
    pub(crate) fn segments_end(&self) -> u64 {
        self.capacity.get() - GUARD_LEN
    }

    /// Between the head and the guard.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            uuid: Some(self.uuid),
            start: HEAD_LEN,
            end: self.segments_end(),
        }
    }

    /// The guard at the end.
    pub(crate) fn guard(&self) -> Guard {
        let place = Extent {
            offset: self.segments_end(),
            len: GUARD_LEN,
        };
        Guard::new(self.uuid, place)
    }

    /// Physical range it was made at, if known.
    pub(crate) fn phys(&self) -> Option<(u64, u64)> {
        let (start, len) = (self.phys_start.get(), self.phys_len.get());
        (len > 0).then_some((start, len))
    }
}

impl RecordV1 {
    fn blank(slot: u32, store_uuid: [u8; 16], state: State) -> Self {
        let mut record = Self::new_zeroed();
        record.slot = U32::new(slot);
        record.state = U32::new(state as u32);
        record.store_uuid = store_uuid;
        record
    }

    /// A slot that owns nothing.
    pub(crate) fn free(slot: u32, store_uuid: [u8; 16]) -> Self {
        Self::blank(slot, store_uuid, State::Free)
    }

    /// A slot whose extents are being zeroed. At most [`PLACES`] of them.
    pub(crate) fn scrubbing(slot: u32, store_uuid: [u8; 16], extents: &[Extent]) -> Self {
        debug_assert!(extents.len() <= PLACES);
        let mut record = Self::blank(slot, store_uuid, State::Scrubbing);
        record.places_len = U32::new(extents.len() as u32);
        for (place, extent) in record.places.iter_mut().zip(extents) {
            place.granule = granule_of(extent.offset);
            place.granules = granule_of(extent.len);
        }
        record
    }

    /// A VM's segment, Allocating or Live.
    pub(crate) fn owned(owner: &Owner, live: bool) -> Self {
        let spec = &owner.spec;
        let state = if live { State::Live } else { State::Allocating };
        let mut record = Self::blank(spec.id.0, spec.store_uuid, state);
        record.vm = spec.vm.0;
        record.name = padded(spec.name.as_str());
        record.created_ns = U64::new(owner.created_ns);
        record.exec_granule = granule_of(spec.exec.offset);
        record.places_len = U32::new(spec.ram.len() as u32);
        for (place, p) in record.places.iter_mut().zip(&spec.ram) {
            place.gpa = U64::new(p.gpa.0);
            place.granule = granule_of(p.place.offset);
            place.granules = granule_of(p.place.len);
        }
        record
    }

    /// Decodes and checks one record. Untrusted input.
    pub(crate) fn decode(payload: &[u8], slot: u32, bounds: &Bounds) -> Result<Record, String> {
        let record = Self::read_from_bytes(payload).map_err(|_| "it has a wrong length")?;
        if record.slot.get() != slot {
            return Err(format!("it belongs in slot {}", record.slot));
        }
        if bounds.uuid.is_some_and(|uuid| record.store_uuid != uuid) {
            return Err("it belongs to another store".into());
        }
        let state = State::from_number(record.state.get()).ok_or("its state is unknown")?;
        if state == State::Free {
            return Ok(Record::Free);
        }
        let places = record
            .places
            .get(..record.places_len.get() as usize)
            .ok_or("it has too many extents")?;
        let extents: Vec<Extent> = places.iter().map(PlaceV1::extent).collect();
        if state == State::Scrubbing {
            bounds.hold(extents.iter().copied())?;
            return Ok(Record::Scrubbing(extents));
        }
        if places.len() > EXTENTS_MAX {
            return Err("it has too many extents".into());
        }
        let name = unpadded(&record.name).and_then(|text| text.parse::<VmName>().ok());
        let ram = places.iter().map(|p| Placement {
            gpa: Gpa(p.gpa.get()),
            place: p.extent(),
        });
        let spec = SegmentSpec {
            id: SegmentId(slot),
            vm: VmId(record.vm),
            name: name.ok_or("its name is not a VM's")?,
            store_uuid: record.store_uuid,
            exec: Extent {
                offset: bytes_of(record.exec_granule),
                len: GRANULE,
            },
            ram: ram.collect(),
        };
        spec.check().map_err(|e| e.to_string())?;
        bounds.hold(spec.extents())?;
        let owner = Owner {
            spec,
            created_ns: record.created_ns.get(),
        };
        Ok(match state {
            State::Live => Record::Live(owner),
            _ => Record::Allocating(owner),
        })
    }

    /// The name in a record that could not be decoded: a hint for people,
    /// nothing else.
    pub(crate) fn name_hint(page: &[u8; COPY_LEN_MAX]) -> Option<VmName> {
        let (record, _) = Self::read_from_prefix(&page[COPY_HEADER_LEN..]).ok()?;
        unpadded(&record.name)?.parse().ok()
    }
}

impl PlaceV1 {
    fn extent(&self) -> Extent {
        Extent {
            offset: bytes_of(self.granule),
            len: bytes_of(self.granules),
        }
    }
}

/// Whose a record must be, and where what it claims may lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The store; `None` where each segment has an id of its own.
    pub uuid: Option<[u8; 16]>,
    /// First byte that a segment may have.
    pub start: u64,
    /// Where segments end.
    pub end: u64,
}

impl Bounds {
    /// Whether every extent lies inside.
    fn hold(&self, extents: impl Iterator<Item = Extent>) -> Result<(), String> {
        for e in extents {
            if e.len == 0 || e.offset < self.start || e.offset + e.len > self.end {
                return Err(format!(
                    "extent {:#x}+{:#x} lies outside the store",
                    e.offset, e.len
                ));
            }
        }
        Ok(())
    }
}
