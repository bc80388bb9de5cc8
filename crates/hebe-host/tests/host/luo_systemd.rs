//! VMs whose memory Linux carries, on a host that its service manager takes down
//! and whose PID 1 holds the sessions meanwhile.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hebe_flow::reboot::Fate;
use hebe_flow::stopping::Going;
use hebe_host::listing::{self, VmState};
use hebe_host::luo::asking;
use hebe_host::notes;
use hebe_host::ops;
use hebe_host::preflight::{Level, preflight};
use hebe_host::reboot::stage;
use hebe_host::report::complete_report;
use hebe_host::resume_all::{ResumeAll, Resumed, resume_all};
use hebe_host::stopping::{Order, Stopped, stopping};
use hebe_sys::clock::stamp_now;
use hebe_sys::fdstore::FdStore;
use hebe_sys::luo::fake::Fault;
use hebe_types::{RebootMethod, VmId};

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("pid_1_carries_vms_while_every_process_ends", carried),
    (
        "a_vm_that_was_frozen_before_is_carried_by_pid_1_too",
        frozen,
    ),
    (
        "a_store_that_is_full_costs_no_vm_and_nothing_stays_preserved",
        full,
    ),
    ("a_pid_1_that_hears_nothing_costs_no_vm", deaf),
    ("a_pid_1_that_is_too_old_costs_no_vm", too_old),
    ("whoever_is_to_carry_is_said_and_may_be_chosen", chosen),
    (
        "a_vm_that_cannot_be_preserved_is_saved_and_the_others_are_carried",
        one_fails,
    ),
    (
        "a_late_part_that_fails_lets_the_vm_run_to_be_saved",
        late_part,
    ),
    (
        "a_freeze_without_an_answer_counts_by_what_the_memory_says",
        no_answer,
    ),
    (
        "a_vm_that_stands_frozen_in_memory_that_is_not_carried_is_said_to_be_lost",
        stands_in_vain,
    ),
    (
        "sessions_that_pid_1_did_not_get_are_found_by_the_keeper",
        not_passed,
    ),
    ("a_session_under_a_wrong_name_is_taken_by_its_own", misnamed),
    (
        "a_session_that_did_not_arrive_costs_its_vm_alone",
        one_missing,
    ),
    (
        "an_event_that_was_killed_after_the_hand_over_ends_what_is_left",
        killed,
    ),
    ("a_soft_reboot_carries_no_files", soft),
];

fn silent(_: &str) {}

/// The service manager takes the host down; what is said.
fn stop(world: &World, going: Going) -> Stopped {
    *world.machine.going.lock().expect("lock") = Some(Ok(going));
    stopping(&world.host, &silent).expect("its turn")
}

fn stage_warm(world: &World) {
    *world.machine.going.lock().expect("lock") = Some(Ok(Going::Stays));
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
}

fn fates(stopped: &Stopped) -> Vec<Option<Fate>> {
    stopped.vms.iter().map(|vm| vm.fate).collect()
}

/// The next boot: first what hebe-freeze.service does, then hebe-resume.service.
fn boot(world: &World) -> ResumeAll {
    world.next_boot();
    asking::take_handed(&world.host).expect("taken");
    resume_all(&world.host, stamp_now(), false).expect("not busy")
}

fn id(world: &World, vm: &str) -> VmId {
    world.instance(vm).expect("up").vm
}

/// The keeper tells PID 1 when it has everything.
fn let_go(world: &World) {
    let began = Instant::now();
    while !world.manager().names().is_empty() {
        assert!(began.elapsed() < PATIENCE, "PID 1 holds on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn noted(world: &World) -> usize {
    notes::all(&world.host.layout).len()
}

fn carried() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    stage_warm(&world);
    world.forget_events();
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep); 2], "{stopped:?}");
    assert_eq!(stopped.notes, Vec::<String>::new());
    // No process has anything of them any more, and still nothing is gone.
    for vm in ["db", "web"] {
        assert!(listing::survey(&world.host).rows[&name(vm)].pid.is_none());
    }
    let names = ["hebe.host", "hebe.vm.000", "hebe.vm.001"];
    // VMs are preserved side by side, and come in any order.
    let mut held = world.manager().names();
    held.sort();
    assert_eq!(held, names);
    assert_eq!(world.luo().outgoing().0, 3);
    let all = boot(&world);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
    let_go(&world);
    assert_eq!(noted(&world), 0);
    let report = complete_report(&world.host).expect("io").expect("a report");
    assert_eq!(report.carried.len(), 2);
    // What arrived is carried once more.
    stage_warm(&world);
    assert_eq!(fates(&stop(&world, Going::Kexec)), [Some(Fate::Keep); 2]);
    let all = boot(&world);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

