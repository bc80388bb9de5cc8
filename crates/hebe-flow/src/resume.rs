//! What to do with each VM after a start of the host, decided from facts that
//! outlive it alone.
//!
//! The facts are: the store's segments and the state that each commits to, the
//! saved files, the list of VMs to boot, and which VMs have a living VMM. The
//! host may have stopped between any two writes; so every combination has an
//! answer, and the answers obey two rules:
//!
//! 1. RAM never meets a disk that went on without it. A state (frozen or saved)
//!    is used only where nothing shows that the VM ran after it.
//! 2. Nothing that could still be resumed is ever given up by a plan.
//!
//! | segment's state | saved file | pending | decision |
//! |---|---|---|---|
//! | frozen | – | any | resume |
//! | frozen, and nothing says whether it was started since | – | any | left: a person must choose |
//! | frozen | file | any | left frozen: two states, a person must choose |
//! | running, by a VMM that lives | any | any | already up |
//! | running, VMM or host gone | complete | any | restore (the VM did not run after the save) |
//! | running, VMM or host gone | being restored, into this segment | any | lost: it ran after the restore began |
//! | running, VMM or host gone | – | yes | boot |
//! | running, VMM or host gone | – | no | lost |
//! | empty | complete, or being restored into this segment | any | restore: the new segment never ran |
//! | empty | – | yes | boot |
//! | empty | – | no | clean up |
//! | ended | complete | any | restore (the VM ended when it was saved) |
//! | ended | being restored, into this segment | any | lost: it ran after the restore began |
//! | running, ended or empty | being restored, not into this segment | any | interrupted: a person must choose |
//! | ended | – | yes | boot |
//! | ended | – | no | clean up |
//! | none | complete | any | restore |
//! | none | being restored | any | interrupted: a person must choose |
//! | none | – | yes | boot |
//! | damaged | any | any | left where it is, with the reason |
//! | more than one segment | any | any | left where they are |
//! | frozen, and given up since | complete | any | restore |
//! | frozen, and given up since | being restored | any | a person must choose |
//! | frozen, and given up since | – | yes | boot |
//! | frozen, and given up since | – | no | lost: its disks went on |
//! | none; frozen in a store that is not here | – | any | lost: never booted unasked |
//! | none; frozen in a store that is not here | file | any | left: a person must choose |
//! | any, mapped by a VMM that nobody can reach | any | any | left, whatever the segment says |
//! | running, ended or none; it failed before the host's reboot | – | yes | boot |
//! | running, ended or none; it failed before the host's reboot | – | no | lost, for that reason |

use std::collections::{BTreeMap, BTreeSet};

use hebe_types::{SegmentId, VmId, VmName};
use serde::{Deserialize, Serialize};

/// What a segment's execution area says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecFact {
    /// Nothing: no VM ever ran in it.
    Empty,
    /// A VM ran in it and ended: nothing can be resumed, and a file that it was
    /// restored from is older than its disks.
    Ended,
    /// A VMM ran it last, and no state was committed since.
    Running,
    /// A state is committed.
    Frozen,
    /// A state is committed, and the VM was started or given up since, while
    /// its store was not there.
    GivenUp,
    /// Unreadable.
    Damaged(String),
}

/// One segment of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentFact {
    /// Its record in the table.
    pub id: SegmentId,
    /// Its VM; `None` where the record cannot be read.
    pub name: Option<VmName>,
    /// The life of that VM that it belongs to; `None` likewise.
    pub vm: Option<VmId>,
    /// Its state.
    pub exec: ExecFact,
}

/// A saved file of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedFact {
    /// Complete, and the VM did not run since.
    Complete,
    /// A restore from it began and its end was not recorded.
    Restoring {
        /// The life in whose segment it began; `None` where it began in memory
        /// that is no segment, or nobody knows: no segment tells then whether
        /// the VM ran, for one of another life, or of this one before it was
        /// saved, may be there.
        into: Option<VmId>,
    },
}

