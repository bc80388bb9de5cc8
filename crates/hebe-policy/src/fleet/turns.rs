//! A roll that is written down: its order, and how far each host is, so that
//! hosts take their turns by themselves and any person can stop them.
//!
//! ```text
//!                 its turn, and a slot        another boot, and the slot was given back
//! waiting ──────────────────────────► away ──────────────────────────────────► done
//!    │ pre-flight says no               │ undone, or it is not known
//!    ▼                                  ▼
//! refused                            failed: the roll stops          skipped: by a person
//! ```
//!
//! Whoever keeps this only has to change it one transaction at a time. A host
//! becomes *away* in the same transaction in which its slot becomes its own for
//! good, under the condition that the roll and its own mark are as they were
//! when its turn was found. From that follows, whatever is answered in whatever
//! order:
//!
//! 1. At most k hosts of the roll are away: a host's turn comes when fewer than
//!    k of those before it are not through, and hosts do not become un-through
//!    without the roll being written.
//! 2. When a roll was paused, stopped or aborted, no host begins any more.
//! 3. A host goes once.
//! 4. A host whose reboot failed, or that is not back in time, stops the roll.
//!
//! Nothing here is decided by a clock but whether a host is late, and then only
//! for the worse.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::slots::{FleetName, Found};
use crate::span::Span;

/// Version of [`Rollout`] and of [`Mark`] as they are written down.
pub const ROLL_VERSION: u32 = 1;
/// Most hosts of a roll: all of it has to fit into one value of etcd.
pub const ROLL_HOSTS_MAX: usize = 1_000;

/// A roll as it was ordered, and whether it goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// [`ROLL_VERSION`].
    pub version: u32,
    /// Random: what is written down of hosts says to which roll it belongs.
    pub id: String,
    /// Who ordered it.
    pub by: String,
    /// When, in seconds since 1970.
    pub began_s: u64,
    /// k.
    pub at_most: u32,
    /// After how long a host counts as not back.
    pub give_up_s: u64,
    /// Into what each host reboots.
    pub reboot: RebootOrder,
    /// Hosts in their order.
    pub hosts: Vec<Place>,
    /// Whether it goes on.
    pub state: RollState,
}

/// Into what a host reboots, and how. What is not said is as `hebe reboot`
/// does it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebootOrder {
    /// The next kernel, a file on each host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Its initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// How VMs get over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Only where this file is there, such as `/run/reboot-required`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_if: Option<String>,
}

/// How VMs get over a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Frozen in memory.
    Warm,
    /// Saved to disk.
    Saved,
    /// Shut down and booted.
    Cold,
}

/// One host of a roll.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Its name.
    pub host: FleetName,
    /// What it contributes.
    pub capacity: f64,
    /// How long it is expected to take, in seconds.
    pub expected_s: u64,
}

/// Whether a roll goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RollState {
    /// It does.
    Running,
    /// A person said not now.
    Paused {
        /// Who.
        by: String,
    },
    /// Something is wrong with a host.
    Stopped {
        /// Which host found it.
        by: String,
        /// In one sentence.
        why: String,
    },
    /// A person said never.
    Aborted {
        /// Who.
        by: String,
    },
}

/// How far one host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// [`ROLL_VERSION`].
    pub version: u32,
    /// To which roll it belongs.
    pub roll: String,
    /// Whose it is.
    pub host: FleetName,
    /// The machine that wrote it, as in a slot.
    pub machine: String,
    /// The boot in which it was written.
    pub boot_id: String,
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// How far.
    pub state: MarkState,
}

/// How far a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", deny_unknown_fields)]
pub enum MarkState {
    /// It could go, and does not yet.
    Waiting {
        /// Why.
        why: String,
    },
    /// It has its slot for good, and reboots.
    Away,
    /// Its new kernel runs, and every VM answers; or there was nothing to do.
    Done {
        /// Why there was nothing to do.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// It does not reboot, and nothing was touched.
    Refused {
        /// Why.
        why: String,
    },
    /// Its reboot was begun and did not come to its end.
    Failed {
        /// Why.
        why: String,
    },
    /// A person passed it over.
    Skipped {
        /// Who.
        by: String,
    },
}

impl MarkState {
    /// Whether the host is through with this roll.
    pub fn is_through(&self) -> bool {
        !matches!(self, Self::Waiting { .. } | Self::Away)
    }

