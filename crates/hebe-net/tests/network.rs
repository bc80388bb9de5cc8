//! The network with real packets, rules and a real DHCP client, in network
//! namespaces of its own: a host, a world beyond it, and guests. Nothing of the
//! machine's own network is touched. Needs root, `ip`, `nft` and busybox; says
//! so where one is missing.

mod world;

use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io, thread};

use hebe_net::{Care, NetworkError, Place};
use hebe_types::{NetConfig, Network};
use world::{World, eventually};

/// What a guest's port says; a guest serves it as long as the test runs.
const WORD: &str = "hello";

#[test]
fn a_guest_gets_its_address_reaches_the_world_and_is_reached_by_its_ports() {
    let Some(world) = World::new("all") else {
        return;
    };
    let port = world.port("web", &["8080:80", "udp:5353:53", "127.0.0.1:2222:80"]);
    let said = world.plug(&port, Care::Whole).expect("plugged");
    assert!(
        said.iter().any(|words| words.contains("ip_forward = 1")),
        "{said:?}"
    );
    let guest = world.guest(&port);
    // DHCP, by another's client.
    let lease = guest.dhcp(&world);
    assert_eq!(lease[0], port.address.to_string(), "{lease:?}");
    assert_eq!(lease[1], "10.86.0.1", "{lease:?}");
    assert_eq!(lease[2], "web", "{lease:?}");
    // Out: the world sees the host's address.
    let seen = world.outside.serve_peers(9000);
    let got = eventually(|| guest.space.ask((world.outside_address, 9000), b""));
    assert_eq!(got.as_deref(), Some("192.0.2.1"));
    drop(seen);
    // In: by the host's address, from the world and from the host; and by the
    // host's loopback address.
    let _served = guest.space.serve(80, WORD);
    for (space, at) in [
        (&world.outside, (Ipv4Addr::new(192, 0, 2, 1), 8080)),
        (&world.host, (Ipv4Addr::new(192, 0, 2, 1), 8080)),
        (&world.host, (Ipv4Addr::LOCALHOST, 8080)),
        (&world.host, (Ipv4Addr::LOCALHOST, 2222)),
    ] {
        let got = eventually(|| space.ask(at, b""));
        assert_eq!(got.as_deref(), Some(WORD), "{at:?}");
    }
    let _udp = guest.space.serve_udp(53, WORD);
    let got = eventually(|| world.outside.ask_udp((Ipv4Addr::new(192, 0, 2, 1), 5353)));
    assert_eq!(got.as_deref(), Some(WORD));
    // Nobody unasked: the world knows the way, and is not let in; what leads in
    // from the loopback address does not from outside.
    world
        .outside
        .run(&["ip", "route", "add", "10.86.0.0/24", "via", "192.0.2.1"]);
    assert_eq!(world.outside.ask((port.address, 80), b""), None);
    let outer = (Ipv4Addr::new(192, 0, 2, 1), 2222);
    assert_eq!(world.outside.ask(outer, b""), None);
    // All of it goes when the guest does.
    drop(guest);
    world.release("web");
    assert!(world.is_gone(), "{}", world.rules());
}

#[test]
fn rules_that_somebody_flushes_come_back() {
    let Some(world) = World::new("flush") else {
        return;
    };
    let port = world.port("web", &["8080:80"]);
    world.plug(&port, Care::Whole).expect("plugged");
    let guest = world.guest(&port);
    let before = world.rules();
    assert!(before.contains("dport 8080"), "{before}");
    world.host.run(&["nft", "flush", "ruleset"]);
    let back = eventually(|| Some(world.rules()).filter(|rules| *rules == before));
    assert_eq!(back, Some(before));
    drop(guest);
}

#[test]
fn a_guest_that_goes_takes_its_ports_along_and_leaves_the_others() {
    let Some(world) = World::new("two") else {
        return;
    };
    let web = world.port("web", &["8080:80"]);
    let db = world.port("db", &["5432:5432"]);
    world.plug(&web, Care::Whole).expect("plugged");
    let first = world.guest(&web);
    world.plug(&db, Care::Whole).expect("plugged");
    let second = world.guest(&db);
    assert_ne!(web.address, db.address);
    assert!(world.rules().contains("dport 8080"));
    // Who has a port keeps it; what is refused leaves nothing.
    let thief = world.port("thief", &["8080:80"]);
    let refused = world.plug(&thief, Care::Whole).expect_err("taken");
    assert!(
        matches!(refused, NetworkError::PortTaken { .. }),
        "{refused}"
    );
    // A VM that goes on comes without the port, and says so.
    let said = world.plug(&thief, Care::WhatThereIs).expect("plugged");
    assert!(said.iter().any(|words| words.contains("'web'")), "{said:?}");
    world.release("thief");
    // Killed: nothing was counted, so nothing is miscounted.
    drop(first);
    world.release("web");
    let gone = eventually(|| (!world.rules().contains("dport 8080")).then_some(()));
    assert!(gone.is_some(), "{}", world.rules());
    assert!(world.rules().contains("dport 5432"));
    drop(second);
    world.release("db");
    assert!(world.is_gone());
}

