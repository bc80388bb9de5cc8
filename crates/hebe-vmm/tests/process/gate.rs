//! What a VMM that boots waits for.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use hebe_api::VmmState;
use rustix::fs::{FlockOperation, flock};

use crate::guest;
use crate::vmm::Vmm;

/// A VMM with a disk, that disk, and our side of its gate.
fn start(disk_of: impl FnOnce(&Path)) -> (Vmm, PathBuf, UnixStream) {
    let dir = tempfile::tempdir().expect("dir");
    let [kernel, disk] = ["kernel", "disk.img"].map(|name| dir.path().join(name));
    fs::write(&kernel, guest::image(guest::IDLE)).expect("kernel");
    fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    disk_of(&disk);
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\nkernel = '{}'\n[[disk]]\npath = '{}'\n",
        kernel.display(),
        disk.display()
    );
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let vmm = Vmm::start(dir, &config, |command| {
        let theirs = OwnedFd::from(theirs);
        command.args(["--gate-fd", &theirs.as_raw_fd().to_string()]);
        vec![theirs]
    });
    (vmm, disk, ours)
}

fn is_locked(disk: &Path) -> bool {
    let disk = File::open(disk).expect("disk");
    flock(&disk, FlockOperation::NonBlockingLockShared).is_err()
}

#[test]
fn a_vm_boots_after_a_word_that_comes_when_its_disks_are_locked() {
    if guest::cannot_run() {
        return;
    }
    let (vmm, disk, mut gate) = start(|_| {});
    gate.read_exact(&mut [0]).expect("they are locked");
    assert!(is_locked(&disk));
    gate.write_all(&[1]).expect("write");
    assert_eq!(vmm.status().state, VmmState::Running);
    assert!(is_locked(&disk));
}

#[test]
fn a_vm_that_nobody_lets_run_does_not() {
    if guest::cannot_run() {
        return;
    }
    let (mut vmm, disk, mut gate) = start(|_| {});
    gate.read_exact(&mut [0]).expect("they are locked");
    drop(gate);
    let (success, record) = vmm.wait();
    assert!(!success);
    assert_eq!(record["ran"], false, "{record}");
    let message = record["message"].to_string();
    assert!(message.contains("ended before"), "{record}");
    assert!(!is_locked(&disk));
}

#[test]
fn a_disk_that_cannot_be_locked_is_not_said_to_be() {
    if guest::cannot_run() {
        return;
    }
    let mut other = None;
    let (mut vmm, _, mut gate) = start(|disk| {
        let held = File::open(disk).expect("disk");
        flock(&held, FlockOperation::NonBlockingLockExclusive).expect("free");
        other = Some(held);
    });
    let mut said = Vec::new();
    gate.read_to_end(&mut said).expect("its end");
    assert!(said.is_empty());
    let (success, record) = vmm.wait();
    assert!(!success && record["ran"] == false, "{record}");
    drop(other);
}
