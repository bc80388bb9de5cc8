//! What is saved comes back, and what is damaged does not.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use hebe_types::{GRANULE, Gpa, RamRange};
use proptest::prelude::*;

use crate::format::{HeaderV1, Plan};
use crate::save::{Sink, partial_name, save_into_with, save_with};
use crate::*;

const HIGH: u64 = 4 << 30;

struct Sample {
    _dir: tempfile::TempDir,
    path: PathBuf,
    low: Vec<u8>,
    high: Vec<u8>,
}

/// Two ranges, mostly zeros, with pages of data here and there.
fn sample() -> Sample {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("web.hebe");
    let mut low = vec![0u8; 3 * GRANULE as usize];
    let mut high = vec![0u8; GRANULE as usize];
    for page in [0usize, 1, 2, 7, 511, 512, 1400, 1535] {
        for (i, byte) in low[page * 4096..(page + 1) * 4096].iter_mut().enumerate() {
            *byte = (page ^ i) as u8;
        }
    }
    *high.last_mut().expect("byte") = 0xee;
    Sample {
        _dir: dir,
        path,
        low,
        high,
    }
}

impl Sample {
    fn views(&self) -> [RamView<'_>; 2] {
        [
            RamView::from_slice(Gpa(0), &self.low),
            RamView::from_slice(Gpa(HIGH), &self.high),
        ]
    }

    fn save(&self) -> SaveStats {
        save(&self.path, STATE, &self.views()).expect("save")
    }

    fn load(&self) -> Result<(Vec<u8>, Vec<u8>), SnapshotError> {
        let saved = SavedFile::open(&self.path)?;
        assert_eq!(saved.state(), STATE);
        let mut low = vec![0; self.low.len()];
        let mut high = vec![0; self.high.len()];
        let verified = saved.verify();
        let loaded = saved.load_into(&mut [
            RamViewMut::from_slice(Gpa(0), &mut low),
            RamViewMut::from_slice(Gpa(HIGH), &mut high),
        ]);
        let words = |e: &SnapshotError| e.to_string();
        let said = verified.as_ref().map_err(words).err();
        assert_eq!(said, loaded.as_ref().map_err(words).err());
        loaded?;
        Ok((low, high))
    }

    fn plan(&self) -> Plan {
        Plan::new(2, STATE.len() as u64, 4 * GRANULE)
    }

    fn file(&self) -> File {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .open(&self.path)
            .expect("open")
    }

    fn flip(&self, offset: u64, bit: u8) {
        let mut byte = [0];
        let file = self.file();
        file.read_exact_at(&mut byte, offset).expect("read");
        byte[0] ^= 1 << bit;
        file.write_all_at(&byte, offset).expect("write");
    }
}

const STATE: &[u8] = b"execution state of a VM";

#[test]
fn what_is_saved_comes_back() {
    let sample = sample();
    let stats = sample.save();
    assert_eq!(stats.ram_bytes, 4 * GRANULE);
    assert_eq!(stats.ram_bytes_written, 9 * 4096);
    let (low, high) = sample.load().expect("load");
    assert!(low == sample.low && high == sample.high);
    assert!(!partial_name(&sample.path).exists());
    let saved = SavedFile::open(&sample.path).expect("open");
    let ranges = [(0, 3 * GRANULE), (HIGH, GRANULE)];
    let ranges = ranges.map(|(gpa, len)| RamRange { gpa: Gpa(gpa), len });
    assert_eq!(saved.ram_ranges(), ranges);
    assert!(saved.saved_ns() > 1 << 60);
}

#[test]
fn a_file_that_was_handed_over_is_filled_or_left_without_contents() {
    let sample = sample();
    let older = vec![0xaa; 20 << 20];
    for room in [None, Some(3)] {
        fs::write(&sample.path, &older).expect("what was there before");
        let file = sample.file();
        let name = Path::new("a name");
        match room {
            None => {
                save_into(&file, name, STATE, &sample.views()).expect("save");
                let (low, high) = sample.load().expect("load");
                assert!(low == sample.low && high == sample.high);
            }
            Some(writes) => {
                let sink = Faulty {
                    file: file.try_clone().expect("clone"),
                    writes_left: writes,
                    error: io::ErrorKind::StorageFull,
                };
                let failed = save_into_with(&file, name, STATE, &sample.views(), sink);
                let failed = failed.expect_err("full").to_string();
                assert!(failed.contains("a name"), "{failed}");
                assert_eq!(file.metadata().expect("metadata").len(), 0);
            }
        }
    }
}

