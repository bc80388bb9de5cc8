//! One VM: start, list, suspend, resume, stop; and everything that goes wrong.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hebe_flow::resume::SavedFact;
use hebe_host::definitions;
use hebe_host::limits::OutOfMemory;
use hebe_host::listing::{self, VmState};
use hebe_host::ops::{self, ResumeFrom, ResumeOptions, StopOptions};
use hebe_host::resume_all::{Resumed, resume_all, resume_all_telling};
use hebe_host::saved::SavedPaths;
use hebe_host::suspend_all::{Suspended, suspend_all};
use hebe_snapshot::RamView;
use hebe_sys::clock::stamp_now;

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("a_vm_lives_from_start_to_stop", lives),
    ("a_vm_that_fails_to_start_leaves_nothing", fails_to_start),
    ("refused_orders_name_a_way_out", refused_orders),
    ("a_killed_vmm_is_a_crash_and_start_boots_anew", killed),
    (
        "a_vmm_that_the_kernel_ended_for_want_of_memory_has_that_reason",
        out_of_memory,
    ),
    ("a_resume_that_fails_leaves_the_vm_frozen", resume_fails),
    (
        "a_vmm_that_died_after_its_commit_left_a_frozen_vm",
        died_after_commit,
    ),
    ("a_guest_that_ignores_the_button", ignores_button),
    ("a_vmm_that_answers_nobody_is_ended_by_force", stuck),
    ("a_guest_that_powers_itself_off_is_stopped", powers_off),
    ("a_transient_vm_is_remembered_until_it_stops", transient),
    ("two_states_need_a_choice", two_states),
    (
        "memory_that_a_vmm_does_not_let_run_costs_no_file",
        two_states_held,
    ),
    (
        "a_memfd_vm_runs_without_a_store_and_cannot_be_suspended",
        memfd,
    ),
    ("vms_held_by_a_killed_manager_are_thawed", held),
    (
        "all_vms_are_suspended_at_once_and_one_that_cannot_be_holds_up_nobody",
        suspend_every,
    ),
    ("a_full_store_is_one_sentence", full_store),
    ("room_of_guests_that_powered_off_is_used", reaped_room),
    ("one_order_at_a_time_concerns_all_vms", one_at_a_time),
    (
        "a_vmm_without_its_directory_keeps_its_segment",
        directory_emptied,
    ),
    (
        "a_frozen_vm_whose_vmm_lost_its_directory_is_run_by_no_other",
        held_without_directory,
    ),
    (
        "a_silent_vmm_that_continues_a_state_is_not_ended",
        silent_with_a_state,
    ),
    ("a_changed_disk_is_accepted_by_order_only", changed_disk),
    (
        "a_state_is_compared_with_what_its_vm_was_booted_with",
        expected,
    ),
    ("a_vmm_that_says_it_is_another_vms_is_not_believed", liar),
    ("an_order_to_kill_reaches_the_vmm_alone", other_process),
    (
        "an_order_to_kill_reaches_nobody_who_has_the_vmms_process_id_by_now",
        process_id_used_again,
    ),
    (
        "a_vm_that_is_stopped_leaves_no_file_of_its_restore",
        stopped_after_restore,
    ),
    (
        "a_vm_that_is_resumed_waits_for_its_place_only_where_that_matters",
        waits_for_its_place,
    ),
];

fn force() -> StopOptions {
    StopOptions {
        timeout: Duration::ZERO,
        force: true,
    }
}

/// What a VM was booted with is kept for the VMM that continues its state.
fn expected() {
    let world = World::new();
    world.start(&["web"]);
    let web = name("web");
    world.tell("web", "say-expects");
    ops::suspend(&world.host, &web).expect("freezes");
    world.next_boot();
    world.forget_events();
    ops::resume(&world.host, &web, ResumeOptions::default()).expect("resumes");
    assert!(world.at("web expects") < world.at("web runs"));
    // A state directory that is not there keeps no VM from coming back.
    ops::suspend(&world.host, &web).expect("freezes");
    fs::remove_dir_all(world.host.layout.state.join("lives")).expect("away");
    world.forget_events();
    ops::resume(&world.host, &web, ResumeOptions::default()).expect("resumes");
    assert!(!world.events().contains(&"web expects".to_owned()));
    ops::stop(&world.host, &web, force()).expect("stops");
    world.start(&["web"]);
    let lives = world.host.layout.state.join("lives");
    assert_eq!(fs::read_dir(&lives).expect("dir").count(), 1);
    ops::stop(&world.host, &web, force()).expect("stops");
    assert_eq!(fs::read_dir(&lives).expect("dir").count(), 0);
}

