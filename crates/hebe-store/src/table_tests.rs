//! The table, stopped between any two writes, damaged, and driven at random
//! against a model.

use std::collections::BTreeMap;
use std::slice;

use proptest::prelude::*;

use super::*;
use crate::layout::GUARD_LEN;
use crate::spec::Placement;
use crate::testing::{Image, Op, TestMedia, cut_at, every_cut};

const UUID: [u8; 16] = [0x77; 16];

/// A store without the bytes of its guard, which no change of the table reads
/// or writes (see [`spares_guard`]): images stay small.
fn fresh(granules: u64, slots: u32) -> Image {
    let media = TestMedia::over(&formatted(granules, slots));
    let guard = superblock(granules, slots).guard().place();
    media.scrub(guard).expect("scrub");
    media.snapshot()
}

fn formatted(granules: u64, slots: u32) -> Image {
    let media = TestMedia::default();
    let superblock = superblock(granules, slots);
    format(&media, &superblock).expect("format");
    media.snapshot()
}

/// Of a store with so many granules before its guard.
fn superblock(granules: u64, slots: u32) -> SuperblockV2 {
    SuperblockV2::new(UUID, granules * GRANULE + GUARD_LEN, slots, None, 5)
}

fn attach(image: &Image) -> Table<TestMedia> {
    let media = TestMedia::over(image);
    match inspect(&media).expect("inspect") {
        (Head::Store(superblock), generation) => Table::new(media, *superblock, generation),
        other => panic!("{other:?}"),
    }
}

/// As a manager opens it.
fn managed(image: &Image) -> Table<TestMedia> {
    let table = attach(image);
    table.recover().expect("recover");
    spares_guard(&table);
    table
}

/// Nothing was written to the guard, nor behind it.
fn spares_guard(table: &Table<TestMedia>) {
    let end = table.superblock.segments_end();
    let spared = |op: &Op| match op {
        Op::Store { offset, bytes } => offset + bytes.len() as u64 <= end,
        Op::Scrub(extent) => extent.offset + extent.len <= end,
        Op::Fence => true,
    };
    assert!(table.media.log.borrow().iter().all(spared));
}

fn name(i: u8) -> VmName {
    format!("vm-{i}").parse().expect("name")
}

fn create(table: &Table<TestMedia>, i: u8, granules: u64) -> Result<SegmentSpec, StoreError> {
    table.create(VmId([i; 16]), &name(i), ByteSize(granules * GRANULE), 9)
}

/// Writes a mark into every granule of a segment, as a guest and a VMM would.
fn mark(table: &Table<TestMedia>, spec: &SegmentSpec, tag: u8) {
    let mut image = table.media.image.borrow_mut();
    for granule in granules(spec) {
        image.write(granule * GRANULE + 8192, &[tag; 16]);
    }
}

fn marked(image: &Image, spec: &SegmentSpec, tag: u8) -> bool {
    granules(spec)
        .into_iter()
        .all(|granule| image.bytes(granule * GRANULE + 8192, 16) == [tag; 16])
}

fn granules(spec: &SegmentSpec) -> Vec<u64> {
    spec.extents()
        .flat_map(|e| e.offset / GRANULE..(e.offset + e.len) / GRANULE)
        .collect()
}

/// Whether a segment reads as zero where a guest or a VMM could have written.
fn clean(image: &Image, spec: &SegmentSpec) -> bool {
    let written = |e: Extent| Extent {
        len: e.len - if e == spec.exec { 8192 } else { 0 },
        ..e
    };
    spec.extents().all(|e| image.is_zero(written(e)))
}

/// Whether a segment is wiped, guard and all.
fn wiped(image: &Image, spec: &SegmentSpec) -> bool {
    spec.extents().all(|e| image.is_zero(e))
}

/// A store with a frozen VM in slot 0 and a damaged record in slot 1.
fn with_frozen() -> (Image, SegmentSpec) {
    let table = managed(&formatted(12, 3));
    let spec = create(&table, 1, 2).expect("create");
    let other = create(&table, 2, 2).expect("create");
    let exec = Window {
        media: &table.media,
        base: spec.exec.offset,
    };
    exec::commit_frozen(&exec, &Whose::of(&spec), b"state", 1).expect("freeze");
    let mut image = table.media.snapshot();
    for at in [record_place(other.id.0).a, record_place(other.id.0).b] {
        image.flip(at + 60, 1);
    }
    (image, spec)
}

