//! Disks that keep nothing: what is written over them lasts as long as the VM's
//! life may go on, and no longer.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use hebe_block::BlockBackend;
use hebe_host::definitions;
use hebe_host::listing::VmState;
use hebe_host::ops::{self, ResumeOptions, StopOptions};
use hebe_host::overlays;
use hebe_host::preflight::{Level, preflight};
use hebe_host::resume_all::resume_all;
use hebe_sys::clock::stamp_now;
use hebe_types::{DiskConfig, RebootMethod, VmConfig};

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_disk_that_keeps_nothing_gets_an_image_over_it_that_ends_with_the_vm",
        from_start_to_stop,
    ),
    (
        "what_is_written_over_a_disk_outlives_suspends_and_reboots",
        outlives,
    ),
    (
        "a_cold_reboot_throws_away_what_was_written_over_a_disk_and_says_so",
        cold,
    ),
    (
        "what_a_killed_vmm_wrote_over_a_disk_goes_at_the_next_start",
        killed,
    ),
    (
        "what_a_vm_that_powered_off_wrote_over_a_disk_goes_at_the_next_look",
        powers_off,
    ),
    (
        "a_start_that_fails_removes_no_image_that_a_frozen_vm_needs",
        fails_to_start,
    ),
    (
        "a_disk_that_is_missing_or_written_to_is_not_written_over",
        refused,
    ),
];

fn force() -> StopOptions {
    StopOptions {
        timeout: Duration::ZERO,
        force: true,
    }
}

fn base(world: &World) -> PathBuf {
    world.root.path().join("base.img")
}

/// A disk of sevens, and VMs over it.
fn define(world: &World, vms: &[&str]) {
    fs::write(base(world), vec![7; 1 << 20]).expect("disk");
    let disk = format!(
        "[[disk]]\npath = '{}'\nsnapshot = true",
        base(world).display()
    );
    for vm in vms {
        world.define(vm, &disk);
    }
}

/// All images, by name.
fn images(world: &World) -> Vec<PathBuf> {
    let dir = fs::read_dir(world.host.layout.state.join("overlays"));
    let entries = dir.into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// What the VM's VMM was started with.
fn booted(world: &World, vm: &str) -> VmConfig {
    definitions::read(&world.dir(vm).join("config.toml")).expect("config.toml")
}

/// What the fake VMM does not do: it opens its disk, and writes.
fn write(disk: &DiskConfig, byte: u8) {
    let disk = BlockBackend::of(disk).expect("open");
    disk.write_at(&[byte; 512], 4096).expect("write");
    disk.settle().expect("settle");
}

fn read(disk: &DiskConfig) -> [u8; 2] {
    let disk = BlockBackend::of(disk).expect("open");
    [0, 4096].map(|at| {
        let mut byte = [0];
        disk.read_at(&mut byte, at).expect("read");
        byte[0]
    })
}

fn assert_untouched(world: &World) {
    let bytes = fs::read(base(world)).expect("disk");
    assert!(bytes.len() == 1 << 20 && bytes.iter().all(|b| *b == 7));
}

fn from_start_to_stop() {
    let world = World::new();
    define(&world, &["db", "web"]);
    for vm in ["db", "web"] {
        ops::start(&world.host, &name(vm)).expect("many may share one disk");
    }
    let [db, web] = ["db", "web"].map(|vm| booted(&world, vm).disks.remove(0));
    assert_eq!(images(&world), [db.path.clone(), web.path.clone()]);
    for (disk, byte) in [(&db, 1), (&web, 2)] {
        assert_eq!(disk.backing, [base(&world)]);
        assert!(!disk.readonly && !disk.snapshot);
        write(disk, byte);
    }
    assert_eq!((read(&db), read(&web)), ([7, 1], [7, 2]));
    ops::stop(&world.host, &name("web"), force()).expect("stops");
    assert_eq!(images(&world), [db.path]);
    world.kill("db");
    ops::drop_vm(&world.host, &name("db")).expect("given up");
    assert!(images(&world).is_empty());
    assert_untouched(&world);
}

fn outlives() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    let disk = booted(&world, "web").disks.remove(0);
    write(&disk, 1);
    let is_there = |what: &str| {
        let own = std::slice::from_ref(&disk.path);
        assert_eq!(images(&world), own, "{what}");
        assert_eq!(read(&disk), [7, 1], "{what}");
    };
    ops::suspend(&world.host, &name("web")).expect("suspends");
    is_there("suspended");
    world.next_boot();
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("resumes");
    is_there("resumed");
    for method in [RebootMethod::Warm, RebootMethod::Saved] {
        world.reboot(method);
        is_there("between");
        resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert_eq!(world.state("web"), VmState::Running, "{method:?}");
        is_there("after");
    }
    ops::stop(&world.host, &name("web"), force()).expect("stops");
    assert!(images(&world).is_empty());
    assert_untouched(&world);
}

