//! All VMs: reboots that work, reboots that are undone, and stops of the
//! machine in between.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hebe_host::listing::VmState;
use hebe_host::ops;
use hebe_host::pending::Pending;
use hebe_host::preflight::{Level, RebootOptions};
use hebe_host::reboot::{RebootEnd, reboot};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::saved::SavedPaths;
use hebe_host::store_init::{InitOptions, init};
use hebe_host::timeline::{EventKind, Side};
use hebe_sys::clock::stamp_now;
use hebe_types::RebootMethod;

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_warm_reboot_brings_every_vm_back_and_leaves_a_report",
        warm,
    ),
    ("a_saved_reboot_brings_every_vm_back_from_its_file", saved),
    (
        "a_saved_vm_whose_vmm_died_is_not_lost_with_its_file",
        saved_and_died,
    ),
    ("a_cold_reboot_boots_what_it_shut_down", cold),
    (
        "a_guest_that_powers_off_after_its_reboot_was_undone_is_booted",
        powers_off_late,
    ),
    (
        "what_its_owner_decides_since_keeps_a_vm_from_being_booted",
        decided_since,
    ),
    (
        "a_list_of_vms_to_boot_that_cannot_be_read_is_said",
        list_unread,
    ),
    (
        "a_guest_that_powers_itself_off_meanwhile_stays_off_and_stops_nothing",
        ended_meanwhile,
    ),
    ("a_jump_that_fails_thaws_every_vm", jump_fails),
    (
        "a_vm_that_cannot_freeze_brings_the_others_back",
        cannot_freeze,
    ),
    ("a_vmm_that_dies_while_it_freezes", dies_freezing),
    (
        "a_vm_that_cannot_be_saved_brings_the_others_back",
        cannot_save,
    ),
    ("a_kernel_that_does_not_load_touches_nothing", load_fails),
    ("services_that_do_not_stop_are_started_again", services_fail),
    ("a_failed_cold_reboot_boots_the_vms_again", cold_fails),
    ("a_failed_thaw_leaves_the_vm_listed", thaw_fails),
    ("a_stop_of_the_machine_while_vms_run", stop_while_running),
    (
        "a_stop_of_the_machine_during_a_restore",
        stop_while_restoring,
    ),
    (
        "a_restored_vm_that_ended_is_not_restored_again",
        ended_after_restore,
    ),
    (
        "a_lost_vm_that_is_booted_leaves_no_file_to_go_back_to",
        booted_after_restore,
    ),
    (
        "a_file_that_a_running_vm_left_behind_is_no_second_state",
        stale_file,
    ),
    (
        "a_stop_of_the_machine_before_a_vm_ever_ran",
        stop_before_first_run,
    ),
    ("damage_costs_one_vm", damage),
    ("no_vm_is_ordered_about_during_a_reboot", orders_wait),
    ("a_vm_that_came_up_meanwhile_stops_the_jump", came_up),
    (
        "a_vm_of_which_nobody_can_tell_whether_it_runs_is_not_left_behind",
        nobody_can_tell,
    ),
    ("a_thread_that_panics_undoes_the_reboot", panics),
];

fn silent(_: &str) {}

fn abort(world: &World, method: RebootMethod) -> (String, Vec<String>, Vec<String>) {
    abort_after(world, &world.options(method))
}

fn abort_after(world: &World, options: &RebootOptions) -> (String, Vec<String>, Vec<String>) {
    match reboot(&world.host, options, &silent) {
        Err(RebootEnd::Aborted {
            why,
            stranded,
            notes,
        }) => {
            let stranded = stranded.iter().map(|(n, _)| n.to_string()).collect();
            (why, stranded, notes)
        }
        other => panic!("not aborted: {other:?}"),
    }
}

