//! Slots in a real etcd. `cargo xtask test --only fleet` fetches one; else see
//! [`server::program`].

mod access;
#[allow(dead_code, reason = "shared with the tests of hebed")]
mod certificates;
mod faults;
mod rolls;
mod server;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hebe_fleet::config::{EtcdConfig, FleetConfig};
use hebe_fleet::etcd::{Change, Condition, Etcd};
use hebe_fleet::order::{
    NotRebooted, Order, give_up, in_turn, new_slot, own, release_after_boot, wall_s,
};
use hebe_fleet::slots::{Slots, Taken};
use hebe_policy::fleet::holder::{Stop, Times};
use hebe_policy::fleet::slots::{FleetName, Found, Full, Phase, Slot};
use hebe_policy::span::Span;

use server::Server;

/// Lease in seconds, and how long one request may take: more than a busy computer
/// ever stands still.
const LEASE_S: u64 = 60;
const REQUEST_S: u64 = 20;
/// The same where a test waits until a lease is over, or nobody answers.
const SHORT_LEASE_S: u64 = 15;
const SHORT_REQUEST_S: u64 = 3;
/// How long an order waits that gets what it wants.
const PATIENCE_S: u64 = 120;

fn name(text: &str) -> FleetName {
    text.parse().expect("name")
}

fn config(endpoints: &[String], at_most: u32) -> FleetConfig {
    FleetConfig {
        group: name("rack1"),
        host: None,
        at_most,
        give_up_after: Span::minutes(2),
        lease: Span::seconds(LEASE_S),
        patience: Span::minutes(1),
        request_timeout: Span::seconds(REQUEST_S),
        always: false,
        etcd: Some(EtcdConfig {
            endpoints: endpoints.to_vec(),
            ..EtcdConfig::default()
        }),
        fleetlock: None,
    }
}

/// [`config`] with a lease that a test can outlast.
fn hasty(endpoints: &[String], at_most: u32) -> FleetConfig {
    FleetConfig {
        lease: Span::seconds(SHORT_LEASE_S),
        request_timeout: Span::seconds(SHORT_REQUEST_S),
        ..config(endpoints, at_most)
    }
}

fn times(config: &FleetConfig, patience_s: u64) -> Times {
    Times {
        ask_every_ms: 50,
        ..config.times(Span::seconds(patience_s))
    }
}

fn slots(config: &FleetConfig, host: &str) -> Slots {
    Slots::open(config, &name(host), "/nonexistent/note".into()).expect("client")
}

fn slot(config: &FleetConfig, host: &str, boot_id: &str) -> Slot {
    new_slot(config, &name(host), host, boot_id).expect("slot")
}

fn quiet(_: &str) {}

/// Waits until an order says that it asks again.
struct Heard(AtomicUsize);

impl Heard {
    fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    fn say(&self, text: &str) {
        if text.starts_with("asking again") {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn wait(&self) {
        let begun = Instant::now();
        while self.0.load(Ordering::SeqCst) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "it asks nobody");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn there(slots: &Slots, host: &str) -> Option<Slot> {
    match slots.own(&name(host)).expect("answer")? {
        Found::Slot(slot) => Some(slot),
        Found::Unreadable { why, .. } => panic!("{why}"),
    }
}

fn vms(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Takes a slot for good, as the old kernel does, and forgets about it.
fn pinned(slots: &Slots, config: &FleetConfig, host: &str, give_up_s: u64) {
    let slot = slot(config, host, "boot-1");
    let mut order = Order::take(slots, slot, times(config, PATIENCE_S), &quiet).expect("slot");
    order.pin(vms(&["web", "db"]), give_up_s).expect("pinned");
}

#[test]
fn of_many_hosts_at_most_k_are_under_way() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 2);
    let (away, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for host in ["a", "b", "c", "d", "e", "f"] {
            let (config, away, most) = (&config, &away, &most);
            scope.spawn(move || {
                let slots = slots(config, host);
                let slot = slot(config, host, "boot-1");
                let times = times(config, PATIENCE_S);
                let mut order = Order::take(&slots, slot, times, &quiet).expect("a slot in time");
                most.fetch_max(away.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                order
                    .while_held(|| thread::sleep(Duration::from_millis(50)))
                    .expect("held");
                order.pin(vms(&[]), 60).expect("pinned");
                thread::sleep(Duration::from_millis(100));
                away.fetch_sub(1, Ordering::SeqCst);
                let mine = there(&slots, host).expect("it is there");
                give_up(&slots, mine, times, &quiet).expect("released");
            });
        }
    });
    assert_eq!(most.load(Ordering::SeqCst), 2, "k at once, and no more");
    assert_eq!(slots(&config, "a").all().expect("answer"), []);
}

#[test]
fn a_slot_outlives_the_time_between_two_kernels() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let (a, b) = (slots(&config, "a"), slots(&config, "b"));
    pinned(&a, &config, "a", 120);
    server.outlast_lease(SHORT_LEASE_S);
    let mine = there(&a, "a").expect("it is still there");
    assert_eq!(
        (mine.phase, mine.boot_id.as_str()),
        (Phase::Rebooting, "boot-1")
    );
    assert!(mine.deadline_s > mine.since_s);
    let taken = b
        .take(&slot(&config, "b", "x"), mine.since_s)
        .expect("answer");
    assert!(matches!(taken, Taken::Not(Full::Taken { .. })), "{taken:?}");
    // The new kernel.
    let found = own(&a, &name("a"), times(&config, PATIENCE_S), &quiet).expect("answer");
    let Some(Found::Slot(found)) = found else {
        panic!("{found:?}");
    };
    let mut looks = 0;
    let mut look = |all: &BTreeSet<String>| {
        assert_eq!(*all, vms(&["db", "web"]));
        assert_eq!(
            there(&a, "a").map(|slot| slot.phase),
            Some(Phase::Verifying)
        );
        looks += 1;
        if looks < 3 {
            return Err("VM 'db' is frozen".to_owned());
        }
        Ok(())
    };
    release_after_boot(
        &a,
        found,
        times(&config, PATIENCE_S),
        120,
        &mut look,
        &quiet,
    )
    .expect("released");
    assert_eq!((looks, there(&a, "a")), (3, None));
    let taken = b
        .take(&slot(&config, "b", "x"), mine.since_s)
        .expect("answer");
    assert_eq!(taken, Taken::Leased);
}

#[test]
fn a_vm_that_does_not_answer_keeps_the_slot() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let a = slots(&config, "a");
    pinned(&a, &config, "a", 120);
    let mine = there(&a, "a").expect("slot");
    let mut never = |_: &BTreeSet<String>| Err("VM 'db' is frozen".to_owned());
    let stop = release_after_boot(&a, mine, times(&config, 5), 1, &mut never, &quiet);
    let text = stop.expect_err("kept").to_string();
    assert!(
        text.contains("VM 'db' is frozen") && text.contains("kept"),
        "{text}"
    );
    assert!(there(&a, "a").is_some());
}

