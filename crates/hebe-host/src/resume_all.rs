//! Brings the VMs back when the host comes up.
//!
//! Order, because guests wait: first every VM that is frozen in memory, all at
//! once and with nothing done beside it; then those that need work (a segment
//! scrubbed, a file read, a kernel booted). What is done to whom is decided by
//! [`hebe_flow::resume`] from persistent facts alone.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;

use hebe_api::VmStatus;
use hebe_flow::resume::{Decision, ExecFact, Facts, SegmentFact, plan};
use hebe_types::{Stamp, VmConfig, VmId, VmName};
use serde::Serialize;

use crate::answering::DIED;
use crate::definitions;
use crate::failed;
use crate::files;
use crate::host::{Host, HostError};
use crate::launch;
use crate::listing::with_cause;
use crate::lock::VmLock;
use crate::luo;
use crate::luo::arrivals::Arrivals;
use crate::network::Beside;
use crate::notes;
use crate::ops;
use crate::pending::{self, Pending};
use crate::report::{ReportPlace, keep_report, last_report};
use crate::resuming;
use crate::saved;
use crate::saving;
use crate::segments::{self, free_segment};
use crate::stores::{ExecView, StoreView};
use crate::stores_known;
use crate::timeline::{EventKind, KernelInfo, Side, Timeline, corrected_clock};
use crate::vmm;

/// Folders of the state directory that nobody writes to but who holds the lock of
/// all VMs, or shares it. Whoever has it to himself finds nothing there that is being
/// written, and what looks so was left by one who was killed.
const WRITTEN_BY_ORDERS: [&str; 6] = ["failed", "frozen", "lives", "saved", "seeds", "vms"];

/// What became of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Resumed {
    /// It was up already, or was thawed in the VMM that held it.
    Already,
    /// Resumed from memory.
    Resumed,
    /// Restored from its file.
    Restored,
    /// Booted.
    Booted,
    /// A segment in which nothing ever ran was freed.
    Cleaned,
    /// Left as it is.
    Left {
        /// Why, with the way out.
        reason: String,
    },
    /// It cannot be continued.
    Lost {
        /// Why, with the way out.
        reason: String,
    },
    /// It could have been brought back, and was not.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Resumed {
    /// Whether it runs.
    fn is_up(&self) -> bool {
        matches!(
            self,
            Self::Already | Self::Resumed | Self::Restored | Self::Booted
        )
    }

    /// Whether somebody should look.
    pub fn is_trouble(&self) -> bool {
        matches!(
            self,
            Self::Left { .. } | Self::Lost { .. } | Self::Failed { .. }
        )
    }
}

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct ResumeAll {
    /// Per VM.
    pub vms: BTreeMap<VmName, Resumed>,
    /// Why the store could not be used, if so.
    pub store_trouble: Option<String>,
    /// Why nothing of what the kernel before handed over could be had, if so.
    pub carry_trouble: Option<String>,
    /// Why VMs that a cold reboot shut down are not booted, if so.
    pub pending_trouble: Option<String>,
    /// The wall clock was set forward by so many milliseconds.
    pub clock_corrected_ms: Option<i64>,
}

/// Is told, once for each VM that is dealt with, of how many there are; by the
/// thread that did it.
pub type Tell<'a> = &'a (dyn Fn(usize) + Sync);

/// Everything known, and what came of it.
struct Work<'a> {
    host: &'a Host,
    tell: Tell<'a>,
    store: Option<&'a StoreView>,
    configs: BTreeMap<VmName, VmConfig>,
    /// Those whose network is being made.
    expected: &'a BTreeSet<VmName>,
}

/// Resumes, restores and boots every VM that is due. `started` is the instant
/// at which this process began; with `autostart` also VMs that are to run
/// whenever the host does.
///
/// # Errors
/// Another order for all VMs, or one for a single VM that does not end, is under
/// way; nothing has changed.
pub fn resume_all(host: &Host, started: Stamp, autostart: bool) -> Result<ResumeAll, HostError> {
    resume_all_telling(host, started, autostart, &|_| {})
}