fn warm() {
    let world = World::new();
    world.start(&["db", "web"]);
    let before = world.instance("web").expect("instance").vm;
    world.forget_events();
    world.reboot(RebootMethod::Warm);
    let stop = world.at("host run stop a");
    for event in ["db frozen", "web frozen"] {
        assert!(stop < world.at(event), "services stop first (R-22)");
        assert!(world.at(event) < world.at("host leave Kexec"));
    }
    assert!(world.at("host load") < stop, "the load comes while VMs run");
    let last_sync = world.events().iter().rposition(|e| e == "host sync");
    assert!(last_sync > Some(world.at("web frozen")), "last writes");
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Frozen);
    }
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.store_trouble, None);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!(world.instance("web").expect("instance").vm, before);
    let report = complete_report(&world.host).expect("io").expect("a report");
    assert_eq!(report.before.release, "6.1");
    assert_eq!(report.after.as_ref().expect("after").release, "6.2");
    let web = name("web");
    for (side, vm, kind) in [
        (Side::Before, None, EventKind::ServicesStopped),
        (Side::Before, Some(&web), EventKind::Committed),
        (Side::Before, None, EventKind::Jump),
        (Side::After, None, EventKind::UserSpace),
        (Side::After, None, EventKind::StoreFound),
        (Side::After, Some(&web), EventKind::Running),
        (Side::After, Some(&web), EventKind::FirstReply),
    ] {
        assert!(report.at(side, vm, kind).is_some(), "{side:?} {kind:?}");
    }
    let downtimes = report.downtimes();
    assert_eq!(downtimes.len(), 2);
    assert!(
        downtimes
            .iter()
            .all(|d| d.stopped_ms.is_some_and(|ms| ms > 0.0))
    );
    let again = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(again.vms.values().all(|r| *r == Resumed::Already));
}

fn saved() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.forget_events();
    world.reboot(RebootMethod::Saved);
    assert_eq!(world.state("web"), VmState::Saved);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(all.vms.values().all(|r| *r == Resumed::Restored), "{all:?}");
    for vm in ["db", "web"] {
        let paths = SavedPaths::new(&world.host.layout, &name(vm));
        assert_eq!(paths.fact(), None, "the file is used up");
        assert_eq!(world.state(vm), VmState::Running);
    }
    assert_eq!(world.segments(), 2, "the stale segments are gone");
    // What ran since is never taken back to the file.
    world.next_boot();
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let lost = &all.vms[&name("web")];
    assert!(matches!(lost, Resumed::Lost { .. }), "{lost:?}");
}

/// The VMM is gone when the reboot is undone: the file is all there is.
fn saved_and_died() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("web", "die-after-save");
    world.tell("db", "refuse-save");
    let (why, _, _) = abort(&world, RebootMethod::Saved);
    assert!(why.contains("the disk is full"), "{why}");
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    match world.state("web") {
        VmState::Running => assert_eq!(paths.fact(), None, "the file is used up"),
        VmState::Saved => assert!(paths.fact().is_some(), "its file is there"),
        other => panic!("web is {other:?}: lost with its file"),
    }
    assert_eq!(world.state("db"), VmState::Running);
}

/// A guest may need longer to shut down than it has: the reboot is undone, and
/// what it was told to do is undone, too.
fn powers_off_late() {
    let world = World::new();
    world.start(&["db", "web"]);
    let before = world.instance("web").expect("instance").vm;
    world.tell("web", "power-off-late");
    // It goes down two seconds after that, and two before it is given up.
    let mut options = world.options(RebootMethod::Cold);
    options.timeout_s = 4;
    let (why, stranded, _) = abort_after(&world, &options);
    assert!(why.contains("did not power off"), "{why}");
    assert!(stranded.is_empty(), "{stranded:?}");
    assert_eq!(world.state("web"), VmState::Running);
    let after = world.instance("web").expect("instance").vm;
    assert_ne!(before, after, "booted anew");
    let pending = Pending::read(&world.host.layout).expect("read");
    assert!(pending.vms.is_empty(), "the next boot is told nothing");
}

