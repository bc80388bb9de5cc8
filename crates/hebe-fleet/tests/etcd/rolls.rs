//! Rolls through a group, in a real etcd.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read as _, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hebe_fleet::etcd::{Change, Condition};
use hebe_fleet::order::{Order, release_after_boot};
use hebe_fleet::rolls::{Going, Read, Rolls, WishError};
use hebe_fleet::slots::FleetError;
use hebe_fleet::{FleetConfig, Member};
use hebe_policy::fleet::forecast::Inventory;
use hebe_policy::fleet::holder::Stop;
use hebe_policy::fleet::slots::{Found, Phase};
use hebe_policy::fleet::turns::{Denied, MarkState, RollState, Rollout, Turn, Wish};

use crate::server::Server;
use crate::{PATIENCE_S, config, hasty, name, quiet, slots, there, times, vms};

/// How long a roll of the tests may take.
const ROLL_MAX: Duration = Duration::from_secs(300);

fn member(server: &Server, host: &str, boot_id: &str) -> Member {
    member_by(config(&server.endpoints, 9), host, boot_id)
}

fn member_by(config: FleetConfig, host: &str, boot_id: &str) -> Member {
    Member {
        slots: slots(&config, host),
        host: name(host),
        machine: host.to_owned(),
        boot_id: boot_id.to_owned(),
        config,
    }
}

fn rollout(id: &str, at_most: u32, hosts: &[&str]) -> Rollout {
    let mut text = format!("group = \"rack1\"\nat_most = {at_most}\nexpected = \"1min\"\n");
    for host in hosts {
        text += &format!("[[host]]\nname = \"{host}\"\n");
    }
    let inventory: Inventory = toml::from_str(&text).expect("inventory");
    inventory.rollout(id, "root@a", 1_000).expect("rollout")
}

fn rolls(member: &Member) -> Rolls {
    member.rolls().expect("etcd keeps rolls")
}

fn read(rolls: &Rolls) -> Read {
    rolls.read().expect("answer").expect("a roll")
}

fn state(rolls: &Rolls, host: &str) -> Option<MarkState> {
    read(rolls).view.state(&name(host)).cloned()
}

/// Takes a slot for a turn, as `hebe reboot --roll` does.
fn take<'a>(member: &'a Member, slots: &'a hebe_fleet::Slots) -> Result<Order<'a>, Stop> {
    let slot = member.new_slot().expect("slot");
    Order::take(slots, slot, times(&member.config, PATIENCE_S), &quiet)
}

fn going(member: &Member, id: &str) -> hebe_fleet::Slots {
    member.slots.going(Going::new(&rolls(member), id))
}

/// Goes in roll `id`, if it is this host's turn.
fn goes(member: &Member, id: &str, give_up_s: u64) -> Result<(), Stop> {
    let slots = going(member, id);
    take(member, &slots)?.pin(vms(&["web"]), give_up_s)
}

/// The new kernel: gives the slot back, and says so.
fn is_back(server: &Server, host: &str) {
    let member = member(server, host, "boot-2");
    let slot = there(&member.slots, host).expect("its slot");
    let mut look = |_: &BTreeSet<String>| Ok(());
    let times = times(&member.config, PATIENCE_S);
    release_after_boot(&member.slots, slot, times, 120, &mut look, &quiet).expect("released");
    rolls(&member).settle(&member, false).expect("answer");
}

