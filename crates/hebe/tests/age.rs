//! `hebe host sample` and `hebe host age`, on a host whose samples are given.

use std::path::Path;
use std::process::{Command, Output};

use hebe_host::Host;
use hebe_host::ageing::{SLOTS, SampleStore, path_below, sample};
use serde_json::Value;

fn hebe(root: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hebe"))
        .args(arguments)
        .env("HEBE_STATE_DIR", root)
        .env("HEBE_RUN_DIR", root.join("run"))
        .env("HEBE_CONFIG_DIR", root.join("etc"))
        .output()
        .expect("hebe runs")
}

#[test]
fn a_host_is_sampled_and_it_is_too_early_to_tell() {
    let dir = tempfile::tempdir().expect("dir");
    let none = hebe(dir.path(), &["host", "age"]);
    assert_eq!(none.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&none.stderr);
    assert!(stderr.contains("hebe host sample"), "{stderr}");
    assert!(hebe(dir.path(), &["host", "sample"]).status.success());
    let output = hebe(dir.path(), &["--json", "host", "sample"]);
    let taken: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(taken["readings"][0]["indicator"], "memory-available");
    assert!(taken["readings"][0]["limit"].is_number(), "{taken}");
    assert!(taken["boot_id"].is_string(), "{taken}");
    let output = hebe(dir.path(), &["--json", "host", "age"]);
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&value["samples"], &value["ageing"]),
        (&2.into(), &false.into())
    );
    assert_eq!(value["findings"][0]["trend"], "too-short");
}

/// A leak of 1 MB every ten seconds from 1 GB: the limit is reached in 10,000
/// seconds less what has gone by.
#[test]
fn a_leak_is_a_status_and_a_sentence() {
    let dir = tempfile::tempdir().expect("dir");
    let mut store = SampleStore::open(&path_below(dir.path()), SLOTS).expect("store");
    let mut sample = sample(&Host::here()).expect("sample");
    for i in 0..50 {
        sample.up_s += 10.0;
        sample.at_s += 10.0;
        let wobble = f64::from(i * 7 % 5) * 1e5;
        let available = sample.readings[0].as_mut().expect("available memory");
        available.value = 1e9 - f64::from(i) * 1e6 + wobble;
        store.append(&sample).expect("append");
    }
    drop(store);
    let output = hebe(dir.path(), &["host", "age", "--period", "none"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("available memory is exhausted first"),
        "{text}"
    );
    let output = hebe(dir.path(), &["--json", "host", "age", "--period", "none"]);
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let seconds = value["findings"][0]["exhausted_in_s"]
        .as_f64()
        .expect("time");
    assert!((seconds / 9_510.0 - 1.0).abs() < 0.2, "{seconds}");
    let early = hebe(dir.path(), &["host", "age"]);
    assert_eq!(early.status.code(), Some(0));
    for (flag, value) in [
        ("--period", "soon"),
        ("--error-rate", "0"),
        ("--confidence", "7"),
    ] {
        let refused = hebe(dir.path(), &["host", "age", flag, value]);
        assert!(
            [Some(1), Some(2)].contains(&refused.status.code()),
            "{flag}"
        );
    }
}

/// What the boot before suffered from was cured by its end, whether or not this
/// one was sampled yet.
#[test]
fn right_after_a_reboot_the_boot_before_is_not_assessed() {
    let dir = tempfile::tempdir().expect("dir");
    let mut store = SampleStore::open(&path_below(dir.path()), SLOTS).expect("store");
    let mut sample = sample(&Host::here()).expect("sample");
    let this_boot = sample.boot;
    sample.boot = [7; 16];
    for i in 0..50 {
        sample.up_s += 10.0;
        sample.at_s += 10.0;
        sample.readings[0].as_mut().expect("memory").value = 1e9 - f64::from(i) * 1e6;
        store.append(&sample).expect("append");
    }
    let svg = dir.path().join("age.svg");
    let look = || {
        let path = svg.to_string_lossy().into_owned();
        let age = ["host", "age", "--period", "none", "--svg", &path];
        let text = hebe(dir.path(), &age);
        let json = hebe(dir.path(), &[&["--json"], &age[..]].concat());
        let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
        (text, value)
    };
    let (text, value) = look();
    assert_eq!(text.status.code(), Some(0), "{text:?}");
    let said = String::from_utf8_lossy(&text.stdout);
    assert!(said.contains("no sample of this boot yet"), "{said}");
    assert_eq!(
        (&value["samples"], &value["samples_before"]),
        (&0.into(), &50.into())
    );
    assert_eq!(value["ageing"], false);
    let drawn = std::fs::read_to_string(&svg).expect("chart");
    assert!(
        drawn.contains("available memory") && !drawn.contains(">reboot<"),
        "{drawn}"
    );
    sample.boot = this_boot;
    sample.at_s += 60.0;
    store.append(&sample).expect("append");
    let (text, value) = look();
    assert_eq!(text.status.code(), Some(0), "{text:?}");
    assert_eq!(
        (&value["samples"], &value["ageing"]),
        (&1.into(), &false.into())
    );
    let drawn = std::fs::read_to_string(&svg).expect("chart");
    assert!(drawn.contains(">reboot<"), "{drawn}");
}
