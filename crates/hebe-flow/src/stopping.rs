//! What becomes of each VM when the service manager takes the host down, as a
//! state machine of values (R-22, R-23).
//!
//! ```text
//!   Prepare ──▶ SetAside ──▶ Freeze ──▶ Record ──▶ Ended
//!                  │            │
//!                  ▼            ▼          each VM, in its own chain of fates:
//!              save / shut    freeze ─fails─▶ save ─fails─▶ shut down ─fails─▶ stranded
//!              / end
//! ```
//!
//! A reboot that Hebe carries out itself ([`crate::reboot`]) has a way back: if
//! one VM cannot be suspended, every VM runs again. Here there is none. The
//! host's services are down when this begins, and the machine leaves whatever
//! is answered; so a VM that cannot be kept as it should is kept as it can.
//!
//! The owner of the state is whoever carries the event out (`hebe-host`): it
//! runs each [`Effect`] and feeds its result back. No I/O, no clock, no locks.
//!
//! Contract:
//! - Whatever takes long (files, shutdowns) that is known beforehand comes
//!   before the first VM is frozen; then all others freeze at once.
//! - Every VM that runs is asked at least once, and tried with every fate of
//!   its chain until one holds.
//! - Memory is trusted to outlive the kernel only where [`Ground`] says so.

use std::collections::BTreeMap;

use hebe_types::{RebootMethod, VmName};
use serde::{Deserialize, Serialize};

use crate::life::Life;
use crate::reboot::Fate;

/// Where the host goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Going {
    /// Nowhere: it stays up.
    Stays,
    /// Into another kernel, by kexec.
    Kexec,
    /// Into a new user space of the same kernel.
    SoftReboot,
    /// Through a reset of the machine.
    Reset,
    /// It is switched off, or stands still.
    Off,
}

impl Going {
    /// From the service manager's queue: `systemctl list-jobs`, whose columns
    /// are a number, the unit, what is done to it, and how far that is. A host
    /// that goes to several places at once, or to none that is known here,
    /// counts as one whose memory does not survive.
    pub fn from_jobs(jobs: &str) -> Self {
        let starts = |unit: &str| {
            jobs.lines().any(|line| {
                let mut words = line.split_whitespace();
                words.next().is_some_and(|id| id.parse::<u64>().is_ok())
                    && words.next() == Some(unit)
                    && words.next() == Some("start")
            })
        };
        let any = |units: &[&str]| units.iter().any(|unit| starts(unit));
        let off = ["poweroff.target", "halt.target", "exit.target"];
        if any(&off) {
            Self::Off
        } else if any(&["reboot.target", "ctrl-alt-del.target"]) {
            Self::Reset
        } else if any(&["kexec.target"]) {
            Self::Kexec
        } else if any(&["soft-reboot.target"]) {
            Self::SoftReboot
        } else if any(&["shutdown.target", "final.target", "umount.target"]) {
            Self::Reset
        } else {
            Self::Stays
        }
    }

    /// In a reader's words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Stays => "the host stays up",
            Self::Kexec => "the host goes to its next kernel by kexec",
            Self::SoftReboot => "the host's user space begins anew",
            Self::Reset => "the machine is reset",
            Self::Off => "the machine is switched off",
        }
    }
}

/// What is done to VMs whose memory does not outlive the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wish {
    /// They are saved to files.
    #[default]
    Save,
    /// Their guests are shut down, and booted again.
    Shutdown,
}

/// What the VMs can count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ground {
    /// The store outlives what comes.
    pub store: bool,
    /// The kernel carries files over: store `luo`.
    pub carried: bool,
    /// For all others.
    pub wish: Wish,
    /// The method of a reboot that somebody ordered.
    pub ordered: Option<RebootMethod>,
}

/// Where a VM's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// In the store.
    Store,
    /// In files that the kernel may carry.
    Files,
    /// In its VMM alone.
    Process,
}

