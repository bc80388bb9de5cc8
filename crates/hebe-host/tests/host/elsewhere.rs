//! VMs that are frozen in a store that this kernel does not have.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use hebe_flow::resume::SavedFact;
use hebe_host::Host;
use hebe_host::listing::{self, VmRow, VmState};
use hebe_host::notes;
use hebe_host::ops::{self, ResumeFrom, ResumeOptions, StopOptions};
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::saved::{SavedInfo, SavedPaths};
use hebe_host::store_init::{InitOptions, init};
use hebe_sys::clock::stamp_now;
use hebe_types::{RebootMethod, VmId};

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    (
        "a_frozen_vm_without_its_store_is_lost_and_not_stopped",
        lost,
    ),
    ("a_vm_started_afresh_never_meets_its_old_memory", afresh),
    (
        "a_frozen_vm_that_no_note_tells_of_is_resumed_by_an_order_that_says_so",
        not_mounted,
    ),
    (
        "a_frozen_vm_whose_record_names_nobody_is_lost_and_not_stopped",
        record_damaged,
    ),
    (
        "a_vm_started_afresh_and_saved_is_restored",
        afresh_and_saved,
    ),
    ("a_start_afresh_that_fails_gives_nothing_up", afresh_fails),
    (
        "a_vm_whose_notes_cannot_be_listed_is_not_booted",
        notes_not_listed,
    ),
    ("a_lost_vm_that_is_dropped_is_never_resumed", dropped),
    ("a_lost_vm_with_a_file_needs_a_choice", lost_with_file),
    (
        "a_restore_that_never_ran_gives_nothing_up_and_keeps_its_file",
        restore_fails,
    ),
    (
        "a_suspend_that_comes_second_leaves_the_note_of_the_first",
        frozen_by_another,
    ),
    (
        "what_was_given_up_in_another_store_stays_so",
        given_up_elsewhere,
    ),
    ("notes_last_as_long_as_the_frozen_state", notes_end),
    (
        "a_store_with_a_frozen_vm_is_not_made_anew",
        given_up_by_name,
    ),
    (
        "what_a_killed_order_was_writing_is_swept_and_never_a_living_ones",
        unfinished,
    ),
    (
        "a_note_that_cannot_be_read_costs_a_choice_and_no_data",
        unreadable,
    ),
];

fn row(host: &Host) -> VmRow {
    let mut rows = listing::survey(host).rows;
    rows.remove(&name("web")).expect("listed")
}

/// As with `--unnoted`.
fn any(host: &Host) -> Host {
    let mut host = host.clone();
    host.layout.unnoted = true;
    host
}

fn noted(world: &World) -> usize {
    notes::all(&world.host.layout).len()
}

fn resumed(host: &Host, autostart: bool) -> Resumed {
    let mut all = resume_all(host, stamp_now(), autostart).expect("not busy");
    all.vms.remove(&name("web")).expect("in the answer")
}

fn stop(host: &Host) {
    let force = StopOptions {
        timeout: Duration::ZERO,
        force: true,
    };
    ops::stop(host, &name("web"), force).expect("stops");
}

/// An order that lives shares the lock of all VMs: as long as it does, nothing is
/// swept.
fn unfinished() {
    let world = World::new();
    world.start(&["web"]);
    let vm = world.instance("web").expect("up").vm;
    let state = &world.host.layout.state;
    let left = [
        format!("frozen/web.{vm}.json.new"),
        format!("lives/old.{vm}.toml.new"),
        "failed/web.json.new".to_owned(),
        "saved/web.json.new".to_owned(),
    ];
    let left = left.map(|file| state.join(file));
    let others = [
        format!("lives/web.{vm}.toml"),
        "saved/web.part".to_owned(),
        "pending.json.new".to_owned(),
    ];
    let others = others.map(|file| state.join(file));
    for file in left.iter().chain(&others[1..]) {
        fs::create_dir_all(file.parent().expect("a folder")).expect("mkdir");
        fs::write(file, "{").expect("write");
    }
    let order = world.host.lock_orders().expect("an order begins");
    let host = world.host.clone();
    let swept = std::thread::spawn(move || resume_all(&host, stamp_now(), false));
    // As long as a look takes that does not wait for it.
    for _ in 0..20 {
        listing::survey(&world.host);
        assert!(left.iter().all(|file| file.exists()), "it is being written");
    }
    drop(order);
    swept.join().expect("joined").expect("its turn");
    assert!(!left.iter().any(|file| file.exists()));
    assert!(others.iter().all(|file| file.exists()), "and nothing else");
}