fn loaded(image: &Image) -> Table<TestMedia> {
    let table = attach(image);
    let (superblock, generation) = (table.superblock, table.superblock_generation);
    Table::load(table.media, superblock, generation).expect("load")
}

#[test]
fn an_untouched_guard_lets_the_store_be_used() {
    let (image, spec) = with_frozen();
    let table = loaded(&image);
    table.check().expect("untouched");
    table.recover().expect("recover");
    let all = table.segments().expect("segments");
    let SegmentEntry::Valid(info) = &all[0] else {
        panic!("{all:?}");
    };
    assert_eq!(info.spec, spec);
    assert!(matches!(info.exec, ExecStatus::Frozen { len: 5, .. }));
}

#[test]
fn an_overwritten_guard_leaves_nothing_to_resume_and_nothing_is_written() {
    let (image, spec) = with_frozen();
    let guard = superblock(12, 3).guard().place();
    let hits = [
        (0, 1),
        (GRANULE - 1, 1),
        (GRANULE / 2, 4096),
        (0, GRANULE as usize),
    ];
    for (at, len) in hits {
        for fill in [0, 0x5a, 0xff] {
            let mut hurt = image.clone();
            let old = hurt.bytes(guard.offset + at, 1)[0];
            let byte = if old == fill { !fill } else { fill };
            hurt.write(guard.offset + at, &vec![byte; len]);
            let table = loaded(&hurt);
            assert_eq!(specs(&table), [], "nothing can be resumed");
            let listed = damaged(&table);
            assert_eq!(listed[0].0, spec.id.0);
            assert_eq!(listed[0].1.as_deref(), Some("vm-1"));
            assert!(listed[0].2.contains("something else used"), "{listed:?}");
            assert_eq!(listed[1].0, 1, "a damaged record stays listed");
            assert_eq!(table.usage().expect("usage").0, 0);
            let refused = [
                create(&table, 5, 1).map(|_| ()),
                table.drop_segment(spec.id, Some(spec.vm)),
                table.drop_segment(SegmentId(1), None),
            ];
            for result in refused {
                assert!(matches!(result, Err(StoreError::Overrun { .. })));
            }
            assert_eq!(table.media.snapshot(), hurt, "nothing is written");
        }
    }
}

#[test]
fn a_segments_overwritten_guard_costs_that_vm_alone() {
    let table = managed(&formatted(12, 3));
    let hurt = create(&table, 1, 2).expect("create");
    let kept = create(&table, 2, 2).expect("create");
    let last = hurt.exec.offset + GRANULE - 1;
    table.media.image.borrow_mut().flip(last, 0);
    let table = loaded(&table.media.snapshot());
    let all = table.segments().expect("segments");
    let damage: Vec<bool> = all
        .iter()
        .map(|entry| {
            let SegmentEntry::Valid(info) = entry else {
                panic!("{entry:?}");
            };
            matches!(info.exec, ExecStatus::Damaged { .. })
        })
        .collect();
    assert_eq!(damage, [true, false]);
    table.drop_segment(hurt.id, Some(hurt.vm)).expect("give up");
    assert!(wiped(&table.media.snapshot(), &hurt));
    assert_eq!(specs(&table), [kept]);
}

#[test]
fn formatting_again_brings_another_pattern() {
    let media = TestMedia::over(&formatted(12, 3));
    let mut again = superblock(12, 3);
    let guard = again.guard().place();
    let before = media.snapshot().bytes(guard.offset, GRANULE as usize);
    media.image.borrow_mut().write(guard.offset, &[0; 4096]);
    again.uuid = [0x88; 16];
    format(&media, &again).expect("format");
    loaded(&media.snapshot()).check().expect("a new guard");
    let after = media.snapshot().bytes(guard.offset, GRANULE as usize);
    assert_ne!(before[4096..], after[4096..]);
}

