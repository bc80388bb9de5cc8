//! The reboot machine against a model of a host on which anything may fail.
//!
//! The model knows what each VM really is. Failures come in every kind: an
//! effect is refused, or is done and its answer is lost, or its VMM dies.
//! Whatever the interleaving, no VM is lost, none runs twice, and the outcome
//! tells the truth about each.

use std::collections::BTreeMap;

use hebe_flow::reboot::{Effect, Fate, Input, Outcome, Phase, Reboot};
use hebe_types::VmName;
use proptest::prelude::*;

/// What a VM really is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Real {
    /// One VMM runs it.
    Running,
    /// Frozen or saved, a VMM holds it.
    Held,
    /// Frozen or saved, no VMM.
    Rests,
    /// Shut down, can be booted.
    Off,
    /// KVM gave it up, and its VMM stands.
    Failed,
    /// It had failed, and its VMM was ended.
    Ended,
}

/// What happens to one effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Luck {
    Works,
    /// Refused; nothing changed.
    Refused,
    /// Done, and the answer was lost.
    AnswerLost,
    /// Done, and then the VMM died.
    VmmDied,
    /// The guest brings KVM to give its VM up.
    GivenUp,
}

#[derive(Debug)]
struct World {
    vms: BTreeMap<VmName, Real>,
    image: bool,
    services: bool,
    prepared: bool,
    jumped: bool,
    services_stopped_before_suspend: bool,
}

impl World {
    /// Does one effect and gives the input it leads to.
    fn act(&mut self, effect: &Effect, luck: Luck) -> Option<Input> {
        let works = luck == Luck::Works;
        let single = |ok: bool| {
            Some(if ok {
                Input::Done
            } else {
                Input::Failed("bad luck".into())
            })
        };
        match effect {
            Effect::Preflight => single(works),
            Effect::LoadImage => {
                self.image = luck != Luck::Refused;
                single(works)
            }
            Effect::StopServices => {
                self.services = luck == Luck::Refused;
                single(works)
            }
            Effect::Prepare => {
                self.prepared = luck != Luck::Refused;
                single(works)
            }
            Effect::Suspend(vm, fate) => Some(self.suspend(vm, *fate, luck)),
            Effect::Record => {
                let all_down = self.vms.values().all(|v| *v != Real::Running);
                assert!(all_down, "the report is written when nothing runs");
                single(works)
            }
            Effect::Jump => {
                assert!(self.vms.values().all(|v| *v != Real::Running));
                if works {
                    self.jumped = true;
                    return None;
                }
                single(false)
            }
            Effect::Thaw(vm, _) | Effect::Boot(vm) => Some(self.bring_back(vm, luck)),
            Effect::StartServices => {
                self.services |= works;
                single(works)
            }
            Effect::Unprepare => {
                self.prepared &= !works;
                single(works)
            }
            Effect::Unload => {
                self.image &= !works;
                single(works)
            }
        }
    }

    fn suspend(&mut self, vm: &VmName, fate: Fate, luck: Luck) -> Input {
        self.services_stopped_before_suspend &= !self.services;
        let real = self.vms.get_mut(vm).expect("known");
        let before = match fate {
            Fate::End => Real::Failed,
            _ => Real::Running,
        };
        assert_eq!(*real, before, "{vm} is suspended once");
        if luck != Luck::Refused {
            *real = match (fate, luck) {
                (Fate::End, _) | (Fate::Keep | Fate::Save, Luck::GivenUp) => Real::Ended,
                (Fate::ShutDown, _) => Real::Off,
                (_, Luck::VmmDied) => Real::Rests,
                _ => Real::Held,
            };
        }
        match luck {
            Luck::Works => Input::VmDone(vm.clone()),
            // One that was to be shut down is down.
            Luck::GivenUp if matches!(fate, Fate::End | Fate::ShutDown) => {
                Input::VmDone(vm.clone())
            }
            Luck::GivenUp => Input::VmOver {
                vm: vm.clone(),
                why: "KVM gave it up".into(),
            },
            luck => Input::VmFailed {
                vm: vm.clone(),
                why: "bad luck".into(),
                certain: luck == Luck::Refused,
            },
        }
    }