/// Frozen by a warm reboot, into a kernel without the reservation.
fn frozen(more: &str) -> (World, Host, VmId) {
    let world = World::new();
    world.define("web", more);
    let id = ops::start(&world.host, &name("web")).expect("starts").id;
    world.reboot(RebootMethod::Warm);
    let bare = world.bare();
    (world, bare, id)
}

fn lost() {
    let (world, bare, id) = frozen("autostart = true");
    let store = world.host.store.view().expect("view").expect("store");
    let row = row(&bare);
    assert_eq!(row.state, VmState::Lost);
    let detail = row.detail.expect("the reason");
    let uuid = VmId(store.uuid).to_string();
    for words in [uuid.as_str(), "memmap=256M!4G", "hebe start web --afresh"] {
        assert!(detail.contains(words), "{detail}");
    }
    let all = resumed(&bare, true);
    assert!(
        matches!(&all, Resumed::Lost { reason } if *reason == detail),
        "not booted, though it is to start by itself: {all:?}"
    );
    let (_, config) = hebe_host::definitions::load(&bare.layout, &name("web")).expect("own");
    for refused in [
        ops::start(&bare, &name("web")),
        ops::boot(&bare, &config),
        ops::resume(&bare, &name("web"), ResumeOptions::default()),
    ] {
        let error = refused.expect_err("its memory may be there").to_string();
        assert!(error.contains("--afresh"), "{error}");
    }
    // A store that is there and cannot be read is as good as none.
    fs::rename(
        world.root.path().join("store"),
        world.root.path().join("away"),
    )
    .expect("away");
    assert_eq!(self::row(&world.host).state, VmState::Lost);
    fs::rename(
        world.root.path().join("away"),
        world.root.path().join("store"),
    )
    .expect("back");
    world.reserved();
    assert_eq!(self::row(&world.host).state, VmState::Frozen);
    assert_eq!(resumed(&world.host, true), Resumed::Resumed);
    assert_eq!(world.instance("web").expect("up").vm, id);
    assert_eq!(noted(&world), 0);
}

fn afresh() {
    let (world, bare, id) = frozen("");
    let fresh = ops::start_afresh(&bare, &name("web")).expect("boots");
    assert_ne!(fresh.id, id);
    stop(&bare);
    assert_eq!(
        row(&bare).state,
        VmState::Stopped,
        "nothing to decide any more"
    );
    world.reserved();
    let host = &world.host;
    let found = row(host);
    assert_eq!(found.state, VmState::Crashed, "{:?}", found.detail);
    let why = found.detail.expect("the reason");
    assert!(why.contains("given up"), "{why}");
    assert!(matches!(resumed(host, false), Resumed::Lost { reason } if reason == why));
    let view = host.store.view().expect("view").expect("store");
    let refused = [
        ops::resume(host, &name("web"), ResumeOptions::default()),
        ops::continue_frozen(host, &name("web"), Some(&view)),
    ];
    for result in refused {
        assert!(result.is_err(), "old memory would meet a newer disk");
    }
    assert_eq!(world.segments(), 1, "nothing is freed without an order");
    ops::start(host, &name("web")).expect("boots");
    assert_eq!((world.segments(), noted(&world)), (1, 0));
}

/// Early user space resumes before the state directory is mounted, where alone
/// stands that the VM was started afresh.
fn not_mounted() {
    let (world, bare, id) = frozen("");
    ops::start_afresh(&bare, &name("web")).expect("boots");
    stop(&bare);
    world.reserved();
    let mut early = world.host.clone();
    early.layout.state = world.root.path().join("not/mounted");
    let left = resumed(&early, false);
    let Resumed::Left { reason } = &left else {
        panic!("old memory would meet a newer disk: {left:?}");
    };
    for word in ["not/mounted", "mount it", "--unnoted"] {
        assert!(reason.contains(word), "{reason}");
    }
    let listed = row(&early);
    assert_eq!(listed.state, VmState::Frozen);
    assert_eq!(listed.detail.as_ref(), Some(reason));
    let refused = ops::resume(&early, &name("web"), ResumeOptions::default());
    assert!(refused.is_err_and(|e| e.to_string().contains("--unnoted")));
    // A reboot from there does not make it known.
    let _ = hebe_host::reboot::reboot(&early, &world.options(RebootMethod::Warm), &|_| {});
    assert!(matches!(resumed(&early, false), Resumed::Left { .. }));
    // The directory has the last word, as ever.
    assert!(matches!(resumed(&world.host, false), Resumed::Lost { .. }));
    assert_eq!(resumed(&any(&early), false), Resumed::Resumed, "by order");
    assert_eq!(world.instance("web").expect("up").vm, id);
}

