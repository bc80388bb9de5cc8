//! `hebe fleet roll` and `hebe reboot --roll` against a real etcd, where there
//! is one (`HEBE_ETCD`, or `PATH`).

mod group;

use std::fs;
use std::path::PathBuf;

use group::server::Server;
use group::{Host, put_slot, slot};
use hebe_fleet::etcd::{Change, Condition};
use serde_json::{Value, json};

/// An inventory of these hosts, with more of TOML.
fn inventory(host: &Host, hosts: &[&str], more: &str) -> PathBuf {
    let mut text = format!("group = \"rack1\"\nexpected = \"1min\"\n{more}");
    for host in hosts {
        text += &format!("[[host]]\nname = \"{host}\"\n");
    }
    let path = host.dir().join("inventory.toml");
    fs::write(&path, text).expect("write");
    path
}

fn states(host: &Host) -> Vec<String> {
    let status = host.json("fleet roll status");
    let rows = status["hosts"].as_array().expect("hosts").iter();
    rows.map(|row| row["state"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// What an earlier kernel of `host` wrote down when it went.
fn put_away(server: &Server, host: &Host, named: &str) {
    let id = host.json("fleet roll status")["id"].clone();
    let mark = json!({
        "version": 1, "roll": id, "host": named, "machine": group::machine(),
        "boot_id": "before", "at_s": 1_000, "state": {"state": "away"},
    });
    let put = Change::Put(
        format!("/hebe/roll/1/rack1/host/{named}"),
        mark.to_string().into_bytes(),
        0,
    );
    let always = [Condition::QuietSince("/nothing/".into(), 0)];
    assert!(server.client().change(&always, &[put]).expect("answer"));
}

#[test]
fn a_roll_goes_through_the_hosts_as_they_take_their_turns() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let [a, b, c] = ["a", "b", "c"].map(|name| Host::of(&server, name));
    a.says("fleet roll status", 1, "there is no roll");
    a.says("reboot --roll", 1, "there is no roll");
    let file = inventory(
        &a,
        &["a", "b", "c"],
        "[reboot]\nkernel = \"/nonexistent/vmlinuz\"\n",
    );
    let order = format!("fleet roll {}", file.display());
    let begun = a.json(&order);
    assert_eq!(
        (&begun["state"], &begun["capacity"]),
        (&json!("running"), &json!(3.0))
    );
    assert_eq!(states(&b), ["next", "later", "later"]);
    b.says(&order, 3, "began a roll through 'rack1' that is not over");
    b.says("reboot --roll", 3, "a before it are not through");
    // Its old kernel went; the new one gives the slot back and says so.
    put_slot(&server, "a", &slot("a", 4_000_000_000, &[]));
    put_away(&server, &a, "a");
    assert_eq!(states(&c), ["away", "later", "later"]);
    b.says("reboot --roll", 3, "a before it are not through");
    a.says("reboot --roll", 3, "under way");
    a.says("fleet release", 0, "gave its slot");
    assert_eq!(states(&c), ["done", "next", "later"]);
    a.says("reboot --roll", 3, "had its turn: done");
    // The next host cannot go: nothing is touched, and the one after it may.
    b.says("reboot --roll", 3, "/nonexistent/vmlinuz");
    assert_eq!(states(&c), ["done", "refused", "next"]);
    // Persons on other hosts.
    a.says("fleet roll pause", 0, "paused (by ");
    c.says("reboot --roll", 3, "paused the roll");
    b.says("fleet roll continue", 0, "running");
    b.says("fleet roll continue", 3, "the roll is running");
    a.says("fleet roll skip c", 0, "over");
    a.says("fleet roll skip c", 3, "the roll is over");
    assert_eq!(states(&b), ["done", "refused", "skipped"]);
    c.says("fleet roll status --wait", 3, "over");
    a.says("fleet roll retry b", 0, "next");
    a.says("fleet roll abort", 0, "aborted (by ");
    b.says("reboot --roll", 3, "aborted the roll");
    let only = format!("[reboot]\nonly_if = {:?}\n", a.dir().join("absent"));
    let file = inventory(&b, &["b"], &only);
    b.says(&format!("fleet roll {}", file.display()), 0, "running");
    b.says("reboot --roll", 0, "nothing asks for a reboot");
    b.says("fleet roll status --wait", 0, "over");
}

#[test]
fn a_host_that_is_not_back_stops_the_roll_for_everybody() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let [a, b] = ["a", "b"].map(|name| Host::of(&server, name));
    let file = inventory(&a, &["a", "b"], "at_most = 2\n");
    a.says(
        &format!("fleet roll {}", file.display()),
        0,
        "fleet.toml here says at_most = 1",
    );
    put_slot(&server, "a", &slot("a", 2_000, &[]));
    put_away(&server, &a, "a");
    b.says(
        "reboot --roll",
        3,
        "the roll stops, because host 'a' was to be back",
    );
    a.says("fleet roll status --wait", 3, "says 'b'");
    b.says("fleet roll continue", 3, "hebe fleet roll retry HOST");
    b.says("fleet roll skip a", 3, "hebe fleet unlock a --yes");
    b.says("fleet unlock a --yes", 0, "the slot of 'a' is free");
    b.says("fleet roll skip a", 0, "skipped");
    b.says("fleet roll continue", 0, "running");
    assert_eq!(states(&a), ["skipped", "next"]);
    // Nobody comes after the last one: whoever watches finds out.
    put_slot(&server, "b", &slot("b", 2_000, &[]));
    put_away(&server, &b, "b");
    a.says("fleet roll status --wait", 3, "stopped");
    assert_eq!(a.json("fleet roll status")["state"], "stopped");
}

#[test]
fn what_cannot_be_meant_is_one_sentence() {
    let Some(server) = Server::start(1) else {
        return;
    };
    let a = Host::of(&server, "a");
    for (hosts, more, word) in [
        (
            &["a"][..],
            "[reboot]\nkernel = \"vmlinuz\"\n",
            "no whole path",
        ),
        (&["a"], "[reboot]\nkernal = \"/vmlinuz\"\n", "kernal"),
        (&["a"], "[reboot]\nmethod = \"hot\"\n", "hot"),
        (&["a", "a"], "", "there twice"),
        (&["a b"], "", "no name of a host"),
        (&[], "", "no [[host]]"),
    ] {
        let file = inventory(&a, hosts, more);
        a.says(&format!("fleet roll {}", file.display()), 1, word);
    }
    let file = inventory(&a, &["a"], "");
    let text = fs::read_to_string(&file).expect("text");
    fs::write(&file, text.replace("rack1", "rack2")).expect("write");
    a.says(
        &format!("fleet roll {}", file.display()),
        1,
        "this host is in 'rack1'",
    );
    a.says("fleet roll", 2, "Usage");
    a.says("fleet roll status", 1, "there is no roll");
    a.says("fleet roll abort", 1, "there is no roll");
}

#[test]
fn a_fleetlock_server_keeps_no_rolls_and_what_to_order_is_said() {
    let a = Host::of_nobody();
    let more = "order = \"smallest-first\"\n[reboot]\nkernel = \"/boot/vm'linuz\"\nmethod = \"saved\"\nonly_if = \"/run/reboot-required\"\n[[host]]\nname = \"b\"\ncapacity = 5\n";
    let file = inventory(&a, &["a"], more);
    let order = format!("fleet roll {}", file.display());
    a.says(&order, 3, "keeps slots and no rolls");
    let orders: Value = a.json(&order)["orders"].clone();
    assert_eq!(
        (&orders[0]["host"], &orders[1]["host"]),
        (&json!("a"), &json!("b"))
    );
    assert_eq!(
        orders[0]["order"],
        "test ! -e '/run/reboot-required' || hebe reboot --fleet --kernel '/boot/vm'\\''linuz' --method saved"
    );
    for line in ["fleet roll status", "fleet roll pause", "reboot --roll"] {
        a.says(line, 1, "keeps slots and no rolls");
    }
}
