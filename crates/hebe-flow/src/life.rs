//! The life of one VM, as the host sees it from outside.
//!
//! ```text
//!   Absent ──start──▶ Starting ──up──▶ Running ◀──pause/unpause──▶ Paused
//!     ▲                  │fail           │ │ ▲                       │
//!     └──────────────────┘         stop/off│ │thaw                   │
//!     ▲                                  │ └─freeze─▶ Freezing ◀─────┘
//!     ├───────── Stopping ◀──────────────┘              │committed
//!     │                                                 ▼
//!     │             Resuming ◀──resume── Frozen ◀─quit─ Held
//!     │                 │ fail ──────────▶ ▲
//!     │                 └ up ─▶ Running
//!     │   Running/Paused ─save─▶ Saving ─durable─▶ SavedHeld ─quit─▶ Saved ─restore─▶ Restoring ─▶ Running
//!     ├── drop ── Frozen, Saved, Crashed, Lost
//!     ├── stop ── Failed ◀─KVM gives it up─ Running, Paused, Freezing, Saving, Stopping
//!     └── start afresh: Lost ─▶ Starting
//! ```
//!
//! `Held` is a frozen VM whose VMM still lives and can thaw it; `SavedHeld`
//! the same for a saved one. `Failed` is a VM with which KVM cannot go on: its
//! VMM stands, and has nothing that could be kept. `Crashed` is a VM that ran
//! when its VMM or host stopped, or failed before; `Lost` one that was frozen in a store that this kernel does not
//! have: it can be started afresh or dropped, and either gives that memory up
//! for good. The owner of a VM's state is the holder of its lock: the VMM while
//! there is one, and the host program that starts it before that.

use hebe_types::VmName;
use serde::{Deserialize, Serialize};

/// Where a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Life {
    /// No memory, no process; perhaps a definition.
    Absent,
    /// A VMM is being started for a new VM.
    Starting,
    /// vCPUs run.
    Running,
    /// vCPUs stand; nothing is committed.
    Paused,
    /// The state is being built and committed.
    Freezing,
    /// Frozen; its VMM lives.
    Held,
    /// Frozen; no process.
    Frozen,
    /// A VMM is being started around frozen RAM.
    Resuming,
    /// RAM and state are being written to a file.
    Saving,
    /// Saved; its VMM lives.
    SavedHeld,
    /// Saved; no process.
    Saved,
    /// A VMM is being started from a file.
    Restoring,
    /// The guest was asked to shut down.
    Stopping,
    /// KVM cannot go on with it: it never runs again, and its VMM lives.
    Failed,
    /// It ran when its VMM or host stopped, or had failed.
    Crashed,
    /// Frozen in a store that is not here.
    Lost,
}

/// What a person or the host wants, or what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Boot it.
    Start,
    /// Boot it, even if its memory may still be frozen somewhere.
    StartAfresh,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs run.
    Unpause,
    /// Suspend on memory.
    Freeze,
    /// Undo a freeze in the same VMM.
    Thaw,
    /// End the VMM of a held VM.
    Quit,
    /// Resume from memory.
    Resume,
    /// Write to a file.
    Save,
    /// Restore from the file.
    Restore,
    /// Shut down.
    Stop,
    /// Free memory and files.
    Drop,
}

/// What became of an order, or of the VM by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Happening {
    /// The order under way succeeded.
    Succeeded,
    /// The order under way failed, and left everything as it was.
    Failed,
    /// The guest powered itself off.
    GuestOff,
    /// KVM cannot go on with it.
    GivenUp,
    /// The VMM is gone.
    VmmGone,
}

/// What the host must do for an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Take the lock, allocate a segment, start a VMM.
    LaunchNew,
    /// Take the lock, start a VMM around the frozen segment.
    LaunchResume,
    /// Take the lock, withdraw the file, start a VMM from it.
    LaunchRestore,
    /// Send the VMM this order.
    Ask(Order),
    /// Free the segment (it is scrubbed) and the files.
    Free,
}

/// The order does not fit the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refused {
    /// The state.
    pub life: Life,
    /// The order.
    pub order: Order,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { life, order } = self;
        let out = match (life, order) {
            (Life::Running, Order::Start | Order::StartAfresh | Order::Resume | Order::Restore) => {
                "it runs already: nothing to do"
            }
            // Its VMM answers to nothing else.
            (Life::Held, _) => {
                "it is frozen, and its VMM holds it: `hebe resume NAME` continues it, and `hebe stop NAME` ends it then"
            }
            (Life::Frozen, Order::Start | Order::StartAfresh) => {
                "it is frozen in memory: `hebe resume NAME` continues it, `hebe drop NAME --yes` gives it up"
            }
            (Life::Saved | Life::SavedHeld, Order::Start | Order::StartAfresh) => {
                "it is saved in a file: `hebe resume NAME` continues it, `hebe drop NAME --yes` gives it up"
            }
            (Life::Running | Life::Paused, Order::Drop) => {
                "it is up: stop it first with `hebe stop NAME`"
            }
            (Life::Failed, _) => {
                "it failed and cannot run again: `hebe stop NAME` ends it, and `hebe start NAME` boots it then"
            }
            (Life::Absent, _) => "it is not up: `hebe start NAME` boots it",
            (Life::Crashed, _) => {
                "it stopped without a state: `hebe start NAME` boots it, `hebe drop NAME` frees its memory"
            }
            (Life::Lost, _) => {
                "it was frozen in a store that this kernel does not have: boot the kernel that has it to continue it; `hebe start NAME --afresh` boots it, `hebe drop NAME --yes` gives it up, and after either its memory is never continued"
            }
            (Life::Frozen, Order::Stop | Order::Freeze | Order::Pause | Order::Save) => {
                "it is frozen: resume it first with `hebe resume NAME`"
            }
            _ => {
                "it is in the middle of something else, or the order makes no sense now: see `hebe list`"
            }
        };
        f.write_str(out)
    }
}

