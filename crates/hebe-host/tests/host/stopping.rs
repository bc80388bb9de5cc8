//! The host is taken down by a service manager: what becomes of its VMs.

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use hebe_flow::reboot::Fate;
use hebe_flow::stopping::Going;
use hebe_host::listing::VmState;
use hebe_host::ops;
use hebe_host::reboot::{RebootEnd, reboot, stage};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::saved::SavedPaths;
use hebe_host::stopping::{Order, Stopped, stopping};
use hebe_host::stores::StoreAccess;
use hebe_host::timeline::{EventKind, Side};
use hebe_host::vmm;
use hebe_sys::clock::stamp_now;
use hebe_types::RebootMethod;

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("a_host_that_stays_up_keeps_its_vms_running", stays),
    ("a_staged_kexec_keeps_every_vm_in_memory", staged),
    ("a_reboot_is_carried_out_by_the_service_manager", by_manager),
    (
        "a_service_manager_that_refuses_leaves_nothing_behind",
        refuses,
    ),
    (
        "a_reset_saves_every_vm_and_the_next_boot_restores_it",
        reset,
    ),
    ("a_host_may_shut_its_guests_down_instead", shut_down),
    ("a_kernel_that_somebody_else_loaded_is_not_trusted", foreign),
    (
        "a_kernel_that_does_not_load_is_no_reason_to_lose_a_vm",
        load_fails,
    ),
    (
        "a_vm_that_cannot_be_frozen_is_saved_or_else_shut_down",
        fallbacks,
    ),
    ("an_event_that_was_killed_is_carried_out_again", again),
    (
        "a_vm_that_is_frozen_already_is_saved_before_the_power_goes",
        frozen_before,
    ),
    (
        "a_service_manager_that_says_nothing_costs_no_vm",
        silent_manager,
    ),
    ("an_order_for_another_way_is_not_followed", other_way),
    ("a_vmm_that_does_not_answer_costs_the_others_nothing", stuck),
    ("a_thread_that_panics_is_a_way_that_failed", panics),
    ("a_vm_at_which_looking_panics_is_listed", unseen),
    (
        "a_word_that_a_vm_was_given_up_is_not_taken_for_one_about_its_next_freeze",
        word_stands,
    ),
];

fn silent(_: &str) {}

fn goes(world: &World, going: Going) {
    *world.machine.going.lock().expect("lock") = Some(Ok(going));
}

fn stop(world: &World, going: Going) -> Stopped {
    goes(world, going);
    stopping(&world.host, &silent).expect("its turn")
}

fn fates(stopped: &Stopped) -> Vec<Option<Fate>> {
    stopped.vms.iter().map(|vm| vm.fate).collect()
}

/// The machine leaves: systemd's part.
fn leave(world: &World) {
    if let Some(store) = &*world.machine.store.lock().expect("lock") {
        store.release();
    }
    world.next_boot();
}

fn resumed(world: &World, how: &Resumed) {
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(!all.vms.is_empty());
    assert!(all.vms.values().all(|r| r == how), "{all:?}");
}

fn stays() {
    let world = World::new();
    world.start(&["web"]);
    let stopped = stop(&world, Going::Stays);
    assert_eq!(stopped.going, Going::Stays);
    assert!(stopped.vms.is_empty() && stopped.notes.is_empty());
    assert_eq!(world.state("web"), VmState::Running);
    assert!(!world.events().iter().any(|e| e.contains("frozen")));
}

fn staged() {
    let world = World::new();
    world.start(&["db", "web"]);
    let before = world.instance("web").expect("instance").vm;
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    assert_eq!(world.state("web"), VmState::Running);
    world.forget_events();
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep); 2], "{stopped:?}");
    assert!(!stopped.loses());
    // What was checked is what is jumped into, whatever was loaded since.
    assert!(world.at("host load") < world.at("web frozen"));
    assert_eq!(Order::read(&world.host).expect("read"), None, "it is done");
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Frozen, "no VMM is left");
    }
    leave(&world);
    resumed(&world, &Resumed::Resumed);
    assert_eq!(world.instance("web").expect("instance").vm, before);
    let report = complete_report(&world.host).expect("io").expect("a report");
    let web = name("web");
    let at = |vm, kind| report.at(Side::Before, vm, kind).expect("noted");
    let down = at(None, EventKind::ServicesStopped);
    let asked = at(Some(&web), EventKind::SuspendAsked);
    assert!(down.tsc < asked.tsc, "services first (R-22)");
    assert!(report.notes.iter().any(|n| n.contains("service manager")));
}