fn specs(table: &Table<TestMedia>) -> Vec<SegmentSpec> {
    let all = table.segments().expect("segments");
    let valid = all.into_iter().filter_map(|entry| match entry {
        SegmentEntry::Valid(info) => Some(info.spec),
        SegmentEntry::Damaged { .. } => None,
    });
    valid.collect()
}

fn damaged(table: &Table<TestMedia>) -> Vec<(u32, Option<String>, String)> {
    let all = table.segments().expect("segments");
    let bad = all.into_iter().filter_map(|entry| match entry {
        SegmentEntry::Damaged { slot, name, reason } => {
            Some((slot, name.map(|n| n.to_string()), reason))
        }
        SegmentEntry::Valid(_) => None,
    });
    bad.collect()
}

#[test]
fn a_stop_anywhere_in_create_leaves_the_vm_there_or_absent() {
    let table = managed(&fresh(12, 3));
    let neighbour = create(&table, 1, 2).expect("neighbour");
    mark(&table, &neighbour, 0x11);
    // Dirt where the new VM will go.
    let dirt = create(&table, 2, 4).expect("dirt");
    table.drop_segment(dirt.id, Some(dirt.vm)).expect("drop");
    mark(&table, &dirt, 0xdd);
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    let made = create(&table, 3, 4).expect("create");
    let log = table.media.log.borrow().clone();
    let (mut there, mut absent) = (0, 0);
    every_cut(&start, &log, |image, at| {
        let reader = attach(image);
        assert_eq!(damaged(&reader), [], "{at}");
        let table = managed(image);
        assert_eq!(damaged(&table), [], "{at}");
        let image = table.media.snapshot();
        assert!(marked(&image, &neighbour, 0x11), "{at}");
        match specs(&table).as_slice() {
            [one] => {
                absent += 1;
                assert_eq!(*one, neighbour);
                assert_eq!(table.usage().expect("usage").0, 7 * GRANULE, "{at}");
                let again = create(&table, 3, 4).expect("again");
                assert!(clean(&table.media.snapshot(), &again), "{at}");
            }
            [one, two] => {
                there += 1;
                assert_eq!((one, two), (&neighbour, &made));
                assert!(clean(&image, &made), "{at}");
            }
            more => panic!("{at}: {more:?}"),
        }
    });
    assert!(there > 10 && absent > 10);
}

#[test]
fn a_stop_anywhere_in_drop_leaves_the_vm_whole_or_absent() {
    let table = managed(&fresh(12, 3));
    let neighbour = create(&table, 1, 2).expect("neighbour");
    let doomed = create(&table, 2, 4).expect("doomed");
    mark(&table, &neighbour, 0x11);
    mark(&table, &doomed, 0x22);
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    table
        .drop_segment(doomed.id, Some(doomed.vm))
        .expect("drop");
    let log = table.media.log.borrow().clone();
    let (mut there, mut absent, mut looks_whole) = (0, 0, 0);
    every_cut(&start, &log, |image, at| {
        let stopped = attach(image);
        let end = stopped.superblock.segments_end();
        let mapped = check_live(&stopped.media, end, &doomed);
        let whole = marked(image, &doomed, 0x22);
        if specs(&stopped).contains(&doomed) {
            assert!(whole, "listed, so whole: {at}");
            mapped.expect("its VMM may have it");
        } else {
            // The next manager zeroes it, whatever it looks like.
            assert!(matches!(mapped, Err(StoreError::Reused(_))), "{at}");
            looks_whole += usize::from(whole);
        }
        let table = managed(image);
        let image = table.media.snapshot();
        assert!(marked(&image, &neighbour, 0x11), "{at}");
        assert_eq!(damaged(&table), [], "{at}");
        if specs(&table).contains(&doomed) {
            there += 1;
            assert!(marked(&image, &doomed, 0x22), "{at}");
        } else {
            absent += 1;
            assert!(wiped(&image, &doomed), "{at}");
            assert_eq!(table.usage().expect("usage").0, 7 * GRANULE);
        }
    });
    assert!(there > 10 && absent > 10 && looks_whole > 0);
}

