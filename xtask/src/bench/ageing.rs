//! A daemon that leaks, and a host that rejuvenates itself: how right the time
//! to exhaustion is that was foretold, and the sawtooth.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use hebe_policy::ageing::Sample;
use lab::assets::Assets;
use serde_json::json;

use super::{Aim, Output, caveat, while_emulator_fails};
use crate::sawtooth::{self, Found, Plan, Prediction, SAMPLE_EVERY_S};
use crate::ui::Spinner;

/// What to measure.
#[derive(Args)]
pub struct AgeingArgs {
    /// What the daemon leaks, in KiB a second.
    #[arg(long, default_value_t = 2048)]
    leak: u64,
    /// Reboots by the policy.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=20))]
    teeth: u32,
    /// Do not let the leak go on to the end after them.
    #[arg(long)]
    no_end: bool,
    /// Draw all samples into this file, as `hebe host age --svg` does.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Runs it; prints each prediction beside the truth.
pub fn run(assets: &Assets, args: &AgeingArgs, progress: &Spinner) -> Result<()> {
    let plan = Plan {
        leak_kib_per_s: args.leak,
        teeth: args.teeth,
        to_the_end: !args.no_end,
    };
    let (mut found, mut failures) = (Found::default(), 0);
    let result = while_emulator_fails(progress, &mut failures, || {
        found = Found::default();
        sawtooth::run(assets, plan, &mut found, progress)
    });
    progress.clear();
    println!("A leak of {} KiB/s ({})", args.leak, caveat());
    for tooth in &found.teeth {
        println!("  {}", sawtooth::words(tooth));
    }
    if let Some(end) = &found.end {
        println!(
            "  to the end: foretold {:.0} s, measured {:.0} s, when {:.1} MiB were left",
            end.flagged.predicted_s,
            end.measured_s,
            end.least / 1048576.0
        );
    }
    let aims = aims(&found);
    Aim::print(&aims);
    let csv: Vec<String> = found.samples.iter().map(csv_line).collect();
    let all = json!({
        "leak_kib_per_s": args.leak,
        "sample_every_s": SAMPLE_EVERY_S,
        "emulator_failures": failures,
        "teeth": found.teeth,
        "end": found.end,
        "samples": found.samples,
    });
    args.output
        .write(all, &aims, "boot,up_s,at_s,available_bytes", &csv)?;
    if let Some(path) = args.svg.as_ref().filter(|_| !found.svg.is_empty()) {
        fs::write(path, &found.svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    result
}

fn aims(found: &Found) -> Vec<Aim> {
    let off = |what: String, said: &Prediction, off: f64| {
        let what = format!(
            "{what}, {} the interval (the part by which the time to exhaustion was foretold wrongly, when first flagged)",
            if said.holds() { "inside" } else { "outside" }
        );
        Aim::new(what, off, "between -0.2 and 0.2", off.abs() <= 0.2)
    };
    let teeth = found.teeth.iter().enumerate();
    let mut aims: Vec<Aim> = teeth
        .map(|(i, tooth)| {
            let what = format!("tooth {}, against what is left at the known rate", i + 1);
            off(what, &tooth.flagged, tooth.flagged.off())
        })
        .collect();
    if let Some(end) = &found.end {
        let part = end.flagged.predicted_s / end.measured_s - 1.0;
        let what = "the last tooth, against the end itself".to_owned();
        aims.push(off(what, &end.flagged, part));
    }
    aims
}

fn csv_line(sample: &Sample) -> String {
    let boot = sample.boot.iter().take(4);
    let boot: String = boot.map(|byte| format!("{byte:02x}")).collect();
    let value = sample.readings[0].map_or(String::new(), |r| format!("{:.0}", r.value));
    format!("{boot},{:.3},{:.3},{value}", sample.up_s, sample.at_s)
}