fn cold() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    let first = images(&world);
    let said = |method| {
        let (verdict, _) = preflight(&world.host, &world.options(method), true);
        assert!(verdict.passes(), "{}", verdict.why_not());
        let own = verdict.checks.iter().find(|c| c.id == "snapshot:web");
        own.map(|check| check.level)
    };
    assert_eq!(said(RebootMethod::Warm), None);
    assert_eq!(said(RebootMethod::Saved), None);
    assert_eq!(said(RebootMethod::Cold), Some(Level::Warn));
    world.reboot(RebootMethod::Cold);
    resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(world.state("web"), VmState::Running);
    let second = images(&world);
    assert!(second.len() == 1 && second != first, "{second:?}");
    assert_untouched(&world);
}

fn killed() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    let first = images(&world);
    world.kill("web");
    overlays::sweep(&world.host);
    assert_eq!(images(&world), first, "somebody may want to look at it");
    world.next_boot();
    overlays::sweep(&world.host);
    assert_eq!(images(&world), first);
    ops::start(&world.host, &name("web")).expect("boots anew");
    let second = images(&world);
    assert!(second.len() == 1 && second != first, "{second:?}");
}

fn powers_off() {
    let world = World::new();
    define(&world, &["db", "web"]);
    for vm in ["db", "web"] {
        ops::start(&world.host, &name(vm)).expect("starts");
    }
    let db = booted(&world, "db").disks.remove(0).path;
    let socket = world.host.layout.socket(&name("web"));
    let wait = Duration::from_secs(5);
    let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::PowerButton, wait);
    assert!(ops::ended_within(&world.host, &name("web"), wait));
    assert_eq!(images(&world).len(), 2);
    // Of a VM that is suspended nothing goes, nor of one that runs.
    ops::suspend(&world.host, &name("db")).expect("suspends");
    world.define("other", "");
    ops::start(&world.host, &name("other")).expect("starts");
    assert_eq!(images(&world), [db]);
    assert_eq!(world.state("web"), VmState::Stopped);
}

fn fails_to_start() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    let first = images(&world);
    let life = world.host.layout.state.join("lives");
    let life = fs::read_dir(life).expect("lives").next();
    let life = life.expect("one").expect("read").path();
    ops::suspend(&world.host, &name("web")).expect("suspends");
    world.next_boot();
    let bare = world.bare();
    world.tell("web", "fail-start");
    ops::start_afresh(&bare, &name("web")).expect_err("told so");
    assert_eq!(images(&world), first, "its memory was not given up");
    assert!(life.exists(), "nor what it was booted with");
    world.reserved();
    world.tell("web", "");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("resumes");
    assert_eq!(images(&world), first);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    world.next_boot();
    let bare = world.bare();
    ops::start_afresh(&bare, &name("web")).expect("boots");
    let second = images(&world);
    assert!(second.len() == 1 && second != first, "{second:?}");
    assert!(!life.exists(), "that life is over");
}

fn refused() {
    let world = World::new();
    define(&world, &["web"]);
    let start = || {
        let error = ops::start(&world.host, &name("web")).expect_err("refused");
        assert!(images(&world).is_empty(), "{error}");
        assert_eq!(world.segments(), 0, "{error}");
        assert_eq!(world.state("web"), VmState::Stopped, "{error}");
        error.to_string()
    };
    let writer = BlockBackend::open(&base(&world), false).expect("open");
    assert!(start().contains("in use by another VM"));
    drop(writer);
    fs::write(base(&world), vec![7; 1000]).expect("disk");
    assert!(start().contains("1000 bytes"));
    fs::remove_file(base(&world)).expect("remove");
    assert!(start().contains("base.img"));
    let state = &world.host.layout.state;
    define(&world, &["web"]);
    fs::remove_dir(state.join("overlays")).expect("it is empty");
    fs::write(state.join("overlays"), "in the way").expect("write");
    let error = ops::start(&world.host, &name("web")).expect_err("no folder");
    assert!(error.to_string().contains("overlays"), "{error}");
    assert_eq!(world.segments(), 0);
}
