//! The suspend event of a host whose service manager takes it down: runs the
//! effects of [`hebe_flow::stopping`].
//!
//! It is the stop of `hebe-freeze.service`, which systemd orders behind that
//! of every ordinary service and before that of any mount. Where the host
//! stays up nothing happens: the unit was stopped by hand.
//!
//! | killed after | VMs | then |
//! |---|---|---|
//! | nothing | run | the event is carried out again (`ExecStopPost=`) |
//! | the kernel loaded, notes written | run | again; both are written anew |
//! | some VMs frozen, others not | each either | again: what is frozen stays so, the others follow |
//! | a file written in part | its VM stands still in its VMM | again: it runs, and is saved or frozen |
//! | all kept, no report | kept | again: nothing but the report, which tells of less |
//! | the report written, VMMs alive | kept | systemd ends them, which changes nothing about their VMs |

mod order;

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use hebe_flow::life::Life;
use hebe_flow::reboot::Fate;
use hebe_flow::resume::SavedFact;
use hebe_flow::stopping::{Effect, Going, Ground, Input, Memory, Phase, Stopping, VmEnd, chain};
use hebe_sys::proc;
use hebe_types::{RebootMethod, VmName};
use serde::Serialize;

use crate::answering;
use crate::host::{ForeignKernel, Host, HostConfig, HostError, Shutdown};
use crate::job::Note;
use crate::listing::{Survey, VmRow, with_cause};
use crate::lock::VmLock;
use crate::luo;
use crate::pending;
use crate::preflight::{Level, RebootOptions, Verdict, preflight};
use crate::reboot::{Driver, fate_words};
use crate::saved::SavedPaths;
use crate::system::Leave;
use crate::timeline::EventKind;
use crate::vmm;

pub use order::Order;

/// How long another order that concerns all VMs is waited for.
const TURN_WAIT: Duration = Duration::from_secs(300);
/// Checks without which nothing in memory can be trusted to survive a kexec.
const IMAGE_CHECKS: [&str; 5] = ["root", "kernel", "initrd", "kexec", "reservation"];

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stopped {
    /// Where the host goes.
    pub going: Going,
    /// How each VM is kept.
    pub vms: Vec<Kept>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// How one VM is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Which VM.
    pub vm: VmName,
    /// How; `None` where nothing held and it ends with the host.
    pub fate: Option<Fate>,
    /// The same as a sentence, with what was tried in vain.
    pub sentence: String,
}

impl Stopped {
    /// Whether some VM ends with the host.
    pub fn loses(&self) -> bool {
        self.vms.iter().any(|vm| vm.fate.is_none())
    }
}

/// Keeps every VM over what the host goes to. `say` is told each step.
///
/// # Errors
/// Another order that concerns all VMs does not end.
pub fn stopping(host: &Host, say: &(dyn Fn(&str) + Sync)) -> Result<Stopped, HostError> {
    let mut notes = Vec::new();
    let going = host.system.going().unwrap_or_else(|why| {
        notes.push(format!(
            "it could not be found out where the host goes ({why}): VMs are saved, as for a reset"
        ));
        Going::Reset
    });
    if going == Going::Stays {
        say("the host stays up, and so do its VMs");
        return Ok(Stopped {
            going,
            vms: Vec::new(),
            notes,
        });
    }
    // There is no way back: an order to stop is none to leave VMs behind.
    let _ = proc::hold_signals();
    say(going.words());
    let _only_one = turn(host)?;
    let config = host.config().unwrap_or_else(|error| {
        notes.push(format!("host.toml is not used: {error}"));
        HostConfig::default()
    });
    let order = order_for(host, going, &mut notes);
    let (ground, verdict, survey) =
        ground(host, going, order.as_ref(), &config.shutdown, &mut notes);
    for note in &notes {
        say(note);
    }
    let event = Event::new(
        host,
        going,
        order.as_ref(),
        &config,
        ground,
        verdict,
        survey,
        say,
    );
    let stopped = event.run(notes);
    Order::withdraw(host);
    Ok(stopped)
}

/// The lock of all VMs. A reboot that is under way by itself needs no help.
fn turn(host: &Host) -> Result<VmLock, HostError> {
    let began = Instant::now();
    loop {
        match host.lock_all() {
            Err(HostError::HostBusy | HostError::OrdersBusy) if began.elapsed() < TURN_WAIT => {
                thread::sleep(Duration::from_millis(100));
            }
            other => return other,
        }
    }
}

