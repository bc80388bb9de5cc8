//! Stores on real files, segments on real mappings.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hebe_store::{
    Access, ExecStatus, FormatOptions, MappedRam, REPORT_LEN_MAX, Segment, SegmentEntry,
    SegmentSpec, Store, StoreError,
};
use hebe_types::{ByteSize, GRANULE, VmId, VmName};

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

/// A file for a store of so many granules and the guard.
fn bench(granules: u64) -> Bench {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("store");
    let file = File::create_new(&path).expect("file");
    file.set_len((granules + 1) * GRANULE).expect("length");
    Bench { _dir: dir, path }
}

fn formatted(granules: u64) -> Bench {
    let bench = bench(granules);
    Store::format(&bench.path, FormatOptions::default()).expect("format");
    bench
}

fn manage(path: &Path) -> Store {
    Store::open(path, Access::Manage).expect("open")
}

fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

fn fd(path: &Path) -> OwnedFd {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .open(path)
        .expect("open")
        .into()
}

fn write_ram(ram: &MappedRam, offset: u64, bytes: &[u8]) {
    assert!(offset + bytes.len() as u64 <= ram.len);
    // SAFETY: inside the mapping, which the caller's segment keeps alive.
    unsafe {
        let to = ram.host.as_ptr().add(offset as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
    }
}

fn read_ram(ram: &MappedRam, offset: u64, len: usize) -> Vec<u8> {
    assert!(offset + len as u64 <= ram.len);
    let mut out = vec![0; len];
    // SAFETY: inside the mapping, which the caller's segment keeps alive.
    unsafe {
        let from = ram.host.as_ptr().add(offset as usize);
        std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), len);
    }
    out
}

fn valid(store: &Store) -> Vec<(SegmentSpec, ExecStatus)> {
    let all = store.segments().expect("segments");
    all.into_iter()
        .map(|entry| match entry {
            SegmentEntry::Valid(info) => (info.spec, info.exec),
            damaged => panic!("{damaged:?}"),
        })
        .collect()
}

#[test]
fn a_vm_is_found_again_with_its_ram_and_state() {
    let bench = formatted(16);
    let mut store = manage(&bench.path);
    let spec = store
        .create(VmId([1; 16]), &name("web"), ByteSize(4 * GRANULE))
        .expect("create");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    assert_eq!(segment.ram().len(), 1);
    assert_eq!(segment.ram()[0].host.as_ptr().addr() % GRANULE as usize, 0);
    assert_eq!(segment.ram()[0].len, 4 * GRANULE);
    assert_eq!(segment.exec().status(), ExecStatus::Empty);
    segment.exec().mark_running([5; 16], 77).expect("running");
    for granule in 0..4u64 {
        write_ram(
            &segment.ram()[0],
            granule * GRANULE + 9,
            &[granule as u8 + 1],
        );
    }
    segment.exec().commit_frozen(b"the state").expect("frozen");
    drop((segment, store));

    let store = Store::open(&bench.path, Access::Read).expect("open");
    let (found, exec) = valid(&store).pop().expect("one");
    assert_eq!(found, spec);
    assert!(
        matches!(exec, ExecStatus::Frozen { len: 9, .. }),
        "{exec:?}"
    );
    let segment = Segment::map(fd(&bench.path), &found).expect("map");
    assert_eq!(segment.exec().load().expect("state"), b"the state");
    for granule in 0..4u64 {
        let byte = read_ram(&segment.ram()[0], granule * GRANULE + 9, 1);
        assert_eq!(byte, [granule as u8 + 1]);
    }
    segment.exec().mark_running([6; 16], 78).expect("running");
    let expected = "process 78";
    let refused = segment.exec().load().expect_err("RAM may have changed");
    assert!(refused.to_string().contains(expected), "{refused}");
    assert!(matches!(
        valid(&store)[0].1,
        ExecStatus::Running { pid: 78, .. }
    ));
}