#[test]
fn a_stop_anywhere_in_recovery_is_recovered_from() {
    let table = managed(&fresh(10, 2));
    let doomed = create(&table, 2, 4).expect("doomed");
    mark(&table, &doomed, 0x22);
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    table
        .drop_segment(doomed.id, Some(doomed.vm))
        .expect("drop");
    let log = table.media.log.borrow().clone();
    for full in 0..log.len() {
        let stopped = cut_at(&start, &log, full, 3);
        let recovery = managed(&stopped);
        let second = recovery.media.log.borrow().clone();
        for again in 0..second.len() {
            let table = managed(&cut_at(&stopped, &second, again, 2));
            assert_eq!(damaged(&table), []);
            let image = table.media.snapshot();
            match specs(&table).as_slice() {
                [] => assert!(wiped(&image, &doomed)),
                [one] => assert!(one == &doomed && marked(&image, &doomed, 0x22)),
                more => panic!("{more:?}"),
            }
        }
    }
}

#[test]
fn a_stop_anywhere_in_format_leaves_no_store_or_the_new_one() {
    let table = managed(&fresh(10, 2));
    create(&table, 1, 2).expect("old VM");
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    let mut new = superblock(10, 2);
    new.uuid = [0x88; 16];
    format(&table.media, &new).expect("format");
    let log = table.media.log.borrow().clone();
    for full in 2..log.len() {
        let media = TestMedia::over(&cut_at(&start, &log, full, 5));
        if let (Head::Store(found), generation) = inspect(&media).expect("inspect") {
            assert_eq!(*found, new);
            let table = Table::new(media, *found, generation);
            assert_eq!(table.segments().expect("segments"), []);
        }
    }
}

#[test]
fn one_damaged_copy_costs_nothing_and_is_repaired() {
    let table = managed(&fresh(10, 2));
    let spec = create(&table, 1, 2).expect("create");
    let image = table.media.snapshot();
    let place = record_place(spec.id.0);
    let used = (mirror::COPY_HEADER_LEN + place.payload_len) as u64;
    for at in [place.a, place.b] {
        for offset in (0..160).chain((160..used).step_by(37)) {
            for bit in 0..8 {
                let mut hurt = image.clone();
                hurt.flip(at + offset, bit);
                let table = attach(&hurt);
                assert_eq!(specs(&table), slice::from_ref(&spec), "{offset} {bit}");
                table.recover().expect("recover");
                assert_eq!(table.media.snapshot(), image, "healed");
            }
        }
    }
    for at in [SUPERBLOCK.a, SUPERBLOCK.b] {
        for offset in 0..(mirror::COPY_HEADER_LEN + SUPERBLOCK.payload_len) as u64 {
            let mut hurt = image.clone();
            hurt.flip(at + offset, (offset % 8) as u8);
            let table = managed(&hurt);
            assert_eq!(specs(&table), slice::from_ref(&spec));
            assert_eq!(table.media.snapshot(), image, "healed");
        }
    }
}

#[test]
fn a_damaged_record_costs_one_vm_and_hides_no_memory() {
    for ruin in [0u8, 0xff] {
        let table = managed(&fresh(16, 4));
        let kept = create(&table, 1, 2).expect("kept");
        let lost = create(&table, 2, 3).expect("lost");
        mark(&table, &kept, 0x11);
        mark(&table, &lost, 0x22);
        let place = record_place(lost.id.0);
        let mut image = table.media.snapshot();
        for at in [place.a, place.b] {
            image.write(at + 20, &[ruin; 60]);
            if ruin == 0 {
                image.write(at, &[0; 4096]);
            }
        }
        let table = managed(&image);
        assert_eq!(specs(&table), slice::from_ref(&kept));
        let found = damaged(&table);
        assert_eq!((found.len(), found[0].0), (1, lost.id.0), "{found:?}");
        let refused = create(&table, 3, 1).expect_err("may be the lost VM's");
        assert!(matches!(refused, StoreError::DamagedRecord(id) if id == lost.id));
        assert_eq!(
            table.usage().expect("usage").0,
            0,
            "nothing is provably free"
        );
        assert!(marked(&table.media.snapshot(), &lost, 0x22), "untouched");

        table.drop_segment(lost.id, None).expect("give up");
        assert_eq!(damaged(&table), []);
        let image = table.media.snapshot();
        assert!(marked(&image, &kept, 0x11) && wiped(&image, &lost));
        create(&table, 3, 3).expect("room again");
    }
}