#[test]
fn a_holder_that_dies_before_its_reboot_blocks_nobody() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = hasty(&server.endpoints, 1);
    let (a, b) = (slots(&config, "a"), slots(&config, "b"));
    let take = |slots, host| {
        let slot = slot(&config, host, "boot-1");
        Order::take(slots, slot, times(&config, PATIENCE_S), &quiet)
    };
    drop(take(&a, "a").expect("slot"));
    let order = take(&b, "b");
    order.expect("when the lease is over");
}

#[test]
fn a_host_that_does_not_come_back_stops_all_until_it_is_unlocked() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 3);
    let (a, b) = (slots(&config, "a"), slots(&config, "b"));
    pinned(&a, &config, "a", 0);
    let begun = Instant::now();
    while !there(&a, "a").is_some_and(|slot| slot.is_overdue(wall_s())) {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "it is never late"
        );
        thread::sleep(Duration::from_millis(20));
    }
    let wants = || {
        Order::take(
            &b,
            slot(&config, "b", "x"),
            times(&config, PATIENCE_S),
            &quiet,
        )
    };
    let Err(Stop::NoSlot(why)) = wants() else {
        panic!("two slots are free, and still nobody may begin");
    };
    assert!(why.contains("hebe fleet unlock a --yes"), "{why}");
    assert_eq!(a.unlock(&name("a")).expect("answer"), Some(true));
    assert_eq!(a.unlock(&name("a")).expect("answer"), Some(false));
    wants().expect("all go on");
}

#[test]
fn an_order_takes_over_what_was_locked_by_hand_and_leaves_it_if_undone() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let a = slots(&config, "a");
    pinned(&a, &config, "a", 120);
    let first = || slot(&config, "a", "boot-1");
    let wants = || Order::take(&a, first(), times(&config, PATIENCE_S), &quiet);
    let mut order = wants().expect("its own");
    assert!(order.keeps());
    order.pin(vms(&["web"]), 60).expect("pinned");
    assert_eq!(
        order.undo("it was undone"),
        Stop::NotReady("it was undone".into())
    );
    assert_eq!(there(&a, "a").map(|slot| slot.vms), Some(vms(&["web"])));
    // Under another kernel it has to be released first.
    let later = Order::take(&a, slot(&config, "a", "boot-2"), times(&config, 5), &quiet);
    let text = later.err().expect("refused").to_string();
    assert!(text.contains("hebe fleet release"), "{text}");
}

#[test]
fn an_order_that_is_undone_gives_back_what_it_took() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let a = slots(&config, "a");
    for pin in [false, true] {
        let slot = slot(&config, "a", "boot-1");
        let times = times(&config, PATIENCE_S);
        let mut order = Order::take(&a, slot, times, &quiet).expect("slot");
        if pin {
            order.pin(vms(&[]), 60).expect("pinned");
        }
        assert_eq!(order.undo("x"), Stop::NotReady("x".into()));
        assert_eq!(there(&a, "a"), None);
    }
}

