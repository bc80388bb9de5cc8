//! `cargo xtask bench`: the papers' experiments on the emulated machine.
//!
//! Ratios within one run mean something; seconds do not where the machine is
//! emulated. Every sample is kept. What a bench expects is printed beside
//! what it found, and a failed expectation is a finding, not an error.

mod ageing;
mod beside;
mod cache;
mod cluster;
mod io;
mod reboot;
mod reload;
mod suspend;
mod vmm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use lab::assets::Assets;
use lab::machine::{Accelerator, EmulatorFailure};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab};
use serde::Serialize;
use serde_json::{Value, json};

use crate::ui::Spinner;

/// Which experiment.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Downtime of warm, saved and cold reboots and of QEMU's cpr-reboot, by
    /// number of VMs.
    Reboot(reboot::RebootArgs),
    /// Suspend and resume on memory and on disk, by RAM size.
    Suspend(suspend::SuspendArgs),
    /// kexec against hard reset, to the first VM running.
    Reload(reload::ReloadArgs),
    /// Throughput just before and just after a reboot.
    Cache(cache::CacheArgs),
    /// A daemon that leaks, flagged and cured by the policy: the sawtooth, and
    /// how right the time to exhaustion was.
    Ageing(ageing::AgeingArgs),
    /// Throughput of a group of hosts over one cycle of rejuvenations, warm,
    /// cold, and with migration to a spare host: simulated for many hosts, and
    /// measured with three behind a load balancer (T-03).
    Cluster(cluster::ClusterArgs),
    /// What a VMM costs beside QEMU: memory without guest RAM, and the time from
    /// the order to the guest's first instruction and to its user space.
    Vmm(vmm::VmmArgs),
    /// A guest's disk (fio) and network (iperf3) as a ratio to the same under
    /// QEMU.
    Io(io::IoArgs),
}

/// Where figures go, for every bench.
#[derive(Args)]
pub struct Output {
    /// Write rows and raw samples into this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write rows into this file, as CSV.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

impl Output {
    /// Writes what was found as JSON, and `rows` under `header` as CSV.
    fn write(&self, found: Value, aims: &[Aim], header: &str, rows: &[String]) -> Result<()> {
        let mut all = json!({
            "emulated": emulated(),
            "aims": aims,
        });
        if let (Some(all), Value::Object(found)) = (all.as_object_mut(), found) {
            all.extend(found);
        }
        let put = |path: &Path, text: String| {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        if let Some(path) = &self.json {
            put(path, all.to_string())?;
        }
        if let Some(path) = &self.csv {
            put(path, format!("{header}\n{}\n", rows.join("\n")))?;
        }
        Ok(())
    }
}

/// Runs one bench.
pub fn run(assets: &Assets, args: &BenchArgs, progress: &Spinner) -> Result<ExitCode> {
    match &args.bench {
        Bench::Reboot(args) => reboot::run(assets, args, progress)?,
        Bench::Suspend(args) => suspend::run(assets, args, progress)?,
        Bench::Reload(args) => reload::run(assets, args, progress)?,
        Bench::Cache(args) => cache::run(assets, args, progress)?,
        Bench::Ageing(args) => ageing::run(assets, args, progress)?,
        Bench::Cluster(args) => cluster::run(assets, args, progress)?,
        Bench::Vmm(args) => vmm::run(assets, args, progress)?,
        Bench::Io(args) => io::run(assets, args, progress)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What is expected of a figure, and whether it came out so.
#[derive(Serialize)]
struct Aim {
    /// What is measured.
    what: String,
    /// What came out; none where the run had too few samples for it.
    value: Option<f64>,
    /// In words.
    expected: &'static str,
    met: bool,
}

impl Aim {
    /// A figure that is not a number is an expectation that is not met.
    fn new(what: String, value: f64, expected: &'static str, met: bool) -> Self {
        Self {
            what,
            value: value.is_finite().then_some(value),
            expected,
            met: met && value.is_finite(),
        }
    }

    fn print(aims: &[Self]) {
        for aim in aims {
            let value = aim.value.map_or("-".to_owned(), |v| format!("{v:.2}"));
            let met = if aim.met { "met" } else { "NOT met" };
            println!("{}: {value} (expected {}: {met})", aim.what, aim.expected);
        }
    }
}

/// The machine is emulated, so that its seconds mean nothing elsewhere.
fn emulated() -> bool {
    Accelerator::detect() == Accelerator::Tcg
}

/// What every table must say.
fn caveat() -> &'static str {
    match emulated() {
        true => "emulated machine: compare, do not quote",
        false => "a machine in a machine: compare rather than quote",
    }
}

/// How often a measurement is begun anew because the emulated processor failed.
const EMULATOR_FAILURES_MAX: u32 = 4;

/// Runs `work`, and again on a fresh machine where the emulator failed under
/// it; counts that in `failures`.
fn while_emulator_fails(
    progress: &Spinner,
    failures: &mut u32,
    mut work: impl FnMut() -> Result<()>,
) -> Result<()> {
    for _ in 0..EMULATOR_FAILURES_MAX {
        match work() {
            Err(error) if error.is::<EmulatorFailure>() => {
                *failures += 1;
                progress.note(&format!("once more: {error:#}"));
            }
            other => return other,
        }
    }
    work()
}

/// Gives an error its cause: a guest whose emulated processor failed shows
/// first in that it does not answer.
fn diagnosed<T>(lab: &mut Lab, guests: &[GuestSpec], result: Result<T>) -> Result<T> {
    result.map_err(|error| {
        let machine = lab.machine.check();
        match machine.and_then(|()| lab.check_exits(guests)) {
            Err(cause) if cause.is::<EmulatorFailure>() => cause,
            _ => error,
        }
    })
}

/// The middle one of some figures, of an even number the mean of the middle
/// two; not a number for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn only_the_emulators_failures_are_tried_again() {
        let progress = Spinner::new();
        let (mut failures, mut runs) = (0, 0);
        let result = while_emulator_fails(&progress, &mut failures, || {
            runs += 1;
            match runs {
                1 => Err(EmulatorFailure("a guest")).context("n = 11"),
                _ => anyhow::bail!("something else"),
            }
        });
        assert!(result.is_err());
        assert_eq!((failures, runs), (1, 2));
    }

    #[test]
    fn a_figure_that_is_missing_meets_no_expectation() {
        let aim = Aim::new("x".to_owned(), f64::NAN, "anything", true);
        assert!(!aim.met && aim.value.is_none());
        assert!(Aim::new("x".to_owned(), 1.0, "anything", true).met);
    }
}