impl Refused {
    /// The sentence, with the VM's name in the orders that it names.
    pub fn sentence(&self, name: &VmName) -> String {
        self.to_string().replace("NAME", name.as_str())
    }
}

impl Life {
    /// Takes an order; gives the state while it is carried out, and what to do.
    pub fn order(self, order: Order) -> Result<(Life, Effect), Refused> {
        let ask = Effect::Ask(order);
        Ok(match (self, order) {
            (Self::Absent, Order::Start | Order::StartAfresh) => {
                (Self::Starting, Effect::LaunchNew)
            }
            // An explicit start of a crashed VM gives up its RAM: without the
            // state of its CPUs nothing can continue it.
            (Self::Crashed, Order::Start | Order::StartAfresh) => {
                (Self::Starting, Effect::LaunchNew)
            }
            // Only where it was said that its memory is given up.
            (Self::Lost, Order::StartAfresh) => (Self::Starting, Effect::LaunchNew),
            (Self::Running, Order::Pause) => (Self::Paused, ask),
            (Self::Paused, Order::Unpause) => (Self::Running, ask),
            (Self::Running | Self::Paused, Order::Freeze) => (Self::Freezing, ask),
            (Self::Held, Order::Thaw) => (Self::Running, ask),
            (Self::Held, Order::Quit) => (Self::Frozen, ask),
            (Self::Frozen, Order::Resume) => (Self::Resuming, Effect::LaunchResume),
            (Self::Held, Order::Resume) => (Self::Running, Effect::Ask(Order::Thaw)),
            (Self::Running | Self::Paused, Order::Save) => (Self::Saving, ask),
            (Self::SavedHeld, Order::Unpause) => (Self::Running, ask),
            (Self::SavedHeld, Order::Quit) => (Self::Saved, ask),
            (Self::Saved, Order::Restore | Order::Resume) => {
                (Self::Restoring, Effect::LaunchRestore)
            }
            (Self::Running | Self::Paused | Self::Failed, Order::Stop) => (Self::Stopping, ask),
            (Self::Frozen | Self::Saved | Self::Crashed | Self::Lost, Order::Drop) => {
                (Self::Absent, Effect::Free)
            }
            (life, order) => return Err(Refused { life, order }),
        })
    }

    /// Takes what happened; gives the state after it.
    pub fn after(self, happening: Happening) -> Life {
        use Happening::{Failed, GivenUp, GuestOff, Succeeded, VmmGone};
        match (self, happening) {
            (Self::Starting | Self::Resuming | Self::Restoring, Succeeded) => Self::Running,
            (Self::Freezing, Succeeded) => Self::Held,
            (Self::Saving, Succeeded) => Self::SavedHeld,
            (Self::Stopping, Succeeded) => Self::Absent,
            // Nothing is withdrawn before the new VMM is sure to run.
            (Self::Starting, Failed | VmmGone) => Self::Absent,
            (Self::Resuming, Failed) => Self::Frozen,
            (Self::Restoring, Failed) => Self::Saved,
            (Self::Freezing | Self::Saving | Self::Stopping, Failed) => Self::Running,
            (Self::Running | Self::Paused | Self::Stopping, GuestOff) => Self::Absent,
            // What is committed stays so, and is continued elsewhere.
            (
                Self::Running | Self::Paused | Self::Freezing | Self::Saving | Self::Stopping,
                GivenUp,
            ) => Self::Failed,
            (Self::Held, VmmGone) => Self::Frozen,
            (Self::SavedHeld, VmmGone) => Self::Saved,
            // Between two writes: what the segment says decides; a state that
            // was not committed is no state.
            (
                Self::Running
                | Self::Paused
                | Self::Freezing
                | Self::Saving
                | Self::Stopping
                | Self::Resuming
                | Self::Restoring
                | Self::Failed,
                VmmGone,
            ) => Self::Crashed,
            (life, _) => life,
        }
    }

    /// Whether a living VMM holds the VM in this state.
    pub fn has_vmm(self) -> bool {
        !matches!(
            self,
            Self::Absent | Self::Frozen | Self::Saved | Self::Crashed | Self::Lost
        )
    }

