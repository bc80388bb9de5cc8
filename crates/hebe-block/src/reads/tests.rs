use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use super::*;

/// What all disks of a process may have under way is one number.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// With a ring, or a word why there is none.
fn disk_or_skip(
    file: &tempfile::NamedTempFile,
    open: fn(&mut BlockBackend) -> Result<(), NoRing>,
) -> Option<BlockBackend> {
    let mut disk = BlockBackend::open(file.path(), false).expect("open");
    match open(&mut disk) {
        Ok(()) => Some(disk),
        Err(why) => {
            println!("skipped: no ring for this disk: {why}");
            None
        }
    }
}

fn patterned(len: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 513) as u8).collect();
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().write_all_at(&bytes, 0).expect("write");
    (file, bytes)
}

fn drop_from_cache(file: &tempfile::NamedTempFile) {
    file.as_file().sync_all().expect("sync");
    let advice = rustix::fs::Advice::DontNeed;
    rustix::fs::fadvise(file.as_file(), 0, None, advice).expect("advice");
}

/// Takes what ends until nothing is under way.
fn take_all(disk: &BlockBackend) -> BTreeMap<usize, io::Result<Vec<u8>>> {
    let mut all = BTreeMap::new();
    while disk.reads_under_way() > 0 {
        if let Some((number, read)) = disk.ended_read() {
            assert!(all.insert(number, read).is_none());
            continue;
        }
        let readable = disk.reads_ended().expect("a ring");
        // SAFETY: the disk's ring is open.
        let readable = unsafe { std::os::fd::BorrowedFd::borrow_raw(readable) };
        let mut fds = [rustix::event::PollFd::new(
            &readable,
            rustix::event::PollFlags::IN,
        )];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => panic!("{e}"),
        }
    }
    all
}

#[test]
fn what_is_under_way_is_what_lies_there_and_is_counted() {
    let _turn = turn();
    let (file, bytes) = patterned(4 << 20);
    for open in [
        BlockBackend::open_ring,
        // Each read is refused there, and done one by one.
        BlockBackend::open_refusing_ring,
    ] {
        let Some(disk) = disk_or_skip(&file, open) else {
            return;
        };
        drop_from_cache(&file);
        let mut begun = BTreeMap::new();
        for at in (0..4 << 20).step_by(128 << 10) {
            let Some(number) = disk.begin_read(8192, at) else {
                panic!("there is room");
            };
            begun.insert(number, at as usize);
        }
        disk.send_reads().expect("sent");
        let ended = take_all(&disk);
        assert!(ended.keys().eq(begun.keys()));
        for (number, read) in ended {
            let at = begun[&number];
            assert!(read.expect("read") == bytes[at..at + 8192], "{at}");
        }
        assert_eq!(disk.bytes_read(), 32 * 8192);
    }
}

#[test]
fn what_is_in_the_cache_is_read_at_once() {
    let _turn = turn();
    let (file, bytes) = patterned(1 << 20);
    let Some(disk) = disk_or_skip(&file, BlockBackend::open_ring) else {
        return;
    };
    let mut data = vec![0; 4096];
    disk.read_at(&mut data, 8192).expect("read");
    assert!(disk.read_cached(&mut data, 8192));
    assert!(data == bytes[8192..][..4096]);
    assert_eq!((disk.reads_under_way(), disk.bytes_read()), (0, 2 * 4096));
    // Nothing beyond the disk.
    assert!(!disk.read_cached(&mut data, 1 << 20));
    assert_eq!(disk.begin_read(4096, (1 << 20) - 512), None);
    assert_eq!(disk.begin_read(0, 0), None);
}

#[test]
fn room_for_reads_is_bounded_for_a_disk_and_for_all() {
    let _turn = turn();
    let (files, mut disks): (Vec<_>, Vec<_>) = (0..3)
        .filter_map(|_| {
            let (file, _) = patterned(2 << 20);
            let disk = disk_or_skip(&file, BlockBackend::open_ring)?;
            Some((file, disk))
        })
        .unzip();
    if files.len() < 3 {
        return;
    }
    let begin_all = |disk: &BlockBackend, len: usize| {
        let begun = (0..200).map_while(|_| disk.begin_read(len, 0));
        begun.count()
    };
    // By number, by size, and by what the others left.
    assert_eq!(begin_all(&disks[0], 512), READS_MAX);
    assert_eq!(begin_all(&disks[1], 256 << 10), 4);
    assert_eq!(begin_all(&disks[2], 256 << 10), 3);
    // What is prepared, or under way, is room again when its disk is gone, or
    // it was taken.
    disks[1].send_reads().expect("sent");
    disks[1].await_reads();
    assert!(disks[1].begin_read(256 << 10, 0).is_some());
    disks.remove(2);
    disks.remove(0);
    let own = &disks[0];
    own.send_reads().expect("sent");
    own.await_reads();
    assert_eq!(own.reads_under_way(), 0);
    assert_eq!(own.reads.as_ref().expect("a ring").state().bytes, 0);
}

#[test]
fn a_disk_that_became_shorter_under_its_reads_fails_those_beyond_its_end() {
    let _turn = turn();
    let (file, bytes) = patterned(1 << 20);
    let Some(disk) = disk_or_skip(&file, BlockBackend::open_ring) else {
        return;
    };
    file.as_file().set_len(4096).expect("cut");
    let mut begun = BTreeMap::new();
    for at in [0, 2048, 4096, 1 << 19] {
        begun.insert(disk.begin_read(4096, at).expect("room"), at);
    }
    disk.send_reads().expect("sent");
    let mut ends: Vec<(u64, bool)> = take_all(&disk)
        .into_iter()
        .map(|(number, read)| {
            let whole = read.as_ref().is_ok_and(|data| *data == bytes[..4096]);
            assert_eq!(whole, read.is_ok());
            (begun[&number], whole)
        })
        .collect();
    ends.sort_unstable();
    let wanted = [(0, true), (2048, false), (4096, false), (1 << 19, false)];
    assert_eq!(ends, wanted);
}

/// Whoever opens the disk next must not find it locked by a ring that the
/// kernel has not torn down yet.
#[test]
fn a_disk_with_a_ring_is_free_again_at_once() {
    let _turn = turn();
    let (file, _) = patterned(1 << 20);
    for _ in 0..20 {
        let Some(disk) = disk_or_skip(&file, BlockBackend::open_ring) else {
            return;
        };
        drop_from_cache(&file);
        for at in 0..16 {
            disk.begin_read(4096, at << 16).expect("room");
        }
        disk.send_reads().expect("sent");
        let again = disk.again().expect("again");
        assert!(again.has_ring());
        drop((disk, again));
    }
}

#[test]
fn an_image_has_no_ring() {
    let folder = tempfile::tempdir().expect("folder");
    let below = folder.path().join("below.raw");
    std::fs::write(&below, vec![0; 1 << 20]).expect("write");
    let path = folder.path().join("over.qcow2");
    let below = hebe_types::DiskConfig::raw(below, true);
    let over = crate::make_overlay(&path, &below).expect("an image");
    let mut image = BlockBackend::of(&over).expect("open");
    assert!(matches!(image.open_ring(), Err(NoRing::Image)));
    assert!(!image.has_ring() && image.begin_read(512, 0).is_none());
}
