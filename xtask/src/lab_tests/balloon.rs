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
/// What the third guest is left with, in MiB.
const LEFT_MIB: f64 = 128.0;
/// How long a guest may take, under an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// Three guests with the same cached file: without a balloon, with one that
/// takes reports, and with one that is blown up besides.
pub fn run(scene: &Scene) -> Result<()> {
    let [from, to] = Carrier::Luo.kernels();
    let guests: Vec<GuestSpec> = (0..3)
        .map(|index| GuestSpec {
            store: Carrier::Luo.kind(),
            disk: true,
            balloon: index > 0,
            memcheck_mib: 8,
            ..GuestSpec::numbered(index, KernelName::V6_1Cloud)
        })
        .collect();
    let disks = guests.iter().map(|g| (g.name.clone(), CACHED_MIB + 64));
    let options = LabOptions {
        host: from,
        others: vec![to],
        guest_disks: disks.collect(),
        ..Carrier::Luo.options(3)
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    lab.start(&guests)?;
    for guest in &guests {
        let path = format!("/file?mib={CACHED_MIB}");
        probe::http_get(lab.ports(guest)?.http, &path, PATIENCE)?;
    }
    for name in ["vm2", "vm3"] {
        let status = wait(&lab, name, "its driver", |s| s["active"] == true)?;
        ensure!(status["gives_back"] == true, "{name}: {status}");
        ensure!(status["reporting"] == true, "{name}: {status}");
        let says = |key: &str| status["guest"][key].as_u64().unwrap_or(0);
        ensure!(says("total") > 0 && says("caches") > 0, "{name}: {status}");
    }
    let before = balloon(&lab, "vm3")?;
    show("vm2 at first", &balloon(&lab, "vm2")?);
    show("vm3 at first", &before);
    let target = format!("{LEFT_MIB}MiB");
    super::json(
        &lab,
        &["hebe", "balloon", "vm3", "--target", &target, "--json"],
    )?;
    let small = wait(&lab, "vm3", "to be small", |s| {
        mib(&s["actual"]) <= LEFT_MIB
    })?;
    show("vm3 small", &small);
    let gone = mib(&before["resident"]) - mib(&small["resident"]);
    ensure!(gone > 32.0, "only {gone} MiB came back: {small}");

    say_plans(&lab, to)?;
    let trial = trial::reboot(&mut lab, &guests, Method::Warm, to, &[], scene.progress)?;
    demo::check(&trial)?;
    let carried = trial.report["carried"].as_array();
    for row in carried.context("the report has no carried VMs")? {
        println!("    carried: {row}");
    }
    let after = balloon(&lab, "vm3")?;
    show("vm3 afterwards", &after);
    ensure!(after["target"] == small["target"], "{after}");
    ensure!(after["actual"] == small["actual"], "{after}");

    // The remedy that pre-flight names.
    let all = ["hebe", "balloon", "vm3", "--target", "256MiB", "--json"];
    super::json(&lab, &all)?;
    wait(&lab, "vm3", "to be large", |s| mib(&s["actual"]) >= 256.0)?;
    super::json(
        &lab,
        &["hebe", "balloon", "vm3", "--target", &target, "--json"],
    )?;
    let again = wait(&lab, "vm3", "to be small again", |s| {
        mib(&s["actual"]) <= LEFT_MIB
    })?;
    show("vm3 small again", &again);
    ensure!(
        mib(&again["resident"]) + 16.0 < mib(&after["resident"]),
        "{after}, {again}"
    );
    lab.wait_for_guests(&guests)?;
    lab.machine.check()?;
    lab.machine.power_off()
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

/// Pre-flight says what is filled, and warns where that undoes a balloon.
fn say_plans(lab: &Lab, to: KernelName) -> Result<()> {
    let arguments = lab.reboot_arguments(to);
    let mut argv = vec!["hebe", "reboot", "--dry-run", "--json"];
    argv.extend(arguments.iter().map(String::as_str));
    let verdict = lab.machine.exec(&argv)?;
    let verdict: Value = serde_json::from_str(&verdict.text()).context("no JSON")?;
    let checks = verdict["checks"].as_array().context("no checks")?;
    for (name, level) in [("vm1", "ok"), ("vm3", "warn")] {
        let id = format!("live-update:{name}");
        let check = checks.iter().find(|c| c["id"] == id.as_str());
        let check = check.with_context(|| format!("nothing about {name}: {verdict}"))?;
        println!("    {}", check["sentence"].as_str().unwrap_or_default());
        ensure!(check["level"] == level, "{check}");
    }
    Ok(())
}
