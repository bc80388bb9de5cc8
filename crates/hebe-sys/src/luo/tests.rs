use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::fake::{FakeKernel, Fault};
use super::*;

fn memfd(pages: u64) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, pages * 4096).expect("ftruncate");
    fd
}

fn name(text: &str) -> SessionName {
    text.parse().expect("name")
}

#[test]
fn names_are_bounded() {
    for bad in ["", "a\0b", &"x".repeat(64)] {
        assert!(bad.parse::<SessionName>().is_err(), "{bad:?}");
    }
    assert!("x".repeat(63).parse::<SessionName>().is_ok());
}

#[test]
fn an_absent_device_is_explained() {
    let proc = tempfile::tempdir().expect("dir");
    let why = |misc: &str, cmdline: &str| {
        fs::write(proc.path().join("misc"), misc).expect("misc");
        fs::write(proc.path().join("cmdline"), cmdline).expect("cmdline");
        why_absent(proc.path())
    };
    let misc = "229 fuse\n122 liveupdate\n";
    assert!(matches!(why(misc, "quiet"), LuoError::NoNode));
    assert!(matches!(why("229 fuse\n", "quiet"), LuoError::NotOffered));
    assert!(matches!(
        why("", "kho=on quiet"),
        LuoError::NotEnabled("liveupdate=on")
    ));
    assert!(matches!(
        why("", "liveupdate=on"),
        LuoError::NotEnabled("kho=on")
    ));
    assert!(matches!(
        why("", "kho=on liveupdate=on\n"),
        LuoError::NotWorking
    ));
}

/// A device file that is there or not: `open` and `offered` agree on it.
#[test]
fn this_kernel_answers_in_a_sentence() {
    match (offered(), LiveUpdate::open()) {
        (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
        (Ok(()), Ok(_) | Err(LuoError::Taken | LuoError::NotPermitted(_))) => {}
        (offered, opened) => panic!("{offered:?} and {opened:?}"),
    }
}

#[test]
fn one_device_at_a_time_and_sessions_outlive_it() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("first");
    assert!(matches!(kernel.open(), Err(LuoError::Taken)));
    let session = device.create_session(&name("a")).expect("session");
    drop(device);
    let device = kernel.open().expect("again");
    assert!(matches!(
        device.create_session(&name("a")),
        Err(LuoError::SessionExists(_))
    ));
    session.preserve(memfd(1).as_fd(), Token(0)).expect("kept");
    assert_eq!(kernel.outgoing(), (1, 1));
    drop(session);
    assert_eq!(kernel.outgoing(), (0, 0), "closed: let go");
}

#[test]
fn preserving_follows_the_kernels_rules() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("open");
    let one = device.create_session(&name("one")).expect("one");
    let two = device.create_session(&name("two")).expect("two");
    let file = memfd(4);
    one.preserve(file.as_fd(), Token(7)).expect("kept");
    let stat = rustix::fs::fstat(&file).expect("stat");
    assert_eq!(stat.st_blocks * 512, 4 * 4096, "holes are filled");
    assert!(matches!(
        two.preserve(file.as_fd(), Token(1)),
        Err(LuoError::Preserved)
    ));
    assert!(matches!(
        one.preserve(memfd(1).as_fd(), Token(7)),
        Err(LuoError::TokenUsed(Token(7)))
    ));
    let null = File::open("/dev/null").expect("null");
    assert!(matches!(
        one.preserve(null.as_fd(), Token(8)),
        Err(LuoError::NotCarried)
    ));
    drop(one);
    two.preserve(file.as_fd(), Token(1)).expect("free again");
}

#[test]
fn a_file_comes_back_with_its_bytes_and_once_finished_no_more() {
    let kernel = FakeKernel::default();
    let old = kernel.open().expect("old");
    let session = old.create_session(&name("s")).expect("session");
    let file = memfd(3);
    session.preserve(file.as_fd(), Token(5)).expect("kept");
    rustix::io::pwrite(&file, b"later", 4096).expect("written after it was preserved");
    kernel.kexec();
    drop((session, old, file));
    let new = kernel.open().expect("new");
    let session = new.retrieve_session(&name("s")).expect("session");
    assert!(matches!(
        new.retrieve_session(&name("s")),
        Err(LuoError::SessionTaken(_))
    ));
    assert!(matches!(
        new.retrieve_session(&name("t")),
        Err(LuoError::NoSession(_))
    ));
    assert!(matches!(
        session.retrieve(Token(6)),
        Err(LuoError::NoToken(Token(6)))
    ));
    let back = session.retrieve(Token(5)).expect("back");
    session.retrieve(Token(5)).expect("the same once more");
    let mut text = [0; 5];
    rustix::io::pread(&back, &mut text, 4096).expect("read");
    assert_eq!(&text, b"later");
    session.finish().expect("finish");
    assert!(session.retrieve(Token(5)).is_err(), "finished");
    drop(session);
    rustix::io::pread(&back, &mut text, 4096).expect("the descriptor lives on");
}