impl SavedFact {
    /// Whether a restore from it began.
    pub fn is_restoring(self) -> bool {
        matches!(self, Self::Restoring { .. })
    }

    /// Whether a restore from it began in the segment of the life `vm`.
    pub fn is_restoring_into(self, vm: Option<VmId>) -> bool {
        let Self::Restoring { into } = self else {
            return false;
        };
        into.is_some() && into == vm
    }
}

/// Everything that a plan is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The store's segments.
    pub segments: Vec<SegmentFact>,
    /// Saved files.
    pub saved: BTreeMap<VmName, SavedFact>,
    /// VMs that a cold reboot shut down, to be booted.
    pub pending: BTreeSet<VmName>,
    /// VMs that are to run whenever the host does.
    pub autostart: BTreeSet<VmName>,
    /// VMs whose VMM lives.
    pub alive: BTreeSet<VmName>,
    /// VMs whose VMM lives, has the segment mapped, and cannot be reached; with
    /// one sentence that says so and the way out.
    pub stranded: BTreeMap<VmName, String>,
    /// VMs that were frozen in a store that is not here; with one sentence that
    /// says so and the ways out.
    pub elsewhere: BTreeMap<VmName, String>,
    /// Frozen VMs of which no note says whether they were started since; with
    /// one sentence that says so and the ways out.
    pub unnoted: BTreeMap<VmName, String>,
    /// VMs that failed and were ended by a reboot of the host; each with why.
    pub failed: BTreeMap<VmName, String>,
}

/// What to do with one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// Its VMM lives: nothing.
    Already,
    /// Resume from memory.
    Resume {
        /// The segment with the committed state.
        segment: SegmentId,
    },
    /// Restore from its saved file, after dropping the stale segment, if any.
    Restore {
        /// The segment that the file makes stale.
        stale: Option<SegmentId>,
    },
    /// Boot from its definition, after dropping the old segment, if any.
    Boot {
        /// The segment of the VM's former life.
        stale: Option<SegmentId>,
    },
    /// Drop a segment in which nothing ever ran, or whose VM ended.
    Clean {
        /// Which.
        segment: SegmentId,
    },
    /// It can be resumed or looked at, but not without a person's choice.
    Leave {
        /// One sentence, with the way out.
        reason: String,
    },
    /// It ran when its VMM or host stopped: what its CPUs held is gone.
    Lost {
        /// One sentence, with the way out.
        reason: String,
    },
}

/// Decides for every VM that the facts name. Segments that name no VM are not
/// in the answer: they stay as they are, and `store list` shows them.
pub fn plan(facts: &Facts) -> BTreeMap<VmName, Decision> {
    let mut segments: BTreeMap<&VmName, Vec<&SegmentFact>> = BTreeMap::new();
    for segment in &facts.segments {
        if let Some(name) = &segment.name {
            segments.entry(name).or_default().push(segment);
        }
    }
    let names: BTreeSet<&VmName> = segments
        .keys()
        .copied()
        .chain(facts.saved.keys())
        .chain(&facts.pending)
        .chain(&facts.autostart)
        .chain(&facts.alive)
        .chain(facts.stranded.keys())
        .chain(facts.elsewhere.keys())
        .chain(facts.failed.keys())
        .collect();
    names
        .into_iter()
        .map(|name| {
            let own = segments.get(name).map_or(&[][..], Vec::as_slice);
            (name.clone(), decide(facts, name, own))
        })
        .collect()
}

