//! etcd down, slow, cut off; leases lost.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use hebe_fleet::order::Order;
use hebe_fleet::slots::FleetError;
use hebe_policy::fleet::holder::Stop;

use crate::server::Server;
use crate::{
    Heard, PATIENCE_S, SHORT_LEASE_S, config, hasty, name, pinned, quiet, slot, slots, there,
    times, vms,
};

/// How long an order may take to give up.
const END_MAX: Duration = Duration::from_secs(90);

#[test]
fn without_etcd_no_slot_is_had_and_that_is_said_in_time() {
    let Some(mut server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let a = slots(&config, "a");
    let heard = Heard::new();
    let say = |text: &str| heard.say(text);
    let wants = |patience_s| {
        let slot = slot(&config, "a", "boot-1");
        Order::take(&a, slot, times(&config, patience_s), &say)
    };
    let begun = Instant::now();
    server.cut(0);
    let Err(Stop::NoSlot(why)) = wants(2) else {
        panic!("nobody answered");
    };
    assert!(why.contains("nobody keeps the slots"), "{why}");
    assert!(begun.elapsed() < END_MAX);
    // Slow, and then there: one waits.
    heard.0.store(0, Ordering::SeqCst);
    thread::scope(|scope| {
        let waits = scope.spawn(|| wants(PATIENCE_S));
        heard.wait();
        server.mend(0);
        drop(waits.join().expect("no panic").expect("a slot"));
    });
    server.kill(0);
    let Err(FleetError::Silent(why)) = a.own(&name("a")) else {
        panic!("etcd is dead");
    };
    assert!(why.contains("127.0.0.1"), "{why}");
}

#[test]
fn a_pinned_slot_outlives_etcd_itself() {
    let Some(mut server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let a = slots(&config, "a");
    pinned(&a, &config, "a", 120);
    server.kill(0);
    server.restart(0);
    assert!(there(&a, "a").is_some());
}

#[test]
fn a_lease_that_cannot_be_renewed_in_time_is_lost() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let a = slots(&config, "a");
    let slot = slot(&config, "a", "boot-1");
    let times = times(&config, PATIENCE_S);
    let mut order = Order::take(&a, slot.clone(), times, &quiet).expect("slot");
    // Renewed for longer than it would last, first of all.
    let outlasts = || server.outlast_lease(SHORT_LEASE_S);
    order.while_held(outlasts).expect("renewed");
    assert!(there(&a, "a").is_some());
    server.cut(0);
    // No clock but this one's can be asked now.
    let whole = Duration::from_secs(SHORT_LEASE_S + 1);
    let lost = order.while_held(|| thread::sleep(whole));
    server.mend(0);
    assert!(matches!(lost, Err(Stop::Lost(_))), "{lost:?}");
    assert!(order.pin(vms(&[]), 60).is_err(), "it is not acted on");
    server.wait();
    assert_ne!(
        there(&a, "a").map(|slot| slot.phase.as_str()),
        Some("rebooting")
    );
}

#[test]
fn a_slot_that_somebody_freed_is_not_acted_on() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let a = slots(&config, "a");
    let wants = || {
        let slot = slot(&config, "a", "boot-1");
        Order::take(&a, slot, times(&config, PATIENCE_S), &quiet).expect("slot")
    };
    let mut order = wants();
    a.unlock(&name("a")).expect("answer");
    let lost = order.pin(vms(&[]), 60).expect_err("freed");
    assert!(lost.to_string().contains("nothing was touched"), "{lost}");
    let mut order = wants();
    a.unlock(&name("a")).expect("answer");
    let lost = order.while_held(|| thread::sleep(Duration::from_secs(SHORT_LEASE_S)));
    assert!(matches!(lost, Err(Stop::Lost(_))), "{lost:?}");
}

#[test]
fn pinning_waits_for_a_slow_etcd_and_gives_up_without_rebooting() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let a = slots(&config, "a");
    let heard = Heard::new();
    let say = |text: &str| heard.say(text);
    let wants = || {
        let slot = slot(&config, "a", "boot-1");
        Order::take(&a, slot, times(&config, PATIENCE_S), &say).expect("slot")
    };
    let mut order = wants();
    server.cut(0);
    thread::scope(|scope| {
        let pins = scope.spawn(|| order.pin(vms(&[]), 60));
        heard.wait();
        server.mend(0);
        pins.join().expect("no panic").expect("in the end");
    });
    assert_eq!(order.undo("x"), Stop::NotReady("x".into()));
    let mut order = wants();
    server.cut(0);
    let begun = Instant::now();
    let stop = order.pin(vms(&[]), 60).expect_err("nobody answered");
    server.mend(0);
    assert!(begun.elapsed() < END_MAX, "{stop}");
    assert!(
        matches!(stop, Stop::Unreleased(_) | Stop::Unsure(_)),
        "{stop:?}"
    );
}

#[test]
fn a_cluster_goes_on_without_a_member_and_not_without_a_majority() {
    let Some(server) = Server::start(3) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let a = slots(&config, "a");
    server.cut(0);
    // The first two may have to choose a leader.
    let wanted = slot(&config, "a", "boot-1");
    let order = Order::take(&a, wanted, times(&config, PATIENCE_S), &quiet);
    let order = order.expect("two of three");
    server.cut(1);
    let Err(error) = a.all() else {
        panic!("one of three must not answer for all");
    };
    assert!(matches!(error, FleetError::Silent(_)), "{error}");
    server.mend(0);
    server.mend(1);
    server.wait();
    drop(order);
}