    /// As it is shown.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Away => "away",
            Self::Done { .. } => "done",
            Self::Refused { .. } => "refused",
            Self::Failed { .. } => "failed",
            Self::Skipped { .. } => "skipped",
        }
    }

    /// What there is to say about it.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Waiting { why } | Self::Refused { why } | Self::Failed { why } => Some(why),
            Self::Done { why } => why.as_deref(),
            Self::Skipped { by } => Some(by),
            Self::Away => None,
        }
    }
}

/// A roll and the marks that belong to it, at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The roll.
    pub rollout: Rollout,
    /// By host.
    pub marks: BTreeMap<String, Mark>,
}

/// Whether it is a host's turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may go as soon as it has a slot.
    Go,
    /// Not yet.
    NotYet(String),
    /// It is rebooting, or was.
    Away,
    /// It has nothing to do with this roll, or not any more.
    Never(String),
    /// Something is wrong with a host: the roll has to stop.
    Stop(String),
}

impl View {
    /// How far a host is, if anything is written down.
    pub fn state(&self, host: &FleetName) -> Option<&MarkState> {
        self.marks.get(host.as_str()).map(|mark| &mark.state)
    }

    fn is_through(&self, host: &FleetName) -> bool {
        self.state(host).is_some_and(MarkState::is_through)
    }

    /// Whether nothing more happens by itself.
    pub fn is_over(&self) -> bool {
        let mut hosts = self.rollout.hosts.iter();
        match self.rollout.state {
            RollState::Aborted { .. } => {
                !hosts.any(|place| self.state(&place.host) == Some(&MarkState::Away))
            }
            _ => hosts.all(|place| self.is_through(&place.host)),
        }
    }

    /// Hosts whose turn it is: the first k that are not through.
    pub fn at_turn(&self) -> impl Iterator<Item = &Place> {
        let hosts = self.rollout.hosts.iter();
        hosts
            .filter(|place| !self.is_through(&place.host))
            .take(self.rollout.at_most as usize)
    }

    /// What every host that is not away contributes now.
    pub fn capacity(&self) -> f64 {
        let hosts = self.rollout.hosts.iter();
        hosts
            .filter(|place| self.state(&place.host) != Some(&MarkState::Away))
            .map(|place| place.capacity)
            .sum()
    }

    /// What stops the roll, if anything does; `slots` are those of the group.
    pub fn trouble(&self, slots: &[Found], now_s: u64) -> Option<String> {
        let failed = self.rollout.hosts.iter().find_map(|place| {
            let MarkState::Failed { why } = self.state(&place.host)? else {
                return None;
            };
            Some(format!("the reboot of host '{}' failed: {why}", place.host))
        });
        let late = || {
            slots.iter().find_map(|found| match found {
                Found::Slot(slot) if slot.is_overdue(now_s) => Some(format!(
                    "host '{}' was to be back {} ago and is not",
                    slot.host,
                    Span::seconds(now_s.saturating_sub(slot.deadline_s))
                )),
                _ => None,
            })
        };
        failed.or_else(late)
    }

    /// Whether it is the turn of `me`.
    pub fn turn(&self, slots: &[Found], me: &FleetName, now_s: u64) -> Turn {
        let Some(index) = self.rollout.hosts.iter().position(|p| p.host == *me) else {
            return Turn::Never(format!("host '{me}' is no part of the roll"));
        };
        match self.state(me) {
            Some(MarkState::Away) => return Turn::Away,
            Some(state) if state.is_through() => {
                let text = format!("host '{me}' had its turn: {}", state.as_str());
                return Turn::Never(text);
            }
            _ => {}
        }
        match &self.rollout.state {
            RollState::Running => {}
            RollState::Aborted { by } => return Turn::Never(format!("{by} aborted the roll")),
            RollState::Paused { by } => return Turn::NotYet(format!("{by} paused the roll")),
            RollState::Stopped { by, why } => {
                return Turn::NotYet(format!("'{by}' stopped the roll: {why}"));
            }
        }
        if let Some(why) = self.trouble(slots, now_s) {
            return Turn::Stop(why);
        }
        let before = self.rollout.hosts[..index].iter();
        let before: Vec<&str> = before
            .filter(|place| !self.is_through(&place.host))
            .map(|place| place.host.as_str())
            .collect();
        if before.len() < self.rollout.at_most as usize {
            return Turn::Go;
        }
        Turn::NotYet(format!("{} before it are not through", before.join(", ")))
    }
}

