//! The segment table: format, recovery, creation and destruction, over any
//! [`Media`]. The state machine is drawn in the crate's head.
//!
//! Every operation reads the table anew: what stands in the store is the only
//! truth, and there is no cache that could disagree with it.

use std::io;

use hebe_types::{ByteSize, Extent, GRANULE, SegmentId, VmId, VmName, ram_ranges};
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::alloc::{self, NoRoom};
use crate::exec::{self, ExecStatus, Whose};
use crate::layout::{
    Bounds, HEAD_LEN, Owner, PLACES, Record, RecordV1, SEGMENTS_MAX, SUPERBLOCK, SuperblockV2,
    record_place,
};
use crate::media::Media;
use crate::mirror::{self, COPY_LEN_MAX, Reading};
use crate::spec::SegmentSpec;
use crate::{StoreError, report};

/// A segment whose record is intact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Whose it is and where it lies.
    pub spec: SegmentSpec,
    /// When it was created: nanoseconds since 1970.
    pub created_ns: u64,
    /// Whether its VM runs, is frozen, or cannot be resumed.
    pub exec: ExecStatus,
}

/// One used slot of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum SegmentEntry {
    /// A segment.
    Valid(SegmentInfo),
    /// A record that cannot be believed, or one in a store that
    /// [`crate::Store::check`] refuses. Its memory is neither mapped nor handed
    /// out until the slot is dropped, or the store made anew.
    Damaged {
        /// The slot.
        slot: u32,
        /// What its name may have been: a hint for people.
        name: Option<VmName>,
        /// Why.
        reason: String,
    },
}

/// One slot as read.
#[derive(Debug)]
pub(crate) enum Slot {
    Good(Record),
    Damaged(String),
}

impl Slot {
    /// Whether this is the segment that `vm` had when it was listed.
    fn check_drop(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreError> {
        match self {
            Self::Good(Record::Free) => Err(StoreError::NoSuchSegment(id)),
            Self::Good(Record::Allocating(owner) | Record::Live(owner))
                if vm != Some(owner.spec.vm) =>
            {
                Err(StoreError::Reused(id))
            }
            Self::Damaged(_) if vm.is_some() => Err(StoreError::Reused(id)),
            Self::Good(_) | Self::Damaged(_) => Ok(()),
        }
    }
}

/// Every slot with the reading it was decoded from.
struct Scan {
    slots: Vec<(Reading, Slot)>,
}

/// What is at the head of a range.
#[derive(Debug)]
pub(crate) enum Head {
    /// No store was ever here.
    Foreign,
    /// A store was here, and its superblock cannot be read.
    Damaged(String),
    /// Written by a newer release.
    Newer(u32),
    /// A store. Boxed for size.
    Store(Box<SuperblockV2>),
}

/// A store's table, checked.
#[derive(Debug)]
pub(crate) struct Table<M> {
    pub(crate) media: M,
    superblock: SuperblockV2,
    superblock_generation: u64,
    /// First wrong word of the guard, as found by [`Table::load`].
    overrun: Option<u64>,
}

impl Scan {
    fn damaged(&self) -> Option<SegmentId> {
        let bad = |(_, slot): &(Reading, Slot)| matches!(slot, Slot::Damaged(_));
        self.slots.iter().position(bad).map(|i| SegmentId(i as u32))
    }

    fn records(&self) -> impl Iterator<Item = (u32, &Record)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(i, (_, slot))| match slot {
            Slot::Good(record) => Some((i as u32, record)),
            Slot::Damaged(_) => None,
        })
    }

    fn live(&self) -> impl Iterator<Item = &Owner> {
        self.records().filter_map(|(_, record)| match record {
            Record::Live(owner) => Some(owner),
            _ => None,
        })
    }

    fn owned(&self) -> Vec<(u32, Extent)> {
        let all = self.records();
        all.flat_map(|(i, record)| extents(record).into_iter().map(move |e| (i, e)))
            .collect()
    }

    /// Runs that no record owns; none while a damaged record may own any.
    fn free_runs(&self, end: u64) -> Vec<Extent> {
        if self.damaged().is_some() {
            return Vec::new();
        }
        let owned: Vec<Extent> = self.owned().into_iter().map(|(_, e)| e).collect();
        alloc::free_runs(end, &owned)
    }
}