/// Nothing in the store names the VM any more, and its memory is there.
/// Nobody can read any more which VM is in the one segment.
fn damage_record(world: &World) {
    use std::os::unix::fs::FileExt;
    let store = world.root.path().join("store");
    let file = fs::OpenOptions::new().read(true).write(true).open(store);
    let file = file.expect("open");
    let mut head = vec![0u8; 4 << 20];
    file.read_exact_at(&mut head, 0).expect("read");
    let pages = head.chunks(4096).enumerate();
    let named = pages.filter(|(_, page)| page.windows(4).any(|w| w == b"web\0"));
    let named: Vec<u64> = named.map(|(number, _)| number as u64 * 4096).collect();
    assert!(named.len() >= 2, "both copies: {named:?}");
    for page in named {
        file.write_all_at(&[0xff; 4096], page).expect("damage");
    }
}

fn record_damaged() {
    let world = World::new();
    // It would boot without the store.
    world.define("web", "autostart = true");
    let host = &world.host;
    ops::start(host, &name("web")).expect("starts");
    ops::suspend(host, &name("web")).expect("suspends");
    damage_record(&world);
    world.define("web", "autostart = true\nstore = \"memfd\"");
    let found = row(host);
    assert_eq!(found.state, VmState::Lost, "not stopped: {found:?}");
    let why = found.detail.expect("the reason");
    assert!(why.contains("hebe store list"), "{why}");
    assert!(matches!(resumed(host, true), Resumed::Lost { reason } if reason == why));
    assert!(ops::start(host, &name("web")).is_err());
    assert!(ops::drop_worthless(host, &name("web")).is_err());
    ops::start_afresh(host, &name("web")).expect("by order");
    assert_eq!(world.state("web"), VmState::Running);
}

fn afresh_and_saved() {
    let (world, bare, _) = frozen("autostart = true");
    let fresh = ops::start_afresh(&bare, &name("web")).expect("boots").id;
    // It runs in a memfd: the frozen segment of its name is not its own.
    let up = row(&world.host);
    assert_eq!((up.segment, up.store), (None, Some("memfd")));
    world.reboot(RebootMethod::Warm);
    world.reserved();
    assert_eq!(row(&world.host).state, VmState::Saved);
    assert_eq!(resumed(&world.host, true), Resumed::Restored);
    assert_eq!(row(&world.host).id, Some(fresh.to_string()));
}

fn afresh_fails() {
    let (world, bare, id) = frozen("");
    world.tell("web", "fail-start");
    ops::start_afresh(&bare, &name("web")).expect_err("no VMM");
    world.tell("web", "");
    assert_eq!(row(&bare).state, VmState::Lost);
    world.reserved();
    assert_eq!(resumed(&world.host, false), Resumed::Resumed);
    assert_eq!(world.instance("web").expect("up").vm, id);
}

/// A loop of links stands for a disk that fails.
fn notes_not_listed() {
    let (world, bare, id) = frozen("autostart = true");
    let notes = bare.layout.state.join("frozen");
    let away = bare.layout.state.join("away");
    fs::rename(&notes, &away).expect("away");
    std::os::unix::fs::symlink("frozen", &notes).expect("link");
    let refused = ops::start(&bare, &name("web")).expect_err("its memory may be there");
    assert!(refused.to_string().contains("frozen"), "{refused}");
    let all = resumed(&bare, true);
    assert!(matches!(all, Resumed::Failed { .. }), "{all:?}");
    fs::remove_file(&notes).expect("removed");
    fs::rename(&away, &notes).expect("back");
    world.reserved();
    assert_eq!(resumed(&world.host, true), Resumed::Resumed);
    assert_eq!(world.instance("web").expect("up").vm, id);
}

