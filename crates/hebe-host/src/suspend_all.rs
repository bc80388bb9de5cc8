//! Suspends all VMs on memory, as before the host's power is to be saved or its
//! devices changed: each as [`crate::ops::suspend`] does, all at once as a reboot
//! freezes them, and under the same lock, so that no VM comes up meanwhile.
//!
//! One that cannot be suspended holds up nobody, and runs on.

use std::collections::BTreeMap;
use std::thread;

use hebe_api::FreezeReport;
use hebe_flow::life::Life;
use hebe_types::VmName;
use serde::Serialize;

use crate::answering::DIED;
use crate::host::{Host, HostError};
use crate::listing::{self, Survey, VmRow, with_cause};
use crate::ops;
use crate::resume_all::Tell;

/// What became of one VM.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Suspended {
    /// It is frozen.
    Frozen {
        /// When it was, and how much state it has.
        freeze: Box<FreezeReport>,
    },
    /// It was frozen or saved already.
    Already,
    /// It is as it was.
    Failed {
        /// Why, with the way out.
        reason: String,
    },
}

impl Suspended {
    /// Whether somebody should look.
    pub fn is_trouble(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct SuspendAll {
    /// Of each VM that is not simply down.
    pub vms: BTreeMap<VmName, Suspended>,
}

/// Suspends every VM that runs or is paused. `tell` hears of each that is dealt
/// with.
///
/// # Errors
/// Another order for all VMs, or one for a single VM that does not end, is under
/// way; nothing has changed.
pub fn suspend_all(host: &Host, tell: Tell) -> Result<SuspendAll, HostError> {
    let _only_one = host.lock_all()?;
    let survey = listing::survey(host);
    let concerned: Vec<&VmRow> = survey.rows.values().filter(|r| is_concerned(r)).collect();
    let whole = concerned.len();
    let vms = thread::scope(|scope| {
        let survey = &survey;
        let workers = concerned.into_iter().map(|row| {
            let work = move || {
                let result = suspend(host, survey, row);
                tell(whole);
                result
            };
            let worker = thread::Builder::new().spawn_scoped(scope, work);
            (&row.name, worker.map_err(|_| work))
        });
        let workers: Vec<_> = workers.collect();
        let results = workers.into_iter().map(|(name, worker)| {
            let result = match worker {
                Ok(worker) => worker.join().unwrap_or_else(|_| Suspended::Failed {
                    reason: DIED.to_owned(),
                }),
                // No thread can be had: one after the other then.
                Err(work) => work(),
            };
            (name.clone(), result)
        });
        results.collect()
    });
    Ok(SuspendAll { vms })
}

/// Of others there is nothing that runs.
fn is_concerned(row: &VmRow) -> bool {
    row.life.has_vmm() || matches!(row.life, Life::Frozen | Life::Saved)
}

fn suspend(host: &Host, survey: &Survey, row: &VmRow) -> Suspended {
    let kept = [Life::Frozen, Life::Held, Life::Saved, Life::SavedHeld];
    if kept.contains(&row.life) {
        return Suspended::Already;
    }
    match ops::suspend_seen(host, survey, row) {
        Ok(report) => Suspended::Frozen {
            freeze: Box::new(report),
        },
        Err(error) => Suspended::Failed {
            reason: with_cause(&error),
        },
    }
}