/// What is to be tried with a VM, in this order; nothing where nothing of it
/// is up, or what there is of it survives anyway.
pub fn chain(life: Life, memory: Memory, ground: &Ground) -> Vec<Fate> {
    let survives = match memory {
        Memory::Store => ground.store,
        Memory::Files => ground.carried,
        Memory::Process => false,
    };
    let frozen = matches!(life, Life::Frozen | Life::Held);
    if matches!(life, Life::Saved | Life::SavedHeld) || (frozen && survives) {
        return Vec::new();
    }
    if !frozen && !life.has_vmm() {
        return Vec::new();
    }
    // KVM gave it up: nothing of it could go on.
    if life == Life::Failed {
        return vec![Fate::End];
    }
    match ground.ordered {
        // Its owner did not want its guest to go on: it is not woken for that.
        Some(RebootMethod::Cold) if !frozen => vec![Fate::ShutDown, Fate::Save],
        Some(RebootMethod::Saved | RebootMethod::Cold) => vec![Fate::Save, Fate::ShutDown],
        _ if survives => vec![Fate::Keep, Fate::Save, Fate::ShutDown],
        _ if ground.wish == Wish::Shutdown && !frozen => vec![Fate::ShutDown, Fate::Save],
        _ => vec![Fate::Save, Fate::ShutDown],
    }
}

/// Phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// What the next kernel must know is being written.
    Prepare,
    /// VMs that take long are being saved or shut down.
    SetAside,
    /// All others freeze at once.
    Freeze,
    /// The report is being written.
    Record,
    /// Over.
    Ended,
}

/// What the driver must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write what the next kernel must know.
    Prepare,
    /// Suspend a VM so. Answer: [`Input::VmDone`] or [`Input::VmFailed`].
    Suspend(VmName, Fate),
    /// Write the report.
    Record,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The phase's one effect succeeded.
    Done,
    /// The phase's one effect failed; that is noted, and it goes on.
    Failed(String),
    /// The VM is in this fate, which may be another one than it was asked to.
    VmDone(VmName, Fate),
    /// It is not.
    VmFailed(VmName, String),
}

/// An input that the phase cannot take: the driver is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopping: {input:?} cannot happen in phase {phase:?}")]
pub struct OutOfOrder {
    /// The phase.
    pub phase: Phase,
    /// The input.
    pub input: Input,
}

/// One VM's way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    chain: Vec<Fate>,
    /// How many of them were ordered.
    tried: usize,
    settled: Option<Fate>,
    failures: Vec<(Fate, String)>,
}

impl Way {
    fn open(&self) -> bool {
        self.settled.is_none() && self.failures.len() < self.chain.len()
    }
}

/// How one VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEnd {
    /// Which VM.
    pub vm: VmName,
    /// How it is kept; `None` where nothing held, and it ends with the host.
    pub fate: Option<Fate>,
    /// What was tried in vain, and why.
    pub failures: Vec<(Fate, String)>,
}

/// One event under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    phase: Phase,
    vms: BTreeMap<VmName, Way>,
    notes: Vec<String>,
}

impl Stopping {
    /// Of these VMs, each with its [`chain`].
    pub fn new(vms: impl IntoIterator<Item = (VmName, Vec<Fate>)>) -> Self {
        let way = |(vm, chain)| {
            let way = Way {
                chain,
                tried: 0,
                settled: None,
                failures: Vec::new(),
            };
            (vm, way)
        };
        Self {
            phase: Phase::Prepare,
            vms: vms.into_iter().map(way).collect(),
            notes: Vec::new(),
        }
    }

