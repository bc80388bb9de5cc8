//! The daemon is killed at any instant, and no VM notices.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use hebe_host::listing::VmState;
use hebe_host::resume_all::resume_all;
use hebe_sys::clock::stamp_now;

use crate::world::World;

pub const CASES: &[crate::Case] = &[
    ("two_hundred_deaths_during_orders_harm_no_vm", fake),
    ("deaths_during_orders_harm_no_vm_with_a_guest", real),
];

/// Deaths under VMMs without guests.
const DEATHS: u32 = 200;
/// Deaths under real ones.
const REAL_DEATHS: u32 = 24;

fn fake() {
    deaths(&World::new(), DEATHS);
}

fn real() {
    if crate::guest::cannot_run() {
        return;
    }
    let world = World::new();
    fs::write(world.root.path().join(crate::REAL), "").expect("write");
    deaths(&world, REAL_DEATHS);
}

/// One VM is started, suspended, resumed and stopped over and over by daemons
/// that die; another one runs all the time.
fn deaths(world: &World, count: u32) {
    world.define("web", "");
    world.define("quiet", "");
    let first = world.daemon();
    let started = first.order("/v1/vms/quiet/start", "");
    assert_eq!(started["state"], "done", "{started} {}", world.log());
    let quiet = world.pid("quiet").expect("up");
    first.kill();
    let mut orders = [0; 4];
    for death in 0..count {
        let daemon = world.daemon();
        let (index, reply) = loop {
            let seen = world.state("web");
            let (path, index, body) = match seen {
                Some(VmState::Running) if death % 3 == 0 => {
                    ("stop", 0, "{\"timeout_s\": 0, \"force\": true}")
                }
                Some(VmState::Running) => ("suspend", 1, ""),
                Some(VmState::Frozen) => ("resume", 2, ""),
                Some(VmState::Stopped | VmState::Crashed) => ("start", 3, ""),
                other => panic!("death {death}: {other:?}"),
            };
            let reply = daemon.post(&format!("/v1/vms/web/{path}"), body);
            // A VMM that had been asked to freeze may have done so meanwhile.
            if reply.status == 409 && world.state("web") != seen {
                continue;
            }
            assert_eq!(reply.status, 202, "death {death}: {path}: {reply:?}");
            break (index, reply);
        };
        // From at once to well after such an order ends; now and then it ends.
        let step = u64::from(death * 7 % 20);
        thread::sleep(Duration::from_micros(step * step * 500));
        if death % 4 == 3 {
            daemon.job(reply.header("location").expect("Location"));
        }
        daemon.kill();
        orders[index] += 1;
        settle(world, death);
        assert_eq!(world.pid("quiet"), Some(quiet), "death {death}");
    }
    assert!(orders.iter().all(|&n| n > 0), "{orders:?}");
    assert_eq!(world.state("quiet"), Some(VmState::Running));
    let all = resume_all(&world.host, stamp_now(), false).expect("not busy");
    let trouble: Vec<_> = all.vms.values().filter(|vm| vm.is_trouble()).collect();
    assert!(
        trouble.iter().all(|vm| format!("{vm:?}").contains("Lost")),
        "{all:?}"
    );
}

/// A VMM that was being started goes on by itself.
fn settle(world: &World, death: u32) {
    let began = Instant::now();
    while world.state("web") == Some(VmState::Unresponsive) {
        let waited = began.elapsed();
        assert!(waited < crate::world::PATIENCE, "death {death}");
        thread::sleep(Duration::from_millis(2));
    }
}