#[test]
fn hosts_take_their_turns_in_order_and_at_most_k_at_once() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let hosts = ["a", "b", "c", "d"];
    for at_most in [1, 2] {
        let id = format!("roll-{at_most}");
        let first = member(&server, "a", "boot-1");
        let begun = rolls(&first).begin(&rollout(&id, at_most, &hosts));
        assert!(begun.expect("answer").is_none(), "none is under way");
        let (away, log) = (Mutex::new((0, 0)), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for host in hosts {
                let (server, id, away, log) = (&server, &id, &away, &log);
                scope.spawn(move || {
                    let begun = Instant::now();
                    let member = member(server, host, "boot-1");
                    while read(&rolls(&member)).turn(&member.host) != Turn::Go {
                        assert!(begun.elapsed() < ROLL_MAX, "{host} never had its turn");
                        thread::sleep(Duration::from_millis(20));
                    }
                    log.lock().expect("lock").push(host);
                    goes(&member, id, 60).expect("its turn");
                    {
                        let mut away = away.lock().expect("lock");
                        away.0 += 1;
                        away.1 = away.1.max(away.0);
                    }
                    assert_eq!(state(&rolls(&member), host), Some(MarkState::Away));
                    away.lock().expect("lock").0 -= 1;
                    is_back(server, host);
                });
            }
        });
        assert!(away.into_inner().expect("lock").1 <= at_most);
        let log = log.into_inner().expect("lock");
        if at_most == 1 {
            assert_eq!(log, hosts);
        }
        let view = read(&rolls(&first)).view;
        assert!(view.is_over());
        for host in hosts {
            assert_eq!(
                view.state(&name(host)),
                Some(&MarkState::Done { why: None })
            );
            assert_eq!(there(&first.slots, host), None);
        }
    }
}

#[test]
fn once_a_pause_was_answered_nobody_begins() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let (a, b) = (
        member(&server, "a", "boot-1"),
        member(&server, "b", "boot-1"),
    );
    let keeps = rolls(&a);
    let begun = keeps.begin(&rollout("1", 1, &["a", "b"]));
    assert!(begun.expect("answer").is_none(), "none is under way");
    // It found its turn and has a lease; then somebody on another host pauses.
    let slots = going(&a, "1");
    let mut order = take(&a, &slots).expect("slot");
    rolls(&b).wish(&b, &Wish::Pause, "root@b").expect("paused");
    let Err(Stop::NotReady(why)) = order.pin(vms(&[]), 60) else {
        panic!("the roll was paused");
    };
    assert!(why.contains("root@b paused the roll"), "{why}");
    assert_eq!(
        there(&a.slots, "a"),
        None,
        "the slot was given back at once"
    );
    assert_eq!(state(&keeps, "a"), None);
    // Any other person of the group goes on with it.
    rolls(&b)
        .wish(&b, &Wish::Continue, "root@b")
        .expect("goes on");
    // A host that was passed over meanwhile does not go either.
    let mut order = take(&a, &slots).expect("slot");
    rolls(&b)
        .wish(&b, &Wish::Skip(name("a")), "root@b")
        .expect("skipped");
    assert!(order.pin(vms(&[]), 60).is_err());
    goes(&b, "1", 60).expect("b is next");
    let Err(Stop::NotReady(why)) = goes(&a, "another", 60) else {
        panic!("there is no such roll");
    };
    assert!(why.contains("another roll"), "{why}");
    // One that is under way is in the way of another roll, an aborted one only
    // until it is back.
    let second = || keeps.begin(&rollout("2", 1, &["a"])).expect("answer");
    assert!(second().is_some());
    keeps.wish(&a, &Wish::Abort, "root@a").expect("aborted");
    assert!(second().is_some(), "b is under way");
    is_back(&server, "b");
    assert!(second().is_none());
    assert!(
        second().is_none(),
        "an order that was repeated changes nothing"
    );
    assert_eq!(state(&keeps, "b"), None, "that was another roll");
}