fn decide(facts: &Facts, name: &VmName, segments: &[&SegmentFact]) -> Decision {
    if facts.alive.contains(name) {
        return Decision::Already;
    }
    if let Some(reason) = facts.stranded.get(name) {
        let reason = reason.clone();
        return Decision::Leave { reason };
    }
    let saved = facts.saved.get(name).copied();
    let boot = facts.pending.contains(name) || facts.autostart.contains(name);
    let decision = match segments {
        [] => without_segment(name, saved),
        [one] => with_segment(name, one, saved, boot),
        more => Decision::Leave {
            reason: format!(
                "{} segments bear the name '{name}': look at them with `hebe store list` and drop all but one with `hebe store drop`",
                more.len()
            ),
        },
    };
    match (facts.elsewhere.get(name), decision) {
        (Some(reason), Decision::Boot { .. }) => Decision::Lost {
            reason: reason.clone(),
        },
        (Some(reason), Decision::Restore { .. }) => Decision::Leave {
            reason: format!("it is saved in a file, too, and {reason}"),
        },
        (_, Decision::Resume { .. }) if facts.unnoted.contains_key(name) => Decision::Leave {
            reason: facts.unnoted[name].clone(),
        },
        (_, Decision::Boot { .. } | Decision::Clean { .. } | Decision::Lost { .. })
            if !boot && facts.failed.contains_key(name) =>
        {
            Decision::Lost {
                reason: ended(name, &facts.failed[name]),
            }
        }
        (_, decision) => decision,
    }
}

fn interrupted(name: &VmName) -> Decision {
    Decision::Leave {
        reason: format!(
            "a restore was interrupted and nothing shows whether the VM ran: `hebe resume {name} --again` if it did not, `hebe drop {name} --yes` otherwise"
        ),
    }
}

fn without_segment(name: &VmName, saved: Option<SavedFact>) -> Decision {
    match saved {
        Some(SavedFact::Complete) => Decision::Restore { stale: None },
        Some(SavedFact::Restoring { .. }) => interrupted(name),
        // Named by the list or by its definition only.
        None => Decision::Boot { stale: None },
    }
}

fn with_segment(
    name: &VmName,
    segment: &SegmentFact,
    saved: Option<SavedFact>,
    boot: bool,
) -> Decision {
    let id = segment.id;
    let stale = Some(id);
    match (&segment.exec, saved) {
        (ExecFact::Damaged(reason), _) => Decision::Leave {
            reason: format!(
                "its state in segment {id} cannot be used ({reason}): `hebe drop {name} --yes` gives it up"
            ),
        },
        (ExecFact::Frozen, None) => Decision::Resume { segment: id },
        (ExecFact::Frozen, Some(_)) => Decision::Leave {
            reason: format!(
                "it is frozen in memory and saved in a file, and only one of them may run: `hebe resume {name} --from memory` or `--from file`"
            ),
        },
        (ExecFact::GivenUp, Some(SavedFact::Restoring { .. })) => interrupted(name),
        (_, Some(SavedFact::Complete)) => Decision::Restore { stale },
        (_, Some(fact)) if !fact.is_restoring_into(segment.vm) => interrupted(name),
        (ExecFact::Empty, Some(_)) => Decision::Restore { stale },
        (ExecFact::Running | ExecFact::Ended, Some(_)) => Decision::Lost {
            reason: format!(
                "it ran after its restore and stopped without a state: `hebe start {name}` boots it"
            ),
        },
        (ExecFact::Running | ExecFact::Ended | ExecFact::Empty | ExecFact::GivenUp, None)
            if boot =>
        {
            Decision::Boot { stale }
        }
        (ExecFact::GivenUp, None) => Decision::Lost {
            reason: given_up(name, id),
        },
        (ExecFact::Running, None) => Decision::Lost {
            reason: format!(
                "its VMM or the host stopped while it ran: `hebe start {name}` boots it, `hebe drop {name}` frees its memory"
            ),
        },
        (ExecFact::Empty | ExecFact::Ended, None) => Decision::Clean { segment: id },
    }
}

fn ended(name: &VmName, why: &str) -> String {
    format!(
        "{why}: `hebe start {name}` boots it, `hebe drop {name}` forgets it and frees its memory"
    )
}