#[test]
fn a_killed_helper_is_started_again_and_hands_out_the_same() {
    let Some(world) = World::new("kill") else {
        return;
    };
    let port = world.port("web", &[]);
    world.plug(&port, Care::Whole).expect("plugged");
    let guest = world.guest(&port);
    assert_eq!(guest.dhcp(&world)[0], port.address.to_string());
    world.kill_helper();
    world.plug(&port, Care::WhatThereIs).expect("plugged again");
    guest.space.run(&["ip", "addr", "flush", "dev", "eth0"]);
    assert_eq!(guest.dhcp(&world)[0], port.address.to_string());
}

/// Who looks after it needs no order of a VM.
#[test]
fn a_killed_helper_is_started_by_who_looks_after_it_as_long_as_it_is_needed() {
    let Some(world) = World::new("tend") else {
        return;
    };
    assert!(!world.tend().expect("nothing there"));
    let port = world.port("web", &[]);
    world.plug(&port, Care::Whole).expect("plugged");
    assert!(!world.tend().expect("it is served"));
    let guest = world.guest(&port);
    world.kill_helper();
    assert!(world.tend().expect("started"));
    assert!(!world.tend().expect("it is served"));
    assert_eq!(guest.dhcp(&world)[0], port.address.to_string());
    // Killed, and then nobody is left: nobody else would take the network away.
    world.kill_helper();
    drop(guest);
    world.release("web");
    assert!(!world.tend().expect("taken away"));
    assert!(world.is_gone());
}

/// A new kernel has no bridge, no rules and no helper, and the VM is not to be
/// told.
#[test]
fn after_a_reboot_the_network_is_made_anew_around_the_addresses_that_vms_have() {
    let Some(before) = World::new("old") else {
        return;
    };
    let port = before.port("web", &["8080:80"]);
    before.plug(&port, Care::Whole).expect("plugged");
    let state = before.state();
    drop(before);
    let Some(after) = World::new("new") else {
        return;
    };
    let said = after.plug(&port, Care::WhatThereIs).expect("plugged");
    assert_eq!(said.len(), 1, "forwarding alone: {said:?}");
    let guest = after.guest(&port);
    // Where the VMM runs on, it has this address and asks nobody.
    let address = format!("{}/24", port.address);
    guest
        .space
        .run(&["ip", "addr", "add", &address, "dev", "eth0"]);
    let _served = guest.space.serve(80, WORD);
    let at = (Ipv4Addr::new(192, 0, 2, 1), 8080);
    // By the gateway's Ethernet address that the guest knew before.
    let gateway = [
        "ip",
        "neigh",
        "add",
        "10.86.0.1",
        "lladdr",
        "02:48:45:42:45:01",
        "dev",
        "eth0",
        "nud",
        "permanent",
    ];
    guest.space.run(&gateway);
    guest
        .space
        .run(&["ip", "route", "add", "default", "via", "10.86.0.1"]);
    assert_eq!(
        eventually(|| after.outside.ask(at, b"")).as_deref(),
        Some(WORD)
    );
    // And when it is booted anew, by the book.
    let mut nets = vec![NetConfig::made(Network::Nat)];
    let place = Place::open(after.run_dir(), state.path()).expect("place");
    let name = "web".parse().expect("name");
    after
        .host
        .within(move || place.lease(&name, &mut nets, &|_| true).map(|()| nets))
        .map(|nets| assert_eq!(nets[0].address, Some(port.address)))
        .expect("leased");
}

