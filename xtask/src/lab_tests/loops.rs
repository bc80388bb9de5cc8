//! A small SMP guest with live FP state, timers and interrupts in flight is
//! suspended and resumed over and over, by the program `suspend-loop`.
//!
//! The many loops are done where this computer's `/dev/kvm` runs the guest, and
//! in the emulated machine otherwise. That always does some, because it has
//! AVX, and the fault checks.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::binaries::{Binaries, HEBE, HEBE_VMM, Program};
use lab::machine::{Accelerator, UNDELIVERED};
use lab::scenario::{Lab, LabOptions};

use crate::test::Scene;

/// The loops and the fault checks, as a program.
const SUSPEND_LOOP: Program = Program {
    package: "suspend-loop",
    name: "suspend-loop",
};

/// Longest run of the program in the emulated machine.
const LIMIT: Duration = Duration::from_secs(3600);
/// How long a guest that was resumed may take to make progress.
const PROGRESS: [&str; 2] = ["--progress-s", "240"];
/// The many loops.
const LOOPS: &str = "1000";
const LOOPS_FULL: &str = "10000";
/// Loops in the emulated machine beside the many on `/dev/kvm`.
const LOOPS_BESIDE: &str = "300";
/// What the program prints where the guest's AVX registers were watched.
const WITH_AVX: &str = "SSE, AVX;";
/// What the program prints of a triple fault.
const SHUT_DOWN: &str = "VcpuStopped(Shutdown)";

/// Runs the program here, if it can, and in an emulated host.
pub fn run(scene: &Scene) -> Result<()> {
    let many = if scene.full { LOOPS_FULL } else { LOOPS };
    let here = here(scene, many)?;
    emulated(scene, if here { LOOPS_BESIDE } else { LOOPS })
}

/// Whether the loops ran on this computer's `/dev/kvm`.
fn here(scene: &Scene, loops: &str) -> Result<bool> {
    let binaries = Binaries::build(&[SUSPEND_LOOP], &[], scene.progress)?;
    let program = binaries
        .product
        .first()
        .context("suspend-loop was not built")?;
    let runs = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.context("suspend-loop does not start")
    };
    if !runs(&["--trial", "--vcpus", "2"])?.status.success() {
        println!(
            "    /dev/kvm here does not run the test guest: all loops in the emulated machine"
        );
        return Ok(false);
    }
    scene
        .progress
        .step(&format!("{loops} suspends and resumes on /dev/kvm"));
    let output = runs(&[&["--loops", loops, "--vcpus", "2"][..], &PROGRESS].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    tell("/dev/kvm", &text);
    ensure!(
        output.status.success(),
        "suspend-loop found something: {text}"
    );
    Ok(true)
}

fn emulated(scene: &Scene, loops: &str) -> Result<()> {
    let options = LabOptions {
        product: vec![HEBE, HEBE_VMM, SUSPEND_LOOP],
        store_init: false,
        reserve_mib: 0,
        guest_kernels: Vec::new(),
        disk_mib: 512,
        avx: true,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step(&format!(
        "fault checks, and {loops} suspends and resumes in the emulated machine"
    ));
    let argv = [
        &["suspend-loop", "--loops", loops, "--vcpus", "2", "--faults"][..],
        &PROGRESS,
    ];
    let argv = argv.concat();
    let output = lab.machine.agent.exec(&argv, b"", LIMIT)?;
    let text = output.all_text();
    tell("emulated", &text);
    if [SHUT_DOWN, UNDELIVERED]
        .iter()
        .any(|word| text.contains(word))
    {
        return Err(lab.machine.shut_down("a guest"));
    }
    ensure!(output.ok(), "suspend-loop found something: {text}");
    // What this computer's KVM may lack, the lab's has.
    let skipped = text.lines().find(|line| line.starts_with("skipped"));
    ensure!(skipped.is_none(), "{}", skipped.unwrap_or_default());
    ensure!(
        lab.machine.accelerator == Accelerator::Kvm || text.contains(WITH_AVX),
        "the AVX registers were not watched: {text}"
    );
    lab.machine.check()?;
    lab.machine.power_off()
}

fn tell(place: &str, text: &str) {
    for line in text.lines() {
        println!("    {place}: {line}");
    }
}
