//! Images over disks that stay as they are.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hebe_block::{BlockBackend, BlockError, DiskChange, disk_change, make_overlay};
use hebe_types::{DiskConfig, DiskFormat};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};

fn raw(path: &Path) -> DiskConfig {
    DiskConfig {
        snapshot: true,
        ..DiskConfig::raw(path.to_owned(), false)
    }
}

fn read(disk: &BlockBackend, at: u64) -> u8 {
    let mut byte = [0];
    disk.read_at(&mut byte, at).expect("read");
    byte[0]
}

/// Of everything that a disk is known by, and of what is in it.
fn checksum(path: &Path) -> (u64, usize) {
    let bytes = fs::read(path).expect("read");
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    (sum, bytes.len())
}

#[test]
fn writes_land_in_the_image_and_the_disk_below_stays_as_it_is() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let base = at("base");
    // No whole number of an image's clusters.
    let bytes: Vec<u8> = (0..(3 << 20) + 512).map(|i: u32| (i >> 9) as u8).collect();
    fs::write(&base, &bytes).expect("base");
    let mut rights = fs::metadata(&base).expect("metadata").permissions();
    rights.set_mode(0o444);
    fs::set_permissions(&base, rights).expect("nobody may write to it");
    let (sum, modified) = (checksum(&base), fs::metadata(&base).expect("m").modified());
    let over = make_overlay(&at("one"), &raw(&base)).expect("made");
    let other = make_overlay(&at("two"), &raw(&base)).expect("two may share it");
    let mode = fs::metadata(at("one")).expect("m").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let [one, two] = [&over, &other].map(|disk| BlockBackend::of(disk).expect("open"));
    assert_eq!(one.sectors() * 512, bytes.len() as u64);
    let last = bytes.len() as u64 - 1;
    for place in [0, 512, 1 << 20, last] {
        assert_eq!(read(&one, place), bytes[place as usize], "{place}");
    }
    one.write_at(&[0xaa; 512], 0).expect("write");
    one.write_at(&[0xbb], last).expect("write");
    one.write_zeroes(1 << 20, 65536, true).expect("zeroes");
    one.discard(2 << 20, 65536).expect("discard");
    let found = [0, 512, 1 << 20, 2 << 20, last].map(|place| read(&one, place));
    assert_eq!(found, [0xaa, 1, 0, 0, 0xbb]);
    assert_eq!(read(&two, 0), 0, "the other one sees nothing of it");
    one.settle().expect("settle");
    one.check_found_again().expect("it is there");
    let saved = one.identity().expect("identity");
    drop((one, two));
    // As a resume finds it.
    let one = BlockBackend::of(&over).expect("again");
    let found = one.identity().expect("identity");
    assert_eq!(disk_change(&saved, &found), None);
    assert_eq!((read(&one, 0), read(&one, last)), (0xaa, 0xbb));
    assert_eq!(checksum(&base), sum);
    let now = fs::metadata(&base).expect("m").modified();
    assert_eq!(now.expect("time"), modified.expect("time"));
    // Without the image there is no disk, and another base is another disk.
    drop(one);
    fs::rename(at("one"), at("kept")).expect("away");
    assert!(matches!(
        BlockBackend::of(&over),
        Err(BlockError::Open { .. })
    ));
    fs::rename(at("kept"), at("one")).expect("back");
    fs::rename(&base, at("old")).expect("away");
    fs::write(&base, &bytes).expect("the same bytes");
    let one = BlockBackend::of(&over).expect("open");
    let change = disk_change(&saved, &one.identity().expect("identity"));
    assert_eq!(change, Some(DiskChange::OtherFile));
}

#[test]
fn an_image_may_lie_over_an_image() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("base"), vec![3; 1 << 20]).expect("base");
    let middle = make_overlay(&at("middle"), &raw(&at("base"))).expect("middle");
    let disk = BlockBackend::of(&middle).expect("open");
    disk.write_at(&[4; 512], 512).expect("write");
    disk.settle().expect("settle");
    drop(disk);
    let sum = checksum(&at("middle"));
    let snapshot = DiskConfig {
        snapshot: true,
        ..middle
    };
    let top = make_overlay(&at("top"), &snapshot).expect("top");
    assert_eq!(top.backing, [at("middle"), at("base")]);
    assert_eq!(top.format, DiskFormat::Qcow2);
    let disk = BlockBackend::of(&top).expect("open");
    disk.write_at(&[5; 512], 1024).expect("write");
    disk.settle().expect("settle");
    let found = [0, 512, 1024].map(|place| read(&disk, place));
    assert_eq!(found, [3, 4, 5]);
    drop(disk);
    assert_eq!(checksum(&at("middle")), sum);
}

#[test]
fn what_cannot_be_written_over_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let over = at("over");
    let refused = |disk: &DiskConfig| {
        let refused = make_overlay(&over, disk).expect_err("refused");
        assert!(!over.exists(), "{refused}");
        refused
    };
    let missing = refused(&raw(&at("none"))).to_string();
    assert!(missing.contains("none' cannot be opened"), "{missing}");
    fs::write(at("base"), vec![0; 1 << 20]).expect("base");
    let writer = BlockBackend::open(&at("base"), false).expect("open");
    assert!(matches!(refused(&raw(&at("base"))), BlockError::Busy(_)));
    drop(writer);
    let image = DiskConfig {
        format: DiskFormat::Qcow2,
        ..raw(&at("base"))
    };
    assert!(matches!(refused(&image), BlockError::Image { .. }));
    let long = dir.path().join(format!("{}base", "./".repeat(520)));
    let said = refused(&raw(&long)).to_string();
    assert!(said.contains("1023 bytes"), "{said}");
    // A header may claim any size, for which nothing is made ready.
    let file = File::create_open(StorageCreateOptions::new().filename(at("huge")));
    Qcow2::<File>::create_builder(file.expect("file"))
        .cluster_size(2 << 20)
        .size((2 << 50) + 512)
        .create()
        .expect("image");
    let huge = DiskConfig {
        format: DiskFormat::Qcow2,
        ..raw(&at("huge"))
    };
    assert!(matches!(refused(&huge), BlockError::Make { .. }));
    fs::write(&over, "somebody's").expect("in the way");
    let there = make_overlay(&over, &raw(&at("base"))).expect_err("refused");
    assert!(matches!(there, BlockError::Make { .. }), "{there}");
    assert_eq!(fs::read(&over).expect("kept"), b"somebody's");
    let bare = BlockBackend::of(&raw(&at("base"))).expect_err("nothing over it");
    assert!(matches!(bare, BlockError::Bare(_)), "{bare}");
}
