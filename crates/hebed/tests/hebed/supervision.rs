//! VMs that the daemon starts by itself.

use std::fs;
use std::thread;
use std::time::Duration;

use hebe_host::listing::VmState;
use hebe_host::ops::{self, StopOptions};
use serde_json::json;

use crate::world::{World, name};

pub const CASES: &[crate::Case] = &[
    ("vms_start_with_the_host_in_order_and_once", autostart),
    (
        "a_vm_that_fails_is_started_again_and_one_that_is_stopped_is_not",
        restart,
    ),
    ("a_new_daemon_adopts_what_runs_and_what_is_frozen", adoption),
];

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
        timeout: Duration::from_secs(10),
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