/// Rules for all VMs of a host at once; those that do not come are forgotten.
#[test]
fn vms_that_are_expected_find_their_rules_there() {
    let Some(world) = World::new("many") else {
        return;
    };
    let ports: Vec<_> = ["a", "b", "c"]
        .iter()
        .zip(["1001:1", "1002:1", "1003:1"])
        .map(|(vm, forward)| world.port(vm, &[forward]))
        .collect();
    // As in early user space: nobody holds them yet.
    ["a", "b", "c"].iter().for_each(|vm| world.release(vm));
    world.expect(&ports, || ()).expect("expected");
    let rules = world.rules();
    for port in ["1001", "1002", "1003"] {
        assert!(rules.contains(&format!("dport {port}")), "{rules}");
    }
    let _again = world.port("b", &["1002:1"]);
    world.plug(&ports[1], Care::WhatThereIs).expect("plugged");
    assert_eq!(
        world.rules(),
        rules,
        "nothing is taken away from those that come"
    );
    world.over();
    let gone = || (!world.rules().contains("dport 1001")).then_some(());
    assert!(eventually(gone).is_some(), "{}", world.rules());
    assert!(world.rules().contains("dport 1002"), "{}", world.rules());
}

/// Guests that run before their rules are in: no frame of theirs gets anywhere, and
/// none to them, whoever forwards already. Then all is as ever.
#[test]
fn a_guest_that_runs_before_its_rules_are_in_can_do_nothing_that_they_forbid() {
    let Some(world) = World::new("early") else {
        return;
    };
    let (web, db) = (world.port("web", &["8080:80"]), world.port("db", &[]));
    // Some hosts forward from the first instant on.
    let forwards = "/proc/sys/net/ipv4/ip_forward";
    let on = world.host.within(|| std::fs::write(forwards, "1"));
    on.expect("forwarding");
    let outside = world.outside.serve(9000, WORD);
    let host = world.host.serve(7000, WORD);
    let (gateway, beyond) = (
        (Ipv4Addr::new(10, 86, 0, 1), 7000),
        (world.outside_address, 9000),
    );
    let forwarded = (Ipv4Addr::new(192, 0, 2, 1), 8080);
    world
        .outside
        .run(&["ip", "route", "add", "10.86.0.0/24", "via", "192.0.2.1"]);
    let mut guests = None;
    let meanwhile = || {
        let (first, second) = (world.guest(&web), world.guest(&db));
        // The second passes for the first.
        for guest in [&first, &second] {
            let own = format!("{}/24", web.address);
            for words in [
                &["addr", "add", &own, "dev", "eth0"][..],
                &["route", "add", "default", "via", "10.86.0.1"],
            ] {
                guest.space.run(&[&["ip"], words].concat());
            }
        }
        assert!(!world.rules().contains("hebe"), "{}", world.rules());
        let served = first.space.serve(80, WORD);
        for guest in [&first, &second] {
            assert_eq!(guest.space.ask(gateway, b""), None, "the host");
            assert_eq!(guest.space.ask(beyond, b""), None, "the world");
        }
        for space in [&world.host, &world.outside, &second.space] {
            assert_eq!(space.ask((web.address, 80), b""), None, "unasked");
        }
        // Nobody answers in a guest's place; where no guest is, the host does.
        assert!(!world.outside.is_refused(forwarded));
        let refused = || world.outside.is_refused((forwarded.0, 8081)).then_some(());
        assert!(eventually(refused).is_some());
        let heard = world.host.run(&["ip", "neigh", "show", "dev", "hebe0"]);
        assert!(!heard.contains("lladdr 52:54"), "{heard}");
        guests = Some((first, second, served));
    };
    world
        .expect(&[web.clone(), db.clone()], meanwhile)
        .expect("made");
    let (first, second, _served) = guests.expect("two guests");
    for (from, at) in [
        (&first.space, gateway),
        (&first.space, beyond),
        (&world.outside, forwarded),
    ] {
        let got = eventually(|| from.ask(at, b""));
        assert_eq!(got.as_deref(), Some(WORD), "{at:?}");
    }
    assert_eq!(second.space.ask(gateway, b""), None, "still another's");
    assert_eq!(world.outside.ask((web.address, 80), b""), None, "unasked");
    drop((outside, host));
}

