//! A reboot of the VMM layer, as a state machine of values (R-15, R-17, R-22).
//!
//! ```text
//!              ┌────────────── forward: one phase after the other ──────────────┐
//!   Preflight → LoadImage → StopServices → Prepare → SetAside → Freeze → Record → Jump
//!       │           │            │            │          │         │        │       │
//!       │           └────────────┴────────────┴──────────┴─────────┴────────┴───────┘
//!       ▼                                     │ any failure, or an abort
//!    Refused                                  ▼
//!                 Thaw → StartServices → Boot → Unprepare → Unload → Aborted
//!              └── back: one undo path; a step that fails is noted, never a reason to stop ──┘
//! ```
//!
//! The owner of the state is whoever drives the reboot (`hebe-host`): it runs
//! each [`Effect`], and feeds its result back as an [`Input`]. The machine
//! does no I/O, reads no clock and takes no lock.
//!
//! Contract:
//! - Services stop before any VM is suspended (R-22), and VMs that take long
//!   (saved to disk, shut down) go before those that are frozen in memory, so
//!   that the latter run as long as possible (R-23). All frozen VMs freeze at
//!   once.
//! - Before the jump is irrevocable every VM is suspended, saved or off; if
//!   one is not, none is lost: the undo path brings back whatever this reboot
//!   took away, in the order that makes downtime least (running VMs first).
//! - A VM whose answer never came counts as "perhaps suspended" and is thawed
//!   like the others.
//! - A VM with which KVM cannot go on, before or while it is to be suspended,
//!   holds up nobody: there is nothing of it that an undo could bring back.
//! - The machine ends in [`Phase::Ended`] with every VM running or listed with
//!   the reason why it is not.

use std::collections::BTreeMap;

use hebe_types::VmName;
use serde::{Deserialize, Serialize};

/// What a reboot does to one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Frozen where it is in memory (R-10).
    Keep,
    /// RAM and state written to a file.
    Save,
    /// Shut down, and booted afterwards (R-04).
    ShutDown,
    /// Its VMM ends, and nothing is kept: KVM gave the VM up, so that there is
    /// nothing that could go on. What boots it again is its owner's affair.
    End,
}

/// Where one VM stands in this reboot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmPhase {
    /// Not touched yet.
    Running,
    /// Its effect was ordered; no answer yet.
    Pending,
    /// Frozen, saved, off or ended, as its fate says.
    Suspended,
    /// It failed instead, or crashed, for this reason: it never runs again.
    Over(String),
    /// It refused and runs on.
    Refused(String),
    /// Nobody knows: no answer came.
    Unknown(String),
    /// The way back was ordered; no answer yet.
    Returning,
    /// Runs again.
    Back,
    /// Could not be brought back; it is where the text says.
    Stranded(String),
}

/// Phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Checks; nothing has changed.
    Preflight,
    /// The next kernel is being loaded.
    LoadImage,
    /// Host services are being stopped.
    StopServices,
    /// What the next kernel must know is being written.
    Prepare,
    /// VMs that take long are being saved or shut down.
    SetAside,
    /// All other VMs freeze at once.
    Freeze,
    /// The timeline is being written into the store.
    Record,
    /// The last order was given.
    Jump,
    /// Undo: VMs that are in memory or on file come back.
    Thaw,
    /// Undo: host services start.
    StartServices,
    /// Undo: VMs that were shut down boot.
    Boot,
    /// Undo: what was written for the next kernel is withdrawn.
    Unprepare,
    /// Undo: the image is unloaded.
    Unload,
    /// Over; see [`Reboot::outcome`].
    Ended,
}

