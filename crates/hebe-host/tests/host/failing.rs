//! VMs that KVM gives up, or whose guests bring their VMMs to an end: they hold up
//! nobody when the host is rebooted, and are listed with their reason afterwards.

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_flow::stopping::Going;
use hebe_host::listing::{self, VmState};
use hebe_host::ops;
use hebe_host::pending::Pending;
use hebe_host::preflight::{Level, preflight};
use hebe_host::reboot::{RebootEnd, reboot, stage};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::stopping::{Stopped, stopping};
use hebe_host::stores::StoreAccess;
use hebe_sys::clock::stamp_now;
use hebe_types::RebootMethod;

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_vm_that_failed_is_named_ended_and_listed_with_its_reason",
        named,
    ),
    ("a_vm_that_failed_is_started_again_by_its_rules", by_rules),
    (
        "a_vm_that_failed_without_a_store_is_listed_until_it_is_dropped",
        without_store,
    ),
    ("a_vm_that_fails_at_its_freeze_holds_up_nobody", at_freeze),
    (
        "a_vm_that_failed_stays_ended_when_the_reboot_is_undone",
        undone,
    ),
    (
        "a_guest_that_crashes_while_a_reboot_is_under_way_holds_up_nobody",
        crashes_meanwhile,
    ),
    (
        "a_vm_that_failed_is_ended_at_the_suspend_event_where_nobody_can_ask",
        at_the_event,
    ),
    (
        "a_vm_that_fails_in_memory_that_linux_carries_costs_the_others_nothing",
        carried,
    ),
];

const METHODS: [RebootMethod; 3] = [RebootMethod::Warm, RebootMethod::Saved, RebootMethod::Cold];

fn silent(_: &str) {}

/// What a method brings a VM back by.
fn back(method: RebootMethod) -> Resumed {
    match method {
        RebootMethod::Warm => Resumed::Resumed,
        RebootMethod::Saved => Resumed::Restored,
        RebootMethod::Cold => Resumed::Booted,
    }
}

/// It is listed as what it is, and told with its reason, now and by a resume.
fn crashed(world: &World, vm: &str, why: &str) {
    let survey = listing::survey(&world.host);
    let row = &survey.rows[&name(vm)];
    assert_eq!(row.state, VmState::Crashed, "{row:?}");
    let detail = row.detail.as_deref().expect("why");
    assert!(detail.contains(why), "{detail}");
    let pending = Pending::read(&world.host.layout).expect("read");
    assert!(!pending.has(&name(vm)), "its rules say what boots it");
    let noted = hebe_host::notes::all(&world.host.layout);
    assert!(
        !noted.iter().any(|n| n.name == name(vm)),
        "nor is it frozen"
    );
}