#[test]
fn a_host_that_is_not_back_stops_the_roll_until_a_person_has_looked() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let (a, b) = (
        member(&server, "a", "boot-1"),
        member(&server, "b", "boot-1"),
    );
    let keeps = rolls(&b);
    let begun = keeps.begin(&rollout("1", 2, &["a", "b"]));
    assert!(begun.expect("answer").is_none(), "none is under way");
    goes(&a, "1", 0).expect("its turn");
    let begun = Instant::now();
    let why = loop {
        let read = read(&keeps);
        if let Turn::Stop(why) = read.turn(&b.host) {
            keeps.stop(&read, &b, &why).expect("answer");
            break why;
        }
        assert!(begun.elapsed() < ROLL_MAX);
        thread::sleep(Duration::from_millis(50));
    };
    assert!(why.contains("host 'a' was to be back"), "{why}");
    assert!(matches!(
        read(&keeps).view.rollout.state,
        RollState::Stopped { .. }
    ));
    let wish = |wish: Wish| keeps.wish(&b, &wish, "root@b");
    let denied = |wished: Result<Rollout, WishError>| match wished {
        Err(WishError::Denied(denied)) => denied,
        other => panic!("{other:?}"),
    };
    assert!(matches!(denied(wish(Wish::Continue)), Denied::Trouble(_)));
    assert!(matches!(
        denied(wish(Wish::Skip(name("a")))),
        Denied::UnderWay(_)
    ));
    // It comes late: its slot is free again, and the roll stays stopped.
    is_back(&server, "a");
    assert_eq!(state(&keeps, "a"), Some(MarkState::Done { why: None }));
    assert!(matches!(read(&keeps).turn(&b.host), Turn::NotYet(_)));
    wish(Wish::Continue).expect("goes on");
    // A reboot that failed stops it as well, and is tried again when wanted.
    goes(&b, "1", 60).expect("its turn");
    let failed = MarkState::Failed {
        why: "kexec failed".into(),
    };
    keeps.mark(&b, "1", &failed).expect("answer");
    let slot = there(&b.slots, "b").expect("slot");
    b.slots.release(&slot).expect("answer");
    assert!(
        read(&keeps)
            .view
            .trouble(&[], 0)
            .is_some_and(|why| why.contains("kexec failed"))
    );
    wish(Wish::Retry(name("b"))).expect("granted");
    assert_eq!(read(&keeps).turn(&b.host), Turn::Go);
    goes(&b, "1", 60).expect("once more");
    // Killed while it was undone: nobody saw how it ended.
    let slot = there(&b.slots, "b").expect("slot");
    b.slots.release(&slot).expect("answer");
    keeps.settle(&b, true).expect("answer");
    assert_eq!(
        state(&keeps, "b"),
        Some(MarkState::Away),
        "it is being undone"
    );
    keeps.settle(&b, false).expect("answer");
    assert!(matches!(state(&keeps, "b"), Some(MarkState::Failed { .. })));
}

#[test]
fn without_an_answer_it_is_nobodys_turn_and_what_cannot_be_read_is_told() {
    let Some(mut server) = Server::start(1) else {
        return;
    };
    let [a, b] = ["a", "b"].map(|host| {
        // It does not insist for long where nobody answers.
        member_by(hasty(&server.endpoints, 9), host, "boot-1")
    });
    let keeps = rolls(&a);
    assert!(keeps.read().expect("answer").is_none());
    let begun = keeps.begin(&rollout("1", 1, &["a", "b"]));
    assert!(begun.expect("answer").is_none(), "none is under way");
    // A mark that cannot be read holds a place, and can be passed over.
    let put = |key: &str, value: &str| {
        let always = [Condition::QuietSince("/nothing/".into(), 0)];
        let put = Change::Put(format!("/hebe/roll/1/rack1/{key}"), value.into(), 0);
        assert!(server.client().change(&always, &[put]).expect("answer"));
    };
    put("host/a", "{\"version\": 2}");
    let seen = read(&keeps);
    assert!(matches!(seen.turn(&b.host), Turn::NotYet(_)));
    let Some(MarkState::Waiting { why }) = seen.view.state(&a.host) else {
        panic!("{seen:?}");
    };
    assert!(why.contains("its version is 2"), "{why}");
    keeps
        .wish(&b, &Wish::Skip(name("a")), "root@b")
        .expect("granted");
    assert_eq!(read(&keeps).turn(&b.host), Turn::Go);
    assert!(matches!(&read(&keeps).slots[..], []));
    // etcd dies while it is b's turn: it has a lease, and does not go.
    let slots = going(&b, "1");
    let mut order = take(&b, &slots).expect("slot");
    server.kill(0);
    assert!(keeps.read().is_err());
    assert!(order.pin(vms(&[]), 60).is_err());
    server.restart(0);
    assert_ne!(state(&keeps, "b"), Some(MarkState::Away));
    assert!(
        !matches!(b.slots.own(&b.host).expect("answer"), Some(Found::Slot(slot)) if slot.phase.as_str() == "rebooting")
    );
    let put = |value: &str| {
        let always = [Condition::QuietSince("/nothing/".into(), 0)];
        let put = Change::Put("/hebe/roll/1/rack1/roll".into(), value.into(), 0);
        assert!(server.client().change(&always, &[put]).expect("answer"));
    };
    for value in ["{", "{\"version\": 2}", "{\"version\": 1}"] {
        put(value);
        let error = keeps.read().expect_err(value).to_string();
        assert!(error.contains("/hebe/roll/1/rack1/roll"), "{error}");
    }
}