fn by_manager() {
    let world = World::new();
    world.start(&["web"]);
    goes(&world, Going::Stays);
    world.forget_events();
    let (host, machine) = (world.host.clone(), world.machine.clone());
    let options = world.options(RebootMethod::Warm);
    let event = {
        let (host, machine) = (world.host.clone(), world.machine.clone());
        move || {
            *machine.going.lock().expect("lock") = Some(Ok(Going::Kexec));
            let stopped = stopping(&host, &silent).expect("its turn");
            assert_eq!(fates(&stopped), [Some(Fate::Keep)]);
            machine.left.store(true, Ordering::Release);
            // As far as it comes: it ends with the services.
            loop {
                thread::park();
            }
        }
    };
    *machine.at_services.lock().expect("lock") = Some(Box::new(event));
    thread::spawn(move || reboot(&host, &options, &silent));
    let began = Instant::now();
    while !world.machine.left.load(Ordering::Acquire) {
        assert!(began.elapsed() < PATIENCE, "it leaves");
        thread::sleep(Duration::from_millis(5));
    }
    let first = world.at("host load");
    assert!(first < world.at("host ask Kexec"));
    assert!(world.at("host ask Kexec") < world.at("web frozen"));
    let events = world.events();
    assert!(!events.iter().any(|e| e.contains("run stop")), "{events:?}");
    assert!(!events.iter().any(|e| e.contains("leave")), "{events:?}");
    leave(&world);
    resumed(&world, &Resumed::Resumed);
}

fn refuses() {
    let world = World::new();
    world.start(&["web"]);
    goes(&world, Going::Stays);
    world.machine.refuse_services.store(true, Ordering::Relaxed);
    let end = reboot(&world.host, &world.options(RebootMethod::Warm), &silent);
    let Err(RebootEnd::Aborted { why, stranded, .. }) = end else {
        panic!("{end:?}");
    };
    assert!(why.contains("refused") && stranded.is_empty());
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(Order::read(&world.host).expect("read"), None);
    assert!(world.at("host ask Kexec") < world.at("host unload"));
}

fn reset() {
    for going in [Going::Reset, Going::Off] {
        let world = World::new();
        world.start(&["db", "web"]);
        let stopped = stop(&world, going);
        assert_eq!(fates(&stopped), [Some(Fate::Save); 2], "{stopped:?}");
        assert_eq!(world.state("web"), VmState::Saved);
        leave(&world);
        resumed(&world, &Resumed::Restored);
    }
}

fn shut_down() {
    let world = World::new();
    let toml = world.host.layout.config.join("host.toml");
    fs::write(toml, "[shutdown]\nvms = \"shutdown\"\ntimeout_s = 4\n").expect("write");
    world.start(&["db", "web"]);
    world.tell("db", "ignore-button");
    let stopped = stop(&world, Going::Reset);
    // A guest that does not do as asked is kept all the same.
    assert_eq!(fates(&stopped), [Some(Fate::Save), Some(Fate::ShutDown)]);
    leave(&world);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("db")], Resumed::Restored);
    assert_eq!(all.vms[&name("web")], Resumed::Booted);
}

fn foreign() {
    let world = World::new();
    world.start(&["web"]);
    world.machine.loaded.store(true, Ordering::Relaxed);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save)]);
    assert!(
        stopped.notes.iter().any(|n| n.contains("--load")),
        "{stopped:?}"
    );
    assert!(
        !world.events().iter().any(|e| e == "host load"),
        "it is theirs"
    );
    let world = World::new();
    let toml = world.host.layout.config.join("host.toml");
    fs::write(toml, "[shutdown]\nforeign_kernel = \"trust\"\n").expect("write");
    world.start(&["web"]);
    world.machine.loaded.store(true, Ordering::Relaxed);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep)]);
    assert!(
        stopped.notes.iter().any(|n| n.contains("trust")),
        "{stopped:?}"
    );
}

fn load_fails() {
    let world = World::new();
    world.start(&["web"]);
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    world.machine.refuse_load.store(true, Ordering::Relaxed);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save)]);
    assert!(stopped.notes.iter().any(|n| n.contains("cannot be loaded")));
    // Nothing was ordered or loaded, and this machine's own kernel is not there.
    let world = World::new();
    world.start(&["web"]);
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Save)], "{stopped:?}");
}

