//! Carries out a reboot: runs the effects of [`hebe_flow::reboot`] and feeds
//! their results back.
//!
//! The machine of states, its order and its one undo path are drawn in
//! `hebe-flow`; here is what each effect does. One thread runs the machine and
//! the effects that stand alone; each VM's effect has a thread of its own, so
//! that all VMs freeze, save or shut down at once.
//!
//! When files are flushed: `sync` runs once before any VM is stopped, where it
//! may take long and costs no downtime, and once after the last one is
//! stopped, when only the guests' last writes are left. The second cannot be
//! left out or done earlier: a guest counts a completed write as done and will
//! not repeat it, but in the host it may still lie in the page cache, which
//! ends with this kernel.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use hebe_flow::life::Life;
use hebe_flow::reboot::{Effect, Fate, Input, Outcome, Phase, Reboot};
use hebe_sys::proc;
use hebe_types::{RebootMethod, Stamp, VmId, VmName};

use crate::files;
use crate::host::{Host, HostError};
use crate::launch::{Launch, Memory, Origin};
use crate::listing::{self, Survey, VmRow, with_cause};
use crate::lock::VmLock;
use crate::ops::{self, StopOptions};
use crate::preflight::{RebootOptions, Verdict, preflight};
use crate::saved::{Pending, SavedPaths};
use crate::stores::ExecView;
use crate::system::Leave;
use crate::timeline::{EventKind, KernelInfo, Side, Timeline, rate};
use crate::vmm;

/// How a reboot ended that did not leave the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RebootEnd {
    /// Checks failed; nothing was touched.
    Refused(String),
    /// Something failed and everything was undone.
    Aborted {
        /// The first failure.
        why: String,
        /// VMs that do not run, and where each is.
        stranded: Vec<(VmName, String)>,
        /// Undo steps that failed, other than VMs.
        notes: Vec<String>,
    },
}

/// Reboots. Returns only when that did not happen. `say` is told each step in
/// words, never between the first suspended VM and the jump's result.
pub fn reboot(
    host: &Host,
    options: &RebootOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Infallible, RebootEnd> {
    let began = Instants::now(host);
    let _only_one = host
        .lock_all()
        .map_err(|e| RebootEnd::Refused(with_cause(&e)))?;
    let (verdict, survey) = preflight(host, options, false);
    let fates: Vec<(VmName, Fate)> = verdict
        .vms
        .iter()
        .filter_map(|v| Some((v.vm.clone(), v.fate?)))
        .collect();
    let machine = Reboot::new(fates, verdict.next.is_some());
    let before = KernelInfo {
        release: host.system.release(),
        boot_id: VmId(host.system.boot_id()).to_string(),
    };
    let mut timeline = Timeline::new(options.method, before);
    timeline.note(began.stamp, Side::Before, None, EventKind::Asked);
    let mut driver = Driver {
        host,
        options,
        verdict,
        survey,
        timeline,
        began,
        say,
    };
    match driver.run(machine) {
        Outcome::Refused(why) => Err(RebootEnd::Refused(why)),
        Outcome::Aborted {
            why,
            stranded,
            notes,
        } => Err(RebootEnd::Aborted {
            why,
            stranded,
            notes,
        }),
    }
}

/// One instant on the clocks from which the TSC's rate is measured.
#[derive(Clone, Copy)]
struct Instants {
    stamp: Stamp,
    monotonic_ns: u64,
}

impl Instants {
    fn now(host: &Host) -> Self {
        Self {
            stamp: host.system.stamp(),
            monotonic_ns: host.system.monotonic_ns(),
        }
    }
}

/// What a VM's effect gives back: the input, and instants to note.
struct Answer {
    input: Input,
    notes: Vec<Note>,
}

enum Note {
    Freeze(VmName, hebe_api::FreezeReport),
    Save(VmName, hebe_api::SaveReport),
    Off {
        vm: VmName,
        asked: Stamp,
        off: Stamp,
    },
}

struct Driver<'a> {
    host: &'a Host,
    options: &'a RebootOptions,
    verdict: Verdict,
    survey: Survey,
    timeline: Timeline,
    began: Instants,
    say: &'a (dyn Fn(&str) + Sync),
}

