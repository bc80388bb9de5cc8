//! Live updates in which somebody dies, is late, is in the way or is told to
//! end: afterwards every VM runs, or is frozen and listed, or is gone with the
//! reason. docs/live-update.md lists which fault is tried by which of these.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Client, Request, Response};
use hebe_host::Layout;
use hebe_host::listing::{self, VmState};
use hebe_host::luo::asking;
use hebe_host::luo::keeper::{self, Place};
use hebe_host::notes;
use hebe_host::ops::{self, ResumeOptions, StopOptions};
use hebe_host::reboot::{RebootEnd, reboot};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{ResumeAll, Resumed, resume_all};
use hebe_host::stores::ExecView;
use hebe_host::timeline::{EventKind, Side};
use hebe_host::vmm;
use hebe_store::Segment;
use hebe_store::luo::{Carrier, HolePolicy, Plan, SegmentFiles};
use hebe_sys::clock::stamp_now;
use hebe_sys::fdpass;
use hebe_sys::luo::fake::{FakeKernel, Fault};
use hebe_types::{ByteSize, RebootMethod, VmId};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("a_late_part_that_fails_leaves_every_vm_running", late_part),
    ("another_owner_of_the_device_costs_no_vm", another_owner),
    (
        "a_vmm_that_dies_frozen_is_replaced_when_the_jump_fails",
        vmm_dies,
    ),
    (
        "a_vm_that_stays_frozen_after_an_abort_is_noted_and_listed",
        stays_frozen,
    ),
    (
        "what_another_order_froze_stays_noted",
        frozen_by_another_order,
    ),
    (
        "a_vm_that_ran_on_and_ended_is_not_missed",
        ended_by_its_own_will,
    ),
    ("each_vm_resumes_when_its_own_memory_is_there", one_by_one),
    (
        "each_vm_resumes_when_its_own_memory_is_there_on_one_processor",
        on_one_processor,
    ),
    (
        "a_keeper_that_panics_at_one_vm_keeps_nobody_waiting",
        keeper_dies,
    ),
    (
        "the_word_that_memory_elsewhere_was_given_up_is_never_replaced",
        word_is_kept,
    ),
    ("a_keeper_does_not_obey_sigterm", sigterm),
    ("a_keeper_needs_nobody_who_started_it", starter_gone),
];

fn silent(_: &str) {}

fn resume(world: &World) -> ResumeAll {
    resume_all(&world.host, stamp_now(), false).expect("not busy")
}

fn noted(world: &World) -> usize {
    notes::all(&world.host.layout).len()
}

fn id(world: &World, vm: &str) -> VmId {
    world.instance(vm).expect("up").vm
}

/// Reboots, which fails; why, and which VMs do not run.
fn aborted(world: &World, say: &(dyn Fn(&str) + Sync)) -> (String, Vec<String>) {
    match reboot(&world.host, &world.options(RebootMethod::Warm), say) {
        Err(RebootEnd::Aborted { why, stranded, .. }) => {
            let names = stranded.into_iter().map(|(name, _)| name.to_string());
            (why, names.collect())
        }
        other => panic!("not undone: {other:?}"),
    }
}

fn all_run(world: &World) {
    for vm in ["db", "web"] {
        assert_eq!(world.state(vm), VmState::Running, "{vm}");
    }
}

/// The memory of a VM, as the reboot job gets it.
pub fn files(world: &World, vm: &str) -> SegmentFiles {
    let socket = world.host.layout.socket(&name(vm));
    let mut client = Client::connect(&socket).expect("connect");
    let answer = client.call(&Request::SegmentFiles).expect("files");
    let Response::SegmentFiles { count, spec } = answer else {
        panic!("{answer:?}");
    };
    let fds = fdpass::receive(&client.into_stream(), count).expect("descriptors");
    SegmentFiles::from_fds(serde_json::from_str(&spec).expect("spec"), fds).expect("files")
}

/// Its RAM was left out as empty; the guest begins to use it while disks are
/// flushed, and there is no memory to preserve it with.
fn late_part() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let touch = |world: &World| {
        let ram = files(world, "web");
        *world.machine.at_sync.lock().expect("lock") = Some(Box::new(move || {
            let part = ram.fds().nth(1).expect("RAM");
            rustix::io::pwrite(part, b"used", 4096).expect("write");
        }));
    };
    touch(&world);
    let fault = Fault::Preserve("hebe.vm.001".into(), 2);
    world.luo().arm(fault, libc::ENOMEM);
    let (why, stranded) = aborted(&world, &silent);
    assert!(why.contains("web") && why.contains("part 0"), "{why}");
    assert!(stranded.is_empty(), "{stranded:?}");
    all_run(&world);
    assert_eq!((world.luo().outgoing(), noted(&world)), ((0, 0), 0));
    // Without the fault it goes along, and arrives.
    world.luo().disarm();
    touch(&world);
    world.reboot(RebootMethod::Warm);
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
    let mut bytes = [0; 4];
    let ram = files(&world, "web");
    let part = ram.fds().nth(1).expect("RAM");
    rustix::io::pread(part, &mut bytes, 4096).expect("read");
    assert_eq!(&bytes, b"used");
}

