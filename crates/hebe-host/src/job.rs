//! What a reboot does to one VM, forward and back; each in a thread of its own.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hebe_api::{ClientError, FreezeReport, SaveReport, VmmState};
use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_flow::resume::SavedFact;
use hebe_store::ExecStatus;
use hebe_store::luo::SegmentFiles;
use hebe_types::{Stamp, VmId, VmName};

use crate::failed;
use crate::host::{Host, HostError};
use crate::launch::{ExitRecord, Instance};
use crate::listing::{VmRow, VmState, with_cause};
use crate::lock::VmLock;
use crate::luo;
use crate::luo::carry::Carried;
use crate::notes;
use crate::ops::{self, StopOptions};
use crate::pending;
use crate::resuming::{ResumeOptions, resume_one};
use crate::saved::SavedPaths;
use crate::saving;
use crate::stores::ExecView;
use crate::vmm;

/// How long a VMM that takes no request any more may need to be gone.
const ENDING_WAIT: Duration = Duration::from_secs(1);
/// How long a VMM that refused to suspend its VM may need to find out that KVM
/// cannot go on with it: its vCPUs run, and fail, again.
const FAILING_WAIT: Duration = Duration::from_millis(200);

/// Instants that a VM's effect found, to be noted in the timeline.
pub(crate) enum Note {
    Freeze(VmName, FreezeReport),
    Save(VmName, SaveReport),
    Off {
        vm: VmName,
        asked: Stamp,
        off: Stamp,
    },
    /// Its guest powered itself off before it was asked anything.
    Ended(VmName),
    /// It failed, for this reason, and is ended.
    Over(VmName, String),
}

/// Why a VM's effect failed.
pub(crate) struct Trouble {
    pub(crate) why: String,
    pub(crate) certain: bool,
    /// Nobody was there to be asked.
    unasked: bool,
    /// The VM failed: it has nothing left that could be kept.
    pub(crate) over: bool,
}

impl Trouble {
    fn certain(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            certain: true,
            unasked: false,
            over: false,
        }
    }
}

impl From<HostError> for Trouble {
    fn from(error: HostError) -> Self {
        match &error {
            HostError::Vmm { source, .. } => Self {
                certain: vmm::is_refusal(source),
                unasked: is_unasked(source),
                over: false,
                why: with_cause(source),
            },
            _ => Self {
                certain: false,
                unasked: false,
                over: false,
                why: with_cause(&error),
            },
        }
    }
}

/// Of a request that got no answer: a power button that was pressed may be what
/// ended the guest.
fn is_unasked(error: &ClientError) -> bool {
    matches!(error, ClientError::Connect { .. })
}

/// One VM's part, in a thread of its own.
pub(crate) struct Job {
    pub(crate) host: Host,
    pub(crate) vm: VmName,
    pub(crate) row: Option<VmRow>,
    /// Its memory, where the reboot holds it beside the VMM: store `luo`.
    pub(crate) files: Option<Arc<SegmentFiles>>,
    pub(crate) stop: StopOptions,
    /// What it is frozen in survives: to stand frozen is to be kept.
    pub(crate) keeps: bool,
}

impl Job {
    pub(crate) fn suspend(&self, fate: Fate) -> (Result<(), Trouble>, Option<Note>) {
        if self.has_ended(Duration::ZERO) {
            return self.ended(fate);
        }
        let result = match fate {
            Fate::Keep => self.freeze(),
            Fate::Save => self.save(),
            Fate::ShutDown => self.shut_down(),
            Fate::End => self.end(),
        };
        match result {
            Ok(note) => (Ok(()), Some(note)),
            // Its end is its own, unless a power button was pressed.
            Err(trouble)
                if !trouble.certain
                    && (trouble.unasked || fate != Fate::ShutDown)
                    && self.has_ended(ENDING_WAIT) =>
            {
                self.ended(fate)
            }
            Err(trouble) if matches!(fate, Fate::Keep | Fate::Save) => self.over(trouble),
            // It was to be down, and is.
            Err(trouble) if trouble.unasked && self.crash().is_some() => (Ok(()), None),
            Err(trouble) => (Err(trouble), None),
        }
    }

