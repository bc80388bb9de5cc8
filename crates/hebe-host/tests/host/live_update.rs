//! VMs whose memory Linux carries: reboots that work, and what becomes of the
//! VMs when any part of it fails.

use std::fs;
use std::sync::atomic::Ordering;

use hebe_host::launch::Instance;
use hebe_host::listing::{self, VmRow, VmState};
use hebe_host::luo::asking;
use hebe_host::notes;
use hebe_host::ops::{self, ResumeFrom, ResumeOptions};
use hebe_host::preflight::{Level, RebootOptions, preflight};
use hebe_host::reboot::{RebootEnd, reboot};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{ResumeAll, Resumed, resume_all};
use hebe_host::saved::SavedPaths;
use hebe_snapshot::RamView;
use hebe_sys::clock::stamp_now;
use hebe_sys::luo::fake::Fault;
use hebe_types::{RebootMethod, VmId};

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    ("carried_vms_come_back_as_they_were", carried),
    ("each_vm_has_the_store_that_it_asks_for", chosen),
    (
        "a_preserve_that_fails_leaves_every_vm_running",
        preserve_fails,
    ),
    ("a_jump_that_fails_lets_carried_memory_go", jump_fails),
    ("a_vm_that_was_suspended_is_carried_too", suspended),
    ("a_token_that_fails_costs_one_vm", token_fails),
    ("a_session_that_is_missing_is_told_by_name", session_missing),
    (
        "what_the_next_kernel_cannot_read_is_lost_and_said",
        unreadable,
    ),
    (
        "a_kernel_without_live_update_says_what_was_lost",
        not_offered,
    ),
    (
        "a_vm_that_does_not_resume_stays_and_is_carried_on",
        carried_on,
    ),
    ("a_keeper_that_ends_takes_nothing_that_runs", keeper_ends),
    ("a_carried_vm_that_is_dropped_is_gone", dropped),
    ("preflight_refuses_what_would_lose_memory", refused),
    ("a_saved_vm_is_restored_into_carried_memory", restored),
    (
        "a_file_that_a_running_vm_left_behind_is_no_second_state_of_carried_memory",
        stale_file,
    ),
    (
        "memory_that_ends_with_its_vmm_is_not_given_up_for_a_damaged_file",
        damaged_file,
    ),
    (
        "a_file_that_is_chosen_leaves_nothing_of_carried_memory",
        file_chosen,
    ),
];

fn silent(_: &str) {}

fn resume(world: &World) -> ResumeAll {
    resume_all(&world.host, stamp_now(), false).expect("not busy")
}

fn row(world: &World, vm: &str) -> VmRow {
    let mut rows = listing::survey(&world.host).rows;
    rows.remove(&name(vm)).expect("listed")
}

fn instance(world: &World, vm: &str) -> Instance {
    world.instance(vm).expect("up")
}

fn id(world: &World, vm: &str) -> VmId {
    instance(world, vm).vm
}

fn aborted(world: &World) -> String {
    match reboot(&world.host, &world.options(RebootMethod::Warm), &silent) {
        Err(RebootEnd::Aborted { why, stranded, .. }) if stranded.is_empty() => why,
        other => panic!("not undone: {other:?}"),
    }
}

fn noted(world: &World) -> usize {
    notes::all(&world.host.layout).len()
}

fn keeper_gone(world: &World) {
    let held = asking::list(&world.host.layout.keeper_socket()).expect("io");
    assert!(held.is_none_or(|held| held.vms.is_empty()));
}

fn carried() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    assert_eq!(row(&world, "web").store, Some("luo"));
    world.reboot(RebootMethod::Warm);
    assert_eq!(noted(&world), 2);
    let all = resume(&world);
    assert_eq!(all.carry_trouble, None);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Running);
        assert_eq!(row(&world, vm).store, Some("luo"));
    }
    keeper_gone(&world);
    assert_eq!(noted(&world), 0);
    let report = complete_report(&world.host).expect("io").expect("a report");
    assert_eq!(report.before.release, "6.1");
    assert_eq!(report.after.as_ref().expect("after").release, "6.2");
    // And once more, from what arrived.
    world.reboot(RebootMethod::Warm);
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