impl Driver<'_> {
    fn run(&mut self, mut machine: Reboot) -> Outcome {
        let (sender, receiver) = channel();
        let mut effects: VecDeque<Effect> = machine.begin().into();
        let mut abort_told = false;
        loop {
            if let Some(outcome) = machine.outcome() {
                return outcome;
            }
            let stop = !abort_told && proc::asked_to_stop();
            let input = if stop && machine.phase() < Phase::Jump {
                abort_told = true;
                Input::Abort("it was stopped by a signal".into())
            } else if let Some(effect) = effects.pop_front() {
                match self.execute(effect, &sender) {
                    Some(input) => input,
                    None => continue,
                }
            } else {
                match self.receive(&receiver) {
                    Some(input) => input,
                    None => continue,
                }
            };
            match machine.clone().step(input) {
                Ok((next, more)) => {
                    machine = next;
                    effects.extend(more);
                }
                // A second answer of one VM, or an abort at the last moment:
                // neither changes anything.
                Err(out_of_order) => (self.say)(&out_of_order.to_string()),
            }
        }
    }

    fn receive(&mut self, receiver: &Receiver<Answer>) -> Option<Input> {
        let answer = match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        };
        for note in answer.notes {
            match note {
                Note::Freeze(vm, report) => self.timeline.note_freeze(&vm, &report),
                Note::Save(vm, report) => self.timeline.note_save(&vm, &report),
                Note::Off { vm, asked, off } => {
                    let instants = [
                        (asked, EventKind::SuspendAsked),
                        (off, EventKind::PoweredOff),
                    ];
                    for (at, kind) in instants {
                        self.timeline.note(at, Side::Before, Some(&vm), kind);
                    }
                }
            }
        }
        Some(answer.input)
    }

    /// Runs one effect. Those of VMs answer later, through `sender`.
    fn execute(&mut self, effect: Effect, sender: &Sender<Answer>) -> Option<Input> {
        let done = match effect {
            Effect::Suspend(vm, fate) => {
                self.in_thread(vm, sender, move |job| job.suspend(fate));
                return None;
            }
            Effect::Thaw(vm, fate) => {
                self.in_thread(vm, sender, move |job| (job.bring_back(fate), None));
                return None;
            }
            Effect::Boot(vm) => {
                self.in_thread(vm, sender, |job| (job.boot(), None));
                return None;
            }
            Effect::Preflight => self.check(),
            Effect::LoadImage => self.load_image(),
            Effect::StopServices => self.stop_services(),
            Effect::Prepare => self.prepare(),
            Effect::Record => self.record(),
            Effect::Jump => Err(with_cause(&self.host.system.leave(self.verdict.leave()))),
            Effect::StartServices => self.start_services(),
            Effect::Unprepare => self.unprepare(),
            Effect::Unload => self.host.system.unload_kernel().map_err(|e| with_cause(&e)),
        };
        Some(match done {
            Ok(()) => Input::Done,
            Err(why) => {
                (self.say)(&format!("failed: {why}"));
                Input::Failed(why)
            }
        })
    }

    fn in_thread(
        &self,
        vm: VmName,
        sender: &Sender<Answer>,
        work: impl FnOnce(&Job) -> (Result<(), Trouble>, Option<Note>) + Send + 'static,
    ) {
        let job = Job {
            host: self.host.clone(),
            row: self.survey.rows.get(&vm).cloned(),
            stop: StopOptions {
                timeout: Duration::from_secs(self.options.timeout_s),
                force: self.options.force,
            },
            vm: vm.clone(),
        };
        let sender = sender.clone();
        thread::spawn(move || {
            let (result, note) = work(&job);
            let input = match result {
                Ok(()) => Input::VmDone(vm),
                Err(Trouble { why, certain }) => Input::VmFailed { vm, why, certain },
            };
            // The driver waits for every answer, so it is there to take it.
            let _ = sender.send(Answer {
                input,
                notes: note.into_iter().collect(),
            });
        });
    }

    fn note(&mut self, kind: EventKind) {
        let now = self.host.system.stamp();
        self.timeline.note(now, Side::Before, None, kind);
    }

    fn check(&mut self) -> Result<(), String> {
        if !self.verdict.passes() {
            return Err(self.verdict.why_not());
        }
        self.note(EventKind::Checked);
        Ok(())
    }

    fn load_image(&mut self) -> Result<(), String> {
        let Some(next) = &self.verdict.next else {
            return Ok(());
        };
        (self.say)(&format!("loading {}", next.kernel.display()));
        self.host
            .system
            .load_kernel(&next.kernel, next.initrd.as_deref(), &next.cmdline)
            .map_err(|e| with_cause(&e))?;
        self.note(EventKind::ImageLoaded);
        Ok(())
    }

    fn stop_services(&mut self) -> Result<(), String> {
        // From here on the terminal may go away, because its service stops.
        proc::hold_signals().map_err(|e| format!("cannot hold signals: {e}"))?;
        let services = self.host.config().map_err(|e| e.to_string())?.services;
        for command in &services.stop {
            (self.say)(&format!("stopping services: {command}"));
            self.host
                .system
                .run(command, services.timeout())
                .map_err(|e| e.to_string())?;
        }
        self.note(EventKind::ServicesStopped);
        Ok(())
    }

    fn start_services(&mut self) -> Result<(), String> {
        let services = self.host.config().map_err(|e| e.to_string())?.services;
        let mut failed = Vec::new();
        for command in &services.start {
            (self.say)(&format!("starting services: {command}"));
            if let Err(error) = self.host.system.run(command, services.timeout()) {
                failed.push(error.to_string());
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(failed.join("; "))
        }
    }

    /// Everything that can be written while the VMs still run.
    fn prepare(&mut self) -> Result<(), String> {
        let say = |e: HostError| with_cause(&e);
        ops::reap(self.host).map_err(say)?;
        let mut pending = Pending::read(&self.host.layout).map_err(say)?;
        for vm in &self.verdict.vms {
            let definition = self.survey.definitions.get(&vm.vm);
            if let (Some(Fate::ShutDown), Some(Ok(config))) = (vm.fate, definition) {
                pending.vms.retain(|c| c.name != config.name);
                pending.vms.push(config.clone());
            }
        }
        pending.write(self.host).map_err(say)?;
        if self.survey.store.is_some() {
            self.host.store.hold().map_err(|e| with_cause(&e))?;
        }
        (self.say)("flushing disks");
        self.host.system.sync();
        self.note(EventKind::Prepared);
        (self.say)("suspending VMs");
        Ok(())
    }

    fn unprepare(&mut self) -> Result<(), String> {
        self.host.store.release();
        let say = |e: HostError| with_cause(&e);
        let mut pending = Pending::read(&self.host.layout).map_err(say)?;
        let ours = |name: &VmName| {
            let mut vms = self.verdict.vms.iter();
            vms.any(|v| v.vm == *name && v.fate == Some(Fate::ShutDown))
        };
        pending.vms.retain(|c| !ours(&c.name));
        pending.write(self.host).map_err(say)
    }

    /// The last work before the jump; every VM is down here, so it is short.
    fn record(&mut self) -> Result<(), String> {
        self.note(EventKind::AllSuspended);
        self.host.system.sync();
        self.note(EventKind::Flushed);
        let now = Instants::now(self.host);
        self.timeline.tsc_hz = rate(
            (self.began.stamp.tsc, self.began.monotonic_ns),
            (now.stamp.tsc, now.monotonic_ns),
        );
        self.timeline.note(
            self.host.system.stamp(),
            Side::Before,
            None,
            EventKind::Jump,
        );
        let place = match (self.survey.store.is_some(), self.verdict.leave()) {
            (true, Leave::Kexec) => ReportPlace::Store,
            (true, _) => ReportPlace::Both,
            (false, _) => ReportPlace::Disk,
        };
        keep_report(self.host, &self.timeline, place)
    }
}

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