fn cold() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("web", "ignore-button");
    let mut options = world.options(RebootMethod::Cold);
    options.timeout_s = 4;
    let (why, stranded, _) = abort_after(&world, &options);
    assert!(why.contains("did not power off"), "{why}");
    assert_eq!(stranded, ["web"], "it may go down at any time");
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(world.state("db"), VmState::Running, "booted again");
    let pending = Pending::read(&world.host.layout).expect("read");
    let names: Vec<_> = pending.vms.iter().map(|c| c.name.clone()).collect();
    assert_eq!(names, [name("web")], "whoever goes down late is booted");
    world.tell("web", "");
    world.reboot(RebootMethod::Cold);
    let pending = Pending::read(&world.host.layout).expect("read");
    assert_eq!(pending.vms.len(), 2);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(all.vms.values().all(|r| *r == Resumed::Booted), "{all:?}");
    assert_eq!(world.segments(), 2);
    let pending = Pending::read(&world.host.layout).expect("read");
    assert!(pending.vms.is_empty());
}

/// A VM that failed to boot is tried again at the next boot, unless its owner
/// did something about it meanwhile: then the list must not boot it.
fn decided_since() {
    let force = ops::StopOptions {
        timeout: Duration::ZERO,
        force: true,
    };
    let web = name("web");
    type Decision<'a> = (&'a str, &'a dyn Fn(&World), bool);
    let decisions: [Decision; 4] = [
        ("nothing", &|_| {}, true),
        (
            "started and stopped",
            &|world| {
                ops::start(&world.host, &web).expect("starts");
                ops::stop(&world.host, &web, force).expect("stops");
            },
            false,
        ),
        (
            "run and killed with the host",
            &|world| {
                let path = hebe_host::definitions::expected_path(&world.host.layout, &web);
                let config = hebe_host::definitions::read(&path).expect("own");
                ops::run(&world.host, &config).expect("runs");
            },
            false,
        ),
        (
            "dropped",
            &|world| ops::drop_vm(&world.host, &web).expect("given up"),
            false,
        ),
    ];
    for (what, decide, boots) in decisions {
        let world = World::new();
        world.start(&["db", "web"]);
        world.reboot(RebootMethod::Cold);
        world.tell("web", "fail-start");
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert!(matches!(all.vms[&web], Resumed::Failed { .. }), "{all:?}");
        world.tell("web", "");
        decide(&world);
        world.next_boot();
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        let booted = all.vms.get(&web) == Some(&Resumed::Booted);
        assert_eq!(booted, boots, "{what}: {all:?}");
    }
}

/// Of a list in words of another release, or of none.
fn list_unread() {
    let world = World::new();
    world.start(&["web"]);
    world.reboot(RebootMethod::Cold);
    let list = world.host.layout.state.join("pending.json");
    let text = fs::read_to_string(&list).expect("the list");
    let check = |id: &str| {
        let options = world.options(RebootMethod::Warm);
        let (verdict, _) = hebe_host::preflight::preflight(&world.host, &options, false);
        verdict.checks.into_iter().find(|c| c.id == id)
    };
    fs::write(&list, text.replace("\"web\",", "\"web\", \"unknown\": 1,")).expect("write");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_ne!(all.vms.get(&name("web")), Some(&Resumed::Booted));
    let trouble = all.pending_trouble.expect("said");
    for word in ["web", "unknown", "hebe start web"] {
        assert!(trouble.contains(word), "{trouble}");
    }
    assert_eq!(check("pending").expect("said").level, Level::Warn);
    fs::write(&list, "{").expect("write");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let trouble = all.pending_trouble.expect("said");
    assert!(trouble.contains("hebe start NAME"), "{trouble}");
    let failed = check("pending").expect("said");
    assert_eq!(failed.level, Level::Fail, "found out while VMs run");
    world.start(&["web"]);
    fs::write(&list, &text).expect("the word of another release");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Already);
    assert_eq!(all.pending_trouble, None);
    assert!(!list.exists());
    assert_eq!(check("pending"), None);
}

