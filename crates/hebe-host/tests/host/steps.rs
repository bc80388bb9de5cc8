//! A restore that is killed at every step.
//!
//! The operator is this program again, traced: it is killed just before it
//! makes the system call that changes something on disk, the first time round
//! the first one, then the second, until an order gets through. What it does
//! to the store without a system call is cut in the store's own tests.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use hebe_api::VmmState;
use hebe_flow::resume::SavedFact;
use hebe_host::listing::VmState;
use hebe_host::ops;
use hebe_host::resume_all::resume_all;
use hebe_host::saved::SavedPaths;
use hebe_host::{saving, vmm};
use hebe_sys::clock::stamp_now;
use hebe_types::VmId;

use crate::kills::settle;
use crate::world::{PATIENCE, World, name};

pub const CASES: &[crate::Case] = &[
    ("a_restore_that_is_killed_at_any_step", restored),
    ("a_failing_restore_that_is_killed_at_any_step", undone),
    ("a_repeated_restore_that_is_killed_at_any_step", repeated),
];

/// What changes something that outlives the operator, or starts a process.
const STEPS: [libc::c_long; 12] = [
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_msync,
    libc::SYS_clone,
];

fn ptrace(request: libc::c_uint, pid: i32, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: the requests made here take a number at most; PEEKUSER reads a
    // word of the tracee at an offset in `libc::user`.
    let (address, data) = match request {
        libc::PTRACE_PEEKUSER => (data, 0),
        _ => (0, data),
    };
    // SAFETY: as above.
    match unsafe { libc::ptrace(request, pid, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    assert_eq!(waited, pid, "{}", io::Error::last_os_error());
    status
}

/// Gives the order, and kills whoever carries it out before step `number`;
/// gives whether there was such a step.
fn killed_before(root: &Path, order: &str, number: usize) -> bool {
    let mut command = Command::new(std::env::current_exe().expect("exe"));
    command.args(["--operate", order]).arg(root);
    // SAFETY: the call is async-signal-safe, and nothing else is done.
    unsafe {
        command.pre_exec(|| {
            ptrace(libc::PTRACE_TRACEME, 0, 0)?;
            Ok(())
        });
    }
    #[expect(clippy::zombie_processes, reason = "waited for by its tracer, below")]
    let child = command.spawn().expect("the operator starts");
    let pid = i32::try_from(child.id()).expect("pid");
    assert!(libc::WIFSTOPPED(wait(pid)), "it is traced");
    let options = (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as usize;
    ptrace(libc::PTRACE_SETOPTIONS, pid, options).expect("options");
    let call_at = std::mem::offset_of!(libc::user, regs)
        + std::mem::offset_of!(libc::user_regs_struct, orig_rax);
    let (mut entered, mut steps, mut signal) = (false, 0, 0);
    loop {
        ptrace(libc::PTRACE_SYSCALL, pid, signal).expect("on");
        let status = wait(pid);
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            return false;
        }
        let stop = libc::WSTOPSIG(status);
        if stop != libc::SIGTRAP | 0x80 {
            signal = usize::try_from(stop).unwrap_or(0);
            continue;
        }
        signal = 0;
        entered = !entered;
        let call = ptrace(libc::PTRACE_PEEKUSER, pid, call_at).expect("peek");
        if !entered || !STEPS.contains(&call) {
            continue;
        }
        if steps == number {
            // SAFETY: a plain system call on our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            while !libc::WIFSIGNALED(wait(pid)) {}
            return true;
        }
        steps += 1;
    }
}

/// VM `web`, which runs, and its id.
fn running() -> (World, VmId) {
    let world = World::new();
    world.start(&["web"]);
    let id = world.instance("web").expect("instance").vm;
    (world, id)
}

/// Saves it as a reboot does, and ends its VMM.
fn save(world: &World) {
    let web = name("web");
    saving::save_held(&world.host, &web, None).expect("saves");
    vmm::quit(&world.host, &web, Some(VmmState::Saved)).expect("quits");
    let wait = PATIENCE;
    drop(ops::wait_for_end(&world.host, &web, wait).expect("ends"));
    assert_eq!(world.state("web"), VmState::Saved);
}

fn fact(world: &World) -> Option<SavedFact> {
    SavedPaths::new(&world.host.layout, &name("web")).fact()
}

/// Whatever was killed: the VM runs, or is saved, and the next boot's order
/// makes it run without a person's choice.
fn comes_back(world: &World, id: VmId, when: &str) {
    settle(world);
    let state = world.state("web");
    assert!(
        matches!(state, VmState::Running | VmState::Saved),
        "{when}: {state:?}, {:?}",
        fact(world)
    );
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let result = &all.vms[&name("web")];
    assert!(!result.is_trouble(), "{when}: {result:?}");
    settle(world);
    assert_eq!(world.state("web"), VmState::Running, "{when}");
    assert_eq!(world.instance("web").expect("instance").vm, id, "{when}");
    assert_eq!(world.segments(), 1, "{when}");
}

fn restored() {
    let (world, id) = running();
    let mut steps = 0;
    loop {
        save(&world);
        let killed = killed_before(world.root.path(), "resume", steps);
        comes_back(&world, id, &format!("before step {steps}"));
        if !killed {
            break;
        }
        steps += 1;
    }
    assert!(steps > 8, "{steps}");
    assert_eq!(fact(&world), None, "the file is gone, for the VM ran");
}

fn undone() {
    let (world, id) = running();
    let mut steps = 0;
    loop {
        save(&world);
        world.tell("web", "fail-start");
        let killed = killed_before(world.root.path(), "resume", steps);
        settle(&world);
        assert_eq!(world.state("web"), VmState::Saved, "before step {steps}");
        world.tell("web", "");
        comes_back(&world, id, &format!("before step {steps}"));
        if !killed {
            break;
        }
        steps += 1;
    }
    assert!(steps > 8, "{steps}");
}

fn repeated() {
    let (world, id) = running();
    let mut steps = 0;
    loop {
        save(&world);
        let mut set_aside = 0;
        while !fact(&world).is_some_and(SavedFact::is_restoring) {
            let killed = killed_before(world.root.path(), "resume", set_aside);
            assert!(killed, "it was set aside, and the VM not started");
            set_aside += 1;
        }
        let killed = killed_before(world.root.path(), "again", steps);
        comes_back(&world, id, &format!("before step {steps} of the second"));
        if !killed {
            break;
        }
        steps += 1;
    }
    assert!(steps > 8, "{steps}");
}
