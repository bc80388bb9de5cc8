//! Disks of VMs at rest, which nobody has locked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hebe_host::listing::{self, VmState};
use hebe_host::ops::{self, ResumeOptions, StopOptions};
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::{Host, HostError, definitions};
use hebe_sys::clock::stamp_now;
use hebe_types::RebootMethod;

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_disk_of_a_frozen_vm_is_no_other_vms_to_write",
        of_a_frozen_vm,
    ),
    (
        "a_disk_of_a_saved_vm_is_no_other_vms_to_write",
        of_a_saved_vm,
    ),
    ("a_disk_of_a_lost_vm_is_no_other_vms_to_write", of_a_lost_vm),
    (
        "a_disk_that_this_host_has_mounted_is_no_vms_to_write",
        mounted,
    ),
    (
        "a_disk_behind_an_image_of_a_frozen_vm_is_no_other_vms_to_write",
        behind_an_image,
    ),
];

const FORCE: StopOptions = StopOptions {
    timeout: std::time::Duration::ZERO,
    force: true,
};

/// VM `web` with a disk, and `db` with the same one; `web` runs.
fn shared(ours: &str, theirs: &str) -> (World, PathBuf) {
    let world = World::new();
    let disk = world.root.path().join("disk.img");
    fs::write(&disk, vec![7; 1 << 20]).expect("disk");
    world.define("web", &with(&disk, ours));
    world.define("db", &with(&disk, theirs));
    ops::start(&world.host, &name("web")).expect("starts");
    (world, disk)
}

fn with(disk: &Path, more: &str) -> String {
    format!(
        "autostart = true\n[[disk]]\npath = \"{}\"\n{more}",
        disk.display()
    )
}

/// By whatever order.
fn refused(host: &Host, how: &str) {
    let own = definitions::expected_path(&host.layout, &name("db"));
    let config = definitions::read_own(&own).expect("a definition");
    for (order, result) in [
        ("start", ops::start(host, &name("db"))),
        ("run", ops::run(host, &config)),
        ("boot", ops::boot(host, &config)),
    ] {
        let why = result.expect_err(order).to_string();
        for word in ["disk.img", "web", how, "hebe drop web --yes"] {
            assert!(why.contains(word), "{order}: {why}");
        }
    }
    assert!(!host.layout.vm_dir(&name("db")).exists(), "nothing is left");
}

fn of_a_frozen_vm() {
    let (world, disk) = shared("", "");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    refused(&world.host, "frozen");
    // Under another name.
    let link = world.root.path().join("other/disk.img");
    fs::create_dir(link.parent().expect("folder")).expect("mkdir");
    fs::hard_link(&disk, &link).expect("link");
    world.define("db", &with(&link, ""));
    refused(&world.host, "frozen");
    // One that does not write does no harm.
    for more in ["readonly = true", "snapshot = true"] {
        world.define("db", &with(&disk, more));
        ops::start(&world.host, &name("db")).expect(more);
        ops::stop(&world.host, &name("db"), FORCE).expect("stops");
    }
    world.define("db", &with(&disk, ""));
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("its own disk");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    ops::drop_vm(&world.host, &name("web")).expect("given up");
    ops::start(&world.host, &name("db")).expect("nobody claims it");
}

fn of_a_saved_vm() {
    let (world, _) = shared("", "");
    world.reboot(RebootMethod::Saved);
    refused(&world.host, "saved in a file");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("its own disk");
    assert_eq!(world.state("web"), VmState::Running);
}

fn of_a_lost_vm() {
    let (world, _) = shared("", "");
    world.reboot(RebootMethod::Warm);
    let bare = world.bare();
    let state = |host: &Host| listing::survey(host).rows[&name("web")].state;
    assert_eq!(state(&bare), VmState::Lost);
    refused(&bare, "frozen in a store that is away");
    // Nor at the host's start.
    let all = resume_all(&bare, stamp_now(), true).expect("not busy");
    let db = &all.vms[&name("db")];
    assert!(
        matches!(db, Resumed::Failed { reason } if reason.contains("disk.img")),
        "{db:?}"
    );
    // What was given up claims nothing, here and where its store is again.
    ops::start_afresh(&bare, &name("web")).expect("boots");
    ops::stop(&bare, &name("web"), FORCE).expect("stops");
    ops::start(&bare, &name("db")).expect("nobody claims it");
    world.reserved();
    assert_eq!(state(&world.host), VmState::Crashed);
    ops::start(&world.host, &name("db")).expect("nobody claims it");
}

/// Written to, what is behind the image is another disk.
fn behind_an_image() {
    let (world, _) = shared("snapshot = true", "");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    refused(&world.host, "frozen");
}

/// A device of a file, as long as it lives.
struct Loop(String);

impl Loop {
    fn of(image: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(image)
            .output();
        let output = output.ok().filter(|output| output.status.success())?;
        let device = String::from_utf8(output.stdout).ok()?;
        Some(Self(device.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// Mounted, as long as it lives.
struct Mount(PathBuf);

impl Mount {
    fn of(device: &str, at: &Path) -> Option<Self> {
        fs::create_dir_all(at).expect("mkdir");
        let status = Command::new("mount").arg(device).arg(at).status();
        status
            .is_ok_and(|s| s.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mounted() {
    let world = World::new();
    let image = world.root.path().join("disk.img");
    fs::File::create(&image)
        .and_then(|f| f.set_len(8 << 20))
        .expect("disk");
    let made = Command::new("mke2fs")
        .args(["-q", "-F"])
        .arg(&image)
        .status();
    let device = Loop::of(&image).filter(|_| made.is_ok_and(|s| s.success()));
    let Some(device) = device else {
        println!("skipped: no file system on a loop device can be made here");
        return;
    };
    let at = world.root.path().join("mnt");
    let mount = || Mount::of(&device.0, &at);
    let Some(mounted) = mount() else {
        println!("skipped: nothing can be mounted here");
        return;
    };
    world.define("web", &with(Path::new(&device.0), ""));
    let refused = |result: Result<_, HostError>, what: &str| {
        let why = result
            .map(|_: hebe_api::VmStatus| ())
            .expect_err(what)
            .to_string();
        assert!(
            why.contains(&device.0) && why.contains("mounted at"),
            "{what}: {why}"
        );
    };
    refused(ops::start(&world.host, &name("web")), "start");
    assert_eq!(world.segments(), 0);
    world.define("web", &with(Path::new(&device.0), "readonly = true"));
    ops::start(&world.host, &name("web")).expect("it does not write");
    ops::stop(&world.host, &name("web"), FORCE).expect("stops");
    drop(mounted);
    world.define("web", &with(Path::new(&device.0), ""));
    ops::start(&world.host, &name("web")).expect("nobody else writes");
    // While it stood still, in memory or in a file.
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let plain = ResumeOptions::default();
    let mounted = mount().expect("as before");
    refused(ops::resume(&world.host, &name("web"), plain), "resume");
    assert_eq!(world.state("web"), VmState::Frozen);
    drop(mounted);
    ops::resume(&world.host, &name("web"), plain).expect("by a person's word");
    world.reboot(RebootMethod::Saved);
    let mounted = mount().expect("as before");
    refused(ops::resume(&world.host, &name("web"), plain), "restore");
    assert_eq!(world.state("web"), VmState::Saved);
    drop(mounted);
    ops::resume(&world.host, &name("web"), plain).expect("by a person's word");
}