/// Pre-flight saw it run; loading a kernel and stopping services take minutes.
fn ended_meanwhile() {
    let methods = [RebootMethod::Warm, RebootMethod::Saved, RebootMethod::Cold];
    for method in methods {
        for late in [false, true] {
            for leaves in [false, true] {
                let world = World::new();
                world.start(&["db", "web"]);
                let host = world.host.clone();
                let between = move || {
                    let db = name("db");
                    let wait = PATIENCE;
                    let button = hebe_api::Request::PowerButton;
                    let _ = hebe_host::vmm::order(&host.layout.socket(&db), &button, wait);
                    assert!(ops::ended_within(&host, &db, wait));
                };
                let at = if late {
                    &world.machine.at_sync
                } else {
                    &world.machine.at_services
                };
                *at.lock().expect("lock") = Some(Box::new(between));
                let what = format!("{method:?} {late} {leaves}");
                if leaves {
                    world.reboot(method);
                    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
                    assert!(!all.vms.values().any(Resumed::is_trouble), "{what} {all:?}");
                } else {
                    let (_, stranded, notes) = abort(&world, method);
                    assert_eq!((stranded, notes), (vec![], vec![]), "{what}");
                }
                assert_eq!(world.state("web"), VmState::Running, "{what}");
                assert_eq!(world.state("db"), VmState::Stopped, "{what}");
                let noted = hebe_host::notes::all(&world.host.layout).len();
                assert_eq!(noted, 0, "{what}: as lost where the store is away");
            }
        }
    }
}

fn jump_fails() {
    let world = World::new();
    world.start(&["db", "web"]);
    let before = world.instance("web").expect("instance").vm;
    let (why, stranded, notes) = abort(&world, RebootMethod::Warm);
    assert!(why.contains("reboot"), "{why}");
    assert!(
        stranded.is_empty() && notes.is_empty(),
        "{stranded:?} {notes:?}"
    );
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Running);
    }
    assert_eq!(world.instance("web").expect("instance").vm, before);
    assert!(world.at("host leave Kexec") < world.at("host run start a"));
    world.at("host unload");
    // The store has no manager any more: others can work.
    world.start(&["third"]);
}

fn cannot_freeze() {
    let world = World::new();
    world.start(&["db", "mail", "web"]);
    world.tell("mail", "refuse-freeze");
    let (why, stranded, _) = abort(&world, RebootMethod::Warm);
    assert_eq!(why, "mail: a disk request hangs");
    assert!(stranded.is_empty());
    for vm in ["db", "mail", "web"] {
        assert_eq!(world.state(vm), VmState::Running);
    }
    let left = world.events().iter().any(|e| e.starts_with("host leave"));
    assert!(!left, "the machine did not leave");
}

fn dies_freezing() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("db", "die-after-commit");
    world.tell("web", "die-before-commit");
    let (_, stranded, _) = abort(&world, RebootMethod::Warm);
    assert_eq!(stranded, ["web"], "it has no state");
    assert_eq!(world.state("web"), VmState::Crashed);
    assert_eq!(world.state("db"), VmState::Running, "resumed by a new VMM");
}

fn cannot_save() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("db", "refuse-save");
    let (why, stranded, _) = abort(&world, RebootMethod::Saved);
    assert!(why.contains("disk is full"), "{why}");
    assert!(stranded.is_empty());
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Running);
        let paths = SavedPaths::new(&world.host.layout, &name(vm));
        assert_eq!(paths.fact(), None, "no file is older than its disk");
    }
}

fn load_fails() {
    let world = World::new();
    world.start(&["web"]);
    world.forget_events();
    world.machine.refuse_load.store(true, Ordering::Relaxed);
    let (why, stranded, _) = abort(&world, RebootMethod::Warm);
    assert!(why.contains("load"), "{why}");
    assert!(stranded.is_empty());
    assert_eq!(world.events(), ["host unload"]);
}

fn services_fail() {
    let world = World::new();
    world.start(&["web"]);
    world.forget_events();
    world.machine.refuse_services.store(true, Ordering::Relaxed);
    let (why, _, _) = abort(&world, RebootMethod::Warm);
    assert!(why.contains("stop a"), "{why}");
    let expected = [
        "host load",
        "host run stop a",
        "host run start a",
        "host unload",
    ];
    assert_eq!(world.events(), expected);
}