/// What a VM leaves where it was made keeps somebody waiting in most places, and a
/// cage that is demanded has limits before a VM runs.
fn waits_for_its_place() {
    let world = World::new();
    let web = name("web");
    world.tell("web", "say-later");
    let later = |order: &dyn Fn()| {
        world.forget_events();
        order();
        world.events().contains(&"web later".to_owned())
    };
    let boot = || world.start(&["web"]);
    let resume = || {
        ops::suspend(&world.host, &web).expect("freezes");
        ops::resume(&world.host, &web, ResumeOptions::default()).expect("resumes");
    };
    assert!(!later(&boot) && !later(&resume));
    world.machine.ends_alone.store(true, Ordering::Relaxed);
    assert!(later(&resume));
    let toml = world.host.layout.config.join("host.toml");
    fs::write(&toml, "cage = \"required\"\n").expect("write");
    assert!(!later(&resume));
    fs::remove_file(&toml).expect("away");
    ops::stop(&world.host, &web, force()).expect("stops");
    assert!(!later(&boot), "no guest stands still for it");
}

/// A guest that owns its VMM answers as another VM.
fn liar() {
    let world = World::new();
    world.start(&["innocent", "web"]);
    for lie in ["another-name", "another-id"] {
        world.tell("web", lie);
        assert_eq!(world.state("web"), VmState::Unresponsive, "{lie}");
        let survey = hebe_host::listing::survey(&world.host);
        let row = &survey.rows[&name("web")];
        let detail = row.detail.clone().unwrap_or_default();
        assert!(detail.contains("another VM's"), "{lie}: {detail}");
        assert_eq!(survey.rows[&name("innocent")].state, VmState::Running);
        // Nothing is written in the name that it took.
        let saved = hebe_host::saving::save_held(&world.host, &name("web"), None);
        let refused = saved
            .map_err(|e| hebe_host::listing::with_cause(&e))
            .expect_err("refused");
        assert!(refused.contains("another VM's"), "{lie}: {refused}");
        let dir = world.host.layout.state.join("saved");
        assert!(!dir.exists(), "{lie}: {dir:?}");
        assert!(ops::suspend(&world.host, &name("web")).is_err(), "{lie}");
    }
    ops::stop(&world.host, &name("web"), force()).expect("by force");
    assert_eq!(world.state("web"), VmState::Stopped);
    assert_eq!(world.state("innocent"), VmState::Running);
}

/// A guest that owns its VMM answers with the process of somebody else, which
/// ignores the button: here that of this test.
fn other_process() {
    let world = World::new();
    world.start(&["web"]);
    world.tell("web", "another-process ignore-button ignore-quit");
    let survey = hebe_host::listing::survey(&world.host);
    let pid = survey.rows[&name("web")].pid.expect("a process");
    assert_ne!(pid, std::process::id(), "its own word");
    ops::stop(&world.host, &name("web"), force()).expect("this test lives");
    assert_eq!(world.state("web"), VmState::Stopped);
}

/// Since the look at it the VMM ended, and what began then has its process id.
fn process_id_used_again() {
    use rustix::process::{Pid, Signal, kill_process};
    use std::os::unix::process::ExitStatusExt;
    let world = World::new();
    world.start(&["web"]);
    let mut row = listing::survey(&world.host).rows[&name("web")].clone();
    ops::stop(&world.host, &name("web"), force()).expect("stops");
    let mut innocent = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .expect("sleep");
    row.pid = Some(innocent.id());
    ops::power_off(&world.host, &row, force()).expect("nobody is left");
    kill_process(Pid::from_child(&innocent), Signal::TERM).expect("it lives");
    let ended = innocent.wait().expect("ended");
    assert_eq!(ended.signal(), Some(Signal::TERM.as_raw()), "{ended}");
}