#[test]
fn a_machine_of_the_same_name_does_not_take_the_slot_for_its_own() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 9);
    let a = slots(&config, "a");
    pinned(&a, &config, "a", 120);
    let clone = new_slot(&config, &name("a"), "another", "boot-1").expect("slot");
    let taken = a.take(&clone, 0).expect("answer");
    assert!(matches!(taken, Taken::Not(Full::SameName(_))), "{taken:?}");
}

#[test]
fn a_turn_checks_under_a_lease_and_reboots_under_a_slot_for_good() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let (a, key) = (slots(&config, "a"), "/hebe/fleet/1/rack1/a");
    let lease = || {
        let entries = server.client().range(key).expect("answer").entries;
        entries.first().map(|entry| entry.lease != 0)
    };
    let patience_s = Cell::new(PATIENCE_S);
    let turn = |check: &dyn Fn() -> Result<BTreeSet<String>, String>, rebooted: &mut bool| {
        let wanted = slot(&config, "a", "boot-1");
        in_turn(
            &a,
            wanted,
            times(&config, patience_s.get()),
            60,
            &quiet,
            check,
            || {
                let mine = there(&a, "a").expect("slot");
                assert_eq!((mine.phase, lease()), (Phase::Rebooting, Some(false)));
                assert_eq!(mine.vms, vms(&["web"]));
                *rebooted = true;
                NotRebooted {
                    why: "kexec failed".to_owned(),
                    all_run: true,
                }
            },
        )
    };
    let ready = || {
        assert_eq!(lease(), Some(true));
        Ok(vms(&["web"]))
    };
    let mut rebooted = false;
    let stop = turn(&ready, &mut rebooted);
    assert_eq!(stop, Stop::NotReady("kexec failed".into()));
    assert!(rebooted && lease().is_none(), "undone, and given back");
    // Not ready, or no slot: nothing is rebooted.
    let mut rebooted = false;
    let stop = turn(&|| Err("no kernel".to_owned()), &mut rebooted);
    assert_eq!(stop, Stop::NotReady("no kernel".into()));
    let freed = || {
        a.unlock(&name("a")).expect("answer");
        Ok(vms(&["web"]))
    };
    let stop = turn(&freed, &mut rebooted);
    assert!(matches!(stop, Stop::Lost(_)), "{stop:?}");
    pinned(&slots(&config, "b"), &config, "b", 120);
    patience_s.set(1);
    let stop = turn(&|| panic!("there is no slot"), &mut rebooted);
    assert!(matches!(stop, Stop::NoSlot(_)), "{stop:?}");
    assert!(!rebooted);
}

#[test]
fn what_cannot_be_read_counts_and_is_told() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let config = config(&server.endpoints, 1);
    let a = slots(&config, "a");
    let etcd = server.client();
    let always = [Condition::QuietSince("/other".into(), 0)];
    for value in ["{", "{\"version\": 2}", "{\"version\": 1}"] {
        let put = Change::Put("/hebe/fleet/1/rack1/b".into(), value.into(), 0);
        assert!(etcd.change(&always, &[put]).expect("answer"));
        let all = a.all().expect("answer");
        assert!(
            matches!(&all[..], [Found::Unreadable { host, .. }] if host == "b"),
            "{all:?}"
        );
        let taken = a.take(&slot(&config, "a", "x"), 0).expect("answer");
        assert!(matches!(taken, Taken::Not(Full::Taken { .. })), "{taken:?}");
    }
}

#[test]
fn a_request_that_comes_late_changes_nothing() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let etcd = server.client();
    let put = |key: &str, value: &str| Change::Put(key.into(), value.into(), 0);
    let seen = |etcd: &Etcd| etcd.range("/g/").expect("answer").revision;
    let quiet_since = |revision| Condition::QuietSince("/g/".into(), revision);
    let before = seen(&etcd);
    assert!(
        etcd.change(&[quiet_since(before)], &[put("/g/a", "1")])
            .expect("answer")
    );
    // Twice, or after somebody else's.
    assert!(
        !etcd
            .change(&[quiet_since(before)], &[put("/g/a", "1")])
            .expect("answer")
    );
    assert!(
        !etcd
            .change(&[quiet_since(before)], &[put("/g/b", "1")])
            .expect("answer")
    );
    // Other groups do not disturb, nor does what goes.
    let now = seen(&etcd);
    assert!(
        etcd.change(&[quiet_since(now)], &[put("/h/a", "1")])
            .expect("answer")
    );
    let entry = etcd.range("/g/").expect("answer").entries.remove(0);
    let written = [Condition::WrittenAt("/g/a".into(), entry.mod_revision)];
    let delete = [Change::Delete("/g/a".into())];
    assert!(etcd.change(&written, &delete).expect("answer"));
    assert!(
        !etcd.change(&written, &delete).expect("answer"),
        "it is gone"
    );
    assert!(
        etcd.change(&[quiet_since(now)], &[put("/g/b", "1")])
            .expect("answer")
    );
}
