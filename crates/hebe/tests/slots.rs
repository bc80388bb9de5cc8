//! `hebe fleet status`, `lock`, `release` and `unlock` against a real etcd,
//! where there is one (`HEBE_ETCD`, or `PATH`).

mod group;

use std::fs;

use group::server::Server;
use group::{Host, put, put_slot, slot};
use serde_json::{Value, json};

#[test]
fn two_hosts_take_turns() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let [a, b] = ["a", "b"].map(|name| Host::of(&server, name));
    a.says(
        "fleet status",
        0,
        "0 under way, at most 1 at once; this is 'a'",
    );
    a.says("fleet release", 0, "has no slot to release");
    let locked = a.json("fleet lock");
    assert_eq!(
        (&locked["result"], &locked["slot"]["phase"]),
        (&json!("locked"), &json!("rebooting"))
    );
    a.says("fleet lock", 0, "'a' has a slot of 'rack1'");
    b.says(
        "fleet lock --wait 0s",
        3,
        "as many hosts as may be are under way (1 of at most 1): a",
    );
    let status = b.json("fleet status");
    assert_eq!(status["slots"][0]["host"], "a");
    assert_eq!(status["slots"][0]["overdue"], false);
    assert_eq!(status["stopped"], Value::Null);
    b.says("fleet unlock a", 1, "hebe fleet unlock a --yes");
    a.says("fleet release", 0, "gave its slot of 'rack1' back");
    b.says("fleet lock --wait 0s", 0, "'b' has a slot");
    a.says("fleet unlock b --yes", 0, "the slot of 'b' is free");
    assert_eq!(a.json("fleet unlock b --yes")["result"], "none");
}

#[test]
fn the_new_kernel_gives_the_slot_back_when_every_vm_answers() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let a = Host::of(&server, "a");
    let later = 4_000_000_000;
    put(&server, "a", later, &["web"]);
    a.says("fleet release --wait 0s", 5, "VM 'web' is not there");
    assert_eq!(a.json("fleet status")["slots"][0]["phase"], "verifying");
    a.says("fleet lock", 3, "hebe fleet release");
    put(&server, "a", later, &[]);
    a.says("fleet release", 0, "gave its slot");
    // It came back late: its slot is released all the same.
    put(&server, "a", 2_000, &[]);
    a.says("fleet status", 3, "NOT BACK");
    a.says("fleet release", 0, "gave its slot");
    // Another one does not come back.
    put(&server, "b", 2_000, &[]);
    a.says("fleet lock", 3, "hebe fleet unlock b --yes");
    let status = a.json("fleet status");
    let stopped = status["stopped"].as_str().expect("a sentence");
    assert!(stopped.contains("'b' did not come back"), "{stopped}");
}

#[test]
fn a_machine_of_the_same_name_releases_nothing() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let a = Host::of(&server, "a");
    let mut other = slot("a", 4_000_000_000, &[]);
    other["machine"] = json!("another");
    put_slot(&server, "a", &other);
    a.says("fleet release", 1, "another machine of the same name 'a'");
    a.says("fleet lock", 3, "another machine of the same name 'a'");
    assert_eq!(a.json("fleet status")["slots"][0]["machine"], "another");
    a.says("fleet unlock a --yes", 0, "the slot of 'a' is free");
}

#[test]
fn the_record_on_a_copied_disk_releases_nothing() {
    let a = Host::of_nobody();
    let mut other = slot("a", 4_000_000_000, &[]);
    other["machine"] = json!("another");
    fs::create_dir_all(a.dir().join("state/fleet")).expect("folder");
    let note = a.dir().join("state/fleet/slot.json");
    fs::write(&note, other.to_string()).expect("write");
    a.says("fleet release", 1, "another machine of the same name 'a'");
    assert!(note.exists());
}

#[test]
fn without_etcd_one_sentence_says_so() {
    let Some(mut server) = Server::start(1) else {
        return;
    };
    let a = Host::hasty(&server, "a");
    server.kill(0);
    for line in ["fleet status", "fleet unlock b --yes"] {
        a.says(line, 1, "nobody keeps the slots of this group just now");
    }
    a.says("fleet lock --wait 0s", 3, "nobody keeps the slots");
    a.says("fleet release", 1, "the slot is not released");
    let error = a.json("fleet status");
    assert!(error["error"].is_string(), "{error}");
}

#[test]
fn a_host_without_a_sound_group_is_told_what_to_write() {
    let a = Host::new();
    for line in [
        "fleet status",
        "fleet lock",
        "fleet release",
        "fleet unlock b --yes",
        "reboot --fleet --dry-run",
    ] {
        a.says(line, 1, "this host belongs to no group: there is no");
    }
    let good = "group = \"g\"\n[etcd]\nendpoints = [\"http://127.0.0.1:1\"]\n";
    for (text, word) in [
        ("", "fleet.toml"),
        ("group = \"g\"\n", "either [etcd] or [fleetlock]"),
        ("group = \"a/b\"\n", "no name of a host or group"),
        (&format!("at_most = 0\n{good}"), "at_most = 0"),
        (&format!("most = 0\n{good}"), "most"),
        (&good.replace("http:", "https:"), "ca ="),
    ] {
        a.configure(text);
        a.says("fleet status", 1, word);
    }
}