fn another_owner() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    // It comes after the checks, and stays.
    let owner = std::sync::Mutex::new(None);
    let take = |said: &str| {
        if said.starts_with("stopping services") {
            *owner.lock().expect("lock") = Some(world.luo().open().expect("free"));
        }
    };
    let (why, stranded) = aborted(&world, &take);
    assert!(
        why.contains("another process has /dev/liveupdate open"),
        "{why}"
    );
    assert!(stranded.is_empty(), "{stranded:?}");
    all_run(&world);
    assert_eq!(noted(&world), 0);
    *owner.lock().expect("lock") = None;
    // One that is soon done is waited for.
    let kernel = world.luo();
    let brief = move |said: &str| {
        if said.starts_with("stopping services") {
            let device = kernel.open().expect("free");
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(200));
                drop(device);
            });
        }
    };
    let (why, _) = aborted(&world, &brief);
    assert!(why.contains("reboot"), "it came to the jump: {why}");
    world.reboot(RebootMethod::Warm);
    // In the next kernel nothing is lost: nobody has asked for it yet.
    let device = world.luo().open().expect("free");
    let all = resume(&world);
    assert!(
        all.carry_trouble
            .is_some_and(|why| why.contains("another process"))
    );
    let rows = listing::survey(&world.host).rows;
    let web = rows.get(&name("web")).expect("listed");
    assert_eq!(web.state, VmState::Lost);
    let detail = web.detail.as_deref().unwrap_or_default();
    assert!(detail.contains("hebe resume --all"), "{detail}");
    ops::start(&world.host, &name("web")).expect_err("its memory may come back");
    drop(device);
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
}

fn vmm_dies() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    let before = [id(&world, "db"), id(&world, "web")];
    world.tell("web", "die-after-commit");
    // The new VMM is told nothing any more.
    let file = world.root.path().join("fake/web");
    *world.machine.at_sync.lock().expect("lock") = None;
    let (why, stranded) = {
        let watch = thread::spawn({
            let events = world.machine.events.clone();
            move || {
                let frozen = |text: String| text.contains("web frozen");
                while !fs::read_to_string(&events).is_ok_and(frozen) {
                    thread::sleep(Duration::from_millis(1));
                }
                fs::write(file, "").expect("write");
            }
        });
        let end = aborted(&world, &silent);
        watch.join().expect("watched");
        end
    };
    assert!(why.contains("web"), "{why}");
    assert!(stranded.is_empty(), "{stranded:?}");
    all_run(&world);
    assert_eq!([id(&world, "db"), id(&world, "web")], before);
    assert_eq!((world.luo().outgoing(), noted(&world)), ((0, 0), 0));
    world.reboot(RebootMethod::Warm);
    assert!(resume(&world).vms.values().all(|r| *r == Resumed::Resumed));
}

fn stays_frozen() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.tell("web", "refuse-thaw");
    let (_, stranded) = aborted(&world, &silent);
    assert_eq!(stranded, ["web"]);
    assert_eq!(world.state("db"), VmState::Running);
    assert_eq!(world.state("web"), VmState::Frozen);
    assert_eq!(noted(&world), 1, "of the one that is still frozen");
    world.tell("web", "");
    ops::resume(&world.host, &name("web"), ResumeOptions::default()).expect("thaws");
    assert_eq!((world.state("web"), noted(&world)), (VmState::Running, 0));
}

fn frozen_by_another_order() {
    let world = World::live_update();
    world.start(&["web"]);
    world.tell("web", "frozen-by-another");
    ops::suspend(&world.host, &name("web")).expect_err("it was frozen already");
    assert_eq!((world.state("web"), noted(&world)), (VmState::Frozen, 1));
    world.kill("web");
    assert_eq!(world.state("web"), VmState::Lost);
}

/// An order that was killed leaves its notes; a VM that runs on and is stopped
/// later is stopped, and nothing of it is missed.
fn ended_by_its_own_will() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    for vm in ["db", "web"] {
        ops::suspend(&world.host, &name(vm)).expect("freezes");
        // As if whoever ordered it were gone before it could forget.
        vmm::let_run(&world.host.layout.socket(&name(vm))).expect("thaws");
    }
    assert_eq!(noted(&world), 2);
    let stop = StopOptions {
        timeout: PATIENCE,
        force: false,
    };
    ops::stop(&world.host, &name("web"), stop).expect("stops");
    assert_eq!((world.state("web"), noted(&world)), (VmState::Stopped, 1));
    // The next look at all VMs forgets those that run.
    resume(&world);
    assert_eq!((world.state("db"), noted(&world)), (VmState::Running, 0));
}

