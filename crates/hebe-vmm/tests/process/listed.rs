//! How `hebe list` sees a real VMM that its cage killed.

use std::fs;
use std::io::{self, Write};
use std::mem::offset_of;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hebe_host::listing::{self, VmState};
use hebe_host::lock::VmLock;
use hebe_host::ops::{self, StopOptions};
use hebe_host::stores::DeviceStore;
use hebe_host::system::Machine;
use hebe_host::{Host, Layout};
use hebe_types::VmName;
use rustix::process::{Pid, Signal, kill_process};

use crate::guest;

/// A host below `root`, with this very `hebe-vmm`.
fn host(root: &Path) -> Host {
    let mut layout = Layout::below(root);
    layout.vmm = env!("CARGO_BIN_EXE_hebe-vmm").into();
    Host {
        layout,
        store: Arc::new(DeviceStore::new(None)),
        system: Arc::new(Machine::default()),
    }
}

/// Starts VM `web` as an operator does; gives its VMM's process.
fn start(host: &Host, name: &VmName) -> u32 {
    let dir = host.layout.config.join("vms");
    fs::create_dir_all(&dir).expect("mkdir");
    let kernel = dir.join("kernel");
    fs::write(&kernel, guest::image(guest::IDLE)).expect("kernel");
    let kernel = kernel.display();
    let text = format!("name = 'web'\nmemory = '8MiB'\nstore = 'memfd'\nkernel = '{kernel}'\n");
    fs::write(dir.join("web.toml"), text).expect("definition");
    ops::start(host, name).expect("starts").pid
}

fn wait_for_end(host: &Host, name: &VmName) {
    let until = Instant::now() + Duration::from_secs(120);
    while VmLock::is_held(&host.layout.vm_dir(name)) {
        assert!(Instant::now() < until, "its VMM lives");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What `hebe list` shows of it.
fn listed(host: &Host, name: &VmName) -> (VmState, String) {
    let survey = listing::survey(host);
    let row = &survey.rows[name];
    (row.state, row.detail.clone().unwrap_or_default())
}

/// What it shows of one that ended, when whoever waits for its process has noted
/// how: that is after its lock has fallen.
fn listed_with(word: &str, host: &Host, name: &VmName) -> (VmState, String) {
    wait_for_end(host, name);
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let (state, why) = listed(host, name);
        if why.contains(word) {
            return (state, why);
        }
        assert!(Instant::now() < until, "no word of {word}: {why}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ptrace(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: every caller passes what the request takes; the tracee is
    // another process, and what is written here is a plain struct of ours.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn wait_for_stop(thread: i32) {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    assert_eq!(waited, thread, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status), "{status:#x}");
}

/// Has a thread of another process make `call` instead of the system call
/// that it makes next: what a guest would have it do that took it over.
fn make_it_call(thread: i32, call: libc::c_long, wake: impl FnOnce()) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, thread, 0, 0)?;
    ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
    wait_for_stop(thread);
    ptrace(libc::PTRACE_SYSCALL, thread, 0, 0)?;
    wake();
    wait_for_stop(thread);
    let number = offset_of!(libc::user, regs) + offset_of!(libc::user_regs_struct, orig_rax);
    ptrace(libc::PTRACE_POKEUSER, thread, number, call as usize)?;
    ptrace(libc::PTRACE_DETACH, thread, 0, 0)
}

/// The thread that waits for connections.
fn accept_thread(pid: u32) -> i32 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("tasks");
    let named = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "accept")
    };
    let task = tasks.flatten().find(named).expect("a thread that accepts");
    let id = task.file_name().into_string().expect("a number");
    id.parse().expect("a number")
}

#[test]
fn a_vmm_that_its_cage_killed_is_listed_with_that_word() {
    if guest::cannot_run() {
        return;
    }
    let root = tempfile::tempdir().expect("dir");
    let host = host(root.path());
    let name: VmName = "web".parse().expect("name");
    let pid = start(&host, &name);
    assert_eq!(listed(&host, &name).0, VmState::Running);
    let socket = host.layout.socket(&name);
    let wake = || drop(UnixStream::connect(&socket));
    if let Err(error) = make_it_call(accept_thread(pid), libc::SYS_socket, wake) {
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
        let line = "skipped here: a test that traces a process: not permitted (runs in CI)";
        let _ = writeln!(io::stderr(), "{line}");
        let force = StopOptions {
            timeout: Duration::ZERO,
            force: true,
        };
        return ops::stop(&host, &name, force).expect("stops");
    }
    let (state, why) = listed_with("cage", &host, &name);
    assert_eq!(state, VmState::Crashed, "{why}");
    let word = format!(
        "killed by its cage: it made system call {}",
        libc::SYS_socket
    );
    assert!(why.starts_with(&word), "{why}");
    // It can be booted anew.
    start(&host, &name);
    assert_eq!(listed(&host, &name).0, VmState::Running);
    ops::drop_vm(&host, &name).expect_err("it runs");
    let force = StopOptions {
        timeout: Duration::ZERO,
        force: true,
    };
    ops::stop(&host, &name, force).expect("stops");
}

#[test]
fn a_vmm_that_somebody_ended_by_the_cages_signal_is_not_said_to_have_made_a_call() {
    if guest::cannot_run() {
        return;
    }
    let root = tempfile::tempdir().expect("dir");
    let host = host(root.path());
    let name: VmName = "web".parse().expect("name");
    let pid = start(&host, &name);
    let pid = Pid::from_raw(pid as i32).expect("pid");
    kill_process(pid, Signal::SYS).expect("kill");
    let (state, why) = listed_with("SIGSYS", &host, &name);
    assert_eq!(state, VmState::Crashed, "{why}");
    assert!(!why.contains("system call"), "{why}");
}