#[test]
fn ram_in_pieces_is_contiguous_for_the_guest() {
    let bench = formatted(16);
    let mut store = manage(&bench.path);
    let size = ByteSize(2 * GRANULE);
    let specs: Vec<SegmentSpec> = ["a", "b", "c", "d"]
        .iter()
        .enumerate()
        .map(|(i, n)| {
            store
                .create(VmId([i as u8; 16]), &name(n), size)
                .expect("create")
        })
        .collect();
    store
        .drop_segment(specs[0].id, Some(specs[0].vm))
        .expect("drop");
    store
        .drop_segment(specs[2].id, Some(specs[2].vm))
        .expect("drop");
    let spec = store
        .create(VmId([9; 16]), &name("e"), ByteSize(6 * GRANULE))
        .expect("create");
    assert!(spec.ram.len() > 1, "{spec:?}");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    assert_eq!(segment.ram().len(), 1);
    for granule in 0..6u64 {
        write_ram(
            &segment.ram()[0],
            granule * GRANULE,
            &[0x40 + granule as u8],
        );
    }
    let file = File::open(&bench.path).expect("file");
    for placement in &spec.ram {
        for at in (0..placement.place.len).step_by(GRANULE as usize) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, placement.place.offset + at)
                .expect("read");
            let granule = (placement.gpa.0 + at) / GRANULE;
            assert_eq!(byte[0], 0x40 + granule as u8);
        }
    }
}

#[test]
fn destroyed_bytes_are_gone_and_a_new_vm_sees_zeros() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let size = ByteSize(5 * GRANULE);
    let spec = store.create(VmId([1; 16]), &name("a"), size).expect("a");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    for at in (0..size.bytes()).step_by(4096) {
        write_ram(&segment.ram()[0], at, b"secret");
    }
    segment.exec().commit_frozen(b"secret").expect("frozen");
    drop(segment);
    let full = store.create(VmId([2; 16]), &name("b"), ByteSize(GRANULE));
    assert!(
        matches!(full, Err(StoreError::OutOfSpace { .. })),
        "{full:?}"
    );
    store.drop_segment(spec.id, Some(spec.vm)).expect("drop");
    let bytes = std::fs::read(&bench.path).expect("read");
    assert!(!bytes.windows(6).any(|w| w == b"secret"));

    // Bytes that got there behind the store's back are not seen either.
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    for granule in 2..8 {
        file.write_all_at(b"leftover", granule * GRANULE + 4096)
            .expect("write");
    }
    let spec = store.create(VmId([2; 16]), &name("b"), size).expect("b");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    assert_eq!(segment.exec().status(), ExecStatus::Empty);
    let ram = read_ram(&segment.ram()[0], 0, size.bytes() as usize);
    assert!(ram.iter().all(|b| *b == 0));
}

/// A VM's disk whose name was typed in the store's place.
#[test]
fn a_file_that_holds_something_else_is_not_formatted_unasked() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk.img");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let file = file.expect("create");
    file.set_len(8 * GRANULE).expect("size");
    // Where a file system has its superblock.
    file.write_all_at(b"somebody's", 1080).expect("write");
    let refused = Store::format(&path, FormatOptions::default());
    let error = refused.expect_err("it is no store");
    assert!(matches!(error, StoreError::NotBlank(_)), "{error}");
    let mut start = vec![0; 4096];
    file.read_exact_at(&mut start, 0).expect("read");
    assert_eq!(&start[1080..1090], b"somebody's", "nothing is written");
    assert!(start[..1080].iter().all(|b| *b == 0));
    Store::format(&path, FormatOptions { force: true }).expect("by order");
}