/// The same life of the VM was frozen in another store, and given up there: were
/// that forgotten, it would be resumed with disks that went on without it.
fn word_is_kept() {
    let world = World::live_update();
    world.start(&["web"]);
    let web = name("web");
    ops::suspend(&world.host, &web).expect("freezes");
    vmm::let_run(&world.host.layout.socket(&web)).expect("thaws");
    let dir = world.host.layout.state.join("frozen");
    let path = dir.join(format!("web.{}.json", id(&world, "web")));
    let note = fs::read_to_string(&path).expect("a note");
    let given_up = note
        .replace("\"luo\"", "\"another\"")
        .replace("\"given_up\": false", "\"given_up\": true");
    assert_ne!(note, given_up);
    fs::write(&path, &given_up).expect("write");
    let refused = ops::suspend(&world.host, &web).expect_err("it would be forgotten");
    assert!(refused.to_string().contains("was given up"), "{refused}");
    let (why, stranded) = aborted(&world, &silent);
    assert!(why.contains("was given up"), "{why}");
    assert!(stranded.is_empty(), "{stranded:?}");
    assert_eq!(world.state("web"), VmState::Running);
    resume(&world);
    let kept = fs::read_to_string(&path).expect("still there");
    assert_eq!(kept, given_up);
}

/// A computer with one processor has as much memory to wait for.
fn on_one_processor() {
    let worker = thread::Builder::new().spawn(|| {
        let mut one = CpuSet::new();
        let mine = sched_getaffinity(None).expect("affinity");
        let first = (0..CpuSet::MAX_CPU).find(|cpu| mine.is_set(*cpu));
        one.set(first.expect("a processor"));
        // Of this thread, and of all that begin from here.
        sched_setaffinity(None, &one).expect("affinity");
        assert_eq!(thread::available_parallelism().expect("known").get(), 1);
        one_by_one();
    });
    worker.expect("a thread").join().expect("as with several");
}

fn keeper_dies() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.reboot(RebootMethod::Warm);
    *world.machine.keeper_dies_at.lock().expect("lock") = Some("hebe.vm.000".to_owned());
    let all = world.in_time(|host| resume_all(host, stamp_now(), false).expect("not busy"));
    assert_eq!(all.vms[&name("web")], Resumed::Resumed, "{all:?}");
    let db = &all.vms[&name("db")];
    assert!(db.is_trouble(), "{db:?}");
    // It is listed with the reason, and is nobody's who waits.
    let socket = world.host.layout.keeper_socket();
    let held = asking::list(&socket).expect("io").expect("a keeper").vms;
    let [lost] = held.as_slice() else {
        panic!("{held:?}");
    };
    assert!(!lost.awaited, "{lost:?}");
    assert!(matches!(lost.exec, ExecView::Damaged { .. }), "{lost:?}");
    let row = listing::survey(&world.host).rows[&name("db")].clone();
    assert_eq!(row.state, VmState::Damaged, "{row:?}");
    assert!(row.detail.is_some(), "{row:?}");
    // And its owner decides.
    world.in_time(|host| ops::drop_vm(host, &name("db")).expect("given up"));
    assert_eq!(world.state("web"), VmState::Running);
}

/// Lets a kernel go on that was stalled, also where the test fails meanwhile.
struct GoesOn(FakeKernel);

impl Drop for GoesOn {
    fn drop(&mut self) {
        self.0.go_on();
    }
}

