//! qcow2 images made by `imago` itself and by hand: sound, chained, hostile.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hebe_block::{BlockBackend, BlockError, DiskChange, ImageTrouble, disk_change};
use hebe_types::{DiskConfig, DiskFormat};
use imago::file::File;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};

const SIZE: u64 = 4 << 20;

fn make(path: &Path, backing: Option<(&str, &str)>) {
    let _ = fs::remove_file(path);
    let file = File::create_open(StorageCreateOptions::new().filename(path)).expect("file");
    let mut builder = Qcow2::<File>::create_builder(file)
        .size(SIZE)
        .preallocate(PreallocateMode::None);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().expect("image");
}

fn config(path: &Path, backing: &[PathBuf]) -> DiskConfig {
    DiskConfig {
        format: DiskFormat::Qcow2,
        backing: backing.to_vec(),
        ..DiskConfig::raw(path.to_owned(), false)
    }
}

fn open(path: &Path, backing: &[PathBuf]) -> Result<BlockBackend, BlockError> {
    BlockBackend::of(&config(path, backing))
}

fn trouble(path: &Path, backing: &[PathBuf]) -> ImageTrouble {
    match open(path, backing) {
        Err(BlockError::Image { trouble, .. }) => trouble,
        other => panic!("{other:?}"),
    }
}

fn read(disk: &BlockBackend, offset: u64) -> [u8; 4] {
    let mut data = [9; 4];
    disk.read_at(&mut data, offset).expect("read");
    data
}

#[test]
fn what_is_written_survives_and_closing_changes_nothing_after_settling() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk.qcow2");
    make(&path, None);
    let disk = open(&path, &[]).expect("open");
    assert_eq!(disk.sectors(), SIZE / 512);
    assert_eq!(read(&disk, SIZE - 4), [0; 4]);
    disk.write_at(b"last", SIZE - 4).expect("write");
    disk.write_at(&[7; 200_000], 100_000).expect("write");
    disk.discard(131_072, 65_536).expect("discard");
    disk.write_zeroes(250_000, 10_000, false).expect("zero");
    assert!(disk.write_at(b"x", SIZE).is_err());
    assert!(disk.read_at(&mut [0], SIZE).is_err());
    disk.settle().expect("settle");
    disk.check_found_again().expect("there");
    let saved = disk.identity().expect("identity");
    let again = disk.again().expect("again");
    drop(disk);
    assert_eq!(read(&again, SIZE - 4), *b"last");
    drop(again);
    let disk = open(&path, &[]).expect("again");
    let found = disk.identity().expect("identity");
    assert_eq!(disk_change(&saved, &found), None);
    assert_eq!(read(&disk, SIZE - 4), *b"last");
    assert_eq!(
        (read(&disk, 100_000), read(&disk, 131_072)),
        ([7; 4], [0; 4])
    );
    let around = [249_996, 250_000, 259_996, 260_000].map(|at| read(&disk, at));
    assert_eq!(around, [[7; 4], [0; 4], [0; 4], [7; 4]]);
    assert_eq!(read(&disk, 131_072 + 65_536), [7; 4]);
    let busy = open(&path, &[]);
    assert!(matches!(busy, Err(BlockError::Busy(_))), "{busy:?}");
}

#[test]
fn a_chain_is_read_through_shared_and_known_by_all_its_files() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("base"), vec![3; SIZE as usize]).expect("base");
    make(&at("middle"), Some(("base", "raw")));
    make(&at("one"), Some(("middle", "qcow2")));
    make(&at("two"), Some(("/etc/shadow", "qcow2")));
    let behind = [at("middle"), at("base")];
    let one = open(&at("one"), &behind).expect("one");
    let two = open(&at("two"), &behind).expect("what it names is not what is opened");
    assert_eq!(read(&one, 8), [3; 4]);
    one.write_at(b"mine", 8).expect("write");
    assert_eq!(
        (read(&one, 8), read(&one, 12), read(&two, 8)),
        (*b"mine", [3; 4], [3; 4])
    );
    let writer = BlockBackend::open(&at("base"), false);
    assert!(matches!(writer, Err(BlockError::Busy(_))), "{writer:?}");
    one.settle().expect("settle");
    let saved = one.identity().expect("identity");
    one.check_found_again().expect("there");
    fs::rename(at("middle"), at("gone")).expect("rename");
    assert!(matches!(one.check_found_again(), Err(BlockError::Gone(_))));
    fs::rename(at("gone"), at("middle")).expect("back");
    drop((one, two));
    let time = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    let base = fs::File::options()
        .write(true)
        .open(at("base"))
        .expect("base");
    base.set_times(time).expect("time");
    let one = open(&at("one"), &behind).expect("one");
    let change = disk_change(&saved, &one.identity().expect("identity"));
    assert_eq!(change, Some(DiskChange::Written));
}

