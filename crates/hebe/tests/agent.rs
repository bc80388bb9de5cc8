//! `hebe agent NAME exec` and `wait`, with a VM that is none: a lock that is held,
//! and a socket behind which an agent serves.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hebe_agent::guest::Guest;
use hebe_agent::{Facts, Limits, Said, converse};
use hebe_host::lock::VmLock;
use serde_json::Value;

/// It runs programs, which are this machine's, and is at a phase.
#[derive(Clone, Default)]
struct Nobody(Arc<Mutex<String>>);

impl Guest for Nobody {
    fn facts(&self) -> Facts {
        Facts {
            phase: self.0.lock().expect("phase").clone(),
            ..Facts::default()
        }
    }
    fn set_time(&self, _: u64) -> io::Result<i64> {
        Err(io::Error::other("not asked"))
    }
    fn freeze(&self, _: Duration) -> Result<u32, String> {
        Err("not asked".into())
    }
    fn thaw(&self) -> Result<u32, String> {
        Err("not asked".into())
    }
    fn shut_down(&self, _: bool) -> io::Result<()> {
        Err(io::Error::other("not asked"))
    }
}

/// A VM named `web` that seems to be up.
struct Vm {
    root: tempfile::TempDir,
    guest: Nobody,
    _lock: VmLock,
}

impl Vm {
    /// Nobody answers at its socket but who takes connections from there.
    fn with_listener() -> (Self, UnixListener) {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("run/vms/web");
        let lock = VmLock::take(&dir).expect("lock").expect("free");
        let listener = UnixListener::bind(dir.join("vsock.sock")).expect("socket");
        let vm = Self {
            root,
            guest: Nobody::default(),
            _lock: lock,
        };
        (vm, listener)
    }

    fn with_agent(exec: bool) -> Self {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("run/vms/web");
        let lock = VmLock::take(&dir).expect("lock").expect("free");
        let guest = Nobody::default();
        let own = guest.clone();
        let listener = UnixListener::bind(dir.join("vsock.sock")).expect("socket");
        let limits = Limits {
            exec,
            ..Limits::default()
        };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut line = String::new();
                let mut asked = BufReader::new(stream);
                asked.read_line(&mut line).expect("a line");
                assert_eq!(line, "CONNECT 18501\n");
                let mut stream = asked.into_inner();
                stream.write_all(b"OK 1024\n").expect("answer");
                let guest = own.clone();
                thread::spawn(move || converse(stream, &guest, limits));
            }
        });
        Self {
            root,
            guest,
            _lock: lock,
        }
    }

    fn hebe(&self, arguments: &[&str]) -> Output {
        self.order("exec", arguments).output().expect("hebe runs")
    }

    fn order(&self, order: &str, arguments: &[&str]) -> Command {
        let root: &Path = self.root.path();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hebe"));
        command
            .args(["agent", "web", order])
            .args(arguments)
            .env("HEBE_RUN_DIR", root.join("run"))
            .env("HEBE_CONFIG_DIR", root.join("etc"))
            .env("HEBE_STATE_DIR", root.join("state"))
            .env("HEBE_STORE", root.join("store"))
            .stdin(Stdio::null());
        command
    }

    fn is_at(&self, phase: &str) {
        *self.guest.0.lock().expect("phase") = phase.to_owned();
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[test]
fn a_programs_outputs_and_its_end_are_passed_on() {
    let vm = Vm::with_agent(true);
    let script = "echo \"$@\"; printf 'a\\033[2Jb' >&2; exit 7";
    let output = vm.hebe(&["--", "sh", "-c", script, "-", "--json", "a  b"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(text(&output.stdout), "--json a  b\n");
    // No terminal: as it came.
    assert_eq!(text(&output.stderr), "a\u{1b}[2Jb");
    // Without the two dashes, too.
    let output = vm.hebe(&["true", "--json"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), ""),
        "{output:?}"
    );
}

#[test]
fn json_has_the_outputs_whole_and_cannot_steer() {
    let vm = Vm::with_agent(true);
    let script = "printf 'a\\nb\\302\\233'; echo e >&2; exit 3";
    let output = vm.hebe(&["--json", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(3));
    let said = text(&output.stdout);
    assert!(!said.contains('\u{9b}'), "{said:?}");
    let value: Value = serde_json::from_str(said).expect("JSON");
    assert_eq!(
        value,
        serde_json::json!({
            "name": "web",
            "ended": {"status": 3, "stdout": "a\nb\u{9b}", "stderr": "e\n", "cut": false},
        })
    );
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn what_did_not_run_or_end_is_told_and_has_a_status_of_its_own() {
    let vm = Vm::with_agent(true);
    for (arguments, wanted) in [
        (["--timeout", "1", "sleep", "100"].as_slice(), "--timeout"),
        (&["--", "/no/such/program"], "cannot be run"),
        (&["--", "sh", "-c", "kill -9 $$"], "signal"),
        (&["--", "echo", &"x".repeat(9000)], "8192"),
    ] {
        let output = vm.hebe(arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(255), "{told}");
        assert!(told.contains(wanted) && told.lines().count() == 1, "{told}");
    }
    let output = vm.hebe(&["--", "head", "-c", "40000", "/dev/zero"]);
    assert_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(0), 16384)
    );
    assert!(text(&output.stderr).contains("not all"), "{output:?}");
}

#[test]
fn where_programs_are_not_run_it_is_said_how_they_would_be() {
    let vm = Vm::with_agent(false);
    let output = vm.hebe(&["--json", "--", "true"]);
    assert_eq!(output.status.code(), Some(255));
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let why = value["error"].as_str().expect("a sentence");
    assert!(why.contains("--allow-exec"), "{why}");
    // A VM that is not up has no agent.
    let root = vm.root.path();
    fs::create_dir_all(root.join("run/vms/gone")).expect("mkdir");
    let output = Command::new(env!("CARGO_BIN_EXE_hebe"))
        .args(["agent", "gone", "exec", "true"])
        .env("HEBE_RUN_DIR", root.join("run"))
        .env("HEBE_CONFIG_DIR", root.join("etc"))
        .env("HEBE_STATE_DIR", root.join("state"))
        .env("HEBE_STORE", root.join("store"))
        .output()
        .expect("hebe runs");
    assert_eq!(output.status.code(), Some(255));
    assert!(text(&output.stderr).contains("does not run"), "{output:?}");
}

/// A VM that is suspended while a program runs in it: nobody knows what came of that.
#[test]
fn a_program_whose_end_is_not_heard_of_may_have_run() {
    let (vm, listener) = Vm::with_listener();
    let agent = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        let mut asked = BufReader::new(stream);
        let mut line = String::new();
        asked.read_line(&mut line).expect("a line");
        let facts = Facts {
            protocol: hebe_agent::PROTOCOL,
            ..Facts::default()
        };
        let hello = serde_json::to_string(&Said::Hello(facts)).expect("JSON");
        let said = format!("OK 1024\n{hello}\n");
        let stream = asked.get_mut();
        stream.write_all(said.as_bytes()).expect("answer");
        line.clear();
        asked.read_line(&mut line).expect("an order");
        line
    });
    let output = vm.hebe(&["--timeout", "7", "true"]);
    assert!(agent.join().expect("no panic").contains("exec"));
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(255), "{told}");
    assert!(told.contains("may run on, for 7 s"), "{told}");
}