/// The order that was given for where the host goes now.
fn order_for(host: &Host, going: Going, notes: &mut Vec<String>) -> Option<Order> {
    let order = match Order::read(host) {
        Ok(order) => order?,
        Err(error) => {
            notes.push(format!("no order is followed: {}", with_cause(&error)));
            return None;
        }
    };
    let fits = match order.leave() {
        Leave::Kexec => going == Going::Kexec,
        Leave::Reset => going == Going::Reset,
        Leave::PowerOff => going == Going::Off,
    };
    if !fits {
        let words = going.words();
        notes.push(format!("a reboot was ordered otherwise, and {words}"));
    }
    fits.then_some(order)
}

/// What VMs can count on, with the verdict and the survey it was found in.
fn ground(
    host: &Host,
    going: Going,
    order: Option<&Order>,
    config: &Shutdown,
    notes: &mut Vec<String>,
) -> (Ground, Verdict, Survey) {
    let options = match (order, going) {
        (Some(order), _) => order.options(),
        (None, Going::Kexec | Going::SoftReboot) => RebootOptions::default(),
        (None, _) => RebootOptions {
            method: RebootMethod::Saved,
            hard: true,
            ..RebootOptions::default()
        },
    };
    let (mut verdict, survey) = preflight(host, &options, false);
    let store = sound(&verdict, &["store"], notes) && survey.store.is_some();
    let survives = match going {
        Going::Kexec => image(host, &mut verdict, order.is_some(), config, notes),
        Going::SoftReboot => true,
        Going::Reset | Going::Off | Going::Stays => false,
    };
    if going != Going::Kexec {
        verdict.next = None;
    }
    let ground = Ground {
        store: store && survives,
        // A soft reboot ends every VMM, and no kernel takes anything over.
        carried: survives && going == Going::Kexec && carries(host, &verdict, &survey, notes),
        wish: config.vms,
        ordered: order.map(|o| o.method),
    };
    (ground, verdict, survey)
}

/// Whether PID 1 can hold what the next kernel is to take over, and that can.
fn carries(host: &Host, verdict: &Verdict, survey: &Survey, notes: &mut Vec<String>) -> bool {
    let ids = verdict.checks.iter().map(|check| check.id.as_str());
    // Whether PID 1 can is asked below: its unit is being stopped already.
    let ids = ids.filter(|id| id.starts_with("live-update") && *id != luo::check::CARRIER);
    let ids: Vec<&str> = ids.collect();
    if !sound(verdict, &ids, notes) {
        return false;
    }
    let has_files = |row: &VmRow| memory_of(row) == Memory::Files && row.life.has_vmm();
    let carrier = luo::carrier(host);
    if let (Err(why), true) = (&carrier, survey.rows.values().any(has_files)) {
        notes.push(format!(
            "PID 1 does not hold the memory of VMs in store luo: {why}"
        ));
    }
    carrier.is_ok()
}

/// Whether all of these checks hold; what does not is noted.
fn sound(verdict: &Verdict, ids: &[&str], notes: &mut Vec<String>) -> bool {
    let failed = verdict.checks.iter().filter(|c| c.level == Level::Fail);
    let failed: Vec<_> = failed.filter(|c| ids.contains(&c.id.as_str())).collect();
    notes.extend(failed.iter().map(|check| check.sentence.clone()));
    failed.is_empty()
}

/// Whether the next kernel is one that keeps the reserved memory. One that
/// Hebe knows is loaded (again): then it is this one that comes, whatever
/// somebody else loaded meanwhile.
fn image(
    host: &Host,
    verdict: &mut Verdict,
    ordered: bool,
    config: &Shutdown,
    notes: &mut Vec<String>,
) -> bool {
    if !ordered && host.system.kernel_loaded() == Some(true) {
        verdict.next = None;
        return match config.foreign_kernel {
            ForeignKernel::Trust => {
                notes.push("the next kernel was not loaded by hebe, and host.toml says to trust it with what is in memory".into());
                true
            }
            ForeignKernel::Save => {
                notes.push("the next kernel was not loaded by hebe, so that nobody knows whether it keeps the reserved memory: VMs are saved (load it with `hebe reboot --load`)".into());
                false
            }
        };
    }
    let sound = sound(verdict, &IMAGE_CHECKS, notes);
    let loaded = sound && load(host, verdict, notes);
    if !loaded {
        verdict.next = None;
    }
    loaded
}