/// A host has its addresses later than that.
#[test]
fn a_port_at_an_address_that_comes_later_leads_to_a_vm_that_goes_on() {
    let Some(world) = World::new("late") else {
        return;
    };
    let at = Ipv4Addr::new(192, 0, 2, 9);
    let port = world.port("web", &["tcp:192.0.2.9:8080:80"]);
    // Of a boot it is said.
    let refused = world.plug(&port, Care::Whole).expect_err("no such address");
    assert!(
        matches!(refused, NetworkError::PortInUse { .. }),
        "{refused}"
    );
    let said = world.expect(std::slice::from_ref(&port), || ());
    let said = said.expect("made").concat();
    assert!(!said.contains("8080"), "{said}");
    let guest = world.guest(&port);
    guest.dhcp(&world);
    let _served = guest.space.serve(80, WORD);
    world
        .host
        .run(&["ip", "addr", "add", "192.0.2.9/24", "dev", "up0"]);
    let got = eventually(|| world.outside.ask((at, 8080), b""));
    assert_eq!(got.as_deref(), Some(WORD));
}

/// Whoever comes next finishes what a process did not that was killed meanwhile.
#[test]
fn a_network_whose_maker_is_killed_is_finished_by_the_next() {
    let Some(world) = World::new("half") else {
        return;
    };
    let port = world.port("web", &["8080:80"]);
    world.half_expect(std::slice::from_ref(&port));
    assert!(!world.rules().contains("hebe"), "{}", world.rules());
    let guest = world.guest(&port);
    assert!(world.tend().expect("finished"));
    assert!(world.rules().contains("dport 8080"), "{}", world.rules());
    assert_eq!(guest.dhcp(&world)[0], port.address.to_string());
}

#[test]
fn a_guest_cannot_pass_for_its_neighbour() {
    let Some(world) = World::new("spoof") else {
        return;
    };
    let (web, db) = (world.port("web", &[]), world.port("db", &[]));
    world.plug(&web, Care::Whole).expect("plugged");
    let first = world.guest(&web);
    world.plug(&db, Care::Whole).expect("plugged");
    let second = world.guest(&db);
    first.dhcp(&world);
    second.dhcp(&world);
    let _served = world.host.serve(7000, WORD);
    let gateway = (Ipv4Addr::new(10, 86, 0, 1), 7000);
    let got = eventually(|| second.space.ask(gateway, b""));
    assert_eq!(got.as_deref(), Some(WORD));
    // With the other's address.
    let theirs = format!("{}/24", web.address);
    second.space.run(&["ip", "addr", "flush", "dev", "eth0"]);
    second
        .space
        .run(&["ip", "addr", "add", &theirs, "dev", "eth0"]);
    assert_eq!(second.space.ask(gateway, b""), None);
    // With the other's Ethernet address.
    let own = format!("{}/24", db.address);
    let mac = web.mac.to_string();
    second.space.run(&["ip", "addr", "flush", "dev", "eth0"]);
    second
        .space
        .run(&["ip", "link", "set", "eth0", "address", &mac]);
    second
        .space
        .run(&["ip", "addr", "add", &own, "dev", "eth0"]);
    assert_eq!(second.space.ask(gateway, b""), None);
    let got = eventually(|| first.space.ask(gateway, b""));
    assert_eq!(got.as_deref(), Some(WORD));
}

/// An ARP request by `mac`, which says that it is `sender`.
fn arp(mac: [u8; 6], hardware: u16, sender: Ipv4Addr) -> Vec<u8> {
    let [high, low] = hardware.to_be_bytes();
    let head = [&[0x08, 0x06, high, low, 8, 0, 6, 4, 0, 1][..], &mac];
    let rest = [&sender.octets()[..], &[0; 6], &[10, 86, 0, 99]];
    [head.concat(), rest.concat()].concat()
}

