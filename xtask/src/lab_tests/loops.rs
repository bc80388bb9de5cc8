//! A small SMP guest with live FP state, timers and interrupts in flight is
//! suspended and resumed over and over, by the program `suspend-loop`.
//!
//! Where this computer's `/dev/kvm` runs the guest, that is where the many
//! loops are. The emulated machine does the fault checks alone: its processor
//! now and then shuts a vCPU of this guest down, about once in 20 seconds of
//! running, with or without any suspend (seen with one suspend in 23 s). Such
//! an end, and no other, is tried again with another seed.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::binaries::{Binaries, HEBE, HEBE_VMM, Program};
use lab::scenario::{Lab, LabOptions};

use crate::test::Scene;

/// The loops and the fault checks, as a program.
const SUSPEND_LOOP: Program = Program {
    package: "suspend-loop",
    name: "suspend-loop",
};

/// Longest run of the program in the emulated machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Loops where `/dev/kvm` runs the guest.
const LOOPS: &str = "1000";
const LOOPS_FULL: &str = "10000";
/// Tries in the emulated machine.
const TRIES: u32 = 4;
/// What a try says that the emulated processor ended.
const SHUT_DOWN: &str = "the VM ended: VcpuStopped(Shutdown)";

/// Runs the program here, if it can, and in an emulated host.
pub fn run(scene: &Scene) -> Result<()> {
    here(scene)?;
    emulated(scene)
}

fn here(scene: &Scene) -> Result<()> {
    let binaries = Binaries::build(&[SUSPEND_LOOP], scene.progress)?;
    let program = binaries
        .product
        .first()
        .context("suspend-loop was not built")?;
    let runs = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.context("suspend-loop does not start")
    };
    if !runs(&["--trial", "--vcpus", "2"])?.status.success() {
        println!("    skipped: the many loops, because /dev/kvm here does not run the test guest");
        return Ok(());
    }
    let loops = if scene.full { LOOPS_FULL } else { LOOPS };
    scene
        .progress
        .step(&format!("{loops} suspends and resumes on /dev/kvm"));
    let output = runs(&["--loops", loops, "--vcpus", "2"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    tell(&text);
    ensure!(
        output.status.success(),
        "suspend-loop found something: {text}"
    );
    Ok(())
}

fn emulated(scene: &Scene) -> Result<()> {
    let options = LabOptions {
        product: vec![HEBE, HEBE_VMM, SUSPEND_LOOP],
        store_init: false,
        reserve_mib: 0,
        guest_kernels: Vec::new(),
        disk_mib: 512,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("fault checks");
    let checks = ["suspend-loop", "--loops", "0", "--vcpus", "2", "--faults"];
    attempt(&lab, &checks)?;
    lab.machine.check()?;
    lab.machine.power_off()
}

/// Runs the program until it succeeds or fails for a reason of its own.
fn attempt(lab: &Lab, argv: &[&str]) -> Result<()> {
    for _ in 0..TRIES {
        let output = lab.machine.agent.exec(argv, b"", LIMIT)?;
        let text = output.all_text();
        tell(&text);
        if output.ok() {
            return Ok(());
        }
        let failures: Vec<&str> = text.lines().filter(|l| l.starts_with("FAILED")).collect();
        let by_emulation = !failures.is_empty() && failures.iter().all(|l| l.contains(SHUT_DOWN));
        ensure!(by_emulation, "suspend-loop found something: {text}");
        println!("    the emulated processor shut a vCPU down: once more");
    }
    bail!("the emulated processor shut a vCPU down {TRIES} times")
}

fn tell(text: &str) {
    for line in text.lines() {
        println!("    {line}");
    }
}