fn lost(all: &std::collections::BTreeMap<hebe_types::VmName, Resumed>, vm: &str, why: &str) {
    match all.get(&name(vm)) {
        Some(Resumed::Lost { reason }) => {
            assert!(reason.contains(why), "{reason}");
            assert!(reason.contains(&format!("hebe start {vm}")), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

fn named() {
    for method in METHODS {
        let world = World::new();
        world.start(&["db", "web"]);
        world.tell("db", "failed");
        let (verdict, survey) = preflight(&world.host, &world.options(method), true);
        assert!(verdict.passes(), "{}", verdict.why_not());
        let row = &survey.rows[&name("db")];
        assert_eq!((row.state, row.life), (VmState::Paused, Life::Failed));
        let detail = row.detail.as_deref().expect("detail");
        assert!(detail.contains("KVM gave it up"), "{detail}");
        let fate = |vm: &str| {
            let own = verdict.vms.iter().find(|v| v.vm == name(vm));
            own.expect("listed").fate
        };
        assert_eq!(fate("db"), Some(Fate::End));
        assert_ne!(fate("web"), Some(Fate::End));
        let check = verdict.checks.iter().find(|c| c.id == "failed:db");
        let check = check.expect("said");
        assert_eq!(check.level, Level::Warn);
        assert!(check.sentence.contains("KVM gave it up"), "{check:?}");
        world.reboot(method);
        crashed(&world, "db", "KVM gave it up");
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert_eq!(all.vms[&name("web")], back(method), "{method:?}");
        lost(&all.vms, "db", "KVM gave it up");
        let report = complete_report(&world.host).expect("io").expect("a report");
        let told = |n: &String| n.contains("'db'") && n.contains("KVM gave it up");
        assert!(report.notes.iter().any(told), "{:?}", report.notes);
        // Its owner's order is carried out, and then there is no more to say.
        world.tell("db", "");
        ops::start(&world.host, &name("db")).expect("starts");
        world.kill("db");
        let survey = listing::survey(&world.host);
        let detail = survey.rows[&name("db")].detail.clone().expect("why");
        assert!(!detail.contains("KVM gave it up"), "{detail}");
    }
}

fn by_rules() {
    let world = World::new();
    world.define("db", "autostart = true");
    ops::start(&world.host, &name("db")).expect("starts");
    world.tell("db", "failed");
    world.reboot(RebootMethod::Warm);
    world.tell("db", "");
    let all = resume_all(&world.host, stamp_now(), true).expect("not busy");
    assert_eq!(all.vms[&name("db")], Resumed::Booted);
    assert_eq!(world.state("db"), VmState::Running);
}

fn without_store() {
    let world = World::without_store();
    world.start(&["db", "web"]);
    world.tell("db", "failed");
    world.reboot(RebootMethod::Warm);
    crashed(&world, "db", "KVM gave it up");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Restored);
    lost(&all.vms, "db", "KVM gave it up");
    let definition = hebe_host::definitions::expected_path(&world.host.layout, &name("db"));
    std::fs::remove_file(definition).expect("removed");
    crashed(&world, "db", "KVM gave it up");
    ops::drop_vm(&world.host, &name("db")).expect("forgotten");
    let survey = listing::survey(&world.host);
    assert!(!survey.rows.contains_key(&name("db")));
}

fn at_freeze() {
    for (word, why) in [
        ("fail-at-freeze", "KVM gave it up"),
        ("triple-fault", "triple-fault"),
    ] {
        let world = World::new();
        world.start(&["db", "web"]);
        world.tell("db", word);
        world.reboot(RebootMethod::Warm);
        crashed(&world, "db", why);
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert_eq!(all.vms[&name("web")], Resumed::Resumed, "{word}");
        lost(&all.vms, "db", why);
    }
}

/// The machine does not leave: what runs is what ran, and of what does not that is
/// told which ran when it began.
fn undone() {
    let world = World::new();
    world.start(&["before", "meanwhile", "web"]);
    world.tell("before", "failed");
    world.tell("meanwhile", "fail-at-freeze");
    let end = reboot(&world.host, &world.options(RebootMethod::Warm), &silent);
    let Err(RebootEnd::Aborted {
        why,
        stranded,
        notes,
    }) = end
    else {
        panic!("{end:?}");
    };
    assert!(
        why.contains("reboot") && notes.is_empty(),
        "{why} {notes:?}"
    );
    assert_eq!(stranded, [(name("meanwhile"), "KVM gave it up".to_owned())]);
    assert_eq!(world.state("web"), VmState::Running);
    for vm in ["before", "meanwhile"] {
        crashed(&world, vm, "KVM gave it up");
        world.tell(vm, "");
        ops::start(&world.host, &name(vm)).expect("starts");
        assert_eq!(world.state(vm), VmState::Running);
    }
}

fn crashes_meanwhile() {
    for method in METHODS {
        for late in [false, true] {
            let world = World::new();
            world.start(&["db", "web"]);
            let host = world.host.clone();
            world.tell("db", "triple-fault");
            let between = move || {
                let db = name("db");
                let wait = PATIENCE;
                let socket = host.layout.socket(&db);
                let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::Pause, wait);
                assert!(ops::ended_within(&host, &db, wait));
            };
            let at = if late {
                &world.machine.at_sync
            } else {
                &world.machine.at_services
            };
            *at.lock().expect("lock") = Some(Box::new(between));
            world.reboot(method);
            let what = format!("{method:?} {late}");
            world.tell("db", "");
            if method == RebootMethod::Cold {
                let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
                assert_eq!(all.vms[&name("db")], Resumed::Booted, "{what}: it ran");
                assert_eq!(all.vms[&name("web")], Resumed::Booted, "{what}");
                continue;
            }
            crashed(&world, "db", "triple-fault");
            let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
            assert_eq!(all.vms[&name("web")], back(method), "{what}");
            lost(&all.vms, "db", "triple-fault");
        }
    }
}

fn stop(world: &World, going: Going) -> Stopped {
    *world.machine.going.lock().expect("lock") = Some(Ok(going));
    stopping(&world.host, &silent).expect("its turn")
}

fn at_the_event() {
    let ways = [
        (Going::Kexec, Fate::Keep, Resumed::Resumed),
        (Going::Reset, Fate::Save, Resumed::Restored),
        (Going::Off, Fate::Save, Resumed::Restored),
    ];
    for (going, kept, resumed) in ways {
        let world = World::new();
        world.start(&["before", "meanwhile", "web"]);
        world.tell("before", "failed");
        if going == Going::Kexec {
            world.tell("meanwhile", "fail-at-freeze");
            let options = world.options(RebootMethod::Warm);
            stage(&world.host, &options, &silent).expect("it is no reason to refuse");
        } else {
            world.tell("meanwhile", "failed");
        }
        let stopped = stop(&world, going);
        let fates: Vec<_> = stopped.vms.iter().map(|vm| vm.fate).collect();
        let end = Some(Fate::End);
        assert_eq!(fates, [end, end, Some(kept)], "{stopped:?}");
        assert!(!stopped.loses(), "{stopped:?}");
        if let Some(store) = &*world.machine.store.lock().expect("lock") {
            store.release();
        }
        world.next_boot();
        for vm in ["before", "meanwhile"] {
            crashed(&world, vm, "KVM gave it up");
        }
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert_eq!(all.vms[&name("web")], resumed);
        lost(&all.vms, "before", "KVM gave it up");
        lost(&all.vms, "meanwhile", "KVM gave it up");
    }
}

fn carried() {
    for word in ["failed", "fail-at-freeze", "triple-fault"] {
        for managed in [false, true] {
            let world = if managed {
                World::with_manager(8)
            } else {
                World::live_update()
            };
            world.start(&["db", "web"]);
            world.tell("db", word);
            let why = match word {
                "triple-fault" => "triple-fault",
                _ => "KVM gave it up",
            };
            if managed {
                let options = world.options(RebootMethod::Warm);
                stage(&world.host, &options, &silent).expect("staged");
                let stopped = stop(&world, Going::Kexec);
                let fates: Vec<_> = stopped.vms.iter().map(|vm| vm.fate).collect();
                assert_eq!(fates, [Some(Fate::End), Some(Fate::Keep)], "{stopped:?}");
                world.next_boot();
            } else {
                world.reboot(RebootMethod::Warm);
            }
            let all = world.in_time(|host| resume_all(host, stamp_now(), false).expect("not busy"));
            assert_eq!(all.vms[&name("web")], Resumed::Resumed, "{word} {managed}");
            lost(&all.vms, "db", why);
            crashed(&world, "db", why);
        }
    }
}