/// The checksum of a header of IPv4.
fn sum_of(header: &[u8]) -> [u8; 2] {
    let words = header.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

/// What a frame of the test ends with.
const MARK_LEN: u8 = 43;

/// IPv4 with UDP in it, to everybody, without its data.
fn udp(sender: Ipv4Addr, from: u16) -> Vec<u8> {
    let mut packet = [
        &[0x45, 0, 0, 28 + MARK_LEN, 0, 0, 0, 0, 64, 17, 0, 0],
        &sender.octets()[..],
    ]
    .concat();
    packet.extend([255; 4]);
    let sum = sum_of(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(from.to_be_bytes());
    packet.extend([0, 68, 0, 8 + MARK_LEN, 0, 0]);
    [&[0x08, 0x00][..], &packet].concat()
}

/// IPv6 from a guest's own place to all nodes, without its data.
fn ipv6() -> Vec<u8> {
    let place = |first: [u8; 2]| [&first[..], &[0; 13], &[1]].concat();
    // No next header, as far as it goes.
    let head = [0x86, 0xdd, 0x60, 0, 0, 0, 0, MARK_LEN, 59, 255];
    [head.to_vec(), place([0xfe, 0x80]), place([0xff, 2])].concat()
}

/// What a guest writes as it likes: frames that are something else to rules that
/// look for what is wrong, and the same to whoever gets them.
#[test]
fn a_guest_cannot_pass_for_others_by_frames_of_another_make() {
    let Some(world) = World::new("frames") else {
        return;
    };
    let (web, db) = (world.port("web", &[]), world.port("db", &[]));
    world.plug(&web, Care::Whole).expect("plugged");
    world.plug(&db, Care::Whole).expect("plugged");
    let (Some(evil), Some(victim)) = (world.nic(&web), world.nic(&db)) else {
        return;
    };
    let gateway = Ipv4Addr::new(10, 86, 0, 1);
    let (mac, own) = (web.mac.0, web.address);
    let tagged = |tag: [u8; 4], frame: Vec<u8>| [&tag[..], &frame].concat();
    let zero = [0x81, 0, 0, 0];
    let cases = [
        ("its own ARP", arp(mac, 1, own), true),
        ("a probe", arp(mac, 1, Ipv4Addr::UNSPECIFIED), true),
        ("its own packet", udp(own, 68), true),
        (
            "its VMM's RARP",
            [&[0x80, 0x35][..], &[0; 28]].concat(),
            true,
        ),
        ("the gateway's ARP", arp(mac, 1, gateway), false),
        ("the gateway's ARP as IEEE 802", arp(mac, 6, gateway), false),
        (
            "the gateway's ARP in VLAN 0",
            tagged(zero, arp(mac, 1, gateway)),
            false,
        ),
        ("a packet of the gateway", udp(gateway, 68), false),
        (
            "a packet of the gateway in VLAN 0",
            tagged(zero, udp(gateway, 68)),
            false,
        ),
        (
            "its own packet in VLAN 5",
            tagged([0x81, 0, 0, 5], udp(own, 68)),
            false,
        ),
        (
            "two tags",
            tagged([0x88, 0xa8, 0, 0], tagged(zero, arp(mac, 1, gateway))),
            false,
        ),
        ("IPv6", ipv6(), false),
        ("a server of addresses", udp(own, 67), false),
    ];
    let mut wrong = Vec::new();
    for (number, (what, rest, passes)) in (0..).zip(cases) {
        let marked =
            |kind: u8| [&[0xeb, kind, number][..], &[0x5a; MARK_LEN as usize - 3]].concat();
        let frame = [&[255; 6], &mac[..], &rest, &marked(0)].concat();
        let last = [&[255; 6], &mac[..], &arp(mac, 1, own), &marked(1)].concat();
        evil.send(&frame);
        evil.send(&last);
        let come = victim.come(&marked(1));
        let has_mark =
            |frame: &Vec<u8>| frame.windows(MARK_LEN.into()).any(|part| part == marked(0));
        if come.iter().any(has_mark) != passes {
            wrong.push(what);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Stops a thread, also where a test fails.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_guest_that_asks_without_end_keeps_no_other_from_its_address() {
    let Some(world) = World::new("questions") else {
        return;
    };
    let (web, db) = (world.port("web", &[]), world.port("db", &[]));
    world.plug(&web, Care::Whole).expect("plugged");
    world.plug(&db, Care::Whole).expect("plugged");
    let Some(evil) = world.nic(&web) else {
        return;
    };
    let other = world.guest(&db);
    // A request that is read to its end, and answered to nobody.
    let mac = web.mac.0;
    let mut asked = [
        &[1, 1, 6][..],
        &[0; 25],
        &mac,
        &[0; 202],
        &[99, 130, 83, 99],
    ]
    .concat();
    asked.extend([53, 1, 1, 255]);
    let len = asked.len() as u16;
    let mut packet = [
        &[0x45, 0][..],
        &(len + 28).to_be_bytes(),
        &[0, 0, 0, 0, 64, 17, 0, 0],
    ]
    .concat();
    packet.extend(
        [
            &[0; 4][..],
            &[255; 4],
            &[0, 68, 0, 67],
            &(len + 8).to_be_bytes(),
            &[0; 2],
        ]
        .concat(),
    );
    let sum = sum_of(&packet[..20]);
    packet[10..12].copy_from_slice(&sum);
    let frame = [&[255; 6], &mac[..], &[8, 0], &packet, &asked].concat();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                evil.try_send(&frame);
            }
        });
        let _stopping = Stopping(&stop);
        let given = other.dhcp(&world);
        assert_eq!(given[0], db.address.to_string());
    });
}

