//! VMs in networks that Hebe makes, over the orders of a host. Kernels are
//! network namespaces: a new one has no bridge. Needs root, `ip` and `nft`; says
//! so where they are missing.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use hebe_host::ops::{self, StopOptions};
use hebe_host::report::complete_report;
use hebe_host::resume_all::{Resumed, resume_all};
use hebe_host::timeline::{EventKind, Side};
use hebe_host::{HostError, network};
use hebe_sys::clock::stamp_now;
use hebe_sys::link;
use hebe_types::{NAT_BRIDGE, RebootMethod};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Case;
use crate::world::{PATIENCE, World, name};

pub const CASES: &[Case] = &[
    (
        "the_network_is_there_before_a_vm_and_in_the_next_kernel_again",
        the_network_is_there_before_a_vm_and_in_the_next_kernel_again,
    ),
    (
        "a_nic_has_the_same_mac_at_each_boot_and_what_goes_on_keeps_its_own",
        a_nic_has_the_same_mac_at_each_boot_and_what_goes_on_keeps_its_own,
    ),
    (
        "no_vm_that_is_resumed_waits_for_its_network",
        no_vm_that_is_resumed_waits_for_its_network,
    ),
    (
        "a_network_that_cannot_be_had_refuses_a_boot_and_no_resume",
        a_network_that_cannot_be_had_refuses_a_boot_and_no_resume,
    ),
    (
        "a_helper_that_is_gone_is_started_as_long_as_a_vm_needs_it",
        a_helper_that_is_gone_is_started_as_long_as_a_vm_needs_it,
    ),
];

/// Needs no network: what a VM's VMM is started with.
fn a_nic_has_the_same_mac_at_each_boot_and_what_goes_on_keeps_its_own() {
    let world = World::new();
    let tap = |vm: &str| format!("[[net]]\ntap = 't-{vm}'\n[[net]]\ntap = 'u-{vm}'");
    let macs = |world: &World, vm: &str| {
        let path = world.dir(vm).join("config.toml");
        let config = hebe_host::definitions::read(&path).expect("config.toml");
        let macs = config.nets.iter().map(|net| net.mac.expect("a MAC"));
        macs.collect::<Vec<_>>()
    };
    for vm in ["db", "web"] {
        world.define(vm, &tap(vm));
        ops::start(&world.host, &name(vm)).expect("starts");
    }
    let first = macs(&world, "web");
    assert_ne!(first[0], first[1]);
    assert!(!macs(&world, "db").iter().any(|mac| first.contains(mac)));
    let shown = || {
        let defined = hebe_host::definitions::load(&world.host.layout, &name("web"));
        let nets = defined.expect("defined").1.nets;
        let nics = network::nics(&world.host.layout, &name("web"), None, &nets);
        nics[0].mac.clone().expect("known before it boots")
    };
    assert_eq!(shown(), first[0].to_string());
    // Killed with its host, and booted anew.
    world.next_boot();
    ops::start(&world.host, &name("web")).expect("starts");
    assert_eq!(macs(&world, "web"), first);
    // What goes on keeps what it was booted with, whatever the host's id is by then.
    let id = world.host.layout.state.join("host-id");
    let own = fs::read_to_string(&id).expect("drawn");
    fs::write(&id, "0123456789abcdef0123456789abcdef").expect("write");
    let lives = world.host.layout.state.join("lives");
    let life = |world: &World| {
        let vm = world.instance("web").expect("up").vm;
        fs::read_to_string(lives.join(format!("web.{vm}.toml"))).expect("its life")
    };
    let before = life(&world);
    for method in [RebootMethod::Warm, RebootMethod::Saved] {
        world.reboot(method);
        resume_all(&world.host, stamp_now(), false).expect("not busy");
        assert_eq!(life(&world), before);
    }
    // Another host's VM of that name.
    world.reboot(RebootMethod::Cold);
    resume_all(&world.host, stamp_now(), false).expect("not busy");
    assert!(!macs(&world, "web").iter().any(|mac| first.contains(mac)));
    let vm = world.instance("web").expect("up").vm;
    // One that an earlier release booted has its address from its id.
    let text = life(&world);
    let old: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("mac"))
        .collect();
    fs::write(lives.join(format!("web.{vm}.toml")), old.join("\n")).expect("write");
    let nics = network::nics(&world.host.layout, &name("web"), Some(vm), &[]);
    let derived = hebe_types::MacAddr::derived(vm, 1).to_string();
    assert_eq!(nics[1].mac.as_deref(), Some(derived.as_str()));
    // A boot with other addresses than it had is none that anybody ordered.
    world.kill("web");
    fs::write(&id, "?").expect("write");
    let refused = ops::start(&world.host, &name("web")).expect_err("refused");
    assert!(refused.to_string().contains("host-id"), "{refused}");
    fs::write(&id, own).expect("put back");
    ops::start(&world.host, &name("web")).expect("starts");
    assert_eq!(macs(&world, "web"), first);
}

