//! A guest that owns its VMM: what code inside the cage can do.
//!
//! This program starts itself again, as an inmate that enters the cage by the
//! very function that `hebe-vmm` calls, and then tries to break out, each time
//! in another way.

mod attempts;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use attempts::{ATTEMPTS, End, Open};
use hebe_vmm::cage::{EXIT_STATUS, Wish, enter};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// Which attempt the inmate makes.
const TRY: &str = "CAGE_TEST_TRY";
/// The name of what is no attempt: to have a cage, or not to run.
const DEMANDED: &str = "demanded";
/// The same, and nobody limits the process.
const UNLIMITED: &str = "demanded, without limits";
/// Its room.
const ROOM: &str = "CAGE_TEST_ROOM";

/// Who started it.
pub const PARENT: &str = "CAGE_TEST_PARENT";

/// Makes the attempt in a process of its own; in the cage, if `caged`.
fn run(attempt: &str, room: &Path, caged: bool) -> Output {
    let this = std::env::current_exe().expect("this program");
    let mut command = Command::new(this);
    command.args(["--exact", "every_attempt_works_outside_the_cage"]);
    command.args(["--nocapture", "--test-threads=1"]);
    command
        .env(TRY, attempt)
        .env("CAGE_TEST_CAGED", if caged { "yes" } else { "no" });
    command.env(PARENT, std::process::id().to_string());
    command.env(ROOM, room).output().expect("start")
}

/// Whether this is an inmate.
pub fn is_caged() -> bool {
    std::env::var_os("CAGE_TEST_CAGED").is_some_and(|v| v == "yes")
}

/// What the inmate does; returns if this process is none.
fn be_inmate() {
    let (Some(name), Some(dir)) = (std::env::var_os(TRY), std::env::var_os(ROOM)) else {
        return;
    };
    if name == DEMANDED {
        give_capabilities_up();
        demand("on as far as is known");
    }
    if name == UNLIMITED {
        demand("off nobody has control groups");
    }
    let attempt = ATTEMPTS.iter().find(|a| *a.name == *name).expect("known");
    let dir = Path::new(&dir);
    let open = Open::before_the_cage(dir).expect("open");
    if is_caged() {
        let cage = enter(Wish::On, Some(&b"off no control groups"[..])).expect("not demanded");
        eprintln!("cage: {cage}");
    }
    match (attempt.make)(dir, &open) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("refused: {error}");
            std::process::exit(1)
        }
    }
}

/// Without capabilities there are no namespaces.
fn give_capabilities_up() {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).expect("given up");
}

fn demand(word: &str) -> ! {
    match enter(Wish::Required, Some(word.as_bytes())) {
        Ok(cage) => eprintln!("whole: {cage}"),
        Err(error) => eprintln!("refused: {error}"),
    }
    std::process::exit(0)
}

fn room() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("dir");
    fs::create_dir(dir.path().join("own")).expect("own");
    fs::create_dir(dir.path().join("other")).expect("other");
    fs::write(dir.path().join("other/disk.img"), "another VM's").expect("disk");
    dir
}

/// The control: an attempt that fails anyhow would prove nothing.
#[test]
fn every_attempt_works_outside_the_cage() {
    be_inmate();
    for attempt in ATTEMPTS.iter().filter(|a| a.works_outside) {
        let room = room();
        let output = run(attempt.name, room.path(), false);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{}: {said}", attempt.name);
    }
}

#[test]
fn no_attempt_works_inside_the_cage_and_what_a_vmm_does_still_does() {
    for attempt in ATTEMPTS {
        let room = room();
        let output = run(attempt.name, room.path(), true);
        let said = String::from_utf8_lossy(&output.stderr);
        let name = attempt.name;
        assert_eq!(output.status.signal(), None, "{name}: {said}");
        match attempt.end {
            End::Works => assert_eq!(output.status.code(), Some(0), "{name}: {said}"),
            End::Denied => {
                assert_eq!(output.status.code(), Some(1), "{name}: {said}");
                assert!(said.contains("Permission denied"), "{name}: {said}");
            }
            End::Absent => {
                assert_eq!(output.status.code(), Some(1), "{name}: {said}");
                assert!(said.contains("not implemented"), "{name}: {said}");
            }
            End::Killed(call) => {
                assert_eq!(output.status.code(), Some(EXIT_STATUS), "{name}: {said}");
                let word = format!("killed by its cage: it made system call {call},");
                assert!(said.contains(&word), "{name}: {said}");
            }
        }
        let theirs = fs::read(room.path().join("other/disk.img")).expect("disk");
        assert_eq!(theirs, b"another VM's", "{name}");
    }
}

#[test]
fn a_cage_that_is_demanded_and_cannot_be_whole_is_refused() {
    let room = room();
    let output = run(DEMANDED, room.path(), true);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("refused: the VM does not run"), "{said}");
    assert!(
        said.contains("namespaces: ") && said.contains("host.toml"),
        "{said}"
    );
}

#[test]
fn a_cage_that_is_demanded_and_has_no_limits_is_refused() {
    let room = room();
    let output = run(UNLIMITED, room.path(), true);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let why = "refused: the VM does not run";
    assert!(said.contains(why), "{said}");
    assert!(said.contains("nobody has control groups"), "{said}");
}