fn frozen() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    let before = id(&world, "web");
    ops::suspend(&world.host, &name("web")).expect("freezes");
    stage_warm(&world);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep)], "{stopped:?}");
    assert!(
        listing::survey(&world.host).rows[&name("web")]
            .pid
            .is_none()
    );
    let all = boot(&world);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!(id(&world, "web"), before);
}

/// Both VMs are saved instead, and come back from their files.
fn saved_instead(world: &World, words: &str) {
    let before = [id(world, "db"), id(world, "web")];
    stage_warm(world);
    let stopped = stop(world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save); 2], "{stopped:?}");
    let said = format!("{stopped:?}");
    assert!(said.contains(words), "{said}");
    assert_eq!(world.luo().outgoing(), (0, 0), "nothing stays preserved");
    let all = boot(world);
    assert!(all.vms.values().all(|r| *r == Resumed::Restored), "{all:?}");
    assert_eq!([id(world, "db"), id(world, "web")], before);
    assert_eq!(noted(world), 0);
}

fn full() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    // Whoever asked was told that there is room; others took it since.
    let manager = world.manager();
    for number in 0..6 {
        let other = tempfile::tempfile().expect("file");
        let put = manager.put(&format!("other{number}"), other.as_fd());
        put.expect("put");
    }
    manager.settle().expect("done");
    saved_instead(
        &world,
        "took 2 of 3 sessions: raise FileDescriptorStoreMax=",
    );
}

fn deaf() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    world.manager().set_deaf(true);
    // It closes what it gets, and keeps nothing.
    saved_instead(&world, "took 0 of 3 sessions");
}

fn too_old() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    stage_warm(&world);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save); 2], "{stopped:?}");
    let all = boot(&world);
    assert!(all.vms.values().all(|r| *r == Resumed::Restored), "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

fn chosen() {
    let carrier_of = |world: &World, direct| {
        let mut options = world.options(RebootMethod::Warm);
        options.direct = direct;
        let (verdict, _) = preflight(&world.host, &options, false);
        let mut checks = verdict.checks.into_iter();
        let check = checks.find(|c| c.id == "live-update:carrier");
        check.expect("checked")
    };
    let carrier = |world: &World| carrier_of(world, false);
    let config = |world: &World, word: &str| {
        let text = format!("[live_update]\ncarrier = \"{word}\"\n");
        fs::write(world.host.layout.config.join("host.toml"), text).expect("write");
    };
    let world = World::with_manager(8);
    world.start(&["web"]);
    let said = carrier(&world);
    assert_eq!(said.level, Level::Ok);
    assert!(said.sentence.contains("not armed"), "{said:?}");
    *world.machine.going.lock().expect("lock") = Some(Ok(Going::Stays));
    let said = carrier(&world);
    assert!(said.sentence.contains("PID 1 holds the memory"), "{said:?}");
    let said = carrier_of(&world, true);
    assert_eq!(said.level, Level::Ok);
    assert!(said.sentence.contains("--direct"), "{said:?}");
    config(&world, "systemd");
    let said = carrier_of(&world, true);
    assert_eq!(said.level, Level::Fail);
    config(&world, "own");
    let said = carrier(&world);
    assert!(said.sentence.contains("carrier = \"own\""), "{said:?}");
    stage_warm(&world);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save)], "{stopped:?}");
    let said = format!("{stopped:?}");
    assert!(said.contains("carrier = "), "{said}");
    let named = World::with_manager(8);
    named.start(&["web"]);
    config(&named, "systemd");
    stage_warm(&named);
    let stopped = stop(&named, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep)], "{stopped:?}");
    let old = World::live_update();
    old.start(&["web"]);
    *old.machine.going.lock().expect("lock") = Some(Ok(Going::Stays));
    let said = carrier(&old);
    assert_eq!(said.level, Level::Ok);
    assert!(said.sentence.contains("systemd 257"), "{said:?}");
    config(&old, "systemd");
    let said = carrier(&old);
    assert_eq!(said.level, Level::Fail);
    assert!(said.sentence.contains("systemd 257"), "{said:?}");
}

fn one_fails() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    stage_warm(&world);
    // The second slot is web's, and its first token its execution state.
    world
        .luo()
        .arm(Fault::Preserve("hebe.vm.001".into(), 1), libc::ENOMEM);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep), Some(Fate::Save)]);
    let said = format!("{stopped:?}");
    assert!(said.contains("not enough memory"), "{said}");
    assert_eq!(world.manager().names(), ["hebe.host", "hebe.vm.000"]);
    let all = boot(&world);
    assert_eq!(all.vms[&name("db")], Resumed::Resumed);
    assert_eq!(all.vms[&name("web")], Resumed::Restored);
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
    assert_eq!(noted(&world), 0);
}