const NAT: &str = "[[net]]\nnetwork = \"nat\"\nforward = [\"8080:80\"]";

/// How long anything may take.
const LIMIT: Duration = PATIENCE;

/// A network namespace; gone when dropped.
struct Space(String);

impl Space {
    fn new(label: &str) -> Option<Self> {
        let skipped = |why: &str| {
            writeln!(std::io::stderr(), "skipped: networks of VMs: {why}").expect("stderr");
        };
        if !["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"]
            .iter()
            .any(|p| fs::exists(p).unwrap_or(false))
        {
            skipped("nft is not installed");
            return None;
        }
        let name = format!("hebe-host-{}-{label}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).status();
        if !made.is_ok_and(|status| status.success()) {
            skipped("no network namespace can be made: run as root, with iproute2");
            return None;
        }
        Some(Self(name))
    }

    /// Whoever is started from there is in it, too.
    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/var/run/netns/{}", self.0);
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let space = fs::File::open(path).expect("a namespace");
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(space.as_fd(), kind).expect("root");
                work()
            });
            worker.join().expect("a thread in a namespace")
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn the_network_is_there_before_a_vm_and_in_the_next_kernel_again() {
    let (Some(old), Some(new)) = (Space::new("old"), Space::new("new")) else {
        return;
    };
    let world = World::new();
    world.define("web", NAT);
    world.tell("web", "say-bridge");
    let address = |world: &World| {
        let row = hebe_host::listing::survey(&world.host);
        let id = row.rows[&name("web")].id.as_deref();
        let id = id
            .and_then(hebe_sys::proc::parse_uuid)
            .map(hebe_types::VmId);
        let nics = network::nics(&world.host.layout, &name("web"), id, &[]);
        (
            nics[0].address.clone(),
            nics[0].mac.clone(),
            nics[0].tap.clone(),
        )
    };
    let first = old.within(|| {
        ops::start(&world.host, &name("web")).expect("starts");
        assert!(link::index(NAT_BRIDGE).is_some());
        let first = address(&world);
        assert!(first.0.is_some() && first.1.is_some());
        world.reboot(RebootMethod::Warm);
        first
    });
    new.within(|| {
        assert!(link::index(NAT_BRIDGE).is_none(), "a new kernel");
        let all = resume_all(&world.host, stamp_now(), false).expect("resumed");
        assert_eq!(all.vms[&name("web")], Resumed::Resumed, "{all:?}");
        assert_eq!(address(&world), first);
        // Made before each of its VMMs.
        let events = world.events();
        let bridges = events.iter().filter(|e| *e == "web bridge");
        assert_eq!(bridges.count(), 2, "{events:?}");
        // Another boot of it has the same ones.
        let now = StopOptions {
            timeout: Duration::ZERO,
            force: true,
        };
        ops::stop(&world.host, &name("web"), now).expect("stopped");
        ops::start(&world.host, &name("web")).expect("starts");
        assert_eq!(address(&world), first);
    });
}