    fn bring_back(&mut self, vm: &VmName, luck: Luck) -> Input {
        let real = self.vms.get_mut(vm).expect("known");
        assert!(!matches!(*real, Real::Failed | Real::Ended), "{vm} is over");
        // An executor looks first; one that runs is left alone, so that it
        // never runs twice.
        if luck == Luck::Works {
            *real = Real::Running;
            return Input::VmDone(vm.clone());
        }
        Input::VmFailed {
            vm: vm.clone(),
            why: format!("{real:?}"),
            certain: true,
        }
    }
}

fn name(i: usize) -> VmName {
    format!("vm{i}").parse().expect("name")
}

fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = prop_oneof![
        Just(Fate::Keep),
        Just(Fate::Save),
        Just(Fate::ShutDown),
        Just(Fate::End)
    ];
    prop::collection::vec(fate, 0..6)
}

fn at_first(fate: Fate) -> Real {
    match fate {
        Fate::End => Real::Failed,
        _ => Real::Running,
    }
}

fn luck() -> impl Strategy<Value = Luck> {
    prop_oneof![
        8 => Just(Luck::Works),
        1 => Just(Luck::Refused),
        1 => Just(Luck::AnswerLost),
        1 => Just(Luck::VmmDied),
        1 => Just(Luck::GivenUp),
    ]
}

proptest! {
    #[test]
    fn no_vm_is_lost_and_none_runs_twice(
        fates in fates(),
        uses_image in any::<bool>(),
        lucks in prop::collection::vec(luck(), 64),
        order in prop::collection::vec(any::<prop::sample::Index>(), 64),
        abort_at in prop::option::of(0usize..30),
    ) {
        let vms: Vec<(VmName, Fate)> =
            fates.iter().enumerate().map(|(i, f)| (name(i), *f)).collect();
        let mut world = World {
            vms: vms.iter().map(|(n, fate)| (n.clone(), at_first(*fate))).collect(),
            image: false,
            services: true,
            prepared: false,
            jumped: false,
            services_stopped_before_suspend: true,
        };
        let fates = vms.clone();
        let mut machine = Reboot::new(vms, uses_image);
        let mut effects = machine.begin();
        let (mut lucks, mut order) = (lucks.into_iter(), order.into_iter());
        for step in 0.. {
            prop_assert!(step < 200, "it ends");
            if machine.outcome().is_some() || world.jumped {
                break;
            }
            if abort_at == Some(step) && machine.phase() < Phase::Jump {
                let (next, more) = machine.step(Input::Abort("operator".into())).expect("may");
                machine = next;
                effects.extend(more);
                continue;
            }
            prop_assert!(!effects.is_empty(), "something is always under way: {machine:?}");
            // Answers of VMs come in any order.
            let at = order.next().map_or(0, |i| i.index(effects.len()));
            let effect = effects.remove(at);
            let luck = lucks.next().unwrap_or(Luck::Works);
            if let Some(input) = world.act(&effect, luck) {
                let (next, more) = machine.step(input).expect("in order");
                machine = next;
                effects.extend(more);
            }
        }
        prop_assert!(world.services_stopped_before_suspend, "R-22");
        if world.jumped {
            let down = |v: &Real| !matches!(v, Real::Running | Real::Failed);
            prop_assert!(world.vms.values().all(down));
            prop_assert_eq!(world.image, uses_image);
            return Ok(());
        }
        match machine.outcome().expect("ended") {
            Outcome::Refused(_) => {
                prop_assert!(world.services && !world.image && !world.prepared);
                for (vm, fate) in &fates {
                    prop_assert_eq!(world.vms[vm], at_first(*fate));
                }
            }
            Outcome::Aborted { stranded, notes, .. } => {
                for (vm, fate) in &fates {
                    let real = world.vms[vm];
                    let listed = stranded.iter().any(|(name, _)| name == vm);
                    // One that had failed before it began is no loss of its.
                    let lost = real != Real::Running && *fate != Fate::End;
                    prop_assert_eq!(lost, listed, "{} {:?}", vm, real);
                }
                if notes.is_empty() {
                    prop_assert!(world.services && !world.image && !world.prepared);
                }
            }
        }
    }
}

#[test]
fn an_answer_out_of_order_is_refused_and_changes_nothing() {
    let machine = Reboot::new([(name(0), Fate::Keep)], true);
    assert!(machine.clone().step(Input::VmDone(name(0))).is_err());
    let (machine, _) = machine.step(Input::Done).expect("checked");
    let unknown = Input::VmFailed {
        vm: name(7),
        why: String::new(),
        certain: true,
    };
    assert!(machine.step(unknown).is_err());
}