#[test]
fn formatting_needs_force_where_a_store_is() {
    let bench = formatted(8);
    let refused = Store::format(&bench.path, FormatOptions::default());
    assert!(matches!(
        refused,
        Err(StoreError::Formatted { segments: 0, .. })
    ));
    let mut store = manage(&bench.path);
    store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    drop(store);
    let refused = Store::format(&bench.path, FormatOptions::default());
    assert!(matches!(
        refused,
        Err(StoreError::Formatted { segments: 1, .. })
    ));
    // Both superblocks wiped: the records still tell.
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    file.write_all_at(&[0; 8192], 0).expect("wipe");
    let refused = Store::format(&bench.path, FormatOptions::default());
    assert!(matches!(refused, Err(StoreError::HeadDamaged { .. })));
    let opened = Store::open(&bench.path, Access::Read).map(|_| ());
    assert!(matches!(opened, Err(StoreError::HeadDamaged { .. })));
    let info = Store::format(&bench.path, FormatOptions { force: true }).expect("force");
    assert_eq!(info.free, 6 * GRANULE);
    assert!(valid(&manage(&bench.path)).is_empty());
}

#[test]
fn a_foreign_or_small_device_is_refused() {
    let empty = bench(8);
    let opened = Store::open(&empty.path, Access::Manage).map(|_| ());
    assert!(matches!(opened, Err(StoreError::NoStore(_))), "{opened:?}");
    let small = bench(3);
    let formatted = Store::format(&small.path, FormatOptions::default());
    assert!(matches!(formatted, Err(StoreError::TooSmall { .. })));
    let opened = Store::open(Path::new("/dev/null"), Access::Read).map(|_| ());
    assert!(
        matches!(opened, Err(StoreError::NotUsable(_))),
        "{opened:?}"
    );
    let opened = Store::open(Path::new("/nonexistent"), Access::Read).map(|_| ());
    assert!(matches!(opened, Err(StoreError::Open { .. })), "{opened:?}");
}

#[test]
fn a_shrunken_reservation_is_named_and_nothing_is_written() {
    let bench = formatted(16);
    let spec = manage(&bench.path)
        .create(VmId([1; 16]), &name("a"), ByteSize(12 * GRANULE))
        .expect("create");
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    file.set_len(12 * GRANULE).expect("shrink");
    let before = std::fs::read(&bench.path).expect("read");
    let opened = Store::open(&bench.path, Access::Manage).map(|_| ());
    let said = opened.expect_err("refused").to_string();
    assert!(said.contains("34MiB") && said.contains("24MiB"), "{said}");
    let refused = Store::format(&bench.path, FormatOptions::default());
    assert!(matches!(refused, Err(StoreError::Formatted { .. })));
    let mapped = Segment::map(fd(&bench.path), &spec).map(|_| ());
    assert!(
        matches!(mapped, Err(StoreError::BeyondEnd { .. })),
        "{mapped:?}"
    );
    assert_eq!(std::fs::read(&bench.path).expect("read"), before);
}

#[test]
fn one_manager_at_a_time_and_mappings_do_not_keep_its_lock() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let second = Store::open(&bench.path, Access::Manage).map(|_| ());
    assert!(matches!(second, Err(StoreError::Busy(_))), "{second:?}");
    Store::open(&bench.path, Access::Read).expect("readers may look");
    let spec = store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    // As a VMM does: from the manager's descriptor.
    let passed = store.device_fd().try_clone_to_owned().expect("dup");
    let segment = Segment::map(passed, &spec).expect("map");
    drop(store);
    let mut store = manage(&bench.path);
    store.write_report(b"second manager").expect("report");
    drop(segment);
}

#[test]
fn a_reader_changes_nothing() {
    let bench = formatted(8);
    let before = std::fs::read(&bench.path).expect("read");
    let mut store = Store::open(&bench.path, Access::Read).expect("open");
    let created = store.create(VmId([1; 16]), &name("a"), ByteSize(GRANULE));
    assert!(matches!(created, Err(StoreError::ReadOnly)));
    assert!(matches!(
        store.write_report(b"x"),
        Err(StoreError::ReadOnly)
    ));
    assert_eq!(std::fs::read(&bench.path).expect("read"), before);
}