/// [`resume_all`]; `tell` hears of each VM that is dealt with.
///
/// # Errors
/// As of [`resume_all`].
pub fn resume_all_telling(
    host: &Host,
    started: Stamp,
    autostart: bool,
    tell: Tell,
) -> Result<ResumeAll, HostError> {
    let _only_one = host.lock_all()?;
    launch::read_ahead(host);
    let carry_trouble = luo::asking::ensure(host);
    host.store.settle();
    let (store, store_trouble) = match host.store.view() {
        Ok(view) => (view, None),
        Err(error) => (None, Some(with_cause(&error))),
    };
    let found = host.system.stamp();
    let mut timeline = open_report(host);
    let clock_corrected_ms = timeline.as_ref().and_then(|t| correct_clock(host, t));
    let pending = Pending::read(&host.layout);
    let due = pending.as_ref().map_or(&[][..], |p| &p.vms);
    let (facts, configs) = facts(host, store.as_ref(), due, autostart);
    let decisions = plan(&facts);
    let network = Beside::of(host, to_resume(&decisions, store.as_ref()));
    let (vms, network_ready) = network.make_while(|expected| {
        let work = Work {
            host,
            tell,
            store: store.as_ref(),
            configs,
            expected,
        };
        work.carry_out_all(&decisions)
    });
    let pending_trouble = match pending {
        Ok(pending) => settle_pending(host, pending, &vms),
        Err(error) => Some(pending::unreadable(&host.layout, &error)),
    };
    if store.is_some()
        && let Ok(Some(now)) = host.store.view()
    {
        notes::settle(&host.layout, &now);
    }
    luo::forget_arrived(host);
    // Of VMs that an earlier release booted.
    let _ = stores_known::know(host, store.as_ref());
    for dir in WRITTEN_BY_ORDERS {
        files::remove_unfinished(&host.layout.state.join(dir));
    }
    let device = store.as_ref().is_some_and(|s| !s.kept_only);
    if let Some(timeline) = &mut timeline {
        note_new_kernel(host, timeline, started, found, store.is_some());
        if let Some(at) = network_ready {
            timeline.note(at, Side::After, None, EventKind::NetworkReady);
        }
        note_arrivals(host, timeline);
        note_vms(timeline, &vms);
        let place = if device {
            ReportPlace::Store
        } else {
            ReportPlace::Disk
        };
        let _ = keep_report(host, timeline, place);
    }
    Ok(ResumeAll {
        vms: vms.into_iter().map(|(n, (r, _))| (n, r)).collect(),
        store_trouble,
        carry_trouble,
        pending_trouble,
        clock_corrected_ms,
    })
}

/// Those that are resumed from memory, with their ids.
fn to_resume<'a>(
    decisions: &'a BTreeMap<VmName, Decision>,
    store: Option<&'a StoreView>,
) -> impl Iterator<Item = (&'a VmName, VmId)> {
    let resumed = decisions
        .iter()
        .filter(|(_, decision)| matches!(decision, Decision::Resume { .. }));
    resumed.filter_map(move |(name, _)| Some((name, store?.segment_of(name)?.vm?)))
}

/// The report that the kernel before left for this one.
fn open_report(host: &Host) -> Option<Timeline> {
    let timeline = last_report(host).ok().flatten()?;
    let here = VmId(host.system.boot_id()).to_string();
    // A second run of this boot adds to what the first one noted: disks with
    // saved VMs on them may come late.
    let after = timeline.after.as_ref();
    let for_us =
        timeline.before.boot_id != here && after.is_none_or(|kernel| kernel.boot_id == here);
    for_us.then_some(timeline)
}

fn correct_clock(host: &Host, timeline: &Timeline) -> Option<i64> {
    let now = host.system.stamp();
    let right = corrected_clock(timeline.last_before()?, now, timeline.tsc_hz?)?;
    host.system.set_realtime_ns(right).ok()?;
    Some((right as i64 - now.realtime_ns as i64) / 1_000_000)
}

