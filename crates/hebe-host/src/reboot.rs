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

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use hebe_api::VmmState;
use hebe_flow::life::Life;
use hebe_flow::reboot::{Effect, Fate, Input, Outcome, Phase, Reboot, VmPhase};
use hebe_flow::stopping::Going;
use hebe_sys::proc;
use hebe_types::{RebootMethod, Stamp, VmId, VmName};

use crate::answering;
use crate::host::{Host, HostError};
use crate::job::{Job, Note, Trouble};
use crate::listing::{self, Survey, with_cause};
use crate::lock::VmLock;
use crate::luo::carry::Carry;
use crate::notes;
use crate::ops::{self, StopOptions};
use crate::pending::Pending;
use crate::preflight::{RebootOptions, Verdict, VmVerdict, preflight};
use crate::report::{ReportPlace, keep_report};
use crate::stopping::Order;
use crate::system::Leave;
use crate::timeline::{EventKind, KernelInfo, Side, Timeline, rate};
use crate::vmm;

/// How long a VMM may take to answer when everybody else is down.
const LAST_LOOK_WAIT: Duration = Duration::from_secs(2);

/// How often in a row, two seconds apart, the service manager must say that the
/// host stays up, until that is believed.
const STAYS_MAX: u32 = 5;

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
    let asked = host.system.stamp();
    if !options.direct && by_manager(host, options) {
        return ordered(host, options, asked, say);
    }
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
    let mut driver = Driver::new(host, options.clone(), verdict, survey, Some(asked), say);
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

/// Whether the service manager is to carry the reboot out: host services then
/// get their ordered stop, and its suspend event does the rest.
fn by_manager(host: &Host, options: &RebootOptions) -> bool {
    if host.system.armed().is_err() {
        return false;
    }
    // What Linux carries over is held by sessions that end with their holder.
    let carried = || {
        let survey = listing::survey(host);
        let mut rows = survey.rows.values();
        rows.any(|row| row.store == Some(crate::luo::STORE) && row.life.has_vmm())
    };
    options.method != RebootMethod::Warm || crate::luo::carried_by_manager(host) || !carried()
}