/// What is said of a VM whose frozen memory was given up while its store was
/// not there.
pub fn given_up(name: &VmName, segment: SegmentId) -> String {
    format!(
        "its memory in segment {segment} was given up while this store was not there, and its disks went on since: `hebe start {name}` boots it, `hebe drop {name}` frees the memory"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> VmName {
        "web".parse().expect("name")
    }

    const VM: Option<VmId> = Some(VmId([7; 16]));
    /// Into the segment that [`segment`] gives.
    const RESTORING: SavedFact = SavedFact::Restoring { into: VM };

    fn segment(exec: ExecFact) -> SegmentFact {
        SegmentFact {
            id: SegmentId(3),
            name: Some(name()),
            vm: VM,
            exec,
        }
    }

    fn decided(exec: Option<ExecFact>, saved: Option<SavedFact>, pending: bool) -> Decision {
        let facts = Facts {
            segments: exec.map(segment).into_iter().collect(),
            saved: saved.map(|s| (name(), s)).into_iter().collect(),
            pending: pending.then(name).into_iter().collect(),
            ..Facts::default()
        };
        plan(&facts).remove(&name()).unwrap_or(Decision::Already)
    }

    const STALE: Option<SegmentId> = Some(SegmentId(3));

    #[test]
    fn a_frozen_vm_that_nothing_tells_of_is_left() {
        let web: VmName = "web".parse().expect("name");
        let mut facts = Facts {
            segments: vec![SegmentFact {
                id: SegmentId(1),
                name: Some(web.clone()),
                vm: VM,
                exec: ExecFact::Frozen,
            }],
            pending: BTreeSet::from([web.clone()]),
            ..Facts::default()
        };
        let resume = Decision::Resume {
            segment: SegmentId(1),
        };
        assert_eq!(plan(&facts)[&web], resume);
        let reason = "not mounted".to_owned();
        facts.unnoted.insert(web.clone(), reason.clone());
        assert_eq!(plan(&facts)[&web], Decision::Leave { reason });
        facts.alive.insert(web.clone());
        assert_eq!(plan(&facts)[&web], Decision::Already);
    }

    /// What had failed before the host's reboot is treated as what crashed: it is
    /// booted where something says so, and otherwise listed with the reason.
    #[test]
    fn a_vm_that_failed_is_booted_by_its_rules_alone_and_never_forgotten() {
        let web = name();
        for exec in [None, Some(ExecFact::Running), Some(ExecFact::Ended)] {
            let mut facts = Facts {
                segments: exec.clone().map(segment).into_iter().collect(),
                failed: BTreeMap::from([(web.clone(), "KVM gave it up".to_owned())]),
                ..Facts::default()
            };
            let Decision::Lost { reason } = &plan(&facts)[&web] else {
                panic!("{exec:?}: {:?}", plan(&facts));
            };
            assert!(reason.contains("KVM gave it up") && reason.contains("hebe start web"));
            for list in ["pending", "autostart"] {
                let set = BTreeSet::from([web.clone()]);
                let (pending, autostart) = match list {
                    "pending" => (set, BTreeSet::new()),
                    _ => (BTreeSet::new(), set),
                };
                let facts = Facts {
                    pending,
                    autostart,
                    ..facts.clone()
                };
                let decision = &plan(&facts)[&web];
                assert!(matches!(decision, Decision::Boot { .. }), "{decision:?}");
            }
            // A state that can be continued is of another life, and is.
            facts.segments = vec![segment(ExecFact::Frozen)];
            assert!(matches!(plan(&facts)[&web], Decision::Resume { .. }));
            facts.segments.clear();
            facts.saved = BTreeMap::from([(web.clone(), SavedFact::Complete)]);
            assert!(matches!(plan(&facts)[&web], Decision::Restore { .. }));
        }
    }

    #[test]
    fn a_frozen_vm_is_resumed_unless_a_file_contradicts() {
        for pending in [false, true] {
            assert_eq!(
                decided(Some(ExecFact::Frozen), None, pending),
                Decision::Resume {
                    segment: SegmentId(3)
                }
            );
            for saved in [SavedFact::Complete, RESTORING] {
                let decision = decided(Some(ExecFact::Frozen), Some(saved), pending);
                assert!(matches!(decision, Decision::Leave { .. }), "{decision:?}");
            }
        }
    }

    #[test]
    fn old_ram_never_meets_a_newer_disk() {
        // Saved, then the host left: the segment holds what ran before the save.
        for pending in [false, true] {
            let decision = decided(Some(ExecFact::Running), Some(SavedFact::Complete), pending);
            assert_eq!(decision, Decision::Restore { stale: STALE });
            let decision = decided(Some(ExecFact::Ended), Some(SavedFact::Complete), pending);
            assert_eq!(decision, Decision::Restore { stale: STALE });
            // The restored VM ran: the file is old now, even if it ended well.
            for ran in [ExecFact::Running, ExecFact::Ended] {
                let decision = decided(Some(ran), Some(RESTORING), pending);
                assert!(matches!(decision, Decision::Lost { .. }), "{decision:?}");
            }
        }
        // Started afresh while the store was away: the disk is the newer one.
        let given_up = |saved, pending| decided(Some(ExecFact::GivenUp), saved, pending);
        assert!(matches!(given_up(None, false), Decision::Lost { .. }));
        let boot = given_up(None, true);
        assert_eq!(boot, Decision::Boot { stale: STALE });
        let restore = given_up(Some(SavedFact::Complete), false);
        assert_eq!(restore, Decision::Restore { stale: STALE });
        let choice = given_up(Some(RESTORING), false);
        assert!(matches!(choice, Decision::Leave { .. }), "{choice:?}");
        // Nothing shows whether it ran: not decided here.
        let decision = decided(None, Some(RESTORING), false);
        assert!(matches!(decision, Decision::Leave { .. }), "{decision:?}");
    }

    /// Only the segment that the file was being restored into tells what became
    /// of that: another may be of a former life, or of this one before the save.
    #[test]
    fn a_restore_is_judged_by_its_own_segment_alone() {
        let other = Some(VmId([8; 16]));
        for exec in [ExecFact::Empty, ExecFact::Ended, ExecFact::Running] {
            for (into, vm) in [(None, VM), (VM, other), (VM, None), (None, None)] {
                for pending in [false, true] {
                    let facts = Facts {
                        segments: vec![SegmentFact {
                            vm,
                            ..segment(exec.clone())
                        }],
                        saved: [(name(), SavedFact::Restoring { into })].into(),
                        pending: pending.then(name).into_iter().collect(),
                        ..Facts::default()
                    };
                    let decision = plan(&facts).remove(&name());
                    let choice = |reason: &String| reason.contains("--again");
                    assert!(
                        matches!(&decision, Some(Decision::Leave { reason }) if choice(reason)),
                        "{exec:?} {into:?} {vm:?}: {decision:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_restore_that_never_ran_is_repeated() {
        let decision = decided(Some(ExecFact::Empty), Some(RESTORING), false);
        assert_eq!(decision, Decision::Restore { stale: STALE });
        let decision = decided(None, Some(SavedFact::Complete), true);
        assert_eq!(decision, Decision::Restore { stale: None });
    }

    #[test]
    fn pending_vms_boot_and_others_that_ran_are_listed_as_lost() {
        let boot = |stale| Decision::Boot { stale };
        assert_eq!(decided(None, None, true), boot(None));
        assert_eq!(decided(Some(ExecFact::Running), None, true), boot(STALE));
        assert_eq!(decided(Some(ExecFact::Empty), None, true), boot(STALE));
        assert_eq!(decided(Some(ExecFact::Ended), None, true), boot(STALE));
        let lost = decided(Some(ExecFact::Running), None, false);
        assert!(matches!(lost, Decision::Lost { .. }));
        let clean = decided(Some(ExecFact::Empty), None, false);
        assert_eq!(
            clean,
            Decision::Clean {
                segment: SegmentId(3)
            }
        );
    }

    /// Its memory may be there when the next kernel has the store again.
    #[test]
    fn a_vm_that_is_frozen_elsewhere_is_not_brought_to_life_unasked() {
        let mut facts = Facts {
            elsewhere: [(name(), "in store X".to_owned())].into(),
            ..Facts::default()
        };
        let lost = |facts: &Facts| plan(facts).remove(&name());
        for _ in 0..2 {
            let found = lost(&facts);
            assert!(
                matches!(&found, Some(Decision::Lost { reason }) if reason == "in store X"),
                "{found:?}"
            );
            facts.autostart.insert(name());
            facts.pending.insert(name());
        }
        facts.saved.insert(name(), SavedFact::Complete);
        let found = lost(&facts);
        assert!(matches!(found, Some(Decision::Leave { .. })), "{found:?}");
    }

    #[test]
    fn damage_costs_the_damaged_vm_only() {
        let mut facts = Facts::default();
        facts
            .segments
            .push(segment(ExecFact::Damaged("checksum".into())));
        facts.segments.push(SegmentFact {
            id: SegmentId(4),
            name: Some("db".parse().expect("name")),
            vm: VM,
            exec: ExecFact::Frozen,
        });
        facts.segments.push(SegmentFact {
            id: SegmentId(5),
            name: None,
            vm: None,
            exec: ExecFact::Damaged("record".into()),
        });
        let plan = plan(&facts);
        assert_eq!(plan.len(), 2);
        let damaged = &plan[&name()];
        assert!(
            matches!(damaged, Decision::Leave { reason } if reason.contains("checksum")),
            "{damaged:?}"
        );
        let db: VmName = "db".parse().expect("name");
        assert_eq!(
            plan[&db],
            Decision::Resume {
                segment: SegmentId(4)
            }
        );
    }

    #[test]
    fn no_decision_gives_up_a_state_that_could_be_resumed() {
        let execs = [
            None,
            Some(ExecFact::Empty),
            Some(ExecFact::Ended),
            Some(ExecFact::Running),
            Some(ExecFact::Frozen),
            Some(ExecFact::GivenUp),
            Some(ExecFact::Damaged("x".into())),
        ];
        let files = [None, Some(SavedFact::Complete), Some(RESTORING)];
        for exec in &execs {
            for saved in files {
                for pending in [false, true] {
                    let decision = decided(exec.clone(), saved, pending);
                    let drops = match decision {
                        Decision::Restore { stale } | Decision::Boot { stale } => stale.is_some(),
                        Decision::Clean { .. } => true,
                        _ => false,
                    };
                    let precious = matches!(exec, Some(ExecFact::Frozen | ExecFact::Damaged(_)));
                    assert!(!(drops && precious), "{exec:?} {saved:?}: {decision:?}");
                    let boots = matches!(decision, Decision::Boot { .. });
                    assert!(!(boots && saved.is_some()), "{exec:?} {saved:?}");
                }
            }
        }
    }

    #[test]
    fn a_living_vmm_is_left_alone_whatever_else_is_found() {
        let mut facts = Facts::default();
        facts.segments.push(segment(ExecFact::Frozen));
        facts.alive.insert(name());
        facts.saved.insert(name(), SavedFact::Complete);
        assert_eq!(plan(&facts)[&name()], Decision::Already);
        // One that cannot be reached still has the memory.
        for exec in [ExecFact::Frozen, ExecFact::Running, ExecFact::Empty] {
            let facts = Facts {
                segments: vec![segment(exec)],
                pending: [name()].into(),
                stranded: [(name(), "process 7".to_owned())].into(),
                ..Facts::default()
            };
            let left = plan(&facts).remove(&name());
            assert!(
                matches!(&left, Some(Decision::Leave { reason }) if reason == "process 7"),
                "{left:?}"
            );
        }
    }
}
