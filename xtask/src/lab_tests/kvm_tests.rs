//! The tests that run small guests. Where this computer's `/dev/kvm` can, they
//! ran there among the unit tests; otherwise they run in the emulated machine.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::binaries::{HEBE, HEBE_VMM, Tests};
use lab::scenario::{Lab, LabOptions};

use crate::test::Scene;

/// The packages whose tests run guests.
const PACKAGES: [&str; 2] = ["hebe-kvm", "hebe-vmm"];
/// Longest run of one test program.
const LIMIT: Duration = Duration::from_secs(600);
/// How a test says that it did not run.
const SKIPPED: &str = "skipped";

/// Runs them in an emulated host, unless they ran here.
pub fn run(scene: &Scene) -> Result<()> {
    if hebe_kvm::host_can_run().is_ok() && !scene.full {
        println!("    they ran on this computer's /dev/kvm, among the unit tests");
        return Ok(());
    }
    let tests = Tests::build(&PACKAGES, HEBE_VMM, scene.progress)?;
    let options = LabOptions {
        product: vec![HEBE, HEBE_VMM],
        store_init: false,
        reserve_mib: 0,
        guest_kernels: Vec::new(),
        disk_mib: 512,
        tools: true,
        ..LabOptions::default()
    };
    let lab = Lab::boot(scene.assets, options, scene.progress)?;
    let program = tests.program.to_str().context("an odd path")?;
    let (folder, _) = program.rsplit_once('/').context("a relative path")?;
    let place = format!("mkdir -p {folder} /tmp && ln -s /bin/hebe-vmm {program}");
    lab.machine.exec_ok(&["/bin/busybox", "sh", "-c", &place])?;
    for test in &tests.executables {
        one(&lab, test, scene)?;
    }
    lab.machine.power_off()
}

fn one(lab: &Lab, test: &std::path::Path, scene: &Scene) -> Result<()> {
    let name = test.file_name().context("no name")?.to_string_lossy();
    scene
        .progress
        .step(&format!("{name} in the emulated machine"));
    let there = format!("/tmp/{name}");
    let bytes = std::fs::read(test).with_context(|| format!("cannot read {}", test.display()))?;
    lab.machine.agent.put(&there, 0o755, &bytes)?;
    let output = lab.machine.agent.exec(&[&there], b"", LIMIT)?;
    let text = output.all_text();
    let Some(sum) = text.lines().find(|line| line.starts_with("test result:")) else {
        bail!("{name} did not end: {text}");
    };
    println!("    {name}: {sum}");
    ensure!(output.ok(), "{name}: {text}");
    let skipped = text.lines().find(|line| line.contains(SKIPPED));
    ensure!(skipped.is_none(), "{name}: {}", skipped.unwrap_or_default());
    Ok(())
}