#[test]
fn the_damaged_record_of_a_vm_still_shows_its_name() {
    let table = managed(&fresh(10, 2));
    let spec = create(&table, 1, 2).expect("create");
    let place = record_place(spec.id.0);
    let mut image = table.media.snapshot();
    image.flip(place.a + 120, 1);
    image.flip(place.b + 121, 1);
    let found = damaged(&managed(&image));
    assert_eq!(found[0].1.as_deref(), Some("vm-1"), "{found:?}");
}

#[test]
fn giving_up_can_be_stopped_anywhere() {
    let table = managed(&fresh(10, 2));
    let kept = create(&table, 1, 2).expect("kept");
    let lost = create(&table, 2, 2).expect("lost");
    mark(&table, &kept, 0x11);
    mark(&table, &lost, 0x22);
    // Two intact copies that contradict each other: the worst to give up.
    let place = record_place(lost.id.0);
    let payload = table
        .media
        .snapshot()
        .bytes(place.a + 32, place.payload_len);
    let copy = mirror::encode(&place, 77, &payload);
    table.media.image.borrow_mut().write(place.b, &copy);
    assert_eq!(damaged(&table).len(), 1);
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    table.drop_segment(lost.id, None).expect("give up");
    let log = table.media.log.borrow().clone();
    every_cut(&start, &log, |image, at| {
        let table = managed(image);
        assert_eq!(specs(&table), slice::from_ref(&kept), "{at}");
        let again = table.drop_segment(lost.id, None);
        assert!(matches!(again, Ok(()) | Err(StoreError::NoSuchSegment(_))));
        let made = create(&table, 3, 2).expect("room");
        let image = table.media.snapshot();
        assert!(clean(&image, &made) && marked(&image, &kept, 0x11), "{at}");
    });
}

/// Puts a record with a right checksum but wrong contents into a slot.
fn forge(table: &Table<TestMedia>, slot: u32, change: impl FnOnce(&mut Owner)) {
    let mut owner = Owner {
        spec: SegmentSpec {
            id: SegmentId(slot),
            vm: VmId([slot as u8; 16]),
            name: name(slot as u8),
            store_uuid: UUID,
            exec: Extent {
                offset: 8 * GRANULE,
                len: GRANULE,
            },
            ram: vec![Placement {
                gpa: hebe_types::Gpa(0),
                place: Extent {
                    offset: 9 * GRANULE,
                    len: 2 * GRANULE,
                },
            }],
        },
        created_ns: 1,
    };
    change(&mut owner);
    let record = RecordV1::owned(&owner, true);
    let mut record = record.as_bytes().to_vec();
    record[0] = owner.spec.id.0 as u8;
    mirror::write_first(&table.media, &record_place(slot), &record).expect("forge");
}

#[test]
fn forged_records_are_listed_and_never_believed() {
    type Change = fn(&mut Owner);
    let cases: [(Change, &str); 9] = [
        (|o| o.spec.id = SegmentId(1), "belongs in slot 1"),
        (|o| o.spec.store_uuid = [1; 16], "another store"),
        (|o| o.spec.ram[0].place.offset = 15 * GRANULE, "outside"),
        (|o| o.spec.ram[0].place.offset = GRANULE, "outside"),
        (|o| o.spec.exec.offset = 16 * GRANULE, "outside"),
        (|o| o.spec.exec.offset = 10 * GRANULE, "overlap"),
        (|o| o.spec.ram[0].place.len = 0, "granules"),
        (|o| o.spec.ram[0].gpa.0 = GRANULE, "guest-physical"),
        (
            |o| o.spec.ram[0].place.offset = 2 * GRANULE,
            "another segment",
        ),
    ];
    for (change, why) in cases {
        let table = managed(&fresh(16, 4));
        let honest = create(&table, 1, 2).expect("honest");
        mark(&table, &honest, 0x11);
        forge(&table, 2, change);
        let table = managed(&table.media.snapshot());
        let found = damaged(&table);
        let of_slot = found.iter().find(|(slot, ..)| *slot == 2);
        let reason = &of_slot.expect("listed").2;
        assert!(reason.contains(why), "{why}: {reason}");
        assert!(create(&table, 3, 1).is_err());
        assert!(marked(&table.media.snapshot(), &honest, 0x11));
        // Two that claim the same memory are both doubted; giving the forged
        // one up brings the other back.
        table.drop_segment(SegmentId(2), None).expect("give up");
        assert_eq!(specs(&table), slice::from_ref(&honest));
        assert!(marked(&table.media.snapshot(), &honest, 0x11));
    }
}

