//! The policy's part in a roll, against a real etcd, where there is one
//! (`HEBE_ETCD`, or `PATH`).

#[allow(
    dead_code,
    reason = "shared with the tests of hebe-fleet, which use all of it"
)]
#[path = "../../hebe-fleet/tests/etcd/server.rs"]
mod server;

use std::fs;
use std::path::Path;

use hebe_fleet::rolls::Rolls;
use hebe_fleet::{FleetConfig, Member};
use hebe_host::Host;
use hebe_host::host::Layout;
use hebe_policy::fleet::forecast::Inventory;
use hebe_policy::fleet::slots::Phase;
use hebe_policy::fleet::turns::{MarkState, Wish};
use hebed::policy::Follower;
use hebed::policy::halt::{Failed, guarded};
use server::Server;

/// Whoever is told how the host is ageing.
fn silent(_: String, _: bool) {}

fn host(dir: &Path, server: &Server, policy: &str) -> Host {
    let mut host = Host::here();
    host.layout = Layout::below(dir);
    for sub in ["etc", "run/hebed", "state"] {
        fs::create_dir_all(dir.join(sub)).expect("folder");
    }
    let fleet = format!(
        "group = \"rack1\"\nhost = \"a\"\nlease = \"60s\"\nrequest_timeout = \"20s\"\n[etcd]\nendpoints = {:?}\n",
        server.endpoints
    );
    fs::write(dir.join("etc/fleet.toml"), fleet).expect("write");
    fs::write(dir.join("etc/policy.toml"), policy).expect("write");
    host
}

fn member(host: &Host, boot_id: &str) -> Member {
    let text = fs::read_to_string(host.layout.config.join("fleet.toml")).expect("text");
    let config: FleetConfig = toml::from_str(&text).expect("fleet.toml");
    Member::new(config, boot_id.to_owned(), &host.layout.state).expect("member")
}

/// Begins roll `id` through these hosts.
fn begin(rolls: &Rolls, id: &str, hosts: &[&str]) {
    let mut text = "group = \"rack1\"\nexpected = \"1min\"\n".to_owned();
    for host in hosts {
        text += &format!("[[host]]\nname = \"{host}\"\n");
    }
    let inventory: Inventory = toml::from_str(&text).expect("inventory");
    let rollout = inventory.rollout(id, "root@b", 1_000).expect("rollout");
    let begun = rolls.begin(&rollout).expect("answer");
    assert!(begun.is_none(), "none is under way");
}

fn state(rolls: &Rolls) -> Option<MarkState> {
    let read = rolls.read().expect("answer").expect("a roll");
    let state = read.view.state(&"a".parse().expect("name"));
    state.cloned()
}

#[test]
fn the_daemon_takes_the_hosts_turn_when_it_has_come() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let dir = tempfile::tempdir().expect("folder");
    let host = host(dir.path(), &server, "[[rule]]\nwhen = \"roll\"\n");
    let rolls = member(&host, "x").rolls().expect("etcd");
    // The first look sees the rule; there is no roll yet.
    let (follower, go) = Follower::default().tick(&host, true, &silent);
    assert_eq!(go, None);
    let (follower, go) = follower.tick(&host, false, &silent);
    assert_eq!(go, None);
    begin(&rolls, "1", &["b", "a"]);
    let (follower, go) = follower.tick(&host, false, &silent);
    assert_eq!(go, None, "b comes first");
    let skip = Wish::Skip("b".parse().expect("name"));
    rolls
        .wish(&member(&host, "x"), &skip, "root@b")
        .expect("granted");
    // Without waiting for the minute.
    let (follower, go) = follower.tick(&host, false, &silent);
    let words = go.expect("its turn").join(" ");
    assert_eq!(words, "reboot --roll --wait 1min");
    let (_, go) = follower.tick(&host, false, &silent);
    assert_eq!(go, None, "it was just tried");
    // A policy without the rule has nothing to do with rolls.
    let policy = dir.path().join("etc/policy.toml");
    fs::write(&policy, "[[rule]]\nwhen = \"by-hand\"\n").expect("write");
    let (follower, _) = Follower::default().tick(&host, true, &silent);
    assert_eq!(follower.tick(&host, true, &silent).1, None);
    assert_eq!(state(&rolls), None);
    // Nothing goes after a reboot that was undone: others read why they wait.
    fs::write(&policy, "[[rule]]\nwhen = \"roll\"\n").expect("write");
    let undone = || {
        Err(Failed {
            why: "kexec failed".to_owned(),
            touched: true,
        })
    };
    assert!(guarded(&host, &[], undone).is_err());
    let (follower, _) = Follower::default().tick(&host, true, &silent);
    assert_eq!(follower.tick(&host, false, &silent).1, None);
    let Some(MarkState::Waiting { why }) = state(&rolls) else {
        panic!("nobody knows why it waits: {:?}", state(&rolls));
    };
    assert!(why.contains("was undone (kexec failed)"), "{why}");
}

#[test]
fn the_daemon_says_how_its_hosts_turn_ended() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let dir = tempfile::tempdir().expect("folder");
    let host = host(dir.path(), &server, "[[rule]]\nwhen = \"roll\"\n");
    let before = member(&host, "the boot before");
    let rolls = before.rolls().expect("etcd");
    begin(&rolls, "1", &["a"]);
    rolls.mark(&before, "1", &MarkState::Away).expect("answer");
    let mut slot = before.new_slot().expect("slot");
    let taken = before.slots.take(&slot, slot.since_s).expect("answer");
    assert_eq!(taken, hebe_fleet::Taken::Leased);
    slot.phase = Phase::Verifying;
    assert!(before.slots.pin(&slot).expect("answer"));
    let (follower, _) = Follower::default().tick(&host, true, &silent);
    let (follower, go) = follower.tick(&host, false, &silent);
    assert_eq!(go, None);
    assert_eq!(state(&rolls), Some(MarkState::Away), "a VM does not answer");
    before.slots.release(&slot).expect("answer");
    let (_, go) = follower.tick(&host, false, &silent);
    assert_eq!(go, None);
    assert_eq!(state(&rolls), Some(MarkState::Done { why: None }));
}