/// Memory that was left out is used in the last moment, and cannot be preserved:
/// the VM must not be carried without it.
fn late_part() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    stage_warm(&world);
    let ram = crate::luo_faults::files(&world, "web");
    *world.machine.at_sync.lock().expect("lock") = Some(Box::new(move || {
        let part = ram.fds().nth(1).expect("RAM");
        rustix::io::pwrite(part, b"used", 4096).expect("write");
    }));
    world
        .luo()
        .arm(Fault::Preserve("hebe.vm.001".into(), 2), libc::ENOMEM);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep), Some(Fate::Save)]);
    assert_eq!(world.manager().names(), ["hebe.host", "hebe.vm.000"]);
    let all = boot(&world);
    assert_eq!(all.vms[&name("db")], Resumed::Resumed);
    assert_eq!(all.vms[&name("web")], Resumed::Restored, "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

/// The state is committed, and PID 1 holds it: to let go of it would free it.
fn no_answer() {
    for word in ["die-after-commit", "frozen-by-another"] {
        let world = World::with_manager(8);
        world.start(&["db", "web"]);
        let before = [id(&world, "db"), id(&world, "web")];
        stage_warm(&world);
        world.tell("web", word);
        let stopped = stop(&world, Going::Kexec);
        assert_eq!(fates(&stopped), [Some(Fate::Keep); 2], "{stopped:?}");
        assert_eq!(world.manager().names().len(), 3, "{word}");
        world.tell("web", "");
        let all = boot(&world);
        assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
        assert_eq!([id(&world, "db"), id(&world, "web")], before, "{word}");
    }
}

/// Nor can it be let run, to be saved: that it stands frozen keeps nothing.
fn stands_in_vain() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    stage_warm(&world);
    world.tell("web", "refuse-thaw");
    let ram = crate::luo_faults::files(&world, "web");
    *world.machine.at_sync.lock().expect("lock") = Some(Box::new(move || {
        let part = ram.fds().nth(1).expect("RAM");
        rustix::io::pwrite(part, b"used", 4096).expect("write");
    }));
    world
        .luo()
        .arm(Fault::Preserve("hebe.vm.001".into(), 2), libc::ENOMEM);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep), None], "{stopped:?}");
    assert!(stopped.loses());
}

fn left(world: &World) {
    stage_warm(world);
    let stopped = stop(world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep); 2], "{stopped:?}");
}

fn resumed(world: &World) {
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
}

/// systemd could not say to the next one what it held, or the unit is not there
/// yet: the kernel handed the sessions over all the same.
fn not_passed() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    left(&world);
    // It has them open at the jump, and its next self does not ask for them.
    let sessions = world.manager().pass();
    world.manager().replace(Vec::new());
    world.next_boot();
    drop(sessions);
    asking::take_handed(&world.host).expect("nothing to take");
    resumed(&world);
}

fn misnamed() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    left(&world);
    world.next_boot();
    let mut passed = world.manager().pass();
    passed[1].0 = "something".into();
    passed[2].0 = "hebe.vm.000".into();
    world.manager().replace(passed);
    asking::take_handed(&world.host).expect("taken");
    resumed(&world);
    let_go(&world);
}

fn one_missing() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    left(&world);
    world.next_boot();
    // PID 1 got it and closed it: its store was too small for the unit.
    let mut passed = world.manager().pass();
    passed.retain(|(name, _)| name != "hebe.vm.000");
    world.manager().replace(passed);
    asking::take_handed(&world.host).expect("taken");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
    assert!(
        matches!(&all.vms[&name("db")], Resumed::Left { .. }),
        "{all:?}"
    );
    assert_eq!(world.state("db"), VmState::Damaged);
}

/// PID 1 holds everything, and the event was killed before it had ended all
/// VMMs: the next try must not begin anew, for that would let go.
fn killed() {
    let world = World::with_manager(8);
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    world.tell("web", "ignore-quit");
    stage_warm(&world);
    let order = Order::read(&world.host).expect("read").expect("one");
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep); 2], "{stopped:?}");
    // It was killed before it could withdraw the order.
    order.write(&world.host).expect("written");
    assert_eq!(world.state("web"), VmState::Frozen);
    assert!(
        listing::survey(&world.host).rows[&name("web")]
            .pid
            .is_some()
    );
    world.tell("web", "");
    let names = world.manager().names();
    stop(&world, Going::Kexec);
    assert!(
        listing::survey(&world.host).rows[&name("web")]
            .pid
            .is_none()
    );
    assert_eq!(world.manager().names(), names);
    let all = boot(&world);
    assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

fn soft() {
    let world = World::with_manager(8);
    world.start(&["web"]);
    let stopped = stop(&world, Going::SoftReboot);
    assert_eq!(fates(&stopped), [Some(Fate::Save)], "{stopped:?}");
    assert!(world.manager().names().is_empty());
}