fn chosen() {
    let luo = World::live_update();
    luo.start(&["web"]);
    assert!(instance(&luo, "web").files);
    luo.define("huge", "hugepages = true");
    ops::start(&luo.host, &name("huge")).expect("starts");
    assert_eq!(row(&luo, "huge").store, Some("memfd"));
    let mut both = World::new();
    *both.machine.luo.lock().expect("lock") = Some(Default::default());
    both.keep_arrivals();
    both.start(&["web"]);
    both.define("db", "store = \"luo\"");
    assert_eq!(row(&both, "db").store, Some("luo"));
    ops::start(&both.host, &name("db")).expect("starts");
    assert_eq!(row(&both, "web").store, Some("devdax"));
    assert_eq!(row(&both, "db").store, Some("luo"));
    let neither = World::without_store();
    neither.start(&["web"]);
    assert_eq!(row(&neither, "web").store, Some("memfd"));
    neither.define("db", "store = \"luo\"");
    let why = ops::start(&neither.host, &name("db")).expect_err("not offered");
    assert!(
        why.to_string().contains("no Live Update Orchestrator"),
        "{why}"
    );
}

fn preserve_fails() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    for token in [0, 1, 2] {
        let fault = Fault::Preserve("hebe.vm.001".into(), token);
        world.luo().arm(fault, libc::ENOMEM);
        // An empty part is left out, and not preserved at all.
        let why = if token == 2 {
            let holes = "[live_update]\nholes = \"fill\"\n";
            fs::write(world.host.layout.config.join("host.toml"), holes).expect("write");
            aborted(&world)
        } else {
            aborted(&world)
        };
        assert!(
            why.contains("web") && why.contains("not enough memory"),
            "{why}"
        );
        for vm in ["db", "web"] {
            assert_eq!(world.state(vm), VmState::Running);
        }
        assert!(!world.events().iter().any(|e| e.ends_with("frozen")));
        assert_eq!(world.luo().outgoing(), (0, 0), "the sessions are closed");
        assert_eq!(noted(&world), 0);
        world.luo().disarm();
    }
    world
        .luo()
        .arm(Fault::Create("hebe.host".into()), libc::EEXIST);
    assert!(aborted(&world).contains("hebe.host"));
}

fn jump_fails() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let why = aborted(&world);
    assert!(why.contains("reboot"), "{why}");
    for vm in ["db", "web"] {
        assert!(world.at(&format!("{vm} frozen")) < world.at("host leave Kexec"));
        assert_eq!(world.state(vm), VmState::Running);
    }
    assert_eq!(world.luo().outgoing(), (0, 0));
    assert_eq!(noted(&world), 0);
    world.reboot(RebootMethod::Warm);
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
}

fn suspended() {
    let world = World::live_update();
    world.start(&["web"]);
    let before = id(&world, "web");
    ops::suspend(&world.host, &name("web")).expect("freezes");
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(noted(&world), 1);
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("thaws");
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(noted(&world), 0);
    ops::suspend(&world.host, &name("web")).expect("freezes");
    world.reboot(RebootMethod::Cold);
    // A reset carries nothing: the checks refuse it, so this was a jump.
    assert_eq!(resume(&world).vms[&name("web")], Resumed::Resumed);
    assert_eq!(id(&world, "web"), before);
    // Killed while it is frozen, it is gone, and nobody takes it for stopped.
    ops::suspend(&world.host, &name("web")).expect("freezes");
    world.kill("web");
    let row = row(&world, "web");
    assert_eq!(row.state, VmState::Lost);
    assert!(row.detail.is_some_and(|why| why.contains("--afresh")));
}

fn token_fails() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    // The first slot is db's, and its second token its execution state.
    world
        .luo()
        .arm(Fault::Retrieve("hebe.vm.000".into(), 1), libc::EIO);
    world.reboot(RebootMethod::Warm);
    let all = resume(&world);
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
    let Resumed::Left { reason } = &all.vms[&name("db")] else {
        panic!("{all:?}");
    };
    assert!(reason.contains("execution-state area"), "{reason}");
    assert!(reason.contains("hebe drop db"), "{reason}");
    let db = row(&world, "db");
    assert_eq!(db.state, VmState::Damaged);
    assert!(db.detail.is_some_and(|why| why.contains("token 1")));
    let start = ops::start(&world.host, &name("db")).expect_err("it is not over");
    assert!(start.to_string().contains("hebe drop db"), "{start}");
    ops::drop_vm(&world.host, &name("db")).expect("given up");
    keeper_gone(&world);
    world.start(&["db"]);
    assert_eq!(world.state("db"), VmState::Running);
}

fn session_missing() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.luo().arm(Fault::Vanish("hebe.vm.000".into()), 1);
    world.reboot(RebootMethod::Warm);
    let all = resume(&world);
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
    assert!(
        matches!(&all.vms[&name("db")], Resumed::Left { reason } if reason.contains("no session"))
    );
    assert_eq!(row(&world, "db").state, VmState::Damaged);
}

