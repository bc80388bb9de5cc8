//! How long the layer below VMs takes to come back: kexec against the
//! machine's reset button, both up to the first VM that runs.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde_json::json;

use super::{Output, median};
use crate::ui::Spinner;

/// What to measure.
#[derive(Args)]
pub struct ReloadArgs {
    /// Repeats of each.
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    #[command(flatten)]
    output: Output,
}

/// Runs it. The figure is the VM's downtime seen from outside less nothing:
/// it is frozen on memory both times, so that only the reload differs.
pub fn run(assets: &Assets, args: &ReloadArgs, progress: &Spinner) -> Result<()> {
    let mut lab = Lab::boot(assets, LabOptions::default(), progress)?;
    let guests = [GuestSpec::numbered(0, KernelName::V6_1Cloud)];
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    let (mut quick, mut reset) = (Vec::new(), Vec::new());
    for repeat in 0..args.repeats {
        progress.step(&format!("kexec {}", repeat + 1));
        let kernel = KernelName::V6_1Cloud;
        let trial = trial::reboot(&mut lab, &guests, Method::Warm, kernel, &[], progress)?;
        quick.push(trial.vms[0].downtime_ms / 1000.0);
        progress.step(&format!("hard reset {}", repeat + 1));
        lab.machine.exec_ok(&["hebe", "suspend", "vm1"])?;
        let start = Instant::now();
        lab.reset()?;
        lab.wait_for_guests(&guests).context("after a hard reset")?;
        reset.push(start.elapsed().as_secs_f64());
    }
    lab.machine.power_off()?;
    progress.clear();
    let (k, r) = (median(quick.clone()), median(reset.clone()));
    println!(
        "to the first VM running, median seconds of {} (emulated machine)",
        args.repeats
    );
    println!("kexec {k:.2}   hard reset {r:.2}   ratio {:.2}", r / k);
    println!(
        "The emulated machine has no slow firmware: a real one's reset takes longer (R-43, R-50)."
    );
    let line = |kind: &str, list: &[f64]| {
        list.iter()
            .enumerate()
            .map(|(i, s)| format!("{kind},{i},{s:.3}"))
            .collect::<Vec<_>>()
    };
    let csv = [line("kexec", &quick), line("hard-reset", &reset)].concat();
    let all = json!({ "emulated": true, "kexec_s": quick, "hard_reset_s": reset });
    args.output.write(&all, "reload,repeat,seconds", &csv)
}
