//! How long the layer below VMs takes to come back: kexec against the
//! machine's reset button, both up to the first VM that runs.
//!
//! Both ways begin with the VM frozen on memory and the next kernel in memory
//! where kexec needs it, and end with the VM's first reply to the same probe,
//! so that only the reload differs.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::probe::{Probe, ProbeRecord};
use lab::progress::Progress;
use lab::scenario::{BOOT_LIMIT, GuestSpec, Lab, LabOptions};
use serde::Serialize;
use serde_json::json;

use super::{Output, caveat, diagnosed, median, while_emulator_fails};
use crate::ui::Spinner;

const KERNEL: KernelName = KernelName::V6_1Cloud;

/// What to measure.
#[derive(Args)]
pub struct ReloadArgs {
    /// Repeats of each.
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    #[command(flatten)]
    output: Output,
}

/// How the old kernel is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Reload {
    Kexec,
    HardReset,
}

impl Reload {
    const ALL: [Self; 2] = [Self::Kexec, Self::HardReset];

    fn as_str(self) -> &'static str {
        match self {
            Self::Kexec => "kexec",
            Self::HardReset => "hard-reset",
        }
    }
}

#[derive(Serialize)]
struct Row {
    reload: Reload,
    repeat: u32,
    /// From the jump or the reset to the new kernel's first program.
    to_user_space_s: f64,
    /// And to the VM's first reply.
    to_first_vm_s: f64,
}

/// Runs it; prints the medians and their ratio.
pub fn run(assets: &Assets, args: &ReloadArgs, progress: &Spinner) -> Result<()> {
    let (mut rows, mut failures) = (Vec::new(), 0);
    let result = while_emulator_fails(progress, &mut failures, || {
        rows.clear();
        measure_all(assets, args, progress, &mut rows)
    });
    progress.clear();
    print(args, &rows);
    let line = |r: &Row| {
        format!(
            "{},{},{:.3},{:.3}",
            r.reload.as_str(),
            r.repeat,
            r.to_user_space_s,
            r.to_first_vm_s
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({ "repeats": args.repeats, "emulator_failures": failures, "rows": rows });
    let header = "reload,repeat,to_user_space_s,to_first_vm_s";
    args.output.write(all, &[], header, &csv)?;
    result
}

fn measure_all(
    assets: &Assets,
    args: &ReloadArgs,
    progress: &Spinner,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let mut lab = Lab::boot(assets, LabOptions::default(), progress)?;
    let guests = [GuestSpec::numbered(0, KERNEL)];
    lab.start(&guests)?;
    for repeat in 0..args.repeats {
        for reload in Reload::ALL {
            progress.step(&format!("{} {}", reload.as_str(), repeat + 1));
            let row = measure(&mut lab, &guests, reload, repeat);
            let row = diagnosed(&mut lab, &guests, row);
            rows.push(row.with_context(|| format!("{} {repeat}", reload.as_str()))?);
        }
    }
    lab.machine.power_off()
}

fn measure(lab: &mut Lab, guests: &[GuestSpec], reload: Reload, repeat: u32) -> Result<Row> {
    let before = lab.wait_for_guests(guests)?;
    lab.machine.exec_ok(&["hebe", "suspend", "vm1"])?;
    let probe = Probe::start(&lab.ports(&guests[0])?, false)?;
    let from = lab.machine.serial.len();
    let left = leave(lab, reload, from)?;
    let serial = lab.machine.serial.clone();
    let user_space = serial.wait_for("LAB: userspace", from, BOOT_LIMIT)?;
    lab.wait_for_next_boot()?;
    let after = lab.wait_for_guests(guests)?;
    ensure!(
        before[0].boot_id == after[0].boot_id,
        "the guest was booted again"
    );
    // The probe sends every 10 ms: the first reply was long ago.
    thread::sleep(Duration::from_secs(1));
    let began = probe.began();
    let replied = first_reply(&probe.finish()?, left - began)?;
    Ok(Row {
        reload,
        repeat,
        to_user_space_s: (user_space - left).as_secs_f64(),
        to_first_vm_s: replied - (left - began).as_secs_f64(),
    })
}

/// Leaves the old kernel, and says when that was. Loading the next kernel is
/// not part of it: a reload does that while VMs run.
fn leave(lab: &mut Lab, reload: Reload, from: u64) -> Result<Instant> {
    match reload {
        Reload::HardReset => {
            let left = Instant::now();
            lab.machine.reset()?;
            Ok(left)
        }
        Reload::Kexec => {
            lab.leave_by_kexec(KERNEL)?;
            lab.machine.serial.wait_for("LAB: jump", from, BOOT_LIMIT)
        }
    }
}

/// Seconds from the probe's beginning to the first reply after `left`.
fn first_reply(record: &ProbeRecord, left: Duration) -> Result<f64> {
    let left_us = left.as_micros() as u64;
    let replies = record.udp.samples.iter().filter_map(|s| s.reply_us);
    match replies.filter(|at| *at > left_us).min() {
        Some(at) => Ok(at as f64 / 1e6),
        None => bail!("the VM never answered the probe"),
    }
}

fn print(args: &ReloadArgs, rows: &[Row]) {
    println!(
        "seconds from the jump or the reset, median of {} ({})",
        args.repeats,
        caveat()
    );
    println!(
        "{:<11} {:>14} {:>16}",
        "reload", "to user space", "to the first VM"
    );
    let of = |reload: Reload, field: fn(&Row) -> f64| {
        let fits = |r: &&Row| r.reload == reload;
        median(rows.iter().filter(fits).map(field).collect())
    };
    for reload in Reload::ALL {
        println!(
            "{:<11} {:>14.2} {:>16.2}",
            reload.as_str(),
            of(reload, |r| r.to_user_space_s),
            of(reload, |r| r.to_first_vm_s)
        );
    }
    let [kexec, reset] = Reload::ALL.map(|reload| of(reload, |r| r.to_first_vm_s));
    println!("hard reset / kexec, to the first VM: {:.2}", reset / kexec);
    println!(
        "This machine's reset has next to no firmware and no disk to load a kernel from; a real one's takes most of a minute longer (R-43, R-50)."
    );
}

#[cfg(test)]
mod tests {
    use lab::probe::{UdpRecord, UdpSample};

    use super::*;

    #[test]
    fn only_a_reply_after_the_old_kernel_counts() {
        let sample = |reply_us| UdpSample {
            sent_us: 0,
            reply_us,
        };
        let udp = UdpRecord {
            samples: vec![sample(Some(900)), sample(None), sample(Some(5_000_000))],
            end_us: 6_000_000,
        };
        let record = ProbeRecord {
            udp,
            ..ProbeRecord::default()
        };
        let left = Duration::from_millis(1);
        assert_eq!(first_reply(&record, left).expect("reply"), 5.0);
        assert!(first_reply(&record, Duration::from_secs(6)).is_err());
    }
}
