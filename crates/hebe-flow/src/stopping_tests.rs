//! Tests of [`super`].

use super::*;

fn name(text: &str) -> VmName {
    text.parse().expect("name")
}

const WARM: Ground = Ground {
    store: true,
    carried: false,
    wish: Wish::Save,
    ordered: None,
};
const COLD: Ground = Ground {
    store: false,
    ..WARM
};

#[test]
fn where_the_host_goes_is_read_from_the_queue() {
    let jobs = "\
 203 systemd-kexec.service   start waiting
 201 kexec.target            start waiting
 210 shutdown.target         start waiting
 250 ssh.service             stop  running
";
    assert_eq!(Going::from_jobs(jobs), Going::Kexec);
    let of = |unit: &str| {
        Going::from_jobs(&format!(
            "1 {unit} start waiting\n2 shutdown.target start waiting"
        ))
    };
    assert_eq!(of("reboot.target"), Going::Reset);
    assert_eq!(of("poweroff.target"), Going::Off);
    assert_eq!(of("halt.target"), Going::Off);
    assert_eq!(of("soft-reboot.target"), Going::SoftReboot);
    // A target of another release, or somebody's own.
    assert_eq!(of("factory-reset.target"), Going::Reset);
    // What is stopped is no place to go to, and neither is a word in a title.
    for stays in [
        "",
        "No jobs running.",
        "7 hebe-freeze.service stop running",
        "7 kexec.target stop running",
        "kexec.target start waiting",
        "7 rescue.target start waiting",
    ] {
        assert_eq!(Going::from_jobs(stays), Going::Stays, "{stays}");
    }
    let both = "1 kexec.target start waiting\n2 reboot.target start waiting\n";
    assert_eq!(Going::from_jobs(both), Going::Reset, "memory may be lost");
}

#[test]
fn what_is_tried_follows_from_where_memory_lies() {
    use Fate::{Keep, Save, ShutDown};
    let of = |life, memory, ground: &Ground| chain(life, memory, ground);
    assert_eq!(
        of(Life::Running, Memory::Store, &WARM),
        [Keep, Save, ShutDown]
    );
    assert_eq!(of(Life::Running, Memory::Process, &WARM), [Save, ShutDown]);
    assert_eq!(of(Life::Running, Memory::Files, &WARM), [Save, ShutDown]);
    assert_eq!(of(Life::Running, Memory::Store, &COLD), [Save, ShutDown]);
    let shutdown = Ground {
        wish: Wish::Shutdown,
        ..COLD
    };
    assert_eq!(of(Life::Paused, Memory::Store, &shutdown), [ShutDown, Save]);
    // What is frozen stays where it survives, and is saved where it does not.
    assert!(of(Life::Frozen, Memory::Store, &WARM).is_empty());
    assert!(of(Life::Held, Memory::Store, &WARM).is_empty());
    assert_eq!(of(Life::Frozen, Memory::Store, &COLD), [Save, ShutDown]);
    assert_eq!(of(Life::Held, Memory::Store, &shutdown), [Save, ShutDown]);
    for life in [
        Life::Saved,
        Life::SavedHeld,
        Life::Absent,
        Life::Crashed,
        Life::Lost,
    ] {
        assert!(of(life, Memory::Store, &COLD).is_empty(), "{life:?}");
    }
    // What KVM gave up is not asked for anything, wherever it lies.
    for memory in [Memory::Store, Memory::Files, Memory::Process] {
        for ground in [&WARM, &COLD, &shutdown] {
            assert_eq!(of(Life::Failed, memory, ground), [Fate::End]);
        }
    }
    let ordered = |method| Ground {
        ordered: Some(method),
        ..WARM
    };
    let saved = ordered(RebootMethod::Saved);
    assert_eq!(of(Life::Running, Memory::Store, &saved), [Save, ShutDown]);
    let cold = ordered(RebootMethod::Cold);
    assert_eq!(of(Life::Running, Memory::Store, &cold), [ShutDown, Save]);
    let warm = ordered(RebootMethod::Warm);
    assert_eq!(
        of(Life::Running, Memory::Store, &warm),
        [Keep, Save, ShutDown]
    );
}

/// Every VM that has a VMM is asked for something that survives.
#[test]
fn no_vm_that_is_up_is_left_out() {
    for life in [Life::Running, Life::Paused, Life::Starting, Life::Stopping] {
        for memory in [Memory::Store, Memory::Files, Memory::Process] {
            for ground in [WARM, COLD] {
                assert!(
                    !chain(life, memory, &ground).is_empty(),
                    "{life:?} {memory:?}"
                );
            }
        }
    }
}

fn all(machine: Stopping, inputs: Vec<Input>) -> (Stopping, Vec<Effect>) {
    let mut last = Vec::new();
    let mut machine = machine;
    for input in inputs {
        (machine, last) = machine.step(input).expect("in order");
    }
    (machine, last)
}