fn dropped() {
    let (world, bare, _) = frozen("");
    ops::drop_vm(&bare, &name("web")).expect("given up");
    assert_eq!(row(&bare).state, VmState::Stopped);
    world.reserved();
    assert!(matches!(resumed(&world.host, false), Resumed::Lost { .. }));
    ops::drop_vm(&world.host, &name("web")).expect("freed");
    assert_eq!((world.segments(), noted(&world)), (0, 0));
}

/// Frozen in a store that is away, and saved in a file that needs none.
fn frozen_and_saved() -> (World, Host, VmId, SavedPaths) {
    let (world, bare, id) = frozen("");
    let paths = SavedPaths::new(&bare.layout, &name("web"));
    let info = SavedInfo {
        vm: id,
        memory: hebe_types::ByteSize::mib(4),
        in_store: false,
        in_files: false,
        apart: false,
    };
    paths.prepare(&info).expect("prepare");
    fs::write(&paths.part, "web").expect("write");
    paths.commit().expect("commit");
    (world, bare, id, paths)
}

const FROM_FILE: ResumeOptions = ResumeOptions {
    from: Some(ResumeFrom::File),
    again: false,
    accept_changed_disk: false,
};

/// As long as no guest ran from the file, the frozen memory is as good.
fn restore_fails() {
    let (world, mut bare, id, paths) = frozen_and_saved();
    let web = name("web");
    let given_up = |host: &Host| notes::all(&host.layout).iter().any(|n| n.given_up);
    let info = fs::read(&paths.info).expect("read");
    fs::remove_file(&paths.info).expect("remove");
    ops::resume(&bare, &web, FROM_FILE).expect_err("nothing says what the file is");
    assert!(!given_up(&bare));
    fs::write(&paths.info, info).expect("write");
    world.tell("web", "fail-start");
    ops::resume(&bare, &web, FROM_FILE).expect_err("its VMM says why");
    assert!(!given_up(&bare));
    world.tell("web", "");
    let vmm = std::mem::replace(&mut bare.layout.vmm, "/no/such/hebe-vmm".into());
    ops::resume(&bare, &web, FROM_FILE).expect_err("no VMM at all");
    assert!(!given_up(&bare));
    assert_eq!(paths.fact(), Some(SavedFact::Complete), "it never ran");
    bare.layout.vmm = vmm;
    paths.withdraw().expect("the operator's word");
    world.reserved();
    assert_eq!(resumed(&world.host, false), Resumed::Resumed);
    assert_eq!(world.instance("web").expect("up").vm, id);
}

fn lost_with_file() {
    let (world, bare, _, _) = frozen_and_saved();
    let left = resumed(&bare, true);
    assert!(matches!(left, Resumed::Left { .. }), "{left:?}");
    let plain = ops::resume(&bare, &name("web"), ResumeOptions::default());
    let error = plain.expect_err("two states").to_string();
    assert!(error.contains("--from file"), "{error}");
    ops::resume(&bare, &name("web"), FROM_FILE).expect("restores");
    stop(&bare);
    world.reserved();
    assert!(matches!(resumed(&world.host, false), Resumed::Lost { .. }));
}

fn frozen_by_another() {
    let world = World::new();
    world.start(&["web"]);
    world.tell("web", "frozen-by-another");
    ops::suspend(&world.host, &name("web")).expect_err("it is frozen already");
    assert_eq!(row(&world.host).state, VmState::Frozen);
    assert_eq!(noted(&world), 1, "the next kernel may lack its store");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("thaws");
    assert_eq!(noted(&world), 0);
}

fn given_up_elsewhere() {
    let world = World::new();
    world.start(&["web"]);
    let (host, web) = (&world.host, name("web"));
    ops::suspend(host, &web).expect("suspends");
    // The same life was frozen in another store and restored from a file here.
    let dir = host.layout.state.join("frozen");
    let file = fs::read_dir(&dir).expect("dir").next().expect("a note");
    let path = file.expect("entry").path();
    let note = notes::all(&host.layout).remove(0);
    let text = fs::read_to_string(&path).expect("read");
    let text = text.replace(&note.store, &VmId([9; 16]).to_string());
    let marked = text.replace("\"given_up\": false", "\"given_up\": true");
    fs::remove_file(&path).expect("remove");
    ops::resume(&any(host), &web, ResumeOptions::default()).expect("resumes");
    fs::write(&path, &marked).expect("write");
    let error = ops::suspend(host, &web).expect_err("it would replace the word of that");
    assert!(error.to_string().contains("given up"), "{error}");
    assert_eq!(row(host).state, VmState::Running);
    stop(host);
    assert_eq!(fs::read_to_string(&path).ok(), Some(marked));
}