fn facts(
    host: &Host,
    store: Option<&StoreView>,
    pending: &[VmConfig],
    autostart: bool,
) -> (Facts, BTreeMap<VmName, VmConfig>) {
    let mut configs: BTreeMap<VmName, VmConfig> = definitions::all(&host.layout)
        .into_iter()
        .filter_map(|(name, config)| Some((name, config.ok()?)))
        .collect();
    let automatic: BTreeSet<VmName> = configs
        .values()
        .filter(|c| autostart && c.autostart)
        .map(|c| c.name.clone())
        .collect();
    // What was pending is what ran; a definition changed since then counts
    // from the next start on.
    for config in pending {
        configs.insert(config.name.clone(), config.clone());
    }
    let found: Vec<SegmentFact> = store
        .iter()
        .flat_map(|s| &s.segments)
        .map(|s| SegmentFact {
            id: s.id,
            name: s.name.clone(),
            vm: s.vm,
            exec: match &s.exec {
                ExecView::Empty => ExecFact::Empty,
                ExecView::Ended => ExecFact::Ended,
                ExecView::Running { .. } => ExecFact::Running,
                ExecView::Frozen { .. } => match notes::is_given_up(&host.layout, s) {
                    Ok(false) => ExecFact::Frozen,
                    Ok(true) => ExecFact::GivenUp,
                    Err(error) => ExecFact::Damaged(with_cause(&error)),
                },
                ExecView::Damaged { reason } => ExecFact::Damaged(reason.clone()),
            },
        })
        .collect();
    let unnoted = store
        .iter()
        .flat_map(|s| &s.segments)
        .filter(|s| matches!(s.exec, ExecView::Frozen { .. }))
        .filter_map(|s| Some((s.name.clone()?, notes::unnoted(&host.layout, s).ok()??)))
        .collect();
    let saved = saved::all(&host.layout);
    let noted = notes::all(&host.layout);
    let elsewhere: BTreeMap<VmName, String> = notes::elsewhere(&noted, store)
        .map(|n| (n.name.clone(), n.sentence(host, &notes::afresh(&n.name))))
        .collect();
    let last = |name: &VmName| store?.segment_of(name)?.vm;
    let failed: BTreeMap<VmName, String> = failed::all(&host.layout)
        .into_iter()
        .filter(|(name, failed)| failed.is_of(last(name)))
        .map(|(name, failed)| (name, failed.sentence))
        .collect();
    let names = found
        .iter()
        .filter_map(|s| s.name.as_ref())
        .chain(saved.keys())
        .chain(failed.keys())
        .chain(configs.keys());
    let mut alive = BTreeSet::new();
    let mut stranded = BTreeMap::new();
    for name in names {
        let dir = host.layout.vm_dir(name);
        match VmLock::look(&dir) {
            Ok(true) => drop(alive.insert(name.clone())),
            Ok(false) => {
                let why = segments::stranded(host, store, name).map(|(_, why)| why.to_string());
                stranded.extend(why.map(|why| (name.clone(), why)));
            }
            Err(error) => {
                let dir = dir.display();
                let why = format!(
                    "nobody can tell whether it runs: the lock in {dir} cannot be looked at ({error}); resume again when it can"
                );
                stranded.insert(name.clone(), why);
            }
        }
    }
    let facts = Facts {
        segments: found,
        saved,
        pending: pending.iter().map(|c| c.name.clone()).collect(),
        autostart: automatic,
        alive,
        stranded,
        elsewhere,
        unnoted,
        failed,
    };
    (facts, configs)
}

/// What a VM came to, and what its VMM said at the instant it was up.
type Done = (Resumed, Option<(Stamp, VmStatus)>);
type Results = BTreeMap<VmName, Done>;

