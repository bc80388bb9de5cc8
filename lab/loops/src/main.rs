//! `suspend-loop`: the loops and the fault checks, as a program that also
//! runs inside an emulated machine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use hebe_types::ByteSize;
use serde_json::json;
use suspend_loop::environment::{Environment, Trial, trial};
use suspend_loop::loops::{self, Options};
use suspend_loop::rig::Plan;
use suspend_loop::{faults, guest};

/// Suspends and resumes a test guest, over and over.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Suspends and resumes; 0 for none.
    #[arg(long, default_value_t = 1000)]
    loops: u32,
    /// vCPUs of the guest, 1 to 8.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    vcpus: u8,
    /// RAM of the guest in MiB.
    #[arg(long, default_value_t = 8)]
    memory_mib: u64,
    /// Repeats a run's random numbers; drawn from the clock when absent.
    #[arg(long)]
    seed: Option<u64>,
    /// Longest run before a suspend, in milliseconds.
    #[arg(long, default_value_t = 20)]
    run_ms: u64,
    /// After a resume every vCPU must make progress within so many seconds.
    #[arg(long, default_value_t = 30)]
    progress_s: u64,
    /// The lesser guest, for a KVM that interprets every instruction. Without
    /// it, a trial decides.
    #[arg(long)]
    interpreted: bool,
    /// Run the fault checks as well.
    #[arg(long)]
    faults: bool,
    /// Only say whether the guest runs here.
    #[arg(long)]
    trial: bool,
    /// Write the report, with raw samples, to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("suspend-loop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let limit = Duration::from_secs(args.progress_s);
    if args.trial {
        return try_out(args.vcpus, limit);
    }
    let seed = args.seed.unwrap_or_else(seed_from_clock);
    println!("seed {seed:#x}");
    let plan = match plan(args, limit)? {
        Ok(plan) => plan,
        Err(why) => {
            println!("the guest does not run here: {why}");
            return Ok(false);
        }
    };
    let mut good = true;
    let mut checks = Vec::new();
    if args.faults {
        checks = faults::run(plan, seed, limit);
        for check in &checks {
            match (&check.error, &check.skipped) {
                (Some(error), _) => println!("FAILED  {}: {error}", check.name),
                (None, Some(why)) => println!("skipped {}: {why}", check.name),
                (None, None) => println!("ok      {}", check.name),
            }
            good &= check.error.is_none();
        }
    }
    let mut report = None;
    if args.loops > 0 {
        let done = loops::run(&Options {
            plan,
            loops: args.loops,
            seed,
            run_us_max: args.run_ms * 1000,
            progress_max: limit,
            tell_every: 100,
        });
        println!("{}", done.summary());
        if let Some(error) = &done.error {
            println!("FAILED  {error}");
        }
        good &= done.error.is_none();
        report = Some(done);
    }
    if let Some(path) = &args.json {
        let all = json!({ "loops": report, "faults": checks });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(good)
}

/// What to run, or why nothing runs here.
fn plan(args: &Args, limit: Duration) -> Result<Result<Plan, String>> {
    let memory = ByteSize::mib(args.memory_mib).max(guest::MEMORY_MIN);
    if args.interpreted {
        let plan = Plan::interpreted(args.vcpus);
        return Ok(Ok(Plan { memory, ..plan }));
    }
    Ok(match trial(args.vcpus, limit)? {
        Trial::Runs(plan, _) => Ok(Plan { memory, ..plan }),
        Trial::Cannot(why) => Err(why),
    })
}

fn try_out(vcpus: u8, limit: Duration) -> Result<bool> {
    let environment = Environment::detect();
    println!("{}", serde_json::to_string(&environment)?);
    Ok(match trial(vcpus, limit)? {
        Trial::Runs(plan, counters) => {
            println!("the guest runs here: {plan:?}");
            println!("{}", serde_json::to_string(&counters)?);
            true
        }
        Trial::Cannot(why) => {
            println!("the guest does not run here: {why}");
            false
        }
    })
}

fn seed_from_clock() -> u64 {
    hebe_sys::clock::stamp_now().realtime_ns
}
