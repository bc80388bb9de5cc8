//! Warm reboots of VMs in ordinary memory, which the real Live Update
//! Orchestrator of the lab's own kernel carries.

use anyhow::{Result, ensure};
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};

use super::live_update_faults;
use crate::demo::{self, Carrier};
use crate::test::Scene;

const GUESTS: u8 = 2;

/// First what goes wrong, then there and back again: what was carried once is
/// carried once more. The kernel is built on first use.
pub fn run(scene: &Scene) -> Result<()> {
    let [from, to] = Carrier::Luo.kernels();
    let guests: Vec<GuestSpec> = (0..GUESTS)
        .map(|index| GuestSpec {
            store: Carrier::Luo.kind(),
            ..GuestSpec::numbered(index, lab::assets::KernelName::V6_1Cloud)
        })
        .collect();
    let options = LabOptions {
        host: from,
        others: [vec![to], live_update_faults::STOCK.to_vec()].concat(),
        tools: true,
        ..Carrier::Luo.options(GUESTS)
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    lab.start(&guests)?;
    live_update_faults::run(&mut lab, &guests, to, scene.progress)?;
    for _ in 0..2 {
        let trial = trial::reboot(&mut lab, &guests, Method::Warm, to, &[], scene.progress)?;
        demo::check(&trial)?;
        for vm in &trial.vms {
            let seconds = vm.downtime_ms / 1000.0;
            println!("    {}: {seconds:.1} s (emulated)", vm.name);
        }
    }
    let (state, why) = super::state(&lab, "vm1")?;
    ensure!(state == "running", "vm1 is {state}: {why}");
    lab.machine.power_off()
}