/// Every VM is listed as lost, and boots only when that is said.
fn all_lost(world: &World, words: &str) {
    let all = resume_all(&world.host, stamp_now(), true).expect("not busy");
    let trouble = all.carry_trouble.expect("said");
    assert!(trouble.contains(words), "{trouble}");
    for vm in ["db", "web"] {
        assert_eq!(row(world, vm).state, VmState::Lost);
        ops::start(&world.host, &name(vm)).expect_err("not without a word");
        ops::start_afresh(&world.host, &name(vm)).expect("afresh");
        assert_eq!(world.state(vm), VmState::Running);
    }
}

fn unreadable() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.luo().arm(Fault::Deserialize, 1);
    world.reboot(RebootMethod::Warm);
    all_lost(&world, "could not read what the kernel before");
}

fn not_offered() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.reboot(RebootMethod::Warm);
    *world.machine.luo.lock().expect("lock") = None;
    all_lost(&world, "no Live Update Orchestrator");
}

fn carried_on() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let before = id(&world, "web");
    world.reboot(RebootMethod::Warm);
    world.tell("web", "fail-start");
    let all = resume(&world);
    assert_eq!(all.vms[&name("db")], Resumed::Resumed);
    assert!(matches!(&all.vms[&name("web")], Resumed::Failed { reason } if reason.contains("tap")));
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(row(&world, "web").store, Some("luo"));
    // The keeper has it, and it goes over the next reboot with the others.
    world.reboot(RebootMethod::Warm);
    world.tell("web", "");
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
    assert_eq!(id(&world, "web"), before);
    keeper_gone(&world);
}

fn keeper_ends() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.reboot(RebootMethod::Warm);
    world.tell("web", "fail-start");
    resume(&world);
    // As if it were killed: all that it holds goes.
    let socket = world.host.layout.keeper_socket();
    let held = asking::list(&socket).expect("io").expect("a keeper");
    for vm in held.vms {
        asking::release(&socket, vm.segment).expect("release");
    }
    assert_eq!(world.state("db"), VmState::Running);
    let web = row(&world, "web");
    assert_eq!(web.state, VmState::Lost);
    assert!(web.detail.is_some_and(|why| why.contains("gone")));
    let again = resume(&world);
    assert_eq!(again.vms[&name("db")], Resumed::Already);
    assert!(again.vms[&name("web")].is_trouble(), "{again:?}");
}

fn dropped() {
    let world = World::live_update();
    world.start(&["web"]);
    world.reboot(RebootMethod::Warm);
    world.tell("web", "fail-start");
    resume(&world);
    ops::drop_vm(&world.host, &name("web")).expect("given up");
    keeper_gone(&world);
    assert_eq!(row(&world, "web").state, VmState::Stopped);
    assert_eq!(noted(&world), 0);
}

fn refused() {
    let world = World::live_update();
    world.start(&["web"]);
    let verdict = |options: &RebootOptions| preflight(&world.host, options, false).0;
    let good = world.options(RebootMethod::Warm);
    assert!(verdict(&good).passes(), "{}", verdict(&good).why_not());
    let fails = |options: &RebootOptions, words: &str| {
        let verdict = verdict(options);
        let why = verdict.why_not();
        assert!(!verdict.passes() && why.contains(words), "{why}");
    };
    let bare = RebootOptions {
        cmdline: Some("quiet liveupdate=on".into()),
        ..good.clone()
    };
    fails(&bare, "lacks kho=on");
    let taken = world.luo().open().expect("open");
    fails(&good, "another process has /dev/liveupdate open");
    drop(taken);
    let limit = "[live_update]\nholes = \"fill\"\nfill_max = \"2MiB\"\n";
    fs::write(world.host.layout.config.join("host.toml"), limit).expect("write");
    fails(&good, "would fill 4MiB");
    let loose = limit.replace("2MiB", "4MiB");
    fs::write(world.host.layout.config.join("host.toml"), loose).expect("write");
    assert!(verdict(&good).passes(), "{}", verdict(&good).why_not());
    let says = verdict(&good).checks;
    let says = says.iter().find(|c| c.id == "live-update:web");
    let says = says.expect("a check of its memory");
    assert_eq!(says.level, Level::Ok);
    assert!(says.sentence.contains("4MiB will be filled"), "{says:?}");
    // To a guest that gives memory back it means more.
    world.tell("web", "gives-back");
    let says = verdict(&good).checks;
    let says = says.iter().find(|c| c.id == "live-update:web");
    let says = says.expect("a check of its memory");
    assert_eq!(says.level, Level::Warn);
    assert!(says.sentence.contains("4MiB will be filled"), "{says:?}");
    assert!(says.sentence.contains("balloon"), "{says:?}");
    // A VM that goes by file needs none of it.
    let saved = RebootOptions {
        method: RebootMethod::Saved,
        ..bare
    };
    assert!(verdict(&saved).passes(), "{}", verdict(&saved).why_not());
    assert!(!world.machine.left.load(Ordering::Relaxed));
}