#[test]
fn a_failed_retrieve_is_final() {
    let kernel = FakeKernel::default();
    let old = kernel.open().expect("old");
    let session = old.create_session(&name("s")).expect("session");
    for token in [1, 2] {
        session
            .preserve(memfd(1).as_fd(), Token(token))
            .expect("kept");
    }
    kernel.kexec();
    let new = kernel.open().expect("new");
    let session = new.retrieve_session(&name("s")).expect("session");
    kernel.arm(Fault::Retrieve("s".into(), 1), libc::EIO);
    let lost = |result| matches!(result, Err(LuoError::Lost { token: Token(1), source }) if source.raw_os_error() == Some(libc::EIO));
    assert!(lost(session.retrieve(Token(1))));
    kernel.disarm();
    assert!(lost(session.retrieve(Token(1))), "for ever");
    session
        .retrieve(Token(2))
        .expect("the other is not concerned");
}

#[test]
fn a_kernel_that_can_read_nothing_says_so() {
    let kernel = FakeKernel::default();
    kernel.arm(Fault::Deserialize, libc::EINVAL);
    kernel.kexec();
    assert!(matches!(kernel.open(), Err(LuoError::Unreadable)));
}

#[test]
#[should_panic(expected = "EPERM")]
fn a_preserved_file_must_not_shrink() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("open");
    let session = device.create_session(&name("s")).expect("session");
    let file = memfd(2);
    session.preserve(file.as_fd(), Token(0)).expect("kept");
    ftruncate(&file, 4096).expect("no kernel to refuse it");
    kernel.kexec();
}

#[test]
fn a_session_is_known_by_the_name_that_the_kernel_gives_it() {
    let named = |link: &str| super::named(link).map(|name| name.to_string());
    let link = "anon_inode:[luo_session] hebe.vm.000";
    assert_eq!(named(link).as_deref(), Some("hebe.vm.000"));
    for other in [
        "anon_inode:[luo_session]",
        "anon_inode:[luo_session] ",
        "anon_inode:[eventfd]",
        "/memfd:[luo_session] hebe.vm.000 (deleted)",
        "socket:[17]",
    ] {
        assert_eq!(named(other), None, "{other}");
    }
    let refused = adopt(memfd(1)).expect_err("a memfd");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_session_stands_as_long_as_anybody_has_it_open() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("old");
    let session = device.create_session(&name("a")).expect("made");
    session.preserve(memfd(1).as_fd(), Token(1)).expect("kept");
    let copy = session.descriptor().try_clone_to_owned().expect("copy");
    drop(session);
    assert_eq!(kernel.outgoing(), (1, 1), "somebody holds it still");
    let again = device.create_session(&name("a"));
    assert!(matches!(again, Err(LuoError::SessionExists(_))));
    drop(copy);
    assert_eq!(kernel.outgoing(), (0, 0));
}

#[test]
fn sessions_that_were_handed_over_come_first_and_once() {
    let kernel = FakeKernel::default();
    let device = kernel.open().expect("old");
    let sessions: Vec<_> = ["a", "b"]
        .map(|n| {
            let session = device.create_session(&name(n)).expect("made");
            session.preserve(memfd(1).as_fd(), Token(1)).expect("kept");
            session
        })
        .into();
    kernel.kexec();
    drop((device, sessions));
    // Somebody else gets one of them, and hands it over.
    let device = kernel.open().expect("new");
    let fd = device.retrieve_fd(&name("a")).expect("there");
    drop(device);
    let adopted = kernel.adopt(fd).expect("a session");
    assert_eq!(adopted.0, name("a"));
    let refused = kernel.adopt(memfd(1)).expect_err("none");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    let open = {
        let kernel = kernel.clone();
        move || Ok(Box::new(kernel.open()?) as Box<dyn Orchestrator>)
    };
    let handed = Handed::new([adopted], Box::new(open));
    let a = handed.retrieve_session(&name("a")).expect("handed over");
    a.retrieve(Token(1)).expect("its file");
    let again = handed.retrieve_session(&name("a"));
    assert!(matches!(again, Err(LuoError::SessionTaken(_))));
    // Nobody needed the device so far.
    drop(kernel.open().expect("free"));
    let b = handed.retrieve_session(&name("b")).expect("the kernel's");
    b.retrieve(Token(1)).expect("its file");
    for (missing, taken) in [("b", true), ("c", false)] {
        let error = handed.retrieve_session(&name(missing)).expect_err("none");
        assert_eq!(matches!(error, LuoError::SessionTaken(_)), taken);
    }
}

#[test]
fn what_was_not_handed_over_says_why_the_device_cannot_be_had() {
    let handed = Handed::new([], Box::new(|| Err(LuoError::Taken)));
    for _ in 0..2 {
        let refused = handed.retrieve_session(&name("a")).expect_err("taken");
        assert!(matches!(refused, LuoError::Taken));
    }
}