#[test]
fn pages_of_zeros_take_no_space_and_no_memory() {
    let sample = sample();
    sample.save();
    let meta = fs::metadata(&sample.path).expect("metadata");
    assert_eq!(meta.len(), sample.plan().file_len);
    assert!(meta.blocks() * 512 < GRANULE, "{} blocks", meta.blocks());
    let saved = SavedFile::open(&sample.path).expect("open");
    let (mut low, mut high) = (vec![0; sample.low.len()], vec![0; sample.high.len()]);
    let stats = saved
        .load_into(&mut [
            RamViewMut::from_slice(Gpa(0), &mut low),
            RamViewMut::from_slice(Gpa(HIGH), &mut high),
        ])
        .expect("load");
    assert_eq!(stats.ram_bytes, 4 * GRANULE);
    assert!(stats.ram_bytes_read < GRANULE, "{stats:?}");
}

#[test]
fn what_has_no_memory_is_not_read_and_the_file_is_the_same() {
    let sample = sample();
    sample.save();
    let whole = fs::read(&sample.path).expect("read");
    let asked = std::cell::RefCell::new(Vec::new());
    // By granules of eight pages, some of which are zeros that have memory.
    let step = 8 * 4096;
    let used = |gpa: Gpa, len: u64| {
        let (ram, base) = match gpa.0 < HIGH {
            true => (&sample.low, 0),
            false => (&sample.high, HIGH),
        };
        asked.borrow_mut().push((gpa, len));
        let (from, end) = (gpa.0 - base, gpa.0 - base + len);
        let has = |at: &u64| {
            let piece = &ram[*at as usize..(*at + step).min(end) as usize];
            piece.iter().any(|byte| *byte != 0)
        };
        let first = (from..end).step_by(step as usize).find(has)?;
        Some((Gpa(base + first), step.min(end - first)))
    };
    let views = sample.views().map(|view| view.with_holes(&used));
    save(&sample.path, STATE, &views).expect("save");
    let (low, high) = sample.load().expect("load");
    assert!(low == sample.low && high == sample.high);
    assert!(!asked.borrow().is_empty());
    // All but the header, which has the time.
    let sparse = fs::read(&sample.path).expect("read");
    assert!(sparse[4096..] == whole[4096..]);
    // A word that leads nowhere costs nothing but reading.
    let nowhere = |gpa: Gpa, _len: u64| Some((gpa, 0));
    let views = sample.views().map(|view| view.with_holes(&nowhere));
    save(&sample.path, STATE, &views).expect("save");
    let (low, high) = sample.load().expect("load");
    assert!(low == sample.low && high == sample.high);
}

#[test]
fn a_file_without_holes_loads_too() {
    let sample = sample();
    sample.save();
    let bytes = fs::read(&sample.path).expect("read");
    fs::remove_file(&sample.path).expect("remove");
    fs::write(&sample.path, bytes).expect("write");
    let (low, high) = sample.load().expect("load");
    assert!(low == sample.low && high == sample.high);
}

#[test]
fn every_flipped_bit_of_the_header_is_found() {
    let sample = sample();
    sample.save();
    for offset in 0..size_of::<HeaderV1>() as u64 {
        for bit in 0..8 {
            sample.flip(offset, bit);
            let said = SavedFile::open(&sample.path).map(|_| ());
            said.expect_err("a damaged header is refused");
            sample.flip(offset, bit);
        }
    }
    sample.load().expect("whole again");
}

#[test]
fn flipped_bits_of_contents_are_found_and_named() {
    let sample = sample();
    sample.save();
    let plan = sample.plan();
    let cases = [
        (plan.tables_at, "tables"),
        (plan.tables_at + plan.tables_len - 1, "tables"),
        (plan.state_at + 3, "execution state"),
        (plan.ram_at + 5, "RAM at guest address 0x0"),
        (
            plan.ram_at + 2 * GRANULE + 376 * 4096,
            "RAM at guest address 0x400000",
        ),
        (
            plan.ram_at + 2 * GRANULE - 4096,
            "RAM at guest address 0x200000",
        ),
        (plan.file_len - 1, "RAM at guest address 0x100000000"),
    ];
    for (offset, part) in cases {
        sample.flip(offset, 4);
        let said = sample.load().map(|_| ()).expect_err(part).to_string();
        assert!(said.contains(part), "{offset:#x}: {said}");
        sample.flip(offset, 4);
    }
    sample.load().expect("whole again");
}