fn load(host: &Host, verdict: &Verdict, notes: &mut Vec<String>) -> bool {
    let Some(next) = &verdict.next else {
        return false;
    };
    let initrd = next.initrd.as_deref();
    let loaded = host.system.load_kernel(&next.kernel, initrd, &next.cmdline);
    match loaded {
        // systemd would fall back to a reset, which memory may not survive.
        Ok(()) => host.system.kernel_loaded() == Some(true),
        Err(error) => {
            let why = with_cause(&error);
            notes.push(format!("the next kernel cannot be loaded: {why}"));
            false
        }
    }
}

/// What a VM's effect gives back.
struct Answer {
    input: Input,
    note: Option<Note>,
}

/// The event under way.
struct Event<'a> {
    driver: Driver<'a>,
    machine: Stopping,
    going: Going,
    /// See [`Ground::carried`].
    carried: bool,
    /// VMs that must not be frozen, each with the reason.
    not_frozen: BTreeMap<VmName, String>,
}

impl<'a> Event<'a> {
    #[allow(clippy::too_many_arguments)]
    fn new(
        host: &'a Host,
        going: Going,
        order: Option<&Order>,
        config: &HostConfig,
        ground: Ground,
        mut verdict: Verdict,
        survey: Survey,
        say: &'a (dyn Fn(&str) + Sync),
    ) -> Self {
        let chain_of = |row: &VmRow| chain(life_of(host, row), memory_of(row), &ground);
        let chains = survey
            .rows
            .iter()
            .map(|(vm, row)| (vm.clone(), chain_of(row)));
        let chains: Vec<(VmName, Vec<Fate>)> = chains.collect();
        for vm in &mut verdict.vms {
            let chain = chains.iter().find(|(name, _)| *name == vm.vm);
            vm.fate = chain.and_then(|(_, chain)| chain.first().copied());
        }
        if ground.ordered.is_none() {
            verdict.method = if ground.store || ground.carried {
                RebootMethod::Warm
            } else {
                RebootMethod::Saved
            };
        }
        let options = RebootOptions {
            timeout_s: order.map_or(config.shutdown.timeout_s, |o| o.timeout_s),
            force: order.is_some_and(|o| o.force),
            ..RebootOptions::default()
        };
        let asked = order.map(|o| o.asked);
        let driver = Driver::new(host, options, verdict, survey, asked, say);
        Self {
            driver,
            machine: Stopping::new(chains),
            going,
            carried: ground.carried,
            not_frozen: BTreeMap::new(),
        }
    }

    fn run(mut self, mut notes: Vec<String>) -> Stopped {
        let (sender, receiver) = channel::<Answer>();
        self.driver.note(EventKind::ServicesStopped);
        self.driver.timeline.notes.append(&mut notes.clone());
        let mut effects = self.machine.begin();
        while self.machine.phase() != Phase::Ended {
            let input = match effects.pop() {
                Some(Effect::Suspend(vm, fate)) => {
                    self.suspend(vm, fate, &sender);
                    continue;
                }
                Some(Effect::Prepare) => done(self.prepare()),
                Some(Effect::Record) => done(self.record()),
                None => {
                    // Every VM's effect answers, also one that panics; the sender
                    // is here, too.
                    let Ok(answer) = receiver.recv() else { break };
                    if let Some(note) = answer.note {
                        self.driver.take_note(note);
                    }
                    if let Input::VmFailed(vm, why) = &answer.input {
                        (self.driver.say)(&format!("{vm}: {why}"));
                        self.driver.give_up(vm);
                    }
                    answer.input
                }
            };
            match self.machine.clone().step(input) {
                Ok((next, more)) => {
                    self.machine = next;
                    effects.extend(more);
                }
                Err(out_of_order) => (self.driver.say)(&out_of_order.to_string()),
            }
        }
        self.end_vmms();
        notes.extend(self.machine.notes().iter().cloned());
        let ends = self.machine.ends();
        let tried = ends
            .iter()
            .filter(|e| e.fate.is_some() || !e.failures.is_empty());
        Stopped {
            going: self.going,
            vms: tried.map(kept).collect(),
            notes,
        }
    }

