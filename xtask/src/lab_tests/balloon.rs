//! Balloons of real guests under a real Live Update Orchestrator: what they
//! give back, and what preserving fills again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::probe;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde_json::Value;

use crate::demo::{self, Carrier};
use crate::test::Scene;

/// What a guest puts into its page cache, in MiB.
const CACHED_MIB: u64 = 96;
/// What the guest is left with, in MiB.
const LEFT_MIB: f64 = 128.0;
/// How long a guest may take, under an emulated processor.
const PATIENCE: Duration = Duration::from_secs(400);

/// One guest that fills its page cache, is left with half of its RAM, and goes
/// over a reboot.
pub fn run(scene: &Scene) -> Result<()> {
    let [from, to] = Carrier::Luo.kernels();
    let guest = GuestSpec {
        store: Carrier::Luo.kind(),
        disk: true,
        balloon: true,
        memcheck_mib: 8,
        ..GuestSpec::numbered(0, KernelName::V6_1Cloud)
    };
    let (name, guests) = (guest.name.clone(), [guest]);
    let options = LabOptions {
        host: from,
        others: vec![to],
        guest_disks: vec![(name.clone(), CACHED_MIB + 64)],
        ..Carrier::Luo.options(1)
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    lab.start(&guests)?;
    let status = wait(&lab, &name, "driver", |s| s["active"] == true)?;
    ensure!(status["gives_back"] == true, "{status}");
    ensure!(status["reporting"] == true, "{status}");
    say_plan(&lab, &name, to, "as it boots")?;
    show("as it boots", &status);

    let path = format!("/file?mib={CACHED_MIB}");
    probe::http_get(lab.ports(&guests[0])?.http, &path, PATIENCE)?;
    // What the guest tells of itself comes when it comes to it.
    let full = wait(&lab, &name, "word of the guest's", |status| {
        let says = |key: &str| status["guest"][key].as_u64().unwrap_or(0);
        says("total") > 0 && says("caches") > 0
    })?;
    show("with a full cache", &full);
    say_plan(&lab, &name, to, "with a full cache")?;

    let small = set(&lab, &name, LEFT_MIB, |left| left <= LEFT_MIB)?;
    show("small", &small);
    let gone = mib(&full["resident"]) - mib(&small["resident"]);
    ensure!(gone > 32.0, "only {gone} MiB came back: {small}");
    let level = say_plan(&lab, &name, to, "small")?;
    ensure!(level == "warn", "the operator is not warned: {level}");

    let trial = trial::reboot(&mut lab, &guests, Method::Warm, to, &[], scene.progress)?;
    demo::check(&trial)?;
    let carried = trial.report["carried"].as_array();
    for row in carried.context("the report has no carried VMs")? {
        println!("    carried: {row}");
    }
    let after = balloon(&lab, &name)?;
    show("after the reboot", &after);
    ensure!(after["target"] == small["target"], "{after}");
    ensure!(after["actual"] == small["actual"], "{after}");

    // The remedy that pre-flight names.
    set(&lab, &name, 256.0, |left| left >= 256.0)?;
    let again = set(&lab, &name, LEFT_MIB, |left| left <= LEFT_MIB)?;
    show("small again", &again);
    let gone = mib(&after["resident"]) - mib(&again["resident"]);
    ensure!(gone > 16.0, "only {gone} MiB came back: {again}");
    lab.wait_for_guests(&guests)?;
    lab.machine.check()?;
    lab.machine.power_off()
}

/// Sets a balloon, and waits until the guest is there.
fn set(lab: &Lab, name: &str, mib_left: f64, done: impl Fn(f64) -> bool) -> Result<Value> {
    let target = format!("{mib_left}MiB");
    super::json(
        lab,
        &["hebe", "balloon", name, "--target", &target, "--json"],
    )?;
    wait(lab, name, "such size", |s| done(mib(&s["actual"])))
}

fn balloon(lab: &Lab, name: &str) -> Result<Value> {
    super::json(lab, &["hebe", "balloon", name, "--json"])
}

fn wait(lab: &Lab, name: &str, what: &str, done: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = balloon(lab, name)?;
        if done(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "{name}: no {what}: {status}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// A size as the product writes it.
fn mib(size: &Value) -> f64 {
    let size = size
        .as_str()
        .and_then(|s| s.parse::<hebe_types::ByteSize>().ok());
    size.map_or(f64::NAN, |s| s.bytes() as f64 / f64::from(1 << 20))
}

fn show(what: &str, status: &Value) {
    let of = |key: &str| mib(&status[key]);
    println!(
        "    {what}: left {:.0}, in use here {:.0}, given back {:.0} by the balloon and {:.0} by reports, kept {:.0} MiB",
        of("actual"),
        of("resident"),
        of("inflated"),
        of("reported"),
        of("kept")
    );
}

/// Says what pre-flight says of the VM's memory; returns how serious it is.
fn say_plan(lab: &Lab, name: &str, to: KernelName, when: &str) -> Result<String> {
    let arguments = lab.reboot_arguments(to);
    let mut argv = vec!["hebe", "reboot", "--dry-run", "--json"];
    argv.extend(arguments.iter().map(String::as_str));
    let verdict = lab.machine.exec(&argv)?;
    let verdict: Value = serde_json::from_str(&verdict.text()).context("no JSON")?;
    let checks = verdict["checks"].as_array().context("no checks")?;
    let id = format!("live-update:{name}");
    let check = checks.iter().find(|c| c["id"] == id.as_str());
    let check = check.with_context(|| format!("nothing about {name}: {verdict}"))?;
    println!(
        "    {when}, by pre-flight: {}",
        check["sentence"].as_str().unwrap_or_default()
    );
    Ok(check["level"].as_str().unwrap_or_default().to_owned())
}