fn cold_fails() {
    let world = World::new();
    world.start(&["web"]);
    let (_, stranded, _) = abort(&world, RebootMethod::Cold);
    assert!(stranded.is_empty());
    assert_eq!(world.state("web"), VmState::Running);
    let pending = Pending::read(&world.host.layout).expect("read");
    assert!(pending.vms.is_empty(), "the next boot is told nothing");
}

fn thaw_fails() {
    let world = World::new();
    world.start(&["db", "web"]);
    world.tell("web", "refuse-thaw");
    let (_, stranded, _) = abort(&world, RebootMethod::Warm);
    assert_eq!(stranded, ["web"]);
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(world.state("db"), VmState::Running);
    world.tell("web", "");
    resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(world.state("web"), VmState::Running);
}

fn stop_while_running() {
    let world = World::new();
    world.start(&["web"]);
    world.define("auto", "autostart = true");
    ops::start(&world.host, &name("auto")).expect("starts");
    world.next_boot();
    assert_eq!(world.state("web"), VmState::Crashed);
    let all = resume_all(&world.host, stamp_now(), true).expect("not busy");
    let web = &all.vms[&name("web")];
    assert!(matches!(web, Resumed::Lost { reason } if reason.contains("hebe start")));
    assert_eq!(all.vms[&name("auto")], Resumed::Booted);
    assert_eq!(world.segments(), 2, "nothing is freed without an order");
}

fn stop_while_restoring() {
    let world = World::new();
    world.start(&["web"]);
    world.reboot(RebootMethod::Saved);
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    // Stopped after the file was withdrawn and before the VM ran.
    world.tell("web", "fail-late");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(matches!(all.vms[&name("web")], Resumed::Failed { .. }));
    assert!(
        paths.complete.exists(),
        "it never ran: the file counts again"
    );
    fs::rename(&paths.complete, &paths.restoring).expect("rename");
    world.tell("web", "");
    let info = paths.read_info().expect("info");
    let store = &world.host.store;
    store
        .create(info.vm, &name("web"), info.memory)
        .expect("a segment in which nothing ran");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Restored);
    assert_eq!(world.segments(), 1);
}

/// The manager was killed between the VM's first step and the withdrawal of
/// its file; then the guest powered off. Its disk is newer than the file.
fn ended_after_restore() {
    let world = World::new();
    world.start(&["web"]);
    world.reboot(RebootMethod::Saved);
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let info = paths.read_info().expect("info");
    resume_all(&world.host, stamp_now(), false).expect("not busy");
    paths.prepare(&info).expect("prepare");
    fs::write(&paths.restoring, "web").expect("write");
    let wait = PATIENCE;
    let socket = world.host.layout.socket(&name("web"));
    let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::PowerButton, wait);
    assert!(ops::ended_within(&world.host, &name("web"), wait));
    assert_eq!(world.state("web"), VmState::Crashed);
    let again = ops::ResumeOptions {
        from: None,
        again: true,
        ..ops::ResumeOptions::default()
    };
    assert!(ops::resume(&world.host, &name("web"), again).is_err());
    assert!(hebe_host::saving::restore(&world.host, &name("web"), false).is_err());
    world.next_boot();
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let web = &all.vms[&name("web")];
    assert!(matches!(web, Resumed::Lost { .. }), "{web:?}");
}