fn lives() {
    let world = World::new();
    world.define("web", "");
    assert_eq!(world.state("web"), VmState::Stopped);
    let status = ops::start(&world.host, &name("web")).expect("starts");
    assert_eq!(world.state("web"), VmState::Running);
    let instance = world.instance("web").expect("instance");
    assert_eq!(instance.vm, status.id);
    let report = ops::suspend(&world.host, &name("web")).expect("suspends");
    assert_eq!(report.state_bytes, 3);
    assert_eq!(world.state("web"), VmState::Frozen);
    let back = ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("resumes");
    assert_eq!(back.id, status.id, "the same VM");
    assert_eq!(world.state("web"), VmState::Running);
    let options = StopOptions {
        timeout: PATIENCE,
        force: false,
    };
    ops::stop(&world.host, &name("web"), options).expect("stops");
    assert_eq!(world.state("web"), VmState::Stopped);
    assert_eq!(world.segments(), 0);
    assert!(!world.dir("web").exists());
    let events = world.events();
    let expected = [
        "web runs",
        "web frozen",
        "web frozen",
        "web runs",
        "web power-off",
    ];
    assert_eq!(events, expected);
}

fn fails_to_start() {
    let world = World::new();
    world.define("web", "");
    world.tell("web", "fail-start");
    let error = ops::start(&world.host, &name("web")).expect_err("fails");
    assert!(error.to_string().contains("the tap is taken"), "{error}");
    assert_eq!(world.segments(), 0, "the segment is free again");
    assert!(!world.dir("web").exists());
    assert_eq!(world.state("web"), VmState::Stopped);
    let mut host = world.host.clone();
    host.layout.vmm = "/no/such/hebe-vmm".into();
    let error = ops::start(&host, &name("web")).expect_err("no program");
    assert!(error.to_string().contains("HEBE_VMM"), "{error}");
    assert_eq!(world.segments(), 0);
}

fn refused_orders() {
    let world = World::new();
    world.start(&["web"]);
    let twice = ops::start(&world.host, &name("web")).expect_err("runs");
    assert!(twice.to_string().contains("runs already"), "{twice}");
    for order in [ops::drop_vm, ops::drop_worthless] {
        let error = order(&world.host, &name("web")).expect_err("runs");
        assert!(error.to_string().contains("hebe stop web"), "{error}");
    }
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let start = ops::start(&world.host, &name("web")).expect_err("frozen");
    assert!(start.to_string().contains("hebe resume"), "{start}");
    let stop = ops::stop(&world.host, &name("web"), force()).expect_err("frozen");
    assert!(stop.to_string().contains("hebe resume"), "{stop}");
    let nobody = ops::start(&world.host, &name("nobody")).expect_err("unknown");
    assert!(nobody.to_string().contains("nobody.toml"), "{nobody}");
    ops::drop_vm(&world.host, &name("web")).expect("given up");
    assert_eq!(world.segments(), 0);
}

fn killed() {
    let world = World::new();
    world.start(&["web"]);
    world.kill("web");
    assert_eq!(world.state("web"), VmState::Crashed);
    assert_eq!(world.segments(), 1, "nothing is freed without an order");
    let resume = ops::resume(&world.host, &name("web"), ResumeOptions::default());
    let text = resume.expect_err("no state").to_string();
    assert!(text.contains("hebe start"), "{text}");
    ops::start(&world.host, &name("web")).expect("boots anew");
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(world.segments(), 1);
}

fn out_of_memory() {
    let world = World::new();
    world.start(&["db", "web"]);
    let row = |vm: &str| listing::survey(&world.host).rows[&name(vm)].clone();
    let detail = |vm: &str| row(vm).detail.unwrap_or_default();
    let [db, web] = ["db", "web"].map(|vm| row(vm).pid.expect("up"));
    let mut ended = world.machine.out_of_memory.lock().expect("lock");
    ended.extend([(db, OutOfMemory::Host), (web, OutOfMemory::Group)]);
    drop(ended);
    assert_eq!(detail("web"), "", "it runs, whatever the kernel said");
    world.kill("db");
    world.kill("web");
    assert_eq!(world.state("web"), VmState::Crashed);
    assert!(
        detail("web").contains("its control group"),
        "{}",
        detail("web")
    );
    assert!(
        detail("db").contains("host was out of memory"),
        "{}",
        detail("db")
    );
    // The next VMM is another process.
    ops::start(&world.host, &name("web")).expect("boots anew");
    world.kill("web");
    assert_eq!(world.state("web"), VmState::Crashed);
    assert!(!detail("web").contains("memory"), "{}", detail("web"));
}