#[test]
fn a_phase_is_waited_for_and_what_is_there_instead_is_told() {
    let vm = Vm::with_agent(false);
    vm.is_at("up");
    let late = vm.order("wait", &["--timeout", "1"]).output();
    let late = late.expect("hebe runs");
    let told = text(&late.stderr);
    assert_eq!(late.status.code(), Some(1), "{told}");
    assert!(
        told.contains("'up'") && told.contains("--timeout"),
        "{told}"
    );
    // It comes while it is waited for.
    let mut command = vm.order("wait", &["--json", "--timeout", "300"]);
    let waiting = command.stdout(Stdio::piped()).spawn().expect("hebe runs");
    thread::sleep(Duration::from_millis(300));
    vm.is_at("ready");
    let output = waiting.wait_with_output().expect("hebe ends");
    assert!(output.status.success(), "{output:?}");
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["facts"]["phase"], "ready", "{value}");
    // It is there already.
    let output = vm.order("wait", &[]).output().expect("hebe runs");
    assert!(text(&output.stdout).contains("ready"), "{output:?}");
}

/// A guest that has not come to start its agent, or whose VMM hangs up.
#[test]
fn an_agent_that_does_not_answer_yet_is_waited_for() {
    let (vm, listener) = Vm::with_listener();
    vm.is_at("ready");
    let mut waiting = vm.order("wait", &["--timeout", "300"]);
    let mut waiting = waiting.spawn().expect("hebe runs");
    // Twice nobody listens in the guest.
    for _ in 0..2 {
        drop(listener.accept().expect("a connection"));
    }
    let (stream, _) = listener.accept().expect("a connection");
    let mut asked = BufReader::new(stream);
    asked.read_line(&mut String::new()).expect("a line");
    let mut stream = asked.into_inner();
    stream.write_all(b"OK 1024\n").expect("answer");
    let guest = vm.guest.clone();
    thread::spawn(move || converse(stream, &guest, Limits::default()));
    let began = Instant::now();
    while waiting.try_wait().expect("wait").is_none() {
        assert!(began.elapsed() < Duration::from_secs(180), "it waits on");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(waiting.wait().expect("ended").success());
}
