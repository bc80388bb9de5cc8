//! Disks that keep nothing: what is written over them lasts as long as the VM's
//! life may go on, and no longer.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use hebe_block::BlockBackend;
use hebe_flow::reboot::Fate;
use hebe_flow::stopping::Going;
use hebe_host::HostError;
use hebe_host::definitions;
use hebe_host::listing::VmState;
use hebe_host::lock::VmLock;
use hebe_host::ops::{self, ResumeOptions, StopOptions};
use hebe_host::overlays;
use hebe_host::preflight::{Level, preflight};
use hebe_host::reboot::stage;
use hebe_host::resume_all::resume_all;
use hebe_host::segments::drop_listed;
use hebe_host::stopping::stopping;
use hebe_host::store_init::{InitOptions, init};
use hebe_sys::clock::stamp_now;
use hebe_types::{ByteSize, DiskConfig, RebootMethod, VmConfig, VmId};

use crate::world::{PATIENCE, World, name};

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
        "what_was_written_over_a_disk_goes_with_memory_that_is_given_up",
        segment_dropped,
    ),
    (
        "what_was_written_over_a_disk_goes_when_nothing_knows_the_vm",
        unknown,
    ),
    (
        "what_was_written_over_a_disk_stays_as_long_as_anything_knows_the_vm",
        known,
    ),
    (
        "what_a_vm_wrote_that_was_frozen_without_a_note_stays_while_its_store_is_away",
        frozen_unnoted,
    ),
    (
        "a_look_removes_no_image_of_a_vm_that_is_killed_as_it_begins",
        killed_at_a_look,
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
    let wait = PATIENCE;
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

/// What `hebe store drop` does.
fn drop_segment(world: &World) {
    let view = world.host.store.view().expect("view").expect("store");
    let [segment] = view.segments.as_slice() else {
        panic!("{:?}", view.segments);
    };
    drop_listed(&world.host, segment, |_| Ok::<_, HostError>(())).expect("dropped");
}

fn lives(world: &World) -> usize {
    fs::read_dir(world.host.layout.state.join("lives")).map_or(0, Iterator::count)
}

fn segment_dropped() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    assert_eq!((images(&world).len(), lives(&world)), (1, 1));
    drop_segment(&world);
    assert_eq!((images(&world).len(), lives(&world)), (0, 0));
    assert_untouched(&world);
    // A life that is in a file, too, may go on from there.
    ops::start(&world.host, &name("web")).expect("starts");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let saved = world.host.layout.state.join("saved");
    fs::create_dir_all(&saved).expect("mkdir");
    fs::write(saved.join("web.hebe"), "its state").expect("write");
    drop_segment(&world);
    assert_eq!((images(&world).len(), lives(&world)), (1, 1));
}

fn unknown() {
    let world = World::without_store();
    define(&world, &["db", "web"]);
    for vm in ["db", "web"] {
        ops::start(&world.host, &name(vm)).expect("starts");
        world.kill(vm);
    }
    for vm in ["db", "web"] {
        let own = definitions::expected_path(&world.host.layout, &name(vm));
        fs::remove_file(own).expect("no VM any more");
    }
    let both = images(&world);
    overlays::sweep(&world.host);
    assert_eq!(images(&world), both, "they crashed, and may be looked at");
    // The host stops, and with its runtime directory all that knew them.
    world.next_boot();
    define(&world, &["web"]);
    overlays::sweep(&world.host);
    assert_eq!(images(&world), [both[1].clone()], "a definition is left");
    assert_eq!(lives(&world), 1);
    assert!(!world.dir("db").exists(), "looking leaves nothing");
    assert_untouched(&world);
}

/// Every way to be known, one by one; and none.
fn known() {
    let world = World::new();
    let layout = &world.host.layout;
    let old = name("old");
    let id = "07070707-0707-0707-0707-070707070707";
    let (images, lives) = (layout.state.join("overlays"), layout.state.join("lives"));
    let image = images.join(format!("old.{id}.0.qcow2"));
    let life = lives.join(format!("old.{id}.toml"));
    for dir in [&images, &lives] {
        fs::create_dir_all(dir).expect("mkdir");
    }
    let leave = || {
        fs::write(&image, "what was written").expect("write");
        fs::write(&life, "what it was booted with").expect("write");
    };
    let stays = |why: &str| {
        overlays::sweep(&world.host);
        assert!(image.exists() && life.exists(), "{why}");
    };
    leave();
    for (path, text) in [
        ("state/saved/old.hebe".to_owned(), ""),
        ("state/saved/old.restoring".to_owned(), ""),
        ("state/saved/old.part".to_owned(), ""),
        (format!("state/frozen/old.{id}.json"), "not to be read"),
        ("state/pending.json".to_owned(), "not to be read"),
        (
            "state/pending.json".to_owned(),
            "{\"vms\": [{\"name\": \"old\"}]}",
        ),
        (
            "state/pending.json".to_owned(),
            "{\"vms\": [{\"of\": \"another release\"}]}",
        ),
        ("state/vms/old.toml".to_owned(), "not to be read"),
        // A store that is away.
        (format!("state/stores/{id}.json"), "not to be read"),
        ("config/vms/old.toml".to_owned(), "not to be read"),
        ("run/vms/old/instance.json".to_owned(), "{}"),
    ] {
        let (root, rest) = path.split_once('/').expect("a path");
        let root = match root {
            "state" => &layout.state,
            "config" => &layout.config,
            _ => &layout.run,
        };
        let file = root.join(rest);
        fs::create_dir_all(file.parent().expect("a folder")).expect("mkdir");
        fs::write(&file, text).expect("write");
        stays(&path);
        fs::remove_file(&file).expect("remove");
        if rest.ends_with("instance.json") {
            fs::remove_dir(file.parent().expect("its own")).expect("remove");
        }
    }
    // Its VMM lives, and nothing but its arguments tells of it.
    let mut vmm = Command::new("sh")
        .args(["-c", "read line", "--vm-id", &id.replace('-', "")])
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh");
    stays("its VMM lives");
    vmm.kill().expect("kill");
    vmm.wait().expect("wait");
    let dir = world.dir("old");
    let lock = VmLock::take(&dir).expect("io").expect("free");
    stays("somebody begins it");
    lock.remove_dir().expect("remove");
    let segment = world
        .host
        .store
        .create(VmId([7; 16]), &old, ByteSize::mib(4));
    let segment = segment.expect("a segment").id;
    stays("it is in the store");
    world
        .host
        .store
        .drop_segment(segment, Some(VmId([7; 16])))
        .expect("dropped");
    // Nobody can tell what is in a store that cannot be read.
    let store = world.root.path().join("store");
    let whole = fs::read(&store).expect("store");
    fs::write(&store, vec![0xa5; whole.len()]).expect("damage");
    assert!(world.host.store.view().is_err());
    stays("the store cannot be read");
    fs::write(&store, whole).expect("mend");
    overlays::sweep(&world.host);
    assert!(!image.exists() && !life.exists() && !dir.exists());
}