fn notes_end() {
    let world = World::new();
    world.start(&["web"]);
    let (host, web) = (&world.host, name("web"));
    world.tell("web", "refuse-freeze");
    assert!(ops::suspend(host, &web).is_err());
    assert_eq!(noted(&world), 0, "it runs on");
    world.tell("web", "");
    ops::suspend(host, &web).expect("suspends");
    assert_eq!(noted(&world), 1);
    ops::resume(host, &web, ResumeOptions::default()).expect("resumes");
    assert_eq!(noted(&world), 0);
    let undone = hebe_host::reboot::reboot(host, &world.options(RebootMethod::Warm), &|_| {});
    assert!(undone.is_err(), "the jump fails");
    assert_eq!((row(host).state, noted(&world)), (VmState::Running, 0));
    ops::suspend(host, &web).expect("suspends");
    ops::drop_vm(host, &web).expect("given up");
    assert_eq!(noted(&world), 0);
    ops::start(host, &web).expect("starts");
    ops::suspend(host, &web).expect("suspends");
    let anew = InitOptions {
        force: true,
        ..InitOptions::default()
    };
    let refused = init(host, &anew).expect_err("it is frozen there");
    let why = refused.to_string();
    assert!(why.contains("'web'") && why.contains("drop"), "{why}");
    assert_eq!((row(host).state, noted(&world)), (VmState::Frozen, 1));
    damage_record(&world);
    init(host, &anew).expect("made anew");
    assert_eq!(noted(&world), 0, "that store is gone for good");
    ops::start(host, &web).expect("with no more words");
}

/// What force gives up is what nobody can read.
fn given_up_by_name() {
    let world = World::new();
    let host = &world.host;
    world.start(&["db", "web"]);
    let force = || {
        let options = InitOptions {
            force: true,
            ..InitOptions::default()
        };
        init(host, &options).map_err(|error| error.to_string())
    };
    for vm in ["db", "web"] {
        let why = force().expect_err("they run");
        assert!(why.contains("runs in this store"), "{why}");
        ops::suspend(host, &name(vm)).expect("suspends");
    }
    let why = force().expect_err("they are frozen");
    for word in ["'db', 'web'", "hebe resume NAME", "hebe drop NAME --yes"] {
        assert!(why.contains(word), "{why}");
    }
    ops::drop_vm(host, &name("db")).expect("given up");
    let why = force().expect_err("one is left");
    assert!(why.contains("VM 'web', which is frozen"), "{why}");
    ops::resume(host, &name("web"), ResumeOptions::default()).expect("as it was");
    stop(host);
    assert!(!force().expect("nothing is lost").existing);
    // What nobody can resume or drop any more holds nothing up.
    world.start(&["web"]);
    ops::suspend(host, &name("web")).expect("suspends");
    let path = host.layout.store.as_ref().expect("a store");
    let store = fs::OpenOptions::new().write(true).open(path);
    let store = store.expect("open");
    let end = store.metadata().expect("length").len();
    store.write_all_at(&[0xff], end - 1).expect("damage");
    ops::drop_vm(host, &name("web")).expect_err("its guard is overwritten");
    assert!(!force().expect("the way out of that").existing);
}

fn unreadable() {
    let (world, bare, id) = frozen("");
    let path = bare.layout.state.join(format!("frozen/web.{id}.json"));
    fs::write(&path, "{").expect("damage");
    assert_eq!(row(&bare).state, VmState::Lost);
    assert!(ops::start(&bare, &name("web")).is_err());
    world.reserved();
    let host = &world.host;
    assert!(matches!(resumed(host, true), Resumed::Left { .. }));
    let error = ops::resume(host, &name("web"), ResumeOptions::default());
    let text = error.expect_err("nobody knows").to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    assert_eq!(world.segments(), 1);
    assert!(text.contains("--unnoted"), "{text}");
    fs::remove_file(&path).expect("the operator's word");
    ops::resume(&any(host), &name("web"), ResumeOptions::default()).expect("resumes");
}