/// What it was restored from is older than its disk: it goes before the VM
/// boots, or a later restore would take it for an interrupted one.
fn booted_after_restore() {
    let world = World::new();
    world.start(&["web"]);
    world.reboot(RebootMethod::Saved);
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let info = paths.read_info().expect("info");
    resume_all(&world.host, stamp_now(), false).expect("not busy");
    paths.prepare(&info).expect("prepare");
    fs::write(&paths.restoring, "web").expect("write");
    world.next_boot();
    assert_eq!(world.state("web"), VmState::Crashed);
    // A boot that fails has given nothing up but what is stale for certain.
    world.tell("web", "fail-start");
    assert!(ops::start(&world.host, &name("web")).is_err());
    world.tell("web", "");
    ops::start(&world.host, &name("web")).expect("boots");
    assert_eq!(paths.fact(), None);
    assert!(!paths.info.exists());
    let force = ops::StopOptions {
        timeout: Duration::ZERO,
        force: true,
    };
    ops::stop(&world.host, &name("web"), force).expect("stops");
    assert_eq!(world.state("web"), VmState::Stopped);
    let again = ops::ResumeOptions {
        from: None,
        again: true,
        ..ops::ResumeOptions::default()
    };
    assert!(ops::resume(&world.host, &name("web"), again).is_err());
    // Where nothing shows that it ran, the file may be all that is left of it.
    paths.prepare(&info).expect("prepare");
    fs::write(&paths.restoring, "web").expect("write");
    let config = hebe_host::definitions::load(&world.host.layout, &name("web"));
    let refused = ops::boot(&world.host, &config.expect("defined").1);
    assert!(refused.is_err(), "never booted beside a file");
    assert!(
        paths
            .fact()
            .is_some_and(hebe_flow::resume::SavedFact::is_restoring)
    );
}

/// The manager was killed between the VM's first step and the withdrawal of
/// its file: the VM runs, so the file is older than its disk, whatever comes.
fn stale_file() {
    for method in [RebootMethod::Warm, RebootMethod::Saved] {
        let world = World::new();
        world.start(&["web"]);
        let paths = SavedPaths::new(&world.host.layout, &name("web"));
        let leave_behind = || {
            let info = hebe_host::saved::SavedInfo {
                vm: world.instance("web").expect("instance").vm,
                memory: hebe_types::ByteSize::mib(4),
                in_store: true,
                in_files: false,
                apart: false,
            };
            paths.prepare(&info).expect("prepare");
            fs::write(&paths.restoring, "old").expect("write");
        };
        leave_behind();
        world.reboot(method);
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        let back = &all.vms[&name("web")];
        assert!(
            matches!(back, Resumed::Resumed | Resumed::Restored),
            "{method:?}: {back:?}"
        );
        assert_eq!(paths.fact(), None);
        leave_behind();
        ops::suspend(&world.host, &name("web")).expect("suspends");
        let plain = ops::ResumeOptions::default();
        ops::resume(&world.host, &name("web"), plain).expect("no choice to make");
    }
}

fn stop_before_first_run() {
    let world = World::new();
    let store = &world.host.store;
    store
        .create(
            hebe_types::VmId([9; 16]),
            &name("web"),
            hebe_types::ByteSize::mib(4),
        )
        .expect("created, and the machine stopped");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Cleaned);
    assert_eq!(world.segments(), 0);
}

fn damage() {
    use std::os::unix::fs::FileExt;
    let world = World::new();
    world.start(&["db", "web"]);
    ops::suspend(&world.host, &name("db")).expect("suspends");
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let view = world.host.store.view().expect("view").expect("store");
    let spec = &view.segment_of(&name("db")).expect("segment").spec;
    let spec: hebe_store::SegmentSpec = serde_json::from_str(spec).expect("spec");
    let store = fs::OpenOptions::new()
        .write(true)
        .open(world.root.path().join("store"))
        .expect("open");
    let noise = vec![0xa5u8; spec.exec.len as usize];
    store
        .write_all_at(&noise, spec.exec.offset)
        .expect("damage");
    assert_eq!(world.state("db"), VmState::Damaged);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
    let db = &all.vms[&name("db")];
    assert!(
        matches!(db, Resumed::Left { reason } if reason.contains("hebe drop")),
        "{db:?}"
    );
    assert_eq!(world.segments(), 2);
    ops::drop_vm(&world.host, &name("db")).expect("given up");
    assert!(ops::ended_within(&world.host, &name("db"), Duration::ZERO));
    assert_eq!(world.segments(), 1);
}