/// What the host tracks now.
fn tracked(world: &World) -> u32 {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let text = world.host.within(|| fs::read_to_string(path));
    text.expect("a count").trim().parse().expect("a number")
}

#[test]
fn a_guest_that_connects_without_end_takes_no_connection_from_others() {
    /// What a guest may have, and what else there is in such a short time.
    const MAX: u32 = 8192 + 64;
    let Some(world) = World::new("connections") else {
        return;
    };
    let (web, db) = (world.port("web", &[]), world.port("db", &[]));
    world.plug(&web, Care::Whole).expect("plugged");
    let said = world.plug(&db, Care::Whole).expect("plugged");
    if said.iter().any(|words| words.contains("nft_connlimit")) {
        let mut stderr = io::stderr();
        writeln!(stderr, "skipped: connections without end: {said:?}").expect("stderr");
        return;
    }
    let (evil, other) = (world.guest(&web), world.guest(&db));
    evil.dhcp(&world);
    other.dhcp(&world);
    let _peers = world.outside.serve_peers(9000);
    let at = (world.outside_address, 9000);
    assert!(
        eventually(|| evil.space.ask(at, b"")).is_some(),
        "it is held before it began"
    );
    // One that lasts, and that both ends have spoken through.
    let _udp = world.outside.serve_udp(53, WORD);
    let lasting = evil
        .space
        .within(|| UdpSocket::bind("0.0.0.0:0"))
        .expect("a socket");
    let goes_on = || {
        eventually(|| {
            lasting
                .set_read_timeout(Some(Duration::from_millis(500)))
                .ok()?;
            lasting.send_to(b"?", (world.outside_address, 53)).ok()?;
            lasting.recv_from(&mut [0; 64]).ok()
        })
    };
    assert!(goes_on().is_some());
    // To the world and to the host in turn, from ports of its own.
    let begin = |sockets: u32| {
        evil.space.within(|| {
            for n in 0..sockets {
                let to = [at.0, Ipv4Addr::new(10, 86, 0, 1)][n as usize % 2];
                let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
                for port in 20_000..20_500 {
                    let _ = socket.send_to(b"x", (to, port));
                }
            }
        });
    };
    // It had 157500 in six seconds where there was no bound.
    let filled = eventually(|| {
        begin(20);
        (tracked(&world) >= 8192).then_some(())
    });
    assert!(filled.is_some(), "{}", tracked(&world));
    // Another VM comes: what is there counts still.
    let third = world.port("third", &[]);
    world.plug(&third, Care::Whole).expect("plugged");
    begin(200);
    let had = tracked(&world);
    assert!(had < MAX, "{had}");
    assert!(goes_on().is_some(), "what it had is gone");
    assert!(
        eventually(|| other.space.ask(at, b"")).is_some(),
        "its neighbour has no network"
    );
    let of_host = eventually(|| world.host.ask(at, b""));
    assert!(of_host.is_some(), "the host has no network");
    assert_eq!(evil.space.ask(at, b""), None, "there is no bound");
}

#[test]
fn a_range_or_a_port_of_somebody_else_is_left_to_them() {
    let Some(world) = World::new("mine") else {
        return;
    };
    world
        .host
        .run(&["ip", "addr", "add", "10.86.0.77/16", "dev", "up0"]);
    // A new VM gets another range.
    let port = world.port("web", &["8080:80"]);
    assert_eq!(port.address.octets()[..3], [10, 87, 0]);
    // A VM that goes on with an address of the first one has no network.
    let mut old = port.clone();
    old.address = Ipv4Addr::new(10, 86, 0, 20);
    let refused = world.plug(&old, Care::WhatThereIs).expect_err("collides");
    assert!(matches!(refused, NetworkError::Collision(_)), "{refused}");
    assert!(world.is_gone());
    // A program of the host keeps its port.
    let held = world.host.serve(8080, WORD);
    let refused = world.plug(&port, Care::Whole).expect_err("in use");
    assert!(
        matches!(refused, NetworkError::PortInUse { .. }),
        "{refused}"
    );
    assert!(world.is_gone(), "{}", world.rules());
    drop(held);
}