fn one_by_one() {
    let world = World::live_update();
    world.start(&["db", "web"]);
    world.forget_events();
    world.reboot(RebootMethod::Warm);
    world.forget_events();
    // The first slot is db's: a large VM.
    world.luo().stall("hebe.vm.000");
    thread::scope(|scope| {
        let all = scope.spawn(|| resume(&world));
        let goes_on = GoesOn(world.luo());
        let began = Instant::now();
        while !world.events().contains(&"web runs".to_owned()) {
            assert!(began.elapsed() < PATIENCE, "web waits for db");
            thread::sleep(Duration::from_millis(2));
        }
        assert!(!world.events().contains(&"db runs".to_owned()));
        let socket = world.host.layout.keeper_socket();
        let held = asking::list(&socket).expect("io").expect("a keeper").vms;
        let db = held.iter().find(|vm| vm.name == Some(name("db")));
        let db = db.expect("listed while it is awaited");
        assert!(db.awaited && matches!(db.exec, ExecView::Frozen { .. }));
        asking::release(&socket, db.segment).expect_err("it is not here yet");
        assert_eq!(world.state("db"), VmState::Frozen);
        drop(goes_on);
        let all = all.join().expect("resumed");
        assert!(all.vms.values().all(|r| *r == Resumed::Resumed), "{all:?}");
    });
    let report = complete_report(&world.host).expect("io").expect("a report");
    for vm in ["db", "web"] {
        let vm = name(vm);
        let took = |side, from, to| report.took_ms(side, &vm, from, to).expect("noted");
        assert!(took(Side::Before, EventKind::PreserveBegan, EventKind::Preserved) >= 0.0);
        assert!(took(Side::After, EventKind::Retrieving, EventKind::Arrived) >= 0.0);
        let row = report.carried.iter().find(|row| row.vm == vm);
        let row = row.expect("its memory");
        assert_eq!(row.memory, ByteSize::mib(4));
        assert_eq!(row.retrieved, Some(row.preserved));
    }
}

/// This program again: a keeper of one frozen VM, in a kernel of its own.
pub fn keep(arguments: &[String]) -> ExitCode {
    let [root] = arguments else {
        return ExitCode::from(2);
    };
    let layout = Layout::below(Path::new(root));
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("old");
    let web = name("web");
    let files = SegmentFiles::create(VmId([7; 16]), &web, ByteSize::mib(4)).expect("files");
    let copies = files.fds().map(|fd| fd.try_clone_to_owned());
    let copies = copies.collect::<Result<_, _>>().expect("copies");
    let segment = Segment::map_files(copies, files.spec()).expect("map");
    segment.exec().commit_frozen(b"web").expect("commit");
    drop(segment);
    let carrier = Carrier::new(&device, "k").expect("carrier");
    let mut host = carrier.host(1).expect("host");
    let plan = Plan::new(&files.measure().expect("measure"), HolePolicy::Fill);
    let vm = carrier.vm(0, &files, &plan).expect("preserved");
    host.enter(&vm).expect("entered");
    kernel.kexec();
    drop((vm, host, files, device));
    hebe_sys::proc::hold_signals().expect("signals");
    let place = Place {
        socket: layout.keeper_socket(),
        record: layout.run.join("arrivals.json"),
        boot_id: [2; 16],
    };
    let device = Box::new(kernel.open().expect("new"));
    ExitCode::from(u8::from(
        keeper::keep(device, place, std::io::stdout()).is_err(),
    ))
}

fn keeper_process(root: &Path) -> Child {
    Command::new(std::env::current_exe().expect("exe"))
        .arg("--keep")
        .arg(root)
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts")
}

fn ends(mut child: Child) {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            assert!(status.success(), "{status}");
            return;
        }
        assert!(began.elapsed() < PATIENCE, "it ends");
        thread::sleep(Duration::from_millis(2));
    }
}

fn sigterm() {
    let root = tempfile::tempdir().expect("dir");
    let mut child = keeper_process(root.path());
    let mut word = String::new();
    let said = child.stdout.take().expect("stdout");
    BufReader::new(said).read_line(&mut word).expect("a word");
    assert_eq!(word.trim(), "1");
    let socket = Layout::below(root.path()).keeper_socket();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::TERM] {
        kill_process(Pid::from_child(&child), signal).expect("kill");
        let held = asking::list(&socket).expect("io").expect("it lives");
        let exec = &held.vms[0].exec;
        assert!(matches!(exec, ExecView::Frozen { .. }), "{exec:?}");
    }
    let held = asking::list(&socket).expect("io").expect("it lives");
    let files = asking::take(&socket, held.vms[0].segment).expect("its memory");
    assert!(files.fds().all(|fd| rustix::fs::fstat(fd.as_fd()).is_ok()));
    asking::release(&socket, held.vms[0].segment).expect("released");
    ends(child);
}

fn starter_gone() {
    let root = tempfile::tempdir().expect("dir");
    let mut child = keeper_process(root.path());
    drop(child.stdout.take());
    let socket = Layout::below(root.path()).keeper_socket();
    let began = Instant::now();
    let held = loop {
        assert!(began.elapsed() < PATIENCE, "it listens");
        match asking::list(&socket) {
            Ok(Some(held)) => break held,
            _ => thread::sleep(Duration::from_millis(5)),
        }
    };
    // A client that breaks off costs it nothing either.
    drop(std::os::unix::net::UnixStream::connect(&socket).expect("connect"));
    asking::take(&socket, held.vms[0].segment).expect("its memory");
    asking::release(&socket, held.vms[0].segment).expect("released");
    ends(child);
}