fn orders_wait() {
    let world = World::new();
    world.start(&["web"]);
    world.define("db", "");
    let all = world.host.lock_all().expect("free");
    let (db, web) = (name("db"), name("web"));
    let force = ops::StopOptions {
        timeout: Duration::ZERO,
        force: true,
    };
    let anew = InitOptions {
        force: true,
        ..InitOptions::default()
    };
    let refused = [
        ops::start(&world.host, &db).map(drop),
        ops::stop(&world.host, &web, force),
        ops::suspend(&world.host, &web).map(drop),
        ops::resume(&world.host, &web, ops::ResumeOptions::default()).map(drop),
        ops::drop_vm(&world.host, &web),
        init(&world.host, &anew).map(drop),
    ];
    for result in refused {
        let error = result.expect_err("refused").to_string();
        assert!(error.contains("wait until it is done"), "{error}");
    }
    assert_eq!(world.state("web"), VmState::Running);
    drop(all);
    // An order that is under way is waited for.
    let order = world.host.lock_orders().expect("free");
    let end = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(order);
    });
    drop(world.host.lock_all().expect("after the order"));
    end.join().expect("join");
    ops::start(&world.host, &db).expect("starts");
}

/// Started past the host's lock.
fn came_up() {
    let world = World::new();
    world.start(&["web"]);
    world.define("late", "store = \"memfd\"");
    let host = world.host.clone();
    let between = move || {
        let (_, config) = hebe_host::definitions::load(&host.layout, &name("late")).expect("own");
        ops::boot(&host, &config).expect("boots");
    };
    *world.machine.at_sync.lock().expect("lock") = Some(Box::new(between));
    let (why, stranded, _) = abort(&world, RebootMethod::Warm);
    assert!(why.contains("'late'"), "{why}");
    assert!(stranded.is_empty());
    assert!(!world.events().iter().any(|e| e.starts_with("host leave")));
    assert_eq!(world.state("web"), VmState::Running);
}

/// As where no more files can be opened: it may run, and would be lost.
fn nobody_can_tell() {
    let world = World::new();
    world.start(&["web"]);
    let dir = world.dir("late");
    let loops = dir.join("lock");
    let between = move || {
        fs::create_dir_all(&dir).expect("mkdir");
        std::os::unix::fs::symlink("lock", dir.join("lock")).expect("link");
    };
    *world.machine.at_sync.lock().expect("lock") = Some(Box::new(between));
    let (why, stranded, _) = abort(&world, RebootMethod::Warm);
    assert!(
        why.contains("nobody can tell whether VM 'late' runs"),
        "{why}"
    );
    assert!(stranded.is_empty());
    assert!(!world.events().iter().any(|e| e.starts_with("host leave")));
    assert_eq!(world.state("web"), VmState::Running);
    fs::remove_file(loops).expect("removed");
    // Nor is one resumed that may run.
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let lock = world.dir("web").join("lock");
    fs::remove_file(&lock).expect("removed");
    std::os::unix::fs::symlink("lock", &lock).expect("link");
    let left = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let left = &left.vms[&name("web")];
    assert!(
        matches!(left, Resumed::Left { reason } if reason.contains("nobody can tell")),
        "{left:?}"
    );
    fs::remove_file(lock).expect("removed");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
}

/// It panics when its guest is down: nobody says so, and it is booted all the
/// same.
fn panics() {
    let world = World::new();
    world.start(&["web"]);
    *world.machine.panics.lock().expect("lock") = Some(("stamp", 2));
    let options = world.options(RebootMethod::Cold);
    let end = world.in_time(move |host| reboot(host, &options, &silent));
    let Err(RebootEnd::Aborted { why, stranded, .. }) = end else {
        panic!("not aborted: {end:?}");
    };
    assert!(why.contains("ended early"), "{why}");
    assert!(stranded.is_empty(), "{stranded:?}");
    assert_eq!(world.state("web"), VmState::Running);
}