fn resume_fails() {
    let world = World::new();
    world.start(&["web"]);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    for word in ["fail-start", "fail-late"] {
        world.tell("web", word);
        let error = ops::resume(&world.host, &name("web"), ResumeOptions::default());
        assert!(error.is_err());
        assert_eq!(world.state("web"), VmState::Frozen, "{word}");
    }
    world.tell("web", "");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("now");
    assert_eq!(world.state("web"), VmState::Running);
}

fn died_after_commit() {
    let world = World::new();
    world.start(&["web"]);
    world.tell("web", "die-after-commit");
    assert!(ops::suspend(&world.host, &name("web")).is_err());
    assert_eq!(world.state("web"), VmState::Frozen);
    world.tell("web", "");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("resumes");
    world.tell("web", "die-before-commit");
    assert!(ops::suspend(&world.host, &name("web")).is_err());
    assert_eq!(world.state("web"), VmState::Crashed);
}

fn ignores_button() {
    let world = World::new();
    world.start(&["web"]);
    world.tell("web", "ignore-button");
    let patient = StopOptions {
        timeout: Duration::from_millis(100),
        force: false,
    };
    let error = ops::stop(&world.host, &name("web"), patient).expect_err("still there");
    assert!(error.to_string().contains("--force"), "{error}");
    assert_eq!(world.state("web"), VmState::Running);
    ops::stop(&world.host, &name("web"), force()).expect("by force");
    assert_eq!(world.segments(), 0);
}

/// A VMM that answers nobody tells no process id either.
fn stuck() {
    let world = World::new();
    world.start(&["web"]);
    let row_pid = hebe_host::listing::survey(&world.host).rows[&name("web")].pid;
    let pid = rustix::process::Pid::from_raw(row_pid.expect("up") as i32).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stop");
    ops::stop(&world.host, &name("web"), force()).expect("by force");
    assert_eq!(world.segments(), 0);
}

fn powers_off() {
    let world = World::new();
    world.start(&["web"]);
    let socket = world.host.layout.socket(&name("web"));
    let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::PowerButton, PATIENCE);
    assert!(ops::ended_within(&world.host, &name("web"), PATIENCE));
    assert_eq!(world.state("web"), VmState::Stopped);
    let reaped = ops::reap(&world.host).expect("reap");
    assert_eq!(reaped, [name("web")]);
    assert_eq!(world.segments(), 0);
}

fn transient() {
    let world = World::new();
    world.define("web", "");
    let path = hebe_host::definitions::expected_path(&world.host.layout, &name("web"));
    let config = hebe_host::definitions::read(&path).expect("read");
    let mut other = config.clone();
    other.vcpus = 2;
    let error = ops::run(&world.host, &other).expect_err("defined otherwise");
    assert!(error.to_string().contains("hebe start web"), "{error}");
    fs::remove_file(path).expect("remove");
    ops::run(&world.host, &config).expect("runs");
    let kept = hebe_host::definitions::find(&world.host.layout, &name("web"));
    assert!(kept.is_some());
    ops::stop(&world.host, &name("web"), force()).expect("stops");
    assert!(listing::survey(&world.host).rows.is_empty());
    world.tell("web", "fail-start");
    assert!(ops::run(&world.host, &config).is_err());
    assert!(listing::survey(&world.host).rows.is_empty(), "nothing left");
    let lives = fs::read_dir(world.host.layout.state.join("lives")).expect("dir");
    assert_eq!(lives.count(), 0);
}

/// The same where a VMM still holds the memory.
fn two_states_held() {
    let world = World::new();
    world.start(&["web"]);
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let wait = PATIENCE;
    hebe_host::vmm::freeze(&world.host.layout.socket(&name("web")), wait).expect("freezes");
    let info = hebe_host::saved::SavedInfo {
        vm: world.instance("web").expect("instance").vm,
        memory: hebe_types::ByteSize::mib(4),
        in_store: true,
        in_files: false,
        apart: false,
    };
    paths.prepare(&info).expect("prepare");
    paths.commit().expect("commit");
    let memory = ResumeOptions {
        from: Some(ResumeFrom::Memory),
        ..ResumeOptions::default()
    };
    world.tell("web", "refuse-thaw");
    ops::resume(&world.host, &name("web"), memory).expect_err("a device does not start");
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(paths.fact(), Some(SavedFact::Complete));
    world.tell("web", "");
    ops::resume(&world.host, &name("web"), memory).expect("thaws");
    assert_eq!((world.state("web"), paths.fact()), (VmState::Running, None));
}

