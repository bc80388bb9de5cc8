//! A VM with which KVM cannot go on.

use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{ClientError, Request, Response, VmmState};

use crate::guest;
use crate::vmm::Vmm;

/// Jumps to where there is no memory: `mov eax,0xd8000000; jmp eax`.
const JUMP_TO_NOWHERE: &[u8] = &[0xb8, 0x00, 0x00, 0x00, 0xd8, 0xff, 0xe0];

/// A VMM whose VM failed.
fn failed() -> Vmm {
    let vmm = Vmm::start_guest(JUMP_TO_NOWHERE, "");
    let until = Instant::now() + Duration::from_secs(120);
    while vmm.status().failed.is_none() {
        assert!(Instant::now() < until, "it did not fail: {}", vmm.log());
        thread::sleep(Duration::from_millis(2));
    }
    vmm
}

#[test]
fn a_vm_that_kvm_gives_up_stands_still_says_why_and_runs_no_more() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = failed();
    let status = vmm.status();
    assert_eq!(status.state, VmmState::Paused);
    let why = status.failed.expect("why");
    assert!(vmm.is_locked());
    for request in [Request::Unpause, Request::Freeze, Request::Thaw] {
        match vmm.ask(&request) {
            Err(ClientError::Refused(text)) => {
                assert!(text.contains(&why) && text.contains("hebe stop"), "{text}");
            }
            other => panic!("{request:?}: {other:?}"),
        }
    }
    let ended = vmm.ask(&Request::Quit { expected: None });
    assert!(matches!(ended, Ok(Response::Done)), "{ended:?}");
    assert_eq!(vmm.wait().1["reason"], "quit");
}

#[test]
fn the_power_button_ends_a_vm_that_failed() {
    if guest::cannot_run() {
        return;
    }
    let mut vmm = failed();
    let pressed = vmm.ask(&Request::PowerButton);
    assert!(matches!(pressed, Ok(Response::Done)), "{pressed:?}");
    let (success, record) = vmm.wait();
    assert!(success);
    assert_eq!(record["reason"], "quit");
}