    /// It was not suspended for `trouble`. Whether that is because it failed: its
    /// guest brought KVM to give it up, or its VMM to an end. Such a VM holds up
    /// nobody.
    fn over(&self, trouble: Trouble) -> (Result<(), Trouble>, Option<Note>) {
        let ended = match self.failure(&trouble) {
            Some((vm, why)) => self.end_failed(vm, why),
            None => return (Err(trouble), None),
        };
        match ended {
            Ok(Note::Over(vm, why)) => {
                let over = Trouble {
                    over: true,
                    ..Trouble::certain(why.clone())
                };
                (Err(over), Some(Note::Over(vm, why)))
            }
            // It could not be ended, so that it may do whatever it does.
            _ => (Err(trouble), None),
        }
    }

    /// Its guest brought its VMM to an end, since the survey.
    pub(crate) fn crashed(&self) -> Option<Note> {
        let (vm, why) = self.crash()?;
        self.end_failed(vm, why).ok()
    }

    fn crash(&self) -> Option<(VmId, String)> {
        let dir = self.host.layout.vm_dir(&self.vm);
        // What is committed is continued, whatever became of its VMM.
        if VmLock::is_held(&dir) || self.is_committed() {
            return None;
        }
        let record = ExitRecord::read(&dir).filter(ExitRecord::is_failure_of_guest)?;
        let vm = Instance::read(&dir)?.vm;
        Some((vm, record.words().to_owned()))
    }

