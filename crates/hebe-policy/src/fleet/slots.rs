//! The slots of a group: what is written down of each host that is under way,
//! and whether another one may begin.
//!
//! Who keeps the slots (`hebe-fleet` talks to them) only has to change them
//! one at a time; what may be changed is decided here, from all of them at one
//! instant.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::span::Span;

/// Longest name of a group or host.
const NAME_LEN_MAX: usize = 64;
/// Version of [`Slot`] as it is written down.
pub const SLOT_VERSION: u32 = 1;

/// A name of a group or of a host: 1 to 64 of `A-Z a-z 0-9 . _ -`, not
/// beginning with a dot or a dash, so that it may stand in a key, a URL or a
/// command line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FleetName(String);

/// The text is no name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "'{0}' is no name of a host or group: write 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
)]
pub struct InvalidFleetName(pub String);

impl FleetName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for FleetName {
    type Err = InvalidFleetName;

    fn from_str(text: &str) -> Result<Self, InvalidFleetName> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for FleetName {
    type Error = InvalidFleetName;

    fn try_from(text: String) -> Result<Self, InvalidFleetName> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if begins && text.len() <= NAME_LEN_MAX && text.chars().all(fits) {
            Ok(Self(text))
        } else {
            Err(InvalidFleetName(text))
        }
    }
}

impl From<FleetName> for String {
    fn from(name: FleetName) -> Self {
        name.0
    }
}

impl fmt::Display for FleetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far the holder of a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It looks whether it can reboot; the slot is leased and goes by itself
    /// if the holder dies.
    Held,
    /// It reboots, or may: the slot stays until somebody releases it.
    Rebooting,
    /// Its new kernel runs and waits for its VMs.
    Verifying,
}

impl Phase {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Rebooting => "rebooting",
            Self::Verifying => "verifying",
        }
    }
}

/// What is written down of a host that is under way. Times are wall clock, in
/// seconds since 1970: a wrong clock makes others judge a host too early or
/// too late, and never takes its slot away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// [`SLOT_VERSION`].
    pub version: u32,
    /// Whose it is.
    pub host: FleetName,
    /// The machine that took it, as `/etc/machine-id` says, empty where there
    /// is none: two hosts that bear the same name are told apart by it.
    pub machine: String,
    /// How far it is.
    pub phase: Phase,
    /// The order that took it: random, so that an order knows its own slot.
    pub claim: String,
    /// The boot in which it was taken, as `/proc/sys/kernel/random/boot_id`
    /// says; another one says that the host rebooted since.
    pub boot_id: String,
    /// When it was taken.
    pub since_s: u64,
    /// When the host is to be back, all its VMs answering.
    pub deadline_s: u64,
    /// How many hosts may be under way at once, as the holder was told.
    pub at_most: u32,
    /// VMs that ran when it was taken for good: they have to answer.
    pub vms: BTreeSet<String>,
}

impl Slot {
    /// Whether its host counts as not having come back.
    pub fn is_overdue(&self, now_s: u64) -> bool {
        self.phase != Phase::Held && now_s > self.deadline_s
    }
}

/// A slot as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// As it should be.
    Slot(Slot),
    /// Something that this Hebe does not read. It counts.
    Unreadable {
        /// Whose it is, by its name.
        host: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Found {
    /// Whose it is.
    pub fn host(&self) -> &str {
        match self {
            Self::Slot(slot) => slot.host.as_str(),
            Self::Unreadable { host, .. } => host,
        }
    }
}

/// Whether a host may have a slot now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Take {
    /// There is one.
    Free,
    /// It has one already, taken for good in this boot of it: by `hebe fleet
    /// lock`, or by an order that ended before it could release it.
    Mine(Slot),
    /// Not now.
    Not(Full),
}

/// Why there is no slot now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// As many as may are under way.
    #[error("as many hosts as may be are under way ({} of at most {at_most}): {}", hosts.len(), hosts.join(", "))]
    Taken {
        /// Who.
        hosts: Vec<String>,
        /// How many may be; the smallest number that any of them was told.
        at_most: u32,
    },
    /// A host did not come back.
    #[error(
        "host '{host}' was to be back {} ago and is not: it keeps its slot, and no host of the group begins; look after it, then let it release its slot, or say `hebe fleet unlock {host} --yes`",
        Span::seconds(*late_s)
    )]
    NotBack {
        /// Which.
        host: String,
        /// For how long it is overdue.
        late_s: u64,
    },
    /// Another machine has the same name.
    #[error(
        "another machine of the same name '{0}' has this slot: give each host of the group a name of its own (host = \"NAME\" in fleet.toml); if this machine's id was changed, `hebe fleet unlock {0} --yes` frees the slot"
    )]
    SameName(String),
    /// Another order on this host.
    #[error(
        "another order on this host holds its slot, which is given up soon after that order ends"
    )]
    Elsewhere,
    /// This host rebooted under a slot, and nobody released it.
    #[error(
        "this host still has the slot of its last reboot: see why with `hebe fleet release`, which gives it back once every VM answers"
    )]
    Unreleased,
    /// This host's own slot cannot be read.
    #[error(
        "this host has a slot that this Hebe cannot read ({0}): `hebe fleet status` shows it, `hebe fleet unlock HOST --yes` frees it"
    )]
    Unreadable(String),
}

impl Full {
    /// Whether waiting may help without anybody doing anything.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Taken { .. } | Self::Elsewhere)
    }
}