/// Why a VM's effect failed.
struct Trouble {
    why: String,
    certain: bool,
}

impl Trouble {
    fn certain(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            certain: true,
        }
    }
}

impl From<HostError> for Trouble {
    fn from(error: HostError) -> Self {
        match &error {
            HostError::Vmm { source, .. } => Self {
                certain: vmm::is_refusal(source),
                why: with_cause(source),
            },
            _ => Self {
                certain: false,
                why: with_cause(&error),
            },
        }
    }
}

/// One VM's part, in a thread of its own.
struct Job {
    host: Host,
    vm: VmName,
    row: Option<VmRow>,
    stop: StopOptions,
}

impl Job {
    fn suspend(&self, fate: Fate) -> (Result<(), Trouble>, Option<Note>) {
        let result = match fate {
            Fate::Keep => self.freeze(),
            Fate::Save => self.save(),
            Fate::ShutDown => self.shut_down(),
        };
        match result {
            Ok(note) => (Ok(()), Some(note)),
            Err(trouble) => (Err(trouble), None),
        }
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
                why: with_cause(&error),
            }),
        }
    }

    fn save(&self) -> Result<Note, Trouble> {
        self.unpause()?;
        let memory = self.row()?.memory;
        let report = ops::save_held(&self.host, &self.vm, memory)?;
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

    /// Brings a frozen or saved VM back, wherever it is.
    fn bring_back(&self, fate: Fate) -> Result<(), Trouble> {
        if fate == Fate::Save {
            // Before the VM runs, or its file would be older than its disk.
            let paths = SavedPaths::new(&self.host.layout, &self.vm);
            paths
                .withdraw()
                .map_err(|e| Trouble::certain(format!("saved, with its VMM waiting: {e}")))?;
        }
        let dir = self.host.layout.vm_dir(&self.vm);
        if VmLock::is_held(&dir) {
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
        let lost = || Trouble::certain("its VMM ended, and it has no committed state");
        let view = self
            .host
            .store
            .view()
            .map_err(|e| Trouble::certain(format!("in the store, which says: {e}")))?
            .ok_or_else(lost)?;
        let segment = view.segment_of(&self.vm).ok_or_else(lost)?;
        let (ExecView::Frozen { .. }, Some(vm)) = (&segment.exec, segment.vm) else {
            return Err(lost());
        };
        let order = Launch {
            name: self.vm.clone(),
            vm,
            size: segment.memory,
            memory: Memory::Segment {
                id: segment.id,
                spec: segment.spec.clone(),
            },
            origin: Origin::Frozen,
        };
        match ops::continue_frozen(&self.host, &order) {
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

    fn boot(&self) -> Result<(), Trouble> {
        let dir = self.host.layout.vm_dir(&self.vm);
        if VmLock::is_held(&dir) {
            // It never went down.
            return Ok(());
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
            Ok(Some(_)) => ReportPlace::Store,
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

/// The methods, as words for messages.
pub fn method_name(method: RebootMethod) -> &'static str {
    match method {
        RebootMethod::Warm => "warm",
        RebootMethod::Saved => "saved",
        RebootMethod::Cold => "cold",
    }
}
