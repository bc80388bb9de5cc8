//! Keeping the timeline: where it lies, and how it is completed.

use hebe_types::VmId;

use crate::files;
use crate::host::Host;
use crate::listing::{self, VmRow, with_cause};
use crate::timeline::{EventKind, Side, Timeline};

/// Where the report lies on hosts without a store, and once it is complete.
pub fn report_path(host: &Host) -> std::path::PathBuf {
    host.layout.state.join("reports").join("last.json")
}

/// Keeps the report where the next kernel finds it. A copy on the disk that
/// cannot be written costs the report; a store that cannot be written costs the
/// reboot, for then the VMs in it are in doubt too.
pub fn keep_report(host: &Host, timeline: &Timeline, place: ReportPlace) -> Result<(), String> {
    let bytes = timeline.to_bytes();
    if place != ReportPlace::Store {
        let _ = files::write_durably(&report_path(host), &bytes);
    }
    if place != ReportPlace::Disk {
        host.store
            .write_report(&bytes)
            .map_err(|e| with_cause(&e))?;
    }
    Ok(())
}

/// Where a report is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportPlace {
    /// In the store: quick, and survives a kexec.
    Store,
    /// On the disk of the state directory.
    Disk,
    /// In both, where the store may not survive what comes.
    Both,
}

/// The report of the last reboot, if there was one: the newer of the two that
/// store and disk may hold.
pub fn last_report(host: &Host) -> Result<Option<Timeline>, String> {
    // A store that a reset cleared is no reason not to look on the disk.
    let stored = host.store.read_report().ok().flatten();
    let on_disk = std::fs::read(report_path(host)).ok();
    let mut newest: Option<Timeline> = None;
    let mut trouble = None;
    for bytes in stored.into_iter().chain(on_disk).filter(|b| !b.is_empty()) {
        match Timeline::parse(&bytes) {
            Ok(found) => {
                if newest
                    .as_ref()
                    .is_none_or(|n| n.ended_ns() < found.ended_ns())
                {
                    newest = Some(found);
                }
            }
            Err(error) => trouble = Some(error),
        }
    }
    match (newest, trouble) {
        (None, Some(error)) => Err(error),
        (newest, _) => Ok(newest),
    }
}

/// The last report with what running VMs tell of their resume; kept, if that
/// was new.
pub fn complete_report(host: &Host) -> Result<Option<Timeline>, String> {
    let Some(mut timeline) = last_report(host)? else {
        return Ok(None);
    };
    let here = VmId(host.system.boot_id()).to_string();
    if timeline.after.as_ref().map(|k| k.boot_id.as_str()) != Some(here.as_str()) {
        return Ok(Some(timeline));
    }
    let known = timeline.events.len();
    for row in listing::survey(host).rows.values() {
        note_status(&mut timeline, row);
    }
    if timeline.events.len() != known {
        let place = match host.store.view() {
            Ok(Some(store)) if !store.kept_only => ReportPlace::Store,
            _ => ReportPlace::Disk,
        };
        keep_report(host, &timeline, place)?;
    }
    Ok(Some(timeline))
}

/// Notes what a VM's status says about its way through the reboot.
pub fn note_status(timeline: &mut Timeline, row: &VmRow) {
    let Some(status) = &row.status else {
        return;
    };
    let went_through = timeline
        .events
        .iter()
        .any(|e| e.side == Side::Before && e.vm.as_ref() == Some(&row.name));
    if !went_through {
        return;
    }
    if let Some(resume) = &status.resume {
        timeline.note_resume(&row.name, resume);
    }
    if let Some(first) = status.first_tx {
        timeline.note(first, Side::After, Some(&row.name), EventKind::FirstReply);
    }
}