#[test]
fn a_failing_device_leaves_nothing_allocated() {
    let table = managed(&fresh(10, 2));
    table.media.scrub_fails.set(true);
    assert!(create(&table, 1, 2).is_err());
    table.media.scrub_fails.set(false);
    assert_eq!(table.usage().expect("usage").0, 8 * GRANULE);
    create(&table, 1, 2).expect("room");
    create(&table, 2, 2).expect("room");
    assert!(matches!(create(&table, 3, 1), Err(StoreError::TableFull)));
}

#[test]
fn superblock_and_record_have_their_golden_bytes() {
    let media = TestMedia::default();
    let mut sb = SuperblockV2::new(UUID, 16 * GRANULE, 4, Some((0x1_0000_0000, 0x200_0000)), 5);
    sb.release = [0; 32];
    sb.release[..5].copy_from_slice(b"0.1.0");
    format(&media, &sb).expect("format");
    let table = attach(&media.snapshot());
    create(&table, 1, 2).expect("create");
    let image = table.media.snapshot();

    let mut golden = Vec::new();
    golden.extend_from_slice(b"HEBESTOR");
    golden.extend_from_slice(&[2, 0, 0, 0, 112, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0; 4]);
    golden.extend_from_slice(&SUPERBLOCK_CRC.to_le_bytes());
    golden.extend_from_slice(&[0x77; 16]);
    golden.extend_from_slice(&[0, 0, 0, 2, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0]);
    golden.extend_from_slice(&[0, 0, 0, 2, 0, 0, 0, 0]);
    golden.extend_from_slice(&[5, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0, 0, 0x20, 0, 2, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
    golden.extend_from_slice(b"0.1.0");
    golden.extend_from_slice(&[0; 27 + 16]);
    assert_eq!(image.bytes(0, golden.len()), golden);
    assert_eq!(image.bytes(0x1000, golden.len()), golden);

    let mut golden = Vec::new();
    golden.extend_from_slice(b"HEBESEGM");
    golden.extend_from_slice(&[1, 0, 0, 0, 0x60, 0x0f, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0; 4]);
    golden.extend_from_slice(&RECORD_CRC.to_le_bytes());
    golden.extend_from_slice(&[0, 0, 0, 0, 3, 0, 0, 0]);
    golden.extend_from_slice(&[0x77; 16]);
    golden.extend_from_slice(&[1; 16]);
    golden.extend_from_slice(b"vm-1");
    golden.extend_from_slice(&[0; 28]);
    golden.extend_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0]);
    golden.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0]);
    golden.resize(32 + 3936, 0);
    for at in [GRANULE, GRANULE + 0x1000] {
        assert_eq!(image.bytes(at, golden.len()), golden);
    }
}

/// Computed by another implementation of CRC-32 over the bytes of the test above.
const SUPERBLOCK_CRC: u32 = 0xe188_8528;
/// As above.
const RECORD_CRC: u32 = 0xaa73_aea0;

/// What happens to a store.
#[derive(Clone, Debug)]
enum Act {
    Create {
        vm: u8,
        granules: u64,
        stop: Option<(usize, usize)>,
    },
    Drop {
        nth: usize,
        stop: Option<(usize, usize)>,
    },
    Reopen,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let stop = || proptest::option::of((0..40usize, 0..600usize));
    let act = prop_oneof![
        3 => (0..8u8, 1..6u64, stop()).prop_map(|(vm, granules, stop)| Act::Create {
            vm, granules, stop
        }),
        2 => (0..8usize, stop()).prop_map(|(nth, stop)| Act::Drop { nth, stop }),
        1 => Just(Act::Reopen),
    ];
    proptest::collection::vec(act, 1..24)
}

/// The model: which VMs there are, with the mark in their RAM.
type Model = BTreeMap<u8, SegmentSpec>;

