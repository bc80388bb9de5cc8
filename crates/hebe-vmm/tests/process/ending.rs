//! How a VMM ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Request, Response, VmmState};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest;
use crate::vmm::{Vmm, fifo};

/// Waits for a byte from the serial port and resets the machine by the
/// keyboard controller:
/// `mov dx,0x3fd; 1: in al,dx; test al,1; jz 1b; mov al,0xfe; out 0x64,al`.
pub const RESET_WHEN_TOLD: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd,
];

/// Tells by port 0x505 that its kernel panicked, and halts.
const PANICS: &[u8] = &[0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd];

fn signal(vmm: &Vmm, signal: Signal) {
    let pid = Pid::from_child(&vmm.child);
    kill_process(pid, signal).expect("kill");
}

#[test]
fn the_lock_is_held_until_the_end_is_on_record() {
    let dir = tempfile::tempdir().expect("dir");
    let record = dir.path().join("exit.json");
    fifo(&record);
    // A definition that is refused with more words than a FIFO takes at once:
    // its writer waits in the midst of the record.
    let mut vmm = Vmm::start(dir, &"?".repeat(1 << 20), |_| Vec::new());
    let mut reader = File::open(record).expect("the record is being written");
    let mut text = vec![0];
    reader.read_exact(&mut text).expect("its first byte");
    assert!(vmm.is_locked(), "the lock fell before the record was whole");
    reader.read_to_end(&mut text).expect("the rest");
    let record: serde_json::Value = serde_json::from_slice(&text).expect("whole");
    assert_eq!(record["reason"], "error");
    assert_eq!(record["ran"], false);
    assert!(!vmm.child.wait().expect("wait").success());
    assert!(!vmm.is_locked());
}

#[test]
fn a_panic_of_the_guest_is_on_record_when_its_vmm_ends() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = Vmm::run(PANICS, "pvpanic = true\n");
    let until = Instant::now() + Duration::from_secs(120);
    while !vmm.status().guest_panicked {
        assert!(Instant::now() < until, "nothing is told");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(vmm.log().contains("kernel panicked"));
    signal(&vmm, Signal::TERM);
    let (success, record) = vmm.wait();
    assert!(success);
    assert_eq!(record["reason"], "quit");
    let message = record["message"].to_string();
    assert!(message.contains("panicked"), "{record}");
}

#[test]
fn a_signal_powers_a_running_vm_off_and_is_on_record() {
    if guest::cannot_run() {
        return;
    }
    for number in [Signal::TERM, Signal::INT] {
        let mut vmm = Vmm::run(guest::IDLE, "");
        signal(&vmm, number);
        let (success, record) = vmm.wait();
        assert!(success, "{number:?}");
        assert_eq!(record["reason"], "quit");
        assert_eq!(record["ran"], true);
        assert!(record["message"].to_string().contains("signal"), "{record}");
    }
}

#[test]
fn a_signal_leaves_a_frozen_vm_frozen() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = Vmm::run(guest::IDLE, "");
    let frozen = vmm.ask(&Request::Freeze);
    assert!(matches!(frozen, Ok(Response::Frozen(_))), "{frozen:?}");
    signal(&vmm, Signal::TERM);
    let (success, record) = vmm.wait();
    assert!(success);
    assert_eq!(record["reason"], "frozen");
}

#[test]
fn a_signal_that_comes_before_the_vm_runs_keeps_it_from_running() {
    if guest::cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, guest::image(guest::IDLE)).expect("kernel");
    let (config, mut definition) = std::io::pipe().expect("pipe");
    let mut vmm = Vmm::start(dir, "", |command| {
        let config = OwnedFd::from(config);
        command.args(["--config-fd", &config.as_raw_fd().to_string()]);
        vec![config]
    });
    // From here on it waits for its definition.
    drop(vmm.connect());
    signal(&vmm, Signal::TERM);
    thread::sleep(Duration::from_millis(300));
    let kernel = kernel.display();
    write!(
        definition,
        "name = 'web'\nmemory = '8MiB'\nkernel = '{kernel}'\n"
    )
    .expect("write");
    drop(definition);
    let (success, record) = vmm.wait();
    assert!(!success);
    assert_eq!(record["ran"], false, "{record}");
    assert!(record["message"].to_string().contains("signal"), "{record}");
}

#[test]
fn a_guest_that_resets_boots_again_and_a_boot_that_fails_is_on_record() {
    if guest::cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let [real, link] = ["elsewhere", "vmlinuz"].map(|name| dir.path().join(name).join("kernel"));
    for path in [&real, &link] {
        std::fs::create_dir(path.parent().expect("parent")).expect("dir");
    }
    std::fs::write(&real, guest::image(RESET_WHEN_TOLD)).expect("kernel");
    std::os::unix::fs::symlink(&real, &link).expect("link");
    let config = format!(
        "name = 'web'\nmemory = '8MiB'\nkernel = '{}'\n",
        link.display()
    );
    let mut vmm = Vmm::start(dir, &config, |_| Vec::new());
    let reset = |vmm: &Vmm, times: usize| {
        let mut client = vmm.connect();
        let attached = client.call(&Request::Console);
        assert!(matches!(attached, Ok(Response::Done)), "{attached:?}");
        client.into_stream().write_all(b"!").expect("type");
        let until = Instant::now() + Duration::from_secs(120);
        while vmm.log().matches("reset by the guest").count() < times {
            assert!(Instant::now() < until, "no reset: {}", vmm.log());
            thread::sleep(Duration::from_millis(2));
        }
    };
    reset(&vmm, 1);
    assert_eq!(vmm.status().state, VmmState::Running);
    // What it boots from is open: names do not matter any more.
    std::fs::remove_file(&link).expect("remove");
    let moved = real.with_extension("old");
    std::fs::rename(&real, &moved).expect("rename");
    reset(&vmm, 2);
    assert_eq!(vmm.status().state, VmmState::Running);
    std::fs::write(moved, "none").expect("overwrite");
    reset(&vmm, 3);
    let (success, record) = vmm.wait();
    assert!(!success);
    assert_eq!(record["reason"], "error");
    let message = record["message"].to_string();
    assert!(message.contains("does not boot again"), "{message}");
    assert!(message.contains("kernel"), "{message}");
    assert!(vmm.log().contains("does not boot again"), "{}", vmm.log());
}