/// Whether `host`, which is `machine`, in boot `boot_id`, may have a slot while
/// the group's slots are these. Of the host's own number and those of all who are under way the
/// smallest counts: hosts that were told differently obey all.
pub fn may_take(
    found: &[Found],
    host: &FleetName,
    machine: &str,
    boot_id: &str,
    at_most: u32,
    now_s: u64,
) -> Take {
    let own = found.iter().find(|f| f.host() == host.as_str());
    match own {
        Some(Found::Unreadable { why, .. }) => return Take::Not(Full::Unreadable(why.clone())),
        Some(Found::Slot(slot)) if slot.machine != machine => {
            return Take::Not(Full::SameName(host.to_string()));
        }
        Some(Found::Slot(slot)) if slot.phase == Phase::Held => return Take::Not(Full::Elsewhere),
        Some(Found::Slot(slot)) if slot.boot_id == boot_id => return Take::Mine(slot.clone()),
        Some(Found::Slot(_)) => return Take::Not(Full::Unreleased),
        None => {}
    }
    let slots = || {
        found.iter().filter_map(|f| match f {
            Found::Slot(slot) => Some(slot),
            Found::Unreadable { .. } => None,
        })
    };
    if let Some(late) = slots().find(|slot| slot.is_overdue(now_s)) {
        return Take::Not(Full::NotBack {
            host: late.host.to_string(),
            late_s: now_s.saturating_sub(late.deadline_s),
        });
    }
    let at_most = slots().map(|slot| slot.at_most).fold(at_most, u32::min);
    if found.len() < at_most as usize {
        return Take::Free;
    }
    Take::Not(Full::Taken {
        hosts: found.iter().map(|f| f.host().to_owned()).collect(),
        at_most,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(host: &str, phase: Phase, deadline_s: u64, at_most: u32) -> Found {
        Found::Slot(Slot {
            version: SLOT_VERSION,
            host: host.parse().expect("name"),
            machine: "machine-1".into(),
            phase,
            claim: "c".into(),
            boot_id: "boot-1".into(),
            since_s: 0,
            deadline_s,
            at_most,
            vms: BTreeSet::new(),
        })
    }

    fn take(found: &[Found], boot: &str, at_most: u32) -> Take {
        let me = "me".parse().expect("name");
        may_take(found, &me, "machine-1", boot, at_most, 1_000)
    }

    #[test]
    fn the_smallest_number_that_anybody_was_told_counts() {
        let others = [slot("b", Phase::Rebooting, 2_000, 3)];
        assert_eq!(take(&others, "boot-1", 2), Take::Free);
        let Take::Not(full) = take(&others, "boot-1", 1) else {
            panic!("one is under way, and one may be");
        };
        assert!(full.to_string().contains("1 of at most 1"), "{full}");
        let strict = [slot("b", Phase::Held, 2_000, 1)];
        let Take::Not(full) = take(&strict, "boot-1", 9) else {
            panic!("the other one was told that it goes alone");
        };
        assert!(full.may_pass());
    }

    #[test]
    fn a_host_that_is_not_back_stops_everybody_else() {
        let late = [slot("b", Phase::Rebooting, 400, 5)];
        let Take::Not(full) = take(&late, "boot-1", 5) else {
            panic!("b is late");
        };
        let text = full.to_string();
        assert!(text.contains("'b' was to be back 10min ago"), "{text}");
        assert!(text.contains("hebe fleet unlock b --yes"), "{text}");
        assert!(!full.may_pass());
        // A lease has no deadline of this kind: it ends by itself.
        let leased = [slot("b", Phase::Held, 400, 5)];
        assert_eq!(take(&leased, "boot-1", 5), Take::Free);
    }

    #[test]
    fn a_host_knows_its_own_slot_again() {
        let own = [slot("me", Phase::Rebooting, 2_000, 1)];
        assert!(matches!(take(&own, "boot-1", 1), Take::Mine(_)));
        assert_eq!(take(&own, "boot-2", 1), Take::Not(Full::Unreleased));
        let leased = [slot("me", Phase::Held, 2_000, 1)];
        assert_eq!(take(&leased, "boot-1", 1), Take::Not(Full::Elsewhere));
    }

    #[test]
    fn another_machine_of_the_same_name_is_not_taken_for_this_one() {
        let me = "me".parse().expect("name");
        for phase in [Phase::Held, Phase::Rebooting, Phase::Verifying] {
            let found = [slot("me", phase, 2_000, 9)];
            for boot in ["boot-1", "boot-2"] {
                let Take::Not(full) = may_take(&found, &me, "machine-2", boot, 9, 1_000) else {
                    panic!("{phase:?} is another machine's");
                };
                let text = full.to_string();
                assert!(text.contains("same name 'me'"), "{text}");
                assert!(!full.may_pass());
            }
        }
    }

    #[test]
    fn what_cannot_be_read_counts() {
        let odd = |host: &str| {
            [Found::Unreadable {
                host: host.into(),
                why: "version 9".into(),
            }]
        };
        assert!(matches!(
            take(&odd("b"), "boot-1", 1),
            Take::Not(Full::Taken { .. })
        ));
        assert_eq!(take(&odd("b"), "boot-1", 2), Take::Free);
        let Take::Not(own) = take(&odd("me"), "boot-1", 9) else {
            panic!("it is there");
        };
        assert!(own.to_string().contains("version 9"));
    }

    #[test]
    fn names_fit_into_keys_and_command_lines() {
        for good in ["a", "node-7.rack_1", "0"] {
            assert!(good.parse::<FleetName>().is_ok(), "{good}");
        }
        let long = "x".repeat(65);
        for bad in ["", "-x", ".", "a/b", "a b", "ä", long.as_str()] {
            assert!(bad.parse::<FleetName>().is_err(), "{bad}");
        }
    }
}
