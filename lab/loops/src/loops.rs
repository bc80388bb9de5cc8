//! The loop itself.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hebe_api::FreezeReport;

use crate::environment::Environment;
use crate::guest::splitmix64;
use crate::report::{Report, Samples};
use crate::rig::{Plan, Rig};

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The VM.
    pub plan: Plan,
    /// Suspends and resumes.
    pub loops: u32,
    /// Seed of the random waits.
    pub seed: u64,
    /// Longest wait before a suspend, in microseconds.
    pub run_us_max: u64,
    /// Within this time after a resume every vCPU must have made progress.
    pub progress_max: Duration,
    /// Says how far it is, this often; 0 never.
    pub tell_every: u32,
}

/// In place of every such loop's suspend, a pause is undone first.
const PAUSE_EVERY: u32 = 10;
/// And a freeze is undone first.
const THAW_EVERY: u32 = 7;

/// Runs the loops; what goes wrong is in the report.
pub fn run(options: &Options) -> Report {
    let began = Instant::now();
    let plan = options.plan;
    let mut report = Report {
        environment: Environment::detect(),
        seed: options.seed,
        vcpus: plan.vcpus,
        memory_bytes: plan.memory.bytes(),
        loops_wanted: options.loops,
        loops_done: 0,
        pauses: 0,
        thaws: 0,
        avx: false,
        tsc_checked: plan.trust_tsc,
        deadline_timers: Vec::new(),
        state_bytes_max: 0,
        freeze: Samples::default(),
        stop: Samples::default(),
        resume: Samples::default(),
        progress: Samples::default(),
        counters: Vec::new(),
        took_s: 0.0,
        error: None,
    };
    if let Err(error) = go(options, &mut report) {
        report.error = Some(format!("loop {}: {error:#}", report.loops_done));
    }
    report.took_s = began.elapsed().as_secs_f64();
    report
}

fn go(options: &Options, report: &mut Report) -> Result<()> {
    let mut random = options.seed;
    let mut rig = Rig::new(options.plan)?;
    let base = rig.counters();
    rig.vm()?.start()?;
    rig.wait_for_progress(&base, options.progress_max)
        .context("after the boot")?;
    let counters = rig.counters();
    report.avx = counters.iter().all(|c| c.tests_avx());
    report.deadline_timers = counters.iter().map(|c| c.tests_deadline()).collect();
    while report.loops_done < options.loops {
        let result = once(options, report, &mut rig, &mut random);
        report.counters = rig.counters();
        result?;
        report.loops_done += 1;
        if options.tell_every > 0 && report.loops_done.is_multiple_of(options.tell_every) {
            eprintln!("{} of {}", report.loops_done, options.loops);
        }
    }
    rig.vm()?.pause()?;
    rig.check_stopped()?;
    rig.drop_vm()?;
    rig.check_console()
}

fn once(options: &Options, report: &mut Report, rig: &mut Rig, random: &mut u64) -> Result<()> {
    let number = report.loops_done + 1;
    wait(options, random);
    if number.is_multiple_of(PAUSE_EVERY) {
        pause_in_place(options, rig).context("pause in place")?;
        report.pauses += 1;
        wait(options, random);
    }
    if number.is_multiple_of(THAW_EVERY) {
        thaw_in_place(options, rig).context("freeze and thaw in place")?;
        report.thaws += 1;
        wait(options, random);
    }
    let (frozen, took) = rig.freeze()?;
    report.freeze.push(took);
    report.stop.push(stop_time(&frozen));
    report.state_bytes_max = report.state_bytes_max.max(frozen.state_bytes);
    rig.expect_frozen()?;
    rig.check_stopped().context("frozen")?;
    let base = rig.counters();
    rig.drop_vm()?;
    rig.check_console()?;
    ensure!(
        rig.counters() == base,
        "guest memory changed between the freeze and the end of the VM"
    );
    report.resume.push(rig.resume()?.total());
    let progress = rig.wait_for_progress(&base, options.progress_max);
    report.progress.push(progress.context("after the resume")?);
    Ok(())
}

fn pause_in_place(options: &Options, rig: &mut Rig) -> Result<()> {
    rig.vm()?.pause()?;
    rig.check_stopped()?;
    let base = rig.counters();
    thread::sleep(Duration::from_millis(1));
    ensure!(rig.counters() == base, "a paused guest ran");
    rig.vm()?.unpause()?;
    rig.wait_for_progress(&base, options.progress_max).map(drop)
}

fn thaw_in_place(options: &Options, rig: &mut Rig) -> Result<()> {
    rig.freeze()?;
    rig.expect_frozen()?;
    rig.check_stopped()?;
    let base = rig.counters();
    rig.vm()?.thaw()?;
    ensure!(
        rig.segment().exec().load().is_err(),
        "a state that was thawed can still be loaded"
    );
    rig.wait_for_progress(&base, options.progress_max).map(drop)
}

fn wait(options: &Options, random: &mut u64) {
    let us = splitmix64(random) % options.run_us_max.max(1);
    thread::sleep(Duration::from_micros(us));
}

fn stop_time(report: &FreezeReport) -> Duration {
    let ns = report
        .vcpus_stopped
        .realtime_ns
        .saturating_sub(report.asked.realtime_ns);
    Duration::from_nanos(ns)
}