    /// Whether the VM's work would be lost if its memory or file were freed.
    pub fn is_precious(self) -> bool {
        !matches!(self, Self::Absent | Self::Failed | Self::Crashed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Life; 16] = [
        Life::Absent,
        Life::Starting,
        Life::Running,
        Life::Paused,
        Life::Freezing,
        Life::Held,
        Life::Frozen,
        Life::Resuming,
        Life::Saving,
        Life::SavedHeld,
        Life::Saved,
        Life::Restoring,
        Life::Stopping,
        Life::Failed,
        Life::Crashed,
        Life::Lost,
    ];
    const ORDERS: [Order; 12] = [
        Order::Start,
        Order::StartAfresh,
        Order::Pause,
        Order::Unpause,
        Order::Freeze,
        Order::Thaw,
        Order::Quit,
        Order::Resume,
        Order::Save,
        Order::Restore,
        Order::Stop,
        Order::Drop,
    ];

    #[test]
    fn a_vm_goes_through_freeze_and_resume() {
        let (life, effect) = Life::Running.order(Order::Freeze).expect("freeze");
        assert_eq!(effect, Effect::Ask(Order::Freeze));
        let held = life.after(Happening::Succeeded);
        assert_eq!(held, Life::Held);
        let (frozen, _) = held.order(Order::Quit).expect("quit");
        let (resuming, effect) = frozen.order(Order::Resume).expect("resume");
        assert_eq!(effect, Effect::LaunchResume);
        assert_eq!(resuming.after(Happening::Failed), Life::Frozen);
        assert_eq!(resuming.after(Happening::Succeeded), Life::Running);
    }

    #[test]
    fn only_launches_lead_from_a_state_without_a_vmm_to_one_with() {
        for life in ALL {
            for order in ORDERS {
                let Ok((next, effect)) = life.order(order) else {
                    continue;
                };
                let launches = matches!(
                    effect,
                    Effect::LaunchNew | Effect::LaunchResume | Effect::LaunchRestore
                );
                assert_eq!(
                    launches,
                    !life.has_vmm() && next.has_vmm(),
                    "{life:?} {order:?}"
                );
                // Two VMMs never run the same RAM.
                assert!(!(launches && life.has_vmm()), "{life:?} {order:?}");
            }
        }
    }

    #[test]
    fn memory_is_freed_by_explicit_order_only() {
        for life in ALL {
            for order in ORDERS {
                if let Ok((_, Effect::Free)) = life.order(order) {
                    assert_eq!(order, Order::Drop);
                    assert!(!life.has_vmm());
                }
            }
            for happening in [Happening::Failed, Happening::GivenUp, Happening::VmmGone] {
                if life.is_precious() && life.after(happening) == Life::Absent {
                    assert_eq!(life, Life::Starting, "{life:?} {happening:?}");
                }
            }
        }
    }

    #[test]
    fn every_refusal_names_a_way_out() {
        for life in ALL {
            for order in ORDERS {
                if let Err(refused) = life.order(order) {
                    assert!(refused.to_string().len() > 20);
                }
            }
        }
        let refused = Life::Frozen.order(Order::Start).expect_err("frozen");
        let name: VmName = "web".parse().expect("name");
        let sentence = refused.sentence(&name);
        assert!(sentence.contains("`hebe resume web`"), "{sentence}");
        assert!(sentence.contains("`hebe drop web --yes`"), "{sentence}");
    }

    #[test]
    fn a_vm_that_kvm_gave_up_can_be_ended_and_nothing_else() {
        for life in [Life::Running, Life::Paused, Life::Freezing] {
            assert_eq!(life.after(Happening::GivenUp), Life::Failed);
        }
        for life in [Life::Held, Life::SavedHeld] {
            assert_eq!(life.after(Happening::GivenUp), life, "it is committed");
        }
        for order in ORDERS {
            let admitted = Life::Failed.order(order).is_ok();
            assert_eq!(admitted, order == Order::Stop, "{order:?}");
        }
        assert!(Life::Failed.has_vmm() && !Life::Failed.is_precious());
        assert_eq!(Life::Failed.after(Happening::VmmGone), Life::Crashed);
    }

    /// Its memory may still be there, where this kernel cannot see it.
    #[test]
    fn a_lost_vm_is_booted_by_an_order_that_says_so_alone() {
        for order in ORDERS {
            let launched = matches!(Life::Lost.order(order), Ok((Life::Starting, _)));
            assert_eq!(launched, order == Order::StartAfresh, "{order:?}");
        }
        let refused = Life::Lost.order(Order::Start).expect_err("lost");
        assert!(refused.to_string().contains("--afresh"));
        assert!(Life::Lost.is_precious());
        // The word gives nothing up that is here.
        for life in [Life::Frozen, Life::Held, Life::Saved, Life::SavedHeld] {
            assert!(life.order(Order::StartAfresh).is_err(), "{life:?}");
        }
    }
}