fn two_states() {
    let world = World::new();
    world.start(&["web"]);
    let vm = world.instance("web").expect("instance").vm;
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let paths = SavedPaths::new(&world.host.layout, &name("web"));
    let info = hebe_host::saved::SavedInfo {
        vm,
        memory: hebe_types::ByteSize::mib(4),
        in_store: true,
        in_files: false,
        apart: false,
    };
    paths.prepare(&info).expect("prepare");
    let mut ram = vec![0u8; 4 << 20];
    ram[..4096].fill(0x5a);
    let view = RamView::from_slice(hebe_types::Gpa(0), &ram);
    hebe_snapshot::save(&paths.complete, b"web", &[view]).expect("a file from somewhere");
    let error = ops::resume(&world.host, &name("web"), ResumeOptions::default());
    let text = error.expect_err("two states").to_string();
    assert!(text.contains("--from"), "{text}");
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let left = &all.vms[&name("web")];
    assert!(matches!(left, Resumed::Left { .. }), "{left:?}");
    // Memory that does not run does not cost the file.
    let memory = ResumeOptions {
        from: Some(ResumeFrom::Memory),
        ..ResumeOptions::default()
    };
    world.tell("web", "fail-start");
    ops::resume(&world.host, &name("web"), memory).expect_err("its VMM says why");
    world.tell("web", "");
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(paths.fact(), Some(SavedFact::Complete));
    let options = ResumeOptions {
        from: Some(ResumeFrom::File),
        again: false,
        ..ResumeOptions::default()
    };
    // A file that cannot replace the frozen state does not cost it.
    let good = fs::read(&paths.complete).expect("read");
    let mut bad = good.clone();
    *bad.iter_mut().rfind(|b| **b == 0x5a).expect("RAM") ^= 1;
    fs::write(&paths.complete, bad).expect("write");
    let error = ops::resume(&world.host, &name("web"), options).expect_err("damaged");
    assert!(error.to_string().contains("is damaged"), "{error}");
    assert_eq!(world.state("web"), VmState::Frozen);
    fs::write(&paths.complete, good).expect("write");
    ops::resume(&world.host, &name("web"), options).expect("from the file");
    assert_eq!(world.state("web"), VmState::Running);
    assert!(!paths.complete.exists() && !paths.restoring.exists());
    assert_eq!(world.segments(), 1);
}

fn memfd() {
    let world = World::without_store();
    world.start(&["web"]);
    assert_eq!(world.state("web"), VmState::Running);
    let error = ops::suspend(&world.host, &name("web")).expect_err("memfd");
    assert!(error.to_string().contains("devdax"), "{error}");
    world.define("db", "store = \"devdax\"");
    let error = ops::start(&world.host, &name("db")).expect_err("no store");
    assert!(error.to_string().contains("memmap="), "{error}");
    assert!(!world.dir("db").exists());
}

fn held() {
    let world = World::new();
    world.start(&["web"]);
    let socket = world.host.layout.socket(&name("web"));
    hebe_host::vmm::freeze(&socket, PATIENCE).expect("freezes");
    // The manager was killed here, before it told the VMM to end.
    assert_eq!(world.state("web"), VmState::Frozen);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Already);
    assert_eq!(world.state("web"), VmState::Running);
}

fn suspend_every() {
    let world = World::new();
    world.start(&["web", "db", "cache"]);
    ops::suspend(&world.host, &name("db")).expect("freezes");
    world.define("other", "store = \"memfd\"");
    ops::start(&world.host, &name("other")).expect("starts");
    world.define("idle", "");
    let busy = world.host.lock_all().expect("free");
    let refused = suspend_all(&world.host, &|_| panic!("nobody is touched"));
    assert!(refused.is_err());
    drop(busy);
    let told = AtomicUsize::new(0);
    let count = |whole: usize| {
        assert_eq!(whole, 4);
        told.fetch_add(1, Ordering::Relaxed);
    };
    let all = suspend_all(&world.host, &count).expect("not busy");
    assert_eq!((told.into_inner(), all.vms.len()), (4, 4));
    for vm in ["web", "cache"] {
        let of = &all.vms[&name(vm)];
        assert!(matches!(of, Suspended::Frozen { .. }), "{vm}: {of:?}");
        assert_eq!(world.state(vm), VmState::Frozen);
    }
    assert!(matches!(all.vms[&name("db")], Suspended::Already));
    let Suspended::Failed { reason } = &all.vms[&name("other")] else {
        panic!("it is in a memfd: {all:?}");
    };
    assert!(reason.contains("memfd"), "{reason}");
    assert_eq!(world.state("other"), VmState::Running);
    let told = AtomicUsize::new(0);
    let count = |_: usize| {
        told.fetch_add(1, Ordering::Relaxed);
    };
    let all = resume_all_telling(&world.host, stamp_now(), false, &count).expect("not busy");
    assert_eq!(told.into_inner(), all.vms.len(), "{all:?}");
    for vm in ["web", "db", "cache", "other"] {
        assert_eq!(world.state(vm), VmState::Running);
    }
}