    /// Everything that can be written while the VMs still run. Each part for
    /// itself: what cannot be written costs no VM.
    fn prepare(&mut self) -> Result<(), String> {
        let mut failed = Vec::new();
        failed.extend(self.driver.reap().err());
        let shut = |vm: &crate::preflight::VmVerdict| vm.fate == Some(Fate::ShutDown);
        let vms: Vec<VmName> = self
            .driver
            .verdict
            .vms
            .iter()
            .filter(|v| shut(v))
            .map(|v| v.vm.clone())
            .collect();
        for vm in &vms {
            failed.extend(self.note_pending(vm).err());
        }
        failed.extend(self.note_frozen());
        failed.extend(self.driver.hold_store().err());
        failed.extend(self.carry().err());
        (self.driver.say)("flushing disks");
        self.driver.host.system.sync();
        self.driver.note(EventKind::Prepared);
        if failed.is_empty() {
            return Ok(());
        }
        Err(failed.join("; "))
    }

    /// Notes what is about to be frozen; gives what failed. A VM of which a word
    /// stands that must not be replaced is kept in another way: the next kernel
    /// would take that word for one about the state frozen now. One that merely
    /// cannot be noted is frozen all the same, and resumed by an order.
    fn note_frozen(&mut self) -> Vec<String> {
        let mut failed = Vec::new();
        for (vm, error) in self.driver.note_frozen() {
            let why = with_cause(&error);
            failed.push(why.clone());
            if matches!(error, HostError::Refused { .. }) {
                self.not_frozen.insert(vm, why);
            }
        }
        failed
    }

    /// Has the memory of VMs that Linux is to carry preserved while they run, and
    /// PID 1 hold it. Those of which that fails are kept in another way.
    fn carry(&mut self) -> Result<(), String> {
        if !self.carried {
            return Ok(());
        }
        let host = self.driver.host;
        let verdicts = &self.driver.verdict.vms;
        let vms = luo::carry::candidates(&self.driver.survey, verdicts);
        if vms.is_empty() || luo::carry::was_handed_over(host, &vms) {
            return Ok(());
        }
        let prepared = host
            .system
            .fd_store()
            .and_then(|store| luo::carry::Carry::prepare_into(host, &vms, store, self.driver.say));
        let failed = match prepared {
            Ok((carry, failed)) => {
                self.driver.carry = Some(carry);
                failed
            }
            Err(why) => vms
                .iter()
                .map(|vm| (vm.name.clone(), why.clone()))
                .collect(),
        };
        let mut told = Vec::new();
        for (vm, why) in failed {
            let mut sentence = format!("the memory of '{vm}' is not carried: {why}");
            // One that runs is saved when its turn comes to be frozen.
            let frozen = vms.iter().any(|v| v.name == vm && !v.runs);
            if frozen && let Err(why) = self.driver.job(&vm).keep(Fate::Save, false).0 {
                sentence.push_str(&format!("; it was frozen, and cannot be saved: {why}"));
            }
            told.push(sentence);
        }
        match told.is_empty() {
            true => Ok(()),
            false => Err(told.join("; ")),
        }
    }

    /// Puts a VM that is to be shut down on the list of those to boot.
    fn note_pending(&self, vm: &VmName) -> Result<(), String> {
        let host = self.driver.host;
        let Some(Ok(config)) = self.driver.survey.definitions.get(vm) else {
            return Ok(());
        };
        // Others may be taken from it: those whose guests end by themselves.
        pending::add(host, config.clone()).map_err(|e| with_cause(&e))
    }