/// What makes the network here does not end before every VM of it runs, nor before
/// that of a VM which has none: whoever waited for it would wait in vain.
fn no_vm_that_is_resumed_waits_for_its_network() {
    let (Some(old), Some(new)) = (Space::new("before"), Space::new("beside")) else {
        return;
    };
    let world = World::new();
    let vms = ["db", "web", "none"];
    world.define("db", "[[net]]\nnetwork = \"nat\"");
    world.define("web", NAT);
    world.define("none", "");
    vms.iter().for_each(|vm| world.tell(vm, "say-bridge"));
    old.within(|| {
        for vm in vms {
            ops::start(&world.host, &name(vm)).expect("starts");
        }
        world.reboot(RebootMethod::Warm);
    });
    world.forget_events();
    let sockets = vms.map(|vm| world.dir(vm).join("vmm.sock"));
    let (say, said) = std::sync::mpsc::channel();
    let until_they_run = move || {
        let until = Instant::now() + LIMIT;
        while !sockets.iter().all(|s| s.exists()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let up: Vec<bool> = sockets.iter().map(|s| s.exists()).collect();
        say.send(up).expect("heard");
    };
    *world.machine.at_net_helper.lock().expect("lock") = Some(Box::new(until_they_run));
    new.within(|| {
        let all = resume_all(&world.host, stamp_now(), false).expect("resumed");
        let resumed = all.vms.values().all(|vm| *vm == Resumed::Resumed);
        assert!(resumed, "{all:?}");
        // The bridge alone is there before.
        let events = world.events();
        for vm in ["db", "web"] {
            assert!(events.contains(&format!("{vm} bridge")), "{events:?}");
        }
        let helpers = events.iter().filter(|e| *e == "host net helper");
        assert_eq!(helpers.count(), 1, "{events:?}");
        assert!(link::is_up(NAT_BRIDGE));
        let report = complete_report(&world.host).expect("io").expect("a report");
        let ready = report.at(Side::After, None, EventKind::NetworkReady);
        assert!(ready.is_some(), "{report:?}");
        // Nobody is expected any more.
        let noted = fs::read_dir(world.host.layout.run.join("net")).expect("net");
        let noted = noted.map(|entry| entry.expect("entry").path());
        let noted = noted.filter(|path| path.extension().is_some_and(|e| e == "json"));
        let texts: Vec<_> = noted
            .map(|p| fs::read_to_string(p).expect("json"))
            .collect();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert!(!texts.concat().contains("expected"), "{texts:?}");
    });
    assert_eq!(said.try_recv().expect("the helper was started"), [true; 3]);
}

fn a_network_that_cannot_be_had_refuses_a_boot_and_no_resume() {
    let Some(space) = Space::new("none") else {
        return;
    };
    let world = World::new();
    world.define("web", NAT);
    let holder = space.within(|| {
        ops::start(&world.host, &name("web")).expect("starts");
        world.reboot(RebootMethod::Warm);
        network::remarks(&world.host.layout);
        std::net::TcpListener::bind("0.0.0.0:8080").expect("a port")
    });
    space.within(|| {
        // The port that leads to it is somebody else's by now.
        let began = Instant::now();
        let all = resume_all(&world.host, stamp_now(), false).expect("resumed");
        assert_eq!(
            all.vms[&name("web")],
            Resumed::Resumed,
            "{:?}",
            began.elapsed()
        );
        let said = network::remarks(&world.host.layout).join("\n");
        assert!(said.contains("8080:80 cannot be forwarded"), "{said}");
        assert_eq!(network::remarks(&world.host.layout), [""; 0], "said once");
        // Of a boot it is said before anything is there.
        world.define("db", &NAT.replace("80\"", "81\""));
        let segments = world.segments();
        let refused = ops::start(&world.host, &name("db")).expect_err("refused");
        assert!(matches!(refused, HostError::Launch(_)), "{refused:?}");
        assert!(refused.to_string().contains("8080:81"), "{refused}");
        assert_eq!(world.segments(), segments);
        assert!(!world.dir("db").exists());
    });
    drop(holder);
}

/// The helper of these tests is an entry in a list, so that it is always gone.
fn a_helper_that_is_gone_is_started_as_long_as_a_vm_needs_it() {
    let Some(space) = Space::new("tend") else {
        return;
    };
    let world = World::new();
    let started = || {
        world
            .events()
            .iter()
            .filter(|e| *e == "host net helper")
            .count()
    };
    assert!(!network::tend(&world.host).expect("nothing there"));
    assert!(
        !world.host.layout.run.join("net").exists(),
        "nor is it made"
    );
    world.define("web", NAT);
    space.within(|| {
        ops::start(&world.host, &name("web")).expect("starts");
        let first = started();
        assert!(network::tend(&world.host).expect("started"));
        assert_eq!(started(), first + 1);
        let now = StopOptions {
            timeout: Duration::ZERO,
            force: true,
        };
        ops::stop(&world.host, &name("web"), now).expect("stopped");
        assert!(!network::tend(&world.host).expect("nobody needs it"));
        assert_eq!(started(), first + 1);
        assert!(link::index(NAT_BRIDGE).is_none(), "taken away");
    });
}
