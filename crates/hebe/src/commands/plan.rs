//! `plan`: what a rejuvenation costs and saves. The model is `hebe_policy`'s;
//! here files are read.

use std::fs;
use std::path::Path;

use hebe_host::listing::with_cause;
use hebe_host::timeline::{EventKind, Row, Timeline};
use hebe_policy::usage::data::{Quantity, Sample, Table, read_csv};
use hebe_policy::usage::model::Usage;
use hebe_policy::usage::paper::PAPER_N;
use hebe_policy::usage::report::{Report, of_paper, of_table};
use hebe_policy::usage::{chart, text};
use hebe_types::{RebootMethod, VmName};

use crate::cli::PlanArgs;
use crate::output::{Exit, Failure, Outcome, Output};

/// Longest file that is read, in bytes.
const FILE_LEN_MAX: u64 = 64 << 20;
/// What stands for the papers' data.
const PAPER: &str = "paper";

/// `hebe plan`.
pub fn plan(args: &PlanArgs, out: &Output) -> Outcome {
    let report = if args.data.iter().any(|data| data == PAPER) {
        of_the_paper(args)?
    } else {
        of_files(args)?
    };
    if let Some(path) = &args.svg {
        fs::write(path, chart::svg(&report)).map_err(|e| {
            let why = with_cause(&e);
            Failure(format!("cannot write {}: {why}", path.display()))
        })?;
    }
    out.answer(&report, || text::report(&report));
    Ok(Exit::Done)
}

fn of_the_paper(args: &PlanArgs) -> Result<Report, Failure> {
    if args.data.len() > 1 || args.service.is_some() {
        return Err(Failure(
            "the papers' data stands alone: give --data paper without another --data or --service"
                .into(),
        ));
    }
    of_paper(usage(args, PAPER_N)).map_err(|e| Failure(e.to_string()))
}

fn of_files(args: &PlanArgs) -> Result<Report, Failure> {
    let mut table = Table {
        service: args.service.clone(),
        ..Table::default()
    };
    for file in &args.data {
        let read = read(Path::new(file), table.service.as_deref(), args);
        let mut next = read.map_err(|why| Failure(format!("{file}: {why}")))?;
        table.samples.append(&mut next.samples);
        table.service = table.service.or(next.service);
        table.other_services.append(&mut next.other_services);
    }
    table.other_services.sort();
    table.other_services.dedup();
    let varying = table.samples.iter().filter(|s| !s.quantity.is_constant());
    let most = varying.map(|s| s.n).fold(1.0, f64::max) as u32;
    let source = args.data.join(", ");
    of_table(&table, usage(args, most), source).map_err(|e| Failure(e.to_string()))
}

fn usage(args: &PlanArgs, n: u32) -> Usage {
    Usage {
        n: args.vms.unwrap_or(n),
        alpha: args.alpha,
        os_interval: args.os_interval,
        host_interval: args.host_interval,
        os_downtime_s: args.os_downtime,
        evacuate_pause_s: args.evacuate_pause,
        moves: args.moves,
        confidence: args.confidence,
    }
}

fn read(path: &Path, service: Option<&str>, args: &PlanArgs) -> Result<Table, String> {
    let meta = fs::metadata(path).map_err(|e| with_cause(&e))?;
    if meta.len() > FILE_LEN_MAX {
        return Err("the file is longer than 64 MiB: is it the right one?".into());
    }
    let bytes = fs::read(path).map_err(|e| with_cause(&e))?;
    if bytes.trim_ascii_start().first() == Some(&b'{') {
        if args.service.is_some() {
            return Err("a report of a reboot knows no services: leave --service out".into());
        }
        let samples = of_timeline(&Timeline::parse(&bytes)?)?;
        return Ok(Table {
            samples,
            ..Table::default()
        });
    }
    read_csv(&bytes, service).map_err(|e| e.to_string())
}