impl Work<'_> {
    /// First those that wait for nothing but this.
    fn carry_out_all(&self, decisions: &BTreeMap<VmName, Decision>) -> Results {
        // Thawing in a living VMM is as quick as resuming.
        let fast = |d: &Decision| matches!(d, Decision::Resume { .. } | Decision::Already);
        let mut vms = self.all_at_once(decisions, fast);
        vms.extend(self.all_at_once(decisions, |d| !fast(d)));
        vms
    }

    fn all_at_once(
        &self,
        decisions: &BTreeMap<VmName, Decision>,
        wanted: impl Fn(&Decision) -> bool,
    ) -> Results {
        thread::scope(|scope| {
            let wanted = decisions.iter().filter(|(_, decision)| wanted(decision));
            let workers = wanted.map(|(name, decision)| {
                let work = move || {
                    let done = self.carry_out(name, decision);
                    (self.tell)(decisions.len());
                    done
                };
                let worker = thread::Builder::new().spawn_scoped(scope, work);
                (name, worker.map_err(|_| work))
            });
            let workers: Vec<_> = workers.collect();
            let results = workers.into_iter().map(|(name, worker)| {
                let result = match worker {
                    Ok(worker) => worker.join().unwrap_or_else(|_| {
                        let reason = DIED.to_owned();
                        (Resumed::Failed { reason }, None)
                    }),
                    // No thread can be had: one after the other then.
                    Err(work) => work(),
                };
                (name.clone(), result)
            });
            results.collect()
        })
    }

    fn carry_out(&self, name: &VmName, decision: &Decision) -> Done {
        let outcome = match decision {
            Decision::Already => self.already(name),
            Decision::Resume { .. } => self
                .resume(name)
                .map(|status| self.up(Resumed::Resumed, status))
                .or_else(|error| self.did_not_arrive(name).ok_or(error)),
            Decision::Restore { .. } => saving::restore(self.host, name, false)
                .map(|status| self.up(Resumed::Restored, status)),
            Decision::Boot { .. } => self.boot(name),
            Decision::Clean { .. } => self.clean(name),
            Decision::Leave { reason } => Ok((
                Resumed::Left {
                    reason: reason.clone(),
                },
                None,
            )),
            Decision::Lost { reason } => Ok((
                Resumed::Lost {
                    reason: reason.clone(),
                },
                None,
            )),
        };
        outcome.unwrap_or_else(|error| {
            let reason = with_cause(&error);
            (Resumed::Failed { reason }, None)
        })
    }

    /// Memory that was still on its way when that was decided may have turned
    /// out lost: what is done then is what a first look would have decided.
    fn did_not_arrive(&self, name: &VmName) -> Option<Done> {
        let now = self.host.store.view().ok().flatten()?;
        let segment = now.segment_of(name).filter(|s| s.carried)?;
        let ExecView::Damaged { reason } = &segment.exec else {
            return None;
        };
        let facts = Facts {
            segments: vec![SegmentFact {
                id: segment.id,
                name: segment.name.clone(),
                vm: segment.vm,
                exec: ExecFact::Damaged(reason.clone()),
            }],
            ..Facts::default()
        };
        match plan(&facts).remove(name)? {
            Decision::Leave { reason } => Some((Resumed::Left { reason }, None)),
            _ => None,
        }
    }

    fn up(&self, result: Resumed, status: VmStatus) -> Done {
        (result, Some((self.host.system.stamp(), status)))
    }

    fn already(&self, name: &VmName) -> Result<Done, HostError> {
        // A reboot that was killed half-way leaves VMs frozen in living VMMs.
        let survey_state = vmm::status(&self.host.layout.socket(name), vmm::STATUS_WAIT);
        let held = survey_state.is_ok_and(|s| {
            matches!(
                s.state,
                hebe_api::VmmState::Frozen | hebe_api::VmmState::Saved
            )
        });
        if held {
            resuming::resume_one(self.host, name, ops::ResumeOptions::default())?;
        }
        Ok((Resumed::Already, None))
    }

    fn resume(&self, name: &VmName) -> Result<VmStatus, HostError> {
        let is_expected = self.expected.contains(name);
        resuming::continue_expected(self.host, name, self.store, is_expected)
    }

    fn boot(&self, name: &VmName) -> Result<Done, HostError> {
        let config = self.configs.get(name).ok_or_else(|| HostError::NoSuchVm {
            name: name.clone(),
            expected: definitions::expected_path(&self.host.layout, name),
        })?;
        let status = ops::boot(self.host, config)?;
        Ok(self.up(Resumed::Booted, status))
    }

    fn clean(&self, name: &VmName) -> Result<Done, HostError> {
        // Under the VM's lock: a VMM that starts this moment holds it.
        let lock = ops::lock(self.host, name)?;
        let segment = self.store.and_then(|s| s.segment_of(name));
        let state = &self.host.layout.state;
        if segment.is_some_and(|s| s.exec == ExecView::Ended) && !state.exists() {
            // A file of it may lie there, and the segment alone tells that the
            // VM ran after that was written.
            let reason = format!(
                "its segment is freed when {} is mounted: resume again then",
                state.display()
            );
            return Ok((Resumed::Left { reason }, None));
        }
        if let Some(segment) = segment {
            free_segment(self.host, segment)?;
        }
        let _ = lock.remove_dir();
        Ok((Resumed::Cleaned, None))
    }
}