#[test]
fn nothing_is_opened_that_only_the_image_names() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk");
    let base = dir.path().join("base");
    fs::write(&base, [0; 512]).expect("base");
    make(&path, Some(("base", "raw")));
    let refused = trouble(&path, &[]);
    assert!(matches!(&refused, ImageTrouble::BackingUnnamed(name) if name == "base"));
    assert!(refused.to_string().contains("never opened"), "{refused}");
    make(&path, Some(("base", "nbd")));
    assert!(matches!(
        trouble(&path, std::slice::from_ref(&base)),
        ImageTrouble::BackingFormat
    ));
    make(&path, None);
    assert!(matches!(
        trouble(&path, std::slice::from_ref(&base)),
        ImageTrouble::NoBacking
    ));
    assert!(matches!(trouble(&base, &[]), ImageTrouble::NotQcow2));
    let itself = open(&path, std::slice::from_ref(&path));
    assert!(matches!(itself, Err(BlockError::Busy(_))), "{itself:?}");
}

#[test]
fn damaged_headers_are_refused_and_take_no_memory() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk");
    for (at, value) in [
        (4, 9u32),
        (20, 63),
        (20, 0),
        (24, u32::MAX),
        (28, 1),
        (32, 1),
        (36, u32::MAX),
        (36, 0),
        (40, u32::MAX),
        (48, u32::MAX),
        (56, u32::MAX),
        (76, 4),
    ] {
        make(&path, None);
        let file = fs::File::options().write(true).open(&path).expect("open");
        file.write_all_at(&value.to_be_bytes(), at).expect("damage");
        let said = trouble(&path, &[]).to_string();
        assert!(!said.contains('\n'), "{at}: {said}");
        // The lock is gone with the refusal.
        BlockBackend::open(&path, false)
            .map(drop)
            .unwrap_or_else(|e| {
                assert!(matches!(e, BlockError::Size { .. }), "{e}");
            });
    }
}

/// Whatever its tables say, an image is refused, or reads and writes fail, or
/// succeed; nothing panics through and nothing outside the file is touched.
#[test]
fn damaged_tables_do_no_harm() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk");
    make(&path, None);
    let disk = open(&path, &[]).expect("open");
    disk.write_at(&[5; 300_000], 1 << 20).expect("write");
    disk.settle().expect("settle");
    drop(disk);
    let sound = fs::read(&path).expect("read");
    // A campaign: HEBE_SEED=7 HEBE_ROUNDS=100000.
    let number = |key: &str, default: u64| {
        let given = std::env::var(key).ok();
        given.map_or(default, |given| given.parse().expect("a number"))
    };
    let seed = number("HEBE_SEED", 0x9e37_79b9_7f4a_7c15);
    let rounds = number("HEBE_ROUNDS", 300);
    println!("HEBE_SEED={seed} HEBE_ROUNDS={rounds}");
    let mut random = seed.max(1);
    let mut opened = 0;
    for round in 0..rounds {
        let mut image = sound.clone();
        for _ in 0..4 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let cluster = (random >> 8) as usize % image.len().div_ceil(65536);
            let at = cluster * 65536 + (random >> 40) as usize % 128;
            if let Some(byte) = image.get_mut(at) {
                *byte = (random >> 32) as u8;
            }
        }
        fs::write(&path, image).expect("write");
        let began = Instant::now();
        let Ok(disk) = open(&path, &[]) else { continue };
        opened += 1;
        let end = disk.sectors().min(1 << 20) * 512;
        let mut data = vec![0; 65_536];
        for offset in (0..end.min(4 << 20)).step_by(1 << 19) {
            let _ = disk.read_at(&mut data, offset);
            let _ = disk.write_at(b"some", offset);
        }
        let _ = disk.discard(0, 131_072.min(end));
        let _ = disk.settle();
        drop(disk);
        let len = fs::metadata(&path).expect("metadata").blocks_in_bytes();
        assert!(len < 256 << 20, "{len} bytes are taken in round {round}");
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(300),
            "round {round} took {took:?}"
        );
    }
    assert!((1..rounds).contains(&opened), "{opened}");
}

/// The crate would put a new block of counts over the header.
#[test]
fn an_image_whose_counts_are_not_in_their_place_is_not_written_to() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("disk");
    make(&path, None);
    let sound = fs::read(&path).expect("read");
    let table = u64::from_be_bytes(sound[48..56].try_into().expect("8 bytes"));
    let entries = [0, 512, table, 1 << 40];
    for entry in entries {
        let mut image = sound.clone();
        let at = table as usize;
        image[at..at + 8].copy_from_slice(&u64::to_be_bytes(entry));
        fs::write(&path, &image).expect("write");
        let refused = open(&path, &[]).map(|disk| disk.write_at(b"some", 0));
        let refused = refused.expect_err("damaged").to_string();
        assert!(refused.contains("qemu-img check"), "{refused}");
        assert_eq!(fs::read(&path).expect("read"), image, "{entry:#x}");
    }
    fs::write(&path, &sound).expect("write");
    open(&path, &[]).expect("sound");
}

trait Blocks {
    fn blocks_in_bytes(&self) -> u64;
}

impl Blocks for fs::Metadata {
    fn blocks_in_bytes(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(self) * 512
    }
}