fn fallbacks() {
    let world = World::new();
    world.start(&["good", "saved", "shut"]);
    world.tell("saved", "refuse-freeze");
    world.tell("shut", "refuse-freeze refuse-save");
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    let stopped = stop(&world, Going::Kexec);
    let expected = [Some(Fate::Keep), Some(Fate::Save), Some(Fate::ShutDown)];
    assert_eq!(fates(&stopped), expected, "{stopped:?}");
    assert!(stopped.vms[1].sentence.contains("hangs"), "{stopped:?}");
    leave(&world);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("good")], Resumed::Resumed);
    assert_eq!(all.vms[&name("saved")], Resumed::Restored);
    assert_eq!(all.vms[&name("shut")], Resumed::Booted);
    let report = complete_report(&world.host).expect("io").expect("a report");
    let told = |words: &str| report.notes.iter().any(|n| n.contains(words));
    assert!(told("'saved' is saved to a file") && told("'shut' is shut down"));
}

fn again() {
    let world = World::new();
    world.start(&["done", "half", "yet"]);
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    // As far as the first one came: one VM is frozen, and one stands still for
    // a file that was never finished.
    vmm::freeze(&world.host.layout.socket(&name("done")), vmm::FREEZE_WAIT).expect("frozen");
    let paths = SavedPaths::new(&world.host.layout, &name("half"));
    fs::create_dir_all(paths.part.parent().expect("parent")).expect("mkdir");
    let file = fs::File::create(&paths.part).expect("create");
    let socket = world.host.layout.socket(&name("half"));
    vmm::save(&socket, &file, &paths.part, vmm::SAVE_WAIT).expect("saved");
    let stopped = stop(&world, Going::Kexec);
    let expected = [Some(Fate::Keep), Some(Fate::Keep)];
    assert_eq!(fates(&stopped), expected, "{stopped:?}");
    leave(&world);
    resumed(&world, &Resumed::Resumed);
}

fn frozen_before() {
    for held in [false, true] {
        let world = World::new();
        world.start(&["web"]);
        if held {
            vmm::freeze(&world.host.layout.socket(&name("web")), vmm::FREEZE_WAIT).expect("frozen");
        } else {
            ops::suspend(&world.host, &name("web")).expect("suspended");
        }
        let stopped = stop(&world, Going::Off);
        assert_eq!(fates(&stopped), [Some(Fate::Save)], "{stopped:?}");
        leave(&world);
        resumed(&world, &Resumed::Restored);
    }
    // A kexec leaves it where it is.
    let world = World::new();
    world.start(&["web"]);
    ops::suspend(&world.host, &name("web")).expect("suspended");
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    let stopped = stop(&world, Going::Kexec);
    assert!(stopped.vms.is_empty(), "{stopped:?}");
    assert_eq!(world.state("web"), VmState::Frozen);
}

fn silent_manager() {
    let world = World::new();
    world.start(&["web"]);
    *world.machine.going.lock().expect("lock") = Some(Err("no answer".into()));
    let stopped = stopping(&world.host, &silent).expect("its turn");
    assert_eq!(fates(&stopped), [Some(Fate::Save)]);
    assert!(stopped.notes.iter().any(|n| n.contains("no answer")));
    // The host stayed up: an order brings the VM back.
    ops::resume(&world.host, &name("web"), ops::ResumeOptions::default()).expect("resumed");
    assert_eq!(world.state("web"), VmState::Running);
}

fn other_way() {
    let world = World::new();
    world.start(&["web"]);
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    let stopped = stop(&world, Going::Reset);
    assert_eq!(fates(&stopped), [Some(Fate::Save)]);
    assert!(
        stopped.notes.iter().any(|n| n.contains("otherwise")),
        "{stopped:?}"
    );
    // Nor is one of a boot that is over.
    let world = World::new();
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    let old = Order::read(&world.host).expect("read").expect("staged");
    world.next_boot();
    old.write(&world.host).expect("write");
    assert_eq!(Order::read(&world.host).expect("read"), None);
    // One of another release is said, and not followed.
    let path = world.host.layout.run.join("host/order.json");
    fs::write(path, "{\"version\":9}").expect("write");
    assert!(Order::read(&world.host).is_err());
    let stopped = stop(&world, Going::Kexec);
    assert!(
        stopped
            .notes
            .iter()
            .any(|n| n.contains("no order is followed"))
    );
}

