//! `suspend` and `resume`.

use std::collections::BTreeMap;

use hebe_api::FreezeReport;
use hebe_host::Host;
use hebe_host::ops::{self, ResumeFrom, ResumeOptions};
use hebe_host::resume_all::{Resumed, resume_all_telling};
use hebe_host::suspend_all::{self, suspend_all};
use hebe_types::{Stamp, VmName};
use serde::Serialize;

use super::vm::{done, each};
use crate::bar::Bar;
use crate::cli::{FromArg, ResumeArgs, SuspendArgs};
use crate::output::{Exit, Outcome, Output};

#[derive(Serialize)]
struct Suspended<'a> {
    name: &'a VmName,
    result: &'static str,
    freeze: &'a FreezeReport,
}

/// `hebe suspend`.
pub fn suspend(host: &Host, args: &SuspendArgs, out: &Output) -> Outcome {
    if args.all {
        return suspend_every(host, out);
    }
    each("suspending", &args.names, out, |name| {
        let report = ops::suspend(host, name)?;
        Ok(move |out: &Output| suspended(out, name, &report))
    })
}

fn suspended(out: &Output, name: &VmName, report: &FreezeReport) {
    let answer = Suspended {
        name,
        result: "frozen",
        freeze: report,
    };
    out.answer(&answer, || format!("{name}: {}", frozen(report)));
}

fn frozen(report: &FreezeReport) -> String {
    let took_ns = report
        .committed
        .realtime_ns
        .saturating_sub(report.asked.realtime_ns);
    format!(
        "frozen in {:.1} ms, {} bytes of state",
        took_ns as f64 / 1e6,
        report.state_bytes
    )
}

/// `hebe suspend --all`.
fn suspend_every(host: &Host, out: &Output) -> Outcome {
    let (bar, tell) = Bar::vms(out, "suspending all VMs");
    let result = suspend_all(host, &tell)?;
    drop(bar);
    out.answer(&result, || suspended_all(&result.vms));
    Ok(match result.vms.values().any(|vm| vm.is_trouble()) {
        true => Exit::Attention,
        false => Exit::Done,
    })
}

fn suspended_all(vms: &BTreeMap<VmName, suspend_all::Suspended>) -> String {
    use suspend_all::Suspended;
    let sentence = |(name, result): (&VmName, &Suspended)| {
        let text = match result {
            Suspended::Frozen { freeze } => frozen(freeze),
            Suspended::Already => "stands still already".to_owned(),
            Suspended::Failed { reason } => format!("not suspended: {reason}"),
        };
        format!("{name}: {text}\n")
    };
    if vms.is_empty() {
        return "there is no VM to suspend\n".to_owned();
    }
    vms.iter().map(sentence).collect()
}

/// `hebe resume`.
pub fn resume(host: &Host, args: &ResumeArgs, out: &Output, started: Stamp) -> Outcome {
    if args.all {
        return all(host, args.autostart, out, started);
    }
    let options = ResumeOptions {
        from: args.from.map(|from| match from {
            FromArg::Memory => ResumeFrom::Memory,
            FromArg::File => ResumeFrom::File,
        }),
        again: args.again,
        accept_changed_disk: args.accept_changed_disk,
    };
    each("resuming", &args.names, out, |name| {
        ops::resume(host, name, options)?;
        Ok(move |out: &Output| done(out, name, "running"))
    })
}

fn all(host: &Host, autostart: bool, out: &Output, started: Stamp) -> Outcome {
    let (bar, tell) = Bar::vms(out, "resuming all VMs");
    let result = resume_all_telling(host, started, autostart, &tell)?;
    drop(bar);
    out.answer(&result, || sentences(&result.vms));
    // Each stands in the answer, too: JSON is one document.
    if let Some(trouble) = &result.store_trouble {
        out.progress(&format!(
            "no VM was resumed from the store, and nothing in it was changed: {trouble}"
        ));
        return Ok(Exit::Failed);
    }
    if let Some(trouble) = &result.carry_trouble {
        out.progress(&format!(
            "nothing of what the kernel before this one was to hand over could be had: {trouble}"
        ));
        return Ok(Exit::Failed);
    }
    if let Some(trouble) = &result.pending_trouble {
        out.progress(trouble);
    }
    if result.pending_trouble.is_some() || result.vms.values().any(Resumed::is_trouble) {
        return Ok(Exit::Attention);
    }
    Ok(Exit::Done)
}

fn sentences(vms: &BTreeMap<VmName, Resumed>) -> String {
    let sentence = |(name, result): (&VmName, &Resumed)| {
        let text = match result {
            Resumed::Already => "up already".to_owned(),
            Resumed::Resumed => "resumed from memory".to_owned(),
            Resumed::Restored => "restored from its file".to_owned(),
            Resumed::Booted => "booted".to_owned(),
            Resumed::Cleaned => "nothing ever ran in its segment, which is free again".to_owned(),
            Resumed::Left { reason } => format!("left as it is: {reason}"),
            // Not the state 'lost', of which something may still be found.
            Resumed::Lost { reason } => format!("cannot be continued: {reason}"),
            Resumed::Failed { reason } => format!("failed: {reason}"),
        };
        format!("{name}: {text}\n")
    };
    if vms.is_empty() {
        return "there is no VM to resume\n".to_owned();
    }
    vms.iter().map(sentence).collect()
}
