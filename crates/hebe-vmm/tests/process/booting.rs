//! Booting from a disk, in the cage.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Request, Response, VmmState};

use crate::ending::RESET_WHEN_TOLD;
use crate::guest;
use crate::vmm::Vmm;

fn put(disk: &Path, title: &str) {
    let config = format!("menuentry '{title}' {{ linux /vmlinuz quiet\n initrd /initrd.img }}");
    let kernel = guest::image(RESET_WHEN_TOLD);
    let files: [(&str, &[u8]); 3] = [
        ("grub/grub.cfg", config.as_bytes()),
        ("vmlinuz", &kernel),
        ("initrd.img", b"initrd"),
    ];
    fs::write(disk, guest::fat(&files)).expect("disk");
}

fn type_a_byte(vmm: &Vmm) {
    let mut client = vmm.connect();
    let attached = client.call(&Request::Console);
    assert!(matches!(attached, Ok(Response::Done)), "{attached:?}");
    client.into_stream().write_all(b"!").expect("type");
}

fn wait_for(vmm: &Vmm, word: &str) {
    let until = Instant::now() + Duration::from_secs(120);
    while !vmm.log().contains(word) {
        assert!(Instant::now() < until, "no '{word}': {}", vmm.log());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_a_guest_installs_on_its_disk_boots_after_its_reset() {
    if guest::cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let disk = dir.path().join("disk.img");
    put(&disk, "the first");
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\n[[disk]]\npath = '{}'\n",
        disk.display()
    );
    let mut vmm = Vmm::start(dir, &config, |_| Vec::new());
    assert_eq!(vmm.status().state, VmmState::Running);
    wait_for(&vmm, "boots from its first disk: the first");
    put(&disk, "the second");
    type_a_byte(&vmm);
    wait_for(&vmm, "boots from its first disk: the second");
    assert_eq!(vmm.status().state, VmmState::Running);
    let mut damaged = fs::read(&disk).expect("read");
    damaged[..512].fill(0);
    fs::write(&disk, damaged).expect("damage");
    type_a_byte(&vmm);
    let (success, record) = vmm.wait();
    assert!(!success);
    let message = record["message"].to_string();
    assert!(message.contains("does not boot again"), "{message}");
    assert!(message.contains("no file system"), "{message}");
}

#[test]
fn a_disk_that_does_not_boot_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().expect("dir");
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\n[[disk]]\npath = '{}'\n",
        disk.display()
    );
    let mut vmm = Vmm::start(dir, &config, |_| Vec::new());
    let (success, record) = vmm.wait();
    assert!(!success);
    assert_eq!(record["ran"], false);
    let message = record["message"].to_string();
    // Where KVM is absent, that is said first.
    assert!(
        message.contains("no file system that Hebe reads") || guest::cannot_run(),
        "{message}"
    );
    assert!(message.matches("no file system").count() < 2, "{message}");
}

#[test]
fn a_qcow2_image_boots_through_the_file_behind_it() {
    use imago::FormatCreateBuilder;
    use imago::storage::{Storage, StorageCreateOptions};

    if guest::cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let (base, image) = (dir.path().join("base.img"), dir.path().join("disk.qcow2"));
    put(&base, "of the base");
    let file = imago::file::File::create_open(StorageCreateOptions::new().filename(&image));
    imago::qcow2::Qcow2::<imago::file::File>::create_builder(file.expect("file"))
        .size(fs::metadata(&base).expect("metadata").len())
        .backing("base.img".to_owned(), "raw".to_owned())
        .create()
        .expect("image");
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\n[[disk]]\npath = '{}'\nformat = 'qcow2'\n",
        image.display()
    );
    let mut refused = Vmm::start(tempfile::tempdir().expect("dir"), &config, |_| Vec::new());
    let (success, record) = refused.wait();
    let message = record["message"].to_string();
    assert!(!success && message.contains("never opened"), "{message}");
    let config = format!("{config}backing = ['{}']\n", base.display());
    let vmm = Vmm::start(dir, &config, |_| Vec::new());
    assert_eq!(vmm.status().state, VmmState::Running);
    wait_for(&vmm, "boots from its first disk: of the base");
    type_a_byte(&vmm);
    wait_for(&vmm, "reset by the guest");
    assert_eq!(vmm.status().state, VmmState::Running);
    let frozen = vmm.connect().call(&Request::Pause);
    assert!(frozen.is_ok(), "{frozen:?}");
}
