//! The tests that run small guests, in the emulated machine. Where this
//! computer's `/dev/kvm` can run them, too, they did so among the unit tests;
//! then only those of KVM itself are repeated here, because that `/dev/kvm` may
//! be one without hardware behind it, which cannot do all that they try.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::binaries::{HEBE, HEBE_VMM, Tests};
use lab::scenario::{Lab, LabOptions};

use crate::test::Scene;

/// The packages whose tests run guests; of the first those of KVM itself.
const PACKAGES: [&str; 2] = ["hebe-kvm", "hebe-vmm"];
/// Longest run of one test program.
const LIMIT: Duration = Duration::from_secs(2400);
/// How a test says that it did not run.
const SKIPPED: &str = "skipped";

/// Runs them in an emulated host.
pub fn run(scene: &Scene) -> Result<()> {
    let ran_here = hebe_kvm::host_can_run().is_ok() && !scene.full;
    let packages = if ran_here {
        println!("    the VMM's ran on this computer's /dev/kvm, among the unit tests");
        &PACKAGES[..1]
    } else {
        &PACKAGES[..]
    };
    let tests = Tests::build(packages, HEBE_VMM, scene.progress)?;
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