#[test]
fn bad_requests_get_a_sentence_and_leave_nothing() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let mut create = |vm: u8, n: &str, bytes: u64| {
        let made = store.create(VmId([vm; 16]), &name(n), ByteSize(bytes));
        made.map_err(|e| e.to_string())
    };
    assert!(create(1, "a", 0).expect_err("zero").contains("2MiB"));
    assert!(
        create(1, "a", 4096)
            .expect_err("unaligned")
            .contains("2MiB")
    );
    assert!(
        create(1, "a", 1 << 62)
            .expect_err("huge")
            .contains("12MiB free")
    );
    assert!(
        create(1, "a", 6 * GRANULE)
            .expect_err("full")
            .contains("free")
    );
    create(1, "a", GRANULE).expect("fits");
    assert!(
        create(2, "a", GRANULE)
            .expect_err("name")
            .contains("already has segment 0")
    );
    assert!(
        create(1, "b", GRANULE)
            .expect_err("id")
            .contains("already has segment 0")
    );
    assert_eq!(valid(&store).len(), 1);
    assert_eq!(store.info().expect("info").free, 4 * GRANULE);
    for other in [None, Some(VmId([9; 16]))] {
        let dropped = store.drop_segment(valid(&store)[0].0.id, other);
        assert!(matches!(dropped, Err(StoreError::Reused(_))), "{dropped:?}");
    }
    assert_eq!(valid(&store).len(), 1, "another VM's segment is left alone");
    let dropped = store.drop_segment(hebe_types::SegmentId(7), None);
    assert!(matches!(dropped, Err(StoreError::NoSuchSegment(_))));
    let dropped = store.drop_segment(hebe_types::SegmentId(70_000), None);
    assert!(matches!(dropped, Err(StoreError::NoSuchSegment(_))));
}

#[test]
fn the_report_outlives_its_writer() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    assert_eq!(store.read_report().expect("read"), None);
    for round in 0..5u8 {
        let text = vec![round; 1000 + usize::from(round)];
        store.write_report(&text).expect("write");
        assert_eq!(store.read_report().expect("read"), Some(text));
    }
    let longest = vec![7; REPORT_LEN_MAX];
    store.write_report(&longest).expect("write");
    let refused = store.write_report(&vec![7; REPORT_LEN_MAX + 1]);
    assert!(matches!(refused, Err(StoreError::ReportTooLong { .. })));
    drop(store);
    let store = Store::open(&bench.path, Access::Read).expect("open");
    assert_eq!(store.read_report().expect("read"), Some(longest));
}

#[test]
fn a_memfd_segment_is_sealed_and_works() {
    let size = ByteSize(3 * GRANULE);
    let segment = Segment::new_memfd(VmId([1; 16]), &name("m"), size, false).expect("memfd");
    let ram = &segment.ram()[0];
    assert_eq!(ram.len, size.bytes());
    write_ram(ram, size.bytes() - 4, b"tail");
    assert_eq!(read_ram(ram, size.bytes() - 4, 4), b"tail");
    segment.exec().mark_running([1; 16], 1).expect("running");
    segment.exec().commit_frozen(&[3; 100_000]).expect("frozen");
    assert_eq!(segment.exec().load().expect("load"), vec![3; 100_000]);
    let memfd = segment.memfd().expect("memfd");
    rustix::fs::ftruncate(memfd, GRANULE).expect_err("sealed");
    // The same memory through another mapping, as a later VMM would see it.
    let again = memfd.try_clone_to_owned().expect("dup");
    let second = Segment::map(again, segment.spec()).expect("map");
    assert_eq!(read_ram(&second.ram()[0], size.bytes() - 4, 4), b"tail");
    assert_eq!(second.exec().load().expect("load").len(), 100_000);
}

#[test]
fn huge_pages_are_used_or_refused_by_name() {
    let pages_free =
        std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0);
    let made = Segment::new_memfd(VmId([1; 16]), &name("m"), ByteSize(3 * GRANULE), true);
    if pages_free >= 4 {
        write_ram(&made.expect("memfd").ram()[0], 0, b"x");
    } else {
        let said = made.map(|_| ()).expect_err("too few").to_string();
        assert!(said.contains("vm.nr_hugepages"), "{said}");
    }
}