/// What a host that is marked as away can say of itself: `has_slot`, whether it
/// still has its slot; `busy`, whether an order of this boot is at work on it.
pub fn settled(
    mark: &Mark,
    machine: &str,
    boot_id: &str,
    has_slot: bool,
    busy: bool,
) -> Option<MarkState> {
    if mark.state != MarkState::Away || mark.machine != machine || has_slot {
        return None;
    }
    // The new kernel gave the slot back after every VM answered, or a person
    // freed it.
    if mark.boot_id != boot_id {
        return Some(MarkState::Done { why: None });
    }
    (!busy).then(|| MarkState::Failed {
        why: "it was begun and did not happen, and nobody saw why".to_owned(),
    })
}

/// What a person wants of a roll.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// That no further host begins for now.
    Pause,
    /// That it goes on.
    Continue,
    /// That no further host begins, ever.
    Abort,
    /// That it does not wait for this host.
    Skip(FleetName),
    /// That this host has its turn once more.
    Retry(FleetName),
}

/// What comes of a wish: the roll is written anew in any case, so that whoever
/// decided from the old one begins nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Granted {
    /// The roll from now on.
    pub rollout: Rollout,
    /// A host's mark from now on; `Some((host, None))` takes it away.
    pub mark: Option<(FleetName, Option<MarkState>)>,
}

/// Why a wish is not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// There is nothing to continue.
    #[error("the roll is over: `hebe fleet roll FILE` begins another one")]
    Over,
    /// It runs.
    #[error("the roll is running")]
    Running,
    /// It would stop again.
    #[error(
        "{0}: look after the host, then say `hebe fleet roll retry HOST` or `hebe fleet roll skip HOST`, and `hebe fleet unlock HOST --yes` if it keeps a slot that it cannot release"
    )]
    Trouble(String),
    /// No such host.
    #[error("host '{0}' is no part of the roll")]
    NoPart(FleetName),
    /// It is between two kernels, or may be.
    #[error(
        "host '{0}' is under way and has its slot: wait for it, or free the slot first, with `hebe fleet unlock {0} --yes`"
    )]
    UnderWay(FleetName),
    /// Nothing to do again.
    #[error("host '{0}' has not had its turn yet")]
    NotYet(FleetName),
    /// Nothing to pass over.
    #[error("host '{0}' had its turn")]
    Had(FleetName),
}

/// Grants what `by` wishes, or says why not.
///
/// # Errors
/// When that makes no sense where the roll is.
pub fn grant(
    view: &View,
    slots: &[Found],
    wish: Wish,
    by: &str,
    now_s: u64,
) -> Result<Granted, Denied> {
    let mut rollout = view.rollout.clone();
    let aborted = matches!(rollout.state, RollState::Aborted { .. });
    if aborted || (view.is_over() && !matches!(wish, Wish::Retry(_))) {
        return Err(Denied::Over);
    }
    let by = by.to_owned();
    let mut mark = None;
    match wish {
        Wish::Pause => rollout.state = RollState::Paused { by },
        Wish::Abort => rollout.state = RollState::Aborted { by },
        Wish::Continue => {
            if rollout.state == RollState::Running {
                return Err(Denied::Running);
            }
            if let Some(why) = view.trouble(slots, now_s) {
                return Err(Denied::Trouble(why));
            }
            rollout.state = RollState::Running;
        }
        Wish::Skip(host) => match passable(view, slots, &host)? {
            Some(MarkState::Done { .. } | MarkState::Skipped { .. }) => {
                return Err(Denied::Had(host));
            }
            _ => mark = Some((host, Some(MarkState::Skipped { by }))),
        },
        Wish::Retry(host) => match passable(view, slots, &host)? {
            None | Some(MarkState::Waiting { .. }) => return Err(Denied::NotYet(host)),
            _ => mark = Some((host, None)),
        },
    }
    Ok(Granted { rollout, mark })
}

/// How far a host is, unless it may be between two kernels.
fn passable<'a>(
    view: &'a View,
    slots: &[Found],
    host: &FleetName,
) -> Result<Option<&'a MarkState>, Denied> {
    if !view.rollout.hosts.iter().any(|place| place.host == *host) {
        return Err(Denied::NoPart(host.clone()));
    }
    let state = view.state(host);
    let has_slot = slots.iter().any(|found| found.host() == host.as_str());
    if state == Some(&MarkState::Away) && has_slot {
        return Err(Denied::UnderWay(host.clone()));
    }
    Ok(state)
}

#[cfg(test)]
#[path = "turns_tests.rs"]
mod tests;