/// What the driver must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Run all checks. Answer: [`Input::Done`] or [`Input::Failed`].
    Preflight,
    /// Load the next kernel.
    LoadImage,
    /// Stop host services.
    StopServices,
    /// Write what the next kernel must know, and flush dirty pages early.
    Prepare,
    /// Suspend a VM as its fate says. Answer: [`Input::VmDone`] or [`Input::VmFailed`].
    Suspend(VmName, Fate),
    /// Write the timeline, flush what the guests wrote last.
    Record,
    /// Leave this kernel. Answered only when it failed.
    Jump,
    /// Let a frozen or saved VM run again; a VM that runs is left alone.
    Thaw(VmName, Fate),
    /// Start host services.
    StartServices,
    /// Boot a VM that was shut down.
    Boot(VmName),
    /// Withdraw what [`Effect::Prepare`] wrote.
    Unprepare,
    /// Unload the image.
    Unload,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The phase's one effect succeeded.
    Done,
    /// The phase's one effect failed, for this reason.
    Failed(String),
    /// The VM's effect succeeded.
    VmDone(VmName),
    /// The VM itself failed or crashed: it has nothing left that could be kept.
    VmOver {
        /// Which VM.
        vm: VmName,
        /// Why, in one sentence.
        why: String,
    },
    /// The VM's effect failed.
    VmFailed {
        /// Which VM.
        vm: VmName,
        /// Why, in one sentence.
        why: String,
        /// The VM said so itself, and is as it was before the effect.
        certain: bool,
    },
    /// The operator (or a signal) wants the reboot stopped.
    Abort(String),
}

/// How a reboot ended, where it did not end in the jump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Checks failed; nothing was touched.
    Refused(String),
    /// Undone.
    Aborted {
        /// The first failure.
        why: String,
        /// VMs that do not run, each with where it is.
        stranded: Vec<(VmName, String)>,
        /// Undo steps that failed, other than VMs.
        notes: Vec<String>,
    },
}

/// An input that the phase cannot take: the driver is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("reboot: {input:?} cannot happen in phase {phase:?}")]
pub struct OutOfOrder {
    /// The phase.
    pub phase: Phase,
    /// The input.
    pub input: Input,
}

/// One reboot under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reboot {
    phase: Phase,
    vms: BTreeMap<VmName, (Fate, VmPhase)>,
    uses_image: bool,
    /// The phase whose work must be undone from.
    reached: Phase,
    abort: Option<String>,
    notes: Vec<String>,
    refused: bool,
}

impl Reboot {
    /// A reboot of `vms`; with `uses_image` it ends in a kexec, otherwise in
    /// a hardware reset that needs no image.
    pub fn new(vms: impl IntoIterator<Item = (VmName, Fate)>, uses_image: bool) -> Self {
        let start = |(name, fate)| (name, (fate, VmPhase::Running));
        Self {
            phase: Phase::Preflight,
            vms: vms.into_iter().map(start).collect(),
            uses_image,
            reached: Phase::Preflight,
            abort: None,
            notes: Vec::new(),
            refused: false,
        }
    }