fn check(table: &Table<TestMedia>, model: &Model) {
    let found: BTreeMap<u8, SegmentSpec> = specs(table)
        .into_iter()
        .map(|spec| (spec.vm.0[0], spec))
        .collect();
    assert_eq!(&found, model);
    let image = table.media.snapshot();
    let mut used = std::collections::BTreeSet::new();
    for (tag, spec) in model {
        assert!(marked(&image, spec, *tag + 1), "RAM of {tag} was touched");
        let guard = Whose::of(spec);
        let exec = Window {
            media: &table.media,
            base: spec.exec.offset,
        };
        let status = exec::status(&exec, &guard).expect("status");
        assert!(
            !matches!(status, ExecStatus::Damaged { reason } if reason.contains("wrote to it"))
        );
        for granule in granules(spec) {
            assert!(granule * GRANULE >= HEAD_LEN && granule < 20);
            assert!(used.insert(granule), "granule {granule} twice");
        }
    }
    spares_guard(table);
    let free = (18 - used.len() as u64) * GRANULE;
    assert_eq!(table.usage().expect("usage").0, free);
}

/// Runs a change, stopped part-way if asked; the table as the next manager
/// finds it.
fn stoppable(
    table: Table<TestMedia>,
    stop: Option<(usize, usize)>,
    change: impl FnOnce(&Table<TestMedia>),
) -> Table<TestMedia> {
    let start = table.media.snapshot();
    table.media.log.borrow_mut().clear();
    change(&table);
    let Some((full, words)) = stop else {
        return table;
    };
    let log = table.media.log.borrow().clone();
    managed(&cut_at(&start, &log, full, words))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_sequence_of_changes_and_stops_hands_out_owned_memory(acts in acts()) {
        let mut table = managed(&fresh(20, 4));
        let mut model = Model::new();
        for act in acts {
            match act {
                Act::Create { vm, granules, stop } => {
                    let fits = table.usage().expect("usage").0 >= (granules + 1) * GRANULE;
                    let expected = fits && model.len() < 4 && !model.contains_key(&vm);
                    let mut made = None;
                    table = stoppable(table, stop, |t| made = create(t, vm, granules).ok());
                    prop_assert_eq!(made.is_some(), expected);
                    if let Some(spec) = made.filter(|spec| specs(&table).contains(spec)) {
                        prop_assert!(clean(&table.media.snapshot(), &spec));
                        mark(&table, &spec, vm + 1);
                        model.insert(vm, spec);
                    }
                }
                Act::Drop { nth, stop } => {
                    let Some((vm, spec)) = model.iter().nth(nth) else { continue };
                    let (vm, spec) = (*vm, spec.clone());
                    table = stoppable(table, stop, |t| t.drop_segment(spec.id, Some(spec.vm)).expect("drop"));
                    if !specs(&table).contains(&spec) {
                        prop_assert!(wiped(&table.media.snapshot(), &spec));
                        model.remove(&vm);
                    }
                }
                Act::Reopen => table = managed(&table.media.snapshot()),
            }
            check(&table, &model);
        }
    }

    /// Any damage anywhere in the table: what is listed as valid is what was
    /// there, and no memory of another VM is handed out or zeroed.
    #[test]
    fn random_damage_never_forges_a_segment(
        hits in proptest::collection::vec((0..4u32, 0..8192u64, any::<u8>(), 1..300usize), 1..5),
    ) {
        let table = managed(&fresh(20, 4));
        let made: Vec<_> = (0..3).map(|i| create(&table, i, 3).expect("create")).collect();
        for (i, spec) in made.iter().enumerate() {
            mark(&table, spec, i as u8 + 1);
        }
        let mut image = table.media.snapshot();
        for (slot, offset, byte, len) in hits {
            let len = len.min((8192 - offset) as usize);
            image.write(record_place(slot).a + offset, &vec![byte; len]);
        }
        let table = managed(&image);
        for spec in specs(&table) {
            prop_assert!(made.contains(&spec));
        }
        let before = damaged(&table).len();
        prop_assert_eq!(create(&table, 9, 1).is_ok(), before == 0);
        let image = table.media.snapshot();
        for (i, spec) in made.iter().enumerate() {
            prop_assert!(marked(&image, spec, i as u8 + 1));
        }
    }
}