fn full_store() {
    let world = World::new();
    world.define("big", "");
    let path = hebe_host::definitions::expected_path(&world.host.layout, &name("big"));
    let text = fs::read_to_string(&path).expect("read");
    fs::write(&path, text.replace("4MiB", "1GiB")).expect("write");
    let error = ops::start(&world.host, &name("big")).expect_err("full");
    assert!(error.to_string().contains("free"), "{error}");
    assert_eq!(world.segments(), 0);
    assert!(!world.dir("big").exists());
}

fn reaped_room() {
    let world = World::new();
    let large = |vm: &str| {
        world.define(vm, "");
        let path = hebe_host::definitions::expected_path(&world.host.layout, &name(vm));
        let text = fs::read_to_string(&path).expect("read");
        fs::write(&path, text.replace("4MiB", "80MiB")).expect("write");
    };
    large("one");
    large("two");
    ops::start(&world.host, &name("one")).expect("starts");
    assert!(ops::start(&world.host, &name("two")).is_err(), "no room");
    let socket = world.host.layout.socket(&name("one"));
    let wait = PATIENCE;
    let _ = hebe_host::vmm::order(&socket, &hebe_api::Request::PowerButton, wait);
    assert!(ops::ended_within(&world.host, &name("one"), wait));
    ops::start(&world.host, &name("two")).expect("now there is room");
}

fn one_at_a_time() {
    let world = World::new();
    let lock = world.host.lock_all().expect("free");
    let busy = resume_all(&world.host, stamp_now(), false).expect_err("busy");
    assert!(busy.to_string().contains("wait"), "{busy}");
    drop(lock);
    assert!(resume_all(&world.host, stamp_now(), false).is_ok());
}