/// Checks, loads the next kernel and writes the order down, for the service
/// manager to carry out whenever it is asked to leave. VMs run on.
///
/// # Errors
/// Refused; nothing has changed.
pub fn stage(
    host: &Host,
    options: &RebootOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Leave, RebootEnd> {
    stage_at(host, options, host.system.stamp(), say)
}

fn stage_at(
    host: &Host,
    options: &RebootOptions,
    asked: Stamp,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Leave, RebootEnd> {
    let refused = |e: &dyn std::error::Error| RebootEnd::Refused(with_cause(e));
    let _only_one = host.lock_all().map_err(|e| refused(&e))?;
    let (verdict, _) = preflight(host, options, false);
    if !verdict.passes() {
        return Err(RebootEnd::Refused(verdict.why_not()));
    }
    let order = Order::new(host, options, &verdict, asked);
    if let Some(next) = &order.next {
        say(&format!("loading {}", next.kernel.display()));
        let initrd = next.initrd.as_deref();
        let loaded = host.system.load_kernel(&next.kernel, initrd, &next.cmdline);
        loaded.map_err(|e| refused(&e))?;
    }
    if let Err(error) = order.write(host) {
        let _ = host.system.unload_kernel();
        return Err(refused(&error));
    }
    Ok(order.leave())
}

/// Has the service manager reboot the host. Host services go down first; then
/// [`crate::stopping`] keeps the VMs.
fn ordered(
    host: &Host,
    options: &RebootOptions,
    asked: Stamp,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Infallible, RebootEnd> {
    let leave = stage_at(host, options, asked, say)?;
    say("asking the service manager: host services stop first, then all VMs are suspended");
    let why = match host.system.ask(leave) {
        Ok(()) => wait_to_be_ended(host),
        Err(why) => why,
    };
    Order::withdraw(host);
    let undone = host.system.unload_kernel().map_err(|e| with_cause(&e));
    Err(RebootEnd::Aborted {
        why,
        stranded: Vec::new(),
        notes: undone.err().into_iter().collect(),
    })
}

/// This process ends with the services; if it does not, the host stays up.
fn wait_to_be_ended(host: &Host) -> String {
    let mut stays = 0;
    while stays < STAYS_MAX {
        thread::sleep(Duration::from_secs(2));
        match host.system.going() {
            Ok(Going::Stays) => stays += 1,
            _ => stays = 0,
        }
    }
    "the service manager gave the reboot up".into()
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

/// What carries effects out, of a reboot and of [`crate::stopping`].
pub(crate) struct Driver<'a> {
    pub(crate) host: &'a Host,
    options: RebootOptions,
    pub(crate) verdict: Verdict,
    pub(crate) survey: Survey,
    pub(crate) timeline: Timeline,
    began: Instants,
    pub(crate) say: &'a (dyn Fn(&str) + Sync),
    /// What Linux carries; as long as it is here, and no longer.
    pub(crate) carry: Option<Carry>,
    /// VMs that were told to power off and are not up again, when all that can
    /// be brought back is.
    not_booted: BTreeSet<VmName>,
    /// VMs whose guests powered themselves off meanwhile, and which stay so.
    ended: BTreeSet<VmName>,
    /// VMs that failed or crashed, each with why.
    over: BTreeMap<VmName, String>,
}

impl<'a> Driver<'a> {
    /// Nothing done yet, of what was asked for at `asked`.
    pub(crate) fn new(
        host: &'a Host,
        options: RebootOptions,
        verdict: Verdict,
        survey: Survey,
        asked: Option<Stamp>,
        say: &'a (dyn Fn(&str) + Sync),
    ) -> Self {
        let began = Instants::now(host);
        let before = KernelInfo {
            release: host.system.release(),
            boot_id: VmId(host.system.boot_id()).to_string(),
        };
        let mut timeline = Timeline::new(verdict.method, before);
        let asked = asked.unwrap_or(began.stamp);
        timeline.note(asked, Side::Before, None, EventKind::Asked);
        Self {
            host,
            options,
            verdict,
            survey,
            timeline,
            began,
            say,
            carry: None,
            not_booted: BTreeSet::new(),
            ended: BTreeSet::new(),
            over: BTreeMap::new(),
        }
    }

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
                if effect == Effect::Unprepare {
                    self.not_booted = not_booted(&machine, &self.verdict);
                }
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
            self.take_note(note);
        }
        Some(answer.input)
    }

    pub(crate) fn take_note(&mut self, note: Note) {
        match note {
            Note::Freeze(vm, report) => self.timeline.note_freeze(&vm, &report),
            Note::Save(vm, report) => self.timeline.note_save(&vm, &report),
            Note::Ended(vm) => {
                self.ended.insert(vm);
            }
            Note::Over(vm, why) => {
                if !self.over.contains_key(&vm) {
                    let note = format!("VM '{vm}' failed, and is ended: {why}");
                    (self.say)(&note);
                    self.timeline.notes.push(note);
                }
                self.give_up(&vm);
                self.over.insert(vm, why);
            }
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

    /// Runs one effect. Those of VMs answer later, through `sender`.
    fn execute(&mut self, effect: Effect, sender: &Sender<Answer>) -> Option<Input> {
        let done = match effect {
            Effect::Suspend(vm, _) | Effect::Thaw(vm, _) | Effect::Boot(vm)
                if self.ended.contains(&vm) =>
            {
                return Some(Input::VmDone(vm));
            }
            Effect::Suspend(vm, _) if self.over.contains_key(&vm) => {
                let why = self.over[&vm].clone();
                return Some(Input::VmOver { vm, why });
            }
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
            Effect::Jump => self
                .last_look()
                .and_then(|()| Err(with_cause(&self.host.system.leave(self.verdict.leave())))),
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
        let job = self.job(&vm);
        let died = {
            let vm = vm.clone();
            // How far it came nobody knows.
            let certain = false;
            move |why: &str| Answer {
                input: Input::VmFailed {
                    vm,
                    why: why.to_owned(),
                    certain,
                },
                notes: Vec::new(),
            }
        };
        answering::in_thread(sender, died, move || {
            let (result, note) = work(&job);
            let input = match result {
                Ok(()) => Input::VmDone(vm),
                Err(Trouble { why, over, .. }) if over => Input::VmOver { vm, why },
                Err(Trouble { why, certain, .. }) => Input::VmFailed { vm, why, certain },
            };
            Answer {
                input,
                notes: note.into_iter().collect(),
            }
        });
    }

    /// What is done to one VM.
    pub(crate) fn job(&self, vm: &VmName) -> Job {
        Job {
            host: self.host.clone(),
            row: self.survey.rows.get(vm).cloned(),
            files: self.carry.as_ref().and_then(|carry| carry.files(vm)),
            stop: StopOptions {
                timeout: Duration::from_secs(self.options.timeout_s),
                force: self.options.force,
            },
            keeps: true,
            vm: vm.clone(),
        }
    }

    /// Nothing of a VM that is kept in another way, or not at all, goes along.
    pub(crate) fn give_up(&mut self, vm: &VmName) {
        let carry = self.carry.as_mut();
        let given_up = carry.map(|carry| carry.give_up(self.host, vm));
        if let Some(Err(why)) = given_up {
            let note =
                format!("the next kernel gets memory of '{vm}' that is not to be used: {why}");
            (self.say)(&note);
            self.timeline.notes.push(note);
        }
    }

    pub(crate) fn note(&mut self, kind: EventKind) {
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
        self.reap()?;
        let mut pending = Pending::read(&self.host.layout).map_err(say)?;
        for vm in &self.verdict.vms {
            let definition = self.survey.definitions.get(&vm.vm);
            if let (Some(Fate::ShutDown), Some(Ok(config))) = (vm.fate, definition) {
                pending.put(config.clone());
            }
        }
        pending.write(self.host).map_err(say)?;
        if let Some((_, error)) = self.note_frozen().into_iter().next() {
            return Err(say(error));
        }
        if self.verdict.leave() == Leave::Kexec {
            self.carry = Carry::prepare(self.host, &self.survey, &self.verdict, self.say)?;
        }
        self.hold_store()?;
        (self.say)("flushing disks");
        self.host.system.sync();
        // What guests began to use meanwhile: none of that is left for the pause.
        if let Some(carry) = &mut self.carry {
            carry.complete()?;
            carry.note(&mut self.timeline);
        }
        self.note(EventKind::Prepared);
        (self.say)("suspending VMs");
        Ok(())
    }

    /// VMs whose guests ended by themselves since the survey, or crashed.
    pub(crate) fn reap(&mut self) -> Result<(), String> {
        let ended = ops::reap(self.host).map_err(|e| with_cause(&e))?;
        self.ended.extend(ended);
        let kept = |v: &&VmVerdict| matches!(v.fate, Some(Fate::Keep | Fate::Save));
        let kept = self.verdict.vms.iter().filter(kept);
        let crashed: Vec<Note> = kept.filter_map(|v| self.job(&v.vm).crashed()).collect();
        for note in crashed {
            self.take_note(note);
        }
        // Nothing is done to them any more, and nothing noted of them.
        let gone = |vm: &VmName| self.ended.contains(vm) || self.over.contains_key(vm);
        self.verdict.vms.retain(|v| !gone(&v.vm));
        Ok(())
    }

    pub(crate) fn hold_store(&self) -> Result<(), String> {
        if self.survey.store.is_some() {
            self.host.store.hold().map_err(|e| with_cause(&e))?;
        }
        Ok(())
    }

    /// For a next kernel that does not have the store: what is written of each
    /// VM, and what stays of it. Each for itself, for one of which something
    /// cannot be written must not leave the others unnoted. Gives those.
    pub(crate) fn note_frozen(&self) -> Vec<(VmName, HostError)> {
        let mut failed = Vec::new();
        for vm in &self.verdict.vms {
            let stale = match vm.fate {
                Some(Fate::Keep) => ops::withdraw_stale(self.host, &vm.vm),
                _ => Ok(()),
            };
            let errors = [stale.err(), self.note_one(vm).err()];
            failed.extend(errors.into_iter().flatten().map(|e| (vm.vm.clone(), e)));
        }
        failed
    }

    fn note_one(&self, vm: &VmVerdict) -> Result<(), HostError> {
        let Some(store) = &self.survey.store else {
            return Ok(());
        };
        let row = self.survey.rows.get(&vm.vm);
        let keep = vm.fate == Some(Fate::Keep);
        let life = row.map(|r| r.life);
        let own = row.and_then(|r| r.segment);
        let segment = store.segments.iter().find(|s| Some(s.id.0) == own);
        let Some(segment) = segment else {
            return Ok(());
        };
        // What is frozen without a note was frozen under another state
        // directory, which alone knows whether it may go on.
        let known = notes::unnoted(&self.host.layout, segment)?.is_none();
        if keep || life == Some(Life::Held) || (life == Some(Life::Frozen) && known) {
            notes::note(self.host, store, segment)?;
        }
        Ok(())
    }

    fn unprepare(&mut self) -> Result<(), String> {
        // Without a store of PID 1's nobody else holds anything of it.
        let let_go = self.carry.take().map_or(Ok(()), |c| c.forget(self.host));
        self.host.store.release();
        if let Ok(Some(now)) = self.host.store.view() {
            notes::settle(&self.host.layout, &now);
        }
        let say = |e: HostError| with_cause(&e);
        let mut pending = Pending::read(&self.host.layout).map_err(say)?;
        let ours = |name: &VmName| {
            let mut vms = self.verdict.vms.iter();
            let shut = vms.any(|v| v.vm == *name && v.fate == Some(Fate::ShutDown));
            shut && !self.not_booted.contains(name)
        };
        pending.vms.retain(|c| !ours(&c.name));
        pending.write(self.host).map_err(say)?;
        let_go
    }

    /// Whatever runs now would be lost. VMs that were frozen or saved by this
    /// reboot said so themselves and are not asked again: every VM is down.
    fn last_look(&self) -> Result<(), String> {
        let unknown =
            |what: &str, error: &io::Error| format!("nobody can tell whether {what}: {error}");
        let layout = &self.host.layout;
        for name in listing::run_dirs(self.host).map_err(|e| unknown("VMs run", &e))? {
            let held = VmLock::look(&layout.vm_dir(&name));
            if !held.map_err(|e| unknown(&format!("VM '{name}' runs"), &e))? {
                continue;
            }
            let mut vms = self.verdict.vms.iter();
            let fate = vms.find(|v| v.vm == name).and_then(|v| v.fate);
            if matches!(fate, Some(Fate::Keep | Fate::Save)) {
                continue;
            }
            let status = vmm::status(&layout.socket(&name), LAST_LOOK_WAIT);
            match status.map(|s| s.state) {
                Ok(VmmState::Frozen | VmmState::Saved) => {}
                _ => return Err(format!("VM '{name}' came up while the others were stopped")),
            }
        }
        Ok(())
    }

    /// The last work before the jump; every VM is down here, so it is short.
    pub(crate) fn record(&mut self) -> Result<(), String> {
        self.note(EventKind::AllSuspended);
        self.host.system.sync();
        self.note(EventKind::Flushed);
        if let Some(carry) = &mut self.carry {
            carry.complete()?;
            carry.note(&mut self.timeline);
        }
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
        let store = self.survey.store.as_ref().is_some_and(|s| !s.kept_only);
        if let Some(carry) = self.carry.as_mut().filter(|_| !store) {
            return carry.write_report(&self.timeline.to_bytes());
        }
        let place = match (store, self.verdict.leave()) {
            (true, Leave::Kexec) => ReportPlace::Store,
            (true, _) => ReportPlace::Both,
            (false, _) => ReportPlace::Disk,
        };
        keep_report(self.host, &self.timeline, place)
    }
}

/// VMs that were to be booted again, and were not.
fn not_booted(machine: &Reboot, verdict: &Verdict) -> BTreeSet<VmName> {
    let shut = verdict
        .vms
        .iter()
        .filter(|v| v.fate == Some(Fate::ShutDown))
        .filter(|v| matches!(machine.vm(&v.vm), Some(VmPhase::Stranded(_))));
    shut.map(|v| v.vm.clone()).collect()
}

/// What a fate does, as words for messages.
pub(crate) fn fate_words(fate: Fate) -> &'static str {
    match fate {
        Fate::Keep => "freezing in memory",
        Fate::Save => "saving to a file",
        Fate::ShutDown => "shutting the guest down",
        Fate::End => "ending what failed",
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