#[test]
fn what_takes_long_comes_first_and_all_others_freeze_at_once() {
    use Fate::{Keep, Save, ShutDown};
    let keep = vec![Keep, Save, ShutDown];
    let vms = [
        (name("a"), keep.clone()),
        (name("b"), keep),
        (name("slow"), vec![Save, ShutDown]),
        (name("off"), vec![]),
    ];
    let machine = Stopping::new(vms);
    assert_eq!(machine.begin(), [Effect::Prepare]);
    let (machine, effects) = all(machine, vec![Input::Done]);
    assert_eq!(effects, [Effect::Suspend(name("slow"), Save)]);
    let (machine, effects) = all(machine, vec![Input::VmDone(name("slow"), Save)]);
    let freeze = ["a", "b"].map(|vm| Effect::Suspend(name(vm), Keep));
    assert_eq!(effects, freeze);
    // One refuses: it is saved, then shut down, and the other one waits.
    let (machine, effects) = all(
        machine,
        vec![
            Input::VmDone(name("b"), Keep),
            Input::VmFailed(name("a"), "its disk is gone".into()),
        ],
    );
    assert_eq!(effects, [Effect::Suspend(name("a"), Save)]);
    let (machine, effects) = all(machine, vec![Input::VmFailed(name("a"), "no room".into())]);
    assert_eq!(effects, [Effect::Suspend(name("a"), ShutDown)]);
    let (machine, effects) = all(machine, vec![Input::VmDone(name("a"), ShutDown)]);
    assert_eq!(effects, [Effect::Record]);
    let (machine, _) = all(machine, vec![Input::Done]);
    assert_eq!(machine.phase(), Phase::Ended);
    let ends = machine.ends();
    assert_eq!(ends[0].fate, Some(ShutDown));
    assert_eq!(ends[0].failures.len(), 2);
    assert_eq!(ends[1].fate, Some(Keep));
    assert_eq!((ends[2].fate, ends[2].failures.len()), (None, 0));
}

#[test]
fn nothing_that_fails_stops_it() {
    let vms = [(name("a"), vec![Fate::Keep]), (name("b"), vec![Fate::Save])];
    let machine = Stopping::new(vms);
    let (machine, _) = all(
        machine,
        vec![
            Input::Failed("the disk is full".into()),
            Input::VmFailed(name("b"), "x".into()),
            Input::VmFailed(name("a"), "y".into()),
            Input::Failed("no report".into()),
        ],
    );
    assert_eq!(machine.phase(), Phase::Ended);
    assert_eq!(machine.notes(), ["the disk is full", "no report"]);
    assert!(machine.ends().iter().all(|end| end.fate.is_none()));
    // A host without VMs has nothing to wait for.
    let (machine, effects) = all(Stopping::new([]), vec![Input::Done]);
    assert_eq!(
        (machine.phase(), effects),
        (Phase::Record, vec![Effect::Record])
    );
}

#[test]
fn answers_that_nobody_waits_for_are_refused() {
    let machine = Stopping::new([(name("a"), vec![Fate::Keep])]);
    let early = machine.clone().step(Input::VmDone(name("a"), Fate::Keep));
    assert!(early.is_err());
    let (machine, _) = all(machine, vec![Input::Done]);
    let stranger = machine.clone().step(Input::VmDone(name("z"), Fate::Keep));
    assert!(stranger.is_err());
    let (machine, _) = all(machine, vec![Input::VmDone(name("a"), Fate::Keep)]);
    let twice = machine.step(Input::VmFailed(name("a"), String::new()));
    assert!(twice.is_err());
}

/// A model of a driver that answers at random, in any order.
#[test]
fn every_vm_is_tried_to_the_end_of_its_chain_or_holds() {
    for seed in 0..2000u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let chains = [
            vec![Fate::Keep, Fate::Save, Fate::ShutDown],
            vec![Fate::Save, Fate::ShutDown],
            vec![Fate::ShutDown, Fate::Save],
            vec![],
        ];
        let vms: Vec<_> = (0..random(6))
            .map(|n| (name(&format!("vm{n}")), chains[random(4) as usize].clone()))
            .collect();
        let mut machine = Stopping::new(vms.clone());
        let mut open: Vec<Effect> = machine.begin();
        let (mut frozen_begun, mut asked) = (false, 0);
        while machine.phase() != Phase::Ended {
            assert!(!open.is_empty(), "seed {seed}: it waits for nothing");
            let effect = open.swap_remove(random(open.len() as u64) as usize);
            let good = random(2) == 0;
            let input = match effect {
                Effect::Suspend(vm, fate) => {
                    asked += 1;
                    frozen_begun |= fate == Fate::Keep;
                    let first = vms.iter().find(|(n, _)| *n == vm).expect("known").1[0];
                    assert!(
                        fate == Fate::Keep || first == Fate::Keep || !frozen_begun,
                        "seed {seed}: {vm} is set aside while others stand still"
                    );
                    if good {
                        Input::VmDone(vm, fate)
                    } else {
                        Input::VmFailed(vm, "no".into())
                    }
                }
                _ if good => Input::Done,
                _ => Input::Failed("no".into()),
            };
            let (next, more) = machine.step(input).expect("in order");
            machine = next;
            open.extend(more);
        }
        assert!(open.is_empty(), "seed {seed}: {open:?}");
        let tried: usize = machine.ends().iter().map(|end| end.failures.len()).sum();
        let held = machine.ends().iter().filter(|e| e.fate.is_some()).count();
        assert_eq!(tried + held, asked, "seed {seed}");
        for (end, (_, chain)) in machine.ends().iter().zip(&vms) {
            assert!(
                end.fate.is_some() || end.failures.len() == chain.len(),
                "seed {seed}: {end:?}"
            );
        }
    }
}