fn extents(record: &Record) -> Vec<Extent> {
    match record {
        Record::Free => Vec::new(),
        Record::Allocating(owner) | Record::Live(owner) => owner.spec.extents().collect(),
        Record::Scrubbing(extents) => extents.clone(),
    }
}

/// Looks at the head of a range without believing anything.
pub(crate) fn inspect(media: &impl Media) -> io::Result<(Head, u64)> {
    let head = match mirror::read(media, &SUPERBLOCK)? {
        Reading::Newer(version) => Head::Newer(version),
        Reading::Valid {
            payload,
            generation,
            ..
        } => match SuperblockV2::decode(&payload) {
            Ok(superblock) => return Ok((Head::Store(Box::new(superblock)), generation)),
            Err(why) => Head::Damaged(why.into()),
        },
        Reading::Blank | Reading::Damaged(_) if has_traces(media)? => {
            Head::Damaged("both copies of its superblock are unreadable".into())
        }
        Reading::Blank | Reading::Damaged(_) => Head::Foreign,
    };
    Ok((head, 0))
}

/// Whether a store was here: a superblock's magic, or an intact record.
fn has_traces(media: &impl Media) -> io::Result<bool> {
    let mut magic = [0; 8];
    for at in [SUPERBLOCK.a, SUPERBLOCK.b] {
        media.load(at, &mut magic)?;
        if magic == SUPERBLOCK.magic {
            return Ok(true);
        }
    }
    for slot in 0..SEGMENTS_MAX {
        if let Reading::Valid { .. } = mirror::read(media, &record_place(slot))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the store, of which `head` is the head and which ends before `end`,
/// still has that segment.
///
/// # Errors
/// [`StoreError::Reused`] where it does not, or where its record cannot be read.
pub(crate) fn check_live(
    head: &impl Media,
    end: u64,
    spec: &SegmentSpec,
) -> Result<(), StoreError> {
    let slot = spec.id.0;
    let bounds = Bounds {
        uuid: Some(spec.store_uuid),
        start: HEAD_LEN,
        end,
    };
    if slot < SEGMENTS_MAX {
        let read = mirror::read(head, &record_place(slot)).map_err(StoreError::media("read"))?;
        if let Reading::Valid { payload, .. } = read
            && let Ok(Record::Live(owner)) = RecordV1::decode(&payload, slot, &bounds)
            && owner.spec == *spec
        {
            return Ok(());
        }
    }
    Err(StoreError::Reused(spec.id))
}

/// Writes an empty store. The superblock goes first and comes last, so that a
/// stop in between leaves no store at all.
pub(crate) fn format(media: &impl Media, superblock: &SuperblockV2) -> io::Result<()> {
    for at in [SUPERBLOCK.a, SUPERBLOCK.b] {
        media.store(at, &[0; 8])?;
    }
    media.fence();
    report::clear(media)?;
    let guard = superblock.guard();
    guard.write(media, guard.place().offset)?;
    for slot in 0..SEGMENTS_MAX {
        let place = record_place(slot);
        if slot < superblock.slots.get() {
            let free = RecordV1::free(slot, superblock.uuid);
            mirror::write_first(media, &place, free.as_bytes())?;
        } else {
            // No trace of an earlier store.
            media.store(place.a, &[0; 8])?;
            media.store(place.b, &[0; 8])?;
        }
    }
    mirror::write_first(media, &SUPERBLOCK, superblock.as_bytes())
}

impl<M: Media> Table<M> {
    /// A table over a superblock that [`inspect`] found, with its guard
    /// verified.
    pub(crate) fn load(
        media: M,
        superblock: SuperblockV2,
        superblock_generation: u64,
    ) -> Result<Self, StoreError> {
        let guard = superblock.guard();
        let overrun = guard
            .first_wrong(&media, guard.place().offset)
            .map_err(StoreError::media("read"))?;
        Ok(Self {
            overrun,
            ..Self::new(media, superblock, superblock_generation)
        })
    }

    /// A table over a superblock that was just written.
    pub(crate) fn new(media: M, superblock: SuperblockV2, superblock_generation: u64) -> Self {
        Self {
            media,
            superblock,
            superblock_generation,
            overrun: None,
        }
    }

    /// [`StoreError::Overrun`] where the guard is wrong.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.overrun
            .map_or(Ok(()), |at| Err(StoreError::Overrun { at }))
    }

    pub(crate) fn superblock(&self) -> &SuperblockV2 {
        &self.superblock
    }

    fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid
    }

    /// Reads every record, and finds those that overlap.
    fn scan(&self) -> Result<Scan, StoreError> {
        let bounds = self.superblock.bounds();
        let mut slots = Vec::new();
        for slot in 0..self.superblock.slots.get() {
            let reading = mirror::read(&self.media, &record_place(slot))
                .map_err(StoreError::media("read"))?;
            let decoded = match &reading {
                Reading::Valid { payload, .. } => RecordV1::decode(payload, slot, &bounds),
                Reading::Blank => Err("it was wiped".into()),
                Reading::Damaged(why) => Err((*why).into()),
                Reading::Newer(version) => Err(format!(
                    "it has version {version}, and this release reads up to {}",
                    record_place(slot).version
                )),
            };
            slots.push((reading, decoded.map_or_else(Slot::Damaged, Slot::Good)));
        }
        let mut scan = Scan { slots };
        for slot in alloc::conflicts(&scan.owned()) {
            scan.slots[slot as usize].1 =
                Slot::Damaged("it claims memory that another segment claims too".into());
        }
        Ok(scan)
    }

    /// Finishes what a stopped manager left, and makes the two copies of
    /// everything equal. Guest RAM of live segments is not touched.
    pub(crate) fn recover(&self) -> Result<(), StoreError> {
        let write = StoreError::media("write");
        let superblock =
            mirror::read(&self.media, &SUPERBLOCK).map_err(StoreError::media("read"))?;
        mirror::heal(&self.media, &SUPERBLOCK, &superblock).map_err(write)?;
        for (i, (reading, slot)) in self.scan()?.slots.iter().enumerate() {
            let i = i as u32;
            match slot {
                Slot::Good(record @ (Record::Allocating(_) | Record::Scrubbing(_))) => {
                    self.scrub_and_free(i, reading, &extents(record))?;
                }
                Slot::Good(_) => mirror::heal(&self.media, &record_place(i), reading)
                    .map_err(StoreError::media("write"))?,
                Slot::Damaged(_) => {}
            }
        }
        Ok(())
    }

    fn put(&self, slot: u32, current: &Reading, record: &RecordV1) -> Result<(), StoreError> {
        mirror::update(&self.media, &record_place(slot), current, record.as_bytes())
            .map_err(StoreError::media("write"))?;
        Ok(())
    }

    fn reread(&self, slot: u32) -> Result<Reading, StoreError> {
        mirror::read(&self.media, &record_place(slot)).map_err(StoreError::media("read"))
    }

    fn scrub(&self, extents: &[Extent]) -> Result<(), StoreError> {
        for extent in extents {
            self.media
                .scrub(*extent)
                .map_err(StoreError::media("zero"))?;
        }
        self.media.fence();
        Ok(())
    }

    /// Scrubbing, zero, Free. The execution-state area comes first among the
    /// extents, so that a VM half zeroed has no state left to resume from.
    fn scrub_and_free(
        &self,
        slot: u32,
        current: &Reading,
        extents: &[Extent],
    ) -> Result<(), StoreError> {
        let scrubbing = RecordV1::scrubbing(slot, self.uuid(), extents);
        self.put(slot, current, &scrubbing)?;
        self.scrub(extents)?;
        let free = RecordV1::free(slot, self.uuid());
        self.put(slot, &self.reread(slot)?, &free)
    }

    /// Creates a segment; see [`crate::Store::create`].
    pub(crate) fn create(
        &self,
        vm: VmId,
        name: &VmName,
        memory: ByteSize,
        now_ns: u64,
    ) -> Result<SegmentSpec, StoreError> {
        self.check()?;
        let end = self.superblock.segments_end();
        if memory.bytes() == 0 || !memory.bytes().is_multiple_of(GRANULE) {
            return Err(StoreError::Memory(memory));
        }
        let scan = self.scan()?;
        if let Some(id) = scan.damaged() {
            return Err(StoreError::DamagedRecord(id));
        }
        let taken = |o: &&Owner| o.spec.vm == vm || o.spec.name == *name;
        if let Some(owner) = scan.live().find(taken) {
            return Err(StoreError::Exists {
                name: owner.spec.name.clone(),
                id: owner.spec.id,
            });
        }
        let free_slot = scan.records().find(|(_, r)| **r == Record::Free);
        let (slot, _) = free_slot.ok_or(StoreError::TableFull)?;
        let runs = scan.free_runs(end);
        let free = ByteSize(alloc::total(&runs));
        let out_of_space = StoreError::OutOfSpace {
            needed: ByteSize(memory.bytes().saturating_add(GRANULE)),
            free,
        };
        if memory.bytes() >= end {
            return Err(out_of_space);
        }
        let plan = alloc::plan(&runs, &ram_ranges(memory)).map_err(|why| match why {
            NoRoom::Space => out_of_space,
            NoRoom::Fragments => StoreError::Fragmented { free },
        })?;
        let owner = Owner {
            spec: SegmentSpec {
                id: SegmentId(slot),
                vm,
                name: name.clone(),
                store_uuid: self.uuid(),
                exec: plan.exec,
                ram: plan.ram,
            },
            created_ns: now_ns,
        };
        owner.spec.check()?;
        self.commit_new(&scan.slots[slot as usize].0, &owner)?;
        Ok(owner.spec)
    }

    /// Allocating, zero, guard, Live. A failure on the way frees the slot again.
    fn commit_new(&self, current: &Reading, owner: &Owner) -> Result<(), StoreError> {
        let slot = owner.spec.id.0;
        self.put(slot, current, &RecordV1::owned(owner, false))?;
        let extents: Vec<Extent> = owner.spec.extents().collect();
        let window = self.exec_window(owner);
        let guarded = self.scrub(&extents).and_then(|()| {
            exec::prepare(&window, &Whose::of(&owner.spec)).map_err(StoreError::media("write"))
        });
        if let Err(e) = guarded {
            self.put(
                slot,
                &self.reread(slot)?,
                &RecordV1::free(slot, self.uuid()),
            )?;
            return Err(e);
        }
        self.put(slot, &self.reread(slot)?, &RecordV1::owned(owner, true))
    }

    /// Destroys a segment; see [`crate::Store::drop_segment`].
    pub(crate) fn drop_segment(&self, id: SegmentId, vm: Option<VmId>) -> Result<(), StoreError> {
        self.check()?;
        let scan = self.scan()?;
        let found = scan.slots.get(id.0 as usize);
        let (reading, slot) = found.ok_or(StoreError::NoSuchSegment(id))?;
        slot.check_drop(id, vm)?;
        match slot {
            Slot::Good(record) => self.scrub_and_free(id.0, reading, &extents(record)),
            Slot::Damaged(_) => self.give_up(id.0),
        }
    }

    /// Memory that would go with a segment: for a damaged record, all that no
    /// other is known to own.
    ///
    /// # Errors
    /// Those of [`Table::drop_segment`].
    pub(crate) fn memory_of(
        &self,
        id: SegmentId,
        vm: Option<VmId>,
    ) -> Result<Vec<Extent>, StoreError> {
        let scan = self.scan()?;
        let found = scan.slots.get(id.0 as usize);
        let (_, slot) = found.ok_or(StoreError::NoSuchSegment(id))?;
        slot.check_drop(id, vm)?;
        Ok(match slot {
            Slot::Good(record) => extents(record),
            Slot::Damaged(_) => {
                let owned: Vec<Extent> = scan.owned().into_iter().map(|(_, e)| e).collect();
                alloc::free_runs(self.superblock.segments_end(), &owned)
            }
        })
    }

    /// Gives a damaged slot up. Its memory is known only by what others do not
    /// own, so it is zeroed when the last damaged record goes.
    fn give_up(&self, slot: u32) -> Result<(), StoreError> {
        let free = RecordV1::free(slot, self.uuid());
        mirror::replace(&self.media, &record_place(slot), free.as_bytes())
            .map_err(StoreError::media("write"))?;
        let runs = self.scan()?.free_runs(self.superblock.segments_end());
        for piece in runs.chunks(PLACES) {
            self.scrub_and_free(slot, &self.reread(slot)?, piece)?;
        }
        Ok(())
    }

    /// Every used slot, with the status of its execution-state area.
    pub(crate) fn segments(&self) -> Result<Vec<SegmentEntry>, StoreError> {
        let mut out = Vec::new();
        for (i, (_, slot)) in self.scan()?.slots.iter().enumerate() {
            let i = i as u32;
            match slot {
                Slot::Good(Record::Live(owner)) => out.push(self.entry(owner)?),
                Slot::Good(_) => {}
                Slot::Damaged(reason) => out.push(SegmentEntry::Damaged {
                    slot: i,
                    name: self.name_hint(i)?,
                    reason: reason.clone(),
                }),
            }
        }
        Ok(out)
    }

    fn entry(&self, owner: &Owner) -> Result<SegmentEntry, StoreError> {
        if let Err(overrun) = self.check() {
            return Ok(SegmentEntry::Damaged {
                slot: owner.spec.id.0,
                name: Some(owner.spec.name.clone()),
                reason: overrun.to_string(),
            });
        }
        Ok(SegmentEntry::Valid(SegmentInfo {
            spec: owner.spec.clone(),
            created_ns: owner.created_ns,
            exec: exec::status(&self.exec_window(owner), &Whose::of(&owner.spec))?,
        }))
    }

    fn exec_window(&self, owner: &Owner) -> Window<'_, M> {
        Window {
            media: &self.media,
            base: owner.spec.exec.offset,
        }
    }

    fn name_hint(&self, slot: u32) -> Result<Option<VmName>, StoreError> {
        let place = record_place(slot);
        let mut page = [0u8; COPY_LEN_MAX];
        for at in [place.a, place.b] {
            self.media
                .load(at, &mut page)
                .map_err(StoreError::media("read"))?;
            if let Some(name) = RecordV1::name_hint(&page) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Free bytes, and a number that grows with every change of the table.
    pub(crate) fn usage(&self) -> Result<(u64, u64), StoreError> {
        let scan = self.scan()?;
        let free = match self.check() {
            Ok(()) => alloc::total(&scan.free_runs(self.superblock.segments_end())),
            Err(_) => 0,
        };
        let records = scan.slots.iter().map(|(reading, _)| match reading {
            Reading::Valid { generation, .. } => *generation,
            _ => 0,
        });
        let changes = records.fold(self.superblock_generation, u64::saturating_add);
        Ok((free, changes))
    }
}

/// A part of a media, seen from its own offset 0.
struct Window<'a, M> {
    media: &'a M,
    base: u64,
}

impl<M: Media> Media for Window<'_, M> {
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.media.load(self.base + offset, buf)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.media.store(self.base + offset, bytes)
    }

    fn scrub(&self, extent: Extent) -> io::Result<()> {
        self.media.scrub(Extent {
            offset: self.base + extent.offset,
            len: extent.len,
        })
    }

    fn fence(&self) {
        self.media.fence();
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
