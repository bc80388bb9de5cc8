//! `cargo xtask bench`: the papers' experiments on the emulated machine.
//!
//! Ratios within one run mean something; seconds do not, because the machine
//! is emulated. Every sample is kept.

mod cache;
mod reboot;
mod reload;
mod suspend;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use lab::assets::Assets;
use serde::Serialize;

use crate::ui::Spinner;

/// Which experiment.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Downtime of warm, saved and cold reboots, by number of VMs.
    Reboot(reboot::RebootArgs),
    /// Suspend and resume on memory and on disk, by RAM size.
    Suspend(suspend::SuspendArgs),
    /// kexec against hard reset, to the first VM running.
    Reload(reload::ReloadArgs),
    /// Throughput just before and just after a reboot.
    Cache(cache::CacheArgs),
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
    /// Writes `all` as JSON, and `rows` under `header` as CSV.
    fn write(&self, all: &impl Serialize, header: &str, rows: &[String]) -> Result<()> {
        let put = |path: &Path, text: String| {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        if let Some(path) = &self.json {
            put(path, serde_json::to_string_pretty(all)?)?;
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
    }
    Ok(ExitCode::SUCCESS)
}

/// The middle one of some figures; not a number for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
