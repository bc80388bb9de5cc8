//! VMs that the daemon starts by itself.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hebe_host::listing::VmState;
use hebe_host::ops::{self, StopOptions};
use serde_json::json;

use crate::world::{PATIENCE, World, kill, name};

pub const CASES: &[crate::Case] = &[
    ("vms_start_with_the_host_in_order_and_once", autostart),
    (
        "a_vm_that_fails_is_started_again_and_one_that_is_stopped_is_not",
        restart,
    ),
    ("a_new_daemon_adopts_what_runs_and_what_is_frozen", adoption),
    (
        "a_daemon_starts_what_serves_the_network_when_it_is_gone",
        network_helper,
    ),
];

/// Stands beside the daemon in place of `hebe`: serves nothing, and says and holds
/// what the process that serves networks does.
const HELPER: &str = r#"#!/bin/sh
exec 9>>"$HEBE_RUN_DIR/net/helper"
flock --nonblock 9 || exit 1
echo $$ >> "$HEBE_RUN_DIR/helpers"
echo ready
exec sleep 600
"#;

fn ran(world: &World) -> Vec<String> {
    let text = fs::read_to_string(world.root.path().join("fake/events")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn autostart() {
    let world = World::new();
    world.define("app", "autostart = true\nafter = [\"db\", \"cache\"]");
    world.define("db", "autostart = true\nafter = [\"cache\"]");
    world.define("cache", "autostart = true");
    world.define("other", "");
    world.define("unlucky", "autostart = true");
    world.tell("unlucky", "fail-start");
    let daemon = world.daemon();
    for vm in ["app", "db", "cache"] {
        world.until(vm, VmState::Running);
    }
    assert_eq!(ran(&world), ["cache runs", "db runs", "app runs"]);
    assert_eq!(world.state("other"), Some(VmState::Stopped));
    assert!(
        world.log().contains("unlucky: it was not started: "),
        "{}",
        world.log()
    );
    // What an operator stops stays down, whatever becomes of the daemon.
    assert_eq!(daemon.order("/v1/vms/db/stop", "")["state"], "done");
    daemon.kill();
    let stop = StopOptions {
        timeout: PATIENCE,
        force: true,
    };
    ops::stop(&world.host, &name("cache"), stop).expect("stops");
    let daemon = world.daemon();
    daemon.get("/v1/vms");
    thread::sleep(Duration::from_millis(500));
    assert_eq!(world.state("db"), Some(VmState::Stopped));
    assert_eq!(world.state("cache"), Some(VmState::Stopped));
    assert_eq!(world.state("app"), Some(VmState::Running));
}

fn restart() {
    let world = World::new();
    world.define("web", "restart = \"on-failure\"\nrestart_limit = 2");
    world.define("plain", "");
    let daemon = world.daemon();
    for vm in ["web", "plain"] {
        let done = daemon.order(&format!("/v1/vms/{vm}/start"), "");
        assert_eq!(done["state"], "done", "{done}");
    }
    let first = world.pid("web").expect("up");
    world.crash("plain");
    world.crash("web");
    world.until("web", VmState::Running);
    daemon.settled();
    assert_ne!(world.pid("web"), Some(first));
    assert_eq!(world.state("plain"), Some(VmState::Crashed));
    let supervision = daemon.get("/v1/vms/web").json()["supervision"].clone();
    assert_eq!(supervision["restarts"], 1, "{supervision}");
    // Another daemon goes on counting.
    daemon.kill();
    let daemon = world.daemon();
    world.crash("web");
    world.until("web", VmState::Running);
    daemon.settled();
    world.crash("web");
    let vm = daemon.until("/v1/vms/web", |vm| {
        vm["supervision"]["given_up"] == json!(true)
    });
    assert_eq!(vm["state"], "crashed", "{vm}");
    // A person starts it, and stops it: it stays down.
    assert_eq!(daemon.order("/v1/vms/web/start", "")["state"], "done");
    assert_eq!(daemon.order("/v1/vms/web/stop", "")["state"], "done");
    thread::sleep(Duration::from_millis(1500));
    let vm = daemon.get("/v1/vms/web").json();
    assert_eq!(vm["state"], "stopped", "{vm}");
    assert_eq!(vm["supervision"]["restarts"], 0, "{vm}");
}

/// In a network of the daemon's own; says so where it cannot have one.
fn network_helper() {
    for (program, words) in [
        ("unshare", &["--net", "true"][..]),
        ("nft", &["--version"]),
        ("flock", &["--version"]),
    ] {
        let there = Command::new(program).args(words).output();
        if !there.is_ok_and(|output| output.status.success()) {
            let why = format!("skipped: networks of VMs: no {program} for this user\n");
            return io::stderr().write_all(why.as_bytes()).expect("stderr");
        }
    }
    let world = World::new();
    let bin = world.root.path().join("bin");
    fs::create_dir(&bin).expect("mkdir");
    // Beside its own program it looks for the other.
    // By another process: what this one has open to write, a child that another test
    // has forked may have open still, and no such file can be run.
    let text = world.root.path().join("helper");
    fs::write(&text, HELPER).expect("write");
    let hebed = Path::new(env!("CARGO_BIN_EXE_hebed"));
    for (from, to) in [(hebed, "hebed"), (&text, "hebe")] {
        let copied = Command::new("cp").arg(from).arg(bin.join(to)).status();
        assert!(copied.expect("cp runs").success());
    }
    fs::set_permissions(bin.join("hebe"), Permissions::from_mode(0o755)).expect("chmod");
    let mut apart = Command::new("unshare");
    apart.arg("--net").arg(bin.join("hebed"));
    // Ended after the daemon, which would start another.
    let helpers = Helpers(world.host.layout.run.join("helpers"));
    let daemon = world.daemon_of(world.command_by(apart));
    world.define("web", "[[net]]\nnetwork = \"nat\"");
    let started = daemon.order("/v1/vms/web/start", "");
    assert_eq!(started["state"], "done", "{started}: {}", world.log());
    let pids = helpers.pids();
    let [first] = pids.as_slice() else {
        panic!("started by the VM's start: {pids:?}");
    };
    kill(*first);
    let end = Instant::now() + PATIENCE;
    while helpers.pids().len() < 2 || !world.log().contains("started again") {
        assert!(Instant::now() < end, "it stays away: {}", world.log());
        thread::sleep(Duration::from_millis(10));
    }
    // That one serves: it is left alone.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(helpers.pids().len(), 2);
    assert_eq!(world.state("web"), Some(VmState::Running));
}

/// The processes that were started, by the file in which they say so; ended when
/// dropped.
struct Helpers(PathBuf);

impl Helpers {
    fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.pids().into_iter().for_each(kill);
    }
}

fn adoption() {
    let world = World::new();
    for vm in ["runs", "frozen"] {
        world.define(vm, "restart = \"always\"");
        ops::start(&world.host, &name(vm)).expect("starts");
    }
    ops::suspend(&world.host, &name("frozen")).expect("suspends");
    let pid = world.pid("runs");
    let daemon = world.daemon();
    let vms = daemon.get("/v1/vms").json();
    assert_eq!(vms["vms"][0]["state"], "frozen");
    assert_eq!(vms["vms"][1]["state"], "running");
    assert_eq!(daemon.order("/v1/vms/frozen/resume", "")["state"], "done");
    assert_eq!(world.pid("runs"), pid);
    // It is the daemon's own from now on.
    world.crash("runs");
    world.until("runs", VmState::Running);
}
