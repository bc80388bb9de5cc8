use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use super::fake::FakeManager;
use super::*;

fn manager(max: usize) -> (tempfile::TempDir, FakeManager) {
    let dir = tempfile::tempdir().expect("dir");
    let manager = FakeManager::new(&dir.path().join("notify"), max);
    (dir, manager)
}

#[test]
fn what_is_put_is_held_until_it_is_removed() {
    let (_dir, manager) = manager(8);
    let (a, b) = (
        tempfile::tempfile().expect("a"),
        tempfile::tempfile().expect("b"),
    );
    manager.put("hebe.vm.000", a.as_fd()).expect("put");
    manager.put("hebe.vm.001", b.as_fd()).expect("put");
    manager.settle().expect("done");
    assert_eq!(manager.held().expect("count"), 2);
    assert_eq!(manager.names(), ["hebe.vm.000", "hebe.vm.001"]);
    manager.remove("hebe.vm.000").expect("remove");
    manager.settle().expect("done");
    assert_eq!(manager.names(), ["hebe.vm.001"]);
    let passed = manager.pass();
    assert_eq!(passed[0].0, "hebe.vm.001");
    assert!(passed[0].1.as_raw_fd() >= 0);
}

#[test]
fn a_full_store_says_nothing_and_the_count_shows_it() {
    let (_dir, manager) = manager(1);
    for name in ["a", "b"] {
        let file = tempfile::tempfile().expect("file");
        manager.put(name, file.as_fd()).expect("no answer");
    }
    manager.settle().expect("done");
    assert_eq!(manager.held().expect("count"), 1);
}

#[test]
fn a_name_may_be_abstract_and_nobody_there_is_an_error() {
    let name = format!("hebe-fdstore-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("address");
    let listener = UnixDatagram::bind_addr(&address).expect("bind");
    let notify = Notify::connect(OsStr::new(&format!("@{name}"))).expect("connects");
    notify.remove("a").expect("said");
    let mut words = [0; 64];
    let length = listener.recv(&mut words).expect("heard");
    assert_eq!(&words[..length], b"FDSTOREREMOVE=1\nFDNAME=a");
    // Nobody closes the barrier's end.
    let late = notify.settle(Duration::from_millis(20)).expect_err("late");
    assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    assert!(Notify::connect(OsStr::new("/no/such/socket")).is_err());
}

/// In the process that the test below starts: takes what it was given.
fn take() {
    // SAFETY: numbers 3 and 4 are what this process's shell opened, which is
    // checked by what the test expects; and it runs this one test.
    let given = unsafe { Given::take() };
    let names: Vec<&str> = given.fds.iter().map(|(name, _)| name.as_str()).collect();
    let left = VARIABLES.iter().filter(|key| env::var_os(key).is_some());
    println!("given {names:?} {:?} left {}", given.notify, left.count());
}

#[test]
fn descriptors_come_with_their_names_and_only_to_the_process_they_are_for() {
    const CHILD: &str = "HEBE_TAKE_GIVEN";
    if env::var_os(CHILD).is_some() {
        return take();
    }
    let me = std::env::current_exe().expect("exe");
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("file");
    File::create(&file).expect("create");
    let this =
        "fdstore::tests::descriptors_come_with_their_names_and_only_to_the_process_they_are_for";
    let run = |pid: &str| {
        let variables = format!(
            "LISTEN_PID={pid} LISTEN_FDS=2 LISTEN_FDNAMES=hebe.host:hebe.vm.000 NOTIFY_SOCKET=/n {CHILD}=1"
        );
        let script = format!(
            "exec 3<{0} 4<{0}; {variables} exec {1} --exact {this} --nocapture --test-threads=1",
            file.display(),
            me.display()
        );
        let output = Command::new("/bin/sh").args(["-c", &script]).output();
        String::from_utf8_lossy(&output.expect("runs").stdout).into_owned()
    };
    let ours = run("$$");
    assert!(
        ours.contains(r#"given ["hebe.host", "hebe.vm.000"] Some("/n") left 0"#),
        "{ours}"
    );
    let others = run("1");
    assert!(others.contains(r#"given [] Some("/n") left 0"#), "{others}");
}
