//! A small SMP guest with live FP state, timers and interrupts in flight is
//! suspended and resumed over and over, by the program `suspend-loop`.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::binaries::{HEBE, HEBE_VMM, Program};
use lab::scenario::{Lab, LabOptions};

use crate::test::Scene;

/// The loops and the fault checks, as a program.
const SUSPEND_LOOP: Program = Program {
    package: "suspend-loop",
    name: "suspend-loop",
};

/// Longest run of the program.
const LIMIT: Duration = Duration::from_secs(1500);

/// Loops of one run.
const LOOPS: &str = "1000";
const LOOPS_FULL: &str = "10000";

/// Runs the program in an emulated host.
pub fn run(scene: &Scene) -> Result<()> {
    let options = LabOptions {
        product: vec![HEBE, HEBE_VMM, SUSPEND_LOOP],
        store_init: false,
        reserve_mib: 0,
        guest_kernels: Vec::new(),
        disk_mib: 512,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    let loops = if scene.full { LOOPS_FULL } else { LOOPS };
    scene
        .progress
        .step(&format!("{loops} suspends and resumes"));
    let argv = ["suspend-loop", "--loops", loops, "--vcpus", "2", "--faults"];
    let output = lab.machine.agent.exec(&argv, b"", LIMIT)?;
    let text = output.all_text();
    for line in text.lines() {
        println!("    {line}");
    }
    ensure!(output.ok(), "suspend-loop found something: {text}");
    lab.machine.check()?;
    lab.machine.power_off()
}