#[test]
fn ram_around_the_hole_is_two_ranges() {
    let size = ByteSize::gib(4);
    let segment = Segment::new_memfd(VmId([1; 16]), &name("m"), size, false).expect("memfd");
    let ranges: Vec<(u64, u64)> = segment.ram().iter().map(|r| (r.gpa.0, r.len)).collect();
    assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
    write_ram(&segment.ram()[1], (1 << 30) - 1, b"x");
}

/// Everything that is listed, which must all be damaged.
fn damaged(store: &Store) -> Vec<(Option<VmName>, String)> {
    let all = store.segments().expect("segments");
    all.into_iter()
        .map(|entry| match entry {
            SegmentEntry::Damaged { name, reason, .. } => (name, reason),
            valid => panic!("{valid:?}"),
        })
        .collect()
}

#[test]
fn memory_that_something_else_used_is_named_and_nothing_is_resumed_or_written() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let spec = store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    segment.exec().commit_frozen(b"state").expect("frozen");
    drop((store, segment));
    let intact = std::fs::read(&bench.path).expect("read");
    for at in [8 * GRANULE, 9 * GRANULE - 1] {
        let mut hurt = intact.clone();
        hurt[at as usize] ^= 1;
        std::fs::write(&bench.path, &hurt).expect("write");
        for access in [Access::Read, Access::Manage] {
            let mut store = Store::open(&bench.path, access).expect("it can be looked at");
            let said = store.check().expect_err("overrun").to_string();
            assert!(said.contains("hebe store init --force"), "{said}");
            assert_eq!(damaged(&store), [(Some(name("a")), said)]);
            assert_eq!(store.info().expect("info").free, 0);
            assert_eq!(store.read_report().expect("report"), None);
            if access == Access::Manage {
                let refused = [
                    store.drop_segment(spec.id, Some(spec.vm)),
                    store.write_report(b"x"),
                    store
                        .create(VmId([2; 16]), &name("b"), ByteSize(GRANULE))
                        .map(|_| ()),
                ];
                for result in refused {
                    assert!(matches!(result, Err(StoreError::Overrun { .. })));
                }
            }
        }
        let refused = Store::format(&bench.path, FormatOptions::default());
        assert!(matches!(
            refused,
            Err(StoreError::Formatted { segments: 1, .. })
        ));
        assert!(std::fs::read(&bench.path).expect("read") == hurt);
    }
    // Untouched again, it is as it was; and made anew, it is usable.
    std::fs::write(&bench.path, &intact).expect("write");
    assert_eq!(valid(&manage(&bench.path)).len(), 1);
    std::fs::write(&bench.path, vec![0xa5; intact.len()]).expect("write");
    let force = FormatOptions { force: true };
    Store::format(&bench.path, force).expect("anew");
    let store = manage(&bench.path);
    store.check().expect("a new guard");
    assert!(valid(&store).is_empty());
}

#[test]
fn the_smallest_store_holds_one_vm() {
    let bench = formatted(4);
    let mut store = manage(&bench.path);
    assert_eq!(store.info().expect("info").granules_total, 5);
    store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("one");
    assert_eq!(store.info().expect("info").free, 0);
    drop(store);
    let store = Store::open(&bench.path, Access::Read).expect("open");
    store.check().expect("untouched");
    assert_eq!(valid(&store).len(), 1);
}

#[test]
fn a_store_in_a_range_that_grew_keeps_its_guard() {
    let bench = formatted(8);
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    file.set_len(20 * GRANULE).expect("grow");
    manage(&bench.path).check().expect("untouched");
}

#[test]
fn a_segment_that_something_else_wrote_to_is_not_resumed() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let spec = store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    segment.exec().commit_frozen(b"state").expect("frozen");
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    file.write_all_at(&[0; 4096], spec.exec.offset + GRANULE - 4096)
        .expect("write");
    let refused = segment.exec().load().expect_err("damaged");
    assert!(matches!(refused, StoreError::ExecDamaged(_)), "{refused}");
    segment.exec().mark_running([1; 16], 1).expect_err("kept");
    assert!(matches!(valid(&store)[0].1, ExecStatus::Damaged { .. }));
    drop(segment);
    store
        .drop_segment(spec.id, Some(spec.vm))
        .expect("given up");
}

