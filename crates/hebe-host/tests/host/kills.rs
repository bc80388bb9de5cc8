//! SIGKILL at arbitrary instants: of the manager, of the VMM, of both.
//!
//! The operator is this program again, started with an order and killed a
//! little later each time. Afterwards the VM is running, frozen or cleanly
//! absent, and one `resume --all` makes sense of whatever is there.

use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hebe_host::listing::VmState;
use hebe_host::ops::{self, ResumeOptions};
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::stores::DeviceStore;
use hebe_host::system::Machine;
use hebe_host::{Host, Layout};
use hebe_sys::clock::stamp_now;

use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("a_manager_killed_while_it_suspends_and_resumes", manager),
    ("a_manager_killed_while_it_starts_a_vm", starting),
    ("a_vmm_killed_while_it_freezes_and_resumes", vmm),
];

/// A restore that was interrupted, once more.
fn again() -> ResumeOptions {
    ResumeOptions {
        again: true,
        ..ResumeOptions::default()
    }
}

/// The operator: one order, carried out by a process of its own.
pub fn operate(arguments: &[String]) -> ExitCode {
    let [order, root] = arguments else {
        return ExitCode::from(2);
    };
    let root = Path::new(root);
    let mut layout = Layout::below(root);
    layout.vmm = std::env::current_exe().expect("exe");
    let host = Host {
        layout,
        store: Arc::new(DeviceStore::new(Some(root.join("store")))),
        system: Arc::new(Machine::default()),
    };
    let web = name("web");
    let done = match order.as_str() {
        "suspend" => ops::suspend(&host, &web).map(drop),
        "resume" => ops::resume(&host, &web, ResumeOptions::default()).map(drop),
        "start" => ops::start(&host, &web).map(drop),
        "again" => ops::resume(&host, &web, again()).map(drop),
        _ => return ExitCode::from(2),
    };
    ExitCode::from(u8::from(done.is_err()))
}

fn order(world: &World, what: &str) -> Child {
    Command::new(std::env::current_exe().expect("exe"))
        .args(["--operate", what])
        .arg(world.root.path())
        .spawn()
        .expect("the operator starts")
}

fn kill_after(mut child: Child, delay: Duration) {
    thread::sleep(delay);
    child.kill().expect("kill");
    child.wait().expect("wait");
}

/// Instants from the first to well after the last that an order takes here.
fn instants() -> impl Iterator<Item = Duration> {
    (0..24u64).map(|i| Duration::from_micros(i * i * 30))
}

/// A manager that was killed may leave a VMM that is still starting.
pub fn settle(world: &World) {
    let until = Instant::now() + PATIENCE;
    while world.state("web") == VmState::Unresponsive {
        assert!(Instant::now() < until, "the VMM does not answer");
        thread::sleep(Duration::from_millis(5));
    }
}

fn manager() {
    let world = World::new();
    world.start(&["web"]);
    let id = world.instance("web").expect("instance").vm;
    for delay in instants() {
        kill_after(order(&world, "suspend"), delay);
        settle(&world);
        let state = world.state("web");
        assert!(
            matches!(state, VmState::Running | VmState::Frozen),
            "{delay:?}: {state:?}"
        );
        let _ = order(&world, "suspend").wait();
        kill_after(order(&world, "resume"), delay);
        settle(&world);
        let state = world.state("web");
        assert!(
            matches!(state, VmState::Running | VmState::Frozen),
            "{delay:?}: {state:?}"
        );
        let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert!(!all.vms[&name("web")].is_trouble(), "{delay:?}: {all:?}");
        settle(&world);
        assert_eq!(world.state("web"), VmState::Running, "{delay:?}");
    }
    let store = world.host.store.view().expect("view").expect("store");
    let segment = store.segment_of(&name("web")).expect("one segment");
    assert_eq!(segment.vm, Some(id), "still the same VM");
}

fn starting() {
    let world = World::new();
    world.define("web", "");
    for delay in instants() {
        kill_after(order(&world, "start"), delay);
        settle(&world);
        match world.state("web") {
            VmState::Running => {
                let force = ops::StopOptions {
                    timeout: Duration::ZERO,
                    force: true,
                };
                ops::stop(&world.host, &name("web"), force).expect("stops");
            }
            VmState::Stopped => {
                let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
                let result = all.vms.get(&name("web"));
                assert!(
                    matches!(result, None | Some(Resumed::Cleaned)),
                    "{delay:?}: {result:?}"
                );
            }
            state => panic!("{delay:?}: {state:?}"),
        }
        assert_eq!(world.segments(), 0, "{delay:?}");
    }
}

fn vmm() {
    let world = World::new();
    world.start(&["web"]);
    for delay in instants().step_by(2) {
        let pid = pid(&world);
        let mut operator = order(&world, "suspend");
        thread::sleep(delay);
        kill_process(pid);
        operator.wait().expect("wait");
        // It may have hung up, and not yet let go of its lock.
        settle(&world);
        match world.state("web") {
            VmState::Frozen => {
                ops::resume(&world.host, &name("web"), ResumeOptions::default())
                    .expect("a frozen VM resumes");
            }
            VmState::Crashed => {
                ops::start(&world.host, &name("web")).expect("a crashed VM boots anew");
            }
            state => panic!("{delay:?}: {state:?}"),
        }
        assert_eq!(world.state("web"), VmState::Running, "{delay:?}");
        assert_eq!(world.segments(), 1, "{delay:?}");
    }
}

fn pid(world: &World) -> u32 {
    let survey = hebe_host::listing::survey(&world.host);
    survey.rows[&name("web")].pid.expect("up")
}

fn kill_process(pid: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}
