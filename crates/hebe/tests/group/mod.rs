//! Hosts of a group: `hebe` with folders of its own for each, and a real etcd.

#![allow(dead_code, reason = "no test uses all of it")]

#[allow(
    dead_code,
    reason = "shared with the tests of hebe-fleet, which use all of it"
)]
#[path = "../../../hebe-fleet/tests/etcd/server.rs"]
pub mod server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use hebe_fleet::etcd::{Change, Condition};
use serde_json::{Value, json};
use server::Server;
use tempfile::TempDir;

/// How long slots and requests last: more than a busy computer ever stands still.
const LEASE: &str = "lease = \"60s\"\nrequest_timeout = \"20s\"\n";
const HASTY_LEASE: &str = "lease = \"5s\"\nrequest_timeout = \"1s\"\n";

/// A host: `hebe` with folders of its own.
pub struct Host {
    dir: TempDir,
}

impl Host {
    /// One of no group.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        Self { dir }
    }

    /// One of the group that `server` keeps the slots of.
    pub fn of(server: &Server, name: &str) -> Self {
        let host = Self::new();
        host.configure(&config(server, name));
        host
    }

    /// The same, of one who does not insist for long where nobody answers.
    pub fn hasty(server: &Server, name: &str) -> Self {
        let host = Self::new();
        let config = config(server, name);
        host.configure(&config.replace(LEASE, HASTY_LEASE));
        host
    }

    /// Called a, in a group whose FleetLock server is not there.
    pub fn of_nobody() -> Self {
        let host = Self::new();
        let lock = "[fleetlock]\nurl = \"http://127.0.0.1:1\"\n";
        host.configure(&format!("group = \"rack1\"\nhost = \"a\"\n{lock}"));
        host
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn hebe(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hebe"))
            .args(line.split_whitespace())
            .env("HEBE_CONFIG_DIR", self.dir().join("etc"))
            .env("HEBE_STATE_DIR", self.dir().join("state"))
            .env("HEBE_RUN_DIR", self.dir().join("run"))
            .env("HEBE_STORE", self.dir().join("no-store"))
            .output()
            .expect("hebe runs")
    }

    pub fn says(&self, line: &str, exit: i32, word: &str) {
        let output = self.hebe(line);
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).expect("text");
        assert_eq!(output.status.code(), Some(exit), "{line}: {text}");
        assert!(text.contains(word), "{line} does not say '{word}': {text}");
    }

    pub fn json(&self, line: &str) -> Value {
        let output = self.hebe(&format!("--json {line}"));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    pub fn configure(&self, text: &str) {
        fs::create_dir_all(self.dir().join("etc")).expect("folder");
        fs::write(self.dir().join("etc/fleet.toml"), text).expect("write");
    }
}

fn config(server: &Server, host: &str) -> String {
    format!(
        "group = \"rack1\"\nhost = \"{host}\"\n{LEASE}[etcd]\nendpoints = {:?}\n",
        server.endpoints
    )
}

/// What this machine calls itself.
pub fn machine() -> String {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    id.trim().to_owned()
}

/// What the old kernel of `host`, on this machine, wrote down.
pub fn slot(host: &str, deadline_s: u64, vms: &[&str]) -> Value {
    json!({
        "version": 1, "host": host, "machine": machine(), "phase": "rebooting", "claim": "c",
        "boot_id": "before", "since_s": 1_000, "deadline_s": deadline_s, "at_most": 1, "vms": vms,
    })
}

pub fn put(server: &Server, host: &str, deadline_s: u64, vms: &[&str]) {
    put_slot(server, host, &slot(host, deadline_s, vms));
}

pub fn put_slot(server: &Server, host: &str, slot: &Value) {
    let put = Change::Put(
        format!("/hebe/fleet/1/rack1/{host}"),
        slot.to_string().into_bytes(),
        0,
    );
    let always = Condition::QuietSince("/nothing/".into(), 0);
    assert!(server.client().change(&[always], &[put]).expect("answer"));
}