    /// Which life failed, and why.
    fn failure(&self, trouble: &Trouble) -> Option<(VmId, String)> {
        if !trouble.certain {
            return self.crash();
        }
        let began = Instant::now();
        loop {
            let status = vmm::status_of(&self.host, &self.vm, vmm::STATUS_WAIT);
            let Ok(status) = status else {
                // It may have ended since it refused.
                return self.crash();
            };
            if let Some(why) = status.failed {
                return Some((status.id, why));
            }
            if began.elapsed() >= FAILING_WAIT {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// [`Job::suspend`] for one who cannot turn back: also a VM that stands
    /// still already is brought to this fate. With `again`, something else was
    /// tried before. What the VM is in afterwards is the answer.
    pub(crate) fn keep(&self, fate: Fate, again: bool) -> (Result<Fate, String>, Option<Note>) {
        let unknown = self
            .row
            .as_ref()
            .is_some_and(|r| r.state == VmState::Unresponsive);
        if again || unknown {
            match self.stands() {
                // It would end with the host.
                Ok(Some(Fate::Keep)) if !self.keeps => {
                    let socket = self.host.layout.socket(&self.vm);
                    if let Err(error) = vmm::let_run(&socket) {
                        let why = with_cause(&error);
                        return (Err(format!("it stands frozen, and stays so: {why}")), None);
                    }
                }
                // What got no answer was carried out all the same.
                Ok(Some(fate)) => return (Ok(fate), None),
                Ok(None) => {}
                // Whatever is asked next is waited for longer, and in vain.
                Err(_) if self.has_ended(Duration::ZERO) => {}
                Err(why) => return (Err(why), None),
            }
        } else if let Err(trouble) = self.wake() {
            return (Err(trouble.why), None);
        }
        match self.suspend(fate) {
            (Ok(()), note) => (Ok(fate), note),
            // The answer is missing, or its VMM; what counts is there.
            (Err(_), note) if fate == Fate::Keep && self.is_committed() => (Ok(fate), note),
            (Err(trouble), note) if trouble.over => (Ok(Fate::End), note),
            (Err(trouble), note) => (Err(trouble.why), note),
        }
    }

    /// Whether the memory says that the VM is frozen.
    fn is_committed(&self) -> bool {
        if let Some(files) = &self.files {
            return matches!(files.status(), Ok(ExecStatus::Frozen { .. }));
        }
        let view = self.host.store.view().ok().flatten();
        let segment = view.as_ref().and_then(|view| view.segment_of(&self.vm));
        segment.is_some_and(|s| matches!(s.exec, ExecView::Frozen { .. }))
    }

    /// [`Job::keep`] in memory that Linux carries: it is frozen, and what it began
    /// to use since it was preserved is preserved, too; or it runs again.
    pub(crate) fn keep_carried(
        &self,
        carried: &Carried,
        again: bool,
    ) -> (Result<Fate, String>, Option<Note>) {
        let (result, note) = self.keep(Fate::Keep, again);
        let complete = match &result {
            Ok(Fate::Keep) => carried.complete(),
            _ => return (result, note),
        };
        let Err(why) = complete else {
            return (result, note);
        };
        let socket = self.host.layout.socket(&self.vm);
        match vmm::let_run(&socket) {
            Ok(()) => (Err(why), None),
            Err(error) => {
                let stays = with_cause(&error);
                (Err(format!("{why}; and it stays frozen: {stays}")), None)
            }
        }
    }

    /// What its VMM says that it is in; `None` where its guest runs.
    fn stands(&self) -> Result<Option<Fate>, String> {
        let socket = self.host.layout.socket(&self.vm);
        let status = vmm::status(&socket, vmm::STATUS_WAIT);
        let state = status.map_err(|e| format!("its VMM does not answer: {}", with_cause(&e)))?;
        Ok(match state.state {
            VmmState::Frozen => Some(Fate::Keep),
            VmmState::Saved => {
                let paths = SavedPaths::new(&self.host.layout, &self.vm);
                let whole = paths.fact() == Some(SavedFact::Complete);
                if whole {
                    return Ok(Some(Fate::Save));
                }
                vmm::let_run(&socket).map_err(|e| with_cause(&e))?;
                None
            }
            VmmState::Running | VmmState::Paused => None,
        })
    }

    /// What is frozen where it does not survive has to run, to be saved.
    fn wake(&self) -> Result<(), Trouble> {
        let life = self.row()?.life;
        if matches!(life, Life::Frozen | Life::Held) {
            resume_one(&self.host, &self.vm, ResumeOptions::default())?;
        }
        // It has no file that counts, or nothing were to be done with it.
        if life == Life::SavedHeld {
            let socket = self.host.layout.socket(&self.vm);
            vmm::let_run(&socket).map_err(|e| Trouble::certain(with_cause(&e)))?;
        }
        Ok(())
    }

    /// Its guest powered itself off since the reboot began: it is down, and
    /// stays so.
    fn ended(&self, fate: Fate) -> (Result<(), Trouble>, Option<Note>) {
        let settled = match fate {
            Fate::ShutDown => pending::settle(&self.host, &self.vm),
            Fate::Keep | Fate::Save | Fate::End => Ok(()),
        };
        let done = settled.map_err(|e| Trouble::certain(with_cause(&e)));
        (done, Some(Note::Ended(self.vm.clone())))
    }

    fn has_ended(&self, wait: Duration) -> bool {
        let record = || ExitRecord::read(&self.host.layout.vm_dir(&self.vm));
        ops::ended_within(&self.host, &self.vm, wait)
            && record().is_some_and(|record| record.is_clean_end())
    }

    fn row(&self) -> Result<&VmRow, Trouble> {
        self.row
            .as_ref()
            .ok_or_else(|| Trouble::certain("it was not there when the reboot began"))
    }

    /// A VM that an operator paused has to run for the instant in which it is
    /// frozen; it will run afterwards, and the verdict says so.
    fn unpause(&self) -> Result<(), Trouble> {
        if self.row()?.life == Life::Paused {
            let socket = self.host.layout.socket(&self.vm);
            vmm::let_run(&socket).map_err(|e| Trouble::certain(with_cause(&e)))?;
        }
        Ok(())
    }

    fn freeze(&self) -> Result<Note, Trouble> {
        self.unpause()?;
        let socket = self.host.layout.socket(&self.vm);
        match vmm::freeze(&socket, vmm::FREEZE_WAIT) {
            Ok(report) => Ok(Note::Freeze(self.vm.clone(), report)),
            Err(error) => Err(Trouble {
                certain: vmm::is_refusal(&error),
                unasked: is_unasked(&error),
                over: false,
                why: with_cause(&error),
            }),
        }
    }

    fn save(&self) -> Result<Note, Trouble> {
        self.unpause()?;
        let memory = self.row()?.memory;
        let report = saving::save_held(&self.host, &self.vm, memory)?;
        Ok(Note::Save(self.vm.clone(), report))
    }

    fn shut_down(&self) -> Result<Note, Trouble> {
        let asked = self.host.system.stamp();
        ops::power_off(&self.host, self.row()?, self.stop)?;
        Ok(Note::Off {
            vm: self.vm.clone(),
            asked,
            off: self.host.system.stamp(),
        })
    }

    /// Ends a VM that failed.
    fn end(&self) -> Result<Note, Trouble> {
        let found = vmm::status_of(&self.host, &self.vm, vmm::STATUS_WAIT);
        // One that does not answer any more, or is gone, said it before.
        let status = match found {
            Ok(status) => status,
            Err(error) => {
                (self.row()?.status.clone()).ok_or_else(|| Trouble::certain(with_cause(&error)))?
            }
        };
        let why = status.failed.ok_or_else(|| {
            Trouble::certain("it had failed, and does not say so any more: see `hebe list`")
        })?;
        self.end_failed(status.id, why)
    }

    /// The VMM of a failed VM, if it stands, alone knows why: that is noted first.
    /// Its disks were drained when it failed, and are closed in order.
    fn end_failed(&self, vm: VmId, why: String) -> Result<Note, Trouble> {
        let mut said = why.clone();
        if let Err(error) = failed::note(&self.host, &self.vm, vm, &why) {
            said.push_str(&format!("; that is not noted: {}", with_cause(&error)));
        }
        // What was to be frozen is not.
        notes::forget_here(&self.host, &self.vm, vm);
        if VmLock::is_held(&self.host.layout.vm_dir(&self.vm)) {
            ops::end_vmm(&self.host, self.row()?)?;
        }
        Ok(Note::Over(self.vm.clone(), said))
    }

    /// Brings a frozen or saved VM back, wherever it is.
    pub(crate) fn bring_back(&self, fate: Fate) -> Result<(), Trouble> {
        let dir = self.host.layout.vm_dir(&self.vm);
        let alive = VmLock::is_held(&dir);
        if fate == Fate::Save {
            let paths = SavedPaths::new(&self.host.layout, &self.vm);
            if !alive && paths.may_be_complete() {
                // The file is all that is left of the VM: it is restored, or
                // stays where it is and is listed.
                return match saving::restore(&self.host, &self.vm, false) {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        let why = with_cause(&error);
                        Err(Trouble::certain(format!("saved in its file: {why}")))
                    }
                };
            }
            // Before the VM runs, or its file would be older than its disk.
            paths
                .withdraw()
                .map_err(|e| Trouble::certain(format!("saved, with its VMM waiting: {e}")))?;
        }
        if alive {
            let socket = self.host.layout.socket(&self.vm);
            return vmm::let_run(&socket).map_err(|e| {
                let why = with_cause(&e);
                Trouble::certain(format!("held by its VMM, which says: {why}"))
            });
        }
        self.resume_without_vmm()
    }

    /// Its VMM is gone: what the segment says decides.
    fn resume_without_vmm(&self) -> Result<(), Trouble> {
        if let Some(files) = &self.files {
            return luo::continue_here(&self.host, &self.vm, files)
                .map(drop)
                .map_err(|e| Trouble::certain(with_cause(&e)));
        }
        let lost = || Trouble::certain("its VMM ended, and it has no committed state");
        let view = self
            .host
            .store
            .view()
            .map_err(|e| Trouble::certain(format!("in the store, which says: {e}")))?
            .ok_or_else(lost)?;
        let segment = view.segment_of(&self.vm).ok_or_else(lost)?;
        if !matches!(segment.exec, ExecView::Frozen { .. }) {
            return Err(lost());
        }
        match ops::continue_frozen(&self.host, &self.vm, Some(&view)) {
            Ok(_) => Ok(()),
            Err(error) => {
                let why = with_cause(&error);
                Err(Trouble::certain(format!(
                    "frozen in segment {}: {why}",
                    segment.id
                )))
            }
        }
    }

    /// Boots a VM that was told to power off. One that still runs does so at
    /// any moment, because its guest cannot be told to stay: it is waited for
    /// as long as it had to shut down.
    pub(crate) fn boot(&self) -> Result<(), Trouble> {
        if !ops::ended_within(&self.host, &self.vm, self.stop.timeout) {
            return Err(Trouble::certain(format!(
                "told to power off, and its guest still runs: when it is down, `hebe start {}` boots it, as the next boot of the host does",
                self.vm
            )));
        }
        let booted = crate::definitions::load(&self.host.layout, &self.vm)
            .and_then(|(_, config)| ops::boot(&self.host, &config));
        match booted {
            Ok(_) => Ok(()),
            Err(error) => {
                let why = with_cause(&error);
                Err(Trouble::certain(format!("shut down: {why}")))
            }
        }
    }
}