/// Two VMMs never run the same RAM, and none runs in memory that was freed.
#[test]
fn a_segment_has_one_holder_as_long_as_it_is_mapped() {
    let bench = formatted(16);
    let mut store = manage(&bench.path);
    let size = ByteSize(2 * GRANULE);
    let spec = store
        .create(VmId([1; 16]), &name("web"), size)
        .expect("web");
    let other = store.create(VmId([2; 16]), &name("db"), size).expect("db");
    assert!(!store.is_held(&spec).expect("look"));
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    segment.exec().commit_frozen(b"state").expect("frozen");
    assert!(store.is_held(&spec).expect("look"));
    assert!(
        !store.is_held(&other).expect("look"),
        "its neighbour is not"
    );
    let looker = Store::open(&bench.path, Access::Read).expect("open");
    assert!(looker.is_held(&spec).expect("look"));
    let second = Segment::map(fd(&bench.path), &spec).map(|_| ());
    assert!(matches!(second, Err(StoreError::Held(id)) if id == spec.id));
    let dropped = store.drop_segment(spec.id, Some(spec.vm));
    assert!(matches!(dropped, Err(StoreError::Held(_))), "{dropped:?}");
    assert_eq!(segment.exec().load().expect("untouched"), b"state");
    drop((store, looker));
    let made = Store::format(&bench.path, FormatOptions { force: true });
    assert!(matches!(made, Err(StoreError::InUse(_))), "{made:?}");
    drop(segment);
    let mut store = manage(&bench.path);
    let again = Segment::map(fd(&bench.path), &spec).expect("free again");
    drop(again);
    store.drop_segment(spec.id, Some(spec.vm)).expect("free");
    store.drop_segment(other.id, Some(other.vm)).expect("free");
}

/// Who looked before it was dropped has a description of memory that is another
/// VM's by now.
#[test]
fn a_segment_that_was_dropped_since_it_was_listed_is_not_mapped() {
    let bench = formatted(8);
    let mut store = manage(&bench.path);
    let old = store
        .create(VmId([1; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    store.drop_segment(old.id, Some(old.vm)).expect("drop");
    let refused = Segment::map(fd(&bench.path), &old).map(|_| ());
    assert!(matches!(refused, Err(StoreError::Reused(_))), "{refused:?}");
    let new = store
        .create(VmId([2; 16]), &name("a"), ByteSize(GRANULE))
        .expect("create");
    assert_eq!((new.id, new.exec), (old.id, old.exec), "the same place");
    let refused = Segment::map(fd(&bench.path), &old).map(|_| ());
    assert!(matches!(refused, Err(StoreError::Reused(_))), "{refused:?}");
    Segment::map(fd(&bench.path), &new).expect("its own");
}

/// Nobody can tell which memory a damaged record owns: none that is mapped and
/// has no other owner is given away with it.
#[test]
fn a_damaged_record_is_not_given_up_under_its_vmm() {
    let bench = formatted(16);
    let mut store = manage(&bench.path);
    let size = ByteSize(2 * GRANULE);
    let spec = store
        .create(VmId([1; 16]), &name("web"), size)
        .expect("web");
    let other = store.create(VmId([2; 16]), &name("db"), size).expect("db");
    let segment = Segment::map(fd(&bench.path), &spec).expect("map");
    let neighbour = Segment::map(fd(&bench.path), &other).expect("map");
    let file = OpenOptions::new()
        .write(true)
        .open(&bench.path)
        .expect("file");
    let record = GRANULE + u64::from(spec.id.0) * 8192;
    file.write_all_at(&[0xa5; 8192], record).expect("damage");
    let given_up = store.drop_segment(spec.id, None);
    assert!(matches!(given_up, Err(StoreError::Held(_))), "{given_up:?}");
    drop(segment);
    store.drop_segment(spec.id, None).expect("nobody is in it");
    drop(neighbour);
}