#[test]
fn truncated_foreign_newer_and_unfinished_files_are_refused() {
    let sample = sample();
    sample.save();
    let whole = fs::read(&sample.path).expect("read");
    let refused = |bytes: &[u8]| {
        fs::write(&sample.path, bytes).expect("write");
        SavedFile::open(&sample.path)
            .map(|_| ())
            .expect_err("refused")
    };
    for len in [0, 63, 4095] {
        assert!(matches!(refused(&whole[..len]), SnapshotError::Foreign(_)));
    }
    for len in [4096, 5000, whole.len() - 1] {
        let said = refused(&whole[..len]);
        assert!(matches!(said, SnapshotError::Length { .. }), "{said}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(refused(&longer), SnapshotError::Length { .. }));
    assert!(matches!(refused(&[b'x'; 9000]), SnapshotError::Foreign(_)));
    let mut newer = whole.clone();
    newer[8] = 2;
    let said = refused(&newer);
    assert!(
        matches!(said, SnapshotError::Newer { found: 2, .. }),
        "{said}"
    );
    let mut unfinished = whole.clone();
    unfinished[..4096].fill(0);
    assert!(matches!(refused(&unfinished), SnapshotError::Incomplete(_)));
    let absent = SavedFile::open(Path::new("/nonexistent/x")).map(|_| ());
    assert!(matches!(absent, Err(SnapshotError::Io { .. })));
}

#[test]
fn ram_of_another_vm_is_refused_before_anything_is_written() {
    let sample = sample();
    sample.save();
    let saved = SavedFile::open(&sample.path).expect("open");
    let mut small = vec![0; GRANULE as usize];
    let mut high = vec![0; GRANULE as usize];
    let mut big = vec![0; 3 * GRANULE as usize];
    let mut one_too_many = vec![0; GRANULE as usize];
    let check = |views: &mut [RamViewMut<'_>]| {
        let loaded = saved.load_into(views);
        assert!(
            matches!(loaded, Err(SnapshotError::OtherRam { .. })),
            "{loaded:?}"
        );
        assert!(views.iter().all(|v| v.bytes.iter().all(|b| *b == 0)));
    };
    check(&mut [
        RamViewMut::from_slice(Gpa(0), &mut small),
        RamViewMut::from_slice(Gpa(HIGH), &mut high),
    ]);
    check(&mut [RamViewMut::from_slice(Gpa(0), &mut big)]);
    check(&mut [
        RamViewMut::from_slice(Gpa(0), &mut big),
        RamViewMut::from_slice(Gpa(HIGH), &mut high),
        RamViewMut::from_slice(Gpa(2 * HIGH), &mut one_too_many),
    ]);
    check(&mut []);
}

/// A disk that fails after some writes, or is switched off after some.
struct Faulty {
    file: File,
    writes_left: usize,
    error: io::ErrorKind,
}

impl Faulty {
    fn spend(&mut self) -> io::Result<()> {
        self.writes_left = self.writes_left.checked_sub(1).ok_or(self.error)?;
        Ok(())
    }
}

impl Sink for Faulty {
    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.spend()?;
        Sink::set_len(&mut self.file, len)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.spend()?;
        Sink::write_at(&mut self.file, offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.spend()?;
        Ok(())
    }
}

#[test]
fn a_full_disk_is_named_and_nothing_is_left() {
    let mut sample = sample();
    sample.save();
    let old = sample.low.clone();
    sample.low[9 * 4096] = 1;
    let mut failures = 0;
    for writes_left in 0.. {
        let saved = save_with(&sample.path, STATE, &sample.views(), |file| Faulty {
            file,
            writes_left,
            error: io::ErrorKind::StorageFull,
        });
        let Err(e) = saved else { break };
        failures += 1;
        assert!(matches!(e, SnapshotError::NoSpace { .. }), "{e}");
        assert!(!partial_name(&sample.path).exists());
        let loaded = sample.load_ram().expect("the older file is untouched");
        assert!(loaded == old);
    }
    assert!(failures > 8, "{failures}");
    assert!(sample.load_ram().expect("the new file") == sample.low);
}

impl Sample {
    fn load_ram(&self) -> Result<Vec<u8>, SnapshotError> {
        Ok(self.load()?.0)
    }
}

#[test]
fn a_save_cut_off_anywhere_is_told_by_its_file() {
    let sample = sample();
    let copy = sample.path.with_extension("cut");
    for writes_left in 0.. {
        let saved = save_with(&sample.path, STATE, &sample.views(), |file| Copying {
            inner: Faulty {
                file,
                writes_left,
                error: io::ErrorKind::Other,
            },
            copy: copy.clone(),
        });
        if saved.is_ok() {
            break;
        }
        // As a killed process would leave it: at most the last sync missing.
        match SavedFile::open(&copy).map(|_| ()) {
            Err(SnapshotError::Incomplete(_) | SnapshotError::Foreign(_)) => {}
            Ok(()) => assert!(fs::read(&copy).expect("read")[..8] == *b"HEBESAVE"),
            Err(other) => panic!("{other}"),
        }
    }
}

/// Keeps a copy of the file as it is when the disk is switched off.
struct Copying {
    inner: Faulty,
    copy: PathBuf,
}

impl Copying {
    fn keep(&self) -> io::Result<()> {
        let mut bytes = vec![0; self.inner.file.metadata()?.len() as usize];
        self.inner.file.read_exact_at(&mut bytes, 0)?;
        fs::write(&self.copy, bytes)
    }
}

impl Sink for Copying {
    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.keep()?;
        self.inner.set_len(len)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.keep()?;
        self.inner.write_at(offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.keep()?;
        self.inner.sync()
    }
}

#[test]
fn an_unwritable_place_is_named() {
    let sample = sample();
    let nowhere = Path::new("/nonexistent/dir/web.hebe");
    let said = save(nowhere, STATE, &sample.views()).expect_err("refused");
    assert!(said.to_string().contains("cannot create /nonexistent/dir"));
    let odd = [RamView::from_slice(Gpa(0), &sample.low[..4096])];
    let said = save(&sample.path, STATE, &odd).expect_err("refused");
    assert!(matches!(said, SnapshotError::Unsupported(_)), "{said}");
    assert!(!sample.path.exists());
}

#[test]
fn the_header_has_its_golden_bytes() {
    let sample = sample();
    sample.save();
    let bytes = fs::read(&sample.path).expect("read");
    assert_eq!(&bytes[..16], b"HEBESAVE\x01\0\0\0\x01\0\0\0");
    assert_eq!(&bytes[16..24], (10 * (1u64 << 20)).to_le_bytes());
    assert_eq!(&bytes[32..40], 23u64.to_le_bytes());
    assert_eq!(&bytes[40..48], (8 * (1u64 << 20)).to_le_bytes());
    assert_eq!(&bytes[48..52], [2, 0, 0, 0]);
    assert_eq!(&bytes[56..60], crc32fast::hash(STATE).to_le_bytes());
    assert_eq!(&bytes[60..64], crc32fast::hash(&bytes[..60]).to_le_bytes());
    let tables = &bytes[4096..4096 + 48];
    assert_eq!(&bytes[52..56], crc32fast::hash(tables).to_le_bytes());
    assert_eq!(&tables[8..16], (6u64 << 20).to_le_bytes());
    assert_eq!(&tables[16..24], (4u64 << 30).to_le_bytes());
    let crc = crc32fast::hash(&sample.high);
    assert_eq!(&tables[44..48], crc.to_le_bytes());
    assert_eq!(&bytes[8192..8192 + 23], STATE);
    assert!(bytes[2 << 20..8 << 20] == sample.low);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_ram_round_trips_and_any_damage_to_used_pages_is_found(
        pages in proptest::collection::btree_map(0..1024usize, 1..=255u8, 0..40),
        hit in (0..1024usize, 0..4096usize, 1..=255u8),
    ) {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("x");
        let mut ram = vec![0u8; 2 * GRANULE as usize];
        for (page, tag) in &pages {
            ram[page * 4096..(page + 1) * 4096].fill(*tag);
        }
        save(&path, STATE, &[RamView::from_slice(Gpa(0), &ram)]).expect("save");
        let load = || {
            let mut out = vec![0u8; ram.len()];
            let saved = SavedFile::open(&path).expect("open");
            let loaded = saved.load_into(&mut [RamViewMut::from_slice(Gpa(0), &mut out)]);
            loaded.map(|_| out)
        };
        prop_assert!(load().expect("load") == ram);
        let (page, offset, mask) = hit;
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        let at = Plan::new(1, STATE.len() as u64, ram.len() as u64).ram_at;
        let at = at + (page * 4096 + offset) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ mask], at).expect("write");
        prop_assert!(load().is_err());
    }
}