fn stuck() {
    let world = World::new();
    world.start(&["dead", "web"]);
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    // It ends without a word while it freezes.
    world.tell("dead", "die-before-commit");
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [None, Some(Fate::Keep)], "{stopped:?}");
    assert!(stopped.loses());
    leave(&world);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert_eq!(all.vms[&name("web")], Resumed::Resumed);
    // One that ends when the state is committed is frozen.
    let world = World::new();
    world.start(&["web"]);
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    world.tell("web", "die-after-commit");
    let stopped = stop(&world, Going::Kexec);
    assert_eq!(fates(&stopped), [Some(Fate::Keep)], "{stopped:?}");
    leave(&world);
    resumed(&world, &Resumed::Resumed);
}

/// Of two VMs that are to be shut down, the thread of one panics: that is one
/// way that failed, and its next is tried.
fn panics() {
    let world = World::new();
    let toml = world.host.layout.config.join("host.toml");
    fs::write(toml, "[shutdown]\nvms = \"shutdown\"\ntimeout_s = 60\n").expect("write");
    world.start(&["db", "web"]);
    goes(&world, Going::Reset);
    *world.machine.panics.lock().expect("lock") = Some(("stamp", 1));
    let stopped = world.in_time(|host| stopping(host, &silent).expect("its turn"));
    let mut found = fates(&stopped);
    found.sort();
    assert_eq!(
        found,
        [Some(Fate::Save), Some(Fate::ShutDown)],
        "{stopped:?}"
    );
    let saved = stopped.vms.iter().find(|vm| vm.fate == Some(Fate::Save));
    let sentence = &saved.expect("one").sentence;
    assert!(sentence.contains("ended early"), "{sentence}");
    leave(&world);
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let kept = |r: &Resumed| matches!(r, Resumed::Restored | Resumed::Booted);
    assert!(all.vms.len() == 2 && all.vms.values().all(kept), "{all:?}");
}

/// One that is left out of the list would be kept by nobody.
fn unseen() {
    let world = World::without_store();
    world.define("web", "");
    *world.machine.panics.lock().expect("lock") = Some(("live update", 1));
    let survey = hebe_host::listing::survey(&world.host);
    let row = survey.rows.get(&name("web")).expect("listed");
    assert_eq!(row.state, VmState::Unresponsive);
    let detail = row.detail.as_deref().expect("why");
    assert!(detail.contains("ended early"), "{detail}");
    assert_eq!(world.state("web"), VmState::Stopped, "the next look");
}

/// The same life was given up in another store, and restored from a file here:
/// frozen under that word, it would be given up, too. The VM behind it in the
/// alphabet is noted all the same.
fn word_stands() {
    let world = World::new();
    world.define("a", "autostart = true");
    let vm = ops::start(&world.host, &name("a")).expect("starts").id;
    world.start(&["b"]);
    let note = world.host.layout.state.join(format!("frozen/a.{vm}.json"));
    ops::suspend(&world.host, &name("a")).expect("suspends");
    let text = fs::read_to_string(&note).expect("a note");
    ops::resume(&world.host, &name("a"), ops::ResumeOptions::default()).expect("resumes");
    let store = world.host.store.view().expect("view").expect("store");
    let elsewhere = hebe_types::VmId([9; 16]).to_string();
    let text = text
        .replace(&hebe_types::VmId(store.uuid).to_string(), &elsewhere)
        .replace("\"given_up\": false", "\"given_up\": true");
    fs::write(&note, &text).expect("write");
    stage(&world.host, &world.options(RebootMethod::Warm), &silent).expect("staged");
    let stopped = stop(&world, Going::Kexec);
    let expected = [Some(Fate::Save), Some(Fate::Keep)];
    assert_eq!(fates(&stopped), expected, "{stopped:?}");
    assert!(stopped.vms[0].sentence.contains("given up"), "{stopped:?}");
    leave(&world);
    let all = resume_all(&world.host, stamp_now(), true).expect("not busy");
    assert_eq!(all.vms[&name("a")], Resumed::Restored, "not booted anew");
    assert_eq!(all.vms[&name("b")], Resumed::Resumed);
    assert_eq!(world.instance("a").expect("instance").vm, vm);
    assert_eq!(fs::read_to_string(&note).ok(), Some(text), "it stands");
}