/// The state directory was full when the host went down, and the VM's definition
/// is deleted: under a kernel without the store nothing tells of it.
fn frozen_unnoted() {
    let world = World::new();
    define(&world, &["web"]);
    ops::start(&world.host, &name("web")).expect("starts");
    let disk = booted(&world, "web").disks.remove(0);
    write(&disk, 1);
    // No note can be written there.
    let vm = world.instance("web").expect("up").vm;
    let in_the_way = format!("frozen/web.{vm}.json.new");
    let in_the_way = world.host.layout.state.join(in_the_way);
    fs::create_dir_all(&in_the_way).expect("mkdir");
    stage(&world.host, &world.options(RebootMethod::Warm), &|_| {}).expect("staged");
    *world.machine.going.lock().expect("lock") = Some(Ok(Going::Kexec));
    let stopped = stopping(&world.host, &|_| {}).expect("its turn");
    assert_eq!(stopped.vms[0].fate, Some(Fate::Keep), "{stopped:?}");
    world.host.store.release();
    let own = definitions::expected_path(&world.host.layout, &name("web"));
    let definition = fs::read(&own).expect("read");
    fs::remove_file(&own).expect("no VM any more");
    world.next_boot();
    fs::remove_dir(&in_the_way).expect("room again");
    let bare = world.bare();
    let survey = hebe_host::listing::survey(&bare);
    assert!(!survey.rows.contains_key(&name("web")), "nobody knows it");
    overlays::sweep(&bare);
    resume_all(&bare, stamp_now(), true).expect("not busy");
    world.define("other", "store = \"memfd\"");
    ops::start(&bare, &name("other")).expect("starts, and sweeps");
    assert_eq!(images(&world), std::slice::from_ref(&disk.path));
    assert!(lives(&world) >= 1);
    // The store is back, and the VM, with what it wrote.
    world.reserved();
    let mut any = world.host.clone();
    any.layout.unnoted = true;
    ops::resume(&any, &name("web"), ResumeOptions::default()).expect("resumes");
    assert_eq!(read(&disk), [7, 1]);
    fs::write(&own, definition).expect("write");
    ops::stop(&world.host, &name("web"), force()).expect("stops");
    assert!(images(&world).is_empty());
    // A store that is no more is waited for by nobody.
    ops::start(&world.host, &name("web")).expect("starts");
    world.kill("web");
    fs::remove_file(&own).expect("no VM any more");
    world.next_boot();
    overlays::sweep(&bare);
    assert_eq!(images(&world).len(), 1, "it is away");
    let anew = InitOptions {
        force: true,
        ..InitOptions::default()
    };
    init(&world.host, &anew).expect("another store");
    overlays::sweep(&bare);
    assert!(images(&world).is_empty());
}

/// The life before ended by its guest's will, which its record says until the next
/// one begins; that is killed at once, and somebody looks all the time.
fn killed_at_a_look() {
    let world = World::new();
    define(&world, &["web"]);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let ends = Ends(&over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    overlays::sweep(&world.host);
                }
            });
        }
        for round in 0..20 {
            ops::start(&world.host, &name("web")).expect("starts");
            let socket = world.host.layout.socket(&name("web"));
            let wait = PATIENCE;
            let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::PowerButton, wait);
            assert!(ops::ended_within(&world.host, &name("web"), wait));
            ops::start(&world.host, &name("web")).expect("starts");
            let disk = booted(&world, "web").disks.remove(0).path;
            world.kill("web");
            assert_eq!(world.state("web"), VmState::Crashed);
            overlays::sweep(&world.host);
            assert_eq!(images(&world), [disk], "round {round}");
        }
        drop(ends);
    });
}

/// Says that it is over, also where the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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