/// What one reboot measured: the mean over its VMs, as seen from the host, up
/// to each VM's first frame where it sent one. A cold reboot's downtime begins
/// with the order to shut down, and it says what the guests' own reboots took.
fn of_timeline(timeline: &Timeline) -> Result<Vec<Sample>, String> {
    let rows = timeline.rows();
    let mut vms: Vec<&VmName> = rows.iter().filter_map(|r| r.vm.as_ref()).collect();
    vms.sort();
    vms.dedup();
    if vms.is_empty() {
        return Err("no VM went through this reboot: there is nothing to learn from it".into());
    }
    let (mut downtime, mut own) = (Vec::new(), Vec::new());
    for vm in &vms {
        let unfinished = || {
            format!("VM '{vm}' did not come back in this reboot: plan with reports of whole ones")
        };
        let times = VmTimes::of(&rows, vm);
        let (down, guest) = times.measured(timeline.method).ok_or_else(unfinished)?;
        downtime.push(down);
        own.extend(guest);
    }
    let quantity = match timeline.method {
        RebootMethod::Warm => Quantity::Warm,
        RebootMethod::Saved => Quantity::Saved,
        RebootMethod::Cold => Quantity::Cold,
    };
    let mean = |quantity, ms: &[f64]| Sample {
        quantity,
        n: vms.len() as f64,
        seconds: ms.iter().sum::<f64>() / ms.len() as f64 / 1e3,
    };
    let mut samples = vec![mean(quantity, &downtime)];
    if own.len() == vms.len() {
        samples.push(mean(Quantity::RebootOs, &own));
    }
    Ok(samples)
}

/// When things happened to one VM, in milliseconds.
struct VmTimes<'a>(Vec<&'a Row>);

impl<'a> VmTimes<'a> {
    fn of(rows: &'a [Row], vm: &VmName) -> Self {
        Self(rows.iter().filter(|r| r.vm.as_ref() == Some(vm)).collect())
    }

    fn at(&self, kind: EventKind) -> Option<f64> {
        self.0.iter().find(|r| r.kind == kind).map(|r| r.at_ms)
    }

    /// The downtime, and with a cold reboot what the guest's own reboot took.
    fn measured(&self, method: RebootMethod) -> Option<(f64, Option<f64>)> {
        let first = self.at(EventKind::FirstReply);
        if method == RebootMethod::Cold {
            let (asked, off) = (
                self.at(EventKind::SuspendAsked)?,
                self.at(EventKind::PoweredOff)?,
            );
            let booted = self.at(EventKind::Booted)?;
            let own = first.map(|first| (off - asked) + (first - booted).max(0.0));
            return Some((first.unwrap_or(booted) - asked, own));
        }
        let end = first.or(self.at(EventKind::Running))?;
        Some((end - self.at(EventKind::VcpusStopped)?, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hebe_host::timeline::{KernelInfo, Side};
    use hebe_types::Stamp;

    fn timeline(method: RebootMethod, events: &[(u64, Side, EventKind)]) -> Timeline {
        let before = KernelInfo {
            release: "6.1".into(),
            boot_id: "b".into(),
        };
        let mut timeline = Timeline::new(method, before);
        timeline.tsc_hz = Some(1000);
        timeline.axis = Some(hebe_host::timeline::Axis::Tsc);
        for vm in ["a", "b"] {
            let vm = vm.parse().expect("name");
            for (ms, side, kind) in events {
                let at = Stamp {
                    tsc: 5 + ms,
                    realtime_ns: ms * 1_000_000,
                };
                timeline.note(at, *side, Some(&vm), *kind);
            }
        }
        timeline
    }

    #[test]
    fn a_cold_report_gives_the_downtime_and_the_guests_own_reboot() {
        let report = timeline(
            RebootMethod::Cold,
            &[
                (1_000, Side::Before, EventKind::SuspendAsked),
                (4_000, Side::Before, EventKind::PoweredOff),
                (20_000, Side::After, EventKind::Booted),
                (26_000, Side::After, EventKind::FirstReply),
            ],
        );
        let samples = of_timeline(&report).expect("samples");
        let of = |quantity, seconds| Sample {
            quantity,
            n: 2.0,
            seconds,
        };
        assert_eq!(
            samples,
            [of(Quantity::Cold, 25.0), of(Quantity::RebootOs, 9.0)]
        );
    }

    #[test]
    fn a_warm_report_counts_to_the_first_frame_and_an_unfinished_one_is_refused() {
        let mut events = vec![
            (1_000, Side::Before, EventKind::SuspendAsked),
            (1_500, Side::Before, EventKind::VcpusStopped),
        ];
        let error = of_timeline(&timeline(RebootMethod::Warm, &events)).expect_err("unfinished");
        assert!(error.contains("did not come back"), "{error}");
        events.push((9_500, Side::After, EventKind::Running));
        let warm = |events: &[_]| of_timeline(&timeline(RebootMethod::Warm, events));
        assert_eq!(warm(&events).expect("samples")[0].seconds, 8.0);
        events.push((10_500, Side::After, EventKind::FirstReply));
        assert_eq!(warm(&events).expect("samples")[0].seconds, 9.0);
        assert!(of_timeline(&timeline(RebootMethod::Warm, &[])).is_err());
    }
}
