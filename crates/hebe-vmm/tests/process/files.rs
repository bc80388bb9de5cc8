//! A VM whose RAM lies in files that its VMM holds.

use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{Request, Response, VmmState};
use hebe_store::ExecStatus;
use hebe_store::luo::SegmentFiles;
use hebe_sys::fdpass;
use hebe_types::{ByteSize, VmId};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest;
use crate::vmm::Vmm;

fn copies(files: &SegmentFiles) -> Vec<OwnedFd> {
    let copies = files.fds().map(|fd| fd.try_clone_to_owned());
    copies.collect::<Result<_, _>>().expect("copies")
}

fn handed_out(vmm: &Vmm) -> SegmentFiles {
    let mut client = vmm.connect();
    let answer = client.call(&Request::SegmentFiles).expect("files");
    let Response::SegmentFiles { count, spec } = answer else {
        panic!("{answer:?}");
    };
    let fds = fdpass::receive(&client.into_stream(), count).expect("descriptors");
    let spec = serde_json::from_str(&spec).expect("spec");
    SegmentFiles::from_fds(spec, fds).expect("its own files")
}

#[test]
fn a_vm_in_files_hands_them_out_and_does_not_let_them_go_while_it_is_frozen() {
    if guest::cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, guest::image(guest::IDLE)).expect("kernel");
    let kernel = kernel.display();
    let config = format!("name = 'web'\nmemory = '32MiB'\nkernel = '{kernel}'\n");
    let name = "web".parse().expect("name");
    let files = SegmentFiles::create(VmId([0x11; 16]), &name, ByteSize::mib(32)).expect("files");
    let given = copies(&files);
    assert_eq!(given.len(), 3, "execution state, and two parts");
    let vmm = Vmm::start(dir, &config, |command| {
        for fd in &given {
            command.args(["--segment-fd", &fd.as_raw_fd().to_string()]);
        }
        let spec = serde_json::to_string(files.spec()).expect("spec");
        command.args(["--segment", &spec]);
        given
    });
    assert_eq!(vmm.status().state, VmmState::Running);
    let out = handed_out(&vmm);
    assert!(out.is_held().expect("look"), "its VMM has it mapped");
    let status = out.status().expect("status");
    assert!(matches!(status, ExecStatus::Running { .. }), "{status:?}");
    let frozen = vmm.ask(&Request::Freeze);
    assert!(matches!(frozen, Ok(Response::Frozen(_))), "{frozen:?}");
    // The very same memory, and nobody but the VMM keeps it.
    let status = out.status().expect("status");
    assert!(matches!(status, ExecStatus::Frozen { .. }), "{status:?}");
    let expected = Some(VmmState::Frozen);
    let refused = vmm.ask(&Request::Quit { expected }).expect_err("refused");
    assert!(
        refused.to_string().contains("ends with its VMM"),
        "{refused}"
    );
    assert_eq!(vmm.status().state, VmmState::Frozen);
    // Nor does a signal, however often it comes.
    for number in [Signal::TERM, Signal::INT, Signal::TERM] {
        let pid = Pid::from_child(&vmm.child);
        kill_process(pid, number).expect("kill");
    }
    let until = Instant::now() + Duration::from_secs(120);
    while !vmm.log().contains("SIGTERM is not obeyed") {
        assert!(Instant::now() < until, "not a word: {}", vmm.log());
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(vmm.status().state, VmmState::Frozen);
    let thawed = vmm.ask(&Request::Thaw);
    assert!(matches!(thawed, Ok(Response::Done)), "{thawed:?}");
    assert_eq!(vmm.status().state, VmmState::Running);
}

#[test]
fn a_vm_without_files_of_its_own_has_none_to_hand_out() {
    if guest::cannot_run() {
        return;
    }
    let vmm = Vmm::run(guest::IDLE, "");
    let refused = vmm.ask(&Request::SegmentFiles).expect_err("refused");
    assert!(
        refused.to_string().contains("no files of its own"),
        "{refused}"
    );
    assert_eq!(vmm.status().state, VmmState::Running);
}