/// As after a restore whose manager was killed before it removed the file.
fn leave_behind(world: &World) -> SavedPaths {
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let info = hebe_host::saved::SavedInfo {
        vm: id(world, "web"),
        memory: hebe_types::ByteSize::mib(4),
        in_store: false,
        in_files: true,
        apart: false,
    };
    paths.prepare(&info).expect("prepare");
    fs::write(&paths.restoring, "old").expect("write");
    paths
}

fn stale_file() {
    let world = World::live_update();
    world.start(&["web"]);
    let paths = leave_behind(&world);
    world.reboot(RebootMethod::Warm);
    assert_eq!(resume(&world).vms[&name("web")], Resumed::Resumed);
    assert_eq!(paths.fact(), None);
    leave_behind(&world);
    ops::suspend(&world.host, &name("web")).expect("freezes");
    let plain = ResumeOptions::default();
    ops::resume(&world.host, &name("web"), plain).expect("no choice to make");
    assert_eq!(paths.fact(), None);
}

/// Memory that ends with its VMM is given up for a file that is good.
fn damaged_file() {
    let world = World::live_update();
    world.start(&["web"]);
    let before = id(&world, "web");
    ops::suspend(&world.host, &name("web")).expect("freezes");
    let paths = leave_behind(&world);
    fs::rename(&paths.restoring, &paths.complete).expect("a file from somewhere");
    let file = ResumeOptions {
        from: Some(ResumeFrom::File),
        ..ResumeOptions::default()
    };
    let refused = ops::resume(&world.host, &name("web"), file);
    let error = refused.expect_err("it is no saved VM").to_string();
    assert!(error.contains("web.hebe"), "{error}");
    assert_eq!(world.state("web"), VmState::Frozen, "its memory is there");
    let info = fs::read(&paths.info).expect("read");
    fs::write(&paths.info, "{").expect("damage");
    assert!(ops::resume(&world.host, &name("web"), file).is_err());
    assert_eq!(world.state("web"), VmState::Frozen, "its memory is there");
    fs::write(&paths.info, info).expect("write");
    let ram = vec![0u8; 4 << 20];
    let view = RamView::from_slice(hebe_types::Gpa(0), &ram);
    hebe_snapshot::save(&paths.part, b"web", &[view]).expect("a good one");
    fs::rename(&paths.part, &paths.complete).expect("rename");
    ops::resume(&world.host, &name("web"), file).expect("from the file");
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(id(&world, "web"), before);
}

/// The keeper holds the one state, the file is the other one, and is chosen.
fn file_chosen() {
    let world = World::live_update();
    world.start(&["web"]);
    let vm = id(&world, "web");
    world.reboot(RebootMethod::Warm);
    world.tell("web", "fail-start");
    resume(&world);
    world.tell("web", "");
    assert_eq!(world.state("web"), VmState::Frozen, "the keeper has it");
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let info = hebe_host::saved::SavedInfo {
        vm,
        memory: hebe_types::ByteSize::mib(4),
        in_store: false,
        in_files: true,
        apart: false,
    };
    paths.prepare(&info).expect("prepare");
    let file = ResumeOptions {
        from: Some(ResumeFrom::File),
        ..ResumeOptions::default()
    };
    fs::rename(&paths.part, &paths.complete).expect("a bad one");
    ops::resume(&world.host, &name("web"), file).expect_err("it is no saved VM");
    assert_eq!(world.state("web"), VmState::Frozen, "its memory is there");
    let ram = vec![0u8; 4 << 20];
    let view = RamView::from_slice(hebe_types::Gpa(0), &ram);
    hebe_snapshot::save(&paths.part, b"web", &[view]).expect("a good one");
    fs::rename(&paths.part, &paths.complete).expect("rename");
    ops::resume(&world.host, &name("web"), file).expect("from the file");
    assert_eq!(id(&world, "web"), vm);
    keeper_gone(&world);
    // Its disks went on, so nothing of the other state may be left.
    world.kill("web");
    let state = world.state("web");
    assert!(
        matches!(state, VmState::Crashed | VmState::Lost),
        "old memory would meet a newer disk: {state:?}"
    );
    let plain = ResumeOptions::default();
    ops::resume(&world.host, &name("web"), plain).expect_err("nothing to resume");
}

fn restored() {
    let world = World::live_update();
    world.start(&["web"]);
    let before = id(&world, "web");
    world.reboot(RebootMethod::Saved);
    assert_eq!(resume(&world).vms[&name("web")], Resumed::Restored);
    assert_eq!(id(&world, "web"), before);
    assert_eq!(row(&world, "web").store, Some("luo"));
}