/// It may have withdrawn the state already: nobody can tell but itself.
fn silent_with_a_state() {
    use hebe_host::launch::{Launch, LaunchError, Origin, launch};
    let world = World::new();
    world.start(&["web"]);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    let view = world.host.store.view().expect("view").expect("store");
    let segment = view.segment_of(&name("web")).expect("segment");
    let mut order = Launch::of_frozen(segment).expect("frozen");
    world.tell("web", "hang-start");
    let wait = Duration::from_millis(200);
    let lock = ops::lock(&world.host, &name("web")).expect("free");
    let error = launch(&world.host, &lock, &order, wait).expect_err("silent");
    drop(lock);
    let LaunchError::Unanswered { pid, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(world.state("web"), VmState::Unresponsive, "it has its lock");
    let pid = rustix::process::Pid::from_raw(*pid as i32).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it lives");
    let end = PATIENCE;
    assert!(ops::ended_within(&world.host, &name("web"), end));
    // A boot has nothing to lose.
    let config = definitions::load(&world.host.layout, &name("web"));
    order.origin = Origin::Boot(Box::new(config.expect("defined").1));
    let lock = ops::lock(&world.host, &name("web")).expect("free");
    let error = launch(&world.host, &lock, &order, wait).expect_err("silent");
    assert!(matches!(error, LaunchError::Silent { .. }), "{error}");
    drop(lock);
    assert_eq!(world.state("web"), VmState::Frozen);
}

/// The locks went with the directory; their holder lives.
fn directory_emptied() {
    let world = World::new();
    world.start(&["web"]);
    let pid = listing::survey(&world.host).rows[&name("web")].pid;
    let pid = pid.expect("up");
    fs::remove_dir_all(&world.host.layout.run).expect("remove");
    let refused = [
        ops::start(&world.host, &name("web")).map(drop),
        ops::drop_vm(&world.host, &name("web")),
    ];
    for result in refused {
        let error = result.expect_err("it runs").to_string();
        assert!(error.contains(&format!("process {pid}")), "{error}");
    }
    assert_eq!(world.segments(), 1);
    let process = rustix::process::Pid::from_raw(pid as i32).expect("pid");
    rustix::process::kill_process(process, rustix::process::Signal::KILL).expect("it lives");
    let cmdline = format!("/proc/{pid}/cmdline");
    while fs::read(&cmdline).is_ok_and(|words| !words.is_empty()) {
        std::thread::sleep(Duration::from_millis(2));
    }
    ops::drop_vm(&world.host, &name("web")).expect("nobody is in it");
    assert_eq!(world.segments(), 0);
}

/// The frozen segment names no process: the lock on the segment does.
fn held_without_directory() {
    let world = World::new();
    world.start(&["web"]);
    let (web, host) = (name("web"), &world.host);
    let id = world.instance("web").expect("instance").vm;
    let pid = listing::survey(host).rows[&web].pid.expect("up");
    let wait = PATIENCE;
    hebe_host::vmm::freeze(&host.layout.socket(&web), wait).expect("freezes");
    fs::remove_dir_all(&host.layout.run).expect("remove");
    let row = listing::survey(host).rows.remove(&web).expect("listed");
    assert_eq!((row.state, row.pid), (VmState::Unresponsive, Some(pid)));
    let view = host.store.view().expect("view").expect("store");
    let segment = view.segment_of(&web).expect("segment");
    assert!(segment.held);
    let orders = [
        ops::resume(host, &web, ResumeOptions::default()).map(drop),
        ops::start(host, &web).map(drop),
        ops::drop_vm(host, &web),
        hebe_host::segments::free_segment(host, segment),
    ];
    for refused in orders {
        let error = refused.expect_err("it is held").to_string();
        assert!(error.contains(&format!("process {pid}")), "{error}");
        assert!(error.contains("hebe stop web --force"), "{error}");
    }
    let all = resume_all(host, stamp_now(), true).expect("not busy");
    let left = &all.vms[&web];
    assert!(
        matches!(left, Resumed::Left { reason } if reason.contains(&format!("process {pid}"))),
        "{left:?}"
    );
    // Whoever tries all the same gets a VMM that refuses.
    let mut any = host.clone();
    any.layout.unnoted = true;
    let second = ops::continue_frozen(&any, &web, Some(&view)).expect_err("a second VMM");
    assert!(second.to_string().contains("two never run"), "{second}");
    let reboot = hebe_host::preflight::preflight(
        host,
        &world.options(hebe_types::RebootMethod::Warm),
        false,
    );
    assert!(!reboot.0.passes(), "it would be lost");
    ops::stop(host, &web, force()).expect("ended");
    assert_eq!(world.state("web"), VmState::Frozen, "its state is kept");
    let back = ops::resume(&any, &web, ResumeOptions::default()).expect("resumes");
    assert_eq!(back.id, id);
}

fn changed_disk() {
    let world = World::new();
    world.start(&["web"]);
    ops::suspend(&world.host, &name("web")).expect("suspends");
    world.tell("web", "changed-disk");
    let plain = ResumeOptions::default();
    let refused = ops::resume(&world.host, &name("web"), plain).expect_err("changed");
    assert!(refused.to_string().contains("a disk changed"), "{refused}");
    assert_eq!(world.state("web"), VmState::Frozen);
    let accept = ResumeOptions {
        accept_changed_disk: true,
        ..plain
    };
    ops::resume(&world.host, &name("web"), accept).expect("as ordered");
    assert_eq!(world.state("web"), VmState::Running);
}

/// Whoever restored it was killed before the file was removed, and what proves
/// that it is stale goes with the stop: the segment, or the record of the end.
fn stopped_after_restore() {
    for world in [World::new(), World::without_store()] {
        world.start(&["web"]);
        let instance = world.instance("web").expect("instance");
        let paths = SavedPaths::new(&world.host.layout, &name("web"));
        let info = hebe_host::saved::SavedInfo {
            vm: instance.vm,
            memory: instance.memory,
            in_store: instance.segment.is_some(),
            in_files: false,
            apart: false,
        };
        paths.prepare(&info).expect("prepare");
        fs::write(&paths.restoring, "web").expect("left");
        ops::stop(&world.host, &name("web"), force()).expect("stops");
        assert_eq!(paths.fact(), None, "its memory is older than the disks");
        assert_eq!(world.state("web"), VmState::Stopped);
        ops::start(&world.host, &name("web")).expect("with no more words");
    }
}