/// A way to etcd on which something happens just before the next transaction
/// arrives there.
fn detour(etcd: &str, before: impl Fn() + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    let etcd = etcd.trim_start_matches("http://").to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let _ = pass_on(client, &etcd, &before);
        }
    });
    url
}

fn pass_on(mut client: TcpStream, etcd: &str, before: &impl Fn()) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    while reader.read_line(&mut head)? > 2 {}
    for line in head.lines() {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if head.starts_with("POST /v3/kv/txn") {
        before();
    }
    let mut etcd = TcpStream::connect(etcd)?;
    // So that the answer has an end.
    let head = head.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    etcd.write_all(&[head.as_bytes(), &body].concat())?;
    std::io::copy(&mut etcd, &mut client).map(drop)
}

#[test]
fn a_pause_between_the_last_look_and_the_reboot_counts() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let (a, b) = (
        member(&server, "a", "boot-1"),
        member(&server, "b", "boot-1"),
    );
    for wish in [Wish::Pause, Wish::Skip(name("a"))] {
        let id = format!("{wish:?}");
        let keeps = rolls(&b);
        let begun = keeps.begin(&rollout(&id, 1, &["a", "b"]));
        assert!(begun.expect("answer").is_none(), "none is under way");
        let slots = going(&a, &id);
        let slot = a.new_slot().expect("slot");
        let taken = slots.take(&slot, slot.since_s).expect("answer");
        assert_eq!(taken, hebe_fleet::Taken::Leased);
        // It looks, it is its turn, and while it says so, somebody else says
        // something, too.
        let others = (b.clone(), wish.clone());
        let once = AtomicBool::new(true);
        let url = detour(&server.endpoints[0], move || {
            if once.swap(false, Ordering::SeqCst) {
                let (b, wish) = &others;
                rolls(b).wish(b, wish, "root@b").expect("granted");
            }
        });
        let late = Member {
            slots: crate::slots(&config(&[url], 9), "a"),
            ..a.clone()
        };
        let mut rebooting = slot.clone();
        rebooting.phase = Phase::Rebooting;
        let pinned = going(&late, &id).pin(&rebooting);
        assert!(matches!(pinned, Err(FleetError::Changed)), "{pinned:?}");
        assert_ne!(state(&keeps, "a"), Some(MarkState::Away));
        // Asked again, it sees why.
        let pinned = going(&late, &id).pin(&rebooting);
        assert!(matches!(pinned, Err(FleetError::NoTurn(_))), "{pinned:?}");
        a.slots.release(&slot).expect("answer");
        keeps.wish(&b, &Wish::Abort, "root@b").expect("aborted");
    }
}