    /// The first effects.
    pub fn begin(&self) -> Vec<Effect> {
        vec![Effect::Preflight]
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Where one VM stands.
    pub fn vm(&self, name: &VmName) -> Option<&VmPhase> {
        self.vms.get(name).map(|(_, phase)| phase)
    }

    /// How it ended; `None` while it goes on.
    pub fn outcome(&self) -> Option<Outcome> {
        if self.phase != Phase::Ended {
            return None;
        }
        let why = self.abort.clone().unwrap_or_default();
        if self.refused {
            return Some(Outcome::Refused(why));
        }
        let stranded = |(name, (_, phase)): (&VmName, &(Fate, VmPhase))| match phase {
            VmPhase::Stranded(place) | VmPhase::Over(place) => Some((name.clone(), place.clone())),
            _ => None,
        };
        Some(Outcome::Aborted {
            why,
            stranded: self.vms.iter().filter_map(stranded).collect(),
            notes: self.notes.clone(),
        })
    }

    /// Takes one input; gives the next state and the effects to run.
    pub fn step(mut self, input: Input) -> Result<(Self, Vec<Effect>), OutOfOrder> {
        let refuse = |phase, input| Err(OutOfOrder { phase, input });
        let effects = match (self.phase, input) {
            (Phase::Ended | Phase::Jump, input @ Input::Abort(_)) => {
                return refuse(self.phase, input);
            }
            (phase, Input::Abort(why)) => {
                self.abort.get_or_insert(why);
                // Effects under way answer first; per-VM phases notice the
                // abort when the last answer is in, single ones right then.
                debug_assert!(phase != Phase::Ended);
                Vec::new()
            }
            (Phase::SetAside | Phase::Freeze, Input::VmDone(vm)) => {
                self.answer(&vm, VmPhase::Pending, VmPhase::Suspended)?;
                self.after_suspends()
            }
            (Phase::SetAside | Phase::Freeze, Input::VmOver { vm, why }) => {
                self.answer(&vm, VmPhase::Pending, VmPhase::Over(why))?;
                self.after_suspends()
            }
            (Phase::SetAside | Phase::Freeze, Input::VmFailed { vm, why, certain }) => {
                let phase = if certain {
                    VmPhase::Refused(why.clone())
                } else {
                    VmPhase::Unknown(why.clone())
                };
                self.answer(&vm, VmPhase::Pending, phase)?;
                self.abort.get_or_insert(format!("{vm}: {why}"));
                self.after_suspends()
            }
            (Phase::Thaw | Phase::Boot, Input::VmDone(vm)) => {
                self.answer(&vm, VmPhase::Returning, VmPhase::Back)?;
                self.after_returns()
            }
            (Phase::Thaw | Phase::Boot, Input::VmFailed { vm, why, .. }) => {
                self.answer(&vm, VmPhase::Returning, VmPhase::Stranded(why))?;
                self.after_returns()
            }
            (phase, Input::Done) if self.single(phase) => self.after(phase),
            (phase, Input::Failed(why)) if self.single(phase) => self.after_failure(phase, why),
            (phase, input) => return refuse(phase, input),
        };
        Ok((self, effects))
    }

    /// Whether the phase has exactly one effect, answered by Done or Failed.
    fn single(&self, phase: Phase) -> bool {
        !matches!(
            phase,
            Phase::SetAside | Phase::Freeze | Phase::Thaw | Phase::Boot | Phase::Ended
        )
    }

    fn answer(&mut self, vm: &VmName, from: VmPhase, to: VmPhase) -> Result<(), OutOfOrder> {
        match self.vms.get_mut(vm) {
            Some((_, phase)) if *phase == from => {
                *phase = to;
                Ok(())
            }
            _ => Err(OutOfOrder {
                phase: self.phase,
                input: Input::VmDone(vm.clone()),
            }),
        }
    }

    fn after(&mut self, phase: Phase) -> Vec<Effect> {
        if self.abort.is_some() && phase < Phase::Jump {
            self.reached = phase;
            return self.undo();
        }
        match phase {
            Phase::Preflight if self.uses_image => self.enter(Phase::LoadImage),
            Phase::Preflight | Phase::LoadImage => self.enter(Phase::StopServices),
            Phase::StopServices => self.enter(Phase::Prepare),
            Phase::Prepare => self.enter(Phase::SetAside),
            Phase::Record => self.enter(Phase::Jump),
            // A jump that "succeeded" and yet returned did not succeed.
            Phase::Jump => self.after_failure(phase, "the machine did not leave".into()),
            Phase::StartServices => self.enter(Phase::Boot),
            Phase::Unprepare => self.enter(Phase::Unload),
            _ => self.enter(Phase::Ended),
        }
    }

    fn after_failure(&mut self, phase: Phase, why: String) -> Vec<Effect> {
        if phase > Phase::Jump {
            self.notes.push(why);
            return self.after(phase);
        }
        self.abort.get_or_insert(why);
        self.reached = phase;
        if phase == Phase::Preflight {
            self.refused = true;
            return self.enter(Phase::Ended);
        }
        self.undo()
    }

    fn after_suspends(&mut self) -> Vec<Effect> {
        if self.any(VmPhase::Pending) {
            return Vec::new();
        }
        if self.abort.is_some() {
            self.reached = self.phase;
            return self.undo();
        }
        self.enter(match self.phase {
            Phase::SetAside => Phase::Freeze,
            _ => Phase::Record,
        })
    }

    fn after_returns(&mut self) -> Vec<Effect> {
        if self.any(VmPhase::Returning) {
            return Vec::new();
        }
        self.enter(match self.phase {
            Phase::Thaw => Phase::StartServices,
            _ => Phase::Unprepare,
        })
    }

    fn any(&self, wanted: VmPhase) -> bool {
        self.vms.values().any(|(_, phase)| *phase == wanted)
    }

    /// The one way back, whatever failed.
    fn undo(&mut self) -> Vec<Effect> {
        if self.reached == Phase::Preflight {
            self.refused = true;
            return self.enter(Phase::Ended);
        }
        self.enter(Phase::Thaw)
    }

    /// Enters a phase; one that has nothing to do is passed through.
    fn enter(&mut self, phase: Phase) -> Vec<Effect> {
        self.phase = phase;
        let undone_from = self.reached;
        match phase {
            Phase::SetAside => self.order(|fate| fate != Fate::Keep),
            Phase::Freeze => self.order(|fate| fate == Fate::Keep),
            Phase::Thaw => self.bring_back(|fate| matches!(fate, Fate::Keep | Fate::Save)),
            Phase::Boot => self.bring_back(|fate| fate == Fate::ShutDown),
            Phase::StartServices if undone_from < Phase::StopServices => self.enter(Phase::Boot),
            Phase::Unprepare if undone_from < Phase::Prepare => self.enter(Phase::Unload),
            Phase::Unload if !self.uses_image => self.enter(Phase::Ended),
            Phase::Preflight => vec![Effect::Preflight],
            Phase::LoadImage => vec![Effect::LoadImage],
            Phase::StopServices => vec![Effect::StopServices],
            Phase::Prepare => vec![Effect::Prepare],
            Phase::Record => vec![Effect::Record],
            Phase::Jump => vec![Effect::Jump],
            Phase::StartServices => vec![Effect::StartServices],
            Phase::Unprepare => vec![Effect::Unprepare],
            Phase::Unload => vec![Effect::Unload],
            Phase::Ended => Vec::new(),
        }
    }

    fn order(&mut self, wanted: impl Fn(Fate) -> bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (name, (fate, phase)) in &mut self.vms {
            if wanted(*fate) && *phase == VmPhase::Running {
                *phase = VmPhase::Pending;
                effects.push(Effect::Suspend(name.clone(), *fate));
            }
        }
        if effects.is_empty() {
            return self.after_suspends();
        }
        effects
    }

    fn bring_back(&mut self, wanted: impl Fn(Fate) -> bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (name, (fate, phase)) in &mut self.vms {
            let away = matches!(phase, VmPhase::Suspended | VmPhase::Unknown(_));
            if wanted(*fate) && away {
                *phase = VmPhase::Returning;
                effects.push(match fate {
                    Fate::ShutDown => Effect::Boot(name.clone()),
                    fate => Effect::Thaw(name.clone(), *fate),
                });
            }
        }
        if effects.is_empty() {
            return self.after_returns();
        }
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> VmName {
        text.parse().expect("name")
    }

    fn run(mut reboot: Reboot, inputs: &[Input]) -> (Reboot, Vec<Effect>) {
        let mut effects = reboot.begin();
        for input in inputs {
            (reboot, effects) = reboot.step(input.clone()).expect("in order");
        }
        (reboot, effects)
    }

    #[test]
    fn services_stop_before_any_vm_is_suspended_and_slow_vms_go_first() {
        let vms = [
            (name("a"), Fate::Keep),
            (name("b"), Fate::Save),
            (name("c"), Fate::Keep),
        ];
        let (reboot, effects) = run(Reboot::new(vms, true), &[]);
        assert_eq!(effects, [Effect::Preflight]);
        let (reboot, effects) = reboot.step(Input::Done).expect("checked");
        assert_eq!(effects, [Effect::LoadImage]);
        let (reboot, effects) = reboot.step(Input::Done).expect("loaded");
        assert_eq!(effects, [Effect::StopServices]);
        let (reboot, effects) = reboot.step(Input::Done).expect("stopped");
        assert_eq!(effects, [Effect::Prepare]);
        let (reboot, effects) = reboot.step(Input::Done).expect("prepared");
        assert_eq!(effects, [Effect::Suspend(name("b"), Fate::Save)]);
        let (reboot, effects) = reboot.step(Input::VmDone(name("b"))).expect("saved");
        let frozen = [
            Effect::Suspend(name("a"), Fate::Keep),
            Effect::Suspend(name("c"), Fate::Keep),
        ];
        assert_eq!(effects, frozen);
        let (reboot, effects) = reboot.step(Input::VmDone(name("c"))).expect("c");
        assert!(effects.is_empty());
        let (reboot, effects) = reboot.step(Input::VmDone(name("a"))).expect("a");
        assert_eq!(effects, [Effect::Record]);
        let (_, effects) = reboot.step(Input::Done).expect("recorded");
        assert_eq!(effects, [Effect::Jump]);
    }

    #[test]
    fn a_refused_preflight_touches_nothing() {
        let reboot = Reboot::new([(name("a"), Fate::Keep)], true);
        let (reboot, effects) = run(reboot, &[Input::Failed("no kernel".into())]);
        assert!(effects.is_empty());
        assert_eq!(reboot.outcome(), Some(Outcome::Refused("no kernel".into())));
    }

    #[test]
    fn one_vm_that_cannot_freeze_brings_all_others_back() {
        let vms = [(name("a"), Fate::Keep), (name("b"), Fate::Keep)];
        let done = || Input::Done;
        let failed = Input::VmFailed {
            vm: name("b"),
            why: "disk hangs".into(),
            certain: true,
        };
        let inputs = [done(), done(), done(), done(), failed];
        let (reboot, effects) = run(Reboot::new(vms, true), &inputs);
        assert!(effects.is_empty(), "a's answer is still out");
        let (reboot, effects) = reboot.step(Input::VmDone(name("a"))).expect("a");
        assert_eq!(effects, [Effect::Thaw(name("a"), Fate::Keep)]);
        let (reboot, effects) = reboot.step(Input::VmDone(name("a"))).expect("back");
        assert_eq!(effects, [Effect::StartServices]);
        let (reboot, effects) = reboot.step(Input::Done).expect("services");
        assert_eq!(effects, [Effect::Unprepare]);
        let (reboot, effects) = reboot.step(Input::Done).expect("withdrawn");
        assert_eq!(effects, [Effect::Unload]);
        let (reboot, _) = reboot.step(Input::Done).expect("unloaded");
        let expected = Outcome::Aborted {
            why: "b: disk hangs".into(),
            stranded: vec![],
            notes: vec![],
        };
        assert_eq!(reboot.outcome(), Some(expected));
    }

    /// One that had failed before is ended with those that take long; one that
    /// fails while it is to be frozen is as little a reason to turn back. Neither
    /// comes back when something else is one.
    #[test]
    fn a_vm_that_kvm_gives_up_holds_up_nobody() {
        let vms = [
            (name("a"), Fate::Keep),
            (name("b"), Fate::Keep),
            (name("dead"), Fate::End),
        ];
        let done = || Input::Done;
        let inputs = [done(), done(), done(), done()];
        let (reboot, effects) = run(Reboot::new(vms, true), &inputs);
        assert_eq!(effects, [Effect::Suspend(name("dead"), Fate::End)]);
        let (reboot, effects) = reboot.step(Input::VmDone(name("dead"))).expect("ended");
        assert_eq!(effects.len(), 2, "the others freeze");
        let over = Input::VmOver {
            vm: name("b"),
            why: "KVM gave it up".into(),
        };
        let (reboot, _) = reboot.step(over).expect("b");
        let (reboot, effects) = reboot.step(Input::VmDone(name("a"))).expect("a");
        assert_eq!(effects, [Effect::Record], "it goes on");
        let failed = Input::Failed("no room".into());
        let (reboot, effects) = reboot.step(failed).expect("record");
        assert_eq!(effects, [Effect::Thaw(name("a"), Fate::Keep)]);
        let (reboot, _) = reboot.step(Input::VmDone(name("a"))).expect("back");
        let (reboot, effects) = reboot.step(done()).expect("services");
        assert_eq!(effects, [Effect::Unprepare], "nothing is booted");
        let (reboot, _) = reboot.step(done()).expect("withdrawn");
        let (reboot, _) = reboot.step(done()).expect("unloaded");
        let Some(Outcome::Aborted { stranded, .. }) = reboot.outcome() else {
            panic!("{reboot:?}");
        };
        // What ran when it began, and does not now, is told.
        assert_eq!(stranded, [(name("b"), "KVM gave it up".to_owned())]);
    }

    #[test]
    fn a_jump_that_returns_thaws_everything() {
        let vms = [(name("a"), Fate::Keep)];
        let done = || Input::Done;
        let inputs = [
            done(),
            done(),
            done(),
            done(),
            Input::VmDone(name("a")),
            done(),
        ];
        let (reboot, effects) = run(Reboot::new(vms, true), &inputs);
        assert_eq!(effects, [Effect::Jump]);
        assert!(reboot.clone().step(Input::Abort("late".into())).is_err());
        let (_, effects) = reboot.step(Input::Failed("EPERM".into())).expect("failed");
        assert_eq!(effects, [Effect::Thaw(name("a"), Fate::Keep)]);
    }
}