    fn suspend(&mut self, vm: VmName, fate: Fate, sender: &Sender<Answer>) {
        let again = self
            .machine
            .ends()
            .into_iter()
            .any(|e| e.vm == vm && !e.failures.is_empty());
        if again && fate == Fate::ShutDown {
            let _ = self.note_pending(&vm);
        }
        (self.driver.say)(&format!("{vm}: {}", fate_words(fate)));
        let mut job = self.driver.job(&vm);
        let row = self.driver.survey.rows.get(&vm);
        let files = row.is_some_and(|row| memory_of(row) == Memory::Files);
        let carried = self.driver.carry.as_ref().and_then(|carry| carry.vm(&vm));
        let not_frozen = self.not_frozen.get(&vm).cloned();
        let held = !files || carried.is_some();
        job.keeps = self.machine.may_be_frozen(&vm) && held && not_frozen.is_none();
        let died = {
            let vm = vm.clone();
            move |why: &str| Answer {
                input: Input::VmFailed(vm, why.to_owned()),
                note: None,
            }
        };
        answering::in_thread(sender, died, move || {
            let (result, note) = match (fate, carried) {
                (Fate::Keep, _) if not_frozen.is_some() => {
                    (Err(not_frozen.unwrap_or_default()), None)
                }
                (Fate::Keep, Some(carried)) => job.keep_carried(&carried, again),
                (Fate::Keep, None) if files => (Err("nobody carries its memory".to_owned()), None),
                _ => job.keep(fate, again),
            };
            let input = match result {
                Ok(fate) => Input::VmDone(vm, fate),
                Err(why) => Input::VmFailed(vm, why),
            };
            Answer { input, note }
        });
    }

    fn record(&mut self) -> Result<(), String> {
        let vain = self.machine.ends();
        let vain = vain.iter().filter(|end| !end.failures.is_empty());
        let sentences: Vec<String> = vain.map(|end| kept(end).sentence).collect();
        self.driver.timeline.notes.extend(sentences);
        self.driver.timeline.notes.push(
            "the service manager took the host down: the rest of its shutdown lies between 'jump' and 'new kernel entered'".into(),
        );
        self.driver.record()
    }

    /// VMMs of kept VMs have nothing left to do. They end here, so that
    /// nothing has to wait for them, or cannot be unmounted, later on.
    fn end_vmms(&self) {
        for end in self.machine.ends() {
            let expected = match end.fate {
                Some(Fate::Keep) => hebe_api::VmmState::Frozen,
                Some(Fate::Save) => hebe_api::VmmState::Saved,
                _ => continue,
            };
            let row = self.driver.survey.rows.get(&end.vm);
            let files = row.is_some_and(|row| memory_of(row) == Memory::Files);
            if files && end.fate == Some(Fate::Keep) {
                continue;
            }
            let _ = vmm::quit(self.driver.host, &end.vm, Some(expected));
        }
        // Files have no other holder than their VMM, but where PID 1 is one.
        if let Some(Err(why)) = self
            .driver
            .carry
            .as_ref()
            .map(|c| c.end_holders(self.driver.host))
        {
            (self.driver.say)(&why);
        }
    }
}

fn done(result: Result<(), String>) -> Input {
    match result {
        Ok(()) => Input::Done,
        Err(why) => Input::Failed(why),
    }
}

/// A VM that stands still because it was being saved, without a file that
/// counts, has not been saved.
fn life_of(host: &Host, row: &VmRow) -> Life {
    let complete = || {
        let paths = SavedPaths::new(&host.layout, &row.name);
        paths.fact() == Some(SavedFact::Complete)
    };
    match row.life {
        Life::SavedHeld if !complete() => Life::Paused,
        life => life,
    }
}

fn memory_of(row: &VmRow) -> Memory {
    match (row.store, row.segment) {
        (Some(store), _) if store == luo::STORE => Memory::Files,
        (_, Some(_)) => Memory::Store,
        _ => Memory::Process,
    }
}

fn kept(end: &VmEnd) -> Kept {
    let mut sentence = match end.fate {
        Some(Fate::Keep) => "frozen in memory".to_owned(),
        Some(Fate::Save) => "saved to a file".to_owned(),
        Some(Fate::ShutDown) => "shut down, and booted again when the host is up".to_owned(),
        Some(Fate::End) => "ended: it had failed, and cannot run again".to_owned(),
        None => "not kept: it ends with the host".to_owned(),
    };
    for (fate, why) in &end.failures {
        let what = fate_words(*fate);
        sentence.push_str(&format!("; {what} failed: {why}"));
    }
    Kept {
        vm: end.vm.clone(),
        fate: end.fate,
        sentence: format!("VM '{}' is {sentence}", end.vm),
    }
}