/// VMs that are up are pending no more; those that failed stay on the list.
/// Gives why others on it are not booted.
fn settle_pending(host: &Host, mut pending: Pending, vms: &Results) -> Option<String> {
    let up = vms.iter().filter(|(_, (result, _))| result.is_up());
    let taken = up.filter(|(name, _)| pending.remove(name)).count();
    if taken > 0 {
        let _ = pending.write(host);
    }
    pending.trouble(&host.layout)
}

fn note_new_kernel(
    host: &Host,
    timeline: &mut Timeline,
    started: Stamp,
    found: Stamp,
    has_store: bool,
) {
    let now = host.system.stamp();
    timeline.after = Some(KernelInfo {
        release: host.system.release(),
        boot_id: VmId(host.system.boot_id()).to_string(),
    });
    timeline.join(started);
    let since_boot_ns = host.system.since_boot_ns();
    let ticks = timeline.tsc_hz.map_or(0, |hz| {
        (u128::from(since_boot_ns) * u128::from(hz) / 1_000_000_000) as u64
    });
    let entry = Stamp {
        tsc: now.tsc.saturating_sub(ticks),
        realtime_ns: now.realtime_ns.saturating_sub(since_boot_ns),
    };
    let mut note = |at, kind| timeline.note(at, Side::After, None, kind);
    note(entry, EventKind::KernelEntry);
    note(started, EventKind::UserSpace);
    if has_store {
        note(found, EventKind::StoreFound);
    }
    note(now, EventKind::AllResumed);
}

/// How long the memory of VMs that Linux carried took to arrive.
fn note_arrivals(host: &Host, timeline: &mut Timeline) {
    let arrivals = Arrivals::read(host);
    for note in arrivals.into_iter().flat_map(|arrivals| arrivals.vms) {
        let Some(name) = &note.name else {
            continue;
        };
        let instants = [
            (note.began, EventKind::Retrieving),
            (note.ended, EventKind::Arrived),
        ];
        for (at, kind) in instants {
            timeline.note(at, Side::After, Some(name), kind);
        }
        let row = timeline.carried.iter_mut().find(|row| row.vm == *name);
        if let Some(row) = row.filter(|_| note.lost.is_none()) {
            row.retrieved = Some(note.retrieved);
        }
    }
}

fn note_vms(timeline: &mut Timeline, vms: &Results) {
    for (name, (result, up)) in vms {
        let Some((at, status)) = up else {
            continue;
        };
        if *result == Resumed::Booted {
            timeline.note(*at, Side::After, Some(name), EventKind::Booted);
        }
        if let Some(resume) = &status.resume {
            timeline.note_resume(name, resume);
        }
        if let Some(first) = status.first_tx {
            timeline.note(first, Side::After, Some(name), EventKind::FirstReply);
        }
    }
}