    /// The first effects.
    pub fn begin(&self) -> Vec<Effect> {
        vec![Effect::Prepare]
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What failed besides VMs.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// How each VM stands.
    pub fn ends(&self) -> Vec<VmEnd> {
        let end = |(vm, way): (&VmName, &Way)| VmEnd {
            vm: vm.clone(),
            fate: way.settled,
            failures: way.failures.clone(),
        };
        self.vms.iter().map(end).collect()
    }

    /// Whether to be frozen is one of a VM's ways: what it is frozen in survives.
    pub fn may_be_frozen(&self, vm: &VmName) -> bool {
        let way = self.vms.get(vm);
        way.is_some_and(|way| way.chain.contains(&Fate::Keep))
    }

    /// Takes one input; gives the next state and the effects to run.
    ///
    /// # Errors
    /// The input does not belong to the phase.
    pub fn step(mut self, input: Input) -> Result<(Self, Vec<Effect>), OutOfOrder> {
        let effects = match (self.phase, input) {
            (Phase::Prepare, Input::Done) => self.set_aside(),
            (Phase::Prepare, Input::Failed(why)) => {
                self.notes.push(why);
                self.set_aside()
            }
            (Phase::SetAside | Phase::Freeze, Input::VmDone(vm, fate)) => {
                self.way(&vm)?.settled = Some(fate);
                self.after_answer()
            }
            (Phase::SetAside | Phase::Freeze, Input::VmFailed(vm, why)) => {
                let way = self.way(&vm)?;
                let Some(&fate) = way.chain.get(way.tried - 1) else {
                    return self.out_of_order(Input::VmFailed(vm, why));
                };
                way.failures.push((fate, why));
                match way.chain.get(way.tried).copied() {
                    Some(next) => {
                        way.tried += 1;
                        vec![Effect::Suspend(vm, next)]
                    }
                    None => self.after_answer(),
                }
            }
            (Phase::Record, Input::Done) => self.end(),
            (Phase::Record, Input::Failed(why)) => {
                self.notes.push(why);
                self.end()
            }
            (_, input) => return self.out_of_order(input),
        };
        Ok((self, effects))
    }

    fn out_of_order<T>(&self, input: Input) -> Result<T, OutOfOrder> {
        Err(OutOfOrder {
            phase: self.phase,
            input,
        })
    }

    /// A VM of which an answer is awaited.
    fn way(&mut self, vm: &VmName) -> Result<&mut Way, OutOfOrder> {
        let phase = self.phase;
        let awaited = |way: &&mut Way| way.settled.is_none() && way.tried > way.failures.len();
        self.vms
            .get_mut(vm)
            .filter(awaited)
            .ok_or_else(|| OutOfOrder {
                phase,
                input: Input::VmFailed(vm.clone(), "nothing was asked of it".into()),
            })
    }

    fn set_aside(&mut self) -> Vec<Effect> {
        self.phase = Phase::SetAside;
        self.order(|first| first != Fate::Keep)
    }

    fn freeze(&mut self) -> Vec<Effect> {
        self.phase = Phase::Freeze;
        self.order(|first| first == Fate::Keep)
    }

    /// Orders the first fate of every VM that has such a one; goes on to the
    /// next phase where there is none.
    fn order(&mut self, such: impl Fn(Fate) -> bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (vm, way) in &mut self.vms {
            let first = way.chain.first().copied().filter(|f| such(*f));
            if let (Some(fate), 0) = (first, way.tried) {
                way.tried = 1;
                effects.push(Effect::Suspend(vm.clone(), fate));
            }
        }
        if effects.is_empty() {
            self.after_answer()
        } else {
            effects
        }
    }

    fn after_answer(&mut self) -> Vec<Effect> {
        let waits = self.vms.values().any(|way| way.tried > 0 && way.open());
        match self.phase {
            _ if waits => Vec::new(),
            Phase::SetAside => self.freeze(),
            _ => {
                self.phase = Phase::Record;
                vec![Effect::Record]
            }
        }
    }

    fn end(&mut self) -> Vec<Effect> {
        self.phase = Phase::Ended;
        Vec::new()
    }
}

#[cfg(test)]
#[path = "stopping_tests.rs"]
mod tests;
